"""The laboratory: means pair seeds, nothing vanishes, and every table is what the json gives."""

import json

import aggregate
import pytest

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
        name: {"row": row(name, 99.0), "hs_plus": 99.0, "fa": 95.0, "benign": 100.0}
        for name in ("aligned", "finetuned")
    }
    for t, plus, fa, benign in (
        (0.1, 50.0, 94.0, 95.0),
        (0.2, 20.0, 93.0, 91.0),
        (0.3, 0.0, 92.9, 99.0),
        (0.4, 0.0, 95.0, 90.0),
    ):
        made = row("interpolated", plus, setting={"t": t})
        entry = {"row": made, "hs_plus": plus, "fa": fa, "benign": benign}
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
    assert shown == ["0.69 (0.01)", "-0.50 to +0.25", "20 (0)", "-7 to +3", "-"]


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
        row = {"defense": "sft", "hs": 0, "hs_plus": 0, "refusal": 90, "outcomes": {"garbled": 0}}
        rows = [
            {**row, "model": "panacea", "setting": {"scale": 1.0}, "fa": fa, "benign": benign},
            {**row, "model": "panacea", "setting": {"scale": 0.5}, "fa": 1, "benign": 1},
            {**row, "model": "panacea", "setting": {}, "view": "only", "layer": 0},
        ]
        config = {"seed": 0, **({"h_eps": ends} if ends else {})}
        path = tmp_path / ".results" / name / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"config": config, "rows": rows}))

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
