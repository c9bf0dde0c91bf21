"""What lies in the folders of a data set: archives' wrappers and systems' leftovers aside, what is amiss named."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from qtdog.data.formats import extensions, is_picture, way_to_open
from qtdog.data.problems import Problems

# What systems and archives leave behind, in lower case; names that start with a dot besides.
LEFTOVERS = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin", "lost+found"}
# Folders that some copies of data sets have between domain and class; `full` is all of the others together.
PARTS = {"train", "crossval", "val", "valid", "validation", "test", "full"}

STRAY_FILES = "stray files, move them away"
STRAY_FOLDERS = "stray folders, move them away"
NO_CLASS = "stray images in no class folder, sort them into <domain>/<class>/ or move them away"
BROKEN_LINKS = "broken links, mend or remove them"
TWICE = "folders that are the same {kind}, put them together"


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`, by name, but hidden files, leftovers and what documents a data set."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not is_skipped(entry.name)), key=lambda entry: entry.name)


def is_skipped(name: str) -> bool:
    """Whether something of this name is no part of a data set."""
    return name.startswith((".", "README", "LICENSE")) or name.lower() in LEFTOVERS


def folders_in(parent: Path) -> list[Path]:
    """The folders in `parent`, files aside."""
    return [Path(entry.path) for entry in listed(parent) if entry.is_dir()]


def is_broken(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link that leads nowhere."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def holds_lists(folder: Path) -> bool:
    """Whether there are files in it, and neither folders nor pictures: lists of images, archives, notes."""
    entries = listed(folder)
    return bool(entries) and not any(entry.is_dir() or is_picture(entry.name) for entry in entries)


def composed(name: str) -> str:
    """A name with each accented letter in one piece (NFC), however the file system spells it."""
    return unicodedata.normalize("NFC", name)


def named(folders: Iterable[Path], kind: str, problems: Problems) -> dict[str, Path]:
    """The folders by their names, in lexicographic order."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = composed(folder.name)
        if name in found:
            problems.add(TWICE.format(kind=kind), f"{found[name]} and {folder}")
        else:
            found[name] = folder
    return dict(sorted(found.items()))


def domain_folders(base: Path, problems: Problems) -> tuple[list[Path], list[str]]:
    """The folders in `base` that may be domains, and the names of what is left alone: lists, archives, notes."""
    folders, left_alone = [], []
    for entry in listed(base):
        if is_broken(entry):
            problems.add(BROKEN_LINKS, entry.path)
        elif entry.is_dir() and not holds_lists(Path(entry.path)):
            folders.append(Path(entry.path))
        elif not entry.is_dir() and is_picture(entry.name):
            problems.add(NO_CLASS, entry.path)
        else:
            left_alone.append(entry.name)
    return folders, left_alone


def class_folders(domain: Path, problems: Problems) -> list[list[Path]]:
    """The class folders of a domain: one list, or one of each of the PARTS that lie between."""
    folders = subfolders(unwrapped(domain), problems)
    if not are_parts(folders):
        return [folders]
    by_part = [(part.name.lower(), subfolders(part, problems)) for part in folders]
    whole = [inside for name, inside in by_part if name == "full"]
    pieces = [inside for name, inside in by_part if name != "full"]
    # `full` has the same images once more, or more of them.
    return whole if whole and entries_in(whole) > entries_in(pieces) else pieces


def are_parts(folders: list[Path]) -> bool:
    """Whether these are not classes, but parts of a domain that hold the class folders."""
    return bool(folders) and all(f.name.lower() in PARTS for f in folders) and any(map(folders_in, folders))


def entries_in(parts: list[list[Path]]) -> int:
    return sum(len(os.listdir(folder)) for part in parts for folder in part)


def unwrapped(domain: Path) -> Path:
    """The folder that holds the class folders: some archives put a domain into a folder within its own."""
    inside = folders_in(domain)
    if len(inside) == 1 and inside[0].name.lower() not in PARTS and folders_in(inside[0]):
        return unwrapped(inside[0])
    return domain


def subfolders(parent: Path, problems: Problems) -> list[Path]:
    """The folders in `parent` by name; anything else there is a problem."""
    folders = []
    for entry in listed(parent):
        if is_broken(entry):
            problems.add(BROKEN_LINKS, entry.path)
        elif entry.is_dir():
            folders.append(Path(entry.path))
        else:
            problems.add(NO_CLASS if is_picture(entry.name) else STRAY_FILES, entry.path)
    return folders


def listed_images(folder: Path, problems: Problems) -> list[Path]:
    """The images of one class of one domain, by name; anything else there, or an empty file, is a problem."""
    images = []
    for entry in listed(folder):
        if kind := problem_with(entry):
            problems.add(kind, entry.path)
        else:
            images.append(Path(entry.path))
    return images


def problem_with(entry: os.DirEntry[str]) -> str:
    """What is wrong with something that should be an image file, and what to do; empty if nothing is."""
    if is_broken(entry):
        return BROKEN_LINKS
    if entry.is_dir():
        return "stray folders among images, move them away"
    if way := way_to_open(entry.name):
        return f"images that this Pillow cannot open, {way}, or convert them"
    if os.path.splitext(entry.name)[1].lower() not in extensions():
        return f"stray files, not images ({', '.join(sorted(extensions()))}), move them away"
    if entry.stat().st_size == 0:
        return "images that are empty, replace or remove them"
    return ""
