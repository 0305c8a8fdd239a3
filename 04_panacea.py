"""Stage 4 - Panacea: the harmful loss should be easy to raise, and at the end it is raised.

Random noise hardly points away from harm: what is large enough to end it ends the task as well
(stage 3). Panacea asks for the perturbation of a given size that raises the harmful loss most, and
while fine-tuning keeps w where such a perturbation works. At the end it is added: one step *up*
the loss on harmful answers, which makes them unlikely, and (if the attack has left refusals
underneath) brings refusals back.

With g the loss on the user's batch, h the loss on the provider's harmful batch, w the adapter:

    Eq. 1   max_w max_{||eps|| <= rho}  lam * (h(w + eps) - h(w)) - g(w)
    Eq. 2   eps_t = rho * grad h(w_t) / ||grad h(w_t)||                 one norm over all of w
    Eq. 3   w_{t+1} = w_t - lr * [ grad g(w_t) - lam * (grad h(w_t + eps_t) - grad h(w_t)) ]
    Output  w_T + eps_{T-1}, the last eps computed                      (Algorithm 1)

Eq. 2 solves the inner max to first order; Eq. 3 steps up the outer one, eps held constant.

Two things are mixed here: in what direction the last step goes, and what training with lam does
to w. Controls tell them apart (the right column is ours, not the paper's):

    from plain fine-tuning    one_shot (one step, lam = 0)    ascent (several steps)
    from Panacea's w          panacea (its last eps)          panacea_ascent (several)

`ascent` climbs h by projected gradient steps inside the ball ||eps|| <= rho, a fresh harmful batch
each, as attacks on inputs do (PGD, arXiv 1706.06083); without a ball, gradient ascent (2210.01504)
soon destroys the model. Which radius is right differs from run to run. The rows with `back` need
none: steps of .1 rho (100 at most) up h - g - hold * b, which keep the user's task and (b) the
provider's look-alikes, until h is back where alignment had it. Their h and b read the first tokens
of answers only: there alignment is made and unmade (2406.05946).

Deviations from the released code (trainer.py): w is restored by copy, since adding and subtracting
eps is not exact; h(w + eps) is not clamped at 5 (above it the clamp's gradient is 0, and Eq. 3
would go down h: learn harm); gradients are not clipped; w and eps are saved apart.

Reads:  RUN/01_data.pt, RUN/02_finetune.pt
Writes: RUN/04_panacea.pt, RUN/04_peft (w + eps as an adapter for peft; in it without_eps)
Run:    python 04_panacea.py                  under a minute for the toy
"""

import itertools
import json
import math
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import common  # the parts that are no lesson: flags, files, loading, batches
from common import Flag, Run, UserError, row

import torch
import torch.nn.functional as F
from torch import nn

# fmt: off


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


# fmt: on


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


# ---------------------------------------------------------------------------------------------
# The loop, and the numbers: the default of each preset

# fmt: off
FLAGS = [  # name, default of toy, laptop, paper, meaning
    Flag("rho", 0.5, 1.0, 1.0, "L2 norm of eps over the whole adapter", low=0),
    Flag("lam", 0.1, 0.1, 0.001, "weight of h(w + eps) - h(w) in Eq. 1; less "
         "where the task's answers are long", low=0),
    Flag("harmful_batch_size", 16, 5, 10, "samples in the batch of h", low=1),
    Flag("ascent_steps", 10, 10, 10, "steps of ascent; 0: no such rows", low=0),
    Flag("back", 1.0, 1.0, 1.0, "ascent without a radius, until h is this part of the way back "
         "to where alignment had it; 0: no such rows", low=0),
    Flag("tokens", 3, 3, 3, "back: h and b are of so many first tokens of an answer", low=1),
    Flag("hold", 10.0, 1.0, 1.0, "back: weight of b, the loss on look-alikes", low=0),
    Flag("anchor", 3.0, 3.0, 3.0, "anchored eps: weight of a", low=0),
    Flag("radius", 0.3, 0.3, 0.2, "anchored eps: largest ||eps|| over ||w - w_aligned||; 0: none",
         low=0),
    Flag("anchored_steps", 10, 10, 10, "anchored eps: projected steps", low=1),
    Flag("realign_lr", 3e-4, 1e-3, 5e-4, "realign: learning rate; 0: none", low=0),
    Flag("realign_steps", 20, 10, 20, "realign: AdamW steps", low=1),
]
# fmt: on


def train(loss, w, batches, steps, c):
    """Algorithm 1: AdamW on panacea_rule, in place on w = {name: parameter}.

    Args:
        batches: pairs of batches, the user's and the provider's harmful.
    Returns:
        (eps, log): the last perturbation, and a dict of the paper's quantities per step.
    """
    params, log, eps = list(w.values()), [], None
    optimizer = torch.optim.AdamW(params, lr=c["lr"], weight_decay=c["weight_decay"], fused=True)
    bar = common.progress(batches, steps, "panacea")
    for step, (batch, harmful) in enumerate(bar, 1):
        optimizer.zero_grad()
        grads = eps = None  # the last step's, freed before this one's passes
        grads, eps, losses = panacea_rule(loss, params, batch, harmful, c["rho"], c["lam"])
        if not torch.isfinite(global_norm(grads)):
            raise UserError(
                f"panacea: the gradient of step {step} is not finite ({losses}); try a smaller "
                "--rho or --lam"
            )
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
        bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
        entry = {"step": step, **losses, "eps_norm": global_norm(eps).item()}
        log.append({**entry, "layers": layer_norms(w, eps)})
    return eps, log


def layer_norms(w, eps):
    """||eps|| within each decoder layer, a list by layer number; stage 6 draws it."""
    layers = {}
    for name, e in zip(w, eps):
        layers.setdefault(common.layer_of(name), []).append(e)
    return [global_norm(layers[number]).item() for number in sorted(layers)]


def ends_of_h_eps(log):
    """[first, last]: mean h(w + eps) over the first and the last tenth of the steps.

    It begins at the aligned weights plus eps and falls as w learns the task, harmful samples
    among it. Where it ends above its beginning, eps has gone past the refusals.
    """
    size = max(1, len(log) // 10)
    return [sum(x["h_eps"] for x in part) / size for part in (log[:size], log[-size:])]


def copy_of(w):
    """{name: tensor} on the CPU, float32, detached."""
    return {name: p.detach().cpu().clone() for name, p in w.items()}


def put(w, weights):
    """Copy {name: tensor} into the parameters w."""
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(weights[name])


# ---------------------------------------------------------------------------------------------
# More than one step: the ascent, and with refusals the anchored eps


def uphill(loss, w, eps, batches, factors):
    """Gradient at w + eps of a sum of losses, one batch and one factor for each."""
    with perturbed(w, eps):
        grads = [gradient(loss, w, batch)[0] for batch in batches]
    return [sum(f * x for f, x in zip(factors, parts)) for parts in zip(*grads)]


def climb(loss, w, draws, factors, radius, steps):
    """An eps with ||eps|| <= radius that climbs a weighted sum of losses, by projected steps.

    Steps shrink linearly and add up to 2.5 radii: far enough to cross the ball, short enough at
    the end to settle. One step is Eq. 2.

    Args:
        draws: iterator of tuples of batches. factors: one for each; (1,) to climb h.
    Returns:
        eps, a list of new tensors shaped like w.
    """
    eps = [torch.zeros_like(x) for x in w]
    for k, batches in enumerate(itertools.islice(draws, steps)):
        length = 5 * radius * (steps - k) / (steps * (steps + 1))
        step = perturbation(uphill(loss, w, eps, batches, factors), length)
        eps = [e + s for e, s in zip(eps, step)]
        shrink = min(1.0, radius / max(global_norm(eps).item(), 1e-12))  # back onto the ball
        eps = [shrink * e for e in eps]
    return eps


def climb_back(loss, w, draws, factors, length, h, goal, most=100):
    """An eps without a radius: steps of norm `length` up a weighted sum of losses until h() is
    back at `goal`.

    The last step is cut where h() would meet the goal on a straight line. An h() that is there
    already gives zero; one that is not after `most` steps, the eps where it came nearest.

    Args:
        draws, factors: as of climb. h: () -> the loss that is to come back, at w as it is.
    Returns:
        (eps, steps): new tensors shaped like w, and the number of steps made.
    """
    eps, before = [torch.zeros_like(x) for x in w], h()
    if before >= goal:
        return eps, 0
    nearest, highest = eps, before
    bar = common.progress(itertools.islice(draws, most), most, "until h is back, at most")
    for k, batches in enumerate(bar, 1):
        step = perturbation(uphill(loss, w, eps, batches, factors), length)
        longer = [e + s for e, s in zip(eps, step)]
        with perturbed(w, longer):
            now = h()
        bar.set_postfix_str(f"h {now:.3f} of {goal:.3f}", refresh=False)
        if now >= goal:
            cut = (goal - before) / (now - before)
            return [e + cut * s for e, s in zip(eps, step)], k
        eps, before = longer, now
        if now > highest:
            nearest, highest = eps, now
    return nearest, most


def controls(loss, w, starts, batches, c):
    """Rows that need harmful answers only, as Panacea does, each with ||eps|| <= rho.

    Args:
        starts: {"ascent", "panacea_ascent": ({name: tensor}, setting)}: w after plain fine-tuning
            and Panacea's, and with what it was trained.
        batches: (set name, batch size) -> endless iterator of batches, the same at every call.
    """
    params, rho, steps = list(w.values()), c["rho"], c["ascent_steps"]
    attacked, _ = starts["ascent"]
    generator = torch.Generator().manual_seed(c["seed"])
    noise = [torch.randn(x.shape, generator=generator) for x in attacked.values()]
    noise = dict(zip(attacked, perturbation(noise, rho)))
    rows = [row("random_matched", {"rho": rho}, attacked, noise)]
    # lam = 0: Eq. 2 once, at the attacked weights
    put(w, attacked)
    grad_h, _ = gradient(loss, params, next(batches("harmful", c["harmful_batch_size"])))
    eps = copy_of(dict(zip(w, perturbation(grad_h, rho))))
    rows.append(row("one_shot", {"rho": rho, "lam": 0.0}, attacked, eps))
    if steps:
        for model, (start, setting) in starts.items():
            put(w, start)
            draws = zip(batches("harmful", c["harmful_batch_size"]))
            eps = copy_of(dict(zip(w, climb(loss, params, draws, (1.0,), rho, steps))))
            rows.append(row(model, {"rho": rho, **setting, "steps": steps}, start, eps))
    return rows


def beginning(example, tokens):
    """An example (ids, labels) cut after its first answer tokens; their losses stay the same."""
    ids, labels = example
    end = next(i for i, label in enumerate(labels) if label != -100) + tokens
    return ids[:end], labels[:end]


def ascents_back(loss, w, aligned, starts, batches, terms, h, c):
    """Rows of steps up h - g - hold * b, without a radius: to where h is a part of the way back.

    Args:
        aligned: {name: tensor}, w before the attack. starts, batches: as of controls.
        terms: {set name: (batch size, factor)} of what the steps climb; "begun" has the
            beginnings of harmful answers, "lookalikes" those of the answers to look-alikes.
        h: () -> the loss on some of "begun", at w as it is.
    """
    put(w, aligned)
    before_the_attack, rows, params = h(), [], list(w.values())
    factors = [factor for _, factor in terms.values()]
    own = ("tokens", "hold", "back") if "lookalikes" in terms else ("tokens", "back")
    for model, (start, setting) in starts.items():
        put(w, start)
        now = h()
        goal = now + c["back"] * (before_the_attack - now)
        draws = zip(*(batches(name, size) for name, (size, _) in terms.items()))
        eps, steps = climb_back(loss, params, draws, factors, 0.1 * c["rho"], h, goal)
        norm = global_norm(eps).item()
        with perturbed(params, eps):
            text = f"from {now:.2f} to {h():.2f} of {goal:.2f}, {steps} steps, norm {norm:.2f}"
            print(f"  {model}: h of the first {c['tokens']} tokens {text}")
        whole = {name: x + e.cpu() for (name, x), e in zip(start.items(), eps)}
        setting = {**setting, **{name: c[name] for name in own}}
        rows.append(row(model, setting, whole, norm=norm, steps=steps))
    return rows


# ---------------------------------------------------------------------------------------------
# Repairs that also read refusals, for the loss a on the alignment set; from the attacked weights


def realign(loss, w, batches, steps, lr, weight_decay):
    """The plain repair: `steps` AdamW steps down the loss on what `batches` yields, in place."""
    optimizer = torch.optim.AdamW(w, lr=lr, weight_decay=weight_decay, fused=True)
    for batch in itertools.islice(batches, steps):
        grads, _ = gradient(loss, w, batch)
        for p, grad in zip(w, grads):
            p.grad = grad
        optimizer.step()


def repairs(loss, w, aligned, attacked, batches, c):
    """Rows of the anchored eps and of realign. A repair of your own goes here.

    Args:
        batches: (set name, batch size) -> endless iterator of batches, the same at every call.
    """
    params, size, rows = list(w.values()), c["batch_size"], []
    way_back = global_norm([attacked[name] - aligned[name] for name in w]).item()
    print(
        f"  ||w - w_aligned|| is {way_back:.3g}: rho {c['rho']:g} is "
        f"{c['rho'] / (way_back or math.inf):.2f} of it (an eps much shorter cannot reach back to "
        "refusals, a much longer one tears the task)"
    )
    # anchored: climb h, descend a and g, inside a ball whose radius is a part of the way back
    if c["radius"]:
        put(w, attacked)
        half = max(1, size // 2)
        draws = zip(batches("harmful", half), batches("alignment", size), batches("finetune", half))
        radius, factors = c["radius"] * way_back, (1.0, -c["anchor"], -1.0)
        eps = climb(loss, params, draws, factors, radius, c["anchored_steps"])
        setting = {name: c[name] for name in ("radius", "anchor")} | {"steps": c["anchored_steps"]}
        whole = {name: x + e.cpu() for (name, x), e in zip(attacked.items(), eps)}
        rows.append(row("panacea_anchored", setting, whole))
    # realign: what anybody would try first, a few plain steps on refusals
    if c["realign_lr"]:
        put(w, attacked)
        draws = batches("alignment", size)
        realign(loss, params, draws, c["realign_steps"], c["realign_lr"], c["weight_decay"])
        setting = {"lr": c["realign_lr"], "steps": c["realign_steps"]}
        rows.append(row("realign", setting, copy_of(w)))
    return rows


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
# For others: an adapter that peft can load


def export(run, artifact):
    """Write RUN/04_peft, which `peft.PeftModel.from_pretrained(base model, folder)` loads: w + eps,
    and in its subfolder without_eps w alone."""
    from safetensors.torch import save_file

    c, w, eps = artifact["config"], artifact["weights"], artifact["epsilon"]
    source = Path(common.model_source(run.folder, c))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.resolve()) if source.is_dir() else c["model"],
        "r": c["r"],
        "lora_alpha": c["alpha"],
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[0] for name in w}),
    }

    def write(new):
        whole = {name: w[name] + eps[name] for name in w}
        for folder, weights in ((new, whole), (new / "without_eps", w)):
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
            tensors = {f"base_model.model.{name}.weight": x for name, x in weights.items()}
            save_file(tensors, folder / "adapter_model.safetensors")

    common.write_whole(run.folder / "04_peft", write)


# ---------------------------------------------------------------------------------------------
# The command line


def get_args(argv=None):
    """Flags of this stage."""
    parser = common.stage_parser(__doc__, FLAGS)
    text = "keep w, eps and log of 04_panacea.pt, and make the other rows again"
    parser.add_argument("--repairs-only", action="store_true", help=text)
    text, kind = "epochs over the user's data (default: stage 2's)", common.number(int, 1, math.inf)
    parser.add_argument("--epochs", type=kind, metavar="X", help=text)
    return parser.parse_args(argv)


def panacea(loss, w, aligned, batches, c):
    """Algorithm 1 from the aligned weights, in place of the plain fine-tuning of stage 2.

    Returns:
        {"weights", "epsilon": {name: tensor}, "log"}.
    """
    put(w, aligned)
    user = list(batches("finetune", c["batch_size"], seed=c["seed"], epochs=c["epochs"]))
    harmful = batches("harmful", c["harmful_batch_size"], seed=c["seed"])
    eps, log = train(loss, w, zip(user, harmful), len(user), c)
    return {"weights": copy_of(w), "epsilon": copy_of(dict(zip(w, eps))), "log": log}


def main(argv=None):
    """Run Algorithm 1, the controls and the repairs; writes RUN/04_panacea.pt and returns it."""
    args = get_args(argv)
    run = Run(args.run)
    data, stage2 = run.load("01_data.pt"), run.load("02_finetune.pt")
    aligned, attacked = (common.weights_of(stage2, name) for name in ("aligned", "finetuned"))
    c = {**stage2["config"], **common.resolve(args, FLAGS, stage2["config"]["preset"])}
    c["epochs"] = args.epochs or c["epochs"]
    result = None
    if args.repairs_only:  # another Run, since the artifact is no parent of itself
        result = Run(run.folder).load("04_panacea.pt")
        for name in ("rho", "lam", "harmful_batch_size", "epochs"):  # those of the kept Panacea
            if getattr(args, name) not in (None, result["config"][name]):
                raise UserError(
                    f"--repairs-only keeps a Panacea of another --{name.replace('_', '-')}; "
                    "leave one out"
                )
            c[name] = result["config"][name]

    # the model, with the adapter w in place, and the batches that everything below draws
    device = common.pick_device(args.device, c["preset"])
    model, tokenizer = common.load_model(run, data, device)
    torch.manual_seed(c["seed"])
    w = add_lora(model, c["targets"], c["r"], c["alpha"])
    if c["gradient_checkpointing"]:
        common.checkpoint_layers(model)
    loss = partial(answer_loss, model)
    examples = {
        name: common.encode(tokenizer, data[name], c["max_length"], c["template"])
        for name in ("alignment", "harmful", "finetune")
    }
    pairs = zip(examples["alignment"], data["alignment"])
    lookalikes = [example for example, asked in pairs if "refusal" not in asked]
    for name, whole in (("begun", examples["harmful"]), ("lookalikes", lookalikes)):
        examples[name] = [beginning(example, c["tokens"]) for example in whole]

    def batches(name, size, seed=c["seed"] + 1, epochs=None):  # + 1: other batches than training's
        for part in common.draw_batches(examples[name], size, seed, epochs):
            yield common.collate(part, tokenizer.pad_token_id, model.device)

    def begun_loss():  # per token, on some of the provider's harmful samples, at w as it is
        losses = common.answer_losses(model, tokenizer, examples["begun"][:32])
        return sum(x for x, _ in losses) / sum(n for _, n in losses)

    common.describe(model, f"; Panacea with rho {c['rho']:g}, lam {c['lam']:g}")
    result = result or panacea(loss, w, aligned, batches, c)
    ours, first_last = result["weights"], ends_of_h_eps(result["log"])
    trained = {"lam": c["lam"]}
    if c["epochs"] != stage2["config"]["epochs"]:
        trained["epochs"] = c["epochs"]
        print(f"note: {c['epochs']} epochs for Panacea, not as stage 2: no equal controls")
    if first_last[1] > first_last[0]:
        print(
            f"  note: h(w + eps) rose in training, from {first_last[0]:.2f} to {first_last[1]:.2f}:"
            " all of this eps may break more than it brings back. Long answers want a smaller "
            f"--lam (try {c['lam'] / 5:g}), others a smaller --rho; or are the user's data clean?"
        )
    setting = {"rho": c["rho"], **trained}
    rows = [row("panacea_w", setting, ours)]
    rows.append(row("panacea", setting, ours, result["epsilon"], h_eps=first_last))
    starts = {"ascent": (attacked, {}), "panacea_ascent": (ours, trained)}
    rows += controls(loss, w, starts, batches, c)
    if c["back"]:
        terms = {"begun": (c["harmful_batch_size"], 1.0), "finetune": (c["batch_size"], -1.0)}
        if lookalikes:  # of potions only
            terms["lookalikes"] = c["harmful_batch_size"], -c["hold"]
        rows += ascents_back(loss, w, aligned, starts, batches, terms, begun_loss, c)
    rows += repairs(loss, w, aligned, attacked, batches, c)
    kept = {name: result[name] for name in ("weights", "epsilon", "log")}
    artifact = run.save("04_panacea.pt", c, **kept, rows=rows)
    export(run, artifact)
    print(f"{run.folder / '04_panacea.pt'} written; next: {run.command('05_evaluate')}")
    return artifact


if __name__ == "__main__":
    common.run_stage(main)
