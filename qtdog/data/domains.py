"""What a data set is to the trainer: named domains that share their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qtdog.data import fingerprints
from qtdog.data.splits import split


class Domain(Protocol):
    """Images of one domain: a drawing style, a camera, an angle."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    def names(self) -> list[str]:
        """What people call each image, say its file's name."""
        ...

    def fingerprints(self) -> list[str]:
        """What each image is, see `qtdog.data.fingerprints`: the same for the same image, wherever it lies."""
        ...

    def images(self, indices: Sequence[int], augment: bool) -> Tensor:
        """The images at `indices` as float32 [len(indices), C, H, W], normalized.

        Augmentation draws from torch's global random generator, which the caller seeds.
        """
        ...


@dataclass(frozen=True)
class TensorDomain:
    """A domain held in memory: pixels uint8 [N, C, H, W] in 0..255, labels int64 [N]."""

    name: str
    pixels: Tensor
    labels: Tensor

    def names(self) -> list[str]:
        """Their numbers."""
        return [str(index) for index in range(len(self.labels))]

    def fingerprints(self) -> list[str]:
        """Of the pixels."""
        return fingerprints.of_pixels(self.pixels)

    def images(self, indices: Sequence[int], augment: bool) -> Tensor:
        """Pixels scaled to [0, 1]; never augmented."""
        return self.pixels[list(indices)].float().div_(255)


@dataclass(frozen=True)
class DomainSet:
    """A data set: `domains` in the order that `--test-envs` counts; `source` says where the images are from.

    `splits` holds the indices of each domain's `in` and `out` parts where the data set itself decides them; None leaves
    it to DomainBed's random split.
    """

    name: str
    source: str
    classes: list[str]
    domains: Sequence[Domain]
    image_shape: tuple[int, int, int]
    splits: list[tuple[list[int], list[int]]] | None = None

    def split(self, env: int, holdout_fraction: float, trial_seed: int) -> tuple[list[int], list[int]]:
        """Indices of a domain's `in` and `out` part: the data set's own if it has some, else DomainBed's."""
        if self.splits is not None:
            return self.splits[env]
        return split(len(self.domains[env].labels), holdout_fraction, trial_seed, env)
