"""Stage 4 - Panacea: optimise the perturbation instead of drawing it.

Random noise recovers safety because some of it points away from harm; most of it does not, and
costs accuracy. Panacea asks for the perturbation of a given size that raises the harmful loss
most, and while fine-tuning keeps w where such a perturbation works. At the end it is added.

With g the loss on the user's batch, h the loss on the provider's harmful batch, w the adapter:

    Eq. 1   max_w max_{||eps|| <= rho}  lam * (h(w + eps) - h(w)) - g(w)
    Eq. 2   eps_t = rho * grad h(w_t) / ||grad h(w_t)||                 one norm over all of w
    Eq. 3   w_{t+1} = w_t - lr * [ grad g(w_t) - lam * (grad h(w_t + eps_t) - grad h(w_t)) ]
    Output  w_T + eps, eps being the last one computed                  (Algorithm 1)

Eq. 2 solves the inner max to first order; Eq. 3 descends the outer one, through AdamW. With
lam = 0 this is plain fine-tuning, then one step up h: the control `one_shot`.

Beyond the paper: eps silences harm, but what comes instead is noise. The provider owns refusals
too. An *anchored* eps, in the same ball and after plain fine-tuning, climbs h while it descends
a, the loss on the alignment set, and g (--anchor). Control: `realign`, AdamW steps on a alone.

Deviations from the released code: w is restored by copy (adding and subtracting eps is not exact
in bfloat16); h(w + eps) is not clamped at 5 (above, that learns harm); w and eps are saved apart.

Reads:  RUN/01_data.pt, RUN/02_finetune.pt    Writes: RUN/04_panacea.pt
Run:    python 04_panacea.py                  under a minute for the toy
"""

import argparse
import math
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import (Run, UserError, add_flags, checkpoint_layers, cut, describe, encode,
                    endless_batches, epoch_batches, export, load_model, number, over_parts,
                    pick_device, progress, resolve, run_stage, seed_everything, stage_parser)

DEFAULTS = {
    "toy": dict(rho=1.0, lam=0.015, harmful_batch_size=32, anchor=3.0, anchor_steps=5),
    "paper": dict(rho=1.0, lam=0.001, harmful_batch_size=10, anchor=3.0, anchor_steps=5),
}

# ---------------------------------------------------------------------------------------------
# Panacea


def perturbation(grad_h, rho):
    """Eq. 2: eps = rho * grad h / ||grad h||, new tensors, one norm over all of them together.

    Raises:
        UserError: the harmful gradient is zero or not finite, so it has no direction.
    """
    norm = global_norm(grad_h).item()
    if not (math.isfinite(norm) and norm > 0):
        raise UserError(f"the harmful gradient has norm {norm}: no direction to perturb w "
                        "in; the harmful loss is saturated or has overflowed (try a smaller --lr "
                        "in 02_finetune.py)")
    return [rho * x / norm for x in grad_h]


def panacea_rule(loss, w, batch, harmful, rho, lam):
    """Eq. 3: grad g(w) - lam * (grad h(w + eps) - grad h(w)), h on ONE harmful batch.

    Args:
        loss: batch -> scalar loss that depends on w. w: list of tensors that require grad.
        batch, harmful: the user's batch (g) and the provider's (h).
    Returns:
        (gradient, eps, {"g", "h", "h_eps"}): lists of new tensors shaped like w, and the losses.
    """
    grad_g, g = gradient(loss, w, batch)
    grad_h, h = gradient(loss, w, harmful)
    eps = perturbation(grad_h, rho)                                                    # Eq. 2
    with perturbed(w, eps):
        grad_h_eps, h_eps = gradient(loss, w, harmful)
    update = [x - lam * (y_eps - y) for x, y_eps, y in zip(grad_g, grad_h_eps, grad_h)]  # Eq. 3
    return update, eps, {"g": g, "h": h, "h_eps": h_eps}


@contextmanager
def perturbed(w, eps):
    """Inside: w + eps. Afterwards: w again, bit for bit, whatever happened inside."""
    saved = [x.detach().clone() for x in w]
    try:
        with torch.no_grad():
            for x, e in zip(w, eps):
                x.add_(e)
        yield
    finally:
        with torch.no_grad():
            for x, old in zip(w, saved):
                x.copy_(old)


def answer_logits(model, batch):
    """Logits (B*K, V) in float32 and the tokens they should predict (B*K,), -100 where none.

    K: the positions from the first to the last that predict an answer token of any row.
    """
    labels = batch["labels"][:, 1:]                                    # (B, T-1): the next token
    answer = (labels != -100).any(0).nonzero()
    keep = slice(int(answer.min()), int(answer.max()) + 1)             # K positions
    logits = model(input_ids=batch["input_ids"], logits_to_keep=keep, use_cache=False).logits
    return logits.float().flatten(0, 1), labels[:, keep].flatten()


def answer_loss(model, batch):
    """Mean cross-entropy over the answer tokens of a batch; a scalar, float32."""
    return F.cross_entropy(*answer_logits(model, batch), ignore_index=-100)


def gradient(loss, w, batch):
    """(d loss(batch) / d w, loss(batch)): new tensors in the order of `w`, and a number."""
    def part(rows):
        value = loss(rows)
        return *torch.autograd.grad(value, w), value.detach()
    *grads, value = over_parts(part, batch)  # once, or over micro-batches and processes
    return grads, value.item()


def global_norm(tensors):
    """One L2 norm over all tensors together; a scalar tensor."""
    return torch.sqrt(sum(x.pow(2).sum().to(tensors[0].device) for x in tensors))


# Beyond the paper: the anchored perturbation


def anchored_perturbation(objective, w, draws, rho, steps):
    """An eps with ||eps|| <= rho that climbs h - anchor * a - g, by projected gradient steps.

    Steps shrink linearly and add up to 2.5 radii: far enough to cross the ball, short enough at
    the end to settle.

    Args:
        objective: batch -> scalar h - anchor * a - g that depends on w. draws: iterator of its
            batches. steps: number of projected steps.
    Returns:
        eps, a list of new tensors shaped like w.
    """
    eps = [torch.zeros_like(x) for x in w]
    for k in range(steps):
        with perturbed(w, eps):
            climb, _ = gradient(objective, w, next(draws))
        length = 5 * rho * (steps - k) / (steps * (steps + 1))
        eps = [e + s for e, s in zip(eps, perturbation(climb, length))]
        shrink = min(1.0, rho / max(global_norm(eps).item(), 1e-12))  # back onto the ball
        eps = [shrink * e for e in eps]
    return eps


def three_sets(harmful, alignment, user, anchor):
    """Rows of three sets, and the weight of each row's summed loss in h - anchor * a - g."""
    rows, weights = [], []
    for examples, weight in ((harmful, 1.0), (alignment, -anchor), (user, -1.0)):
        tokens = sum(label != -100 for _, labels in examples for label in labels[1:])
        rows += examples
        weights += [weight / tokens] * len(examples)
    return rows, weights


def weighted_loss(model, batch):
    """Sum of batch["weight"] (B,) times each row's summed cross-entropy; a scalar, float32.

    With the weights of three_sets: h - anchor * a - g in one pass instead of three.
    """
    losses = F.cross_entropy(*answer_logits(model, batch), ignore_index=-100, reduction="none")
    return batch["weight"] @ losses.view(len(batch["weight"]), -1).sum(1)


# ---------------------------------------------------------------------------------------------
# LoRA by hand: the same lines as in stage 2, so that each file can be read alone


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, with W frozen, A (r, in) Kaiming-uniform, B (out, r) zero.

    A and B are float32 on any base dtype: AdamW steps of 1e-5 vanish in bfloat16.
    Source: Hu et al. 2021, arXiv 2106.09685, Section 4.1.
    """

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / r
        options = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):  # (..., in) -> (..., out)
        """The frozen layer plus its low-rank update; addmm is y + scale * (x A^T) B^T at once."""
        rows = x.flatten(0, -2)                                        # (N, in): a row per token
        y = torch.addmm(self.base(rows).float(), rows.float() @ self.lora_A.T, self.lora_B.T,
                        alpha=self.scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def add_lora(model, targets, r, alpha):
    """Freeze `model`, wrap its target linear layers in LoRALinear, return w = {name: parameter}.

    Args:
        targets: last parts of module names ("q_proj"), or ["all"] for every linear layer but the
            output head.
    Raises:
        UserError: a target matches no linear layer; the message lists those there are.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules()
              if isinstance(m, nn.Linear) and m is not head}
    last = {name.rpartition(".")[2] for name in linear}
    missing = set(targets) - last - {"all"}
    if missing:
        raise UserError(f"--targets {' '.join(sorted(missing))} match no linear layer; "
                        f"this model has: {' '.join(sorted(last))}")
    w = {}
    for name, module in linear.items():
        if "all" in targets or name.rpartition(".")[2] in targets:
            parent, _, child = name.rpartition(".")
            layer = LoRALinear(module, r, alpha)
            setattr(model.get_submodule(parent), child, layer)
            w[f"{name}.lora_A"], w[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
    return w


# ---------------------------------------------------------------------------------------------
# Training


def copy_of(w):
    """{name: tensor} on the CPU, float32, detached."""
    return {name: p.detach().cpu().clone() for name, p in w.items()}


def named(w, tensors):
    """{name of w: copy of the tensor on the CPU}."""
    return {name: x.detach().cpu().clone() for name, x in zip(w, tensors)}


def layer_norms(w, eps):
    """||eps|| within each decoder layer, a list by layer number; stage 6 draws it."""
    squares = {}
    for name, e in zip(w, eps):
        layer = int(re.search(r"\.(\d+)\.", name)[1])
        squares[layer] = squares.get(layer, 0.0) + e.pow(2).sum().item()
    return [math.sqrt(squares[layer]) for layer in sorted(squares)]


def train(loss, w, batches, harmful, steps, c):
    """Algorithm 1: AdamW on panacea_rule, in place on w = {name: parameter}.

    Returns:
        (eps, log): the last perturbation, and a dict of the paper's quantities per step.
    """
    params, log, eps = list(w.values()), [], None
    optimizer = torch.optim.AdamW(params, lr=c["lr"], weight_decay=c["weight_decay"],
                                  fused=True)
    bar = progress(batches, steps, "panacea")
    for step, batch in enumerate(bar, 1):
        optimizer.zero_grad()
        grads = eps = None  # the last step's, freed before this one's passes
        grads, eps, losses = panacea_rule(loss, params, batch, next(harmful), c["rho"], c["lam"])
        if not torch.isfinite(global_norm(grads)):
            raise UserError(f"the gradient of step {step} is not finite (h(w + eps) = "
                            f"{losses['h_eps']}); try a smaller --rho or --lam")
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
        log.append({"step": step, **losses, "eps_norm": global_norm(eps).item(),
                    "layers": layer_norms(w, eps)})
        bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
    return eps, log


def realign(loss, w, alignment, steps, c):
    """The sceptic's control: `steps` plain AdamW steps on the alignment set, in place."""
    params = list(w.values())
    optimizer = torch.optim.AdamW(params, lr=c["lr"], weight_decay=c["weight_decay"],
                                  fused=True)
    for _ in range(steps):
        for p, grad in zip(params, gradient(loss, params, next(alignment))[0]):
            p.grad = grad
        optimizer.step()


def put(w, weights):
    """Copy {name: tensor} into the parameters w."""
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(weights[name])


def controls(model, w, attacked, panacea_w, endless, batch_of, c):
    """The perturbations that Panacea is compared with; each starts from given weights.

    Args:
        attacked, panacea_w: weights after plain fine-tuning, and after Algorithm 1.
        endless: (set name, batch size, seed) -> endless iterator of lists of examples.
        batch_of: (examples[, rows per pass, weights of the rows]) -> batch.
    Returns:
        {"one_shot", "anchored", "anchored_from_panacea": eps, "realign": weights}.
    """
    params, size, seed = list(w.values()), c["batch_size"], c["seed"] + 1
    loss, half = partial(answer_loss, model), max(1, size // 2)
    rows = c["micro_batch_size"] or max(size, c["harmful_batch_size"])  # as Algorithm 1 had

    def anchored(start):
        put(w, start)
        draws = zip(endless("harmful", half, seed), endless("alignment", size, seed),
                    endless("finetune", half, seed))  # a leads, h pushes, g guards
        mixed = (three_sets(*sets, c["anchor"]) for sets in draws)
        eps = anchored_perturbation(partial(weighted_loss, model), params,
                                    (batch_of(x, rows, weights) for x, weights in mixed),
                                    c["rho"], c["anchor_steps"])
        return named(w, eps)
    result = {}
    if c["anchor"]:
        result["anchored_from_panacea"] = anchored(panacea_w)
        result["anchored"] = anchored(attacked)
    put(w, attacked)
    harmful = batch_of(next(endless("harmful", c["harmful_batch_size"], c["seed"])))
    result["one_shot"] = named(w, perturbation(gradient(loss, params, harmful)[0], c["rho"]))
    realign(loss, w, map(batch_of, endless("alignment", size, seed)), c["anchor_steps"], c)
    result["realign"] = copy_of(w)
    return result


def algorithm(run, data, stage2, c, device):
    """Algorithm 1 and its controls; returns what 04_panacea.pt holds."""
    model, tokenizer = load_model(run, data, device)
    w = add_lora(model, c["targets"], c["r"], c["alpha"])
    if c["gradient_checkpointing"]:
        checkpoint_layers(model)
    steps = c["epochs"] * math.ceil(len(data["finetune"]) / c["batch_size"])
    describe(model, f"; Panacea for {steps} steps, rho {c['rho']}, lam {c['lam']}")
    examples = {name: encode(tokenizer, data[name], c["max_length"])
                for name in ("alignment", "harmful", "finetune")}

    def endless(name, size, seed):
        return endless_batches(examples[name], size, seed)

    def batch_of(rows, size=c["micro_batch_size"], weights=None):
        return cut(rows, tokenizer.pad_token_id, model.device, size, weights)

    seed_everything(c["seed"])
    put(w, stage2["aligned"]["sft"])
    user = epoch_batches(examples["finetune"], c["batch_size"], c["epochs"], c["seed"])
    harmful = endless("harmful", c["harmful_batch_size"], c["seed"])
    eps, log = train(partial(answer_loss, model), w, map(batch_of, user), map(batch_of, harmful),
                     steps, c)
    result = {"weights": copy_of(w), "epsilon": named(w, eps), "log": log}
    return {**result, **controls(model, w, stage2["finetuned"]["sft"], result["weights"], endless,
                                 batch_of, c)}


def plus(w, eps):
    """w + eps, for dicts of tensors."""
    return {name: w[name] + eps[name] for name in w}


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser = stage_parser(__doc__)
    group = parser.add_argument_group("method")
    size, positive = number(int, 1), number(float, 0)
    add_flags(group, DEFAULTS, {
        "rho": (positive, "rho, L2 norm of eps over the whole adapter"),
        "lam": (positive, "lam, weight of h(w + eps) - h(w) in Eq. 1"),
        "harmful_batch_size": (size, "samples in the batch of h"),
        "anchor": (positive, "weight of refusals against harm and task in the anchored eps; "
                             "0 leaves the paper's eps alone"),
        "anchor_steps": (size, "projected steps of the anchored eps, and steps of realign"),
    })
    group = parser.add_argument_group("as in stage 2 unless given")
    for name, kind, text in (("--epochs", size, "epochs over the user's data"),
                             ("--micro-batch-size", number(int, 0), "rows per pass; 0: all")):
        group.add_argument(name, type=kind, default=None, metavar="X", help=text)
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       default=None, help="keep no activations inside layers")
    parser.add_argument("--export", type=Path, metavar="FOLDER",
                        help="write w + eps there as a PEFT adapter; in subfolders w alone, the "
                             "anchored model and merged weights. Nothing is trained again if "
                             "04_panacea.pt fits the flags given")
    return parser.parse_args(argv)


def main(argv=None):
    """Run Algorithm 1 and its controls; writes RUN/04_panacea.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    data, stage2 = run.load("01_data.pt"), run.load("02_finetune.pt")
    if "sft" not in stage2["aligned"]:
        raise UserError("02_finetune.pt has no model aligned with sft; run: python 02_finetune.py "
                        f"--run {args.run} --defense sft")
    c = {**stage2["config"], **resolve(args, DEFAULTS, stage2["config"]["preset"])}
    for name in ("epochs", "micro_batch_size", "gradient_checkpointing"):
        c[name] = c[name] if getattr(args, name) is None else getattr(args, name)
    artifact = None
    if args.export:
        if args.export.exists():
            raise UserError(f"--export {args.export} is there already; name a folder that is not")
        given = {k: v for k, v in vars(args).items() if k in c and v is not None}
        artifact = run.made("04_panacea.pt", given)
    if artifact is None:
        artifact = run.save("04_panacea.pt", c,
                            **algorithm(run, data, stage2, c, pick_device(args.device)))
        print(f"{args.run / '04_panacea.pt'} written; next: python 05_evaluate.py --run "
              f"{args.run}")
    if args.export:
        w, attacked = artifact["weights"], stage2["finetuned"]["sft"]
        adapters = {"panacea": plus(w, artifact["epsilon"]), "without_eps": w}
        if "anchored" in artifact:
            adapters["anchored"] = plus(attacked, artifact["anchored"])
        export(args.export, run, data, adapters, artifact["config"])
        print(f"{args.export} written: w + eps as a PEFT adapter; in it "
              f"{', '.join(list(adapters)[1:])} and merged")
    return artifact


if __name__ == "__main__":
    run_stage(main)
