"""Images on disk: how they are read, prepared and augmented."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision import transforms

from qtdog.config import AugmentationName
from qtdog.data import fingerprints
from qtdog.data.formats import way_to_open
from qtdog.data.modes import WHITE, Color, NoRange, Picture, as_rgb, scale_clear_color
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


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow finds an orientation
# What decoders raise for damaged files and missing parts of Pillow.
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError, RuntimeError, ImportError),
    *(struct.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone wants to see: square RGB images of `image_size` pixels, (x/255 - mean) / std.

    Transparent pixels show `background`.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    background: Color = WHITE

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; without a white background, as in earlier versions."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.background == WHITE:
            del values["background"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Inverse of `to_dict`."""
        return cls(
            image_size=values["image_size"],
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            background=tuple(values.get("background", WHITE)),
        )


@dataclass(frozen=True)
class ImageDomain:
    """The images of one domain, read from disk at each use."""

    name: str
    paths: list[Path]
    labels: Tensor
    augmented: Callable[[Image.Image], Tensor]
    plain: Callable[[Image.Image], Tensor]
    background: Color = WHITE
    ranges: dict[int, Path] = field(default_factory=dict, compare=False)  # met so far, and where

    def names(self) -> list[str]:
        """Of their files."""
        return [path.name for path in self.paths]

    def fingerprints(self) -> list[str]:
        """Of the files' content."""
        return fingerprints.of_files(self.paths)

    def images(self, indices: Sequence[int], augment: bool) -> Tensor:
        """float32 [len(indices), 3, H, W], normalized."""
        transform = self.augmented if augment else self.plain
        return torch.stack([transform(self.picture(self.paths[i])) for i in indices])

    def picture(self, path: Path) -> Image.Image:
        """An image as RGB.

        Raises:
            UserError: if it cannot be read, or would be divided by another number than one before it.
        """
        picture = read_picture(path, self.background)
        if picture.range is not None:
            self.ranges.setdefault(picture.range, path)
            if len(self.ranges) > 1:
                raise UserError(two_ranges(self.name, self.ranges))
        return picture.image


def read_image(path: Path, background: Color = WHITE) -> Image.Image:
    """An upright RGB image of 8 bits a color, or a UserError naming the file; see `read_picture`."""
    return read_picture(path, background).image


def read_picture(path: Path, background: Color = WHITE) -> Picture:
    """An image with what was done to it: brought to RGB of 8 bits, turned as its EXIF orientation says.

    Raises:
        UserError: for a file that cannot be read, that is an animation or has several pages, or whose numbers have no
            known range.
    """
    try:
        with Image.open(path) as image:
            # A camera's MPO is one photograph, with previews or depth behind it.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                frames = getattr(image, "n_frames", "several")
                raise UserError(f"{path} holds {frames} images, an animation or pages: save one of them in its place")
            scale_clear_color(image)
            image.load()
            picture = as_rgb(image, background)
            turned = orientation(image)
    except NoRange as error:
        raise UserError(f"{path} cannot be made a picture of 8 bits: {error}") from error
    except BROKEN as error:
        way = way_to_open(path.name) or "replace or remove it"
        raise UserError(f"cannot read the image {path} ({error or type(error).__name__}): {way}") from error
    if turned is None:
        return picture
    conversion = ", ".join(filter(None, [picture.conversion, "turned upright by EXIF"]))
    return Picture(picture.image.transpose(turned), conversion, picture.range)


def two_ranges(domain: str, ranges: Mapping[int, object]) -> str:
    """What is wrong where images of a domain would be divided by different numbers, each as its own numbers suggest."""
    seen = ", ".join(f"0 to {most} in {where}" for most, where in sorted(ranges.items()))
    return f"the numbers of the images of {domain} have several ranges ({seen}): bring them to one, or to 8 or 16 bits"


def orientation(image: Image.Image) -> Image.Transpose | None:
    """How to turn a decoded image so that it stands upright; None where nothing, or nothing readable, is said of it."""
    if not EXIF & image.info.keys() and not hasattr(image, "tag_v2"):
        return None
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BROKEN:
        return None


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
