"""Make mine.py, a copy of 04_panacea.py with gaps: exercises 1, 3 and 10.

Run: python tests/blank.py perturbation        exercise 1, Eq. 2
     python tests/blank.py panacea_rule        exercise 3, Eq. 3
     python tests/blank.py perturbed           exercise 10, w given back

It may be run again for another function: what you have written in mine.py stays.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {"perturbation": 1, "panacea_rule": 3, "perturbed": 10}


def body_lines(source, name):
    """(first, last line, from 0) of a function's body without its docstring; the last excluded."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node.body[0].end_lineno, node.end_lineno
    raise SystemExit(f"error: there is no function {name} any more; begin again: move mine.py away")


def blank(source, name):
    """`source` with the body of a function replaced by a gap; signature and docstring stay."""
    lines = source.splitlines(keepends=True)
    first, last = body_lines(source, name)
    gap = f'    raise NotImplementedError("exercise {EXERCISES[name]}: write {name} here")\n'
    return "".join([*lines[:first], gap, *lines[last:]])


def body(source, name):
    """The lines of a function's body, as one text."""
    first, last = body_lines(source, name)
    return "".join(source.splitlines(keepends=True)[first:last])


def main(names, root=ROOT):
    """Blank the named functions in mine.py, which is made if it is not there."""
    wrong = [name for name in names if name not in EXERCISES]
    if wrong or not names:
        raise SystemExit(f"error: say which to blank, of {', '.join(EXERCISES)}")
    mine, original = root / "mine.py", (root / "04_panacea.py").read_text(encoding="utf-8")
    source = mine.read_text(encoding="utf-8") if mine.is_file() else original
    for name in names:
        if body(source, name) != body(original, name):
            raise SystemExit(
                f"error: {name} in mine.py is no longer that of 04_panacea.py, and may be your "
                "work; to begin again, move mine.py away first"
            )
        source = blank(source, name)
    mine.write_text(source, encoding="utf-8")
    print(f"mine.py written: your part is {' and '.join(names)}; 04_panacea.py is untouched")


if __name__ == "__main__":
    main(sys.argv[1:])
