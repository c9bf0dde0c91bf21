"""Each op in plain PyTorch: the definition that every backend is tested against.

These functions also serve any device that no faster backend serves. They compute in float32 (float64 for float64
input, which only they accept). Source of the equations: Esser et al., "Learned Step Size Quantization" (2020), and for
`offset` Bhalgat et al., "LSQ+" (2020). `docs/numerics.md` is the contract in words.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry
from .network_checks import (
    Row,
    check_attend,
    check_begin,
    check_convolve,
    check_gate,
    check_mean,
    check_norm,
    check_pool,
    check_quantize,
    check_whole,
)
from .packed_conv2d import ACTIVATIONS
from .packed_network import ACTIVATION_NUMBERS, KINDS
from .packing import codes_dtype


def _per_element(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A per-channel vector [C] shaped to broadcast along `axis` of x; a per-tensor one stays 0-d."""
    if axis is None:
        return scale.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _sum_per_scale(terms: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return terms.sum()
    return terms.movedim(axis, 0).reshape(terms.shape[axis], -1 if terms.numel() else 0).sum(1)


def _codes(
    x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """v = (x - offset) / scale and its code round(clamp(v)), with scale and offset broadcast against x.

    A scale that is not positive and finite becomes NaN, and so does everything computed from it.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.nan)
    s = _per_element(scale.to(compute), x, axis)
    b = None if offset is None else _per_element(offset.to(compute), x, axis)
    v = (x.to(compute) if b is None else x.to(compute) - b) / s
    return v, v.clamp(qmin, qmax).round(), s, b


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    grad_factor: float,
    aten_edge: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = round(clamp((x - offset) / scale, qmin, qmax)) * scale + offset, rounding half to even."""
    _, q, s, b = _codes(x, scale, offset, qmin, qmax, axis)
    y = q * s if b is None else q * s + b
    return torch.empty_like(x, dtype=out_dtype).copy_(y)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    grad_factor: float,
    aten_edge: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradient of x, and the gradients of scale and offset summed over the elements that share them.

    Inside the range (bounds included) dy/dx = 1, dy/dscale = round(v) - v and dy/doffset = 0; outside they are 0, the
    bound and 1. `aten_edge` takes "inside" on round(v), as PyTorch's own learnable op does.
    """
    v, q, _, _ = _codes(x, scale, offset, qmin, qmax, axis)
    edge = v.round() if aten_edge else v
    inside = (edge >= qmin) & (edge <= qmax)
    grad_x = torch.empty_like(x).copy_(torch.where(inside, grad, 0))
    grad_scale = scale.new_empty(0)
    grad_offset = scale.new_empty(0)
    if param_grads:
        g = grad.to(v.dtype)
        term = q - torch.where(inside, v, 0)
        grad_scale = (_sum_per_scale(g * term, axis) * grad_factor).to(scale.dtype).reshape(scale.shape)
        if offset is not None:
            grad_offset = (_sum_per_scale(torch.where(inside, 0, g), axis) * grad_factor).to(scale.dtype)
            grad_offset = grad_offset.reshape(scale.shape)
    return grad_x, grad_scale, grad_offset


def fake_quantize_multi(
    xs: list[Tensor],
    scales: list[Tensor],
    qmins: list[int],
    qmaxs: list[int],
    axis: int | None,
    grad_factors: list[float],
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """`fake_quantize` of every (x, scale, qmin, qmax)."""
    return [
        fake_quantize(x, s, None, lo, hi, axis, g, False, out_dtype or x.dtype)
        for x, s, lo, hi, g in zip(xs, scales, qmins, qmaxs, grad_factors, strict=True)
    ]


def fake_quantize_multi_backward(
    grads: list[Tensor],
    xs: list[Tensor],
    scales: list[Tensor],
    qmins: list[int],
    qmaxs: list[int],
    axis: int | None,
    grad_factors: list[float],
    param_grads: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """`fake_quantize_backward` of every layer: the gradients of all xs, then of all scales."""
    results = [
        fake_quantize_backward(d, x, s, None, lo, hi, axis, g, False, param_grads)
        for d, x, s, lo, hi, g in zip(grads, xs, scales, qmins, qmaxs, grad_factors, strict=True)
    ]
    return [r[0] for r in results], [r[1] for r in results]


def mean_abs(x: Tensor, axis: int | None) -> Tensor:
    """Mean |x| over the elements that share a scale: float32 [C], or 0-d for `axis=None`; 0 for an empty slice."""
    magnitude = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    total = _sum_per_scale(magnitude, axis)
    return total / max(x.numel() // max(total.numel(), 1), 1)


# Packed inference. docs/format.md is the layout of the packed bits.


def plane_widths(bits: int) -> list[int]:
    widths: list[int] = []
    while sum(widths) < bits:
        left = bits - sum(widths)
        widths.append(4 if left >= 4 else 2 if left >= 2 else 1)
    return widths


def pack(codes: Tensor, bits: int) -> Tensor:
    """The low `bits` bits of int8 or uint8 codes, in blocks of 8 chunks of 32: uint8 [bytes]."""
    blocks = -(-codes.numel() // 256)
    chunks = codes.new_zeros(blocks * 256, dtype=torch.uint8)
    chunks[: codes.numel()] = codes.reshape(-1).view(torch.uint8)
    rows, start = [], 0
    for width in plane_widths(bits):
        # Chunk j goes to row j % width at shift width * (j // width).
        part = ((chunks >> start) & (2**width - 1)).view(blocks, 8 // width, width, 32)
        shifts = torch.arange(0, 8, width, device=codes.device, dtype=torch.uint8).view(-1, 1, 1)
        rows.append((part << shifts).sum(1, dtype=torch.uint8))
        start += width
    return torch.cat(rows, dim=1).reshape(-1)


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """The `count` codes of each packed tensor [..., bytes]: int8 or uint8 [..., count]."""
    rows = packed.reshape(*packed.shape[:-1], packed.shape[-1] // (32 * bits), bits, 32)
    codes = packed.new_zeros(*rows.shape[:-2], 8, 32)
    start = 0
    for width in plane_widths(bits):
        shifts = torch.arange(0, 8, width, device=packed.device, dtype=torch.uint8).view(-1, 1, 1)
        part = (rows[..., None, start : start + width, :] >> shifts) & (2**width - 1)
        codes |= part.reshape(codes.shape) << start
        start += width
    codes = codes.flatten(-3)[..., :count]
    if not signed:
        return codes.contiguous()
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """The codes of `fake_quantize` as int8, or uint8 if qmin >= 0; NaN becomes 0 clamped into the range."""
    _, q, _, _ = _codes(x, scale, None, qmin, qmax, axis)
    code_of_nan = min(max(0, qmin), qmax)
    return q.nan_to_num(code_of_nan).to(codes_dtype(qmin))


def dequantize_packed(packed: Tensor, scale: Tensor, bits: int, count: int, out_dtype: torch.dtype) -> Tensor:
    """Codes of [M, bytes] times their channel's scale [M, C]: [M, C, count / C]."""
    codes = unpack(packed, bits, count, signed=True).view(*scale.shape, count // scale.shape[1])
    return (codes * scale[..., None]).to(out_dtype)


def _member_sums(x: Tensor, packed: Tensor, channels: int, bits: int, geometry: Geometry, shared: bool) -> Tensor:
    """conv2d(x, codes) of each member, [M, N, C_out, H', W'], in x's dtype."""
    members = packed.shape[0]
    weight_shape = geometry.weight_shape(channels, x.shape[1])
    codes = unpack(packed, bits, math.prod(weight_shape), signed=True).view(members, *weight_shape)
    weights = codes.permute(0, 1, 4, 2, 3).to(x.dtype)
    images = [x] * members if shared else x.chunk(members)
    top, left, bottom, right = geometry.padding
    return torch.stack(
        [
            F.conv2d(
                F.pad(image, (left, right, top, bottom)),
                weight,
                stride=geometry.stride,
                dilation=geometry.dilation,
                groups=geometry.groups,
            )
            for image, weight in zip(images, weights, strict=True)
        ]
    )


def _epilogue(sums: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """activation(sums [M, N, C, H, W] * scale [M, C] + bias + residual): [M * N, C, H, W]."""
    y = sums * scale[:, None, :, None, None]
    if bias is not None:
        y = y + bias[:, None, :, None, None]
    y = y.flatten(0, 1)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def packed_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    *rest: Any,
) -> Tensor:
    """activation(conv2d(x, codes) * scale + bias + residual) of M members, in float32 (float64 for float64 x)."""
    geometry, (shared, activation) = Geometry.of(*rest[:5]), rest[5:]
    compute = torch.promote_types(x.dtype, torch.float32)
    sums = _member_sums(x.to(compute), packed, scale.shape[1], bits, geometry, shared)
    y = _epilogue(sums, scale, bias, residual, activation)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


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
    """`packed_conv2d` on codes: exact sums, then float32 in the order of the formula, then codes again."""
    geometry, (shared, activation, qmin, qmax, out_dtype) = Geometry.of(*rest[:5]), rest[5:]
    # float64 holds every int32 sum exactly, and unlike integers it has a convolution on every device.
    sums = _member_sums(x.double(), packed, scale.shape[1], bits, geometry, shared).float()
    if residual is not None:
        residual = residual.float()
        if residual_scale is not None:
            residual = (residual.unflatten(0, sums.shape[:2]) * residual_scale.view(-1, 1, 1, 1, 1)).flatten(0, 1)
    y = _epilogue(sums, scale * x_scale[:, None], bias, residual, activation)
    if out_scale is not None:
        y = quantize(y.unflatten(0, sums.shape[:2]), out_scale, qmin, qmax, 0).flatten(0, 1)
    return y.to(out_dtype).contiguous(memory_format=torch.channels_last)


def packed_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shared: bool, activation: str
) -> Tensor:
    """activation(x @ codes.T * scale + bias) of M members: a convolution of 1x1 images."""
    images = x[:, :, None, None]
    y = packed_conv2d(images, packed, scale, bias, None, bits, *Geometry().arguments, shared, activation)
    return y[:, :, 0, 0].contiguous()


def packed_panels(
    packed: Tensor, channels: int, depth: int, bits: int, kernel: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Nothing, which `packed_network` takes for no panels."""
    return packed.new_empty(packed.shape[0], 0)


def packed_network(
    inputs: list[Tensor], constants: list[Tensor], steps: Tensor, out_sizes: list[int], out_dtype: torch.dtype
) -> Tensor:
    """The rows of the table, one after another.

    Raises:
        ValueError: for what the C++ refuses, too.
    """
    values, images = list(inputs), -1
    for index, numbers in enumerate(steps.tolist()):
        row = Row(index, numbers, values, len(inputs))
        given = values[-1] if row["part"] else None
        check_begin(row, images in (-1, values[-1].shape[0]), given, images)
        images = row["images"] if given is None else images
        part = _ROWS[KINDS[row["kind"]]](row, constants, 0 if given is None else given.shape[0], images)
        if given is None:
            values.append(part)
        else:
            values[-1] = torch.cat([given, part])
    y = values[-1]
    if (images, tuple(y.shape), y.dtype) != (out_sizes[0], tuple(out_sizes), out_dtype):
        raise ValueError("packed_network: ends with another result than the op is told to give, or lacks images")
    return y.contiguous(memory_format=torch.channels_last)


def _quantize_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x = row.value("x")
    check_quantize(row, x)
    check_whole(row, written, images)
    row["member"] = 0  # the scales are all that there are
    scale = row.some_floats("out_scale", constants)
    x = x.repeat(row["images"] // x.shape[0], 1, 1, 1).unflatten(0, (row["members"], -1))
    return quantize(x, scale[:, 0], row["qmin"], row["qmax"], 0).flatten(0, 1).view(row.dtype)


def _pool_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x = row.value("x")
    check_pool(row, x)
    check_whole(row, written, images)
    window = _window(row)
    top, left, bottom, right = window.padding
    padded = F.pad(x.float(), (left, right, top, bottom), value=-math.inf)
    pooled = F.max_pool2d(padded, window.kernel, window.stride)
    return pooled[:, :, : row["height"], : row["width"]].to(row.dtype)


def _convolve_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x, window = row.value("x"), _window(row)
    check_convolve(row, x, written, images)
    here = slice(written, written + row["members"] * row["images_of_member"])
    residual = row.value("residual")[here] if row["residual"] >= 0 else None
    if residual is not None:  # the result may be a part of what there are windows for
        height, width = window.output_size(*x.shape[2:])
        residual = F.pad(residual, (0, width - row["width"], 0, height - row["height"]))
    count = torch.Size(window.weight_shape(row["channels"], x.shape[1])[1:]).numel()
    packed, scale = row.weights(constants, count), row.some_floats("scale", constants, row["channels"])
    bias = row.floats("bias", constants, row["channels"])
    x = x if row["shared"] else x[here]
    rest = (row["bits"], *window.arguments, bool(row["shared"]), ACTIVATION_NUMBERS[row["activation"]])
    if x.is_floating_point():
        y = packed_conv2d(x, packed, scale, bias, residual, *rest)
    else:
        scales = [row.floats(name, constants) for name in ("x_scale", "residual_scale", "out_scale")]
        x_scale, residual_scale, out_scale = [None if t is None else t[:, 0] for t in scales]
        assert x_scale is not None
        codes = (row["qmin"], row["qmax"], row.dtype)
        y = packed_conv2d_int8(x, x_scale, packed, scale, bias, residual, residual_scale, out_scale, *rest, *codes)
    return y[:, :, : row["height"], : row["width"]]


def _window(row: Row) -> Geometry:
    pairs = [(row[f"{name}_h"], row[f"{name}_w"]) for name in ("kernel", "stride", "dilation")]
    padding = (row["pad_top"], row["pad_left"], row["pad_bottom"], row["pad_right"])
    return Geometry(pairs[0], pairs[1], padding, pairs[2], row["groups"])


def _mean_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x = row.value("x")
    check_mean(row, x)
    check_whole(row, written, images)
    return x.mean((2, 3), keepdim=True)


def _gate_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x, factors = row.value("x"), row.value("residual")
    check_gate(row, x, factors)
    check_whole(row, written, images)
    return x * factors


def _norm_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x = row.value("x")
    check_norm(row, x)
    check_whole(row, written, images)
    row["member"] = 0
    weight, bias = (row.some_floats(name, constants, row["channels"]) for name in ("scale", "bias"))
    row["members"] = 1
    eps = float(row.some_floats("x_scale", constants))
    normalized = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).unflatten(0, (weight.shape[0], -1))
    by_member = (weight.shape[0], 1, 1, 1, -1)
    return (normalized * weight.view(by_member) + bias.view(by_member)).flatten(0, 1).movedim(-1, 1)


def _attend_row(row: Row, constants: list[Tensor], written: int, images: int) -> Tensor:
    x = row.value("x")
    check_attend(row, x)
    check_whole(row, written, images)
    row["member"], row["members"] = 0, 1
    scale = float(row.some_floats("scale", constants))
    tokens = x.movedim(1, -1).reshape(-1, row["tokens"], x.shape[1])
    query, key, value = (
        tokens[..., row[name] : row[name] + row["channels"]].unflatten(-1, (row["heads"], -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    y = (query @ key.mT * scale).softmax(-1) @ value
    return y.transpose(1, 2).reshape(row["images"], row["height"], row["width"], -1).movedim(-1, 1)


_ROWS = {
    "quantize": _quantize_row,
    "convolve": _convolve_row,
    "max_pool": _pool_row,
    "mean": _mean_row,
    "gate": _gate_row,
    "norm": _norm_row,
    "attend": _attend_row,
}
