"""`pack`, `unpack`, `quantize`, `dequantize_packed`: one pass over the data each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes as packed_codes
from . import numerics
from .launch import launch_of, on_device_of
from .layout import dense, matrix


@triton.jit
def _pack_plane(
    codes_ptr, packed_ptr, block, t, count, blocks, BITS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
):
    for row in tl.static_range(WIDTH):
        packed = (block + t).to(tl.int32) * 0
        for shift in tl.static_range(0, 8, WIDTH):
            i = block * 256 + 32 * (row + shift) + t  # of chunk row + WIDTH * (shift / WIDTH)
            code = tl.load(codes_ptr + i, i < count, other=0).to(tl.int32)
            packed |= ((code >> START) & ((1 << WIDTH) - 1)) << shift
        at = block * (32 * BITS) + 32 * (START + row) + t
        tl.store(packed_ptr + at, packed.to(tl.uint8), block < blocks)


@triton.jit
def _pack_kernel(codes_ptr, packed_ptr, count, blocks, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK blocks of 256 codes a program, one plane row after another: reads 1 B, writes BITS / 8 B a code.

    A code is loaded once a plane, at most three times, from the first-level cache after the first time.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    t = tl.arange(0, 32)[None, :]
    for start in tl.static_range(BITS):
        if packed_codes.plane_width(BITS, start) > 0:
            _pack_plane(
                codes_ptr, packed_ptr, block, t, count, blocks, BITS, start, packed_codes.plane_width(BITS, start)
            )


@triton.jit(do_not_specialize=["tiles", "inner", "channels"])
def _unpack_kernel(
    packed_ptr,
    scale_ptr,
    out_ptr,
    count,
    nbytes,
    tiles,
    inner,
    channels,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK codes of one packed tensor a program: reads BITS / 8 B, writes one element a code.

    With scale_ptr, float32 [rows, channels], codes are multiplied by the scale of their channel i // inner.
    """
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    i = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    codes = packed_codes.load_codes(packed_ptr + row * nbytes, i, mask, BITS)
    if SIGNED:
        codes = packed_codes.signed(codes, BITS)
    if scale_ptr is not None:
        codes = codes.to(tl.float32) * tl.load(scale_ptr + row * channels + i // inner, mask)
    tl.store(out_ptr + row * count + i, codes.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["group", "channels", "kept_tiles"])
def _quantize_kernel(
    x_ptr,
    scale_ptr,
    codes_ptr,
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
    """One tile a program, see `layout.Matrix`: reads 4 B and writes 1 B an element in float32."""
    pid = tl.program_id(0)
    k = (pid % kept_tiles).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    s = (pid // kept_tiles).to(tl.int64) * BLOCK_SUMMED + tl.arange(0, BLOCK_SUMMED)
    scale = numerics.valid_scale(tl.load(scale_ptr + (k // group) % channels))[:, None]
    at = k[:, None] * kept_stride + s[None, :] * summed_stride
    mask = (k < kept)[:, None] & (s < summed)[None, :]
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    code = packed_codes.quantized(x, scale, qmin, qmax)
    tl.store(codes_ptr + at, code.to(codes_ptr.dtype.element_ty), mask)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`reference.pack`, in one launch."""
    blocks = triton.cdiv(codes.numel(), 256)
    packed = codes.new_empty(blocks * 32 * bits, dtype=torch.uint8)
    if blocks:
        launch = launch_of("pack", codes)
        with on_device_of(codes):
            _pack_kernel[(triton.cdiv(blocks, launch.block),)](
                codes.contiguous(),
                packed,
                codes.numel(),
                blocks,
                BITS=bits,
                BLOCK=launch.block,
                num_warps=launch.num_warps,
            )
    return packed


def _unpack(packed: Tensor, scale: Tensor | None, bits: int, count: int, signed: bool, out: Tensor) -> Tensor:
    """Codes of packed [rows, bytes], times scale [rows, channels] if given, into out [rows, count]."""
    rows, channels = out.shape[0], 1 if scale is None else scale.shape[1]
    if out.numel():
        launch = launch_of("unpack", out)
        tiles = triton.cdiv(count, launch.block)
        with on_device_of(out):
            _unpack_kernel[(rows * tiles,)](
                packed.contiguous(),
                None if scale is None else scale.contiguous(),
                out,
                count,
                packed.shape[-1],
                tiles,
                count // channels,
                channels,
                BITS=bits,
                SIGNED=signed,
                BLOCK=launch.block,
                num_warps=launch.num_warps,
                enable_fp_fusion=False,
            )
    return out


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """`reference.unpack`, in one launch."""
    rows = packed.flatten(0, -2) if packed.dim() > 1 else packed[None]
    out = packed.new_empty(rows.shape[0], count, dtype=torch.int8 if signed else torch.uint8)
    return _unpack(rows, None, bits, count, signed, out).view(*packed.shape[:-1], count)


def dequantize_packed(packed: Tensor, scale: Tensor, bits: int, count: int, out_dtype: torch.dtype) -> Tensor:
    """`reference.dequantize_packed`, in one launch."""
    out = packed.new_empty(packed.shape[0], count, dtype=out_dtype)
    return _unpack(packed, scale, bits, count, True, out).view(*scale.shape, count // scale.shape[1])


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """`reference.quantize`, in one launch."""
    x = dense(x)
    codes = torch.empty_like(x, dtype=torch.int8 if qmin < 0 else torch.uint8)
    if x.numel() == 0:
        return codes
    m = matrix(x, axis)
    launch = launch_of("quantize", x)
    block_kept, block_summed = m.tile(launch)
    kept_tiles, summed_tiles = m.tiles(launch)
    with on_device_of(x):
        _quantize_kernel[(kept_tiles * summed_tiles,)](
            x,
            scale.contiguous(),
            codes,
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
    return codes
