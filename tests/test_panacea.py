"""Equations 1 to 3 against closed forms, finite differences and their mutants."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from checks import check_panacea_rule, check_perturbation, check_restores_exactly
from safetensors.torch import load_file

import common
from common import UserError, collate

SOURCE = Path(__file__).resolve().parent.parent / "04_panacea.py"


def test_eq2_matches_its_closed_form(s4):
    check_perturbation(s4.perturbation)


def test_eq3_matches_its_closed_form_and_restores_w(s4):
    check_panacea_rule(s4.panacea_rule)


def test_perturbed_restores_bits_even_when_the_body_raises(s4):
    check_restores_exactly(s4.perturbed)


MUTANTS = {
    "wrong sign of lam": ("x - lam * (y_eps - y)", "x + lam * (y_eps - y)"),
    "missing grad h(w)": ("x - lam * (y_eps - y)", "x - lam * y_eps"),
    "no restore": ("x.copy_(old)", "pass"),
    "restore by subtraction": (
        "for x, old in zip(w, saved):\n                x.copy_(old)",
        "for x, e in zip(w, eps):\n                x.sub_(e)",
    ),
    "descent for ascent": ("[rho * x / norm for x in grad_h]", "[-rho * x / norm for x in grad_h]"),
    "per-tensor norm": ("[rho * x / norm for x in grad_h]", "[rho * x / x.norm() for x in grad_h]"),
    "no normalisation": ("[rho * x / norm for x in grad_h]", "[rho * x for x in grad_h]"),
    "restore without finally": (
        "    try:\n        with torch.no_grad():\n            for x, e in",
        "    if True:\n        with torch.no_grad():\n            for x, e in",
    ),
    "eps aliases the gradient": (
        "[rho * x / norm for x in grad_h]",
        "[x.mul_(rho / norm) for x in grad_h]",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_stage_4_dies(name):
    old, new = MUTANTS[name]
    source = SOURCE.read_text()
    assert source.count(old) == 1, f"the line that mutant {name!r} changes is gone"
    source = source.replace(old, new)
    if name == "restore without finally":
        source = source.replace("        yield\n    finally:", "        yield\n    if True:", 1)
    mutant = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), mutant.__dict__)
    with pytest.raises(AssertionError):
        check_perturbation(mutant.perturbation)
        check_panacea_rule(mutant.panacea_rule)
        check_restores_exactly(mutant.perturbed)


class Net(torch.nn.Module):
    """A small float64 network; a batch is (inputs, targets)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(5, 7).double(), torch.nn.Linear(7, 3).double()

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.b(torch.tanh(self.a(x))), y)


@pytest.fixture()
def net():
    """(network, its weights, user batch, harmful batch)."""
    net, generator = Net(), torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(6, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(2)
    ]
    return net, list(net.parameters()), *batches


def test_eq3_is_the_gradient_of_eq1_by_finite_differences(s4, net):
    model, w, user, harmful = net
    lam, rho = 0.4, 0.3
    grads, eps, _ = s4.panacea_rule(model.loss, w, user, harmful, rho, lam)

    def objective():  # minus Eq. 1 at fixed eps: what Eq. 3 descends
        with torch.no_grad():
            g, h = model.loss(user), model.loss(harmful)
            with s4.perturbed(w, eps):
                return g - lam * (model.loss(harmful) - h)

    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in w]
        t = 1e-6
        with s4.perturbed(w, [t * d for d in direction]):
            up = objective()
        with s4.perturbed(w, [-t * d for d in direction]):
            down = objective()
        slope = sum((x * d).sum() for x, d in zip(grads, direction))
        assert abs((up - down) / (2 * t) - slope) < 1e-7


def test_eps_raises_h_more_than_random_directions_of_the_same_norm(s4, net):
    model, w, _, harmful = net
    grad_h, h = s4.gradient(model.loss, w, harmful)

    def h_at(eps):
        with torch.no_grad(), s4.perturbed(w, eps):
            return model.loss(harmful).item()

    best = h_at(s4.perturbation(grad_h, 0.2))
    generator = torch.Generator().manual_seed(3)
    draws = [
        s4.perturbation([torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in w], 0.2)
        for _ in range(50)
    ]
    assert best > h and best > max(map(h_at, draws))


def test_h_is_taken_twice_on_the_same_harmful_batch(s4, net):
    model, w, user, harmful = net
    seen = []

    def loss(batch):
        seen.append(batch)
        return model.loss(batch)

    s4.panacea_rule(loss, w, user, harmful, 0.1, 0.1)
    assert [x is user for x in seen] == [True, False, False] and seen[1] is seen[2]


def test_w_is_restored_when_the_second_loss_raises(s4, net):
    model, w, user, harmful = net
    start, calls = [x.detach().clone() for x in w], itertools.count()

    def loss(batch):
        if next(calls) == 2:
            raise RuntimeError("out of memory, say")
        return model.loss(batch)

    with pytest.raises(RuntimeError):
        s4.panacea_rule(loss, w, user, harmful, 0.1, 0.1)
    assert all(torch.equal(x, y) for x, y in zip(w, start))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_harmful_gradient_without_direction_is_an_error(s4, value):
    with pytest.raises(UserError, match="harmful gradient"):
        s4.perturbation([torch.full((3,), value)], 1.0)


def test_anchored_eps_stays_in_the_ball_and_brings_the_anchor_down(s4, net):
    model, w, user, harmful = net
    generator = torch.Generator().manual_seed(4)
    anchor = (
        torch.randn(6, 5, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (6,), generator=generator),
    )
    start = [x.detach().clone() for x in w]
    draws = itertools.repeat((harmful, anchor, user))
    eps = s4.climb(model.loss, w, draws, [1.0, -3.0, -1.0], 0.5, 8)
    assert all(torch.equal(x, y) for x, y in zip(w, start))
    assert s4.global_norm(eps) <= 0.5 * (1 + 1e-9)
    before = model.loss(anchor).item()
    with s4.perturbed(w, eps):
        assert model.loss(anchor).item() < before


def test_one_step_of_a_climb_is_eq2_on_the_combined_loss(s4, net):
    model, w, user, harmful = net
    grad_h, grad_g = (s4.gradient(model.loss, w, b)[0] for b in (harmful, user))
    draws = itertools.repeat((harmful, harmful, user))
    eps = s4.climb(model.loss, w, draws, [1.0, -0.25, -1.0], 0.5, 1)
    wanted = s4.perturbation([0.75 * h - g for h, g in zip(grad_h, grad_g)], 0.5)
    assert all(torch.allclose(x, y) for x, y in zip(eps, wanted))


def test_the_steps_of_a_climb_add_up_and_each_looks_from_w_plus_eps(s4, net):
    model, w, user, harmful = net
    weights, rho = [1.0, -0.25, -1.0], 0.5

    def climb(draw):
        return sum(c * model.loss(batch) for c, batch in zip(weights, draw))

    draws = [(harmful, user, user), (user, harmful, user), (harmful, harmful, user)]
    eps = [torch.zeros_like(x) for x in w]
    for draw, length in zip(draws, (5 * rho * k / 12 for k in (3, 2, 1))):  # 2.5 rho in all
        with s4.perturbed(w, eps):
            grads = torch.autograd.grad(climb(draw), w)
        norm = torch.sqrt(sum(x.pow(2).sum() for x in grads))
        eps = [e + length * x / norm for e, x in zip(eps, grads)]
        size = torch.sqrt(sum(e.pow(2).sum() for e in eps))
        eps = [e * min(1.0, rho / size) for e in eps]
    found = s4.climb(model.loss, w, iter(draws), weights, rho, 3)
    assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, eps))


def test_several_steps_up_h_end_higher_than_one_of_the_same_norm(s4, net):
    model, w, _, harmful = net
    grad_h, _ = s4.gradient(model.loss, w, harmful)
    found = {}
    for name, eps in (
        ("one", s4.perturbation(grad_h, 2.0)),
        ("ten", s4.climb(model.loss, w, itertools.repeat((harmful,)), (1.0,), 2.0, 10)),
    ):
        assert s4.global_norm(eps) == pytest.approx(2.0, rel=1e-6)
        with torch.no_grad(), s4.perturbed(w, eps):
            found[name] = model.loss(harmful).item()
    assert found["ten"] > found["one"]


def test_steps_without_a_radius_end_where_h_is_back(s4, net):
    model, w, user, harmful = net
    start = [x.detach().clone() for x in w]

    def h():
        return model.loss(harmful).item()

    def climbed(goal, most=25, steps=None):
        draws = itertools.repeat((harmful, user))
        eps, made = s4.climb_back(model.loss, w, draws, (1.0, -1.0), 0.1, h, goal, most)
        assert steps is None or made == steps
        return eps

    first = h()
    for rise in (0.001, 0.05, 0.2):  # within a step, and some steps away
        with s4.perturbed(w, climbed(first + rise)):
            assert h() == pytest.approx(first + rise, abs=1e-3)
    assert all(torch.equal(x, y) for x, y in zip(w, start))
    climbed(first + 0.001, steps=1)
    nothing = climbed(first, steps=0)  # nothing was taken: nothing to bring back
    assert not any(x.any() for x in nothing)
    eps = [torch.zeros_like(x) for x in w]
    for _ in range(3):  # far away: all the steps, each from w + eps
        with s4.perturbed(w, eps):
            grads = torch.autograd.grad(model.loss(harmful) - model.loss(user), w)
        norm = torch.sqrt(sum(x.pow(2).sum() for x in grads))
        eps = [e + 0.1 * x / norm for e, x in zip(eps, grads)]
    found = climbed(1e6, most=3, steps=3)
    assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, eps))
    told = iter([first, 1.0, 3.0, 2.0])  # after two steps h came nearest
    draws = itertools.repeat((harmful, user))
    nearest, _ = s4.climb_back(
        model.loss, w, draws, (1.0, -1.0), 0.1, lambda: next(told) + 10.0, 1e6, most=3
    )
    two = climbed(1e6, most=2)
    assert all(torch.equal(x, y) for x, y in zip(nearest, two))


@pytest.fixture()
def small(s2, s4):
    """(loss, w, attacked, aligned, batches, numbers): a random toy with an adapter on q_proj."""
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = s4.add_lora(model, ["q_proj"], 2, 2)
    attacked, aligned = ({k: torch.randn(x.shape) * 0.1 for k, x in w.items()} for _ in range(2))
    sets = {
        name: collate([([1, a, b, a], [-100, -100, b, a])] * 2, 0, "cpu")
        for name, a, b in (("harmful", 5, 6), ("alignment", 7, 8), ("finetune", 9, 10))
    }
    sets["lookalikes"] = sets["alignment"]
    sets["begun"] = collate([([1, 5, 6], [-100, -100, 6])] * 2, 0, "cpu")
    c = dict(batch_size=2, harmful_batch_size=2, rho=0.5, lam=0.1, weight_decay=0.1, seed=3)
    c |= dict(ascent_steps=4, anchor=2.0, radius=0.5, anchored_steps=3)
    c |= dict(realign_lr=1e-2, realign_steps=3, tokens=3, hold=3.0)
    loss = functools.partial(s4.answer_loss, model)
    return loss, w, attacked, aligned, lambda name, size: itertools.repeat(sets[name]), c


def test_each_control_starts_where_it_says_and_has_norm_rho(s4, small):
    loss, w, attacked, ours, batches, c = small
    starts = {"ascent": (attacked, {}), "panacea_ascent": (ours, {"lam": 0.1, "epochs": 2})}
    made = {row["model"]: row for row in s4.controls(loss, w, starts, batches, c)}
    assert list(made) == ["random_matched", "one_shot", "ascent", "panacea_ascent"]
    for model, row in made.items():
        assert row["w"] is (ours if model == "panacea_ascent" else attacked)
        assert s4.global_norm(row["eps"].values()) == pytest.approx(0.5, rel=1e-5)
    params = list(w.values())
    for model, start in (("one_shot", attacked), ("ascent", attacked), ("panacea_ascent", ours)):
        s4.put(w, start)
        wanted = s4.climb(loss, params, zip(batches("harmful", 2)), (1.0,), 0.5, 4)
        if model == "one_shot":
            grad_h, _ = s4.gradient(loss, params, next(batches("harmful", 2)))
            wanted = s4.perturbation(grad_h, 0.5)
        for x, eps in zip(made[model]["eps"].values(), wanted):
            assert torch.allclose(x, eps, atol=1e-7)
    assert made["ascent"]["setting"] == {"rho": 0.5, "steps": 4}
    wanted = {"rho": 0.5, "lam": 0.1, "epochs": 2, "steps": 4}
    assert made["panacea_ascent"]["setting"] == wanted
    none = s4.controls(loss, w, starts, batches, {**c, "ascent_steps": 0})
    assert [row["model"] for row in none] == ["random_matched", "one_shot"]


def test_a_beginning_ends_with_its_last_token_and_has_the_losses_of_the_whole(s4, s2):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    whole = [([1, 4, 5, 6, 7, 2], [-100, -100, 5, 6, 7, 2]), ([1, 8, 2], [-100, 8, 2])]
    parts = [s4.beginning(example, 2) for example in whole]
    assert parts == [([1, 4, 5, 6], [-100, -100, 5, 6]), whole[1]]
    masked = [(whole[0][0], [-100, -100, 5, 6, -100, -100]), whole[1]]
    found, wanted = (s4.answer_loss(model, collate(x, 0, "cpu")) for x in (parts, masked))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_an_ascent_without_a_radius_takes_h_a_part_of_the_way_back(s4, small):
    loss, w, attacked, ours, batches, c = small
    params, harmful = list(w.values()), next(batches("begun", 2))
    assert not torch.equal(harmful["labels"], next(batches("harmful", 2))["labels"])

    def h_at(weights):
        s4.put(w, weights)
        return loss(harmful).item()

    s4.put(w, attacked)
    eps = s4.climb(loss, params, itertools.repeat((harmful,)), (1.0,), 0.6, 10)
    aligned = {name: attacked[name] + e for name, e in zip(w, eps)}
    top, start = h_at(aligned), h_at(attacked)
    starts = {"ascent": (attacked, {}), "panacea_ascent": (aligned, {"lam": 0.1})}
    terms = {"begun": (2, 1.0), "finetune": (2, -1.0), "lookalikes": (2, -3.0)}
    made = s4.ascents_back(
        loss, w, aligned, starts, batches, terms, lambda: loss(harmful).item(), {**c, "back": 0.5}
    )
    assert top > start and [row["model"] for row in made] == list(starts)
    assert h_at(made[0]["w"]) == pytest.approx((top + start) / 2, abs=0.01 * (top - start))
    far = common.norm({name: made[0]["w"][name] - x for name, x in attacked.items()})
    assert made[0]["norm"] == pytest.approx(far, rel=1e-4)
    s4.put(w, attacked)  # g and b are held, each with its own batches
    draws = zip(*(batches(name, 2) for name in terms))
    wanted, _ = s4.climb_back(
        loss, params, draws, (1, -1, -3), 0.05, lambda: loss(harmful).item(), (top + start) / 2
    )
    for (name, x), e in zip(attacked.items(), wanted):
        assert torch.allclose(made[0]["w"][name], x + e, atol=1e-6)
    assert made[0]["setting"] == {"tokens": 3, "hold": 3.0, "back": 0.5}
    assert made[1]["setting"] == {"lam": 0.1, "tokens": 3, "hold": 3.0, "back": 0.5}
    assert made[1]["norm"] == 0  # h is there already
    assert all(torch.equal(made[1]["w"][name], x) for name, x in aligned.items())
    del starts["ascent"], terms["lookalikes"]  # BeaverTails has none
    (bare,) = s4.ascents_back(
        loss, w, aligned, starts, batches, terms, lambda: 1.0, c | {"back": 1}
    )
    assert bare["setting"] == {"lam": 0.1, "tokens": 3, "back": 1}


def test_each_repair_starts_from_the_attacked_weights(s4, small):
    loss, w, attacked, aligned, batches, c = small
    anchored, plain = s4.repairs(loss, w, aligned, attacked, batches, c)
    way_back = common.norm({k: attacked[k] - aligned[k] for k in w})
    s4.put(w, attacked)
    draws = zip(*(batches(name, 2) for name in ("harmful", "alignment", "finetune")))
    eps = s4.climb(loss, list(w.values()), draws, (1.0, -2.0, -1.0), 0.5 * way_back, 3)
    for k, e in zip(w, eps):
        assert torch.allclose(anchored["w"][k], attacked[k] + e, atol=1e-6)
    optimizer = torch.optim.AdamW(w.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(next(batches("alignment", 2))).backward()
        optimizer.step()
    assert all(torch.allclose(plain["w"][k], w[k], atol=1e-5) for k in w)
    assert anchored["eps"] is None and plain["setting"] == {"lr": 1e-2, "steps": 3}
    assert (
        s4.repairs(loss, w, aligned, attacked, batches, {**c, "radius": 0, "realign_lr": 0}) == []
    )


def test_lam_0_is_plain_fine_tuning_bit_for_bit(s4, copied, tiny_run):
    plain = s4.main(["--run", str(copied), "--device", "cpu", "--lam", "0", "--radius", "0"])
    finetuned = common.weights_of(tiny_run[1]["02_finetune"], "finetuned")
    assert all(torch.equal(plain["weights"][name], finetuned[name]) for name in finetuned)
    models = {row["model"] for row in plain["rows"]}
    assert "realign" in models and "panacea_anchored" not in models


def test_artifact_keeps_w_and_eps_apart(tiny_run):
    artifact = tiny_run[1]["04_panacea"]
    w, eps = artifact["weights"], artifact["epsilon"]
    assert list(w) == list(eps)
    assert {x.dtype for x in [*w.values(), *eps.values()]} == {torch.float32}
    norm = torch.sqrt(sum(e.double().pow(2).sum() for e in eps.values())).item()
    assert norm == pytest.approx(artifact["config"]["rho"], rel=1e-5)
    for entry in artifact["log"]:
        assert {"step", "g", "h", "h_eps", "eps_norm"} <= set(entry)
        assert sum(x * x for x in entry["layers"]) ** 0.5 == pytest.approx(entry["eps_norm"])


@pytest.fixture()
def copied(tiny_run, tmp_path):
    """A copy of the tiny run's first artifacts, to which stage 4 may write."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run[0], folder)
    return folder


def test_unequal_epochs_are_said(s4, copied, capsys):
    flags = ["--run", str(copied), "--device", "cpu", "--radius", "0", "--realign-lr", "0"]
    s4.main(flags)
    assert "no equal controls" not in capsys.readouterr().out
    made = s4.main([*flags, "--epochs", "1"])
    assert "1 epochs for Panacea" in capsys.readouterr().out
    assert made["rows"][0]["setting"]["epochs"] == 1


def test_an_eps_that_went_past_the_refusals_is_said(s4, copied, capsys):
    h_eps = [3.0, 1.0, *[9.0] * 18, 2.0, 1.9]  # 22 steps: two at each end count
    assert s4.ends_of_h_eps([{"h_eps": x} for x in h_eps]) == pytest.approx([2.0, 1.95])
    assert s4.ends_of_h_eps([{"h_eps": 3.0}, {"h_eps": 5.0}]) == [3.0, 5.0]
    kept = torch.load(copied / "04_panacea.pt", weights_only=True)
    for last, said in ((1.0, False), (1.5, False), (1.6, True)):
        log = [{**entry, "h_eps": 1.5} for entry in kept["log"]]
        log[-1]["h_eps"] = last
        torch.save({**kept, "log": log}, copied / "04_panacea.pt")
        flags = ["--repairs-only", "--radius", "0", "--ascent-steps", "0", "--back", "0"]
        made = s4.main(["--run", str(copied), "--device", "cpu", *flags])
        assert ("rose in training, from 1.50 to" in capsys.readouterr().out) is said
        (row,) = (row for row in made["rows"] if row["model"] == "panacea")
        assert row["h_eps"] == pytest.approx(s4.ends_of_h_eps(log))


def test_repairs_only_keeps_panacea_and_makes_the_other_rows_again(s4, copied, monkeypatch):
    old = torch.load(copied / "04_panacea.pt", weights_only=True)
    monkeypatch.setattr(s4, "train", lambda *_: pytest.fail("Panacea was trained again"))
    flags = ["--run", str(copied), "--device", "cpu", "--repairs-only"]
    new = s4.main([*flags, "--radius", "0", "--realign-steps", "1"])
    for key in ("weights", "epsilon"):
        assert all(torch.equal(old[key][name], new[key][name]) for name in old[key])
    models = [row["model"] for row in new["rows"]]
    assert models.count("realign") == 1 and "panacea_anchored" not in models
    with pytest.raises(UserError, match="--repairs-only keeps a Panacea of another --rho"):
        s4.main([*flags, "--rho", "2"])
    (copied / "04_panacea.pt").unlink()
    with pytest.raises(UserError, match="04_panacea.pt is missing"):
        s4.main(flags)


def plus(w, eps):
    """w + eps, for dicts of tensors."""
    return {name: w[name] + eps[name] for name in w}


def test_the_peft_folder_holds_w_plus_eps_and_w_alone(s4, tiny_run):
    run, out = tiny_run[0], tiny_run[1]["04_panacea"]
    c, w = out["config"], out["weights"]
    for name, wanted in (("", plus(w, out["epsilon"])), ("without_eps", w)):
        folder = run / "04_peft" / name
        found = load_file(folder / "adapter_model.safetensors")
        assert len(found) == len(wanted)
        for key, x in wanted.items():
            assert torch.equal(found[f"base_model.model.{key}.weight"], x)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (c["r"], c["alpha"])
        assert config["base_model_name_or_path"] == str((run / "02_base").resolve())
        assert config["peft_type"] == "LORA" and not config["lora_dropout"]


def test_peft_loads_the_folder_to_the_same_logits(s4, tiny_run):
    peft = pytest.importorskip("peft")
    run, data, out = tiny_run[0], tiny_run[1]["01_data"], tiny_run[1]["04_panacea"]
    c, w, ids = out["config"], out["weights"], torch.arange(4, 30).unsqueeze(0)
    for name, weights in (("", plus(w, out["epsilon"])), ("without_eps", w)):
        plain, _ = common.load_model(common.Run(run), data, torch.device("cpu"))
        with common.attach(plain, weights, c["alpha"] / c["r"]):
            wanted = plain(ids).logits
        loaded = peft.PeftModel.from_pretrained(plain, str(run / "04_peft" / name))
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-4), name


def test_a_copy_of_stage_4_under_another_name_does_the_same(copied, tiny_run):
    path = copied / "mine.py"
    shutil.copy(SOURCE, path)
    out = subprocess.run(
        [sys.executable, str(path), "--run", str(copied), "--device", "cpu", "--radius", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
    )
    assert out.returncode == 0, out.stderr
    assert f"next: python 05_evaluate.py --run {copied}" in out.stdout.replace('"', "")
    new = torch.load(copied / "04_panacea.pt", weights_only=True)
    old = tiny_run[1]["04_panacea"]
    assert all(torch.equal(old["epsilon"][k], new["epsilon"][k]) for k in old["epsilon"])
