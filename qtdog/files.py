"""Files that are written whole or not at all, and what is in them."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qkernels import replace_file


def write_text(path: Path, text: str) -> None:
    """UTF-8, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line, keys sorted as in DomainBed, atomically."""
    write_text(path, "".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Inverse of `write_records`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a header; numbers unrounded."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()
