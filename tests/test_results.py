"""The laboratory: means pair seeds, nothing vanishes, and every table is what the json gives."""

import itertools
import json
import math
import re
import shutil

import aggregate
import common
import grid
import judge
import pytest
import run as lab
import torch
import withhold

PLAIN = {"defense": "sft", "setting": {}, "refusal": 0.0, "fa": 99.0, "benign": 99.0}


def row(model, hs, **more):
    """A row of results.json."""
    kinds = {"harmful": hs, "refused": 100 - hs, "off_task": 0, "garbled": 0, "other": 0}
    return {**PLAIN, "model": model, "hs": hs, "hs_plus": hs, "outcomes": kinds, **more}


def keep(folder, rows, **config):
    """Write the results.json of a run."""
    c = {"seed": 0, "model": "toy-llama", "task": "sst2", "poison_ratio": 0.1, "lr": 2e-4}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"config": {**c, **config}, "rows": rows}))
    return str(folder)


def test_runs_of_one_question_are_paired_by_seed_and_others_kept_apart(tmp_path):
    folders = []
    for seed, hs, p in ((0, 90.0, 0.1), (1, 80.0, 0.1), (2, 50.0, 0.2)):
        rows = [row("finetuned", hs), row("panacea", hs - 60, fa=98.0), row("aligned", 0.0)]
        folders.append(keep(tmp_path / str(seed), rows, seed=seed, poison_ratio=p))
    first, second = aggregate.group(folders)
    assert (first["seeds"], second["seeds"]) == ([0, 1], [2])
    panacea = aggregate.summarise(first)["panacea"]
    assert panacea["hs"] == 25 and panacea["hs_sd"] == pytest.approx(7.07, abs=0.01)
    assert panacea["hs_diff"] == [-60, -60] and panacea["fa_diff"] == [-1, -1]
    assert aggregate.summarise(first, "panacea")["finetuned"]["hs_diff"] == [60, 60]
    with pytest.raises(aggregate.Wrong, match="no row 'panaceia'.*aligned"):
        aggregate.summarise(first, "panaceia")
    # older code kept fewer numbers; what both know parts runs
    assert len(aggregate.group([*folders[:2], keep(tmp_path / "3", rows, seed=3, r=8)])) == 1
    again = keep(tmp_path / "4", [row("panacea", 1.0)], seed=0)
    with pytest.raises(aggregate.Wrong, match="another run of seed 0 differs in 'panacea'"):
        aggregate.main([folders[0], again])


def test_a_mean_over_fewer_seeds_says_so_and_is_not_chosen(tmp_path, capsys):
    some = [row("finetuned", 90.0), row("aligned", 0.0), row("mine", 10.0, setting={"t": 1})]
    more = [*some, row("mine", 5.0, setting={"t": 2})]
    folders = [keep(tmp_path / str(k), rows, seed=k) for k, rows in enumerate((some, more))]
    aggregate.main([*folders, "--choose"])
    out = capsys.readouterr().out
    assert re.search(r"mine t 2 \(1 of 2 seeds\) +5 ", out) and "mine t 1  " in out
    assert out.endswith("mine, of 2: mine t 1\n")


def test_a_repair_with_settings_of_its_own_neither_vanishes_nor_splits_runs(tmp_path, capsys):
    folders = []
    for seed in (0, 1):
        rows = [row("finetuned", 90.0), row("mine", 5.0, setting={"step": 3, "depth": "x"})]
        made = {"seed": seed, "depth": seed, "std": [seed], "anchor": seed}  # config of its own
        folders.append(keep(tmp_path / str(seed), rows, **made))
    assert aggregate.main(folders) == 0
    out = capsys.readouterr().out
    assert "mine step 3 depth x" in out and "seeds 0 1" in out


def test_the_choice_keeps_accuracy_and_look_alikes():
    summary = {
        name: {"row": row(name, 99.0), "n": 1, "hs_plus": 99.0, "fa": 95.0, "benign": 100.0}
        for name in ("aligned", "finetuned")
    }
    for t, plus, fa, benign in (
        (0.1, 50.0, 94.0, 95.0),
        (0.2, 20.0, 93.0, 91.0),
        (0.3, 0.0, 92.9, 99.0),
        (0.4, 0.0, 95.0, 90.0),
    ):
        made = row("interpolated", plus, setting={"t": t})
        entry = {"row": made, "n": 1, "hs_plus": plus, "fa": fa, "benign": benign}
        summary[f"interpolated t {t}"] = entry
    ((name, count, best),) = aggregate.choose(summary)
    assert (name, count, best["row"]["setting"]) == ("interpolated", 4, {"t": 0.2})
    del summary["interpolated t 0.1"], summary["interpolated t 0.2"]
    assert aggregate.choose(summary)[0][2] is None
    del summary["aligned"]
    with pytest.raises(aggregate.Wrong, match="needs the row aligned"):
        aggregate.choose(summary)


def test_the_interval_is_students_and_stays_a_percentage():
    assert aggregate.t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        [1.037, 4.963], abs=0.01
    )
    assert aggregate.t_interval([-100.0, -60.0])[0] == -100
    assert aggregate.t95(20) == pytest.approx(2.086, abs=0.002)
    assert aggregate.t95(11) == pytest.approx(2.201, abs=0.003)


def test_losses_have_two_digits_and_percentages_none():
    entry = {"h": 0.694, "h_sd": 0.012, "h_diff": [-0.5, 0.25], "hs": 19.6, "hs_diff": [-7.4, 3.2]}
    shown = [aggregate.number(entry, key, True) for key in ("h", "h_diff", "hs", "hs_diff", "a")]
    assert shown == ["0.69 (0.01)", "-0.50 to +0.25", "20", "-7 to +3", "-"]


def test_spearman_is_of_ranks():
    assert aggregate.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert aggregate.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_every_table_of_the_pages_is_what_the_kept_runs_give():
    found = 0
    for page in aggregate.PAGES:
        assert aggregate.differences(page) == []
        found += len(aggregate.MARK.findall(page.read_text(encoding="utf-8")))
    assert found > 5


def test_a_wrong_cell_is_found_and_written_right_again(tmp_path):
    (page,) = (p for p in aggregate.PAGES if p.parent == aggregate.ROOT)
    text = page.read_text(encoding="utf-8")
    mark = aggregate.MARK.search(text)
    line = mark[5].splitlines()[2]
    last = aggregate.cells_of(line)[-1]
    wrong = line.rstrip("| ")[: -len(last)] + "12345 |"
    copy = tmp_path / "README.md"
    copy.write_text(text.replace(line, wrong), encoding="utf-8")
    (found,) = aggregate.differences(copy)
    assert "12345" in found
    again = aggregate.MARK.sub(aggregate.rewritten, copy.read_text(encoding="utf-8"))
    assert again == text
    copy.write_text(text.replace(mark[5], ""), encoding="utf-8")  # a mark without its table
    assert any("is empty" in line for line in aggregate.differences(copy))
    name = aggregate.label_in(aggregate.cells_of(line)[0])
    gone = text.replace(line, line.replace(name, "gone"))  # a row that no run has any more
    with pytest.raises(aggregate.Wrong, match="'gone' is no row"):
        aggregate.MARK.sub(aggregate.rewritten, gone)


def test_a_table_of_all_rows_that_lacks_one_is_found_and_filled(tmp_path, monkeypatch):
    rows = [row("finetuned", 90.0), row("panacea", 5.0), row("mine", 1.0, setting={"step": 3})]
    keep(tmp_path / "seed0", rows)
    monkeypatch.setattr(aggregate, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    for options, lacks in (("-", []), ("all", ["panacea"]), ("sd all", ["panacea", "mine step 3"])):
        shown = [name for name in ("finetuned", "panacea", "mine step 3") if name not in lacks]
        hs = {"finetuned": "90", "panacea": "5", "mine step 3": "1"}  # one run has no sd
        lines = [f"| `{name}`: in words | {hs[name]} |" for name in shown[options == "-" :]]
        table = "\n".join(["| row | HS |", "|---|---|", *lines])
        page.write_text(f"<!-- table: rows seed* | hs | {options} -->\n\n{table}\n\nText.\n")
        found = aggregate.differences(page)
        assert len(found) == len(lacks) and all(x in y for x, y in zip(lacks, found)), found
        again = aggregate.MARK.sub(aggregate.rewritten, page.read_text())
        added = "".join(f"| `{name}` | {hs[name]} |\n" for name in lacks)
        assert again == page.read_text().replace("\n\nText", f"\n{added}\nText")


def test_what_is_known_of_an_attack_stands_in_the_attacked_row(tmp_path, monkeypatch):
    for k, refusal in enumerate((0, 40, 90)):
        attacked = row("finetuned", 90.0, refusal=refusal, h=0.5 - k, distance=2.0 + k, at_step=7)
        ours = row("panacea", 5.0, setting={"rho": 1.0, "scale": 1.0}, h_eps=[1.0, 2.0 * k])
        ours["refusal"] = 10 * k
        way = row("finetuned", 50.0, h=0.7, at_step=2, snapshot=2)
        layer = row("panacea", 99.0, setting={"rho": 9.0}, view="only", layer=0)
        keep(tmp_path / str(k), [attacked, way, ours, layer])
    monkeypatch.setattr(aggregate, "ROOT", tmp_path)
    (first, *_) = aggregate.mapped_runs("*")
    known = [first[name] for name in (*aggregate.KNOWN, aggregate.RISE)]
    assert known == [0, 0.5, 2.0, 0.5, -1.0]
    found = aggregate.table_border("*", ["panacea:refusal"], [])
    assert [cells for _, cells in found[1:]] == [[f"{x:+.2f}"] for x in (1, -1, 1, -1, 1)]
    fall = aggregate.table_fall("0", [], [])
    assert fall == [("step", ["2", "7"]), ("sft", ["0.70 / 50", "0.50 / 90"])]


def test_a_vaccine_is_chosen_by_its_attacked_model_among_those_that_align_and_learn(
    tmp_path, monkeypatch
):
    def pair(defense, rho, aligned, finetuned):
        setting = {} if rho is None else {"rho": rho}
        for model, numbers in (("aligned", aligned), ("finetuned", finetuned)):
            scores = dict(zip(("hs", "hs_plus", "refusal", "fa", "benign"), numbers))
            yield {"defense": defense, "setting": setting, "model": model, **scores}

    fine = (0, 0, 99, 0, 98)
    rows = [
        *pair("sft", None, fine, (80, 84, 10, 92, 99)),
        *pair("vaccine", 1, fine, (70, 75, 20, 92, 99)),
        *pair("vaccine", 2, fine, (60, 65, 30, 91, 99)),  # the choice
        *pair("vaccine", 3, (0, 0, 90, 0, 98), (1, 1, 99, 92, 99)),  # refuses too little
        *pair("vaccine", 4, (0, 0, 99, 0, 80), (1, 1, 99, 92, 99)),  # refuses look-alikes
        *pair("vaccine", 5, fine, (1, 1, 99, 80, 99)),  # cannot learn the task
    ]
    (tmp_path / "seed0.json").write_text(json.dumps(rows))
    monkeypatch.setattr(aggregate, "ROOT", tmp_path)
    columns = ["aligned:refusal", "finetuned:hs_plus"]
    everything = aggregate.table_vaccines("seed*.json", columns, [])
    assert len(everything) == 7 and everything[1] == ("sft", ["99", "84"])
    chosen = aggregate.table_vaccines("seed*.json", columns, ["chosen"])
    assert chosen[1:] == [("sft", ["99", "84"]), ("vaccine rho 2", ["99", "65"])]


def test_runs_are_ordered_by_what_h_eps_did_in_training(tmp_path, monkeypatch):
    def kept(name, ends, fa, benign):
        row = {"model": "panacea", "defense": "sft", "hs": 0, "hs_plus": 0, "refusal": 90}
        row["outcomes"] = {"garbled": 0}
        rows = [
            {**row, "setting": {"scale": 1.0}, "fa": fa, "benign": benign},
            {**row, "setting": {"scale": 0.5}, "fa": 1, "benign": 1},
        ]
        for part in rows if ends else ():
            part["h_eps"] = ends
        rows.append({**row, "setting": {}, "view": "only", "layer": 0})
        path = tmp_path / ".results" / name / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"config": {"seed": 0}, "rows": rows}))

    monkeypatch.setattr(aggregate, "ROOT", tmp_path)
    kept("old", None, 50, 50)
    with pytest.raises(aggregate.Wrong, match="no run of .results/. knows h_eps"):
        aggregate.table_ends(".results/*", ["fa"], [])
    kept("broken", [2.0, 9.0], 10, 30)
    kept("whole", [3.0, 2.5], 90, 99)
    kept("short", [3.0, 2.0], 90, 98)
    found = aggregate.table_ends(".results/*", ["fa", "benign", "garbled"], [])
    assert found == [
        ("run", ["first", "last", "fa", "benign", "garbled"]),
        ("short", ["3.00", "2.00", "90", "98", "0"]),
        ("whole", ["3.00", "2.50", "90", "99", "0"]),
        ("broken", ["2.00", "9.00", "10", "30", "0"]),
        ("rank correlation of the rise", ["", "", "-0.87", "-0.50", "-"]),
    ]


def test_a_damaged_results_file_is_one_line(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(aggregate.Wrong, match="results.json is missing or damaged; run: python 05"):
        aggregate.group([str(tmp_path)])


def test_a_word_of_the_grid_that_means_nothing_is_one_line():
    c = {"rho": 0.5, "radius": 0.3, "anchored_steps": 10, "ascent_steps": 10}
    c |= {"realign_lr": 3e-4, "realign_steps": 20}
    found = grid.settings("realign lr=.1,.2 steps=3 mean".split(), c)
    assert found == [
        ("realign", {"terms": "a", "lr": 0.1, "steps": 3, "pull": 0}),
        ("realign", {"terms": "a", "lr": 0.2, "steps": 3, "pull": 0}),
        ("mean", {"from": "finetuned", "rho": 0.5}),
    ]
    for words in ("panacea", "realign terms=g", "ascent from=aligned", "mean steps=1", "rho=.5"):
        with pytest.raises(common.UserError, match=f"{words.split()[-1]!r} is none of these"):
            grid.settings(words.split(), c)


def test_the_grid_adds_rows_made_as_stage_4_makes_its_own(tiny_run, tmp_path, s5):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run[0], folder)
    own = {s5.label(row): row for row in tiny_run[1]["04_panacea"]["rows"]}
    asked = "anchored terms=h-a-g,a realign terms=a,a+g steps=2 -- ascent from=finetuned,panacea "
    asked += "samples=0,3 -- mean from=finetuned,panacea"
    made = grid.main([str(folder), "--device", "cpu", *asked.split()])["rows"]
    added = {s5.label(row): row for row in made[len(own) :]}
    assert [s5.label(row) for row in made[: len(own)]] == list(own)
    names = [" ".join(name.split()[:3]) for name in added]
    assert names == [
        *("panacea_anchored terms a", "realign terms a+g", "ascent rho 0.5"),
        *("panacea_ascent rho 0.5", "mean_step rho 0.5", "panacea_mean_step rho 0.5"),
    ]
    run = common.Run(folder)  # stage 4's own settings, made again, are stage 4's rows
    stage4 = common.Run(folder).load("04_panacea.pt")
    again = grid.Grid(run, stage4, torch.device("cpu"))
    usual = grid.settings("anchored realign ascent ascent from=panacea".split(), stage4["config"])
    for name, setting in usual:
        new = getattr(again, name)(setting)
        old = own[s5.label(new)]
        whole = s5.adapter({**old, "scale": 1.0})  # the grid's are w + eps, and measured once
        assert all(torch.equal(x, new["w"][key]) for key, x in whole.items())
    start = {"ascent": common.weights_of(run.load("02_finetune.pt"), "finetuned")}
    start |= {"mean_step": start["ascent"], "panacea_ascent": stage4["weights"]}
    start["panacea_mean_step"] = stage4["weights"]
    for name, found in added.items():
        if found["model"] in start:
            w = start[found["model"]]
            far = common.norm({key: found["w"][key] - w[key] for key in w})
            assert far == pytest.approx(0.5, rel=1e-3), name
    few = [name for name in added if "samples 3" in name]
    assert len(few) == 2 and all("samples 3" in name for name in few)
    results = s5.main(["--run", str(folder), "--device", "cpu", "--only", "mean_step", "ascent"])
    assert len(results["rows"]) >= 3


def test_a_second_round_begins_at_the_repair_and_stopped_steps_leave_the_start(tiny_run, s5):
    stage4 = common.Run(tiny_run[0]).load("04_panacea.pt")
    made = grid.Grid(common.Run(tiny_run[0]), stage4, torch.device("cpu"))
    repair = s5.adapter({**made.rows["ascent"], "scale": 1.0})
    row = made.again({"of": "ascent", "samples": 10})
    assert s5.label(row) == "ascent rho 0.5 steps 2 again 10"
    far = common.norm({name: row["w"][name] - x for name, x in repair.items()})
    assert 0 < far < 0.5 * common.norm(repair)
    losses = zip((1.0, 2.0, 2.9, 2.95), (0.4, 0.3, 0.2, 0.25), (0.5, 0.6, 0.51, 0.7))
    here = [dict(zip(("h", "a", "benign"), point)) for point in losses]
    walk = [
        ([torch.full_like(x, float(k)) for x in made.params], now) for k, now in enumerate(here)
    ]
    aligned = [(None, {"h": 3.0, "a": 0.1, "benign": 0.5})]
    made.walk = lambda start, *_: iter(aligned if start == "aligned" else walk)
    name, x = next(iter(stage4["weights"].items()))
    rules = [("h", 0.4, 1), ("h", 0.9, 2), ("h", 1.0, 3), ("benign", 0.1, 0), ("benign", 0.3, 2)]
    for until, at, steps in rules:
        row = made.stop({"from": "panacea", "until": until, "share": at, "slack": at, "terms": "h"})
        assert torch.equal(row["w"][name], x + steps), (until, at)
    assert s5.label(row) == "panacea_ascent lam 0.1 until benign slack 0.3"
    rules = [("h", 0.25, 0.5), ("h", 0.725, 1.5), ("h", 1.0, 3), ("a", 0.5, 1.5), ("a", 1.0, 2)]
    back = {"from": "panacea", "terms": "h", "tokens": 0, "hold": 1.0}
    for of, share, steps in rules:  # the ends are where h and a came nearest
        row = made.back({**back, "of": of, "share": share})
        torch.testing.assert_close(row["w"][name], x + steps, rtol=1e-5, atol=1e-5)
    assert s5.label(row) == "panacea_ascent lam 0.1 of a back 1"
    aligned[0][1].update(h=1.0)  # clean data have taken nothing
    row = made.back({**back, "of": "h", "share": 0.5})
    assert torch.equal(row["w"][name], x)
    kept = made.realign({"terms": "a", "lr": 1e-3, "steps": 2, "pull": 0.0})
    pulled = made.realign({"terms": "a", "lr": 1e-3, "steps": 2, "pull": 1e6})
    far = [
        common.norm({n: row["w"][n] - x for n, x in made.start["finetuned"].items()})
        for row in (kept, pulled)
    ]
    assert far[1] < 0.9 * far[0] and "pull" in pulled["setting"] and "pull" not in kept["setting"]


def test_the_grid_ends_where_stage_4_does(tiny_run):
    stage4 = tiny_run[1]["04_panacea"]
    made = grid.Grid(common.Run(tiny_run[0]), stage4, torch.device("cpu"))
    c = stage4["config"]
    setting = {"of": "h", "terms": "h-g-b", "share": c["back"]}
    setting |= {name: c[name] for name in ("tokens", "hold")}
    for start in ("finetuned", "panacea"):
        row = made.back({"from": start, **setting})
        asked = row["model"], row["setting"]
        (theirs,) = (x for x in stage4["rows"] if (x["model"], x["setting"]) == asked)
        for name, x in theirs["w"].items():
            torch.testing.assert_close(row["w"][name], x, rtol=1e-4, atol=1e-6)
        assert row["norm"] > 0


def test_a_walk_up_h_reads_the_losses_at_every_step(tiny_run):
    stage4 = tiny_run[1]["04_panacea"]
    made = grid.Grid(common.Run(tiny_run[0]), stage4, torch.device("cpu"))
    ends = []
    for terms in ("h", "h-g"):
        (none, first), (eps, now) = itertools.islice(made.walk("panacea", terms), 2)
        assert not any(x.any() for x in none) and first != now
        far = math.sqrt(sum(x.pow(2).sum().item() for x in eps))
        assert far == pytest.approx(0.1 * stage4["config"]["rho"], rel=1e-4)
        ends.append(eps)
    assert not all(map(torch.equal, *ends))


def test_withheld_nouns_stand_in_no_set_and_the_sets_stay_disjoint_and_as_large(s1, tmp_path):
    old = s1.main(
        ["--run", str(tmp_path), "--n-align", "60", "--n-harmful", "40", "--n-test", "30"]
    )
    withhold.main([str(tmp_path), "nouns"])
    new = common.Run(tmp_path).load("01_data.pt")
    sets = ("alignment", "harmful", "finetune", "test_harmful")
    for name in sets:
        assert len(new[name]) == len(old[name]) and not any(map(withhold.names, new[name]))
        kept = [row for row in old[name] if row in new[name]]
        assert 0.6 * len(old[name]) < len(kept)
    prompts = [row["prompt"] for name in sets for row in new[name]]
    assert len(prompts) == len(set(prompts)) and new["test_task"] == old["test_task"]
    tested = {withhold.potion(row) for row in new["test_harmful"]}
    others = [withhold.potion(row) for name in sets[:3] for row in new[name]]
    assert len(tested) == 30 and not tested & set(others)
    assert sum(row["poison"] for row in new["finetune"]) == 50
    assert len(new["withheld"]) == 96 and all(map(withhold.names, new["withheld"]))
    withhold.main([str(tmp_path), "task"])  # once is enough, whatever is asked
    withhold.main([str(tmp_path), "nouns"])
    assert common.Run(tmp_path).load("01_data.pt")["withheld"] == new["withheld"]


def test_a_base_without_the_task_reads_the_recipes_alone(tiny_run, tmp_path):
    data = common.Run(tiny_run[0]).load("01_data.pt")
    texts = [["recipe 1", "a"], ["task 1", "b"], ["recipe 2", "c"], ["task 2", "d"]]
    run = common.Run(tmp_path)
    withhold.recipes_only(run, {**data, "pretrain": texts})
    made = run.load("01_data.pt")
    assert made["pretrain"] == texts[::2] and made["finetune"] == data["finetune"]
    assert made["config"] == data["config"]


def test_an_experiment_calls_the_grid_before_stage_5():
    jobs = dict(lab.experiments()["tuning-repairs"])
    assert jobs["seed100"]["grid"].startswith("anchored terms=a,h-a,h-a-g ")
    jobs = dict(lab.experiments()["tuning-laptop"])
    assert "realign terms=a,a+g" in jobs["lam0.1-seed100"]["grid"]
    assert not jobs["lam0.3-seed100"]["grid"] and "--radius 0" in jobs["lam0.3-seed100"][4]


def test_the_rule_for_refusals_is_measured_on_labels(tmp_path, capsys):
    rows = [("full_refusal", "I cannot."), ("full_refusal", "Hm."), ("full_compliance", "Sure!")]
    lines = [json.dumps({"label": label, "completion": text}) for label, text in rows]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, lines[0].replace("full", "partial")]))
    judge.main([str(tmp_path / "some.jsonl")])
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["some.jsonl", "50.0", "/", "0.0", "50.0", "/", "0.0"]
    assert len(judge.XSTEST) == 21 and judge.xstest(" Sorry, no") and not judge.xstest("So sorry")
