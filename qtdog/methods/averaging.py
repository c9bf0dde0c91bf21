"""Averages of the weights along a run. They run over latent weights and scales; the averaged model quantizes them.

A rule is a dataclass of its numbers (see `numbers.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtdog.methods.numbers import number

Weights = dict[str, Tensor]  # by parameter name


class Mean:
    """The running mean of weights that are added one after the other."""

    def __init__(self) -> None:
        self.count = 0
        self.weights: Weights = {}

    @torch.no_grad()
    def add(self, weights: Weights) -> None:
        self.count += 1
        if self.count == 1:
            self.weights = {name: w.detach().clone() for name, w in weights.items()}
        else:
            news = [weights[name].detach() for name in self.weights]
            torch._foreach_lerp_(list(self.weights.values()), news, 1 / self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.count, self.weights = state["count"], {name: w.to(device) for name, w in state["weights"].items()}


@dataclass
class AveragingRule:
    """What becomes of the weights that training passes through. This one: nothing, each checkpoint is as trained.

    One that averages derives from `FromStart`.
    """

    needs_loss = False  # whether `end_segment` wants the validation loss at each checkpoint
    finished = False  # whether the run may end here
    final_only = False  # whether only the average at the end of the run may be selected

    @property
    def summary(self) -> str:
        """At the end of a run: what was averaged, for its log and model card; nothing if its name says all."""
        return ""

    def update(self, model: nn.Module, step: int) -> None:
        """After each update."""

    def end_segment(self, step: int, loss: float) -> None:
        """At each checkpoint, with the mean loss of the model as trained on the sources' validation images."""

    def averaged_weights(self) -> Weights | None:
        """What it would answer if the run ended at this checkpoint; None: the model as trained."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`."""


@dataclass
class FromStart(AveragingRule):
    """A rule for which the weights of some step are the first that count.

    Those of a run that quantizes count from the switch on, so the scales exist and no average mixes float and quantized
    training.
    """

    average_start: int = number(
        100, "first step whose weights are averaged (default with quantization: the switch)", least=0
    )

    @property
    def least_checkpoints(self) -> tuple[str, int]:
        """Which number says how many checkpoints it needs, from `average_start` on, to find an average; and that."""
        return "average_start", 1


@dataclass
class SMA(FromStart):
    """Simple moving average: the mean of all weights from `average_start` on, which is also what is validated.

    Source: Arpit et al. 2022, "Ensemble of averages".
    """

    mean: Mean = field(default_factory=Mean, init=False, repr=False)

    def update(self, model: nn.Module, step: int) -> None:
        if step >= self.average_start:
            self.mean.add(dict(model.named_parameters()))

    def averaged_weights(self) -> Weights | None:
        return self.mean.weights or None

    def state_dict(self) -> dict[str, Any]:
        return self.mean.state_dict()

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.mean.load_state_dict(state, device)


@dataclass
class SWAD(FromStart):
    """Stochastic weight averaging densely: the mean of the weights while the validation loss is in its valley.

    The weights between two checkpoints are averaged to a segment, which has the later one's validation loss. The
    valley begins with the oldest of the last `swad_converge` segments as soon as it has the least loss of them (of
    equal ones the first counts), and its threshold is their mean loss times 1 + `swad_ratio`. It ends, and the run with
    it, when the last `swad_tolerance` segments, its own oldest or later, all lie above the threshold. A run that found
    no valley has its last segment.

    `paper` is algorithm 1: the mean of the segments from the valley's first to the last before those that ended it, or
    to the end of the run.

    `released` is the authors' LossValley, which made their numbers, and averages others:

    - With a tolerance longer than `swad_converge`, also those of the last `swad_tolerance` segments before the valley
      whose loss, and all after it, is at most the threshold; all but the first of these. The valley's first is among
      them, and counts once more when it has become the oldest that is looked at. In a run that is younger than the
      tolerance, these segments are the run's first, some of the valley included, and the run's first counts at each
      checkpoint until there are enough.
    - The valley's first segment is only a place holder, which the first that is averaged replaces.
    - At the end of the run the oldest that is looked at is left out, whether it has been counted or not, and the others
      count until all that are left lie above the threshold.

    Nothing before `average_start` counts, so the switch to quantized weights restarts it, and it cannot end a run
    before that.

    Source: Cha et al. 2021, algorithm 1; github.com/khanrc/swad.
    """

    swad_valley: Literal["released", "paper"] = number(
        "released", "what SWAD averages: as the authors' code, which made their numbers, or as the paper's algorithm 1"
    )
    swad_converge: int = number(3, "checkpoints whose oldest has the least loss begin SWAD", least=1)
    swad_tolerance: int = number(6, "checkpoints above the threshold that end it", least=1)
    swad_ratio: float = number(0.3, "how far above the mean loss the threshold lies", least=0)
    segment: Mean = field(default_factory=Mean, init=False, repr=False)
    average: Mean = field(default_factory=Mean, init=False, repr=False)
    last: list[tuple[float, Weights]] = field(default_factory=list, init=False, repr=False)  # segments, oldest first
    threshold: float | None = field(default=None, init=False)  # None: the valley has not begun
    since: int = field(default=0, init=False)  # segments from the valley's first on
    finished: bool = field(default=False, init=False)

    needs_loss = True
    final_only = True

    @property
    def least_checkpoints(self) -> tuple[str, int]:
        return "swad_converge", self.swad_converge

    @property
    def summary(self) -> str:
        if self.threshold is None:
            return "SWAD found no valley, so of the last segment"
        return "SWAD's valley " + ("as in the paper" if self.swad_valley == "paper" else "as in the released code")

    def update(self, model: nn.Module, step: int) -> None:
        if step >= self.average_start:
            self.segment.add(dict(model.named_parameters()))

    def end_segment(self, step: int, loss: float) -> None:
        if step < self.average_start:
            return
        self.last.append((loss, self.segment.weights))
        self.last = self.last[-max(self.swad_converge, self.swad_tolerance) :]
        self.segment = Mean()
        if self.threshold is None:
            self.begin_valley()
            return
        self.since += 1
        if self.reached:
            if above(self.looked_at, self.threshold):
                self.finished = True
            else:
                self.average.add(self.looked_at[0][1])

    @property
    def looked_at(self) -> list[tuple[float, Weights]]:
        """The segments that may end the valley."""
        return self.last[-self.swad_tolerance :]

    @property
    def reached(self) -> bool:
        """Whether the oldest segment that is looked at is the valley's first or a later one.

        As the paper has it, only when there are as many as the tolerance; the released code does not ask for that.
        """
        return self.since >= (self.swad_tolerance if self.swad_valley == "paper" else len(self.looked_at))

    def begin_valley(self) -> None:
        """Begin the valley if the oldest of the last `swad_converge` segments has the least loss of them."""
        latest = self.last[-self.swad_converge :]
        losses = [loss for loss, _ in latest]
        if len(losses) < self.swad_converge or losses[0] > min(losses):
            return
        self.threshold = sum(losses) / len(losses) * (1 + self.swad_ratio)
        self.since = self.swad_converge
        left = self.swad_converge - self.swad_tolerance  # segments of the valley that are looked at no more
        self.average.weights = latest[0][1]  # stands until the first is added
        if self.swad_valley == "paper":
            early = latest[: max(left + 1, 0)]
        else:
            early = latest[1 : left + 1] if left >= 0 else below(self.looked_at[: 1 - left], self.threshold)[1:]
        for _, weights in early:
            self.average.add(weights)

    def averaged_weights(self) -> Weights | None:
        if self.threshold is None:
            return self.last[-1][1] if self.last else None
        average = Mean()
        average.count, average.weights = self.average.count, {n: w.clone() for n, w in self.average.weights.items()}
        for _, weights in self.left_at_the_end(self.threshold):
            average.add(weights)
        return average.weights

    def left_at_the_end(self, threshold: float) -> list[tuple[float, Weights]]:
        """The segments that the end of the run adds to a valley that has not ended."""
        if self.finished:
            return []
        if self.swad_valley == "paper":
            return self.looked_at[1:] if self.reached else self.looked_at[-self.since :]
        left = self.looked_at[1:]
        while left and left[-1][0] > threshold:
            left.pop()
        return left

    def state_dict(self) -> dict[str, Any]:
        return {
            "segment": self.segment.state_dict(),
            "average": self.average.state_dict(),
            "last": [list(pair) for pair in self.last],
            "threshold": self.threshold,
            "since": self.since,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.segment.load_state_dict(state["segment"], device)
        self.average.load_state_dict(state["average"], device)
        self.last = [(loss, {n: w.to(device) for n, w in weights.items()}) for loss, weights in state["last"]]
        self.threshold, self.since, self.finished = state["threshold"], state["since"], state["finished"]


def above(segments: list[tuple[float, Weights]], threshold: float) -> bool:
    """Whether all losses are greater than the threshold."""
    return min(loss for loss, _ in segments) > threshold


def below(segments: list[tuple[float, Weights]], threshold: float) -> list[tuple[float, Weights]]:
    """The segments after the last whose loss is greater than the threshold."""
    last = max((i for i, (loss, _) in enumerate(segments) if loss > threshold), default=-1)
    return segments[last + 1 :]


AVERAGING: dict[str, type[AveragingRule]] = {"none": AveragingRule, "sma": SMA, "swad": SWAD}


@contextmanager
def holding(model: nn.Module, weights: Weights | None, batches: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Within, `model` has these weights; afterwards it is as before, bit for bit, buffers included.

    Args:
        weights: by parameter name; None leaves all as it is.
        batches: images [N, C, H, W] on which to estimate the statistics of BatchNorm anew; None keeps them.
    """
    if weights is None:
        yield
        return
    with torch.no_grad():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        if batches is not None:
            estimate_statistics(model, batches)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set BatchNorm's running statistics to their mean over `batches`; the model's train and eval modes stay."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes:
        module.training = training
