"""Bad input ends in one line and exit code 2; artifacts are whole, plain and up to date."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from common import Run, UserError, run_stage, write_whole
from conftest import ROOT, STAGES, stage


def script(name, *flags, **options):
    """Run a stage as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=options.pop("cwd", ROOT),
        **options,
    )


def assert_one_line(capsys, name, flags, *words):
    """The stage ends with exit code 2 and one line on stderr that holds `words`."""
    with pytest.raises(SystemExit) as stop:
        run_stage(lambda: stage(name).main([str(f) for f in flags]))
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    for word in words:
        assert str(word) in err, f"{word!r} is not in: {err}"


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("01_data", "--poison-ratio 1.5", ["--poison-ratio", "1.5"]),
        ("01_data", "--poison-ratio nan", ["finite"]),
        ("01_data", "--poison-ratio 0.001", ["rounds to 0 harmful samples"]),
        ("01_data", "--task chess", ["chess", "--task"]),
        ("01_data", "--n-test 0", ["--n-test"]),
        ("01_data", "--n-align many", ["--n-align", "many"]),
        ("01_data", f"--seed {2**70}", ["--seed"]),
        ("01_data", "--n-tset 3", ["--n-tset"]),
        ("01_data", "--preset paper --data-dir /no/such/folder", ["/no/such/folder", "--data-dir"]),
        ("01_data", "--data-dir .", ["--preset paper"]),
        ("01_data", "--model toy-gpt", ["toy-gpt", "--preset paper"]),
        ("01_data", "--preset laptop --model toy-llama", ["toy-llama", "--preset toy"]),
        ("01_data", "--harm beavertails", ["--preset toy", "beavertails"]),
        ("01_data", "--template chat", ["--preset toy", "chat"]),
        ("01_data", "--n-pretrain 100", ["must meet all words"]),
        ("01_data", "--task alpaca --n-finetune 9000", ["missing", "--n-finetune"]),
        ("02_finetune", "--pretrain-steps 3", ["--pretrain-steps"]),
        ("02_finetune", "--defense shield", ["shield"]),
        ("03_random_perturb", "--std -0.1", ["--std", "-0.1"]),
        ("03_random_perturb", "--t 1.2", ["--t", "1.2"]),
        ("04_panacea", "--rho -1", ["--rho", "-1"]),
        ("04_panacea", "--lam inf", ["--lam"]),
        ("04_panacea", "--epochs 0", ["--epochs"]),
        ("05_evaluate", "--scale much", ["--scale", "much"]),
    ],
)
def test_a_flag_out_of_range_is_one_line(name, flags, words, capsys, tmp_path):
    assert_one_line(capsys, name, ["--run", tmp_path, *flags.split()], *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STAGES[1:])
def test_a_missing_input_names_the_command_that_makes_it(name, capsys, tmp_path):
    assert_one_line(capsys, name, ["--run", tmp_path], "missing; run: python 0")


def test_inputs_are_checked(tiny_data, capsys):
    path = tiny_data / "01_data.pt"
    whole = path.read_bytes()
    flags = ["--run", tiny_data]
    for content in (whole[: len(whole) // 2], b"", b"not a zip", pickle.dumps({"kind": "01_data"})):
        path.write_bytes(content)
        assert_one_line(capsys, "02_finetune", flags, path, "python 01_data.py")
    torch.save({"kind": "05_evaluate", "format": Run.FORMAT, "config": {}, "parents": {}}, path)
    assert_one_line(capsys, "02_finetune", flags, "but '05_evaluate'")
    torch.save({"kind": "01_data", "format": 5, "config": {}, "parents": {}}, path)
    assert_one_line(capsys, "02_finetune", flags, path, "(format 5)")
    torch.save(torch.zeros(3), path)
    assert_one_line(capsys, "02_finetune", flags, path)


def test_a_damaged_base_model_is_made_again(s2, tiny_data):
    run, device = Run(tiny_data), torch.device("cpu")
    data = run.load("01_data.pt")
    path = tiny_data / "02_base" / "model.safetensors"
    c = {**data["config"], **common.resolve(None, s2.FLAGS, "toy"), "pretrain_steps": 2}
    path.parent.mkdir()
    (path.parent / "config.json").write_text("half a file")
    (path.parent / "pretrain.json").write_text("{}")
    s2.pretrain(run, data, c, device)
    weights = path.read_bytes()
    written = path.stat().st_mtime_ns
    s2.pretrain(run, data, c, device)  # now it fits, and is not made again
    assert path.stat().st_mtime_ns == written
    foreign = load_file(path)
    foreign["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(foreign, path, metadata={"format": "pt"})
    s2.pretrain(run, data, c, device)
    assert path.read_bytes() == weights
    s2.pretrain(run, data, {**c, "pretrain_steps": 3}, device)
    assert path.read_bytes() != weights


class Hostile:
    """Pickles to a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_hostile_pickle_is_refused_and_not_run(tiny_data, capsys, monkeypatch):
    monkeypatch.chdir(tiny_data)
    torch.save({"kind": "01_data", "config": {}, "parents": {}, "x": Hostile()}, "01_data.pt")
    assert_one_line(capsys, "02_finetune", ["--run", tiny_data], "not a plain-data artifact")
    assert not Path("pwned").exists()


@pytest.fixture()
def copied(tiny_run, tmp_path):
    """A copy of the tiny run, to which a test may write."""
    return shutil.copytree(tiny_run[0], tmp_path / "run")


def test_a_stale_input_is_refused(copied, capsys):
    stage("03_random_perturb").main(["--run", str(copied), "--share", "0"])
    stage("01_data").main(["--run", str(copied), "--seed", "101", "--n-test", "10"])
    for name in STAGES[2:]:
        assert_one_line(capsys, name, ["--run", copied], "stale", "another 0", f"{copied}")


@pytest.mark.parametrize("name", STAGES[2:])
def test_another_base_model_under_the_same_adapters_is_stale(name, copied, capsys):
    words = copied / "02_base" / "tokenizer.json"
    text = words.read_text()
    words.write_text(text.replace('"tonic"', '"tonics"', 1))
    assert text != words.read_text()
    assert_one_line(capsys, name, ["--run", copied], "stale", "base model (toy-llama)")
    words.write_text(text)
    path = copied / "02_base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0  # one number of all
    save_file(weights, path, metadata={"format": "pt"})
    assert_one_line(capsys, name, ["--run", copied], "stale", "base model (toy-llama)")
    path.unlink()
    assert_one_line(capsys, name, ["--run", copied], "stale", "base model")


def test_artifacts_are_plain_data_with_lineage(tiny_run):
    folder, artifacts = tiny_run
    for name in STAGES:
        artifact = torch.load(folder / f"{name}.pt", weights_only=True)
        assert artifact["kind"] == name and artifact["seed"] == artifact["config"]["seed"] == 0
        assert {"torch", "transformers", "numpy"} == set(artifact["versions"])
        told = {"hs", "h_eps", "attack", "distance", "log"}  # config: what it was told, no results
        assert not told & set(artifact["config"])
        assert ("base model" in artifact["parents"]) == (name != "01_data")
    assert set(artifacts["04_panacea"]["parents"]) == {
        "01_data.pt",
        "base model",
        "02_finetune.pt",
    }
    assert not list(folder.glob(".*"))


def test_a_failed_write_leaves_the_old_artifact(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_killed_stage_leaves_its_old_artifact(how, tiny_data):
    old = tiny_data / "02_finetune.pt"
    old.write_text("old")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "02_finetune.py"), "--run", str(tiny_data), "--defense", "sft"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.readline()  # it has begun
    for _ in range(10):  # python drops a Ctrl-C that falls into a destructor: press it again
        time.sleep(1)
        process.send_signal(getattr(signal, how))
        try:
            process.wait(timeout=4)
            break
        except subprocess.TimeoutExpired:
            pass
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == "SIGINT" else -9)
    assert "Traceback" not in err and old.read_text() == "old"
    torch.load(tiny_data / "01_data.pt", weights_only=True)


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_the_header_and_every_default(name, capsys):
    with pytest.raises(SystemExit) as stop:
        stage(name).get_args(["--help"])
    text = "".join(capsys.readouterr().out.split())
    header = (ROOT / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    assert stop.value.code == 0
    assert "".join(header.split()) in text and "default:runs/toy" in text
    for row in stage(name).FLAGS:
        defaults = "; ".join(f"{p}: {common.shown(getattr(row, p))}" for p in common.PRESETS)
        assert f"--{row.name.replace('_', '-')}" in text, row.name
        assert "".join(f"({defaults})".split()) in text, row.name


def test_a_wrong_flag_on_the_command_line_prints_one_line_and_exits_2(tmp_path):
    out = script("04_panacea", "--run", tmp_path, "--rho", "minus")
    assert out.returncode == 2 and out.stdout == "" and len(out.stderr.splitlines()) == 1
    out = script("04_panacea", "--run", tmp_path)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert len(out.stderr.splitlines()) == 1


def test_folders_with_spaces_are_quoted_in_what_to_run_next_and_home_is_found(tmp_path):
    with pytest.raises(UserError, match=r'run: python 01_data.py --run ".*my run"'):
        Run(tmp_path / "my run").load("01_data.pt")
    args = stage("01_data").get_args(["--run=~/x", "--data-dir=~/y"])
    assert args.run == Path.home() / "x" and args.data_dir == Path.home() / "y"


def test_results_are_kept_though_nobody_reads_the_table(copied):
    before = (copied / "results.json").stat().st_mtime_ns
    command = f"{sys.executable} {ROOT}/05_evaluate.py --run {str(copied)!r} --no-causal | head -1"
    subprocess.run(command, shell=True, capture_output=True)
    assert (copied / "results.json").stat().st_mtime_ns > before


def test_auto_takes_the_accelerator_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    for found, wanted in (
        (torch.device("cuda"), "cuda"),
        (torch.device("mps"), "mps"),
        (None, "cpu"),
    ):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available, found=found: found
        )
        assert common.pick_device("auto", "paper").type == wanted
        assert common.pick_device("cpu", "paper").type == "cpu"
        assert common.pick_device("auto", "toy").type == "cpu"  # the page's digits are a CPU's


def test_an_error_in_a_process_of_its_own_arrives_as_one_line(processes):
    with pytest.raises(UserError, match="^no$"):
        common.in_processes(refuse, [(1,), (2,)])


def refuse(_):
    """A job that cannot be done."""
    raise UserError("no")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_killed_process_ends_the_stage_in_one_line(processes):
    with pytest.raises(UserError, match="^one of this stage's processes was killed"):
        common.in_processes(die, [(1,), (2,)])


def die(number):
    """A job whose process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_are_four_at_most_and_no_more_than_this_process_may_use(monkeypatch):
    monkeypatch.undo()
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
        assert WORKERS() == 4
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
        assert WORKERS() == 1


WORKERS = common.workers  # as it is before a fixture replaces it
