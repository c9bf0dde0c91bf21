"""A plot with its numbers beside it."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from qkernels import replace_file
from qtdog.errors import UserError
from qtdog.files import write_text

KINDS = (".png", ".svg", ".pdf")


def picture_path(output: str) -> Path:
    """--output as a path; UserError if it names no kind of picture."""
    picture = Path(output)
    if picture.suffix.lower() not in KINDS:
        raise UserError(f"--output {output} must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return picture


def save_picture(picture: Path, figure: Figure, numbers: str) -> Path:
    """Write the figure, and the CSV text `numbers` beside it; returns the latter's path."""
    table = picture.with_suffix(".csv")
    write_text(table, numbers)
    replace_file(picture, partial(figure.savefig, format=picture.suffix[1:].lower(), dpi=150))
    return table
