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
from .lowering import Constant, Lowered, Seen, image_dims, image_shape, known
from .packed_layer import PackedLayer
from .steps import Step

MOST_SHAPES = 8  # of images, for which segments are kept

State = list[tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Segment:
    """Some steps as one.

    Attributes:
        inputs: the values that it takes, and how many dimensions of each are an image's.
        name, shape: of the value that it gives.
        constants, steps, out_sizes, dtype: of `packed_network`.
    """

    inputs: tuple[tuple[str, int], ...]
    name: str
    shape: torch.Size
    constants: tuple[Constant, ...]
    steps: Tensor
    out_sizes: tuple[int, ...]
    dtype: torch.dtype

    def run(self, values: dict[str, Any]) -> Tensor:
        """The value that it gives, of those by name."""
        inputs = [values[name].reshape(image_shape(values[name].shape, dims)) for name, dims in self.inputs]
        constants: Any = [constant.tensors[constant.name] for constant in self.constants]
        return packed_network(inputs, constants, self.steps, self.out_sizes, self.dtype).reshape(self.shape)


class Part(NamedTuple):
    """A step or a segment, and the values that are not needed after it."""

    call: Step | Segment
    done: tuple[str, ...]


class Segments:
    """The parts that a program runs in, by the shape of its images.

    They hold as long as its layers are what they were: see `state_of`. Threads may run one program at the same time.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[Any, ...], tuple[State, list[Part]]] = {}

    def __deepcopy__(self, memo: Any) -> "Segments":
        return Segments()

    def __reduce__(self) -> Any:
        return Segments, ()

    def parts(self, x: Tensor, state: State) -> list[Part] | None:
        """For images x, if such have passed layers in this state."""
        kept = self._parts.get((x.shape, x.dtype))
        return kept[1] if kept is not None and kept[0] == state else None

    def keep(self, x: Tensor, state: State, parts: list[Part]) -> None:
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
        return layer.changes
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


def parts_of(program: Any, seen: dict[str, Seen]) -> list[Part]:
    """The program's steps, with segments in the place of those that the op knows.

    Args:
        program: a `Program`.
        seen: name -> what a value was, of those that were tensors.
    """
    steps: Sequence[Step] = program.steps
    last_use = {name: i for i, step in enumerate(steps) for name in step.uses}
    last_use[program.output.name] = len(steps)
    able = [step.op == "layer" and known(step, program.layer(step.target), seen) for step in steps]
    parts: list[Part] = []
    begin = 0
    while begin < len(steps):
        end = begin
        while end < len(steps) and able[end]:
            end += 1
        while end > begin and not _closed(program, steps[begin:end], last_use, end):
            end -= 1
        end = max(end, begin + 1)
        names = [step.name for step in steps[begin : end - 1]]
        done = tuple(name for i in range(begin, end) for name in program.done_after(i) if name not in names)
        call = _segment(program, steps[begin:end], seen) if able[begin] else steps[begin]
        parts.append(Part(call, done))
        begin = end
    return parts


def _closed(program: Any, steps: Sequence[Step], last_use: dict[str, int], end: int) -> bool:
    """Whether the steps give one value to those from `end` on, and values have images of one kind for all layers."""
    dims: dict[str, int] = {}
    for step in steps:
        own = image_dims(program.layer(step.target))
        if any(dims.setdefault(name, own) != own for name in (*step.uses, step.name)):
            return False
    return all(last_use.get(step.name, 0) < end for step in steps[:-1])


def _segment(program: Any, steps: Sequence[Step], seen: dict[str, Seen]) -> Segment:
    names = [step.name for step in steps]
    layers = [program.layer(step.target) for step in steps]
    dims = {name: image_dims(layer) for step, layer in zip(steps, layers, strict=True) for name in step.uses}
    inputs = [name for name in dims if name not in names]
    lowered = Lowered(inputs, seen)
    for step, layer in zip(steps, layers, strict=True):
        lowered.add(step, layer)
    last = seen[names[-1]]
    return Segment(
        tuple((name, dims[name]) for name in inputs),
        names[-1],
        last.shape,
        tuple(lowered.constants),
        table(lowered.rows),
        image_shape(last.shape, image_dims(layers[-1])),
        last.dtype,
    )
