"""Stage 3 - the embarrassingly simple fix: add noise to the fine-tuned weights.

Gaussian noise on the weights of the attacked model lowers its harmful score: with enough of it
the model answers nothing well, harmful prompts included. That is the paper's third sentence, and
its catch: the accuracy on the user's task falls too (Fig. 4).

    w' = w + std * z,   z ~ N(0, I)                          for several std
    w' = w + rho * z / ||z||_2                               the control the paper lacks

The second line is noise of the same L2 norm as Panacea's eps. If it did as well as Panacea, the
direction that Panacea optimises would not matter. One z serves all strengths, so that a curve
over std is a walk along one line.

Noise goes to the adapter w = {A, B} only, as in the paper; the frozen model stays as it is.

Reads:  RUN/02_finetune.pt    Writes: RUN/03_random_perturb.pt
Run:    python 03_random_perturb.py                          under 5 seconds
"""

import torch

from common import Run, UserError, add_flags, number, resolve, run_stage, stage_parser

DEFAULTS = {
    "toy": dict(std=[0.04, 0.06, 0.07, 0.08, 0.09, 0.1]),
    "paper": dict(std=[0.001, 0.01, 0.05, 0.1]),
}


def gaussian_like(w, seed):
    """{name: z}, z ~ N(0, 1) of the shape of each tensor of w (dict), float32, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator) for name, x in w.items()}


def unit(direction):
    """`direction` (dict of tensors) divided by its one global L2 norm."""
    norm = torch.sqrt(sum(z.pow(2).sum() for z in direction.values()))
    return {name: z / norm for name, z in direction.items()}


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser = stage_parser(__doc__)
    group = parser.add_argument_group("noise")
    add_flags(group, DEFAULTS, {
        "std": (number(float, 0), "standard deviations of the noise on every adapter weight")})
    return parser.parse_args(argv)


def main(argv=None):
    """Draw the noise and write RUN/03_random_perturb.pt; returns the artifact."""
    args = get_args(argv)
    run = Run(args.run)
    attacked = run.load("02_finetune.pt")
    if "sft" not in attacked["finetuned"]:
        raise UserError("02_finetune.pt has no model aligned with sft; run: python 02_finetune.py "
                        f"--run {args.run} --defense sft")
    config = {**attacked["config"], **resolve(args, DEFAULTS, attacked["config"]["preset"])}
    w = attacked["finetuned"]["sft"]
    z = gaussian_like(w, config["seed"])
    size = sum(x.numel() for x in w.values())
    for std in config["std"]:
        print(f"  std {std:<6g} on {size:,} weights: L2 norm {std * size ** 0.5:.3g}")
    artifact = run.save("03_random_perturb.pt", config, noise=z, matched=unit(z))
    print(f"{args.run / '03_random_perturb.pt'} written; next: python 04_panacea.py "
          f"--run {args.run}")
    return artifact


if __name__ == "__main__":
    run_stage(main)
