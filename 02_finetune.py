"""Stage 2 - align a model, then let a user's data break it.

The provider teaches the model to refuse harmful prompts. Then a user fine-tunes it on an ordinary
task with a few harmful samples among the rest, and the refusals are gone. "Vaccines" change the
first step so that the second does less harm (RepNoise's harmful loss starts far higher, say); the
model breaks all the same within a few hundred steps (Fig. 3). Snapshots let stage 5 draw that.

The model is frozen; what is trained is a LoRA adapter w = {A, B} on its linear layers,
    y = W x + (alpha / r) B A x,
and ONE adapter is carried from alignment into fine-tuning, for every defence alike. Every method
is a rule from batches to a gradient on w; the loop that applies it is the same. With f the loss
on refusals (alignment set) and h the loss on harmful answers (harmful set):

    sft       grad f(w)
    vaccine   grad of f with every layer's output e_l moved by rho * grad_e f / ||grad_e f||
    repnoise  grad [ f + beta * MMD(hidden states on harmful text, noise) - alpha * log h_layers ]
    booster   grad f(w) + lam * ( grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||) )

The toy has no pre-trained model to start from, so this stage first pre-trains one (02_base.pt).

Deviation from the released code: it fine-tunes a NEW adapter after Vaccine and RepNoise but
continues the old one after SFT and Panacea; here all continue the same one.

Reads:  RUN/01_data.pt        Writes: RUN/02_finetune.pt (toy: RUN/02_base.pt as well)
Run:    python 02_finetune.py                 under two minutes for the toy
"""

import argparse
import hashlib
import math
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import (TOY_MODELS, Run, UserError, add_flags, checkpoint_layers, collate, cut,
                    describe, encode, endless_batches, epoch_batches, load_model, load_tokenizer,
                    number, over_parts, pick_device, processes, progress, resolve,
                    run_stage, seed_everything, stage_parser, toy_model)

DEFAULTS = {
    "toy": dict(align_epochs=4, align_lr=2e-3, align_batch_size=16, epochs=6, lr=6e-4,
                batch_size=16, weight_decay=0.1, r=16, alpha=16, targets=["all"], snapshots=3,
                vaccine_rho=5.0, repnoise_alpha=1.0, repnoise_beta=0.1, booster_lam=1.0,
                booster_alpha=0.1, vaccine_batch_size=8, pretrain_steps=430, pretrain_lr=2e-3,
                micro_batch_size=0),
    "paper": dict(align_epochs=20, align_lr=5e-4, align_batch_size=10, epochs=20, lr=2e-5,
                  batch_size=10, weight_decay=0.1, r=32, alpha=4,
                  targets=["q_proj", "k_proj", "v_proj"], snapshots=0,
                  vaccine_rho=20.0, repnoise_alpha=0.02, repnoise_beta=0.1, booster_lam=100.0,
                  booster_alpha=0.01, vaccine_batch_size=10, pretrain_steps=0, pretrain_lr=0.0,
                  micro_batch_size=0),
}
DEFENSES = ("sft", "vaccine", "repnoise", "booster")

# ---------------------------------------------------------------------------------------------
# LoRA by hand


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
# Loss and gradient


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


# ---------------------------------------------------------------------------------------------
# The rules of alignment: (model, w, alignment batch, harmful batch, numbers) -> gradient, loss


def sft_rule(model, w, batch, harmful=None, c=None):
    """Plain supervised fine-tuning: grad f(w)."""
    return gradient(partial(answer_loss, model), w, batch)


@contextmanager
def shifted(layers, shifts):
    """Add shifts[l] (B, T, d) to the output of decoder layer l."""
    def hook(shift):
        return lambda _, inputs, out: (
            (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift)
    handles = [layer.register_forward_hook(hook(s)) for layer, s in zip(layers, shifts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vaccine_rule(model, w, batch, harmful, c):
    """Gradient of f under the embedding drift that raises f most; Vaccine, Eq. 4-5 (2402.01109).

    e_l = rho * grad_{e_l} f / ||grad_e f||, one norm over the outputs of all layers. Two passes.
    """
    layers = model.get_decoder().layers
    like = next(layers.parameters())
    zero = torch.zeros(*batch["input_ids"].shape, model.config.hidden_size, dtype=like.dtype,
                       device=like.device)
    e = [zero.clone().requires_grad_() for _ in layers]
    with shifted(layers, e):
        drift = torch.autograd.grad(answer_loss(model, batch), e)
    norm = global_norm([d.float() for d in drift]).item()
    with shifted(layers, [c["vaccine_rho"] * d / norm for d in drift]):
        return gradient(partial(answer_loss, model), w, batch)


def mmd(x, y):
    """Squared maximum mean discrepancy of two samples (N, d), Gaussian kernels of five widths."""
    z = torch.cat([x, y])
    distance = torch.cdist(z, z).pow(2)                                # (2N, 2N)
    width = distance.detach().mean()
    kernel = sum(torch.exp(-distance / (width * 2.0 ** k)) for k in range(-2, 3))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def repnoise_rule(model, w, batch, harmful, c):
    """grad [f + beta * MMD - alpha * log(harmful loss, mean over layers)]; RepNoise (2405.14577).

    Hidden states at harmful answer tokens are pushed towards Gaussian noise; each layer's harmful
    loss is read through the model's own final norm and output head.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    out = decoder(input_ids=harmful["input_ids"], output_hidden_states=True, use_cache=False)
    at = harmful["labels"][:, 1:] != -100
    target = harmful["labels"][:, 1:][at]                              # (N,)
    states = [h[:, :-1][at] for h in out.hidden_states[1:]]            # layers x (N, d)
    noise = sum(mmd(h.float(), torch.randn_like(h.float())) for h in states) / len(states)
    normed = [decoder.norm(h) for h in states[:-1]] + states[-1:]      # the last is normed already
    h_layers = sum(F.cross_entropy(head(h).float(), target) for h in normed) / len(normed)
    f = answer_loss(model, batch)
    total = f + c["repnoise_beta"] * noise - c["repnoise_alpha"] * torch.log(h_layers)
    return torch.autograd.grad(total, w), f.item()


def booster_rule(model, w, batch, harmful, c):
    """grad f + lam (grad h(w) - grad h(w - alpha grad h / ||grad h||)); Booster (2409.01586)."""
    loss = partial(answer_loss, model)
    grad_f, f = gradient(loss, w, batch)
    grad_h, _ = gradient(loss, w, harmful)
    norm = global_norm(grad_h).item()
    with perturbed(w, [-c["booster_alpha"] * x / norm for x in grad_h]):
        grad_h_step, _ = gradient(loss, w, harmful)
    return [f_ + c["booster_lam"] * (h - h_step)
            for f_, h, h_step in zip(grad_f, grad_h, grad_h_step)], f


RULES = {"sft": sft_rule, "vaccine": vaccine_rule, "repnoise": repnoise_rule,
         "booster": booster_rule}


# ---------------------------------------------------------------------------------------------
# Training


def train(model, w, rule, batches, steps, lr, c, label, pad_id, harmful=None, at_step=None):
    """Apply `rule` for `steps` AdamW steps, in place. Constant learning rate, no dropout.

    Args:
        w: {name: parameter}. rule: one of the rules above. batches: iterator of example lists.
        harmful: iterator of the provider's harmful example lists, if any (for repnoise, booster).
        at_step: called with (step, loss) after each step, for logs and snapshots.
    Raises:
        UserError: the gradient is not finite.
    """
    params = list(w.values())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=c["weight_decay"],
                                  fused=True)
    device = params[0].device
    bar = progress(batches, steps, label)
    for step, examples in enumerate(bar, 1):
        batch = cut(examples, pad_id, device, c["micro_batch_size"])
        other = cut(next(harmful), pad_id, device, c["micro_batch_size"]) if harmful else None
        grads, loss = rule(model, params, batch, other, c)
        if not torch.isfinite(global_norm(grads)):
            raise UserError(f"{label}: the gradient of step {step} is not finite (loss {loss}); "
                            f"try a smaller learning rate than {lr}")
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if at_step:
            at_step(step, loss)


@torch.no_grad()
def mean_loss(model, examples, pad_id, device, size=50):
    """Mean answer loss over examples, in batches."""
    parts = [examples[i:i + size] for i in range(0, len(examples), size)]
    return sum(answer_loss(model, collate(part, pad_id, device)).item() * len(part)
               for part in parts) / len(examples)


def copy_of(w):
    """{name: tensor} on the CPU, float32, detached."""
    return {name: p.detach().cpu().clone() for name, p in w.items()}


def snapshot_steps(steps, count):
    """`count` step numbers, each four times the one before; 3: 1/16, 1/4 and all of the way."""
    return sorted({max(1, round(steps / 4 ** k)) for k in range(count)})


def pretrain(run, data, config, device):
    """Pre-train the toy's base model on its world's text and write 02_base.pt, unless it is there.

    All weights are trained, on all tokens, with a one-cycle learning rate.
    """
    c = {k: config[k] for k in ("model", "seed", "pretrain_steps", "pretrain_lr")}
    c["text_sha256"] = hashlib.sha256(repr((data["vocab"], data["pretrain"])).encode()).hexdigest()
    if run.made("02_base.pt", c):
        print("02_base.pt fits this data and these settings: not pre-training again")
        return
    seed_everything(config["seed"])
    tokenizer = load_tokenizer(data)
    model = toy_model(config["model"], len(data["vocab"])).to(device).train()
    describe(model, f"; pre-training it from scratch on {len(data['pretrain']):,} texts")
    ids = [tokenizer(p + t)["input_ids"] + [tokenizer.eos_token_id] for p, t in data["pretrain"]]
    batches = epoch_batches([(x, x) for x in ids], 32, 1000, config["seed"])
    steps = c["pretrain_steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["pretrain_lr"], weight_decay=0.01,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, c["pretrain_lr"], steps,
                                                   pct_start=0.1)
    bar = progress(range(steps), steps, "pre-train")
    for _ in bar:
        loss = answer_loss(model, collate(next(batches), tokenizer.pad_token_id, device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    Run(run.folder).save("02_base.pt", c, weights={k: v.cpu() for k, v in
                                                   model.state_dict().items()})


def align_and_attack(model, w, initial, defense, examples, c, pad_id):
    """Align with `defense`, then fine-tune on the user's data.

    Returns:
        (aligned w, {step: w during fine-tuning}, log of {"stage", "step", "loss", "h"}, where h,
        the held-out harmful loss, stands at snapshots and at both ends only).
    """
    log = []
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(initial[name])
    seed_everything(c["seed"])
    batch, epochs = c["align_batch_size"], c["align_epochs"]
    steps = epochs * math.ceil(len(examples["alignment"]) / batch)
    if steps:
        train(model, w, RULES[defense], epoch_batches(examples["alignment"], batch, epochs,
                                                      c["seed"]),
              steps, c["align_lr"], c, f"align {defense}", pad_id,
              endless_batches(examples["harmful"], c["vaccine_batch_size"], c["seed"]),
              lambda step, loss: log.append({"stage": "align", "step": step, "loss": loss}))
    aligned, snapshots = copy_of(w), {}
    batch, epochs = c["batch_size"], c["epochs"]
    steps = epochs * math.ceil(len(examples["finetune"]) / batch)
    keep = snapshot_steps(steps, c["snapshots"])
    device = next(iter(w.values())).device

    def record(step, loss=None):
        entry = {"stage": "finetune", "step": step, **({} if loss is None else {"loss": loss})}
        if step in (0, steps) or step in keep:
            entry["h"] = mean_loss(model, examples["test_harmful"], pad_id, device)
        if step in keep and step != steps:
            snapshots[step] = copy_of(w)
        log.append(entry)
    record(0)
    train(model, w, sft_rule, epoch_batches(examples["finetune"], batch, epochs, c["seed"]),
          steps, c["lr"], c, f"attack {defense}", pad_id, at_step=record)
    return aligned, snapshots, log


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser = stage_parser(__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--defense", nargs="+", choices=DEFENSES, default=None, metavar="NAME",
                       help=f"how to align: {', '.join(DEFENSES)} (toy: all; paper: sft)")
    count, size, positive = number(int, 0), number(int, 1), number(float, 0)
    add_flags(group, DEFAULTS, {
        "align_epochs": (count, "epochs over the alignment set; 0 for a chat model"),
        "align_lr": (positive, "learning rate of alignment"),
        "align_batch_size": (size, "batch of alignment"),
        "epochs": (size, "epochs over the user's data"),
        "lr": (positive, "learning rate of fine-tuning"),
        "batch_size": (size, "batch of fine-tuning"),
        "weight_decay": (positive, "AdamW's weight decay"),
        "r": (size, "LoRA rank"), "alpha": (positive, "LoRA alpha; the update is alpha/r * B A"),
        "targets": (str, "linear layers that get an adapter, or all"),
        "snapshots": (count, "points of Fig. 3 after step 0, each four times the one before"),
        "vaccine_rho": (positive, "Vaccine: norm of the embedding drift"),
        "repnoise_alpha": (positive, "RepNoise: weight of -log of the harmful loss"),
        "repnoise_beta": (positive, "RepNoise: weight of the MMD"),
        "booster_lam": (positive, "Booster: weight lam of its regulariser"),
        "booster_alpha": (positive, "Booster: length of its harmful step"),
        "vaccine_batch_size": (size, "samples in alignment's batch of h (RepNoise, Booster)"),
        "pretrain_steps": (number(int, 20), "steps of pre-training the toy"),
        "pretrain_lr": (positive, "highest learning rate of pre-training"),
        "micro_batch_size": (count, "rows per pass, to save memory; 0: the whole batch. The "
                                    "gradient is the same (sft and booster only)"),
    })
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       default=False, help="keep no activations inside layers: two thirds of the "
                                           "speed, a fraction of the memory, the same gradient")
    return parser.parse_args(argv)


def main(argv=None):
    """Align and attack with each defence; writes RUN/02_finetune.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    data = run.load("01_data.pt")
    preset = data["config"]["preset"]
    config = {**data["config"], **resolve(args, DEFAULTS, preset)}
    config["defense"] = args.defense or (list(DEFENSES) if preset == "toy" else ["sft"])
    config["gradient_checkpointing"] = args.gradient_checkpointing
    whole = {"vaccine", "repnoise"} & set(config["defense"])
    if whole and (config["micro_batch_size"] or processes() > 1 or args.device == "spread"):
        raise UserError(f"the whole batch in one pass is what {' and '.join(sorted(whole))} must "
                        "have; leave out --micro-batch-size, torchrun and --device spread, or use "
                        "--defense sft booster")
    device = pick_device(args.device)
    if config["model"] in TOY_MODELS:
        if device == "spread":
            raise UserError(f"--device spread is for models that fit no GPU; {config['model']} "
                            "does: leave it out")
        add_lora(toy_model(config["model"], 8), config["targets"], 1, 1)  # fail before, not after
        pretrain(run, data, config, device)
    model, tokenizer = load_model(run, data, device)
    seed_everything(config["seed"])
    w = add_lora(model, config["targets"], config["r"], config["alpha"])
    if config["gradient_checkpointing"]:
        checkpoint_layers(model)
    describe(model, f"; {sum(p.numel() for p in w.values()):,} of them trained (LoRA)")
    initial = copy_of(w)
    examples = {name: encode(tokenizer, data[name], config["max_length"])
                for name in ("alignment", "harmful", "finetune", "test_harmful")}
    aligned, finetuned, snapshots, log = {}, {}, {}, {}
    for defense in config["defense"]:
        aligned[defense], kept, log[defense] = align_and_attack(
            model, w, initial, defense, examples, config, tokenizer.pad_token_id)
        finetuned[defense] = copy_of(w)
        snapshots[defense] = {str(step): kept[step] for step in kept}
    artifact = run.save("02_finetune.pt", config, aligned=aligned, finetuned=finetuned,
                        snapshots=snapshots, log=log)
    print(f"{args.run / '02_finetune.pt'} written; next: python 03_random_perturb.py "
          f"--run {args.run}")
    return artifact


if __name__ == "__main__":
    run_stage(main)
