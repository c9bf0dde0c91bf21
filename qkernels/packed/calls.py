"""The functions and methods that a program in a file may call, and with which arguments. There are no others."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kinds import ProgramError, shown
from .program import mapped
from .values import (
    DIM,
    DIMS,
    FLAG,
    INDEX,
    INTEGER,
    MOST_DIMS,
    NOTHING,
    NUMBER,
    REAL,
    SHAPE,
    SIZES,
    TENSOR,
    TENSORS,
    Kind,
    Known,
    Result,
    one_of,
    pair,
    several,
    whole,
)

MOST_PARTS = 1024  # of a tensor that is cut, or of what is put together
LONGEST_CUT = 2**16  # of a tensor that is cut into single ones
SIZE, EDGE = whole(1), whole(0)  # of a kernel or a stride; of a padding

Rule = Result | Callable[..., Result]


class Call:
    """A function or method, and what it takes.

    Args:
        target: the function, or the name of the method.
        result: what it gives, or a function of the arguments that says so.
        required: how many of the parameters must be given.
        rest: of which kind any number of further arguments may be.
        elements: how many it makes at most, from its arguments; by default as many as the tensors among them have.
        parameters: name -> kind of each argument, in order.
    """

    def __init__(
        self,
        target: Any,
        result: Rule = "tensor",
        required: int = 1,
        rest: Kind | None = None,
        elements: Callable[..., int] | None = None,
        **parameters: Kind,
    ) -> None:
        self.target, self.result, self.required, self.rest, self.parameters = target, result, required, rest, parameters
        self.most_elements = elements or elements_of

    def check(self, args: list[Any], kwargs: dict[str, Any]) -> Result:
        """Make sure that arguments, with a Known for each Ref, are what it takes; returns what it gives.

        Raises:
            ProgramError: naming the argument that is not.
        """
        names = list(self.parameters)
        given, more = dict(zip(names, args, strict=False)), args[len(names) :]
        if twice := given.keys() & kwargs.keys():
            raise ProgramError(f"is given {min(twice)} twice")
        given |= kwargs
        for name in names[: self.required]:
            if name not in given:
                raise ProgramError(f"is not given {name}")
        for name, value in given.items():
            if name not in self.parameters:
                raise ProgramError(f"has no parameter {shown(name)}")
            if not self.parameters[name].fits(value):
                raise ProgramError(f"takes as {name} {self.parameters[name].name}, not {shown(value)}")
        if more and (self.rest is None or len(more) > MOST_PARTS or not all(map(self.rest.fits, more))):
            raise ProgramError(
                f"takes {self.rest.name if self.rest else 'nothing'} after {names[-1]}, not {shown(more)}"
            )
        return self.result if isinstance(self.result, str) else self.result(**given)


# What depends on the arguments -----------------------------------------------------------------------------------


def _of_operands(a: Any, b: Any) -> Result:
    if Known("shape") in (a, b):
        if a != b:
            raise ProgramError("adds a shape to what is none")
        return "shape"
    return "tensor" if Known("tensor") in (a, b) else "number"


def _of_item(a: Known, b: Any) -> Result:
    if a.result == "tensor":
        return "tensor"
    if isinstance(b, slice):
        return a.result
    if not INTEGER.fits(b):
        raise ProgramError(f"takes {shown(b)} of a {a.result}")
    return "number" if a.result == "shape" else "tensor"


def _of_size(input: Known, dim: Any = None) -> Result:
    return "shape" if dim is None else "number"


# How many elements they make --------------------------------------------------------------------------------------


def elements_of(*args: Any, **kwargs: Any) -> int:
    """Of all tensors among arguments, those that expand counted as often as they are read."""
    counts: list[int] = []
    mapped((args, kwargs), Tensor, lambda t: counts.append(t.numel()))
    return sum(counts)


def _broadcast(*operands: Any, **kwargs: Any) -> int:
    tensors = [operand for operand in (*operands, *kwargs.values()) if isinstance(operand, Tensor)]
    return math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))) if tensors else 0


def _padded(input: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> int:
    shape = list(input.shape)
    for i in range(0, len(pad) - 1, 2):
        shape[-1 - i // 2] += max(0, pad[i]) + max(0, pad[i + 1])
    return math.prod(shape)


def _pooled(input: Tensor, output_size: Any) -> int:
    height, width = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
    sizes = [own if wanted is None else wanted for wanted, own in zip((height, width), input.shape[-2:], strict=True)]
    return input.numel() + math.prod((*input.shape[:-2], *sizes))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * scores + elements_of(query, key, value, *args, **kwargs)


def _parts(input: Tensor, *_: Any, **__: Any) -> int:
    """None, as they share the tensor's memory; but each of them is an object."""
    if max(input.shape, default=0) > LONGEST_CUT:
        raise ProgramError(f"a tensor of shape {list(input.shape)} would be cut up, of more than {LONGEST_CUT}")
    return 0


OPERAND = TENSOR | NUMBER
LENGTHS = INTEGER | several(INTEGER, MOST_PARTS)


def _arithmetic(function: Any, operand: Kind = OPERAND) -> Call:
    return Call(function, _of_operands, 2, elements=_broadcast, a=operand, b=operand)


def _elementwise(function: Any) -> Call:
    return Call(function, input=TENSOR, inplace=one_of(False))


def _pool(function: Any, **more: Any) -> Call:
    stride = pair(SIZE) | NOTHING
    return Call(function, required=2, input=TENSOR, kernel_size=pair(SIZE), stride=stride, padding=pair(EDGE), **more)


FUNCTIONS: dict[str, Call] = {
    "add": _arithmetic(operator.add, OPERAND | SHAPE),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    "truediv": _arithmetic(operator.truediv),
    "floordiv": _arithmetic(operator.floordiv),
    "eq": _arithmetic(operator.eq),
    "neg": Call(operator.neg, lambda a: a.result, a=TENSOR | Kind("a computed number", lambda v: v == Known("number"))),
    "getitem": Call(operator.getitem, _of_item, 2, a=TENSOR | SHAPE | TENSORS, b=INDEX),
    "getattr": Call(getattr, "shape", 2, object=TENSOR, name=one_of("shape")),
    "cat": Call(torch.cat, tensors=TENSORS | several(TENSOR, MOST_PARTS), dim=DIM),
    "flatten": Call(torch.flatten, input=TENSOR, start_dim=DIM, end_dim=DIM),
    "mean": Call(torch.mean, input=TENSOR, dim=DIMS | NOTHING, keepdim=FLAG, dtype=NOTHING),
    "sigmoid": Call(torch.sigmoid, input=TENSOR),
    "tanh": Call(torch.tanh, input=TENSOR),
    "torch.relu": Call(torch.relu, input=TENSOR),
    "torch.add": Call(torch.add, required=2, elements=_broadcast, input=TENSOR, other=OPERAND, alpha=REAL),
    "torch.mul": Call(torch.mul, required=2, elements=_broadcast, input=TENSOR, other=OPERAND),
    "adaptive_avg_pool2d": Call(
        F.adaptive_avg_pool2d, required=2, elements=_pooled, input=TENSOR, output_size=pair(INTEGER | NOTHING)
    ),
    "avg_pool2d": _pool(F.avg_pool2d, ceil_mode=FLAG, count_include_pad=FLAG, divisor_override=SIZE | NOTHING),
    "gelu": Call(F.gelu, input=TENSOR, approximate=one_of("none", "tanh")),
    "hardsigmoid": _elementwise(F.hardsigmoid),
    "hardswish": _elementwise(F.hardswish),
    "max_pool2d": _pool(F.max_pool2d, dilation=pair(SIZE), ceil_mode=FLAG, return_indices=one_of(False)),
    "normalize": Call(F.normalize, input=TENSOR, p=REAL, dim=DIMS, eps=REAL, out=NOTHING),
    "pad": Call(
        F.pad,
        required=2,
        elements=_padded,
        input=TENSOR,
        pad=several(INTEGER, 2 * MOST_DIMS),
        mode=one_of("constant", "reflect", "replicate", "circular"),
        value=REAL | NOTHING,
    ),
    "relu": _elementwise(F.relu),
    "relu6": _elementwise(F.relu6),
    "scaled_dot_product_attention": Call(
        F.scaled_dot_product_attention,
        required=3,
        elements=_attention,
        query=TENSOR,
        key=TENSOR,
        value=TENSOR,
        attn_mask=TENSOR | NOTHING,
        dropout_p=one_of(0, 0.0),
        is_causal=FLAG,
        scale=NUMBER | NOTHING,
        enable_gqa=FLAG,
    ),
    "silu": _elementwise(F.silu),
    "softmax": Call(F.softmax, input=TENSOR, dim=DIM, _stacklevel=whole(0, 16), dtype=NOTHING),
}


def _method(name: str, result: Rule = "tensor", required: int = 0, **more: Any) -> Call:
    """Of a tensor; what is required, and the parameters, come after it."""
    own = {key: more.pop(key) for key in ("rest", "elements") if key in more}
    return Call(name, result, 1 + required, **own, input=TENSOR, **more)


METHODS: dict[str, Call] = {
    call.target: call
    for call in (
        _method("add", required=1, elements=_broadcast, other=OPERAND, alpha=REAL),
        _method("chunk", "tensors", required=1, elements=_parts, chunks=whole(1, MOST_PARTS), dim=DIM),
        _method("contiguous"),
        _method("expand", required=1, size=INTEGER | SIZES, rest=INTEGER),
        _method("flatten", start_dim=DIM, end_dim=DIM),
        _method("mean", dim=DIMS | NOTHING, keepdim=FLAG, dtype=NOTHING),
        _method("mul", required=1, elements=_broadcast, other=OPERAND),
        _method("permute", required=1, dims=DIMS, rest=DIM),
        _method("relu"),
        _method("reshape", required=1, shape=INTEGER | SIZES, rest=INTEGER),
        _method("sigmoid"),
        _method("size", _of_size, dim=DIM),
        _method("softmax", required=1, dim=DIM, dtype=NOTHING),
        _method(
            "split", "tensors", required=1, elements=_parts, split_size=INTEGER | several(INTEGER, MOST_PARTS), dim=DIM
        ),
        _method("squeeze", dim=DIMS),
        _method("sub", required=1, elements=_broadcast, other=OPERAND, alpha=REAL),
        _method("sum", dim=DIMS | NOTHING, keepdim=FLAG, dtype=NOTHING),
        _method("tanh"),
        _method("transpose", required=2, dim0=DIM, dim1=DIM),
        _method("unbind", "tensors", elements=_parts, dim=DIM),
        _method("unflatten", required=2, dim=DIM, sizes=SIZES),
        _method("unsqueeze", required=1, dim=DIM),
        _method("view", required=1, size=INTEGER | SIZES, rest=INTEGER),
    )
}

# By what a step calls.
CALLS: dict[tuple[str, Any], Call] = {
    **{("function", call.target): call for call in FUNCTIONS.values()},
    **{("method", call.target): call for call in METHODS.values()},
}
