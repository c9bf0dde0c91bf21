"""Data sets of several domains."""

from collections.abc import Callable

from qtdog.data.domains import Domain, DomainSet
from qtdog.data.folders import Preprocessing, folder_set
from qtdog.data.mnist import colored_mnist, rotated_mnist

__all__ = ["DATASETS", "Domain", "DomainSet", "Preprocessing", "load_dataset"]

DATASETS = ("RotatedMNIST", "ColoredMNIST", "folder")


def load_dataset(
    name: str, data_dir: str | None, preprocessing: Preprocessing | None, log: Callable[[str], None] = print
) -> DomainSet:
    """The data set `name`; `preprocessing` is for folders of images, the MNIST sets come as they are."""
    if preprocessing is not None:
        return folder_set(data_dir, preprocessing, log)
    return {"RotatedMNIST": rotated_mnist, "ColoredMNIST": colored_mnist}[name](data_dir)
