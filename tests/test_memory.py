"""What a 24 GB card needs and what leaves the project: the same gradient in parts, and export."""

import json
from pathlib import Path

import pytest
import torch
from benchmark import peak_bytes
from conftest import stage
from test_real import SMALL, checkpoint

import common
from common import UserError, checkpoint_layers, collate, cut


@pytest.fixture()
def task(s2, s4):
    """(loss, w, user's examples, harmful examples) on a small random model; lengths differ."""
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = s4.add_lora(model, ["all"], 4, 8)
    for x in w.values():
        torch.nn.init.normal_(x, std=0.1)
    rng = torch.Generator().manual_seed(1)

    def example(prompt, answer):
        ids = torch.randint(4, 50, (prompt + answer,), generator=rng).tolist()
        return ids, [-100] * prompt + ids[prompt:]

    sets = [[example(3 + i % 2, 1 + i) for i in range(n)] for n in (7, 5)]
    return model, (lambda batch: s4.answer_loss(model, batch)), list(w.values()), *sets


def close(first, second):
    """Two lists of gradients agree up to rounding."""
    scale = max(x.abs().max() for x in first)
    return all((x - y).abs().max() < 1e-5 * scale for x, y in zip(first, second))


def panacea(s4, loss, w, user, harmful):
    """Gradient and eps of the rule."""
    return s4.panacea_rule(loss, w, user, harmful, 0.3, 0.5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(s4, task, size):
    _, loss, w, user, harmful = task
    whole = panacea(s4, loss, w, collate(user, 0, "cpu"), collate(harmful, 0, "cpu"))
    parts = cut(user, 0, "cpu", size)
    assert [len(part["labels"]) for _, part in parts] == [size] * (7 // size) + [7 % size] * (
        7 % size > 0
    )
    assert sum(share for share, _ in parts) == pytest.approx(1)
    assert len({round(share, 6) for share, _ in parts}) > 1  # by answer tokens, not by rows
    in_parts = panacea(s4, loss, w, parts, cut(harmful, 0, "cpu", size))
    assert close(whole[0], in_parts[0]) and close(whole[1], in_parts[1])
    assert all(in_parts[2][k] == pytest.approx(whole[2][k], abs=1e-5) for k in whole[2])


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_batch_that_fits_is_not_cut(task, size):
    assert isinstance(cut(task[3], 0, "cpu", size), dict)


def test_gradient_checkpointing_gives_the_same_gradient(s2, s4, task):
    model, loss, w, user, harmful = task
    user, harmful = collate(user, 0, "cpu"), collate(harmful, 0, "cpu")
    c = {
        "vaccine_rho": 2.0,
        "repnoise_alpha": 0.5,
        "repnoise_beta": 0.1,
        "booster_lam": 1.0,
        "booster_alpha": 0.1,
    }

    def all_rules():
        grads = [panacea(s4, loss, w, user, harmful)[0]]
        for rule in s2.RULES.values():
            torch.manual_seed(0)
            grads.append(rule(model, w, user, harmful, c)[0])
        return grads

    plain = all_rules()
    calls = []
    checkpoint_layers(model)
    layer = model.model.layers[0]
    inner = layer.forward.args[0]
    layer.forward = common.partial(
        layer.forward.func,
        lambda *a, **k: (calls.append(1), inner(*a, **k))[1],
        use_reentrant=False,
    )
    assert all(close(x, y) for x, y in zip(plain, all_rules()))
    # eleven passes, each again going backward; but Vaccine's first stops above the first layer
    assert len(calls) == 11 + 10


def test_vaccines_that_need_a_whole_batch_say_so(s2, tiny_data):
    with pytest.raises(UserError, match="repnoise and vaccine must have"):
        s2.main(["--run", str(tiny_data), "--micro-batch-size", "4"])


def test_panaceas_peak_is_plain_fine_tunings_plus_three_adapters(s2, s4):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = s4.add_lora(model, ["all"], 64, 64)  # a large adapter, so that copies of it show
    adapter = sum(4 * x.numel() for x in w.values())
    c = {"weight_decay": 0.1, "lr": 1e-3, "rho": 0.1, "lam": 0.1}
    batch = collate([([1, 5, 6, 7], [-100, -100, 6, 7])] * 2, 0, "cpu")

    def plain():
        s2.train(model, w, s2.sft_rule, [(batch, None)] * 4, 4, 1e-3, c, "sft")

    def ours():
        s4.train(lambda b: s4.answer_loss(model, b), w, [(batch, batch)] * 4, 4, c)

    peaks = []
    for job in (plain, plain, ours):  # the first only warms up
        for x in w.values():
            x.grad = None
        peaks.append(peak_bytes(job))
    more = (peaks[2] - peaks[1]) / adapter
    assert 1 < more < 3.1, f"{more:.2f} adapters more than plain fine-tuning"


def test_a_full_gpu_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory, and three lines more")

    with pytest.raises(SystemExit) as exit:
        common.run_stage(main)
    assert exit.value.code == 2
    assert "--gradient-checkpointing" in capsys.readouterr().err.splitlines()[0]


def exported(folder):
    """Names of all files under a folder."""
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_export_writes_adapters_and_merged_weights_without_training_again(
    s4, story, tmp_path, monkeypatch
):
    run, out = story[0], story[1]["04_panacea"]
    monkeypatch.setattr(s4, "algorithm", lambda *_: pytest.fail("trained again"))
    s4.main(["--run", str(run), "--export", str(tmp_path / "small")])
    assert not (tmp_path / "small" / "merged").exists()  # 27 GB for a 7B model: only if asked for
    s4.main(
        [
            "--run",
            str(run),
            "--export",
            str(tmp_path / "new"),
            "--merge",
            "--rho",
            str(out["config"]["rho"]),
        ]
    )
    files = exported(tmp_path / "new")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merged/model.safetensors",
        "without_eps/adapter_config.json",
    } <= files and not list(tmp_path.glob(".*"))
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (out["config"]["r"], out["config"]["alpha"])
    import transformers

    data, c = story[1]["01_data"], out["config"]
    ids = torch.arange(4, 30).unsqueeze(0)
    plain, _ = common.load_model(common.Run(run), data, torch.device("cpu"))
    with common.attach(plain, s4.plus(out["weights"], out["epsilon"]), c["alpha"] / c["r"]):
        wanted = plain(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new/merged")
    assert torch.allclose(merged(ids).logits, wanted, atol=1e-4)
    assert not torch.allclose(plain(ids).logits, wanted, atol=1e-2)
    assert config["base_model_name_or_path"] == str((run / "02_base").resolve())
    with pytest.raises(UserError, match="is there already"):
        s4.main(["--run", str(run), "--export", str(tmp_path / "new")])
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):  # another rho has to be trained
        monkeypatch.setattr(s4, "algorithm", lambda *_: 1 / 0)
        s4.main(["--run", str(run), "--export", str(tmp_path / "other"), "--rho", "9"])


def test_merged_weights_keep_eps_on_a_bfloat16_checkpoint(s4, tmp_path, data_dir):
    import transformers

    checkpoint(tmp_path / "model", "Llama", torch.bfloat16)
    run = common.Run(tmp_path / "run")
    data = stage("01_data").main(
        [
            *SMALL["01_data"],
            "--run",
            str(run.folder),
            "--task",
            "sst2",
            "--model",
            str(tmp_path / "model"),
            "--data-dir",
            str(data_dir),
        ]
    )
    model, _ = common.load_model(run, data, torch.device("cpu"))
    w = s4.copy_of(s4.add_lora(model, ["q_proj"], 4, 4))
    w = {name: torch.randn(x.shape) * 1e-2 for name, x in w.items()}  # below bfloat16's grid
    s4.export(
        tmp_path / "new",
        run,
        data,
        {
            "config": {**data["config"], "r": 4, "alpha": 4},
            "weights": w,
            "epsilon": {name: torch.zeros_like(x) for name, x in w.items()},
        },
        merge=True,
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new/merged")
    base, _ = common.load_model(run, data, torch.device("cpu"))
    for name in [n.removesuffix(".lora_A") for n in w if n.endswith("A")]:
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight.float()
        assert torch.allclose(
            change, w[f"{name}.lora_B"] @ w[f"{name}.lora_A"], rtol=1e-3, atol=1e-7
        )


def test_peft_loads_the_export_to_the_same_logits(s4, story, tmp_path):
    peft = pytest.importorskip("peft")
    run, out = story[0], story[1]["04_panacea"]
    s4.main(["--run", str(run), "--export", str(tmp_path / "new"), "--device", "cpu"])
    data, c, w = story[1]["01_data"], out["config"], out["weights"]
    ids = torch.arange(4, 30).unsqueeze(0)
    for name, weights in (("", s4.plus(w, out["epsilon"])), ("without_eps", w)):
        plain, _ = common.load_model(common.Run(run), data, torch.device("cpu"))
        with common.attach(plain, weights, c["alpha"] / c["r"]):
            wanted = plain(ids).logits
        loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "new" / name))
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-4), name
