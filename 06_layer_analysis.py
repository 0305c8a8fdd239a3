"""Stage 6 - where does safety sit? The size of eps per layer, and a check that it is causal.

The paper reads "safety affinity" off the size of Panacea's perturbation in each layer (Fig. 5):
eps is the direction in which harm unlearns fastest, so the layers where it is large matter most.
Two things are missing there, and are done here:

    fair     a layer with more weights has a larger norm; so eps is also given per weight
             (||eps_l|| / sqrt(n_l)) and relative to the layer's own weights (||eps_l|| / ||w_l||),
             and over many harmful batches (one eps per training step) rather than one
    causal   stage 5 has applied eps layer by layer, and measured:
                 only      eps_l on layer l alone
                 without   eps on all layers but l
                 one_norm  eps_l stretched to the norm of the whole eps, on layer l alone
                 random    a random direction of that norm on layer l alone

To first order eps_l raises h by ||eps_l||^2 ||grad h|| / rho, so a large layer must do more than
a small one in `only`: their agreement (Spearman's rank correlation) proves little. `one_norm`
asks the fair question, whether a unit of eps does more here than there, and `random` whether
the layer is merely fragile. Effects are on HS (how far it falls) and on refusals (how far they
rise): a layer that only breaks the model lowers HS and brings no refusal.

Reads:  RUN/04_panacea.pt, RUN/05_evaluate.pt (its layer rows; no model is loaded)
Writes: RUN/06_layer_analysis.pt, RUN/layers.json, RUN/06_layer_analysis.png (with matplotlib)
Run:    python 06_layer_analysis.py           seconds
"""

import math

import common  # the parts that are no lesson: flags, files
from common import Run, layer_of

import numpy as np

SIZES, VIEWS = ("norm", "per_weight", "relative"), ("only", "without", "one_norm", "random")
SCORES = ("hs", "hs_plus", "refusal", "fa")

# ---------------------------------------------------------------------------------------------
# Sizes


def sizes(artifact):
    """Per layer: norm (mean over the batches of the last half of the steps), interval, and the
    fair versions; of stage 4's artifact, where `log[i]["layers"]` is ||eps|| per layer at step i.
    """
    log = artifact["log"][len(artifact["log"]) // 2 :]
    norms = np.array([entry["layers"] for entry in log])  # (batches, layers)
    rows = []
    for i, layer in enumerate(sorted({layer_of(name) for name in artifact["weights"]})):
        w, norm = artifact["weights"], norms[:, i].mean().item()
        count = sum(x.numel() for name, x in w.items() if layer_of(name) == layer)
        rows.append(
            {
                "layer": layer,
                "norm": norm,
                "norm_interval": np.quantile(norms[:, i], [0.025, 0.975]).tolist(),
                "per_weight": norm / math.sqrt(count),
                "relative": norm / common.norm(w, layer),
                "batches": len(log),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Effects, from stage 5's rows


def with_views(rows, measured):
    """Add to each layer's row the scores of its views; {"none", "all"}: eps nowhere, everywhere."""
    ends = {}
    for view in measured:
        scores = {key: view[key] for key in SCORES if view[key] is not None}
        if view["layer"] is None:
            ends[view["view"]] = scores
        for row in rows:
            if row["layer"] == view["layer"]:
                row[view["view"]] = scores
    return ends


def ranks(values):
    """Ranks from 0, ties sharing their mean rank; a numpy array."""
    values = np.asarray(values, dtype=float)
    return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])


def correlations(rows, ends, key):
    """{size: {view: Spearman}} between each size of eps and its causal effect on `key`.

    The effect is how far eps moves HS down, or refusals up. A view in which no layer differs has
    no ranks, and is left out.
    """
    sign = -1 if key == "hs" else 1
    rank = {size: {} for size in SIZES}
    for view in VIEWS:
        if view == "without":  # what the layer's absence undoes of the whole effect
            effect = [sign * (ends["all"][key] - row[view][key]) for row in rows]
        else:  # what its presence alone adds
            effect = [sign * (row[view][key] - ends["none"][key]) for row in rows]
        if len(set(effect)) > 1:
            for size in SIZES:
                pair = ranks([row[size] for row in rows]), ranks(effect)
                if len(set(pair[0])) > 1:
                    rank[size][view] = float(np.corrcoef(*pair)[0, 1])
    return rank


# ---------------------------------------------------------------------------------------------
# Table and picture


def text_of(scores):
    """HS, HS+, refusals and FA as text."""
    return "/".join(f"{scores[key]:.0f}" for key in SCORES if key in scores)


def print_layers(rows, ends, agreement, prompts):
    """A line per layer, with a bar in the terminal; then a legend and the rank correlations."""
    top = max(row["norm"] for row in rows) or 1.0
    head = f"\n{'layer':>5}  {'||eps|| [95 %]':20} {'per weight':>10} {'relative':>9}"
    if ends:
        head += "".join(f"  {view:>13}" for view in VIEWS) + "  HS/HS+/refusal/FA"
    print(head)
    for row in rows:
        low, high = row["norm_interval"]
        line = f"{row['layer']:5}  {row['norm']:.3f} [{low:.3f} {high:.3f}]  "
        line += f"{row['per_weight']:10.2e} {row['relative']:9.4f}"
        line += "".join(f"  {text_of(row[view]):>13}" for view in VIEWS if view in row)
        print(line + "  " + "#" * round(20 * row["norm"] / top))
    if ends:
        print(
            f"without eps {text_of(ends['none'])}, with all of it {text_of(ends['all'])}, on "
            f"{prompts} prompts of each kind (stage 5's table has more)\n"
            "only: eps on that layer alone. without: on all others. one_norm: that layer's eps at\n"
            "the norm of the whole. random: noise of that norm on that layer."
        )
    for key, what in (("hs", "the fall of HS"), ("refusal", "the rise of refusals")):
        if agreement:  # of the other sizes: layers.json
            views = agreement[key]["norm"].items()
            values = ", ".join(f"{view} {value:+.2f}" for view, value in views)
            values = values or "no layer differs"
            print(f"rank correlation of the norm with {what} ({len(rows)} layers): {values}")


def draw(rows, ends, path):
    """Bars of the norm of eps per layer, and beside it what eps does on one layer, if measured.

    Returns whether there is matplotlib to draw with.
    """
    figure = common.new_figure(12 if ends else 6, 4)
    if figure is None:
        return False
    axes = figure.subplots(1, 3 if ends else 1, squeeze=False)[0]
    layers, norms = [row["layer"] for row in rows], np.array([row["norm"] for row in rows])
    low, high = np.array([row["norm_interval"] for row in rows]).T
    spread = [np.maximum(norms - low, 0), np.maximum(high - norms, 0)]
    axes[0].bar(layers, norms, yerr=spread, capsize=2, color="tab:purple")
    axes[0].set(title="Size of eps per layer (95 % of batches)", xlabel="layer", ylabel="||eps||")
    for axis, key, title in zip(axes[1:], ("hs", "refusal"), ("Harmful score", "Refusals")):
        for view, style in zip(VIEWS, ("o-", "s:", "D-", "x--")):
            axis.plot(layers, [row[view][key] for row in rows], style, label=view)
        axis.axhline(ends["none"][key], color="grey", lw=0.7, label="no eps")
        axis.set(title=f"{title}, eps on one layer", xlabel="layer", ylabel="%", ylim=(-5, 105))
    if ends:
        axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes:
        axis.locator_params("x", integer=True)
    common.write_whole(path, lambda new: figure.savefig(new, dpi=110))
    print(f"picture: {path}")
    return True


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    return common.stage_parser(__doc__, []).parse_args(argv)


def main(argv=None):
    """Analyse eps by layer; writes RUN/06_layer_analysis.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    stage4, stage5 = run.load("04_panacea.pt"), run.load("05_evaluate.pt")
    c, rows = stage5["config"], sizes(stage4)
    views = [row for row in stage5["rows"] if "view" in row]
    ends = with_views(rows, views)
    agreement = {key: correlations(rows, ends, key) for key in ("hs", "refusal")} if ends else {}
    print_layers(rows, ends, agreement, views[0]["n_harmful"] if views else 0)
    if not ends:
        print(f"for what each layer does, run: {run.command('05_evaluate')} --causal")
    content = {"layers": rows, "ends": ends, "rank_correlation": agreement}
    artifact = run.save("06_layer_analysis.pt", c, **content)
    run.save_json("layers.json", {"config": c, **content})
    if not draw(rows, ends, run.folder / "06_layer_analysis.png"):
        both = f"{run.command('05_evaluate')} && {run.command('06_layer_analysis')}"
        print(f"pictures of this run: pip install matplotlib && {both}")
    print(f"{run.folder / 'layers.json'} written: the last stage is done")
    return artifact


if __name__ == "__main__":
    common.run_stage(main)
