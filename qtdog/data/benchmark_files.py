"""DomainBed's five sets of pictures on disk: `<root>/<folder>/<domain>/<class>/<image>`.

Folder names are compared without regard to case and separators, so that `Real_World`, `real-world` and `Real World` are
the same; `Benchmark.spellings` has the other names that are about. Whatever the spelling, domains and classes are
numbered in the lexicographic order of DomainBed's names.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from qtdog.data.benchmarks import BENCHMARKS, Benchmark
from qtdog.data.folders import ImageFiles, count, existing_folder, listed, listed_images, subfolders
from qtdog.errors import UserError

DUPLICATES = "domain_net_duplicates.txt"
PLURAL = {"domain": "domains", "class": "classes"}


def benchmark_files(name: str, root: str | None, log: Callable[[str], None] = print) -> ImageFiles:
    """The images of the benchmark `name`; `root` is the folder it lies in, or its own.

    Raises:
        UserError: for a stray folder or file, a missing domain, a missing or extra class, or an empty file, naming it
            and what was expected. Files beside the domain folders (archives, lists) are left alone.
    """
    benchmark = BENCHMARKS[name]
    base = located(name, root)
    duplicates = listed_duplicates(base) if name == "DomainNet" else set()
    found: dict[str, dict[str, list[Path]]] = {}
    removed = 0
    for domain, domain_folder in matched(base, folders_in(base), "domain", list(benchmark.images), benchmark).items():
        found[domain] = {}
        inside = subfolders(domain_folder, "class")
        for label, folder in matched(domain_folder, inside, "class", benchmark.classes, benchmark).items():
            images = listed_images(folder)
            found[domain][label] = [path for path in images if (domain, label, path.name) not in duplicates]
            removed += len(images) - len(found[domain][label])
            if not found[domain][label]:
                raise UserError(f"{folder} holds no images: {name} has some of every class in every domain")
        log(f"  domain {len(found) - 1} {domain}: {count(found[domain]):,} images")
    total, expected = sum(map(count, found.values())), sum(benchmark.images.values())
    notes = [f"{name}, {total:,} images under {base}"]
    if name == "DomainNet":
        notes.append(f"{removed:,} duplicates left out" if duplicates else f"no {DUPLICATES} there to leave out")
    if total != expected:
        notes.append(f"NOT DomainBed's {expected:,} (see `qtdog data verify`)")
    return ImageFiles(name, ", ".join(notes), benchmark.classes, found)


def located(name: str, root: str | None) -> Path:
    """The folder of the domains: `root`, a subfolder that goes by the data set's name, or `images` in one of these."""
    benchmark = BENCHMARKS[name]
    base = existing_folder(name, root, f"ROOT/{benchmark.folder}/<domain>/<class>/<image>")
    names, domains = spelled([name, benchmark.folder], benchmark), spelled(benchmark.images, benchmark)
    named = [folder for folder in folders_in(base) if simple(folder.name) in names]
    for place in (base, *sorted(named, key=lambda folder: folder.name != benchmark.folder)):
        for candidate in (place, place / "images"):
            if candidate.is_dir() and any(simple(folder.name) in domains for folder in folders_in(candidate)):
                return candidate
    raise UserError(
        f"no {name} under {base}: expected {benchmark.folder}/ with the domains {', '.join(benchmark.images)}, "
        "or --data-dir of the folder that holds these"
    )


def matched(
    parent: Path, folders: Iterable[Path], kind: str, expected: list[str], benchmark: Benchmark
) -> dict[str, Path]:
    """The folders by DomainBed's names, in the order of `expected`: each of these once and nothing else."""
    names = ": " + ", ".join(expected) if len(expected) <= 10 else ""
    wanted = f"{parent} must hold the {len(expected)} {PLURAL[kind]} of {benchmark.folder}{names}"
    known = spelled(expected, benchmark)
    found: dict[str, Path] = {}
    for folder in folders:
        name = known.get(simple(folder.name))
        if name is None:
            raise UserError(f"stray folder {folder}, move it away: {wanted}")
        if name in found:
            raise UserError(f"{found[name]} and {folder} are both {name}: {wanted}")
        found[name] = folder
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"{parent} lacks the {kind} {', '.join(missing)}: {wanted}")
    return {name: found[name] for name in expected}


def folders_in(parent: Path) -> list[Path]:
    """The folders in `parent`, files aside."""
    return [Path(entry.path) for entry in listed(parent) if entry.is_dir()]


def spelled(names: Iterable[str], benchmark: Benchmark) -> dict[str, str]:
    """DomainBed's name by each of its spellings, simplified."""
    return {simple(each): name for name in names for each in (name, *benchmark.spellings.get(name, []))}


def simple(name: str) -> str:
    """Letters and digits only, in lower case."""
    return "".join(filter(str.isalnum, name.lower()))


def listed_duplicates(base: Path) -> set[tuple[str, str, str]]:
    """(domain, class, file name) of what DomainBed removes from DomainNet, from its list in or above `base`."""
    file = next((file for file in (base / DUPLICATES, base.parent / DUPLICATES) if file.is_file()), None)
    if file is None:
        return set()
    duplicates = set()
    for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
        parts = line.split("/")
        if len(parts) != 3:
            raise UserError(f"{file}: `{line}` is not <domain>/<class>/<image>")
        duplicates.add((parts[0], parts[1], parts[2]))
    return duplicates
