"""Stage 4 - Panacea: optimise the perturbation instead of drawing it.

Random noise recovers safety because some of it points away from harm; most of it does not, and
costs accuracy. Panacea asks for the perturbation of a given size that raises the harmful loss
most, and while fine-tuning keeps w where such a perturbation works. At the end it is added.

With g the loss on the user's batch, h the loss on the provider's harmful batch, w the adapter:

    Eq. 1   max_w max_{||eps|| <= rho}  lam * (h(w + eps) - h(w)) - g(w)
    Eq. 2   eps_t = rho * grad h(w_t) / ||grad h(w_t)||                 one norm over all of w
    Eq. 3   w_{t+1} = w_t - lr * [ grad g(w_t) - lam * (grad h(w_t + eps_t) - grad h(w_t)) ]
    Output  w_T + eps, eps being the last one computed                  (Algorithm 1)

Eq. 2 solves the inner max to first order; Eq. 3 climbs the outer one through AdamW, eps held. With
lam = 0 this is plain fine-tuning, then one step up h: the control `one_shot`. Two more repairs
stand below, each from the attacked weights: `realign`, AdamW down the alignment loss a (and g),
and ours, the *anchored* eps, which may climb h while it descends a and g, inside a ball.

Deviations from the released code (trainer.py): w is restored by copy, since adding and
subtracting eps is not exact in bfloat16; h(w + eps) is not clamped at 5, above which that update
learns harm; gradients are not clipped; w and eps are saved apart.

Reads:  RUN/01_data.pt, RUN/02_finetune.pt    Writes: RUN/04_panacea.pt
Run:    python 04_panacea.py                  under a minute for the toy
"""

import argparse
import itertools
import json
import math
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import (COUNT, POSITIVE, SIZE, TOY_MODELS, Run, UserError, attach, checkpoint_layers,
                    cut, describe, draw_batches, encode, load_model, over_parts, pick_device,
                    progress, resolve, run_stage, stage_parser, write_whole)

DEFAULTS = {  # flag: toy, laptop, paper, type, meaning
    "rho": (1.0, 4.0, 1.0, POSITIVE, "rho, L2 norm of eps over the whole adapter"),
    "lam": (0.015, 0.001, 0.001, POSITIVE, "lam, weight of h(w + eps) - h(w) in Eq. 1"),
    "harmful_batch_size": (32, 10, 10, SIZE, "samples in the batch of h"),
    "anchor": (3.0, 3.0, 3.0, POSITIVE, "anchored eps: weight of a; 0 leaves the anchored eps out"),
    "anchored": (["a:.2:10", "hag:.2:5"], ["a:.2:10", "hag:.2:10"], ["hag:.2:10"], str,
                 "TERMS:RADIUS:STEPS (a, ha or hag of h - anchor a - g; unit ||w - w_aligned||)"),
    "realign": (["a:3e-4:20", "ag:6e-4:10"], ["a:1e-3:10", "ag:1e-3:10"], ["ag:5e-4:20"], str,
                "TERMS:LR:STEPS of AdamW (a, or ag for a + g); or none"),
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
        raise UserError(f"the harmful gradient has norm {norm}: no direction to perturb w in; the "
                        "harmful loss is saturated or overflowed (a smaller --lr in stage 2?)")
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


def answer_loss(model, batch):
    """Mean cross-entropy over the answer tokens of a batch; a scalar, float32.

    Logits (B, K, V) are made at K positions only: from the first to the last that predict an
    answer token of any row.
    """
    labels = batch["labels"][:, 1:]                                    # (B, T-1): the next token
    answer = (labels != -100).any(0).nonzero()
    keep = slice(int(answer.min()), int(answer.max()) + 1)
    logits = model(input_ids=batch["input_ids"], logits_to_keep=keep, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels[:, keep].flatten(),
                           ignore_index=-100)


def gradient(loss, w, batch):
    """(d loss(batch) / d w, loss(batch)): new tensors in the order of `w`, and a number."""
    def part(rows):
        value = loss(rows)
        return *torch.autograd.grad(value, w), value.detach()
    *grads, value = over_parts(part, batch)  # once, or over micro-batches
    return grads, value.item()


def global_norm(tensors):
    """One L2 norm over all tensors together; a scalar tensor."""
    return torch.sqrt(sum(x.pow(2).sum() for x in tensors))


# ---------------------------------------------------------------------------------------------
# Other repairs that optimise: each from the weights w (in place) to new ones or to an eps


def weighted_gradient(loss, w, batches, weights):
    """sum_i weights[i] * grad loss(batches[i]); new tensors shaped like w."""
    grads = [gradient(loss, w, batch)[0] for batch in batches]
    return [sum(c * x for c, x in zip(weights, parts)) for parts in zip(*grads)]


def realign(loss, w, draws, steps, lr, weight_decay):
    """The plain repair: `steps` AdamW steps down the sum of the losses on what `draws` yields."""
    optimizer = torch.optim.AdamW(w, lr=lr, weight_decay=weight_decay, fused=True)
    for batches in itertools.islice(draws, steps):
        for p, grad in zip(w, weighted_gradient(loss, w, batches, [1.0] * len(batches))):
            p.grad = grad
        optimizer.step()


def anchored_perturbation(loss, w, draws, weights, rho, steps):
    """An eps with ||eps|| <= rho that climbs a weighted sum of losses, by projected steps.

    Steps shrink linearly and add up to 2.5 radii: far enough to cross the ball, short enough at
    the end to settle.

    Args:
        draws: iterator of tuples of batches. weights: one for each, as in h - anchor * a - g.
    Returns:
        eps, a list of new tensors shaped like w.
    """
    eps = [torch.zeros_like(x) for x in w]
    for k, batches in enumerate(itertools.islice(draws, steps)):
        with perturbed(w, eps):
            climb = weighted_gradient(loss, w, batches, weights)
        length = 5 * rho * (steps - k) / (steps * (steps + 1))
        eps = [e + s for e, s in zip(eps, perturbation(climb, length))]
        shrink = min(1.0, rho / max(global_norm(eps).item(), 1e-12))  # back onto the ball
        eps = [shrink * e for e in eps]
    return eps


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
        """The frozen layer plus its low-rank update, added in float32."""
        update = self.scale * (x.float() @ self.lora_A.T) @ self.lora_B.T
        return (self.base(x).float() + update).to(x.dtype)


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


def layer_norms(w, eps):
    """||eps|| within each decoder layer, a list by layer number; stage 6 draws it."""
    squares = {}
    for name, e in zip(w, eps):
        layer = int(re.search(r"\.(\d+)\.", name)[1])
        squares[layer] = squares.get(layer, 0.0) + e.pow(2).sum().item()
    return [math.sqrt(squares[layer]) for layer in sorted(squares)]


def train(loss, w, batches, steps, c):
    """Algorithm 1: AdamW on panacea_rule, in place on w = {name: parameter}.

    Args:
        batches: pairs of batches, the user's and the provider's harmful.
    Returns:
        (eps, log): the last perturbation, and a dict of the paper's quantities per step.
    """
    params, log, eps = list(w.values()), [], None
    optimizer = torch.optim.AdamW(params, lr=c["lr"], weight_decay=c["weight_decay"], fused=True)
    bar = progress(batches, steps, "panacea")
    for step, (batch, harmful) in enumerate(bar, 1):
        optimizer.zero_grad()
        grads = eps = None  # the last step's, freed before this one's passes
        grads, eps, losses = panacea_rule(loss, params, batch, harmful, c["rho"], c["lam"])
        if not torch.isfinite(global_norm(grads)):
            raise UserError(f"panacea: the gradient of step {step} is not finite ({losses}); "
                            "try a smaller --rho or --lam")
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
        bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
        log.append({"step": step, **losses, "eps_norm": global_norm(eps).item(),
                    "layers": layer_norms(w, eps)})
    return eps, log


def copy_of(w):
    """{name: tensor} on the CPU, float32, detached."""
    return {name: p.detach().cpu().clone() for name, p in w.items()}


def put(w, weights):
    """Copy {name: tensor} into the parameters w."""
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(weights[name])


def plus(w, eps):
    """w + eps, for dicts of tensors."""
    return {name: w[name] + eps[name] for name in w}


def distance(w, other):
    """L2 norm of w - other over all tensors; dicts."""
    return global_norm([w[name] - other[name] for name in w]).item()


def settings(name, c):
    """[(terms, radius or learning rate, steps)] of --anchored or --realign.

    Raises:
        UserError: one of its texts cannot be read.
    """
    allowed, found = {"anchored": ("a", "ha", "hag"), "realign": ("a", "ag")}[name], []
    for text in (x for x in c[name] or [] if x != "none"):
        try:
            terms, value, steps = text.split(":")
            found.append((allowed[allowed.index(terms)], POSITIVE(value), SIZE(steps)))
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(f"--{name} {text}: give TERMS:NUMBER:STEPS, with TERMS one of "
                            f"{', '.join(allowed)}, or none") from None
    return found


def other_repairs(loss, w, aligned, attacked, batches, c):
    """one_shot's eps, and [{"model", "setting", "weights"}] of anchored eps and realign.

    Args:
        batches: (set name, batch size) -> endless iterator of batches, the same at every call.
    """
    params, size, repairs = list(w.values()), c["batch_size"], []
    put(w, attacked)
    harmful = next(batches("harmful", c["harmful_batch_size"]))
    one_shot = perturbation(gradient(loss, params, harmful)[0], c["rho"])
    one_shot = copy_of(dict(zip(w, one_shot)))

    def add(model, setting, weights):
        repairs.append({"model": model, "setting": setting, "weights": weights})
    sets = {"h": ("harmful", max(1, size // 2), 1.0), "a": ("alignment", size, -c["anchor"]),
            "g": ("finetune", max(1, size // 2), -1.0)}
    unit = max(distance(attacked, aligned), 1e-12)
    print(f"  ||w - w_aligned|| is {unit:.3g}: rho {c['rho']:g} is {c['rho'] / unit:.2f} of it")
    for terms, radius, steps in settings("anchored", c) if c["anchor"] else ():
        put(w, attacked)
        draws = zip(*(batches(*sets[letter][:2]) for letter in terms))
        eps = anchored_perturbation(loss, params, draws, [sets[letter][2] for letter in terms],
                                    radius * unit, steps)
        add("panacea_anchored", {"terms": terms, "radius": radius, "anchor": c["anchor"],
                                 "steps": steps}, plus(attacked, copy_of(dict(zip(w, eps)))))
    for terms, lr, steps in settings("realign", c):
        put(w, attacked)
        draws = zip(*(batches(sets[letter][0], size) for letter in terms))
        realign(loss, params, draws, steps, lr, c["weight_decay"])
        add("realign", {"terms": terms, "lr": lr, "steps": steps}, copy_of(w))
    return one_shot, repairs


def algorithm(run, data, stage2, c, device):
    """Algorithm 1 and the other repairs; returns what 04_panacea.pt holds."""
    model, tokenizer = load_model(run, data, device)
    w = add_lora(model, c["targets"], c["r"], c["alpha"])
    if c["gradient_checkpointing"]:
        checkpoint_layers(model)
    steps = c["epochs"] * math.ceil(len(data["finetune"]) / c["batch_size"])
    describe(model, f"; Panacea for {steps} steps, rho {c['rho']}, lam {c['lam']}")
    examples = {name: encode(tokenizer, data[name], c["max_length"])
                for name in ("alignment", "harmful", "finetune")}

    def batches(name, size, seed, epochs=None):
        return (cut(rows, tokenizer.pad_token_id, model.device, c["micro_batch_size"])
                for rows in draw_batches(examples[name], size, seed, epochs))

    torch.manual_seed(c["seed"])
    loss = partial(answer_loss, model)
    aligned, attacked = stage2["aligned"]["sft"], stage2["finetuned"]["sft"]
    put(w, aligned)
    eps, log = train(loss, w, zip(batches("finetune", c["batch_size"], c["seed"], c["epochs"]),
                                  batches("harmful", c["harmful_batch_size"], c["seed"])),
                     steps, c)
    result = {"weights": copy_of(w), "epsilon": copy_of(dict(zip(w, eps))), "log": log}
    one_shot, repairs = other_repairs(loss, w, aligned, attacked,
                                      partial(batches, seed=c["seed"] + 1), c)
    return {**result, "one_shot": one_shot, "repairs": repairs}


# ---------------------------------------------------------------------------------------------
# Export


def export_peft(folder, base, weights, c):
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained(base model, folder)` loads.

    Args:
        base: hub id or folder of the base model. weights: {"<module>.lora_A" | "...lora_B"}.
    """
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    modules = sorted({name.rpartition(".")[0] for name in weights})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": c["r"], "lora_alpha": c["alpha"], "lora_dropout": 0.0, "bias": "none",
              "target_modules": modules, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({f"base_model.model.{name}.weight": x.contiguous() for name, x in weights.items()},
              folder / "adapter_model.safetensors")


def export(folder, run, data, artifact, merge):
    """Write w + eps as a PEFT adapter in `folder`, and w alone in its subfolder without_eps.

    With `merge` also whole weights in its subfolder merged, w + eps added to the base in float32
    (bfloat16 would round most of eps away): 27 GB for a 7B model.
    """
    c, w = artifact["config"], artifact["weights"]
    base = run.folder / "02_base" if c["model"] in TOY_MODELS else Path(c["model"])
    base = str(base.resolve()) if base.is_dir() else c["model"]
    perturbed_w = plus(w, artifact["epsilon"])

    def write(new):
        export_peft(new, base, perturbed_w, c)
        export_peft(new / "without_eps", base, w, c)
        if merge:
            model, tokenizer = load_model(run, data, torch.device("cpu"))
            with attach(model.float(), perturbed_w, c["alpha"] / c["r"]):
                model.save_pretrained(new / "merged")
            tokenizer.save_pretrained(new / "merged")
    write_whole(folder, write)
    print(f"{folder} written: w + eps as a PEFT adapter; in it without_eps"
          + " and merged" * bool(merge))


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser, _ = stage_parser(__doc__, DEFAULTS)
    group = parser.add_argument_group("as in stage 2 unless given")
    group.add_argument("--epochs", type=SIZE, metavar="X", help="epochs over the user's data")
    group.add_argument("--micro-batch-size", type=COUNT, metavar="X", help="rows per pass; 0: all")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       default=None, help="keep no activations inside layers")
    group = parser.add_argument_group("export")
    group.add_argument("--export", type=Path, metavar="FOLDER",
                       help="write w + eps there as a PEFT adapter, and w alone in a subfolder. "
                            "Nothing is trained again if 04_panacea.pt fits the flags given")
    group.add_argument("--merge", action="store_true", help="export merged float32 weights as well")
    return parser.parse_args(argv)


def made_before(run, given):
    """The run's 04_panacea.pt if it is sound and made with the `given` flags, else None."""
    try:
        artifact = Run(run.folder).load("04_panacea.pt")
    except UserError:
        return None
    return artifact if artifact["config"].items() >= given.items() else None


def main(argv=None):
    """Run Algorithm 1 and the other repairs; writes RUN/04_panacea.pt and returns it."""
    args = get_args(argv)
    for name in ("anchored", "realign"):
        settings(name, vars(args))  # a mistake shows before the hours of training
    if args.merge and not args.export:
        raise UserError("--merge goes with an export; add --export FOLDER")
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
        artifact = made_before(run, {k: v for k, v in vars(args).items()
                                     if k in c and v is not None})
    if artifact is None:
        artifact = run.save("04_panacea.pt", c,
                            **algorithm(run, data, stage2, c, pick_device(args.device)))
        print(f"{args.run / '04_panacea.pt'} written; next: python 05_evaluate.py --run "
              f"{args.run}")
    if args.export:
        export(args.export, run, data, artifact, args.merge)
    return artifact


if __name__ == "__main__":
    run_stage(main)
