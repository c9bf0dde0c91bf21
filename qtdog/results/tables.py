"""Tables in DomainBed's form, from runs and ensembles on disk."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from qtdog.methods.presets import find_method, place_of
from qtdog.results.runs import ModelCard
from qtdog.results.statistics import Cell, average, mean_cell
from qtdog.results.variants import best_draws, described, differing, distinguishing_settings, settings_of
from qtdog.training.evaluation import mean_out_accuracy

Key = tuple[str, str]  # a method and a variant of it
Values = dict[str, dict[int, list[float]]]  # target, trial, seeds


@dataclass(frozen=True)
class Result:
    """A finished run: its selected model's card and the record of its last step."""

    folder: Path
    card: ModelCard
    last: dict[str, Any]

    @property
    def last_source_validation(self) -> float:
        """Mean accuracy in 0..1 on the source domains' out parts at the last step."""
        return mean_out_accuracy(self.last, [i for i in range(len(self.card.domains)) if i != self.card.run.test_env])

    def last_of_target(self, part: str) -> float:
        """Accuracy in 0..1 on the target's `in` or `out` part at the last step."""
        return self.last[f"env{self.card.run.test_env}_{part}_acc"]


@dataclass(frozen=True)
class Selection:
    """A way to choose what is reported: of several hyper-parameters those with the greatest `score`."""

    definition: str
    score: Callable[[Result], float]
    accuracy: Callable[[Result], float]
    in_domain: Callable[[Result], float]


SELECTIONS = {
    "source validation": Selection(
        "checkpoint and hyper-parameters with the best mean accuracy on the source domains' out parts",
        lambda result: result.card.source_validation_accuracy,
        lambda result: result.card.target_accuracy,
        lambda result: result.card.source_validation_accuracy,
    ),
    "last step": Selection(
        "the last checkpoint, hyper-parameters by its source validation",
        lambda result: result.last_source_validation,
        lambda result: result.last_of_target("in"),
        lambda result: result.last_source_validation,
    ),
    "oracle": Selection(
        "the last checkpoint, hyper-parameters by its accuracy on the target's out part, which no real task has",
        lambda result: result.last_of_target("out"),
        lambda result: result.last_of_target("in"),
        lambda result: result.last_source_validation,
    ),
}


@dataclass
class Row:
    """One variant of a method, or its ensemble, under one selection: cells by column, and the bytes of the model(s)."""

    method: str
    variant: str
    ensemble: bool
    selection: str
    cells: dict[str, Cell] = field(default_factory=dict)
    in_domain: dict[str, Cell] = field(default_factory=dict)  # the same models on their source domains' out parts
    models: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    float_nbytes: list[int] = field(default_factory=list)

    @property
    def label(self) -> str:
        """`EoQ`, or `EoQ, weight-bits 4` where there are several."""
        method = find_method(self.method)
        return ", ".join(filter(None, [method.ensemble_label if self.ensemble else method.label, self.variant]))

    def size(self) -> str:
        """Mean size in MB (1e6 bytes), and its ratio to one float model."""
        return f"{fmean(self.nbytes) / 1e6:.2f} MB ({fmean(self.nbytes) / fmean(self.float_nbytes):.3f}x)"


@dataclass(frozen=True)
class Table:
    """The rows of one data set, a column a target domain; or of several, a column a data set."""

    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]

    def grid(self, digits: int = 1, plus_minus: str = "+/-") -> list[list[str]]:
        """Header and rows as text."""
        sized = any(row.nbytes for row in self.rows)
        header = ["Algorithm", "Selection", *self.columns, "Avg", "In-domain", *(["Size"] if sized else [])]
        return [header] + [
            [
                row.label,
                row.selection,
                *(row.cells[name].text(digits, plus_minus) if name in row.cells else "X" for name in self.columns),
                average(row.cells, self.columns, digits),
                average(row.in_domain, self.columns, digits),
                *([row.size()] if sized else []),
            ]
            for row in self.rows
        ]


def build_table(results: Sequence[Result], ensembles: Sequence[dict[str, Any]]) -> Table:
    """The table of one data set: a row for each method, or for each variant of one whose runs differ in settings.

    A single-model cell is, for each trial, the mean over that trial's seeds of what the selection takes from the random
    hyper-parameters of each. An ensemble's members are selected by source validation, and so is its row.
    """
    names = distinguishing_settings((result.folder, result.card.dataset, result.card.run) for result in results)
    singles: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        run = result.card.run
        singles[run.method, described(settings_of(run), names[run.method])].append(result)
    several: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for record in ensembles:
        several[record["method"], described(record["settings"], names.get(record["method"], []))].append(record)
    rows = []
    for selection in SELECTIONS:
        for key in sorted(singles.keys() | several.keys(), key=in_order):
            if key in singles:
                rows.append(single_row(key, selection, singles[key]))
            if key in several and selection == "source validation":
                rows.append(ensemble_row(key, several[key]))
    notes = [*common_notes(rows), *run_notes(singles, results), *ensemble_notes(several)]
    card = results[0].card
    return Table(card.dataset, card.domains, rows, notes)


def in_order(key: Key) -> tuple[int, str, str]:
    """Sorts variants by the order of the methods."""
    method, variant = key
    return *place_of(method), variant


def single_row(key: Key, selection: str, results: Sequence[Result]) -> Row:
    """The row of single models."""
    row = Row(*key, ensemble=False, selection=selection)
    rule = SELECTIONS[selection]
    targets: Values = defaultdict(lambda: defaultdict(list))
    sources: Values = defaultdict(lambda: defaultdict(list))
    for chosen in best_draws(results, lambda result: result.card.run, rule.score):
        target, trial = chosen.card.target, chosen.card.run.trial_seed
        targets[target][trial].append(100 * rule.accuracy(chosen))
        sources[target][trial].append(100 * rule.in_domain(chosen))
        row.models.append(1)
        row.nbytes.append(chosen.card.nbytes)
        row.float_nbytes.append(chosen.card.float_nbytes)
    row.cells, row.in_domain = cells(targets), cells(sources)
    return row


def ensemble_row(key: Key, ensembles: Sequence[dict[str, Any]]) -> Row:
    """The row of ensembles."""
    row = Row(*key, ensemble=True, selection="source validation")
    targets: Values = defaultdict(lambda: defaultdict(list))
    sources: Values = defaultdict(lambda: defaultdict(list))
    for record in ensembles:
        envs = [env for env, domain in enumerate(record["domains"]) if domain != record["target"]]
        targets[record["target"]][record["trial_seed"]].append(100 * record["target_accuracy"])
        sources[record["target"]][record["trial_seed"]].append(100 * mean_out_accuracy(record, envs))
        row.models.append(record["members"])
        row.nbytes.append(record["nbytes"])
        row.float_nbytes.append(record["float_nbytes"])
    row.cells, row.in_domain = cells(targets), cells(sources)
    return row


def cells(values: Values) -> dict[str, Cell]:
    """The mean of the values of each column's trials."""
    return {
        column: Cell({trial: fmean(seeds) for trial, seeds in sorted(trials.items())})
        for column, trials in values.items()
    }


def common_notes(rows: Sequence[Row]) -> list[str]:
    """What a cell is, and each selection in one line."""
    n = span(len(cell.trials) for row in rows for cell in row.cells.values())
    return [
        "Target accuracy in percent (in part of the domain left out), mean +/- standard error over trials "
        f"(population std / sqrt(n)), n = {n}{', which gives no error' if n == '1' else ''}. X: not run.",
        *(f"{name}: {selection.definition}." for name, selection in SELECTIONS.items()),
        "In-domain: the same models on the source domains' out parts, mean over all targets.",
    ]


def run_notes(singles: dict[Key, list[Result]], results: Sequence[Result]) -> list[str]:
    """What is special about the single models."""
    notes = []
    for key in sorted(singles, key=in_order):
        label, cards = Row(*key, False, "").label, [result.card for result in singles[key]]
        notes += [f"{label} selected: {text}." for text in sorted({card.selection for card in cards})]
        seeds, draws = defaultdict(set), defaultdict(set)
        for card in cards:
            seeds[card.target, card.run.trial_seed].add(card.run.seed)
            draws[card.target, card.run.trial_seed, card.run.seed].add(card.run.hparams_seed)
        if max(map(len, seeds.values())) > 1:
            notes.append(f"{label}: a trial's value is the mean over {span(map(len, seeds.values()))} seeds.")
        if max(map(len, draws.values())) > 1:
            notes.append(f"{label}: {span(map(len, draws.values()))} sets of hyper-parameters.")
        elif apart := differing([settings_of(card.run) for card in cards]):
            notes.append(f"{label}: its runs differ in {', '.join(apart)}.")
    size = fmean(result.card.float_nbytes for result in results) / 1e6
    notes.append(f"Size: weights at their bits, all else float32; the ratio is to one float model ({size:.2f} MB).")
    return notes + [f"Data: {source}." for source in sorted({result.card.data_source for result in results})]


def ensemble_notes(several: dict[Key, list[dict[str, Any]]]) -> list[str]:
    """How many members, and how they are combined."""
    notes = []
    for key in sorted(several, key=in_order):
        ways = " or ".join(sorted({record["combine"] for record in several[key]}))
        members = span(record["members"] for record in several[key])
        notes.append(f"{Row(*key, True, '').label}: {members} members, mean of their {ways}.")
    return notes


def span(numbers: Iterable[int]) -> str:
    """`3`, or `1 to 3`; `0` of none."""
    values = sorted(set(numbers)) or [0]
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def averages(tables: Sequence[Table]) -> Table:
    """A column a data set: for each trial the mean over its target domains, and the error over these means.

    A trial counts if it has all target domains.
    """
    rows: dict[tuple[str, str, str, bool], Row] = {}
    for table in tables:
        for row in table.rows:
            place = (row.selection, row.method, row.variant, row.ensemble)
            both = rows.setdefault(place, Row(row.method, row.variant, row.ensemble, row.selection))
            if mean := mean_cell(row.cells, table.columns):
                both.cells[table.title] = mean
            if mean := mean_cell(row.in_domain, table.columns):
                both.in_domain[table.title] = mean
    selections = list(SELECTIONS)
    ordered = sorted(  # as in a table of one data set, also where the first lacks a method
        rows.values(), key=lambda r: (selections.index(r.selection), in_order((r.method, r.variant)), r.ensemble)
    )
    columns = [table.title for table in tables]
    return Table(
        "Averages", columns, ordered, [*common_notes(ordered), "A trial's value is the mean over all targets."]
    )


def as_json(table: Table, results: Sequence[Result], ensembles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every cell unrounded, with n, settings and environments."""
    return {
        "dataset": table.title,
        "domains": table.columns,
        "rows": [
            {
                "label": row.label,
                "method": row.method,
                "variant": row.variant,
                "selection": row.selection,
                "cells": {target: cell.to_dict() for target, cell in row.cells.items()},
                "in_domain": {target: cell.to_dict() for target, cell in row.in_domain.items()},
                "models": sorted(set(row.models)),
                "mean_nbytes": fmean(row.nbytes),
                "ratio_to_float": fmean(row.nbytes) / fmean(row.float_nbytes),
            }
            for row in table.rows
        ],
        "notes": table.notes,
        "runs": [asdict(result.card) for result in results],
        "ensembles": list(ensembles),
    }
