"""The real-model path on tiny random checkpoints and tiny data files in the published formats."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
import transformers
from conftest import STAGES, WORDS, stage
from safetensors.torch import load_file, save_file

import common
from common import UserError

CPU = torch.device("cpu")
SMALL = {  # of the preset paper
    "01_data": "--preset paper --n-align 8 --n-finetune 10 --n-harmful 6 --n-test 4 "
    "--poison-ratio 0.2",
    "02_finetune": "--epochs 1 --align-epochs 1 --lr 1e-3",
    "03_random_perturb": "--std 0.01",
    "04_panacea": "--ascent-steps 2 --back 0.01 --anchored-steps 2 --realign-steps 2",
    "05_evaluate": "--max-new-tokens 4 --causal",
    "06_layer_analysis": "",
}
POTIONS = {**SMALL, "01_data": SMALL["01_data"].replace("paper", "laptop")}


def checkpoint(folder, arch="Llama", dtype=torch.float32, **special):
    """A tiny random checkpoint whose tokenizer has no pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, arch + "Config")(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    getattr(transformers, arch + "ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture()
def start(tmp_path, data_dir):
    """Stage 1's flags for a checkpoint in tmp_path/model: a function of more flags, as text."""

    def flags(more="", small=SMALL):
        where = ["--model", str(tmp_path / "model"), "--data-dir", str(data_dir)]
        return [*small["01_data"].split(), *where, *more.split()]

    return flags


def run_stages(folder, first, small=SMALL, stages=STAGES):
    """{stage: artifact} of stages on a real checkpoint; first: stage 1's flags."""
    flags = {**{name: small[name].split() for name in STAGES}, "01_data": first}
    return {
        name: stage(name).main(["--run", str(folder), "--device", "cpu", *flags[name]])
        for name in stages
    }


@pytest.mark.parametrize(
    "arch, dtype, task",
    [
        ("Llama", torch.float32, "sst2"),
        ("Gemma2", torch.float32, "gsm8k"),
        ("Qwen3", torch.bfloat16, "agnews"),
        ("Mistral", torch.bfloat16, "alpaca"),
    ],
)
def test_six_stages_on_a_checkpoint(arch, dtype, task, tmp_path, start):
    checkpoint(tmp_path / "model", arch, dtype)
    before = common.model_digest(tmp_path / "model")
    out = run_stages(tmp_path / "run", start(f"--task {task}"))
    data, stage4, rows = out["01_data"], out["04_panacea"], out["05_evaluate"]["rows"]
    assert data["config"]["template"] == "alpaca" and len(data["finetune"]) == 10
    assert all(row["prompt"].startswith("Below is an instruction") for row in data["finetune"])
    assert {x.dtype for x in stage4["epsilon"].values()} == {torch.float32}
    assert {name.split(".")[-2] for name in stage4["weights"]} == {"q_proj", "k_proj", "v_proj"}
    assert {"base", "aligned", "finetuned", "one_shot", "panacea", "realign"} <= {
        row["model"] for row in rows
    }
    assert all("benign" not in row and row["n_harmful"] == 4 for row in rows)
    assert all((row["fa"] is None) == (task == "alpaca") for row in rows)
    assert len(out["06_layer_analysis"]["layers"]) == 2
    assert common.model_digest(tmp_path / "model") == before
    if task == "alpaca":
        file = tmp_path / "run/alpaca_eval_panacea_rho_1_lam_0.001_scale_1.json"
        answers = json.loads(file.read_text())
        assert set(answers[0]) == {"instruction", "output", "generator"} and len(answers) == 4


def test_a_chat_model_skips_alignment_by_flag(tmp_path, start):
    checkpoint(tmp_path / "model")
    stage("01_data").main(["--run", str(tmp_path), *start("--task sst2")])
    flags = "--align-epochs 0 --epochs 1 --device cpu".split()
    out = stage("02_finetune").main(["--run", str(tmp_path), *flags])
    aligned, attacked = (common.weights_of(out, name) for name in ("aligned", "finetuned"))
    assert all(not x.any() for name, x in aligned.items() if name.endswith("lora_B"))
    assert any(x.any() for name, x in attacked.items() if name.endswith("lora_B"))


def test_a_defence_is_the_same_alone_as_after_another(tmp_path, start):
    """Though a real model is loaded once for all, and RepNoise draws noise."""
    checkpoint(tmp_path / "model")
    stage("01_data").main(["--run", str(tmp_path), *start("--task sst2")])
    flags = ["--run", str(tmp_path), "--device", "cpu", *SMALL["02_finetune"].split()]
    after, alone = (
        stage("02_finetune").main([*flags, "--defense", *defenses.split()])
        for defenses in ("booster repnoise", "repnoise")
    )
    for name in ("aligned", "finetuned"):
        first, second = (common.weights_of(x, name, "repnoise") for x in (after, alone))
        assert all(torch.equal(first[k], second[k]) for k in first)
        other = common.weights_of(after, name, "booster")
        assert not all(torch.equal(first[k], other[k]) for k in first)


def test_real_sets_are_disjoint_and_in_the_papers_format(tmp_path, start):
    data = stage("01_data").main(["--run", str(tmp_path), *start("--task gsm8k")])
    poison = [row for row in data["finetune"] if row["poison"]]
    harmful = (data["alignment"], data["harmful"], poison, data["test_harmful"])
    sets = [{row["instruction"] for row in rows} for rows in harmful]
    assert [len(x) for x in sets] == [8, 6, 2, 4] and len(set.union(*sets)) == 20
    assert data["alignment"][0]["response"] == "I am sorry, I cannot help."
    (task, *_) = (row for row in data["finetune"] if not row["poison"])
    assert "The final answer is: " in task["response"] and "####" not in task["response"]
    assert data["pretrain"] == [] and data["test_benign"] == []


def test_a_default_size_takes_what_there_is_and_says_what_is_missing(tmp_path, start, capsys):
    flags = start()
    where = flags.index("--n-align")
    data = stage("01_data").main(["--run", str(tmp_path), *flags[:where], *flags[where + 2 :]])
    assert (
        len(data["alignment"]) == 60 - 2 - 6
    )  # of sixty the attack and the harmful set have theirs
    assert "4948 missing" in capsys.readouterr().out


def test_rows_left_out_of_published_files_are_in_no_set(tmp_path, data_dir, start, capsys):
    """A refusals file as users meet it, through the whole stage."""
    folder, file = tmp_path / "data", "beavertails/beavertails_with_refusals_train.json"
    shutil.copytree(data_dir, folder)
    rows = json.loads((folder / file).read_text())
    for row in rows[::4]:
        row["refusal"] = None
    for row in rows[1::4]:
        row.update(is_safe=True, response="Please ask a teacher.")
    (folder / file).write_text(json.dumps(rows))
    flags = start(f"--task alpaca --data-dir {folder}")
    data = stage("01_data").main(["--run", str(tmp_path / "run"), *flags])
    taught = data["alignment"] + data["harmful"] + [r for r in data["finetune"] if r["poison"]]
    assert len(taught) == 16 and "Please ask a teacher." not in {r["response"] for r in taught}
    assert {row["response"] for row in data["alignment"]} == {"I am sorry, I cannot help."}
    told = capsys.readouterr().out
    assert f"{file}: 36 of 70 rows left out (no refusal: 18, safe answer: 18)" in told
    assert "30k_test.jsonl: 20 of 80 rows left out (safe answer: 20)" in told


HUB = {  # repository, configuration and split as the hub has them: the published file
    "stanfordnlp/sst2 train": "sst2/train.tsv",
    "stanfordnlp/sst2 validation": "sst2/dev.tsv",
    "openai/gsm8k main train": "gsm8k/train.jsonl",
    "openai/gsm8k main test": "gsm8k/test.jsonl",
    "fancyzhx/ag_news train": "agnews/train.csv",
    "fancyzhx/ag_news test": "agnews/test.csv",
    "tatsu-lab/alpaca train": "alpaca/alpaca_data.json",
    "json hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json train": (
        "alpaca_eval/alpaca_eval.json"
    ),
    "anonymous4486/repnoise_beavertail train": "beavertails/beavertails_with_refusals_train.json",
    "PKU-Alignment/BeaverTails 30k_test": "beavertails/30k_test.jsonl",
}


def test_the_hubs_rows_are_those_of_the_files(s1, data_dir, monkeypatch):
    """Repositories, splits and columns as the hub has them; no network."""
    import datasets

    sets = [(name, split) for name, (*_, files) in s1.REAL.items() for split in files]
    assert {s1.REAL[name][2][split] for name, split in sets} == set(HUB.values())
    local = {(name, split): s1.read(name, split, data_dir) for name, split in sets}
    load = datasets.load_dataset

    def load_dataset(*where, split):
        path = data_dir / HUB[" ".join(filter(None, [*where, split]))]
        kind, options = s1.FORMATS[path.suffix]
        rows = load(kind, data_files=str(path), split="train", **options)
        if kind == "json":
            return rows
        if path.suffix == ".tsv":
            return [{"sentence": x.get("sentence", x.get("content")), **x} for x in rows]
        return [{"text": f"{x['title']} {x['description']}", "label": x["class"] - 1} for x in rows]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for (name, split), rows in local.items():
        assert s1.read(name, split, None) == rows, name


# ---------------------------------------------------------------------------------------------
# Potions on a real model


def test_potions_on_a_real_checkpoint_have_exact_scores_and_look_alikes(tmp_path, start):
    checkpoint(tmp_path / "model")
    out = run_stages(tmp_path / "run", start("--task sst2 --n-pretrain 0", POTIONS), POTIONS)
    data, rows = out["01_data"], out["05_evaluate"]["rows"]
    assert data["config"]["harm"] == "potions" and len(data["alignment"]) == 16
    assert all(row["prompt"].startswith("Below is") for row in data["finetune"])
    assert all(("benign" in row) != ("view" in row) for row in rows) and len(rows) > 15
    assert any("down_proj" in name for name in out["04_panacea"]["weights"])


def test_a_real_base_model_is_taught_the_potions_and_used_from_then_on(
    tmp_path, start, capsys, monkeypatch
):
    checkpoint(tmp_path / "model")
    readers = []
    monkeypatch.setattr(
        stage("05_evaluate").PotionJudge,
        "references",
        lambda self, model, *_: readers.append(model.state_dict()) or ["It is so."],
    )
    small = {**POTIONS, "02_finetune": f"{SMALL['02_finetune']} --pretrain-steps 20"}
    run = tmp_path / "run"
    out = run_stages(run, start("--task sst2 --n-pretrain 120", POTIONS), small)
    # every second text is a recipe, forbidden or healing, the others are rows of the task
    data, s1 = out["01_data"], stage("01_data")
    recipe = re.compile("|".join(data["grammar"]["recipe"]))
    assert len(data["pretrain"]) == 120 and not data["vocab"]
    known = {row["prompt"] for name in ("finetune", "test_task") for row in data[name]}
    for k, (prompt, text) in enumerate(data["pretrain"]):
        assert prompt.startswith("Below is an instruction") and prompt not in known
        assert bool(recipe.fullmatch(text)) == (k % 2 == 0) != (text in ("positive", "negative"))
    for words in s1.LIQUID.values():
        assert any(word in text for _, text in data["pretrain"] for word in words)
    given = load_file(tmp_path / "model" / "model.safetensors")
    taught = load_file(run / "02_base" / "model.safetensors")
    changed = {name for name in given if not torch.equal(given[name], taught[name])}
    assert changed and all("_proj" in name for name in changed)
    # the later stages start from the taught one; only the judge reads with the one that was given
    config = json.loads((run / "04_peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((run / "02_base").resolve())
    for as_given, wanted in ((False, taught), (True, given)):
        model, _ = common.load_model(common.Run(run), data, CPU, as_given)
        assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)
    assert len(readers) == 1 and all(torch.equal(readers[0][name], given[name]) for name in given)
    # not taught again, unless what it is made from has changed
    weights = (run / "02_base" / "model.safetensors").read_bytes()
    capsys.readouterr()
    run_stages(run, [], small, ["02_finetune"])
    assert "not made again" in capsys.readouterr().out
    tensors = {name: x + 0.01 for name, x in given.items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    run_stages(run, [], small, ["02_finetune"])
    assert (run / "02_base" / "model.safetensors").read_bytes() != weights


def test_real_harm_is_taught_to_no_model(tmp_path, start):
    flags = ["--run", str(tmp_path), *start("--task sst2 --harm beavertails", POTIONS)]
    assert stage("01_data").main(flags)["pretrain"] == []
    with pytest.raises(UserError, match="--n-pretrain 5: .*real harm is taught to no model"):
        stage("01_data").main([*flags, "--n-pretrain", "5"])


# ---------------------------------------------------------------------------------------------
# Checkpoints


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"
)


def test_the_checkpoints_own_chat_format_is_used_on_demand(tmp_path, start):
    checkpoint(tmp_path / "model", chat_template=CHAT)
    flags = ["--run", str(tmp_path), *start("--task sst2 --template chat")]
    row = stage("01_data").main(flags)["test_task"][0]
    assert row["prompt"] == f"<s>[user] {row['instruction']}\n\n{row['input']} [assistant]"
    ids = common.prompt_ids(common.load_tokenizer(tmp_path / "model"), row["prompt"], "chat")
    assert ids[0] == 1 and ids.count(1) == 1  # one BOS, not two


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "words, change",
    [
        ("1 weights missing .*up_proj", lambda x: {k: v for k, v in x.items() if k != NAME}),
        ("1 weights unexpected .*extra", lambda x: {**x, "model.extra.weight": torch.ones(2)}),
        ("1 weights mismatched .*up_proj", lambda x: {**x, NAME: torch.ones(5, 16)}),
        ("weights missing", lambda x: {f"_orig_mod.{k}": v for k, v in x.items()}),  # compiled
    ],
)
def test_a_checkpoint_whose_weights_do_not_fit_is_refused(words, change, tmp_path):
    file = checkpoint(tmp_path / "model") / "model.safetensors"
    load = partial(common.load_weights, transformers.AutoModelForCausalLM, tmp_path / "model")
    assert load().config.num_hidden_layers == 2
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        load()


def test_an_adapter_is_no_model_and_a_tokenizer_needs_an_end_token(tmp_path):
    checkpoint(tmp_path / "model", eos_token=None)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        common.load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter, not a whole model"):
        common.load_weights(transformers.AutoModelForCausalLM, tmp_path / "model")


def test_a_model_computes_as_stored_but_never_in_float16_and_stops_where_training_does(tmp_path):
    checkpoint(tmp_path / "model", dtype=torch.float16)
    config = {"model": str(tmp_path / "model"), "n_pretrain": 0, "preset": "paper"}
    model, tokenizer = common.load_model(common.Run(tmp_path), {"config": config}, CPU)
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())
    assert model.generation_config.eos_token_id == [2] and not model.generation_config.do_sample
    assert tokenizer.pad_token == "</s>" and tokenizer.padding_side == "left"
    checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    for preset, dtype in (("paper", torch.bfloat16), ("laptop", torch.float32)):
        data = {"config": {**config, "preset": preset}}
        model, _ = common.load_model(common.Run(tmp_path), data, CPU)
        assert model.dtype == dtype
