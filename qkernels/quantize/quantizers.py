"""How a tensor is quantized: the range of codes, the scale's start, its gradient factor, and its guard.

A quantizer is a description; the layer that it serves owns the scale, so that `conv1.weight_scale` stands beside
`conv1.weight` in the state dict. Scales have one dimension, also where there is but one: FSDP shards no others.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.fake_quantize import fake_quantize
from ..ops.mean_abs import mean_abs

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
    """LSQ's first scale, 2 mean|x| / sqrt(qmax): float32 [C] along `axis`, or [1] without one.

    A channel of zeros starts at the mean of the other channels' scales, and a tensor of zeros at 1, so that no scale
    starts at 0. Source: Esser et al. 2020.
    """
    return scale_of_mean(mean_abs(x, axis), qmax).reshape(-1)


def scale_of_mean(mean: Tensor, qmax: int) -> Tensor:
    """`init_scale` of a tensor whose mean |x| per scale is `mean`."""
    scale = 2 * mean / math.sqrt(qmax)
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
        channel_axis: the weight's dimension that counts output channels; layers see to it.

    Source: Esser et al. 2020; QT-DoG Eq. 1-3.
    """

    bits: int = 7
    granularity: Granularity = "channel"
    narrow: bool = False
    learn_scale: bool = True
    grad_scale: GradScale = "tensor"
    channel_axis: int = 0

    @property
    def range(self) -> tuple[int, int]:
        """(qmin, qmax)."""
        return code_range(self.bits, narrow=self.narrow)

    @property
    def axis(self) -> int | None:
        """The weight's dimension with one scale an index; None for one scale in all."""
        return self.channel_axis if self.granularity == "channel" else None

    def grad_factor(self, weight: Tensor) -> float:
        """What the gradient of the scale is multiplied by, see `grad_scale`."""
        if self.grad_scale == "none":
            return 1.0
        elements = weight.numel()
        if self.grad_scale == "scale" and self.granularity == "channel":
            elements //= weight.shape[self.channel_axis]
        return 1 / math.sqrt(self.range[1] * elements)

    def init_scale(self, weight: Tensor) -> Tensor:
        """The scale to start from: [C] or [1], in the dtype of `weight`."""
        return init_scale(weight, self.range[1], self.axis).to(weight.dtype)

    def __call__(self, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Fake-quantized weight; `scale` as `positive_scale` gives it."""
        return fake_quantize(weight, scale, *self.range, self.axis, self.grad_factor(weight), out_dtype)


@dataclass(frozen=True)
class INQ:
    """Incremental network quantization of a weight: powers of two, reached by freezing ever more weights.

    The levels are 0 and ±2^i for n2 <= i <= n1, with n1 = floor(log2(4 max|w| / 3)) and n2 = n1 + 2 - 2^bits / 2: the
    2^bits - 1 values that `bits` bits can number symmetrically. A scale is 2^n1, the largest level, taken when the
    weight is first quantized and never learned. Weights are free until `qkernels.snap_` freezes them at their level.

    Args:
        bits: 2..8.
        granularity: one n1 an output channel, or one a tensor (the paper).

    Source: Zhou et al. 2017, with the levels as QT-DoG counts them.
    """

    bits: int = 7
    granularity: Granularity = "tensor"
    learn_scale: bool = False
    channel_axis: int = 0

    @property
    def axis(self) -> int | None:
        """The weight's dimension with one scale an index; None for one scale in all."""
        return self.channel_axis if self.granularity == "channel" else None

    def init_scale(self, weight: Tensor) -> Tensor:
        """2^n1, [C] or [1], in the dtype of `weight`; 1 where all weights are 0."""
        magnitude = weight.detach().abs()
        by_scale = magnitude.reshape(1, -1) if self.axis is None else magnitude.movedim(self.axis, 0).flatten(1)
        largest = by_scale.amax(1)
        return torch.where(largest > 0, nearest_power_of_two(largest), 1)

    def snap(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The level nearest to each weight (of two equally near, the larger), in the weight's shape and dtype."""
        after = weight.dim() - 1 - (self.axis or 0)
        top = scale if self.axis is None else scale.reshape(-1, *[1] * after)
        least = torch.ldexp(top, torch.tensor(2 - 2 ** (self.bits - 1), device=weight.device))
        magnitude = weight.detach().abs()
        level = torch.minimum(torch.maximum(nearest_power_of_two(magnitude), least), top)
        return torch.where(magnitude < least / 2, 0, level.copysign(weight.detach())).to(weight.dtype)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2(4 x / 3)), the power of two nearest to x > 0 (the larger at a tie), without rounding errors."""
    mantissa, _ = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    return x / mantissa.clamp(min=0.5) * torch.where(mantissa >= 0.75, 1.0, 0.5).to(x.dtype)


@dataclass(frozen=True)
class ActivationLSQ:
    """Learned step size quantization of a layer's input: one scale a tensor.

    Args:
        bits: 2..8.
        signed: the codes are [-2^(b-1), 2^(b-1) - 1] if True, [0, 2^b - 1] if False; None lets the first training batch
            decide: unsigned if nothing in it is negative, as after ReLU and ReLU6.
        learn_scale: False keeps the scale where the first training batch put it.

    Source: Esser et al. 2020.
    """

    bits: int = 8
    signed: bool | None = None
    learn_scale: bool = True

    def __call__(
        self, x: Tensor, scale: Tensor, range: tuple[int, int], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Fake-quantized x, [N, ...]; `scale` as `positive_scale` gives it, `range` its (qmin, qmax).

        The gradient factor is 1 / sqrt(qmax * features), with the features of one sample: neither the size of a batch
        nor its split over processes changes the scale's gradient.
        """
        qmin, qmax = range
        if torch.compiler.is_compiling():  # whose sizes may stand for many: no number may be made of them
            return fake_quantize(x, _ByFeatures.apply(scale, x), qmin, qmax, None, 1 / math.sqrt(qmax), out_dtype)
        features = max(math.prod(x.shape[1:]), 1)
        return fake_quantize(x, scale, qmin, qmax, None, 1 / math.sqrt(qmax * features), out_dtype)


class _ByFeatures(torch.autograd.Function):
    """A scale, whose gradient is divided by the root of the features of one sample of x."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, x: Tensor) -> Tensor:
        ctx.features = math.prod(x.shape[1:])
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * torch.full_like(grad, ctx.features).clamp(min=1).rsqrt(), None
