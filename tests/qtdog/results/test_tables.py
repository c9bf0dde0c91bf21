import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qtdog.cli import main
from qtdog.errors import UserError
from qtdog.results import collect, table_formats, tables
from qtdog.results.collect import CollectConfig
from qtdog.results.runs import read_card
from qtdog.results.selections import Result
from qtdog.results.statistics import Cell
from tiny import write_card


@pytest.fixture
def card(trained):
    return read_card(trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0")


def made_up(card, method, target, trial, seed, accuracy, nbytes=1_000_000, hparams_seed=0, last=None, **settings):
    """A run that was never trained; `last` is (source validation, target in, target out) at its last step."""
    domains = ["art", "photo"]
    env = domains.index(target)
    config = {**card.config, "method": method, "test_env": env, "trial_seed": trial, "seed": seed, **settings}
    config["hparams_seed"] = hparams_seed
    validation, inner, outer = last or (0.5, accuracy - 0.1, 0.5)
    made = replace(
        card, config=config, dataset="pictures_2", domains=domains, target=target,
        accuracies={f"env{env}_in_acc": accuracy, f"env{1 - env}_out_acc": validation},
        nbytes=nbytes, float_nbytes=4_000_000,
        selection="the best checkpoint", source_validation_accuracy=validation,
    )  # fmt: skip
    record = {"step": 9, f"env{env}_in_acc": inner, f"env{env}_out_acc": outer, f"env{1 - env}_out_acc": validation}
    return Result(Path(f"{method}/{target}/{trial}_{seed}_{hparams_seed}"), made, [record])


def ensemble_record(target, trial, accuracy, **settings):
    env = ["art", "photo"].index(target)
    return {
        "settings": settings, "domains": ["art", "photo"], "env0_out_acc": 0.1, "env1_out_acc": 0.75,
        "test_env": env, f"env{env}_in_acc": accuracy,
        "method": "qtdog", "target": target, "trial_seed": trial, "target_accuracy": accuracy, "members": 2,
        "combine": "logits", "nbytes": 2_000_000, "float_nbytes": 4_000_000, "dataset": "pictures_2",
    }  # fmt: skip


@pytest.fixture
def table(card):
    runs = [
        made_up(card, "erm", "art", 0, 0, 0.50, 4_000_000, last=(0.6, 0.40, 0.5)),
        made_up(card, "erm", "art", 1, 0, 0.60, 4_000_000),
        made_up(card, "erm", "photo", 0, 0, 0.70, 4_000_000),
        made_up(card, "erm", "photo", 1, 0, 0.70, 4_000_000),
        made_up(card, "qtdog", "art", 0, 0, 0.60),
        made_up(card, "qtdog", "art", 0, 1, 0.80),
        made_up(card, "qtdog", "art", 1, 0, 0.90),
        made_up(card, "qtdog", "art", 1, 1, 0.90),
    ]
    return tables.build_table(runs, [ensemble_record("art", 0, 0.812), ensemble_record("art", 1, 0.9)])


def test_grid_in_domainbeds_form(table):
    validation, last, oracle = "source validation", "last step", "oracle"
    assert table.grid() == [
        ["Algorithm", "Selection", "art", "photo", "Avg", "Worst", "In-domain", "Size"],
        [
            "ERM",
            validation,
            "55.0 +/- 3.5",
            "70.0 +/- 0.0",
            "62.5",
            "55.0 +/- 3.5",
            "52.5",
            "4.00 MB (1.000x)",
        ],  # pstdev 5 / sqrt(2)
        ["QT-DoG", validation, "80.0 +/- 7.1", "X", "X", "X", "X", "1.00 MB (0.250x)"],  # trials: mean(60, 80) and 90
        ["EoQ", validation, "85.6 +/- 3.1", "X", "X", "X", "X", "2.00 MB (0.500x)"],
        ["ERM", last, "45.0 +/- 3.5", "60.0 +/- 0.0", "52.5", "45.0 +/- 3.5", "52.5", "4.00 MB (1.000x)"],
        ["QT-DoG", last, "70.0 +/- 7.1", "X", "X", "X", "X", "1.00 MB (0.250x)"],
        ["ERM", oracle, "45.0 +/- 3.5", "60.0 +/- 0.0", "52.5", "45.0 +/- 3.5", "52.5", "4.00 MB (1.000x)"],
        ["QT-DoG", oracle, "70.0 +/- 7.1", "X", "X", "X", "X", "1.00 MB (0.250x)"],
    ]
    assert table.grid(digits=2)[1][2:5] == ["55.00 +/- 3.54", "70.00 +/- 0.00", "62.50"]
    notes = " ".join(table.notes)
    assert "n = 2" in notes and "QT-DoG: a trial's value is the mean over 2 seeds." in notes
    assert "EoQ: 2 members, mean of their logits." in notes and "ERM: a trial" not in notes
    assert [note.split(":")[0] for note in table.notes[2:5]] == [validation, last, oracle]
    assert "ERM selected: the best checkpoint." in notes
    (erm,) = (row for row in table.rows if (row.label, row.selection) == ("ERM", "source validation"))
    assert erm.in_domain["art"].trials == pytest.approx({0: 60, 1: 50})


def test_selections_among_random_hyper_parameters(card):
    """(source validation, target in, target out) at the last step of three draws."""
    draws = [(0.7, 0.51, 0.3), (0.9, 0.52, 0.2), (0.8, 0.53, 0.4)]
    runs = [made_up(card, "erm", "art", 0, 0, 0.61 + i / 100, hparams_seed=i, last=d) for i, d in enumerate(draws)]
    table = tables.build_table(runs, [])
    assert [row.cells["art"].mean for row in table.rows] == pytest.approx([62, 52, 53])
    assert "ERM: 3 sets of hyper-parameters." in table.notes


def test_doubles_are_refused_and_other_settings_are_said(card):
    one, two = (made_up(card, "erm", "art", 0, seed, 0.5, steps=9 + seed) for seed in (0, 1))
    assert "ERM: its runs differ in steps." in tables.build_table([one, two], []).notes
    with pytest.raises(UserError, match="have the same method, settings, target, trial, seed and hyper-parameter seed"):
        tables.build_table([one, replace(two, card=one.card)], [])


def test_runs_that_differ_in_a_setting_make_rows_of_their_own(card):
    """Two modes of QT-DoG, one of them at two widths, and draws of hyper-parameters, which share a row."""
    quantization = card.config["quantization"]
    runs = []
    for mode, bits, accuracy in (("qat", 7, 0.7), ("qat", 4, 0.6), ("rtn-frozen", 7, 0.5)):
        variant = {**quantization, "qat_mode": mode, "weight_bits": bits}
        for draw in (0, 1):
            lr = {"lr": 1e-3 * (1 + draw)}
            runs.append(
                made_up(card, "qtdog", "art", 0, 0, accuracy, quantization=variant, hparams_seed=draw,
                        last=(0.5, 0.1, draw), **lr)
            )  # fmt: skip
    runs = [replace(run, folder=Path(str(i))) for i, run in enumerate(runs)]
    runs.append(made_up(card, "erm", "art", 0, 0, 0.4))
    ensembles = [
        ensemble_record("art", 0, 0.8, qat_mode="qat", weight_bits=7, lr=1e-3),
        ensemble_record("art", 0, 0.65, qat_mode="qat", weight_bits=4),
    ]
    table = tables.build_table(runs, ensembles)
    assert {row.label: row.cells["art"].mean for row in table.rows if row.selection == "source validation"} == {
        "ERM": 40,
        "QT-DoG, weight-bits 4, qat-mode qat": 60,
        "EoQ, weight-bits 4, qat-mode qat": 65,
        "QT-DoG, weight-bits 7, qat-mode qat": 70,
        "EoQ, weight-bits 7, qat-mode qat": 80,
        "QT-DoG, weight-bits 7, qat-mode rtn-frozen": 50,
    }
    assert "QT-DoG, weight-bits 4, qat-mode qat: 2 sets of hyper-parameters." in table.notes
    assert "EoQ, weight-bits 7, qat-mode qat: 2 members, mean of their logits." in table.notes
    assert not any("differ in" in note for note in table.notes)
    labels = [row.label for row in tables.averages([table, table]).rows]
    assert labels[:6] == [row.label for row in table.rows][:6] and len(labels) == 6 + 4 + 4


def test_uneven_trials_and_seeds_are_said(card):
    runs = [
        made_up(card, "qtdog", "art", 0, 0, 0.5),
        made_up(card, "qtdog", "art", 0, 1, 0.5),
        made_up(card, "qtdog", "art", 1, 0, 0.5),
        made_up(card, "qtdog", "photo", 0, 0, 0.5),
    ]
    notes = " ".join(tables.build_table(runs, []).notes)
    assert "n = 1 to 2" in notes and "mean over 1 to 2 seeds" in notes


def test_cell_error_is_over_trials():
    cell = Cell({0: 1.0, 1: 2.0, 2: 6.0})
    assert cell.mean == 3 and cell.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 3) / math.sqrt(3))
    assert Cell({0: 5.0}).text() == "5.0" and Cell({0: 5.0}).text(3) == "5.000"


def test_averages_over_data_sets(table):
    """ERM on pictures_2: trial 0 has 50 and 70, trial 1 has 60 and 70; QT-DoG lacks photo."""
    other = tables.Table("more", ["a"], [tables.Row("qtdog", "", False, "oracle", {"a": Cell({0: 40.0})})], [])
    both = tables.averages([table, other])
    rows = {(row.label, row.selection): row.cells for row in both.rows}
    assert rows["ERM", "source validation"] == {"pictures_2": Cell({0: 60.0, 1: 65.0})}
    assert rows["QT-DoG", "oracle"] == {"more": Cell({0: 40.0})}
    assert both.grid()[1] == ["ERM", "source validation", "62.5 +/- 1.8", "X", "X", "X", "X"]
    assert [row.selection for row in both.rows][::3] == ["source validation", "last step", "oracle"]
    assert "Averages" in table_formats.as_latex(both)


def test_formats(table):
    text = table_formats.as_text(table)
    header, rule, first = text.splitlines()[2:5]
    assert header.split() == ["Algorithm", "Selection", "art", "photo", "Avg", "Worst", "In-domain", "Size"]
    assert set(rule) == {"-"}
    assert first.startswith("ERM        source validation  55.0 +/- 3.5")
    assert (
        "| ERM | source validation | 55.0 ± 3.5 | 70.0 ± 0.0 | 62.5 | 55.0 ± 3.5 | 52.5 |"
        in table_formats.as_markdown(table)
    )
    latex = table_formats.as_latex(table, digits=2)
    numbers = r"45.00 $\pm$ 3.54 & 60.00 $\pm$ 0.00 & 52.50 & 45.00 $\pm$ 3.54 & 52.50 & 4.00 MB (1.000x) \\"
    assert rf"ERM & last step & {numbers}" in latex
    assert r"\begin{tabular}{llcccccc}" in latex and latex.count(r"\midrule") == 3
    assert table_formats.escaped("+90%_#&") == r"+90\%\_\#\&"
    rows = list(csv.DictReader(table_formats.as_csv([table]).splitlines()))
    assert len(rows) == 28 and rows[0]["algorithm"] == "ERM" and float(rows[0]["mean"]) == pytest.approx(55)
    assert float(rows[0]["stderr"]) == pytest.approx(5 / math.sqrt(2)) and rows[0]["n"] == "2"
    assert (rows[2]["column"], rows[2]["n"], rows[3]["column"], rows[3]["n"]) == ("Avg", "", "Worst", "2")
    assert [float(row["mean"]) for row in rows[2:4]] == pytest.approx([62.5, 55])
    assert (rows[5]["column"], rows[5]["mean"], rows[5]["n"], rows[5]["in_domain"]) == ("photo", "", "0", "")
    assert rows[8]["algorithm"] == "EoQ" and float(rows[8]["in_domain"]) == pytest.approx(75)  # on photo alone


def test_collect_writes_all_formats(trained, tmp_path, capsys):
    runs = shutil.copytree(trained, tmp_path / "runs")
    assert main(["ensemble", str(runs), "--device", "cpu"]) == 0
    unfinished = runs / "RotatedMNIST" / "qtdog" / "15" / "trial0_seed0"
    unfinished.mkdir(parents=True)
    (unfinished / "config.yaml").touch()
    capsys.readouterr()
    assert main(["collect", str(runs), "--digits", "2"]) == 0
    out = capsys.readouterr().out
    assert f"1 unfinished run(s) left out: {unfinished}" in out
    text = (runs / "table.txt").read_text()
    assert text in out and [line.split()[0] for line in text.splitlines()[4:7]] == ["ERM", "QT-DoG", "EoQ"]
    assert " X " in text and "n = 1, which gives no error" in text and "quantized checkpoint" in text
    assert (runs / "table.md").is_file() and (runs / "table.tex").is_file() and (runs / "table.csv").is_file()
    whole = json.loads((runs / "table.json").read_text())
    (table,) = whole["tables"]
    assert whole["date"] and len(table["runs"]) == 3 and len(table["ensembles"]) == 1
    cell = table["rows"][1]["cells"]["0"]
    cards = [read_card(runs / "RotatedMNIST" / "qtdog" / "0" / f"trial0_seed{seed}") for seed in (0, 1)]
    assert cell["n"] == 1 and cell["mean"] == pytest.approx(50 * sum(card.target_accuracy for card in cards))
    assert table["runs"][0]["config"]["steps"] == 9 and table["runs"][0]["environment"]["device"]
    assert main(["collect", str(runs), "--digits", "-1"]) == 2


def test_output_dir_and_mixed_domains(trained, tmp_path):
    written = collect.collect(CollectConfig(str(trained), output_dir=str(tmp_path / "results")))
    assert [path.name for path in written] == ["table.txt", "table.md", "table.tex", "table.csv", "table.json"]
    assert all(path.parent == tmp_path / "results" and path.is_file() for path in written)
    runs = shutil.copytree(trained, tmp_path / "runs")
    run = runs / "RotatedMNIST" / "erm" / "0" / "trial0_seed0"
    write_card(run, json.loads((run / "model.json").read_text().replace('"75"', '"76"')))
    with pytest.raises(UserError, match="have different domains"):
        collect.collect(CollectConfig(str(runs)))
    write_card(run, json.loads((run / "model.json").read_text().replace('"76"', '"75"')) | {"images": "others"})
    with pytest.raises(UserError, match="of RotatedMNIST, have different images"):
        collect.collect(CollectConfig(str(runs)))
