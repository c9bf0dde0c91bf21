"""Tiny data: 120 made-up digits in MNIST's files, and a folder of pictures whose color tells the class."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qtdog.files import seal
from qtdog.results.runs import SEALED

SHARED = Path(__file__).parents[2] / "shared"  # beside the repository, where there is one
ICON_STYLES = SHARED / "data" / "icon_styles.zip"
LITE0_WEIGHTS = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"

DIGITS = ["--dataset", "RotatedMNIST", "--test-envs", "0", "--batch-size", "2", "--device", "cpu"]


def write_idx(path: Path, values: np.ndarray, zipped: bool = False) -> None:
    content = (
        bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.astype(np.uint8).tobytes()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if zipped else content)


def make_digits(root: Path) -> Path:
    """A --data-dir with 120 digits: a bright bar whose row is the label. The test half is gzipped."""
    random = np.random.RandomState(0)
    for part, count in (("train", 80), ("t10k", 40)):
        labels = np.arange(count) % 10
        images = random.randint(0, 60, (count, 28, 28))
        images[np.arange(count), 4 + 2 * labels] = 250
        zipped = part == "t10k"
        suffix = ".gz" if zipped else ""
        write_idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte{suffix}", images, zipped)
        write_idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte{suffix}", labels, zipped)
    return root


def make_pictures(root: Path, count: int = 10) -> Path:
    """Three domains (background), two classes (color), `count` pictures each, 20x16 pixels."""
    random = np.random.RandomState(0)
    for domain, background in (("bright", 200), ("dark", 20), ("middle", 110)):
        for label, channel in (("blue", 2), ("red", 0)):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 50, (16, 20, 3)) + background
                pixels[4:12, 4:16] = 0
                pixels[4:12, 4:16, channel] = 255
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def write_card(run: Path, card: dict[str, Any]) -> None:
    """Give a finished run another model.json, which its seal fits."""
    (run / "model.json").write_text(json.dumps(card))
    seal(run, SEALED)
