"""Tables of other metrics, of runs that leave out several domains, and of grids."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from made_up_runs import made_up_result, made_up_run, random_numbers, write_result
from qtdog.cli import main
from qtdog.config import RunConfig
from qtdog.files import read_records, write_json, write_records
from qtdog.results import metrics, table_formats
from qtdog.results.collect import in_order
from qtdog.results.reported import ACCURACY, METRICS
from qtdog.results.tables import averages, build_table, build_tables
from qtdog.results.variants import settings_of

TARGETS = ["+90%", "+80%", "-90%"]


def results_of(method="erm", targets=((0,), (1,), (2,)), trials=2, random=None, **settings):
    random = random or random_numbers()
    return [
        made_up_result(made_up_run(method, some, trial, **settings), random, Path(f"{method}{some}{trial}{settings}"))
        for some in targets
        for trial in range(trials)
    ]


def ensemble_record(result):
    """The record of an ensemble of a run's targets and trial, with numbers of its own."""
    run = result.card.run
    return {
        "dataset": run.dataset, "method": run.method, "target": result.card.target, "test_envs": result.targets,
        "trial_seed": run.trial_seed, "settings": settings_of(run), "domains": TARGETS, "members": 2,
        "combine": "logits", "nbytes": 1, "float_nbytes": 2, "target_accuracy": 0.5,
        **{name: value / 2 for name, value in result.card.accuracies.items()},
    }  # fmt: skip


def test_every_metric_that_runs_have_is_reported():
    assert {metric.key for metric in METRICS.values()} == set(metrics.NAMES)
    assert all(name == metric.flag for name, metric in METRICS.items())


@pytest.mark.parametrize("name", METRICS)
def test_cells_and_summaries(name):
    """Every number of the first row is found by hand; models are those that accuracy selects."""
    metric, results = METRICS[name], results_of()
    table = build_table(results, [ensemble_record(result) for result in results], metric)
    row, ensemble = table.rows[:2]
    scale = 1 if name == "nll" else 100
    worst = max if name in ("nll", "ece") else min
    key = {"worst": "acc", "accuracy": "acc"}.get(name, metric.key)
    expected = [
        {r.card.run.trial_seed: scale * r.card.accuracies[f"env{env}_in_{key}"] for r in results if r.targets == [env]}
        for env in range(3)
    ]
    assert [row.cells[target].trials for target in TARGETS] == [pytest.approx(trials) for trials in expected]
    assert ensemble.cells["+80%"].mean == pytest.approx(row.cells["+80%"].mean / 2)
    by_trial = [worst(trials[trial] for trials in expected) for trial in (0, 1)]
    assert list(table.worst(row.cells).trials.values()) == pytest.approx(by_trial)
    inside = [
        {
            r.card.run.trial_seed: (min if name == "worst" else fmean)(
                scale * r.card.accuracies[f"env{source}_out_{key}"] for source in range(3) if source != env
            )
            for r in results
            if r.targets == [env]
        }
        for env in range(3)
    ]
    assert [row.in_domain[target].trials for target in TARGETS] == [pytest.approx(trials) for trials in inside]
    header, first = table.grid()[:2]
    assert header[2:5] == TARGETS
    assert header[5:-2] == (["Worst"] if name == "worst" else ["Avg", "Worst"])
    shown = dict(zip(header, first, strict=True))
    digits = 3 if name == "nll" else 1
    assert shown["+90%"].startswith(f"{fmean(expected[0].values()):.{digits}f} +/- ")
    assert shown["Worst"].startswith(f"{fmean(by_trial):.{digits}f} +/- ")
    if name != "worst":
        assert shown["Avg"] == f"{fmean(fmean(trials.values()) for trials in expected):.{digits}f}"
    assert table.notes[0].startswith(f"Target {metric.title} in {'nats' if name == 'nll' else 'percent'} (in part of")
    assert ("greatest" if worst is max else "smallest") in table.notes[1]


def test_ensembles_go_by_the_sources_that_hold_images_out():
    """Those that were chosen; members of several trials may hold none out together."""
    record = ensemble_record(results_of()[0])

    def in_domain(**changes):
        row = build_table(results_of(), [{**record, **changes}], METRICS["ece"]).rows[1]
        return {column: cell.mean for column, cell in row.in_domain.items()}

    assert in_domain(source_envs=[2]) == {"+90%": 100 * record["env2_out_ece"]}
    del record["env1_out_ece"]
    assert in_domain() == {"+90%": 100 * record["env2_out_ece"]}
    del record["env2_out_ece"]
    assert in_domain() == {}


def test_worst_needs_all_columns():
    results = [r for r in results_of() if (r.targets, r.card.run.trial_seed) != ([1], 1)]
    row = (table := build_table(results, [])).rows[0]
    assert list(table.worst(row.cells).trials) == [0]
    table = build_table([r for r in results if r.targets != [1]], [])
    assert table.worst(table.rows[0].cells) is None
    assert table.grid()[1][3:7] == ["X", table.grid()[1][4], "X", "X"]


def test_averages_of_the_worst_domain():
    first = build_table(results_of(), [], METRICS["worst"])
    second = replace(build_table(results_of(random=random_numbers(1)), [], METRICS["worst"]), dataset="other")
    both = averages([first, second])
    row = both.rows[0]
    assert row.cells["ColoredMNIST"] == first.worst(first.rows[0].cells)
    assert both.worst(row.cells).trials == {
        trial: min(row.cells[name].trials[trial] for name in ("ColoredMNIST", "other")) for trial in (0, 1)
    }
    assert both.grid()[0] == ["Algorithm", "Selection", "ColoredMNIST", "other", "Worst", "In-domain"]
    assert "A trial's value is the worst of all targets." in both.notes


# Runs that leave out several domains -------------------------------------------------------------------------------

PAIRS = [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("name", ["accuracy", "worst"])
def test_runs_that_leave_out_two_domains(name):
    results = results_of(targets=[(0,), (1,), (2,), *PAIRS])
    ensembles = [ensemble_record(result) for result in results if result.targets != [2]]
    one, two = build_tables(results, ensembles, METRICS[name])
    assert [table.title for table in (one, two)] == ["ColoredMNIST", "ColoredMNIST, 2 domains left out at once"]
    assert one.columns == TARGETS and two.columns == ["+90%++80%", "+90%+-90%", "+80%+-90%"]
    assert [row.selection for row in one.rows if not row.ensemble] == [
        "source validation", "last step", "leave-one-out", "oracle"
    ]  # fmt: skip
    assert "leave-one-out" not in [row.selection for row in two.rows]
    values = [result.card.accuracies for result in results if result.targets == [0, 2]]
    across = min if name == "worst" else fmean
    cell = next(iter(two.rows)).cells["+90%+-90%"]
    assert list(cell.trials.values()) == pytest.approx(
        [100 * across([value["env0_in_acc"], value["env2_in_acc"]]) for value in values]
    )
    inside = [100 * value["env1_out_acc"] for value in values]
    assert list(two.rows[0].in_domain["+90%+-90%"].trials.values()) == pytest.approx(inside)
    last = next(row for row in two.rows if row.selection == "oracle").cells["+90%+-90%"]
    lasts = [result.last for result in results if result.targets == [0, 2]]
    assert list(last.trials.values()) == pytest.approx(
        [100 * across([record["env0_in_acc"], record["env2_in_acc"]]) for record in lasts]
    )
    assert ("in parts of the domains left out" + ", mean over them" * (name == "accuracy") + ")") in two.notes[0]
    ensemble = next(row for row in two.rows if row.ensemble)
    assert ensemble.cells["+90%+-90%"].mean == pytest.approx(cell.mean / 2)


def test_pairs_alone_have_a_table_and_averages_do_not_mix():
    (two,) = build_tables(results_of(targets=PAIRS), [])
    assert two.left_out == 2 and all(cell.mean for cell in two.rows[0].cells.values())
    (one,) = build_tables(results_of(), [])
    other = replace(one, dataset="other")
    assert [table.title for table in in_order([one, two, other])] == [
        "ColoredMNIST", "other", "Averages", "ColoredMNIST, 2 domains left out at once"
    ]  # fmt: skip


def test_leave_one_out_takes_the_step_that_held_up_on_left_out_sources():
    """Of two steps, by runs that left out the target and a source; a pair of another draw does not count."""

    def result(targets, by_step, draw=0):
        made = made_up_result(made_up_run("erm", targets, draw=draw), random_numbers(), steps=(0, 2))
        records = [{**record, **values} for record, values in zip(made.records, by_step, strict=True)]
        return replace(made, records=records, folder=Path(f"{targets}{draw}"))

    alone = result((0,), [{"env0_in_acc": 0.1}, {"env0_in_acc": 0.2}])
    pairs = [
        result((0, 1), [{"env1_in_acc": 0.9, "env0_in_acc": 0}, {"env1_in_acc": 0.6, "env0_in_acc": 1}]),
        result((0, 2), [{"env2_in_acc": 0.5, "env0_in_acc": 0}, {"env2_in_acc": 0.7, "env0_in_acc": 1}]),
    ]

    def found(wider):
        rows = build_table([alone], [], wider=wider).rows
        return [row.cells["+90%"].mean for row in rows if row.selection == "leave-one-out"]

    assert found(pairs) == [10]  # (.9 + .5) / 2 is more than (.6 + .7) / 2
    assert found(pairs[:1]) == [] and found([]) == []
    assert found([pairs[0], result((0, 2), [{}, {}], draw=1)]) == []
    late = replace(pairs[1], records=pairs[1].records[1:])
    assert found([pairs[0], late]) == [20]  # the one step that all have


# Grids -------------------------------------------------------------------------------------------------------------


def grid_results(points, trials=2, **settings):
    """ERM on one target with these learning rates; each reaches, in a source and on the target, its value."""
    return [
        replace(
            made_up_result(
                made_up_run("erm", (0,), trial, lr=lr, grid=("lr",), **settings), random_numbers(),
                **dict.fromkeys(("env1_out_acc", "env2_out_acc", "env0_out_acc"), value[trial]),
                env0_in_acc=value[trial],
            ),
            folder=Path(f"{lr}{trial}{settings}"),
        )
        for lr, value in points.items()
        for trial in range(trials)
    ]  # fmt: skip


def test_a_grid_is_one_row_chosen_by_source_validation():
    results = grid_results({1e-5: (0.5, 0.8), 5e-5: (0.7, 0.6), 1e-4: (0.1, 0.2)}, trials=2)
    plain = results_of(trials=1, lr=1e-3, targets=[(0,)])
    table = build_table(results, [])
    assert {row.label for row in table.rows} == {"ERM"} and len(table.rows) == 3
    assert table.rows[0].cells["+90%"].trials == {0: 70, 1: 80}
    (note,) = [note for note in table.notes if "searched" in note]
    assert note == (
        "ERM: searched over lr of 1e-05, 5e-05, 0.0001. Chosen by source validation: lr 5e-05 once, lr 1e-05 once; "
        "by last step: lr 5e-05 once, lr 1e-05 once; by oracle: lr 5e-05 once, lr 1e-05 once."
    )
    assert not any("differ in" in note for note in table.notes)
    ensemble = ensemble_record(results[0])
    assert {row.label for row in build_table([*results, *plain], [ensemble]).rows} == {
        "ERM, lr searched", "ERM, lr 0.001", "Ensemble of ERM, lr searched"
    }  # fmt: skip
    loose = [replace(r, card=replace(r.card, config={**r.card.config, "grid": []})) for r in results]
    assert {row.label for row in build_table(loose, []).rows} == {"ERM, lr 1e-05", "ERM, lr 5e-05", "ERM, lr 0.0001"}


def test_a_grid_beside_random_draws():
    results = [
        *grid_results({1e-5: (0.5, 0.5), 5e-5: (0.4, 0.8)}),
        *grid_results({1e-5: (0.6, 0.6), 5e-5: (0.2, 0.3)}, draw=1),
    ]
    table = build_table(results, [])
    assert table.rows[0].cells["+90%"].trials == {0: 60, 1: 80}
    assert "ERM: 2 sets of hyper-parameters." in table.notes
    assert any("by source validation: lr 1e-05 once, lr 5e-05 once" in note for note in table.notes)


def test_grids_are_kept_with_the_settings():
    run = made_up_run("erm", grid=("lr", "weight_decay"))
    assert run.to_dict()["grid"] == ["lr", "weight_decay"]
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert "grid" not in made_up_run("erm").to_dict()
    with pytest.raises(TypeError, match="grid cannot be 'lr'"):
        RunConfig.from_dict({**run.to_dict(), "grid": "lr"})
    assert "grid" not in settings_of(run) and settings_of(run)["lr"] == "searched"


# On disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    random = random_numbers()
    for targets in [(0,), (1,), (2,), *PAIRS]:
        for trial in (0, 1):
            run = made_up_run("erm", targets, trial)
            write_result(made_up_result(run, random, tmp_path / "runs" / f"{targets}{trial}"))
    return tmp_path / "runs"


@pytest.mark.parametrize("name", METRICS)
def test_collect_writes_every_metric_in_every_form(runs, name, capsys):
    assert main(["collect", str(runs), "--metric", name]) == 0
    stem = "table" if name == "accuracy" else f"table_{name}"
    text = (runs / f"{stem}.txt").read_text()
    assert text in capsys.readouterr().out
    assert "ColoredMNIST, 2 domains left out at once" in text
    one, two = json.loads((runs / f"{stem}.json").read_text())["tables"]
    assert one["metric"] == name and (one["left_out"], two["left_out"]) == (1, 2)
    assert (len(one["runs"]), len(two["runs"])) == (6, 6)
    row = one["rows"][0]
    worst = {trial: [cell["trials"][trial] for cell in row["cells"].values()] for trial in ("0", "1")}
    extreme = max if name in ("nll", "ece") else min
    assert row["worst"]["trials"] == {trial: extreme(values) for trial, values in worst.items()}
    lines = [line for line in csv.DictReader((runs / f"{stem}.csv").open()) if line["table"] == "ColoredMNIST"]
    assert {line["metric"] for line in lines} == {name}
    by_column = {line["column"]: line for line in lines if line["selection"] == "source validation"}
    assert float(by_column["Worst"]["mean"]) == row["worst"]["mean"]
    if name == "worst":
        assert row["average"] is None and "Avg" not in by_column and " Avg " not in text
    else:
        assert float(by_column["Avg"]["mean"]) == row["average"] == pytest.approx(
            fmean(cell["mean"] for cell in row["cells"].values())
        )  # fmt: skip
    assert "| Worst |" in (runs / f"{stem}.md").read_text() and "& Worst &" in (runs / f"{stem}.tex").read_text()


def test_runs_of_an_earlier_version_lack_metrics(runs, capsys):
    old = runs / "(1,)0"
    card = json.loads((old / "model.json").read_text())
    card["accuracies"] = {name: value for name, value in card["accuracies"].items() if name[-4:] in ("_acc",)}
    card["accuracies"] = {name: value for name, value in card["accuracies"].items() if name.count("_") == 2}
    write_json(old / "model.json", card)
    assert main(["collect", str(runs), "--metric", "ece"]) == 2
    error = capsys.readouterr().err
    assert f"--metric ece is not in the results of {old}, of an earlier version" in error and "train" in error
    assert main(["collect", str(runs)]) == main(["collect", str(runs), "--metric", "worst"]) == 0


def test_an_ensemble_that_holds_no_image_out_has_every_metric(runs):
    (result, *_) = results_of()
    record = {name: value for name, value in ensemble_record(result).items() if "_out_" not in name}
    (runs / "mixed").mkdir()
    (runs / "mixed" / "members.json").touch()
    write_records(runs / "mixed" / "results.jsonl", [{**record, "mix": ["trials"]}])
    assert main(["collect", str(runs), "--metric", "ece"]) == 0
    (one, _) = json.loads((runs / "table_ece.json").read_text())["tables"]
    (ensemble,) = [row for row in one["rows"] if row["label"].startswith("Ensemble")]
    assert ensemble["cells"]["+90%"]["mean"] == 100 * record["env0_in_ece"] and ensemble["in_domain"] == {}


def test_records_of_an_earlier_version_in_a_run_that_went_on(runs, capsys):
    """Begun by an earlier version, ended by this one."""
    file = runs / "(1,)0" / "results.jsonl"
    first, *rest = read_records(file)
    write_records(file, [{name: value for name, value in first.items() if "ece" not in name}, *rest])
    assert main(["collect", str(runs), "--metric", "ece"]) == 2
    assert f"--metric ece is not in the results of {file.parent}, of an earlier" in capsys.readouterr().err
    assert main(["collect", str(runs)]) == 0


def test_csv_of_a_table_with_nothing_in_a_column():
    table = build_table(results_of(targets=[(0,)]), [])
    lines = list(csv.DictReader(table_formats.as_csv([table]).splitlines()))
    by_column = {line["column"]: line for line in lines if line["selection"] == "oracle"}
    assert by_column["Avg"]["mean"] == by_column["Worst"]["mean"] == "" and by_column["Worst"]["n"] == "0"
    assert table.metric is ACCURACY
