"""A table as text, Markdown, LaTeX and CSV."""

from collections.abc import Sequence
from typing import Any

from qtdog.files import csv_text
from qtdog.results.statistics import Cell, average
from qtdog.results.tables import Table


def as_text(table: Table, digits: int = 1) -> str:
    """For a terminal."""
    header, *rows = table.grid(digits)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *rows)]
    rule = "-" * max(map(len, lines))
    return "\n".join([table.title, "", lines[0], rule, *lines[1:], "", *table.notes, ""])


def as_markdown(table: Table, digits: int = 1) -> str:
    """For a README."""
    header, *rows = table.grid(digits, "±")
    lines = [header, ["---"] * len(header), *rows]
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"**{table.title}**", "", *body, "", *(f"- {note}" for note in table.notes), ""])


def as_latex(table: Table, digits: int = 1) -> str:
    """For a paper; needs the package booktabs. A rule between the selections."""
    header, *rows = ([escaped(cell) for cell in line] for line in table.grid(digits, r"$\pm$"))
    body = [" & ".join(header) + r" \\"]
    selection = None
    for line, row in zip(rows, table.rows, strict=True):
        if row.selection != selection:
            body.append(r"\midrule")
        body.append(" & ".join(line) + r" \\")
        selection = row.selection
    return "\n".join(
        [f"% {note}" for note in [table.title, *table.notes]]
        + [rf"\begin{{tabular}}{{ll{'c' * (len(header) - 2)}}}", r"\toprule", *body]
        + [r"\bottomrule", r"\end{tabular}", ""]
    )


def escaped(text: str) -> str:
    """LaTeX's special characters that occur in names."""
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    return text


def as_csv(tables: Sequence[Table]) -> str:
    """One line a cell, unrounded, for a spreadsheet or pandas; the summaries Avg and Worst are lines of their own."""
    lines: list[list[Any]] = []
    for table in tables:
        for row in table.rows:
            start = [table.title, table.metric.flag, row.label, row.selection]
            for column in table.columns:
                inside = row.in_domain[column].mean if column in row.in_domain else ""
                lines.append([*start, column, *numbers(row.cells.get(column)), inside])
            if not table.metric.is_of_the_worst_domain:
                mean = average(row.cells, table.columns)  # as in DomainBed without an error
                lines.append([*start, "Avg", "" if mean is None else mean, "", "", ""])
            lines.append([*start, "Worst", *numbers(table.worst(row.cells)), ""])
    header = ["table", "metric", "algorithm", "selection", "column", "mean", "stderr", "n", "in_domain"]
    return csv_text(header, lines)


def numbers(cell: Cell | None) -> list[Any]:
    """Mean, standard error and number of trials."""
    return ["", "", 0] if cell is None else [cell.mean, cell.stderr, len(cell.trials)]
