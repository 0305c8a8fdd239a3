"""Speed, as ratios measured side by side in one run on one machine: `python tests/benchmark.py`.

Three tables: what a step of each method costs (plain fine-tuning = 1), what batching saves in
evaluation, and what a step costs with transformers' Trainer and peft instead (only if peft is
installed; it is not a requirement). The toy model and the toy's data, random weights: speed does
not depend on what was learnt. Each number is the median of several rounds in turn, with its range.
"""

import importlib
import itertools
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (attach, collate, encode, epoch_batches, generate,  # noqa: E402
                    load_tokenizer, seed_everything, toy_model)


def rounds(jobs, count):
    """{name: [seconds per round]}: every job once a round, in turn, after one warm-up round."""
    times = {name: [] for name in jobs}
    for k in range(count + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if k:
                times[name].append(time.perf_counter() - start)
    return times


def table(title, times, base, invert=False):
    """Print each job's time relative to `base`, round by round: median and range."""
    print(f"\n{title}")
    for name, seconds in times.items():
        ratios = [b / s if invert else s / b for s, b in zip(seconds, times[base])]
        print(f"  {name:34} {statistics.median(ratios):6.2f}x  [{min(ratios):5.2f} "
              f"{max(ratios):5.2f}]  {1000 * statistics.median(seconds):9.1f} ms")


def step_jobs(s2, s4, model, w, batches, c):
    """{method: a function that takes one gradient of it} at equal batch sizes."""
    user, alignment, harmful = batches
    params = list(w.values())

    def loss(batch):
        return s4.answer_loss(model, batch)
    jobs = {name: lambda rule=rule: rule(model, params, alignment, harmful, c)
            for name, rule in s2.RULES.items()}
    jobs["panacea"] = lambda: s4.panacea_rule(loss, params, alignment, harmful, c["rho"], c["lam"])
    return jobs


def trainer_job(data, tokenizer, examples, c, steps):
    """A function that runs `steps` steps of transformers' Trainer on a peft LoRA; None without."""
    try:
        import peft
        import transformers
    except ImportError:
        print("\npeft is not installed: no comparison with Trainer + peft (pip install peft "
              "accelerate)")
        return None
    model = peft.get_peft_model(toy_model("toy-llama", len(data["vocab"])), peft.LoraConfig(
        r=c["r"], lora_alpha=c["alpha"], target_modules="all-linear"))
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in examples]

    def collate_rows(batch):
        return collate([(r["input_ids"], r["labels"]) for r in batch], tokenizer.pad_token_id,
                       "cpu")

    def job():
        with tempfile.TemporaryDirectory() as folder:
            args = transformers.TrainingArguments(
                folder, per_device_train_batch_size=c["batch_size"], max_steps=steps, report_to=[],
                learning_rate=c["lr"], save_strategy="no", logging_strategy="no",
                disable_tqdm=True, use_cpu=True, max_grad_norm=0)
            transformers.Trainer(model, args, train_dataset=rows,
                                 data_collator=collate_rows).train()
    return job


def main():
    """Run all comparisons."""
    s1, s2, s4 = (importlib.import_module(name) for name in ("01_data", "02_finetune",
                                                             "04_panacea"))
    c = {**s1.DEFAULTS["toy"], **s2.DEFAULTS["toy"], **s4.DEFAULTS["toy"], "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        data = s1.main(["--run", folder])
    seed_everything(0)
    tokenizer = load_tokenizer(data)
    examples = {n: encode(tokenizer, data[n], c["max_length"])
                for n in ("finetune", "alignment", "harmful")}
    model = toy_model("toy-llama", len(data["vocab"]))
    plain = toy_model("toy-llama", len(data["vocab"])).eval()
    plain.load_state_dict(model.state_dict())
    w = s2.add_lora(model, c["targets"], c["r"], c["alpha"])
    batches = [collate(examples[n][:c["batch_size"]], tokenizer.pad_token_id, "cpu")
               for n in ("finetune", "alignment", "harmful")]
    jobs = step_jobs(s2, s4, model, w, batches, c)
    table(f"one gradient, batch {c['batch_size']} for every loss (sft = 1)", rounds(jobs, 15),
          "sft")

    prompts = [row["prompt"] for row in data["test_harmful"]]
    weights = s2.copy_of(w)
    with attach(plain, weights, c["alpha"] / c["r"]):
        together = generate(plain, tokenizer, prompts, 28)
        alone = [generate(plain, tokenizer, [p], 28)[0] for p in prompts]
        same = sum(a == b for a, b in zip(together, alone))
        table(f"answering {len(prompts)} prompts ({same} answers identical; times faster)", rounds({
            "one prompt at a time": lambda: [generate(plain, tokenizer, [p], 28) for p in prompts],
            "in one batch": lambda: generate(plain, tokenizer, prompts, 28)}, 2),
            "one prompt at a time", invert=True)

    steps = c["epochs"] * math.ceil(c["n_finetune"] / c["batch_size"])
    tenth = list(epoch_batches(examples["finetune"], c["batch_size"], 2, 0))[:steps // 10]
    half = c["batch_size"] // 2
    draws = [collate(examples[n][:size], tokenizer.pad_token_id, "cpu") for n, size in (
        ("harmful", half), ("alignment", c["batch_size"]), ("finetune", half))]
    table(f"a tenth of fine-tuning ({steps // 10} steps), and the whole anchored eps", rounds({
        "fine-tuning, a tenth": lambda: s2.train(
            model, w, s2.sft_rule, tenth, len(tenth), c["lr"], c, "", tokenizer.pad_token_id),
        "anchored eps": lambda: s4.anchored_perturbation(
            lambda batch: s4.answer_loss(model, batch), list(w.values()),
            itertools.repeat(draws), c["rho"], c["anchor"], c["anchor_steps"])}, 5),
        "fine-tuning, a tenth")

    steps = 20
    job = trainer_job(data, tokenizer, examples["finetune"], c, steps)
    if job:
        ours = [examples["finetune"][i * 16:(i + 1) * 16] for i in range(steps)]
        table(f"{steps} steps of plain fine-tuning", rounds({
            "02_finetune.py": lambda: s2.train(model, w, s2.sft_rule, ours, steps, c["lr"], c, "",
                                               tokenizer.pad_token_id),
            "Trainer + peft": job}, 5), "02_finetune.py")


if __name__ == "__main__":
    main()
