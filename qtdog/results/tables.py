"""Tables in DomainBed's form, from runs and ensembles on disk."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from qtdog.results.notes import common_notes, ensemble_notes, run_notes
from qtdog.results.reported import ACCURACY, Metric
from qtdog.results.rows import Key, Row, by_key, ensemble_row, in_order, single_row
from qtdog.results.selections import SELECTIONS, Result, column_of, targets_of
from qtdog.results.statistics import Cell, average, mean_cell
from qtdog.results.variants import described, distinguishing_settings


@dataclass(frozen=True)
class Table:
    """The rows of one data set, a column a target; or of several, a column a data set.

    Args:
        dataset: its name, or `Averages`.
        columns: in their order.
        rows: in their order.
        notes: a sentence or two each.
        metric: what the cells hold.
        left_out: how many domains each run leaves out at once; a target is so many.
    """

    dataset: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]
    metric: Metric = ACCURACY
    left_out: int = 1

    @property
    def title(self) -> str:
        """The data set, and how many domains were left out if that is more than one."""
        return self.dataset if self.left_out == 1 else f"{self.dataset}, {self.left_out} domains left out at once"

    def grid(self, digits: int = 1, plus_minus: str = "+/-") -> list[list[str]]:
        """Header and rows as text; `digits` are decimals of a percent."""
        digits += self.metric.digits
        sized = any(row.nbytes for row in self.rows)
        averaged = not self.metric.is_of_the_worst_domain

        def text(cell: Cell | None) -> str:
            return "X" if cell is None else cell.text(digits, plus_minus)

        def number(value: float | None) -> str:
            return "X" if value is None else f"{value:.{digits}f}"

        summaries = [*(["Avg"] if averaged else []), "Worst", "In-domain", *(["Size"] if sized else [])]
        return [["Algorithm", "Selection", *self.columns, *summaries]] + [
            [
                row.label,
                row.selection,
                *(text(row.cells.get(name)) for name in self.columns),
                *([number(average(row.cells, self.columns))] if averaged else []),
                text(self.worst(row.cells)),
                number(self.in_domain(row)),
                *([row.size()] if sized else []),
            ]
            for row in self.rows
        ]

    def worst(self, cells: Mapping[str, Cell]) -> Cell | None:
        """For each trial that has all columns the worst of them; None if there is no such trial."""
        return mean_cell(cells, self.columns, self.metric.worst)

    def in_domain(self, row: Row) -> float | None:
        """The same models on their source domains: mean over all columns, or the worst as the metric has it."""
        if not self.metric.is_of_the_worst_domain:
            return average(row.in_domain, self.columns)
        worst = self.worst(row.in_domain)
        return None if worst is None else worst.mean


def build_tables(
    results: Sequence[Result], ensembles: Sequence[dict[str, Any]], metric: Metric = ACCURACY
) -> list[Table]:
    """The tables of one data set: one of the runs that leave out one domain, one of those that leave out two, ..."""
    groups: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        groups[len(result.targets)].append(result)
    return [
        build_table(
            groups[count],
            [record for record in ensembles if len(targets_of(record)) == count],
            metric,
            groups.get(count + 1, []),
        )
        for count in sorted(groups)
    ]


def build_table(
    results: Sequence[Result],
    ensembles: Sequence[dict[str, Any]],
    metric: Metric = ACCURACY,
    wider: Sequence[Result] = (),
) -> Table:
    """A row for each method, or for each variant of one whose runs differ in settings.

    A single-model cell is, for each trial, the mean over that trial's seeds of what the selection takes from the
    hyper-parameters of each, be they drawn or a grid's. An ensemble's members are selected by source validation, and so
    is its row.

    Args:
        results: runs of one data set, with the same number of targets.
        ensembles: records of its ensembles, with that number of targets.
        metric: what the cells hold.
        wider: runs of the same data set that leave out one domain more, for the selection that asks them.
    """
    names = distinguishing_settings((one.folder, one.card.dataset, one.card.run) for one in (*results, *wider))
    singles, beside = by_key(results, names), by_key(wider, names)
    several: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for record in ensembles:
        mixed = f"mixed {' and '.join(record['mix'])}" if record.get("mix") else ""
        variant = described(record["settings"], names.get(record["method"], []))
        several[record["method"], ", ".join(filter(None, [variant, mixed]))].append(record)
    rows = []
    for selection in SELECTIONS:
        for key in sorted(singles.keys() | several.keys(), key=in_order):
            if key in singles and (row := single_row(key, selection, singles[key], beside.get(key, []), metric)):
                rows.append(row)
            if key in several and selection == "source validation":
                rows.append(ensemble_row(key, several[key], metric))
    card, left_out = results[0].card, len(results[0].targets)
    columns = card.domains
    if left_out > 1:
        targets = {tuple(one.targets) for one in results} | {tuple(targets_of(one)) for one in ensembles}
        columns = [column_of(card.domains, each) for each in sorted(targets)]
    notes = [*common_notes(rows, metric, left_out), *run_notes(rows, singles), *ensemble_notes(several)]
    return Table(card.dataset, columns, rows, notes, metric, left_out)


def averages(tables: Sequence[Table]) -> Table:
    """A column a data set: for each trial the mean over its target domains, and the error over these means.

    A trial counts if it has all target domains. Of the metric of the worst domain, the worst of them.
    """
    metric, left_out = tables[0].metric, tables[0].left_out
    mean = metric.worst if metric.is_of_the_worst_domain else fmean
    rows: dict[tuple[str, str, str, bool], Row] = {}
    for table in tables:
        for row in table.rows:
            place = (row.selection, row.method, row.variant, row.ensemble)
            both = rows.setdefault(place, Row(row.method, row.variant, row.ensemble, row.selection))
            if cell := mean_cell(row.cells, table.columns, mean):
                both.cells[table.dataset] = cell
            if cell := mean_cell(row.in_domain, table.columns, mean):
                both.in_domain[table.dataset] = cell
    selections = list(SELECTIONS)
    ordered = sorted(  # as in a table of one data set, also where the first lacks a method
        rows.values(), key=lambda r: (selections.index(r.selection), in_order((r.method, r.variant)), r.ensemble)
    )
    what = "worst of" if metric.is_of_the_worst_domain else "mean over"
    notes = [*common_notes(ordered, metric, left_out), f"A trial's value is the {what} all targets."]
    return Table("Averages", [table.dataset for table in tables], ordered, notes, metric, left_out)


def as_json(table: Table, results: Sequence[Result], ensembles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every cell unrounded, with n, settings and environments; runs and ensembles of other tables are left out."""
    rows = []
    for row in table.rows:
        worst = table.worst(row.cells)
        rows.append(
            {
                "label": row.label,
                "method": row.method,
                "variant": row.variant,
                "selection": row.selection,
                "cells": {target: cell.to_dict() for target, cell in row.cells.items()},
                "average": None if table.metric.is_of_the_worst_domain else average(row.cells, table.columns),
                "worst": None if worst is None else worst.to_dict(),
                "in_domain": {target: cell.to_dict() for target, cell in row.in_domain.items()},
                "models": sorted(set(row.models)),
                "mean_nbytes": fmean(row.nbytes),
                "ratio_to_float": fmean(row.nbytes) / fmean(row.float_nbytes),
            }
        )
    return {
        "dataset": table.dataset,
        "left_out": table.left_out,
        "metric": table.metric.flag,
        "unit": table.metric.unit,
        "domains": table.columns,
        "rows": rows,
        "notes": table.notes,
        "runs": [asdict(result.card) for result in results if len(result.targets) == table.left_out],
        "ensembles": [record for record in ensembles if len(targets_of(record)) == table.left_out],
    }
