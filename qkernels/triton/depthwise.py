"""A depthwise convolution of M members: each output channel sees one input channel, so there is no matrix product."""

import triton
import triton.language as tl

from .codes import load_codes, signed
from .packed_epilogue import finish


@triton.jit(
    do_not_specialize=[
        "channel_tiles",
        "pixel_tiles",
        "nbytes",
        "x_member",
        "pixels",
        "channels",
        "height",
        "width",
        "out_height",
        "out_width",
        "taps",
        "kernel_w",
        "stride_h",
        "stride_w",
        "pad_top",
        "pad_left",
        "dilation_h",
        "dilation_w",
    ]
)
def depthwise_kernel(
    x_ptr,
    packed_ptr,
    epilogue,
    channel_tiles,
    pixel_tiles,
    nbytes,
    x_member,
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    taps,
    kernel_w,
    stride_h,
    stride_w,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """A program computes a tile [BLOCK_PIXELS, BLOCK_CHANNELS] of a member's output, tap after tap.

    Bound by memory: x is read once from memory and taps / (stride_h * stride_w) times from the caches, the output is
    written once. MULTIPLIER: output channels of each input channel; ALIGNED: a power of two that divides `channels`.
    The rest is as in `implicit_gemm.conv_kernel`.
    """
    channels = channels // ALIGNED * ALIGNED
    in_channels = channels // MULTIPLIER
    if MULTIPLIER == 1:
        x_member = x_member // ALIGNED * ALIGNED
    pid = tl.program_id(0)
    channel = pid % channel_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixel = (pid // channel_tiles % pixel_tiles).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    member = pid // (channel_tiles * pixel_tiles)
    is_channel = channel < channels
    mask = (pixel < pixels)[:, None] & is_channel[None, :]

    image = pixel // out_width // out_height
    top = (pixel // out_width % out_height * stride_h - pad_top).to(tl.int32)
    left = (pixel % out_width * stride_w - pad_left).to(tl.int32)
    first = ((image * height + top) * width + left) * in_channels
    x_ptr += member.to(tl.int64) * x_member
    packed_ptr += member.to(tl.int64) * nbytes

    SUM: tl.constexpr = tl.float32 if x_ptr.dtype.element_ty.is_floating() else tl.int32
    sums = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], SUM)
    for tap in range(taps):
        codes = signed(load_codes(packed_ptr, channel.to(tl.int64) * taps + tap, is_channel, BITS), BITS).to(SUM)
        down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
        row, column = top + down, left + right
        in_image = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = first[:, None] + (down.to(tl.int64) * width + right) * in_channels + (channel // MULTIPLIER)[None, :]
        x = tl.load(x_ptr + at, mask & in_image[:, None], other=0).to(SUM)
        sums += x * codes[None, :]
    finish(sums, member, pixel[:, None], channel[None, :], mask, epilogue, pixels, channels, ACTIVATION)
