"""Any `<root>/<domain>/<class>/<image>` folder."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtdog.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a data set by domain and class, none of them opened yet.

    `out` are those that a manifest gives to the `out` parts; None leaves it to DomainBed's random split.
    """

    name: str
    source: str
    classes: list[str]
    files: dict[str, dict[str, list[Path]]]
    out: set[Path] | None = None


def folder_files(root: str | None, log: Callable[[str], None] = print) -> ImageFiles:
    """What lies under `root`; domains and classes in lexicographic order, images in torchvision's ImageFolder order.

    Names that start with a dot, README or LICENSE are skipped; any other stray file or folder, an empty domain, an
    empty image file and a class that one domain lacks are errors.
    """
    base = existing_folder("folder", root, "ROOT/<domain>/<class>/<image>")
    found = {}
    for domain in subfolders(base, "domain"):
        found[domain.name] = {
            folder.name: images for folder in subfolders(domain, "class") if (images := listed_images(folder))
        }
        if not found[domain.name]:
            raise UserError(f"the domain {domain} holds no images: fill it as <domain>/<class>/<image> or remove it")
        log(f"  domain {len(found) - 1} {domain.name}: {count(found[domain.name]):,} images")
    if len(found) < 2:
        raise UserError(
            f"{base} holds {len(found)} domain folder(s); at least 2 are needed: <root>/<domain>/<class>/<image>"
        )
    classes = sorted(set().union(*found.values()))
    lacking = {name: sorted(set(classes) - set(files)) for name, files in found.items()}
    if any(lacking.values()):
        parts = [f"{name} lacks {', '.join(missing)}" for name, missing in lacking.items() if missing]
        raise UserError(f"domains of {base} do not share their classes: {'; '.join(parts)}")
    total = sum(map(count, found.values()))
    return ImageFiles(base.resolve().name, f"{total:,} images under {base}", classes, found)


def existing_folder(dataset: str, root: str | None, layout: str) -> Path:
    """`--data-dir` as a path, or a UserError that shows the layout."""
    if root is None:
        raise UserError(f"--dataset {dataset} needs --data-dir ROOT with {layout}")
    if not Path(root).is_dir():
        raise UserError(f"--data-dir {root} is not a folder")
    return Path(root)


def count(classes: dict[str, list[Path]]) -> int:
    """Number of images of one domain."""
    return sum(map(len, classes.values()))


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`, by name, but hidden files and those that document a data set."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not entry.name.startswith((".", "README", "LICENSE"))]
    return sorted(kept, key=lambda entry: entry.name)


def subfolders(parent: Path, kind: str) -> list[Path]:
    """The folders in `parent` by name; anything else there is a UserError."""
    entries = listed(parent)
    for entry in entries:
        if not entry.is_dir():
            raise UserError(f"stray file {entry.path}: {parent} may hold {kind} folders only; move it away")
    return [Path(entry.path) for entry in entries]


def listed_images(folder: Path) -> list[Path]:
    """The images of one class of one domain, by name; anything else there, or an empty file, is a UserError."""
    entries = listed(folder)
    for entry in entries:
        if entry.is_dir():
            raise UserError(f"stray folder {entry.path}: {folder} may hold images only; move it away")
        if Path(entry.name).suffix.lower() not in EXTENSIONS:
            raise UserError(f"stray file {entry.path}: not an image ({', '.join(sorted(EXTENSIONS))}); move it away")
        if entry.stat().st_size == 0:
            raise UserError(f"{entry.path} is empty, an image was expected: replace or remove it")
    return [Path(entry.path) for entry in entries]
