"""Segments: successive layers of a program that run as one call of `packed_network`.

Which they are follows from a run of the program: the steps whose layers the op knows, with the shapes that their values
had. So there are segments for images of a shape once such images have passed step by step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..backends import report
from ..ops.packed_network import packed_network, table
from .codes_max_pool import CodesMaxPool2d
from .float_layers import StackedNorm
from .lowering import Constant, Lowered, Shape
from .packed_layer import PackedLayer
from .record import Record, dense_strides
from .steps import Step

MOST_SHAPES = 8  # of images, for which segments are kept

State = list[tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Segment:
    """Some steps as one.

    Attributes:
        inputs: the values that it takes, and as what images.
        name, shape, strides: of the value that it gives.
        constants, steps, out_sizes, dtype: of `packed_network`.
        rounds: whether it rounds otherwise than its steps.
    """

    inputs: tuple[tuple[str, Shape], ...]
    name: str
    shape: torch.Size
    strides: tuple[int, ...]
    constants: tuple[Constant, ...]
    steps: Tensor
    out_sizes: tuple[int, ...]
    dtype: torch.dtype
    rounds: bool

    def run(self, values: dict[str, Any]) -> Tensor:
        """The value that it gives, of those by name."""
        inputs = [values[name].reshape(shape) for name, shape in self.inputs]
        constants: Any = [constant.tensors[constant.name] for constant in self.constants]
        y = packed_network(inputs, constants, self.steps, self.out_sizes, self.dtype)
        return y.as_strided(self.shape, self.strides)


class Part(NamedTuple):
    """A step or a segment, and the values that are not needed after it."""

    call: Step | Segment
    done: tuple[str, ...]


class Parts(NamedTuple):
    """What a program is for images of a shape: its parts, and the numbers that follow from the shape."""

    calls: list[Part]
    numbers: dict[str, Any]

    @property
    def rounds(self) -> bool:
        """Whether they round otherwise than the steps."""
        return any(isinstance(part.call, Segment) and part.call.rounds for part in self.calls)


class Segments:
    """The parts that a program runs in, by the shape of its images.

    They hold as long as its layers are what they were: see `state_of`. Threads may run one program at the same time.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[Any, ...], tuple[State, Parts]] = {}

    def __deepcopy__(self, memo: Any) -> "Segments":
        return Segments()

    def __reduce__(self) -> Any:
        return Segments, ()

    def parts(self, x: Tensor, state: State) -> Parts | None:
        """For images x, if such have passed layers in this state."""
        kept = self._parts.get((x.shape, x.dtype))
        return kept[1] if kept is not None and kept[0] == state else None

    def keep(self, x: Tensor, state: State, parts: Parts) -> None:
        """For the next images like x."""
        kept = self._parts.copy()  # others may be looking at it
        kept.pop((x.shape, x.dtype), None)
        while len(kept) >= MOST_SHAPES:
            del kept[next(iter(kept))]
        kept[x.shape, x.dtype] = state, parts
        self._parts = kept


def state_of(layers: Sequence[nn.Module]) -> State:
    """What segments are made from that may change: which layers there are, and what was set of them."""
    return [(layer, _settings(layer)) for layer in layers]


def _settings(layer: nn.Module) -> Any:
    if isinstance(layer, PackedLayer):
        return layer.changes, layer.has_panels
    if isinstance(layer, StackedNorm):
        return layer.kind, layer.eps, layer.weight.dtype
    return (layer.kernel_size, layer.stride, layer.padding) if isinstance(layer, CodesMaxPool2d) else None


def may_run(x: Any, layers: Sequence[nn.Module]) -> bool:
    """Whether nobody looks at the steps: neither a compiler, a mode that sees each op, nor a hook of a layer.

    Under autocast the float layers give another dtype than they did.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not hooks._global_forward_hooks
        and not hooks._global_forward_pre_hooks
        and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        and _served()
    )


def _served() -> bool:
    """Whether the op runs in C++."""
    return any(row.op == "packed_network" and row.device == "cpu" and row.backend == "cpp" for row in report())


def parts_of(program: Any, record: Record) -> Parts:
    """The program's steps, with segments in the place of those that the op knows, and without those that give numbers.

    Args:
        program: a `Program`.
        record: of a run with images of the shape.
    """
    steps: Sequence[Step] = program.steps
    last_use = {name: i for i, step in enumerate(steps) if step.name not in record.numbers for name in step.uses}
    last_use[program.output.name] = len(steps)
    parts: list[Part] = []
    there, begin = {program.input}, 0
    while begin < len(steps):
        end = _end_of_segment(program, record, begin, last_use)
        call = steps[begin] if end == begin else _segment(program, steps[begin:end], record)
        begin = max(end, begin + 1)
        if call.name not in record.numbers:
            there.add(call.name)
            done = tuple(name for name in there if last_use.get(name, 0) < begin)
            parts.append(Part(call, done))
            there -= {*done}
    return Parts(parts, record.numbers)


def _end_of_segment(program: Any, record: Record, begin: int, last_use: dict[str, int]) -> int:
    """Behind the last of the steps from `begin` on that give one value to those after them; `begin` if none do."""
    steps, lowered, end = program.steps, Lowered(record), begin
    while end < len(steps) and lowered.add(steps[end], _layer(program, steps[end])):
        end += 1

    def closed() -> bool:
        inside = (step.name for step in steps[begin : end - 1] if step.name not in record.numbers)
        return lowered.may_end_with(steps[end - 1].name) and all(last_use.get(name, 0) < end for name in inside)

    while end > begin and not closed():
        end -= 1
    return end


def _layer(program: Any, step: Step) -> nn.Module | None:
    return program.layer(step.target) if step.op == "layer" else None


def _segment(program: Any, steps: Sequence[Step], record: Record) -> Segment:
    lowered = Lowered(record)
    for step in steps:
        lowered.add(step, _layer(program, step))
    name = steps[-1].name
    seen, value = record.tensors[name], lowered.value(name)
    assert value is not None
    return Segment(
        tuple((name, value.shape) for name, value in lowered.inputs.items()),
        name,
        seen.shape,
        dense_strides(seen.shape, value.order),
        tuple(lowered.constants),
        table(lowered.rows()),
        value.shape,
        seen.dtype,
        lowered.rounds,
    )
