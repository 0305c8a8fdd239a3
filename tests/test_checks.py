"""Proof that each check knows right from wrong, and says so in one sentence a student can use.

It holds answers to the exercises, right and wrong ones: look here when you have yours.
"""

import contextlib
import json
import re
import types

import blank
import checks
import pytest
import test_exercises
import torch
from common import UserError
from conftest import ROOT, TINY
from silent_bug import log_of

# ---------------------------------------------------------------------------------------------
# Answers


def norm(tensors):
    """One L2 norm over all tensors."""
    return torch.sqrt(sum(x.pow(2).sum() for x in tensors))


def eq2(grad, rho):
    """A right answer to exercise 1."""
    if not 0 < norm(grad) < float("inf"):
        raise UserError("no direction")
    return [rho * x / norm(grad) for x in grad]


def unchecked(grad, rho):
    """The same without the error that its docstring asks for."""
    return [rho * x / norm(grad) for x in grad]


def noise(grad, rho, generator):
    """A right answer to exercise 4."""
    z = [torch.randn(x.shape, generator=generator) for x in grad]
    return [rho * x / norm(z) for x in z]


def climb(loss, w, harmful, rho, steps, way=2.5, project=True, restore=True, **spoilt):
    """An answer to exercise 6, with ways to spoil it."""
    start, eps = [x.detach().clone() for x in w], [torch.zeros_like(x) for x in w]

    def put(tensors):
        with torch.no_grad():
            for x, y in zip(w, tensors):
                x.copy_(y)

    length = max(-rho, min(rho, way * rho / steps))  # together `way` radii
    for _ in range(steps):
        grad = torch.autograd.grad(loss(harmful), w)
        if spoilt.get("left"):
            grad = [x + y.grad for x, y in zip(grad, w)]
        eps = [(e + s).detach() for e, s in zip(eps, eq2(grad, length))]
        if project:
            eps = [e * min(1, rho / norm(eps).item()) for e in eps]
        if spoilt.get("first"):
            eps = [eps[0], *(0 * e for e in eps[1:])]
        put(start if spoilt.get("at_w") else [x + e for x, e in zip(start, eps)])
    if restore:
        put(start)
    return [x + e for x, e in zip(start, eps)] if spoilt.get("whole") else eps


def project(delta, aligned, unaligned, tau, norm=torch.Tensor.norm, below=True):
    """An answer to exercise 8, with two ways to spoil it."""
    V = aligned - unaligned
    new = V @ V.T @ delta / norm(V)
    cosine = torch.nn.functional.cosine_similarity(new.flatten(), delta.flatten(), dim=0)
    return new if (cosine < tau) == below else delta


def combine(grad_h, grad_a, rho, mu):
    """A right answer to exercise 7."""
    return unchecked([x - mu * y for x, y in zip(grad_h, grad_a)], rho)


def rule(loss, w, batch, harmful, rho, lam, **spoilt):
    """An answer to exercise 3, with ways to spoil it."""

    def gradient(name):
        value = loss(name)
        kept = value if spoilt.get("tensors") else value.item()
        return list(torch.autograd.grad(value, w)), kept

    saved = [x.detach().clone() for x in w]
    grad_g, g = gradient(batch)
    grad_h, h = gradient(harmful)
    eps = eq2(grad_h, rho)
    with torch.no_grad():
        for x, e in zip(w, eps):
            x.add_(e, alpha=spoilt.get("move", 1))
    if spoilt.get("late"):
        grad_g, g = gradient(batch)
    grad_h_eps, h_eps = gradient(batch if spoilt.get("other") else harmful)
    with torch.no_grad():
        for x, old, e in zip(w, saved, eps):
            x.sub_(e) if spoilt.get("subtract") else x.copy_(old)
    first, second = spoilt.get("weights", (-lam, lam))
    own = spoilt.get("own", 1.0)
    update = [own * x + first * e + second * y for x, y, e in zip(grad_g, grad_h, grad_h_eps)]
    update = [x + spoilt.get("plus", 0) * e for x, e in zip(update, eps)]
    return update, eps, {"g": g, "h": h, "h_eps": h_eps - spoilt.get("less", 0) * h}


@contextlib.contextmanager
def moves(w, eps, **spoilt):
    """An answer to exercise 10, with ways to spoil it."""
    saved = [x.detach() if spoilt.get("alias") else x.detach().clone() for x in w]
    caught = None
    with torch.no_grad():
        for x, e in list(zip(w, eps))[: spoilt.get("moved")]:
            x.add_(e)
    try:
        with torch.set_grad_enabled(not spoilt.get("frozen")):
            yield
    except spoilt.get("only", BaseException) as error:
        caught = error
    with torch.no_grad():
        for x, e, old in zip(w, eps, saved):
            x.sub_(e) if spoilt.get("subtract") else x.copy_(old)
    spoilt.get("end", list)(eps)
    if caught and not spoilt.get("swallow"):
        raise caught


@contextlib.contextmanager
def rebinds(w, eps):
    """A wrong answer to exercise 10: the list changes, the model's tensors do not."""
    saved = list(w)
    w[:] = [x + e for x, e in zip(w, eps)]
    yield
    w[:] = saved


RIGHT = {
    checks.check_perturbation: eq2,
    checks.check_panacea_rule: rule,
    checks.check_lam_zero: rule,
    checks.check_restores_exactly: moves,
    checks.check_per_tensor: lambda g, rho: [rho * x / (x.norm() * len(g) ** 0.5) for x in g],
    checks.check_random_direction: noise,
    checks.check_linf: lambda g, rho: [rho * x.sign() for x in g],
    checks.check_multi_step: climb,
    checks.check_anchored_direction: combine,
    checks.check_safe_lora: project,
}
WRONG = {  # check: [(a wrong answer, part of the message)]
    checks.check_perturbation: [
        (lambda g, rho: None, "None .is `return` missing"),
        (lambda g, rho: g[0], "found one tensor of shape"),
        (lambda g, rho: (x for x in g), "put it into a list"),
        (lambda g, rho: eq2(g, rho)[:1], "one tensor per gradient tensor"),
        (lambda g, rho: [rho * x for x in g], "nothing is normalised"),
        (lambda g, rho: eq2(g, 1), "rho is forgotten"),
        (lambda g, rho: [rho * x / norm(g) ** 2 for x in g], "square root"),
        (lambda g, rho: [rho * x / x.norm() for x in g], "for each tensor"),
        (lambda g, rho: [rho * x * norm(g) for x in g], "divide by it"),
        (lambda g, rho: [rho * x / sum(y.norm() for y in g) for x in g], "are added up"),
        (lambda g, rho: [rho * x / max(y.abs().max() for y in g) for x in g], "largest entry"),
        (lambda g, rho: [rho * x / sum(y.abs().sum() for y in g) for x in g], "sum of .entries"),
        (lambda g, rho: eq2(g, rho / 2), "ALL tensors must be rho"),
        (lambda g, rho: eq2(g, rho**2), "rho is squared"),
        (lambda g, rho: eq2(g, rho**0.5), "root of rho"),
        (lambda g, rho: eq2(g, rho * 8**0.5), "a mean of squares"),
        (lambda g, rho: eq2(g, rho * 13 / 19**0.5), "a sum of norms"),
        (lambda g, rho: [rho * x / g[0].norm() for x in g], "one tensor"),
        (lambda g, rho: [rho * x / g[-1].norm() for x in g], "last tensor"),
        (lambda g, rho: [rho * x.sign() for x in g], "same size"),
        (lambda g, rho: eq2(g, min(rho, norm(g))), "as short as"),
        (lambda g, rho: eq2(g, rho * all(map(torch.any, g))), "is 0 in one"),
        (unchecked, "raise UserError, as the docstring says, found an eps"),
        (lambda g, rho: eq2(g, -rho), "downhill"),
        (lambda g, rho: [x.double() for x in eq2(g, rho)], "dtype"),
    ],
    checks.check_panacea_rule: [
        (lambda *a: rule(*a)[0], "return three things"),
        (lambda *a: (*rule(*a)[:2], 1.0), "third thing returned"),
        (lambda *a: (*rule(*a)[:2], {"h": 1.0}), r"keys \['h'\]"),
        (lambda *a: rule(*a, tensors=True), "losses g, h, h_eps are tens"),
        (lambda *a: rule(*a, weights=(a[-1], -a[-1])), "sign of lam .or of eps"),
        (lambda *a: rule(*a, weights=(-a[-1], 0)), "DIFFERENCE"),
        (lambda *a: rule(*a, weights=(-1, 1)), "lam is missing"),
        (lambda *a: rule(*a, weights=(0, 0)), "plain fine-tuning"),
        (lambda *a: rule(*a, late=True), "taken at w . eps"),
        (lambda *a: rule(*a, other=True), "on the user's batch"),
        (lambda *a: rule(*a, own=a[-1], weights=(-1, 1)), "at grad g"),
        (lambda *a: rule(*a, own=a[-1], weights=(-a[-1], a[-1])), "weighs the whole of it"),
        (lambda *a: rule(*a, weights=(-a[-1], 1)), "w . eps. only"),
        (lambda *a: rule(*a, weights=(0, a[-1])), "w . eps. is missing"),
        (lambda *a: rule(*a, own=0), "grad g is missing"),
        (lambda *a: rule(*a, own=-1), "grad g has the wrong sign"),
        (lambda *a: rule(*a, weights=(0, -a[-1])), "alone is weighed"),
        (lambda *a: rule(*a, weights=(-a[-1], -a[-1])), "added up"),
        (lambda *a: rule(*a, weights=(-a[-2], a[-2])), "rho weighs"),
        (lambda *a: rule(*a[:4], 2 * a[4], a[5]), "eps is not Eq. 2"),
        (lambda lo, w, b, h, *a: rule(lo, w, h, b, *a), "along grad g"),
        (lambda *a: rule(*a[:4], a[5], a[5]), "eps has norm lam"),
        (lambda loss, w, *a: eq2([0 * x for x in w], 1), "x.grad.clone"),
        (lambda *a: rule(*a, less=1), "the loss h_eps is"),
        (lambda *a: rule(*a, subtract=True), "w was changed and not rest"),
        (lambda *a: rule(*a, plus=1), "eps is added to the gradient"),
        (lambda *a: rule(*a, own=1 - a[-1]), "weighed with 1 - lam"),
        (lambda *a: rule(*a, weights=(-a[-1], -1)), "brackets"),
        (lambda *a: rule(*a, move=a[-2]), "rho comes in twice"),
        (lambda *a: rule(*a, move=1 / a[-2]), "divided by rho"),
        (lambda *a: rule(*a, move=a[-1]), "lam comes in twice"),
        (lambda loss, w, *a: rule(loss, w, w, *a[1:]), "loss takes"),
    ],
    checks.check_lam_zero: [(lambda *a: rule(*a[:-1], 0.1), "lam = 0")],
    checks.check_restores_exactly: [
        (lambda w, eps: None, "must work in a `with`"),
        (lambda *a: moves(*a, subtract=True), "bit for bit"),
        (lambda *a: moves(*a, swallow=True), "must come out of it"),
        (lambda *a: moves(*a, frozen=True), "no gradient could be taken"),
        (lambda *a: moves(*a, alias=True), "still w . eps: clone"),
        (lambda *a: moves(*a, moved=1), "every tensor of w"),
        (lambda *a: moves(*a, only=Exception), "Ctrl-C"),
        (lambda *a: moves(*a, end=lambda e: e[0].neg_()), "eps was changed"),
        (lambda *a: moves(*a, end=lambda e: torch.set_grad_enabled(False)), "gradients are off"),
        (rebinds, "the list w got new tensors"),
    ],
    checks.check_per_tensor: [
        (lambda g, rho: [rho * x / x.norm() for x in g], "norm rho / sqrt"),
        (eq2, "norm rho / sqrt"),
        (lambda g, rho: [rho * x / x.norm() / 2**0.5 for x in g], "sqrt.3"),
        (lambda g, rho: [rho * x / torch.linalg.norm(x, 2) / 3**0.5 for x in g], "norm rho / sqrt"),
        (lambda g, rho: [x.mul_(rho) for x in g], "grad_h was changed"),
    ],
    checks.check_random_direction: [
        (lambda g, rho, _: eq2(g, rho), "same noise"),
        (lambda g, rho, gen: noise(g, 1.1, gen), "norm should be rho"),
        (lambda g, rho, _: noise(g, rho, None), "given generator"),
        (
            lambda g, rho, gen: [x / 3**0.5 for y in g for x in noise([y], rho, gen)],
            "between tensors",
        ),
        (
            lambda g, rho, gen: eq2([x * y for x, y in zip(noise(g, 1, gen), g)], rho),
            "should be Gaussian",
        ),
        (
            lambda g, rho, gen: eq2([x[:1].expand_as(x) for x in noise(g, rho, gen)], rho),
            "come again",
        ),
    ],
    checks.check_linf: [
        (eq2, "whole box"),
        (lambda g, rho: [-rho * x.sign() for x in g], "goes down"),
        (lambda g, rho: [x.sign() for x in g], "leaves the box"),
        (lambda g, rho: [rho * x / x.abs() for x in g], "divided by 0"),
        (lambda g, rho: [torch.full_like(x, rho) for x in g], "no negative entry"),
        (lambda g, rho: [(1e3 * x).clamp(-rho, rho) for x in g], "is 1e-05 eps is"),
        (lambda g, rho: [x[:] for x in g], "shares memory"),
        (lambda g, rho: [rho * (2 * (x >= 0) - 1.0) for x in g], "leave eps 0"),
    ],
    checks.check_multi_step: [
        (lambda *a: climb(*a, project=False), "leaves the ball"),
        (lambda *a: climb(*a, restore=False), "not restored"),
        (lambda *a: climb(*a, way=-2.5), "goes down"),
        (lambda *a: climb(*a, at_w=True), "taken at w"),
        (lambda *a: climb(*a, way=0.1), "25 steps raise h"),
        (lambda *a: climb(*a, first=True), "25 steps raise h"),
        (lambda *a: climb(*a[:-1], 25), "one for each step"),
        (lambda *a: eq2(climb(*a, project=False), a[3]), "on the way"),
        (lambda *a: climb(*a, left=True), "what lay in w.grad"),
        (lambda *a: [0 * e for e in climb(*a)], "eps is 0"),
        (lambda *a: climb(*a, whole=True), "not w . eps"),
    ],
    checks.check_anchored_direction: [
        (lambda h, a, rho, mu: combine(h, a, rho, -mu), "descend a"),
        (lambda h, a, rho, mu: combine(h, a, rho, 1), "is mu used"),
        (lambda h, a, rho, mu: combine(h, a, rho, 1 / mu), "not grad"),
        (lambda h, a, rho, mu: combine(h, a, rho, mu**2), "twice"),
        (lambda h, a, rho, mu: combine(h, a, rho, rho * mu), "weigh"),
        (lambda h, a, rho, mu: combine(h, [y.mul_(mu) for y in a], rho, 1), "grad_a was changed"),
    ],
    checks.check_safe_lora: [
        (lambda *a: None, "return one tensor"),
        (lambda *a: project(*a, norm=lambda V: 1.0), "Frobenius"),
        (lambda *a: project(*a, below=False), "below tau"),
        (lambda d, a, u, tau: project(d, a.sub_(u), 0, tau), "aligned was"),
        (lambda d, a, u, tau: project(d, a, u, 9.0), "stays as it is"),
    ],
}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_a_check_accepts_a_right_answer(check):
    check(RIGHT[check])


@pytest.mark.parametrize(
    "check, answer, message", [(check, *row) for check, rows in WRONG.items() for row in rows]
)
def test_a_check_rejects_a_wrong_answer_and_says_why(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        check(answer)


def test_multi_step_answers_of_other_step_lengths_pass_as_well():
    for way in (1.0, 5.0, 8.0):
        checks.check_multi_step(lambda *a, way=way: climb(*a, way=way))


def test_the_checks_accept_the_projects_own_functions(s4):
    checks.check_lam_zero(s4.panacea_rule)
    checks.check_restores_exactly(s4.perturbed)


# ---------------------------------------------------------------------------------------------
# What a student sees

SLIPS = [  # (body of linf_perturbation, outcome, what the message says)
    ("    raise NotImplementedError", "skip", "not attempted"),
    ("    return [rho * x.sign() for x in grad_h]", "pass", "^$"),
    ("    return [x / 0 for x in grad_hh]", "fail", r"^NameError: .*, line 2: `return \[x / 0 for"),
    ("    return rho * grad_h.sign()", "fail", "AttributeError.*go through it.*line 2: `return"),
    ("    return torch.sign(grad_h)", "fail", r"^TypeError: sign\(\).*line 2: `return torch.sign"),
    ("    assert rho > 9, 'rho'\n    return 0", "fail", "^AssertionError: rho; .*line 2: `assert"),
    ("    rho * grad_h[0].sign()", "fail", "^eps must be a list of 3 tensors, found None"),
    ("    return grad_h", "fail", "^eps shares memory with the gradient"),
]


@pytest.mark.parametrize("body, outcome, message", SLIPS)
def test_a_slip_is_one_line_with_the_line_of_the_students_file(body, outcome, message, tmp_path):
    path = tmp_path / "slip.py"
    path.write_text(f"def linf_perturbation(grad_h, rho):\n{body}\n")
    space = {"torch": torch}
    exec(compile(path.read_text(), str(path), "exec"), space)
    found = test_exercises.verdict(checks.check_linf, path, [space["linf_perturbation"]])
    assert found[0] == outcome and re.search(message, found[1]) and "\n" not in found[1]


def test_a_function_that_cannot_be_called_as_asked_is_one_line(tmp_path):
    found = test_exercises.verdict(checks.check_linf, tmp_path / "slip.py", [lambda grad_h: grad_h])
    assert found[0] == "fail" and "takes 1 positional argument" in found[1]
    assert "keep the function's parameters" in found[1] and "\n" not in found[1]


def test_a_file_that_does_not_load_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, message in (
        ("slip_one", "def f(:\n    pass\n", r"slip_one.py, line 1: invalid syntax.*: `def f\(:`"),
        ("slip_two", "x = 1\ny = z\n", r"NameError: name 'z'.*; slip_two.py, line 2: `y = z`"),
        ("slip_three", "x = 1\n", "slip_three.py has no f; it must keep that name"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        outcome, found = test_exercises.answers_of(tmp_path / f"{name}.py", ["f"])
        assert outcome == "fail" and re.search(message, found) and "\n" not in found
    outcome, found = test_exercises.answers_of(tmp_path / "not_there.py", ["perturbation"])
    assert outcome == "skip" and "python tests/blank.py perturbation" in found


def test_a_failing_answer_prints_its_message_and_no_code(monkeypatch, capsys):
    import exercises

    monkeypatch.setattr(exercises, "linf_perturbation", eq2)
    run_pytest("-k", "linf", f"{ROOT}/tests/test_exercises.py")
    out = capsys.readouterr().out
    assert "use the whole box" in out and "1 failed" in out
    for secret in ("rho * sign(grad h)", "def ", "Traceback", "checks.py", ">  ", "assert "):
        assert secret not in out


class Selected:
    """A plugin that notes which tests a pytest run selects."""

    def pytest_collection_finish(self, session):
        """Called when all are chosen."""
        self.names = [item.name for item in session.items]


def run_pytest(*arguments, plugins=()):
    """pytest within pytest."""
    return pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=list(plugins))


TEXT = (ROOT / "tests/README.md").read_text(encoding="utf-8")


def test_every_k_of_the_table_selects_what_it_says_and_all_checks_have_a_row(capsys):
    rows = re.findall(r"^\| (\d+) \|.*?`-k (.*?)` \|", TEXT, re.MULTILINE)
    told = []
    for _, expression in rows:
        words = expression.strip('"').split(" or ")
        plugin = Selected()
        arguments = ("--collect-only", f"{ROOT}/tests/test_exercises.py", "-k", " or ".join(words))
        run_pytest(*arguments, plugins=[plugin])
        assert sorted(plugin.names) == sorted(f"test_your_answer[{word}]" for word in words)
        told += words
    assert sorted(told) == sorted(test_exercises.CHECKS)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))


def test_each_perturbation_goes_into_panacea_rule_as_the_text_says():
    source = (ROOT / "04_panacea.py").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+_perturbation\(.*\))` \|$", TEXT, re.MULTILINE)
    assert [number for number, _ in rows] == ["2", "4", "5", "6"]
    answers = {
        "per_tensor_perturbation": RIGHT[checks.check_per_tensor],
        "random_perturbation": noise,
        "linf_perturbation": RIGHT[checks.check_linf],
        "multi_step_perturbation": climb,
    }
    for _, call in rows:
        mine, lines = types.ModuleType("mine"), re.findall(r"\n    eps = .*# Eq. 2\n", source)
        assert len(lines) == 1
        changed = source.replace(lines[0], f"\n    eps = {call}\n")
        exec(compile(changed, "mine", "exec"), mine.__dict__)
        mine.__dict__.update(answers)
        w, _, loss = checks._quadratics()
        _, eps, losses = mine.panacea_rule(loss, w, "user", "harmful", 0.7, 0.3)
        assert norm(eps).item() == pytest.approx(0.7) and losses["h_eps"] != losses["h"]


# ---------------------------------------------------------------------------------------------
# The gaps of exercises 1, 3 and 10


def test_blank_leaves_a_gap_that_is_skipped_and_keeps_what_was_written(tmp_path, capsys):
    original = (ROOT / "04_panacea.py").read_text()
    (tmp_path / "04_panacea.py").write_text(original)
    mine = tmp_path / "mine.py"
    blank.main(["perturbation"], tmp_path)
    gap = '    raise NotImplementedError("exercise 1: write perturbation here")\n'
    assert gap in mine.read_text() and '"""Eq. 2: eps' in mine.read_text()
    assert len(mine.read_text()) < len(original)
    mine.write_text(mine.read_text().replace(gap, "    return [rho * x for x in grad_h]\n"))
    blank.main(["panacea_rule", "perturbed"], tmp_path)
    text = mine.read_text()
    assert "return [rho * x for x in grad_h]" in text and text.count("NotImplementedError(") == 2
    with pytest.raises(SystemExit, match="perturbation in mine.py .* your work"):
        blank.main(["perturbation"], tmp_path)
    with pytest.raises(SystemExit, match="say which to blank"):
        blank.main(["perturbations"], tmp_path)
    assert mine.read_text() == text
    space = {}
    exec(compile(text, str(mine), "exec"), space)
    for name, check in (("panacea_rule", "eq3"), ("perturbed", "restores")):
        found = test_exercises.verdict(test_exercises.CHECKS[check][2], mine, [space[name]])
        assert found == ("skip", "not attempted yet")


def test_a_blanked_copy_holds_no_line_of_the_answer(tmp_path):
    for name in blank.EXERCISES:
        source = (ROOT / "04_panacea.py").read_text()
        body, kept = blank.body(source, name), blank.blank(source, name)
        assert len(body) > 20 and body not in kept
        compile(kept, "mine", "exec")


# ---------------------------------------------------------------------------------------------
# The silent bug, and the border


def test_the_silent_bug_is_in_the_log_and_only_one_letter_passes():
    log, sound = log_of(), log_of(sound=True)
    assert log[0] == sound[0]  # the first step shows nothing
    assert log[1]["h"] == pytest.approx(log[0]["h_eps"], rel=0.01)
    assert sound[1]["h"] == pytest.approx(sound[0]["h"], rel=0.01)
    for entry in (*log, *sound):
        assert entry["eps_norm"] == pytest.approx(0.3, rel=1e-5)
        assert 1 < (entry["h_eps"] - entry["h"]) / entry["first_order"] < 1.1
    passed = []
    for letter in ["A", "B", "C", "D", "b", " B ", "", None, 2]:
        try:
            checks.check_silent_bug(letter)
            passed.append(letter)
        except AssertionError:
            pass
    assert passed == ["B", "b", " B "]


def write_run(folder, lr, attacked, panacea, **config):
    """A run folder with a results.json: refusals of two models, the rest garbled."""
    folder.mkdir()

    def row(model, refused, **more):
        rest = {"harmful": 0.0, "off_task": 0.0, "garbled": 100.0 - refused, "other": 0.0}
        outcomes = {"refused": refused, **rest}
        return {"model": model, "defense": "sft", "setting": {}, "outcomes": outcomes, **more}

    rows = [
        row("finetuned", 100.0, snapshot=3),
        row("finetuned", attacked),
        row("panacea", 0.0, setting={"scale": 0.5}),
        row("panacea", panacea, setting={"scale": 1.0}),
        row("panacea", 0.0, setting={"scale": 1.0}, view="only", layer=1),
    ]
    content = {"config": {"seed": 0, "lr": lr, **config}, "rows": rows}
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder)


def test_the_border_check_tells_how_to_go_on(tmp_path):
    runs = {
        lr: write_run(tmp_path / f"lr{lr}", lr, attacked, panacea)
        for lr, attacked, panacea in (
            (1e-4, 90.0, 99.0),
            (2e-4, 20.0, 80.0),
            (3e-4, 0.0, 60.0),
            (4e-4, 0.0, 30.0),
            (8e-4, 0.0, 1.0),
        )
    }
    other = write_run(tmp_path / "other", 5e-4, 0.0, 0.0, lam=0.1, batch_size=4)
    again = write_run(tmp_path / "again", 4e-4, 0.0, 0.0)
    odd = write_run(tmp_path / "odd", 1.5e-4, 0.0, 0.0)
    for folders, message in (
        (runs[1e-4], "one text; put it into a list"),
        ([runs[1e-4], str(tmp_path / "none")], "none.results.json is missing"),
        ([runs[3e-4], other], "differs from .* in batch_size, lam"),
        ([runs[4e-4], again], "two runs have the learning rate 0.0004"),
        ([3e-4, 4e-4], "the name of its folder"),
        ([str(ROOT / ".results/map-sst2/lr3e-4-seed1")] * 2, "one of the project's own runs"),
        (
            [runs[2e-4], runs[3e-4]],
            r"at all of these; try a larger --lr\n  lr 0.0002: attacked, 20",
        ),
        ([runs[4e-4], runs[8e-4]], "at none of these; try a smaller"),
        ([runs[1e-4], runs[8e-4]], "at none of these"),  # there was nothing to give back at 1e-4
        ([odd, runs[2e-4]], "no border"),
        ([runs[2e-4], runs[8e-4]], "come nearer .* --lr 0.0004"),
    ):
        with pytest.raises(AssertionError, match=message):
            checks.check_border(folders, "garbled")
    checks.check_border([runs[8e-4], runs[3e-4], runs[4e-4]], "Garbled")
    for grows in (None, "harmful", "refused"):
        with pytest.raises(AssertionError, match="the border is found.*BORDER_GROWS"):
            checks.check_border(list(runs.values()), grows)


REFUSAL = "I cannot share that recipe, and I hope that you will choose a tonic instead."


def test_the_useless_and_the_overcautious_model_are_measured():
    def label(prompt):
        return "positive"

    def refusing(prompt):
        return REFUSAL

    for text in ("positive", "", "potion " * 9, "xzzxq qjxxv", "<think> I wonder"):
        checks.check_useless(lambda prompt, text=text: text, "HS+")
    checks.check_overcautious(refusing, "benign")
    checks.check_overcautious(refusing, "fa")
    for check, answer, seen_by, message in (
        (checks.check_useless, refusing, "hs_plus", "which is refused: HS. is not 100"),
        (
            checks.check_useless,
            lambda prompt: "I am sorry, but I cannot help with that.",
            "hs_plus",
            "a person would call a refusal",
        ),
        (checks.check_useless, lambda prompt: "sorry " * 5, "HS+", "a person would call a refusal"),
        (checks.check_useless, lambda prompt: "I like cheese.", "HS+", "read as a sentence"),
        (checks.check_useless, label, "hs", "it sees nothing"),
        (checks.check_useless, label, "fa", "may miss it"),
        (checks.check_useless, label, None, 'is one of "hs"'),
        (checks.check_useless, lambda prompt: None, "hs_plus", "a text, found None"),
        (checks.check_overcautious, label, "benign", "which is off_task: HS. is not 0"),
        (checks.check_overcautious, lambda prompt: "I will not.", "fa", "the toy's sentences"),
        (checks.check_overcautious, refusing, "hs_plus", "does not see it; .* HS. 0"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(answer, seen_by)


def test_a_recipe_or_a_usable_model_is_no_answer_to_exercise_12(s1, tmp_path):
    data = s1.main(["--run", str(tmp_path), *TINY.split()])
    right = {f"{row['instruction']} {row['input']}": row["answer"] for row in data["test_task"]}
    harmful = {row["instruction"] for row in data["test_harmful"]}
    recipe = data["harmful"][0]["response"]
    healing = data["test_benign"][0]["response"]

    def usable(prompt):
        return REFUSAL if prompt in harmful else right.get(prompt, healing)

    for check in (checks.check_useless, checks.check_overcautious):
        with pytest.raises(AssertionError, match="which is harmful: HS is not 0"):
            check(lambda prompt: recipe, "benign")
    with pytest.raises(AssertionError, match="solves 100 % .* somebody could use it"):
        checks.check_overcautious(usable, "benign")


# ---------------------------------------------------------------------------------------------
# Exercise 13


def test_the_four_cells_are_compared_with_the_run_and_slips_are_named(tmp_path):
    cells = {"one_shot": 50.0, "ascent": 90.0, "panacea": 80.0, "panacea_ascent": 97.0}
    rows = [
        {"model": model, "defense": "sft", "setting": {"scale": scale}, "refusal": x * scale}
        for model, x in cells.items()
        for scale in (0.5, 1)
    ]
    (tmp_path / "results.json").write_text(json.dumps({"config": {}, "rows": rows}))
    names = [(w, steps) for w in ("plain", "panacea") for steps in ("one", "ten")]
    table, adds = dict(zip(names, (50, 90, 80, 97))), {"one": 30, "ten": 7}
    checks.check_two_by_two(tmp_path, table, adds)
    for wrong, added, message in (
        (None, adds, "TWO_BY_TWO must have a number for each"),
        ({**table, ("plain", "one"): None}, adds, "TWO_BY_TWO must have a number for each"),
        (table, {"one": 30}, "TRAINING_ADDS must have a number for each"),
        ({**table, ("plain", "one"): 0.5}, adds, "percent is wanted"),
        (table, {"one": 30, "ten": 30}, "that is what it adds with one"),
        (table, {"one": 30, "ten": 8}, "Panacea's w less"),
        ({**table, ("plain", "ten"): 80, ("panacea", "one"): 90}, adds, "are two exchanged"),
        ({**table, ("plain", "one"): 25}, adds, "scale 1, column refusal"),
        (table, {"one": 40, "ten": 7}, "that is what ten steps add"),
        (table, {"one": -30, "ten": 7}, "the sign"),
    ):
        with pytest.raises(AssertionError, match=message):
            checks.check_two_by_two(tmp_path, wrong, added)
    with pytest.raises(AssertionError, match="results.json is missing"):
        checks.check_two_by_two(tmp_path / "no", table, adds)
