"""What a data set is to the trainer: named domains that share their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Domain(Protocol):
    """Images of one domain: a drawing style, a camera, an angle."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    def images(self, indices: Sequence[int], augment: bool) -> Tensor:
        """The images at `indices` as float32 [len(indices), C, H, W], normalized.

        Augmentation draws from torch's global random generator, which the caller seeds.
        """
        ...


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
