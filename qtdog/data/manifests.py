"""A CSV file that lists the images of a data set of one's own.

    path,label,domain,split
    photos/0001.jpg,dog,photo,in
    drawings/7.png,dog,sketch,out

`path` is absolute or relative to the file's folder; `label` and `domain` are any names. `split` may be left out, and
then DomainBed's random split is made; where it is there, every row says `in` (trained on, and in the target domain
tested on) or `out` (validation). Other columns are ignored.
"""

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from qtdog.data.folders import ImageFiles, count
from qtdog.errors import UserError

COLUMNS = ("path", "label", "domain")


def manifest_files(manifest: str | None, log: Callable[[str], None] = print) -> ImageFiles:
    """The images that a CSV file lists; domains and classes in lexicographic order, a class's images in the file's.

    Raises:
        UserError: for a missing column, an empty cell, another word than `in` and `out`, an image that is missing,
            empty or listed twice, fewer than two domains or classes, and a domain without one of its parts; each with
            its line.
    """
    if manifest is None or not Path(manifest).is_file():
        given = f"{manifest} is not a file" if manifest else "nothing is given"
        raise UserError(f"--dataset csv needs --data-dir FILE.csv with the columns {', '.join(COLUMNS)}: {given}")
    file = Path(manifest)
    rows = read_rows(file)
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    lines: dict[Path, int] = {}
    out: set[Path] = set()
    for line, row in rows:
        path = file.parent / row["path"]
        if path in lines:
            raise UserError(f"{file}, line {line}: {path} stands in line {lines[path]}, too")
        if not path.is_file() or path.stat().st_size == 0:
            raise UserError(f"{file}, line {line}: {path} is {'empty' if path.is_file() else 'missing'}")
        lines[path] = line
        found[row["domain"]][row["label"]].append(path)
        if row.get("split") == "out":
            out.add(path)
    classes = sorted({row["label"] for _, row in rows})
    for kind, names in (("domain", sorted(found)), ("label", classes)):
        if len(names) < 2:
            raise UserError(f"{file} has {len(names)} {kind}(s), {', '.join(names)}: at least 2 are needed")
    files = {domain: {label: found[domain][label] for label in classes} for domain in sorted(found)}
    for env, (domain, labels) in enumerate(files.items()):
        lacking = [label for label, paths in labels.items() if not paths]
        log(f"  domain {env} {domain}: {count(labels):,} images" + f", none of {', '.join(lacking)}" * bool(lacking))
        held_out = sum(path in out for paths in labels.values() for path in paths)
        if out and held_out in (0, count(labels)):
            raise UserError(
                f"{file}: all images of {domain} are `{'out' if held_out else 'in'}`, both parts are needed"
            )
    return ImageFiles(file.stem, f"{len(rows):,} images that {file} lists", classes, files, out or None)


def read_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of every row, after checking that no cell is empty."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            columns = reader.fieldnames or []
            missing = [name for name in COLUMNS if name not in columns]
            if missing:
                raise UserError(
                    f"{file} lacks the column(s) {', '.join(missing)}; its first line is {','.join(columns)}"
                )
            rows = [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a CSV file in UTF-8: {error}") from error
    for line, row in rows:
        for name in COLUMNS:
            if not row[name]:
                raise UserError(f"{file}, line {line}: no {name}")
        if "split" in columns and row["split"] not in ("in", "out"):
            raise UserError(f"{file}, line {line}: split is `{row['split'] or ''}`, not `in` or `out`")
    return rows
