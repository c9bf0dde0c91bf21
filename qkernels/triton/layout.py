"""How the kernels see a dense tensor: as a matrix [kept, summed], cut into tiles.

In memory order a tensor is [outer, channels, inner] around its channel axis; without an axis it is one channel. The
elements of a channel are spread over `outer` and `inner`. A program sums along the longer of the two, which leaves the
fewest partial sums, and the other one stays with the channels:

    rows     kept = outer * channels, summed = inner: contiguous along `summed` (weights, contiguous activations)
    columns  kept = channels * inner, summed = outer: contiguous along `kept` (channels_last activations, axis=1)
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .launch import Launch

_MAX_COLUMNS = 128  # of a tile in column order: 512 contiguous bytes of float32, and many rows to sum in registers


@dataclass(frozen=True)
class Matrix:
    """Extents and strides in elements. Channel of a kept index k: (k // group) % channels."""

    kept: int
    summed: int
    kept_stride: int
    summed_stride: int
    group: int
    channels: int

    def tile(self, launch: Launch) -> tuple[int, int]:
        """[kept, summed] extents of a tile, powers of two."""
        if self.summed_stride == 1:
            summed = min(triton.next_power_of_2(self.summed), launch.block)
            return min(triton.next_power_of_2(self.kept), launch.block // summed), summed
        kept = min(triton.next_power_of_2(self.kept), launch.block, _MAX_COLUMNS)
        return kept, min(triton.next_power_of_2(self.summed), launch.block // kept)

    def tiles(self, launch: Launch) -> tuple[int, int]:
        """How many tiles lie side by side along [kept, summed]."""
        kept, summed = self.tile(launch)
        return triton.cdiv(self.kept, kept), triton.cdiv(self.summed, summed)

    def splits(self, launch: Launch) -> tuple[int, int]:
        """Among how many programs the tiles along `summed` are split, and how many each of them walks."""
        kept_tiles, summed_tiles = self.tiles(launch)
        walked = triton.cdiv(summed_tiles, max(1, launch.programs // kept_tiles))
        return triton.cdiv(summed_tiles, walked), walked

    def fold(self, partials: Tensor) -> Tensor:
        """Sums of channels [C] from partial sums [splits, kept]; torch.sum adds in a fixed order."""
        if partials.numel() == self.channels:
            return partials.view(self.channels)
        return partials.view(-1, self.channels, self.group).sum((0, 2))


def matrix(x: Tensor, axis: int | None) -> Matrix:
    """The matrix of a dense tensor that has elements."""
    if axis is None or x.shape[axis] == 1:
        return Matrix(kept=1, summed=x.numel(), kept_stride=0, summed_stride=1, group=1, channels=1)
    channels, inner = x.shape[axis], x.stride(axis)
    outer = x.numel() // (channels * inner)
    # Rows whose starts 16 does not divide have no 16-byte accesses: with enough of them, columns are faster.
    if inner >= outer and (inner % 16 == 0 or outer < 16):
        return Matrix(outer * channels, inner, kept_stride=inner, summed_stride=1, group=1, channels=channels)
    width = channels * inner
    return Matrix(width, outer, kept_stride=1, summed_stride=width, group=inner, channels=channels)


def _is_dense(x: Tensor) -> bool:
    """True if every element of the tensor's memory span is used exactly once."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is dense (or empty), else a dense copy that keeps the order of its dimensions."""
    return x if x.numel() == 0 or _is_dense(x) else torch.empty_like(x).copy_(x)


def laid_out_as(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` itself if its elements lie in the order of x (dense, same shape), else a copy laid out so."""
    if all(a == b or n == 1 for a, b, n in zip(grad.stride(), x.stride(), x.shape, strict=True)):
        return grad
    return torch.empty_like(x, dtype=grad.dtype).copy_(grad)
