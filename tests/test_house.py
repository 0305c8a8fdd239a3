"""The shape of the house: fixed rooms, silent imports, copies that do not drift."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, STAGES


def definitions(name):
    """{function or class name: its syntax tree, printed} of a stage."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    return {
        node.name: ast.dump(node)
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def test_what_stages_2_and_4_share_is_the_same_code():
    two, four = definitions("02_finetune"), definitions("04_panacea")
    same = {
        "LoRALinear",
        "add_lora",
        "answer_loss",
        "gradient",
        "global_norm",
        "perturbed",
        "copy_of",
        "put",
    }
    assert same <= set(two) & set(four)
    for name in same:
        assert two[name] == four[name], f"{name} differs between 02_finetune.py and 04_panacea.py"


@pytest.mark.parametrize("name", STAGES)
def test_stages_never_import_each_other(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else ([node.module] if isinstance(node, ast.ImportFrom) else [])
        )
        assert not set(names) & set(STAGES) and "importlib" not in names


def test_importing_a_stage_prints_and_writes_nothing(tmp_path):
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); "
        f"[importlib.import_module(n) for n in {STAGES + ['common']!r}]"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_line_90_of_stage_4_is_past_equations_1_to_3():
    head = (ROOT / "04_panacea.py").read_text().splitlines()[:90]
    text = "\n".join(head)
    assert "def perturbation" in text and "def panacea_rule" in text
    assert "return update, eps" in text


def test_lines_fit_100_columns_and_public_functions_are_documented():
    for path in [*ROOT.glob("*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_":
                nested = node.col_offset > 4 or path.name == "common.py" and node.name == "parse"
                method = node.col_offset == 4
                assert ast.get_docstring(node) or nested or method, f"{path.name}: {node.name}"


BUDGET = {"common.py": 680, "all": 3000}  # lines; every other file: 480


def test_the_files_stay_small_and_their_functions_short():
    lines = {}
    for path in ROOT.glob("*.py"):
        if path.stem in [*STAGES, "common"]:
            lines[path.name] = len(path.read_text().splitlines())
            assert lines[path.name] <= BUDGET.get(path.name, 480), "new lines want old ones gone"
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    size = node.end_lineno - node.lineno + 1
                    assert size <= 50, f"{path.name}: {node.name} has {size} lines"
    assert len(lines) == 7 and sum(lines.values()) <= BUDGET["all"]


def test_the_two_training_loops_differ_in_the_method_only():
    loops = []
    for name in ("02_finetune", "04_panacea"):
        text = (ROOT / f"{name}.py").read_text()
        loop = text[text.index("    for step, (batch, harmful) in enumerate(bar, 1):") :]
        loops.append([line.strip() for line in loop.split("\n\n\n")[0].splitlines()])
    removed, added = ([line for line in a if line not in b] for a, b in (loops, loops[::-1]))
    assert removed[0] == "grads, losses = rule(model, params, batch, harmful, c)"
    assert any("panacea_rule(" in line for line in added)
    assert len(removed) <= 5 and len(added) <= 10
