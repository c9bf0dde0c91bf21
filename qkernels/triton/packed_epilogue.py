"""What follows the sums of a packed convolution, on tiles of any shape and orientation.

Every operation is rounded to float32 in the order of docs/format.md: launch with `enable_fp_fusion=False`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes, numerics


class Epilogue(NamedTuple):
    """What follows the sums, as `finish` takes it: float32 vectors, and tensors laid out as the output, or None.

    x_scale, residual_scale, out_scale: [members]; scale, bias: [members, channels]; residual, out: [N, C, H, W] in
    channels_last; qmin, qmax: of the output's codes, where it has an out_scale.
    """

    x_scale: Tensor | None
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    residual_scale: Tensor | None
    out_scale: Tensor | None
    out: Tensor
    qmin: float
    qmax: float

    def laid_out(self) -> "Epilogue":
        """With tensors as the kernels read them."""
        return self._replace(
            x_scale=_dense(self.x_scale),
            scale=self.scale.contiguous(),
            bias=_dense(self.bias),
            residual=None if self.residual is None else self.residual.contiguous(memory_format=torch.channels_last),
            residual_scale=_dense(self.residual_scale),
            out_scale=_dense(self.out_scale),
        )


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@triton.jit
def _sixth(v):
    return tl.div_rn(v, tl.full(v.shape, 6.0, tl.float32))


@triton.jit
def _gelu(v):
    a = tl.minimum(tl.abs(v), 13.0, propagate_nan=tl.PropagateNan.ALL)
    p = 0.00399434753 * a + 0.0398087464
    p = p * a + 0.180783898
    p = p * a + 0.434976071
    p = p * a + 0.5
    q = 0.0100121945 * a + 0.099793382
    q = q * a + 0.463000506
    q = q * a + 1.19230521
    q = q * a + 1.66783702
    q = q * a + 1.0
    beyond = tl.div_rn(a * tl.exp(-0.5 * (a * a)) * p, q)
    return tl.where(v < -13.0, v * 0.0, tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) - beyond)


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """What csrc/activation.h computes, with Triton's own exponential. NaN passes, as it does in PyTorch."""
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        v = tl.clamp(v, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        v = tl.div_rn(v, 1.0 + tl.exp(-v))
    elif ACTIVATION == "hardswish":
        v = _sixth(v * tl.clamp(v + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL))
    elif ACTIVATION == "hardsigmoid":
        v = _sixth(tl.clamp(v + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL))
    elif ACTIVATION == "sigmoid":
        v = tl.div_rn(tl.full(v.shape, 1.0, tl.float32), 1.0 + tl.exp(-v))
    elif ACTIVATION == "gelu":
        v = _gelu(v)
    elif ACTIVATION == "gelu_tanh":
        v = tl.div_rn(v, 1.0 + tl.exp(-1.59576912 * (v + 0.044715 * (v * v * v))))
    else:
        tl.static_assert(ACTIVATION == "none")
    return v


@triton.jit
def finish(sums, member, pixel, channel, mask, epilogue, pixels, channels, ACTIVATION: tl.constexpr):
    """Store activation(sums * scale + bias + residual), as codes if there is an out_scale.

    sums: int32 or float32, a tile of one member's output [pixels, channels] in memory; `pixel` and `channel` are
    indices that broadcast to its shape.
    """
    scale = tl.load(epilogue.scale + member * channels + channel, channel < channels, other=0.0)
    if epilogue.x_scale is not None:
        scale = scale * tl.load(epilogue.x_scale + member)
    v = sums.to(tl.float32) * scale
    if epilogue.bias is not None:
        v = v + tl.load(epilogue.bias + member * channels + channel, channel < channels, other=0.0)
    first = member.to(tl.int64) * pixels * channels
    at = pixel * channels + channel
    if epilogue.residual is not None:
        residual = tl.load(epilogue.residual + first + at, mask, other=0).to(tl.float32)
        if epilogue.residual_scale is not None:
            residual = residual * tl.load(epilogue.residual_scale + member)
        v = v + residual
    v = activated(v, ACTIVATION)
    if epilogue.out_scale is not None:
        out_scale = numerics.valid_scale(tl.load(epilogue.out_scale + member))
        v = codes.quantized(v, out_scale, epilogue.qmin, epilogue.qmax)
    tl.store(epilogue.out + first + at, v.to(epilogue.out.dtype.element_ty), mask)
