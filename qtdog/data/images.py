"""Images on disk: how they are read, prepared and augmented."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from qtdog.config import AugmentationName
from qtdog.data import fingerprints
from qtdog.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Whether training images are changed at random, and whether source images are when they are evaluated, too."""

    train: bool
    evaluation: bool


# The three protocols change training images in the same way (see `training_transform`). DomainBed gives a source
# domain's validation images the same treatment, SWAD and QT-DoG validate on plain ones.
AUGMENTATIONS: dict[AugmentationName, Augmentation] = {
    "domainbed": Augmentation(train=True, evaluation=True),
    "swad": Augmentation(train=True, evaluation=False),
    "qtdog": Augmentation(train=True, evaluation=False),
    "none": Augmentation(train=False, evaluation=False),
}


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone wants to see: square RGB images of `image_size` pixels, (x/255 - mean) / std."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class ImageDomain:
    """The images of one domain, read from disk at each use."""

    name: str
    paths: list[Path]
    labels: Tensor
    augmented: Callable[[Image.Image], Tensor]
    plain: Callable[[Image.Image], Tensor]

    def names(self) -> list[str]:
        """Of their files."""
        return [path.name for path in self.paths]

    def fingerprints(self) -> list[str]:
        """Of the files' content."""
        return fingerprints.of_files(self.paths)

    def images(self, indices: Sequence[int], augment: bool) -> Tensor:
        """float32 [len(indices), 3, H, W], normalized."""
        transform = self.augmented if augment else self.plain
        return torch.stack([transform(read_image(self.paths[i])) for i in indices])


def read_image(path: Path) -> Image.Image:
    """An RGB image, or a UserError naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({error}): replace or remove it") from error


def plain_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """PIL image to float32 [3, size, size]: resized without regard to its aspect ratio, as in DomainBed."""
    size = preprocessing.image_size
    return transforms.Compose([transforms.Resize((size, size)), *_as_tensor(preprocessing)])


def training_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """PIL image to float32 [3, size, size], with the random crop, flip, color jitter and graying of DomainBed."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(preprocessing.image_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(0.1),
            *_as_tensor(preprocessing),
        ]
    )


def _as_tensor(preprocessing: Preprocessing) -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
