"""The packed ops on a GPU, in every backend that has them, against the reference in float64; without a GPU, what needs
none of the C++/CUDA kernels emulated.

Larger shapes than Triton's interpreter can run, races, streams, CUDA graphs and torch.compile;
tests/qkernels/ops/test_packed_convolutions.py holds the same kernels to a strict bound on small shapes.
"""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from on_gpu import DEVICE, assert_equal, assert_near, captured, needs_gpu, random_codes, unaligned
from packed_oracle import ACTIVATIONS, INEXACT
from qkernels import backends
from qkernels.ops import reference
from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_conv2d import packed_conv2d, packed_conv2d_int8
from qkernels.ops.packed_gemv import packed_gemv
from qkernels.ops.packing import pack, packed_bytes, quantize, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REPEATS = 20


def in_triton(op):
    return backends.implementation(op, "triton")


def needs_triton_convolutions():
    pytest.importorskip("triton")


# packed_gemv


class Linear(NamedTuple):
    """Arguments of packed_gemv in its order."""

    x: Tensor
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    bits: int
    shared: bool
    activation: str


def random_linear(
    bits, members, rows, in_features, out_features, dtype=torch.float32, shared=False, activation="none", bias=True
) -> Linear:
    count = out_features * in_features
    return Linear(
        torch.randn(rows * (1 if shared else members), in_features, device=DEVICE).to(dtype),
        random_codes((members, packed_bytes(count, bits)), torch.uint8),
        torch.rand(members, out_features, device=DEVICE) / (2**bits * in_features**0.5),
        torch.randn(members, out_features, device=DEVICE) if bias else None,
        bits,
        shared,
        activation,
    )


def check_gemv(backend, linear: Linear) -> None:
    exact = reference.packed_gemv(linear.x.double(), *linear[1:])
    y = backend("packed_gemv")(*linear)
    assert y.dtype == linear.x.dtype and y.is_contiguous()
    assert_near(y, exact)


def bits_and_dtypes():
    """All pairs on a GPU; each of both on the emulated one."""
    return [(bits, t) for bits in range(2, 9) for t in DTYPES if DEVICE == "cuda" or t == DTYPES[bits % 3]]


@pytest.mark.parametrize(("bits", "dtype"), bits_and_dtypes(), ids=str)
def test_gemv(backend, bits, dtype):
    large = ((5, 1, 2048, 2048), (5, 8, 2048, 512), (2, 3, 1280, 1000), (1, 1, 8192, 4096))
    for sizes in ((3, 2, 576, 200), (2, 17, 1100, 40), *(large if DEVICE == "cuda" else ())):
        check_gemv(backend, random_linear(bits, *sizes, dtype))


def test_gemv_on_random_shapes(backend):
    choose = random.Random(0)
    rounds, most, most_rows = (100, 3000, 70) if DEVICE == "cuda" else (5, 130, 20)
    for _ in range(rounds):
        in_chunks = 32 * choose.randint(1, most // 32)
        in_features = choose.choice([choose.randint(1, 40), choose.randint(1, most), in_chunks])
        linear = random_linear(
            choose.randint(2, 8),
            choose.randint(1, 6),
            choose.choice([1, 1, 2, choose.randint(1, 9), choose.randint(1, most_rows)]),
            in_features,
            choose.choice([choose.randint(1, 40), choose.randint(1, most)]),
            choose.choice(DTYPES),
            choose.random() < 0.5,
            choose.choice(ACTIVATIONS),
            choose.random() < 0.7,
        )
        check_gemv(backend, linear)
        check_gemv(backend, linear._replace(x=unaligned(linear.x), packed=unaligned(linear.packed)))


def test_gemv_with_nan_and_infinity(backend):
    linear = random_linear(4, 1, 3, 300, 8)
    linear.x[0, 7], linear.x[1, 299] = torch.nan, torch.inf
    codes = unpack(linear.packed, 4, (8, 300))
    y = backend("packed_gemv")(*linear)
    assert y[0].isnan().all() and y[2].isfinite().all()
    at_infinity = codes[0, :, 299].float()
    assert torch.equal(y[1].isnan(), at_infinity == 0)
    assert torch.equal(y[1][at_infinity != 0], torch.inf * at_infinity[at_infinity != 0].sign())


@pytest.mark.parametrize(
    "backend", ["cuda" if DEVICE == "cuda" else pytest.param("emulated", marks=pytest.mark.slow)], indirect=True
)
def test_a_row_does_not_depend_on_its_neighbors(backend):
    """In C++/CUDA; Triton may sum in another order for another number of rows."""
    linear = random_linear(7, 2, 9, 1000, 300, torch.bfloat16, shared=True)
    together = backend("packed_gemv")(*linear).view(2, 9, 300)
    for n in range(9):
        alone = backend("packed_gemv")(*linear._replace(x=linear.x[n : n + 1]))
        assert torch.equal(alone, together[:, n])


# packed_conv2d, packed_conv2d_int8: Triton's


class Convolution(NamedTuple):
    """What both convolutions take, x apart, and the shape of their result."""

    images: int
    in_shape: tuple[int, int, int]
    members: int
    out_channels: int
    bits: int
    geometry: Geometry
    shared: bool = False
    activation: str = "none"

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.images * (1 if self.shared else self.members), *self.in_shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.images * self.members, self.out_channels, *self.geometry.output_size(*self.in_shape[1:]))

    @property
    def depth(self) -> int:
        _, h, w, channels = self.geometry.weight_shape(self.out_channels, self.in_shape[0])
        return h * w * channels

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """packed, scale, bias"""
        nbytes = packed_bytes(self.out_channels * self.depth, self.bits)
        shape = (self.members, self.out_channels)
        scale = torch.rand(shape, device=DEVICE) / (2**self.bits * self.depth**0.5)
        return random_codes((self.members, nbytes), torch.uint8), scale, torch.randn(shape, device=DEVICE)


RESNET = [  # (in_shape, out_channels, geometry) of ResNet-50 at 224 x 224, and a depthwise and a grouped one
    ((3, 224, 224), 64, Geometry((7, 7), (2, 2), (3, 3, 3, 3))),
    ((64, 56, 56), 64, Geometry((3, 3), (1, 1), (1, 1, 1, 1))),
    ((64, 56, 56), 256, Geometry()),
    ((256, 56, 56), 512, Geometry((1, 1), (2, 2))),
    ((128, 56, 56), 128, Geometry((3, 3), (2, 2), (1, 1, 1, 1))),
    ((512, 7, 7), 512, Geometry((3, 3), (1, 1), (1, 1, 1, 1))),
    ((2048, 7, 7), 512, Geometry()),
    ((2048, 1, 1), 7, Geometry()),
    ((144, 28, 28), 144, Geometry((5, 5), (2, 2), (1, 1, 2, 2), groups=144)),
    ((96, 14, 14), 120, Geometry((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), groups=3)),
]
OTHERS = [  # odd channels, sizes, strides and padding
    ((5, 9, 1), 3, Geometry((3, 1), (2, 1), (0, 0, 1, 0))),
    ((33, 17, 19), 65, Geometry((2, 5), (1, 2), (1, 3, 0, 1), (1, 2))),
    ((1, 1, 1), 1, Geometry()),
    ((7, 30, 31), 14, Geometry((3, 3), (1, 1), (1, 1, 1, 1), groups=7)),
]


def convolutions():
    choose = random.Random(1)
    for i, (in_shape, out_channels, geometry) in enumerate(RESNET + OTHERS):
        bits, members = 2 + i % 7, choose.choice([1, 2, 5])
        shared, activation = choose.random() < 0.5, choose.choice(ACTIVATIONS)
        yield Convolution(choose.choice([1, 4]), in_shape, members, out_channels, bits, geometry, shared, activation)


def exactly(function, *args: Any) -> Tensor:
    """The reference on the GPU without cuDNN, whose fast convolutions do not add integers in float64 exactly."""
    with torch.backends.cudnn.flags(enabled=False):
        return function(*args)


@needs_gpu
@pytest.mark.parametrize("c", list(convolutions()), ids=lambda c: f"{c.in_shape}-{c.out_channels}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_conv2d(c, dtype):
    needs_triton_convolutions()
    packed, scale, bias = c.weights()
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for shape in (c.x_shape, c.out_shape))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        arguments = (packed, scale, bias, residual.contiguous(memory_format=memory_format), c.bits)
        rest = (*c.geometry.arguments, c.shared, c.activation)
        y = in_triton("packed_conv2d")(x.contiguous(memory_format=memory_format), *arguments, *rest)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        wide = (packed, scale, bias, residual.double(), c.bits)
        assert_near(y, exactly(reference.packed_conv2d, x.double(), *wide, *rest))


def int8_arguments(c: Convolution, x_dtype, residual_dtype, out_dtype) -> tuple[Any, ...]:
    """Arguments of packed_conv2d_int8 whose results spread over the codes."""
    packed, scale, bias = c.weights()
    x_scale, residual_scale, out_scale = torch.rand(3, c.members, device=DEVICE) * 0.05 + 0.01
    if residual_dtype in (torch.int8, torch.uint8):
        residual = random_codes(c.out_shape, residual_dtype)
    else:
        residual = None if residual_dtype is None else torch.randn(c.out_shape, device=DEVICE).to(residual_dtype)
        residual_scale = None
    if out_dtype not in (torch.int8, torch.uint8):
        out_scale = None
    low, high = (-128, 127) if out_dtype == torch.int8 else (0, 255)
    tensors = (random_codes(c.x_shape, x_dtype), x_scale, packed, scale, bias, residual, residual_scale, out_scale)
    return (*tensors, c.bits, *c.geometry.arguments, c.shared, c.activation, low, high, out_dtype)


@needs_gpu
@pytest.mark.parametrize("c", list(convolutions()), ids=lambda c: f"{c.in_shape}-{c.out_channels}")
def test_packed_conv2d_int8(c):
    """Bit for bit, exponentials within one code or a few roundings."""
    needs_triton_convolutions()
    for types in (
        (torch.uint8, torch.uint8, torch.uint8),
        (torch.int8, None, torch.int8),
        (torch.uint8, torch.float32, torch.float32),
        (torch.int8, torch.bfloat16, torch.bfloat16),
    ):
        arguments = int8_arguments(c, *types)
        y = in_triton("packed_conv2d_int8")(*arguments)
        expected = exactly(reference.packed_conv2d_int8, *arguments)
        assert y.is_contiguous(memory_format=torch.channels_last)
        if c.activation not in INEXACT:
            assert_equal(y, expected)
        elif types[2].is_floating_point:
            unit = 16 * 2**-24 + torch.finfo(types[2]).eps
            assert ((y.double() - expected.double()).abs() <= unit * expected.double().abs() + 1e-6).all()
        else:
            difference = (y.int() - expected.int()).abs()
            assert difference.max() <= 1 and difference.float().mean() < 1e-3


# Races, streams, graphs, torch.compile: what only a GPU shows

REPEATED = Convolution(2, (256, 14, 14), 5, 256, 7, Geometry((3, 3), (1, 1), (1, 1, 1, 1)), activation="relu")


def repeated_calls():
    """name -> a call of each op that adds something up, or that stages data in shared memory."""
    packed, scale, bias = REPEATED.weights()
    x = torch.randn(REPEATED.x_shape, device=DEVICE, dtype=torch.bfloat16)
    rest = (None, 7, *REPEATED.geometry.arguments, False, "relu")
    codes = int8_arguments(REPEATED, torch.uint8, torch.uint8, torch.uint8)
    small = REPEATED._replace(images=1, in_shape=(512, 7, 7), out_channels=512)  # split over its depth
    few = int8_arguments(small, torch.uint8, None, torch.float32)
    linear = random_linear(7, 5, 8, 2048, 2048)
    return {
        "packed_conv2d": lambda: in_triton("packed_conv2d")(x, packed, scale, bias, *rest),
        "packed_conv2d_int8": lambda: in_triton("packed_conv2d_int8")(*codes),
        "packed_conv2d_int8, small": lambda: in_triton("packed_conv2d_int8")(*few),
        "packed_gemv in Triton": lambda: in_triton("packed_gemv")(*linear),
        "packed_gemv": lambda: torch.ops.qkernels.packed_gemv.default(*linear),
    }


@needs_gpu
def test_every_run_gives_the_same_bits():
    needs_triton_convolutions()
    for name, call in repeated_calls().items():
        first = call().clone()
        for _ in range(REPEATS):
            assert torch.equal(call(), first), name


@needs_gpu
def test_runs_on_the_current_stream():
    needs_triton_convolutions()
    linear = random_linear(7, 2, 4, 512, 512)
    arguments = list(int8_arguments(REPEATED, torch.uint8, None, torch.uint8))
    host_x, host_codes = torch.randn(linear.x.shape), arguments[0].cpu()
    expected = [
        torch.ops.qkernels.packed_gemv.default(*linear._replace(x=host_x.to(DEVICE))),
        torch.ops.qkernels.packed_conv2d_int8.default(*arguments),
        reference.quantize(host_x, torch.tensor(0.01), -128, 127, None),
    ]
    linear.x.zero_()
    arguments[0] = torch.zeros_like(arguments[0])
    scale = torch.tensor(0.01, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on any other stream would read x before it is written
        linear.x.copy_(host_x)
        arguments[0].copy_(host_codes)
        y = torch.ops.qkernels.packed_gemv.default(*linear)
        z = torch.ops.qkernels.packed_conv2d_int8.default(*arguments)
        codes = torch.ops.qkernels.quantize.default(linear.x, scale, -128, 127, None)
        unpacked = unpack(pack(codes, 8), 8, codes.shape)
    stream.synchronize()
    for actual, want in zip((y, z, codes, unpacked), (*expected, expected[-1]), strict=True):
        assert_equal(actual, want)


@needs_gpu
def test_convolution_and_linear_in_a_cuda_graph():
    needs_triton_convolutions()
    arguments = int8_arguments(REPEATED, torch.uint8, torch.uint8, torch.uint8)
    linear = random_linear(7, 5, 1, 2048, 1000, torch.bfloat16)
    for x, call in (
        (arguments[0], lambda: torch.ops.qkernels.packed_conv2d_int8.default(*arguments)),
        (linear.x, lambda: torch.ops.qkernels.packed_gemv.default(*linear)),
    ):
        graph, result = captured(call)
        for _ in range(3):
            x.random_(0, 100)
            graph.replay()
            assert_equal(result, call())


@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_ops_compiled():
    needs_triton_convolutions()
    c = Convolution(2, (32, 10, 10), 3, 16, 6, Geometry((3, 3), (1, 1), (1, 1, 1, 1)))
    packed, scale, bias = c.weights()
    head = random_linear(5, 3, 2, 16, 7)
    x_scale = torch.full((3,), 0.02, device=DEVICE)

    def network(x):
        y = packed_conv2d(x, packed, scale, bias, c.bits, c.geometry, activation="relu6")
        codes = quantize(y.unflatten(0, (3, 2)), x_scale, 0, 255, axis=0).flatten(0, 1)
        z = packed_conv2d_int8(
            codes, x_scale, head.packed, head.scale, head.bias, head.bits, Geometry(), activation="silu"
        )
        return packed_gemv(y.mean((2, 3)), *head[1:4], head.bits), z

    compiled = torch.compile(network, fullgraph=True)
    for _ in range(2):
        x = torch.randn(c.x_shape, device=DEVICE)
        for actual, expected in zip(compiled(x), network(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
