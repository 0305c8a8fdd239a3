"""Stage 3 - repairs that optimise nothing: noise, interpolation, pruning.

Gaussian noise on the weights of the attacked model lowers its harmful score: with enough of it
the model answers nothing well, harmful prompts included. That is the paper's third sentence, and
its catch: the accuracy on the user's task falls too (Fig. 4). Any repair that is better has to
beat what needs no optimiser at all. From attacked weights w and aligned weights w_a, both of
which the provider has, these make new weights:

    noise         w + std * z,   z ~ N(0, I)               for several std, all along one z
    interpolated  w + t * (w_a - w)                        back towards the aligned adapter
    antidote      w with the top share of |w| * ||input||_2 on harmful data set to zero

(Noise as long as Panacea's eps is a control of stage 4.) Interpolation is as in WiSE-FT
(arXiv 2109.01903); RESTA (2402.11746) adds a safety vector instead. Antidote (2408.09600) is the
paper's closest rival; it scores by Wanda (2306.11695).

Everything happens to the adapter w = {A, B} only; the frozen model stays as it is. Deviation from
Antidote's code: the share is pruned from each matrix as a whole, not from each of its rows.

Reads:  RUN/01_data.pt, RUN/02_finetune.pt    Writes: RUN/03_random_perturb.pt
Run:    python 03_random_perturb.py                          under 10 seconds for the toy
"""

import common  # the parts that are no lesson: flags, files, loading, batches
from common import Flag, Run, row

import torch

# fmt: off
FLAGS = [  # name, default of toy, laptop, paper, meaning
    Flag("std", [0.04, 0.07, 0.1], [0.06], [0.001, 0.01, 0.05, 0.1],
         "standard deviations of the noise; 0: none", low=0),
    Flag("t", [0.25, 0.5, 0.75], [0.5], [0.25, 0.5, 0.75],
         "parts of the way back to the aligned adapter; 0: none", low=0, high=1),
    Flag("share", [0.01, 0.05], [0.01], [0.01, 0.05, 0.1],
         "shares of the adapter's weights that Antidote prunes; 0: none", low=0, high=1),
]
# fmt: on


def gaussian_like(w, seed):
    """{name: z}, z ~ N(0, 1) of the shape of each tensor of w (dict), float32, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator) for name, x in w.items()}


def noise(w, z, std):
    """w + std * z (dicts of tensors): Fig. 4 of the paper."""
    return {name: w[name] + std * z[name] for name in w}


def interpolated(w, aligned, t):
    """w + t (aligned - w): t = 0 is the attacked model, t = 1 the aligned one."""
    return {name: torch.lerp(w[name], aligned[name], t) for name in w}


def antidote(w, norms, share):
    """w with the top `share` of each matrix zero, by Wanda score |w| * ||input||_2.

    Args:
        norms: {name: (columns,)}, L2 norm of each input feature over the harmful tokens.
    """
    pruned = {}
    for name, x in w.items():
        score = (x.abs() * norms[name]).flatten()
        top = score.topk(round(share * score.numel())).indices
        pruned[name] = x.flatten().index_fill(0, top, 0.0).view_as(x)
    return pruned


@torch.no_grad()
def input_norms(model, w, alpha_over_r, examples):
    """{name: (columns,)}: L2 norms of what enters each A (x) and each B (A x), over all tokens."""
    squares = dict.fromkeys(w, 0.0)

    handles = []
    for name in [n.removesuffix(".lora_A") for n in w if n.endswith(".lora_A")]:
        A = w[f"{name}.lora_A"].to(model.device)

        def record(_, inputs, name=name, A=A):
            x = inputs[0].float().flatten(0, -2)  # (tokens, in)
            squares[f"{name}.lora_A"] += x.pow(2).sum(0)
            squares[f"{name}.lora_B"] += (x @ A.T).pow(2).sum(0)  # (r,)

        handles.append(model.get_submodule(name).register_forward_pre_hook(record))
    try:
        with common.attach(model, w, alpha_over_r):
            for ids, _ in common.progress(examples, len(examples), "antidote"):
                model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: x.sqrt().cpu() for name, x in squares.items()}


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    return common.stage_parser(__doc__, FLAGS).parse_args(argv)


def main(argv=None):
    """Make the repairs and write RUN/03_random_perturb.pt; returns the artifact."""
    args = get_args(argv)
    run = Run(args.run)
    data, stage2 = run.load("01_data.pt"), run.load("02_finetune.pt")
    w, aligned = (common.weights_of(stage2, name) for name in ("finetuned", "aligned"))
    c = {**stage2["config"], **common.resolve(args, FLAGS, data["config"]["preset"])}
    device = common.pick_device(args.device, c["preset"])
    z, size = gaussian_like(w, c["seed"]), sum(x.numel() for x in w.values())
    rows = []  # a repair of your own: one more row, its name, what varies within the name, its w
    for std in filter(None, c["std"]):
        print(f"  std {std:<6g} on {size:,} weights: L2 norm {std * size**0.5:.3g}")
        rows.append(row("random", {"std": std}, noise(w, z, std)))
    for t in filter(None, c["t"]):
        rows.append(row("interpolated", {"t": t}, interpolated(w, aligned, t)))
    if any(c["share"]):
        model, tokenizer = common.load_model(run, data, device)
        common.describe(model, f"; reading {len(data['harmful'])} harmful samples for Antidote")
        examples = common.encode(tokenizer, data["harmful"], c["max_length"], c["template"])
        norms = input_norms(model, w, c["alpha"] / c["r"], examples)
        for share in filter(None, c["share"]):
            rows.append(row("antidote", {"share": share}, antidote(w, norms, share)))
    artifact = run.save("03_random_perturb.pt", c, rows=rows)
    print(f"{run.folder / '03_random_perturb.pt'} written; next: {run.command('04_panacea')}")
    return artifact


if __name__ == "__main__":
    common.run_stage(main)
