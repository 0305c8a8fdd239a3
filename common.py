"""common.py - what the six stages share: no equation, no training loop, no judge.

errors and flags    UserError, run_stage, Flag, stage_parser, resolve, progress
the run folder      row, Run (load, check, save whole or not at all)
models              pick_device, load_tokenizer, load_weights, load_model, attach
prompts, batches    format_prompt, prompt_ids, encode, collate, draw_batches
answers             answer_losses, generate; in_processes, new_figure
"""

import argparse
import gc
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait for each other by spinning are a sixth faster on an idle machine and take half
# as long again on a busy one. Read when torch is loaded: stages import this file before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import transformers

# ---------------------------------------------------------------------------------------------
# Errors and flags: bad input ends in one line and exit code 2


class UserError(Exception):
    """What the user can mend, in one line: what is wrong, what was found, what to run."""


def run_stage(main):
    """Call `main()`; a UserError is one line on stderr and exit code 2, Ctrl-C exit code 130."""
    gc.freeze()  # torch's own objects need no search for garbage: 2 seconds of a stage
    quiet_libraries()
    sys.stdout.reconfigure(errors="replace")  # a console may lack a letter of an answer
    try:
        return main()
    except UserError as error:
        text, code = f"error: {error}", 2
    except KeyboardInterrupt:
        text, code = "interrupted: this stage's artifact is as it was before; run it again", 130
    except BrokenPipeError:  # a reader such as `head` has left; what is written stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None
    finally:
        gc.freeze()  # the same at the end
    print(text, file=sys.stderr)
    raise SystemExit(code)


def quiet_libraries():
    """No bars and warnings of transformers: load_weights says what matters."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


PRESETS = ("toy", "laptop", "paper")


class Flag(NamedTuple):
    """A line of a stage's FLAGS table. The defaults' type is the flag's: number (in low ... high),
    text, truth value (--name and --no-name), or a list of these (then it takes several)."""

    name: str
    toy: object
    laptop: object
    paper: object
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = None


def number(kind, low, high):
    """argparse type of a number: a finite `kind` (int or float) in low ... high."""

    def parse(text):
        value = kind(text)  # argparse reports a ValueError by itself
        if not low <= value <= high or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"needs {low} to {high}, finite, found {text!r}")
        return value

    parse.__name__ = kind.__name__
    return parse


def shown(value):
    """A default as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def stage_parser(doc, flags):
    """Parser of a stage's flags; the stage's header is the help text."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=style)
    wrong = f"see python {parser.prog} --help"
    parser.error = lambda message: parser.exit(2, f"error: {message}; {wrong}\n")
    text = "folder of this run's artifacts (default: runs/toy)"
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), metavar="DIR", help=text)
    text = "auto (the toy: cpu), cpu, cuda, cuda:1 or mps (default: auto)"
    parser.add_argument("--device", default="auto", metavar="NAME", help=text)
    for flag in flags:
        defaults = "; ".join(f"{preset}: {shown(getattr(flag, preset))}" for preset in PRESETS)
        options = {"help": f"{flag.help} ({defaults})".replace("%", "%%"), "metavar": "X"}
        options["nargs"] = "+" if isinstance(flag.toy, list) else None
        kind = type(flag.toy[0] if isinstance(flag.toy, list) else flag.toy)
        if kind is bool:
            options = {"help": options["help"], "action": argparse.BooleanOptionalAction}
        elif kind is str:
            options["choices"] = flag.choices
        else:
            options["type"] = number(kind, flag.low, flag.high)
        parser.add_argument("--" + flag.name.replace("_", "-"), **options)
    return parser


def resolve(args, flags, preset):
    """{flag: value}: as given in args (None: no flags), else the preset's default."""
    given = vars(args) if args else {}
    defaults = {flag.name: getattr(flag, preset) for flag in flags}
    return {k: x if given.get(k) is None else given[k] for k, x in defaults.items()}


show_bars = True  # False in all but one of the processes of `in_processes`


def progress(iterable, total, label):
    """tqdm with one style for all stages: label, bar, seconds per step, time left."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} "
    form += "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    options = dict(desc=f"  {label}", bar_format=form, ascii=" .:-=#", disable=not show_bars)
    often = 0.5 if sys.stderr.isatty() else 10  # seconds
    return tqdm(iterable, total=total, file=sys.stderr, mininterval=often, **options)


# ---------------------------------------------------------------------------------------------
# The run folder


def row(model, setting, w, eps=None, defense="sft", **more):
    """What stages 2 to 4 hand on to stage 5: one model of its table, w + scale * eps.

    Args:
        model, setting: its name, and what varies within the name. defense: how it was aligned.
        w, eps: {"<module>.lora_A" | "...lora_B": tensor}; eps None if there is nothing to scale.
        more: goes into results.json as it is.
    """
    return {"model": model, "defense": defense, "setting": setting, **more, "w": w, "eps": eps}


def weights_of(stage2, model, defense="sft"):
    """w of a row of stage 2's artifact: "aligned", or "finetuned", the attacked one."""
    for x in stage2["rows"]:
        if (x["model"], x["defense"]) == (model, defense) and "snapshot" not in x:
            return x["w"]
    raise UserError(f"02_finetune.pt: nothing was aligned with {defense}; run 02_finetune.py again")


def layer_of(name):
    """Number of the decoder layer that a weight's name belongs to: "model.layers.3.mlp" -> 3."""
    return int(re.search(r"\.(\d+)\.", name)[1])


def norm(weights, layer=None):
    """L2 norm of a dict of tensors, or of those of one layer; a number."""
    parts = [x for name, x in weights.items() if layer is None or layer_of(name) == layer]
    return math.sqrt(sum(x.pow(2).sum().item() for x in parts))


def write_whole(path, write):
    """Call `write(temporary path)` and rename the result to `path`: there whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as half:
        temporary = Path(half) / path.name
        write(temporary)
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)


TOY_MODELS = ("toy-llama", "toy-gemma2", "toy-qwen2")
TOY_TOKEN = r"[\w/]+:?|[^\w\s]"  # what its tokenizer takes for a word: a colon may end it; a mark
BASE_MODEL = "base model"  # its name among an artifact's parents


def model_source(run_folder, config):
    """Where a run's model lies or comes from: in RUN/02_base if stage 2 makes it, else --model."""
    return run_folder / "02_base" if config["n_pretrain"] else config["model"]


def file_digest(path):
    """sha256 of a file, as text; "" if it is not there."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(source):
    """sha256 of a checkpoint folder's files, or the commit of a downloaded hub model; "": none."""
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(source), local_files_only=True)).name
        except LocalEntryNotFoundError:
            return ""
    parts = []
    for pattern in ("config.json", "tokenizer.json", "*.safetensors", "*.bin"):
        parts += [f"{p.name} {file_digest(p)}" for p in sorted(Path(source).glob(pattern))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""


class Run:
    """One run folder; the digests of the artifacts it loads become the parents of what it saves.

    An artifact is a dict of plain data and tensors, with `kind` (its file name's stem), `config`
    (what the run was told), `seed`, `parents` ({file name, or "base model": digest}), `versions`.
    """

    FORMAT = 6  # raised when what the artifacts hold changes

    def __init__(self, folder):
        self.folder, self.parents, self.digests = Path(folder), {}, {}

    def command(self, stage):
        """The command that runs a stage of this run."""
        path = str(self.folder)
        return f"python {stage}.py --run " + (f'"{path}"' if " " in path else path)

    def digest(self, name, config):
        """Digest of a parent as it is now; "" if it is not there. Read once a stage."""
        if name not in self.digests:
            base = model_source(self.folder, config)
            digest = model_digest(base) if name == BASE_MODEL else file_digest(self.folder / name)
            self.digests[name] = digest
        return self.digests[name]

    def load(self, name):
        """The artifact `name`, checked. Raises UserError if it is missing, truncated, foreign,
        hostile, of another version of the project, or made from inputs that have changed since."""
        path = self.folder / name
        again = f"run: {self.command(path.stem)}"
        if not path.is_file():
            raise UserError(f"{path} is missing; {again}")
        try:
            artifact = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file raises a dozen kinds; each means the same to the user
            raise UserError(f"{path} is damaged or not a plain-data artifact; {again}") from None
        head = artifact if isinstance(artifact, dict) else {}
        if (head.get("kind"), head.get("format")) != (path.stem, self.FORMAT):
            raise UserError(
                f"{path} is no {path.stem!r} of this version of the project (format {self.FORMAT})"
                f" but {head.get('kind')!r} (format {head.get('format')}); {again}"
            )
        for parent, expected in artifact["parents"].items():
            if self.digest(parent, artifact["config"]) != expected:
                what = f" ({artifact['config']['model']})" if parent == BASE_MODEL else ""
                raise UserError(
                    f"{path} is stale: it was made from another {parent}{what}; put that back, or "
                    f"{again}"
                )
            self.parents[parent] = expected
        self.parents[name] = self.digest(name, artifact["config"])
        return artifact

    def save(self, name, config, **payload):
        """Write artifact `name` (whole or not at all) and return it."""
        packages = ("torch", "transformers", "numpy")
        artifact = {"kind": Path(name).stem, "format": self.FORMAT, "config": config}
        artifact |= {"seed": config["seed"], "parents": dict(self.parents)}
        artifact["versions"] = {x: importlib.metadata.version(x) for x in packages}
        artifact |= payload
        write_whole(self.folder / name, lambda path: torch.save(artifact, path))
        return artifact

    def save_json(self, name, content):
        """Write `content` as indented JSON, whole or not at all."""
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# Models


def pick_device(name, preset):
    """torch.device for `--device`; auto takes the accelerator, if there is one, else the CPU.

    The toy stays on the CPU unless told, and computes with one thread: its matrices are too small
    for a GPU or for two threads, and its digits would depend on them.
    """
    if preset == "toy":
        torch.set_num_threads(1)
        name = "cpu" if name == "auto" else name
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return torch.device(name)


def load_tokenizer(name, toy=False):
    """Tokenizer of a checkpoint, a folder or a hub id; it pads on the left, with EOS if need be.

    The toy's is read as it was written: AutoTokenizer would put Qwen2's own in its place.
    Raises UserError if it has no end token, without which no answer would ever stop.
    """
    kind = transformers.PreTrainedTokenizerFast if toy else transformers.AutoTokenizer
    tokenizer = kind.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        where = "set eos_token in its tokenizer_config.json, or give another model"
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token; {where}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_weights(auto_class, name, **options):
    """A model of `auto_class`, every weight of it from the checkpoint `name`.

    transformers fills what a checkpoint lacks with random numbers, and drops what it has too
    much. Raises UserError for any missing, left-over or mis-shaped tensor, and for an adapter.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{name} is a PEFT adapter, not a whole model; give its base model")
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = auto_class.from_pretrained(name, **options)
    for what in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{what}_keys"])):
            raise UserError(
                f"{name} does not fit {type(model).__name__}: {len(keys)} weights {what} (such as "
                f"{keys[0]}); give a checkpoint of this class"
            )
    return model


def load_model(run, data, device, as_given=False):
    """The frozen base model of the run, in eval mode on `device`, and its tokenizer.

    It comes from RUN/02_base if stage 2 makes one (and not `as_given`), else from a folder or the
    hub; in bfloat16 on a CUDA GPU, else as stored (laptop: in float32, which a CPU does faster).
    """
    config = data["config"]
    source = config["model"] if as_given else model_source(run.folder, config)
    if source == run.folder / "02_base" and not (source / "model.safetensors").is_file():
        raise UserError(f"{source} is missing; run: {run.command('02_finetune')}")
    dtype = torch.bfloat16 if device.type == "cuda" else "auto"
    model = load_weights(transformers.AutoModelForCausalLM, source, dtype=dtype)
    tokenizer = load_tokenizer(source, toy=config["model"] in TOY_MODELS)
    if not as_given:
        run.parents[BASE_MODEL] = run.digest(BASE_MODEL, config)
    slow = device.type != "cuda" and config["preset"] == "laptop"
    if slow or model.dtype == torch.float16:  # whose gradients under- and overflow
        model = model.float()
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # some tokenizers add one the model has not
    own = model.generation_config.eos_token_id  # stop there, and where training stops
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    model.generation_config = transformers.GenerationConfig(  # greedy, no penalty
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(stops)
    )
    return model.to(device).eval().requires_grad_(False), tokenizer


def describe(model, extra=""):
    """One line on what is about to run."""
    size = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {size:,} weights, {model.dtype} on {model.device}{extra}")


def checkpoint_layers(model):
    """Recompute each decoder layer's activations in the backward pass instead of keeping them."""
    from torch.utils.checkpoint import checkpoint  # transformers' own needs training mode

    for layer in model.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@contextmanager
@torch.no_grad()
def attach(model, adapter, alpha_over_r):
    """Run `model` with a LoRA adapter on its frozen linear layers; afterwards it is as it was.

    The training stages wrap layers in LoRALinear; answering is faster without. float32 weights
    take alpha_over_r * B A in, so that an answer costs no more than the base model's. bfloat16
    would round most of a small eps away; there the adapter runs beside each layer, as beside one
    of another class, which may round its weights itself.

    Args:
        adapter: {"<module>.lora_A": (r, in), "<module>.lora_B": (out, r)}, or empty.
    """
    handles, saved = [], []
    try:
        for name in [n.removesuffix(".lora_A") for n in adapter if n.endswith(".lora_A")]:
            module = model.get_submodule(name)
            A, B = (adapter[f"{name}.lora_{x}"].to(module.weight.device) for x in "AB")
            if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
                saved.append((module.weight, module.weight.clone()))
                module.weight.add_(alpha_over_r * B @ A)
            else:

                def beside(_, inputs, out, A=A, B=B):
                    update = alpha_over_r * (inputs[0].float() @ A.T) @ B.T
                    return (out.float() + update).to(out.dtype)

                handles.append(module.register_forward_hook(beside))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for weight, old in saved:
            weight.copy_(old)


# ---------------------------------------------------------------------------------------------
# Prompts and batches

_HEAD = "Below is an instruction that describes a task"
_TAIL = "Write a response that appropriately completes the request.\n\n"
TEMPLATES = {  # (without input, with input); "alpaca" is the paper's
    "toy": (
        "Instruction: {instruction}\nResponse:\n",
        "Instruction: {instruction} {input}\nResponse:\n",
    ),
    "alpaca": (
        f"{_HEAD}. {_TAIL}### Instruction:\n{{instruction}}\n\n### Response:\n",
        f"{_HEAD}, paired with an input that provides further context. {_TAIL}"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
}


def format_prompt(template, instruction, input="", tokenizer=None):
    """The text the model sees before it answers; template: toy, alpaca, or the checkpoint's chat.

    A reasoning model's chat template is asked for an answer without a thought.
    """
    if template != "chat":
        return TEMPLATES[template][bool(input)].format(instruction=instruction, input=input)
    turn = {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer.apply_chat_template([turn], **options)


def prompt_ids(tokenizer, prompt, template, room=None):
    """Tokens of a prompt, ready to be answered: a list of ids, at most `room` of them.

    A chat template writes its special tokens into the text, so none are added; other prompts get
    those the tokenizer puts in front (BOS), and none behind, where an end token would tell the
    model that all is said. What exceeds `room` is cut from the left, after the BOS.
    Raises UserError if a chat template begins with its BOS twice, or ends with an end token.
    """
    chat = template == "chat"  # elsewhere a "</s>" that a user writes is text
    options = dict(add_special_tokens=not chat, split_special_tokens=not chat, verbose=False)
    ids = tokenizer(prompt, **options)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while ids and ids[-1] == eos and not chat:
        ids.pop()
    if ids[-1:] == [eos] or (bos is not None and ids[:2] == [bos, bos]):
        raise UserError(
            f"a prompt of --template {template} begins with its BOS twice or ends with "
            f"{tokenizer.eos_token}: {tokenizer.decode(ids)[-60:]!r}; use --template alpaca"
        )
    if room is not None and len(ids) > room:
        head = ids[:1] if ids[0] in (bos, eos) else []
        ids = head + ids[len(ids) - (room - len(head)) :]
    return ids


def encode(tokenizer, rows, max_length, template):
    """Tokenize rows for training: [(ids, labels)], the prompt masked with -100, EOS at the end.

    What exceeds `max_length` tokens is cut from the left of the prompt (its BOS stays); an answer
    keeps at least half of them, without EOS if it is cut.
    """
    examples, options = [], dict(add_special_tokens=False, split_special_tokens=True)
    for example in rows:
        reply = tokenizer(example["response"], **options)["input_ids"] + [tokenizer.eos_token_id]
        asked = prompt_ids(tokenizer, example["prompt"], template)
        reply = reply[: max(max_length // 2, max_length - len(asked))]
        ids = prompt_ids(tokenizer, example["prompt"], template, max_length - len(reply))
        examples.append((ids + reply, [-100] * len(ids) + reply))
    return examples


def collate(examples, pad_id, device):
    """Right-pad examples to a batch: {"input_ids": (B, T), "labels": (B, T)}.

    No attention mask is needed: under causal attention no real token sees the padding after it,
    and padding has no label.
    """
    batch = {}
    for name, rows, value in zip(("input_ids", "labels"), zip(*examples), (pad_id, -100)):
        rows = [torch.tensor(x) for x in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        batch[name] = padded.to(device)
    return batch


def draw_batches(examples, batch_size, seed, epochs=None):
    """Yield lists of examples, reshuffled every epoch by `seed`; the last of one may be short.

    Without a number of epochs (the provider's sets, beside the user's) they are full and endless.
    """
    size = min(batch_size, len(examples))
    rng = random.Random(seed)
    for _ in itertools.count() if epochs is None else range(epochs):
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order) - (size - 1 if epochs is None else 0), size):
            yield [examples[i] for i in order[start : start + size]]


# ---------------------------------------------------------------------------------------------
# Answers


@torch.no_grad()
def answer_losses(model, tokenizer, examples, batch_size=16):
    """[(summed cross-entropy in nats, number of answer tokens)] of each example (ids, labels)."""
    sums = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = collate(part, tokenizer.pad_token_id, model.device)
        labels = batch["labels"][:, 1:]  # (B, T-1): the next token
        first = int((labels != -100).any(0).int().argmax())  # no logits before the first answer
        keep = slice(first, labels.shape[1])
        out = model(input_ids=batch["input_ids"], logits_to_keep=keep, use_cache=False)
        logits, labels = out.logits.float(), labels[:, keep]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(labels)  # (B, K), 0 where no label
        sums += zip(losses.sum(1).tolist(), (labels != -100).sum(1).tolist())
    return sums


@torch.no_grad()
def generate(model, tokenizer, prompts, template, max_new_tokens, batch_size):
    """Greedy answers to `prompts`, in their order, without the prompt and the special tokens.

    Batches hold prompts of similar length, left-padded; a prompt too long for the context loses
    its left. An answer is the same as that of the prompt alone (float32; bfloat16 may round to
    another word).

    Returns:
        (texts, ended): the answers, and whether each ended by itself before max_new_tokens.
    """
    room = (getattr(model.config, "max_position_embeddings", None) or 2048) - max_new_tokens
    if room < 2:
        raise UserError(f"--max-new-tokens {max_new_tokens} fills the model's context; use less")
    asked = [prompt_ids(tokenizer, text, template, room) for text in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(asked[i]), reverse=True)
    stops = torch.tensor(model.generation_config.eos_token_id).to(model.device)
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [asked[i] for i in part]}, return_tensors="pt")
        out = model.generate(**batch.to(model.device), max_new_tokens=max_new_tokens)
        new = out[:, batch["input_ids"].shape[1] :]  # (B, at most max_new_tokens)
        stopped = torch.isin(new, stops).any(1).tolist()
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text, stop in zip(part, decoded, stopped):
            texts[i], ended[i] = text.strip(), stop
    return texts, ended


def _start_worker():
    """What a process of `in_processes` does first: one thread, leave Ctrl-C to its parent, and
    end with it, however it ends."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(function, job, show):
    """function(*job) as bytes: tensors sent one by one would exhaust a process's open files."""
    global show_bars
    show_bars, buffer = show, io.BytesIO()
    torch.save(function(*job), buffer)
    return buffer.getvalue()


def workers():
    """How many processes are of use: the cores that this one may use, four at most."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def in_processes(function, jobs):
    """[function(*job) for job in jobs], in processes of one thread; the first one shows its bar.

    For the toy, whose matrices are too small for two threads to share. `function` must be a
    module's own, and return what torch.load(weights_only=True) reads.
    Raises UserError if a process is killed.
    """
    count = min(len(jobs), workers())
    if count < 2:
        return [function(*job) for job in jobs]
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit locked threads
    with ProcessPoolExecutor(count, mp_context=spawn, initializer=_start_worker) as pool:
        try:
            futures = [pool.submit(_work, function, job, job is jobs[0]) for job in jobs]
            parts = [future.result() for future in futures]
        except BrokenProcessPool:
            text = "one of this stage's processes was killed (for want of memory?); run it again"
            raise UserError(text) from None
        except BaseException:  # Ctrl-C, or an error in one of them: do not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return [torch.load(io.BytesIO(part), weights_only=True) for part in parts]


def new_figure(width, height):
    """An empty matplotlib Figure, or None where matplotlib is not installed (it is optional)."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook exports one that a script may not have
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")
