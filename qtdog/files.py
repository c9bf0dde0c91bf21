"""Files that are written whole or not at all, and what is in them.

Work that is finished is sealed: `done`, written last, lists the SHA-256 of its files (`sha256sum --check done` reads
it, too), and what is read back is compared with that, so that a bit that flips is noticed.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qkernels import replace_file
from qtdog.errors import UserError

DONE = "done"
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


def write_text(path: Path, text: str) -> None:
    """UTF-8, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """UTF-8, at the end of a file or as a new one; an interruption may leave a part of `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8", newline="") as out:
            out.write(text)
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line, keys sorted as in DomainBed, atomically."""
    write_text(path, records_text(records))


def records_text(records: Sequence[dict[str, Any]]) -> str:
    """What `write_records` writes."""
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Inverse of `write_records`; UserError for what it cannot have written, or a seal that does not fit."""
    try:
        return parse_records(read_sealed(path).decode())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from error


def parse_records(text: str) -> list[dict[str, Any]]:
    """Inverse of `records_text`; ValueError for what is none."""
    records = [json.loads(line) for line in text.splitlines()]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError("it is empty" if not records else "a line is no JSON object")
    return records


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a header; numbers unrounded."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


# Seals -----------------------------------------------------------------------------------------------------------

REMEDY = "bring it back from a copy, or remove its folder and give the command that made it again"


def seal(folder: Path, names: Iterable[str]) -> None:
    """Mark what lies in `folder` as finished, with the checksums of the files `names`."""
    sums = [(hashlib.sha256((folder / name).read_bytes()).hexdigest(), name) for name in names]
    write_text(folder / DONE, "".join(f"{digest}  {name}\n" for digest, name in sums))


def is_done(folder: Path) -> bool:
    """Whether a folder has the mark of finished work."""
    return (folder / DONE).is_file()


def read_sealed(path: Path) -> bytes:
    """The bytes of a file; UserError if its folder's seal says others.

    Where there is no seal, or the mere mark of earlier versions, whatever is there.
    """
    content = path.read_bytes()
    mark = path.with_name(DONE)
    text = mark.read_bytes().decode(errors="replace") if mark.is_file() else ""
    if text in ("", "done\n"):
        return content
    sums = [_SUM.fullmatch(line) for line in text.splitlines()]
    known = {found[2]: found[1] for found in sums if found}
    if None in sums or path.name not in known:
        raise UserError(f"{mark} is damaged: {REMEDY}")
    if hashlib.sha256(content).hexdigest() != known[path.name]:
        raise UserError(f"{path} is damaged, its content is not what {mark} was written for: {REMEDY}")
    return content
