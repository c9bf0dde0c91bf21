"""A plot with its numbers beside it."""

import csv
import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qtdog.errors import UserError
from qtdog.results.runs import replace_file, write_text

KINDS = (".png", ".svg", ".pdf")


def picture_path(output: str) -> Path:
    """--output as a path; UserError if it names no kind of picture."""
    picture = Path(output)
    if picture.suffix.lower() not in KINDS:
        raise UserError(f"--output {output} must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return picture


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a header; numbers unrounded."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def save_picture(picture: Path, figure: Figure, numbers: str) -> Path:
    """Write the figure, and the CSV text `numbers` beside it; returns the latter's path."""
    table = picture.with_suffix(".csv")
    write_text(table, numbers)
    replace_file(picture, partial(figure.savefig, format=picture.suffix[1:].lower(), dpi=150))
    return table
