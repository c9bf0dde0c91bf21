"""`packed_conv2d`, `packed_conv2d_int8` and `packed_gemv`: which kernel serves a layer, and how it is launched."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backends
from ..ops.geometry import Geometry
from . import tuning
from .depthwise import depthwise_kernel
from .implicit_gemm import conv_kernel, fold_kernel
from .launch import launch_of, on_device_of

_TL = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.int8,
}
GEMV_ROWS = 8  # of a member, up to which a C++/CUDA packed_gemv is preferred


def _alignment(*sizes: int) -> int:
    """The largest power of two, up to 16, that divides all sizes."""
    return math.gcd(16, *sizes)


@dataclass(frozen=True)
class _Epilogue:
    """What `packed_epilogue.finish` takes: the tensors and range that follow the sums."""

    x_scale: Tensor | None
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    residual_scale: Tensor | None
    out_scale: Tensor | None
    out: Tensor
    qmin: int
    qmax: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the kernels, laid out as they read them."""
        vectors = (self.x_scale, self.scale, self.bias)
        residual = None if self.residual is None else self.residual.contiguous(memory_format=torch.channels_last)
        return (
            *(None if t is None else t.contiguous() for t in vectors),
            residual,
            *(None if t is None else t.contiguous() for t in (self.residual_scale, self.out_scale)),
            self.out,
            float(self.qmin),
            float(self.qmax),
        )


def _convolve(
    x: Tensor, packed: Tensor, epilogue: _Epilogue, bits: int, geometry: Geometry, shared: bool, activation: str
) -> Tensor:
    """Fill and return epilogue.out."""
    if epilogue.out.numel():
        x = x.contiguous(memory_format=torch.channels_last)
        packed = packed.contiguous()
        if packed.data_ptr() % 16:  # a view into something larger: the kernels read words
            packed = packed.clone()
        launch = _depthwise if x.shape[1] == geometry.groups else _implicit_gemm
        with on_device_of(x):
            launch(x, packed, epilogue, bits, geometry, shared, activation)
    return epilogue.out


def _depthwise(
    x: Tensor, packed: Tensor, epilogue: _Epilogue, bits: int, geometry: Geometry, shared: bool, activation: str
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
        *epilogue.arguments,
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


def _implicit_gemm(
    x: Tensor, packed: Tensor, epilogue: _Epilogue, bits: int, geometry: Geometry, shared: bool, activation: str
) -> None:
    images, channels, out_height, out_width = epilogue.out.shape
    members, groups = packed.shape[0], geometry.groups
    pixels = images // members * out_height * out_width
    depth_per_tap = x.shape[1] // groups
    depth = depth_per_tap * math.prod(geometry.kernel)
    # Triton's interpreter has no bfloat16 product.
    dot = tl.float32 if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret else _TL[x.dtype]
    integers = dot == tl.int8
    depth_aligned = math.gcd(32, depth)
    if depth_aligned >= 4:
        packed = packed.view(-1).view(torch.int32)
    x_member, packed_member = 0 if shared else x.numel() // members, packed.numel() // members
    out_aligned = _alignment(channels // groups)
    sizes = (x.numel() // (1 if shared else members), pixels * channels, channels * depth)
    arguments = epilogue.arguments

    def launch(tile: tuning.Tile) -> None:
        channel_tiles = triton.cdiv(channels // groups, tile.channels)
        pixel_tiles = triton.cdiv(pixels, tile.pixels)
        walked = max(1, triton.cdiv(triton.cdiv(depth, tile.depth), tile.splits))
        splits = max(1, triton.cdiv(triton.cdiv(depth, tile.depth), walked))
        partials = None
        if splits > 1:
            partials = x.new_empty(splits, members, pixels, channels, dtype=torch.int32 if integers else torch.float32)
        conv_kernel[(channel_tiles * pixel_tiles * groups * members, splits)](
            x,
            packed,
            partials,
            *arguments,
            channel_tiles,
            pixel_tiles,
            groups,
            walked,
            packed_member,
            x_member,
            pixels,
            channels,
            depth,
            depth_per_tap,
            x.shape[1],
            *x.shape[2:],
            out_height,
            out_width,
            *geometry.stride,
            *geometry.padding[:2],
            *geometry.dilation,
            BITS=bits,
            ACTIVATION=activation,
            DOT=dot,
            KERNEL_H=geometry.kernel[0],
            KERNEL_W=geometry.kernel[1],
            PADDED=any(geometry.padding),
            ONE_TAP=depth_per_tap % tile.depth == 0,
            DEPTH_ALIGNED=depth_aligned,
            EVEN=depth % tile.depth == 0,
            WIDE=max(sizes) + tile.depth * tile.channels >= 2**31,
            IN_ALIGNED=_alignment(depth_per_tap),
            OUT_ALIGNED=out_aligned,
            BLOCK_CHANNELS=tile.channels,
            BLOCK_PIXELS=tile.pixels,
            BLOCK_DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
        if partials is not None:
            _fold(partials, arguments, activation, out_aligned)

    bucket = tuning.Bucket.of(dot.name, channels // groups, pixels, depth, depth_per_tap, members * groups)
    launch(tuning.tile_of(bucket, x.device, launch))


def _fold(partials: Tensor, arguments: tuple[Any, ...], activation: str, out_aligned: int) -> None:
    """The second launch of a split sum: partials [splits, members, pixels, channels] to outputs."""
    splits, members, pixels, channels = partials.shape
    launch = launch_of("fold", partials)
    block_channels = min(triton.next_power_of_2(channels), 64, launch.block)
    block_pixels = launch.block // block_channels
    channel_tiles = triton.cdiv(channels, block_channels)
    fold_kernel[(channel_tiles * triton.cdiv(pixels, block_pixels), members)](
        partials,
        *arguments,
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


def _output(x: Tensor, members: int, channels: int, geometry: Geometry, shared: bool, dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0] * (members if shared else 1), channels, *geometry.output_size(*x.shape[2:]))
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@cache
def _has_cuda_gemv() -> bool:
    return any((row.op, row.device, row.backend) == ("packed_gemv", "cuda", "cuda") for row in backends.report())


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
    geometry, (shared, activation) = Geometry.of(rest[:11]), rest[11:]
    members, channels = scale.shape
    rows = x.shape[0] // (1 if shared else members) * x.shape[2] * x.shape[3]
    if geometry == Geometry() and residual is None and rows <= GEMV_ROWS and x.is_cuda and _has_cuda_gemv():
        images, _, height, width = x.shape
        row_wise = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        y = torch.ops.qkernels.packed_gemv(row_wise, packed, scale, bias, bits, shared, activation)
        return y.view(images * (members if shared else 1), height, width, channels).permute(0, 3, 1, 2)
    out = _output(x, members, channels, geometry, shared, x.dtype)
    epilogue = _Epilogue(None, scale, bias, residual, None, None, out, 0, 0)
    return _convolve(x, packed, epilogue, bits, geometry, shared, activation)


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
    geometry, (shared, activation, qmin, qmax, out_dtype) = Geometry.of(rest[:11]), rest[11:]
    out = _output(x, scale.shape[0], scale.shape[1], geometry, shared, out_dtype)
    epilogue = _Epilogue(x_scale, scale, bias, residual, residual_scale, out_scale, out, qmin, qmax)
    return _convolve(x, packed, epilogue, bits, geometry, shared, activation)


def packed_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shared: bool, activation: str
) -> Tensor:
    """`reference.packed_gemv`: a convolution of 1x1 images, whose one tile of pixels reads each weight once."""
    images = x[:, :, None, None]
    out = _output(images, scale.shape[0], scale.shape[1], Geometry(), shared, x.dtype)
    epilogue = _Epilogue(None, scale, bias, None, None, None, out, 0, 0)
    return _convolve(images, packed, epilogue, bits, Geometry(), shared, activation)[:, :, 0, 0].contiguous()
