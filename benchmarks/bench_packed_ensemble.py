"""Five 7-bit ResNet-50 that answer together, against one float model and five."""

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk

from . import peers
from .contest import Contest, Work
from .costs import dtype_name
from .networks import trained_like
from .peers import Forward
from .timing import seconds_of

MEMBERS = 5
ROUNDING = {"cpu": 1e-3, "cuda": 5e-2}  # through 53 layers; GPUs convolve float32 in TF32
INTEGER_ERROR = 0.2  # of 8-bit activations calibrated on noise; icon_styles tells what it does to accuracy
ONE = "one float32 model"

PEAK_WHILE_LOADING = """
import resource, sys, torch, qkernels as qk
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
free = torch.ones((peak() - resident()) // 4 + 1)  # so that what loading takes shows in the peak
before = peak()
ensemble = qk.PackedEnsemble.load(sys.argv[1])
for tensor in [*ensemble.parameters(), *ensemble.buffers()]:
    tensor.max()  # touches pages that are only mapped so far
print(peak() - before)
"""


@pytest.mark.parametrize("batch", [1, 8, pytest.param(64, marks=pytest.mark.gpu)], ids=lambda batch: f"batch{batch}")
def bench_packed_ensemble(contest: Contest, device: str, batch: int) -> None:
    """Packed ensemble of five ResNet-50

    Seven-bit weights, images of 224x224. Weight-only: packed weights, float activations. Integer: int8 activations,
    calibrated on the images that are timed. Ratios are times over one float32 model. The floats run in the memory
    format that is faster here. Targets on 2 CPU threads: integer at most 2.5 at batch 1 and 1.6 at batch 8, weight-only
    no slower than five float models. On an H200: at most one float32 model under max-autotune at batch 1 and 8, and at
    most 0.6 of five float16 members in one CUDA graph at batch 64. Size: 5 x .224 of the float model, loading at most
    1.3 times the packed size.
    """
    with torch.no_grad():
        floats = [trained_like("resnet50", seed).to(device) for seed in range(MEMBERS)]
        quantized = [copy.deepcopy(model) for model in floats]
        for model in quantized:
            qk.quantize_(model)
        contest.parameters, contest.size = f"batch {batch}", batch
        # One set: what passes between two uses of anything, weights and activations, exceeds every cache.
        images = torch.randn(batch, 3, 224, 224, device=device)
        enter_floats(contest, floats, images)
        enter_packed(contest, quantized, images)
        if batch == 1:
            contest.facts |= sizes(quantized, floats[0])
        contest.measure(base=ONE)


def enter_floats(contest: Contest, floats: list[nn.Module], images: Tensor) -> None:
    layout = faster_layout(floats[0], images, contest.device)
    models = [model.to(memory_format=layout) for model in floats]
    contest.facts["memory format of the floats"] = str(layout).removeprefix("torch.")
    x = images.contiguous(memory_format=layout)
    one, mean = models[0](x), peers.in_turn(models)(x)

    def enter(name: str, make: Callable[[], Forward], expected: Tensor = mean, slow: bool = False) -> None:
        begin = contest.slow_peer if slow else contest.peer
        begin(name, lambda: on(make(), x), expected, ROUNDING[contest.device])

    enter(ONE, lambda: models[0], one)
    enter("five float32 models in turn", lambda: peers.in_turn(models))
    enter("float32 stack_module_state + vmap", lambda: peers.vmapped(models), slow=len(images) > 1)
    enter("float32 members compiled, in turn", lambda: peers.compiled_members(models), slow=True)
    if contest.device == "cuda":
        enter("one float32 model, max-autotune", lambda: peers.max_autotuned(models[0]), one, slow=True)
        halves = [copy.deepcopy(m).half().to(memory_format=torch.channels_last) for m in models]
        x = images.half().contiguous(memory_format=torch.channels_last)
        enter("one float16 model", lambda: halves[0], one)
        enter("one float16 model, max-autotune", lambda: peers.max_autotuned(halves[0]), one, slow=True)
        enter("five float16 members", lambda: peers.in_turn(halves))
        enter("five float16 members on streams", lambda: peers.on_streams(halves))


def enter_packed(contest: Contest, quantized: list[nn.Module], images: Tensor) -> None:
    expected = peers.in_turn(quantized)(images)
    dtypes = [torch.float32] if contest.device == "cpu" else [torch.float16, torch.float32]
    ensemble = qk.PackedEnsemble.from_models(quantized)
    for dtype in dtypes:
        name = "packed, weight-only" + (f", {dtype_name(dtype)}" if contest.device == "cuda" else "")
        x = images.to(dtype, memory_format=torch.channels_last)
        contest.ours(name, on(ensemble, x), expected, ROUNDING[contest.device])
    integer = copy.deepcopy(ensemble)
    integer.to_integer_([images[:2]], float_dtype=dtypes[0])
    x = images.to(dtypes[0], memory_format=torch.channels_last)
    contest.ours("packed, integer", on(integer, x), expected, INTEGER_ERROR)


def on(forward: Forward, images: Tensor) -> Work:
    return lambda _: forward(images)


def faster_layout(model: nn.Module, images: Tensor, device: str) -> torch.memory_format:
    """The memory format in which the float model is faster: the median of three."""
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        x = images.contiguous(memory_format=layout)
        seconds[layout] = sorted(seconds_of(partial(model, x), device) for _ in range(4))[1]
    return min(seconds, key=lambda layout: seconds[layout])


def sizes(quantized: list[nn.Module], model: nn.Module) -> dict[str, str]:
    """Bytes of the ensemble in memory, on disk, and at the peak of loading it."""
    ensemble = qk.PackedEnsemble.from_models(quantized)
    one = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with tempfile.TemporaryDirectory() as folder:
        ensemble.save(folder)
        file = sum(p.stat().st_size for p in Path(folder).iterdir())
        command = [sys.executable, "-c", PEAK_WHILE_LOADING, folder]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "float32 model": f"{one:,} bytes",
        "ensemble in memory": f"{ensemble.nbytes:,} bytes, {ensemble.nbytes / one:.4f} of one float32 model",
        "ensemble on disk": f"{file:,} bytes, {file / one:.4f} of one float32 model",
        "peak memory while loading": f"{peak:,} bytes, {peak / ensemble.nbytes:.3f} of the ensemble's size",
    }
