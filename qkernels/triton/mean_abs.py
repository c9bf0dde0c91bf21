"""`mean_abs`: mean |x| over the elements that share a scale. See `layout.Matrix` for [kept, summed]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_of, on_device_of
from .layout import dense, matrix


@triton.jit(do_not_specialize=["kept_tiles", "summed_tiles", "walked"])
def _abs_sums_kernel(
    x_ptr,
    sums_ptr,
    kept,
    summed,
    kept_stride,
    summed_stride,
    kept_tiles,
    summed_tiles,
    walked,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_SUMMED: tl.constexpr,
):
    """A program walks `walked` tiles along `summed` and leaves one sum a kept index. Reads x once: 4 B an element."""
    pid = tl.program_id(0)
    split = (pid // kept_tiles).to(tl.int64)
    k = (pid % kept_tiles).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    sums = tl.zeros([BLOCK_KEPT, BLOCK_SUMMED], tl.float32)
    for tile in range(split * walked, tl.minimum((split + 1) * walked, summed_tiles)):
        s = tile * BLOCK_SUMMED + tl.arange(0, BLOCK_SUMMED)
        at = k[:, None] * kept_stride + s[None, :] * summed_stride
        mask = (k < kept)[:, None] & (s < summed)[None, :]
        sums += tl.abs(tl.load(x_ptr + at, mask, other=0.0).to(tl.float32))
    tl.store(sums_ptr + split * kept + k, tl.sum(sums, 1), k < kept)


def mean_abs(x: Tensor, axis: int | None) -> Tensor:
    """`reference.mean_abs`: float32 [C], or 0-d without an axis."""
    shape = () if axis is None else (x.shape[axis],)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    x = dense(x)
    m = matrix(x, axis)
    launch = launch_of("mean_abs", x)
    block_kept, block_summed = m.tile(launch)
    kept_tiles, summed_tiles = m.tiles(launch)
    splits, walked = m.splits(launch)
    sums = x.new_empty(splits, m.kept, dtype=torch.float32)
    with on_device_of(x):
        _abs_sums_kernel[(kept_tiles * splits,)](
            x,
            sums,
            m.kept,
            m.summed,
            m.kept_stride,
            m.summed_stride,
            kept_tiles,
            summed_tiles,
            walked,
            BLOCK_KEPT=block_kept,
            BLOCK_SUMMED=block_summed,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return (m.fold(sums) / (x.numel() // m.channels)).view(shape)
