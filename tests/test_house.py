"""The shape of the house: silent imports, copies that do not drift, one name for one thing."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, STAGES


def definitions(name):
    """{function or class name: its syntax tree, printed} of a stage."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, kinds)}


def test_what_stages_2_and_4_share_is_the_same_code():
    two, four = definitions("02_finetune"), definitions("04_panacea")
    same = "LoRALinear add_lora answer_loss gradient global_norm perturbed copy_of put".split()
    for name in same:
        assert two[name] == four[name], f"{name} differs between 02_finetune.py and 04_panacea.py"


@pytest.mark.parametrize("name", STAGES)
def test_stages_never_import_each_other(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        assert not set(names) & {*STAGES, "importlib"}


def test_importing_a_stage_prints_and_writes_nothing(tmp_path):
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); "
        f"[importlib.import_module(n) for n in {[*STAGES, 'common']!r}]"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_symbols_have_one_name_everywhere():
    """w g h a eps rho lam, and no others for the same things."""
    wrong = {"lamb", "lambda_", "eps_rho", "epsilon_", "perturb", "harm_loss", "grad_f"}
    for path in [*ROOT.glob("*.py"), *(ROOT / ".results").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        assert not names & wrong, f"{path.name}: {names & wrong}"
