"""Vaccine, RepNoise, Booster and random noise, each against its own formula."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import stage

from common import collate


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


def test_sft_is_the_gradient_of_f(s2, setting):
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


def test_a_defence_is_the_same_alone_as_after_the_others(s2, tiny_data):
    flags = [
        "--run",
        str(tiny_data),
        "--device",
        "cpu",
        "--pretrain-steps",
        "20",
        "--epochs",
        "1",
        "--align-epochs",
        "1",
    ]
    after = s2.main([*flags, "--defense", "sft", "repnoise"])
    alone = s2.main([*flags, "--defense", "repnoise"])
    for kind in ("aligned", "finetuned"):
        first, second = after[kind]["repnoise"], alone[kind]["repnoise"]
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert not all(torch.equal(first[k], after[kind]["sft"][k]) for k in first)


def test_every_draw_of_stages_2_and_4_follows_the_runs_seed(s1, s2, s4, tmp_path, monkeypatch):
    seeds = []
    for module in (s2, s4):

        def spy(examples, size, seed, epochs=None, draw=module.draw_batches):
            seeds.append(seed)
            return draw(examples, size, seed, epochs)

        monkeypatch.setattr(module, "draw_batches", spy)
    flags = ["--run", str(tmp_path), "--device", "cpu"]
    s1.main(
        [
            *flags,
            "--seed",
            "7",
            "--n-align",
            "20",
            "--n-finetune",
            "20",
            "--n-harmful",
            "10",
            "--n-test",
            "10",
        ]
    )
    s2.main(
        [
            *flags,
            "--pretrain-steps",
            "20",
            "--defense",
            "sft",
            "--align-epochs",
            "1",
            "--epochs",
            "1",
        ]
    )
    s4.main([*flags, "--anchored", "a:0.2:1", "hag:0.2:1"])
    assert set(seeds) == {7, 8}  # 8: the controls draw other batches than training did
    assert seeds[:3] == [7] * 3  # pre-training, alignment, the attack


def test_the_held_out_loss_is_a_mean_over_rows(s2, setting):
    model, w, batch, harmful = setting
    rows = [
        (ids.tolist(), labels.tolist())
        for ids, labels in zip(harmful["input_ids"], harmful["labels"])
    ]
    alone = [s2.answer_loss(model, collate([row], 0, "cpu")).item() for row in rows]
    assert s2.mean_loss(model, rows, 0, "cpu", size=2) == pytest.approx(sum(alone) / 3, rel=1e-5)


def test_all_defences_run_to_the_table_and_the_picture(tiny_data, monkeypatch, capsys):
    flags = ["--run", str(tiny_data), "--device", "cpu"]
    stage2 = stage("02_finetune").main(
        [
            *flags,
            "--pretrain-steps",
            "20",
            "--align-epochs",
            "1",
            "--epochs",
            "2",
            "--snapshots",
            "2",
        ]
    )
    assert set(stage2["finetuned"]) == {"sft", "vaccine", "repnoise", "booster"}
    steps = stage2["log"]["sft"][-1]["step"]
    assert steps == 4 and list(stage2["snapshots"]["sft"]) == ["1"]  # a quarter of the way
    stage("03_random_perturb").main([*flags, "--std", "0.1"])
    stage("04_panacea").main([*flags, "--anchored", "a:0.2:1", "hag:0.2:1"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = stage("05_evaluate").main([*flags, "--scale", "1", "--max-new-tokens", "3"])["rows"]
    assert len({(r["model"], r["defense"], str(r["setting"])) for r in rows}) == len(rows) == 27
    out = capsys.readouterr().out
    assert "pip install matplotlib" in out and "finetuned booster" in out
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    stage("05_evaluate").draw(
        [{"rows": rows, "model": "toy-llama", "task": "sst2"}] * 2, tiny_data / "picture.png"
    )
    assert (tiny_data / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_mmd_is_zero_for_equal_samples_and_grows_with_distance(s2):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    near, far = s2.mmd(x, torch.randn(64, 4)), s2.mmd(x, torch.randn(64, 4) + 3)
    assert s2.mmd(x, x).abs() < 1e-6 and 0 < near < far


def test_noise_has_the_strength_it_says_and_follows_the_seed():
    from conftest import stage

    s3 = stage("03_random_perturb")
    w = {"a": torch.zeros(300, 200), "b": torch.zeros(500)}
    z, again, other = (s3.gaussian_like(w, seed) for seed in (1, 1, 2))
    assert all(torch.equal(z[k], again[k]) and not torch.equal(z[k], other[k]) for k in w)
    assert z["a"].std().item() == pytest.approx(1, abs=0.02)
    u = s3.unit(z)
    assert sum(x.pow(2).sum().item() for x in u.values()) == pytest.approx(1, rel=1e-5)
    assert torch.allclose(u["b"] / u["a"][0, 0], z["b"] / z["a"][0, 0])  # one norm: same direction


def test_random_rows_carry_the_stated_noise(story, s5):
    _, artifacts = story
    w = artifacts["02_finetune"]["finetuned"]["sft"]
    rows = list(
        s5.adapters(
            artifacts["02_finetune"], artifacts["03_random_perturb"], artifacts["04_panacea"], [1.0]
        )
    )
    size = sum(x.numel() for x in w.values())
    aligned = artifacts["02_finetune"]["aligned"]["sft"]
    unit = math.sqrt(sum((aligned[k] - w[k]).pow(2).sum().item() for k in w))
    for model, _, setting, weights in rows:
        if model == "base":
            continue
        distance = math.sqrt(sum((weights[k] - w[k]).pow(2).sum().item() for k in w))
        if model == "random":
            assert distance == pytest.approx(setting["std"] * math.sqrt(size), rel=0.02)
        if model in ("random_matched", "one_shot"):
            assert distance == pytest.approx(setting["rho"], rel=1e-4)
        if model == "interpolated":
            assert distance == pytest.approx(setting["t"] * unit, rel=1e-4)
        if model == "panacea_anchored":
            assert 0 < distance <= setting["radius"] * unit * (1 + 1e-4)
