"""A CSV file that lists the images of a data set of one's own.

    path,label,domain,split
    photos/0001.jpg,dog,photo,in
    drawings/7.png,dog,sketch,out

`path` is absolute or relative to the file's folder; `label` and `domain` are any names. `split` may be left out, and
then DomainBed's random split is made; where it is there, every row says `in` (trained on, and in the target domain
tested on) or `out` (validation). Other columns are ignored.
"""

import csv
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from qtdog.data.folders import ImageFiles, count, other_spellings
from qtdog.data.listing import composed
from qtdog.data.problems import Problems
from qtdog.errors import UserError

COLUMNS = ("path", "label", "domain")


def manifest_files(manifest: str | None, log: Callable[[str], None] = print, least: int = 2) -> ImageFiles:
    """The images that a CSV file lists; domains and classes in lexicographic order, a class's images in the file's.

    Args:
        least: domains, and classes. With 1, images to judge a model on, whose parts are of no interest.

    Raises:
        UserError: for missing columns; or naming all lines with an empty cell, another word than `in` and `out`, an
            image that is missing, empty or listed twice, and for fewer than two domains or classes, labels that domains
            spell in several ways, and domains without one of their parts.
    """
    if manifest is None or not Path(manifest).is_file():
        given = f"{manifest} is not a file" if manifest else "nothing is given"
        raise UserError(f"--dataset csv needs --data-dir FILE.csv with the columns {', '.join(COLUMNS)}: {given}")
    file = Path(manifest)
    problems = Problems()
    rows = read_rows(file, problems)
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    lines: dict[Path, int] = {}
    out: set[Path] = set()
    for line, row in rows:
        path = existing(file.parent / row["path"])
        if path in lines:
            problems.add(
                "images listed twice, leave one of the lines out", f"line {line}: {path} of line {lines[path]}"
            )
        elif not path.is_file():
            missing = "leads nowhere" if path.is_symlink() else "is missing"
            problems.add(
                "images that are not there, bring them back or leave them out", f"line {line}: {path} {missing}"
            )
        elif path.stat().st_size == 0:
            problems.add("images that are empty, replace them or leave them out", f"line {line}: {path}")
        lines.setdefault(path, line)
        found[composed(row["domain"])][composed(row["label"])].append(path)
        if row.get("split") == "out":
            out.add(path)
    classes = sorted(set().union(*found.values()))
    for kind, names in (("domains", sorted(found)), ("labels", classes)):
        if len(names) < least:
            problems.add(f"at least {least} {kind} are needed, there are {len(names)}", ", ".join(names) or "none")
    for label in sorted(other_spellings(found)):
        domains = ", ".join(name for name, labels in found.items() if label in labels)
        problems.add("labels that domains spell in several ways, write them alike", f"{label} in {domains}")
    files = {domain: {label: found[domain][label] for label in classes} for domain in sorted(found)}
    for domain, labels in files.items():
        held_out = sum(path in out for paths in labels.values() for path in paths)
        if least > 1 and out and held_out in (0, count(labels)):
            problems.add("domains without one of the parts `in` and `out`, which both are needed",
                         f"{domain} has `{'out' if held_out else 'in'}` alone")  # fmt: skip
    problems.refuse(file)
    for env, (domain, labels) in enumerate(files.items()):
        lacking = [label for label, paths in labels.items() if not paths]
        log(f"  domain {env} {domain}: {count(labels):,} images" + f", none of {', '.join(lacking)}" * bool(lacking))
    return ImageFiles(file.stem, f"{len(rows):,} images that {file} lists", classes, files, out or None)


def read_rows(file: Path, problems: Problems) -> list[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of every row without an empty cell; the others are problems."""
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
    whole = []
    for line, row in rows:
        empty = [name for name in COLUMNS if not row[name]]
        if empty:
            problems.add("lines that lack something, fill it in", f"line {line}: no {' and no '.join(empty)}")
        elif "split" in columns and row["split"] not in ("in", "out"):
            problems.add(
                "lines whose split is not `in` or `out`, write one of these", f"line {line}: `{row['split'] or ''}`"
            )
        else:
            whole.append((line, row))
    return whole


def existing(path: Path) -> Path:
    """The path, or if nothing is there what goes by the same letters: accents may be apart from them (NFD) or not."""
    if path.is_file():
        return path
    forms = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
    return next((each for each in forms if each.is_file()), path)
