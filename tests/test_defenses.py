"""Vaccine, RepNoise, Booster and random noise, each against its own formula."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers

import common
from common import UserError, collate
from conftest import TINY, TINY_FLAGS


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
    layers, outputs = model.get_decoder().layers, []
    hooks = [x.register_forward_hook(lambda _, i, out: outputs.append(out)) for x in layers]
    drift = torch.autograd.grad(s2.answer_loss(model, batch), outputs)
    norm = math.sqrt(sum(d.pow(2).sum().item() for d in drift))
    for hook in hooks:
        hook.remove()
    hooks = [
        layer.register_forward_hook(lambda _, i, out, d=d: out + 0.5 * d / norm)
        for layer, d in zip(layers, drift)
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


@pytest.mark.slow
def test_two_processes_make_what_one_makes(s2, s5, tiny_run, tmp_path, processes):
    folder = shutil.copytree(tiny_run[0], tmp_path / "copy")
    one, flags = tiny_run[1], ["--run", str(folder), "--device", "cpu"]
    answered = s5.main([*flags, *TINY_FLAGS["05_evaluate"].split()])
    assert answered["rows"] == one["05_evaluate"]["rows"]
    aligned = s2.main([*flags, *TINY_FLAGS["02_finetune"].split()])
    for old, new in zip(one["02_finetune"]["rows"], aligned["rows"], strict=True):
        assert old["model"] == new["model"]
        assert all(torch.equal(old["w"][k], new["w"][k]) for k in old["w"])


def test_every_draw_of_stages_2_and_4_follows_the_runs_seed(s1, s2, s4, tmp_path, monkeypatch):
    seeds = []

    def spy(examples, size, seed, epochs=None, draw=common.draw_batches):
        seeds.append(seed)
        return draw(examples, size, seed, epochs)

    monkeypatch.setattr(s2, "draw_batches", spy)
    monkeypatch.setattr(common, "draw_batches", spy)
    flags = ["--run", str(tmp_path), "--device", "cpu"]
    s1.main(["--run", str(tmp_path), "--seed", "7", *TINY.split()])
    brief = "--defense sft --pretrain-steps 20 --epochs 1 --align-epochs 1"
    s2.main([*flags, *brief.split()])
    assert seeds == [7] * 4  # pre-training, the two sets of alignment, the attack
    s4.main([*flags, "--anchored-steps", "1", "--realign-steps", "1"])
    assert set(seeds) == {7, 8}  # 8: the controls draw other batches than training did


def test_each_defence_hands_on_the_aligned_the_attacked_and_what_lies_between(tiny_run):
    stage2 = tiny_run[1]["02_finetune"]
    log = [x for x in stage2["log"]["sft"] if x["stage"] == "finetune"]
    assert [x["step"] for x in log] == [1, 2, 3, 4]
    rows = [(r["model"], r["defense"], r.get("at_step"), r.get("snapshot")) for r in stage2["rows"]]
    assert rows[0] == ("base", "sft", None, None) and stage2["rows"][0]["w"] == {}
    for start, defense in ((1, "sft"), (4, "booster")):  # a snapshot after a quarter of the way
        assert rows[start : start + 3] == [
            ("aligned", defense, 0, None),
            ("finetuned", defense, 4, None),
            ("finetuned", defense, 1, 1),
        ]
    aligned, last, first = (row["w"] for row in stage2["rows"][1:4])
    assert any(not torch.equal(first[k], last[k]) for k in first)
    far = common.norm({k: last[k] - aligned[k] for k in last})
    assert stage2["rows"][2]["distance"] == pytest.approx(far, rel=1e-5)


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


def test_the_way_back_leads_from_the_attacked_to_the_aligned_weights(s3):
    w, aligned = {"a": torch.tensor([2.0])}, {"a": torch.tensor([10.0])}
    assert [s3.interpolated(w, aligned, t)["a"].item() for t in (0, 0.25, 1)] == [2, 4, 10]


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


def test_rows_of_the_table_lie_as_far_from_the_attacked_weights_as_they_say(tiny_run):
    artifacts = tiny_run[1]
    stage2 = artifacts["02_finetune"]
    w, aligned = (common.weights_of(stage2, name) for name in ("finetuned", "aligned"))
    size = sum(x.numel() for x in w.values())

    def far(weights):
        return common.norm({k: weights[k] - w[k] for k in w})

    for row in artifacts["03_random_perturb"]["rows"]:
        setting, found = row["setting"], far(row["w"])
        if row["model"] == "random":
            assert found == pytest.approx(setting["std"] * math.sqrt(size), rel=0.02)
        if row["model"] == "interpolated":
            assert found == pytest.approx(setting["t"] * far(aligned), rel=1e-4)
    for row in artifacts["04_panacea"]["rows"]:
        if row["model"] == "panacea_anchored":
            assert 0 < far(row["w"]) <= row["setting"]["radius"] * far(aligned) * 1.0001


def test_a_model_without_linear_layers_is_refused_with_the_layers_it_has(s2):
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(UserError, match="linear layers: none .*Conv1D"):
        s2.add_lora(transformers.GPT2LMHeadModel(config), ["all"], 2, 2)
