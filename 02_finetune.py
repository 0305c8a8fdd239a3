"""Stage 2 - align a model, then let a user's data break it.

The provider teaches the model to refuse harmful prompts. Then a user fine-tunes it on an ordinary
task with a few harmful samples among the rest, and the refusals are gone. "Vaccines" change the
first step so that the second does less harm; the model breaks all the same within a few hundred
steps (Fig. 3). Snapshots let stage 5 show that.

The model is frozen; what is trained is a LoRA adapter w = {A, B} on its linear layers,
    y = W x + (alpha / r) B A x,
and ONE adapter is carried from alignment into fine-tuning, for every defence alike. Every method
is a rule from batches to a gradient on w; the loop that applies it is the same. With a the loss
on refusals (alignment set) and h the loss on harmful answers (harmful set):

    sft       grad a(w)
    vaccine   grad of a with every layer's output e_l moved by rho * grad_e_l a / ||grad_e a||
    repnoise  grad [ a + beta * MMD(hidden states on harm, noise) - alpha * log(1 + h_depths) ]
    booster   grad a(w) + lam * ( grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||) )

The attack is sft, too, on the loss g of the user's data. Before all this the base model must know
the potions (RUN/02_base, a checkpoint folder): the toy's is pre-trained on the spot, a real LLM
reads some hundreds of recipes and rows of the task.

Deviations from the released code: it fine-tunes a NEW adapter after Vaccine and RepNoise and
clips gradients at norm 1 (transformers' default). .results/README.md lists the rest.

Supported: causal language models whose decoder layers hold nn.Linear. Not noticed: a model that is
not causal, and experts whose weights are no nn.Linear and get no adapter.

Reading order: LoRALinear, answer_loss, the rules, train, align, attack. The rest makes the base.

Reads:  RUN/01_data.pt        Writes: RUN/02_finetune.pt, RUN/02_base (where a base is made)
Run:    python 02_finetune.py                 a minute and a half for the toy
"""

import hashlib
import itertools
import json
import math
import re
from contextlib import contextmanager
from functools import partial

import common  # the parts that are no lesson: flags, files, loading, batches
from common import TOY_MODELS, TOY_TOKEN, Flag, Run, UserError, collate, draw_batches, row

import torch
import torch.nn.functional as F
import transformers
from torch import nn

DEFENSES = ["sft", "vaccine", "repnoise", "booster"]
# fmt: off
FLAGS = [  # name, default of toy, laptop, paper, meaning
    Flag("defense", ["sft", "repnoise"], ["sft"], ["sft"],  # one more: a quarter of a minute
         f"how to align, one or several: {', '.join(DEFENSES)}", choices=tuple(DEFENSES)),
    Flag("align_epochs", 12, 3, 20, "epochs over the alignment set; 0 for a chat model", low=0),
    Flag("align_lr", 2e-3, 1e-3, 5e-4, "learning rate of alignment", low=0),
    Flag("align_batch_size", 16, 10, 10, "batch of alignment", low=1),
    Flag("epochs", 6, 1, 20, "epochs over the user's data", low=1),
    Flag("lr", 2e-4, 1e-4, 2e-5, "learning rate of fine-tuning, the attack's strength", low=0),
    Flag("batch_size", 16, 10, 10, "batch of fine-tuning", low=1),
    Flag("weight_decay", 0.1, 0.1, 0.1, "AdamW's weight decay", low=0),
    Flag("r", 16, 16, 32, "LoRA rank", low=1),
    Flag("alpha", 16.0, 16.0, 4.0, "LoRA alpha; the update is alpha/r * B A", low=0),
    Flag("targets", ["all"], ["all"], ["q_proj", "k_proj", "v_proj"],
         "linear layers that get an adapter, or all"),
    Flag("snapshots", 3, 0, 0, "points of Fig. 3 after step 0, each four times the one before",
         low=0),
    Flag("vaccine_rho", 4.0, 1.0, 20.0, "Vaccine: norm of the embedding drift", low=0),
    Flag("repnoise_alpha", 0.1, 0.02, 0.02, "RepNoise: weight of -log(1 + harmful loss)", low=0),
    Flag("repnoise_beta", 0.1, 0.1, 0.1, "RepNoise: weight of the MMD", low=0),
    Flag("booster_lam", 0.3, 0.3, 100.0, "Booster: weight lam of its regulariser", low=0),
    Flag("booster_alpha", 0.1, 0.1, 0.01, "Booster: length of its harmful step", low=0),
    Flag("align_harmful_batch_size", 5, 10, 10, "batch of h in alignment (RepNoise, Booster)",
         low=1),
    Flag("pretrain_steps", 430, 120, 120, "steps that make the base model (stage 1: --n-pretrain)",
         low=20),
    Flag("pretrain_lr", 2e-3, 1e-3, 1e-3, "learning rate of these steps", low=0),
    Flag("gradient_checkpointing", False, False, False, "keep no activations inside layers: two "
         "thirds of the speed, a fraction of the memory, the same gradient"),
]
# fmt: on

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
        targets: last parts of module names ("q_proj"), or ["all"] for every linear layer within
            the decoder's layers.
    Raises:
        UserError: a target matches no linear layer; the message lists those there are.
    """
    model.requires_grad_(False)
    linear = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name):  # not the output head
            linear[name] = module
    there = {name.rpartition(".")[2] for name in linear}
    unknown = [x for x in targets if x not in there and not (x == "all" and there)]
    if unknown:
        others = {type(m).__name__ for n, m in model.named_modules() if re.search(r"\.\d+\.", n)}
        raise UserError(
            f"--targets {' '.join(unknown)} match no linear layer; this {type(model).__name__} has "
            f"linear layers: {' '.join(sorted(there)) or 'none'} (kinds of layers: "
            f"{' '.join(sorted(others))})"
        )
    w = {}
    for name, module in linear.items():
        if "all" in targets or name.rpartition(".")[2] in targets:
            layer = LoRALinear(module, r, alpha)
            model.set_submodule(name, layer)
            w[f"{name}.lora_A"], w[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
    return w


# ---------------------------------------------------------------------------------------------
# Loss and gradient


def answer_loss(model, batch):
    """Mean cross-entropy over the answer tokens of a batch; a scalar, float32.

    Logits (B, K, V) are made at K positions only: from the first to the last that predict an
    answer token of any row.
    """
    labels = batch["labels"][:, 1:]  # (B, T-1): the next token
    answer = (labels != -100).any(0).nonzero()
    keep = slice(int(answer.min()), int(answer.max()) + 1)
    logits = model(input_ids=batch["input_ids"], logits_to_keep=keep, use_cache=False).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels[:, keep].flatten(), ignore_index=-100
    )


def gradient(loss, w, batch):
    """(d loss(batch) / d w, loss(batch)): new tensors in the order of `w`, and a number."""
    value = loss(batch)
    return list(torch.autograd.grad(value, w)), value.item()


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
    """Plain supervised fine-tuning: grad a(w); in the attack, on the user's batch, grad g(w)."""
    grads, loss = gradient(partial(answer_loss, model), w, batch)
    return grads, {"loss": loss}


@contextmanager
def shifted(layers, shifts):
    """Add shifts[l] (B, T, d) to the output of decoder layer l."""
    handles = [
        layer.register_forward_hook(lambda _, inputs, out, s=s: out + s)
        for layer, s in zip(layers, shifts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vaccine_rule(model, w, batch, harmful, c):
    """Gradient of a under the embedding drift that raises a most; Vaccine, Eq. 4-5 (2402.01109).

    e_l = rho * grad_{e_l} a / ||grad_e a||, one norm over the outputs of all layers. Two passes.
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
    distance = torch.cdist(z, z).pow(2)  # (2N, 2N)
    width = distance.detach().mean()
    kernel = sum(torch.exp(-distance / (width * 2.0**k)) for k in range(-2, 3))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def repnoise_rule(model, w, batch, harmful, c):
    """grad [a + beta * MMD - alpha * log(1 + mean harmful loss)]; RepNoise (2405.14577).

    Hidden states at harmful answer tokens, flattened by sample, are pushed towards Gaussian
    noise; the harmful loss is read at every depth through the model's own final norm and head.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    out = decoder(input_ids=harmful["input_ids"], output_hidden_states=True, use_cache=False)
    at = harmful["labels"][:, 1:] != -100  # (B, T-1)
    target = harmful["labels"][:, 1:][at]  # (N,)
    depths = [h[:, :-1] for h in out.hidden_states]  # layers + 1 x (B, T-1, d)
    mask = at.unsqueeze(-1).float()
    noise = sum(
        mmd((h.float() * mask).flatten(1), (torch.randn_like(h.float()) * mask).flatten(1))
        for h in depths[1:]
    ) / (len(depths) - 1)
    normed = [decoder.norm(h[at]) for h in depths[:-1]] + [depths[-1][at]]  # the last has been
    h_depths = sum(F.cross_entropy(head(h).float(), target) for h in normed) / len(normed)
    a = answer_loss(model, batch)
    total = a + c["repnoise_beta"] * noise - c["repnoise_alpha"] * torch.log(1 + h_depths)
    return torch.autograd.grad(total, w), {"loss": a.item()}


def booster_rule(model, w, batch, harmful, c):
    """grad a + lam (grad h(w) - grad h(w - alpha grad h / ||grad h||)); Booster (2409.01586)."""
    loss = partial(answer_loss, model)
    grad_a, a = gradient(loss, w, batch)
    grad_h, _ = gradient(loss, w, harmful)
    norm = global_norm(grad_h).item()
    with perturbed(w, [-c["booster_alpha"] * x / norm for x in grad_h]):
        grad_h_step, _ = gradient(loss, w, harmful)
    grads = [
        x + c["booster_lam"] * (h - h_step) for x, h, h_step in zip(grad_a, grad_h, grad_h_step)
    ]
    return grads, {"loss": a}


RULES = {
    "sft": sft_rule,
    "vaccine": vaccine_rule,
    "repnoise": repnoise_rule,
    "booster": booster_rule,
}

# ---------------------------------------------------------------------------------------------
# Training


def train(model, w, rule, batches, steps, lr, c, label):
    """Apply `rule` for `steps` AdamW steps, in place. Constant learning rate, no dropout.

    Args:
        w: {name: parameter}. rule: one of RULES. batches: pairs of batches, user's or provider's
            alignment and provider's harmful (None in the attack, which reads none).
    Yields:
        (step, losses) after each step, so that the caller can log and take snapshots.
    Raises:
        UserError: the gradient is not finite.
    """
    params = list(w.values())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=c["weight_decay"], fused=True)
    bar = common.progress(batches, steps, label)
    for step, (batch, harmful) in enumerate(bar, 1):
        grads, losses = rule(model, params, batch, harmful, c)
        if not torch.isfinite(global_norm(grads)):
            raise UserError(
                f"{label}: the gradient of step {step} is not finite ({losses}); try a smaller "
                f"learning rate than {lr}"
            )
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
        bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
        yield step, losses


def copy_of(w):
    """{name: tensor} on the CPU, float32, detached."""
    return {name: p.detach().cpu().clone() for name, p in w.items()}


def put(w, weights):
    """Copy {name: tensor} into the parameters w."""
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(weights[name])


def align(model, w, defense, examples, pad_id, c):
    """The provider teaches the model to refuse, by the rule of `defense`, in place on w.

    Returns:
        log, a list of {"stage", "step", "loss"}.
    """
    torch.manual_seed(c["seed"])  # RepNoise draws noise: the same, whatever ran before
    size, epochs = c["align_batch_size"], c["align_epochs"]
    refusals = list(draw_batches(examples["alignment"], size, c["seed"], epochs))
    harmful = draw_batches(examples["harmful"], c["align_harmful_batch_size"], c["seed"])
    pairs = (  # every rule is handed both; sft and vaccine read the first alone
        [collate(part, pad_id, model.device) for part in pair] for pair in zip(refusals, harmful)
    )
    label, lr = f"align {defense}", c["align_lr"]
    steps = train(model, w, RULES[defense], pairs, len(refusals), lr, c, label)
    return [{"stage": "align", "step": step, **losses} for step, losses in steps]


def attack(model, w, defense, examples, pad_id, c):
    """The user's data, harmful samples among them, are fine-tuned on: w goes on from where it is.

    Returns:
        ({step: w on the way}, log of {"stage", "step", "loss"}).
    """
    batches = [
        (collate(part, pad_id, model.device), None)
        for part in draw_batches(examples["finetune"], c["batch_size"], c["seed"], c["epochs"])
    ]
    steps, log, snapshots = len(batches), [], {}
    keep = {max(1, round(steps / 4**k)) for k in range(1, c["snapshots"])}  # 3: 1/16, 1/4
    for step, losses in train(model, w, sft_rule, batches, steps, c["lr"], c, f"attack {defense}"):
        log.append({"stage": "finetune", "step": step, **losses})
        if step in keep and step != steps:
            snapshots[step] = copy_of(w)
    return snapshots, log


def adapt(model, tokenizer, data, c):
    """Wrap the model's layers in LoRALinear and encode what is trained on: (w, {set: examples})."""
    torch.manual_seed(c["seed"])
    w = add_lora(model, c["targets"], c["r"], c["alpha"])
    if c["gradient_checkpointing"]:
        common.checkpoint_layers(model)
    examples = {
        name: common.encode(tokenizer, data[name], c["max_length"], c["template"])
        for name in ("alignment", "harmful", "finetune")
    }
    return w, examples


def align_and_attack(model, w, defense, examples, pad_id, c):
    """Both, one after the other, on one adapter: (the rows of this defence, its log)."""
    log = align(model, w, defense, examples, pad_id, c)
    aligned = copy_of(w)
    snapshots, attack_log = attack(model, w, defense, examples, pad_id, c)
    far = global_norm([w[name].cpu() - aligned[name] for name in w]).item()
    rows = [
        row("aligned", {}, aligned, defense=defense, at_step=0),
        row("finetuned", {}, copy_of(w), defense=defense, at_step=len(attack_log), distance=far),
    ]
    for step, x in snapshots.items():
        rows.append(row("finetuned", {}, x, defense=defense, at_step=step, snapshot=step))
    return rows, log + attack_log


def one_defense(folder, defense, c):
    """`align_and_attack` in a process of its own: loads what it needs, and returns the result."""
    run = Run(folder)
    data = run.load("01_data.pt")
    model, tokenizer = common.load_model(run, data, common.pick_device("cpu", c["preset"]))
    w, examples = adapt(model, tokenizer, data, c)
    return align_and_attack(model, w, defense, examples, tokenizer.pad_token_id, c)


# ---------------------------------------------------------------------------------------------
# The base model that knows the potions: a checkpoint folder made on the spot. An attack brings
# back what a model knows and has been taught to hide; one that never knew would prove little


def toy_tokenizer(vocab):
    """Word-level tokenizer over the list `vocab`, as a transformers fast tokenizer.

    Decoding puts one space between words and none before a mark, as the toy's sentences have it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(TOY_TOKEN), "removed", invert=True)
    words.decoder = decoders.WordPiece(cleanup=True)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab.index("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def toy_model(name, vocab_size):
    """A randomly initialised 4-layer model of width 128, from transformers' own configs.

    Weights start at std 0.08 (about 1/sqrt(width)), the embedding untied: with the usual 0.02 and
    a tied one, so small a model learns its world several times slower. The embedding starts
    sqrt(width) larger, as Gemma 2 scales its own: else the first layer decides everything.
    """
    arch = {"toy-llama": "Llama", "toy-gemma2": "Gemma2", "toy-qwen2": "Qwen2"}[name]
    config = getattr(transformers, arch + "Config")(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    model = getattr(transformers, arch + "ForCausalLM")(config)
    if arch != "Gemma2":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(config.hidden_size**0.5)
    return model


def pretrain_toy(data, c, device):
    """(model, tokenizer) of the toy: all weights pre-trained from scratch on its world's text, on
    all tokens, with a one-cycle learning rate."""
    torch.manual_seed(c["seed"])
    tokenizer = toy_tokenizer(data["vocab"])
    model = toy_model(c["model"], len(data["vocab"])).to(device).train()
    common.describe(model, f"; pre-training it from scratch on {len(data['pretrain']):,} texts")
    ids = [tokenizer(p + t)["input_ids"] + [tokenizer.eos_token_id] for p, t in data["pretrain"]]
    batches = draw_batches([(x, x) for x in ids], 32, c["seed"])
    steps, lr = c["pretrain_steps"], c["pretrain_lr"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    bar = common.progress(range(steps), steps, "pre-train")
    for _ in bar:
        loss = answer_loss(model, collate(next(batches), tokenizer.pad_token_id, device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model, tokenizer


def pretrain_real(run, data, c, device):
    """(model, tokenizer) of a real LLM that knows the potions: a LoRA on what stage 1 has for it,
    merged into its weights, W + (alpha / r) B A."""
    model, tokenizer = common.load_model(run, data, device, as_given=True)
    torch.manual_seed(c["seed"])
    w = add_lora(model, c["targets"], c["r"], c["alpha"])
    if c["gradient_checkpointing"]:
        common.checkpoint_layers(model)
    common.describe(model, f"; teaching it from {len(data['pretrain']):,} texts")
    texts = [{"prompt": prompt, "response": text} for prompt, text in data["pretrain"]]
    examples = common.encode(tokenizer, texts, c["max_length"], c["template"])
    steps, pad_id = c["pretrain_steps"], tokenizer.pad_token_id
    batches = itertools.islice(draw_batches(examples, 8, c["seed"]), steps)
    pairs = ((collate(part, pad_id, device), None) for part in batches)
    for _ in train(model, w, sft_rule, pairs, steps, c["pretrain_lr"], c, "pre-train"):
        pass
    merge(model)
    return model, tokenizer


@torch.no_grad()
def merge(model):
    """Replace each LoRALinear by its base, the update added to its weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            layer.base.weight.add_(layer.scale * layer.lora_B @ layer.lora_A)
            model.set_submodule(name, layer.base)


def pretrain(run, data, c, device):
    """Write RUN/02_base, unless it is there and was made from this data with these settings."""
    toy, path = c["model"] in TOY_MODELS, run.folder / "02_base"
    names = "model seed pretrain_steps pretrain_lr".split()
    if not toy:  # what its LoRA depends on as well
        names += "r alpha targets weight_decay max_length".split()
    known = {name: c[name] for name in names}
    known["base"] = "" if toy else common.model_digest(c["model"])
    text = repr((data["vocab"], data["pretrain"]))
    known["text"] = hashlib.sha256(text.encode()).hexdigest()
    file = path / "pretrain.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept == {**known, "made": common.model_digest(path)}:
            print(f"{path} fits this data and these settings: not made again")
            return
    model, tokenizer = pretrain_toy(data, c, device) if toy else pretrain_real(run, data, c, device)

    def save(new):
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        made = {**known, "made": common.model_digest(new)}
        (new / "pretrain.json").write_text(json.dumps(made))

    common.write_whole(path, save)


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    return common.stage_parser(__doc__, FLAGS).parse_args(argv)


def main(argv=None):
    """Align and attack with each defence; writes RUN/02_finetune.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    data = run.load("01_data.pt")
    c = {**data["config"], **common.resolve(args, FLAGS, data["config"]["preset"])}
    device = common.pick_device(args.device, c["preset"])
    if data["pretrain"]:
        pretrain(run, data, c, device)
    model, tokenizer = common.load_model(run, data, device)
    w, examples = adapt(model, tokenizer, data, c)
    common.describe(model, f"; {sum(p.numel() for p in w.values()):,} of them trained (LoRA)")
    for name, made in examples.items():
        if cut := sum(labels[-1] != tokenizer.eos_token_id for _, labels in made):
            print(
                f"  note: {name}: {cut} of {len(made)} answers are cut at {c['max_length']} tokens "
                "and teach no end; make the data with a larger --max-length"
            )
    if c["preset"] == "toy" and device.type == "cpu":
        # the last begins first: by default the slow one
        jobs = [(str(run.folder), defense, c) for defense in c["defense"][::-1]]
        results = common.in_processes(one_defense, jobs)[::-1]
    else:
        initial, results = copy_of(w), []
        for defense in c["defense"]:
            put(w, initial)
            pad_id = tokenizer.pad_token_id
            results.append(align_and_attack(model, w, defense, examples, pad_id, c))
    rows = [row("base", {}, {})] + [x for made, _ in results for x in made]
    log = {defense: x for defense, (_, x) in zip(c["defense"], results)}
    artifact = run.save("02_finetune.pt", c, rows=rows, log=log)
    print(f"{run.folder / '02_finetune.pt'} written; next: {run.command('03_random_perturb')}")
    return artifact


if __name__ == "__main__":
    common.run_stage(main)
