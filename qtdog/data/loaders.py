"""Minibatches without state, and the parts that are evaluated.

The minibatches of step t are a pure function of (seed, domain, t). So a resumed run continues exactly, whatever the
number of worker processes, and no sampler state is stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtdog.data.domains import Domain
from qtdog.data.splits import seed_hash
from qtdog.errors import UserError

EVAL_BATCH = 256
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """Images `indices` of `domain`, whose index in the data set is `env`."""

    domain: Domain
    env: int
    indices: list[int]

    def labels(self) -> Tensor:
        """int64 [len(indices)]."""
        return self.domain.labels[self.indices]


class Minibatches(Dataset):
    """Item t: for each source domain, `batch_size` (image, label) pairs drawn with replacement, augmented."""

    def __init__(self, parts: Sequence[Part], batch_size: int, seed: int) -> None:
        self.parts, self.batch_size, self.seed = parts, batch_size, seed

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]] | UserError:
        # An exception from a worker process would arrive wrapped in its traceback: hand a user's error over as a value.
        try:
            return [self.minibatch(part, step) for part in self.parts]
        except UserError as error:
            return error

    def minibatch(self, part: Part, step: int) -> tuple[Tensor, Tensor]:
        """images float32 [batch_size, C, H, W], labels int64 [batch_size]; the caller's random state is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_hash(self.seed, part.env, step))
            drawn = torch.randint(len(part.indices), (self.batch_size,)).tolist()
            indices = [part.indices[i] for i in drawn]
            return part.domain.images(indices, augment=True), part.domain.labels[indices]


def training_batches(
    parts: Sequence[Part], batch_size: int, seed: int, start: int, stop: int, workers: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The minibatches of steps start..stop-1, in order."""
    loader = DataLoader(
        Minibatches(parts, batch_size, seed),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        generator=torch.Generator(),  # the loader draws a base seed: not from the global generator
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


class Chunks(Dataset):
    """Item k: the k-th chunk of a part's images, not augmented."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return -(-len(self.part.indices) // EVAL_BATCH)

    def __getitem__(self, chunk: int) -> Tensor | UserError:
        indices = self.part.indices[chunk * EVAL_BATCH : (chunk + 1) * EVAL_BATCH]
        try:
            return self.part.domain.images(indices, augment=False)
        except UserError as error:
            return error


@dataclass
class EvaluationImages:
    """A part's images as batches, read in order; kept in memory after the first pass if `keep`."""

    part: Part
    workers: int = 0
    keep: bool = False
    kept: list[Tensor] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float32 [n, C, H, W], labels int64 [n]) with n <= 256."""
        labels = self.part.labels().split(EVAL_BATCH)
        if self.kept:
            yield from zip(self.kept, labels, strict=True)
            return
        read: list[Tensor] = []
        loader = DataLoader(Chunks(self.part), batch_size=None, num_workers=self.workers, generator=torch.Generator())
        for images, chunk_labels in zip(loader, labels, strict=True):
            if isinstance(images, UserError):
                raise images
            if self.keep:
                read.append(images)
            yield images, chunk_labels
        self.kept = read


def fits_in_memory(images: int, image_shape: tuple[int, int, int]) -> bool:
    """Whether that many float32 images may be kept between evaluations."""
    channels, height, width = image_shape
    return images * channels * height * width * 4 <= CACHE_BYTES
