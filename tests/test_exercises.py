"""Your answers to the exercises, checked: tests/README.md has the exercises.

Run: python -m pytest -q tests/test_exercises.py -k linf

What is not attempted yet is skipped (-rs says what it waits for). That the checks know right from
wrong is tested elsewhere.
"""

import ast
import importlib
import linecache
import traceback
from pathlib import Path

import checks
import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE, MINE = ROOT / "tests/exercises.py", ROOT / "mine.py"

CHECKS = {  # what -k selects: (file, its names that are handed over, check)
    "eq2": (MINE, ["perturbation"], checks.check_perturbation),
    "per_tensor": (HERE, ["per_tensor_perturbation"], checks.check_per_tensor),
    "eq3": (MINE, ["panacea_rule"], checks.check_panacea_rule),
    "lam_zero": (MINE, ["panacea_rule"], checks.check_lam_zero),
    "random_direction": (HERE, ["random_perturbation"], checks.check_random_direction),
    "linf": (HERE, ["linf_perturbation"], checks.check_linf),
    "multi_step": (HERE, ["multi_step_perturbation"], checks.check_multi_step),
    "anchored_direction": (HERE, ["anchored_direction"], checks.check_anchored_direction),
    "safe_lora": (HERE, ["safe_lora"], checks.check_safe_lora),
    "silent_bug": (HERE, ["SILENT_BUG"], checks.check_silent_bug),
    "restores": (MINE, ["perturbed"], checks.check_restores_exactly),
    "border": (HERE, ["BORDER_RUNS", "BORDER_GROWS"], checks.check_border),
    "useless": (HERE, ["useless", "USELESS_IS_SEEN_BY"], checks.check_useless),
    "overcautious": (HERE, ["overcautious", "OVERCAUTIOUS_IS_SEEN_BY"], checks.check_overcautious),
    "two_by_two": (
        HERE,
        ["TWO_BY_TWO_RUN", "TWO_BY_TWO", "TRAINING_ADDS"],
        checks.check_two_by_two,
    ),
}
RESULTS = {}  # exercise: pass, skip or fail, for the line of points at the end
POINTS = {  # importance, as in tests/README.md's table
    **{"eq2": 5, "per_tensor": 2, "eq3": 5, "lam_zero": 0, "random_direction": 4, "linf": 3},
    **{"multi_step": 3, "anchored_direction": 4, "safe_lora": 2, "silent_bug": 4, "restores": 4},
    **{"border": 5, "useless": 3, "overcautious": 2, "two_by_two": 5},
}

HINTS = {  # part of an error's text: what mostly helps
    "a leaf Variable that requires grad": "change w inside `with torch.no_grad():`",
    "must match the size": "shapes differ: go through the tensors one by one, with zip",
    "generator didn't yield": "`yield` once, where the caller's body runs",
    "generator didn't stop": "`yield` once only",
    "is not an iterator": "`yield` once, where the caller's body runs",
    "can't multiply sequence": "grad_h is a list of tensors: go through it",
    "'list' and": "it is a list of tensors: go through it",
    "must be Tensor, not list": "it is a list of tensors: go through it",
    "Boolean value of Tensor": "a condition needs one number: flatten, or take one norm",
    "'list' object has no attribute": "it is a list of tensors: go through it; gradient() gives a "
    "pair, the gradient and the loss",
    "does not require grad": "the loss must be computed where gradients are on, and from w itself",
    "backward through the graph a second time": "call loss(...) again for each gradient",
    "appears to not have been used in the graph": "the loss must be computed from w itself",
    "positional argument": "keep the function's parameters as they were",
}


def in_one_line(error, path, name=""):
    """What went wrong in the student's file `path`, and where, as one sentence: at the last line
    of the function `name`, which may have called sound ones of that file with the wrong thing."""
    if isinstance(error, SyntaxError):
        return f"{path.name}, line {error.lineno}: {error.msg}: `{(error.text or '').strip()}`"
    text = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
    hint = "".join(f" ({hint})" for part, hint in HINTS.items() if part in str(error))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if same(f.filename, path)]
    lines = [f.lineno for f in frames if f.name == name] or [f.lineno for f in frames]
    if not lines:  # the check could not call it, or could not use what came back
        return f"the check could not go on: {type(error).__name__}: {text}{hint}"
    line = linecache.getline(str(path), lines[-1]).strip()
    return f"{type(error).__name__}: {text}{hint}; {path.name}, line {lines[-1]}: `{line}`"


def same(filename, path):
    """Whether a frame of a traceback is of the file `path`."""
    return Path(filename).resolve() == path.resolve()


def verdict(check, path, answers):
    """("pass" | "skip" | "fail", message) of a check on the answers of a student's file."""
    try:
        check(*answers)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, NotImplementedError) and same(last.filename, path):
            if last.name == answers[0].__name__:
                return "skip", "not attempted yet"
            return "fail", f"it calls {last.name}, which is still to be written: {error}"
        if isinstance(error, AssertionError) and same(last.filename, Path(checks.__file__)):
            return "fail", str(error)
        return "fail", in_one_line(error, path, getattr(answers[0], "__name__", ""))
    return "pass", ""


def untouched(path, name):
    """Whether a function stands in the student's copy to the letter as in 04_panacea.py."""

    def source(file):
        text = file.read_text(encoding="utf-8")
        found = [x for x in ast.parse(text).body if getattr(x, "name", None) == name]
        return found and ast.get_source_segment(text, found[0])

    return source(path) == source(ROOT / "04_panacea.py")


def empty(answer):
    """Whether an answer that is no function still stands as the sheet has it."""
    return answer is None or isinstance(answer, dict) and all(map(empty, answer.values()))


def answers_of(path, names):
    """("pass", the named things of a student's file), or ("skip" | "fail", message)."""
    if not path.is_file():
        return "skip", f"not attempted yet: python tests/blank.py {names[0]} makes {path.name}"
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        return "fail", in_one_line(error, path)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        return "fail", f"{path.name} has no {missing[0]}; it must keep that name"
    answers = [getattr(module, name) for name in names]
    if path == MINE and untouched(path, names[0]):
        return "skip", f"as in 04_panacea.py; python tests/blank.py {names[0]} makes a gap of it"
    if all(map(empty, answers)):
        return "skip", "not attempted yet"
    return "pass", answers


@pytest.mark.parametrize("name", CHECKS)
def test_your_answer(name):
    path, names, check = CHECKS[name]
    outcome, found = answers_of(path, names)
    if outcome == "pass":
        outcome, found = verdict(check, path, found)
    RESULTS[name] = outcome
    if outcome == "skip":
        pytest.skip(found)
    if outcome == "fail":
        pytest.fail(found, pytrace=False)
