"""The parts of a run's domains, and how good a model is on them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qtdog.config import RunConfig
from qtdog.data import DomainSet
from qtdog.data.images import AUGMENTATIONS
from qtdog.data.loaders import EvaluationImages, Part, fits_in_memory
from qtdog.errors import UserError


def domain_parts(run: RunConfig, dataset: DomainSet) -> dict[str, Part]:
    """The parts of all domains by DomainBed's names: env0_in, env0_out, env1_in, ..."""
    parts = {}
    for env, domain in enumerate(dataset.domains):
        inner, outer = dataset.split(env, run.holdout_fraction, run.trial_seed)
        if not outer:
            raise UserError(
                f"domain {domain.name} has {len(inner)} image(s), too few to hold out {run.holdout_fraction:.0%}: "
                "add images or raise --holdout-fraction"
            )
        parts[f"env{env}_in"] = Part(domain, env, inner)
        parts[f"env{env}_out"] = Part(domain, env, outer)
    return parts


def sources(run: RunConfig, dataset: DomainSet) -> list[int]:
    """Indices of the source domains."""
    return run.source_envs(len(dataset.domains))


def evaluation_images(
    run: RunConfig, dataset: DomainSet, parts: dict[str, Part], workers: int
) -> dict[str, EvaluationImages]:
    """All parts as evaluated at a checkpoint.

    Of the source domains' training images perhaps only the first; source images are augmented if the preset says so.
    """
    evaluated = dict(parts)
    for env in sources(run, dataset):
        part = parts[f"env{env}_in"]
        evaluated[f"env{env}_in"] = Part(part.domain, env, part.indices[: run.eval_train_images])
    keep = fits_in_memory(sum(len(part.indices) for part in evaluated.values()), dataset.image_shape)
    augment = AUGMENTATIONS[run.augmentation].evaluation
    return {
        name: EvaluationImages(part, workers, keep, augment and part.env in sources(run, dataset))
        for name, part in evaluated.items()
    }


@torch.no_grad()
def mean_loss(model: nn.Module, parts: Sequence[EvaluationImages], device: torch.device) -> float:
    """Cross-entropy per image, in nats, over all images of `parts`; the model's mode is the caller's."""
    total, count = 0.0, 0
    for images in parts:
        for batch, labels in images:
            logits = model(batch.to(device, memory_format=torch.channels_last))
            total += F.cross_entropy(logits.float(), labels.to(device), reduction="sum").item()
            count += len(labels)
    return total / count


def mean_out_accuracy(accuracies: dict[str, float], envs: Sequence[int]) -> float:
    """Mean over domains of the accuracy on their out parts: source validation, if `envs` are the sources."""
    # numpy's mean, which is DomainBed's: where accuracies are about equal, its last bit decides which is greater.
    return float(np.mean([accuracies[f"env{env}_out_acc"] for env in envs]))
