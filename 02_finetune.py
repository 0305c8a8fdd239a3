"""Stage 2 - align a model, then let a user's data break it.

The provider teaches the model to refuse harmful prompts. Then a user fine-tunes it on an ordinary
task with a few harmful samples among the rest, and the refusals are gone. "Vaccines" change the
first step so that the second does less harm; the model breaks all the same within a few hundred
steps (Fig. 3). Snapshots let stage 5 show that.

The model is frozen; what is trained is a LoRA adapter w = {A, B} on its linear layers,
    y = W x + (alpha / r) B A x,
and ONE adapter is carried from alignment into fine-tuning, for every defence alike. Every method
is a rule from batches to a gradient on w; the loop that applies it is the same. With f the loss
on refusals (alignment set) and h the loss on harmful answers (harmful set):

    sft       grad f(w)
    vaccine   grad of f with every layer's output e_l moved by rho * grad_e_l f / ||grad_e f||
    repnoise  grad [ f + beta * MMD(hidden states on harm, noise) - alpha * log(1 + h_depths) ]
    booster   grad f(w) + lam * ( grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||) )

The toy has no pre-trained model: this stage makes one first (RUN/02_base, a checkpoint folder).

Deviations from the released code: it fine-tunes a NEW adapter after Vaccine and RepNoise and
clips gradients at norm 1 (transformers' default). The README lists the rest.

Reads:  RUN/01_data.pt        Writes: RUN/02_finetune.pt (toy: RUN/02_base as well)
Run:    python 02_finetune.py                 under two minutes for the toy
"""

import hashlib
import itertools
import math
from contextlib import contextmanager, suppress
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from common import (COUNT, POSITIVE, SIZE, TOY_MODELS, TOY_TOKEN, Run, UserError,
                    checkpoint_layers, collate, cut, describe, draw_batches, encode,
                    load_model, number, over_parts, pick_device, progress, resolve, run_stage,
                    stage_parser, write_whole)

DEFENSES = ["sft", "vaccine", "repnoise", "booster"]
DEFAULTS = {  # flag: toy, laptop, paper, type, meaning
    "defense": (DEFENSES, ["sft"], ["sft"], tuple(DEFENSES),
                f"how to align, one or several: {', '.join(DEFENSES)}"),
    "align_epochs": (4, 3, 20, COUNT, "epochs over the alignment set; 0 for a chat model"),
    "align_lr": (2e-3, 1e-3, 5e-4, POSITIVE, "learning rate of alignment"),
    "align_batch_size": (16, 10, 10, SIZE, "batch of alignment"),
    "epochs": (6, 1, 20, SIZE, "epochs over the user's data"),
    "lr": (6e-4, 7e-4, 2e-5, POSITIVE, "learning rate of fine-tuning"),
    "batch_size": (16, 10, 10, SIZE, "batch of fine-tuning"),
    "weight_decay": (0.1, 0.1, 0.1, POSITIVE, "AdamW's weight decay"),
    "r": (16, 16, 32, SIZE, "LoRA rank"),
    "alpha": (16, 16, 4, POSITIVE, "LoRA alpha; the update is alpha/r * B A"),
    "targets": (["all"], ["all"], ["q_proj", "k_proj", "v_proj"], str,
                "linear layers that get an adapter, or all"),
    "snapshots": (3, 0, 0, COUNT, "points of Fig. 3 after step 0, each four times the one before"),
    "vaccine_rho": (1.0, 1.0, 20.0, POSITIVE, "Vaccine: norm of the embedding drift"),
    "repnoise_alpha": (0.3, 0.02, 0.02, POSITIVE, "RepNoise: weight of -log of the harmful loss"),
    "repnoise_beta": (0.1, 0.1, 0.1, POSITIVE, "RepNoise: weight of the MMD"),
    "booster_lam": (0.3, 0.3, 100.0, POSITIVE, "Booster: weight lam of its regulariser"),
    "booster_alpha": (0.1, 0.1, 0.01, POSITIVE, "Booster: length of its harmful step"),
    "align_harmful_batch_size": (32, 10, 10, SIZE, "batch of h in alignment (RepNoise, Booster)"),
    "pretrain_steps": (430, 0, 0, number(int, 20), "steps of pre-training the toy"),
    "pretrain_lr": (2e-3, 0.0, 0.0, POSITIVE, "highest learning rate of pre-training"),
    "micro_batch_size": (0, 0, 0, COUNT, "rows per pass, to save memory; 0: the whole batch. The "
                         "gradient is the same (sft and booster only)"),
    "gradient_checkpointing": (False, False, False, bool, "keep no activations inside layers: two "
                               "thirds of the speed, a fraction of the memory, the same gradient"),
}

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
# Loss and gradient


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
# The rules: (model, w, alignment batch, harmful batch, numbers) -> gradient on w, {name: loss}


def sft_rule(model, w, batch, harmful=None, c=None):
    """Plain supervised fine-tuning: grad f(w)."""
    grads, loss = gradient(partial(answer_loss, model), w, batch)
    return grads, {"loss": loss}


@contextmanager
def shifted(layers, shifts):
    """Add shifts[l] (B, T, d) to the output of decoder layer l."""
    handles = [layer.register_forward_hook(lambda _, inputs, out, s=s: out + s)
               for layer, s in zip(layers, shifts)]
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
    like = model.get_input_embeddings().weight  # the base's dtype: an adapter's is float32
    shape = (*batch["input_ids"].shape, model.config.hidden_size)
    e = [like.new_zeros(shape).requires_grad_() for _ in layers]
    with shifted(layers, e):
        drift = torch.autograd.grad(answer_loss(model, batch), e)
    norm = global_norm([d.float() for d in drift]).item()
    with shifted(layers, [c["vaccine_rho"] * d / norm for d in drift]):
        return sft_rule(model, w, batch)


def mmd(x, y):
    """Squared maximum mean discrepancy of two samples (N, d), Gaussian kernels of five widths."""
    z = torch.cat([x, y])
    distance = torch.cdist(z, z).pow(2)                                # (2N, 2N)
    width = distance.detach().mean()
    kernel = sum(torch.exp(-distance / (width * 2.0 ** k)) for k in range(-2, 3))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def repnoise_rule(model, w, batch, harmful, c):
    """grad [f + beta * MMD - alpha * log(1 + mean harmful loss)]; RepNoise (2405.14577).

    Hidden states at harmful answer tokens, flattened by sample, are pushed towards Gaussian
    noise; the harmful loss is read at every depth through the model's own final norm and head.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    out = decoder(input_ids=harmful["input_ids"], output_hidden_states=True, use_cache=False)
    at = harmful["labels"][:, 1:] != -100                              # (B, T-1)
    target = harmful["labels"][:, 1:][at]                              # (N,)
    depths = [h[:, :-1] for h in out.hidden_states]                    # layers + 1 x (B, T-1, d)
    mask = at.unsqueeze(-1).float()
    noise = sum(mmd((h.float() * mask).flatten(1), (torch.randn_like(h.float()) * mask).flatten(1))
                for h in depths[1:]) / (len(depths) - 1)
    normed = [decoder.norm(h[at]) for h in depths[:-1]] + [depths[-1][at]]  # the last has been
    h_depths = sum(F.cross_entropy(head(h).float(), target) for h in normed) / len(normed)
    f = answer_loss(model, batch)
    total = f + c["repnoise_beta"] * noise - c["repnoise_alpha"] * torch.log(1 + h_depths)
    return torch.autograd.grad(total, w), {"loss": f.item()}


def booster_rule(model, w, batch, harmful, c):
    """grad f + lam (grad h(w) - grad h(w - alpha grad h / ||grad h||)); Booster (2409.01586)."""
    loss = partial(answer_loss, model)
    grad_f, f = gradient(loss, w, batch)
    grad_h, _ = gradient(loss, w, harmful)
    norm = global_norm(grad_h).item()
    with perturbed(w, [-c["booster_alpha"] * x / norm for x in grad_h]):
        grad_h_step, _ = gradient(loss, w, harmful)
    return [f_ + c["booster_lam"] * (h - h_step)
            for f_, h, h_step in zip(grad_f, grad_h, grad_h_step)], {"loss": f}


RULES = {"sft": sft_rule, "vaccine": vaccine_rule, "repnoise": repnoise_rule,
         "booster": booster_rule}

# ---------------------------------------------------------------------------------------------
# Training


def train(model, w, rule, batches, steps, lr, c, label, at_step=None):
    """Apply `rule` for `steps` AdamW steps, in place. Constant learning rate, no dropout.

    Args:
        w: {name: parameter}. rule: one of RULES. batches: pairs of batches, user's or provider's
            alignment and provider's harmful (None where the rule reads none).
        at_step: called with (step, losses) after each step, for logs and snapshots.
    Raises:
        UserError: the gradient is not finite.
    """
    params = list(w.values())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=c["weight_decay"], fused=True)
    bar = progress(batches, steps, label)
    for step, (batch, harmful) in enumerate(bar, 1):
        grads, losses = rule(model, params, batch, harmful, c)
        if not torch.isfinite(global_norm(grads)):
            raise UserError(f"{label}: the gradient of step {step} is not finite ({losses}); "
                            f"try a smaller learning rate than {lr}")
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
        bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
        if at_step:
            at_step(step, losses)


@torch.no_grad()
def mean_loss(model, examples, pad_id, device, size):
    """Mean answer loss over examples, in batches of `size`."""
    parts = [examples[i:i + size] for i in range(0, len(examples), size)]
    return sum(answer_loss(model, collate(part, pad_id, device)).item() * len(part)
               for part in parts) / len(examples)


def copy_of(w):
    """{name: tensor} on the CPU, float32, detached."""
    return {name: p.detach().cpu().clone() for name, p in w.items()}


def put(w, weights):
    """Copy {name: tensor} into the parameters w."""
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(weights[name])


def align_and_attack(model, w, initial, defense, examples, c, pad_id):
    """Align with `defense`, then fine-tune on the user's data.

    Returns:
        (aligned w, {step: w during fine-tuning}, log of {"stage", "step", "loss", "h"}, where h,
        the held-out harmful loss, stands at snapshots and at both ends only).
    """
    def batches(name, size, epochs=None):
        return (cut(rows, pad_id, model.device, c["micro_batch_size"])
                for rows in draw_batches(examples[name], size, c["seed"], epochs))
    log, snapshots = [], {}
    put(w, initial)
    torch.manual_seed(c["seed"])
    size, epochs = c["align_batch_size"], c["align_epochs"]
    steps = epochs * math.ceil(len(examples["alignment"]) / size)
    harmful = (batches("harmful", c["align_harmful_batch_size"])
               if defense in ("repnoise", "booster") else itertools.repeat(None))
    train(model, w, RULES[defense], zip(batches("alignment", size, epochs), harmful), steps,
          c["align_lr"], c, f"align {defense}",
          lambda step, losses: log.append({"stage": "align", "step": step, **losses}))
    aligned = copy_of(w)
    size, epochs = c["batch_size"], c["epochs"]
    steps = epochs * math.ceil(len(examples["finetune"]) / size)
    keep = {max(1, round(steps / 4 ** k)) for k in range(c["snapshots"])}  # 3: 1/16, 1/4 and all

    def record(step, losses):
        entry = {"stage": "finetune", "step": step, **losses}
        if step in (0, steps) or step in keep:
            entry["h"] = mean_loss(model, examples["test_harmful"], pad_id, model.device,
                                   c["micro_batch_size"] or size)
        if step in keep and step != steps:
            snapshots[str(step)] = copy_of(w)
        log.append(entry)
    record(0, {})
    train(model, w, sft_rule, zip(batches("finetune", size, epochs), itertools.repeat(None)),
          steps, c["lr"], c, f"attack {defense}", record)
    return aligned, snapshots, log


# ---------------------------------------------------------------------------------------------
# The toy's base model: a checkpoint folder made on the spot


def toy_tokenizer(vocab):
    """Word-level tokenizer over the list `vocab`, as a transformers fast tokenizer.

    Decoding puts one space between words and none before a mark, as the toy's sentences have it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(TOY_TOKEN), "removed", invert=True)
    words.decoder = decoders.WordPiece(cleanup=True)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab.index("<s>"))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>")


def toy_model(name, vocab_size):
    """A randomly initialised 4-layer model of width 128, from transformers' own configs.

    Weights start at std 0.08 (about 1/sqrt(width)), the embedding untied: with the usual 0.02 and
    a tied one, so small a model learns its world several times slower. The embedding starts
    sqrt(width) larger, as Gemma 2 scales its own: else the first layer decides everything.
    """
    arch = {"toy-llama": "Llama", "toy-gemma2": "Gemma2", "toy-qwen2": "Qwen2"}[name]
    config = getattr(transformers, arch + "Config")(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        initializer_range=0.08)
    model = getattr(transformers, arch + "ForCausalLM")(config)
    if arch != "Gemma2":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(config.hidden_size ** 0.5)
    return model


def pretrain(run, data, config, device):
    """Pre-train all weights of the toy's base model on its world's text, on all tokens, with a
    one-cycle learning rate, unless RUN/02_base is that model."""
    made_from = {k: config[k] for k in ("model", "seed", "pretrain_steps", "pretrain_lr")}
    text = repr((data["vocab"], data["pretrain"]))
    made_from["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    folder = run.folder / "02_base"
    with suppress(Exception):  # a damaged one raises a dozen kinds
        if (folder / "model.safetensors").is_file() and (
                transformers.AutoModelForCausalLM.from_pretrained(folder).config.made_from
                == made_from):
            return print(f"{folder} fits this data and these settings: not pre-training again")
    torch.manual_seed(config["seed"])
    tokenizer = toy_tokenizer(data["vocab"])
    model = toy_model(config["model"], len(data["vocab"])).to(device).train()
    describe(model, f"; pre-training it from scratch on {len(data['pretrain']):,} texts")
    ids = [tokenizer(p + t)["input_ids"] + [tokenizer.eos_token_id] for p, t in data["pretrain"]]
    batches = draw_batches([(x, x) for x in ids], 32, config["seed"])
    steps, lr = config["pretrain_steps"], config["pretrain_lr"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    bar = progress(range(steps), steps, "pre-train")
    for _ in bar:
        loss = answer_loss(model, collate(next(batches), tokenizer.pad_token_id, device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.config.made_from = made_from
    write_whole(folder, lambda new: (model.save_pretrained(new), tokenizer.save_pretrained(new)))


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    return stage_parser(__doc__, DEFAULTS)[0].parse_args(argv)


def check(config):
    """Refuse what cannot work, before anything is made."""
    whole = {"vaccine", "repnoise"} & set(config["defense"])
    if whole and config["micro_batch_size"]:
        raise UserError(f"the whole batch in one pass is what {' and '.join(sorted(whole))} must "
                        "have; leave out --micro-batch-size, or use --defense sft booster")
    if config["model"] in TOY_MODELS:
        add_lora(toy_model(config["model"], 8), config["targets"], 1, 1)


def main(argv=None):
    """Align and attack with each defence; writes RUN/02_finetune.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    data = run.load("01_data.pt")
    config = {**data["config"], **resolve(args, DEFAULTS, data["config"]["preset"])}
    check(config)
    device = pick_device(args.device)
    if config["model"] in TOY_MODELS:
        pretrain(run, data, config, device)
    model, tokenizer = load_model(run, data, device)
    torch.manual_seed(config["seed"])
    w = add_lora(model, config["targets"], config["r"], config["alpha"])
    if config["gradient_checkpointing"]:
        checkpoint_layers(model)
    describe(model, f"; {sum(p.numel() for p in w.values()):,} of them trained (LoRA)")
    initial = copy_of(w)
    examples = {name: encode(tokenizer, data[name], config["max_length"])
                for name in ("alignment", "harmful", "finetune", "test_harmful")}
    result = {"aligned": {}, "finetuned": {}, "snapshots": {}, "log": {}}
    for defense in config["defense"]:
        aligned, kept, log = align_and_attack(model, w, initial, defense, examples, config,
                                              tokenizer.pad_token_id)
        for name, value in zip(result, (aligned, copy_of(w), kept, log)):
            result[name][defense] = value
    artifact = run.save("02_finetune.pt", config, **result)
    print(f"{args.run / '02_finetune.pt'} written; next: python 03_random_perturb.py "
          f"--run {args.run}")
    return artifact


if __name__ == "__main__":
    run_stage(main)
