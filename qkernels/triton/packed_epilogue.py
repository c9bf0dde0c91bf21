"""What follows the sums of a packed convolution, on tiles of any shape and orientation.

Every operation is rounded to float32 in the order of docs/format.md: launch with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl

from . import codes, numerics


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """NaN passes, as it does in PyTorch."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        v = tl.where(v < 0.0, 0.0, v)
        if ACTIVATION == "relu6":
            v = tl.where(v > 6.0, 6.0, v)
    elif ACTIVATION == "silu":
        v = tl.div_rn(v, 1.0 + tl.exp(-v))
    else:
        tl.static_assert(ACTIVATION == "none")
    return v


@triton.jit
def finish(
    sums,
    member,
    pixel,
    channel,
    mask,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_scale_ptr,
    out_scale_ptr,
    out_ptr,
    qmin,
    qmax,
    pixels,
    channels,
    ACTIVATION: tl.constexpr,
):
    """Store activation(sums * scale + bias + residual), as codes if there is an out_scale.

    sums: int32 or float32, a tile of one member's output [pixels, channels] in memory; `pixel` and `channel` are
    indices that broadcast to its shape. Pointers to what a layer does not have are None.
    """
    scale = tl.load(scale_ptr + member * channels + channel, channel < channels, other=0.0)
    if x_scale_ptr is not None:
        scale = scale * tl.load(x_scale_ptr + member)
    v = sums.to(tl.float32) * scale
    if bias_ptr is not None:
        v = v + tl.load(bias_ptr + member * channels + channel, channel < channels, other=0.0)
    first = member.to(tl.int64) * pixels * channels
    at = pixel * channels + channel
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + first + at, mask, other=0).to(tl.float32)
        if residual_scale_ptr is not None:
            residual = residual * tl.load(residual_scale_ptr + member)
        v = v + residual
    v = activated(v, ACTIVATION)
    if out_scale_ptr is not None:
        out_scale = numerics.valid_scale(tl.load(out_scale_ptr + member))
        v = codes.rounded(numerics.grid(v, out_scale, None), qmin, qmax)
    tl.store(out_ptr + first + at, v.to(out_ptr.dtype.element_ty), mask)
