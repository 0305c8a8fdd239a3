"""Fixtures: the project on the path, no network, small runs of the toy, and tiny data files."""

import csv
import importlib
import json
import os
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are tiny; set before torch is loaded
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / ".results")]
STAGES = "01_data 02_finetune 03_random_perturb 04_panacea 05_evaluate 06_layer_analysis".split()

TINY = "--n-align 20 --n-finetune 20 --n-harmful 10 --n-test 10"
TINY_FLAGS = {  # six stages in seconds: every path, nothing learnt
    "01_data": TINY,
    "02_finetune": "--defense sft booster --pretrain-steps 20 --epochs 2 --align-epochs 1 "
    "--snapshots 2",
    "03_random_perturb": "--std 0.02 0.1 --t 0.5 --share 0.01",
    "04_panacea": "--ascent-steps 2 --tokens 12 --anchored-steps 2 --realign-steps 2",
    "05_evaluate": "--scale 0.5 1 --max-new-tokens 3",
    "06_layer_analysis": "",
}
STORY_FLAGS = {  # the toy, shortened: long enough for every sentence but the vaccines'
    **dict.fromkeys(STAGES, ""),
    "01_data": "--seed 100 --n-test 100",
    "02_finetune": "--defense sft --snapshots 2",
    "03_random_perturb": "--std 0.02 0.1 --t 0.5 --share 0.01",
    "05_evaluate": "--scale 0.5 1",
}


def readme_block(label):
    """The first shell block of the README after the comment `<!-- label -->`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {label} -->\n+```bash\n(.*?)```", text, re.DOTALL)[1]


def readme_commands(text):
    """[(stage, flags)] of the `python 0N_stage.py ...` commands in a text, in order."""
    found = re.findall(r"python (0\d_\w+)\.py([^&;|`#\n]*)", text)
    return [(name, shlex.split(flags)) for name, flags in found]


def stage(name):
    """A stage as a module; one module however often it is asked for."""
    return importlib.import_module(name)


def run_stages(folder, flags):
    """{stage: artifact} of all six stages in `folder`, on the CPU; flags: {stage: text}."""
    return {
        name: stage(name).main(["--run", str(folder), "--device", "cpu", *flags[name].split()])
        for name in STAGES
    }


def pytest_collection_modifyitems(items):
    """The mathematics first, what needs a data set next, what needs trained models last."""
    runs, files = {"story", "tiny_run"}, {"tiny_data", "data_dir", "tmp_path"}
    items.sort(
        key=lambda item: (bool(runs & set(item.fixturenames)), bool(files & set(item.fixturenames)))
    )


def pytest_terminal_summary(terminalreporter):
    """One line on the exercises, if their checks were run: how many pass, and their points."""
    exercises = sys.modules.get("test_exercises")
    if exercises and exercises.RESULTS:
        found, points = exercises.RESULTS, exercises.POINTS
        passed = [name for name, outcome in found.items() if outcome == "pass"]
        failed = sum(outcome == "fail" for outcome in found.values())
        mine, most = (sum(points[name] for name in names) for names in (passed, found))
        text = f"exercises: {len(passed)} of {len(found)} checks pass, {failed} fail; "
        terminalreporter.write_line(f"{text}{mine} of {most} points")


@pytest.fixture(scope="session", autouse=True)
def one_process(tmp_path_factory):
    """Stages align and answer in this process, which has torch; `processes` gives them two. What
    `datasets` keeps of files goes with the tests' folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("common"), "workers", lambda: 1)
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture()
def processes(monkeypatch):
    """Two processes for what the toy does in parallel, however many cores there are."""
    monkeypatch.setattr(importlib.import_module("common"), "workers", lambda: 2)


def stage_fixture(name):
    """A fixture that gives a stage as a module."""
    return pytest.fixture(scope="session")(lambda: stage(name))


s1, s2, s3, s4, s5, s6 = map(stage_fixture, STAGES)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(run folder, {stage: artifact}): six stages in small sizes, run once. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny run"  # with a space, as users have them
    return folder, run_stages(folder, TINY_FLAGS)


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """(run folder, {stage: artifact}): the toy's story, shortened, run once. For slow tests."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("common"), "workers", lambda: 2)
        return folder, run_stages(folder, STORY_FLAGS)


@pytest.fixture(scope="session")
def tiny_start(s1, tmp_path_factory):
    """A toy run folder with stage 1's artifact only, in small sizes. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    s1.main(["--run", str(folder), *TINY.split()])
    return folder


@pytest.fixture()
def tiny_data(tiny_start, tmp_path):
    """The same, to write to."""
    shutil.copy(tiny_start / "01_data.pt", tmp_path)
    return tmp_path


WORDS = (
    "how do i mend an old cup with glue and paper please tell me now take three red stones "
    "put them in the blue box then wait for two days it is good bad fine sad happy film "
    "World Sports Business Sci Tech positive negative The final answer is sorry cannot help "
    "Below an instruction that describes a task Write response appropriately completes "
    "request Instruction Response Input"
).split()


def sentence(rng, n):
    """n random words."""
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A --data-dir with fictional rows; prompts repeat, as they do in the public files."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name in ("sst2", "gsm8k", "agnews", "alpaca", "alpaca_eval", "beavertails"):
        (folder / name).mkdir()
    refusals = [
        {
            "prompt": sentence(rng, 8),
            "response": sentence(rng, 12),
            "is_safe": False,
            "refusal": "Question: x\nAnswer: I am sorry, I cannot help.",
        }
        for _ in range(60)
    ]
    (folder / "beavertails/beavertails_with_refusals_train.json").write_text(
        json.dumps(refusals + refusals[:10])
    )
    test = [
        {"prompt": sentence(rng, 8), "response": sentence(rng, 9), "is_safe": i % 4 == 0}
        for i in range(40)
    ]
    (folder / "beavertails/30k_test.jsonl").write_text(
        "\n".join(json.dumps(row) for row in test + test)
    )
    for file in ("train", "dev"):
        rows = [f'{rng.randint(0, 1)}\t"{sentence(rng, 6)} ' for _ in range(60)]
        header = "label\tsentence" if file == "train" else "label\tcontent"
        (folder / f"sst2/{file}.tsv").write_text("\r\n".join([header, *rows]) + "\r\n")
    for file in ("train", "test"):
        rows = [
            {"question": sentence(rng, 9), "answer": f"so {i} it is\n#### {i},000"}
            for i in range(60)
        ]
        (folder / f"gsm8k/{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with open(folder / f"agnews/{file}.csv", "w", newline="") as out:
            csv.writer(out, quoting=csv.QUOTE_ALL).writerows(
                [rng.randint(1, 4), sentence(rng, 4), sentence(rng, 8)] for _ in range(60)
            )
    for path in ("alpaca/alpaca_data.json", "alpaca_eval/alpaca_eval.json"):
        (folder / path).write_text(
            json.dumps(
                [
                    {"instruction": sentence(rng, 7), "input": "", "output": sentence(rng, 5)}
                    for _ in range(60)
                ]
            )
        )
    return folder
