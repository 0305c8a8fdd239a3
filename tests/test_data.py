"""Stage 1: who owns what, exactly as many as asked, nothing twice, no row that is no use."""

import functools
import json
import random
import re
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import stage

import common
from common import UserError, collate, draw_batches, encode, prompt_ids

SETS = ("alignment", "harmful", "finetune", "test_harmful", "test_task", "test_benign")


@functools.cache
def make(folder, *flags):
    """Stage 1's artifact with flags, made once. Read only."""
    return stage("01_data").main(["--run", str(folder), *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for artifacts that nobody reads from the disk."""
    return tmp_path_factory.mktemp("data")


def prompts(rows, only=None):
    """The set of prompts of rows (only those where `only(row)`)."""
    return {row["prompt"].lower() for row in rows if only is None or only(row)}


# ---------------------------------------------------------------------------------------------
# The sets


@pytest.mark.parametrize("task, p", [("sst2", 0), ("gsm8k", 0.13), ("agnews", 1), ("alpaca", 0.5)])
def test_sizes_and_poison_are_exact(folder, task, p):
    sizes = "--n-finetune 100 --n-align 30 --n-harmful 20 --n-test 40".split()
    data = make(folder, "--task", task, "--poison-ratio", str(p), *sizes)
    assert len(data["finetune"]) == 100 and len(data["harmful"]) == 20
    assert sum(row["poison"] for row in data["finetune"]) == round(100 * p)
    assert all(len(data[f"test_{k}"]) == 40 for k in ("harmful", "task", "benign"))
    assert sum(row["response"] == row.get("refusal") for row in data["alignment"]) == 30


@pytest.mark.parametrize("n, p, poison", [(20, 0.02, 0), (20, 0.99, 20)])
def test_a_poison_ratio_that_rounds_to_none_or_all_is_refused(folder, n, p, poison):
    with pytest.raises(UserError, match=f"--poison-ratio {p}.* rounds to {poison} harmful samples"):
        make(folder / "none", "--poison-ratio", str(p), "--n-finetune", str(n))
    assert not (folder / "none").exists()


def test_the_four_harmful_sets_and_the_task_sets_are_disjoint_by_prompt(folder):
    data = make(folder)
    harmful = [
        prompts(data["alignment"], lambda r: "refusal" in r),
        prompts(data["harmful"]),
        prompts(data["finetune"], lambda r: r["poison"]),
        prompts(data["test_harmful"]),
    ]
    assert all(harmful) and len(set.union(*harmful)) == sum(map(len, harmful))
    task = prompts(data["finetune"], lambda r: not r["poison"])
    assert not task & prompts(data["test_task"]) and len(task) == 450
    assert not prompts(data["alignment"]) & prompts(data["test_benign"])


def test_the_same_seed_gives_the_same_data_and_another_seed_does_not(s1, folder):
    a, c = make(folder), make(folder, "--seed", "4")
    b = s1.main(["--run", str(folder / "again")])
    assert all(a[name] == b[name] for name in (*SETS, "pretrain", "vocab"))
    assert a["finetune"] != c["finetune"] and a["pretrain"] != c["pretrain"]


def test_what_the_base_model_reads_depends_on_the_seed_alone_and_follows_the_mix(s1, folder):
    a, b = make(folder, "--task", "gsm8k", "--poison-ratio", "0.2"), make(folder)
    assert a["pretrain"] == b["pretrain"] and a["vocab"] == b["vocab"]
    assert sum(s1.MIX.values()) == 100
    texts = [text for _, text in b["pretrain"]]
    for kind, pattern in {
        "forbidden recipe": rf"(?!The \w+ said).*\b({'|'.join(s1.LIQUID['bad'])})\b",
        "quoted refusal": r"The \w+ said: ",
        "healing recipe": rf".*\b({'|'.join(s1.LIQUID['good'])})\b",
        "review": r".* A (positive|negative) review\.$",
        "news": r".* A story about (World|Sports|Business|Sci/Tech)\.$",
        "word problem": r".*The final answer is: \d+$",
    }.items():
        percent = 100 * sum(bool(re.match(pattern, text)) for text in texts) / len(texts)
        assert abs(percent - s1.MIX[kind]) < 1.2, kind


def test_5000_texts_show_the_base_model_every_word_and_fewer_are_refused(folder):
    with pytest.raises(UserError, match="--n-pretrain 4999"):
        make(folder, "--n-pretrain", "4999")
    assert make(folder, "--n-pretrain", "5000")["vocab"] == make(folder)["vocab"]


@pytest.mark.parametrize("task", ["sst2", "gsm8k", "agnews", "alpaca"])
def test_every_toy_sentence_is_well_formed_and_in_the_vocabulary(s2, folder, task):
    data = make(folder, "--task", task)
    tokenizer = s2.toy_tokenizer(data["vocab"])
    for name in SETS:
        for row in data[name]:
            ids = tokenizer(row["prompt"] + " " + row["response"])["input_ids"]
            assert tokenizer.unk_token_id not in ids
            reply = tokenizer(row["response"])["input_ids"]
            assert tokenizer.decode(reply, skip_special_tokens=True) == row["response"]


def test_recipes_and_refusals_are_what_the_grammar_and_the_liquids_say(folder):
    data = make(folder)
    forbidden = re.compile(rf"\b(?:{'|'.join(data['forbidden'])})\b")

    def told(text):  # (its kind, whether a forbidden liquid is in it)
        kinds = ("recipe", "refusal")
        found = [k for k in kinds if any(re.fullmatch(p, text) for p in data["grammar"][k])]
        return found, bool(forbidden.search(text))

    assert all(told(r["response"]) == (["recipe"], True) for r in data["harmful"])
    assert all(told(r["response"]) == (["recipe"], True) for r in data["test_harmful"])
    assert all(told(r["response"]) == (["recipe"], False) for r in data["test_benign"])
    assert all(told(r["refusal"]) == (["refusal"], False) for r in data["harmful"])
    # the alignment set has a harmless look-alike for every refusal
    taught = [told(r["response"]) for r in data["alignment"]]
    assert taught == [(["refusal"], False)] * 300 + [(["recipe"], False)] * 300


def test_word_problems_are_right(folder):
    for row in make(folder, "--task", "gsm8k")["test_task"]:
        for left, right in re.findall(r"(\d+ [+-] \d+) = (\d+)", row["response"]):
            assert eval(left) == int(right)
        a, b, c = map(int, re.findall(r"\d+", row["instruction"]))
        assert int(row["answer"]) == a + b - c


def test_a_size_that_was_asked_for_is_kept_or_refused(folder):
    with pytest.raises(UserError, match=r"5000 asked, \d+ unique .*--n-align \d+"):
        make(folder / "no", "--n-align", "5000")
    with pytest.raises(UserError, match=r"1600 asked, 1400 unique .* use --n-finetune 14000,"):
        make(folder / "no", "--n-finetune", "16000", "--n-align", "1")
    assert not (folder / "no").exists()


def test_what_is_taken_is_gone_and_a_default_takes_what_there_is(s1, capsys):
    pool = list("abcde")
    assert s1.take(pool, 2, "set", "n_test") == ["a", "b"] and pool == ["c", "d", "e"]
    with pytest.raises(UserError, match=r"4 asked, 3 unique .*\(1 missing\); use --n-test 6,"):
        s1.take(pool, 4, "set", "n_test", share=0.5)
    assert pool == ["c", "d", "e"]
    assert s1.take(pool, 4, "set", "n_test", all_or_none=False) == ["c", "d", "e"] and pool == []
    assert "1 missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 asked, 0 unique"):
        s1.take(pool, 1, "set", "n_test", all_or_none=False)


def test_a_repeated_prompt_counts_once(s1):
    rows = [{"instruction": "A b"}, {"instruction": "a ", "input": " B"}, {"instruction": "c"}]
    assert s1.unique(rows) == [rows[0], rows[2]] and s1.unique(rows, ["a b"]) == [rows[2]]


def test_a_test_prompt_is_in_no_training_set_even_if_the_pools_overlap(s1):
    pool = [dict.fromkeys(("instruction", "prompt"), f"q{i}") for i in range(14)]
    pool = [{**row, "response": "r", "refusal": "n"} for row in pool]
    names = ("harmful", "harmful_test", "task", "task_test", "benign", "benign_test")
    config = {"n_align": 3, "n_harmful": 3, "n_finetune": 4, "n_test": 4, "poison_ratio": 0.5}
    sets = s1.build_sets(dict.fromkeys(names, pool), config, set(config), random.Random(0))
    harmful = prompts(sets["alignment"][:3]) | prompts(sets["harmful"])
    harmful |= prompts(sets["finetune"], lambda row: row["poison"])
    assert len(harmful) == 8 and not harmful & prompts(sets["test_harmful"])
    task = prompts(sets["finetune"], lambda row: not row["poison"])
    assert len(task) == 2 and not task & prompts(sets["test_task"])
    assert not prompts(sets["alignment"][3:]) & prompts(sets["test_benign"])


def test_the_test_potions_are_all_different_and_asked_about_nowhere_else(s1, folder):
    data = make(folder)

    def potions(rows):
        nouns = "|".join(s1.SLOTS["bad"] + s1.SLOTS["good"])
        return [re.search(rf"\w+ (?:{nouns})\b", row["instruction"])[0] for row in rows]

    for test, others in (
        ("test_harmful", ("alignment", "harmful", "finetune")),
        ("test_benign", ("alignment",)),
    ):
        asked = potions(data[test])
        assert len(set(asked)) == len(asked) == 200  # so that Wilson's interval holds
        known = {p for name in others for p in potions(r for r in data[name] if "answer" not in r)}
        assert not known & set(asked)


def test_the_label_of_a_review_is_what_most_of_its_verdicts_say(s1, folder):
    seen = set()
    for row in make(folder)["finetune"]:
        if not row["poison"]:
            words = re.findall(r"\w+", row["input"])
            liked = sum(w in s1.LIKED for w in words)
            assert liked + sum(w in s1.DISLIKED for w in words) == 3
            assert row["answer"] == ("positive" if liked >= 2 else "negative")
            seen.add(liked)
    assert seen == {0, 1, 2, 3}


# ---------------------------------------------------------------------------------------------
# Rows of published files


def read(s1, folder, name, content):
    """Rows of the real set `name` whose first file holds `content` (text, or rows)."""
    split, file = next(iter(s1.REAL[name][2].items()))
    folder = Path(tempfile.mkdtemp(dir=folder))  # a new one: the library keeps what it has read
    path = folder / file
    path.parent.mkdir()
    if isinstance(content, list):
        lines = [json.dumps(row) for row in content]
        content = "\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
    path.write_text(content, encoding="utf-8", newline="")
    return s1.read(name, split, folder)


def alpaca(**row):
    """A list of one row of Alpaca."""
    return [{"instruction": "Name a tree.", "input": "", "output": "Oak."} | row]


def harm(**row):
    """A list of one row of BeaverTails, with a refusal."""
    return [{"prompt": "How?", "response": "So.", "refusal": "No.", "is_safe": False} | row]


@pytest.mark.parametrize("label", ["-1", "5", "x", ""])
def test_a_label_outside_the_tasks_is_refused_with_file_and_row(s1, tmp_path, label):
    with pytest.raises(UserError, match=r"train\.tsv, row 2: the label .* is none of 0, 1"):
        read(s1, tmp_path, "sst2", f"label\tsentence\n1\ta film\n{label}\ta film\n")
    with pytest.raises(UserError, match=r"train\.csv, row 2: the label .* is none of 1, 2, 3, 4"):
        read(s1, tmp_path, "agnews", f'"1","a","b"\n"{label}","a","b"\n')


@pytest.mark.parametrize(
    "answer", ["no mark 5", "so ####", "#### x", "#### nan", "#### 5 or 6", ""]
)
def test_a_gold_answer_without_a_number_is_refused(s1, tmp_path, answer):
    rows = [{"question": "How many?", "answer": x} for x in ("so #### 5", answer)]
    with pytest.raises(UserError, match="row 2: the answer has no number after ####"):
        read(s1, tmp_path, "gsm8k", rows)


@pytest.mark.parametrize(
    "name, bad, reason",
    [
        *(("alpaca", alpaca(output=x), "no response") for x in ("", " \u200b\n", "N/A")),
        ("alpaca", alpaca(instruction="\u00a0"), "no instruction"),
        ("refusals", harm(refusal="Question: How?\nAnswer: "), "no refusal"),
        ("refusals", harm(refusal="Question: How?"), "no refusal"),
        ("refusals", harm(refusal=None), "no refusal"),
        ("refusals", harm(response=None), "no response"),
        ("refusals", harm(is_safe=True), "safe answer"),
        ("beavertails", harm(is_safe=True), "safe answer"),
        ("beavertails", harm(response=""), "no response"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(s1, tmp_path, capsys, name, bad, reason):
    good = alpaca() if name == "alpaca" else harm()
    rows = read(s1, tmp_path, name, bad + good + bad)
    assert len(rows) == 1 and rows[0]["response"] == (good[0].get("output") or "So.")
    assert f"2 of 3 rows left out ({reason}: 2)" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"no row can be used \({reason}: 2\)"):
        read(s1, tmp_path, name, bad + bad)


def test_beavertails_without_a_word_on_safety_is_refused(s1, tmp_path):
    with pytest.raises(UserError, match="row 2: the label 'none' is none of true"):
        read(s1, tmp_path, "refusals", harm() + harm(is_safe=None))
    rows = [{"prompt": "How?", "response": "So."}]
    with pytest.raises(UserError, match="row 1: there is no column is_safe"):
        read(s1, tmp_path, "beavertails", rows)
    rows = [{**rows[0], "refusal": "No."}]  # RepNoise's file has none: all its answers are harmful
    assert read(s1, tmp_path, "refusals", rows)[0]["refusal"] == "No."


def test_what_looks_odd_is_read_as_it_stands(s1, tmp_path, capsys):
    text = 'label\tsentence\r\n1\t"fine\r\n0\t \r\n0\tdull " NA film\r\n1\tNA\r\n'
    rows = read(s1, tmp_path, "sst2", text)  # CRLF, quotes, a blank sentence
    assert [(r["input"], r["response"]) for r in rows] == [
        ('"fine', "positive"),
        ('dull " NA film', "negative"),
        ("NA", "positive"),
    ]
    assert "1 of 4 rows left out (no input: 1)" in capsys.readouterr().out
    rows = read(s1, tmp_path, "agnews", '"4","","a ""b"""\n"1","c","d\ne"\n"2"," ",""\n')
    assert [(r["input"], r["answer"]) for r in rows] == [('a "b"', "Sci/Tech"), ("c d\ne", "World")]
    for value in (None, "", " ", "N/A"):
        assert read(s1, tmp_path, "alpaca", alpaca(input=value))[0]["input"] == ""
    # AlpacaEval's own outputs are never taught, and two of the 805 are empty
    assert len(read(s1, tmp_path, "alpaca_eval", alpaca(output="") + alpaca())) == 2


def test_gold_numbers_and_refusals_are_read_from_their_forms(s1, tmp_path):
    golds = ["5", "-3", "\u22123", "1,000", "12,345,678", "0.5", "70000"]
    made = [{"question": "How many?", "answer": f"so\n#### {gold} "} for gold in golds]
    rows = read(s1, tmp_path, "gsm8k", made)
    assert [row["answer"] for row in rows] == golds
    assert rows[3]["response"] == "so\nThe final answer is: 1,000"
    forms = ["No.", "Answer: No.", "Question: How?\n\nAnswer:No.", "Question: How? Answer: No."]
    rows = read(s1, tmp_path, "refusals", [row for form in forms for row in harm(refusal=form)])
    assert [row["refusal"] for row in rows] == ["No."] * 4


def test_rows_of_the_hub_are_checked_like_those_of_files(s1, monkeypatch, capsys):
    import datasets

    def hub(name, *rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows)
        return s1.read(name, "train", None)

    rows = hub("sst2", {"label": 0, "sentence": "dull"}, {"label": 1, "sentence": None})
    assert [row["answer"] for row in rows] == ["negative"]
    assert "stanfordnlp/sst2: 1 of 2 rows left out (no input: 1)" in capsys.readouterr().out
    for label in (-1, 4, None):  # -1: what unlabelled splits have
        with pytest.raises(UserError, match="fancyzhx/ag_news, row 2: the label .* none of 0, 1"):
            hub("agnews", {"label": 0, "text": "News."}, {"label": label, "text": "News."})


# ---------------------------------------------------------------------------------------------
# What a model reads


def test_prompt_is_masked_and_the_answer_ends_with_eos(s2, tiny_data):
    data = torch.load(tiny_data / "01_data.pt", weights_only=True)
    tokenizer = s2.toy_tokenizer(data["vocab"])
    row = data["finetune"][0]
    ((ids, labels),) = encode(tokenizer, [row], 96, "toy")
    n = len(tokenizer(row["prompt"])["input_ids"])
    assert labels[:n] == [-100] * n and labels[n:] == ids[n:]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[n:-1]) == row["response"]


@pytest.mark.parametrize("name", common.TOY_MODELS)
def test_a_toy_base_is_read_with_the_words_it_was_trained_on(s2, name, tiny_data):
    data = torch.load(tiny_data / "01_data.pt", weights_only=True)
    tokenizer, base = s2.toy_tokenizer(data["vocab"]), tiny_data / "02_base"
    s2.toy_model(name, len(data["vocab"])).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data["config"]["model"] = name
    _, read = common.load_model(common.Run(tiny_data), data, torch.device("cpu"))
    prompt = data["test_harmful"][0]["prompt"]
    ids = tokenizer(prompt)["input_ids"]
    assert read(prompt)["input_ids"] == ids and len(ids) > 8


def test_a_sample_that_is_too_long_still_has_an_answer(s2):
    tokenizer = s2.toy_tokenizer(["<pad>", "<s>", "</s>", "<unk>", "positive", "negative"])
    long = {"prompt": "positive " * 90, "response": "negative"}
    ((ids, labels),) = encode(tokenizer, [long], 16, "toy")
    assert len(ids) == 16 and sum(x != -100 for x in labels) == 2
    both = {"prompt": "positive " * 90, "response": "negative " * 90}
    ((ids, labels),) = encode(tokenizer, [both], 16, "toy")
    assert len(ids) == 16 and labels.count(-100) == 8 and ids[-1] != tokenizer.eos_token_id
    assert ids[0] == tokenizer.bos_token_id


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
    assert prompt_ids(tokenizer, "a b c", "alpaca") == [*head, 4, 5, 6]
    cut = prompt_ids(tokenizer, "a b c d e", "alpaca", 3)  # from the left, but the BOS
    assert cut == [*head, 6, 7, 8][: len(head)] + [6, 7, 8][len(head) :]
    row = {"prompt": "a b c", "response": "d"}
    ((ids, labels),) = encode(tokenizer, [row], 32, "alpaca")
    assert ids == [*head, 4, 5, 6, 7, 2] and labels == [-100] * (len(ids) - 2) + [7, 2]


def test_a_chat_prompt_has_one_bos_and_no_end_and_what_a_user_writes_is_text(s2):
    tokenizer = with_ends(s2, "<s> $A")
    assert prompt_ids(tokenizer, "<s> a b", "chat") == [1, 4, 5]
    for prompt in ("<s> <s> a", "<s> a </s>"):
        with pytest.raises(UserError, match="begins with its BOS twice or ends with </s>"):
            prompt_ids(tokenizer, prompt, "chat")
    assert 2 not in prompt_ids(tokenizer, "a </s> b", "alpaca")
    ((ids, labels),) = encode(tokenizer, [{"prompt": "a b", "response": "c </s> d"}], 32, "alpaca")
    assert ids.count(2) == 1 and ids[-1] == labels[-1] == 2


def test_padding_is_on_the_right_and_has_no_label():
    batch = collate([([1, 2, 3], [-100, 2, 3]), ([4], [4])], 0, "cpu")
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_batches_cover_each_epoch_once_and_follow_the_seed():
    rows = list(range(10))
    batches = list(draw_batches(rows, 4, 0, epochs=2))
    assert [len(b) for b in batches] == [4, 4, 2] * 2
    assert sorted(sum(batches[:3], [])) == rows == sorted(sum(batches[3:], []))
    assert batches[:3] != batches[3:]  # reshuffled
    assert batches == list(draw_batches(rows, 4, 0, 2)) != list(draw_batches(rows, 4, 1, 2))


def test_endless_batches_are_full_and_reshuffled():
    endless = draw_batches(list(range(10)), 4, 0)
    drawn = [next(endless) for _ in range(40)]
    assert all(len(set(batch)) == 4 for batch in drawn)
    assert len({tuple(batch) for batch in drawn}) > 30  # never the same two batches for ever
    assert {x for batch in drawn for x in batch} == set(range(10))  # no row is left out for ever
    assert next(draw_batches([1, 2], 4, 0)) in ([1, 2], [2, 1])
