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
    """Item t: for each source domain, `batch_size` (image, label) pairs drawn with replacement.

    Every image of a part is equally likely, or if `balanced` every class that occurs in it, and of a class every image.

    With several processes, each gets its `share` (rank, world_size) of them: the same pairs as one process, divided.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        batch_size: int,
        seed: int,
        augment: bool = True,
        share: tuple[int, int] = (0, 1),
        balanced: bool = False,
    ) -> None:
        self.parts, self.batch_size, self.seed, self.augment, self.share = parts, batch_size, seed, augment, share
        self.likelihoods = {part.env: balanced_likelihoods(part.labels()) for part in parts} if balanced else {}

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]] | UserError:
        # An exception from a worker process would arrive wrapped in its traceback: hand a user's error over as a value.
        try:
            return [self.minibatch(part, step) for part in self.parts]
        except UserError as error:
            return error

    def minibatch(self, part: Part, step: int) -> tuple[Tensor, Tensor]:
        """images float32 [B, C, H, W], labels int64 [B] with B = batch_size / world_size.

        The caller's random state is untouched.
        """
        rank, world_size = self.share
        positions = range(rank, self.batch_size, world_size)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_hash(self.seed, part.env, step))
            if part.env in self.likelihoods:
                drawn = torch.multinomial(self.likelihoods[part.env], self.batch_size, replacement=True).tolist()
            else:
                drawn = torch.randint(len(part.indices), (self.batch_size,)).tolist()
            indices = [part.indices[drawn[position]] for position in positions]
            if not self.augment:
                return part.domain.images(indices, False), part.domain.labels[indices]
            images = []
            for position, index in zip(positions, indices, strict=True):
                # Seeded one by one, so that an image does not depend on which process reads it.
                torch.default_generator.manual_seed(seed_hash(self.seed, part.env, step, position))
                images.append(part.domain.images([index], True))
            return torch.cat(images), part.domain.labels[indices]


def balanced_likelihoods(labels: Tensor) -> Tensor:
    """float64 [N]: how likely each image of labels int64 [N] is drawn, so that every class is equally likely."""
    classes, counts = labels.unique(return_counts=True)
    return 1 / counts.double()[torch.searchsorted(classes, labels)] / len(classes)


def training_batches(
    parts: Sequence[Part],
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int,
    augment: bool = True,
    share: tuple[int, int] = (0, 1),
    balanced: bool = False,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The minibatches of steps start..stop-1, in order."""
    loader = DataLoader(
        Minibatches(parts, batch_size, seed, augment, share, balanced),
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
    """Item k: the k-th chunk of a part's images; if augmented, then in the same way at every pass."""

    def __init__(self, part: Part, augment: bool) -> None:
        self.part, self.augment = part, augment

    def __len__(self) -> int:
        return -(-len(self.part.indices) // EVAL_BATCH)

    def __getitem__(self, chunk: int) -> Tensor | UserError:
        indices = self.part.indices[chunk * EVAL_BATCH : (chunk + 1) * EVAL_BATCH]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_hash("evaluation", self.part.env, chunk))
                return self.part.domain.images(indices, self.augment)
        except UserError as error:
            return error


@dataclass
class EvaluationImages:
    """A part's images as batches, read in order; kept in memory after the first pass if `keep`."""

    part: Part
    workers: int = 0
    keep: bool = False
    augment: bool = False
    kept: list[Tensor] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float32 [n, C, H, W], labels int64 [n]) with n <= 256."""
        labels = self.part.labels().split(EVAL_BATCH)
        if self.kept:
            yield from zip(self.kept, labels, strict=True)
            return
        read: list[Tensor] = []
        loader = DataLoader(
            Chunks(self.part, self.augment),
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator(),
        )
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
