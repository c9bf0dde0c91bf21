"""Record: what the values of a program were when images passed, and which of them only look at others' memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .steps import Step


class Seen(NamedTuple):
    """What a tensor was.

    Attributes:
        shape, dtype, strides: its own.
        offset: where it begins in the memory that it lies in, in elements.
    """

    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...]
    offset: int


class Record:
    """What a run has shown, for images of one shape.

    Attributes:
        tensors: name -> what the tensor was.
        views: name of a tensor, or of several, that lie in the memory of an earlier value -> that value.
        numbers: name -> number or shape. They follow from the shape of the images alone.
        own: the names of the results of which each member has its own.
    """

    def __init__(self, name: str, x: Tensor, own: frozenset[str]) -> None:
        self.own = own
        self.tensors: dict[str, Seen] = {name: _seen(x)}
        self.views: dict[str, str] = {}
        self.numbers: dict[str, Any] = {}

    def see(self, step: Step, value: Any, values: dict[str, Any]) -> None:
        """The result of a step, of the values that there are."""
        if isinstance(value, Tensor):
            self.tensors[step.name] = _seen(value)
        places = _places(value)
        if not places:
            self.numbers[step.name] = value
            return
        for name in step.uses if step.op != "layer" else ():  # a layer may have written there
            if places == _places(values[name]):
                self.views[step.name] = self.base(name)

    def base(self, name: str) -> str:
        """The value in whose memory a value lies."""
        return self.views.get(name, name)


def _seen(t: Tensor) -> Seen:
    return Seen(t.shape, t.dtype, t.stride(), int(t.storage_offset()))


def _places(value: Any) -> set[int]:
    """Where the memory of a tensor, or of several, begins."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr()}
    parts = value if isinstance(value, tuple | list) else ()
    return set().union(*(_places(part) for part in parts))


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Of elements one after another, dimensions in `order`, outermost first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def same_strides(seen: Seen, strides: Sequence[int]) -> bool:
    """But for dimensions of one element, where they say nothing."""
    return all(n == 1 or own == other for n, own, other in zip(seen.shape, seen.strides, strides, strict=True))


def lies_in_order(seen: Seen, order: Sequence[int]) -> bool:
    """Whether the elements lie one after another from the memory's first on."""
    return seen.offset == 0 and same_strides(seen, dense_strides(seen.shape, order))
