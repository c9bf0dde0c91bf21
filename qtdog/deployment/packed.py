"""Packing the models of trained runs into one file."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import qkernels as qk
from qtdog.data.image_lists import ImageList
from qtdog.data.loaders import Part
from qtdog.errors import UserError
from qtdog.results.runs import ModelCard


def pack_members(
    models: Sequence[nn.Module], card: ModelCard, images: ImageList | None, combine: str
) -> qk.PackedEnsemble:
    """The packed ensemble of trained models, knowing what it takes to feed and to judge it.

    Args:
        images: those that they were trained on, as they are to lie beside the file; None if nobody knows.
    """
    run = card.run
    info = {
        "architecture": card.backbone,
        "method": run.method,
        "data_kind": run.dataset,  # --dataset
        "dataset": card.dataset,
        "data_source": card.data_source,
        "classes": card.classes,
        "domains": card.domains,
        "targets": card.targets,
        "sources": card.sources,
        "trial_seed": run.trial_seed,
        "holdout_fraction": run.holdout_fraction,
        "image_shape": card.image_shape,
        "preprocessing": card.preprocessing,
        "combine": combine,
        **({"images_sha256": images.division} if images is not None else {}),
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
