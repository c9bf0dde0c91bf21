"""Random tables of `packed_network`: layers one after another, as legal as they are arbitrary."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from packed_oracle import ACTIVATIONS, EXACT
from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_network import Row, table
from qkernels.ops.packed_panels import packed_panels
from qkernels.ops.packing import packed_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.uint8)


class Value(NamedTuple):
    """What a row takes: images [images, channels, height, width] of N a member, or N that all members share."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    shared: bool


class Network:
    """A table in the making.

    Args:
        random: what all follows from.
        most: channels, in each of a few groups.
        exact: nothing of which backends give other bits: exponentials, float convolutions, norms, means, attention.
    """

    def __init__(self, random: random.Random, most: int = 9, exact: bool = False, members: int | None = None) -> None:
        self.random, self.most, self.exact = random, most, exact
        self.members, self.images = members or random.randint(1, 3), random.randint(1, 2)
        self.inputs: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.rows: list[Row] = []
        self.values: list[Value] = []

    def tensor(self, shape, dtype: torch.dtype = torch.float32, positive: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        if not dtype.is_floating_point:
            return torch.randint(*((-128, 128) if dtype.is_signed else (0, 256)), shape, generator=generator).to(dtype)
        values = torch.randn(shape, generator=generator)
        return (values.abs() * 0.02 + 0.005 if positive else values).to(dtype)

    def constant(self, t: Tensor) -> int:
        self.constants.append(t)
        return len(self.constants) - 1

    def _value(self, dtype: torch.dtype, shape, shared: bool = False) -> Value:
        self.values.append(Value(len(self.values), dtype, tuple(shape), shared))
        return self.values[-1]

    def input(self, dtype: torch.dtype | None = None, shape=None, shared: bool | None = None) -> Value:
        dtype = dtype or self.random.choice((*FLOATS, *CODES))
        shared = self.random.random() < 0.5 if shared is None else shared
        images = self.images * (1 if shared else self.members)
        channels = self.random.choice((1, 2, 3, 4, 6, self.most))
        shape = shape or (images, channels, self.random.randint(1, 9), self.random.randint(1, 9))
        x = self.tensor(shape, dtype)
        self.inputs.append(x.contiguous(memory_format=torch.channels_last) if self.random.random() < 0.5 else x)
        return self._value(dtype, shape, shared)

    def quantize(self, x: Value) -> Value:
        """With the scales of all members, or if they share x perhaps with one."""
        members = self.random.choice((1, self.members)) if x.shared else self.members
        dtype = self.random.choice(CODES)
        shape = (x.shape[0] * (members if x.shared else 1), *x.shape[1:])
        y = self._value(dtype, shape, x.shared and members == 1)
        scale = self.constant(self.tensor([members], positive=True))
        ranges = {torch.int8: ((-128, 127), (-8, 7), (3, 9)), torch.uint8: ((0, 255), (0, 15), (3, 9))}
        limits = self.random.choice(ranges[dtype])
        self.rows.append(
            Row("quantize", x.number, y.number, dtype, shape, members=members, code_range=limits, out_scale=scale)
        )
        return y

    def _window(self, x: Value) -> Geometry:
        choose = self.random.randint
        groups = self.random.choice([1, 1, x.shape[1], *(g for g in (2, 3) if x.shape[1] % g == 0)])
        kernel, stride, dilation = ((choose(1, 3), choose(1, 3 if i == 0 else 2)) for i in range(3))
        return Geometry(kernel, stride, tuple(choose(0, 4) for _ in range(4)), dilation, groups)

    def _size(self, x: Value, geometry: Geometry) -> tuple[int, int]:
        """Of the result; at times less than there is room for."""
        size = geometry.output_size(*x.shape[2:])
        return tuple(self.random.choice((n, n, n, self.random.randint(1, n))) for n in size)  # type: ignore[return-value]

    def pool(self, x: Value) -> Value:
        kernel = (self.random.randint(1, 3), self.random.randint(1, 3))
        padding = tuple(self.random.randint(0, k - 1) for k in (*kernel, *kernel))
        g = Geometry(kernel, (self.random.randint(1, 3), self.random.randint(1, 3)), padding)
        if any(n + a + b < k for n, a, b, k in zip(x.shape[2:], padding, padding[2:], kernel, strict=False)):
            g = Geometry()
        shape = (*x.shape[:2], *self._size(x, g))
        y = self._value(x.dtype, shape, x.shared)
        window = (*g.kernel, *g.stride, *g.padding, *g.dilation, g.groups)
        self.rows.append(Row("max_pool", x.number, y.number, x.dtype, shape, images_of_member=shape[0], window=window))
        return y

    def _residual(self, shape) -> Value | None:
        return self.random.choice([None, *(v for v in self.values if v.shape == shape and not v.shared)])

    def convolve(self, x: Value, geometry: Geometry | None = None, channels: int | None = None) -> Value:
        g = geometry or self._window(x)
        reach = [d * (k - 1) for d, k in zip(g.dilation, g.kernel, strict=True)]
        if any(n + a + b <= r for n, a, b, r in zip(x.shape[2:], g.padding, g.padding[2:], reach, strict=False)):
            g = Geometry(groups=g.groups)
        channels = channels or g.groups * self.random.randint(1, self.random.choice((2, self.most)))
        images = x.shape[0] if x.shared else x.shape[0] // self.members
        shape = (images * self.members, channels, *self._size(x, g))
        codes = x.dtype in CODES
        residual = self._residual(shape)
        dtype = self.random.choice((*FLOATS, *CODES)) if codes else x.dtype
        if residual is not None and not codes and residual.dtype != x.dtype:
            residual = None
        has_codes = residual is not None and residual.dtype in CODES
        bits = [self.random.choice((4, 7, self.random.randint(2, 8))) for _ in range(self.members)]
        count = torch.Size(g.weight_shape(channels, x.shape[1])).numel()
        byte, starts = self.random.choice((0, 3)), []
        for b in bits:
            starts.append(byte)
            byte += packed_bytes(count, b)
        scales, each = torch.float32, [self.members]
        y = self._value(dtype, shape)
        shared_fields = dict(
            residual=-1 if residual is None else residual.number,
            images_of_member=images,
            shared=x.shared,
            window=(*g.kernel, *g.stride, *g.padding, *g.dilation, g.groups),
            activation=self.random.choice(EXACT if self.exact else ACTIVATIONS),
            code_range=(-128, 127) if dtype == torch.int8 else (0, 255),
            packed=self.constant(self.tensor([byte + 1], torch.uint8)),
            scale=self.constant(self.tensor([self.members, channels], scales, True)),
            bias=self.random.choice((-1, self.constant(self.tensor([self.members, channels])))),
            x_scale=self.constant(self.tensor(each, scales, True)) if codes else -1,
            residual_scale=self.constant(self.tensor(each, scales, True)) if has_codes else -1,
            out_scale=self.constant(self.tensor(each, scales, True)) if dtype in CODES else -1,
        )
        runs = [m for m in range(self.members) if m == 0 or bits[m] != bits[m - 1]]
        if codes and self.random.random() < 0.3:
            shared_fields["panels"] = self._panels(shared_fields["packed"], bits, starts, channels, x.shape[1], g)
        for part, (begin, end) in enumerate(zip(runs, [*runs[1:], self.members], strict=True)):
            place = dict(part=part, first=begin * images, members=end - begin, member=begin)
            place |= dict(bits=bits[begin], byte=starts[begin])
            self.rows.append(Row("convolve", x.number, y.number, dtype, shape, **place, **shared_fields))
        return y

    def _one_row(self, kind: str, x: Value, shape, **fields) -> Value:
        y = self._value(x.dtype, shape, x.shared)
        self.rows.append(Row(kind, x.number, y.number, x.dtype, shape, **fields))
        return y

    def mean(self, x: Value) -> Value:
        return self._one_row("mean", x, (*x.shape[:2], 1, 1))

    def gate(self, x: Value) -> Value:
        factors = self.input(torch.float32, (*x.shape[:2], 1, 1), x.shared)
        return self._one_row("gate", x, x.shape, residual=factors.number)

    def norm(self, x: Value) -> Value:
        members = 1 if x.shared else self.members
        weight, bias = (self.constant(self.tensor([members, x.shape[1]])) for _ in range(2))
        eps = self.constant(torch.tensor([self.random.choice((1e-5, 1e-6, 0.1))]))
        return self._one_row("norm", x, x.shape, members=members, scale=weight, bias=bias, x_scale=eps)

    def attend(self, x: Value) -> Value:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        tokens = self.random.choice([n for n in (1, x.shape[2] * x.shape[3], pixels) if pixels % n == 0])
        heads = self.random.choice([n for n in (1, 2, 3) if n <= x.shape[1]])
        channels = heads * self.random.randint(1, x.shape[1] // heads)
        starts = {name: self.random.randint(0, x.shape[1] - channels) for name in ("query", "key", "value")}
        scale = self.constant(torch.tensor([self.random.choice((1.0, 0.125, -0.5))]))
        shape = (x.shape[0], channels, *x.shape[2:])
        return self._one_row("attend", x, shape, heads=heads, tokens=tokens, scale=scale, **starts)

    def _panels(
        self, packed: int, bits: list[int], starts: list[int], channels: int, in_channels: int, g: Geometry
    ) -> int:
        """The weights unpacked: of all members, or what is none of theirs and not taken."""
        if self.random.random() < 0.2:
            return self.constant(self.tensor([self.members, self.random.choice((0, 64, 1000))], torch.uint8))
        depth = in_channels // g.groups
        count = channels * depth * g.kernel[0] * g.kernel[1]
        parts = [
            packed_panels(
                self.constants[packed][start:][None, : packed_bytes(count, b)],
                *(channels, depth, b, g.kernel, g.dilation, g.groups),
            )
            for b, start in zip(bits, starts, strict=True)
        ]
        return self.constant(torch.cat(parts))

    def step(self, x: Value) -> Value:
        if x.dtype == torch.float32 and self.random.random() < 0.3:
            made = not self.values[-1].number < len(self.inputs)  # then there are no more inputs
            kinds = [] if self.exact else [self.mean, self.norm, self.attend]
            kinds += [] if made else [self.gate]
            if kinds:
                return self.random.choice(kinds)(x)
        if x.dtype in FLOATS and (self.exact or self.random.random() < 0.5):
            return self.quantize(x)
        return self.pool(x) if x.dtype in CODES and self.random.random() < 0.3 else self.convolve(x)

    def arguments(self) -> list:
        """Of the op."""
        return [self.inputs, self.constants, table(self.rows), list(self.values[-1].shape), self.values[-1].dtype]


def random_network(number: int, steps: int | None = None, **settings) -> Network:
    """One of `steps` layers, each taking an earlier result."""
    choose = random.Random(f"network/{number}")
    network = Network(choose, **settings)
    for _ in range(choose.randint(1, 2)):
        network.input()
    x = network.values[-1]
    for _ in range(steps or choose.randint(1, 5)):
        x = network.step(network.random.choice((x, x, x, *network.values)))
    return network
