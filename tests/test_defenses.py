"""Vaccine, RepNoise, Booster and random noise, each against its own formula."""

import functools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from common import UserError, collate
from conftest import TINY_FLAGS

BRIEF = "--device cpu --pretrain-steps 20 --epochs 1 --align-epochs 1".split()


@pytest.fixture()
def setting(s2):
    """(model, w as a list, alignment batch, harmful batch) with an adapter that is not zero."""
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = list(s2.add_lora(model, ["all"], 2, 2).values())
    with torch.no_grad():
        for p in w:
            p.add_(0.05 * torch.randn_like(p))
    ids = torch.randint(4, 50, (6, 8)).tolist()
    rows = [(x, [-100] * 3 + x[3:]) for x in ids]
    return model, w, collate(rows[:3], 0, "cpu"), collate(rows[3:], 0, "cpu")


def close(a, b, atol=1e-5):
    """All pairs of tensors close."""
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a, b, strict=True))


def test_sft_is_the_gradient_of_a(s2, setting):
    model, w, batch, harmful = setting
    grads, loss = s2.sft_rule(model, w, batch)
    f = s2.answer_loss(model, batch)
    assert loss == {"loss": f.item()} and close(grads, torch.autograd.grad(f, w))


def test_vaccine_moves_every_layer_by_one_global_norm(s2, setting):
    model, w, batch, harmful = setting
    layers = model.get_decoder().layers
    outputs, shifts = [], []

    def record(_, inputs, out):
        outputs.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(record) for layer in layers]
    drift = torch.autograd.grad(s2.answer_loss(model, batch), outputs)
    for hook in hooks:
        hook.remove()
    norm = math.sqrt(sum(d.pow(2).sum().item() for d in drift))
    shifts = [0.5 * d / norm for d in drift]
    assert math.sqrt(sum(s.pow(2).sum().item() for s in shifts)) == pytest.approx(0.5, rel=1e-5)
    hooks = [
        layer.register_forward_hook(lambda _, i, out, s=s: out + s)
        for layer, s in zip(layers, shifts)
    ]
    wanted = torch.autograd.grad(s2.answer_loss(model, batch), w)
    for hook in hooks:
        hook.remove()
    grads, loss = s2.vaccine_rule(model, w, batch, harmful, {"vaccine_rho": 0.5})
    assert close(grads, wanted) and loss["loss"] > s2.answer_loss(model, batch).item()
    assert not close(grads, s2.sft_rule(model, w, batch)[0])


@pytest.mark.parametrize("rule", ["vaccine", "repnoise", "booster"])
def test_a_vaccine_works_on_a_bfloat16_base(rule, s2):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).to(torch.bfloat16).eval()
    w = list(s2.add_lora(model, ["all"], 2, 2).values())
    batch = collate([([1, 5, 6, 7, 8], [-100, -100, 6, 7, 8])] * 2, 0, "cpu")
    c = {"vaccine_rho": 1.0, "repnoise_alpha": 1.0, "repnoise_beta": 1.0, "booster_lam": 1.0}
    grads, _ = s2.RULES[rule](model, w, batch, batch, {**c, "booster_alpha": 0.1})
    assert {x.dtype for x in grads} == {torch.float32}
    assert all(x.isfinite().all() for x in grads) and any(x.any() for x in grads)


def test_booster_is_its_formula(s2, setting):
    model, w, batch, harmful = setting
    start = [p.detach().clone() for p in w]
    c = {"booster_lam": 3.0, "booster_alpha": 0.2}
    grads, _ = s2.booster_rule(model, w, batch, harmful, c)
    assert all(torch.equal(p, q) for p, q in zip(w, start))
    grad_f, grad_h = (torch.autograd.grad(s2.answer_loss(model, b), w) for b in (batch, harmful))
    norm = math.sqrt(sum(x.pow(2).sum().item() for x in grad_h))
    with torch.no_grad():
        for p, x in zip(w, grad_h):
            p.sub_(0.2 * x / norm)  # downhill on h: what a harmful step would do
    grad_step = torch.autograd.grad(s2.answer_loss(model, harmful), w)
    assert close(grads, [f + 3.0 * (h - s) for f, h, s in zip(grad_f, grad_h, grad_step)], 1e-4)


def test_repnoise_without_its_terms_is_sft_and_each_term_adds_its_own(s2, setting):
    model, w, batch, harmful = setting

    def grads(alpha, beta):
        torch.manual_seed(7)
        return s2.repnoise_rule(
            model, w, batch, harmful, {"repnoise_alpha": alpha, "repnoise_beta": beta}
        )[0]

    assert close(grads(0.0, 0.0), s2.sft_rule(model, w, batch)[0])
    out = model(input_ids=harmful["input_ids"], output_hidden_states=True)
    labels = harmful["labels"][:, 1:].flatten()
    losses = []
    for i, h in enumerate(out.hidden_states):
        h = h if i == 4 else model.model.norm(h)
        losses.append(F.cross_entropy(model.lm_head(h)[:, :-1].flatten(0, 1), labels))
    total = s2.answer_loss(model, batch) - 0.3 * torch.log(1 + sum(losses) / 5)
    assert close(grads(0.3, 0.0), torch.autograd.grad(total, w), 1e-4)
    assert not close(grads(0.0, 0.5), grads(0.0, 0.0))


def test_a_defence_is_the_same_alone_as_after_another(s2, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run[0], tmp_path / "copy")
    after = tiny_run[1]["02_finetune"]  # sft, then booster
    flags = TINY_FLAGS["02_finetune"].replace("sft booster", "booster").split()
    alone = s2.main(["--run", str(folder), "--device", "cpu", *flags])
    for kind in ("aligned", "finetuned"):
        first, second = after[kind]["booster"], alone[kind]["booster"]
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert not all(torch.equal(first[k], after[kind]["sft"][k]) for k in first)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(s2, s5, tiny_run, tmp_path, processes):
    folder = shutil.copytree(tiny_run[0], tmp_path / "copy")
    one, flags = tiny_run[1], ["--run", str(folder), "--device", "cpu"]
    answered = s5.main([*flags, *TINY_FLAGS["05_evaluate"].split()])
    assert answered["rows"] == one["05_evaluate"]["rows"]
    aligned = s2.main([*flags, *TINY_FLAGS["02_finetune"].split()])
    for kind in ("aligned", "finetuned"):
        for name, old in one["02_finetune"][kind].items():
            assert all(torch.equal(old[k], aligned[kind][name][k]) for k in old)


def test_every_draw_of_stages_2_and_4_follows_the_runs_seed(s1, s2, s4, tmp_path, monkeypatch):
    import common

    seeds = []

    def spy(examples, size, seed, epochs=None, draw=common.draw_batches):
        seeds.append(seed)
        return draw(examples, size, seed, epochs)

    monkeypatch.setattr(s2, "draw_batches", spy)
    monkeypatch.setattr(common, "draw_batches", spy)
    flags = ["--run", str(tmp_path), "--device", "cpu"]
    sizes = "--n-align 20 --n-finetune 20 --n-harmful 10 --n-test 10".split()
    s1.main(["--run", str(tmp_path), "--seed", "7", *sizes])
    s2.main(["--run", str(tmp_path), *BRIEF, "--defense", "sft"])
    assert seeds == [7] * 3  # pre-training, alignment, the attack
    s4.main([*flags, "--anchored-steps", "1", "--realign-steps", "1"])
    assert set(seeds) == {7, 8}  # 8: the controls draw other batches than training did


def test_the_held_out_loss_is_a_mean_over_rows(s2, setting):
    model, w, batch, harmful = setting
    rows = [
        (ids.tolist(), labels.tolist())
        for ids, labels in zip(harmful["input_ids"], harmful["labels"])
    ]
    alone = [s2.answer_loss(model, collate([row], 0, "cpu")).item() for row in rows]
    assert s2.mean_loss(model, rows, 0, "cpu", size=2) == pytest.approx(sum(alone) / 3, rel=1e-5)


def test_the_attack_keeps_snapshots_and_the_held_out_loss(tiny_run):
    stage2 = tiny_run[1]["02_finetune"]
    assert set(stage2["finetuned"]) == {"sft", "booster"}
    log = [x for x in stage2["log"]["sft"] if x["stage"] == "finetune"]
    assert [x["step"] for x in log] == [0, 1, 2, 3, 4]
    assert [x["step"] for x in log if "h" in x] == [0, 1, 4]  # both ends, and a quarter of the way
    assert list(stage2["snapshots"]["sft"]) == ["1"]
    first, last = stage2["snapshots"]["sft"]["1"], stage2["finetuned"]["sft"]
    assert any(not torch.equal(first[k], last[k]) for k in first)


def test_mmd_is_zero_for_equal_samples_and_grows_with_distance(s2):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    near, far = s2.mmd(x, torch.randn(64, 4)), s2.mmd(x, torch.randn(64, 4) + 3)
    assert s2.mmd(x, x).abs() < 1e-6 and 0 < near < far


def test_noise_has_the_strength_it_says_and_follows_the_seed(s3):
    w = {"a": torch.zeros(300, 200), "b": torch.zeros(500)}
    z, again, other = (s3.gaussian_like(w, seed) for seed in (1, 1, 2))
    assert all(torch.equal(z[k], again[k]) and not torch.equal(z[k], other[k]) for k in w)
    assert z["a"].std().item() == pytest.approx(1, abs=0.02)
    u = s3.unit(z)
    assert sum(x.pow(2).sum().item() for x in u.values()) == pytest.approx(1, rel=1e-5)
    assert torch.allclose(u["b"] / u["a"][0, 0], z["b"] / z["a"][0, 0])  # one norm: same direction


def test_antidote_prunes_what_harm_uses_most(s3):
    w = {"a": torch.tensor([[1.0, -3.0], [2.0, 0.5]])}
    pruned = s3.antidote(w, {"a": torch.tensor([10.0, 1.0])}, 0.5)  # scores 10 3 / 20 0.5
    assert torch.equal(pruned["a"], torch.tensor([[0.0, -3.0], [0.0, 0.5]]))


def test_input_norms_are_those_of_what_enters_a_and_b(s2, s3):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    shapes = s2.copy_of(s2.add_lora(s2.toy_model("toy-llama", 50), ["q_proj"], 2, 2))
    w = {name: 0.1 * torch.randn(x.shape) for name, x in shapes.items()}
    seen = []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    examples = [([1, 5, 6, 7], None), ([1, 9], None)]
    norms = s3.input_norms(model, w, 1.0, examples)
    handle.remove()
    x = torch.cat(seen)  # (6 tokens, in)
    name = "model.layers.0.self_attn.q_proj.lora_"
    assert torch.allclose(norms[name + "A"], x.norm(dim=0), rtol=1e-4)
    assert torch.allclose(norms[name + "B"], (x @ w[name + "A"].T).norm(dim=0), rtol=1e-4)


def test_rows_of_the_table_lie_as_far_from_the_attacked_weights_as_they_say(tiny_run, s5):
    artifacts = tiny_run[1]
    w, aligned = (artifacts["02_finetune"][k]["sft"] for k in ("finetuned", "aligned"))
    size = sum(x.numel() for x in w.values())

    def far(weights):
        return math.sqrt(sum((weights[k] - w[k]).pow(2).sum().item() for k in w))

    for repair in artifacts["03_random_perturb"]["repairs"]:
        setting, found = repair["setting"], far(repair["weights"])
        if repair["model"] == "random":
            assert found == pytest.approx(setting["std"] * math.sqrt(size), rel=0.02)
        if repair["model"] == "interpolated":
            assert found == pytest.approx(setting["t"] * far(aligned), rel=1e-4)
    for repair in artifacts["04_panacea"]["repairs"]:
        if repair["model"] == "panacea_anchored":
            assert 0 < far(repair["weights"]) <= repair["setting"]["radius"] * far(aligned) * 1.0001


def arch(name, **more):
    """A tiny causal LM of any architecture, at random weights."""
    import transformers

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = getattr(transformers, name + "Config")(vocab_size=60, **{**sizes, **more})
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, name + "ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, head)(config).eval()


def test_a_model_without_linear_layers_is_refused_with_those_it_has(s2):
    with pytest.raises(UserError, match="linear layers: none .*Conv1D"):
        s2.add_lora(arch("GPT2", n_embd=32, n_layer=1, n_head=2), ["all"], 2, 2)


def tried(s2, tiny_data, model, **c):
    """try_model on a model, with the tiny data's rows in the toy's tokens."""
    data = torch.load(tiny_data / "01_data.pt", weights_only=True)
    tokenizer = s2.toy_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *data["vocab"][4:60]])
    tokenizer.padding_side = "left"
    model.generation_config.eos_token_id = [2]
    model.generation_config.pad_token_id = 0
    c = {**data["config"], "defense": ["sft"], "targets": ["all"], "r": 2, "alpha": 2.0, **c}
    c["gradient_checkpointing"] = False
    w, examples = s2.adapt(model, tokenizer, data, c)
    s2.try_model(model, tokenizer, w, examples, data, c)


def test_a_model_that_works_passes_the_trial(s2, tiny_data, capsys):
    tried(s2, tiny_data, arch("Llama"))
    assert "no adapter" not in capsys.readouterr().out


def test_a_context_shorter_than_the_samples_is_refused(s2, tiny_data):
    with pytest.raises(UserError, match="context of 64 tokens, shorter than --max-length 96"):
        tried(s2, tiny_data, arch("Llama", max_position_embeddings=64))


def test_layers_whose_weights_are_read_directly_are_refused_before_training(s2, tiny_data):
    model = arch("Llama")
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, m=layer.mlp: (
            x @ m.up_proj.base.weight.T @ (m.down_proj.base.weight.T)
        )
    with pytest.raises(UserError, match="cannot be trained here with sft"):
        tried(s2, tiny_data, model)


def test_a_model_that_sees_the_padding_is_refused(s2, tiny_data):
    model = arch("Llama")
    plain = model.forward

    @functools.wraps(plain)  # generate reads the signature
    def forward(*args, **kwargs):
        out, mask = plain(*args, **kwargs), kwargs.get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum())
        out.logits = out.logits.roll(padding, -1)  # padding anywhere changes every word
        return out

    model.forward = forward
    with pytest.raises(UserError, match="answers a prompt differently beside another one"):
        tried(s2, tiny_data, model)


def test_experts_that_get_no_adapter_are_said(s2, tiny_data, capsys):
    more = dict(num_local_experts=2, num_experts_per_tok=2, num_key_value_heads=2)
    tried(s2, tiny_data, arch("Mixtral", **more))
    assert "% of the layers' weights get no adapter: " in capsys.readouterr().out
