"""The ops: argument checks and fake kernel, autograd, vmap, and the function that users call.

The implementations are registered by `backends.py`. The checks stand once, in a function that the user-callable and
the fake kernel share, so eager and compiled code give the same message: in eager code the former calls it, while the
compiler traces the latter does (Dynamo cannot trace a message that speaks of tensors).

Gradients through `torch.func.grad` are not supported: PyTorch's `register_autograd` has no such path. Gradients of a
`torch.vmap`ped call are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .library import library as _library

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CODE = 2**22  # float32 rounds to the nearest integer exactly up to here, on every backend

_ops = torch.ops.qkernels


def _check_x(op: str, x: Tensor, axis: int | None) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}; convert it, or use qkernels.reference"
        )
    if axis is not None and not 0 <= axis < x.dim():
        raise ValueError(f"{op}: axis {axis} is out of range for x with {x.dim()} dimensions")


def _check_range(op: str, qmin: int, qmax: int) -> None:
    if not -MAX_CODE <= qmin < qmax <= MAX_CODE:
        raise ValueError(f"{op}: need qmin < qmax within +-2**22, got qmin={qmin}, qmax={qmax}")


def _check_per_scale(op: str, name: str, t: Tensor, x: Tensor, axis: int | None) -> None:
    """`t` (scale or offset) is float32 on x's device, with one element, or one a channel."""
    if t.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device} but x is on {x.device}")
    if axis is None:
        if t.numel() != 1:
            raise ValueError(
                f"{op}: {name} must have one element without an axis, got shape {tuple(t.shape)}; "
                "pass axis for one scale a channel"
            )
    elif t.dim() != 1 or t.shape[0] != x.shape[axis]:
        raise ValueError(
            f"{op}: {name} must have shape ({x.shape[axis]},), one element for each channel along axis {axis} "
            f"of x {tuple(x.shape)}, got {tuple(t.shape)}"
        )


def _normalized(axis: int | None, x: Tensor) -> int | None:
    return axis + x.dim() if axis is not None and -x.dim() <= axis < 0 else axis


def _calls_op() -> bool:
    """Whether a call must reach the op with its gradient still to be recorded, as tracing and transforms need it.

    Eager training goes through a Function of our own instead: for what `register_autograd` makes, PyTorch compares the
    arguments with the schema's anew in each call, which takes several times as long as everything else.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled()


def _unrecorded(op: Any, *arguments: Any) -> Any:
    """Call an op inside a Function: where no gradient is wanted, not by way of the Python code that would say so."""
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _raise_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fake_quantize has no second derivative: the straight-through gradient is not a function to differentiate. "
        "Take higher derivatives of the loss through the dequantized weights instead (qkernels.dequantize_)."
    )


# fake_quantize ---------------------------------------------------------------------------------------------------


def _check_fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, axis: int | None, out_dtype: torch.dtype
) -> None:
    _check_x("fake_quantize", x, axis)
    _check_range("fake_quantize", qmin, qmax)
    _check_per_scale("fake_quantize", "scale", scale, x, axis)
    if offset is not None:
        _check_per_scale("fake_quantize", "offset", offset, x, axis)
    if out_dtype not in KERNEL_DTYPES:
        raise TypeError(f"fake_quantize: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


@torch.library.register_fake("qkernels::fake_quantize", lib=_library)
def _fake_quantize_fake(x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, out_dtype):
    _check_fake_quantize(x, scale, offset, qmin, qmax, axis, out_dtype)
    return torch.empty_like(x, dtype=out_dtype)


@torch.library.register_fake("qkernels::fake_quantize_backward", lib=_library)
def _fake_quantize_backward_fake(grad, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, param_grads):
    grad_scale = torch.empty_like(scale) if param_grads else scale.new_empty(0)
    grad_offset = torch.empty_like(scale) if param_grads and offset is not None else scale.new_empty(0)
    return torch.empty_like(x), grad_scale, grad_offset


def _fake_quantize_setup(ctx, inputs, output):
    x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, _ = inputs
    ctx.save_for_backward(x, scale, offset)
    ctx.arguments = (qmin, qmax, axis, grad_factor, aten_edge)


def _fake_quantize_autograd(ctx, grad):
    x, scale, offset = ctx.saved_tensors
    _, scale_needed, offset_needed, *_ = ctx.needs_input_grad
    param_grads = scale_needed or offset_needed
    grad_x, grad_scale, grad_offset = _unrecorded(
        _ops.fake_quantize_backward.default, grad, x, scale, offset, *ctx.arguments, param_grads
    )
    return (
        grad_x,
        grad_scale if scale_needed else None,
        grad_offset if offset_needed else None,
        *(None,) * 6,
    )


torch.library.register_autograd(
    "qkernels::fake_quantize", _fake_quantize_autograd, setup_context=_fake_quantize_setup, lib=_library
)
torch.library.register_autograd("qkernels::fake_quantize_backward", _raise_double_backward, lib=_library)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _fake_quantize_setup(ctx, inputs, None)
        return _unrecorded(_ops.fake_quantize.default, *inputs)

    backward = staticmethod(_fake_quantize_autograd)


def _as_channels(t: Tensor, bdim: int | None, axis: int | None, batch: int) -> Tensor:
    """[..., batch at bdim, ...] with channels along `axis` -> [batch * C, rest]; per tensor -> [batch, numel]."""
    t = t.movedim(bdim, 0) if bdim is not None else t.expand(batch, *t.shape)
    return t.flatten(1) if axis is None else t.movedim(axis + 1, 1).flatten(0, 1).flatten(1)


def _from_channels(t: Tensor, like: Tensor, bdim: int | None, axis: int | None, batch: int) -> Tensor:
    """Inverse of `_as_channels`, batch first."""
    shape = list(like.shape) if bdim is None else [n for d, n in enumerate(like.shape) if d != bdim % like.dim()]
    if axis is None:
        return t.reshape(batch, *shape)
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    return t.reshape(batch, *moved).movedim(1, axis + 1)


def _per_scale_channels(t: Tensor | None, bdim: int | None, batch: int) -> Tensor | None:
    if t is None:
        return None
    return (t.movedim(bdim, 0) if bdim is not None else t.expand(batch, *t.shape)).reshape(-1)


@torch.library.register_vmap("qkernels::fake_quantize", lib=_library)
def _fake_quantize_vmap(info, in_dims, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, out_dtype):
    y = _ops.fake_quantize.default(
        _as_channels(x, in_dims[0], axis, info.batch_size),
        _per_scale_channels(scale, in_dims[1], info.batch_size),
        _per_scale_channels(offset, in_dims[2], info.batch_size),
        qmin,
        qmax,
        0,
        grad_factor,
        aten_edge,
        out_dtype,
    )
    return _from_channels(y, x, in_dims[0], axis, info.batch_size), 0


@torch.library.register_vmap("qkernels::fake_quantize_backward", lib=_library)
def _fake_quantize_backward_vmap(
    info, in_dims, grad, x, scale, offset, qmin, qmax, axis, grad_factor, aten_edge, param_grads
):
    grad_x, grad_scale, grad_offset = _ops.fake_quantize_backward.default(
        _as_channels(grad, in_dims[0], axis, info.batch_size),
        _as_channels(x, in_dims[1], axis, info.batch_size),
        _per_scale_channels(scale, in_dims[2], info.batch_size),
        _per_scale_channels(offset, in_dims[3], info.batch_size),
        qmin,
        qmax,
        0,
        grad_factor,
        aten_edge,
        param_grads,
    )
    shape = scale.shape if in_dims[2] is None else scale.movedim(in_dims[2], 0).shape[1:]
    return (
        _from_channels(grad_x, x, in_dims[1], axis, info.batch_size),
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
    axis = _normalized(axis, x)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if edge not in ("lsq", "aten"):
        raise ValueError(f'fake_quantize: edge must be "lsq" or "aten", got {edge!r}')
    if not torch.compiler.is_compiling():
        _check_fake_quantize(x, scale, offset, qmin, qmax, axis, out_dtype)
    call = _ops.fake_quantize.default if _calls_op() else _FakeQuantize.apply
    return call(x, scale, offset, qmin, qmax, axis, float(grad_factor), edge == "aten", out_dtype)


# fake_quantize_multi ---------------------------------------------------------------------------------------------


def _check_fake_quantize_multi(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    axis: int | None,
    grad_factors: Sequence[float],
) -> None:
    op = "fake_quantize_multi"
    lengths = [len(a) for a in (xs, scales, qmins, qmaxs, grad_factors)]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"{op}: xs, scales, qmins, qmaxs and grad_factors must have one entry a layer, got lengths {lengths}"
        )
    for i, (x, scale, qmin, qmax) in enumerate(zip(xs, scales, qmins, qmaxs, strict=True)):
        layer = f"{op}, layer {i}"
        _check_x(layer, x, axis)
        _check_range(layer, qmin, qmax)
        _check_per_scale(layer, "scale", scale, x, axis)
        if x.dtype != xs[0].dtype or x.device != xs[0].device:
            raise ValueError(
                f"{layer}: all xs must share dtype and device; "
                f"layer 0 is {xs[0].dtype} on {xs[0].device}, this one {x.dtype} on {x.device}"
            )


@torch.library.register_fake("qkernels::fake_quantize_multi", lib=_library)
def _fake_quantize_multi_fake(xs, scales, qmins, qmaxs, axis, grad_factors, out_dtype):
    _check_fake_quantize_multi(xs, scales, qmins, qmaxs, axis, grad_factors)
    return [torch.empty_like(x, dtype=out_dtype or x.dtype) for x in xs]


@torch.library.register_fake("qkernels::fake_quantize_multi_backward", lib=_library)
def _fake_quantize_multi_backward_fake(grads, xs, scales, qmins, qmaxs, axis, grad_factors, param_grads):
    return (
        [torch.empty_like(x) for x in xs],
        [torch.empty_like(s) if param_grads else s.new_empty(0) for s in scales],
    )


def _fake_quantize_multi_setup(ctx, inputs, output):
    xs, scales, qmins, qmaxs, axis, grad_factors, _ = inputs
    ctx.save_for_backward(*xs, *scales)
    ctx.arguments = (qmins, qmaxs, axis, grad_factors)


def _fake_quantize_multi_autograd(ctx, grads):
    layers = len(grads)
    xs, scales = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
    _, scales_needed, *_ = ctx.needs_input_grad
    grad_xs, grad_scales = _ops.fake_quantize_multi_backward.default(
        grads, xs, scales, *ctx.arguments, any(scales_needed)
    )
    grad_scales = [g if needed else None for g, needed in zip(grad_scales, scales_needed, strict=True)]
    return list(grad_xs), grad_scales, None, None, None, None, None


torch.library.register_autograd(
    "qkernels::fake_quantize_multi",
    _fake_quantize_multi_autograd,
    setup_context=_fake_quantize_multi_setup,
    lib=_library,
)
torch.library.register_autograd("qkernels::fake_quantize_multi_backward", _raise_double_backward, lib=_library)


class _FakeQuantizeMulti(torch.autograd.Function):
    """With xs and scales one after another, since a Function takes no gradients of lists."""

    @staticmethod
    def forward(ctx, qmins, qmaxs, axis, grad_factors, out_dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.arguments = (qmins, qmaxs, axis, grad_factors)
        layers = len(tensors) // 2
        xs, scales = tensors[:layers], tensors[layers:]
        return tuple(_unrecorded(_ops.fake_quantize_multi.default, xs, scales, *ctx.arguments, out_dtype))

    @staticmethod
    def backward(ctx, *grads):
        layers = len(grads)
        xs, scales = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        scales_needed = ctx.needs_input_grad[-layers:]
        grad_xs, grad_scales = _unrecorded(
            _ops.fake_quantize_multi_backward.default, grads, xs, scales, *ctx.arguments, any(scales_needed)
        )
        grad_scales = [g if needed else None for g, needed in zip(grad_scales, scales_needed, strict=True)]
        return *(None,) * 5, *grad_xs, *grad_scales


@torch.library.register_vmap("qkernels::fake_quantize_multi", lib=_library)
def _fake_quantize_multi_vmap(info, in_dims, xs, scales, qmins, qmaxs, axis, grad_factors, out_dtype):
    batch = info.batch_size
    ys = _ops.fake_quantize_multi.default(
        [_as_channels(x, d, axis, batch) for x, d in zip(xs, in_dims[0], strict=True)],
        [_per_scale_channels(s, d, batch) for s, d in zip(scales, in_dims[1], strict=True)],
        qmins,
        qmaxs,
        0,
        grad_factors,
        out_dtype,
    )
    return [_from_channels(y, x, d, axis, batch) for y, x, d in zip(ys, xs, in_dims[0], strict=True)], [0] * len(ys)


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
    if not torch.compiler.is_compiling():
        _check_fake_quantize_multi(xs, scales, qmins, qmaxs, axis, grad_factors)
    arguments = (list(qmins), list(qmaxs), axis, grad_factors, out_dtype)
    if _calls_op():
        return _ops.fake_quantize_multi.default(list(xs), list(scales), *arguments)
    return list(_FakeQuantizeMulti.apply(*arguments, *xs, *scales))


# mean_abs --------------------------------------------------------------------------------------------------------


@torch.library.register_fake("qkernels::mean_abs", lib=_library)
def _mean_abs_fake(x, axis):
    _check_x("mean_abs", x, axis)
    return x.new_empty((), dtype=torch.float32) if axis is None else x.new_empty(x.shape[axis], dtype=torch.float32)


@torch.no_grad()
def mean_abs(x: Tensor, axis: int | None = None) -> Tensor:
    """Mean |x| over the elements that share a scale, in one pass; not differentiable.

    Args:
        x: float32, bfloat16 or float16, any shape and memory format.
        axis: the dimension with one result an index; None for the whole tensor.

    Returns:
        float32 [C], or 0-d without an axis; 0 for an empty slice.
    """
    axis = _normalized(axis, x)
    if not torch.compiler.is_compiling():
        _check_x("mean_abs", x, axis)
    return _ops.mean_abs.default(x.detach(), axis)
