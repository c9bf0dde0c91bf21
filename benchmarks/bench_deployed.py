"""Networks as people deploy them on a CPU: float, compiled, bfloat16, ONNX Runtime's int8, and packed ensembles."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.ops import library

from . import onnxruntime_peers, peers
from .bench_packed_ensemble import MEMBERS, ONE, faster_layout, on
from .contest import Contest
from .networks import trained_like
from .peers import Forward

ROUNDING = 1e-3
# Of the largest logit. Random mobile networks make much of every error; the accuracy on pictures is what counts.
BFLOAT16_ERROR, INTEGER_ERROR = 0.15, 0.45
SETTLE = 0.05  # seconds: after a call of ONNX Runtime's PyTorch is twice as slow 10 ms later, and as before after 50

full = pytest.mark.full
NETWORKS = [  # name, pixels
    ("resnet50", 224),
    ("tf_efficientnet_lite0", 224),
    ("vit_tiny_patch16_224", 224),
    ("resnet18", 64),
    pytest.param("mobilenetv3_large_100", 224, marks=full),
    pytest.param("convnext_atto", 224, marks=full),
    pytest.param("deit_small_patch16_224", 224, marks=full),
]
SMALLEST = [
    ("resnet50", 1),
    ("tf_efficientnet_lite0", 1),
    ("vit_tiny_patch16_224", 16),
    ("resnet18", 1),
    pytest.param("mobilenetv3_large_100", 1, marks=full),
    pytest.param("convnext_atto", 32, marks=full),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("network", "pixels"), NETWORKS)
@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"batch{batch}")
def bench_deployed_networks(contest: Contest, network: str, pixels: int, batch: int) -> None:
    """Deployed networks

    One and five packed members with 7-bit weights beside what else runs a network on a CPU. Integer: int8 activations,
    calibrated on the images that are timed, as are ONNX Runtime's, which quantizes the float model by its own tools.
    Ratios are times over one float32 model in eager PyTorch, in the memory format that is faster here. Everybody pauses
    before a turn and runs twice before it is timed, since ONNX Runtime's threads spin on after a call. Targets: one
    integer member no slower than ONNX Runtime's int8, and five faster than five of its sessions; with AMX, five
    weight-only members on bfloat16 images no slower than five bfloat16 models in turn.
    """
    contest.parameters, contest.size = f"{network}, {pixels} pixels, batch {batch}", batch
    with torch.no_grad():
        floats, images = made(network, torch.Size((batch, 3, pixels, pixels)))
        enter_floats(contest, floats, images)
        enter_faster_floats(contest, floats, images)
        enter_onnxruntime(contest, floats, images)
        enter_packed(contest, floats, images)
        contest.measure(base=ONE)


@pytest.mark.cpu
@pytest.mark.parametrize(("network", "pixels"), SMALLEST)
def bench_forward_overhead(contest: Contest, network: str, pixels: int) -> None:
    """Overhead of a whole forward

    The smallest image that the network takes: what is left is Python, the dispatcher, threads that begin and end, and
    reading the weights. Ratios are times over one float32 model in eager PyTorch. Target: one integer member no slower
    than it.
    """
    contest.parameters = f"{network}, {pixels} pixel" + "s" * (pixels > 1)
    options = {"img_size": pixels} if network.startswith("vit") else {}
    with torch.no_grad():
        floats, images = made(network, torch.Size((1, 3, pixels, pixels)), **options)
        enter_floats(contest, floats, images)
        enter_onnxruntime(contest, floats, images)
        enter_packed(contest, floats, images)
        for name, costs in contest.work.items():
            contest.facts[f"calls of our ops, {name}"] = str(len(costs))
        contest.measure(base=ONE)


def made(network: str, shape: torch.Size, **options: Any) -> tuple[list[nn.Module], Tensor]:
    return [trained_like(network, seed, **options) for seed in range(MEMBERS)], torch.randn(shape)


def enter_floats(contest: Contest, floats: list[nn.Module], images: Tensor) -> None:
    contest.settle = SETTLE
    layout = faster_layout(floats[0], images, contest.device)
    contest.facts["memory format of the floats"] = str(layout).removeprefix("torch.")
    models = [model.to(memory_format=layout) for model in floats]
    x = images.contiguous(memory_format=layout)
    contest.peer(ONE, lambda: on(models[0], x))
    contest.peer("five float32 models in turn", lambda: on(peers.in_turn(models), x))


def enter_faster_floats(contest: Contest, floats: list[nn.Module], images: Tensor) -> None:
    """PyTorch's own ways to be faster than eager float32."""
    model, x = floats[0], images.contiguous(memory_format=torch.channels_last)
    expected, mean = model(x), peers.in_turn(floats)(x)

    def autocast() -> Forward:
        peers.require_bfloat16()
        return torch.autocast("cpu", torch.bfloat16)(model.forward)

    def bfloat16(models: list[nn.Module]) -> Forward:
        peers.require_bfloat16()
        copies = [copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last) for model in models]
        return peers.in_turn(copies)

    contest.slow_peer("one float32 model, compiled", lambda: on(peers.frozen(model), x), expected, ROUNDING)
    contest.peer("one model, bfloat16 autocast", lambda: on(autocast(), x), expected, BFLOAT16_ERROR)
    contest.peer("one bfloat16 model", lambda: on(bfloat16([model]), x.bfloat16()), expected, BFLOAT16_ERROR)
    contest.peer("five bfloat16 models in turn", lambda: on(bfloat16(floats), x.bfloat16()), mean, BFLOAT16_ERROR)


def enter_onnxruntime(contest: Contest, floats: list[nn.Module], images: Tensor) -> None:
    one, mean = floats[0](images), peers.in_turn(floats)(images)
    int8 = partial(onnxruntime_peers.int8_session, images=images, calibration=images)

    def in_turn() -> Forward:
        return peers.in_turn([int8(model, share_cores=True) for model in floats])

    contest.peer(
        "ONNX Runtime, float32", lambda: on(onnxruntime_peers.float_session(floats[0], images), images), one, ROUNDING
    )
    contest.peer("ONNX Runtime, int8", lambda: on(int8(floats[0]), images), one, INTEGER_ERROR)
    contest.peer("ONNX Runtime, five int8 in turn", lambda: on(in_turn(), images), mean, INTEGER_ERROR)


def enter_packed(contest: Contest, floats: list[nn.Module], images: Tensor) -> None:
    quantized = [copy.deepcopy(model) for model in floats]
    for model in quantized:
        qk.quantize_(model)
    x = images.contiguous(memory_format=torch.channels_last)
    for name, models in (("one", quantized[:1]), ("five", quantized)):
        expected = peers.in_turn(models)(images)
        ensemble = qk.PackedEnsemble.from_models(models)
        contest.ours(f"packed, weight-only, {name}", on(ensemble, x), expected, ROUNDING)
        if "amx" in library.cpu_features():  # others multiply bfloat16 as float32
            contest.ours(f"packed, weight-only, {name}, bfloat16", on(ensemble, x.bfloat16()), expected, BFLOAT16_ERROR)
        integer = copy.deepcopy(ensemble)
        integer.to_integer_([images])
        contest.ours(f"packed, integer, {name}", on(integer, x), expected, INTEGER_ERROR)
        unpacked = copy.deepcopy(integer).unpack_()
        contest.ours(f"packed, integer, {name}, weights unpacked", on(unpacked, x), expected, INTEGER_ERROR)
        contest.facts[f"bytes, {name}"] = f"{integer.nbytes:,} packed, {unpacked.nbytes:,} with unpacked weights"
