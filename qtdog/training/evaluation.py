"""The parts of a run's domains, and the accuracy of a model on them."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtdog.config import RunConfig
from qtdog.data import DomainSet
from qtdog.data.images import AUGMENTATIONS
from qtdog.data.loaders import EvaluationImages, Part, fits_in_memory
from qtdog.errors import UserError

Combine = Literal["logits", "probs"]


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
    return [env for env in range(len(dataset.domains)) if env != run.test_env]


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
        name: EvaluationImages(part, workers, keep, augment and part.env != run.test_env)
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


@torch.no_grad()
def accuracy(model: nn.Module, images: EvaluationImages, device: torch.device) -> float:
    """Share of correct predictions, in 0..1; the model is left in eval mode."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for batch, labels in images:
        logits = model(batch.to(device, memory_format=torch.channels_last))
        correct += (logits.argmax(1) == labels.to(device)).sum()
    return correct.item() / len(images.part.indices)


def combine_logits(logits: Tensor, combine: Combine) -> Tensor:
    """Class probabilities of an ensemble.

    Args:
        logits: float [members, N, classes].
        combine: `logits` takes the softmax of their mean over the members (EoQ), `probs` the mean of the softmaxes.

    Returns:
        float [N, classes].
    """
    return logits.mean(0).softmax(-1) if combine == "logits" else logits.softmax(-1).mean(0)


@torch.no_grad()
def member_accuracies(
    member_logits: Callable[[Tensor], Tensor], images: EvaluationImages, combine: Combine, device: torch.device
) -> tuple[float, list[float]]:
    """Share of correct predictions, in 0..1, of an ensemble and of each member alone.

    Args:
        member_logits: images [N, C, H, W] to logits [members, N, classes].
    """
    together, alone = 0, torch.zeros(())
    for batch, labels in images:
        logits = member_logits(batch.to(device, memory_format=torch.channels_last)).float().cpu()
        together += int((combine_logits(logits, combine).argmax(-1) == labels).sum())
        alone = alone + (logits.argmax(-1) == labels).sum(1)
    count = len(images.part.indices)
    return together / count, (alone.double() / count).tolist()


def mean_out_accuracy(accuracies: dict[str, float], envs: Sequence[int]) -> float:
    """Mean over domains of the accuracy on their out parts: source validation, if `envs` are the sources."""
    return sum(accuracies[f"env{env}_out_acc"] for env in envs) / len(envs)
