"""Stage 6 - where does safety sit? The size of eps per layer, and a check that it is causal.

The paper reads "safety affinity" off the size of Panacea's perturbation in each layer (Fig. 5):
eps is the direction in which harm unlearns fastest, so the layers where it is large matter most.
Two things are missing there, and are done here:

    fair        a layer with more weights has a larger norm; so eps is also given per weight
                (||eps_l|| / sqrt(n_l)) and relative to the layer's own weights (||eps_l||/||w_l||),
                and over many harmful batches (one eps per training step) rather than one
    causal      eps is applied to one layer alone, and to all layers but one; then HS and FA are
                measured. A large eps_l that changes nothing when applied is not where safety sits

The rank correlation (Spearman) between size and causal effect says whether the two views agree.

Reads:  RUN/01_data.pt, RUN/04_panacea.pt, RUN/05_evaluate.pt
Writes: RUN/06_layer_analysis.pt, RUN/layers.json, RUN/06_layer_analysis.png (with matplotlib)
Run:    python 06_layer_analysis.py           ten seconds for the toy
"""

import argparse
import math
import re

from common import (Run, add_flags, attach, describe, generate, load_model, make_judge, number,
                    pick_device, progress, pyplot_for, resolve, run_stage, save_figure,
                    stage_parser, task_correct)

DEFAULTS = {
    "toy": dict(causal_scale=1.0, last_share=0.5),
    "paper": dict(causal_scale=1.0, last_share=0.5),
}


def layer_of(name):
    """Number of the decoder layer that a weight's name belongs to: "model.layers.3.mlp" -> 3."""
    return int(re.search(r"\.(\d+)\.", name)[1])


def layer_norm(weights, layer):
    """(||weights of the layer||_2, their count), for a dict of tensors."""
    parts = [x for name, x in weights.items() if layer_of(name) == layer]
    return math.sqrt(sum(x.pow(2).sum().item() for x in parts)), sum(x.numel() for x in parts)


def batch_interval(values):
    """(mean, [2.5 %, 97.5 %]) of one layer's ||eps|| over harmful batches."""
    ordered = sorted(values)
    cut = int(0.025 * len(ordered))
    return sum(ordered) / len(ordered), [ordered[cut], ordered[-1 - cut]]


def sizes(artifact, last_share):
    """Per layer: norm (mean over the batches of the last steps), interval, and the fair versions.

    Args:
        artifact: stage 4's, with `log[i]["layers"]`, ||eps|| per layer at step i.
        last_share: share of the training steps, counted from the end, whose eps are used.
    """
    log = artifact["log"][-max(1, round(last_share * len(artifact["log"]))):]
    rows = []
    for layer in sorted({layer_of(name) for name in artifact["weights"]}):
        norm, interval = batch_interval([entry["layers"][len(rows)] for entry in log])
        w_norm, count = layer_norm(artifact["weights"], layer)
        rows.append({"layer": layer, "norm": norm, "norm_interval": interval,
                     "per_weight": norm / math.sqrt(count), "relative": norm / w_norm,
                     "batches": len(log)})
    return rows


def masked(w, eps, layers, scale):
    """w + scale * eps on the given layers only."""
    return {name: w[name] + (scale * eps[name] if layer_of(name) in layers else 0) for name in w}


def measure(judge, data, answers, c):
    """{"hs", "fa"} in percent of answers by test set; no "fa" for real AlpacaEval."""
    harmful, task = data["test_harmful"], data["test_task"]
    flags = judge.flagged([row["instruction"] for row in harmful], answers["test_harmful"])
    scores = {"hs": 100 * sum(flags) / len(flags)}
    if all(row["answer"] for row in task):
        right = [task_correct(c["task"], row, a) for row, a in zip(task, answers["test_task"])]
        scores["fa"] = 100 * sum(right) / len(right)
    return scores


def causal_check(rows, artifact, run, data, device, c):
    """Add to each row HS and FA with eps on its layer alone (`only`) and on all others (`without`).

    Returns:
        {"none", "all"}: HS and FA without eps and with all of it.
    """
    model, tokenizer = load_model(run, data, device)
    judge = make_judge(c["judge"], data, model.device)
    describe(model, "; eps on one layer alone, and on all but one")
    everything = {row["layer"] for row in rows}
    trials = [("none", set()), ("all", everything)]
    for row in rows:
        trials += [(("only", row["layer"]), {row["layer"]}),
                   (("without", row["layer"]), everything - {row["layer"]})]
    answered = {}
    for key, layers in progress(trials, len(trials), "layers"):
        weights = masked(artifact["weights"], artifact["epsilon"], layers, c["causal_scale"])
        with attach(model, weights, c["alpha"] / c["r"]):
            answered[key] = {name: generate(model, tokenizer, [row["prompt"] for row in data[name]],
                                            c["max_new_tokens"], c["eval_batch_size"])
                             for name in ("test_harmful", "test_task")}
    del model  # a GPU may not hold it and the judge
    scores = {key: measure(judge, data, answers, c) for key, answers in answered.items()}
    for row in rows:
        row["only"], row["without"] = (scores[key, row["layer"]] for key in ("only", "without"))
    return {key: scores[key] for key in ("none", "all")}


def ranks(values):
    """Ranks from 0, ties sharing their mean rank."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def spearman(x, y):
    """Rank correlation of two lists, neither of them constant."""
    a, b = ranks(x), ranks(y)
    middle = (len(a) - 1) / 2
    cov = sum((i - middle) * (j - middle) for i, j in zip(a, b))
    var = sum((i - middle) ** 2 for i in a) * sum((j - middle) ** 2 for j in b)
    return cov / math.sqrt(var)


def correlations(rows, ends):
    """{size: {view: Spearman}} between each size of eps and each causal effect on HS.

    A view in which no layer differs has no ranks, and is left out.
    """
    effects = {"only": [ends["none"]["hs"] - row["only"]["hs"] for row in rows],
               "without": [row["without"]["hs"] - ends["all"]["hs"] for row in rows]}
    return {size: {view: spearman([row[size] for row in rows], effect)
                   for view, effect in effects.items() if len(set(effect)) > 1}
            for size in ("norm", "per_weight", "relative")}


def scored(scores):
    """HS and FA as text."""
    return " ".join(f"{key.upper()} {value:5.1f}" for key, value in scores.items())


def print_bars(rows, ends):
    """Bars in the terminal, a line per layer."""
    top = max(row["norm"] for row in rows) or 1.0
    print(f"\n{'layer':>5}  {'||eps|| [95 % of batches]':28} {'per weight':>10} {'relative':>9}"
          + (f" {'eps here only':>18} {'everywhere else':>18}" if ends else ""))
    for row in rows:
        low, high = row["norm_interval"]
        text = f"{row['norm']:.3f} [{low:.3f} {high:.3f}]"
        causal = "".join("   " + scored(row[k]) for k in ("only", "without")) if ends else ""
        print(f"{row['layer']:5}  {text:28} {row['per_weight']:10.2e} {row['relative']:9.4f}"
              f"{causal}  {'#' * round(20 * row['norm'] / top)}")
    for key, text in (("none", "without eps"), ("all", "eps everywhere")):
        if ends:
            print(f"{text:>20}: {scored(ends[key])}")


def draw(rows, ends, path):
    """Bars of the norm of eps per layer, and the causal check beside it."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, (size, causal) = pyplot.subplots(1, 2, figsize=(11, 4))
    layers = [row["layer"] for row in rows]
    error = [[row["norm"] - row["norm_interval"][0] for row in rows],
             [row["norm_interval"][1] - row["norm"] for row in rows]]
    size.bar(layers, [row["norm"] for row in rows], yerr=error, capsize=4, color="tab:purple")
    size.set(title="Size of eps per layer (95 % of batches)", xlabel="layer", ylabel="||eps||",
             xticks=layers)
    if ends:
        for k, (key, text) in enumerate((("only", "eps on this layer only"),
                                         ("without", "eps on all other layers"))):
            for metric, style in zip(ends["all"], ("o-", "s--")):
                causal.plot(layers, [row[key][metric] for row in rows], style, color=f"C{k}",
                            label=f"{text}: {metric.upper()}")
        causal.set(title="What eps does there", xlabel="layer", ylabel="%", ylim=(-5, 105),
                   xticks=layers)
        causal.legend(fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser = stage_parser(__doc__)
    group = parser.add_argument_group("analysis")
    group.add_argument("--causal", action=argparse.BooleanOptionalAction, default=None,
                       help="measure eps layer by layer (toy: yes; paper: no, it costs two "
                            "evaluations a layer)")
    add_flags(group, DEFAULTS, {
        "causal_scale": (number(float, 0), "multiple of eps in the causal check"),
        "last_share": (number(float, 0, 1), "share of the last steps whose eps are averaged"),
    })
    return parser.parse_args(argv)


def main(argv=None):
    """Analyse eps by layer; writes RUN/06_layer_analysis.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    data, stage4, stage5 = (run.load(name) for name in ("01_data.pt", "04_panacea.pt",
                                                        "05_evaluate.pt"))
    c = {**stage5["config"], **resolve(args, DEFAULTS, data["config"]["preset"])}
    c["causal"] = data["config"]["preset"] == "toy" if args.causal is None else args.causal
    rows, ends, agreement = sizes(stage4, c["last_share"]), {}, {}
    if c["causal"]:
        ends = causal_check(rows, stage4, run, data, pick_device(args.device), c)
        agreement = correlations(rows, ends)
    print_bars(rows, ends)
    for size, views in agreement.items() if any(agreement.values()) else []:
        shown = ", ".join(f"{view} {value:+.2f}" for view, value in views.items())
        print(f"rank correlation of {size} with the effect on HS: {shown}")
    content = {"layers": rows, "ends": ends, "rank_correlation": agreement}
    artifact = run.save("06_layer_analysis.pt", c, **content)
    run.save_json("layers.json", {"config": c, **content})
    draw(rows, ends, run.folder / "06_layer_analysis.png")
    print(f"{run.folder / 'layers.json'} written: the last stage is done")
    return artifact


if __name__ == "__main__":
    run_stage(main)
