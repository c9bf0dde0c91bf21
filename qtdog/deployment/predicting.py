"""`qtdog predict`: the classes of pictures."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qtdog.data.formats import is_picture
from qtdog.data.images import plain_transform, read_image
from qtdog.deployment.image_tables import check_table, columns_of, joined, write_table
from qtdog.deployment.predictors import ModelConfig, Predictor, open_predictor
from qtdog.errors import UserError
from qtdog.log import PRINT
from qtdog.results.predictions import Answers, answer

BATCH = 32


@dataclass
class PredictConfig(ModelConfig):
    """Settings of `qtdog predict`."""

    images: Annotated[list[str], "picture files, or folders that hold them at any depth"] = field(default_factory=list)
    top: Annotated[int, "how many classes to print"] = 3
    json: Annotated[bool, "print one JSON object an image"] = False
    csv: Annotated[str | None, "FILE.csv or FILE.parquet: the probability of every class, a row an image"] = None


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Print the most likely classes of each image and how far the members disagree; returns the same as records.

    Raises:
        UserError: for an image that is missing or cannot be read. The answers before it are printed, and in the table.
    """
    if config.csv:
        check_table(config.csv)
    predictor = open_predictor(config)
    transform = transform_of(predictor)
    images = pictures(config.images)
    records: list[dict[str, Any]] = []
    tables: list[dict[str, list[Any]]] = []
    try:
        with tqdm(total=len(images), desc="predicting", disable=None if len(images) > BATCH else True) as bar:
            for some, batch in batches(images, transform):
                found = answer(predictor.member_logits, batch, predictor.device, predictor.combine)
                classes = predictor.classes or [str(i) for i in range(found.log_probabilities.shape[1])]
                for record in records_of(some, found, classes, max(1, config.top)):
                    PRINT(json.dumps(record) if config.json else line_of(record))
                    records.append(record)
                tables.append({"image": [str(image) for image in some], **columns_of(found, classes)})
                bar.update(len(some))
    finally:
        if config.csv and tables:
            write_table(config.csv, joined(tables))
    return records


def batches(images: Sequence[Path], transform: Callable[[Path], Tensor]) -> Iterator[tuple[Sequence[Path], Tensor]]:
    """Up to BATCH files at a time, and their images [N, C, H, W]; those before one that cannot be read come, too."""
    read: list[Tensor] = []
    for index, image in enumerate(images):
        try:
            read.append(transform(image))
        except UserError:
            if read:
                yield images[index - len(read) : index], torch.stack(read)
            raise
        if len(read) == BATCH or index == len(images) - 1:
            yield images[index + 1 - len(read) : index + 1], torch.stack(read)
            read = []


def records_of(images: Sequence[Path], answers: Answers, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """An object for each image, with its `top` classes, the most likely first."""
    chances = answers.log_probabilities.exp()
    best = chances.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
    return [
        {
            "image": str(image),
            "classes": {classes[index]: row[index].item() for index in order},
            "disagreement": disagreement,
        }
        for image, row, order, disagreement in zip(images, chances, best, answers.disagreement.tolist(), strict=True)
    ]


def line_of(record: dict[str, Any]) -> str:
    """For people."""
    chances = ", ".join(f"{label} {chance:.3f}" for label, chance in record["classes"].items())
    return f"{record['image']}  {chances}  (disagreement {record['disagreement']:.2f})"


def pictures(names: Sequence[str]) -> list[Path]:
    """The picture files that are named, or lie in a folder that is; UserError for what is neither."""
    if not names:
        raise UserError("name the images to predict: qtdog predict FILE IMAGE...")
    found: list[Path] = []
    for place in map(Path, names):
        if place.is_dir():
            inside = [file for file in sorted(place.rglob("*")) if is_picture(file.name) and file.is_file()]
            if not inside:
                raise UserError(f"{place} holds no pictures")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place} is not a file")
    return found


def transform_of(predictor: Predictor) -> Callable[[Path], Tensor]:
    """Image file to float32 [C, H, W], as the network was trained on them."""
    if predictor.preprocessing is not None:
        prepare, background = plain_transform(predictor.preprocessing), predictor.preprocessing.background
        return lambda path: prepare(read_image(path, background))
    channels, height, width = predictor.image_shape
    if channels != 1:
        raise UserError(f"this network takes images of {channels} channels, which picture files do not have")

    def transform(path: Path) -> Tensor:
        gray = read_image(path).convert("L").resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(gray, np.float32) / 255)[None]

    return transform
