"""How one step is taken. A step rule gets the loss as a closure, so that it may evaluate it more than once.

A rule is a dataclass of its numbers (see `numbers.py`). All rules work with `DistributedDataParallel` models and with a
`GradScaler`.

Under DistributedDataParallel the first of two passes does not synchronize: each process moves the weights along the
gradient of its own images (m-sharpness, Foret et al. 2021), and what the optimizer gets is averaged over all, once.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import qkernels as qk
from qtdog.methods.numbers import number
from qtdog.models import unwrapped

Loss = Callable[[], Tensor]


class InPieces:
    """A minibatch's loss as the mean of those of its pieces, which are of one size.

    Called, it is the whole; `backward` computes a piece after the other, so that memory for one is enough.
    """

    def __init__(self, pieces: Sequence[Loss]) -> None:
        self.pieces = pieces

    def __call__(self) -> Tensor:
        return torch.stack([piece() for piece in self.pieces]).mean()


@dataclass
class StepRule:
    """One update of `optimizer`'s parameters. A rule that remembers something between steps stores it by state_dict."""

    needs_scales: ClassVar[bool] = False  # whether it has no meaning for a method that does not quantize

    @property
    def least_steps(self) -> tuple[str, int]:
        """Which number says how many steps it takes until it does what no other rule does; and that.

        Of a rule that needs scales, steps from the switch on.
        """
        return "steps", 1

    @property
    def same_as(self) -> str | None:
        """The name of the step rule that it is with its numbers, if that is another one."""
        return None

    def __call__(self, loss: Loss, model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None) -> Tensor:
        """Take one step; returns the loss before it, a detached scalar.

        Args:
            loss: evaluates the loss of this step's minibatch at the model's present weights; the same function at
                every call, so with the same dropout masks.
            scaler: for float16 training; its `update` is called here.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""

    def files(self) -> dict[str, str]:
        """Text to keep in the run's folder, by file name."""
        return {}


@dataclass
class Plain(StepRule):
    """Gradient descent."""

    def __call__(self, loss: Loss, model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None) -> Tensor:
        optimizer.zero_grad()
        value = backward(loss, scaler)
        update(optimizer, scaler)
        return value


@dataclass
class WeightNoise(StepRule):
    """The gradient at weights with uniform noise: what quantization does, less its structure (QT-DoG's ablation)."""

    weight_noise: float = number(1e-4, "weights are moved by up to this for each gradient", least=0)

    @property
    def same_as(self) -> str | None:
        return "plain" if self.weight_noise == 0 else None

    def __call__(self, loss: Loss, model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None) -> Tensor:
        optimizer.zero_grad()
        weights = [p for p in parameters_of(optimizer) if p.dim() >= 2]
        noisy = [w.detach() + torch.empty_like(w).uniform_(-self.weight_noise, self.weight_noise) for w in weights]
        with replaced(weights, noisy):
            value = backward(loss, scaler)
        update(optimizer, scaler)
        return value


@dataclass
class SAM(StepRule):
    """Sharpness-aware minimization: the gradient at w + rho g / ||g||.

    Source: Foret et al. 2021.
    """

    rho: float = number(0.05, "SAM's radius", least=0)

    @property
    def same_as(self) -> str | None:
        return "plain" if self.rho == 0 else None

    def __call__(self, loss: Loss, model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None) -> Tensor:
        optimizer.zero_grad()
        with unsynchronized(model):
            value = backward(loss, scaler)
        parameters, gradients = trained(optimizer)
        unit = 1.0 if scaler is None else scaler.get_scale()
        length = self.rho / (norm_of(gradients, unit) + 1e-12)
        with replaced(parameters, moved(parameters, gradients, length / unit)), kept_statistics(model):
            optimizer.zero_grad()
            backward(loss, scaler)
        update(optimizer, scaler)
        return value


@dataclass
class SAGM(SAM):
    """Sharpness-aware gradient matching: the mean of the gradients at w and at w + (rho / ||g|| - alpha) g.

    Source: Wang et al. 2023, the objective L(w) + L_p(w - alpha grad L(w)).
    """

    alpha: float = number(1e-3, "SAGM's step along the gradient", least=0)

    @property
    def same_as(self) -> str | None:
        return "plain" if self.rho == self.alpha == 0 else None

    def __call__(self, loss: Loss, model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None) -> Tensor:
        optimizer.zero_grad()
        with unsynchronized(model):
            value = backward(loss, scaler, share=0.5)
        parameters, gradients = trained(optimizer)
        unit = 0.5 if scaler is None else 0.5 * scaler.get_scale()
        length = self.rho / (norm_of(gradients, unit) + 1e-12) - self.alpha
        weights = moved(parameters, gradients, length / unit)
        self.between_passes(model)
        with replaced(parameters, weights), kept_statistics(model):
            backward(loss, scaler, share=0.5)  # adds to the gradients of the first pass
        update(optimizer, scaler)
        return value

    def between_passes(self, model: nn.Module) -> None:
        """After the first pass, whose gradients the parameters hold."""


@dataclass
class GAQAT(SAGM):
    """SAGM that drops the first pass's gradient of those quantization scales on which it has little disorder.

    Every `disorder_window` steps the disorder of each scale, the share of sign flips of its first-pass (task) gradient
    between consecutive steps, decides whether the scale is frozen: then it gets half of the second-pass (smoothness)
    gradient alone, until a later window thaws it. Everything else gets SAGM's gradient.

    Source: GAQAT, arXiv 2412.05551; per layer, FQAT, arXiv 2509.00859.
    """

    disorder_window: int = number(350, "steps between GAQAT's decisions which scales to freeze", least=2)
    disorder_threshold: float = number(0.3, "share of sign flips, 0 to 1, that decides", least=0, most=1)
    freeze_when: Literal["below", "above"] = number("below", "freeze scales with a disorder below or above it")
    freeze_granularity: Literal["scale", "layer"] = number(
        "scale", "decide for each scale, or for the scales of a layer together by their mean (FQAT)"
    )
    unfreeze: bool = number(True, "whether a frozen scale may thaw in a later window")
    disorder: "Disorder | None" = field(default=None, init=False, repr=False)

    needs_scales = True

    @property
    def least_steps(self) -> tuple[str, int]:
        return "disorder_window", self.disorder_window

    @property
    def same_as(self) -> str | None:
        never = self.disorder_threshold == (0 if self.freeze_when == "below" else 1)
        return "sagm" if never else None

    def between_passes(self, model: nn.Module) -> None:
        scales = dict(qk.named_scales(unwrapped(model)))
        if not scales or not any(layer.enabled for _, layer in qk.quantized_layers(unwrapped(model))):
            return
        if self.disorder is None:
            self.disorder = Disorder(list(scales), [scale.shape for scale in scales.values()])
        gradients = [torch.zeros_like(s) if s.grad is None else s.grad for s in scales.values()]
        if self.disorder.record(gradients) == self.disorder_window:
            self.disorder.close_window(
                self.disorder_threshold, self.freeze_when, self.freeze_granularity, self.unfreeze
            )
        torch._foreach_mul_(gradients, self.disorder.free())

    def state_dict(self) -> dict[str, Any]:
        return {} if self.disorder is None else self.disorder.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.disorder = Disorder.from_state_dict(state)

    def files(self) -> dict[str, str]:
        return {} if self.disorder is None else {"disorder.csv": self.disorder.as_csv()}


class Disorder:
    """How often the sign of each scale's task gradient flips, and which scales are frozen for that.

    `history` has for each finished window: the number of steps until its end, the disorder of every element of every
    scale, and which are frozen from then on.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        self.names, self.shapes = list(names), [list(shape) for shape in shapes]
        self.sizes = [torch.Size(shape).numel() for shape in shapes]
        self.signs = torch.zeros(sum(self.sizes))  # -1, 0 or 1: of the last gradient that was not 0
        self.flips = torch.zeros_like(self.signs)
        self.frozen = torch.zeros_like(self.signs, dtype=torch.bool)
        self.steps = self.window_steps = 0
        self.history: list[tuple[int, Tensor, Tensor]] = []

    def record(self, gradients: Sequence[Tensor]) -> int:
        """Compare the signs of one gradient a scale with the last ones; returns the steps in this window so far."""
        flat = torch.cat([g.flatten() for g in gradients])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)  # the first pass was not synchronized, and all processes must freeze the same
        if self.signs.device != flat.device:
            self.signs, self.flips, self.frozen = (t.to(flat.device) for t in (self.signs, self.flips, self.frozen))
        signs = flat.sign()
        self.flips += signs * self.signs < 0
        self.signs = torch.where(signs.abs() == 1, signs, self.signs)
        self.steps += 1
        self.window_steps += 1
        return self.window_steps

    def close_window(self, threshold: float, freeze_when: str, granularity: str, unfreeze: bool) -> None:
        """Freeze and thaw by the disorder of the window that ends here, and begin the next."""
        pairs = self.window_steps - (self.steps == self.window_steps)  # the very first step has none before it
        disorder = self.flips / max(pairs, 1)
        judged = self.mean_by_layer(disorder) if granularity == "layer" else disorder
        chosen = judged < threshold if freeze_when == "below" else judged > threshold
        self.frozen = chosen if unfreeze else chosen | self.frozen
        self.history.append((self.steps, disorder.cpu(), self.frozen.cpu()))
        self.flips = torch.zeros_like(self.flips)
        self.window_steps = 0

    def mean_by_layer(self, values: Tensor) -> Tensor:
        """Each element's layer's mean: a layer has the scale of its weight and of its input."""
        layers = [name.rpartition(".")[0] for name in self.names]
        order = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
        owner = torch.tensor([order[layer] for layer in layers]).repeat_interleave(torch.tensor(self.sizes))
        owner = owner.to(values.device)
        total = torch.zeros(len(order), device=values.device).index_add_(0, owner, values)
        return (total / owner.bincount())[owner]

    def free(self) -> list[Tensor]:
        """For each scale a tensor of its shape: 0 where it is frozen, else 1."""
        kept = (~self.frozen).to(self.signs.dtype).split(self.sizes)
        return [k.view(shape) for k, shape in zip(kept, self.shapes, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "history": [list(window) for window in self.history]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Disorder":
        disorder = cls(state["names"], state["shapes"])
        vars(disorder).update(state, history=[tuple(window) for window in state["history"]])
        return disorder

    def as_csv(self) -> str:
        """A line for each window and scale; of a scale a channel, the mean disorder and the share that is frozen."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["steps", "scale", "disorder", "frozen"])
        for steps, disorder, frozen in self.history:
            columns = zip(self.names, disorder.split(self.sizes), frozen.float().split(self.sizes), strict=True)
            for name, values, share in columns:
                writer.writerow([steps, name, f"{values.mean().item():.6g}", f"{share.mean().item():.6g}"])
        return out.getvalue()


def backward(loss: Loss, scaler: GradScaler | None, share: float = 1.0) -> Tensor:
    """Add `share` of the loss's gradients, times the scaler's scale, to the parameters'; returns the loss, detached.

    Of a loss `InPieces`, piece by piece.
    """
    pieces = loss.pieces if isinstance(loss, InPieces) else [loss]
    factor, values = share / len(pieces), []
    for piece in pieces:
        value = piece()
        shared = value if factor == 1 else factor * value
        (shared if scaler is None else scaler.scale(shared)).backward()
        values.append(value.detach())
    return torch.stack(values).mean() if len(values) > 1 else values[0]


def update(optimizer: Optimizer, scaler: GradScaler | None) -> None:
    """The optimizer's step, which a scaler leaves out where a gradient is not finite."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that are trained."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def trained(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and the gradients."""
    pairs = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
    return [p for p, _ in pairs], [g for _, g in pairs]


def norm_of(gradients: list[Tensor], unit: float) -> Tensor:
    """The Euclidean norm, 0-d, of all gradients together, which are `unit` times the loss's."""
    return torch.stack(torch._foreach_norm(gradients)).norm() / unit


@torch.no_grad()
def moved(parameters: list[Tensor], gradients: list[Tensor], length: Tensor) -> list[Tensor]:
    """parameters + length * gradients, as new tensors.

    A gradient that is not finite makes them NaN, and so shows in the second pass, for which a scaler skips the step.
    """
    weights = list(torch._foreach_mul(gradients, length))
    torch._foreach_add_(weights, parameters)
    return weights


@contextmanager
def replaced(parameters: list[Tensor], weights: list[Tensor]) -> Iterator[None]:
    """Within, the parameters hold `weights`; their own values wait untouched and come back."""
    own = [p.data for p in parameters]
    for p, w in zip(parameters, weights, strict=True):
        p.data = w
    try:
        yield
    finally:
        for p, w in zip(parameters, own, strict=True):
            p.data = w


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm that trains its statistics normalizes by the batch as ever, but does not update them."""
    updating = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for module in updating:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in updating:
            module.track_running_stats = True


def unsynchronized(model: nn.Module) -> AbstractContextManager[None]:
    """Within, DistributedDataParallel leaves gradients as each process has them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


STEPS: dict[str, type[StepRule]] = {
    "plain": Plain,
    "sam": SAM,
    "sagm": SAGM,
    "gaqat": GAQAT,
    "weight-noise": WeightNoise,
}
