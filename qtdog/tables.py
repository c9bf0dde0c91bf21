"""Tables in DomainBed's form, from runs and ensembles on disk."""

import datetime
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from qtdog.config import CollectConfig
from qtdog.errors import UserError
from qtdog.presets import METHODS
from qtdog.runs import Log, ModelCard, find_runs, read_card, read_records, write_json, write_text


@dataclass(frozen=True)
class Cell:
    """Accuracies of one row on one target domain, in percent: one value a trial."""

    trials: dict[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.trials.values())

    @property
    def stderr(self) -> float:
        """DomainBed's: population standard deviation over the trials / sqrt(their number)."""
        return pstdev(self.trials.values()) / math.sqrt(len(self.trials))

    def text(self, plus_minus: str = "+/-") -> str:
        return f"{self.mean:.1f} {plus_minus} {self.stderr:.1f}"


@dataclass
class Row:
    """One method: cells by target domain, and what it takes to store the model(s)."""

    label: str
    cells: dict[str, Cell] = field(default_factory=dict)
    models: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    float_nbytes: list[int] = field(default_factory=list)

    def average(self, domains: Sequence[str]) -> str:
        """Mean over all target domains, X if one is missing."""
        missing = any(domain not in self.cells for domain in domains)
        return "X" if missing else f"{fmean(self.cells[domain].mean for domain in domains):.1f}"

    def size(self) -> str:
        """Mean size in MB (1e6 bytes), and its ratio to one float model."""
        return f"{fmean(self.nbytes) / 1e6:.2f} MB ({fmean(self.nbytes) / fmean(self.float_nbytes):.3f}x)"


@dataclass(frozen=True)
class Table:
    """All rows of one data set."""

    dataset: str
    domains: list[str]
    rows: list[Row]
    notes: list[str]

    def grid(self, plus_minus: str = "+/-") -> list[list[str]]:
        """Header and rows as text."""
        header = ["Algorithm", *self.domains, "Avg", "Size"]
        return [header] + [
            [
                row.label,
                *(row.cells[domain].text(plus_minus) if domain in row.cells else "X" for domain in self.domains),
                row.average(self.domains),
                row.size(),
            ]
            for row in self.rows
        ]


def build_table(runs: Sequence[ModelCard], ensembles: Sequence[dict[str, Any]]) -> Table:
    """The table of one data set.

    A single-model cell is, for each trial, the mean over that trial's seeds.
    """
    rows: dict[str, Row] = {}
    counts: dict[str, set[int]] = defaultdict(set)
    for key, method in METHODS.items():
        for kind, label in (("single", method.label), ("ensemble", method.ensemble_label)):
            values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
            row = Row(label)
            if kind == "single":
                for card in (card for card in runs if card.run.method == key):
                    values[card.target][card.run.trial_seed].append(100 * card.target_accuracy)
                    row.models.append(1)
                    row.nbytes.append(card.nbytes)
                    row.float_nbytes.append(card.float_nbytes)
                counts[label] = {len(seeds) for trials in values.values() for seeds in trials.values()}
            else:
                for record in (record for record in ensembles if record["method"] == key):
                    values[record["target"]][record["trial_seed"]].append(100 * record["target_accuracy"])
                    row.models.append(record["members"])
                    row.nbytes.append(record["nbytes"])
                    row.float_nbytes.append(record["float_nbytes"])
            row.cells = {
                target: Cell({trial: fmean(seeds) for trial, seeds in sorted(trials.items())})
                for target, trials in values.items()
            }
            if row.cells:
                rows[label] = row
    first = runs[0]
    trial_counts = sorted({len(cell.trials) for row in rows.values() for cell in row.cells.values()})
    n = str(trial_counts[0]) if len(trial_counts) == 1 else f"{trial_counts[0]} to {trial_counts[-1]}"
    notes = [
        "Target accuracy in percent (in part of the domain left out), mean +/- standard error over trials "
        f"(population std / sqrt(n)), n = {n}. X: not run.",
        *sorted({f"Selection ({METHODS[card.run.method].label}): {card.selection}." for card in runs}),
    ]
    for label, seeds in counts.items():
        if label in rows and max(seeds) > 1:
            several = f"{max(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
            notes.append(f"{label}: a trial's value is the mean over {several} seeds.")
    for label in (method.ensemble_label for method in METHODS.values()):
        if label in rows:
            row = rows[label]
            several = "/".join(str(count) for count in sorted(set(row.models)))
            ways = sorted({r["combine"] for r in ensembles if METHODS[r["method"]].ensemble_label == label})
            notes.append(f"{label}: {several} members, mean of their {' or '.join(ways)}.")
    notes.append(
        f"Size: weights at their bits, all else float32; the ratio is to one float model "
        f"({fmean(card.float_nbytes for card in runs) / 1e6:.2f} MB)."
    )
    notes += [f"Data: {source}." for source in sorted({card.data_source for card in runs})]
    return Table(first.dataset, first.domains, list(rows.values()), notes)


def as_text(table: Table) -> str:
    """For a terminal."""
    grid = table.grid()
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in grid]
    return "\n".join([f"{table.dataset}", "", lines[0], "-" * max(map(len, lines)), *lines[1:], "", *table.notes, ""])


def as_markdown(table: Table) -> str:
    """For a README."""
    header, *rows = table.grid("±")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        [f"**{table.dataset}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""]
        + [f"- {note}" for note in table.notes]
        + [""]
    )


def as_latex(table: Table) -> str:
    """For a paper; needs the package booktabs."""
    header, *rows = ([escaped(cell) for cell in line] for line in table.grid(r"$\pm$"))
    body = [" & ".join(line) + r" \\" for line in rows]
    return "\n".join(
        [f"% {note}" for note in [table.dataset, *table.notes]]
        + [rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}", r"\toprule", " & ".join(header) + r" \\", r"\midrule"]
        + [*body, r"\bottomrule", r"\end{tabular}", ""]
    )


def escaped(text: str) -> str:
    """LaTeX's special characters that occur in names."""
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    return text


def as_json(table: Table, runs: Sequence[ModelCard], ensembles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every cell unrounded, with n, settings and environments."""
    return {
        "dataset": table.dataset,
        "domains": table.domains,
        "rows": [
            {
                "label": row.label,
                "cells": {
                    target: {"mean": c.mean, "stderr": c.stderr, "n": len(c.trials), "trials": c.trials}
                    for target, c in row.cells.items()
                },
                "models": sorted(set(row.models)),
                "mean_nbytes": fmean(row.nbytes),
                "ratio_to_float": fmean(row.nbytes) / fmean(row.float_nbytes),
            }
            for row in table.rows
        ],
        "notes": table.notes,
        "runs": [asdict(card) for card in runs],
        "ensembles": list(ensembles),
    }


def collect(config: CollectConfig) -> list[Path]:
    """Print the tables of everything under a folder, and write table.txt, .md, .tex and .json; returns their paths."""
    log = Log()
    folder = Path(config.folder)
    cards = [read_card(run) for run in find_runs([config.folder])]
    ensembles = [
        record
        for manifest in sorted(folder.rglob("members.json"))
        for record in read_records(manifest.with_name("results.jsonl"))
    ]
    unfinished = [
        stored.parent for stored in sorted(folder.rglob("config.yaml")) if not stored.with_name("done").is_file()
    ]
    datasets = sorted({card.dataset for card in cards})
    grouped = {
        name: ([c for c in cards if c.dataset == name], [e for e in ensembles if e["dataset"] == name])
        for name in datasets
    }
    for name, (runs, _) in grouped.items():
        if len({tuple(card.domains) for card in runs}) > 1:
            raise UserError(f"runs of {name} under {folder} have different domains: collect their folders apart")
    tables = {name: build_table(*group) for name, group in grouped.items()}
    output = Path(config.output_dir or config.folder)
    text = "\n".join(as_text(table) for table in tables.values())
    log(text)
    if unfinished:
        log(f"{len(unfinished)} unfinished run(s) left out: {', '.join(map(str, unfinished))}")
    write_text(output / "table.txt", text)
    write_text(output / "table.md", "\n".join(as_markdown(table) for table in tables.values()))
    write_text(output / "table.tex", "\n".join(as_latex(table) for table in tables.values()))
    write_json(
        output / "table.json",
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tables": [as_json(tables[name], *grouped[name]) for name in datasets],
        },
    )
    written = [output / f"table.{suffix}" for suffix in ("txt", "md", "tex", "json")]
    log("written: " + ", ".join(map(str, written)))
    return written
