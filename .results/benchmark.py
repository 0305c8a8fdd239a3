"""Speed and memory, as ratios measured side by side in one run: `python .results/benchmark.py`.

What a training step of each method costs (plain fine-tuning = 1), what batching saves when
answering, what a step costs with transformers' Trainer and peft instead (only if peft is
installed; it is no requirement), and how time and peak memory grow with every size of the model.
`--data-dir FOLDER` instead takes the steps on real rows, as the paper's setting has them; `--story`
times the six stages of the default run; `--busy` an excerpt of stage 2 beside a busy process, with
one thread and with two (with `--model`, of that checkpoint); `--memory-7b` steps of a
Llama-2-7B with random weights, on a CUDA GPU.

The toy's data and models with random weights: speed does not depend on what was learnt. A number
is the median of several rounds in turn, [with its range].
"""

import argparse
import contextlib
import importlib
import io
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    attach,
    checkpoint_layers,
    collate,
    draw_batches,
    encode,
    generate,
    load_tokenizer,
    load_weights,
    progress,
    resolve,
)

import torch

STAGES = (
    "01_data",
    "02_finetune",
    "03_random_perturb",
    "04_panacea",
    "05_evaluate",
    "06_layer_analysis",
)


def quietly(job):
    """job() without its progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        job()


def rounds(jobs, count):
    """{name: [seconds per round]}: every job once a round, in turn, after one warm-up round."""
    times = {name: [] for name in jobs}
    for k in range(count + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            quietly(job)
            if k:
                times[name].append(time.perf_counter() - start)
    return times


def table(title, times, base, invert=False, memory=None):
    """Print each job's time relative to `base`, round by round: median and range."""
    print(f"\n{title}")
    for name, seconds in times.items():
        ratios = [b / s if invert else s / b for s, b in zip(seconds, times[base])]
        print(
            f"  {name:36} {statistics.median(ratios):6.2f}x  [{min(ratios):5.2f} "
            f"{max(ratios):5.2f}]  {1000 * statistics.median(seconds):9.1f} ms"
            + (f"  {memory[name] / 2**20:7.1f} MiB" if memory else "")
        )


def peak_bytes(job):
    """Most bytes that CPU tensors held at a time during `job()`, beyond those held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        quietly(job)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Toy:
    """The toy's data, tokens and defaults, and an adapted random model."""

    def __init__(self):
        self.s1, self.s2, self.s4 = (importlib.import_module(STAGES[i]) for i in (0, 1, 3))
        self.c = {"seed": 0}
        for stage in (self.s1, self.s2, self.s4):
            self.c.update(resolve(None, stage.FLAGS, "toy"))
        with tempfile.TemporaryDirectory() as folder:
            self.data = self.s1.main(["--run", folder])
        torch.manual_seed(0)
        self.tokenizer = self.s2.toy_tokenizer(self.data["vocab"])
        self.tokenizer.padding_side = "left"
        self.examples = {
            n: encode(self.tokenizer, self.data[n], self.c["max_length"], "toy")
            for n in ("finetune", "alignment", "harmful")
        }
        self.model = self.fresh()
        self.w = self.s2.add_lora(self.model, self.c["targets"], self.c["r"], self.c["alpha"])

    def fresh(self):
        """A new model without adapter, that answers greedily."""
        import transformers

        model = self.s2.toy_model("toy-llama", len(self.data["vocab"])).eval()
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=[2]
        )
        return model

    def batches(self, name, size, count):
        """The first `count` batches of a set."""
        rows = list(draw_batches(self.examples[name], size, 0, 1))[:count]
        return [collate(x, self.tokenizer.pad_token_id, "cpu") for x in rows]

    def loss(self, batch):
        """Answer loss of the adapted model."""
        return self.s4.answer_loss(self.model, batch)

    def train(self, rule, batches, harmful=None):
        """Stage 2's loop with a rule of stage 2."""
        pairs = list(zip(batches, itertools.cycle(harmful or [None])))
        list(self.s2.train(self.model, self.w, rule, pairs, len(pairs), self.c["lr"], self.c, ""))

    def panacea(self, batches, harmful):
        """Stage 4's loop."""
        pairs = list(zip(batches, itertools.cycle(harmful)))
        self.s4.train(self.loss, self.w, pairs, len(pairs), self.c)


def steps(toy):
    """Five training steps of every method at equal batch sizes."""
    size, large = toy.c["batch_size"], toy.c["harmful_batch_size"]
    user, harmful = (toy.batches(n, size, 5) for n in ("finetune", "harmful"))
    more = toy.batches("harmful", large, 5)
    jobs = {
        name: lambda rule=rule: toy.train(rule, user, harmful)
        for name, rule in toy.s2.RULES.items()
    }
    jobs["panacea"] = lambda: toy.panacea(user, harmful)
    jobs[f"panacea, harmful batch {large} (toy)"] = lambda: toy.panacea(user, more)
    memory = {name: peak_bytes(job) for name, job in jobs.items()}
    table(
        f"training steps, batch {size} for every loss (sft = 1), and peak memory beyond the "
        "model's",
        rounds(jobs, 9),
        "sft",
        memory=memory,
    )


def after_training(toy):
    """What the repairs computed after plain fine-tuning cost, against fine-tuning."""
    c = toy.c
    whole = c["epochs"] * math.ceil(c["n_finetune"] / c["batch_size"])
    tenth = toy.batches("finetune", c["batch_size"], whole // 10)
    size, half = c["batch_size"], c["batch_size"] // 2
    params = list(toy.w.values())
    h, a, g = (
        toy.batches(n, k, 1)[0]
        for n, k in (("harmful", half), ("alignment", size), ("finetune", half))
    )
    harmful = toy.batches("harmful", c["harmful_batch_size"], 1)[0]
    jobs = {
        "a tenth of fine-tuning": lambda: toy.train(toy.s2.sft_rule, tenth),
        "one-shot eps": lambda: toy.s4.perturbation(
            toy.s4.gradient(toy.loss, params, harmful)[0], c["rho"]
        ),
        "anchored eps": lambda: toy.s4.climb(
            toy.loss, params, itertools.repeat((h, a, g)), (1.0, -3.0, -1.0), 1.0, 5
        ),
        "realign": lambda: toy.s4.realign(toy.loss, params, itertools.repeat(a), 20, 1e-3, 0.1),
    }
    table(
        f"a tenth of fine-tuning ({len(tenth)} steps) = 1; the whole of each repair",
        rounds(jobs, 9),
        "a tenth of fine-tuning",
    )


def stories_model(vocab_size):
    """A random Llama of the shape of the stories260K checkpoint."""
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, pad_token_id=0, eos_token_id=[2]
    )
    return model


def answering(toy):
    """Answers in one batch against one prompt at a time."""
    prompts = [row["prompt"] for row in toy.data["test_harmful"]]
    for name, model in (
        ("toy", toy.fresh()),
        ("stories260K's shape", stories_model(len(toy.data["vocab"]))),
    ):
        adapter = {n: 0.05 * x for n, x in toy.s2.copy_of(toy.w).items()} if name == "toy" else {}
        with attach(model, adapter, toy.c["alpha"] / toy.c["r"]):
            together, _ = generate(model, toy.tokenizer, prompts, "toy", 28, 200)
            alone = [generate(model, toy.tokenizer, [p], "toy", 28, 1)[0][0] for p in prompts]
            same = sum(a == b for a, b in zip(together, alone))
            table(
                f"{name}: answering {len(prompts)} prompts ({same} answers identical)",
                rounds(
                    {
                        "one prompt at a time": lambda: [
                            generate(model, toy.tokenizer, [p], "toy", 28, 1) for p in prompts
                        ],
                        "in one batch": lambda: generate(
                            model, toy.tokenizer, prompts, "toy", 28, 200
                        ),
                    },
                    2,
                ),
                "one prompt at a time",
                invert=True,
            )


def against_trainer(s2, fresh, rows, pad_id, c):
    """Steps of 02_finetune.py, and of transformers' Trainer on a peft LoRA, if peft is there.

    Args:
        fresh: makes the model. rows: batches, lists of (ids, labels).
    """
    try:
        import peft
        import transformers
    except ImportError:
        print("\nno comparison with Trainer + peft: pip install peft accelerate")
        return
    lora = peft.LoraConfig(r=c["r"], lora_alpha=c["alpha"], target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.Trainer(
            peft.get_peft_model(fresh(), lora),
            transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=len(rows[0]),
                max_steps=len(rows),
                report_to=[],
                learning_rate=c["lr"],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                max_grad_norm=0,
            ),
            train_dataset=[
                {"input_ids": ids, "labels": labels} for batch in rows for ids, labels in batch
            ],
            data_collator=lambda batch: collate(
                [(r["input_ids"], r["labels"]) for r in batch], pad_id, "cpu"
            ),
        )
        model = fresh()
        w = s2.add_lora(model, c["targets"], c["r"], c["alpha"])

        def ours():
            pairs = ((collate(batch, pad_id, "cpu"), None) for batch in rows)
            list(s2.train(model, w, s2.sft_rule, pairs, len(rows), c["lr"], c, ""))

        jobs = {"02_finetune.py": ours, "Trainer + peft": theirs.train}
        memory = {name: peak_bytes(job) for name, job in jobs.items()}
        table(
            f"{len(rows)} steps of plain fine-tuning, and peak memory beyond the model's",
            rounds(jobs, 5),
            "02_finetune.py",
            memory=memory,
        )


def trainer(toy):
    """Twenty steps on the toy, here and by others."""
    rows = list(draw_batches(toy.examples["finetune"], toy.c["batch_size"], 0, 1))[:20]
    against_trainer(toy.s2, toy.fresh, rows, toy.tokenizer.pad_token_id, toy.c)


def checkpoint(folder, batch_size=10, length=70, answer=30):
    """A real checkpoint: our step, Trainer's and Panacea's, and what share of peak speed it has.

    Random tokens in batches of the laptop preset's size: speed does not depend on what they say.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    s2, s4 = (importlib.import_module(STAGES[i]) for i in (1, 3))
    c = {**resolve(None, s2.FLAGS, "laptop"), **resolve(None, s4.FLAGS, "laptop")}
    tokenizer = load_tokenizer(folder)

    def fresh():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    torch.manual_seed(0)
    ids = torch.randint(100, len(tokenizer) - 100, (3 * batch_size, length)).tolist()
    examples = [(x, [-100] * (length - answer) + x[length - answer :]) for x in ids]
    rows = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    against_trainer(s2, fresh, rows, tokenizer.pad_token_id, c)
    model = fresh()
    params = list(s2.add_lora(model, c["targets"], c["r"], c["alpha"]).values())
    loss = partial(s4.answer_loss, model)
    batch = collate(rows[0], tokenizer.pad_token_id, "cpu")
    with FlopCounterMode(display=False) as counter:
        s4.gradient(loss, params, batch)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    x, y = torch.randn(batch_size * length, width), torch.randn(width, inner)
    repeats = math.ceil(counter.get_total_flops() / (2 * batch_size * length * width * inner))
    jobs = {
        "a gradient of plain fine-tuning": lambda: s4.gradient(loss, params, batch),
        "Panacea's": lambda: s4.panacea_rule(loss, params, batch, batch, c["rho"], c["lam"]),
        "its operations as one matrix product": lambda: [x @ y for _ in range(repeats)],
    }
    table(
        f"{counter.get_total_flops() / 1e9:.0f} GFLOP: the last row is the share of the "
        "matrix product's speed that we reach",
        rounds(jobs, 5),
        "a gradient of plain fine-tuning",
    )
    prompts = [tokenizer.decode(x[:40]) for x in ids[:20]]
    model = fresh()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    table(
        "answering 20 prompts, 20 tokens each",
        rounds(
            {
                "one prompt at a time": lambda: [
                    generate(model, tokenizer, [p], "alpaca", 20, 1) for p in prompts
                ],
                "in one batch": lambda: generate(model, tokenizer, prompts, "alpaca", 20, 20),
            },
            2,
        ),
        "one prompt at a time",
        invert=True,
    )


def exponent(x, y):
    """Slope of log y over log x: y grows like x to this power."""
    x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def panacea_step(s2, s4, width=128, depth=4, length=64, batch=16, rank=16):
    """A function that takes one Panacea gradient on a random Llama of these sizes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    w = list(s2.add_lora(model, ["all"], rank, rank).values())
    ids = torch.randint(4, 400, (batch, length))
    rows = {"input_ids": ids, "labels": torch.where(torch.arange(length) < length // 2, -100, ids)}
    return lambda: s4.panacea_rule(lambda b: s4.answer_loss(model, b), w, rows, rows, 1.0, 0.01)


def scaling(toy):
    """Time and peak memory of one Panacea gradient as each size doubles twice."""
    print(
        "\none Panacea gradient: ms / MiB as a size doubles, and the fitted exponents\n"
        "  (start: width 128, depth 4, length 64, batch 16, rank 16)"
    )
    for name, start in (("width", 128), ("depth", 4), ("length", 64), ("batch", 16), ("rank", 16)):
        sizes = [start, 2 * start, 4 * start]
        jobs = {size: panacea_step(toy.s2, toy.s4, **{name: size}) for size in sizes}
        times = {k: statistics.median(v) for k, v in rounds(jobs, 3).items()}
        memory = {k: peak_bytes(job) for k, job in jobs.items()}
        cells = "  ".join(f"{k}: {1000 * times[k]:.0f} / {memory[k] / 2**20:.0f}" for k in sizes)
        print(
            f"  {name:8} {cells:58} time ^{exponent(sizes, times.values()):.2f}  memory "
            f"^{exponent(sizes, memory.values()):.2f}"
        )
    model, prompts = toy.fresh(), [row["prompt"] for row in toy.data["test_harmful"]]
    counts = [50, 100, 200, 400]
    times = rounds(
        {
            n: lambda n=n: generate(model, toy.tokenizer, (2 * prompts)[:n], "toy", 28, 200)
            for n in counts
        },
        3,
    )
    middle = [statistics.median(times[n]) for n in counts]
    print(
        "  prompts  "
        + "  ".join(f"{n}: {1000 * t:.0f} ms" for n, t in zip(counts, middle))
        + f"   answering time ^{exponent(counts, middle):.2f}"
    )


def llama2_7b():
    """A Llama-2-7B with random bfloat16 weights on the GPU."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def seven_billion():
    """Peak memory and seconds of a training step of Llama-2-7B in the paper's setting.

    Batches of 10 x 256 tokens (half of them answers), LoRA of rank 32 on q, k and v; plain
    fine-tuning and Panacea, without gradient checkpointing and with it.
    """
    s2, s4 = (importlib.import_module(STAGES[i]) for i in (1, 3))
    c = {**resolve(None, s2.FLAGS, "paper"), **resolve(None, s4.FLAGS, "paper")}
    ids = torch.randint(4, 32000, (c["batch_size"], 256), device="cuda")
    answer = torch.arange(256, device="cuda") >= 128
    batch = {"input_ids": ids, "labels": torch.where(answer, ids, -100)}
    model = llama2_7b()
    w = s4.add_lora(model, c["targets"], c["r"], c["alpha"])

    def plain(steps):
        pairs = [(batch, None)] * steps
        list(s2.train(model, w, s2.sft_rule, pairs, steps, c["lr"], c, ""))

    def panacea(steps):
        s4.train(partial(s4.answer_loss, model), w, [(batch, batch)] * steps, steps, c)

    print(f"  {torch.cuda.get_device_name()}")
    for how in ("all activations kept", "gradient checkpointing"):
        if how == "gradient checkpointing":
            checkpoint_layers(model)
        on_gpu(f"plain fine-tuning, {how}", plain)
        on_gpu(f"Panacea, {how}", panacea)


def on_gpu(name, job):
    """Print the peak memory of job(steps) on the GPU, weights included, and a step's seconds."""
    times = {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for steps in (2, 2, 7):  # the first to warm up; the difference leaves out what is once
            start = time.perf_counter()
            quietly(partial(job, steps))
            torch.cuda.synchronize()
            times[steps] = time.perf_counter() - start
    except torch.OutOfMemoryError:
        print(f"  {name:44} out of memory", flush=True)
        return
    held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(
        f"  {name:44} {held / 1e9:6.1f} GB ({reserved / 1e9:.1f} with what is kept for later), "
        f"{(times[7] - times[2]) / 5:.2f} s a step",
        flush=True,
    )


def pieces(texts):
    """A byte-pair tokenizer of 8,000 pieces learnt from `texts`, digits apart as Llama's are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    words.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


def real_steps(folder, count=6):
    """Panacea's gradient against plain fine-tuning's on the paper's rows, in its batches of 10.

    A random Llama of width 256 with LoRA on q, k and v: what counts is how many tokens g and h
    have. A batch is padded to its own longest row, as everywhere here.
    """
    import transformers

    s1, s2, s4 = (importlib.import_module(STAGES[i]) for i in (0, 1, 3))
    c = {**resolve(None, s2.FLAGS, "paper"), **resolve(None, s4.FLAGS, "paper")}
    for task in progress(("sst2", "gsm8k", "agnews", "alpaca"), 4, "tasks"):
        with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
            data = s1.main(
                ["--run", run, "--preset", "paper", "--task", task, "--data-dir", str(folder)]
            )
        tokenizer = pieces(
            [r["prompt"] + r["response"] for r in data["finetune"] + data["harmful"]]
        )
        user, harmful = (
            [
                collate(x, tokenizer.eos_token_id, "cpu")
                for x in draw_batches(
                    encode(tokenizer, data[name], data["config"]["max_length"], "alpaca"),
                    c["batch_size"],
                    0,
                    1,
                )
            ]
            for name in ("finetune", "harmful")
        )
        tokens = [statistics.mean(b["input_ids"].numel() for b in x) for x in (user, harmful)]
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=8000,
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=4,
                num_attention_heads=4,
            )
        ).eval()
        params = list(s4.add_lora(model, c["targets"], c["r"], c["alpha"]).values())
        loss = partial(s4.answer_loss, model)
        table(
            f"{task}: {tokens[0]:.0f} tokens in a batch of g, {tokens[1]:.0f} in one of h (mean "
            "of the epoch, padding included)",
            rounds(
                {
                    "plain fine-tuning": lambda: [
                        s4.gradient(loss, params, g) for g in user[:count]
                    ],
                    "panacea": lambda: [
                        s4.panacea_rule(loss, params, g, h, c["rho"], c["lam"])
                        for g, h in zip(user[:count], harmful)
                    ],
                },
                5,
            ),
            "plain fine-tuning",
        )


def busy(toy):
    """Forty steps of plain fine-tuning, idle and beside a process that never rests."""
    user = list(itertools.islice(itertools.cycle(toy.batches("finetune", 16, 20)), 40))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        idle = statistics.median(rounds({"x": lambda: toy.train(toy.s2.sft_rule, user)}, 3)["x"])
        loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            other = rounds({"x": lambda: toy.train(toy.s2.sft_rule, user)}, 3)["x"]
        finally:
            loop.kill()
        ratio = statistics.median(other) / idle
        print(f"  {threads} thread(s): idle {idle:.2f} s; beside a busy process {ratio:.2f}x")
    torch.set_num_threads(before)


def step_time(folder, threads):
    """Print the median seconds of a gradient of plain fine-tuning on a real checkpoint."""
    import transformers

    torch.set_num_threads(threads)
    s2 = importlib.import_module(STAGES[1])
    model = load_weights(transformers.AutoModelForCausalLM, folder, dtype=torch.float32).eval()
    params = list(s2.add_lora(model, ["all"], 16, 16).values())
    ids = torch.randint(4, model.config.vocab_size, (10, 96))
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(96) < 64, -100, ids)}
    job = {"x": lambda: s2.sft_rule(model, params, batch)}
    rounds(job, 1)
    print(statistics.median(rounds(job, 4)["x"]))


def busy_checkpoint(folder):
    """The same on a real checkpoint, for threads that wait by spinning, or sleep; each alone."""

    def seconds(threads, environment):
        command = [sys.executable, __file__, "--model", folder, "--step", str(threads)]
        environment = {**os.environ, **environment}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    for name, threads, environment in (
        ("two threads that spin", 2, {"GOMP_SPINCOUNT": "300000"}),  # GNU's OpenMP by itself
        ("two threads that sleep", 2, {}),  # as common.py asks
        ("one thread", 1, {}),
    ):
        idle = seconds(threads, environment)
        loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            other = seconds(threads, environment)
        finally:
            loop.kill()
        print(
            f"  {name:23} idle {idle:.2f} s; beside a busy process {other / idle:.2f}x", flush=True
        )


def story():
    """Seconds of each stage of the default run, each in a process of its own."""
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in STAGES:
            start = time.perf_counter()
            subprocess.run(
                [
                    sys.executable,
                    Path(__file__).resolve().parent.parent / f"{name}.py",
                    "--run",
                    folder,
                ],
                check=True,
                capture_output=True,
            )
            seconds = time.perf_counter() - start
            total += seconds
            print(f"  {name:20} {seconds:6.1f} s", flush=True)
    print(f"  {'all':20} {total:6.1f} s")


def main(argv=None):
    """Run all comparisons, or one of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--story", action="store_true", help="time the stages of the default run")
    parser.add_argument("--busy", action="store_true", help="beside a busy process")
    parser.add_argument(
        "--memory-7b",
        action="store_true",
        help="the memory and the seconds of a step of Llama-2-7B, on a CUDA GPU",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="steps on the real rows of this folder (the README says how its files are named)",
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="steps and answers of this checkpoint instead of the toy"
    )
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)  # what --busy --model runs
    args = parser.parse_args(argv)
    if args.step:
        return step_time(args.model, args.step)
    if args.model:
        return busy_checkpoint(args.model) if args.busy else checkpoint(args.model)
    if args.data_dir:
        return real_steps(args.data_dir)
    if args.memory_7b and not torch.cuda.is_available():
        parser.error("--memory-7b needs a CUDA GPU, and none is found here")
    if args.story or args.memory_7b:
        return story() if args.story else seven_billion()
    toy = Toy()
    if args.busy:
        return busy(toy)
    for part in progress((steps, after_training, answering, trainer, scaling), 5, "parts"):
        part(toy)


if __name__ == "__main__":
    main()
