"""Make the runs behind the tables: `python .results/run.py NAME`, two at a time, one thread each.

NAME is one of those that --list prints, each with its number of runs. A run is the six stages in
runs/lab/NAME/RUN, with the rows of grid.py before stage 5 and the nouns that withhold.py takes out
where an experiment asks for them; its results.json and layers.json are then kept, a row a line, in
.results/NAME/RUN. A run that is kept already is not made again, so that an interrupted command
goes on where it was. Runs of one seed share their base model, which depends on it alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STAGES = "01_data 02_finetune 03_random_perturb 04_panacea 05_evaluate 06_layer_analysis".split()
LRS = "1e-4 1.5e-4 2e-4 3e-4 4e-4 6e-4 1e-3".split()  # strengths of the map, weak to complete
SFT = "--defense sft --snapshots 0"
ALL = "--defense sft vaccine repnoise booster"
FEW = {3: "--std 0 --t 0 --share 0", 5: "--scale 0.5 1 --no-causal"}  # the rows of the map
STDS, SCALES = "--std 0.04 0.06 0.07 0.08 0.1", "--scale 0.5 1 1.5"  # more than the defaults
LEAN = {2: SFT, 3: STDS, 5: f"{SCALES} --no-causal"}  # all repairs, plain alignment, no layers


def job(name, grid="", **flags):
    """(name of a run, {stage number, or "grid": flags}); given as s1="--seed 3", s2=..."""
    return name, {"grid": grid, **{int(key[1:]): text for key, text in flags.items()}}


def with_flags(jobs, common):
    """The jobs with the flags of `common`, {stage, or "grid": text}, put before their own."""
    keys = (*range(1, 7), "grid", "withhold")
    return [
        (name, {k: f"{common.get(k, '')} {flags.get(k, '')}".strip() for k in keys})
        for name, flags in jobs
    ]


def experiments():
    """{name: jobs}."""
    tuned, seeds = range(100, 106), range(10)
    found = {"toy": [job(f"seed{s}", s1=f"--seed {s}", s2=ALL, s3=STDS, s5=SCALES) for s in seeds]}
    # direction or training: the 2 x 2 table, the frontier over the radius, the mechanism
    found["direction"] = with_flags(
        [job(f"seed{s}", s1=f"--seed {s}") for s in seeds],
        {
            2: SFT,
            3: STDS,
            "grid": "ascent from=finetuned,panacea rho=.175,.25,.35,.7 "
            "ascent from=finetuned,panacea steps=1,2,5,20 "
            "ascent from=finetuned samples=10,50 mean from=finetuned,panacea",
            5: "--scale 0.25 0.35 0.5 0.7 1 1.5 2 3 --no-causal",
        },
    )
    # the same at harder attacks, and on the other tasks (with a lam that fits) and another model
    beyond = {2: SFT, 3: "--std 0 --share 0", 5: "--scale 0.5 1 --no-causal"}
    beyond["grid"] = (
        "ascent from=finetuned,panacea rho=.25,.35,.7 back from=finetuned,panacea terms=h-g"
    )
    found["direction-attack"] = with_flags(
        [
            job(f"lr{lr}-seed{s}", s1=f"--seed {s}", s2=f"--lr {lr}")
            for s in range(5)
            for lr in ("4e-4", "6e-4", "1e-3")
        ],
        beyond,
    )
    found["direction-tasks"] = with_flags(
        [
            job(f"{task}-seed{s}", s1=f"--seed {s} --task {task}", s4=f"--lam {lam}")
            for s in range(5)
            for task, lam in (("gsm8k", "0.02"), ("alpaca", "0.05"), ("agnews", "0.1"))
        ]
        + [
            job(f"{model}-seed{s}", s1=f"--seed {s} --model toy-{model}")
            for s in range(5)
            for model in ("gemma2", "qwen2")
        ],
        beyond,
    )
    found["direction-poison"] = with_flags(
        [
            job(f"p{p}-seed{s}", s1=f"--seed {s} --poison-ratio {p}")
            for s in range(5)
            for p in ("0", "0.05", "0.2")
        ],
        beyond,
    )
    found["again"] = with_flags(  # the user comes back: does a repair last?
        [job(f"seed{s}", s1=f"--seed {s}") for s in range(5)],
        {
            **beyond,
            "grid": "again of=finetuned,ascent,panacea,panacea_ascent,panacea_anchored,realign",
            5: "--scale 1 --no-causal",
        },
    )
    found["map"] = with_flags(  # where it ends: the attack's strength, depth, lam
        [
            job(f"{task}-lr{lr}-seed{s}", s1=f"--seed {s} --task {task}", s2=f"--lr {lr}")
            for s in range(5)
            for task in ("sst2", "agnews")
            for lr in LRS
        ]
        + [
            job(f"sst2-epochs{d}-seed{s}", s1=f"--seed {s}", s2=f"--align-epochs {d}")
            for s in range(5)
            for d in (2, 4, 8, 16)
        ]
        + [
            job(f"sst2-lam{lam}-seed{s}", s1=f"--seed {s}", s4=f"--lam {lam}")
            for s in range(5)
            for lam in ("0.03", "0.2")
        ],
        {
            2: SFT,
            3: "--std 0 --share 0 --t 0.5",
            "grid": "back from=finetuned,panacea terms=h-g",
            5: "--scale 0.5 1 --no-causal",
        },
    )
    found["tuning-ascent"] = with_flags(  # 24 settings each, as Panacea; and rules
        [job(f"seed{s}", s1=f"--seed {s}") for s in tuned],
        {
            **beyond,
            "grid": "ascent from=finetuned,panacea rho=.25,.35,.5,.6,.7,.85 steps=2,5,10,20 "
            "stop from=finetuned,panacea until=h share=.7,.8,.9,1 "
            "stop from=finetuned,panacea until=benign slack=.003,.01,.03,.1 "
            "realign terms=3a+g lr=1.5e-4,3e-4,6e-4,1e-3 steps=10,20 "
            "realign pull=.1,1 lr=1.5e-4,3e-4,6e-4 steps=10,20 "
            "anchored terms=h-g radius=.1,.2,.3,.5",
            5: "--scale 1 --no-causal",
        },
    )
    back = "back from=finetuned,panacea"  # no radius: until h, or a, is back by a part
    found["tuning-back"] = with_flags(
        [
            job(f"seed{s}", f"{back} of=h,a terms=h,h-g share=.5,.6,.7,.8,.9,1", s1=f"--seed {s}")
            for s in range(100, 103)
        ]
        + [  # what to hold, after a harder attack and on other tasks too
            job(f"{name}-seed{s}", s1=f"--seed {s} --task {task}", s2=attack, s4=f"--lam {lam}")
            for s in range(100, 103)
            for name, task, attack, lam in (
                ("sst2-lr4e-4", "sst2", "--lr 4e-4", 0.1),
                ("agnews", "agnews", "", 0.1),
                ("gsm8k", "gsm8k", "", 0.02),
            )
        ],
        {
            **beyond,
            4: "--radius 0 --realign-lr 0 --back 0",
            "grid": f"{back} terms=h-g tokens=0,1,3,6 {back} terms=h-g-b tokens=0,1,3,6 hold=1 "
            f"{back} terms=h-g-b tokens=3 hold=3,10,30",
            5: "--scale 1 --no-causal",
        },
    )
    found["tuned"] = with_flags(  # the front page: the reports' seeds, with what tuning chose
        [job(f"seed{s}", s1=f"--seed {s}") for s in seeds],
        {
            2: SFT,
            3: STDS,
            "grid": "ascent from=finetuned,panacea rho=.35 steps=20 "
            "back from=finetuned,panacea terms=h,h-g "
            "realign terms=3a+g lr=6e-4 steps=10 realign pull=.1 lr=6e-4 steps=20",
            5: "--scale 1 --no-causal",
        },
    )
    found["withheld"] = with_flags(  # two nouns that stand in no set
        [job(f"seed{s}", s1=f"--seed {s}") for s in range(5)], {**beyond, "withhold": "nouns"}
    )
    found["never-aligned"] = with_flags(  # the control of the mechanism: nothing to bring back
        [job(f"seed{s}", s1=f"--seed {s}") for s in range(5)],
        {**LEAN, 2: f"{SFT} --align-epochs 0"},
    )
    found["toy-tasks"] = with_flags(
        [
            job(f"{task}-seed{s}", s1=f"--seed {s} --task {task}")
            for s in range(5)
            for task in ("gsm8k", "agnews", "alpaca")
        ]
        + [job(f"gemma2-seed{s}", s1=f"--seed {s} --model toy-gemma2") for s in range(5)],
        LEAN,
    )
    found["toy-tasks-lam"] = with_flags(  # the tasks with long answers, with a lam tuned on them
        [
            job(f"{task}-seed{s}", s1=f"--seed {s} --task {task}", s4=f"--lam {lam}")
            for s in range(5)
            for task, lam in (("gsm8k", "0.02"), ("alpaca", "0.05"))
        ],
        LEAN,
    )
    found["toy-poison"] = with_flags(
        [
            job(f"p{p}-seed{s}", s1=f"--seed {s} --poison-ratio {p}")
            for s in range(5)
            for p in ("0", "0.05", "0.15", "0.2")
        ],
        LEAN,
    )
    for task in ("sst2", "agnews"):
        found[f"map-{task}"] = with_flags(
            [
                job(f"lr{lr}-seed{s}", s1=f"--seed {s} --task {task}", s2=f"--lr {lr}")
                for s in range(5)
                for lr in LRS
            ],
            {2: SFT, **FEW},
        )
    found["map-depth"] = with_flags(
        [
            job(f"epochs{d}-seed{s}", s1=f"--seed {s}", s2=f"--align-epochs {d}")
            for s in range(5)
            for d in (2, 4, 8, 16)
        ],
        {2: SFT, **FEW},
    )
    at = {"s2": "--lr 2e-4"}  # as in map-sst2, whose stages 1 to 3 are taken over
    found["map-lam"] = with_flags(
        [
            job(f"lam{lam}-seed{s}", s1=f"--seed {s} --task sst2", **at, s4=f"--lam {lam}")
            for s in range(5)
            for lam in ("0.03", "0.2")
        ],
        {2: SFT, **FEW},
    )
    # Panacea's eight settings, all of eps added; other scales come for nothing
    found["tuning-panacea"] = with_flags(
        [
            job(f"rho{rho}-lam{lam}-seed{s}", s1=f"--seed {s}", s4=f"--rho {rho} --lam {lam}")
            for s in tuned
            for rho in ("0.25", "0.5")
            for lam in ("0.1", "0.2", "0.5", "1")
        ],
        {2: SFT, 3: FEW[3], 4: "--radius 0 --realign-lr 0", 5: "--scale 0.5 1 1.5 --no-causal"},
    )
    # why lam does not carry over to tasks with long answers, and which does
    found["tuning-tasks"] = with_flags(
        [
            job(
                f"{task}-lam{lam}-seed{s}",
                s1=f"--seed {s} --task {task}",
                s4=f"--lam {lam} --radius 0 --realign-lr 0",
            )
            for s in range(100, 103)
            for task in ("gsm8k", "alpaca")
            for lam in ("0.01", "0.02", "0.05", "0.1")
        ],
        {2: SFT, 3: FEW[3], 5: "--scale 0.5 1 --no-causal"},
    )
    found["tuning-repairs"] = with_flags(
        [job(f"seed{s}", s1=f"--seed {s}") for s in tuned],
        {
            2: SFT,
            3: "--std .04 .05 .06 .065 .07 .08 .09 .1 --t .1 .2 .3 .4 .5 .6 .7 .8 "
            "--share .001 .002 .005 .01 .02 .03 .05 .1",
            "grid": "anchored terms=a,h-a,h-a-g radius=.1,.2,.3,.5 steps=5,10 "
            "realign terms=a,a+g lr=1.5e-4,3e-4,6e-4,1e-3 steps=10,20",
            5: "--scale 1 --no-causal",
        },
    )
    found.update(of_a_real_llm())
    return found


def of_a_real_llm():
    """{name: jobs} of SmolLM2: most of an hour each, so few seeds, and the layers on one only."""
    found, laptop = {}, {1: "--preset laptop", 5: "--scale 0.5 1 2"}
    found["laptop-sst2"] = with_flags(
        [job("seed0", s1="--seed 0", s5="--causal")]
        + [job(f"seed{s}", s1=f"--seed {s}") for s in (1, 2)],
        laptop,
    )
    found["direction-laptop"] = with_flags(  # direction or training, and rules that stop
        [job(f"seed{s}", s1=f"--seed {s}") for s in range(5)],
        {
            1: "--preset laptop",
            3: "--std 0 --share 0",
            4: "--radius 0 --realign-lr 0",
            "grid": "ascent from=finetuned rho=1.5 ascent from=panacea rho=.25,.35,.5,.7 "
            "stop from=finetuned,panacea until=h "
            "back from=finetuned,panacea of=h,a share=.7,.8,.9",
            5: "--scale 1",
        },
    )
    for kind, more in (
        ("clean", {1: "--poison-ratio 0"}),
        ("lr4e-5", {2: "--lr 4e-5"}),
        ("agnews", {1: "--task agnews"}),
    ):
        found[f"direction-laptop-{kind}"] = with_flags(found["direction-laptop"], more)
    found["direction-recipes"] = [  # the same, on a base that has not read the task
        (name, {**flags, "withhold": "task"}) for name, flags in found["direction-laptop"][:3]
    ]
    found["laptop-agnews"] = with_flags([job("seed0", s1="--seed 0 --task agnews")], laptop)
    found["laptop-clean"] = with_flags([job("seed0", s1="--seed 0 --poison-ratio 0")], laptop)
    few = {**laptop, 3: FEW[3], 5: "--scale 0.5 1"}
    # the map of lam and the tuning in one; lam = 0 is one_shot
    more = "anchored radius=.2,.3,.5 realign terms=a,a+g lr=3e-4,1e-3"  # once is enough
    found["tuning-laptop"] = with_flags(
        [
            job(
                f"lam{lam}-seed{s}",
                s1=f"--seed {s}",
                s4=f"--lam {lam}" + (lam != "0.1") * " --radius 0 --realign-lr 0",
                grid=(lam == "0.1") * more,
            )
            for s, lams in ((100, "0.1 0.3 0.03 0.01 0.001"), (101, "0.1 0.03"), (102, "0.1 0.03"))
            for lam in lams.split()
        ],
        {**laptop, 3: FEW[3]},
    )
    found["map-laptop"] = with_flags(
        [  # beside the default, 1e-4; this has the paper's ratio to alignment's rate
            job(f"lr4e-5-seed{s}", s1=f"--seed {s}", s5="" if s else "--causal") for s in range(3)
        ],
        {**laptop, 2: "--lr 4e-5", "grid": "realign terms=a+g"},
    ) + with_flags([job("lr4e-4-seed0", s1="--seed 0", s2="--lr 4e-4")], few)
    return found


def compact(content):
    """results.json or layers.json as text with one row a line, so that a diff shows rows.

    Of a model's folder only the last part is kept: the rest says where it lay on one machine.
    """
    content = {**content, "config": dict(content["config"])}
    if Path(content["config"]["model"]).is_dir():
        content["config"]["model"] = Path(content["config"]["model"]).resolve().name
    rows = {key: value for key, value in content.items() if isinstance(value, list)}
    parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items() if k not in rows]
    for key, values in rows.items():
        lines = ",\n".join(json.dumps(rounded(value)) for value in values)
        parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
    return "{" + ",\n".join(parts) + "}\n"


def rounded(value):
    """Numbers with six digits, which is more than any table shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def same_start(flags):
    """Folder for the artifacts of stages 1 to 3 that runs with these flags have in common."""
    code = [(ROOT / f"{name}.py").read_text() for name in (*STAGES[:3], "common")]
    key = json.dumps([code, [flags.get(k, "") for k in (1, 2, 3, "withhold")]])
    return ROOT / "runs/lab/starts" / hashlib.sha256(key.encode()).hexdigest()[:16]


def copy_start(source, target):
    """Copy what stages 1 to 3 wrote; into place by a rename, so that it is there whole."""
    half = Path(f"{target}.{os.getpid()}.{threading.get_ident()}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for path in source.glob("0[123]_*"):
        if path.is_dir():
            shutil.copytree(path, half / path.name)
        elif path.suffix == ".pt":
            shutil.copy2(path, half)
    if not target.exists():
        half.rename(target)


def make(experiment, name, flags, more, until, threads):
    """One run, stage after stage; keeps its results and returns None, or what went wrong.

    A stage whose artifact is in the run's folder is not made again.
    """
    kept, folder = HERE / experiment / name, ROOT / "runs/lab" / experiment / name
    if (kept / "results.json").is_file():
        return None
    words = flags[1].split()
    model = words[words.index("--model") + 1] if "--model" in words else "llama"
    if "laptop" in words:
        model = f"laptop-{words[words.index('--task') + 1] if '--task' in words else 'sst2'}"
        model += "-recipes" * (flags.get("withhold") == "task")  # a base of its own
    base = ROOT / "runs/lab/bases" / f"{model}-{words[words.index('--seed') + 1]}"
    start = same_start({**flags, 1: f"{flags[1]} {more}"})
    if not folder.is_dir() and start.is_dir():
        copy_start(start, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if base.is_dir() and not (folder / "02_base").is_dir():
        shutil.copytree(base, folder / "02_base")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "log", "a") as log:

        def failed(script, words):
            command = [sys.executable, str(script), *words]
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
            return done.returncode

        for k, stage in enumerate(STAGES[:until], 1):
            there = (folder / f"{stage}.pt").is_file()
            if k == 5 and flags.get("grid") and not there:
                if failed(HERE / "grid.py", [str(folder), *flags["grid"].split()]):
                    return f"{experiment}/{name}: grid failed; see {folder / 'log'}"
            words = flags.get(k, "").split() + (more.split() if k == 1 else [])
            if not there and failed(ROOT / f"{stage}.py", ["--run", str(folder), *words]):
                return f"{experiment}/{name}: {stage} failed; see {folder / 'log'}"
            if k in (1, 5) and flags.get("withhold"):
                if failed(HERE / "withhold.py", [str(folder), flags["withhold"]]):
                    return f"{experiment}/{name}: withhold failed; see {folder / 'log'}"
            if k == 2 and not base.is_dir() and (folder / "02_base").is_dir():
                shutil.copytree(folder / "02_base", base, dirs_exist_ok=True)
            if k == 3 and not start.is_dir():
                copy_start(folder, start)
    for file in ("results.json", "layers.json"):
        if (folder / file).is_file():
            text = compact(json.loads((folder / file).read_text()))
            kept.mkdir(parents=True, exist_ok=True)
            (kept / file).write_text(text)
    return None


def main(argv=None):
    """Make the runs of one or several experiments."""
    known = experiments()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name has TEXT")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each run (1)")
    parser.add_argument("--more", default="", metavar="FLAGS", help="more flags for stage 1")
    parser.add_argument("--until", type=int, default=6, metavar="N", help="stop after stage N (6)")
    args = parser.parse_args(argv)
    if args.list or not args.names:
        for name, jobs in known.items():
            print(f"  {name:16} {len(jobs):3} runs")
        return
    from tqdm import tqdm

    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [
            pool.submit(make, experiment, name, flags, args.more, args.until, args.threads)
            for experiment in args.names
            for name, flags in known[experiment]
            if args.only in name
        ]
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="runs"):
            if done.result():
                print(done.result(), file=sys.stderr)


if __name__ == "__main__":
    main()
