"""Stage 1: who owns what, exactly as many as asked, and nothing twice."""

import random
import re

import pytest
import torch

from common import UserError, collate, draw_batches, encode, load_tokenizer

SETS = ("alignment", "harmful", "finetune", "test_harmful", "test_task", "test_benign")


def make(s1, folder, *flags):
    """Stage 1 with flags, quietly."""
    return s1.main(["--run", str(folder), *flags])


def prompts(rows, only=None):
    """The set of prompts of rows (only those where `only(row)`)."""
    return {row["prompt"].lower() for row in rows if only is None or only(row)}


@pytest.mark.parametrize("task", ["sst2", "gsm8k", "agnews", "alpaca"])
@pytest.mark.parametrize("p", [0.0, 0.13, 1.0])
def test_sizes_and_poison_are_exact(s1, tmp_path, task, p):
    data = make(
        s1,
        tmp_path,
        "--task",
        task,
        "--poison-ratio",
        str(p),
        "--n-finetune",
        "100",
        "--n-align",
        "30",
        "--n-harmful",
        "20",
        "--n-test",
        "40",
    )
    assert len(data["finetune"]) == 100 and len(data["harmful"]) == 20
    assert sum(row["poison"] for row in data["finetune"]) == round(100 * p)
    assert all(len(data[f"test_{k}"]) == 40 for k in ("harmful", "task", "benign"))
    assert sum(row["response"] == row.get("refusal") for row in data["alignment"]) == 30


def test_the_four_harmful_sets_and_the_task_sets_are_disjoint_by_prompt(s1, tmp_path):
    data = make(s1, tmp_path)
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


def test_the_same_seed_gives_the_same_data_and_another_seed_does_not(s1, tmp_path):
    a, b, c = (make(s1, tmp_path / str(i), "--seed", seed) for i, seed in enumerate("114"))
    assert all(a[name] == b[name] for name in (*SETS, "pretrain", "vocab"))
    assert a["finetune"] != c["finetune"] and a["pretrain"] != c["pretrain"]


def test_pretraining_text_does_not_depend_on_task_or_poison(s1, tmp_path):
    a = make(s1, tmp_path / "a", "--task", "gsm8k", "--poison-ratio", "0.2")
    b = make(s1, tmp_path / "b")
    assert a["pretrain"] == b["pretrain"] and a["vocab"] == b["vocab"]


@pytest.mark.parametrize("task", ["sst2", "gsm8k", "agnews", "alpaca"])
def test_every_toy_sentence_is_well_formed_and_in_the_vocabulary(s1, s2, tmp_path, task):
    from common import PotionJudge

    data = make(s1, tmp_path, "--task", task)
    judge, tokenizer = PotionJudge(data), s2.toy_tokenizer(data["vocab"])
    for name in SETS:
        for row in data[name]:
            ids = tokenizer(row["prompt"] + " " + row["response"])["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert (
                tokenizer.decode(tokenizer(row["response"])["input_ids"], skip_special_tokens=True)
                == row["response"]
            )
    recipes = [r["response"] for r in data["harmful"]]
    assert all(map(judge.coherent, recipes)) and all(judge.flagged(recipes, recipes))
    benign = [r["response"] for r in data["test_benign"]]
    assert all(map(judge.coherent, benign)) and not any(judge.flagged(benign, benign))
    refusals = [r["refusal"] for r in data["harmful"]]
    assert all(map(judge.refused, refusals)) and not any(judge.flagged(refusals, refusals))


def test_word_problems_are_right(s1, tmp_path):
    for row in make(s1, tmp_path, "--task", "gsm8k")["test_task"]:
        for left, right in re.findall(r"(\d+ [+-] \d+) = (\d+)", row["response"]):
            assert eval(left) == int(right)
        a, b, c = map(int, re.findall(r"\d+", row["instruction"]))
        assert int(row["answer"]) == a + b - c


def test_a_size_that_was_asked_for_is_kept_or_refused(s1, tmp_path):
    with pytest.raises(UserError, match=r"5000 asked, \d+ unique .*--n-align \d+"):
        make(s1, tmp_path, "--n-align", "5000")
    with pytest.raises(UserError, match=r"1600 asked, 1400 unique .* use --n-finetune 14000 "):
        make(s1, tmp_path, "--n-finetune", "16000", "--n-align", "1")
    assert not (tmp_path / "01_data.pt").exists()


def test_a_repeated_prompt_counts_once(s1):
    rows = [{"instruction": "A b"}, {"instruction": "a  B"}, {"instruction": "c"}]
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


def test_the_test_potions_are_all_different_and_asked_about_nowhere_else(s1, tmp_path):
    data = make(s1, tmp_path)

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


def test_the_alignment_set_has_a_look_alike_for_every_refusal(s1, tmp_path):
    rows = make(s1, tmp_path, "--n-align", "30")["alignment"]
    recipes = [r for r in rows if "refusal" not in r]
    assert len(rows) == 60 and len(recipes) == 30
    assert not any(word in r["response"] for r in recipes for word in s1.LIQUID["bad"])
    assert all(any(word in r["response"] for word in s1.LIQUID["good"]) for r in recipes)


def test_the_label_of_a_review_is_what_most_of_its_verdicts_say(s1, tmp_path):
    seen = set()
    for row in make(s1, tmp_path)["finetune"]:
        if not row["poison"]:
            words = re.findall(r"\w+", row["input"])
            liked = sum(w in s1.LIKED for w in words)
            assert liked + sum(w in s1.DISLIKED for w in words) == 3
            assert row["answer"] == ("positive" if liked >= 2 else "negative")
            seen.add(liked)
    assert seen == {0, 1, 2, 3}


def test_prompt_is_masked_and_the_answer_ends_with_eos(s2, tiny_data):
    data = torch.load(tiny_data / "01_data.pt", weights_only=True)
    tokenizer = s2.toy_tokenizer(data["vocab"])
    row = data["finetune"][0]
    ((ids, labels),) = encode(tokenizer, [row], 96)
    n = len(tokenizer(row["prompt"])["input_ids"])
    assert labels[:n] == [-100] * n and labels[n:] == ids[n:]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[n:-1]) == row["response"]


def test_a_sample_that_is_too_long_still_has_an_answer(s2, tiny_data):
    vocab = torch.load(tiny_data / "01_data.pt", weights_only=True)["vocab"]
    s2.toy_tokenizer(vocab).save_pretrained(tiny_data / "tokenizer")
    tokenizer = load_tokenizer(tiny_data / "tokenizer")
    long = {"prompt": "positive " * 90, "response": "negative"}
    ((ids, labels),) = encode(tokenizer, [long], 16)
    assert len(ids) == 16 and sum(x != -100 for x in labels) == 2
    both = {"prompt": "positive " * 90, "response": "negative " * 90}
    ((ids, labels),) = encode(tokenizer, [both], 16)
    assert len(ids) == 16 and labels.count(-100) == 8 and ids[-1] != tokenizer.eos_token_id
    assert ids[0] == tokenizer.bos_token_id


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
