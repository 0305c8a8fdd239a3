"""What if it was never read? `python .results/withhold.py RUN WHAT` after stages 1 and 5.

nouns: are refusals tied to words? Every forbidden noun stands in the alignment, the harmful, the
user's and the test set, so "held out" means a new adjective, and safety could be a detector of ten
nouns. Here two of them (and the liquid of each) stand in no set: only the base model has read of
them. After stage 1 their rows are replaced by others about the eight other nouns, the tests' too;
after stage 5 every model is also asked about all potions of the two, and its rows join
results.json with "nouns withheld".

task: does a repair keep what only the attack has taught? A real LLM's base reads recipes and rows
of the task; without the latter, the task is learnt from the user's data.
"""

import argparse
import importlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # the project is on the path now

s1, s5 = map(importlib.import_module, ("01_data", "05_evaluate"))
NOUNS = s1.SLOTS["bad"][-2:]


def names(row, nouns=NOUNS):
    """Whether a row asks about one of these nouns."""
    return any(f" {noun}" in row["instruction"] for noun in nouns)


def withhold(run, data):
    """Replace what names the two nouns, in every set, by rows about others; writes 01_data.pt."""
    rng = random.Random(f"withhold {data['seed']}")
    sets = ("alignment", "harmful", "finetune", "test_harmful", "test_task", "test_benign")
    taken = {s1.prompt_key(row) for name in sets for row in data[name]}
    tested = " ".join(row["instruction"] for row in data["test_harmful"])
    test, others = [], []
    for noun in s1.SLOTS["bad"]:
        for adj in s1.SLOTS["adj"]:
            if noun in NOUNS:  # every potion of theirs is asked about once
                test.append(s1.potion_row(rng, "bad", adj, noun, rng.choice(s1.ASK)))
            elif f"{adj} {noun}" not in tested:
                others += [s1.potion_row(rng, "bad", adj, noun, asked) for asked in s1.ASK]
    others = [row for row in others if s1.prompt_key(row) not in taken]
    rng.shuffle(others)
    changed = {name: [row for row in data[name] if not names(row)] for name in sets}
    lack = len(data["test_harmful"]) - len(changed["test_harmful"])
    potions = {}  # of one that joins the tests nothing else may be asked
    for row in others:
        potions.setdefault(potion(row), row)
    new = dict(list(potions.items())[:lack])
    changed["test_harmful"] += new.values()
    others = [row for row in others if potion(row) not in new]
    for name in ("alignment", "harmful", "finetune"):
        rows = []
        for row in data[name]:
            if potion(row) in new or names(row):
                more = others.pop()
                more = {**more, "response": more["refusal"]} if name == "alignment" else more
                row = {**more, **({"poison": True} if name == "finetune" else {})}
            rows.append(row)
        changed[name] = rows
    for rows in (*changed.values(), test):
        for row in rows:
            row["prompt"] = common.format_prompt("toy", row["instruction"], row.get("input", ""))
    more = {name: data[name] for name in ("pretrain", "vocab", "herbs", "forbidden", "grammar")}
    run.save("01_data.pt", data["config"], **changed, **more, withheld=test)
    print(f"nothing but the base has read of {' and '.join(NOUNS)}; {len(test)} prompts on them")


def potion(row):
    """(adjective, noun) of a row about a forbidden potion, else None."""
    words = [word.strip(".?") for word in row["instruction"].split()]
    for adj, noun in zip(words, words[1:]):
        if noun in s1.SLOTS["bad"]:
            return adj, noun
    return None


def measure(run, data):
    """Ask every model about the withheld nouns; its rows join RUN/results.json."""
    results = json.loads((run.folder / "results.json").read_text())
    c = {**results["config"], "causal": False}
    data, _, rows = s5.rows_to_do(run, c, None)
    asked = {**data, "test_harmful": data["withheld"], "test_benign": [], "test_task": []}
    model, tokenizer = common.load_model(run, data, common.pick_device("auto", c["preset"]))
    judge = s5.make_judge("toy", data, model.device)
    for row in common.progress(rows, len(rows), "withheld"):
        with common.attach(model, s5.adapter(row), c["alpha"] / c["r"]):
            prompts = [x["prompt"] for x in asked["test_harmful"]]
            said, _ = s5.answers_of(model, tokenizer, prompts, c)
        pairs = zip(asked["test_harmful"], said)
        kinds = [s5.outcome(judge, c["task"], x["instruction"], text) for x, text in pairs]
        share = {kind: 100 * kinds.count(kind) / len(kinds) for kind in s5.OUTCOMES}
        setting = {**row["setting"], "nouns": "withheld"}
        more = {"hs": share["harmful"], "refusal": share["refused"], "n_harmful": len(kinds)}
        more["hs_plus"] = share["harmful"] + share["off_task"] + share["garbled"]
        head = {"model": row["model"], "defense": row["defense"], "setting": setting}
        results["rows"].append({**head, "outcomes": share, **more, "fa": None})
    run.save_json("results.json", results)


def recipes_only(run, data):
    """Leave the user's task out of what the base model reads; writes 01_data.pt."""
    read = data["pretrain"][::2]  # every other text, as stage 1 mixes them
    head = ("kind", "format", "config", "seed", "parents", "versions")
    kept = {name: data[name] for name in data if name not in head}
    run.save("01_data.pt", data["config"], **{**kept, "pretrain": read}, withheld=[])
    print(f"the base reads {len(read)} recipes, and nothing of the task")


def main(argv=None):
    """Change the data, once; later measure, once; what is done already is not done again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "what", choices=("nouns", "task"), help="nouns (the toy) or task (a real LLM)"
    )
    args = parser.parse_args(argv)
    run, results = common.Run(args.run), args.run / "results.json"
    data = common.Run(run.folder).load("01_data.pt")
    if "withheld" not in data:
        {"nouns": withhold, "task": recipes_only}[args.what](run, data)
    elif args.what == "nouns" and results.is_file():
        rows = json.loads(results.read_text())["rows"]
        if not any("nouns" in row["setting"] for row in rows):
            measure(run, data)


if __name__ == "__main__":
    common.run_stage(main)
