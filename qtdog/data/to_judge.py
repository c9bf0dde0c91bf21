"""Pictures with known classes for a model that is trained already: fewer will do than training needs.

One domain is enough, and of the model's classes some; `<root>/<class>/<image>` is a domain, called as its folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from qtdog.data.benchmark_files import benchmark_files, simple
from qtdog.data.benchmarks import BENCHMARKS
from qtdog.data.folders import ImageFiles, count, existing_folder, images_by_class, innermost
from qtdog.data.listing import composed, domain_folders, folders_in, named
from qtdog.data.manifests import manifest_files
from qtdog.data.problems import Problems
from qtdog.errors import UserError

LAYOUT = "ROOT/<domain>/<class>/<image>, or ROOT/<class>/<image> of one domain"


def files_to_judge(
    name: str, place: str | None, classes: Sequence[str], log: Callable[[str], None] = print
) -> ImageFiles:
    """The files of pictures of some of `classes`, in one domain or several, by domain and class.

    Raises:
        UserError: for pictures of other classes, or in no class, naming them.
    """
    if name in BENCHMARKS:
        try:
            return benchmark_files(name, place, log)
        except UserError as error:
            raise UserError(f"{error}; other pictures of these classes, or some of them: --dataset folder") from error
    if name == "csv":
        return as_the_model(manifest_files(place, log, least=1), classes)
    if name != "folder":
        raise UserError(f"there is no data set of pictures {name}: there are {', '.join(BENCHMARKS)}, folder and csv")
    base = existing_folder("folder", place, LAYOUT)
    problems = Problems()
    known = {simple(label) for label in classes}
    if any(simple(folder.name) in known for folder in folders_in(base)):  # the classes of one domain
        found = {composed(base.resolve().name): images_by_class(base, problems)}
    else:
        base = innermost(base)
        folders, _ = domain_folders(base, problems)
        found = {
            domain: images_by_class(folder, problems) for domain, folder in named(folders, "domain", problems).items()
        }
    if not any(found.values()):
        problems.add(
            f"no pictures in folders of their classes ({LAYOUT}); `qtdog predict` takes pictures without", base
        )
    problems.refuse(f"the data set {base}")
    total = sum(map(count, found.values()))
    files = ImageFiles(composed(base.resolve().name), f"{total:,} images under {base}", [], found)
    return as_the_model(files, classes)


def as_the_model(found: ImageFiles, classes: Sequence[str]) -> ImageFiles:
    """The same files with the classes as the model has them, whatever their spelling; it may lack some of them."""
    known = {simple(label): label for label in classes}
    problems = Problems()
    files: dict[str, dict[str, list[Path]]] = {}
    for domain, by_class in found.files.items():
        files[domain] = {label: [] for label in classes}
        for label, paths in by_class.items():
            if simple(label) in known:
                files[domain][known[simple(label)]] += paths
            else:
                problems.add(
                    f"no classes of the model, which has {', '.join(classes)}; leave them out", f"{domain}/{label}"
                )
    problems.refuse(found.source)
    return ImageFiles(found.name, found.source, list(classes), files)
