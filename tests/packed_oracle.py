"""The packed ops in numpy, written from docs/format.md and docs/numerics.md and not from the package.

Bits are placed one by one; convolutions are sums over taps in int64 or float64; the epilogue is float32.
"""

import math
from typing import NamedTuple

import numpy as np

EXACT = ("none", "relu", "relu6", "hardswish", "hardsigmoid")  # activations of IEEE operations alone
INEXACT = ("silu", "sigmoid", "gelu", "gelu_tanh")  # with an exponential, or of erf: backends give other bits
ACTIVATIONS = EXACT + INEXACT
STRETCH = {"hardswish": 1.5, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13}  # the most they stretch differences, else 1
FLOAT32_UNIT = 2.0**-24  # the largest relative error of one rounding


class Window(NamedTuple):
    """How a convolution walks its image: (height, width) pairs, padding (top, left, bottom, right)."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def packed_nbytes(count, bits):
    return (count + 255) // 256 * 32 * bits


def _bit_positions(count, bits):
    """The byte and the bit in it of every bit of every code, lowest first: two arrays [count, bits]."""
    index = np.arange(count)
    block, chunk, t = index // 256, index % 256 // 32, index % 32
    byte, bit = np.zeros((2, count, bits), np.int64)
    plane = 0
    for width in {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[bits]:
        for k in range(width):
            byte[:, plane + k] = block * 32 * bits + 32 * plane + 32 * (chunk % width) + t
            bit[:, plane + k] = width * (chunk // width) + k
        plane += width
    return byte, bit


def pack(codes, bits):
    """uint8 [packed_nbytes] of int8 or uint8 codes."""
    codes = codes.reshape(-1).astype(np.int64) & 255
    byte, bit = _bit_positions(codes.size, bits)
    packed = np.zeros(packed_nbytes(codes.size, bits), np.int64)
    np.add.at(packed, byte, (codes[:, None] >> np.arange(bits) & 1) << bit)
    return packed.astype(np.uint8)


def unpack(packed, bits, count, signed):
    """int64 [count]."""
    byte, bit = _bit_positions(count, bits)
    codes = ((packed.astype(np.int64)[byte] >> bit & 1) << np.arange(bits)).sum(1)
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if signed else codes


def quantize(x, scale, qmin, qmax, axis):
    """int64 codes of float32 x; scale float32 [C], or one element without an axis."""
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    scale = scale.reshape(shape if x.ndim else ())
    with np.errstate(all="ignore"):
        v = x / np.where((scale > 0) & np.isfinite(scale), scale, np.float32(np.nan))
        codes = np.rint(np.clip(v, np.float32(qmin), np.float32(qmax)))
    return np.where(np.isnan(codes), min(max(0, qmin), qmax), codes).astype(np.int64)


def convolution(x, weight, window):
    """x [N, C, H, W] and weight [O, kernel_h, kernel_w, C / groups], in their dtype: [N, O, H', W']."""
    (stride_h, stride_w), (top, left, bottom, right), (dilation_h, dilation_w), groups = window
    out_channels, kernel_h, kernel_w, depth = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows = np.arange(0, x.shape[2] - dilation_h * (kernel_h - 1), stride_h)
    columns = np.arange(0, x.shape[3] - dilation_w * (kernel_w - 1), stride_w)
    y = np.zeros((x.shape[0], out_channels, len(rows), len(columns)), x.dtype)
    for i, j in np.ndindex(kernel_h, kernel_w):
        tap = x[:, :, (rows + i * dilation_h)[:, None], columns + j * dilation_w]
        for g in range(groups):
            outputs = slice(g * out_channels // groups, (g + 1) * out_channels // groups)
            inputs = slice(g * depth, (g + 1) * depth)
            y[:, outputs] += np.einsum("nchw,oc->nohw", tap[:, inputs], weight[outputs, i, j])
    return y


def members_convolution(x, weights, window, shared):
    """`convolution` of each member: x [M * N, ...] (or [N, ...] if shared), weights [M, ...]: [M, N, O, H', W']."""
    members = len(weights)
    images = [x] * members if shared else np.split(x, members)
    return np.stack([convolution(image, weight, window) for image, weight in zip(images, weights, strict=True)])


def activate(y, activation):
    if activation == "relu":
        return np.maximum(y, y.dtype.type(0))
    if activation == "relu6":
        return np.clip(y, y.dtype.type(0), y.dtype.type(6))
    if activation in ("hardswish", "hardsigmoid"):
        limited = np.clip(y + y.dtype.type(3), y.dtype.type(0), y.dtype.type(6))
        return (y * limited if activation == "hardswish" else limited) / y.dtype.type(6)
    with np.errstate(over="ignore"):
        if activation == "silu":
            return y / (1 + np.exp(-y))
        if activation == "sigmoid":
            return 1 / (1 + np.exp(-y))
    wide = y.astype(np.float64)
    if activation == "gelu":
        return (wide / 2 * np.vectorize(math.erfc, otypes=[float])(-wide / math.sqrt(2))).astype(y.dtype)
    if activation == "gelu_tanh":
        u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return (wide / 2 * (1 + np.tanh(u))).astype(y.dtype)
    assert activation == "none"
    return y


def activation_slack(y, activation):
    """How far float32 may be from activate(y)'s exact values y: a few roundings, of GELU near 0 those of 1 + erf."""
    return 16 * FLOAT32_UNIT * np.abs(y) + (8e-7 if activation.startswith("gelu") else 1e-37)


def epilogue(sums, scale, bias, residual, activation):
    """activation(sums [M, N, O, H', W'] * scale [M, O] + bias + residual), each operation rounded to sums' dtype."""
    y = sums * scale[:, None, :, None, None].astype(sums.dtype)
    if bias is not None:
        y = y + bias[:, None, :, None, None].astype(sums.dtype)
    if residual is not None:
        y = y + residual.reshape(y.shape).astype(sums.dtype)
    return activate(y, activation)
