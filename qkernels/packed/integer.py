"""The integer path of a packed ensemble: scales for the activations, found on images, and codes from layer to layer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..quantize.quantizers import code_range
from .answers import called
from .codes_max_pool import CodesMaxPool2d
from .packed_layer import PackedLayer
from .program import Program, Ref, Step

Method = Literal["mse", "percentile", "max"]

BINS = 2048
CANDIDATES = 100  # scales that "mse" tries, up to the one that clips nothing


@dataclass(frozen=True)
class IntegerReport:
    """What the integer path changes on the calibration images.

    Attributes:
        layers: how many layers work on integers.
        connected: how many of them hand codes to the next without floats between.
        agreement: share of the images whose most likely class stayed the same.
        logit_error: root mean square change of the mean logits, relative to their root mean square.
    """

    layers: int
    connected: int
    agreement: float
    logit_error: float

    def __str__(self) -> str:
        return (
            f"{self.layers} integer layers, {self.connected} of them hand on codes; on the calibration images "
            f"{100 * self.agreement:.1f} % of the predictions agree, logits change by {100 * self.logit_error:.1f} %"
        )


class ActivationStatistics:
    """Least and largest value and a histogram of |x| for each member, over batches that are seen twice."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.least = torch.zeros(members)
        self.largest = torch.zeros(members)
        self.histogram = torch.zeros(members, BINS, dtype=torch.float64)

    def _by_member(self, x: Tensor, shared: bool) -> Tensor:
        x = x.detach().float()
        return x.reshape(1, -1).expand(self.members, -1) if shared else x.reshape(self.members, -1)

    def see_range(self, x: Tensor, shared: bool) -> None:
        values = self._by_member(x, shared)
        if not bool(values.isfinite().all()):
            raise ValueError("to_integer_: the calibration images lead to activations of NaN or infinity")
        self.least = torch.minimum(self.least, values.amin(1).cpu())
        self.largest = torch.maximum(self.largest, values.abs().amax(1).cpu())

    def see_histogram(self, x: Tensor, shared: bool) -> None:
        for member, values in enumerate(self._by_member(x, shared)):
            largest = float(self.largest[member]) or 1.0
            bins = (values.abs() / largest * BINS).long().clamp_(max=BINS - 1)
            self.histogram[member] += torch.bincount(bins, minlength=BINS).cpu()

    def scale(self, method: Method, percentile: float, qmax: int) -> Tensor:
        """float32 [M]: the scale of each member's codes up to qmax; 1 where all activations are 0."""
        edges = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
        largest = self.largest.double()
        if method == "percentile":
            shares = self.histogram.cumsum(1) / self.histogram.sum(1, keepdim=True).clamp(min=1)
            reached = (shares < percentile / 100).sum(1).clamp(max=BINS - 1)
            clipped = largest * edges[reached]
        elif method == "mse":
            clipped = largest * torch.stack([_least_error(row, edges, qmax) for row in self.histogram])
        else:
            clipped = largest
        return torch.where(clipped > 0, clipped / qmax, 1).float()


def _least_error(histogram: Tensor, edges: Tensor, qmax: int) -> Tensor:
    """The share of the largest value to clip at, for the least squared error of quantization."""
    centers = edges - 0.5 / BINS
    clips = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
    scales = (clips / qmax)[:, None]
    quantized = (centers / scales).round().clamp(max=qmax) * scales
    return clips[((quantized - centers).square() * histogram).sum(1).argmin()]


@contextmanager
def _hooks(program: nn.Module, statistics: dict[PackedLayer, ActivationStatistics], see: str) -> Iterator[None]:
    def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
        getattr(statistics[layer], see)(args[0], layer.shared)

    handles = [layer.register_forward_pre_hook(hook) for layer in statistics]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def to_integer_(
    program: nn.Module,
    members: int,
    batches: Iterable[Tensor],
    method: Method = "mse",
    percentile: float = 99.99,
    bits: int = 8,
    float_dtype: torch.dtype = torch.float32,
) -> IntegerReport:
    """See `PackedEnsemble.to_integer_`."""
    if method not in ("mse", "percentile", "max"):
        raise ValueError(f'to_integer_: method must be "mse", "percentile" or "max", got {method!r}')
    if not 0 < percentile <= 100:
        raise ValueError(f"to_integer_: percentile must be in (0, 100], got {percentile}")
    if iter(batches) is batches:
        raise TypeError("to_integer_: the batches are read three times; give a list or a data loader, not an iterator")
    layers = [module for module in program.modules() if isinstance(module, PackedLayer)]
    found = {
        layer: ActivationStatistics(layer.members) for layer in layers if layer.input_scale is None
    }  # learned scales stay
    with _hooks(program, found, "see_range"):
        before = [called(program, x) for x in batches]
    if not before:
        raise ValueError("to_integer_: there are no batches to calibrate on")
    if not all(isinstance(logits, Tensor) for logits in before):
        raise TypeError("to_integer_: the members answer with structures, and not with logits that could be compared")
    with _hooks(program, found, "see_histogram"):
        for x in batches:
            called(program, x)
    for layer, seen in found.items():
        codes = code_range(bits, signed=bool((seen.least < 0).any()))
        layer.quantize_input_(seen.scale(method, percentile, codes[1]).to(layer.weight_scale.device), codes)
    for layer in layers:
        layer.float_dtype = float_dtype
    connected = connect_(program) if isinstance(program, Program) else 0
    changes = [_change(old, called(program, x)) for old, x in zip(before, batches, strict=True)]
    agreeing, images, squares, magnitude = (sum(column) for column in zip(*changes, strict=True))
    return IntegerReport(len(layers), connected, agreeing / images, (squares / max(magnitude, 1e-30)) ** 0.5)


def _change(before: Tensor, after: Tensor) -> tuple[int, int, float, float]:
    """Images that agree, images, and the sums of squares of the change and of the mean logits."""
    old, new = (logits.double().mean(0) for logits in (before, after))
    same = int((old.argmax(-1) == new.argmax(-1)).sum())
    return same, old.shape[0], float((new - old).square().sum()), float(old.square().sum())


# Codes from layer to layer ---------------------------------------------------------------------------------------


def connect_(program: Program) -> int:
    """Let layers hand codes to the next where all that use their output take the same codes. Returns how many do."""
    connected = 0
    for step in program.steps:
        layer = _layer_of(step, program)
        if not _takes_codes(layer) or len(program.callers(step.target)) > 1:
            continue
        users = list(_users_of_codes(step, program))
        inputs = [user for user, role in users if role == "input"]
        if not inputs or any(role == "float" for _, role in users):
            continue
        first = inputs[0]
        if not all(
            user.input_range == first.input_range and torch.equal(user.input_scale, first.input_scale)
            for user in inputs
        ):
            continue
        layer.output_scale, layer.output_range = first.input_scale.clone(), first.input_range
        for user, role in users:
            if role == "residual":
                user.residual_scale = first.input_scale.clone()
        _let_pools_take_codes(step, program)
        connected += 1
    return connected


def _layer_of(step: Step, program: Program) -> nn.Module | None:
    """The layer that a step calls, if it does."""
    return program.layer(step.target) if step.op == "layer" else None


def _takes_codes(layer: nn.Module | None) -> TypeGuard[PackedLayer]:
    return isinstance(layer, PackedLayer) and layer.input_scale is not None


def _users_of_codes(step: Step, program: Program) -> Iterator[tuple[Any, str]]:
    """Who uses a step's result, through max pools: (layer, "input" or "residual"), or (None, "float")."""
    if program.output.name == step.name:
        yield None, "float"
    for user in program.users(step.name):
        layer = _layer_of(user, program)
        if _takes_codes(layer) and len(program.callers(user.target)) == 1:
            yield from (
                (layer, role)
                for arg, role in zip(user.args, ("input", "residual"), strict=False)
                if arg == Ref(step.name)
            )
        elif _is_plain_max_pool(layer):
            yield from _users_of_codes(user, program)
        else:
            yield None, "float"


def _is_plain_max_pool(layer: nn.Module | None) -> bool:
    plain = type(layer) in (nn.MaxPool2d, CodesMaxPool2d)
    return plain and _pair(layer.dilation) == (1, 1) and not layer.ceil_mode  # type: ignore[union-attr, arg-type]


def _let_pools_take_codes(step: Step, program: Program) -> None:
    for user in program.users(step.name):
        pool: Any = _layer_of(user, program)
        if _is_plain_max_pool(pool):
            program.put_layer(user.target, CodesMaxPool2d(pool.kernel_size, pool.stride, pool.padding))
            _let_pools_take_codes(user, program)
