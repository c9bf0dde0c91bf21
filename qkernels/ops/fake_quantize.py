"""`fake_quantize`: argument checks and fake kernel, autograd, vmap, and the function that users call.

The implementations are registered by `backends.py`.
"""

from typing import Literal

import torch
from torch import Tensor

from .checks import check_element, check_grad, check_per_scale, check_range, check_x, normalized
from .library import call, explain, library, register_fake
from .transforms import as_channels, calls_op, from_channels, per_scale_channels, raise_double_backward, unrecorded

ops = torch.ops.qkernels


def _check_quantizer(
    op: str, x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, axis: int | None
) -> None:
    check_x(op, x, axis)
    check_range(op, qmin, qmax)
    check_per_scale(op, "scale", scale, x, axis)
    if offset is not None:
        check_per_scale(op, "offset", offset, x, axis)


def _check_fake_quantize(x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, out_dtype):
    _check_quantizer("fake_quantize", x, scale, offset, qmin, qmax, axis)
    check_element("fake_quantize", "out_dtype", out_dtype)


def _check_fake_quantize_backward(grad, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, param_grads):
    _check_quantizer("fake_quantize_backward", x, scale, offset, qmin, qmax, axis)
    check_grad("fake_quantize_backward", grad, x)


@register_fake("fake_quantize", _check_fake_quantize)
def _fake_quantize_fake(x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, out_dtype):
    return torch.empty_like(x, dtype=out_dtype)


@register_fake("fake_quantize_backward", _check_fake_quantize_backward)
def _fake_quantize_backward_fake(grad, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, param_grads):
    grad_scale = torch.empty_like(scale) if param_grads else scale.new_empty(0)
    grad_offset = torch.empty_like(scale) if param_grads and offset is not None else scale.new_empty(0)
    return torch.empty_like(x), grad_scale, grad_offset


def _fake_quantize_setup(ctx, inputs, output):
    x, scale, offset, *arguments = inputs
    ctx.save_for_backward(x, scale, offset)
    ctx.arguments = arguments


def _gradients(ctx, grad):
    """Of x, scale and offset."""
    x, scale, offset = ctx.saved_tensors
    qmin, qmax, axis, grad_factor, aten_edge, _ = ctx.arguments
    needed = ctx.needs_input_grad
    scale_needed, offset_needed = needed[1], needed[2]
    grad_x, grad_scale, grad_offset = unrecorded(
        ops.fake_quantize_backward.default,
        grad,
        x,
        scale,
        offset,
        qmin,
        qmax,
        axis,
        grad_factor,
        aten_edge,
        scale_needed or offset_needed,
    )
    return grad_x, grad_scale if scale_needed else None, grad_offset if offset_needed else None


def _fake_quantize_autograd(ctx, grad):
    return *_gradients(ctx, grad), *(None,) * 6


torch.library.register_autograd(
    "qkernels::fake_quantize", _fake_quantize_autograd, setup_context=_fake_quantize_setup, lib=library
)
torch.library.register_autograd("qkernels::fake_quantize_backward", raise_double_backward, lib=library)


class _FakeQuantize(torch.autograd.Function):
    """With what has no gradient in one argument: PyTorch looks at each on the way in, and at a gradient of each."""

    @staticmethod
    def forward(ctx, x, scale, offset, arguments):
        ctx.save_for_backward(x, scale, offset)
        ctx.arguments = arguments
        return unrecorded(ops.fake_quantize.default, x, scale, offset, *arguments)

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(ctx, grad), None


@torch.library.register_vmap("qkernels::fake_quantize", lib=library)
def _fake_quantize_vmap(info, in_dims, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, out_dtype):
    y = ops.fake_quantize.default(
        as_channels(x, in_dims[0], axis, info.batch_size),
        per_scale_channels(scale, in_dims[1], info.batch_size),
        per_scale_channels(offset, in_dims[2], info.batch_size),
        qmin,
        qmax,
        0,
        grad_factor,
        aten_edge,
        out_dtype,
    )
    return from_channels(y, x, in_dims[0], axis, info.batch_size), 0


@torch.library.register_vmap("qkernels::fake_quantize_backward", lib=library)
def _fake_quantize_backward_vmap(
    info, in_dims, grad, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, param_grads
):
    grad_x, grad_scale, grad_offset = ops.fake_quantize_backward.default(
        as_channels(grad, in_dims[0], axis, info.batch_size),
        as_channels(x, in_dims[1], axis, info.batch_size),
        per_scale_channels(scale, in_dims[2], info.batch_size),
        per_scale_channels(offset, in_dims[3], info.batch_size),
        qmin,
        qmax,
        0,
        grad_factor,
        aten_edge,
        param_grads,
    )
    shape = scale.shape if in_dims[2] is None else scale.movedim(in_dims[2], 0).shape[1:]
    return (
        from_channels(grad_x, x, in_dims[1], axis, info.batch_size),
        grad_scale.reshape(info.batch_size, *shape) if param_grads else grad_scale.expand(info.batch_size, 0),
        grad_offset.reshape(info.batch_size, *shape)
        if param_grads and offset is not None
        else grad_offset.expand(info.batch_size, 0),
    ), (0, 0, 0)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_factor: float = 1.0,
    out_dtype: torch.dtype | None = None,
    *,
    offset: Tensor | None = None,
    edge: Literal["lsq", "aten"] = "lsq",
) -> Tensor:
    """Quantize to integer codes in [qmin, qmax] and back: round(clamp((x - offset) / scale)) * scale + offset.

    Differentiable in x (straight through), scale (LSQ) and offset (LSQ+); not twice. Where `scale` does not require a
    gradient none is computed.

    Args:
        x: float32, bfloat16 or float16, any shape and memory format. NaN stays NaN, infinities saturate.
        scale: float32 step size, [C] with `axis`, else one element. A scale that is not positive and finite makes the
            output of its slice NaN, its own gradient NaN and the gradient of x in its slice 0.
        qmin, qmax: the least and largest code; [-64, 63] is signed 7 bit, [0, 255] unsigned 8 bit.
        axis: the dimension of x that has one scale an index; None for one scale a tensor.
        grad_factor: multiplies the gradients of scale and offset; LSQ takes 1 / sqrt(qmax * elements).
        out_dtype: dtype of the result, by default x's. The gradient of x always has x's dtype.
        offset: float32, shaped as scale; added to the grid (LSQ+).
        edge: "lsq" decides which elements are inside the range before rounding, as the paper does; "aten" after it,
            as `torch._fake_quantize_learnable_per_*_affine` does.

    Returns:
        A tensor of x's shape and memory format.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device, axis or range.

    Source: Esser et al. 2020 (LSQ), Bhalgat et al. 2020 (LSQ+).
    """
    axis = normalized(axis, x)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if edge not in ("lsq", "aten"):
        raise ValueError(f'fake_quantize: edge must be "lsq" or "aten", got {edge!r}')
    arguments = (qmin, qmax, axis, float(grad_factor), edge == "aten", out_dtype)
    if calls_op():
        return call("fake_quantize", ops.fake_quantize.default, x, scale, offset, *arguments)
    try:
        return _FakeQuantize.apply(x, scale, offset, arguments)
    except RuntimeError:
        explain("fake_quantize", x, scale, offset, *arguments)
        raise
