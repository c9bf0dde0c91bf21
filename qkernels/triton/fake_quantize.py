"""`fake_quantize` and its backward: one pass over the data each. See `layout.Matrix` for [kept, summed].

All integer arguments are elements; scale and offset are float32, one a channel, or a single one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import numerics
from .launch import launch_of, on_device_of
from .layout import dense, laid_out_as, matrix


@triton.jit(do_not_specialize=["group", "channels", "kept_tiles"])
def _forward_kernel(
    x_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    qmin,
    qmax,
    kept,
    summed,
    kept_stride,
    summed_stride,
    group,
    channels,
    kept_tiles,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_SUMMED: tl.constexpr,
):
    """One tile a program. Reads x and writes y once: 4 B + 4 B an element in float32, 2 B + 2 B in bfloat16."""
    pid = tl.program_id(0)
    k = (pid % kept_tiles).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    s = (pid // kept_tiles).to(tl.int64) * BLOCK_SUMMED + tl.arange(0, BLOCK_SUMMED)
    channel = (k // group) % channels
    scale = numerics.valid_scale(tl.load(scale_ptr + channel))[:, None]
    offset = None if offset_ptr is None else tl.load(offset_ptr + channel)[:, None]
    at = k[:, None] * kept_stride + s[None, :] * summed_stride
    mask = (k < kept)[:, None] & (s < summed)[None, :]
    x = tl.load(x_ptr + at, mask).to(tl.float32)
    y = numerics.fake_quantize(x, scale, offset, qmin, qmax)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["group", "channels", "kept_tiles", "summed_tiles", "walked"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    offset_ptr,
    grad_x_ptr,
    scale_sums_ptr,
    offset_sums_ptr,
    qmin,
    qmax,
    inside_min,
    inside_max,
    factor,
    kept,
    summed,
    kept_stride,
    summed_stride,
    group,
    channels,
    kept_tiles,
    summed_tiles,
    walked,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_SUMMED: tl.constexpr,
):
    """A program walks `walked` tiles along `summed`, writes grad_x, and leaves one sum a kept index: [splits, kept].

    Reads grad and x and writes grad_x once: 12 B an element in float32, 6 B in bfloat16. Without `scale_sums_ptr`
    nothing is summed. Elements beyond the edge load grad = 0, so their terms are 0.
    """
    pid = tl.program_id(0)
    split = (pid // kept_tiles).to(tl.int64)
    k = (pid % kept_tiles).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    channel = (k // group) % channels
    scale = numerics.valid_scale(tl.load(scale_ptr + channel))[:, None]
    offset = None if offset_ptr is None else tl.load(offset_ptr + channel)[:, None]
    scale_sums = tl.zeros([BLOCK_KEPT, BLOCK_SUMMED], tl.float32)
    offset_sums = tl.zeros([BLOCK_KEPT, BLOCK_SUMMED], tl.float32)
    for tile in range(split * walked, tl.minimum((split + 1) * walked, summed_tiles)):
        s = tile * BLOCK_SUMMED + tl.arange(0, BLOCK_SUMMED)
        at = k[:, None] * kept_stride + s[None, :] * summed_stride
        mask = (k < kept)[:, None] & (s < summed)[None, :]
        x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask, other=0.0).to(tl.float32)
        v = numerics.grid(x, scale, offset)
        inside = numerics.is_inside(v, inside_min, inside_max)
        tl.store(grad_x_ptr + at, tl.where(inside, grad, 0.0).to(grad_x_ptr.dtype.element_ty), mask)
        if scale_sums_ptr is not None:
            scale_sums += numerics.scale_term(v, inside, grad, qmin, qmax)
        if offset_sums_ptr is not None:
            offset_sums += tl.where(inside, 0.0, grad)
    if scale_sums_ptr is not None:
        tl.store(scale_sums_ptr + split * kept + k, tl.sum(scale_sums, 1) * factor, k < kept)
    if offset_sums_ptr is not None:
        tl.store(offset_sums_ptr + split * kept + k, tl.sum(offset_sums, 1) * factor, k < kept)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    grad_factor: float,
    aten_edge: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`reference.fake_quantize`, in one launch."""
    x = dense(x)
    y = torch.empty_like(x, dtype=out_dtype)
    if x.numel() == 0:
        return y
    m = matrix(x, axis)
    launch = launch_of("forward", x)
    block_kept, block_summed = m.tile(launch)
    kept_tiles, summed_tiles = m.tiles(launch)
    with on_device_of(x):
        _forward_kernel[(kept_tiles * summed_tiles,)](
            x,
            scale.contiguous(),
            None if offset is None else offset.contiguous(),
            y,
            float(qmin),
            float(qmax),
            m.kept,
            m.summed,
            m.kept_stride,
            m.summed_stride,
            m.group,
            m.channels,
            kept_tiles,
            BLOCK_KEPT=block_kept,
            BLOCK_SUMMED=block_summed,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return y


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    grad_factor: float,
    aten_edge: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.fake_quantize_backward`, in one launch; a second folds the partial sums where there are several."""
    x = dense(x)
    grad_x = torch.empty_like(x)
    offset_needed = param_grads and offset is not None
    if x.numel() == 0:
        nothing, zeros = scale.new_empty(0), torch.zeros_like(scale)
        return grad_x, zeros if param_grads else nothing, zeros.clone() if offset_needed else nothing
    m = matrix(x, axis)
    launch = launch_of("backward", x)
    block_kept, block_summed = m.tile(launch)
    kept_tiles, summed_tiles = m.tiles(launch)
    splits, walked = m.splits(launch)
    scale_sums = scale.new_empty(splits, m.kept) if param_grads else None
    offset_sums = scale.new_empty(splits, m.kept) if offset_needed else None
    with on_device_of(x):
        _backward_kernel[(kept_tiles * splits,)](
            laid_out_as(grad, x),
            x,
            scale.contiguous(),
            None if offset is None else offset.contiguous(),
            grad_x,
            scale_sums,
            offset_sums,
            float(qmin),
            float(qmax),
            *numerics.inside_bounds(qmin, qmax, aten_edge),
            grad_factor,
            m.kept,
            m.summed,
            m.kept_stride,
            m.summed_stride,
            m.group,
            m.channels,
            kept_tiles,
            summed_tiles,
            walked,
            BLOCK_KEPT=block_kept,
            BLOCK_SUMMED=block_summed,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return (
        grad_x,
        scale.new_empty(0) if scale_sums is None else m.fold(scale_sums).view(scale.shape),
        scale.new_empty(0) if offset_sums is None else m.fold(offset_sums).view(scale.shape),
    )
