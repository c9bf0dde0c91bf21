"""The demo: what it runs and says, and the page that shows it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from qtdog import demo
from qtdog.cli import main
from qtdog.demo import DemoConfig
from qtdog.errors import UserError
from qtdog.results.runs import read_card
from qtdog.training.jobs import carry_out


@pytest.fixture
def one_process(monkeypatch):
    """Runs one after the other in this process: starting others takes longer than such runs."""
    monkeypatch.setattr(demo, "carry_out", lambda jobs, at_once, threads: carry_out(jobs, at_once=1))


@pytest.mark.slow
def test_end_to_end_and_again(one_process, digits_dir, tmp_path, capsys):
    output = tmp_path / "demo"
    arguments = ["demo", "--output-dir", str(output), "--data-dir", str(digits_dir), "--steps", "6", "--members", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 minutes on 2 cores" in out.split("\n\n")[0]
    table, sentence, files = out.split("\n\n")[-3:]
    rows = [line for line in table.splitlines() if "kB" in line]
    assert [row.split("  ")[0] for row in rows] == ["ERM", "QT-DoG", "Ensemble of ERM", "EoQ"]
    cards = [read_card(output / "RotatedMNIST" / "qtdog" / "75" / f"trial0_seed{seed}") for seed in range(2)]
    assert " ".join(f"{100 * card.target_accuracy:.1f}" for card in cards) in rows[1]
    assert sentence.count(".") - sentence.count(".", 0, -1) == 1 and sentence.startswith(
        "On the domain left out EoQ is"
    )
    for name in ("table.txt", "flatness.png"):
        assert str(output / name) in files and (output / name).is_file()
    assert (output / "flatness.csv").is_file()
    assert (output / "RotatedMNIST" / "qtdog" / "75" / "trial0_ensemble" / "packed").is_dir()
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.count("is finished, not run again") == 4 and again.endswith("\n\n".join([table, sentence, files]))


def test_settings_are_checked():
    with pytest.raises(UserError, match="--members"):
        demo.run_demo(DemoConfig(members=1))


WORDS = ("more", "less", "the same")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([2.0, 3.1, 4.0], "more (+1.03 ± 0.03 seed by seed)"),
        ([0.0, 0.9, 2.0], "less (-1.03 ± 0.03 seed by seed)"),
        ([2.0, 1.0, 3.0], "within chance the same (+0.00 ± 0.58 seed by seed)"),
        ([1.0, 2.0, 3.0], "within chance the same (+0.00 ± 0.00 seed by seed)"),
    ],
)
def test_a_difference_is_one_beyond_two_errors(values, told):
    assert demo.difference(values, [1.0, 2.0, 3.0], WORDS, 2) == told


def test_the_sentence_has_the_numbers_of_the_table():
    erm = demo.Row("ERM", [80.0, 82.0], [90.0, 90.0], 1000, 1000, [0.2, 0.4])
    qtdog = demo.Row("QT-DoG", [70.0, 72.0], [90.0, 90.0], 250, 1000, [0.1, 0.3])
    erms, eoq = (
        demo.Row(name, [value], [95.0], size, 1000, []) for name, value, size in (("E", 84.0, 2000), ("Q", 81.5, 500))
    )
    told = demo.verdict(erm, qtdog, erms, eoq)
    assert "+0.5 points" in told and "above 1 of its 2 seeds, in 0.50 times" in told and "+3.0 in 2.00 times" in told
    assert "less accurate than ERM (-10.0 ± 0.0" in told and "flatter than ERM's (-0.10 ± 0.00" in told
    worse = demo.verdict(erm, qtdog, erms, dataclasses.replace(eoq, target=[79.0]))
    assert "-2.0 points" in worse and "above 0 of its 2 seeds" in worse
    assert "81.0 ± 1.4" in demo.table([erm, qtdog, erms, eoq])


def test_the_page_shows_the_committed_table():
    """docs/demo/table.json is `runs/demo/table.json` of the run that docs/demo.md shows."""
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "demo.md").read_text()
    (results,) = json.loads((docs / "demo" / "table.json").read_text())["tables"]
    rows = [row for row in results["rows"] if row["selection"] == "source validation"]
    assert [row["label"] for row in rows] == ["ERM", "Ensemble of ERM", "QT-DoG", "EoQ"]
    for row in rows:
        (line,) = re.findall(rf"^{row['label']} .*kB.*$", page, re.MULTILINE)
        accuracies = [row[part][demo.TARGET]["mean"] for part in ("cells", "in_domain")]
        told = [f"{accuracy:.1f}" for accuracy in accuracies]
        told.append(f"{row['mean_nbytes'] / 1000:.0f} kB ({row['ratio_to_float']:.2f}x)")
        assert all(f" {text}" in line for text in told), (line, told)
