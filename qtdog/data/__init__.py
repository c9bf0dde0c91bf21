"""Data sets of several domains."""

from collections.abc import Callable

import torch

from qtdog.data.benchmark_files import benchmark_files
from qtdog.data.benchmarks import BENCHMARKS
from qtdog.data.domains import Domain, DomainSet, TensorDomain
from qtdog.data.folders import ImageFiles, folder_files
from qtdog.data.images import ImageDomain, Preprocessing, plain_transform, training_transform
from qtdog.data.manifests import manifest_files
from qtdog.data.mnist import ANGLES, COLOR_FLIPS, colored_mnist, rotated_mnist
from qtdog.errors import UserError

__all__ = [
    "DIGITS",
    "Domain",
    "DomainSet",
    "Preprocessing",
    "TensorDomain",
    "domain_names",
    "image_files",
    "load_dataset",
]

# Data sets whose images are tensors that come as they are: from --data-dir to a DomainSet.
DIGITS: dict[str, Callable[[str | None], DomainSet]] = {"RotatedMNIST": rotated_mnist, "ColoredMNIST": colored_mnist}
# Their domains, where these are known without the data.
MNIST_DOMAINS = {"RotatedMNIST": [str(angle) for angle in ANGLES], "ColoredMNIST": list(COLOR_FLIPS)}
# The ways in which pictures of one's own may lie.
LAYOUTS: dict[str, Callable[..., ImageFiles]] = {"folder": folder_files, "csv": manifest_files}


def load_dataset(
    name: str, data_dir: str | None, preprocessing: Preprocessing | None, log: Callable[[str], None] = print
) -> DomainSet:
    """The data set `name`; `preprocessing` is for pictures, the MNIST sets come as they are."""
    if name in DIGITS:
        return DIGITS[name](data_dir)
    found = image_files(name, data_dir, log)
    assert preprocessing is not None
    return domain_set(found, preprocessing)


def domain_names(name: str, data_dir: str | None) -> tuple[str, list[str]]:
    """The data set's title and the names of its domains, without opening an image."""
    known = MNIST_DOMAINS | {title: list(benchmark.images) for title, benchmark in BENCHMARKS.items()}
    if name in known:
        return name, known[name]
    if name in DIGITS:  # a plug-in's
        dataset = DIGITS[name](data_dir)
        return dataset.name, [domain.name for domain in dataset.domains]
    found = image_files(name, data_dir, lambda line: None)
    return found.name, list(found.files)


def image_files(name: str, data_dir: str | None, log: Callable[[str], None] = print) -> ImageFiles:
    """The files of a data set of pictures, checked but not opened."""
    if name in BENCHMARKS:
        return benchmark_files(name, data_dir, log)
    if name not in LAYOUTS:
        known = ", ".join([*DIGITS, *BENCHMARKS, *LAYOUTS])
        raise UserError(f"there is no data set {name}: there are {known}; plug-ins may have others")
    return LAYOUTS[name](data_dir, log)


def domain_set(found: ImageFiles, preprocessing: Preprocessing) -> DomainSet:
    """A data set whose images are read at each use, class after class within a domain as torchvision's ImageFolder."""
    augmented, plain = training_transform(preprocessing), plain_transform(preprocessing)
    domains = []
    for name, files in found.files.items():
        paths = [path for label in found.classes for path in files[label]]
        labels = torch.tensor([index for index, label in enumerate(found.classes) for _ in files[label]])
        domains.append(ImageDomain(name, paths, labels, augmented, plain, preprocessing.background))
    splits = None
    if found.out is not None:
        splits = [given_split(domain.paths, found.out) for domain in domains]
    size = preprocessing.image_size
    return DomainSet(found.name, found.source, found.classes, domains, (3, size, size), splits)


def given_split(paths: list, out: set) -> tuple[list[int], list[int]]:
    """Indices of the `in` and `out` parts that a manifest names."""
    return [i for i, path in enumerate(paths) if path not in out], [i for i, path in enumerate(paths) if path in out]
