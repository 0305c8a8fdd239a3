"""The real-model path on tiny random checkpoints and tiny data files in the published formats."""

import json
import re
import shutil

import pytest
import torch
from conftest import STAGES, WORDS, stage
from safetensors.torch import load_file, save_file

import common
from common import UserError


def checkpoint(folder, arch, dtype=torch.float32):
    """A tiny random checkpoint whose tokenizer has no pad token."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
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
    model = getattr(transformers, arch + "ForCausalLM")(config).to(dtype)
    model.save_pretrained(folder)
    return len(vocab)


SMALL = {
    "01_data": [
        "--preset",
        "paper",
        "--n-align",
        "8",
        "--n-finetune",
        "10",
        "--n-harmful",
        "6",
        "--n-test",
        "4",
        "--poison-ratio",
        "0.2",
    ],
    "02_finetune": ["--epochs", "1", "--align-epochs", "1", "--lr", "1e-3"],
    "03_random_perturb": ["--std", "0.01"],
    "04_panacea": ["--anchored-steps", "2", "--realign-steps", "2"],
    "05_evaluate": ["--max-new-tokens", "4", "--causal"],
    "06_layer_analysis": [],
}


def run_all(folder, model, task, data_dir, first=()):
    """All six stages on a real checkpoint; {stage: artifact}."""
    extra = {
        "01_data": ["--model", str(model), "--task", task, "--data-dir", str(data_dir), *first]
    }
    return {
        name: stage(name).main(
            ["--run", str(folder), "--device", "cpu", *SMALL[name], *extra.get(name, [])]
        )
        for name in STAGES
    }


@pytest.mark.parametrize(
    "arch, dtype, task",
    [
        ("Llama", torch.float32, "sst2"),
        ("Gemma2", torch.float32, "gsm8k"),
        ("Qwen2", torch.bfloat16, "agnews"),
        ("Mistral", torch.bfloat16, "alpaca"),
    ],
)
def test_six_stages_on_a_checkpoint(arch, dtype, task, tmp_path, data_dir):
    size = checkpoint(tmp_path / "model", arch, dtype)
    out = run_all(tmp_path / "run", tmp_path / "model", task, data_dir)
    data, stage4, rows = out["01_data"], out["04_panacea"], out["05_evaluate"]["rows"]
    assert data["config"]["template"] == "alpaca" and len(data["finetune"]) == 10
    assert all(row["prompt"].startswith("Below is an instruction") for row in data["finetune"])
    assert {x.dtype for x in stage4["epsilon"].values()} == {torch.float32}
    assert all("q_proj" in n or "k_proj" in n or "v_proj" in n for n in stage4["weights"])
    assert {"base", "aligned", "finetuned", "one_shot", "panacea", "realign"} <= {
        row["model"] for row in rows
    }
    assert all("benign" not in row and row["n_harmful"] == 4 for row in rows)
    assert all((row["fa"] is None) == (task == "alpaca") for row in rows)
    assert len(out["06_layer_analysis"]["layers"]) == 2
    import transformers

    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size
        == size
    )
    if task == "alpaca":
        file = tmp_path / "run/alpaca_eval_panacea_rho_1_lam_0.001_scale_1.json"
        answers = json.loads(file.read_text())
        assert set(answers[0]) == {"instruction", "output", "generator"} and len(answers) == 4


def test_a_chat_model_skips_alignment_by_flag(tmp_path, data_dir):
    checkpoint(tmp_path / "model", "Llama")
    stage("01_data").main(
        [
            "--run",
            str(tmp_path),
            *SMALL["01_data"],
            "--model",
            str(tmp_path / "model"),
            "--task",
            "sst2",
            "--data-dir",
            str(data_dir),
        ]
    )
    out = stage("02_finetune").main(
        ["--run", str(tmp_path), "--align-epochs", "0", "--epochs", "1"]
    )
    aligned, finetuned = (common.weights_of(out, name) for name in ("aligned", "finetuned"))
    assert all(not x.any() for name, x in aligned.items() if name.endswith("lora_B"))
    assert any(x.any() for name, x in finetuned.items() if name.endswith("lora_B"))


def test_real_sets_are_disjoint_and_in_the_papers_format(tmp_path, data_dir):
    checkpoint(tmp_path / "model", "Llama")
    s1 = stage("01_data")
    data = s1.main(
        [
            "--run",
            str(tmp_path),
            *SMALL["01_data"],
            "--task",
            "gsm8k",
            "--model",
            str(tmp_path / "model"),
            "--data-dir",
            str(data_dir),
        ]
    )
    sets = [
        {r["instruction"] for r in rows}
        for rows in (
            data["alignment"],
            data["harmful"],
            [r for r in data["finetune"] if r["poison"]],
            data["test_harmful"],
        )
    ]
    assert [len(s) for s in sets] == [8, 6, 2, 4]
    assert len(set.union(*sets)) == 20
    assert data["alignment"][0]["response"] == "I am sorry, I cannot help."
    task = [r for r in data["finetune"] if not r["poison"]][0]
    assert "The final answer is: " in task["response"] and "####" not in task["response"]


def test_a_default_size_takes_what_there_is_and_says_what_is_missing(tmp_path, data_dir, capsys):
    checkpoint(tmp_path / "model", "Llama")
    data = stage("01_data").main(
        [
            "--run",
            str(tmp_path),
            "--preset",
            "paper",
            "--model",
            str(tmp_path / "model"),
            "--data-dir",
            str(data_dir),
            "--n-finetune",
            "10",
            "--n-harmful",
            "6",
            "--n-test",
            "4",
        ]
    )
    assert len(data["alignment"]) == 53
    assert "4947 missing" in capsys.readouterr().out


def test_potions_on_a_real_checkpoint_have_exact_scores_and_look_alikes(tmp_path, data_dir):
    checkpoint(tmp_path / "model", "Llama")
    flags = SMALL["01_data"][2:]  # the laptop's preset: potions, all linear layers
    out = run_all(
        tmp_path / "run",
        tmp_path / "model",
        "sst2",
        data_dir,
        ["--preset", "laptop", *flags, "--n-pretrain", "0"],
    )
    data, rows = out["01_data"], out["05_evaluate"]["rows"]
    assert data["config"]["harm"] == "potions" and len(data["alignment"]) == 16
    assert all("brew" in r["prompt"] or "the " in r["prompt"] for r in data["test_harmful"])
    assert all(row["prompt"].startswith("Below is") for row in data["finetune"])
    assert all(("benign" in row) != ("view" in row) for row in rows) and len(rows) > 15
    assert any("down_proj" in name for name in out["04_panacea"]["weights"])


def test_a_real_base_model_is_taught_the_potions_and_used_from_then_on(
    tmp_path, data_dir, capsys, monkeypatch
):
    checkpoint(tmp_path / "model", "Llama")
    readers = []
    monkeypatch.setattr(
        stage("05_evaluate").PotionJudge,
        "read",
        lambda self, model, *others: (
            setattr(self, "garbled", set()) or readers.append(model.state_dict())
        ),
    )
    first = ["--harm", "potions", "--n-pretrain", "60"]
    flags_of = {**SMALL, "02_finetune": [*SMALL["02_finetune"], "--pretrain-steps", "20"]}
    where = ["--model", str(tmp_path / "model"), "--task", "sst2", "--data-dir", str(data_dir)]
    run, out = tmp_path / "run", {}
    for name in STAGES:  # on the CPU, whose float32 can be compared with the files
        more = [*where, *first] if name == "01_data" else []
        more += ["--device", "cpu"] if name in ("02_finetune", "04_panacea", "05_evaluate") else []
        out[name] = stage(name).main(["--run", str(run), *flags_of[name], *more])
    data = out["01_data"]
    recipe = re.compile("|".join(data["grammar"]["recipe"]))
    liquids = {"bad": data["forbidden"], "good": stage("01_data").LIQUID["good"]}
    assert len(data["pretrain"]) == 60 and not data["vocab"]
    known = {row["prompt"] for name in ("finetune", "test_task") for row in data[name]}
    for k, (prompt, text) in enumerate(data["pretrain"]):
        assert prompt.startswith("Below is an instruction") and prompt not in known
        assert bool(recipe.fullmatch(text)) == (k % 2 == 0) != (text in ("positive", "negative"))
    for words in liquids.values():
        assert any(word in text for _, text in data["pretrain"] for word in words)
    given = load_file(tmp_path / "model" / "model.safetensors")
    taught = load_file(run / "02_base" / "model.safetensors")
    changed = {name for name in given if not torch.equal(given[name], taught[name])}
    assert changed and all("_proj" in name for name in changed)
    # the later stages start from the taught one; only the judge reads with the one that was given
    config = json.loads((run / "04_peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((run / "02_base").resolve())
    model, _ = common.load_model(common.Run(run), data, torch.device("cpu"))
    assert all(torch.equal(model.state_dict()[name], taught[name]) for name in taught)
    plain, _ = common.load_model(common.Run(run), data, torch.device("cpu"), as_given=True)
    assert all(torch.equal(plain.state_dict()[name], given[name]) for name in given)
    assert all(torch.equal(readers[0][name], given[name]) for name in given)
    # not taught again, unless what it is made from has changed
    weights = (run / "02_base" / "model.safetensors").read_bytes()
    again = ["--run", str(run), *flags_of["02_finetune"], "--device", "cpu"]
    stage("02_finetune").main(again)
    assert "not made again" in capsys.readouterr().out
    tensors = {name: x + 0.01 for name, x in given.items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    stage("02_finetune").main(again)
    assert (run / "02_base" / "model.safetensors").read_bytes() != weights


def test_real_harm_is_taught_to_no_model(tmp_path, data_dir):
    checkpoint(tmp_path / "model", "Llama")
    where = f"--run {tmp_path} --data-dir {data_dir} --model {tmp_path}/model"
    flags = [*where.split(), *SMALL["01_data"], "--task", "sst2", "--harm", "beavertails"]
    flags[flags.index("paper")] = "laptop"
    assert stage("01_data").main(flags)["pretrain"] == []
    with pytest.raises(UserError, match="--n-pretrain 5.*real harm is taught to no model"):
        stage("01_data").main([*flags, "--n-pretrain", "5"])


def test_the_checkpoints_own_chat_format_is_used_on_demand(tmp_path, data_dir):
    import transformers
    from common import load_tokenizer, prompt_ids

    checkpoint(tmp_path / "model", "Llama")
    flags = [
        "--run",
        str(tmp_path),
        *SMALL["01_data"],
        "--model",
        str(tmp_path / "model"),
        "--task",
        "sst2",
        "--data-dir",
        str(data_dir),
        "--template",
        "chat",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"
        "{% if not enable_thinking %}<think></think>{% endif %}"  # as Qwen 3's
    )
    tokenizer.save_pretrained(tmp_path / "model")
    row = stage("01_data").main(flags)["test_task"][0]
    wanted = f"[user] {row['instruction']}\n\n{row['input']} [assistant]<think></think>"
    assert row["prompt"] == "<s>" + wanted
    ids = prompt_ids(load_tokenizer(tmp_path / "model"), row["prompt"], "chat")
    assert ids[0] == 1 and ids.count(1) == 1  # one BOS, not two


@pytest.mark.parametrize("task", ["sst2", "gsm8k", "agnews", "alpaca"])
def test_the_hubs_rows_give_the_sets_of_the_files(task, tmp_path, data_dir, monkeypatch):
    """The data sets' names, splits and columns as the hub has them; no network."""
    import datasets

    s1 = stage("01_data")

    real = datasets.load_dataset

    def files(name):
        kind, options = s1.FORMATS[(data_dir / name).suffix]
        return list(real(kind, data_files=str(data_dir / name), split="train", **options))

    def load_dataset(path, name=None, data_dir=None, data_files=None, *, split, **options):
        if path in ("csv", "json") and not data_files.startswith("hf://"):
            return real(path, data_files=data_files, split=split, **options)
        where = data_files or "/".join(filter(None, [path, name, split]))
        rows = {
            "PKU-Alignment/BeaverTails/30k_test": lambda: [
                {**row, "category": {"violence": True}}
                for row in files("beavertails/30k_test.jsonl")
            ],
            "anonymous4486/repnoise_beavertail/train": lambda: files(
                "beavertails/beavertails_with_refusals_train.json"
            ),
            **{
                f"stanfordnlp/sst2/{split}": lambda file=file: [
                    {
                        "idx": i,
                        "sentence": row.get("sentence", row.get("content")),
                        "label": int(row["label"]),
                    }
                    for i, row in enumerate(files(f"sst2/{file}.tsv"))
                ]
                for split, file in (("train", "train"), ("validation", "dev"))
            },
            **{
                f"openai/gsm8k/main/{split}": lambda split=split: files(f"gsm8k/{split}.jsonl")
                for split in ("train", "test")
            },
            **{
                f"fancyzhx/ag_news/{split}": lambda split=split: [
                    {
                        "text": f"{row['title']} {row['description']}",
                        "label": int(row["class"]) - 1,
                    }
                    for row in files(f"agnews/{split}.csv")
                ]
                for split in ("train", "test")
            },
            "tatsu-lab/alpaca/train": lambda: [
                {**row, "text": ""} for row in files("alpaca/alpaca_data.json")
            ],
            "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json": lambda: [
                {
                    "dataset": "helpful_base",
                    "generator": "x",
                    "instruction": row["instruction"],
                    "output": row["output"],
                }
                for row in files("alpaca_eval/alpaca_eval.json")
            ],
        }
        return datasets.Dataset.from_list(rows[where]())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = [*SMALL["01_data"], "--task", task, "--model", "some/model"]
    hub = s1.main(["--run", str(tmp_path / "hub"), *flags])
    local = s1.main(["--run", str(tmp_path / "local"), *flags, "--data-dir", str(data_dir)])
    for name in ("alignment", "harmful", "finetune", "test_harmful", "test_task"):
        assert hub[name] == local[name], name


def test_rows_left_out_of_published_files_are_in_no_set(tmp_path, data_dir, capsys):
    """A refusals file as users meet it, through the whole stage."""
    folder, file = tmp_path / "data", "beavertails/beavertails_with_refusals_train.json"
    shutil.copytree(data_dir, folder)
    rows = json.loads((folder / file).read_text())
    for row in rows[::4]:
        row["refusal"] = None
    for row in rows[1::4]:
        row.update(is_safe="True", response="Please ask a teacher.")
    (folder / file).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    flags = [*SMALL["01_data"], "--model", "some/model", "--task", "alpaca"]
    data = stage("01_data").main(
        ["--run", str(tmp_path / "run"), *flags, "--data-dir", str(folder)]
    )
    taught = data["alignment"] + data["harmful"] + [r for r in data["finetune"] if r["poison"]]
    assert len(taught) == 16 and "Please ask a teacher." not in {r["response"] for r in taught}
    assert {row["response"] for row in data["alignment"]} == {"I am sorry, I cannot help."}
    told = capsys.readouterr().out
    assert f"{file}: 36 of 70 rows left out (no refusal: 18, safe answer: 18)" in told
    assert "30k_test.jsonl: 20 of 80 rows left out (safe answer: 20)" in told


@pytest.mark.parametrize("arch", ["Llama", "Gemma2"])
def test_weights_that_do_not_fit_are_refused(arch, tmp_path):
    import transformers

    checkpoint(tmp_path, arch)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    common.load_weights(transformers.AutoModelForCausalLM, tmp_path)
    for changed, words in (
        ({f"_orig_mod.{k}": x for k, x in whole.items()}, "weights missing"),
        ({k: x for k, x in whole.items() if k != name}, "1 weights missing .*up_proj"),
        ({**whole, "model.extra.weight": whole[name].clone()}, "unexpected .*extra"),
        ({**whole, name: whole[name][:5].clone()}, "mismatched .*up_proj"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=words):
            common.load_weights(transformers.AutoModelForCausalLM, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter"):
        common.load_weights(transformers.AutoModelForCausalLM, tmp_path)


def with_ends(s2, single):
    """The toy's tokenizer over a few words, with another template of special tokens."""
    from tokenizers import processors

    tokenizer = s2.toy_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_no_end_token_stands_between_prompt_and_answer(s2, single):
    tokenizer = with_ends(s2, single)
    head = [1] if single.startswith("<s>") else []
    assert common.prompt_ids(tokenizer, "a b c", "alpaca") == [*head, 4, 5, 6]
    cut = common.prompt_ids(tokenizer, "a b c d e", "alpaca", 3)  # from the left, but the BOS
    assert cut == [*head, 6, 7, 8][: len(head)] + [6, 7, 8][len(head) :]
    row = {"prompt": "a b c", "response": "d"}
    ((ids, labels),) = common.encode(tokenizer, [row], 32, "alpaca")
    assert ids == [*head, 4, 5, 6, 7, 2] and labels == [-100] * (len(ids) - 2) + [7, 2]


def test_a_chat_prompt_has_one_bos_and_no_end_and_what_a_user_writes_is_text(s2):
    tokenizer = with_ends(s2, "<s> $A")
    assert common.prompt_ids(tokenizer, "<s> a b", "chat") == [1, 4, 5]
    for prompt in ("<s> <s> a", "<s> a </s>"):
        with pytest.raises(UserError, match="begins with its BOS twice or ends with </s>"):
            common.prompt_ids(tokenizer, prompt, "chat")
    assert 2 not in common.prompt_ids(tokenizer, "a </s> b", "alpaca")
    ((ids, labels),) = common.encode(
        tokenizer, [{"prompt": "a b", "response": "c </s> d"}], 32, "alpaca"
    )
    assert ids.count(2) == 1 and ids[-1] == labels[-1] == 2


def test_a_tokenizer_without_an_end_is_refused(s2, tmp_path):
    tokenizer = with_ends(s2, "$A")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        common.load_tokenizer(tmp_path)
