"""DomainBed's five sets of pictures on disk: `<root>/<folder>/<domain>/<class>/<image>`.

Folder names are compared without regard to case and separators, so that `Real_World`, `real-world` and `Real World` are
the same; `Benchmark.spellings` has the other names that are about. Whatever the spelling, domains and classes are
numbered in the lexicographic order of DomainBed's names.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qtdog.data.benchmarks import BENCHMARKS, Benchmark
from qtdog.data.folders import ImageFiles, count, existing_folder
from qtdog.data.listing import TWICE, class_folders, composed, domain_folders, folders_in, listed_images
from qtdog.data.problems import Problems
from qtdog.errors import UserError, listing

DUPLICATES = "domain_net_duplicates.txt"
PLURAL = {"domain": "domains", "class": "classes"}


def benchmark_files(name: str, root: str | None, log: Callable[[str], None] = print) -> ImageFiles:
    """The images of the benchmark `name`; `root` is the folder it lies in, or its own.

    Raises:
        UserError: naming all stray folders and files, missing domains, missing and extra classes, broken links and
            empty files, and what was expected. Files and folders of files beside the domain folders (archives, lists)
            are left alone.
    """
    benchmark = BENCHMARKS[name]
    base = located(name, root)
    problems = Problems()
    duplicates = listed_duplicates(base) if name == "DomainNet" else set()
    folders, _ = domain_folders(base, problems)
    found: dict[str, dict[str, list[Path]]] = {}
    removed = 0
    for domain, folder in matched(base, [folders], "domain", list(benchmark.images), benchmark, problems).items():
        parts = class_folders(folder[0], problems)
        by_class = matched(folder[0], parts, "class", benchmark.classes, benchmark, problems)
        found[domain] = {}
        for label, places in by_class.items():
            images = [path for place in places for path in listed_images(place, problems)]
            found[domain][label] = [path for path in images if (domain, label, path.name) not in duplicates]
            removed += len(images) - len(found[domain][label])
            if not images:
                problems.add(f"class folders that hold no images, of which {name} has some in every domain", places[0])
    problems.refuse(f"{name} under {base}")
    for env, (domain, files) in enumerate(found.items()):
        log(f"  domain {env} {domain}: {count(files):,} images")
    total, expected = sum(map(count, found.values())), sum(benchmark.images.values())
    notes = [f"{name}, {total:,} images under {base}"]
    if duplicates:
        notes.append(f"{removed:,} duplicates left out")
    elif name == "DomainNet" and total != expected:
        notes.append(f"no {DUPLICATES} there to leave out")
    if total != expected:
        notes.append(f"NOT DomainBed's {expected:,} (see `qtdog data verify`)")
    return ImageFiles(name, ", ".join(notes), benchmark.classes, found)


def located(name: str, root: str | None) -> Path:
    """The folder of the domains: `root`, a folder that goes by the data set's name, or what holds them in one of these.

    Folders of other names in `root` count if they hold most of the domains: archives are unpacked anywhere.
    """
    benchmark = BENCHMARKS[name]
    base = existing_folder(name, root, f"ROOT/{benchmark.folder}/<domain>/<class>/<image>")
    names, domains = spelled([name, benchmark.folder], benchmark), spelled(benchmark.images, benchmark)

    def domains_of(folder: Path) -> int:
        return len({domains.get(simple(inside.name)) for inside in folders_in(folder)} - {None})

    own = [folder for folder in folders_in(base) if simple(folder.name) in names]
    own.sort(key=lambda folder: folder.name != benchmark.folder)
    places = [base, *(inside for folder in own for inside in within(folder, 2, domains_of))]
    places += [place for place in within(base, 2, domains_of) if 2 * domains_of(place) >= len(benchmark.images)]
    best = max(places, key=domains_of)  # the first of those that have as many
    if domains_of(best):
        return best
    raise UserError(
        f"no {name} under {base}: expected {benchmark.folder}/ with the domains {', '.join(benchmark.images)}, "
        "or --data-dir of the folder that holds these"
    )


def within(folder: Path, depth: int, domains_of: Callable[[Path], int]) -> Iterator[Path]:
    """`folder` and those in it, `depth` levels down, but not what is in a folder of domains."""
    yield folder
    if depth and not domains_of(folder):
        for inside in folders_in(folder):
            yield from within(inside, depth - 1, domains_of)


def matched(
    parent: Path,
    parts: list[list[Path]],
    kind: str,
    expected: list[str],
    benchmark: Benchmark,
    problems: Problems,
) -> dict[str, list[Path]]:
    """The folders by DomainBed's names, in the order of `expected`; each must be there, and no other."""
    names = f": {', '.join(expected)}" if len(expected) <= 10 else ""
    wanted = f"{benchmark.folder} has {len(expected)} {PLURAL[kind]}{names}"
    known = spelled(expected, benchmark)
    found: dict[str, list[Path]] = {name: [] for name in expected}
    for folders in parts:
        here: dict[str, Path] = {}
        for folder in folders:
            name = known.get(simple(folder.name))
            if name is None:
                problems.add(f"stray folders, move them away ({wanted})", folder)
            elif name in here:
                problems.add(TWICE.format(kind=kind), f"{here[name]} and {folder} are both {name}")
            else:
                here[name] = folder
                found[name].append(folder)
    if missing := [name for name in expected if not found[name]]:
        where = parent if kind == "domain" else f"{parent.name}"
        problems.add(f"{PLURAL[kind]} that are missing, bring them back ({wanted})", f"{listing(missing)} in {where}")
    return {name: places for name, places in found.items() if places}


def spelled(names: Iterable[str], benchmark: Benchmark) -> dict[str, str]:
    """DomainBed's name by each of its spellings, simplified."""
    return {simple(each): name for name in names for each in (name, *benchmark.spellings.get(name, []))}


def simple(name: str) -> str:
    """Letters and digits only, in lower case."""
    return "".join(filter(str.isalnum, composed(name).lower()))


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
