"""`qtdog compare`: by how much a method beats another on the same trials, and how sure that is."""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from qtdog.errors import UserError
from qtdog.files import csv_text, write_json, write_text
from qtdog.log import PRINT, Log
from qtdog.methods.presets import ENSEMBLES, find_method
from qtdog.results.collect import read_folder
from qtdog.results.reported import METRICS, MetricName
from qtdog.results.rows import Row
from qtdog.results.statistics import Cell, mean_cell, t_quantile, t_within
from qtdog.results.tables import Table, build_tables


@dataclass
class CompareConfig:
    """Settings of `qtdog compare`."""

    folder: Annotated[str, "folder that holds runs and ensembles at any depth"] = "runs"
    methods: Annotated[
        list[str],
        "two of them, the second is compared with the first; one of several variants by its label in the table",
    ] = field(default_factory=list)
    metric: Annotated[MetricName, "what is compared; `worst` is the accuracy of the worst domain"] = "accuracy"
    confidence: Annotated[float, "of the intervals"] = 0.95
    output_dir: Annotated[str | None, "where comparison_*.txt, .csv and .json go (default: the folder)"] = None
    digits: Annotated[int, "decimals of a percent; of nats two more"] = 1


@dataclass(frozen=True)
class Difference:
    """The second method's values less the first's, one a trial that both have.

    Args:
        target: the column, `Avg` or `Worst`.
        first: the values of the first method by trial, in the metric's unit.
        second: those of the second, of the same trials.
        confidence: of the interval, in 0..1.
    """

    target: str
    first: Mapping[int, float]
    second: Mapping[int, float]
    confidence: float

    @property
    def trials(self) -> dict[int, float]:
        """The differences by trial."""
        return {trial: self.second[trial] - self.first[trial] for trial in self.first}

    @property
    def mean(self) -> float:
        return fmean(self.trials.values())

    @property
    def stderr(self) -> float | None:
        """Sample standard deviation (of n - 1) / sqrt(n); None for fewer than 2."""
        return stdev(self.trials.values()) / math.sqrt(len(self.trials)) if len(self.trials) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's: the mean -/+ its quantile for n - 1 degrees of freedom times the standard error."""
        if self.stderr is None:
            return None
        reach = t_quantile(self.confidence, len(self.trials) - 1) * self.stderr
        return self.mean - reach, self.mean + reach

    @property
    def p_value(self) -> float | None:
        """Of the paired t test, two-sided: how likely so large a mean is where there is no difference."""
        if self.stderr is None:
            return None
        if self.stderr == 0:
            return float(self.mean == 0)
        return 1 - t_within(abs(self.mean) / self.stderr, len(self.trials) - 1)

    def to_dict(self) -> dict[str, Any]:
        """Unrounded, for JSON."""
        low, high = self.interval or (None, None)
        return {
            "target": self.target,
            "first": fmean(self.first.values()),
            "second": fmean(self.second.values()),
            "difference": self.mean,
            "stderr": self.stderr,
            "low": low,
            "high": high,
            "p_value": self.p_value,
            "n": len(self.trials),
            "trials": self.trials,
        }


@dataclass(frozen=True)
class Comparison:
    """Two rows of a table, compared."""

    table: Table
    first: Row
    second: Row
    differences: list[Difference]
    notes: list[str]

    def text(self, digits: int) -> str:
        """For a terminal."""
        digits += self.table.metric.digits

        def line(one: Difference) -> list[str]:
            error = "" if one.stderr is None else f" +/- {one.stderr:.{digits}f}"
            interval = "" if one.interval is None else " to ".join(f"{end:+.{digits}f}" for end in one.interval)
            p = "" if one.p_value is None else "< 0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}"
            means = [f"{fmean(values.values()):.{digits}f}" for values in (one.first, one.second)]
            return [one.target, *means, f"{one.mean:+.{digits}f}{error}", interval, p, str(len(one.trials))]

        percent = f"{100 * self.differences[0].confidence:g} % interval"
        header = ["Target", self.first.label, self.second.label, "Difference", percent, "p", "n"]
        lines = [header, *map(line, self.differences)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(map(str.ljust, each, widths)).rstrip() for each in lines]
        metric = self.table.metric
        title = f"{self.table.title}: {self.second.label} less {self.first.label}, {metric.flag} in {metric.unit}"
        return "\n".join([title, "", shown[0], "-" * max(map(len, shown)), *shown[1:], "", *self.notes, ""])

    def to_dict(self) -> dict[str, Any]:
        """Unrounded, for JSON."""
        return {
            "dataset": self.table.dataset,
            "left_out": self.table.left_out,
            "metric": self.table.metric.flag,
            "unit": self.table.metric.unit,
            "first": self.first.label,
            "second": self.second.label,
            "confidence": self.differences[0].confidence,
            "differences": [one.to_dict() for one in self.differences],
            "notes": self.notes,
        }


def compare(config: CompareConfig, log: Log = PRINT) -> list[Path]:
    """Print the comparison of two methods on each data set; returns the paths of the .txt, .csv and .json.

    Raises:
        UserError: for methods that are not there, or that have no two trials in common.
    """
    if len(config.methods) != 2:
        raise UserError(f"--methods takes two, as in `--methods erm qtdog`, not {len(config.methods)}")
    if not 0 < config.confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, as .95 does, not {config.confidence}")
    if config.digits < 0:
        raise UserError(f"--digits must not be negative, not {config.digits}")
    metric = METRICS[config.metric]
    collected = read_folder(config.folder, metric).values()
    tables = [table for one in collected for table in build_tables(one.results, one.ensembles, metric)]
    found = [(table, [find_row(table, name) for name in config.methods]) for table in tables]
    for i, name in enumerate(config.methods):
        if all(rows[i] is None for _, rows in found):
            labels = dict.fromkeys(row.label for table in tables for row in candidates(table))
            raise UserError(f"--methods {name}: {config.folder} has {'; '.join(labels)}")
    comparisons = []
    for table, (first, second) in found:
        if first is not None and first is second:
            raise UserError(f"--methods {' and '.join(config.methods)} are the same row, {first.label}")
        if first is not None and second is not None:
            comparisons.append(compare_rows(table, first, second, config.confidence))
        else:
            missing = [name for name, row in zip(config.methods, (first, second), strict=True) if row is None]
            log(f"{table.title} is left out: there is no {' and no '.join(missing)}")
    shown = [one for one in comparisons if any(each.stderr is not None for each in one.differences)]
    if not shown:
        raise UserError(
            f"{' and '.join(config.methods)} have no two trials of a target in common, and one gives no interval: "
            "train both with more --trial-seed, or `qtdog sweep --n-trials 3`"
        )
    for one in comparisons:
        if one not in shown:
            log(f"{one.table.title} is left out: no target has two trials that both methods have")
    return write(shown, config, log)


def write(comparisons: Sequence[Comparison], config: CompareConfig, log: Log) -> list[Path]:
    """Print, and write as text, CSV and JSON."""
    text = "\n".join(one.text(config.digits) for one in comparisons)
    log(text)
    names = [*config.methods, *([] if config.metric == "accuracy" else [config.metric])]
    stem = "_".join(["comparison", *(re.sub(r"[^\w.+-]+", "_", name) for name in names)])
    written = [Path(config.output_dir or config.folder) / f"{stem}.{suffix}" for suffix in ("txt", "csv", "json")]
    numbers = ["target", "first", "second", "difference", "stderr", "low", "high", "p_value", "n"]
    lines = []
    for one in comparisons:
        start = [one.table.title, one.table.metric.flag, one.first.label, one.second.label, config.confidence]
        for values in (difference.to_dict() for difference in one.differences):
            lines.append([*start, *("" if values[name] is None else values[name] for name in numbers)])
    header = ["table", "metric", "first_method", "second_method", "confidence", *numbers]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_text(written[0], text)
    write_text(written[1], csv_text(header, lines))
    write_json(written[2], {"date": date, "comparisons": [one.to_dict() for one in comparisons]})
    log("written: " + ", ".join(map(str, written)))
    return written


def candidates(table: Table) -> list[Row]:
    """The rows that may be compared: of models that were selected by source validation."""
    return [row for row in table.rows if row.selection == "source validation"]


def find_row(table: Table, name: str) -> Row | None:
    """The row that a user means by its label, or by its method if that has one row; None if there is no such row.

    Raises:
        UserError: for a method of several rows.
    """
    wanted = name.casefold()
    rows = candidates(table)
    if exact := [row for row in rows if row.label.casefold() == wanted]:
        return exact[0]
    of_method = [row for row in rows if wanted in (each.casefold() for each in names_of(row))]
    if len(of_method) > 1:
        labels = "; ".join(f'"{row.label}"' for row in of_method)
        raise UserError(f"--methods {name} has several variants on {table.title}, name one of them: {labels}")
    return of_method[0] if of_method else None


def names_of(row: Row) -> list[str]:
    """What a user may call the method of a row: `qtdog` or `QT-DoG`, of its ensemble `eoq` or `EoQ`."""
    method = find_method(row.method)
    if not row.ensemble:
        return [row.method, method.label]
    return [method.ensemble_label, *(name for name, (member, _) in ENSEMBLES.items() if member == row.method)]


def compare_rows(table: Table, first: Row, second: Row, confidence: float) -> Comparison:
    """Column by column, on average, and where each is worst."""
    rows = (first, second)
    columns = [column for column in table.columns if all(column in row.cells for row in rows)]
    columns = [column for column in columns if first.cells[column].trials.keys() & second.cells[column].trials.keys()]
    pairs: list[tuple[str, Cell | None, Cell | None]] = [
        (column, first.cells[column], second.cells[column]) for column in columns
    ]
    if len(columns) > 1:
        summaries = {} if table.metric.is_of_the_worst_domain else {"Avg": fmean}
        for name, mean in {**summaries, "Worst": table.metric.worst}.items():
            pairs.append((name, mean_cell(first.cells, columns, mean), mean_cell(second.cells, columns, mean)))
    differences = []
    for name, a, b in pairs:
        if a and b and (both := sorted(a.trials.keys() & b.trials.keys())):
            of_first, of_second = ({trial: cell.trials[trial] for trial in both} for cell in (a, b))
            differences.append(Difference(name, of_first, of_second, confidence))
    return Comparison(table, first, second, differences, notes(table, rows, columns, differences))


def notes(table: Table, rows: tuple[Row, Row], columns: Sequence[str], differences: Sequence[Difference]) -> list[str]:
    """What the numbers are, and which were left out."""
    worst = "smallest" if table.metric.worst is min else "greatest"
    summaries = f"for each trial that has all of {', '.join(columns)} their mean, or the {worst}, then as a target"
    told = [
        "Difference: mean over the n trials that both have, +/- its standard error (sample std / sqrt(n)); interval "
        "and p by Student's t for pairs, which takes the trials' differences for independent and normal.",
        *([f"Avg, Worst: {summaries}."] if len(columns) > 1 else []),
        f"{'More' if table.metric.worst is min else 'Less'} is better. Models are selected by source validation.",
    ]
    if single := [one.target for one in differences if one.stderr is None]:
        told.append(f"One pair gives no interval: {', '.join(single)}.")
    for row, other in (rows, rows[::-1]):
        alone = []
        for column in table.columns:
            own, others = (set(each.cells[column].trials) if column in each.cells else set() for each in (row, other))
            if trials := sorted(own - others):
                alone.append(f"{column} trial{'s' * (len(trials) > 1)} {', '.join(map(str, trials))}")
        if alone:
            told.append(f"Left out, since {other.label} lacks them: {'; '.join(alone)}.")
    return told
