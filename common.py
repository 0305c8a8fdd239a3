"""common.py - what all six stages must agree on: no equation, no training loop, no judge.

errors and flags    UserError, run_stage, Flag, stage_parser, resolve
the run folder      write_whole, Run (load, check lineage, save whole or not at all)
models              pick_device, load_tokenizer, load_model, attach
prompts, batches    format_prompt, prompt_ids, encode, collate, draw_batches
answers             generate, in_processes
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
import shlex
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait for each other by spinning are a sixth faster on an idle machine and take half
# as long again on a busy one. Read when torch is loaded: stages import this file before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from safetensors import SafetensorError

# ---------------------------------------------------------------------------------------------
# Errors and flags: bad input ends in one line and exit code 2


class UserError(Exception):
    """Something the user can mend: one line saying what is wrong, what was found, what to run."""


def run_stage(main):
    """Call `main()`; what the user can mend is one line on stderr and exit code 2."""
    gc.freeze()  # spares torch's objects the search for garbage: 2 seconds off start and end
    try:
        return main()
    except UserError as error:
        text, code = f"error: {error}", 2
    except torch.OutOfMemoryError:
        text, code = (
            "error: out of GPU memory; stages 2 and 4: --gradient-checkpointing or a smaller "
            "--batch-size in stage 2; stage 5: a smaller --eval-batch-size",
            2,
        )
    except KeyboardInterrupt:
        text, code = "interrupted: this stage's artifact is as it was before; run it again", 130
    finally:
        gc.freeze()
    print(text, file=sys.stderr)
    raise SystemExit(code)


PRESETS = ("toy", "laptop", "paper")


class Flag(NamedTuple):
    """A line of a stage's FLAGS table: name, its default in each preset, meaning, what is allowed.

    The defaults' type is the flag's: whole number, number, text, truth value (--name and
    --no-name), or a list of these (then it takes several). Numbers must lie in low ... high.
    """

    name: str
    toy: object
    laptop: object
    paper: object
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()


def number(kind, low, high):
    """argparse type of a number: a finite `kind` (int or float) in low ... high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value in (math.inf, -math.inf):
            what = "whole number" if kind is int else "finite number"
            raise argparse.ArgumentTypeError(f"needs a {what} from {low} to {high}, found {text!r}")
        return value

    return parse


def shown(value):
    """A default or a setting as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def add_flag(group, row, default=None, note=""):
    """Add a Flag to an argparse group. `note` ends its help text."""
    options = {"default": default, "help": row.help + note}
    sample = row.toy[0] if isinstance(row.toy, list) else row.toy
    if isinstance(sample, bool):
        options["action"] = argparse.BooleanOptionalAction
    else:
        kind = type(sample)
        options["type"] = number(kind, row.low, row.high) if kind in (int, float) else kind
        options["metavar"] = "X"
        if row.choices:
            options["choices"] = row.choices
        if isinstance(row.toy, list):
            options["nargs"] = "+"
    group.add_argument("--" + row.name.replace("_", "-"), **options)


def stage_parser(doc, flags):
    """(parser, its group of the stage's own flags): the stage's header is the help text."""
    parser = argparse.ArgumentParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(
        2, f"error: {message}; see python {parser.prog} --help\n"
    )
    group = parser.add_argument_group("where")
    group.add_argument(
        "--run",
        type=Path,
        default=Path("runs/toy"),
        metavar="DIR",
        help="folder of this run's artifacts (default: runs/toy)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (the toy: cpu), cpu, cuda, cuda:1 or mps (default: auto)",
    )
    group = parser.add_argument_group("what and how much")
    for row in flags:
        defaults = "; ".join(f"{preset}: {shown(getattr(row, preset))}" for preset in PRESETS)
        add_flag(group, row, note=f" ({defaults})")
    return parser, group


def resolve(args, flags, preset):
    """{flag: value}: as given in args (None: no flags), else the preset's default."""
    given = vars(args) if args else {}
    return {
        row.name: getattr(row, preset) if given.get(row.name) is None else given[row.name]
        for row in flags
    }


def progress(iterable, total, label):
    """tqdm with one style for all stages: label, bar, seconds per step, time left."""
    from tqdm import tqdm

    return tqdm(
        iterable,
        total=total,
        desc=f"  {label}",
        ascii=" .:-=#",
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} "
        "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def say_next(path, stage, folder):
    """The closing line of a stage: what was written, and the command that comes next."""
    print(f"{path} written; next: python {stage} --run {shlex.quote(str(folder))}")


# ---------------------------------------------------------------------------------------------
# The run folder


def write_whole(path, write):
    """Call `write(temporary path)` and rename the result to `path`: there whole, or not at all.

    Raises UserError if the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            if path.is_dir() and temporary.is_dir():
                shutil.rmtree(path)
            temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot write {path} ({reason}); give a folder that can be written"
        ) from None


def file_digest(path):
    """sha256 of a file, as text. Of one beyond 1 GB, 16 KB of every MB: seconds for a 7B model."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= 2**30:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(str(size).encode())
        for start in range(0, size, 2**20):
            file.seek(start)
            digest.update(file.read(2**14))
    return digest.hexdigest()


TOY_MODELS = ("toy-llama", "toy-gemma2", "toy-qwen2")
TOY_TOKEN = r"[\w/]+:?|[^\w\s]"  # what its tokenizer takes for a word: a colon may end it; a mark
BASE_MODEL = "base model"  # its name among an artifact's parents


def model_source(run_folder, config):
    """Where a run's model lies or comes from: in RUN/02_base if stage 2 makes it, else --model."""
    return run_folder / "02_base" if config["n_pretrain"] else config["model"]


def base_digest(source):
    """Digest of a model's configuration, weights and tokenizer: "" if there are none.

    source: a folder, or a hub id, of which the files that were downloaded count.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), local_files_only=True))
        except Exception:  # no such download, no such name: the caller says what that means
            return ""
    patterns = "config.json *.safetensors *.bin tokenizer* *.model vocab* merges*".split()
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    parts = [f"{path.name} {file_digest(path)}" for path in sorted(files) if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if len(parts) > 1 else ""


class Run:
    """One run folder; the digests of the artifacts it loads become the parents of what it saves.

    An artifact is a dict of plain data and tensors, with `kind` (its file name's stem), `config`
    (every number that made it), `seed`, `parents` ({file name, or "base model": sha256}) and
    `versions`.
    """

    FORMAT = 5  # raised when what the artifacts hold changes

    def __init__(self, folder):
        self.folder, self.parents, self.digests = Path(folder), {}, {}

    def command(self, stage):
        """The command that runs a stage of this run."""
        return f"python {stage}.py --run {shlex.quote(str(self.folder))}"

    def digest(self, name, config):
        """Digest of a parent as it is now; "" if it is not there."""
        if name not in self.digests:  # once a stage: stages 2 to 4 have the base model in common
            if name == BASE_MODEL:
                self.digests[name] = base_digest(model_source(self.folder, config))
            else:
                path = self.folder / name
                self.digests[name] = file_digest(path) if path.is_file() else ""
        return self.digests[name]

    def load(self, name):
        """The artifact `name`, checked. Raises UserError if it is missing, truncated, foreign,
        hostile, of another version of the project, or made from inputs that have changed since."""
        path = self.folder / name
        again = f"run: {self.command(path.stem)}"
        if not path.is_file():
            others = sorted(str(p.parent) for p in self.folder.parent.glob("*/01_data.pt"))
            hint = f" (there is {', '.join(others)})" if others and not self.folder.is_dir() else ""
            raise UserError(f"{path} is missing{hint}; {again}")
        try:
            artifact = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file raises a dozen kinds; each means the same to the user
            raise UserError(f"{path} is damaged or not a plain-data artifact; {again}") from None
        kind = artifact.get("kind") if isinstance(artifact, dict) else type(artifact).__name__
        if kind != path.stem:
            raise UserError(f"{path} should hold {path.stem!r}, found {kind!r}; {again}")
        if artifact.get("format") != self.FORMAT:
            raise UserError(f"{path} is of another version of this project; {again}")
        for parent, expected in artifact["parents"].items():
            if self.digest(parent, artifact["config"]) != expected:
                what = artifact["config"]["model"] if parent == BASE_MODEL else ""
                raise UserError(
                    f"{path} is stale: it was made from another {parent}{what and f' ({what})'}; "
                    f"put that back, or {again}"
                )
            self.parents[parent] = expected
        self.parents[name] = self.digest(name, artifact["config"])
        return artifact

    def save(self, name, config, **payload):
        """Write artifact `name` (whole or not at all) and return it."""
        versions = {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "numpy")
        }
        artifact = {
            "kind": Path(name).stem,
            "format": self.FORMAT,
            "config": config,
            "seed": config["seed"],
            "parents": dict(self.parents),
            "versions": {"python": sys.version.split()[0], **versions},
            **payload,
        }
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
    Raises UserError if the device is unknown or not there.
    """
    if preset == "toy":
        torch.set_num_threads(1)
        name = "cpu" if name == "auto" else name
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not available here; use --device cpu") from None
    return device


def load_tokenizer(name):
    """Tokenizer of a checkpoint, a folder or a hub id; it pads on the left, with EOS if need be.

    Raises UserError if it cannot be read or has no end-of-sequence token, without which no
    answer would ever stop.
    """
    tokenizer = from_pretrained(transformers.AutoTokenizer, name)
    end = tokenizer.eos_token  # GPT-2's is its unknown token, too, and is an end all the same
    if not end or tokenizer.eos_token_id is None or (end == tokenizer.unk_token and "unk" in end):
        raise UserError(
            f"{name}: its tokenizer has no end-of-sequence token, so that no answer could end; "
            "set eos_token in its tokenizer_config.json, or give another model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def from_pretrained(auto_class, name, **options):
    """`auto_class.from_pretrained(name)`; UserError if it fails (missing, gated, an adapter)."""
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(
            f"{name} is a PEFT adapter, not a whole model; give its base model, or merge it first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    transformers.utils.logging.set_verbosity_error()  # what it reports, load_weights says in a line
    transformers.utils.logging.disable_progress_bar()  # seconds of loading; the lesson's have bars
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:  # hub, files and formats each raise their own kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"cannot load {name} ({reason}); give a local folder (01_data.py --model FOLDER, or "
            "--judge FOLDER), for a gated model run hf auth login, for a damaged 02_base run "
            "02_finetune.py again"
        ) from None


def load_weights(auto_class, name, **options):
    """A model of `auto_class`, every weight of it from the checkpoint `name`.

    transformers fills what a checkpoint lacks with random numbers, and drops what it has too
    much. Raises UserError for any missing, left-over or mis-shaped tensor, and for an adapter.
    """
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    model, info = from_pretrained(auto_class, name, **options)
    for what, keys in (
        ("missing from the checkpoint", info["missing_keys"]),
        ("left over in the checkpoint", info["unexpected_keys"]),
        ("of another shape", info["mismatched_keys"]),
    ):
        if keys:
            keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            more = ", ..." if len(keys) > 2 else ""
            raise UserError(
                f"{name} does not fit {type(model).__name__}: {len(keys)} weights {what} "
                f"({', '.join(keys[:2])}{more}); give a checkpoint of this "
                "class"
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name} is a PEFT adapter, not a whole model; give its base model")
    return model


def load_model(run, data, device, as_given=False):
    """The frozen base model of the run, in eval mode on `device`, and its tokenizer.

    It comes from RUN/02_base if stage 2 makes one (and not `as_given`), else from a folder or the
    hub; in bfloat16 on a CUDA GPU, else as stored (laptop: in float32, which a CPU does faster).
    Raises UserError if that fails.
    """
    config = data["config"]
    source = config["model"] if as_given else model_source(run.folder, config)
    if source == run.folder / "02_base" and not (source / "model.safetensors").is_file():
        raise UserError(f"{source} is missing; run: {run.command('02_finetune')}")
    tokenizer = load_tokenizer(source)
    dtype = torch.bfloat16 if device.type == "cuda" else "auto"
    model = load_weights(transformers.AutoModelForCausalLM, source, dtype=dtype)
    if not as_given:
        run.parents[BASE_MODEL] = run.digest(BASE_MODEL, config)
    if model.dtype == torch.float16 or (  # its gradients under- and overflow
        device.type != "cuda" and config["preset"] == "laptop"
    ):
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
    would round most of a small eps away; there the adapter runs beside each layer.

    Args:
        adapter: {"<module>.lora_A": (r, in), "<module>.lora_B": (out, r)}, or empty.
    """
    handles, saved = [], []
    try:
        for name in [n.removesuffix(".lora_A") for n in adapter if n.endswith(".lora_A")]:
            module = model.get_submodule(name)
            A, B = (adapter[f"{name}.lora_{x}"].to(module.weight.device) for x in "AB")
            if module.weight.dtype == torch.float32:
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

    Raises UserError if template is "chat" and the tokenizer has none, or several and no default.
    """
    if template != "chat":
        return TEMPLATES[template][bool(input)].format(instruction=instruction, input=input)
    turn = {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}
    found = tokenizer.chat_template
    if not found or (isinstance(found, dict) and "default" not in found):
        there = f"{len(found)} but no default ({', '.join(found)})" if found else "none"
        raise UserError(f"--template chat: this checkpoint has {there}; use --template alpaca")
    try:
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's errors are of many kinds
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--template chat: the checkpoint's chat template fails ({reason}); use --template "
            "alpaca"
        ) from None
    if instruction.strip() not in text:
        raise UserError(
            "--template chat: the checkpoint's chat template leaves out what the user says; use "
            "--template alpaca"
        )
    return text


def prompt_ids(tokenizer, prompt, template, room=None):
    """Tokens of a prompt, ready to be answered: a list of ids, at most `room` of them.

    A chat template writes its special tokens into the text, so none are added; other prompts get
    those the tokenizer puts in front (BOS), and none behind, where an end token would tell the
    model that all is said. What exceeds `room` is cut from the left, after the leading ones.
    """
    chat = template == "chat"  # elsewhere a "</s>" that a user writes is text
    options = dict(add_special_tokens=not chat, split_special_tokens=not chat, verbose=False)
    ids = tokenizer(prompt, **options)["input_ids"]
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}  # GPT-2's are its unknown token, too
    special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - marks)
    if template != "chat":
        while ids and ids[-1] in special:
            ids.pop()
    if room is not None and len(ids) > room:
        head = list(itertools.takewhile(special.__contains__, ids))[: room - 1]
        ids = head + ids[len(ids) - (room - len(head)) :]
    return ids


def encode(tokenizer, rows, max_length, template):
    """Tokenize rows for training: [(ids, labels)], the prompt masked with -100, EOS at the end.

    What exceeds `max_length` tokens is cut from the left of the prompt (its BOS stays); an answer
    keeps at least half of them, without EOS if it is cut.
    """
    examples = []
    for row in rows:
        options = dict(add_special_tokens=False, split_special_tokens=True)
        reply = tokenizer(row["response"], **options)["input_ids"]
        asked = prompt_ids(tokenizer, row["prompt"], template)
        room = max(max_length // 2, max_length - len(asked))
        reply = (reply + [tokenizer.eos_token_id])[:room]
        ids = prompt_ids(tokenizer, row["prompt"], template, max_length - len(reply))
        examples.append((ids + reply, [-100] * len(ids) + reply))
    return examples


def collate(examples, pad_id, device):
    """Right-pad examples to a batch: {"input_ids": (B, T), "labels": (B, T)}.

    No attention mask is needed: under causal attention no real token sees the padding after it,
    and padding has no label.
    """

    def padded(rows, value):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids, labels = zip(*examples)
    return {"input_ids": padded(ids, pad_id).to(device), "labels": padded(labels, -100).to(device)}


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
def generate(model, tokenizer, prompts, template, max_new_tokens, batch_size):
    """Greedy answers to `prompts`, in their order, without the prompt and the special tokens.

    Batches hold prompts of similar length, left-padded; a prompt too long for the context loses
    its left. An answer is the same as that of the prompt alone (float32; bfloat16 may round to
    another word).

    Returns:
        (texts, ended): the answers, and whether each ended by itself before max_new_tokens.
    Raises:
        UserError: max_new_tokens alone fills the context.
    """
    context = getattr(model.config, "max_position_embeddings", None) or 2048
    if context - max_new_tokens < 2:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in a context of "
            f"{context} tokens; use a smaller one"
        )
    asked = [prompt_ids(tokenizer, text, template, context - max_new_tokens) for text in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(asked[i]), reverse=True)
    stops = torch.tensor(model.generation_config.eos_token_id).to(model.device)
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [asked[i] for i in part]}, return_tensors="pt")
        out = model.generate(**batch.to(model.device), max_new_tokens=max_new_tokens)
        new = out[:, batch["input_ids"].shape[1] :]  # (B, at most max_new_tokens)
        stopped = torch.isin(new, stops).any(1).tolist()
        for i, text, stop in zip(
            part, tokenizer.batch_decode(new, skip_special_tokens=True), stopped
        ):
            texts[i], ended[i] = text.strip(), stop
    return texts, ended


def _quiet_worker():
    """What a process of `in_processes` does first: one thread, and leave Ctrl-C to its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _saved(function, job):
    """function(*job) as bytes: tensors sent one by one would exhaust a process's open files."""
    buffer = io.BytesIO()
    torch.save(function(*job), buffer)
    return buffer.getvalue()


def in_processes(function, jobs):
    """[function(*job) for job in jobs], one process of one thread for each core.

    For the toy, whose matrices are too small for two threads to share. `function` must be a
    module's own, and return what torch.load(weights_only=True) reads.
    """
    count = min(len(jobs), os.cpu_count() or 1)
    if count < 2:
        return [function(*job) for job in jobs]
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit locked threads
    with spawn.Pool(count, initializer=_quiet_worker) as pool:
        parts = pool.map(partial(_saved, function), jobs, chunksize=1)
        pool.close()
        pool.join()  # so that they end by themselves, with nothing left to clear up
    return [torch.load(io.BytesIO(part), weights_only=True) for part in parts]
