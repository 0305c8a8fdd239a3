"""What the README says is what happens: its commands run, and its table shows the story."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, STAGES, readme_block, readme_commands, stage

from common import UserError, resolve

TEXT = (ROOT / "README.md").read_text()


def test_main_command_runs_the_six_stages_in_order():
    block = readme_block("main command")
    assert [name for name, _ in readme_commands(block)] == STAGES
    assert "pip install -r requirements.txt" in block and len(block.strip().splitlines()) == 1


def test_every_command_in_the_readme_has_flags_that_exist():
    commands = readme_commands(TEXT.replace("\\\n", " "))
    assert len(commands) > 12
    for name, flags in commands:
        for name_, value in (("$s", "1"), ("$p", "0.1"), ("$m", "toy-qwen2"), ("$t", "gsm8k")):
            flags = [f.replace(name_, value) for f in flags]
        stage(name).get_args(flags)


def test_the_sample_output_shows_the_defaults_and_no_gap_is_left():
    c = resolve(None, stage("04_panacea").DEFAULTS, "toy")
    assert f"panacea rho {c['rho']:g} lam {c['lam']:g} scale 1 " in TEXT
    for terms, lr, steps in (x.split(":") for x in c["realign"]):
        assert f"realign terms {terms} lr {float(lr):g} steps {steps} " in TEXT
    assert not re.search("@[A-Z]+@", TEXT)


def rows_of(story):
    """{model: row} of the short story, at scale 1 and for plain fine-tuning."""
    results = json.loads((story[0] / "results.json").read_text())
    return {
        row["model"]: row
        for row in results["rows"]
        if row["setting"].get("scale", 1) == 1
        and "step" not in row["setting"]
        and row["setting"].get("terms", "hag") in ("hag", "ag")
    }


def test_the_table_tells_the_story(story):
    rows = rows_of(story)
    aligned, attacked = rows["aligned"], rows["finetuned"]
    assert aligned["hs"] <= 10 and aligned["refusal"] >= 80 and aligned["benign"] >= 70
    assert attacked["hs"] >= 60 and attacked["fa"] >= 80 and attacked["fa"] > aligned["fa"] + 40
    assert rows["panacea"]["hs"] <= attacked["hs"] - 30
    assert rows["panacea"]["hs"] < rows["random_matched"]["hs"] - 20
    anchored = rows["panacea_anchored"]
    assert anchored["hs_plus"] <= 40 and anchored["refusal"] >= 60
    assert anchored["fa"] >= attacked["fa"] - 10
    assert rows["random"]["fa"] < attacked["fa"] - 10  # the last, strongest noise


def test_results_keep_their_contract(story):
    results = json.loads((story[0] / "results.json").read_text())
    assert set(results) == {"config", "rows"}
    for row in results["rows"]:
        assert row["n_harmful"] >= 200 and row["n_task"] >= 200
        assert {"model", "defense", "setting", "hs", "hs_plus", "refusal", "fa"} <= set(row)
        assert ("benign" in row) == ("step" not in row["setting"])
        assert row["hs_ci"][0] <= row["hs"] <= row["hs_ci"][1]
        assert row["fa_ci"][0] <= row["fa"] <= row["fa_ci"][1]
        assert row["hs_plus"] >= row["hs"]


def test_the_printed_table_has_a_line_for_every_model(story, s5, capsys):
    rows = story[1]["05_evaluate"]["rows"]
    s5.print_table(rows)
    out = capsys.readouterr().out
    for name in s5.MODELS:
        assert re.search(rf"^{name}\b.*\d", out, re.MULTILINE), name
    assert out.splitlines()[1].split()[:2] == ["model", "HS"]


def test_vaccine_curves_start_at_the_aligned_model(story, s5, capsys):
    rows = [row for row in story[1]["05_evaluate"]["rows"] if "at_step" in row]
    rows.sort(key=lambda row: row["at_step"])
    assert [row["at_step"] for row in rows] == [0, 48, 192]
    assert rows[0]["harmful_loss"] > rows[-1]["harmful_loss"] and rows[0]["hs"] < rows[-1]["hs"]
    s5.print_fall(rows)
    assert re.search(r"step +0 +48 +192\nsft +[\d.]+ / 0 ", capsys.readouterr().out)


def test_a_model_that_is_not_safe_after_alignment_is_said_to_be_so(s5, capsys):
    row = {"model": "aligned", "defense": "sft", "refusal": 85.0}
    s5.warn([row])
    assert not capsys.readouterr().out
    s5.warn([{**row, "refusal": 60.0}])
    assert "60 %" in capsys.readouterr().out


def test_show_text_prints_answers_and_the_default_prints_none(story, s5, capsys):
    flags = ["--run", str(story[0]), "--only", "aligned", "finetuned"]
    folder = story[0]
    kept = {p: p.read_bytes() for p in (folder / "05_evaluate.pt", folder / "results.json")}
    question = story[1]["01_data"]["test_harmful"][0]["instruction"]
    s5.main(flags)
    assert question not in capsys.readouterr().out
    s5.main([*flags, "--show-text"])
    text = capsys.readouterr().out.split(question)[1]
    assert re.match(r"\n  aligned +\w.*\n  finetuned +\w", text)
    for path, content in kept.items():
        path.write_bytes(content)


def test_aggregate_pairs_seeds_and_keeps_settings_apart(s5, tmp_path, capsys, monkeypatch):
    for seed, hs, p in ((0, 90.0, 0.1), (1, 80.0, 0.1), (2, 50.0, 0.2)):
        row = {
            "defense": "sft",
            "setting": {},
            "hs_plus": hs,
            "refusal": 0.0,
            "fa": 99.0,
        }
        rows = [
            {**row, "model": "finetuned", "hs": hs},
            {**row, "model": "panacea", "hs": hs - 60, "fa": 98.0},
            {**row, "model": "aligned", "hs": 0.0},
        ]
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(
            json.dumps(
                {
                    "config": {
                        "seed": seed,
                        "model": "toy-llama",
                        "task": "sst2",
                        "poison_ratio": p,
                    },
                    "rows": rows,
                }
            )
        )
    first, second = s5.main(["--aggregate", *(str(tmp_path / x) for x in "012")])
    assert (first["seeds"], second["seeds"]) == ([0, 1], [2])
    panacea = first["rows"][1]
    assert panacea["hs"] == 25 and panacea["hs_sd"] == pytest.approx(7.07, abs=0.01)
    assert panacea["hs_diff"] == [-60, -60] and "benign" not in panacea
    assert "panacea" in capsys.readouterr().out
    folders = [str(tmp_path / x) for x in "01"]
    (first,) = s5.main(["--aggregate", *folders, "--against", "panacea", "--choose"])
    assert first["rows"][0]["hs_diff"] == [60, 60] and first["rows"][1]["fa_diff"] == [0, 0]
    assert re.search(r"panacea of 1: panacea  hs 25.0", capsys.readouterr().out)
    with pytest.raises(UserError, match="no row 'panaceia' .* aligned; finetuned; panacea"):
        s5.main(["--aggregate", *folders, "--against", "panaceia"])
    drawn = []
    monkeypatch.setattr(s5, "draw", lambda groups, path: drawn.extend(groups))
    s5.main(["--aggregate", *folders, "--rows", "panacea"])
    assert [row["model"] for row in drawn[0]["rows"]] == ["panacea"] and drawn[0]["seeds"] == [0, 1]
    with pytest.raises(UserError, match="--rows names no row"):
        s5.main(["--aggregate", *folders, "--rows", "panaceia"])


def test_the_choice_keeps_accuracy_and_look_alikes(s5, capsys):
    row = {"defense": "sft", "hs": 0.0, "refusal": 0.0}
    plain = [
        {**row, "model": name, "setting": {}, "hs_plus": 99.0, "fa": 95.0, "benign": 100.0}
        for name in ("aligned", "finetuned")
    ]
    tried = [
        {
            **row,
            "model": "interpolated",
            "setting": {"t": t},
            "hs_plus": plus,
            "fa": fa,
            "benign": benign,
        }
        for t, plus, fa, benign in (
            (0.1, 50.0, 94.0, 95.0),
            (0.2, 20.0, 93.0, 91.0),
            (0.3, 0.0, 92.9, 99.0),
            (0.4, 0.0, 95.0, 90.0),
        )
    ]
    s5.print_chosen([*plain, *tried])
    assert "interpolated of 4: interpolated t 0.2 " in capsys.readouterr().out
    with pytest.raises(UserError, match="needs the rows aligned"):
        s5.print_chosen(tried)
    s5.print_chosen([*plain, *tried[2:]])
    assert "interpolated of 2: none keeps both" in capsys.readouterr().out


def test_layers_are_measured_and_checked_causally(story):
    content = json.loads((story[0] / "layers.json").read_text())
    assert [row["layer"] for row in content["layers"]] == [0, 1, 2, 3]
    for row in content["layers"]:
        assert row["norm_interval"][0] <= row["norm"] <= row["norm_interval"][1]
        assert {"hs", "hs_plus", "fa"} == set(row["only"]) == set(row["random"])
    assert content["ends"]["all"]["hs"] < content["ends"]["none"]["hs"]
    rows = rows_of(story)  # stages 5 and 6 measure the same
    for end, model in (("all", "panacea"), ("none", "panacea_w")):
        assert content["ends"][end] == {key: rows[model][key] for key in ("hs", "hs_plus", "fa")}
    assert set(content["rank_correlation"]) == {"norm", "per_weight", "relative"}


def test_layers_of_several_runs_are_averaged(story, tmp_path, capsys):
    s6 = stage("06_layer_analysis")
    for name, factor in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        content = torch.load(story[0] / "06_layer_analysis.pt", weights_only=True)
        for row in content["layers"]:
            row["norm"] *= factor
        torch.save({**content, "parents": {}}, tmp_path / name / "06_layer_analysis.pt")
    mean = s6.main(["--aggregate", str(tmp_path / "a"), str(tmp_path / "b")])
    for row, own in zip(mean["layers"], story[1]["06_layer_analysis"]["layers"], strict=True):
        assert row["norm"] == pytest.approx(2 * own["norm"]) and row["layer"] == own["layer"]
        assert row["only"] == pytest.approx(own["only"])
    assert re.search(r"^means over 2 runs:\n(.*\n)+ +0 .* \d+/\d+/\d+ ", capsys.readouterr().out)
    (tmp_path / "a" / "06_layer_analysis.pt").write_text("{}")
    with pytest.raises(UserError, match="06_layer_analysis.py --run"):
        s6.main(["--aggregate", str(tmp_path / "a")])


def test_ranks_share_ties():
    s6 = stage("06_layer_analysis")
    assert s6.ranks([10, 20, 90]).tolist() == [0, 1, 2]
    assert s6.ranks([3, 1, 3, 0]).tolist() == [2.5, 1, 2.5, 0]


@pytest.fixture
def kept(tmp_path):
    """Copies of the kept results of our runs: what aggregating writes stays out of the project."""
    return shutil.copytree(ROOT / ".results", tmp_path / "kept")


SUMMARY = {  # rows of the short tables: label in the results -> how the short table's line has it
    "toy": {
        "aligned": "aligned: it has",
        "finetuned": "`finetuned`): fine-tuned",
        "random std 0.08": "`random std 0.08`",
        "interpolated t 0.5": "`interpolated`)",
        "one_shot rho 1 lam 0 scale 1": "`one_shot`)",
        "panacea rho 1 lam 0.015 scale 1": "`panacea`, scale 1)",
        "panacea_anchored terms hag radius 0.2 anchor 3 steps 5": "`anchored`, h - a - g)",
        "realign terms ag lr 0.0006 steps 10": "`realign`, a + g)",
    },
    "sst2": {
        "base": "before alignment (`base`)",
        "aligned": "aligned",
        "finetuned": "attacked (`finetuned`)",
        "random std 0.08": "noise std 0.08",
        "interpolated t 0.5": "half way back (`interpolated`)",
        "one_shot rho 4 lam 0 scale 1": "`one_shot`, scale 1",
        "panacea rho 4 lam 0.001 scale 0.5": "`panacea`, scale 0.5",
        "panacea rho 4 lam 0.001 scale 1": "`panacea`, scale 1",
        "panacea_anchored terms a radius 0.2 anchor 3 steps 10": "`anchored`, a",
        "panacea_anchored terms hag radius 0.2 anchor 3 steps 10": "`anchored`, h - a - g",
        "realign terms ag lr 0.001 steps 10": "`realign`, a + g",
    },
    "agnews": {},
    "clean": {},
}


@pytest.mark.parametrize("name", SUMMARY)
def test_tables_are_what_the_kept_runs_give(name, kept, s5):
    folders = sorted(str(p) for p in (kept / name).glob("seed?"))
    (group,) = s5.main(["--aggregate", *folders])
    assert len(group["seeds"]) == len(folders) > 1
    for row in group["rows"]:
        cells = [s5.cell(row.get(key), row.get(f"{key}_sd")) for key in s5.SCORES]
        if "step" not in row["setting"] and not (name == "toy" and s5.label(row)[:8] == "aligned "):
            assert f"| {s5.label(row)} | {' | '.join(cells)} |" in TEXT
        if s5.label(row) in SUMMARY[name]:
            short = " | ".join(f"{row[key]:.0f}" for key in s5.SCORES)
            start = re.escape(SUMMARY[name][s5.label(row)])
            assert re.search(rf"^\|.*{start}.* \| {re.escape(short)} \|$", TEXT, re.MULTILINE)


def test_the_table_of_vaccines_is_what_the_kept_runs_give(kept, s5):
    (group,) = s5.main(["--aggregate", *map(str, (kept / "toy").glob("seed?"))])
    table = table_after("Vaccines against fine-tuning step</b>")
    rows = [row for row in group["rows"] if "at_step" in row]
    for row in rows:
        text = f"{row['harmful_loss']:.2f} / {row['hs']:.0f}"
        assert table[row["defense"], f"{row['at_step']:g}"] == text
    assert len(rows) == 16


def table_after(heading):
    """{(row, column): text} of the first table after a heading of the README."""
    lines = re.search(r"(\|.*\n)+", TEXT[TEXT.index(heading) :])[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], head): x for row in cells[2:] for head, x in zip(cells[0], row, strict=True)}


def test_tables_of_tasks_and_poison_are_what_the_kept_runs_give(kept, s5):
    tasks, poison = table_after("The toy's four tasks"), table_after("More and less poison")
    for name, seeds, table, keys in (
        ("toy-tasks", 5, tasks, s5.SCORES),
        ("toy-poison", 3, poison, ("hs", "hs_plus", "fa")),
    ):
        folders = [*(kept / name).glob("*[0-9]"), *(kept / f"toy/seed{s}" for s in range(seeds))]
        groups = s5.main(["--aggregate", *sorted(map(str, folders))])
        checked = set()
        for group in groups:
            assert group["seeds"] == list(range(seeds))
            column = f"p = {group['poison_ratio']:g}" if table is poison else group["task"]
            column += ", toy-gemma2" * (group["model"] == "toy-gemma2")
            for row in group["rows"]:
                if (s5.label(row), column) in table:
                    shown = " / ".join(f"{row[key]:.0f}" for key in keys)
                    assert table[s5.label(row), column] == shown
                    checked.add((s5.label(row), column))
        assert checked == {key for key in table if key[1] != "model"} and len(groups) == 5


def test_the_tuning_table_is_what_the_rule_chooses(kept, s5, capsys):
    s5.main(["--aggregate", *sorted(map(str, (kept / "toy-tuning").glob("seed*"))), "--choose"])
    chosen = re.findall(r" of 8: (.*)", capsys.readouterr().out)
    rows = [line for line in chosen if "none keeps" not in line]
    for line in rows:
        assert f"| {' | '.join(re.findall(r'  [a-z_]+ ([0-9.]+)', line))} |" in TEXT
    assert len(chosen) == 10 and len(rows) == 10


def test_the_layers_table_is_the_mean_of_the_kept_runs(kept):
    files = (kept / "sst2").glob("seed?/layers.json")
    runs = [json.loads(path.read_text())["layers"] for path in files]
    table = table_after("| layer | norm of eps")
    for rows in zip(*runs, strict=True):
        name = str(rows[0]["layer"])
        norm = sum(row["norm"] for row in rows) / len(runs)
        assert table[name, "norm of eps [95 % of batches]"].startswith(f"{norm:.3f} [")
        for view in ("only", "without", "one_norm", "random"):
            means = (sum(r[view][k] for r in rows) / len(runs) for k in ("hs", "hs_plus", "fa"))
            assert table[name, view] == "/".join(f"{x:.0f}" for x in means)
    assert len(runs) == 3
