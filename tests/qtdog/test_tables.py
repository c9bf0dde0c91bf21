import json
import math
import shutil
from dataclasses import replace

import pytest

from qtdog import tables
from qtdog.cli import main
from qtdog.config import CollectConfig
from qtdog.errors import UserError
from qtdog.runs import read_card


@pytest.fixture
def card(trained):
    return read_card(trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0")


def made_up(card, method, target, trial, seed, accuracy, nbytes=1_000_000):
    """The card of a run that was never trained."""
    domains = ["art", "photo"]
    env = domains.index(target)
    config = {**card.config, "method": method, "test_env": env, "trial_seed": trial, "seed": seed}
    accuracies = {f"env{env}_in_acc": accuracy}
    return replace(
        card, config=config, dataset="pictures_2", domains=domains, target=target, accuracies=accuracies,
        nbytes=nbytes, float_nbytes=4_000_000, selection="source validation",
    )  # fmt: skip


def ensemble_record(target, trial, accuracy):
    return {
        "method": "qtdog", "target": target, "trial_seed": trial, "target_accuracy": accuracy, "members": 2,
        "combine": "logits", "nbytes": 2_000_000, "float_nbytes": 4_000_000, "dataset": "pictures_2",
    }  # fmt: skip


@pytest.fixture
def table(card):
    runs = [
        made_up(card, "erm", "art", 0, 0, 0.50, 4_000_000),
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
    assert table.grid() == [
        ["Algorithm", "art", "photo", "Avg", "Size"],
        ["ERM", "55.0 +/- 3.5", "70.0 +/- 0.0", "62.5", "4.00 MB (1.000x)"],  # pstdev 5 / sqrt(2)
        ["QT-DoG", "80.0 +/- 7.1", "X", "X", "1.00 MB (0.250x)"],  # trials: mean(60, 80) and 90
        ["EoQ", "85.6 +/- 3.1", "X", "X", "2.00 MB (0.500x)"],
    ]
    notes = " ".join(table.notes)
    assert "n = 2" in notes and "QT-DoG: a trial's value is the mean over 2 seeds." in notes
    assert "EoQ: 2 members, mean of their logits." in notes and "ERM: a trial" not in notes


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
    cell = tables.Cell({0: 1.0, 1: 2.0, 2: 6.0})
    assert cell.mean == 3 and cell.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 3) / math.sqrt(3))
    assert tables.Cell({0: 5.0}).text() == "5.0 +/- 0.0"


def test_formats(table):
    text = tables.as_text(table)
    header, rule, first = text.splitlines()[2:5]
    assert header.split() == ["Algorithm", "art", "photo", "Avg", "Size"] and set(rule) == {"-"}
    assert first.startswith("ERM        55.0 +/- 3.5")
    assert "| ERM | 55.0 ± 3.5 | 70.0 ± 0.0 | 62.5 |" in tables.as_markdown(table)
    latex = tables.as_latex(table)
    assert r"ERM & 55.0 $\pm$ 3.5 & 70.0 $\pm$ 0.0 & 62.5 & 4.00 MB (1.000x) \\" in latex
    assert r"\begin{tabular}{lcccc}" in latex
    assert tables.escaped("+90%_#&") == r"+90\%\_\#\&"


def test_collect_writes_all_formats(trained, tmp_path, capsys):
    runs = shutil.copytree(trained, tmp_path / "runs")
    assert main(["ensemble", str(runs), "--device", "cpu"]) == 0
    unfinished = runs / "RotatedMNIST" / "qtdog" / "15" / "trial0_seed0"
    unfinished.mkdir(parents=True)
    (unfinished / "config.yaml").touch()
    capsys.readouterr()
    assert main(["collect", str(runs)]) == 0
    out = capsys.readouterr().out
    assert f"1 unfinished run(s) left out: {unfinished}" in out
    text = (runs / "table.txt").read_text()
    assert text in out and [line.split()[0] for line in text.splitlines()[4:7]] == ["ERM", "QT-DoG", "EoQ"]
    assert " X " in text and "once" not in text and "quantized checkpoint" in text
    assert (runs / "table.md").is_file() and (runs / "table.tex").is_file()
    whole = json.loads((runs / "table.json").read_text())
    (table,) = whole["tables"]
    assert whole["date"] and len(table["runs"]) == 3 and len(table["ensembles"]) == 1
    cell = table["rows"][1]["cells"]["0"]
    cards = [read_card(runs / "RotatedMNIST" / "qtdog" / "0" / f"trial0_seed{seed}") for seed in (0, 1)]
    assert cell["n"] == 1 and cell["mean"] == pytest.approx(50 * sum(card.target_accuracy for card in cards))
    assert table["runs"][0]["config"]["steps"] == 9 and table["runs"][0]["environment"]["device"]


def test_output_dir_and_mixed_domains(trained, tmp_path):
    written = tables.collect(CollectConfig(str(trained), output_dir=str(tmp_path / "results")))
    assert [path.name for path in written] == ["table.txt", "table.md", "table.tex", "table.json"]
    assert all(path.parent == tmp_path / "results" and path.is_file() for path in written)
    runs = shutil.copytree(trained, tmp_path / "runs")
    file = runs / "RotatedMNIST" / "erm" / "0" / "trial0_seed0" / "model.json"
    file.write_text(file.read_text().replace('"75"', '"76"'))
    with pytest.raises(UserError, match="have different domains"):
        tables.collect(CollectConfig(str(runs)))
