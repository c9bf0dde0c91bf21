"""Our tables and those that DomainBed's collect_results makes of the same folder."""

import itertools
import json
import os
import re
import runpy
import sys
from collections import defaultdict

import numpy as np
import pytest

from made_up_runs import made_up_result, made_up_run, random_numbers, write_result
from qtdog.cli import main
from qtdog.data import domain_names
from qtdog.methods.presets import METHODS, find_method
from qtdog.results.collect import read_folder
from qtdog.results.reported import ACCURACY
from qtdog.results.tables import averages, build_tables
from tiny import DIGITS

DATASETS = ("ColoredMNIST", "RotatedMNIST")
THEIRS = {  # DomainBed's names of the selections that both have
    "source validation": "training-domain validation set",
    "leave-one-out": "leave-one-domain-out cross-validation",
    "oracle": "test-domain validation set (oracle)",
}


def write_runs(folder, method, random):
    """A sweep of a method, each run in a folder of its own: all targets; of ColoredMNIST all pairs, too, and draws."""
    for dataset in DATASETS:
        envs = range(len(domain_names(dataset, None)[1]))
        targets, draws = [(env,) for env in envs], 1
        if dataset == "ColoredMNIST":
            targets, draws = [*targets, *itertools.combinations(envs, 2)], 2
        for some, trial, draw in itertools.product(targets, range(2), range(draws)):
            run = made_up_run(method, some, trial, draw, dataset=dataset)
            name = f"{method}_{dataset}_{some}_{trial}_{draw}"
            write_result(made_up_result(run, random, folder / name))


# DomainBed's rules (model_selection.py, collect_results.py), written out afresh ------------------------------------


def records_below(folder):
    """All records one folder deep, by (data set, algorithm, target, trial); one of two targets counts for both."""
    groups = defaultdict(list)
    for file in sorted(folder.glob("*/results.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            args = record["args"]
            for env in args["test_envs"]:
                groups[args["dataset"], args["algorithm"], env, args["trial_seed"]].append(record)
    return groups


def source_validation(target, records):
    """(validation, test) of the best checkpoint, the first of equal ones."""
    alone = [record for record in records if record["args"]["test_envs"] == [target]]
    sources = [env for env in range(count_envs(records[0])) if env != target]
    pairs = [
        (np.mean([record[f"env{env}_out_acc"] for env in sources]), record[f"env{target}_in_acc"]) for record in alone
    ]
    return max(pairs, key=lambda pair: pair[0], default=None)


def oracle(target, records):
    """(validation, test) of the last checkpoint."""
    alone = [record for record in records if record["args"]["test_envs"] == [target]]
    last = max(alone, key=lambda record: record["step"], default=None)
    return last and (last[f"env{target}_out_acc"], last[f"env{target}_in_acc"])


def leave_one_out(target, records):
    """(validation, test) of the best step, where each other domain is validated by the run that left both out."""
    pairs = []
    for step in sorted({record["step"] for record in records}):
        at_step = {tuple(sorted(r["args"]["test_envs"])): r for r in records if r["step"] == step}
        others = [env for env in range(count_envs(records[0])) if env != target]
        keys = [tuple(sorted((target, env))) for env in others]
        if all(key in at_step for key in [(target,), *keys]):
            validation = [at_step[key][f"env{env}_in_acc"] for key, env in zip(keys, others, strict=True)]
            pairs.append((np.sum(validation) / len(others), at_step[target,][f"env{target}_in_acc"]))
    return max(pairs, key=lambda pair: pair[0], default=None)


def count_envs(record):
    return next(i for i in itertools.count() if f"env{i}_out_acc" not in record)


RULES = {"source validation": source_validation, "leave-one-out": leave_one_out, "oracle": oracle}


def domainbeds_accuracies(folder, selection):
    """By (data set, algorithm, target, trial); of draws that validate equally well the last."""
    found = {}
    for (dataset, algorithm, env, trial), records in records_below(folder).items():
        draws = sorted({record["args"]["hparams_seed"] for record in records})
        pairs = [RULES[selection](env, [r for r in records if r["args"]["hparams_seed"] == draw]) for draw in draws]
        if pairs := [pair for pair in pairs if pair is not None]:
            found[dataset, algorithm, env, trial] = max(reversed(pairs), key=lambda pair: pair[0])[1]
    return found


def mean_error(values):
    """How DomainBed prints a cell."""
    return f"{100 * np.mean(values):.1f} +/- {100 * np.std(values / np.sqrt(len(values))):.1f}"


def domainbeds_tables(folder, selection):
    """Algorithm -> cells and Avg of each data set, and of the averages."""
    accuracies = domainbeds_accuracies(folder, selection)
    algorithms = sorted({algorithm for _, algorithm, _, _ in accuracies})
    tables = {}
    for dataset in DATASETS:
        for algorithm in algorithms:
            columns = [
                [value for (d, a, e, _), value in accuracies.items() if (d, a, e) == (dataset, algorithm, env)]
                for env in range(len(domain_names(dataset, None)[1]))
            ]
            if any(columns):
                means = [100 * np.mean(column) if column else None for column in columns]
                cells = [mean_error(column) if column else "X" for column in columns]
                average = "X" if None in means else f"{sum(means) / len(means):.1f}"
                tables[dataset, algorithm] = [*cells, average]
    for algorithm in algorithms:
        columns = []
        for dataset in DATASETS:
            trials = defaultdict(list)
            for (d, a, _, trial), value in accuracies.items():
                if (d, a) == (dataset, algorithm):
                    trials[trial].append(value)
            columns.append([np.mean(values) for values in trials.values()])
        cells = [mean_error(column) if column else "X" for column in columns]
        average = f"{np.mean([100 * np.mean(column) for column in columns]):.1f}" if all(columns) else "X"
        tables["Averages", algorithm] = [*cells, average]
    return tables


# Ours ------------------------------------------------------------------------------------------------------------


def our_tables(folder, selection):
    """The same of ours: without Worst, In-domain and Size."""
    several = [build_tables(one.results, one.ensembles)[0] for one in read_folder(str(folder), ACCURACY).values()]
    found = {}
    for table in [*several, averages(several)]:
        for row in table.grid()[1:]:
            if row[1] == selection:
                found[table.title, row[0]] = row[2 : 3 + len(table.columns)]
    return found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Runs of every preset, each with numbers of its own."""
    folder, random = tmp_path_factory.mktemp("sweep"), random_numbers()
    for method in METHODS:
        write_runs(folder, method, random)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("selection", THEIRS)
def test_the_same_numbers_of_every_method(sweep, selection):
    theirs, ours = domainbeds_tables(sweep, selection), our_tables(sweep, selection)
    labels = {find_method(method).label for method in METHODS}
    datasets = {"ColoredMNIST", "RotatedMNIST", "Averages"} - (
        {"RotatedMNIST"} if selection == "leave-one-out" else set()
    )
    assert theirs.keys() == {(dataset, label) for dataset in datasets for label in labels}
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.untraced
def test_domainbeds_own_collector(sweep, monkeypatch, capsys):
    """git clone https://github.com/facebookresearch/DomainBed && DOMAINBED=DomainBed pytest tests/qtdog/results"""
    if "DOMAINBED" in os.environ:
        monkeypatch.syspath_prepend(os.environ["DOMAINBED"])
    try:
        import domainbed.datasets  # noqa: F401
    except ImportError as error:
        pytest.skip(f"DomainBed is not there, see $DOMAINBED: {error}")
    monkeypatch.setattr(sys, "argv", ["collect_results", "--input_dir", str(sweep)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which it replaces
    runpy.run_module("domainbed.scripts.collect_results", run_name="__main__")
    found = parse_results((sweep / "results.txt").read_text())
    for selection, name in THEIRS.items():
        ours = our_tables(sweep, selection)
        theirs = {key[1:]: cells for key, cells in found.items() if key[0] == name and set(cells) != {"X"}}
        assert theirs == ours and theirs


def parse_results(text):
    """(selection, data set, algorithm) -> cells of results.txt."""
    found, selection, dataset, columns = {}, None, None, 0
    for line in text.splitlines():
        if title := re.fullmatch(r"-------- (?:Dataset: (\w+)|(Averages)), model selection method: (.*)", line):
            selection, dataset = title[3], title[1] or title[2]
        elif line.startswith("Algorithm"):
            columns = len(line.split()) - 2
        elif selection and line.strip():
            (*label,) = re.split(r"\s{2,}", line.strip())
            found[selection, dataset, label[0]] = label[1:]
            assert len(label) == columns + 2, line
    return found


# A folder that was trained -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("erm", []),
        ("swad", ["--swad-converge", "1", "--swad-tolerance", "1"]),  # may select the last checkpoint alone
        ("qtdog", ["--switch-step", "2"]),  # those from the switch on
        ("qtdog+sma", ["--switch-step", "1"]),
    ],
    ids=["erm", "swad", "qtdog", "qtdog+sma"],
)
def test_the_same_numbers_of_runs_that_were_trained(method, flags, digits_dir, tmp_path):
    for trial, draw in ((0, 0), (0, 1), (1, 0)):
        assert main(["train", *DIGITS, "--data-dir", str(digits_dir), "--method", method,
                     *flags, "--output-dir", str(tmp_path / "runs"), "--steps", "4", "--checkpoint-freq", "1",
                     "--eval-train-images", "2", "--trial-seed", str(trial),
                     "--hparams-seed", str(draw)]) == 0  # fmt: skip
    (place,) = {file.parents[1] for file in (tmp_path / "runs").rglob("results.jsonl")}
    ((name, collected),) = read_folder(str(place), ACCURACY).items()
    assert name == "RotatedMNIST" and len({result.card.run.lr for result in collected.results}) == 2
    (table,) = build_tables(collected.results, [])
    rows = {row.selection: row for row in table.rows}
    for selection in ("source validation", "oracle"):
        label = find_method(method).label
        theirs = domainbeds_accuracies(place, selection)
        assert theirs == {
            ("RotatedMNIST", label, 0, trial): pytest.approx(value / 100)
            for trial, value in rows[selection].cells["0"].trials.items()
        }


@pytest.mark.slow
def test_the_same_numbers_of_a_sweep_with_pairs_of_targets(digits_dir, tmp_path):
    assert main(["sweep", *DIGITS[2:], "--data-dir", str(digits_dir), "--datasets", "ColoredMNIST", "--methods", "erm",
                 "--test-envs", "0", "0+1", "0+2", "--n-trials", "1", "--output-dir", str(tmp_path), "--steps", "4",
                 "--checkpoint-freq", "1", "--eval-train-images", "2"]) == 0  # fmt: skip
    collected = read_folder(str(tmp_path), ACCURACY)["ColoredMNIST"]
    one, two = build_tables(collected.results, [])
    assert len(one.rows) == 4 and two.columns == ["+90%++80%", "+90%+-90%"]
    for row in one.rows:
        if row.selection in THEIRS:
            theirs = domainbeds_accuracies(tmp_path, row.selection)["ColoredMNIST", "ERM", 0, 0]
            assert row.cells["+90%"].trials == {0: pytest.approx(100 * theirs)}


@pytest.mark.slow
def test_a_grid_that_was_trained_is_one_row(digits_dir, tmp_path, capsys):
    grid = ["--lr", "1e-3", "1e-2", "--swad-ratio", "1.2", "1.5"]
    assert main(["train", *DIGITS, "--data-dir", str(digits_dir), "--method", "qtdog+swad", "--steps", "6",
                 "--output-dir", str(tmp_path), "--checkpoint-freq", "1", "--eval-train-images", "2",
                 "--switch-step", "1", "--swad-converge", "1", "--swad-tolerance", "1", *grid]) == 0  # fmt: skip
    assert main(["collect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "source validation  " in line]
    assert row.startswith("QT-DoG + SWAD  source validation")
    assert re.search(
        r"QT-DoG \+ SWAD: searched over lr of 0.001, 0.01 and swad-ratio of 1.2, 1.5. Chosen by source", out
    )
    ours = read_folder(str(tmp_path), ACCURACY)["RotatedMNIST"].results
    best = max(ours, key=lambda result: result.card.source_validation_accuracy)
    cell = build_tables(ours, [])[0].rows[0].cells["0"].mean / 100
    assert cell in [
        r.card.target_accuracy
        for r in ours
        if r.card.source_validation_accuracy == best.card.source_validation_accuracy
    ]
