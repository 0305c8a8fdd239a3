"""Fixtures: the project on the path, no network, and one small toy story run once for all tests."""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
STAGES = ["01_data", "02_finetune", "03_random_perturb", "04_panacea", "05_evaluate",
          "06_layer_analysis"]

# The toy, shortened: one defence, half the steps. Long enough for every sentence to show.
SHORT = {
    "01_data": ["--seed", "100"],
    "02_finetune": ["--defense", "sft", "--pretrain-steps", "400", "--epochs", "5",
                    "--snapshots", "2"],
    "03_random_perturb": ["--std", "0.02", "0.1"],
    "04_panacea": [],
    "05_evaluate": ["--scale", "0.5", "1"],
    "06_layer_analysis": [],
}


def readme_block(label):
    """The first shell block of the README after the comment `<!-- label -->`."""
    text = (ROOT / "README.md").read_text()
    return re.search(rf"<!-- {label} -->\n+```bash\n(.*?)```", text, re.DOTALL)[1]


def readme_commands(text):
    """[(stage, flags)] of the `python 0N_stage.py ...` commands in a text, in order."""
    found = re.findall(r"python (0\d_\w+)\.py([^&;|`#\n]*)", text)
    return [(name, shlex.split(flags)) for name, flags in found]


def stage(name):
    """A stage as a module; one module however often it is asked for."""
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def s1():
    """Stage 1."""
    return stage("01_data")


@pytest.fixture(scope="session")
def s2():
    """Stage 2."""
    return stage("02_finetune")


@pytest.fixture(scope="session")
def s4():
    """Stage 4."""
    return stage("04_panacea")


@pytest.fixture(scope="session")
def s5():
    """Stage 5."""
    return stage("05_evaluate")


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """(run folder, {stage: artifact}): the README's main commands, shortened, run once."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    return folder, {name: stage(name).main([*flags, "--run", str(folder), "--device", "cpu",
                                            *SHORT[name]])
                    for name, flags in readme_commands(readme_block("main command"))}


@pytest.fixture()
def tiny_data(s1, tmp_path):
    """A toy run folder with stage 1's artifact only, in small sizes."""
    s1.main(["--run", str(tmp_path), "--n-align", "20", "--n-finetune", "20", "--n-harmful", "10",
             "--n-test", "10"])
    return tmp_path
