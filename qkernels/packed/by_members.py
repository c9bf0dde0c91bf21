"""Functions of values of which each member has its own: the result is what each member's value gives alone.

A value of the members is [M, *what one member has]. Any function can be called member by member (`in_turn`): whatever
it does, be it a mean over the batch, it does to one member's value. Frequent functions have a form that computes all
members at once, their arguments moved past the first dimension; the tests hold every form to `in_turn`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .steps import Ref, mapped, refs_in

Bound = dict[str, Any]  # name of a parameter -> its argument, with Refs


class Function(Protocol):
    """What a form needs of a `Call`."""

    def run(self, bound: Bound) -> Any: ...


class Operands:
    """The results that steps take.

    Args:
        values: name -> result; a tensor of the members, or the tensors of a tuple of theirs, have them in front.
        own: the names of the results of which each member has its own; the others are the same for all.
    """

    def __init__(self, values: dict[str, Any], own: frozenset[str], members: int) -> None:
        self.values, self.own, self.members = values, own, members

    def value(self, ref: Ref) -> Any:
        return self.values[ref.name]

    def one(self, ref: Ref, member: int = 0) -> Any:
        """What one member has."""
        value = self.values[ref.name]
        if ref.name not in self.own:
            return value
        return value[member] if isinstance(value, Tensor) else tuple([part[member] for part in value])

    def rank(self, ref: Ref) -> int:
        """How many dimensions one member's tensor has; 0 for what is none."""
        value = self.values[ref.name]
        return value.dim() - (ref.name in self.own) if isinstance(value, Tensor) else 0

    def aligned(self, ref: Ref, rank: int) -> Any:
        """The value, so that it meets others of this rank as each member's does: from the last dimension on."""
        value, missing = self.values[ref.name], rank - self.rank(ref)
        if ref.name not in self.own or not missing:
            return value
        return value.reshape(self.members, *[1] * missing, *value.shape[1:])

    def expanded(self, ref: Ref) -> Tensor:
        """The members' tensor, also where they share it: [M, ...]."""
        value = self.values[ref.name]
        return value if ref.name in self.own else value.expand(self.members, *value.shape)

    def only_own(self, bound: Bound) -> Tensor | None:
        """The members' tensor that a function takes, of one dimension at least, if it takes no other tensors."""
        first, *others = refs_in(bound)
        tensor = first.name in self.own and isinstance(self.value(first), Tensor) and self.rank(first) > 0
        if not tensor or any(isinstance(self.value(other), Tensor | tuple) for other in others):
            return None
        return self.value(first)


# Of a call whose arguments are among these operands; None where the form does not know such arguments.
Form = Callable[[Function, Operands, Bound], Any]


def in_turn(call: Function, operands: Operands, bound: Bound) -> Any:
    """Member by member: what every form has to give."""
    return joined(
        [call.run(mapped(bound, Ref, partial(operands.one, member=member))) for member in range(operands.members)]
    )


def joined(results: Sequence[Any]) -> Any:
    """The members' results as one."""
    if isinstance(results[0], Tensor):
        return torch.stack(list(results))
    return tuple(joined(parts) for parts in zip(*results, strict=True))


def moved(dim: Any, rank: int) -> Any:
    """A dimension, or several, of one member's value of that rank as one of all members'."""
    if isinstance(dim, tuple | list):
        return tuple([moved(d, rank) for d in dim])
    if not -rank <= dim < rank:
        raise IndexError(f"there is no dimension {dim} of {rank}")
    return dim + 1 if dim >= 0 else dim


def alone(call: Function, operands: Operands, bound: Bound) -> Any:
    """What is the same for every member, such as a size."""
    return call.run(mapped(bound, Ref, operands.one))


# Forms -----------------------------------------------------------------------------------------------------------


def pointwise(call: Function, operands: Operands, bound: Bound) -> Any:
    """Of tensors that broadcast."""
    refs = refs_in(bound)
    rank = max(map(operands.rank, refs))
    tensors = [operands.value(ref) for ref in refs if isinstance(operands.value(ref), Tensor)]
    # A tensor without dimensions has no say in the result's dtype; with the members in front it would.
    if len({t.dtype for t in tensors}) > 1 and any(operands.rank(ref) == 0 for ref in refs if ref.name in operands.own):
        return None
    return call.run(mapped(bound, Ref, partial(operands.aligned, rank=rank)))


def along(**dims: Any) -> Form:
    """Of one tensor, along dimensions: name of the parameter -> its default, where None are all dimensions."""

    def form(call: Function, operands: Operands, bound: Bound) -> Any:
        x = operands.only_own(bound)
        if x is None:
            return None
        rank = x.dim() - 1
        chosen = {name: bound.get(name, default) for name, default in dims.items()}
        chosen = {name: tuple(range(rank)) if dim is None else dim for name, dim in chosen.items()}
        chosen = {name: moved(dim, rank) for name, dim in chosen.items()}
        return call.run(mapped({**bound, **chosen}, Ref, operands.value))

    return form


def unsqueezed(call: Function, operands: Operands, bound: Bound) -> Any:
    x = operands.only_own(bound)
    return None if x is None else x.unsqueeze(moved(bound["dim"], x.dim()))


def squeezed(call: Function, operands: Operands, bound: Bound) -> Any:
    x = operands.only_own(bound)
    if x is None:
        return None
    dim = bound.get("dim", tuple(range(x.dim() - 1)))
    return x.squeeze(moved(dim, x.dim() - 1))


def permuted(call: Function, operands: Operands, bound: Bound) -> Any:
    x = operands.only_own(bound)
    return None if x is None else x.permute(0, *moved(bound["dims"], x.dim() - 1))


def _sizes(given: Any, operands: Operands) -> tuple[int, ...]:
    sizes = mapped(given, Ref, operands.value)
    return tuple(sizes) if isinstance(sizes, tuple | list) else (sizes,)


def reshaped(call: Function, operands: Operands, bound: Bound) -> Any:
    x = operands.only_own(bound)
    return None if x is None else x.reshape(operands.members, *_sizes(list(bound.values())[1], operands))


def expanded(call: Function, operands: Operands, bound: Bound) -> Any:
    x = operands.only_own(bound)
    if x is None:
        return None
    sizes = _sizes(list(bound.values())[1], operands)
    missing = len(sizes) - (x.dim() - 1)
    if missing < 0:
        return None
    return x.reshape(operands.members, *[1] * missing, *x.shape[1:]).expand(operands.members, *sizes)


def item(call: Function, operands: Operands, bound: Bound) -> Any:
    """Of several tensors one; of a tensor a part."""
    value, index = operands.value(bound["a"]), mapped(bound["b"], Ref, operands.value)
    if isinstance(value, tuple | list):
        return value[index]
    if operands.only_own(bound) is None:
        return None
    return value[(slice(None), *index) if isinstance(index, tuple) else (slice(None), index)]


def selected(call: Function, operands: Operands, bound: Bound) -> Any:
    x, index = bound["input"], bound["index"]
    if x.name not in operands.own or index.name in operands.own:
        return None
    return operands.value(x).index_select(moved(bound["dim"], operands.rank(x)), operands.value(index))


def on_planes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images [N, C, H, W] that treats each image by itself, of [..., C, H, W]."""
    if x.dim() <= 4:
        return function(x)
    lead = x.shape[:-3]
    return function(x.reshape(-1, *x.shape[-3:])).unflatten(0, lead)


def pooled(call: Function, operands: Operands, bound: Bound) -> Any:
    x = operands.only_own(bound)
    if x is None or x.dim() < 4:
        return None
    name, ref = next(iter(bound.items()))
    others = mapped({key: value for key, value in bound.items() if value is not ref}, Ref, operands.value)
    return on_planes(lambda images: call.run({name: images, **others}), x)


def multiplied(call: Function, operands: Operands, bound: Bound) -> Any:
    """A product of matrices: of two dimensions at least, as vectors are no batch of matrices."""
    return None if min(map(operands.rank, refs_in(bound))) < 2 else pointwise(call, operands, bound)


def concatenated(call: Function, operands: Operands, bound: Bound) -> Any:
    tensors = bound["tensors"]
    parts = list(operands.value(tensors)) if isinstance(tensors, Ref) else [operands.expanded(ref) for ref in tensors]
    rank = parts[0].dim() - 1
    if rank == 0 or any(part.dim() - 1 != rank for part in parts):
        return None
    return torch.cat(parts, moved(bound.get("dim", 0), rank))


def stacked(call: Function, operands: Operands, bound: Bound) -> Any:
    if isinstance(bound["tensors"], Ref):
        return None
    parts = [operands.expanded(ref) for ref in bound["tensors"]]
    return torch.stack(parts, moved(bound.get("dim", 0), parts[0].dim()))


def attended(call: Function, operands: Operands, bound: Bound) -> Any:
    """Attention of [N, heads, length, depth]: members and images are one batch, for which there are fast kernels."""
    names = ("query", "key", "value")
    if any(operands.rank(bound[name]) != 4 for name in names):
        return None
    values = mapped({name: value for name, value in bound.items() if name not in names}, Ref, operands.value)
    own = {name: operands.expanded(bound[name]) for name in names}
    if (mask := bound.get("attn_mask")) is not None:
        aligned = operands.aligned(mask, 4)
        aligned = aligned[None] if aligned.dim() == 2 else aligned
        values["attn_mask"] = aligned.expand(*own["query"].shape[:2], *aligned.shape[-3:]).flatten(0, 1)
    result = call.run({**{name: value.flatten(0, 1) for name, value in own.items()}, **values})
    return result.unflatten(0, own["query"].shape[:2])
