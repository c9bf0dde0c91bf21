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
}
CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool"})
# What gives the values that it takes.
COPIES = frozenset({"contiguous", "clone", "detach", "alias", "requires_grad_", "cpu", "cuda", "lift_fresh"})
# What takes of a tensor its sizes at most.
FACTORIES = frozenset(
    {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
)
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
    if name == "meshgrid" and isinstance(args[0], Tensor):
        args = (args,)
    if function in _FUNCTIONS:
        return Target("call_function", function, args, kwargs)
    name = name.removesuffix("_") if not name.endswith("__") else name
    name = RENAMED.get(name, name)
    if name in REVERSED:
        return Target("call_function", REVERSED[name], args[::-1], kwargs)
    if name in OPERATORS and not kwargs:
        return Target("call_function", OPERATORS[name], args, kwargs)
    if name in METHODS:
        if not args:
            args = (kwargs["input"],)
            kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        return Target("call_method", name, args, kwargs)
    if name in FUNCTIONS:
        return Target("call_function", FUNCTIONS[name].target, args, kwargs)
    return Target("call_function", function, args, kwargs)
