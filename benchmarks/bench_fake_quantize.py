"""fake_quantize of single tensors and of all weights of a network: forward, backward and both."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.ops import reference
from qkernels.quantize.quantizers import code_range

from . import peers
from .contest import Contest, Work
from .costs import dtype_name
from .networks import conv_weights

OURS = "fake_quantize"
FLOOR = "copies, same traffic"
BOTH = "forward + backward"
CHANNEL, TENSOR = 0, None
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
PEERS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # their sums for a scale are less careful


def distinct_shapes(network: str) -> list[tuple[int, ...]]:
    return sorted({tuple(w.shape) for w in conv_weights(network)}, key=lambda s: (len(s), torch.Size(s).numel()))


Values = tuple[tuple[int, ...], torch.dtype, int | None, str]  # shape, dtype, axis, passes

QUICK_WEIGHTS = [(64, 64, 1, 1), (256, 256, 3, 3), (512, 512, 3, 3), (1536, 384)]
VARIED = (512, 512, 3, 3)
WEIGHTS: list[Values] = [(shape, torch.float32, CHANNEL, BOTH) for shape in QUICK_WEIGHTS]
MORE_WEIGHTS: list[Values] = [
    (shape, torch.float32, CHANNEL, BOTH)
    for network in ("resnet50", "vit_small_patch16_224")
    for shape in distinct_shapes(network)
    if shape not in QUICK_WEIGHTS
]
MORE_WEIGHTS += [(VARIED, torch.float32, CHANNEL, passes) for passes in ("forward", "backward")]
MORE_WEIGHTS += [(VARIED, torch.float32, TENSOR, passes) for passes in ("forward", "backward", BOTH)]
MORE_WEIGHTS += [(VARIED, torch.bfloat16, axis, BOTH) for axis in (CHANNEL, TENSOR)]


def named(values: Values) -> str:
    shape, dtype, axis, passes = values
    per = "channel" if axis == CHANNEL else "tensor"
    return f"{'x'.join(map(str, shape))}, {dtype_name(dtype)}, per {per}, {passes}"


def parametrize(quick: list[Values], more: list[Values]) -> pytest.MarkDecorator:
    values = [pytest.param(*v, id=named(v)) for v in quick]
    values += [pytest.param(*v, id=named(v), marks=pytest.mark.full) for v in more]
    return pytest.mark.parametrize("shape, dtype, axis, passes", values)


@parametrize(WEIGHTS, MORE_WEIGHTS)
def bench_weight(contest: Contest, shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, passes: str) -> None:
    """fake_quantize of one weight

    Weights of ResNet-50 and ViT-S, 7 bit, scales learned. Ratios are times over ours. The copies move the same bytes
    through PyTorch's copy_ (forward) and add (backward). Of the smallest, [64, 64, 1, 1], the time is what a call
    costs. Target there: native op at least 2.
    """
    single(contest, shape, dtype, axis, passes, code_range(7))


IMAGES = {"cpu": 32, "cuda": 96}
FEATURES: dict[str, list[tuple[int, ...]]] = {  # of one image
    "resnet50": [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)],
    "vit_small": [(197, 384), (197, 1536)],
}
ACTIVATIONS: list[Values] = [((64, 56, 56), torch.float32, TENSOR, BOTH)]
MORE_ACTIVATIONS: list[Values] = [
    (shape, torch.float32, TENSOR, BOTH) for shapes in FEATURES.values() for shape in shapes if shape != (64, 56, 56)
]
MORE_ACTIVATIONS += [((64, 56, 56), torch.float32, TENSOR, passes) for passes in ("forward", "backward")]
MORE_ACTIVATIONS += [(shape, torch.bfloat16, TENSOR, BOTH) for shape in ((64, 56, 56), (256, 56, 56), (197, 1536))]


@pytest.mark.both_allocators
@parametrize(ACTIVATIONS, MORE_ACTIVATIONS)
def bench_activation(
    contest: Contest, device: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, passes: str
) -> None:
    """fake_quantize of activations

    Activations of ResNet-50 (channels_last) and ViT-S behind a ReLU, a batch of 32 on a CPU and of 96 on a GPU, 4 bit
    without sign, one learned scale. Ratios are times over ours. Targets: on a CPU with 2 threads, [32, 64, 56, 56]
    forward + backward at most 1.3 times the copies, which move the same bytes in the same five passes; on a GPU at
    least 85 % of the measured copy bandwidth from 16 M elements on.
    """
    single(contest, (IMAGES[device], *shape), dtype, axis, passes, code_range(4, signed=False))


def single(
    contest: Contest,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axis: int | None,
    passes: str,
    codes: tuple[int, int],
) -> None:
    """Ours, the peers and the copies on tensors of one shape."""
    qmin, qmax = codes
    contest.parameters = named((shape, dtype, axis, passes))
    contest.size = torch.Size(shape).numel()
    factor = (contest.size * qmax) ** -0.5

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(shape, device=contest.device).to(dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if qmin == 0:
            x = x.relu()  # as it is in a network: half of it zeros, whose division can take longer
        scale = qk.init_scale(x, qmax, axis).reshape(-1)
        # PyTorch and the paper differ on the gradient at the very bounds of the range: there it is 0 from the start.
        grad = torch.where(x == qmin, 0, torch.randn_like(x))
        return x.requires_grad_(), scale.requires_grad_(), grad

    sets = contest.rotate(inputs)
    x, scale, grad = (t.detach() for t in sets[0])
    y = reference.fake_quantize(x, scale, None, qmin, qmax, axis, factor, False, dtype)
    grads = reference.fake_quantize_backward(grad, x, scale, None, qmin, qmax, axis, factor, False, True)[:2]
    expected = {"forward": (y,), "backward": grads, BOTH: grads}[passes]

    def work_of(quantize: peers.Quantize) -> Work:
        return passes_of(lambda x, scale: quantize(x, scale, qmin, qmax, axis, factor), sets, passes)

    contest.ours(OURS, work_of(qk.fake_quantize), expected, TOLERANCE[dtype])
    for name, quantize in peers.FAKE_QUANTIZE.items():
        # PyTorch's op decides the edge of the range after rounding, so its gradients are not the paper's.
        right = expected if name != "native op" or passes == "forward" else None
        contest.peer(name, partial(work_of, quantize), right, PEERS_TOLERANCE[dtype])
    if contest.device == "cuda":
        contest.peer(peers.TRITON, lambda: work_of(peers.fake_quantize_in_triton), expected, TOLERANCE[dtype])
    contest.peer(FLOOR, lambda: copies(sets, passes))
    contest.measure(base=OURS)


def passes_of(
    quantize: Callable[[Tensor, Tensor], Tensor], sets: list[tuple[Tensor, Tensor, Tensor]], passes: str
) -> Work:
    """The forward, the backward or both, on input set i."""
    if passes == "forward":
        return lambda i: (quantize(*sets[i][:2]),)
    if passes == BOTH:
        return lambda i: torch.autograd.grad(quantize(*sets[i][:2]), sets[i][:2], sets[i][2])
    ys = [quantize(x, scale) for x, scale, _ in sets]
    return lambda i: torch.autograd.grad(ys[i], sets[i][:2], sets[i][2], retain_graph=True)


def copies(sets: list[tuple[Tensor, Tensor, Tensor]], passes: str) -> Work:
    """The traffic alone: forward one read and one write, backward two reads and one write, of memory that is there."""
    out = torch.empty_like(sets[0][0])

    @torch.no_grad()
    def work(i: int) -> None:
        x, _, grad = sets[i]
        if passes != "backward":
            out.copy_(x)
        if passes != "forward":
            torch.add(x, grad, out=out)

    return work


MULTI = "fake_quantize_multi"


@pytest.mark.both_allocators
@pytest.mark.parametrize("network", ["resnet50", pytest.param("vit_small_patch16_224", marks=pytest.mark.full)])
def bench_all_weights(contest: Contest, network: str) -> None:
    """All weights of a network, forward + backward

    Float32, 7 bit, one scale a channel. Ours is one `fake_quantize_multi`, the others go layer by layer. Ratios are
    times over ours. Targets on 2 threads, of ResNet-50: eager LSQ at least 12, native op at least 4, compiled LSQ at
    least 1.5; on a GPU at most 0.25 ms. The copies move the same bytes into memory that is there already: a floor for
    any kernel that goes through all layers forward and then backward. Where that floor is above a twelfth of eager
    LSQ's time, the first target is out of reach: going layer by layer, eager LSQ finds most of its operands in the
    cache.
    """
    qmin, qmax = code_range(7)
    weights = [w.to(contest.device).requires_grad_() for w in conv_weights(network)]
    scales = [qk.init_scale(w, qmax, 0).requires_grad_() for w in weights]
    upstream, layers = [torch.randn_like(w) for w in weights], len(weights)
    factors = [(w.numel() * qmax) ** -0.5 for w in weights]
    contest.parameters, contest.size = network, sum(w.numel() for w in weights)

    def clear() -> None:
        """As zero_grad does: until the next step the gradients stay, and with them the memory that malloc has."""
        for t in (*weights, *scales):
            t.grad = None

    def gradients() -> list[Tensor | None]:
        return [t.grad for t in (*weights, *scales)]

    def ours(_: int) -> list[Tensor | None]:
        clear()
        ys = qk.fake_quantize_multi(weights, scales, [qmin] * layers, [qmax] * layers, 0, factors)
        torch.autograd.backward(ys, upstream)
        return gradients()

    def layer_by_layer(quantize: peers.Quantize) -> Work:
        def work(_: int) -> list[Tensor | None]:
            clear()
            ys = []  # a forward keeps them for its backward
            for weight, scale, factor, grad in zip(weights, scales, factors, upstream, strict=True):
                ys.append(quantize(weight, scale, qmin, qmax, 0, factor))
                ys[-1].backward(grad)
            return gradients()

        return work

    @torch.no_grad()
    def in_triton(_: int) -> list[Tensor]:
        return peers.fake_quantize_multi_in_triton(weights, scales, upstream, qmin, qmax, factors)

    with torch.no_grad():
        expected = reference.fake_quantize_multi_backward(
            upstream, weights, scales, [qmin] * layers, [qmax] * layers, 0, factors, True
        )
    contest.ours(MULTI, ours, [*expected[0], *expected[1]])
    for name, quantize in peers.FAKE_QUANTIZE.items():
        right = None if name == "native op" else [*expected[0], *expected[1]]
        # On a GPU every shape is compiled anew.
        enter = contest.slow_peer if contest.device == "cuda" and name == "compiled LSQ" else contest.peer
        enter(name, partial(layer_by_layer, quantize), right)
    if contest.device == "cuda":
        contest.peer(peers.TRITON, lambda: in_triton, [*expected[0], *expected[1]])
    contest.peer(FLOOR, lambda: all_copies(weights, upstream))
    contest.measure(base=MULTI)


def all_copies(weights: list[Tensor], upstream: list[Tensor]) -> Work:
    """The traffic of a forward through all layers, then a backward through all."""
    outputs = [torch.empty_like(w) for w in weights]

    @torch.no_grad()
    def work(_: int) -> None:
        for out, weight in zip(outputs, weights, strict=True):
            out.copy_(weight)
        for out, weight, grad in zip(outputs, weights, upstream, strict=True):
            torch.add(weight, grad, out=out)

    return work
