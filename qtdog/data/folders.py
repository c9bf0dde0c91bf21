"""Any `<root>/<domain>/<class>/<image>` folder."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qtdog.data.listing import (
    are_parts,
    class_folders,
    composed,
    domain_folders,
    folders_in,
    holds_lists,
    listed,
    listed_images,
    named,
)
from qtdog.data.problems import Problems
from qtdog.errors import UserError, listing

LAYOUT = "<root>/<domain>/<class>/<image>"


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

    One folder that holds everything may lie between, also within a domain; the class folders may lie in `train`, `val`
    and `test`, which are put together. Left alone are names that start with a dot, README or LICENSE, what systems
    leave behind, and beside the domains files that are no images and folders of such files.

    Raises:
        UserError: naming all stray files and folders, broken links, empty domains and images, classes that a domain
            lacks, and fewer than two domains or classes.
    """
    base = innermost(existing_folder("folder", root, "ROOT/<domain>/<class>/<image>"))
    problems = Problems()
    folders, left_alone = domain_folders(base, problems)
    found: dict[str, dict[str, list[Path]]] = {}
    for name, folder in named(folders, "domain", problems).items():
        found[name] = images_by_class(folder, problems)
        if not found[name]:
            problems.add(f"domains that hold no images, fill them as {LAYOUT} or remove them", folder)
    classes = sorted(set().union(*found.values()))
    found = {name: {label: files[label] for label in sorted(files)} for name, files in found.items()}
    for kind, names in (("domain folders", list(found)), ("classes", classes)):
        if len(names) < 2:
            problems.add(f"at least 2 {kind} are needed ({LAYOUT}), there are {len(names)}", ", ".join(names) or "none")
    check_classes(found, problems)
    problems.refuse(f"the data set {base}")
    if left_alone:
        log(f"  left alone: {listing(left_alone)}")
    for env, (name, files) in enumerate(found.items()):
        log(f"  domain {env} {name}: {count(files):,} images")
    total = sum(map(count, found.values()))
    return ImageFiles(composed(base.resolve().name), f"{total:,} images under {base}", classes, found)


def innermost(base: Path) -> Path:
    """The folder of the domains: `base`, or what it holds if that is one folder with everything in it."""
    inside = [folder for folder in folders_in(base) if not holds_lists(folder)]
    if len(inside) == 1:
        domains = folders_in(inside[0])
        if any(map(folders_in, domains)) and not are_parts(domains):
            return innermost(inside[0])
    return base


def images_by_class(domain: Path, problems: Problems) -> dict[str, list[Path]]:
    """The images of each class whose folder is not empty."""
    found: dict[str, list[Path]] = {}
    for part in class_folders(domain, problems):
        for name, folder in named(part, "class", problems).items():
            if listed(folder):
                found.setdefault(name, []).extend(listed_images(folder, problems))
    return found


def check_classes(found: Mapping[str, Mapping[str, object]], problems: Problems) -> None:
    """Note the classes that some domains have and others lack, and those among them that differ in spelling only."""
    classes = sorted(set().union(*found.values()))
    spellings = other_spellings(found)
    for label in classes:
        lacking = [name for name, files in found.items() if files and label not in files]
        if lacking and label in spellings:
            having = [name for name, files in found.items() if label in files]
            problems.add("classes that domains spell in several ways, name them alike", f"{label} in {listing(having)}")
        elif lacking:
            problems.add(
                "classes that some domains lack, add or remove them, or list the images in a CSV file (--dataset csv), "
                "where a domain may lack some",
                f"{label} in {listing(lacking)}",
            )


def other_spellings(found: Mapping[str, Mapping[str, object]]) -> set[str]:
    """Classes of which other domains have one that differs in case, spaces, dashes and underscores alone.

    Not where a domain has both: letters are classes, too.
    """
    by_spelling: dict[str, dict[str, None]] = {}
    for files in found.values():
        for label in files:
            by_spelling.setdefault(spelling(label), {})[label] = None
    several = [labels for labels in by_spelling.values() if len(labels) > 1]
    return {
        label
        for labels in several
        if not any(len(labels.keys() & files.keys()) > 1 for files in found.values())
        for label in labels
    }


def spelling(label: str) -> str:
    """What spellings of a name have in common."""
    return re.sub(r"[\s_-]+", "", label.casefold()) or label


def existing_folder(dataset: str, root: str | None, layout: str) -> Path:
    """`--data-dir` as a path, or a UserError that shows the layout."""
    if root is None:
        raise UserError(f"--dataset {dataset} needs --data-dir ROOT with {layout}")
    if not Path(root).is_dir():
        raise UserError(f"--data-dir {root} is not a folder")
    return Path(root)


def count(classes: Mapping[str, list[Path]]) -> int:
    """Number of images of one domain."""
    return sum(map(len, classes.values()))
