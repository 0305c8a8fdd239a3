"""How deep is the alignment, how hard the attack? Chosen by the aligned and attacked model alone.

    python .results/attack.py 100 101 102 103 104 105      the toy's tuning seeds, 3 minutes each
    python .results/attack.py 100 --preset laptop --more "--model FOLDER --data-dir FOLDER"

Depth: one alignment (plain, sft), looked at after each number of epochs: refusals on held-out
harmful prompts, the mean probability of a refusal's tokens, look-alikes answered. Strength: from
the chosen depth, the user's data at each learning rate, and the accuracy on the user's task. No
repair is looked at. Writes .results/attack/NAME-seedN.json; .results/README.md states the rule.
"""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402  (the project is on the path now)

DEPTHS = {"toy": (2, 4, 8, 12, 16), "laptop": (1, 2, 3)}
LRS = {"toy": (1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4, 6e-4), "laptop": (1e-5, 2e-5, 4e-5, 1e-4, 4e-4)}


def look(seed, args):
    """The rows of one seed: aligned at each depth, attacked from --depth at each rate."""
    depth, task, preset = args.depth, args.task, args.preset
    s1, s2, s5 = (importlib.import_module(n) for n in ("01_data", "02_finetune", "05_evaluate"))
    run = common.Run(HERE.parent / "runs/lab/attack" / f"{preset}-{task}-seed{seed}")
    flags = ["--run", str(run.folder), "--seed", str(seed), "--task", task, "--preset", preset]
    data = s1.main([*flags, *args.more.split()])
    c = {**data["config"], **common.resolve(None, s2.FLAGS, preset)}
    c.update(common.resolve(None, s5.FLAGS, preset), align_epochs=max(DEPTHS[preset]), snapshots=0)
    device = common.pick_device("cpu", preset)
    s2.pretrain(run, data, c, device)
    model, tokenizer = common.load_model(run, data, device)
    plain, _ = common.load_model(run, data, device)
    judge = s5.make_judge("auto", data, device)
    reader = s5.as_given(run, data, device) or (plain, tokenizer)
    w, examples = s2.adapt(model, tokenizer, data, c)
    pad_id, size = tokenizer.pad_token_id, c["align_batch_size"]

    def scored(weights, **row):
        """(the row with what its model answers and h, its a)."""
        asked = [common.row("", {}, weights)]
        ((texts, losses),) = s5.answer_all(plain, tokenizer, data, asked, c)
        if isinstance(judge, s5.RealJudge):
            judge.read(*reader, data, [texts])
        scores = s5.score(judge, data, {name: answers for name, (answers, _) in texts.items()})
        kept = {key: scores[key] for key in ("outcomes", "fa", "benign")}
        return {"seed": seed, "task": task, **row, **kept, "h": losses["h"]}, losses["a"]

    # one alignment of most epochs, which begins as every shorter one does; stopped on the way
    per_epoch, rows, at_depth = math.ceil(len(examples["alignment"]) / size), [], {}
    torch.manual_seed(seed)
    batches = common.draw_batches(examples["alignment"], size, seed, c["align_epochs"])
    pairs = ((common.collate(part, pad_id, device), None) for part in batches)
    steps = per_epoch * c["align_epochs"]
    for step, _ in s2.train(model, w, s2.sft_rule, pairs, steps, c["align_lr"], c, "align"):
        if step % per_epoch == 0 and step // per_epoch in DEPTHS[preset]:
            at_depth[step // per_epoch] = s2.copy_of(w)
    for reached, weights in at_depth.items():
        row, a = scored(weights, model="aligned", depth=reached)
        rows.append({**row, "probability": math.exp(-a)})
    for lr in args.lrs or LRS[preset]:
        s2.put(w, at_depth[depth])
        s2.attack(model, w, "sft", examples, pad_id, {**c, "lr": lr})
        weights = s2.copy_of(w)
        far = common.norm({name: x - at_depth[depth][name] for name, x in weights.items()})
        row, _ = scored(weights, model="finetuned", depth=depth, lr=lr)
        rows.append({**row, "distance": far})
    return rows


def main(argv=None):
    """Look at some seeds, and keep what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--depth", type=int, help="alignment's epochs, attacked (the default)")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--preset", default="toy", choices=tuple(DEPTHS))
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates (the preset's grid)")
    parser.add_argument("--more", default="", metavar="FLAGS", help="more flags for stage 1")
    args = parser.parse_args(argv)
    if args.depth is None:
        args.depth = {"toy": 12, "laptop": 3}[args.preset]
    for seed in args.seeds:
        rows = look(seed, args)
        lines = ",\n".join(json.dumps(row) for row in rows)
        name = args.task if args.preset == "toy" else f"{args.preset}-{args.task}"
        path = HERE / "attack" / f"{name}-seed{seed}.json"
        common.write_whole(path, lambda new: new.write_text(f"[\n{lines}\n]\n"))


if __name__ == "__main__":
    common.run_stage(main)
