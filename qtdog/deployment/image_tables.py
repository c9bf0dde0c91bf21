"""What a model answers, a row an image, as CSV or Parquet."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkernels import replace_file
from qtdog.errors import UserError
from qtdog.files import csv_text, write_text
from qtdog.results.predictions import Answers

Columns = Mapping[str, Sequence[Any]]  # by name, all of one length

FORMATS = (".csv", ".parquet")


def check_table(file: str) -> None:
    """Raises UserError for a file that could not be written, before there is anything to write."""
    if Path(file).suffix not in FORMATS:
        raise UserError(f"{file} must end in {' or '.join(FORMATS)}")
    if Path(file).suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{file} needs the package pyarrow: `pip install 'qtdog[parquet]'`, or name a .csv file")


def columns_of(answers: Answers, classes: Sequence[str]) -> dict[str, list[Any]]:
    """What is predicted: class, probability of it, the members' disagreement, probability of each class."""
    chances, decided = answers.log_probabilities.exp(), answers.classes
    return {
        "predicted": [classes[index] for index in decided.tolist()],
        "confidence": chances.gather(1, decided[:, None])[:, 0].tolist(),
        "disagreement": answers.disagreement.tolist(),
        **{f"p({name})": chances[:, index].tolist() for index, name in enumerate(classes)},
    }


def joined(tables: Sequence[Columns]) -> dict[str, list[Any]]:
    """One table of several with the same columns."""
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def write_table(file: str, columns: Columns) -> None:
    """By the suffix of the file, atomically."""
    if Path(file).suffix == ".csv":
        write_text(Path(file), csv_text(list(columns), zip(*columns.values(), strict=True)))
        return
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(dict(columns))
    replace_file(Path(file), lambda temporary: pyarrow.parquet.write_table(table, temporary))
