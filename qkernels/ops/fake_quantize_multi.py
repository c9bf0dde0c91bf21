"""`fake_quantize_multi`: the weights of all layers in one call."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import check_element, check_grad, check_per_scale, check_range, check_x
from .library import call, library, register_fake
from .transforms import as_channels, calls_op, from_channels, per_scale_channels, raise_double_backward, unrecorded

ops = torch.ops.qkernels


def _check_layers(
    op: str,
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    axis: int | None,
    grad_factors: Sequence[float],
) -> None:
    lengths = [len(a) for a in (xs, scales, qmins, qmaxs, grad_factors)]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"{op}: xs, scales, qmins, qmaxs and grad_factors must have one entry a layer, got lengths {lengths}"
        )
    for i, (x, scale, qmin, qmax) in enumerate(zip(xs, scales, qmins, qmaxs, strict=True)):
        layer = f"{op}, layer {i}"
        check_x(layer, x, axis)
        check_range(layer, qmin, qmax)
        check_per_scale(layer, "scale", scale, x, axis)
        if x.dtype != xs[0].dtype or x.device != xs[0].device:
            raise ValueError(
                f"{layer}: all xs must share dtype and device; "
                f"layer 0 is {xs[0].dtype} on {xs[0].device}, this one {x.dtype} on {x.device}"
            )


def _check_fake_quantize_multi(xs, scales, qmins, qmaxs, axis, grad_factors, out_dtype):
    _check_layers("fake_quantize_multi", xs, scales, qmins, qmaxs, axis, grad_factors)
    if out_dtype is not None:
        check_element("fake_quantize_multi", "out_dtype", out_dtype)


def _check_fake_quantize_multi_backward(grads, xs, scales, qmins, qmaxs, axis, grad_factors, param_grads):
    op = "fake_quantize_multi_backward"
    _check_layers(op, xs, scales, qmins, qmaxs, axis, grad_factors)
    if len(grads) != len(xs):
        raise ValueError(f"{op}: grads and xs must have one entry a layer, got {len(grads)} and {len(xs)}")
    for i, (grad, x) in enumerate(zip(grads, xs, strict=True)):
        check_grad(f"{op}, layer {i}", grad, x)
        if grad.dtype != grads[0].dtype:
            raise TypeError(f"{op}, layer {i}: all grads must share a dtype, got {grads[0].dtype} and {grad.dtype}")


@register_fake("fake_quantize_multi", _check_fake_quantize_multi)
def _fake_quantize_multi_fake(xs, scales, qmins, qmaxs, axis, grad_factors, out_dtype):
    return [torch.empty_like(x, dtype=out_dtype or x.dtype) for x in xs]


@register_fake("fake_quantize_multi_backward", _check_fake_quantize_multi_backward)
def _fake_quantize_multi_backward_fake(grads, xs, scales, qmins, qmaxs, axis, grad_factors, param_grads):
    return (
        [torch.empty_like(x) for x in xs],
        [torch.empty_like(s) if param_grads else s.new_empty(0) for s in scales],
    )


def _fake_quantize_multi_setup(ctx, inputs, output):
    xs, scales, *arguments, _ = inputs
    ctx.save_for_backward(*xs, *scales)
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)


def _gradients(backward, ctx, grads, scales_needed):
    """Of xs and scales, by `backward(grads, xs, scales, ...)`; None of layers whose result was not used."""
    layers = len(grads)
    qmins, qmaxs, axis, grad_factors = ctx.arguments
    grad_xs, grad_scales = [None] * layers, [None] * layers
    used = [i for i, grad in enumerate(grads) if grad is not None]

    def of_used(values):
        return [values[i] for i in used]

    if used:
        found = backward(
            *map(of_used, (grads, ctx.saved_tensors[:layers], ctx.saved_tensors[layers:], qmins, qmaxs)),
            axis,
            of_used(grad_factors),
            any(of_used(scales_needed)),
        )
        for i, grad_x, grad_scale in zip(used, *found, strict=True):
            grad_xs[i], grad_scales[i] = grad_x, grad_scale if scales_needed[i] else None
    return grad_xs, grad_scales


def _fake_quantize_multi_autograd(ctx, grads):
    found = _gradients(ops.fake_quantize_multi_backward.default, ctx, grads, ctx.needs_input_grad[1])
    return *found, None, None, None, None, None


torch.library.register_autograd(
    "qkernels::fake_quantize_multi",
    _fake_quantize_multi_autograd,
    setup_context=_fake_quantize_multi_setup,
    lib=library,
)
torch.library.register_autograd("qkernels::fake_quantize_multi_backward", raise_double_backward, lib=library)


class _FakeQuantizeMulti(torch.autograd.Function):
    """With xs and scales one after another, since a Function takes no gradients of lists."""

    @staticmethod
    def forward(ctx, layers, qmins, qmaxs, axis, grad_factors, out_dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.arguments = (qmins, qmaxs, axis, grad_factors)
        ctx.set_materialize_grads(False)
        xs, scales = tensors[:layers], tensors[layers:]
        return tuple(unrecorded(ops.fake_quantize_multi.default, xs, scales, *ctx.arguments, out_dtype))

    @staticmethod
    def backward(ctx, *grads):
        backward = partial(unrecorded, ops.fake_quantize_multi_backward.default)
        grad_xs, grad_scales = _gradients(backward, ctx, grads, ctx.needs_input_grad[-len(grads) :])
        return *(None,) * 6, *grad_xs, *grad_scales


def _recorded(xs: list[Tensor], scales: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The op, with its gradient by `_FakeQuantizeMulti`."""
    return list(_FakeQuantizeMulti.apply(len(xs), *arguments, *xs, *scales))


@torch.library.register_vmap("qkernels::fake_quantize_multi", lib=library)
def _fake_quantize_multi_vmap(info, in_dims, xs, scales, qmins, qmaxs, axis, grad_factors, out_dtype):
    batch = info.batch_size
    ys = ops.fake_quantize_multi.default(
        [as_channels(x, d, axis, batch) for x, d in zip(xs, in_dims[0], strict=True)],
        [per_scale_channels(s, d, batch) for s, d in zip(scales, in_dims[1], strict=True)],
        qmins,
        qmaxs,
        0,
        grad_factors,
        out_dtype,
    )
    return [from_channels(y, x, d, axis, batch) for y, x, d in zip(ys, xs, in_dims[0], strict=True)], [0] * len(ys)


def fake_quantize_multi(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    axis: int | None = 0,
    grad_factors: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`fake_quantize` of many tensors in one launch forward and one backward: every layer of a model at once.

    Args:
        xs: tensors of one dtype (float32, bfloat16 or float16) on one device, of any shapes and memory formats.
        scales: float32, each [C] along `axis` of its x, or one element each where `axis` is None.
        qmins, qmaxs, grad_factors: one a layer; grad_factors defaults to ones.
        axis: the channel dimension that all xs share.
        out_dtype: dtype of the results, by default that of xs.

    Returns:
        One tensor a layer, shaped as `xs`.

    Raises:
        TypeError, ValueError: naming the layer, as `fake_quantize` does.
    """
    if len(xs) == 0:
        return []
    grad_factors = [1.0] * len(xs) if grad_factors is None else [float(g) for g in grad_factors]
    arguments = (list(xs), list(scales), list(qmins), list(qmaxs), axis, grad_factors, out_dtype)
    return call("fake_quantize_multi", ops.fake_quantize_multi.default if calls_op() else _recorded, *arguments)
