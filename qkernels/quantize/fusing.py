"""All weights of a model in one kernel call: `fuse_weights_`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fake_quantize_multi import fake_quantize_multi
from .layers import QuantizedLayer, multiply_dtype, quantized_layers
from .quantizers import LARGEST_SCALE, LSQ, SMALLEST_SCALE, positive_scale
from .sharding import is_sharded


def fuse_weights_(model: nn.Module) -> nn.Module:
    """From now on fake-quantize all LSQ weights of `model` in one kernel call at the start of each of its forwards.

    Same numbers as layer by layer, fewer launches. Call it on the module whose forward you call (inside
    DistributedDataParallel: the inner one), any time after or before `quantize_`, once. Returns `model`.

    A weight that is sharded when the model's forward begins (FSDP2, but for the outermost module's own) is left to its
    layer.
    """
    if _fuse not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_fuse)
        model.register_forward_hook(_unfuse, always_call=True)
    return model


def _fuse(model: nn.Module, args: Any) -> None:
    weights: dict[Any, list[tuple[QuantizedLayer, LSQ, Tensor]]] = {}
    inputs: dict[Any, list[QuantizedLayer]] = {}
    for _, layer in quantized_layers(model):
        if not layer.enabled or is_sharded(layer.weight_scale):
            continue
        if isinstance(layer.weight_quantizer, LSQ):
            key = (layer.weight_quantizer.axis, layer.latent_weight.device, layer.latent_weight.dtype)
            weights.setdefault(key, []).append((layer, layer.weight_quantizer, layer.float_weight()))
        if layer.act_range is not None:  # else the input to come decides its scale
            inputs.setdefault(layer.act_scale.device, []).append(layer)
    for (axis, _, _), members in weights.items():
        layers, quantizers, floats = zip(*members, strict=True)
        fused = fake_quantize_multi(
            floats,
            _positive_scales([layer.weight_scale for layer in layers]),
            [q.range[0] for q in quantizers],
            [q.range[1] for q in quantizers],
            axis,
            [q.grad_factor(weight) for q, weight in zip(quantizers, floats, strict=True)],
            multiply_dtype(floats[0]),
        )
        for layer, weight in zip(layers, fused, strict=True):
            layer.fused_weight = weight
    for rounding in inputs.values():
        for layer, scale in zip(rounding, _positive_scales([r.act_scale for r in rounding]), strict=True):
            layer.fused_act_scale = scale


def _unfuse(model: nn.Module, args: Any, output: Any) -> None:
    for _, layer in quantized_layers(model):
        layer.fused_weight = layer.fused_act_scale = None


def _positive_scales(scales: Sequence[Tensor]) -> Sequence[Tensor]:
    """`positive_scale` of each, flat, in a few launches for all of them."""
    if torch.compiler.is_compiling():  # which fuses them itself
        return [positive_scale(scale) for scale in scales]
    positive: tuple[Tensor, ...] = _PositiveScales.apply(*scales)
    return positive


class _PositiveScales(torch.autograd.Function):
    """A scale whose result is not used has no gradient, rather than zeros by which an optimizer would step."""

    @staticmethod
    def forward(ctx: Any, *scales: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([scale.float().flatten() for scale in scales])
        ctx.save_for_backward(flat)
        ctx.sizes, ctx.dtypes = [scale.numel() for scale in scales], [scale.dtype for scale in scales]
        ctx.set_materialize_grads(False)
        return positive_scale(flat).split(ctx.sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (flat,) = ctx.saved_tensors
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if not used:
            return (None,) * len(grads)
        magnitude = flat.abs()
        slope = flat.sign() * ((magnitude >= SMALLEST_SCALE) & (magnitude <= LARGEST_SCALE))
        slopes = slope.split(ctx.sizes)
        products = torch.cat([grads[i] for i in used]) * torch.cat([slopes[i] for i in used])  # type: ignore[misc]
        results: list[Tensor | None] = [None] * len(grads)
        for i, product in zip(used, products.split([ctx.sizes[i] for i in used]), strict=True):
            results[i] = product.to(ctx.dtypes[i])
        return tuple(results)
