"""Ratios that must hold on a CPU with AMX, AVX-512 VNNI or AVX2: `python -m benchmarks --gate`.

What is compared runs in one process, in turn, and the ratio is taken within a round; the median of many rounds counts.
So a slow machine slows both sides, and a disturbance spoils a round, not the median. Each bound is less than half of
what was measured on two quiet cores (docs/performance.md), and of the least of three runs beside two busy processes: it
is passed by a kernel that still does what it is there for, and failed by one that lost its vector instructions or fell
back to the reference, which cost a factor, not percents.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import qkernels as qk
from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_conv2d import packed_conv2d_int8
from qkernels.ops.packing import pack, unpack
from qkernels.quantize.quantizers import code_range

from . import machine, peers
from .networks import trained_like
from .timing import quartiles, seconds_of

Pair = tuple[Callable[[], object], Callable[[], object]]  # ours, and the peer
ROUNDS = 31


def weights() -> Pair:
    """fake_quantize_multi of ten weights, forward and backward, against PyTorch's own op."""
    xs = [torch.randn(256, 256, 3, 3, requires_grad=True) for _ in range(10)]
    qmin, qmax = code_range(7)
    scales = [qk.init_scale(x, qmax, 0).requires_grad_() for x in xs]
    upstream = [torch.randn_like(x) for x in xs]

    def run(ys: list[Tensor]) -> object:
        return torch.autograd.grad(ys, [*xs, *scales], upstream)

    def ours() -> object:
        return run(qk.fake_quantize_multi(xs, scales, [qmin] * 10, [qmax] * 10))

    def native() -> object:
        return run([peers.native(x, s, qmin, qmax, 0, 1.0) for x, s in zip(xs, scales, strict=True)])

    return ours, native


def integer_convolution() -> Pair:
    """A packed int8 convolution of five members against five float ones."""
    members, channels, pixels = 5, 256, 14
    x = torch.randint(0, 256, (members * 4, channels, pixels, pixels), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-64, 64, (members, channels, 3, 3, channels), dtype=torch.int8)
    packed = torch.stack([pack(member, 7) for member in weight])
    one, scale, geometry = torch.ones(members), torch.rand(members, channels), Geometry((3, 3), padding=(1, 1, 1, 1))
    images = x.float().chunk(members)
    floats = weight.float().permute(0, 1, 4, 2, 3)

    def ours() -> object:
        return packed_conv2d_int8(x, one, packed, scale, None, 7, geometry, out_scale=one, out_dtype=torch.uint8)

    return ours, lambda: [F.conv2d(i, w, padding=1) for i, w in zip(images, floats, strict=True)]


def depthwise_convolution() -> Pair:
    """The same of depthwise ones."""
    members, channels, pixels = 5, 240, 28
    x = torch.randint(0, 256, (members * 4, channels, pixels, pixels), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-64, 64, (members, channels, 5, 5, 1), dtype=torch.int8)
    packed = torch.stack([pack(member, 7) for member in weight])
    one, scale = torch.ones(members), torch.rand(members, channels)
    geometry = Geometry((5, 5), padding=(2, 2, 2, 2), groups=channels)
    images = x.float().chunk(members)
    floats = weight.float().permute(0, 1, 4, 2, 3)

    def ours() -> object:
        return packed_conv2d_int8(x, one, packed, scale, None, 7, geometry, out_scale=one, out_dtype=torch.uint8)

    return ours, lambda: [F.conv2d(i, w, padding=2, groups=channels) for i, w in zip(images, floats, strict=True)]


def network() -> Pair:
    """A packed ResNet-18 on integers, one image of 64 pixels, against the float model: what a forward costs."""
    model, images = trained_like("resnet18"), torch.randn(1, 3, 64, 64)
    quantized = copy.deepcopy(model)
    qk.quantize_(quantized)
    ensemble = qk.PackedEnsemble.from_models([quantized])
    ensemble.to_integer_([images])
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    return lambda: ensemble(images), torch.no_grad()(lambda: model(images))


def unpacking() -> Pair:
    """Unpacking 7-bit codes against the same in plain PyTorch."""
    packed = pack(torch.randint(-64, 64, (2**21,), dtype=torch.int8), 7)
    return lambda: unpack(packed, 7, (2**21,)), lambda: qk.backends.reference.unpack(packed, 7, 2**21, True)


# By the machine's best instructions, the least ratio of the peer's time to ours.
GATES: dict[str, tuple[Callable[[], Pair], dict[str, float]]] = {
    "fake_quantize_multi against PyTorch's op": (weights, {"AMX": 2.0, "AVX-512 VNNI": 2.0, "AVX2": 2.0}),
    "packed int8 convolution against float": (integer_convolution, {"AMX": 3.0, "AVX-512 VNNI": 1.5, "AVX2": 0.7}),
    "packed int8 depthwise convolution against float": (depthwise_convolution, {"AMX": 0.7}),
    "packed ResNet-18 on one small image against float": (network, {"AMX": 1.2}),
    "unpack against PyTorch ops": (unpacking, {"AMX": 5.0, "AVX-512 VNNI": 5.0, "AVX2": 5.0}),
}


def ratio(pair: Pair) -> float:
    """The median over rounds of the peer's time by ours."""
    ours, peer = pair
    for run in (ours, peer):
        run()
    return quartiles([seconds_of(peer, "cpu") / seconds_of(ours, "cpu") for _ in range(ROUNDS)])[1]


def check() -> list[str]:
    """Print each gate's ratio; returns what failed. On other CPUs there is nothing that must hold."""
    instructions = machine.instructions()
    failed = []
    for name, (make, bounds) in GATES.items():
        if instructions not in bounds:
            print(f"{name}: no ratio is known for this CPU; known are {', '.join(bounds)}")
            continue
        found, least = ratio(make()), bounds[instructions]
        print(f"{name}: {found:.1f}, at least {least}", flush=True)
        if not found >= least:
            failed.append(f"{name}: {found:.2f} < {least}")
    return failed
