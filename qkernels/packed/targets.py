"""What PyTorch calls in many ways, by one name each: that of `functions.py`."""

import inspect
import operator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functions import FUNCTIONS, METHODS

OPERATORS: dict[str, Any] = {
    "add": operator.add,
    "sub": operator.sub,
    "subtract": operator.sub,
    "mul": operator.mul,
    "multiply": operator.mul,
    "div": operator.truediv,
    "true_divide": operator.truediv,
    "divide": operator.truediv,
    "floor_divide": operator.floordiv,
    "__floordiv__": operator.floordiv,
    "remainder": operator.mod,
    "pow": operator.pow,
    "matmul": operator.matmul,
    "neg": operator.neg,
    "eq": operator.eq,
    "__eq__": operator.eq,
    "ne": operator.ne,
    "__ne__": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__getitem__": operator.getitem,
}
REVERSED: dict[str, Any] = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmatmul__": operator.matmul,
}
RENAMED = {
    "__and__": "logical_and",  # of truth values; other bits have no place in a network
    "__invert__": "logical_not",
    "__or__": "logical_or",
    "absolute": "abs",
    "bitwise_not": "logical_not",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    # What "contiguous" gives is no value of its own, and the members' strides are others.
    "view": "reshape",
    "view_as": "reshape_as",
}
CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool"})
# What gives the values that it takes.
COPIES = frozenset({"contiguous", "clone", "detach", "alias", "requires_grad_", "cpu", "cuda", "lift_fresh"})
# What takes of a tensor its sizes at most.
FACTORIES = frozenset(
    {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
)
# What takes the arguments of the function of that name, although it is another (torch.layer_norm, Tensor.prelu).
ALIKE = frozenset(
    {"adaptive_max_pool1d", "celu", "group_norm", "layer_norm", "log_softmax", "max_pool1d", "max_pool2d", "max_pool3d",
     "prelu", "rms_norm", "selu", "softmax"}
)  # fmt: skip
EXTREMES = {"max": ("amax", "maximum"), "min": ("amin", "minimum")}
ASSERTIONS = (torch._assert,)
# What tells values to Python.
READS = frozenset(
    {"__bool__", "__float__", "__int__", "__index__", "__contains__", "item", "tolist", "numpy", "__array__", "equal",
     "allclose", "nonzero", "unique", "is_nonzero"}
)  # fmt: skip


class Target(NamedTuple):
    """A call in the form that a program has it."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_FUNCTIONS = {call.target for call in FUNCTIONS.values()}


@cache
def _signature(function: Any) -> inspect.Signature | None:
    """Of a function written in Python; others have none."""
    written = inspect.isfunction(function) and not hasattr(function, "__wrapped__")
    return inspect.signature(function) if written else None


def changed_argument(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a call changes in place."""
    signature = _signature(function)
    if signature is not None and "inplace" in signature.parameters:
        given = signature.bind(*args, **kwargs).arguments
        return next(iter(given.values())) if given.get("inplace") else None
    if name.endswith("_") and not name.endswith("__") and name not in COPIES:
        return args[0]
    return None


def canonical(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
    """A call by the name that programs know it by, computing its result and changing nothing."""
    signature = _signature(function)
    if signature is not None and "inplace" in signature.parameters:
        given = signature.bind(*args, **kwargs).arguments
        given.pop("inplace", None)
        args, kwargs = (), dict(given)
        args = (kwargs.pop(next(iter(kwargs))),)
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}  # it is None
    if name == "meshgrid" and isinstance(args[0], Tensor):
        args = (args,)
    if name in ("zeros", "ones") and args and not isinstance(args[0], tuple | list):
        args = (args,)
    if function in _FUNCTIONS:
        return Target("call_function", function, args, kwargs)
    name = name.removesuffix("_") if not name.endswith("__") else name
    name = RENAMED.get(name, name)
    if name in REVERSED:
        return Target("call_function", REVERSED[name], args[::-1], kwargs)
    if name in EXTREMES:
        name, args, kwargs = _extreme(name, *args, **kwargs)
    if name == "__getitem__" and (selection := _selection(*args)) is not None:
        return Target("call_method", "index_select", (args[0], *selection), {})
    if name in OPERATORS and not kwargs:
        return Target("call_function", OPERATORS[name], args, kwargs)
    if name in METHODS:
        if not args:
            args = (kwargs["input"],)
            kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        return Target("call_method", name, args, kwargs)
    if name in ALIKE:
        return Target("call_function", FUNCTIONS[name].target, args, kwargs)
    if function is Tensor.where:
        return Target("call_function", torch.where, _where(*args, **kwargs), {})
    return Target("call_function", function, args, kwargs)


def _extreme(name: str, input: Tensor, *args: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Of all elements, or of two tensors, it has another name; along a dimension it gives positions, too."""
    if not args and not kwargs:
        return EXTREMES[name][0], (input,), {}
    other = kwargs.get("other", args[0] if args else None)
    return (EXTREMES[name][1], (input, other), {}) if isinstance(other, Tensor) else (name, (input, *args), kwargs)


def _where(self: Tensor, condition: Tensor, other: Any) -> tuple[Any, ...]:
    return condition, self, other


def _selection(x: Any, index: Any) -> tuple[int, Tensor] | None:
    """Of x[:, [2, 0]] the dimension and the indices, as `index_select` takes them; None for other parts of a tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [place for place, part in enumerate(parts) if isinstance(part, list)]
    whole = [part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in parts]
    if not isinstance(x, Tensor) or len(lists) != 1 or sum(whole) < len(parts) - 1:
        return None
    (place,) = lists
    dim = place - len(parts) if any(part is Ellipsis for part in parts[:place]) else place
    if not all(type(i) is int and i >= 0 for i in parts[place]):
        return None
    return dim, torch.tensor(parts[place], device=x.device)
