"""Codes and their packed bits: `pack`, `unpack`, `quantize`, `dequantize_packed`. docs/format.md is the layout.

None of these ops is differentiable.
"""

import torch
from torch import Tensor

from .checks import check_element, check_members, check_range, check_same_device, normalized
from .library import call, register_fake

ops = torch.ops.qkernels

CHUNK_CODES = 32
BLOCK_CODES = 256


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes of `bits` bits: 32 * bits for every 256 codes begun."""
    return -(-count // BLOCK_CODES) * CHUNK_CODES * bits


def codes_dtype(qmin: int) -> torch.dtype:
    """int8 for ranges with negative codes, else uint8."""
    return torch.int8 if qmin < 0 else torch.uint8


def check_bits(op: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits must be 2..8, got {bits}")


def check_packed(op: str, packed: Tensor, bits: int, count: int) -> None:
    check_bits(op, bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"{op}: packed must be uint8, got {packed.dtype}")
    if count < 0 or packed.dim() == 0 or packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(
            f"{op}: {count} codes of {bits} bits take {packed_bytes(max(count, 0), bits)} bytes, "
            f"got packed of shape {tuple(packed.shape)}"
        )


def _check_pack(codes: Tensor, bits: int) -> None:
    check_bits("pack", bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"pack: codes must be int8 or uint8, got {codes.dtype}")


@register_fake("pack", _check_pack)
def _pack_fake(codes, bits):
    return codes.new_empty(packed_bytes(codes.numel(), bits), dtype=torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the low `bits` bits of each code, in row-major order, as docs/format.md lays them out.

    Args:
        codes: int8 (two's complement) or uint8, any shape. Codes outside the range of `bits` lose their high bits.
        bits: 2..8.

    Returns:
        uint8 [packed_bytes(codes.numel(), bits)].
    """
    return call("pack", ops.pack.default, codes, bits)


def _check_unpack(packed: Tensor, bits: int, count: int, signed: bool) -> None:
    check_packed("unpack", packed, bits, count)


@register_fake("unpack", _check_unpack)
def _unpack_fake(packed, bits, count, signed):
    return packed.new_empty((*packed.shape[:-1], count), dtype=torch.int8 if signed else torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size, signed: bool = True) -> Tensor:
    """The codes that `pack` packed.

    Args:
        packed: uint8 [..., bytes]: leading dimensions are separate packed tensors.
        bits: 2..8.
        shape: of the codes of one packed tensor.
        signed: int8 codes from two's complement, else uint8.

    Returns:
        int8 or uint8 [..., *shape].

    Raises:
        ValueError: if `bytes` is not what that many codes take.
    """
    count = 1
    for n in shape:
        count *= n
    return call("unpack", ops.unpack.default, packed, bits, count, signed).reshape(*packed.shape[:-1], *shape)


# quantize, dequantize_packed -------------------------------------------------------------------------------------


def _check_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> None:
    check_element("quantize", "x", x.dtype)
    check_range("quantize", qmin, qmax)
    if not (qmin >= -128 and qmax <= 127) and not (qmin >= 0 and qmax <= 255):
        raise ValueError(f"quantize: codes in [{qmin}, {qmax}] fit neither int8 nor uint8")
    if axis is not None and not 0 <= axis < x.dim():
        raise ValueError(f"quantize: axis {axis} is out of range for x with {x.dim()} dimensions")
    check_same_device("quantize", x, scale=scale)
    check_members("quantize", scale=(scale, tuple(scale.shape) if axis is None else (x.shape[axis],)))
    if axis is None and scale.numel() != 1:
        raise ValueError(f"quantize: scale must have one element without an axis, got shape {tuple(scale.shape)}")


@register_fake("quantize", _check_quantize)
def _quantize_fake(x, scale, qmin, qmax, axis):
    return torch.empty_like(x, dtype=codes_dtype(qmin))


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """The integer codes round(clamp(x / scale, qmin, qmax)) that `fake_quantize` multiplies by the scale.

    Args:
        x: float32, bfloat16 or float16, any shape and memory format.
        scale: float32, [C] with `axis`, else one element; positive and finite.
        qmin, qmax: within int8 or uint8.

    Returns:
        int8 (uint8 if qmin >= 0) of x's shape and memory format. NaN, which no integer can hold, becomes code 0
        clamped into the range, and so does everything under a scale that is not positive and finite.
    """
    axis = normalized(axis, x)
    return call("quantize", ops.quantize.default, x, scale, qmin, qmax, axis)


def _check_dequantize_packed(packed: Tensor, scale: Tensor, bits: int, count: int, out_dtype: torch.dtype) -> None:
    op = "dequantize_packed"
    check_packed(op, packed, bits, count)
    if packed.dim() != 2 or scale.dim() != 2 or scale.shape[0] != packed.shape[0]:
        raise ValueError(
            f"{op}: packed must be [members, bytes] and scale [members, channels], "
            f"got {tuple(packed.shape)} and {tuple(scale.shape)}"
        )
    if scale.shape[1] == 0 or count % scale.shape[1]:
        raise ValueError(f"{op}: {count} codes do not divide into {scale.shape[1]} channels")
    check_same_device(op, packed, scale=scale)
    check_members(op, scale=(scale, tuple(scale.shape)))
    check_element(op, "out_dtype", out_dtype)


@register_fake("dequantize_packed", _check_dequantize_packed)
def _dequantize_packed_fake(packed, scale, bits, count, out_dtype):
    return scale.new_empty((*scale.shape, count // scale.shape[1]), dtype=out_dtype)


def dequantize_packed(
    packed: Tensor, scale: Tensor, bits: int, count: int, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Signed packed codes times the scale of their channel.

    Args:
        packed: uint8 [M, bytes], M members of `count` codes each.
        scale: float32 [M, C].
        bits: 2..8.

    Returns:
        out_dtype [M, C, count / C].
    """
    return call("dequantize_packed", ops.dequantize_packed.default, packed, scale, bits, count, out_dtype)
