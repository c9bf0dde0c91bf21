"""Packed convolutions of ResNet-50's shapes, and the packed matrix-vector product, for five members."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qkernels import backends
from qkernels.ops import reference
from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_conv2d import packed_conv2d, packed_conv2d_int8
from qkernels.ops.packed_gemv import packed_gemv
from qkernels.ops.packed_network import Row, packed_network, table
from qkernels.ops.packed_panels import packed_panels
from qkernels.ops.packing import dequantize_packed, pack

from . import peers
from .contest import Absent, Contest, Work
from .costs import dtype_name

MEMBERS, BITS = 5, 7
OURS = "packed, integer"
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
TORCHAO_ROUNDING = 2e-2  # it finds a scale of its own for weights that were quantized before
ONE_CODE = 1.5 / 255  # PyTorch's op rounds its multipliers


class Shape(NamedTuple):
    """A convolution without bias of ResNet-50, of images that are `pixels` high and wide."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    pixels: int

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.inputs}>{self.outputs} {self.kernel}x{self.kernel}{stride} at {self.pixels}"

    @property
    def geometry(self) -> Geometry:
        return Geometry((self.kernel,) * 2, (self.stride,) * 2, (self.kernel // 2,) * 4)


def resnet50_shapes() -> list[Shape]:
    """The distinct convolutions of ResNet-50 at 224x224 (with stride in the 3x3 ones, as timm has it)."""
    shapes = [Shape(3, 64, 7, 2, 224)]
    inputs, pixels = 64, 56
    for stage, width in enumerate((64, 128, 256, 512)):
        stride = 1 if stage == 0 else 2
        small = pixels // stride
        shapes += [
            Shape(inputs, width, 1, 1, pixels),
            Shape(width, width, 3, stride, pixels),
            Shape(width, 4 * width, 1, 1, small),
            Shape(inputs, 4 * width, 1, stride, pixels),
            Shape(4 * width, width, 1, 1, small),
            Shape(width, width, 3, 1, small),
        ]
        inputs, pixels = 4 * width, small
    return list(dict.fromkeys(shapes))


QUICK = [Shape(64, 64, 3, 1, 56), Shape(256, 1024, 1, 1, 14), Shape(512, 512, 3, 1, 7)]
SHAPES = [(shape, ()) for shape in QUICK] + [(s, pytest.mark.full) for s in resnet50_shapes() if s not in QUICK]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.full), 8])
@pytest.mark.parametrize("shape", [pytest.param(s, marks=m, id=str(s).replace(" ", "-")) for s, m in SHAPES])
def bench_packed_conv(contest: Contest, device: str, shape: Shape, batch: int) -> None:
    """Packed convolutions of five members

    Seven-bit weights, each member on images of its own. Weight-only: float activations in and out. Integer: int8
    codes in and out. Ratios are times over the integer path. The floats are PyTorch's own convolutions in
    channels_last, member by member.
    """
    with torch.no_grad():
        convolutions(contest, device, shape, batch)


class Inputs(NamedTuple):
    """What the integer path takes: codes of the images and packed codes of the weights."""

    x: Tensor  # uint8 [M * batch, inputs, pixels, pixels]
    packed: Tensor


def convolutions(contest: Contest, device: str, shape: Shape, batch: int) -> None:
    contest.parameters = f"{shape}, batch {batch}"
    count = torch.Size(shape.geometry.weight_shape(shape.outputs, shape.inputs)).numel()
    contest.size = 2 * MEMBERS * batch * count * (shape.pixels // shape.stride) ** 2

    def inputs() -> Inputs:
        images = (MEMBERS * batch, shape.inputs, shape.pixels, shape.pixels)
        x = torch.randint(0, 256, images, dtype=torch.uint8, device=device)
        codes = torch.randint(-64, 64, (MEMBERS, count), dtype=torch.int8, device=device)
        packed = torch.stack([pack(member, BITS) for member in codes])
        return Inputs(x.contiguous(memory_format=torch.channels_last), packed)

    sets = contest.rotate(inputs)
    scale = torch.rand(MEMBERS, shape.outputs, device=device) * 0.01 + 0.005
    x_scale = torch.full((MEMBERS,), 1 / 64, device=device)
    out_scale = torch.full((MEMBERS,), float(shape.inputs * shape.kernel**2) ** 0.5 / 16, device=device)

    def integer(i: int) -> Tensor:
        x, packed = sets[i]
        return packed_conv2d_int8(
            x, x_scale, packed, scale, None, BITS, shape.geometry, out_scale=out_scale, out_dtype=torch.uint8
        )

    def weight_only(i: int) -> Tensor:
        return packed_conv2d(images[i], sets[i].packed, scale, None, BITS, shape.geometry)

    x, packed = sets[0]
    rest: Any = (BITS, *shape.geometry.arguments, False, "none")
    codes = reference.packed_conv2d_int8(
        x, x_scale, packed, scale, None, None, None, out_scale, *rest, 0, 255, torch.uint8
    )
    contest.ours(OURS, integer, codes, tolerance=0)
    own, low = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16, torch.float16)
    images = [s.x.to(own).div_(64) for s in sets]
    y = reference.packed_conv2d(images[0], packed, scale, None, None, *rest)
    contest.ours("packed, weight-only", weight_only, y, ROUNDING[own])
    weights = [dequantize_packed(s.packed, scale, BITS, count) for s in sets]
    for dtype in (torch.float32, low):
        make = partial(floats, shape, images, weights, dtype)
        contest.peer(
            f"float convolutions, {dtype_name(dtype)}", make, y.chunk(MEMBERS), max(ROUNDING[dtype], ROUNDING[own])
        )
    make = partial(pytorch_int8, shape, sets, weights, scale, out_scale)
    contest.peer("int8 convolutions of PyTorch", make, codes.chunk(MEMBERS), ONE_CODE)
    contest.measure(base=OURS)


CALLS = 1000


def bench_packed_conv2d_call(contest: Contest, device: str) -> None:
    """A call of packed_conv2d

    One pixel, one channel in, four out: what is left is Python, the dispatcher and the checks. Times are of one call,
    ratios over the function that users call. The op is called through autograd and below it, as the function does when
    no gradient is wanted.
    """
    contest.parameters, contest.sets, contest.graphs = "1 pixel", CALLS, False
    geometry = Geometry((1, 1))
    x, scale = torch.randn(1, 1, 1, 1, device=device), torch.ones(1, 4, device=device)
    packed = pack(torch.ones(4, dtype=torch.int8, device=device), BITS)[None]
    arguments: Any = (x, packed, scale, None, None, BITS, *geometry.arguments, False, "none")
    expected = x.expand(1, 4, 1, 1)
    weight = torch.ones(4, 1, 1, 1, device=device)
    op = torch.ops.qkernels.packed_conv2d.default

    def below_autograd(i: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    with torch.no_grad():
        contest.ours("packed_conv2d", lambda i: packed_conv2d(x, packed, scale, None, BITS, geometry), expected)
        contest.ours("the op", lambda i: op(*arguments), expected)
        contest.ours("the op below autograd", below_autograd, expected)
        contest.peer("F.conv2d", lambda: lambda i: F.conv2d(x, weight), expected)
        contest.measure(base="packed_conv2d")


def bench_packed_network(contest: Contest, device: str) -> None:
    """Pointwise convolutions one after another, in one call and in one call each

    Eight of 64 channels on images of 7x7, five members, codes all the way: as small as the last layers of networks are.
    Ratios are over the one call. The op is made for CPUs; weights may be unpacked before it.
    """
    layers, channels, pixels = 8, 64, 7
    contest.parameters, contest.sets, contest.graphs = f"{layers} layers", 50, False
    shape, geometry = (MEMBERS, channels, pixels, pixels), Geometry((1, 1))
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
    codes = torch.randint(-64, 64, (MEMBERS, channels * channels), dtype=torch.int8, device=device)
    packed = torch.stack([pack(c, BITS) for c in codes])
    scale, by_member = torch.full((MEMBERS, channels), 1e-2, device=device), torch.full((MEMBERS,), 0.5, device=device)
    fields: Any = dict(members=MEMBERS, bits=BITS, packed=0, scale=1, x_scale=2, out_scale=2)
    rows = [Row("convolve", i, i + 1, torch.uint8, shape, **fields) for i in range(layers)]
    constants, steps = [packed.flatten(), scale, by_member], table(rows)
    panels = packed_panels(packed, channels, channels, BITS, (1, 1), (1, 1), 1)
    with_panels = table([row._replace(panels=len(constants)) for row in rows])

    def at_once(i: int) -> Tensor:
        return packed_network([x], constants, steps, shape, torch.uint8)

    def unpacked(i: int) -> Tensor:
        return packed_network([x], [*constants, panels], with_panels, shape, torch.uint8)

    def one_by_one(i: int) -> Tensor:
        y = x
        for _ in range(layers):
            y = packed_conv2d_int8(
                y, by_member, packed, scale, None, BITS, geometry, out_scale=by_member, out_dtype=torch.uint8
            )
        return y

    expected = reference.packed_network([x], constants, steps, list(shape), torch.uint8)
    with torch.no_grad():
        contest.ours("one call", at_once, expected, tolerance=0)
        contest.ours("one call, weights unpacked", unpacked, expected, tolerance=0)
        contest.ours("a call each", one_by_one, expected, tolerance=0)
        contest.measure(base="one call")


def by_channels_last(weights: Tensor, shape: Shape) -> Tensor:
    """[M, outputs, h * w * inputs] as [M, outputs, inputs, h, w], the inputs next to each other in memory."""
    return weights.view(MEMBERS, *shape.geometry.weight_shape(shape.outputs, shape.inputs)).permute(0, 1, 4, 2, 3)


def floats(shape: Shape, images: list[Tensor], weights: list[Tensor], dtype: torch.dtype) -> Work:
    if images[0].device.type == "cpu" and dtype == torch.bfloat16:
        peers.require_bfloat16()
    xs = [x.to(dtype).chunk(MEMBERS) for x in images]
    ws = [by_channels_last(w.to(dtype), shape) for w in weights]

    def work(i: int) -> list[Tensor]:
        padding = shape.kernel // 2
        return [F.conv2d(x, w, stride=shape.stride, padding=padding) for x, w in zip(xs[i], ws[i], strict=True)]

    return work


def pytorch_int8(shape: Shape, sets: list[Inputs], weights: list[Tensor], scale: Tensor, out_scale: Tensor) -> Work:
    """PyTorch's quantized convolution, which runs oneDNN's; codes in and out."""
    if scale.device.type != "cpu":
        raise Absent("PyTorch has no int8 convolution for GPUs")
    padding, stride = [shape.kernel // 2] * 2, [shape.stride] * 2
    zeros = torch.zeros(shape.outputs, dtype=torch.int64)

    def prepared(weight: Tensor, weight_scale: Tensor) -> Any:
        quantized = torch.quantize_per_channel(weight, weight_scale.double(), zeros, 0, torch.qint8)
        return torch.ops.quantized.conv2d_prepack(quantized, None, stride, padding, [1, 1], 1)

    ws = [[prepared(w, s) for w, s in zip(by_channels_last(weight, shape), scale, strict=True)] for weight in weights]
    xs = [[torch._make_per_tensor_quantized_tensor(x, 1 / 64, 0) for x in s.x.chunk(MEMBERS)] for s in sets]
    one_scale = out_scale[0].item()

    def work(i: int) -> list[Tensor]:
        return [torch.ops.quantized.conv2d(x, w, one_scale, 0) for x, w in zip(xs[i], ws[i], strict=True)]

    return work


LINEAR = {"2048>1000": (2048, 1000), "4096>4096": (4096, 4096), "8192>8192": (8192, 8192)}
full, gpu = pytest.mark.full, pytest.mark.gpu
LAYERS = ["2048>1000", pytest.param("4096>4096", marks=full), pytest.param("8192>8192", marks=[full, gpu])]
WIDTHS = [BITS, *(pytest.param(bits, marks=[full, gpu]) for bits in (2, 3, 4, 5, 6, 8))]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=full)], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("bits", WIDTHS, ids=lambda bits: f"bits{bits}")
def bench_packed_gemv(contest: Contest, device: str, layer: str, rows: int, bits: int) -> None:
    """Packed matrix-vector product of five members

    Seven-bit weights where no other number stands, each member with rows of its own; float32 on a CPU, float16 on a
    GPU. Ratios are times over ours. Target on an H200: at least 80 % of the bandwidth at one row.
    """
    inputs, outputs = LINEAR[layer]
    dtype = torch.float32 if device == "cpu" else torch.float16
    count = inputs * outputs
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    contest.parameters = f"{layer}, {rows} row{'s' * (rows > 1)}" + f", {bits} bit" * (bits != BITS)
    contest.size = count * MEMBERS
    scale = torch.rand(MEMBERS, outputs, device=device) * 0.01 + 0.005

    def make() -> tuple[Tensor, Tensor]:
        codes = torch.randint(low, high, (MEMBERS, count), dtype=torch.int8, device=device)
        x = torch.randn(MEMBERS * rows, inputs, device=device).to(dtype)
        return x, torch.stack([pack(member, bits) for member in codes])

    sets = contest.rotate(make)
    weights = [dequantize_packed(packed, scale, bits, count, dtype) for _, packed in sets]
    x, packed = sets[0]
    expected = reference.packed_gemv(x, packed, scale, None, bits, False, "none")

    def ours(i: int) -> Tensor:
        x, packed = sets[i]
        return packed_gemv(x, packed, scale, None, bits)

    def in_turn(i: int) -> Tensor:
        xs = sets[i][0].chunk(MEMBERS)
        return torch.cat([F.linear(x, w) for x, w in zip(xs, weights[i], strict=True)])

    def torchao() -> Work:
        of_sets = [peers.torchao_int8(weight) for weight in weights]
        return lambda i: of_sets[i](sets[i][0])

    def batched(i: int) -> Tensor:
        return torch.bmm(sets[i][0].view(MEMBERS, rows, -1), weights[i].mT).flatten(0, 1)

    def in_triton(i: int) -> Tensor:
        x, packed = sets[i]
        return backends.implementation("packed_gemv", "triton")(x, packed, scale, None, bits, False, "none")

    contest.ours("packed_gemv", ours, expected, ROUNDING[dtype])
    if device == "cuda":
        contest.peer(peers.TRITON, lambda: in_triton, expected, ROUNDING[dtype])
    contest.peer("linear layers in turn", lambda: in_turn, expected, ROUNDING[dtype])
    contest.peer("torch.bmm", lambda: batched, expected, ROUNDING[dtype])
    contest.peer("torchao int8, in turn", torchao, expected, TORCHAO_ROUNDING)
    contest.measure(base="packed_gemv")
