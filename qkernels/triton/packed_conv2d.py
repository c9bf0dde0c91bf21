"""`packed_conv2d` and `packed_conv2d_int8`: which kernel serves a layer, and how it is launched."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..ops.geometry import Geometry
from ..ops.packed_conv2d import output_shape
from . import tuning
from .depthwise import depthwise_kernel
from .implicit_gemm import conv_kernel, decode_kernel, fold_kernel
from .launch import launch_of, on_device_of
from .packed_epilogue import Epilogue

WORD = 4  # input channels that are loaded at a time, at least

_TL = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def _product_of(x: Tensor) -> torch.dtype:
    """The type in which x and the codes are multiplied."""
    if x.dtype == torch.uint8:
        return torch.int8
    # Triton's interpreter has no bfloat16 product.
    return torch.float32 if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret else x.dtype


def _alignment(*sizes: int) -> int:
    """The largest power of two, up to 16, that divides all sizes."""
    return math.gcd(16, *sizes)


def convolve(
    x: Tensor, packed: Tensor, epilogue: Epilogue, bits: int, geometry: Geometry, shared: bool, activation: str
) -> Tensor:
    """Fill and return epilogue.out."""
    top, left, bottom, right = geometry.padding
    padded = (x.shape[2] + top + bottom) * (x.shape[3] + left + right)
    if max(padded, *geometry.stride, *geometry.dilation, epilogue.scale.numel()) >= 2**31:
        raise ValueError(f"the Triton kernels count the pixels of a padded image in 32 bits: {geometry} is too large")
    if epilogue.out.numel():
        x = x.contiguous(memory_format=torch.channels_last)
        packed = packed.contiguous()
        if packed.data_ptr() % 16:  # a view into something larger: the kernels read words
            packed = packed.clone()
        launch = _depthwise if x.shape[1] == geometry.groups else _implicit_gemm
        with on_device_of(x):
            launch(x, packed, epilogue.laid_out(), bits, geometry, shared, activation)
    return epilogue.out


def _depthwise(
    x: Tensor, packed: Tensor, epilogue: Epilogue, bits: int, geometry: Geometry, shared: bool, activation: str
) -> None:
    images, channels, out_height, out_width = epilogue.out.shape
    members = packed.shape[0]
    pixels = images // members * out_height * out_width
    launch = launch_of("depthwise", x)
    block_channels = min(triton.next_power_of_2(channels), 64)
    # With as many threads as channels the compiler has each decode one code and passes it on to the others; with more
    # of them, every thread would decode the codes of all its channels.
    num_warps = max(launch.num_warps, block_channels // 32)
    block_pixels = triton.cdiv(num_warps * launch.block, block_channels)
    channel_tiles, pixel_tiles = triton.cdiv(channels, block_channels), triton.cdiv(pixels, block_pixels)
    depthwise_kernel[(members * channel_tiles * pixel_tiles,)](
        x,
        packed,
        epilogue,
        channel_tiles,
        pixel_tiles,
        packed.shape[1],
        0 if shared else x.numel() // members,
        pixels,
        channels,
        *x.shape[2:],
        out_height,
        out_width,
        math.prod(geometry.kernel),
        geometry.kernel[1],
        *geometry.stride,
        *geometry.padding[:2],
        *geometry.dilation,
        BITS=bits,
        ACTIVATION=activation,
        MULTIPLIER=channels // geometry.groups,
        ALIGNED=_alignment(channels),
        BLOCK_CHANNELS=block_channels,
        BLOCK_PIXELS=block_pixels,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def _padded(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """x with so many channels of zeros that loads take a WORD of each pixel, where it has one group; and how many."""
    pad = -x.shape[1] % WORD if groups == 1 else 0
    if pad:
        x = F.pad(x, (0, 0, 0, 0, 0, pad)).contiguous(memory_format=torch.channels_last)
    return x, pad


def _implicit_gemm(
    x: Tensor, packed: Tensor, epilogue: Epilogue, bits: int, geometry: Geometry, shared: bool, activation: str
) -> None:
    images, channels, out_height, out_width = epilogue.out.shape
    members, groups = packed.shape[0], geometry.groups
    pixels = images // members * out_height * out_width
    x, pad = _padded(x, groups)
    depth_per_tap = x.shape[1] // groups
    depth = depth_per_tap * math.prod(geometry.kernel)
    product = _product_of(x)
    sum_dtype = torch.float32 if product.is_floating_point else torch.int32
    depth_aligned = math.gcd(32, depth)
    if depth_aligned >= WORD and not pad:
        packed = packed.view(-1).view(torch.int32)
    x_member = 0 if shared else x.numel() // members
    sizes = (pixels, channels, depth, depth_per_tap, x.shape[1], *x.shape[2:], out_height, out_width)
    window = (*geometry.stride, *geometry.padding[:2], *geometry.dilation)
    largest = max(x.numel() // (1 if shared else members), pixels * channels, channels * depth)
    constants = {
        "ACTIVATION": activation,
        "DOT": _TL[product],
        "KERNEL_H": geometry.kernel[0],
        "KERNEL_W": geometry.kernel[1],
        "PADDED": any(geometry.padding),
        "DEPTH_ALIGNED": depth_aligned,
        "IN_ALIGNED": _alignment(depth_per_tap),
        "OUT_ALIGNED": _alignment(channels // groups),
        "enable_fp_fusion": False,
    }

    def launch(tile: tuning.Tile) -> None:
        channel_tiles = triton.cdiv(channels // groups, tile.channels)
        pixel_tiles = triton.cdiv(pixels, tile.pixels)
        depth_tiles = max(1, triton.cdiv(depth, tile.depth))
        walked = triton.cdiv(depth_tiles, tile.splits)
        splits = triton.cdiv(depth_tiles, walked)
        partials = x.new_empty(splits, members, pixels, channels, dtype=sum_dtype) if splits > 1 else None
        codes, code_sums = packed, None
        if decoded := tile.decoded or pad > 0:
            shape = (members, channels, math.prod(geometry.kernel), depth_per_tap)
            codes, code_sums = _decoded(packed, bits, shape, pad, product, x.dtype == torch.uint8)
        tiles = (channel_tiles, pixel_tiles, groups, walked, codes.numel() // members, x_member)
        conv_kernel[(channel_tiles * pixel_tiles * groups * members, splits)](
            *(x, codes, code_sums, partials, epilogue, *tiles, *sizes, *window),
            **constants,
            BITS=None if decoded else bits,
            ONE_TAP=depth_per_tap % tile.depth == 0,
            EVEN=depth % tile.depth == 0,
            WIDE=largest + tile.depth * tile.channels >= 2**31,
            BLOCK_CHANNELS=tile.channels,
            BLOCK_PIXELS=tile.pixels,
            BLOCK_DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if partials is not None:
            _fold(partials, epilogue, activation, constants["OUT_ALIGNED"])

    bucket = tuning.Bucket.of(_TL[product].name, channels // groups, pixels, depth, depth_per_tap, members * groups)
    launch(tuning.tile_of(bucket, x.device, launch))


def _decoded(
    packed: Tensor, bits: int, shape: tuple[int, int, int, int], pad: int, dtype: torch.dtype, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """What a convolution of decoded codes reads: codes [members, channels, taps, depth_per_tap], and their sums.

    pad: so many of a tap's codes are not packed, and 0. The sums are int32 [members, channels], where they are wanted.
    """
    members, channels, taps, depth_per_tap = shape
    depth = taps * depth_per_tap
    codes = packed.new_empty(shape, dtype=dtype)
    sums = packed.new_empty(shape[:2], dtype=torch.int32) if with_sums else None
    launch = launch_of("decode", codes)
    block_depth = min(triton.next_power_of_2(depth), launch.block)
    block_channels = launch.block // block_depth
    decode_kernel[(triton.cdiv(channels, block_channels), members)](
        *(packed, codes, sums, channels, depth, depth_per_tap, packed.numel() // members),
        BITS=bits,
        PAD=pad,
        DEPTH_ALIGNED=math.gcd(32, depth),
        EVEN=depth % block_depth == 0,
        WIDE=channels * depth + launch.block >= 2**31,
        BLOCK_CHANNELS=block_channels,
        BLOCK_DEPTH=block_depth,
        num_warps=launch.num_warps,
    )
    return codes, sums


def _fold(partials: Tensor, epilogue: Epilogue, activation: str, out_aligned: int) -> None:
    """The second launch of a split sum: partials [splits, members, pixels, channels] to outputs."""
    splits, members, pixels, channels = partials.shape
    launch = launch_of("fold", partials)
    block_channels = min(triton.next_power_of_2(channels), 64, launch.block)
    block_pixels = launch.block // block_channels
    channel_tiles = triton.cdiv(channels, block_channels)
    fold_kernel[(channel_tiles * triton.cdiv(pixels, block_pixels), members)](
        partials,
        epilogue,
        splits,
        members,
        channel_tiles,
        pixels,
        channels,
        ACTIVATION=activation,
        OUT_ALIGNED=out_aligned,
        BLOCK_CHANNELS=block_channels,
        BLOCK_PIXELS=block_pixels,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def output_of(x: Tensor, members: int, channels: int, geometry: Geometry, shared: bool, dtype: torch.dtype) -> Tensor:
    shape = output_shape(x, members, channels, geometry, shared)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def packed_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    *rest: Any,
) -> Tensor:
    """`reference.packed_conv2d`, in one launch, or two where the sum is split."""
    geometry, (shared, activation) = Geometry.of(*rest[:5]), rest[5:]
    out = output_of(x, scale.shape[0], scale.shape[1], geometry, shared, x.dtype)
    epilogue = Epilogue(None, scale, bias, residual, None, None, out, 0.0, 0.0)
    return convolve(x, packed, epilogue, bits, geometry, shared, activation)


def packed_conv2d_int8(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    out_scale: Tensor | None,
    bits: int,
    *rest: Any,
) -> Tensor:
    """`reference.packed_conv2d_int8`, in one launch, or two where the sum is split."""
    geometry, (shared, activation, qmin, qmax, out_dtype) = Geometry.of(*rest[:5]), rest[5:]
    out = output_of(x, scale.shape[0], scale.shape[1], geometry, shared, out_dtype)
    epilogue = Epilogue(x_scale, scale, bias, residual, residual_scale, out_scale, out, float(qmin), float(qmax))
    return convolve(x, packed, epilogue, bits, geometry, shared, activation)
