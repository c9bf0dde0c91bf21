"""`qtdog features`: what a trained network makes of images, before its last layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qkernels import replace_file
from qtdog.data.image_lists import images_of
from qtdog.data.loaders import EvaluationImages, Part
from qtdog.deployment.evaluating import DataToJudgeConfig, data_to_judge
from qtdog.deployment.predictors import open_predictor
from qtdog.environment import pick_workers
from qtdog.errors import UserError
from qtdog.log import PRINT, Log
from qtdog.models import head


@dataclass
class FeaturesConfig(DataToJudgeConfig):
    """Settings of `qtdog features`."""

    output: Annotated[str, "FILE.npz: arrays features, labels, domains, images, roles, classes"] = "features.npz"


def write_features(config: FeaturesConfig, log: Log = PRINT) -> Path:
    """What the last layer takes, for every image of a data set, trained on or not: each says its role."""
    output = Path(config.output)
    if output.suffix != ".npz":
        raise UserError(f"--output {config.output} must end in .npz")
    predictor = open_predictor(config)
    if len(predictor.models) != 1:
        raise UserError(f"{config.file} is no single run: features are those of one network, name the folder of a run")
    dataset, seen = data_to_judge(config, predictor, log), predictor.seen
    workers = pick_workers(config.num_workers, predictor.preprocessing is not None)
    features, labels, images = [], [], []
    for env, domain in enumerate(tqdm(dataset.domains, desc="features", disable=None)):
        part = Part(domain, env, list(range(len(domain.labels))))
        features.append(features_of(predictor.models[0], EvaluationImages(part, workers), predictor.device))
        labels.append(domain.labels)
        images += images_of(dataset, env)
    arrays: dict[str, Any] = {
        "features": torch.cat(features).numpy(),
        "labels": torch.cat(labels).numpy(),
        "domains": np.array([image.domain for image in images]),
        "images": np.array([image.name for image in images]),
        "roles": np.array([seen.role(image) for image in images]),
        "classes": np.array(dataset.classes),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out:  # given a name, numpy would add .npz to it
            np.savez(out, **arrays)

    replace_file(output, write)
    log(f"{len(images)} images, {arrays['features'].shape[1]} features each -> {output}")
    return output


@torch.no_grad()
def features_of(model: nn.Module, images: EvaluationImages, device: torch.device) -> Tensor:
    """float32 [N, features] of all images of a part: what the model's head takes."""
    found: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(1).float().cpu()))
    try:
        for batch, _ in images:
            model(batch.to(device, memory_format=torch.channels_last))
    finally:
        handle.remove()
    return torch.cat(found)
