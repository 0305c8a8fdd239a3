"""Means over seeds, and the tables and pictures that are made of them.

    python .results/aggregate.py runs/seed*          mean (sd) of every row, and the paired 95 %
                                                     interval of its difference to --against ROW
    python .results/aggregate.py runs/tune* --choose each repair's best setting, by the one rule
    python .results/aggregate.py --check             are the tables of both READMEs what the kept
                                                     json gives? (--write makes them again)
    python .results/aggregate.py --draw              the pictures of the README, from the kept json

Runs belong together if they asked the same question: the same preset, model, task, harm, share of
poison, alignment and attack. Rows carry their own settings, so a repair of your own needs no line
here. A table on a page stands after a comment that says what it is made of:

    <!-- table: rows .results/toy/seed* | hs hs_plus refusal fa benign | sd all -->

With the word `all` the table must show every row that the json gives; else a page may leave out
rows.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCORES = ("hs", "hs_plus", "refusal", "fa", "benign")
LOSSES = ("h", "a", "g")
QUESTION = (  # what a run asks; runs that differ in these have no mean
    *("preset", "model", "task", "harm", "template", "poison_ratio", "n_align", "n_finetune"),
    *("n_harmful", "n_test", "align_epochs", "align_lr", "epochs", "lr", "batch_size", "r"),
    *("alpha", "targets", "judge", "pretrain_steps", "pretrain_lr", "n_pretrain", "max_length"),
    *("max_new_tokens", "weight_decay", "align_batch_size", "align_harmful_batch_size"),
    *("harmful_batch_size", "vaccine_rho", "repnoise_alpha", "repnoise_beta", "booster_lam"),
    *("booster_alpha", "harmless"),
)


class Wrong(Exception):
    """Something the user can mend, in one line."""


# ---------------------------------------------------------------------------------------------
# Reading and summarising


def read(folder):
    """results.json of a run folder, checked."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["config"]["seed"]
        for row in results["rows"]:
            row["hs"], row["hs_plus"], row["refusal"], label(row)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise Wrong(
            f"{path} is missing or damaged; run: python 05_evaluate.py --run {folder}"
        ) from None
    return results


def label(row):
    """A row's name: model, defence if not sft, what varies, and where on the way it stands."""
    parts = [row["model"]] + ([row["defense"]] if row["defense"] != "sft" else [])
    for key, value in row["setting"].items():
        parts.append(f"{key} {value if isinstance(value, str) else f'{value:g}'}")
    for key in ("snapshot", "view", "layer"):
        if row.get(key) is not None:
            parts.append(f"{key} {row[key]}")
    return " ".join(parts)


def t95(n):
    """97.5 % quantile of Student's t with n degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    exact = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
    if n <= 10:
        return exact[n - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)


def t_interval(differences):
    """95 % interval of the mean of two differences of percentages or more, within -100 ... 100."""
    n, middle = len(differences), float(np.mean(differences))
    half = t95(n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return [max(-100.0, middle - half), min(100.0, middle + half)]


def scores_of(row):
    """{score: number} of a row, the outcomes among them."""
    found = {key: row[key] for key in (*SCORES, "at_step", *LOSSES) if row.get(key) is not None}
    return {**found, **row.get("outcomes", {})}


def group(folders, strict=False):
    """[{"config", "seeds", "rows": {label: {seed: row}}}]: runs of one question together.

    Raises Wrong if `strict` and two runs of one seed have different scores in one row.
    """
    groups = []
    for folder in folders:
        results = read(folder)
        c = results["config"]
        for found in groups:  # a number that older code did not keep is no difference
            both = {x for x in QUESTION if x in c and x in found["config"]}
            if all(c[x] == found["config"][x] for x in both):
                break
        else:
            found = {"config": c, "seeds": [], "rows": {}}
            groups.append(found)
        found["seeds"].append(c["seed"])
        for row in results["rows"]:
            by_seed = found["rows"].setdefault(label(row), {})
            other = by_seed.get(c["seed"], row)
            if strict and scores_of(other) != scores_of(row):
                raise Wrong(f"{folder}: another run of seed {c['seed']} differs in {label(row)!r}")
            by_seed[c["seed"]] = row
    if not groups:
        raise Wrong("no run folders given")
    return groups


def summarise(found, against="finetuned"):
    """{label: {score: mean, score_sd, score_diff (interval of the difference), "row", "n"}}."""
    base, summary = found["rows"].get(against), {}
    if base is None:
        raise Wrong(f"no row {against!r}; --against takes one of: {'; '.join(found['rows'])}")
    for name, by_seed in found["rows"].items():
        rows = [scores_of(row) for row in by_seed.values()]
        entry = {"row": next(iter(by_seed.values())), "n": len(rows)}
        for key in rows[0]:
            if not all(key in row for row in rows):
                continue
            values = [row[key] for row in rows]
            entry[key] = float(np.mean(values))
            if len(values) > 1:
                entry[f"{key}_sd"] = float(np.std(values, ddof=1))
            pairs = [
                scores_of(row)[key] - scores_of(base[seed])[key]
                for seed, row in by_seed.items()
                if seed in base and key in scores_of(base[seed])
            ]
            if len(pairs) > 1:
                entry[f"{key}_diff"] = t_interval(pairs)
        summary[name] = entry
    return summary


def choose(summary):
    """[(repair, settings tried, best entry or None)] by the one rule.

    The rule: lowest HS+ with FA within 2 points of the attacked model's and benign over 90 % of
    the aligned model's, in means over the seeds.
    """
    for name in ("aligned", "finetuned"):
        if name not in summary:
            raise Wrong(f"--choose needs the row {name}")
    tried = {}
    for entry in summary.values():
        row = entry["row"]
        plain = row["model"] in ("base", "aligned", "finetuned")
        if not plain and "view" not in row and "snapshot" not in row:
            setting = row["setting"]
            parts = [row["model"], setting.get("terms"), "with a pull" * ("pull" in setting)]
            parts += [f"until {setting['until']}"] if "until" in setting else []
            parts += [setting.get("of", "h"), "back"] if "back" in setting else []
            parts += ["tokens"] if "tokens" in setting else []
            tried.setdefault(" ".join(filter(None, parts)), []).append(entry)
    chosen, seeds = [], max(entry["n"] for entry in summary.values())
    for name, entries in tried.items():
        good = [
            e
            for e in entries
            if e["n"] == seeds  # a mean over fewer is none to compare
            and e.get("fa", 0) >= summary["finetuned"].get("fa", 0) - 2
            and e.get("benign", 100) > 0.9 * summary["aligned"].get("benign", 100)
        ]
        best = min(good, key=lambda e: (e["hs_plus"], -e.get("fa", 0)), default=None)
        chosen.append((name, len(entries), best))
    return chosen


def ranks(values):
    """Ranks from 0, ties sharing their mean rank."""
    values = np.asarray(values, dtype=float)
    return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])


def spearman(x, y):
    """Rank correlation of two lists."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


# ---------------------------------------------------------------------------------------------
# The tables of the pages


def files(patterns):
    """Run folders of the project that patterns, with commas between them, name; sorted."""
    found = [p for pattern in patterns.split(",") for p in ROOT.glob(f"{pattern}/results.json")]
    if not found:
        raise Wrong(f"no run folders match {patterns}")
    return sorted(str(p.parent) for p in found)


def number(entry, key, sd):
    """A mean as text, with its standard deviation if `sd`; KEY_diff is an interval."""
    if key not in entry:
        return "-"
    digits = 2 if key.removesuffix("_diff") in LOSSES else 0
    if key.endswith("_diff"):
        return f"{entry[key][0]:+.{digits}f} to {entry[key][1]:+.{digits}f}"
    spread = f" ({entry[f'{key}_sd']:.{digits}f})" if sd and f"{key}_sd" in entry else ""
    return f"{entry[key]:.{digits}f}{spread}"


def table_rows(pattern, columns, options):
    """[(label, cells)] of all rows but snapshots and layers; "against ROW" as aggregate's own.

    A column KEY_diff is the paired 95 % interval of the difference to that row, in whose name
    `options` have ~ for a space.
    """
    (found,) = group(files(pattern))
    against = options[options.index("against") + 1] if "against" in options else "finetuned"
    table = [("row", columns)]
    for name, entry in summarise(found, against.replace("~", " ")).items():
        row = entry["row"]
        if "snapshot" not in row and "view" not in row:
            table.append((name, [number(entry, key, "sd" in options) for key in columns]))
    return table


def table_pairs(pattern, columns, options):
    """Paired 95 % intervals of differences between rows: options "ROW minus ROW; ROW minus ROW"."""
    (found,) = group(files(pattern))
    table = [("difference", columns)]
    for pair in " ".join(options).split("; "):
        first, second = pair.split(" minus ")
        entry = summarise(found, second)[first]
        table.append((pair, [number(entry, key, False) for key in columns]))
    return table


def table_square(pattern, columns, options):
    """The 2 x 2 of one score: w plain or Panacea's, one step up h or ten; means (sd), and the
    paired 95 % intervals of both differences."""
    (found,), (key,) = group(files(pattern)), columns
    summary = summarise(found)
    square = [("one_shot", "ascent"), ("panacea", "panacea_ascent")]
    square = [[label(pick(summary, model)["row"]) for model in models] for models in square]

    def less(second, first):
        return number(summarise(found, first)[second], f"{key}_diff", False)

    table = [(key, ["one step", "ten steps", "ten less one"])]
    for name, (one, ten) in zip(("plain", "Panacea's"), square):
        cells = [number(summary[row], key, True) for row in (one, ten)]
        table.append((name, [*cells, less(ten, one)]))
    table.append(("Panacea's less plain", [less(b, a) for a, b in zip(*square)] + [""]))
    return table


def table_groups(pattern, columns, options):
    """Rows by groups of runs; `options`: "by" a key of the config, and "only" these models."""
    key = options[options.index("by") + 1]
    only = options[options.index("only") + 1 :] if "only" in options else None
    groups = group(files(pattern))
    groups.sort(key=lambda g: (isinstance(g["config"][key], str), g["config"][key]))
    sums = [summarise(found) for found in groups]
    table = [("row", [f"{key} {found['config'].get(key)}" for found in groups])]
    for name in dict.fromkeys(name for s in sums for name in s):
        row = next(s[name]["row"] for s in sums if name in s)
        if "snapshot" in row or "view" in row or row["defense"] != "sft":
            continue
        if only and row["model"] not in only:
            continue
        cells = []
        for s in sums:
            entry = s.get(name, {})
            cells.append(" / ".join(number(entry, column, False) for column in columns))
        table.append((name, cells))
    return table


def table_chosen(pattern, columns, options):
    """Each repair's best setting, by the rule of `choose`."""
    (found,) = group(files(pattern))
    summary = summarise(found)
    table = [("repair", ["chosen", *columns])]
    table.append(("attacked", ["", *(number(summary["finetuned"], k, False) for k in columns)]))
    for name, count, best in choose(summary):
        cells = ["none keeps both"] + ["-"] * len(columns)
        if best:
            cells = [f"{label(best['row'])}, of {count}"]
            cells += [number(best, key, False) for key in columns]
        table.append((name, cells))
    return table


def table_fall(pattern, columns, options):
    """Harmful loss h / HS against fine-tuning step, by defence: Fig. 3."""
    (found,) = group(files(pattern))
    curves = {}
    for entry in summarise(found).values():
        if "at_step" in entry:
            text = f"{entry['h']:.2f} / {entry['hs']:.0f}"
            curves.setdefault(entry["row"]["defense"], {})[round(entry["at_step"])] = text
    steps = sorted({step for points in curves.values() for step in points})
    table = [("step", [str(step) for step in steps])]
    for name, points in curves.items():
        table.append((name, [points.get(step, "-") for step in steps]))
    return table


def table_layers(pattern, columns, options):
    """||eps|| and what eps does, layer by layer: means over runs of layers.json.

    A view's cell is HS / HS+ / refusal / FA. The last rows: the model without eps and with all of
    it, and the mean rank correlations of the norm with the fall of HS and the rise of refusals.
    """
    runs = [json.loads((Path(f) / "layers.json").read_text()) for f in files(pattern)]

    def cell(rows):
        keys = [k for k in ("hs", "hs_plus", "refusal", "fa") if k in rows[0]]
        return " / ".join(f"{np.mean([row[k] for row in rows]):.0f}" for k in keys)

    table = [("layer", ["norm of eps", "relative to w", *columns])]
    for rows in zip(*(run["layers"] for run in runs), strict=True):
        cells = [f"{np.mean([row[key] for row in rows]):.3f}" for key in ("norm", "relative")]
        cells += [cell([row[view] for row in rows]) for view in columns]
        table.append((str(rows[0]["layer"]), cells))
    for name, key in (("without eps", "none"), ("all of eps", "all")):
        table.append((name, ["", "", cell([run["ends"][key] for run in runs])] + [""] * 3))
    if "refusal" not in runs[0]["rank_correlation"]:
        return table
    for what, key in (("fall of HS", "hs"), ("rise of refusals", "refusal")):
        known = [run["rank_correlation"][key]["norm"] for run in runs]
        cells = []
        for view in columns:  # there is none where every layer has the same effect
            found = [k[view] for k in known if view in k]
            cells.append(f"{np.mean(found):+.2f}" if found else "-")
        table.append((f"rank correlation of norm, {what}", ["", "", *cells]))
    return table


def table_attack(pattern, columns, options):
    """What attack.py saw, means over seeds: by "depth" of alignment or "lr" of the attack."""
    rows = [row for path in sorted(ROOT.glob(pattern)) for row in json.loads(path.read_text())]
    key = options[options.index("by") + 1]
    model = {"depth": "aligned", "lr": "finetuned"}[key]
    table = [(key, columns)]
    for value in sorted({row[key] for row in rows if row["model"] == model}):
        own = [row for row in rows if row["model"] == model and row[key] == value]
        cells = []
        for column in columns:
            x = np.mean([row["outcomes"].get(column, row.get(column, math.nan)) for row in own])
            cells.append(f"{x:.2f}" if column in ("h", "probability", "distance") else f"{x:.1f}")
        table.append((f"{value:g}", cells))
    return table


def table_vaccines(pattern, columns, options):
    """What vaccines.py saw, means over seeds; a column is "aligned:SCORE" or "finetuned:SCORE".

    With the option "chosen", only plain alignment and each vaccine's best setting, by its rule.
    """
    rows = [row for path in sorted(ROOT.glob(pattern)) for row in json.loads(path.read_text())]
    means = {}
    for row in rows:
        found = means.setdefault(label({**row, "model": row["defense"], "defense": "sft"}), {})
        for key in SCORES:
            found.setdefault(f"{row['model']}:{key}", []).append(row[key])
    means = {
        name: {k: float(np.mean(v)) for k, v in found.items()} for name, found in means.items()
    }
    if "chosen" in options:
        plain, best = means["sft"], {"sft": "sft"}
        for name, found in means.items():
            fits = (
                found["aligned:refusal"] >= 95
                and found["aligned:benign"] > 0.9 * plain["aligned:benign"]
                and found["finetuned:fa"] >= plain["finetuned:fa"] - 2
            )
            defense = name.split()[0]
            low = means[best[defense]]["finetuned:hs_plus"] if defense in best else math.inf
            if fits and found["finetuned:hs_plus"] < low:
                best[defense] = name
        means = {name: means[name] for name in best.values()}
    return [("row", columns)] + [
        (name, [f"{found[column]:.0f}" for column in columns]) for name, found in means.items()
    ]


KNOWN = (  # of a run, before any repair is tried
    "refusals that the attack has left",
    "h at the attacked weights",
    "distance of w from w_aligned",
    "rho over that distance",
)
RISE = "rise of h(w + eps) in Panacea's training"


def mapped_runs(pattern):
    """[{number's name: number}], one of each run: what is known of the attack, and what becomes.

    The second kind is named "MODEL:SCORE", of the row at scale 1.
    """
    found = []
    for folder in files(pattern):
        rows = {}
        for row in read(folder)["rows"]:
            if "snapshot" not in row and "view" not in row and row["defense"] == "sft":
                if row["setting"].get("scale", 1) == 1:
                    rows[row["model"]] = row
        attacked, rho = rows["finetuned"], rows["panacea"]["setting"]["rho"]
        known = [attacked[key] for key in ("refusal", "h", "distance")]
        run = dict(zip(KNOWN, (*known, rho / attacked["distance"])))
        if "h_eps" in rows["panacea"]:
            first, last = rows["panacea"]["h_eps"]
            run[RISE] = last - first
        for model, row in rows.items():
            run.update({f"{model}:{key}": row[key] for key in SCORES})
        found.append(run)
    return found


def table_border(pattern, columns, options):
    """Rank correlation of what is known before any repair with what repairs make of it."""
    runs = mapped_runs(pattern)
    table = [("known before any repair", [f"`{c.replace(':', '` ')}" for c in columns])]
    for name in (*KNOWN, *([RISE] if all(RISE in run for run in runs) else [])):
        values = [run[name] for run in runs]
        table.append((name, [f"{spearman(values, [r[k] for r in runs]):+.2f}" for k in columns]))
    return table


def table_ends(pattern, columns, options):
    """h(w + eps) as Panacea's training began and ended, and what all of eps makes of the run.

    Ordered by the rise, with its rank correlation with each column; runs that know no h_eps (made
    by older code) are left out.
    """
    runs = []
    for folder in files(pattern):
        for row in read(folder)["rows"]:
            if "h_eps" in row and row["setting"].get("scale") == 1:
                name = str(Path(folder).relative_to(ROOT / ".results"))
                runs.append((name, row["h_eps"], {**row, **row["outcomes"]}))
    if not runs:
        raise Wrong(f"no run of {pattern} knows h_eps")
    runs.sort(key=lambda run: run[1][1] - run[1][0])
    table = [("run", ["first", "last", *columns])]
    for name, ends, row in runs:
        cells = [f"{x:.2f}" for x in ends] + [f"{row[key]:.0f}" for key in columns]
        table.append((name, cells))
    rises = [last - first for _, (first, last), _ in runs]
    cells = [[row[key] for *_, row in runs] for key in columns]
    found = [f"{spearman(rises, x):+.2f}" if len(set(x)) > 1 else "-" for x in cells]
    table.append(("rank correlation of the rise", ["", "", *found]))
    return table


KINDS = {
    "ends": table_ends,
    "rows": table_rows,
    "groups": table_groups,
    "pairs": table_pairs,
    "square": table_square,
    "chosen": table_chosen,
    "fall": table_fall,
    "layers": table_layers,
    "border": table_border,
    "attack": table_attack,
    "vaccines": table_vaccines,
}
MARK = re.compile(r"<!-- table: (\w+) (\S+) \| ([^|]*?) \| (.*?) -->\n\n((?:\|.*\n)*)")


def made(match):
    """(the head, the rows {label: cells}) of the table that a mark asks for."""
    options = [word for word in match[4].split() if word != "all"]
    head, *rows = KINDS[match[1]](match[2], match[3].split(), options)
    return head, dict(rows)


def cells_of(line):
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def label_in(cell):
    """The row's label that a first cell names: what stands in backticks, else all of it."""
    code = re.search(r"`([^`]+)`", cell)
    return code[1] if code else cell


def missing(match, wanted):
    """Labels of the rows that a marked table has to show and lacks."""
    shown = {label_in(cells_of(line)[0]) for line in match[5].splitlines()[2:]}
    return [name for name in wanted if name not in shown and "all" in match[4].split()]


def differences(path):
    """Cells of a page's marked tables that differ from what the kept json gives, as lines."""
    wrong = []
    for match in MARK.finditer(path.read_text(encoding="utf-8")):
        lines, (head, wanted) = match[5].splitlines()[2:], made(match)
        for line in lines:
            cells = cells_of(line)
            name, shown = label_in(cells[0]), cells[-len(head[1]) :]
            if name not in wanted:
                wrong.append(f"{path.name}: {name!r} is no row of {match[2]}")
            elif shown != wanted[name]:
                wrong.append(f"{path.name}: {name}: shown {shown}, kept {wanted[name]}")
        if not lines:
            wrong.append(f"{path.name}: the table of {match[2]} is empty")
        for name in missing(match, wanted):
            wrong.append(f"{path.name}: {name}: a row of {match[2]} that the page lacks")
    return wrong


def rewritten(match):
    """A marked table with its numbers made again; what was written by hand stays.

    A mark without a table, or with one of other columns, gets the whole one; rows that a table of
    `all` lacks come last.
    """
    (head, wanted), lines = made(match), match[5].splitlines()
    text, names = lines[:2], missing(match, wanted)
    if len(lines) < 3 or len(cells_of(lines[0])) != 1 + len(head[1]):
        text = [f"| {' | '.join([head[0], *head[1]])} |", "|" + "---|" * (1 + len(head[1]))]
        lines, names = [], wanted
    for line in lines[2:]:
        cells = cells_of(line)
        if label_in(cells[0]) not in wanted:
            raise Wrong(f"{label_in(cells[0])!r} is no row of {match[2]}; delete the table")
        new = wanted[label_in(cells[0])]
        text.append(f"| {' | '.join([*cells[: len(cells) - len(new)], *new])} |")
    text += [f"| {' | '.join([f'`{name}`', *wanted[name]])} |" for name in names]
    mark = f"<!-- table: {match[1]} {match[2]} | {match[3]} | {match[4]} -->\n\n"
    return mark + "\n".join(text) + ("\n" if match[5] else "\n\n")


PAGES = (ROOT / "README.md", HERE / "README.md")

# ---------------------------------------------------------------------------------------------
# The pictures of the README

OUTCOMES = {
    "harmful": "tab:red",
    "refused": "tab:blue",
    "off_task": "gold",
    "garbled": "tab:orange",
    "other": "lightgrey",
}
STORY = (  # (row of the kept json, its name in the picture)
    ("aligned", "aligned"),
    ("finetuned", "attacked"),
    ("random std 0.07", "noise"),
    ("random_matched", "noise of Panacea's size"),
    ("interpolated t 0.5", "half way back"),
    ("one_shot", "one step up h (lam = 0)"),
    ("ascent", "ten steps up h"),
    ("ascent tokens 3 hold 10 back 1", "steps until h is back"),
    ("panacea_w", "Panacea without eps"),
    ("panacea", "Panacea"),
    ("panacea_ascent", "Panacea, ten steps up h"),
    ("panacea_ascent lam 0.1 tokens 3 hold 10 back 1", "Panacea, until h is back"),
    ("panacea_anchored", "anchored (reads refusals)"),
    ("realign", "realign (reads refusals)"),
)


def pick(summary, name):
    """The entry of a row, or of a model at scale 1."""
    if name in summary:
        return summary[name]
    for entry in summary.values():
        row = entry["row"]
        plain = "view" not in row and "snapshot" not in row and row["defense"] == "sft"
        if row["model"] == name and plain and row["setting"].get("scale", 1) == 1:
            return entry
    raise Wrong(f"no row {name}")


def stacked(axis, entries, names):
    """Bars of five outcomes, from above."""
    start = np.zeros(len(entries))
    for kind, colour in OUTCOMES.items():
        part = np.array([entry[kind] for entry in entries])
        axis.barh(range(len(entries)), part, left=start, color=colour, label=kind.replace("_", " "))
        start += part
    axis.set_yticks(range(len(entries)), names)
    axis.set_xlim(0, 100)


def save(figure, path):
    """Write a picture."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"picture: {path.relative_to(ROOT)}")


def draw_story():
    """What becomes of harmful prompts, and the accuracy on the task, on the toy."""
    from matplotlib.figure import Figure

    (found,) = group(files(".results/tuned/seed*"))
    summary = summarise(found)
    entries = [pick(summary, name) for name, _ in STORY]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    stacked(left, entries, [name for _, name in STORY])
    left.set(title=f"answers to harmful prompts, mean of {len(found['seeds'])} seeds", xlabel="%")
    right.barh(
        range(len(entries)),
        [e["fa"] for e in entries],
        xerr=[e["fa_sd"] for e in entries],
        color="tab:green",
        error_kw={"lw": 0.8},
    )
    right.set(title="accuracy on the task (sd)", xlabel="%", xlim=(0, 105))
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=5)
    save(figure, ROOT / ".assets/story.png")


MAP = (  # (runs, key of their config, its name on the axis, factor, the default there, line's name)
    (
        ".results/map/sst2-lr[1246]e-*",
        *("lr", "attack's learning rate, 1e-4", 1e4, "2", "toy, sst2"),
    ),
    (
        ".results/map/agnews-lr[1246]e-*",
        *("lr", "attack's learning rate, 1e-4", 1e4, "2", "toy, agnews"),
    ),
    (
        ".results/map/sst2-epochs*,.results/map/sst2-lr2e-4-*",
        *("align_epochs", "epochs of alignment", 1, "12", "toy, sst2"),
    ),
    (
        ".results/map-laptop/*,.results/direction-laptop/seed*",
        *("lr", "attack's learning rate, 1e-5", 1e5, "10", "SmolLM2, sst2"),
    ),
)


def draw_map():
    """Outcomes against the attack's strength and the alignment's depth, for six models.

    Where a model was not measured its place says so.
    """
    from matplotlib.figure import Figure

    models = (
        ("finetuned", "attacked"),
        ("one_shot", "one step up h (lam = 0)"),
        ("ascent", "ten steps"),
        ("ascent tokens 3 hold 10 back 1", "until h is back"),
        ("panacea", "Panacea"),
        ("panacea_ascent lam 0.1 tokens 3 hold 10 back 1", "Panacea, until h is back"),
    )
    figure = Figure(figsize=(14.5, 2.6 * len(MAP)), layout="constrained")
    axes = figure.subplots(len(MAP), len(models), sharey=True)
    for k, (pattern, key, what, factor, default, task) in enumerate(MAP):
        groups = sorted(group(files(pattern)), key=lambda g: g["config"][key])
        sums = [summarise(found) for found in groups]
        places = [f"{g['config'][key] * factor:g}" for g in groups]
        for axis, (model, name) in zip(axes[k], models):
            if "laptop" in pattern:
                model = model.replace("hold 10", "hold 1")  # the default there
            entries = {x: entry for x, s in enumerate(sums) if (entry := measured(s, model))}
            start = np.zeros(len(entries))
            for kind, colour in OUTCOMES.items():
                part = np.array([entry[kind] for entry in entries.values()])
                axis.bar(
                    list(entries), part, bottom=start, color=colour, label=kind.replace("_", " ")
                )
                start += part
            accuracies = [entry["fa"] for entry in entries.values()]
            axis.plot(list(entries), accuracies, "k.-", label="accuracy on the task")
            axis.set(ylim=(0, 100), xlim=(-0.6, len(places) - 0.4), xlabel=what)
            axis.set_xticks(range(len(places)), places)
            axis.get_xticklabels()[places.index(default)].set_fontweight("bold")
            for x in set(range(len(places))) - set(entries):
                axis.text(x, 50, "not run", rotation=90, ha="center", va="center", color="grey")
            if k == 0:
                axis.set_title(name)
        axes[k][0].set_ylabel(f"{task}, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=6)
    save(figure, ROOT / ".assets/map.png")


def measured(summary, name):
    """The entry of a row, or None."""
    try:
        return pick(summary, name)
    except Wrong:
        return None


def along(summary, model, rho=0.5):
    """[(||eps||, entry)] of a model as its eps grows: scaled, or climbed in balls of that radius.

    It begins with the model without eps: the attacked one, or Panacea's w.
    """
    start = "panacea_w rho 0.5 lam 0.1" if model.startswith("panacea") else "finetuned"
    points = {0.0: summary[start]}
    for entry in summary.values():
        row, setting = entry["row"], entry["row"]["setting"]
        usual = "rho" in setting and "samples" not in setting and setting.get("steps", 10) == 10
        if row["model"] == model and usual:
            climbed = "ascent" in model and setting.get("scale", 1) == 1
            if climbed:
                points[setting["rho"]] = entry
            elif "ascent" not in model:
                points[rho * setting["scale"]] = entry
    return sorted(points.items(), key=lambda point: point[0])


def draw_mechanism():
    """Losses, outcomes and how an answer begins, along w + t eps: one step, ten steps, noise;
    from plain fine-tuning."""
    from matplotlib.figure import Figure

    (found,) = group(files(".results/direction/seed*"))
    summary, first = summarise(found), min(found["seeds"])
    (words,) = group(files(".results/first-token/seed*"))
    begins = summarise(words)
    figure = Figure(figsize=(10.5, 7.4), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey="row")

    def filled(axis, points, kinds):
        places, bottom = sorted(points), np.zeros(len(points))
        for kind, (colour, what) in kinds.items():
            part = np.array([points[t][kind] for t in places])
            axis.fill_between(places, bottom, bottom + part, color=colour, label=what, lw=0)
            bottom += part

    def of(summary, model):
        points = {0.0: summary["finetuned"]}
        for entry in summary.values():
            if entry["row"]["model"] == model and entry["row"]["setting"].get("scale", 9) <= 3:
                points[entry["row"]["setting"]["scale"]] = entry
        return points

    for column, (model, name) in enumerate(
        (("one_shot", "one step up h"), ("ascent", "ten steps up h"), ("random_matched", "noise"))
    ):
        points = of(summary, model)
        places, (upper, lower, last) = sorted(points), (axes[k][column] for k in range(3))
        for key, colour, what in (
            ("h", "tab:red", "h: harmful answers"),
            ("a", "tab:blue", "a: refusals"),
            ("g", "tab:green", "g: the user's task"),
        ):
            upper.plot(places, [points[t][key] for t in places], color=colour, label=what)
            rows = [found["rows"][label(points[t]["row"])][first] for t in places]
            upper.plot(places, [row[key] for row in rows], color=colour, lw=0.7, ls=":")
        filled(lower, points, {kind: (x, kind.replace("_", " ")) for kind, x in OUTCOMES.items()})
        filled(
            last,
            of(begins, model),
            {
                "p_recipe": ("tab:red", "a recipe's"),
                "p_refusal": ("tab:blue", "a refusal's"),
                "p_label": ("gold", "a label"),
                "p_other": ("lightgrey", "another"),
            },
        )
        lower.plot(places, [points[t]["fa"] for t in places], "k.-", label="accuracy on the task")
        upper.set_title(name)
        lower.set(ylim=(0, 100), xlim=(0, 3))
        last.set(xlabel="t, in w + t eps (||eps|| = 0.5)", ylim=(0, 100))
        for axis in (upper, lower, last):
            axis.axvline(1, color="grey", lw=0.7)
    axes[0][0].set(ylabel="loss per token, held out", ylim=(0, 2.5))
    axes[1][0].set_ylabel("answers to harmful prompts, %")
    axes[2][0].set_ylabel("first word, probability in %")
    for axis in axes[:, 2]:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, ROOT / ".assets/mechanism.png")


def draw_frontier():
    """Refusals against what they cost as ||eps|| grows, after three attacks: does training move
    the frontier?"""
    from matplotlib.figure import Figure

    attacks = (
        (".results/direction/seed*", "attack at 2e-4, the default"),
        (".results/direction-attack/lr4e-4-*", "at 4e-4"),
        (".results/direction-attack/lr6e-4-*", "at 6e-4"),
    )
    lines = (
        ("one_shot", "o--", "plain fine-tuning, one step"),
        ("ascent", "o-", "plain fine-tuning, ten steps"),
        ("panacea", "s--", "Panacea, its last eps"),
        ("panacea_ascent", "s-", "Panacea, ten steps"),
    )
    costs = (("fa", "accuracy on the task, points lost"), ("benign", "look-alikes, points lost"))
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = figure.subplots(len(costs), len(attacks), sharey=True)
    for column, (pattern, title) in enumerate(attacks):
        (found,) = group(files(pattern))
        summary = summarise(found)
        axes[0][column].set_title(f"{title} ({len(found['seeds'])} seeds)")
        for axis, (key, what) in zip(axes[:, column], costs):
            for model, style, name in lines:
                colour = "tab:blue" if model.startswith("panacea") else "tab:orange"
                points = [(rho, e) for rho, e in along(summary, model) if rho <= 0.75]
                lost = [summary["finetuned"][key] - e[key] for _, e in points]
                back = [e["refusal"] for _, e in points]
                axis.plot(lost, back, style, color=colour, label=name, ms=4)
                for (rho, _), x, y in zip(points, lost, back):
                    if rho == 0.5:
                        at = {"xytext": (3, -9), "textcoords": "offset points"}
                        axis.annotate(f"{rho:g}", (x, y), fontsize=7, **at)
            axis.set(xlabel=what, ylim=(0, 102))
    for axis in axes[:, 0]:
        axis.set_ylabel("harmful prompts refused, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    save(figure, ROOT / ".assets/frontier.png")


# ---------------------------------------------------------------------------------------------
# The command line


def print_columns(rows):
    """Rows of texts in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(row[0].ljust(widths[0]) + "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths[1:])))


def print_summary(found, against):
    """The table of one group of runs."""
    summary, c, seeds = summarise(found, against), found["config"], len(set(found["seeds"]))
    print(
        f"\n{c['model']}, {c['task']}, p = {c['poison_ratio']:g}, attack {c['lr']:g}, seeds "
        f"{' '.join(map(str, sorted(found['seeds'])))}: mean (sd); in brackets the paired 95 % "
        f"interval of the difference to {against}"
    )
    table = [("row", *SCORES, "hs: difference", "fa: difference")]
    for name, entry in summary.items():
        if "view" in entry["row"] or "snapshot" in entry["row"]:
            continue
        cells = [number(entry, key, True) for key in SCORES]
        for key in ("hs", "fa"):
            low, high = entry.get(f"{key}_diff", (None, None))
            cells.append("-" if low is None else f"[{low:+.1f} {high:+.1f}]")
        some = f" ({entry['n']} of {seeds} seeds)" if entry["n"] < seeds else ""
        table.append((name + some, *cells))
    print_columns(table)


def main(argv=None):
    """Summarise runs, or check, write or draw the pages; returns the number of wrong cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="run folders")
    parser.add_argument("--against", default="finetuned", metavar="ROW", help="row to compare with")
    parser.add_argument("--choose", action="store_true", help="each repair's best setting")
    parser.add_argument("--check", action="store_true", help="compare the pages with the json")
    parser.add_argument("--write", action="store_true", help="make the pages' tables again")
    parser.add_argument("--draw", action="store_true", help="make the README's pictures again")
    args = parser.parse_args(argv)
    if args.write:
        for path in PAGES:
            path.write_text(MARK.sub(rewritten, path.read_text(encoding="utf-8")), encoding="utf-8")
    if args.draw:
        draw_story()
        draw_mechanism()
        draw_frontier()
        draw_map()
    if args.check:
        wrong = [line for path in PAGES for line in differences(path)]
        print("\n".join(wrong) or "every table is what the kept json gives")
        return len(wrong)
    if args.folders:
        for found in group(args.folders, strict=True):
            print_summary(found, args.against)
            if args.choose:
                print("\nchosen: lowest HS+ with FA within 2 of attacked and benign over 90 %")
                for name, count, best in choose(summarise(found, args.against)):
                    text = label(best["row"]) if best else "none keeps both"
                    print(f"  {name}, of {count}: {text}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(1 if main() else 0)
    except Wrong as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
