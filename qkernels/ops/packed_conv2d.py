"""The ops of packed inference: codes and their packed bits, and the convolution of M members in one call.

Layers are in `packed_layers.py`; `docs/format.md` is the layout. A convolution takes the members' images one member
after another along the batch, [M * N, C, H, W], and gives the same; a linear layer is a convolution of 1x1 images.
None of these ops is differentiable.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .fake_quantize import KERNEL_DTYPES, _check_range, _normalized, _ops
from .library import library as _library
from .schemas import PACKED

Activation = Literal["none", "relu", "relu6", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}

CHUNK_CODES = 32
BLOCK_CODES = 256
MOST_TERMS = 2**31 // (255 * 128)  # of a sum of products of codes that surely fits int32


def _not_differentiable(ctx, *grads):
    raise RuntimeError(
        "packed weights are for inference and have no gradient: train the model they were packed from, or call the "
        "packed one under torch.no_grad()"
    )


for _name in PACKED:
    torch.library.register_autograd(f"qkernels::{_name}", _not_differentiable, lib=_library)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes of `bits` bits: 32 * bits for every 256 codes begun."""
    return -(-count // BLOCK_CODES) * CHUNK_CODES * bits


def codes_dtype(qmin: int) -> torch.dtype:
    """int8 for ranges with negative codes, else uint8."""
    return torch.int8 if qmin < 0 else torch.uint8


def _check_bits(op: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits must be 2..8, got {bits}")


def _check_packed(op: str, packed: Tensor, bits: int, count: int) -> None:
    _check_bits(op, bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"{op}: packed must be uint8, got {packed.dtype}")
    if count < 0 or packed.dim() == 0 or packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(
            f"{op}: {count} codes of {bits} bits take {packed_bytes(max(count, 0), bits)} bytes, "
            f"got packed of shape {tuple(packed.shape)}"
        )


def _check_same_device(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device} but the first argument on {x.device}")


def _check_members(op: str, **vectors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Each (tensor, shape) is float32 and of that shape, or None."""
    for name, (t, shape) in vectors.items():
        if t is None:
            continue
        if t.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {t.dtype}")
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(t.shape)}")


# pack, unpack ----------------------------------------------------------------------------------------------------


def _check_pack(codes: Tensor, bits: int) -> None:
    _check_bits("pack", bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"pack: codes must be int8 or uint8, got {codes.dtype}")


@torch.library.register_fake("qkernels::pack", lib=_library)
def _pack_fake(codes, bits):
    _check_pack(codes, bits)
    return codes.new_empty(packed_bytes(codes.numel(), bits), dtype=torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the low `bits` bits of each code, in row-major order, as docs/format.md lays them out.

    Args:
        codes: int8 (two's complement) or uint8, any shape. Codes outside the range of `bits` lose their high bits.
        bits: 2..8.

    Returns:
        uint8 [packed_bytes(codes.numel(), bits)].
    """
    if not torch.compiler.is_compiling():
        _check_pack(codes, bits)
    return _ops.pack.default(codes, bits)


@torch.library.register_fake("qkernels::unpack", lib=_library)
def _unpack_fake(packed, bits, count, signed):
    _check_packed("unpack", packed, bits, count)
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
    if not torch.compiler.is_compiling():
        _check_packed("unpack", packed, bits, count)
    return _ops.unpack.default(packed, bits, count, signed).reshape(*packed.shape[:-1], *shape)


# quantize, dequantize_packed -------------------------------------------------------------------------------------


def _check_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"quantize: x must be float32, bfloat16 or float16, got {x.dtype}")
    _check_range("quantize", qmin, qmax)
    if not (qmin >= -128 and qmax <= 127) and not (qmin >= 0 and qmax <= 255):
        raise ValueError(f"quantize: codes in [{qmin}, {qmax}] fit neither int8 nor uint8")
    if axis is not None and not 0 <= axis < x.dim():
        raise ValueError(f"quantize: axis {axis} is out of range for x with {x.dim()} dimensions")
    _check_same_device("quantize", x, scale=scale)
    _check_members("quantize", scale=(scale, tuple(scale.shape) if axis is None else (x.shape[axis],)))
    if axis is None and scale.numel() != 1:
        raise ValueError(f"quantize: scale must have one element without an axis, got shape {tuple(scale.shape)}")


@torch.library.register_fake("qkernels::quantize", lib=_library)
def _quantize_fake(x, scale, qmin, qmax, axis):
    _check_quantize(x, scale, qmin, qmax, axis)
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
    axis = _normalized(axis, x)
    if not torch.compiler.is_compiling():
        _check_quantize(x, scale, qmin, qmax, axis)
    return _ops.quantize.default(x, scale, qmin, qmax, axis)


def _check_dequantize_packed(packed: Tensor, scale: Tensor, bits: int, count: int, out_dtype: torch.dtype) -> None:
    op = "dequantize_packed"
    _check_packed(op, packed, bits, count)
    if packed.dim() != 2 or scale.dim() != 2 or scale.shape[0] != packed.shape[0]:
        raise ValueError(
            f"{op}: packed must be [members, bytes] and scale [members, channels], "
            f"got {tuple(packed.shape)} and {tuple(scale.shape)}"
        )
    if scale.shape[1] == 0 or count % scale.shape[1]:
        raise ValueError(f"{op}: {count} codes do not divide into {scale.shape[1]} channels")
    _check_same_device(op, packed, scale=scale)
    _check_members(op, scale=(scale, tuple(scale.shape)))
    if out_dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


@torch.library.register_fake("qkernels::dequantize_packed", lib=_library)
def _dequantize_packed_fake(packed, scale, bits, count, out_dtype):
    _check_dequantize_packed(packed, scale, bits, count, out_dtype)
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
    if not torch.compiler.is_compiling():
        _check_dequantize_packed(packed, scale, bits, count, out_dtype)
    return _ops.dequantize_packed.default(packed, scale, bits, count, out_dtype)


# packed_conv2d, packed_conv2d_int8 -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution, each pair (height, width); padding is zeros at (top, left, bottom, right)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def arguments(self) -> tuple[int, ...]:
        """In the order of the ops' schemas."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups)

    @classmethod
    def of(cls, arguments: tuple[int, ...]) -> "Geometry":
        """The inverse of `arguments`."""
        a = tuple(arguments)
        return cls(a[0:2], a[2:4], a[4:8], a[8:10], a[10])  # type: ignore[arg-type]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        padded = (height + top + bottom, width + left + right)
        h, w = (
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )
        return h, w

    def tf_same(self, height: int, width: int) -> "Geometry":
        """With TensorFlow's "same" padding for an image of this size (timm's Conv2dSame)."""
        total = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, k, s, d in zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        ]
        top, left = total[0] // 2, total[1] // 2
        return replace(self, padding=(top, left, total[0] - top, total[1] - left))

    def weight_shape(self, out_channels: int, in_channels: int) -> tuple[int, int, int, int]:
        """[out, kernel_h, kernel_w, in / groups], the order in which the codes of a weight are packed."""
        return out_channels, *self.kernel, in_channels // self.groups


def _check_conv(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    geometry: Geometry,
    shared: bool,
    activation: str,
) -> tuple[int, int, int, int]:
    """Checks what both convolutions share; returns the output's shape [M * N, C, H, W]."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [images, channels, height, width], got shape {tuple(x.shape)}")
    if packed.dim() != 2 or scale.dim() != 2 or scale.shape[0] != packed.shape[0] or packed.shape[0] == 0:
        raise ValueError(
            f"{op}: packed must be [members, bytes] and scale [members, channels], "
            f"got {tuple(packed.shape)} and {tuple(scale.shape)}"
        )
    members, channels = scale.shape
    if min(*geometry.kernel, *geometry.stride, *geometry.dilation, geometry.groups) < 1 or min(geometry.padding) < 0:
        raise ValueError(
            f"{op}: kernel, stride, dilation and groups must be positive and padding not negative: {geometry}"
        )
    if x.shape[1] % geometry.groups or channels % geometry.groups:
        raise ValueError(
            f"{op}: {x.shape[1]} input and {channels} output channels do not divide by groups={geometry.groups}"
        )
    if not shared and x.shape[0] % members:
        raise ValueError(
            f"{op}: {x.shape[0]} images do not divide among {members} members; pass shared=True if every "
            "member sees the same ones"
        )
    _, kernel_h, kernel_w, depth = geometry.weight_shape(channels, x.shape[1])
    _check_packed(op, packed, bits, channels * kernel_h * kernel_w * depth)
    _check_members(op, scale=(scale, (members, channels)), bias=(bias, (members, channels)))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    height, width = geometry.output_size(*x.shape[2:])
    if height < 1 or width < 1:
        raise ValueError(f"{op}: the kernel {geometry.kernel} is larger than the padded image {tuple(x.shape[2:])}")
    shape = (x.shape[0] * (members if shared else 1), channels, height, width)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{op}: residual must have the output's shape {shape}, got {tuple(residual.shape)}")
    _check_same_device(op, x, packed=packed, scale=scale, bias=bias, residual=residual)
    return shape


def _check_packed_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    geometry: Geometry,
    shared: bool,
    activation: str,
) -> tuple[int, int, int, int]:
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"packed_conv2d: x must be float32, bfloat16 or float16, got {x.dtype}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"packed_conv2d: residual must have x's dtype {x.dtype}, got {residual.dtype}")
    return _check_conv("packed_conv2d", x, packed, scale, bias, residual, bits, geometry, shared, activation)


@torch.library.register_fake("qkernels::packed_conv2d", lib=_library)
def _packed_conv2d_fake(x, packed, scale, bias, residual, bits, *rest):
    geometry, (shared, activation) = Geometry.of(rest[:11]), rest[11:]
    shape = _check_packed_conv2d(x, packed, scale, bias, residual, bits, geometry, shared, activation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def packed_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    geometry: Geometry,
    *,
    residual: Tensor | None = None,
    shared: bool = False,
    activation: Activation = "none",
) -> Tensor:
    """activation(conv2d(x, codes) * scale + bias + residual) of M members, with float activations.

    Args:
        x: float32, bfloat16 or float16 [M * N, C_in, H, W], member after member; [N, C_in, H, W] with `shared`.
        packed: uint8 [M, bytes]: signed codes of each member's weight in the order [C_out, h, w, C_in / groups].
        scale, bias: float32 [M, C_out].
        bits: 2..8.
        residual: x's dtype, of the output's shape.
        shared: every member sees the same x.

    Returns:
        x's dtype [M * N, C_out, H', W'], channels_last. Sums are taken in float32.
    """
    if not torch.compiler.is_compiling():
        _check_packed_conv2d(x, packed, scale, bias, residual, bits, geometry, shared, activation)
    return _ops.packed_conv2d.default(x, packed, scale, bias, residual, bits, *geometry.arguments, shared, activation)


def _check_packed_conv2d_int8(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    out_scale: Tensor | None,
    bits: int,
    geometry: Geometry,
    shared: bool,
    activation: str,
    qmin: int,
    qmax: int,
    out_dtype: torch.dtype,
) -> tuple[int, int, int, int]:
    op = "packed_conv2d_int8"
    integers = (torch.int8, torch.uint8)
    if x.dtype not in integers:
        raise TypeError(f"{op}: x must be int8 or uint8 codes, got {x.dtype}; see qkernels.packed_ops.quantize")
    shape = _check_conv(op, x, packed, scale, bias, residual, bits, geometry, shared, activation)
    terms = geometry.kernel[0] * geometry.kernel[1] * x.shape[1] // geometry.groups
    if terms > MOST_TERMS:
        raise ValueError(f"{op}: a sum of {terms} products may exceed int32, {MOST_TERMS} cannot; use packed_conv2d")
    members = scale.shape[0]
    if (residual is not None and residual.dtype in integers) != (residual_scale is not None):
        raise ValueError(f"{op}: residual_scale goes with an int8 or uint8 residual, and only with one")
    if residual is not None and residual.dtype not in (*integers, *KERNEL_DTYPES):
        raise TypeError(f"{op}: residual must be codes or a kernel's float dtype, got {residual.dtype}")
    _check_members(
        op,
        x_scale=(x_scale, (members,)),
        residual_scale=(residual_scale, (members,)),
        out_scale=(out_scale, (members,)),
    )
    _check_same_device(op, x, x_scale=x_scale, residual_scale=residual_scale, out_scale=out_scale)
    if (out_dtype in integers) != (out_scale is not None):
        raise ValueError(f"{op}: out_scale goes with an int8 or uint8 out_dtype, and only with one")
    if out_dtype not in (*integers, *KERNEL_DTYPES):
        raise TypeError(f"{op}: out_dtype must be int8, uint8, float32, bfloat16 or float16, got {out_dtype}")
    if out_dtype in integers:
        _check_range(op, qmin, qmax)
        least, most = (-128, 127) if out_dtype == torch.int8 else (0, 255)
        if qmin < least or qmax > most:
            raise ValueError(f"{op}: codes in [{qmin}, {qmax}] do not fit {out_dtype}")
    return shape


@torch.library.register_fake("qkernels::packed_conv2d_int8", lib=_library)
def _packed_conv2d_int8_fake(x, x_scale, packed, scale, bias, residual, residual_scale, out_scale, bits, *rest):
    geometry, (shared, activation, qmin, qmax, out_dtype) = Geometry.of(rest[:11]), rest[11:]
    shape = _check_packed_conv2d_int8(
        x,
        x_scale,
        packed,
        scale,
        bias,
        residual,
        residual_scale,
        out_scale,
        bits,
        geometry,
        shared,
        activation,
        qmin,
        qmax,
        out_dtype,
    )
    return x.new_empty(shape, dtype=out_dtype).to(memory_format=torch.channels_last)


def packed_conv2d_int8(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    geometry: Geometry,
    *,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    code_range: tuple[int, int] = (0, 255),
    shared: bool = False,
    activation: Activation = "none",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`packed_conv2d` on integer activations: the sums are exact int32.

    y = activation(sum * (scale * x_scale) + bias + residual * residual_scale), each operation rounded to float32 in
    this order, then, with `out_scale`, the codes round(clamp(y / out_scale)). Every backend gives the same bits (SiLU:
    within its rounding).

    Args:
        x: int8 or uint8 codes [M * N, C_in, H, W], or [N, C_in, H, W] with `shared`; 0 stands for 0.
        x_scale: float32 [M], the scale of each member's x.
        packed, scale, bias, bits, shared, activation: as for `packed_conv2d`.
        residual: of the output's shape, codes with their `residual_scale` float32 [M], or float32, bfloat16, float16.
        out_scale: float32 [M]; given exactly if out_dtype is int8 or uint8.
        code_range: of the resulting codes.

    Returns:
        out_dtype [M * N, C_out, H', W'], channels_last.
    """
    arguments = (x, x_scale, packed, scale, bias, residual, residual_scale, out_scale, bits)
    rest = (shared, activation, *code_range, out_dtype)
    if not torch.compiler.is_compiling():
        _check_packed_conv2d_int8(*arguments, geometry, *rest)
    return _ops.packed_conv2d_int8.default(*arguments, *geometry.arguments, *rest)


# packed_gemv -----------------------------------------------------------------------------------------------------


def _check_packed_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shared: bool, activation: str
) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"packed_gemv: x must be [rows, in], got shape {tuple(x.shape)}")
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"packed_gemv: x must be float32, bfloat16 or float16, got {x.dtype}")
    images = x[:, :, None, None]
    shape = _check_conv("packed_gemv", images, packed, scale, bias, None, bits, Geometry(), shared, activation)
    return shape[:2]


@torch.library.register_fake("qkernels::packed_gemv", lib=_library)
def _packed_gemv_fake(x, packed, scale, bias, bits, shared, activation):
    return x.new_empty(_check_packed_gemv(x, packed, scale, bias, bits, shared, activation))


def packed_gemv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    *,
    shared: bool = False,
    activation: Activation = "none",
) -> Tensor:
    """activation(x @ codes.T * scale + bias) of M members, made for few rows: it reads each weight once.

    Args:
        x: float32, bfloat16 or float16 [M * N, in], member after member; [N, in] with `shared`.
        packed: uint8 [M, bytes]: signed codes of each member's weight [out, in].
        scale, bias: float32 [M, out].

    Returns:
        x's dtype [M * N, out]. Sums are taken in float32.
    """
    if not torch.compiler.is_compiling():
        _check_packed_gemv(x, packed, scale, bias, bits, shared, activation)
    return _ops.packed_gemv.default(x, packed, scale, bias, bits, shared, activation)
