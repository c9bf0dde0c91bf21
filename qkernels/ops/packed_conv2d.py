"""`packed_conv2d` and `packed_conv2d_int8`: the convolution of M members in one call. Not differentiable.

A convolution takes the members' images one member after another along the batch, [M * N, C, H, W], and gives the same.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import KERNEL_DTYPES, check_element, check_members, check_range, check_same_device
from .geometry import Geometry
from .library import call, register_fake
from .packing import check_packed
from .transforms import unrecorded

ops = torch.ops.qkernels

Activation = Literal["none", "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh"]
# In the order of csrc/activation.h. PyTorch's own hardswish and hardsigmoid multiply by 1 / 6 on GPUs, which rounds
# otherwise; its GELU of infinity is NaN on some CPUs.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda y: (y + 3).clamp(0, 6) / 6,
    "sigmoid": torch.sigmoid,
    "gelu": lambda y: 0.5 * y * torch.erfc(-math.sqrt(0.5) * y),
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
MOST_TERMS = 2**31 // (255 * 128)  # of a sum of products of codes that surely fits int32


def output_shape(x: Tensor, members: int, channels: int, geometry: Geometry, shared: bool) -> tuple[int, int, int, int]:
    """[M * N, C, H', W'] of a convolution of x."""
    return (x.shape[0] * (members if shared else 1), channels, *geometry.output_size(*x.shape[2:]))


def with_geometry(check: Callable[..., None], first: int) -> Callable[..., None]:
    """`check`, which takes a Geometry, of an op's arguments, which are its five parts from argument `first` on."""
    return lambda *a: check(*a[:first], Geometry.of(*a[first : first + 5]), *a[first + 5 :])


def check_conv(
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
) -> None:
    """Checks what both convolutions share."""
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be [images, channels, height, width], got shape {tuple(x.shape)}")
    if packed.dim() != 2 or scale.dim() != 2 or scale.shape[0] != packed.shape[0] or packed.shape[0] == 0:
        raise ValueError(
            f"{op}: packed must be [members, bytes] and scale [members, channels], "
            f"got {tuple(packed.shape)} and {tuple(scale.shape)}"
        )
    members, channels = scale.shape
    window = (geometry.kernel, geometry.stride, geometry.dilation, geometry.padding)
    if tuple(map(len, window)) != (2, 2, 2, 4):
        raise ValueError(f"{op}: kernel, stride and dilation take two numbers each, padding four: {geometry}")
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
    check_packed(op, packed, bits, channels * kernel_h * kernel_w * depth)
    check_members(op, scale=(scale, (members, channels)), bias=(bias, (members, channels)))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    shape = output_shape(x, members, channels, geometry, shared)
    if min(shape[2:]) < 1:
        raise ValueError(f"{op}: the kernel {geometry.kernel} is larger than the padded image {tuple(x.shape[2:])}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{op}: residual must have the output's shape {shape}, got {tuple(residual.shape)}")
    check_same_device(op, x, packed=packed, scale=scale, bias=bias, residual=residual)


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
) -> None:
    check_element("packed_conv2d", "x", x.dtype)
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"packed_conv2d: residual must have x's dtype {x.dtype}, got {residual.dtype}")
    check_conv("packed_conv2d", x, packed, scale, bias, residual, bits, geometry, shared, activation)


def _fake_output(x: Tensor, scale: Tensor, window: Any, shared: bool, dtype: torch.dtype) -> Tensor:
    members, channels = scale.shape
    shape = output_shape(x, members, channels, Geometry.of(*window), shared)
    return x.new_empty(shape, dtype=dtype).to(memory_format=torch.channels_last)


@register_fake("packed_conv2d", with_geometry(_check_packed_conv2d, 6))
def _packed_conv2d_fake(x, packed, scale, bias, residual, bits, *rest):
    return _fake_output(x, scale, rest[:5], rest[5], x.dtype)


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
    arguments = (x, packed, scale, bias, residual, bits, *geometry.arguments, shared, activation)
    return call("packed_conv2d", partial(unrecorded, ops.packed_conv2d.default), *arguments)


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
) -> None:
    op = "packed_conv2d_int8"
    integers = (torch.int8, torch.uint8)
    if x.dtype not in integers:
        raise TypeError(f"{op}: x must be int8 or uint8 codes, got {x.dtype}; see qkernels.ops.packing.quantize")
    check_conv(op, x, packed, scale, bias, residual, bits, geometry, shared, activation)
    terms = geometry.kernel[0] * geometry.kernel[1] * x.shape[1] // geometry.groups
    if terms > MOST_TERMS:
        raise ValueError(f"{op}: a sum of {terms} products may exceed int32, {MOST_TERMS} cannot; use packed_conv2d")
    members = scale.shape[0]
    if (residual is not None and residual.dtype in integers) != (residual_scale is not None):
        raise ValueError(f"{op}: residual_scale goes with an int8 or uint8 residual, and only with one")
    if residual is not None and residual.dtype not in (*integers, *KERNEL_DTYPES):
        raise TypeError(f"{op}: residual must be codes or a kernel's float dtype, got {residual.dtype}")
    check_members(
        op,
        x_scale=(x_scale, (members,)),
        residual_scale=(residual_scale, (members,)),
        out_scale=(out_scale, (members,)),
    )
    check_same_device(op, x, x_scale=x_scale, residual_scale=residual_scale, out_scale=out_scale)
    if (out_dtype in integers) != (out_scale is not None):
        raise ValueError(f"{op}: out_scale goes with an int8 or uint8 out_dtype, and only with one")
    if out_dtype not in (*integers, *KERNEL_DTYPES):
        raise TypeError(f"{op}: out_dtype must be int8, uint8, float32, bfloat16 or float16, got {out_dtype}")
    if out_dtype in integers:
        check_range(op, qmin, qmax)
        least, most = (-128, 127) if out_dtype == torch.int8 else (0, 255)
        if qmin < least or qmax > most:
            raise ValueError(f"{op}: codes in [{qmin}, {qmax}] do not fit {out_dtype}")


@register_fake("packed_conv2d_int8", with_geometry(_check_packed_conv2d_int8, 9))
def _packed_conv2d_int8_fake(x, x_scale, packed, scale, bias, residual, residual_scale, out_scale, bits, *rest):
    return _fake_output(x, scale, rest[:5], rest[5], rest[-1])


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
    this order, then, with `out_scale`, the codes round(clamp(y / out_scale)). Every backend gives the same bits; SiLU,
    sigmoid and GELU, which take an exponential, up to a few roundings.

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
    tensors = (x, x_scale, packed, scale, bias, residual, residual_scale, out_scale)
    arguments = (*tensors, bits, *geometry.arguments, shared, activation, *code_range, out_dtype)
    return call("packed_conv2d_int8", partial(unrecorded, ops.packed_conv2d_int8.default), *arguments)
