"""`qtdog data prepare`: a data set laid out as <output>/<domain>/<class>/<image>, by links to where its images lie."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from qtdog.data import DIGITS, image_files
from qtdog.data.benchmarks import BENCHMARKS
from qtdog.data.folders import ImageFiles, count
from qtdog.data.formats import extensions
from qtdog.data.listing import is_skipped
from qtdog.data.problems import Problems
from qtdog.errors import UserError
from qtdog.files import write_json
from qtdog.log import Log

RECORD = ".prepared.json"  # in the folder: what was prepared there, from where
PARTIAL = ".partial"  # ends the folder's name until all is in it


@dataclass
class PrepareConfig:
    """Settings of `qtdog data prepare`."""

    dataset: Annotated[str, "which data, as for `qtdog train`"] = "folder"
    data_dir: Annotated[str | None, "where it lies now, as for `qtdog train`; nothing is changed there"] = None
    output: Annotated[str | None, "folder to make, which then holds <domain>/<class>/<image>"] = None
    copy: Annotated[bool, "copy the images; else they are symbolic links"] = False


def prepare(config: PrepareConfig) -> None:
    """Make the folder, or go on making it, and print what is in it beside what is expected.

    Until all is in it, it goes by another name, so that nobody takes half of it for the data set.

    Raises:
        UserError: for data that cannot be used as it is, names that cannot be folders, and an output folder that holds
            something else or lies in the data.
    """
    if config.output is None:
        raise UserError("--output must name the folder to make, such as data/PACS")
    if config.dataset in DIGITS:
        raise UserError(f"{config.dataset} is read as it comes, there is nothing to prepare: docs/data.md")
    log, output = Log(), Path(config.output)
    found = image_files(config.dataset, config.data_dir, lambda line: None)
    log(found.source)
    refuse_place(found, output, by_list=config.dataset == "csv")
    planned = plan(found, config.dataset)
    record = record_of(config, planned)
    if output.is_dir() and any(output.iterdir()):
        check_prepared(output, record, planned)
        log(f"{output} is prepared already, nothing was done")
    else:
        make(output, record, planned, config.copy)
        log(f"{'copied' if config.copy else 'linked'} {len(planned):,} images to {output}")
    print_counts(config.dataset, found, log)
    if found.out is not None:
        log("the column `split` is not carried over: training draws the in and out parts anew")
    trained_as = "folder" if config.dataset == "csv" else config.dataset
    log(f"use it with: --dataset {trained_as} --data-dir {output}")


def plan(found: ImageFiles, dataset: str) -> dict[str, Path]:
    """Path in the output folder -> image. The order of a class's images stays, on which its split depends."""
    problems = Problems()
    for name in [*found.files, *found.classes]:
        if is_skipped(name) or "/" in name or "\0" in name:
            problems.add("names that cannot be those of folders here, write others", name)
    planned = {}
    for domain, files in found.files.items():
        for label in found.classes:
            if not files[label]:
                problems.add(
                    f"classes that a domain lacks, which only a list may (--dataset {dataset})", f"{domain}/{label}"
                )
            for name, path in file_names(files[label]):
                if is_skipped(name) or path.suffix.lower() not in extensions():
                    problems.add("files whose names are no images', rename them", path)
                planned[f"{domain}/{label}/{name}"] = path.absolute()
    problems.refuse("what shall be prepared")
    return planned


def file_names(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    """Each image with its name in the output folder: its own, if that keeps all apart and in order, else numbered."""
    names = [path.name for path in paths]
    if names == sorted(set(names)):
        yield from zip(names, paths, strict=True)
        return
    digits = len(str(len(paths)))
    for index, path in enumerate(paths):
        yield f"{index:0{digits}}_{path.name}", path


def record_of(config: PrepareConfig, planned: dict[str, Path]) -> dict[str, Any]:
    """What was prepared: how, and a checksum of which images under which names."""
    pairs = "".join(f"{name}\0{path}\0" for name, path in planned.items())
    return {
        "dataset": config.dataset,
        "data_dir": str(Path(config.data_dir or "").absolute()),
        "copied": config.copy,
        "images": len(planned),
        "sha256": hashlib.sha256(pairs.encode(errors="surrogateescape")).hexdigest(),
    }


def refuse_place(found: ImageFiles, output: Path, by_list: bool) -> None:
    """UserError for an output that is no folder, or that would change the data which it is made of."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    parents = {path.absolute().parent for files in found.files.values() for paths in files.values() for path in paths}
    base = Path(os.path.commonpath(parents))
    place = output.resolve()
    if place in {parent.resolve() for parent in parents} or (not by_list and place.is_relative_to(base.resolve())):
        raise UserError(f"--output {output} lies in the data that it is made of: name a folder beside it")


def check_prepared(output: Path, record: dict[str, Any], planned: dict[str, Path]) -> None:
    """UserError unless a folder holds what is to be prepared, all of it."""
    try:
        there = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{output} is not empty, and not made by qtdog data prepare: name another --output") from None
    if there != record:
        was = there.get("data_dir") if isinstance(there, dict) else None
        raise UserError(
            f"{output} was prepared from other images, or in another way (from {was}): remove it or name another"
        )
    problems = Problems()
    for name, path in planned.items():
        if not is_there(output / name, path, record["copied"]):
            problems.add("images that are gone or changed since, remove the folder and prepare it anew", output / name)
    problems.refuse(output)


def make(output: Path, record: dict[str, Any], planned: dict[str, Path], copy: bool) -> None:
    """Fill the folder under another name, from where an interrupted command left it, and then give it its own."""
    partial = Path(os.path.abspath(output) + PARTIAL)
    if partial.exists() and not (partial / RECORD).is_file() and any(partial.iterdir()):
        raise UserError(
            f"{partial} is in the way, and not made by qtdog data prepare: move it, or name another --output"
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / RECORD, record)
    remove_others(partial, planned)
    for folder in {os.path.dirname(name) for name in planned}:
        (partial / folder).mkdir(parents=True, exist_ok=True)
    for name, path in tqdm(planned.items(), desc="copying" if copy else "linking", disable=None):
        place = partial / name
        if is_there(place, path, copy):
            continue
        place.unlink(missing_ok=True)
        if copy:
            half = place.with_name(f".{place.name}")
            shutil.copy2(path, half)
            os.replace(half, place)
        else:
            place.symlink_to(path)
    os.replace(partial, output)


def is_there(place: Path, path: Path, copy: bool) -> bool:
    """Whether an image has been linked or copied already."""
    if not copy:
        return place.is_symlink() and os.readlink(place) == str(path) and place.exists()
    return not place.is_symlink() and place.is_file() and place.stat().st_size == path.stat().st_size


def remove_others(partial: Path, planned: dict[str, Path]) -> None:
    """Remove what an earlier command has put there from images that have changed since."""
    for folder, _, names in os.walk(partial):
        for name in names:
            file = Path(folder, name)
            if str(file.relative_to(partial)) not in planned and file != partial / RECORD:
                file.unlink()
    for folder, _, _ in os.walk(partial, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def print_counts(name: str, found: ImageFiles, log: Log) -> None:
    """The images of each domain, beside those of DomainBed."""
    expected = BENCHMARKS[name].images if name in BENCHMARKS else {}
    for env, (domain, files) in enumerate(found.files.items()):
        number, wanted = count(files), expected.get(domain)
        beside = "" if wanted is None else ", as expected" if wanted == number else f", expected {wanted:,}"
        log(f"  domain {env} {domain}: {number:,} images of {len(found.classes)} classes{beside}")
    kinds = Counter(path.suffix.lower() for files in found.files.values() for paths in files.values() for path in paths)
    log(f"  {', '.join(f'{number:,} {kind}' for kind, number in kinds.most_common())}")
