"""Stage 6 - where does safety sit? The size of eps per layer, and a check that it is causal.

The paper reads "safety affinity" off the size of Panacea's perturbation in each layer (Fig. 5):
eps is the direction in which harm unlearns fastest, so the layers where it is large matter most.
Two things are missing there, and are done here:

    fair     a layer with more weights has a larger norm; so eps is also given per weight
             (||eps_l|| / sqrt(n_l)) and relative to the layer's own weights (||eps_l|| / ||w_l||),
             and over many harmful batches (one eps per training step) rather than one
    causal   eps is applied layer by layer, and HS, HS+ and FA are measured:
                 only      eps_l on layer l alone
                 without   eps on all layers but l
                 one_norm  eps_l stretched to the norm of the whole eps, on layer l alone
                 random    a random direction of that norm on layer l alone

To first order eps_l raises h by ||eps_l||^2 ||grad h|| / rho, so a large layer must do more than
a small one in `only`: their agreement (Spearman's rank correlation) proves little. `one_norm`
asks the fair question, whether a unit of eps does more here than there, and `random` whether
the layer is merely fragile.

Reads:  RUN/01_data.pt, RUN/04_panacea.pt, RUN/05_evaluate.pt
Writes: RUN/06_layer_analysis.pt, RUN/layers.json, RUN/06_layer_analysis.png (with matplotlib)
Run:    python 06_layer_analysis.py           twenty seconds for the toy
        python 06_layer_analysis.py --aggregate runs/seed*
"""

import math
import re
from pathlib import Path

import numpy as np
import torch

from common import (POSITIVE, SIZE, Run, UserError, answer_tests, describe, load_model, make_judge,
                    number, pick_device, picture, progress, resolve, run_stage, score, stage_parser)

DEFAULTS = {  # flag: toy, laptop, paper, type, meaning
    "causal": (True, True, False, bool, "apply eps layer by layer and measure; four evaluations a "
               "layer"),
    "causal_prompts": (200, 20, 100, SIZE, "prompts of each kind in the causal check"),
    "causal_scale": (1.0, 1.0, 1.0, POSITIVE, "multiple of eps in the causal check"),
    "last_share": (0.5, 0.5, 0.5, number(float, 0, 1), "share of the last steps whose eps are "
                   "averaged"),
}
SIZES, VIEWS = ("norm", "per_weight", "relative"), ("only", "without", "one_norm", "random")

# ---------------------------------------------------------------------------------------------
# Sizes


def layer_of(name):
    """Number of the decoder layer that a weight's name belongs to: "model.layers.3.mlp" -> 3."""
    return int(re.search(r"\.(\d+)\.", name)[1])


def norm_of(weights, layer=None):
    """(L2 norm, count) of a dict of tensors, or of those of one layer."""
    parts = [x for name, x in weights.items() if layer is None or layer_of(name) == layer]
    return math.sqrt(sum(x.pow(2).sum().item() for x in parts)), sum(x.numel() for x in parts)


def sizes(artifact, last_share):
    """Per layer: norm (mean over the batches of the last steps), interval, and the fair versions.

    Args:
        artifact: stage 4's, with `log[i]["layers"]`, ||eps|| per layer at step i.
        last_share: share of the training steps, counted from the end, whose eps are used.
    """
    log = artifact["log"][-max(1, round(last_share * len(artifact["log"]))):]
    norms = np.array([entry["layers"] for entry in log])               # (batches, layers)
    rows = []
    for i, layer in enumerate(sorted({layer_of(name) for name in artifact["weights"]})):
        norm, (w_norm, count) = norms[:, i].mean().item(), norm_of(artifact["weights"], layer)
        rows.append({"layer": layer, "norm": norm, "per_weight": norm / math.sqrt(count),
                     "norm_interval": np.quantile(norms[:, i], [0.025, 0.975]).tolist(),
                     "relative": norm / w_norm, "batches": len(log)})
    return rows


# ---------------------------------------------------------------------------------------------
# The causal check


def masked(w, eps, layers, scale=1.0):
    """w + scale * eps on the given layers only."""
    return {name: w[name] + (scale * eps[name] if layer_of(name) in layers else 0) for name in w}


def trials(w, eps, layers, scale, seed):
    """Yield (view, layer, adapter weights): eps nowhere, everywhere, and layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(x.shape, generator=generator) for name, x in eps.items()}
    whole = scale * norm_of(eps)[0]
    yield "none", None, w
    yield "all", None, masked(w, eps, layers, scale)
    for layer in layers:
        yield "only", layer, masked(w, eps, {layer}, scale)
        yield "without", layer, masked(w, eps, set(layers) - {layer}, scale)
        for view, direction in (("one_norm", eps), ("random", noise)):
            length = norm_of(direction, layer)[0] or 1.0  # a layer without eps stays as it is
            yield view, layer, masked(w, direction, {layer}, whole / length)


def causal_check(rows, artifact, run, data, device, c):
    """Add to each row the scores of every view of its layer.

    Returns:
        {"none", "all"}: scores without eps and with all of it.
    """
    model, tokenizer = load_model(run, data, device)
    judge = make_judge(c["judge"], data, model.device)
    tests = ("test_harmful", "test_task")
    few = {**data, **{name: data[name][:c["causal_prompts"]] for name in tests}}
    describe(model, "; eps layer by layer")
    layers, answers = [row["layer"] for row in rows], {}
    todo = trials(artifact["weights"], artifact["epsilon"], layers, c["causal_scale"], c["seed"])
    for view, layer, weights in progress(todo, 2 + len(VIEWS) * len(layers), "layers"):
        answers[view, layer] = answer_tests(model, tokenizer, few, weights, c, tests)
    judge.listen(model, tokenizer, data, [text for x in answers.values()
                                          for text in x["test_harmful"]])
    del model  # a GPU may not hold it and the judge
    ends = {}
    for (view, layer), texts in answers.items():
        scores = score(judge, few, texts)
        kept = {key: scores[key] for key in ("hs", "hs_plus", "fa") if key in scores}
        (ends if layer is None else rows[layers.index(layer)])[view] = kept
    return ends


def ranks(values):
    """Ranks from 0, ties sharing their mean rank; a numpy array."""
    values = np.asarray(values, dtype=float)
    return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])


def correlations(rows, ends):
    """{size: {view: Spearman}} between each size of eps and each causal effect on HS.

    A view in which no layer differs has no ranks, and is left out.
    """
    effects = {view: [row[view]["hs"] - ends["all"]["hs"] if view == "without" else
                      ends["none"]["hs"] - row[view]["hs"] for row in rows] for view in VIEWS}
    return {size: {view: float(np.corrcoef(ranks([row[size] for row in rows]), ranks(effect))[0, 1])
                   for view, effect in effects.items() if len(set(effect)) > 1}
            for size in SIZES}


# ---------------------------------------------------------------------------------------------
# Tables and pictures


def text_of(scores):
    """HS, HS+ and FA as text."""
    return "/".join(f"{scores[key]:.0f}" for key in ("hs", "hs_plus", "fa") if key in scores)


def print_layers(rows, ends, agreement):
    """A line per layer, with a bar in the terminal; then the rank correlations."""
    top = max(row["norm"] for row in rows) or 1.0
    print(f"\n{'layer':>5}  {'||eps|| [95 %]':20} {'per weight':>10} {'relative':>9}" + (
        "".join(f"  {view:>11}" for view in VIEWS) + "  HS/HS+/FA" if ends else ""))
    for row in rows:
        low, high = row["norm_interval"]
        print(f"{row['layer']:5}  {row['norm']:.3f} [{low:.3f} {high:.3f}]  "
              f"{row['per_weight']:10.2e} {row['relative']:9.4f}"
              + "".join(f"  {text_of(row[view]):>11}" for view in VIEWS if view in row)
              + "  " + "#" * round(20 * row["norm"] / top))
    if ends:
        print(f"without eps {text_of(ends['none'])}, with all of it {text_of(ends['all'])}")
    for size, views in agreement.items():
        print(f"rank correlation of {size} with the fall of HS: " + ", ".join(
            f"{view} {value:+.2f}" for view, value in views.items()))


def draw(rows, ends, path):
    """Bars of the norm of eps per layer, and the causal check beside it if it was made."""
    def plot(size, effect=None):
        layers = [row["layer"] for row in rows]
        norms = np.array([row["norm"] for row in rows])
        low, high = np.array([row["norm_interval"] for row in rows]).T
        size.bar(layers, norms, yerr=[np.maximum(norms - low, 0), np.maximum(high - norms, 0)],
                 capsize=2, color="tab:purple")
        size.set(title="Size of eps per layer (95 % of batches)", xlabel="layer", ylabel="||eps||")
        if effect:
            for view, style in zip(VIEWS, ("o-", "s:", "D-", "x--")):
                effect.plot(layers, [row[view]["hs"] for row in rows], style, label=view)
            effect.axhline(ends["none"]["hs"], color="grey", lw=0.7, label="no eps")
            effect.set(title="Harmful score with eps on one layer", xlabel="layer", ylabel="%",
                       ylim=(-5, 105))
            effect.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        for axis in filter(None, (size, effect)):
            axis.locator_params("x", integer=True)
    picture(path, plot, 2 if ends else 1, (11 if ends else 6, 4))


# ---------------------------------------------------------------------------------------------
# Several runs


def aggregate(folders):
    """Means over seeds of the layers of several runs; writes layers.json and a picture beside them.

    Raises:
        UserError: a run has no sound 06_layer_analysis.pt, or one of another depth.
    """
    found = [Run(folder).load("06_layer_analysis.pt") for folder in folders]
    if len({(bool(x["ends"]), len(x["layers"]), *map(x["config"].get, ("model", "task",
             "poison_ratio"))) for x in found}) > 1:
        raise UserError("runs of another model, task, poison or --causal have no mean")

    def mean(values):
        if isinstance(values[0], dict):
            return {key: mean([v[key] for v in values]) for key in values[0]
                    if all(key in v for v in values)}
        if isinstance(values[0], list):
            return [mean(list(part)) for part in zip(*values)]
        return float(np.mean(values))
    rows = mean([x["layers"] for x in found])
    ends, agreement = (mean([x[key] for x in found]) for key in ("ends", "rank_correlation"))
    for row in rows:
        row["layer"] = int(row["layer"])
    print(f"means over {len(found)} runs:", end="")
    print_layers(rows, ends, agreement)
    beside, content = Run(Path(folders[0]).parent), {"layers": rows, "ends": ends,
                                                     "rank_correlation": agreement}
    beside.save_json("layers.json", content)
    draw(rows, ends, beside.folder / "layers.png")
    return content


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser, group = stage_parser(__doc__, DEFAULTS)
    group.add_argument("--aggregate", nargs="+", type=Path, metavar="DIR",
                       help="only summarise stage 6 of these runs over seeds")
    return parser.parse_args(argv)


def main(argv=None):
    """Analyse eps by layer; writes RUN/06_layer_analysis.pt and returns it."""
    args = get_args(argv)
    if args.aggregate:
        return aggregate(args.aggregate)
    run = Run(args.run)
    data, stage4, stage5 = (run.load(name) for name in ("01_data.pt", "04_panacea.pt",
                                                        "05_evaluate.pt"))
    c = {**stage5["config"], **resolve(args, DEFAULTS, data["config"]["preset"])}
    rows, ends, agreement = sizes(stage4, c["last_share"]), {}, {}
    if c["causal"]:
        ends = causal_check(rows, stage4, run, data, pick_device(args.device), c)
        agreement = correlations(rows, ends)
    print_layers(rows, ends, agreement)
    content = {"layers": rows, "ends": ends, "rank_correlation": agreement}
    artifact = run.save("06_layer_analysis.pt", c, **content)
    run.save_json("layers.json", {"config": c, **content})
    draw(rows, ends, run.folder / "06_layer_analysis.png")
    print(f"{run.folder / 'layers.json'} written: the last stage is done")
    return artifact


if __name__ == "__main__":
    run_stage(main)
