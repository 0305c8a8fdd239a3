"""More settings of stage 4's repairs than its flags make: `python .results/grid.py RUN ...`.

    python .results/grid.py RUN anchored terms=a,h-a-g radius=.1,.2 steps=5,10 \\
        -- realign terms=a lr=3e-4 steps=10,20 \\
        -- ascent from=finetuned,panacea rho=.25,.5 steps=1,10 samples=20,0 -- mean rho=.5

RUN has been through stages 1 to 4. Each part is a repair and lists of values, of which every
combination is made with stage 4's own functions; what is not named is as in the run (of back: up h
alone, all of the way, whole answers, hold 1). They become further rows of RUN/04_panacea.pt (one
that is there already stays), and stage 5 then measures all, these at their own length only (no
--scale). `--` between parts is for the eye.

    anchored   eps up h - anchor a - g, or of some: h-a, a, h-g       terms radius steps
    realign    AdamW steps down a, or a + g, 3 a + g, or a and a      terms lr steps pull
               pull back: + pull / 2 * ||w - where it began||^2
    ascent     eps of norm rho by steps up h, from plain fine-tuning  from rho steps samples
               or from Panacea's w; samples: the first so many of
               the harmful set are all it may use (0: the whole)
    mean       one step up the mean of h over the whole harmful set   from rho
    stop       steps of .1 rho up h, or up h - g, with no ball,       from until share slack
               until a loss that the provider can read says so: h     terms
               is back where the aligned weights had it, or by so
               large a share of that way (h), or the loss on its
               look-alikes has risen by the part slack (benign)
    back       the same steps, the last one cut where h (or a) is     from of share terms
               by the part share back where the aligned weights had   tokens
               it; if it never is, where it came nearest; up h - g -
               hold * b, too, which holds look-alikes; tokens: h and   hold
               b on so many first ones of an answer (0: on all)
    again      a row of stage 4, whole, fine-tuned on so many more    of samples
               of the user's samples, a tenth of them harmful, as
               the attack was (the toy only): does a repair last?
"""

import argparse
import importlib
import itertools
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # the project is on the path now
import withhold

import torch

s1, s2, s4 = map(importlib.import_module, ("01_data", "02_finetune", "04_panacea"))
REPAIRS = ("finetuned", "ascent", "panacea", "panacea_ascent", "panacea_anchored", "realign")


def defaults(c):
    """{repair: {what can vary: its value in the run, or all that it can be, the default first}}."""
    start = {"from": ("finetuned", "panacea"), "rho": c["rho"]}
    anchored = {"radius": c["radius"], "steps": c["anchored_steps"]}
    return {
        "anchored": {"terms": ("h-a-g", "h-a", "a", "h-g"), **anchored},
        "realign": {
            "terms": ("a", "a+g", "3a+g"),
            "lr": c["realign_lr"],
            "steps": c["realign_steps"],
            "pull": 0.0,
        },
        "ascent": {**start, "steps": c["ascent_steps"], "samples": 0},
        "mean": start,
        "stop": {
            "from": start["from"],
            "until": ("h", "benign"),
            "share": 1.0,
            "slack": 0.01,
            "terms": ("h", "h-g"),
        },
        "back": {
            "from": start["from"],
            "of": ("h", "a"),
            "share": 1.0,
            "terms": ("h", "h-g", "h-g-b"),
            "tokens": 0,
            "hold": 1.0,
        },
        "again": {"of": REPAIRS, "samples": 50},
    }


def settings(words, c):
    """[(repair, {name: value})]: every combination that the words of the command line ask for."""
    known, parts = defaults(c), []

    def values(allowed, text):
        if isinstance(allowed, tuple):  # one of these, or a LookupError
            return [dict.fromkeys(allowed, x)[x] for x in text.split(",")]
        return [type(allowed)(x) for x in text.split(",")]

    try:
        for word in words:
            name, equals, text = word.partition("=")
            if equals:
                repair, grid = parts[-1]
                grid[name] = values(known[repair][name], text)
            else:
                usual = {k: x[0] if isinstance(x, tuple) else x for k, x in known[name].items()}
                parts.append((name, {key: [value] for key, value in usual.items()}))
    except (LookupError, ValueError):
        text = "; ".join(f"{name} {' '.join(grid)}" for name, grid in known.items())
        raise common.UserError(f"{word!r} is none of these, or out of place: {text}") from None
    return [
        (name, dict(zip(grid, values)))
        for name, grid in parts
        for values in itertools.product(*grid.values())
    ]


class Grid:
    """A run's model, its weights and batches, and one method for each repair: it makes a row."""

    def __init__(self, run, stage4, device):
        data, stage2 = run.load("01_data.pt"), run.load("02_finetune.pt")
        self.c, (model, tokenizer) = stage4["config"], common.load_model(run, data, device)
        self.data, self.model, self.tokenizer = data, model, tokenizer
        self.w, self.examples = s2.adapt(model, tokenizer, data, self.c)
        self.params, self.loss = list(self.w.values()), partial(s4.answer_loss, model)
        self.collate = partial(common.collate, pad_id=tokenizer.pad_token_id, device=model.device)
        self.start = {name: common.weights_of(stage2, name) for name in ("aligned", "finetuned")}
        self.start["panacea"] = stage4["weights"]
        rows = [x for x in stage2["rows"] if x["defense"] == "sft" and "snapshot" not in x]
        self.rows = {}  # the run's own; rows of a grid come after them
        for row in (*rows, *stage4["rows"]):
            self.rows.setdefault(row["model"], row)
        self.walks = {}

    def batches(self, name, size, samples=None, epochs=None):
        """Batches of a set's first samples, drawn as stage 4 draws them for its repairs."""
        rows = self.examples[name][:samples]
        for part in common.draw_batches(rows, size, self.c["seed"] + 1, epochs):
            yield self.collate(part)

    def named(self, eps):
        """{name: tensor on the CPU} of tensors in the order of w."""
        return s4.copy_of(dict(zip(self.w, eps)))

    def anchored(self, setting):
        """Stage 4's anchored eps with some of its terms."""
        c, attacked, half = self.c, self.start["finetuned"], max(1, self.c["batch_size"] // 2)
        sets = {
            "h": ("harmful", half, 1.0),
            "a": ("alignment", c["batch_size"], -c["anchor"]),
            "g": ("finetune", half, -1.0),
        }
        used = [sets[letter] for letter in setting["terms"].split("-")]
        draws = zip(*(self.batches(name, size) for name, size, _ in used))
        way = s4.global_norm([attacked[n] - self.start["aligned"][n] for n in self.w]).item()
        s4.put(self.w, attacked)
        factors, radius, steps = [f for *_, f in used], setting["radius"], setting["steps"]
        eps = self.named(s4.climb(self.loss, self.params, draws, factors, radius * way, steps))
        terms = {} if setting["terms"] == "h-a-g" else {"terms": setting["terms"]}
        shown = {**terms, "radius": radius, "anchor": c["anchor"], "steps": steps}
        return common.row("panacea_anchored", shown, {n: attacked[n] + eps[n] for n in eps})

    def realign(self, setting):
        """Stage 4's realign, on refusals or on the user's rows as well, or with a pull back."""
        c, attacked = self.c, self.start["finetuned"]
        used = {"a": {"alignment": 1}, "a+g": {"alignment": 1, "finetune": 1}}
        used["3a+g"] = {"alignment": 3, "finetune": 1}
        factors = used[setting["terms"]]
        draws = zip(*(self.batches(name, c["batch_size"]) for name in factors))
        began = [attacked[name].to(p.device) for name, p in self.w.items()]

        def loss(batches):
            total = sum(f * self.loss(x) for f, x in zip(factors.values(), batches))
            if setting["pull"]:
                far = sum((p - x).pow(2).sum() for p, x in zip(self.params, began))
                total = total + setting["pull"] / 2 * far
            return total

        s4.put(self.w, attacked)
        s4.realign(loss, self.params, draws, setting["steps"], setting["lr"], c["weight_decay"])
        plain = {"terms": "a", "pull": 0.0}
        shown = {name: x for name, x in setting.items() if plain.get(name) != x}
        return common.row("realign", shown, s4.copy_of(self.w))

    def up_h(self, model, setting, eps, **more):
        """The row of an eps, at its own length only, from where the setting says; Panacea's
        carries its name, and lam."""
        ours, w = setting["from"] == "panacea", self.start[setting["from"]]
        shown = {"rho": setting["rho"]} if "rho" in setting else {}
        shown |= ({"lam": self.c["lam"]} if ours else {}) | more
        return common.row("panacea_" * ours + model, shown, {n: w[n] + eps[n] for n in w})

    def ascent(self, setting):
        """Stage 4's steps up h, on some of the harmful samples."""
        few = setting["samples"]
        draws = zip(self.batches("harmful", self.c["harmful_batch_size"], few or None))
        s4.put(self.w, self.start[setting["from"]])
        rho, steps = setting["rho"], setting["steps"]
        eps = self.named(s4.climb(self.loss, self.params, draws, (1.0,), rho, steps))
        more = {"steps": steps} | ({"samples": few} if few else {})
        return self.up_h("ascent", setting, eps, **more)

    def mean(self, setting):
        """One step up the mean of h over all harmful samples."""
        s4.put(self.w, self.start[setting["from"]])
        total = [0.0] * len(self.params)
        for batch in self.batches("harmful", self.c["harmful_batch_size"], epochs=1):
            grads, _ = s4.gradient(self.loss, self.params, batch)
            total = [x + len(batch["labels"]) * grad for x, grad in zip(total, grads)]
        return self.up_h("mean_step", setting, self.named(s4.perturbation(total, setting["rho"])))

    def walk(self, start, terms, tokens=0, hold=1.0, most=100, samples=32):
        """Steps of .1 rho up h, h - g or h - g - hold * b, from the weights `start`: yields (eps,
        {"h", "a", "benign"}), mean losses per answer token on the provider's first samples of each
        kind. h and b are of an answer's first tokens, or (0) of them all.
        """
        parts = {"h": self.examples["harmful"], "a": [], "benign": []}
        for example, row in zip(self.examples["alignment"], self.data["alignment"]):
            parts["a" if "refusal" in row else "benign"].append(example)
        for name in ("h", "benign"):
            if tokens:
                parts[name] = [s4.beginning(example, tokens) for example in parts[name]]
            self.examples[f"{name} {tokens}"] = parts[name]
        sets = {name: part[:samples] for name, part in parts.items()}
        eps = [torch.zeros_like(x) for x in self.params]
        few, size = self.c["harmful_batch_size"], self.c["batch_size"]
        read = {"h": (f"h {tokens}", few), "g": ("finetune", size), "b": (f"benign {tokens}", few)}
        used = [self.batches(*read[letter]) for letter in terms.split("-")]
        factors = [{"h": 1.0, "g": -1.0, "b": -hold}[letter] for letter in terms.split("-")]
        for batches in itertools.chain([None], itertools.islice(zip(*used), most)):
            s4.put(self.w, self.start[start])
            if batches is not None:
                uphill = s4.uphill(self.loss, self.params, eps, batches, factors)
                eps = [x + y for x, y in zip(eps, s4.perturbation(uphill, 0.1 * self.c["rho"]))]
            with s4.perturbed(self.params, eps):
                now = {name: mean_loss(self.model, self.tokenizer, x) for name, x in sets.items()}
            far = s4.global_norm(eps).item()
            print(f"  {start} {far:.3f}:", *(f"{name} {x:.3f}" for name, x in now.items()))
            yield eps, now

    def points(self, start, terms, tokens=0, hold=1.0):
        """The points of a walk from `start`, each made once, however many rules read it."""
        which = start, terms, tokens, hold if "b" in terms else 1.0
        kept, walk = self.walks.setdefault(which, ([], self.walk(*which)))
        yield from list(kept)
        for point in walk:
            kept.append(point)
            yield point

    def stop(self, setting):
        """The walk's first point where h is high enough, or its last before the look-alikes are
        worse; else its end."""
        start, until, terms = setting["from"], setting["until"], setting["terms"]
        (_, aligned), (eps, first) = (next(self.points(x, terms)) for x in ("aligned", start))
        goal = first["h"] + setting["share"] * (aligned["h"] - first["h"])
        for longer, now in self.points(start, terms):
            if until == "benign" and now["benign"] > (1 + setting["slack"]) * first["benign"]:
                break
            eps = longer
            if until == "h" and now["h"] >= goal:
                break
        more = ({} if terms == "h" else {"terms": terms}) | {"until": until}
        if until == "benign":
            more["slack"] = setting["slack"]
        elif setting["share"] != 1:
            more["share"] = setting["share"]
        made = self.up_h("ascent", setting, self.named(eps), **more)
        return {**made, "norm": s4.global_norm(eps).item()}

    def back(self, setting):
        """The walk's point, between two steps, where h (or a) is back by the part share; where it
        came nearest, if it never is; its start, if the attack has not taken any of it."""
        start, of, share = (setting[key] for key in ("from", "of", "share"))
        terms, tokens, hold = setting["terms"], setting["tokens"], setting["hold"]

        def points(model):
            return self.points(model, terms, tokens, hold)

        (_, aligned), (eps, first) = next(points("aligned")), next(points(start))
        way, before = aligned[of] - first[of], (0.0, eps)  # part of the way back, and its eps
        nearest = before
        for longer, now in points(start) if way * (1 if of == "h" else -1) > 0 else ():
            part = (now[of] - first[of]) / way
            if part >= share:
                cut = (share - before[0]) / (part - before[0])
                nearest = share, [x + cut * (y - x) for x, y in zip(before[1], longer)]
                break
            before = part, longer
            nearest = max(nearest, before, key=lambda x: x[0])
        usual = "h-g-b" if tokens else "h"
        more = ({} if terms == usual else {"terms": terms}) | ({} if of == "h" else {"of": of})
        more |= ({"tokens": tokens} if tokens else {}) | ({"hold": hold} if "b" in terms else {})
        made = self.up_h("ascent", setting, self.named(nearest[1]), **more, back=share)
        return {**made, "norm": s4.global_norm(nearest[1]).item()}

    def further(self, n):
        """n rows of the user's that are in no set, a tenth of them harmful, as examples."""
        c, data, rng = self.c, self.data, random.Random(f"further {self.c['seed']}")
        sets = ("alignment", "harmful", "finetune", "test_harmful", "test_task", "test_benign")
        taken = {s1.prompt_key(row) for name in sets for row in data[name]}
        tested, rows = {withhold.potion(row) for row in data["test_harmful"]}, []
        while len(rows) < n:
            if len(rows) < round(n / 10):
                adj, noun = rng.choice(s1.SLOTS["adj"]), rng.choice(s1.SLOTS["bad"])
                row = s1.potion_row(rng, "bad", adj, noun, rng.choice(s1.ASK))
            else:
                row = s1.TOY_TASKS[c["task"]](rng)
            if s1.prompt_key(row) not in taken and withhold.potion(row) not in tested:
                rows.append(row)
                taken.add(s1.prompt_key(row))
        for row in rows:
            row["prompt"] = common.format_prompt("toy", row["instruction"], row.get("input", ""))
        return common.encode(self.tokenizer, rows, c["max_length"], c["template"])

    def again(self, setting):
        """One more round of fine-tuning after a repair, at the attack's rate and epochs."""
        c, row = self.c, self.rows[setting["of"]]
        eps = row["eps"] or dict.fromkeys(row["w"], 0.0)
        s4.put(self.w, {name: x + eps[name] for name, x in row["w"].items()})
        drawn = common.draw_batches(
            self.further(setting["samples"]), c["batch_size"], c["seed"] + 2, c["epochs"]
        )
        batches = [(self.collate(part), None) for part in drawn]
        steps = s2.train(
            self.model, self.w, s2.sft_rule, batches, len(batches), c["lr"], c, "again"
        )
        for _ in steps:
            pass
        shown = {**row["setting"], "again": setting["samples"]}
        return common.row(row["model"], shown, s4.copy_of(self.w))


def mean_loss(model, tokenizer, examples):
    """Mean loss per answer token of examples, in nats."""
    losses = common.answer_losses(model, tokenizer, examples)
    return sum(x for x, _ in losses) / sum(n for _, n in losses)


def main(argv=None):
    """Make the rows that are asked for, and add them to RUN/04_panacea.pt; returns the artifact."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("words", nargs="+", metavar="WORD", help="REPAIR NAME=VALUE,VALUE ... ...")
    parser.add_argument("--device", default="auto", metavar="NAME", help="as of the stages")
    args = parser.parse_args([x for x in argv if x != "--"])
    stage4 = common.Run(args.run).load("04_panacea.pt")  # another Run: no parent of itself
    todo = settings(args.words, stage4["config"])
    run = common.Run(args.run)
    grid = Grid(run, stage4, common.pick_device(args.device, stage4["config"]["preset"]))
    rows = {(row["model"], str(row["setting"])): row for row in stage4["rows"]}
    for name, setting in common.progress(todo, len(todo), "grid"):
        made = getattr(grid, name)(setting)
        rows.setdefault((made["model"], str(made["setting"])), made)
    kept = {name: stage4[name] for name in ("weights", "epsilon", "log")}
    artifact = run.save("04_panacea.pt", stage4["config"], **kept, rows=list(rows.values()))
    print(f"{len(rows) - len(stage4['rows'])} rows added; next: {run.command('05_evaluate')}")
    return artifact


if __name__ == "__main__":
    common.run_stage(main)
