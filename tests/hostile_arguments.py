"""The arguments of hostile_calls.py: legal ones of each op, and what is made of them. All follow from a number."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from network_cases import random_network
from packed_oracle import ACTIVATIONS
from qkernels.ops.packing import packed_bytes
from qkernels.ops.schemas import SCHEMAS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.uint8)
DTYPES = (
    *(*FLOATS, *CODES, torch.float64, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.uint16),
)
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 9, 16, 31, 127, 128, 255, 256, 1000, 4096, 65_793, 100_000, 2**20, 2**22, 2**22 + 1),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 257, 2**63 - 1, 2**63, 2**70),
    *(-1, -2, -8, -128, -129, -100_000, -(2**22), -(2**31), -(2**32), -(2**63), -(2**63) - 1),
)


class Maker:
    """Random values that follow from an op and a number."""

    def __init__(self, op: str, number: int, device: str) -> None:
        self.random = random.Random(f"{op}/{number}")
        self.device = device

    def __call__(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int = 9) -> int:
        return self.random.randint(1, most)

    def tensor(self, shape: Any, dtype: torch.dtype = torch.float32, positive: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        if dtype.is_floating_point:
            values = torch.randn(shape, generator=generator)
            values = (values.abs() * 0.1 + 0.01) if positive else values
        else:
            values = torch.randint(
                -128 if dtype.is_signed else 0, 128 if dtype.is_signed else 256, shape, generator=generator
            )
        return values.to(self.device, dtype)

    def shape(self) -> list[int]:
        return self(
            [self.size(40)],
            [self.size(), self.size(70)],
            [self.size(), self.size(), self.size()],
            [2, 3, 4, 5],
            [],
            [300, 7],
        )


# Legal arguments -------------------------------------------------------------------------------------------------


def quantizer(make: Maker) -> tuple[Tensor, Tensor, Any, int, int, int | None]:
    shape = make.shape()
    axis = make(None, make.random.randrange(len(shape))) if shape else None
    scale_shape = [] if axis is None else [shape[axis]]
    offset = make(None, make.tensor(scale_shape))
    x = make.tensor(shape, make(*FLOATS))
    return x, make.tensor(scale_shape, positive=True), offset, *make((-8, 7), (-64, 63), (0, 255)), axis


def fake_quantize(make: Maker) -> list[Any]:
    return [*quantizer(make), 0.5, make(True, False), make(*FLOATS)]


def fake_quantize_backward(make: Maker) -> list[Any]:
    layer = quantizer(make)
    return [make.tensor(layer[0].shape, make(*FLOATS)), *layer, 0.5, make(True, False), make(True, False)]


def model(make: Maker) -> tuple[list[Tensor], list[Tensor], list[int], list[int], int | None, list[float]]:
    axis, layers, dtype = make(None, 0), make.size(4), make(*FLOATS)
    xs = [make.tensor([make.size(), *make.shape()], dtype) for _ in range(layers)]
    scales = [make.tensor([] if axis is None else [len(x)], positive=True) for x in xs]
    return xs, scales, [-8] * layers, [7] * layers, axis, [0.5 + i for i in range(layers)]


def fake_quantize_multi(make: Maker) -> list[Any]:
    return [*model(make), make(None, *FLOATS)]


def fake_quantize_multi_backward(make: Maker) -> list[Any]:
    layers, dtype = model(make), make(*FLOATS)
    return [[make.tensor(x.shape, dtype) for x in layers[0]], *layers, make(True, False)]


def mean_abs(make: Maker) -> list[Any]:
    x, *_, axis = quantizer(make)
    return [x, axis]


def pack(make: Maker) -> list[Any]:
    return [make.tensor(make.shape(), make(*CODES)), make.random.randint(2, 8)]


def unpack(make: Maker) -> list[Any]:
    bits, count = make.random.randint(2, 8), make.random.randint(0, 600)
    shape = [*make([], [2], [3, 1]), packed_bytes(count, bits)]
    return [make.tensor(shape, torch.uint8), bits, count, make(True, False)]


def quantize(make: Maker) -> list[Any]:
    x, scale, _, qmin, qmax, axis = quantizer(make)
    return [x, scale, qmin, qmax, axis]


def dequantize_packed(make: Maker) -> list[Any]:
    bits, members, channels = make.random.randint(2, 8), make.size(3), make.size()
    count = channels * make.size(60)
    packed = make.tensor([members, packed_bytes(count, bits)], torch.uint8)
    return [packed, make.tensor([members, channels]), bits, count, make(*FLOATS)]


def window(make: Maker) -> tuple[list[int], list[int], list[int], list[int], int]:
    pair = [make.size(3), make.size(3)]
    return (
        pair,
        [make.size(3), make.size(3)],
        [make.size(3) - 1 for _ in range(4)],
        [make.size(2), make.size(2)],
        make(1, 1, 2),
    )


def convolution(make: Maker, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, packed, scale, bias, bits, window, shared, activation, and the output's shape."""
    kernel, stride, padding, dilation, groups = window(make)
    depth, members, images, shared = make(1, 1, make.size(8)), make.size(3), make.size(2), make(True, False)
    channels, bits = groups * make.size(8), make.random.randint(2, 8)
    height, width = (d * (k - 1) + make.size(5) for d, k in zip(dilation, kernel, strict=True))
    packed = [members, packed_bytes(channels * kernel[0] * kernel[1] * depth, bits)]
    out = [
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, before, after, d, k, s in zip(
            (height, width), padding[:2], padding[2:], dilation, kernel, stride, strict=True
        )
    ]
    return (
        make.tensor([images * (1 if shared else members), groups * depth, height, width], dtype),
        make.tensor(packed, torch.uint8),
        make.tensor([members, channels], positive=True),
        make(None, make.tensor([members, channels])),
        bits,
        (kernel, stride, padding, dilation, groups),
        shared,
        make(*ACTIVATIONS),
        [images * members, channels, *out],
    )


def packed_conv2d(make: Maker) -> list[Any]:
    dtype = make(*FLOATS)
    x, packed, scale, bias, bits, geometry, shared, activation, out = convolution(make, dtype)
    return [x, packed, scale, bias, make(None, make.tensor(out, dtype)), bits, *geometry, shared, activation]


def packed_conv2d_int8(make: Maker) -> list[Any]:
    x, packed, scale, bias, bits, geometry, shared, activation, out = convolution(make, make(*CODES))
    residual_dtype, out_dtype = make(None, *CODES, *FLOATS), make(*CODES, *FLOATS)
    x_scale, residual_scale, out_scale = (make.tensor([len(scale)], positive=True) for _ in range(3))
    return [
        *(x, x_scale, packed, scale, bias),
        None if residual_dtype is None else make.tensor(out, residual_dtype),
        residual_scale if residual_dtype in CODES else None,
        out_scale if out_dtype in CODES else None,
        *(bits, *geometry, shared, activation),
        *((-128, 127) if out_dtype == torch.int8 else (0, 255)),
        out_dtype,
    ]


def packed_gemv(make: Maker) -> list[Any]:
    members, rows, depth, channels = make.size(3), make.size(3), make.size(300), make.size(40)
    bits, shared = make.random.randint(2, 8), make(True, False)
    return [
        make.tensor([rows * (1 if shared else members), depth], make(*FLOATS)),
        make.tensor([members, packed_bytes(depth * channels, bits)], torch.uint8),
        make.tensor([members, channels], positive=True),
        make(None, make.tensor([members, channels])),
        *(bits, shared, make(*ACTIVATIONS)),
    ]


def packed_panels(make: Maker) -> list[Any]:
    members, bits, groups, depth = make(1, 2), make(2, 4, 7, 8), make(1, 2, 3), make(1, 3, 8, 20)
    channels, kernel = groups * make(1, 5, 20), [make(1, 3), make(1, 2)]
    nbytes = packed_bytes(channels * depth * kernel[0] * kernel[1], bits)
    packed = make.tensor([members, nbytes], torch.uint8)
    return [packed, channels, depth, bits, kernel, [make(1, 2), make(1, 2)], groups]


def packed_network(make: Maker) -> list[Any]:
    """Of what all backends compute alike, or of a single layer."""
    exact = make(True, True, False)
    network = random_network(make.random.getrandbits(60), steps=None if exact else 1, exact=exact)
    return tree_map_only(Tensor, lambda t: t if t.dtype == torch.int64 else t.to(make.device), network.arguments())


# What is made of them --------------------------------------------------------------------------------------------


def with_size(t: Tensor, make: Maker) -> Tensor:
    """Another size of one dimension, of the same values and more."""
    if not t.dim():
        return t.reshape(1)
    d = make.random.randrange(t.dim())
    size = make(0, t.shape[d] + 1, max(t.shape[d] - 1, 0), 2 * t.shape[d], 1)
    shape = [*t.shape[:d], size, *t.shape[d + 1 :]]
    return make.tensor(shape, t.dtype)


def expanded(t: Tensor, make: Maker) -> Tensor:
    """All elements of a dimension in one place, perhaps many more of them."""
    if not t.dim() or 0 in t.shape:
        return t
    d = make.random.randrange(t.dim())
    size = make(t.shape[d], t.shape[d], 2**16, 2**40)
    return t.narrow(d, 0, 1).expand([size if i == d else n for i, n in enumerate(t.shape)])


def overlapping(t: Tensor, make: Maker) -> Tensor:
    """The same memory for several elements."""
    return t.new_zeros(2 * sum(t.shape) + 1).as_strided(t.shape, [make(0, 1, 2) for _ in t.shape])


def strided(t: Tensor, make: Maker) -> Tensor:
    wide = t.new_zeros([2 * n + 1 for n in t.shape])
    return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def special(t: Tensor, make: Maker) -> Tensor:
    if t.numel() and t.dtype == torch.int64:
        t = t.contiguous().clone()
        for _ in range(make(1, 1, 1, 2, 3)):
            at, near = make.random.randrange(t.numel()), make.random.randrange(t.numel())
            value = int(t.view(-1)[at])
            value = make(value + 1, value - 1, 2 * value, int(t.view(-1)[near]), make.size(8), -1, make(*NUMBERS))
            t.view(-1)[at] = min(max(value, -(2**63)), 2**63 - 1)
        return t
    if not t.numel() or not t.dtype.is_floating_point:
        return t
    t = t.clone(memory_format=torch.contiguous_format)
    t.view(-1)[make.random.randrange(t.numel())] = make(float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-30)
    return t


OF_TENSORS: tuple[Callable[[Tensor, Maker], Any], ...] = (
    with_size,
    with_size,
    expanded,
    overlapping,
    strided,
    special,
    lambda t, make: make.tensor(t.shape, make(*DTYPES)),
    lambda t, make: t.to(make(*DTYPES)),
    lambda t, make: t[None],
    lambda t, make: t[0] if t.dim() and len(t) else t[None],
    lambda t, make: t.flatten(),
    lambda t, make: t.transpose(0, -1) if t.dim() else t,
    lambda t, make: t.new_empty(make([0], [], [0, 3], [2, 0, 2, 2])),
    lambda t, make: t.to("meta"),
    lambda t, make: t.cpu(),
    lambda t, make: t.to_sparse() if t.dim() and t.dtype in FLOATS[:1] else t,
    lambda t, make: None,
    lambda t, make: make(3, "x", 1.5, [t]),
)


def of_list(values: list[Any], make: Maker) -> Any:
    at = make.random.randrange(len(values)) if values else 0
    changed = values and changed_value(values[at], make)
    pair = [100_000, -100_000] if make(True, False) else [2**32, 2**32 - 1]
    make.random.shuffle(pair)
    return make(
        [*values[:at], changed, *values[at + 1 :]] if values else [None],
        [*values[:at], changed, *values[at + 1 :]] if values else [],
        [*pair, *values[2:]] if values and isinstance(values[0], int) else values[::-1],
        values[:-1],
        [*values, *values[:1]],
        [],
    )


def changed_value(value: Any, make: Maker) -> Any:
    if isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and not value.is_meta and value.numel() < 10**6
        if is_plain and value.dtype == torch.int64 and make.random.random() < 0.8:  # a table
            return special(value, make)
        return make(*OF_TENSORS)(value, make) if is_plain else value
    if isinstance(value, list):
        return of_list(value, make)
    if isinstance(value, bool):
        return make(not value, not value, 7, None)
    if isinstance(value, int):
        return make(make(*NUMBERS), make(*NUMBERS), value + 1, value - 1, -value, None, 2.5)
    if isinstance(value, float):
        return make(float("nan"), -1.0, 0.0, 1e30, 2, None)
    if isinstance(value, str):
        return make(*ACTIVATIONS, "", "mish", "RELU", "relu\0", "x" * 10_000, "é", 3)
    if isinstance(value, torch.dtype):
        return make(*DTYPES)
    return make(make.tensor([3]), 0, 1, -1, 2**63 - 1, make.tensor([2], torch.int8), make.tensor([]), "none")


LEGAL: dict[str, Callable[[Maker], list[Any]]] = {
    f.__name__: f
    for f in (
        *(fake_quantize, fake_quantize_backward, fake_quantize_multi, fake_quantize_multi_backward, mean_abs),
        *(pack, unpack, quantize, dequantize_packed, packed_conv2d, packed_conv2d_int8, packed_gemv),
        *(packed_panels, packed_network),
    )
}


def hostile(op: str, number: int, device: str) -> list[Any]:
    """The arguments of one call: of ten one is as it should be, of the others one to three arguments are not."""
    make = Maker(op, number, device)
    args = LEGAL[op](make)
    for _ in range(make(0, 1, 1, 1, 1, 1, 1, 2, 2, 3)):
        at = make.random.randrange(len(args))
        args[at] = changed_value(args[at], make)
    # PyTorch takes numbers and tensors of one for dtypes, and looks up -77 in a table.
    if SCHEMAS[op].count("ScalarType") and not isinstance(args[-1], torch.dtype | str | None):
        args[-1] = make(*DTYPES)
    return args
