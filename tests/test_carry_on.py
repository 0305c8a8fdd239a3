"""Each recipe of "Carry on" in tests/README.md is followed to the letter, and works."""

import re
import shutil
import types
from functools import partial

import pytest
import torch
from conftest import ROOT

from common import collate, norm, resolve, weights_of

TEXT = (ROOT / "tests/README.md").read_text(encoding="utf-8")
STEP = re.compile(
    r"^In `(\S+)`, (before|after|instead of) the line `([^`\n]*)`\n\n```python\n(.*?)```\n",
    re.MULTILINE | re.DOTALL,
)


def steps_of(heading):
    """[(file, where, line, lines to write)] of the recipe under a heading; of all if it is ""."""
    text = TEXT[TEXT.index("## Carry on") :]
    if heading:
        text = text[text.index(f"### {heading}\n") :].partition("\n### ")[0]
    return STEP.findall(text)


def followed(heading):
    """{file: its text, changed as the recipe says}."""
    files = {}
    for file, where, line, new in steps_of(heading):
        text = files.get(file) or (ROOT / file).read_text(encoding="utf-8")
        assert f"\n{text}".count(f"\n{line}\n") == 1, f"{file}: not just one line {line!r}"
        before, _, after = f"\n{text}".partition(f"\n{line}\n")
        old = {"before": f"{new}{line}\n", "after": f"{line}\n{new}", "instead of": new}[where]
        files[file] = f"{before}\n{old}{after}"[1:]
    assert files, f"no steps under {heading!r}"
    return files


def module(heading, file):
    """A stage, changed as the recipe says, as a module."""
    changed = types.ModuleType("changed")
    exec(compile(followed(heading)[file], file, "exec"), changed.__dict__)
    return changed


@pytest.fixture()
def run(tiny_run, tmp_path):
    """A run of one's own, as the exercises make it: a copy of stages 1 to 4 of the tiny run."""
    folder = tmp_path / "my run"
    folder.mkdir()
    for path in tiny_run[0].glob("0[1234]_*"):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)
    return folder


def test_both_repairs_are_rows_of_the_table_and_panacea_is_kept(run, tiny_run, s5, capsys):
    argv = ["--run", str(run), "--device", "cpu"]
    s3 = module("A repair that optimises nothing", "03_random_perturb.py")
    made = s3.main([*argv, "--std", "0", "--t", "0", "--share", "0"])
    stage2 = torch.load(run / "02_finetune.pt", weights_only=True)
    attacked = weights_of(stage2, "finetuned")
    half, more = (row["w"] for row in made["rows"][-2:])
    for name, x in attacked.items():
        assert torch.equal(half[name], (0.5 if name.endswith("B") else 1.0) * x)
        assert torch.equal(more[name], (0.8 if name.endswith("B") else 1.0) * x)

    s4 = module("A repair that optimises", "04_panacea.py")
    made, before = s4.main([*argv, "--repairs-only"]), tiny_run[1]["04_panacea"]
    for name, x in before["epsilon"].items():
        assert torch.equal(made["epsilon"][name], x)
    (mine,) = (row for row in made["rows"] if row["model"] == "refusal_step")
    assert norm(mine["eps"]) == pytest.approx(made["config"]["rho"], rel=1e-4)
    assert all(torch.equal(mine["w"][name], x) for name, x in attacked.items())

    rho = made["config"]["rho"]
    capsys.readouterr()
    rows = s5.main([*argv, "--scale", "1", "--max-new-tokens", "3", "--no-causal"])["rows"]
    found, out = [(row["model"], row["setting"]) for row in rows], capsys.readouterr().out
    for model, setting, label in (
        ("shrunk", {"factor": 0.5}, "shrunk factor 0.5"),
        ("shrunk", {"factor": 0.8}, "shrunk factor 0.8"),
        ("refusal_step", {"length": rho, "scale": 1.0}, f"refusal_step length {rho:g} scale 1"),
    ):
        assert (model, setting) in found and label in out


def test_the_step_towards_refusals_lowers_their_loss():
    changed = module("A repair that optimises", "04_panacea.py")
    w = [torch.tensor([3.0, -4.0], requires_grad=True)]
    (eps,) = changed.refusal_step(lambda batch: (w[0] ** 2).sum() / 2, w, None, 0.5)
    assert torch.allclose(eps, torch.tensor([-0.3, 0.4]))


def small_model(s2):
    """(model, w, examples) of a toy with an adapter that is not zero."""
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = s2.add_lora(model, ["all"], 2, 2)
    with torch.no_grad():
        for p in w.values():
            p.add_(0.05 * torch.randn_like(p))
    rows = [(x, [-100] * 3 + x[3:]) for x in torch.randint(4, 50, (8, 8)).tolist()]
    return model, w, {"alignment": rows[:4], "harmful": rows[4:]}


def test_a_defence_is_a_rule_that_reads_both_sets_and_a_choice_of_the_flag(s2):
    changed = module("A defence", "02_finetune.py")
    model, w, examples = small_model(changed)
    params, rule = list(w.values()), changed.RULES["ascent"]
    batch, harmful = (collate(examples[name], 0, "cpu") for name in ("alignment", "harmful"))
    grads, losses = rule(model, params, batch, harmful, {})
    loss = partial(changed.answer_loss, model)
    grad_a, a = changed.gradient(loss, params, batch)
    grad_h, _ = changed.gradient(loss, params, harmful)
    assert losses == {"loss": a}
    for x, y, z in zip(grads, grad_a, grad_h):
        assert torch.equal(x, y - 0.02 * z)
    c = {**resolve(None, changed.FLAGS, "toy"), "seed": 0}
    c.update(align_batch_size=2, align_harmful_batch_size=2, align_epochs=1)
    log = changed.align(model, w, "ascent", examples, 0, c)
    assert [entry["step"] for entry in log] == [1, 2]
    assert changed.get_args(["--defense", "sft", "ascent"]).defense == ["sft", "ascent"]


def test_every_step_of_carry_on_is_read_by_a_test_and_every_code_block_is_a_step():
    text = TEXT[TEXT.index("## Carry on") :]
    assert len(steps_of("")) == text.count("```python") > 5


def test_the_flag_that_the_text_offers_is_read(s3, monkeypatch):
    from common import Flag

    line = re.search(r"`(Flag\(\"factor\".*?\),)` to `FLAGS`", TEXT)[1]
    monkeypatch.setattr(s3, "FLAGS", [*s3.FLAGS, *eval(f"[{line}]", {"Flag": Flag})])
    assert s3.get_args(["--factor", "0.3", "0.6"]).factor == [0.3, 0.6]
