"""The cases of smoke.py: of every op one for each dtype and layout, with what the numpy oracles say of it.

Other parameters (axis, bits, convolution, activation, ...) take turns in a random order, the same every time.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, product, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import oracle
import packed_oracle
from packed_oracle import ACTIVATIONS, EXACT, FLOAT32_UNIT, Window
from qkernels.ops.geometry import Geometry

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8)
LAYOUTS = ("contiguous", "channels_last", "transposed", "every other", "unaligned")
PLAIN_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "channels_last")  # of any number of dimensions
SHAPE = (6, 24, 5, 7)
QMIN, QMAX, FACTOR = -8, 7, 0.3
SUMS = 1.1e-6  # of the sum of |terms|: what short chains of float32 additions keep to


class Geometric(NamedTuple):
    """A convolution: of images [channels, height, width]."""

    in_shape: tuple[int, int, int]
    out_channels: int
    geometry: Geometry


CONVOLUTIONS = {
    "1x1": Geometric((40, 6, 5), 24, Geometry()),
    "3x3": Geometric((16, 7, 6), 70, Geometry((3, 3), padding=(1, 1, 1, 1))),
    "stem": Geometric((3, 17, 15), 16, Geometry((7, 7), (2, 2), (3, 3, 3, 3))),
    "depthwise": Geometric((36, 9, 8), 36, Geometry((3, 3), (2, 2), (0, 0, 1, 1), groups=36)),
    "deep": Geometric((256, 4, 4), 20, Geometry((3, 3), padding=(1, 1, 1, 1))),  # its sum is split
    "1x1 stride 2": Geometric((64, 7, 7), 72, Geometry(stride=(2, 2))),
    "groups": Geometric((24, 7, 7), 36, Geometry((3, 3), padding=(1, 1, 1, 1), groups=3)),
    "odd": Geometric((5, 9, 4), 3, Geometry((3, 2), (2, 1), (0, 0, 1, 0), (1, 2))),
}


class Case(NamedTuple):
    op: str
    parameters: dict[str, Any]

    def __str__(self) -> str:
        values = ", ".join(f"{k} {str(v).removeprefix('torch.')}" for k, v in self.parameters.items())
        return f"{self.op}: {values}"


class Expected(NamedTuple):
    """A result: its values, by how much each may differ, its dtype, and its strides if they matter."""

    values: Tensor
    dtype: torch.dtype
    bound: Tensor | float = 0.0
    strides: tuple[int, ...] | None = None


class Problem(NamedTuple):
    """Arguments in the order of the op's schema, CPU tensors among them, and every tensor that must come out."""

    arguments: tuple[Any, ...]
    results: list[Expected]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        reverse = list(reversed(range(t.dim())))
        return t.permute(reverse).contiguous().permute(reverse)
    if layout == "every other":
        return torch.stack([t, t], -1)[..., 0]
    if layout == "unaligned":
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    return t


def float32(t: Tensor | None) -> Any:
    return None if t is None else t.float().numpy()


def like(x: Tensor) -> tuple[int, ...]:
    return torch.empty_like(x).stride()


def stored(values: np.ndarray, dtype: torch.dtype, x: Tensor) -> Expected:
    """float32 values rounded once, laid out as x."""
    return Expected(torch.from_numpy(np.array(values, np.float32)).to(dtype), dtype, strides=like(x))


def near(values: np.ndarray, magnitude: np.ndarray, factor: float = 1.0) -> Expected:
    """A float32 sum times `factor`; magnitude: of its terms."""
    return Expected(torch.as_tensor(values * factor), torch.float32, torch.as_tensor(SUMS * factor * magnitude) + 1e-30)


# Fake-quantization -----------------------------------------------------------------------------------------------


def quantizer(
    rng: np.random.Generator, dtype: torch.dtype, layout: str, axis: int | None, shape: tuple[int, ...] = SHAPE
) -> tuple[Tensor, Tensor]:
    """x with ties, and scales; of several channels one has values that are not finite, and one an invalid scale."""
    channels = () if axis is None else (shape[axis],)
    scale = torch.full(channels, 0.25)
    x = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), rng.integers(-20, 20, shape) / 8)
    if axis is not None and shape[axis] > 4:
        scale[1::2], scale[4] = 0.137, 0.0
        channel = np.moveaxis(x, axis, 0)[2].flat
        channel[:3] = [np.nan, np.inf, -np.inf][: len(channel)]
    return laid_out(torch.from_numpy(x.astype(np.float32)).to(dtype), layout), scale


def offset_of(rng: np.random.Generator, scale: Tensor, axis: int | None) -> Tensor | None:
    """Per channel along the first dimension there is one."""
    return torch.from_numpy(rng.normal(size=scale.shape).astype(np.float32)) if axis == 0 else None


def fake_quantize(rng, x_dtype, layout, axis, out_dtype) -> Problem:
    x, scale = quantizer(rng, x_dtype, layout, axis)
    offset = offset_of(rng, scale, axis)
    y = oracle.fake_quantize(float32(x), float32(scale), float32(offset), QMIN, QMAX, axis)
    return Problem((x, scale, offset, QMIN, QMAX, axis, 1.0, False, out_dtype), [stored(y, out_dtype, x)])


def fake_quantize_backward(rng, x_dtype, layout, axis, grad_dtype) -> Problem:
    x, scale = quantizer(rng, x_dtype, layout, axis)
    offset, aten_edge = offset_of(rng, scale, axis), axis == 1
    grad = torch.from_numpy(rng.normal(size=x.shape).astype(np.float32)).to(grad_dtype)
    grad = grad if axis == 1 else laid_out(grad, layout)
    exact = oracle.gradients(float32(grad), float32(x), float32(scale), float32(offset), QMIN, QMAX, axis, aten_edge)
    nothing = Expected(torch.empty(0), torch.float32)
    return Problem(
        (grad, x, scale, offset, QMIN, QMAX, axis, FACTOR, aten_edge, True),
        [
            stored(exact.x, x_dtype, x),
            near(exact.scale, exact.scale_magnitude, FACTOR),
            nothing if offset is None else near(exact.offset, exact.offset_magnitude, FACTOR),
        ],
    )


class Model(NamedTuple):
    """Layers, one of each layout and an empty one: the lists that `fake_quantize_multi` takes."""

    xs: list[Tensor]
    scales: list[Tensor]
    qmins: list[int]
    qmaxs: list[int]
    factors: list[float]


def model(rng: np.random.Generator, dtype: torch.dtype, axis: int | None) -> Model:
    shapes = [(8, 3, 3, 3), (6, 5, 3, 4), (3, 20), (1, 9), (2, 3, 1500), (0, 4)]
    layers = [
        quantizer(rng, dtype, layout if len(shape) == 4 or layout != "channels_last" else "contiguous", axis, shape)
        for shape, layout in zip(shapes, (*LAYOUTS, "contiguous"), strict=True)
    ]
    bits = [2 + i for i in range(len(shapes))]
    return Model(
        [x for x, _ in layers],
        [scale for _, scale in layers],
        [-(2 ** (b - 1)) for b in bits],
        [2 ** (b - 1) - 1 for b in bits],
        [0.1 * b for b in bits],
    )


def fake_quantize_multi(rng, x_dtype, out_dtype, axis) -> Problem:
    m = model(rng, x_dtype, axis)
    ys = [
        stored(oracle.fake_quantize(float32(x), float32(scale), None, low, high, axis), out_dtype, x)
        for x, scale, low, high in zip(m.xs, m.scales, m.qmins, m.qmaxs, strict=True)
    ]
    return Problem((m.xs, m.scales, m.qmins, m.qmaxs, axis, m.factors, out_dtype), ys)


def fake_quantize_multi_backward(rng, x_dtype, grad_dtype, axis) -> Problem:
    m = model(rng, x_dtype, axis)
    grads = [torch.from_numpy(rng.normal(size=x.shape).astype(np.float32)).to(grad_dtype) for x in m.xs]
    exact = [
        oracle.gradients(float32(grad), float32(x), float32(scale), None, low, high, axis, False)
        for grad, x, scale, low, high in zip(grads, m.xs, m.scales, m.qmins, m.qmaxs, strict=True)
    ]
    of_xs = [stored(e.x, x_dtype, x) for e, x in zip(exact, m.xs, strict=True)]
    of_scales = [near(e.scale, e.scale_magnitude, f) for e, f in zip(exact, m.factors, strict=True)]
    return Problem((grads, m.xs, m.scales, m.qmins, m.qmaxs, axis, m.factors, True), [*of_xs, *of_scales])


def mean_abs(rng, x_dtype, layout, axis) -> Problem:
    x = laid_out(torch.from_numpy(rng.normal(size=SHAPE).astype(np.float32)).to(x_dtype), layout)
    exact = oracle.mean_abs(float32(x), axis)
    return Problem((x, axis), [near(exact, exact)])


# Codes and their bits --------------------------------------------------------------------------------------------


def codes_of(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    low = -128 if dtype == torch.int8 else 0
    return torch.from_numpy(rng.integers(low, low + 256, shape)).to(dtype)


def pack(rng, dtype, layout, bits) -> Problem:
    codes = laid_out(codes_of(rng, dtype, (3, 7, 5, 11)), layout)
    return Problem((codes, bits), [Expected(torch.from_numpy(packed_oracle.pack(codes.numpy(), bits)), torch.uint8)])


def unpack(rng, dtype, layout, bits) -> Problem:
    """Any bytes are codes: also those behind the last code."""
    count = 700
    packed = codes_of(rng, torch.uint8, (2, 3, packed_oracle.packed_nbytes(count, bits)))
    signed = dtype == torch.int8
    codes = [packed_oracle.unpack(p, bits, count, signed) for p in packed.flatten(0, 1).numpy()]
    expected = Expected(torch.from_numpy(np.stack(codes).reshape(2, 3, count)), dtype)
    return Problem((laid_out(packed, layout), bits, count, signed), [expected])


def quantize(rng, x_dtype, layout, axis, dtype) -> Problem:
    x, scale = quantizer(rng, x_dtype, layout, axis)
    qmin, qmax = (-128, 127) if dtype == torch.int8 else (3, 200)
    codes = packed_oracle.quantize(float32(x), float32(scale), qmin, qmax, axis)
    return Problem((x, scale, qmin, qmax, axis), [Expected(torch.from_numpy(codes), dtype, strides=like(x))])


def dequantize_packed(rng, out_dtype, layout, bits) -> Problem:
    members, channels, depth = 2, 12, 45
    count = channels * depth
    packed = codes_of(rng, torch.uint8, (members, packed_oracle.packed_nbytes(count, bits)))
    scale = rng.normal(size=(members, channels)).astype(np.float32)
    codes = np.stack([packed_oracle.unpack(p, bits, count, True) for p in packed.numpy()])
    y = codes.reshape(members, channels, depth).astype(np.float32) * scale[..., None]
    expected = Expected(torch.from_numpy(y).to(out_dtype), out_dtype)
    return Problem((laid_out(packed, layout), torch.from_numpy(scale), bits, count, out_dtype), [expected])


# Convolutions ----------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A packed layer of MEMBERS members, as the oracle takes it and as the ops do."""

    geometry: Geometry
    codes: np.ndarray  # [members, out, kernel_h, kernel_w, in / groups]
    packed: Tensor
    scale: Tensor
    bias: Tensor

    def sums(self, x: np.ndarray, codes: np.ndarray, shared: bool) -> np.ndarray:
        g = self.geometry
        window = Window(g.stride, g.padding, g.dilation, g.groups)
        return packed_oracle.members_convolution(x, codes.astype(x.dtype), window, shared)


MEMBERS, IMAGES = 2, 3


def layer_of(rng: np.random.Generator, c: Geometric, bits: int) -> Layer:
    shape = c.geometry.weight_shape(c.out_channels, c.in_shape[0])
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (MEMBERS, *shape))
    scale = np.exp(rng.uniform(-4, 0, (MEMBERS, c.out_channels))) / 2**bits
    bias = rng.normal(size=scale.shape)
    packed = torch.from_numpy(np.stack([packed_oracle.pack(member, bits) for member in codes]))
    return Layer(c.geometry, codes, packed, *(torch.from_numpy(a.astype(np.float32)) for a in (scale, bias)))


def shapes_of(c: Geometric, images: int, shared: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of x and of the result."""
    out = (images * MEMBERS, c.out_channels, *c.geometry.output_size(*c.in_shape[1:]))
    return (images if shared else images * MEMBERS, *c.in_shape), out


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(dtype)


def float_result(layer: Layer, x: Tensor, residual: Tensor | None, shared: bool, activation: str) -> Expected:
    """In float64, and what rounding every product, sum and store in float32 can add up to."""
    x64 = x.double().numpy()
    rest = [None if t is None else t.double().numpy() for t in (layer.scale, layer.bias, residual)]
    exact = packed_oracle.epilogue(layer.sums(x64, layer.codes, shared), *rest, activation)
    positive = [None if t is None else np.abs(t) for t in rest]
    magnitude = packed_oracle.epilogue(layer.sums(np.abs(x64), np.abs(layer.codes), shared), *positive, "none")
    bound = FLOAT32_UNIT * (layer.codes[0, 0].size + 4) * magnitude
    bound = packed_oracle.STRETCH.get(activation, 1) * bound + packed_oracle.activation_slack(exact, activation)
    unit = torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0
    bound = bound + unit * (np.abs(exact) + bound) + 2.0**-24  # denormals of float16
    return Expected(torch.from_numpy(exact).flatten(0, 1), x.dtype, torch.from_numpy(bound).flatten(0, 1))


def channels_last(e: Expected) -> Expected:
    strides = torch.empty(e.values.shape).to(memory_format=torch.channels_last).stride()
    return e._replace(strides=strides)


def packed_conv2d(rng, x_dtype, layout, convolution, bits, activation, shared, with_residual) -> Problem:
    c = CONVOLUTIONS[convolution]
    layer = layer_of(rng, c, bits)
    x_shape, out_shape = shapes_of(c, IMAGES, shared)
    x = laid_out(normal(rng, x_shape, x_dtype), layout)
    residual = laid_out(normal(rng, out_shape, x_dtype), layout) if with_residual else None
    return Problem(
        (x, layer.packed, layer.scale, layer.bias, residual, bits, *c.geometry.arguments, shared, activation),
        [channels_last(float_result(layer, x, residual, shared, activation))],
    )


def packed_gemv(rng, x_dtype, layout, rows, bits, activation, shared) -> Problem:
    c = Geometric((300, 1, 1), 40, Geometry())
    layer = layer_of(rng, c, bits)
    x_shape, _ = shapes_of(c, rows, shared)
    x = laid_out(normal(rng, x_shape[:2], x_dtype), layout)
    result = float_result(layer, x[:, :, None, None], None, shared, activation)
    flat = result._replace(values=result.values[:, :, 0, 0], bound=result.bound[:, :, 0, 0])
    return Problem((x, layer.packed, layer.scale, layer.bias, bits, shared, activation), [flat])


def packed_conv2d_int8(
    rng, x_dtype, out_dtype, layout, convolution, bits, activation, shared, residual_dtype
) -> Problem:
    """Bit for bit: sums in int64, then float32 in the order of docs/numerics.md."""
    c = CONVOLUTIONS[convolution]
    layer = layer_of(rng, c, bits)
    x_shape, out_shape = shapes_of(c, IMAGES, shared)
    x = laid_out(codes_of(rng, x_dtype, x_shape), layout)
    x_scale, residual_scale, out_scale = np.exp(rng.uniform(-5, -3, (3, MEMBERS))).astype(np.float32)
    residual, addend = None, None
    if residual_dtype in INTEGERS:
        residual = laid_out(codes_of(rng, residual_dtype, out_shape), layout)
        addend = float32(residual).reshape(MEMBERS, IMAGES, *out_shape[1:]) * residual_scale.reshape(-1, 1, 1, 1, 1)
    elif residual_dtype is not None:
        residual = laid_out(normal(rng, out_shape, residual_dtype), layout)
        addend = float32(residual)
    sums = layer.sums(x.numpy().astype(np.int64), layer.codes, shared).astype(np.float32)
    multiplier = float32(layer.scale) * x_scale[:, None]
    y = packed_oracle.epilogue(sums, multiplier, float32(layer.bias), addend, activation)
    qmin, qmax = (-128, 127) if out_dtype == torch.int8 else (0, 255)
    if out_dtype in INTEGERS:
        y = packed_oracle.quantize(y, out_scale, qmin, qmax, 0)
    y = torch.from_numpy(y).flatten(0, 1).to(out_dtype)
    x_scale, residual_scale, out_scale = (torch.from_numpy(s) for s in (x_scale, residual_scale, out_scale))
    return Problem(
        (
            x,
            x_scale,
            layer.packed,
            layer.scale,
            layer.bias,
            residual,
            residual_scale if residual_dtype in INTEGERS else None,
            out_scale if out_dtype in INTEGERS else None,
            bits,
            *c.geometry.arguments,
            shared,
            activation,
            qmin,
            qmax,
            out_dtype,
        ),
        [channels_last(Expected(y, out_dtype))],
    )


# The list --------------------------------------------------------------------------------------------------------

AXES = (0, None, 1)
BITS = range(2, 9)
# op -> (parameters of which every combination is a case, parameters that take turns)
PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fake_quantize": (dict(x_dtype=FLOATS, layout=LAYOUTS), dict(axis=AXES, out_dtype=FLOATS)),
    "fake_quantize_backward": (dict(x_dtype=FLOATS, layout=LAYOUTS), dict(axis=AXES, grad_dtype=FLOATS)),
    "fake_quantize_multi": (dict(x_dtype=FLOATS, out_dtype=FLOATS), dict(axis=AXES)),
    "fake_quantize_multi_backward": (dict(x_dtype=FLOATS, grad_dtype=FLOATS), dict(axis=AXES)),
    "mean_abs": (dict(x_dtype=FLOATS, layout=LAYOUTS), dict(axis=AXES)),
    "pack": (dict(dtype=INTEGERS, layout=LAYOUTS), dict(bits=BITS)),
    "unpack": (dict(dtype=INTEGERS, layout=PLAIN_LAYOUTS), dict(bits=BITS)),
    "quantize": (dict(x_dtype=FLOATS, layout=LAYOUTS), dict(axis=AXES, dtype=INTEGERS)),
    "dequantize_packed": (dict(out_dtype=FLOATS, layout=PLAIN_LAYOUTS), dict(bits=BITS)),
    "packed_conv2d": (
        dict(x_dtype=FLOATS, layout=LAYOUTS),
        dict(
            convolution=CONVOLUTIONS,
            bits=BITS,
            activation=ACTIVATIONS,
            shared=(False, True, True),
            with_residual=(True, False),
        ),
    ),
    "packed_conv2d_int8": (
        dict(x_dtype=INTEGERS, out_dtype=(*INTEGERS, *FLOATS)),
        dict(
            layout=("channels_last", "contiguous", "every other", "unaligned"),
            convolution=CONVOLUTIONS,
            bits=(7, 8, 2, 5, 4, 6, 3),
            activation=EXACT,
            shared=(False, True, True),
            residual_dtype=(torch.uint8, None, torch.float32, torch.int8, torch.bfloat16),
        ),
    ),
    "packed_gemv": (
        dict(x_dtype=FLOATS, layout=PLAIN_LAYOUTS),
        dict(rows=(1, 8, 3, 17), bits=(7, 8, 2, 5, 4, 6, 3), activation=ACTIVATIONS, shared=(False, True, True)),
    ),
}

PROBLEMS: dict[str, Callable[..., Problem]] = {op: globals()[op] for op in PARAMETERS}


def in_turns(values: Iterable[Any], choose: random.Random) -> Iterator[Any]:
    """All values in a random order, then again in another, without end."""
    values = list(values)
    while True:
        yield from choose.sample(values, len(values))


def cases_of(op: str) -> Iterator[Case]:
    crossed, in_turn = PARAMETERS[op]
    choose = random.Random(op)
    turns = [in_turns(values, choose) for values in in_turn.values()]
    for values in product(*crossed.values()):
        yield Case(op, dict(zip(crossed, values, strict=True)) | dict(zip(in_turn, map(next, turns), strict=True)))


def cases() -> list[Case]:
    """The first case of every op, then the second of every op, and so on: cut short, it has still seen every op."""
    rounds = zip_longest(*map(cases_of, PARAMETERS))
    return [case for case in chain.from_iterable(rounds) if case is not None]
