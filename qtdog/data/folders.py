"""Any `<root>/<domain>/<class>/<image>` folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from qtdog.data.domains import DomainSet
from qtdog.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone wants to see: square RGB images of `image_size` pixels, (x/255 - mean) / std."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class FolderDomain:
    """The images of one domain folder, read from disk at each use."""

    name: str
    paths: list[Path]
    labels: Tensor
    train_transform: Callable[[Image.Image], Tensor]
    eval_transform: Callable[[Image.Image], Tensor]

    def images(self, indices: Sequence[int], augment: bool) -> Tensor:
        """float32 [len(indices), 3, H, W], normalized."""
        transform = self.train_transform if augment else self.eval_transform
        return torch.stack([transform(read_image(self.paths[i])) for i in indices])


def read_image(path: Path) -> Image.Image:
    """An RGB image, or a UserError naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({error}): replace or remove it") from error


def folder_set(root: str | None, preprocessing: Preprocessing, log: Callable[[str], None] = print) -> DomainSet:
    """The data set under `root`; domains and classes in lexicographic order, images in torchvision's ImageFolder order.

    Names that start with a dot, README or LICENSE are skipped; any other stray file or folder, an empty domain and a
    class that one domain lacks are errors.
    """
    if root is None:
        raise UserError("--dataset folder needs --data-dir ROOT with ROOT/<domain>/<class>/<image>")
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"--data-dir {root} is not a folder")
    normalize = transforms.Normalize(preprocessing.mean, preprocessing.std)
    size = preprocessing.image_size
    train_transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            normalize,
        ]
    )
    eval_transform = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor(), normalize])

    found = {domain.name: class_files(domain) for domain in subfolders(base, "domain")}
    if len(found) < 2:
        raise UserError(
            f"{base} holds {len(found)} domain folder(s); at least 2 are needed: <root>/<domain>/<class>/<image>"
        )
    classes = sorted(set().union(*found.values()))
    lacking = {name: sorted(set(classes) - set(files)) for name, files in found.items()}
    if any(lacking.values()):
        parts = [f"{name} lacks {', '.join(missing)}" for name, missing in lacking.items() if missing]
        raise UserError(f"domains of {base} do not share their classes: {'; '.join(parts)}")
    domains = []
    for name, files in found.items():
        paths = [path for label in classes for path in files[label]]
        labels = torch.tensor([index for index, label in enumerate(classes) for _ in files[label]])
        domains.append(FolderDomain(name, paths, labels, train_transform, eval_transform))
        log(f"  domain {len(domains) - 1} {name}: {len(paths):,} images")
    total = sum(len(domain.paths) for domain in domains)
    return DomainSet(base.resolve().name, f"{total:,} images under {base}", classes, domains, (3, size, size))


def listed(folder: Path) -> list[Path]:
    """What lies in `folder`, by name, but hidden files and those that document a data set."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "README", "LICENSE")))


def subfolders(parent: Path, kind: str) -> list[Path]:
    """The folders in `parent` by name; anything else there is a UserError."""
    entries = listed(parent)
    for entry in entries:
        if not entry.is_dir():
            raise UserError(f"stray file {entry}: {parent} may hold {kind} folders only; move it away")
    return entries


def class_files(domain: Path) -> dict[str, list[Path]]:
    """The images of each class of one domain, by name; a class folder without images counts as absent."""
    files = {}
    for folder in subfolders(domain, "class"):
        entries = listed(folder)
        for entry in entries:
            if entry.is_dir():
                raise UserError(f"stray folder {entry}: {folder} may hold images only; move it away")
            if entry.suffix.lower() not in EXTENSIONS:
                raise UserError(f"stray file {entry}: not an image ({', '.join(sorted(EXTENSIONS))}); move it away")
        if entries:
            files[folder.name] = entries
    if not files:
        raise UserError(f"the domain {domain} holds no images: fill it as <domain>/<class>/<image> or remove it")
    return files
