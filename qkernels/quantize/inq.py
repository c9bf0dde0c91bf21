"""Incremental network quantization: the schedule by which weights freeze at powers of two."""

import torch
from torch import nn

from .layers import quantized_layers
from .quantizers import INQ


@torch.no_grad()
def snap_(model: nn.Module, fraction: float) -> None:
    """Freeze more weights of every INQ layer at their levels, the largest free ones first.

    Args:
        fraction: share in 0..1 of each layer's weights that is frozen afterwards; those frozen already stay, also where
            `fraction` is less than before. The paper's schedule is .5, .75, .875, 1.

    Raises:
        ValueError: for a fraction outside 0..1, or a model without an INQ layer.

    Source: Zhou et al. 2017, pruning-inspired partition.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"snap_: fraction must lie in 0..1, got {fraction}")
    layers = [layer for _, layer in quantized_layers(model) if isinstance(layer.weight_quantizer, INQ)]
    if not layers:
        raise ValueError('snap_: the model has no INQ layer; see QConfig(quantizer="inq")')
    for layer in layers:
        assert isinstance(layer.weight_quantizer, INQ)
        weight, frozen = layer.latent_weight.detach(), layer.weight_frozen
        more = round(fraction * weight.numel()) - int(frozen.isfinite().sum())
        if more > 0:
            magnitude = torch.where(frozen.isinf(), weight.abs(), -1).flatten()
            largest = magnitude.argsort(descending=True, stable=True)[:more]
            chosen = torch.zeros_like(magnitude, dtype=torch.bool).index_fill_(0, largest, True).view_as(weight)
            frozen.copy_(torch.where(chosen, layer.weight_quantizer.snap(weight, layer.weight_scale), frozen))
