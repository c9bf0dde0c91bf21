"""Whole training steps: what quantization adds to one."""

from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import qkernels as qk
from qtdog.methods import steps

from . import peers
from .contest import Contest, Work
from .networks import CLASSES
from .timing import Run

FLOAT, OURS = "float", "qkernels"


@dataclass(frozen=True)
class Setup:
    """A network and its images: what is usual on a device."""

    network: str
    batch: int
    pixels: int
    autocast: bool
    memory_format: torch.memory_format
    rounding: float  # of the loss

    def __str__(self) -> str:
        dtype = "bfloat16 autocast" if self.autocast else "float32"
        return f"{self.network}, {self.batch} images of {self.pixels}x{self.pixels}, {dtype}"

    @property
    def slug(self) -> str:
        return f"{self.network}-{self.pixels}"


SETUPS = [
    pytest.param(s, marks=marks, id=s.slug)
    for s, marks in [
        (Setup("resnet18", 32, 64, False, torch.contiguous_format, 1e-3), [pytest.mark.cpu]),
        (Setup("resnet50", 96, 224, True, torch.channels_last, 5e-2), [pytest.mark.gpu]),
    ]
]
TRANSFORMERS = [
    pytest.param(s, marks=[*marks, pytest.mark.full], id=s.slug)
    for s, marks in [
        (Setup("vit_small_patch16_224", 4, 224, False, torch.contiguous_format, 1e-3), [pytest.mark.cpu]),
        (Setup("vit_small_patch16_224", 96, 224, True, torch.contiguous_format, 5e-2), [pytest.mark.gpu]),
    ]
]

HALF = [
    pytest.param(
        Setup("resnet18", 32, 64, True, torch.contiguous_format, 5e-2), marks=pytest.mark.cpu, id="resnet18-64-bfloat16"
    )
]


class Step:
    """A training step of one model: Adam on one batch, the same in every contender."""

    def __init__(
        self, setup: Setup, device: str, convert: peers.Convert, weight_bits: int, act_bits: int | None
    ) -> None:
        torch.manual_seed(0)
        model = timm.create_model(setup.network, num_classes=CLASSES).to(memory_format=setup.memory_format).to(device)
        self.model = convert(model, weight_bits, act_bits)
        images = torch.randn(setup.batch, 3, setup.pixels, setup.pixels)
        self.images = images.to(device, memory_format=setup.memory_format)
        self.labels = torch.randint(CLASSES, (setup.batch,)).to(device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=setup.autocast)
        with torch.no_grad():
            self.forward()  # the first batch decides the scales of activations
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-5)

    def forward(self) -> Tensor:
        with self.autocast:
            self.loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        return self.loss

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self, _: int) -> Tensor:
        """One step; returns the loss before it."""
        loss = self.forward().detach()
        self.backward()
        self.update()
        return loss

    @property
    def phases(self) -> dict[str, Run]:
        return {"forward": self.forward, "backward": self.backward, "update": self.update}


def unchanged(model: nn.Module, weight_bits: int, act_bits: int | None) -> nn.Module:
    return model


def ours(model: nn.Module, weight_bits: int, act_bits: int | None) -> nn.Module:
    qk.quantize_(model, qk.QConfig(weight_bits=weight_bits, act_bits=act_bits))
    return qk.fuse_weights_(model)


def compare_steps(
    contest: Contest, setup: Setup, weight_bits: int, act_bits: int | None, slow: tuple[str, ...] = ()
) -> None:
    """The float step, ours, and those of the peers, which start from the same weights and scales.

    Args:
        slow: peers that take too long to compile for the quick set; on a GPU also compiled LSQ.
    """
    slow += ("compiled LSQ",) * (contest.device == "cuda")
    contest.parameters, contest.graphs = str(setup), False
    made: dict[str, Step] = {}

    def step(name: str, convert: peers.Convert) -> Step:
        made[name] = Step(setup, contest.device, convert, weight_bits, act_bits)
        return made[name]

    with torch.no_grad():
        expected = step("eager LSQ", peers.TRAINING["eager LSQ"]).forward()
    contest.peer(FLOAT, partial(step, FLOAT, unchanged))
    contest.ours(OURS, step(OURS, ours), expected, setup.rounding)
    for name, convert in peers.TRAINING.items():
        # The scales of these start elsewhere.
        right = None if name in ("torchao", "brevitas") else expected
        enter = contest.slow_peer if name in slow else contest.peer
        enter(name, partial(step, name, convert), right, setup.rounding)
    contest.phases = {name: made[name].phases for name in contest.contenders}
    contest.work.clear()  # quantization is a part of the step, whose least time nobody knows
    contest.measure(base=FLOAT)


@pytest.mark.both_allocators
@pytest.mark.parametrize("setup", SETUPS + HALF + TRANSFORMERS)
def bench_qat_step(contest: Contest, setup: Setup) -> None:
    """Training step with 7-bit weights

    Adam on one batch, every layer but the classifier, one learned scale a channel. Ratios are times over the float
    step. Targets: ours at most 1.10 on 2 CPU threads, 1.05 in bfloat16, at most 1.02 on an H200.
    """
    compare_steps(contest, setup, weight_bits=7, act_bits=None)


@pytest.mark.parametrize("setup", SETUPS)
def bench_w4a4_step(contest: Contest, setup: Setup) -> None:
    """Training step with 4-bit weights and activations

    As above, with one learned scale for each layer's input. Ratios are times over the float step. Target: ours at most
    1.15 on an H200.
    """
    compare_steps(contest, setup, weight_bits=4, act_bits=4, slow=("compiled LSQ",))


@pytest.mark.parametrize("setup", SETUPS)
def bench_gaqat_step(contest: Contest, setup: Setup) -> None:
    """GAQAT step

    Two forwards and two backwards on 4-bit weights and activations, with the trainer's own code; eager LSQ with SAGM,
    its rule without the freezing of scales. Ratios are times over the plain step of our kernels (LSQ). Target: ours at
    most 2.1 on an H200.
    """
    contest.parameters, contest.graphs = str(setup), False
    gaqat, sagm = steps.GAQAT(disorder_window=100), steps.SAGM()
    eager = peers.TRAINING["eager LSQ"]

    def step(rule: steps.StepRule, convert: peers.Convert) -> Work:
        one = Step(setup, contest.device, convert, 4, 4)
        return lambda _: rule(one.forward, one.model, one.optimizer)

    expected = step(steps.Plain(), eager)(0)
    contest.ours("LSQ, qkernels", step(steps.Plain(), ours), expected, setup.rounding)
    contest.ours("GAQAT, qkernels", step(gaqat, ours), expected, setup.rounding)
    contest.peer("LSQ, eager", partial(step, steps.Plain(), eager), expected, setup.rounding)
    contest.peer("SAGM, eager", partial(step, sagm, eager), expected, setup.rounding)
    contest.work.clear()
    contest.measure(base="LSQ, qkernels")
