"""How a tensor is quantized: the range of codes, the scale's start, its gradient factor, and its guard.

A quantizer is a description; the layer that it serves owns the scale, so that `conv1.weight_scale` stands beside
`conv1.weight` in the state dict.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ops import fake_quantize, mean_abs

Granularity = Literal["channel", "tensor"]
GradScale = Literal["tensor", "scale", "none"]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LARGEST_SCALE = torch.finfo(torch.float32).max


def code_range(bits: int, signed: bool = True, narrow: bool = False) -> tuple[int, int]:
    """(qmin, qmax) of `bits`-bit codes: signed [-2^(b-1), 2^(b-1) - 1] (narrow drops the least), else [0, 2^b - 1]."""
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1


def init_scale(x: Tensor, qmax: int, axis: int | None = None) -> Tensor:
    """LSQ's first scale, 2 mean|x| / sqrt(qmax): float32 [C] along `axis`, or 0-d without one.

    A channel of zeros starts at the mean of the other channels' scales, and a tensor of zeros at 1, so that no scale
    starts at 0. Source: Esser et al. 2020.
    """
    scale = 2 * mean_abs(x, axis) / math.sqrt(qmax)
    empty = scale <= 0
    rest = torch.where(empty, 0, scale).sum() / (~empty).sum().clamp(min=1)
    return torch.where(empty, torch.where(rest > 0, rest, 1), scale)


def positive_scale(scale: Tensor) -> Tensor:
    """The scale that a layer uses: |scale| in float32, kept off 0 and infinity.

    An optimizer may step a scale across 0; |.| reflects it there with the sign of its gradient, so it comes back to
    where it acts on the same side, and is never negative, 0 or infinite in use.
    """
    return scale.float().abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)


@dataclass(frozen=True)
class LSQ:
    """Learned step size quantization of a weight.

    Args:
        bits: 2..8.
        granularity: one scale an output channel, or one a tensor.
        narrow: leave out the least code, for a symmetric range.
        learn_scale: False keeps the scale where it started (straight-through estimator only).
        grad_scale: the N of the gradient factor 1 / sqrt(qmax * N): elements of the whole "tensor" (as QT-DoG does,
            also per channel), elements that share a "scale" (the LSQ paper), or "none" for a factor of 1.

    Source: Esser et al. 2020; QT-DoG Eq. 1-3.
    """

    bits: int = 7
    granularity: Granularity = "channel"
    narrow: bool = False
    learn_scale: bool = True
    grad_scale: GradScale = "tensor"

    @property
    def range(self) -> tuple[int, int]:
        return code_range(self.bits, narrow=self.narrow)

    @property
    def axis(self) -> int | None:
        return 0 if self.granularity == "channel" else None

    def grad_factor(self, weight: Tensor) -> float:
        if self.grad_scale == "none":
            return 1.0
        elements = weight.numel()
        if self.grad_scale == "scale" and self.granularity == "channel":
            elements //= weight.shape[0]
        return 1 / math.sqrt(self.range[1] * elements)

    def init_scale(self, weight: Tensor) -> Tensor:
        """The scale to start from: [C] or 0-d, in the dtype of `weight`."""
        return init_scale(weight, self.range[1], self.axis).to(weight.dtype)

    def __call__(self, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Fake-quantized weight; `scale` is the layer's parameter as it is."""
        return fake_quantize(weight, positive_scale(scale), *self.range, self.axis, self.grad_factor(weight), out_dtype)
