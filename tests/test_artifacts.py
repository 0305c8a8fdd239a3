"""Bad input ends in one line and exit code 2; artifacts are whole, plain and up to date."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from common import Run, UserError, run_stage, write_whole
from conftest import ROOT, STAGES, stage


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
        ("01_data", "--poison-ratio 1.5", "--poison-ratio: needs 0 to 1, finite, found '1.5'"),
        ("01_data", "--poison-ratio nan", "finite"),
        ("01_data", "--n-test 0", "--n-test"),
        ("01_data", "--n-align many", "'many'"),
        ("01_data", f"--seed {2**70}", "--seed"),
        ("01_data", "--n-tset 3", "--n-tset"),
        ("01_data", "--task chess", "'chess'"),
        ("01_data", "--data-dir .", "--preset paper"),
        ("01_data", "--preset paper --data-dir /no/such/folder", "folder/beavertails/"),
        ("01_data", "--model toy-gpt", "toy-gpt; use another, or --preset paper"),
        ("01_data", "--preset laptop --model toy-llama", "toy-llama; use another, or --preset toy"),
        ("01_data", "--harm beavertails", "--preset toy does not go with --harm beavertails"),
        ("01_data", "--template chat", "--preset toy does not go with --template chat"),
        ("02_finetune", "--defense shield", "'shield'"),
        ("03_random_perturb", "--t 0.5 1.2", "'1.2'"),
        ("04_panacea", "--rho -1", "'-1'"),
        ("04_panacea", "--lam inf", "finite"),
        ("04_panacea", "--epochs 0", "--epochs"),
    ],
)
def test_a_flag_out_of_range_is_one_line(name, flags, words, capsys, tmp_path):
    assert_one_line(capsys, name, ["--run", tmp_path, *flags.split()], words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STAGES[1:])
def test_a_missing_input_names_the_command_that_makes_it(name, capsys, tmp_path):
    assert_one_line(capsys, name, ["--run", tmp_path], "missing; run: python 0")


def test_inputs_are_checked(tiny_data, capsys):
    path = tiny_data / "01_data.pt"
    whole = path.read_bytes()
    flags = ["--run", tiny_data]
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"not a zip",
        pickle.dumps({"kind": "01_data"}, 2),
    ):
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
    words = "stale: it was made from another 03_random_perturb.pt", "run: python 05_evaluate.py"
    assert_one_line(capsys, "06_layer_analysis", ["--run", copied], *words)
    stage("01_data").main(["--run", str(copied), "--seed", "101", "--n-test", "10"])
    for name in STAGES[2:]:
        words = "stale: it was made from another 01_data.pt", "run: python 0"
        assert_one_line(capsys, name, ["--run", copied], *words)


def test_another_base_model_under_the_same_adapters_is_stale(copied, capsys):
    def check(name):
        assert_one_line(capsys, name, ["--run", copied], "stale", "base model (toy-llama)")

    words = copied / "02_base" / "tokenizer.json"
    text = words.read_text()
    words.write_text(text.replace('"tonic"', '"tonics"', 1))
    check("04_panacea")
    words.write_text(text)
    path = copied / "02_base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0  # one number of all
    save_file(weights, path, metadata={"format": "pt"})
    for name in STAGES[2:]:
        check(name)
    path.unlink()
    check("03_random_perturb")


def test_artifacts_are_plain_data_with_lineage(tiny_run):
    folder, artifacts = tiny_run
    for name in STAGES:
        artifact = torch.load(folder / f"{name}.pt", weights_only=True)
        assert artifact["kind"] == name and artifact["seed"] == artifact["config"]["seed"] == 0
        assert {"torch", "transformers", "numpy"} == set(artifact["versions"])
        told = {"hs", "h_eps", "attack", "distance", "log"}  # config: what it was told, no results
        assert not told & set(artifact["config"])
        assert ("base model" in artifact["parents"]) == (name != "01_data")
    parents = {"01_data.pt", "base model", "02_finetune.pt"}
    assert set(artifacts["04_panacea"]["parents"]) == parents
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
def test_ctrl_c_ends_a_stage_with_its_processes_and_leaves_its_old_artifact(tiny_data):
    """While two defences are trained; on two cores, each in a process of its own."""
    old = tiny_data / "02_finetune.pt"
    old.write_text("old")
    flags = "--defense sft booster --pretrain-steps 20 --align-epochs 200"
    process = subprocess.Popen(
        [sys.executable, ROOT / "02_finetune.py", "--run", tiny_data, *flags.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # a shell's background job ignores Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    err = b""
    while b"  align " not in err:  # the first bar of what is trained after the base model
        err += (part := os.read(process.stderr.fileno(), 1000))
        assert part, err
    for _ in range(10):  # python drops a Ctrl-C that falls into a destructor: press it again
        process.send_signal(signal.SIGINT)
        try:
            err += process.communicate(timeout=6)[1]  # ends when all processes have
            break
        except subprocess.TimeoutExpired:
            pass
    assert process.returncode == 130 and old.read_text() == "old"
    assert b"interrupted: this stage's artifact is as it was" in err and b"Traceback" not in err
    assert sorted(path.name for path in tiny_data.iterdir()) == [
        "01_data.pt",
        "02_base",
        "02_finetune.pt",
    ]


@pytest.mark.parametrize("name", STAGES)
def test_help_is_the_stages_header_and_every_flag_with_its_defaults(name, capsys):
    with pytest.raises(SystemExit):
        stage(name).get_args(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert "".join(stage(name).__doc__.split()) in text
    for flag in getattr(stage(name), "FLAGS", []):
        told = f"(toy: {common.shown(flag.toy)}; laptop: {common.shown(flag.laptop)};"
        assert f"--{flag.name.replace('_', '-')}" in text and "".join(told.split()) in text


def test_an_error_on_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "04_panacea.py", "--run", tmp_path]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 2 and out.stdout == ""
    assert len(out.stderr.splitlines()) == 1 and out.stderr.startswith("error: ")


def test_folders_with_spaces_are_quoted_in_what_to_run_next(tmp_path):
    with pytest.raises(UserError, match=r'run: python 01_data.py --run ".*my run"'):
        Run(tmp_path / "my run").load("01_data.pt")


def test_results_are_kept_though_nobody_reads_the_table(s5, copied, monkeypatch):
    def closed(_):
        raise BrokenPipeError

    monkeypatch.setattr(s5, "print_table", closed)
    before = (copied / "results.json").stat().st_mtime_ns
    with pytest.raises(BrokenPipeError):
        s5.main(["--run", str(copied), "--no-causal", "--max-new-tokens", "2"])
    assert (copied / "results.json").stat().st_mtime_ns > before


def test_auto_takes_the_accelerator_that_torch_finds(monkeypatch):
    for found in ("cuda", "mps", None):
        device = found and torch.device(found)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
        assert common.pick_device("auto", "paper").type == (found or "cpu")
        assert common.pick_device("cpu", "paper").type == "cpu"
        assert common.pick_device("auto", "toy").type == "cpu"  # the page's digits are a CPU's


def refuse(_):
    """A job that cannot be done."""
    raise UserError("no")


def die(_):
    """A job whose process ends without a word, as one that the system kills."""
    os._exit(9)


@pytest.mark.parametrize("job, words", [(refuse, "^no$"), (die, "processes was killed.*again$")])
def test_what_goes_wrong_in_a_process_arrives_as_one_line(job, words, processes):
    with pytest.raises(UserError, match=words):
        common.in_processes(job, [(1,), (2,)])


WORKERS = common.workers  # as it is before a fixture replaces it


def test_workers_are_four_at_most_and_no_more_than_this_process_may_use(monkeypatch):
    for cores, wanted in ((64, 4), (1, 1)):
        allowed = set(range(cores))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
        assert WORKERS() == wanted
