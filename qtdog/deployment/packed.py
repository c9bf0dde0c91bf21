"""Packed ensembles of trained runs: their file, their accuracy on a data set, and predictions for single images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import qkernels as qk
from qtdog.config import Device
from qtdog.data import DomainSet, load_dataset
from qtdog.data.images import plain_transform, read_image
from qtdog.data.loaders import EvaluationImages, Part
from qtdog.deployment.info import info_of, preprocessing_of
from qtdog.environment import pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.log import PRINT, Log
from qtdog.results.runs import ModelCard
from qtdog.training.evaluation import combine_logits, member_accuracies


def pack_members(models: Sequence[nn.Module], card: ModelCard, combine: str) -> qk.PackedEnsemble:
    """The packed ensemble of trained models, knowing what it takes to feed and to judge it."""
    run = card.run
    info = {
        "architecture": card.backbone,
        "method": run.method,
        "data_kind": run.dataset,  # --dataset
        "dataset": card.dataset,
        "data_source": card.data_source,
        "classes": card.classes,
        "domains": card.domains,
        "target": card.target,
        "trial_seed": run.trial_seed,
        "holdout_fraction": run.holdout_fraction,
        "image_shape": card.image_shape,
        "preprocessing": card.preprocessing,
        "combine": combine,
    }
    device = next(models[0].parameters()).device
    try:
        return qk.PackedEnsemble.from_models(models, torch.zeros(2, *card.image_shape, device=device), **info)
    except ValueError as error:
        raise UserError(f"these runs cannot be one packed file: {error}") from error


def calibration_batches(parts: Sequence[Part], images: int, device: torch.device) -> list[Tensor]:
    """About `images` training images, the same number of each source domain, in batches of up to 32."""
    each = max(1, images // len(parts))
    # The indices of a part are in random order.
    chunks = [(part, part.indices[:each][i : i + 32]) for part in parts for i in range(0, each, 32)]
    return [part.domain.images(indices, False).to(device) for part, indices in chunks if indices]


def read_ensemble(
    config: "EvalConfig | PredictConfig", device: torch.device
) -> tuple[qk.PackedEnsemble, dict[str, Any]]:
    """A packed ensemble, and what it says of itself.

    Raises:
        UserError: if there is none, it is damaged, takes too much memory, or is not signed as the settings require.
    """
    file = config.file
    if not file:
        raise UserError("name a packed ensemble: the folder `packed` that `qtdog ensemble` wrote")
    try:
        ensemble = qk.PackedEnsemble.load(file, max_bytes=config.max_bytes, public_key=config.require_signature)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    return ensemble.to(device), info_of(ensemble, file)


def answerer(ensemble: qk.PackedEnsemble, info: dict[str, Any], file: str) -> Callable[[Tensor], Tensor]:
    """What gives the members' logits for images; UserError where the ensemble cannot take them."""

    def answer(images: Tensor) -> Tensor:
        try:
            logits = ensemble.member_logits(images)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{file} cannot take images of shape {list(images.shape)}: {error}") from error
        if "classes" in info and logits.shape[1:] != (len(images), len(info["classes"])):
            raise UserError(f"{file} names {len(info['classes'])} classes, its network gives {list(logits.shape)}")
        return logits

    return answer


# qtdog eval ------------------------------------------------------------------------------------------------------


def parts_to_judge(info: dict[str, Any], dataset: DomainSet) -> list[tuple[Part, str]]:
    """(images, what they were to the training) of each domain.

    Of the domains that it was trained on only the images that were held out count, and of the target the part that the
    published tables report; of any other data all images do.
    """
    judged = []
    for env, domain in enumerate(dataset.domains):
        everything = range(len(domain.labels))
        if dataset.name != info.get("dataset") or domain.name not in info.get("domains", []):
            judged.append((Part(domain, env, list(everything)), "never seen"))
            continue
        if missing := {"holdout_fraction", "trial_seed", "target"} - info.keys():
            raise UserError(f"the packed ensemble was trained on these domains, but does not say its {min(missing)}")
        inner, outer = dataset.split(env, info["holdout_fraction"], info["trial_seed"])
        target = domain.name == info["target"]
        judged.append((Part(domain, env, inner if target else outer), "target" if target else "source, held out"))
    return judged


@dataclass
class EvalConfig:
    """Settings of `qtdog eval`."""

    file: Annotated[str, "packed ensemble: the folder `packed` that `qtdog ensemble` wrote"] = ""
    data_dir: Annotated[str | None, "root of the data, as for `qtdog train`"] = None
    dataset: Annotated[str | None, "which data (default: the one it was trained on)"] = None
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[int | None, "processes that read images, at most the CPU cores"] = None
    require_signature: Annotated[str | None, "public key of whoever must have signed the file: see `qtdog sign`"] = None
    max_bytes: Annotated[int | None, "memory that a file may take (default: docs/format.md), if it is refused"] = None


def evaluate_file(config: EvalConfig) -> dict[str, float]:
    """Print the accuracy of a packed ensemble on each domain of a data set; returns it by domain, in 0..1."""
    log = Log()
    device = pick_device(config.device)
    ensemble, info = read_ensemble(config, device)
    name = config.dataset or info.get("data_kind", "folder")
    preprocessing = preprocessing_of(info)
    dataset = load_dataset(name, config.data_dir, preprocessing, log)
    if dataset.classes != info.get("classes"):
        raise UserError(f"the data has the classes {dataset.classes}, {config.file} {info.get('classes')}")
    workers = pick_workers(config.num_workers, preprocessing is not None)
    log(
        f"{info.get('architecture', 'packed ensemble')}, {ensemble.members} members, {ensemble.nbytes:,} bytes, "
        f"{'integer' if ensemble.integer else 'float'} activations, on {dataset.source}"
    )
    answer = answerer(ensemble, info, config.file)
    accuracies = {}
    for part, role in tqdm(parts_to_judge(info, dataset), desc="evaluating", disable=None):
        images, combine = EvaluationImages(part, workers), info.get("combine", "logits")
        together, alone = member_accuracies(answer, images, combine, device)
        accuracies[part.domain.name] = together
        singles = ", ".join(f"{100 * one:.1f}" for one in alone)
        log(
            f"  {part.domain.name:20} {100 * together:5.1f} %  of {len(part.indices):6} images  "
            f"({role}; members alone: {singles})"
        )
    return accuracies


# qtdog predict ---------------------------------------------------------------------------------------------------


def digit_transform(image_shape: Sequence[int]) -> Callable[[Image.Image], Tensor]:
    """PIL image to float32 [1, H, W] in 0..1, as the MNIST sets are."""
    channels, height, width = image_shape
    if channels != 1:
        raise UserError(f"this network takes images of {channels} channels, which picture files do not have")

    def transform(image: Image.Image) -> Tensor:
        gray = image.convert("L").resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(gray, np.float32) / 255)[None]

    return transform


@dataclass
class PredictConfig:
    """Settings of `qtdog predict`."""

    file: Annotated[str, "packed ensemble: the folder `packed` that `qtdog ensemble` wrote"] = ""
    images: Annotated[list[str], "picture files"] = field(default_factory=list)
    top: Annotated[int, "how many classes to print"] = 3
    json: Annotated[bool, "print one JSON object an image"] = False
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    require_signature: Annotated[str | None, "public key of whoever must have signed the file: see `qtdog sign`"] = None
    max_bytes: Annotated[int | None, "memory that a file may take (default: docs/format.md), if it is refused"] = None


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Print the most likely classes of each image and how far the members disagree; returns the same as records."""
    device = pick_device(config.device)
    ensemble, info = read_ensemble(config, device)
    answer = answerer(ensemble, info, config.file)
    classes = info.get("classes")
    preprocessing = preprocessing_of(info)
    transform = digit_transform(info["image_shape"]) if preprocessing is None else plain_transform(preprocessing)
    if not config.images:
        raise UserError("name the images to predict: qtdog predict FILE IMAGE...")
    missing = [image for image in config.images if not Path(image).is_file()]
    if missing:
        raise UserError(f"{missing[0]} is not a file")
    records = []
    for image in config.images:
        batch = transform(read_image(Path(image)))[None].to(device)
        logits = answer(batch).float().cpu()
        probabilities = combine_logits(logits, info.get("combine", "logits"))[0]
        votes = logits[:, 0].argmax(-1)
        best = probabilities.argsort(descending=True)[: max(1, config.top)].tolist()
        record = {
            "image": image,
            "classes": {classes[i] if classes else str(i): probabilities[i].item() for i in best},
            # The share of members that would have decided otherwise.
            "disagreement": (votes != best[0]).double().mean().item(),
        }
        records.append(record)
        if config.json:
            PRINT(json.dumps(record))
        else:
            chances = ", ".join(f"{label} {chance:.3f}" for label, chance in record["classes"].items())
            PRINT(f"{image}  {chances}  (disagreement {record['disagreement']:.2f})")
    return records
