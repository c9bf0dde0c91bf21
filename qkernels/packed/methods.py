"""The methods of tensors that a program may call: see `functions.py`."""

from typing import Any

from . import elements as count
from .by_members import alone, along, expanded, permuted, pointwise, reshaped, selected, squeezed, unsqueezed
from .calls import Call, Rule
from .elements import MOST_PARTS
from .values import (
    DIM,
    DIMS,
    DTYPE,
    FLAG,
    INTEGER,
    MOST_DIMS,
    NOTHING,
    NUMBER,
    REAL,
    REAL_OR_INFINITE,
    SIZES,
    TENSOR,
    Known,
    Result,
    one_of,
    several,
    whole,
)

OPERAND = TENSOR | NUMBER
LENGTHS = INTEGER | several(INTEGER, MOST_PARTS)
UNARY = (
    *(
        "abs",
        "acos",
        "asin",
        "atan",
        "ceil",
        "clone",
        "contiguous",
        "cos",
        "erf",
        "exp",
        "expm1",
        "floor",
        "log",
        "log1p",
    ),
    *("log2", "logical_not", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square"),
    *("tan", "tanh"),
)


def _of_size(input: Known, dim: Any = None) -> Result:
    return "shape" if dim is None else "number"


def _method(name: str, result: Rule = "tensor", required: int = 0, **more: Any) -> Call:
    """Of a tensor; what is required, and the parameters, come after it."""
    own = {key: more.pop(key) for key in ("rest", "elements", "form") if key in more}
    return Call(name, result, 1 + required, **own, input=TENSOR, **more)


def _pointwise(name: str, **more: Any) -> Call:
    return _method(name, form=pointwise, elements=count.broadcast, required=len(more), **more)


def _reduced(name: str, **more: Any) -> Call:
    return _method(name, form=along(dim=None), dim=DIMS | NOTHING, keepdim=FLAG, **more)


_OF_DTYPE: dict[str, Any] = {"dtype": DTYPE | NOTHING}
_TWO: dict[str, Any] = {"elements": count.broadcast, "form": pointwise}
METHODS: dict[str, Call] = {
    call.target: call
    for call in (
        *map(
            _pointwise,
            UNARY,
        ),
        *(_pointwise(name, other=TENSOR) for name in ("maximum", "minimum", "logical_and", "logical_or", "atan2")),
        *(_reduced(name) for name in ("amax", "amin")),
        *(_reduced(name, **_OF_DTYPE) for name in ("mean", "sum")),
        *(
            _method(name, form=along(dim=None), dim=DIMS | NOTHING, unbiased=FLAG, keepdim=FLAG, correction=REAL)
            for name in ("std", "var")
        ),
        _method("add", required=1, **_TWO, other=OPERAND, alpha=REAL),
        _method("addcmul", required=2, **_TWO, tensor1=TENSOR, tensor2=TENSOR, value=REAL),
        _method(
            "baddbmm",
            required=2,
            elements=lambda i, a, b, **_: i.numel() + count.multiplied(a, b),
            batch1=TENSOR,
            batch2=TENSOR,
            beta=REAL,
            alpha=REAL,
        ),
        _method("bmm", required=1, elements=count.multiplied, mat2=TENSOR),
        _method("chunk", "tensors", 1, elements=count.parts, form=along(dim=0), chunks=whole(1, MOST_PARTS), dim=DIM),
        _method("clamp", form=pointwise, elements=count.broadcast, min=OPERAND | NOTHING, max=OPERAND | NOTHING),
        _method("cumsum", required=1, form=along(dim=0), dim=DIM, **_OF_DTYPE),
        _method("div", required=1, **_TWO, other=OPERAND, rounding_mode=one_of("floor", "trunc", None)),
        _method("expand", required=1, form=expanded, size=INTEGER | SIZES, rest=INTEGER),
        _method("expand_as", required=1, elements=count.broadcast, other=TENSOR),
        _method("flatten", form=along(start_dim=0, end_dim=-1), start_dim=DIM, end_dim=DIM),
        _method("flip", required=1, form=along(dims=0), dims=DIMS, rest=DIM),
        _method("index_select", required=2, elements=count.selected, form=selected, dim=DIM, index=TENSOR),
        _method("logsumexp", required=1, form=along(dim=0), dim=DIMS, keepdim=FLAG),
        _method("masked_fill", required=2, **_TWO, mask=TENSOR, value=REAL_OR_INFINITE),
        *(
            _method(name, "tensors", 1, elements=count.extremes, form=along(dim=0), dim=DIM, keepdim=FLAG)
            for name in ("max", "min")
        ),
        _method("movedim", required=2, form=along(source=0, destination=0), source=DIMS, destination=DIMS),
        _method("mul", required=1, **_TWO, other=OPERAND),
        _method("narrow", required=3, form=along(dim=0), dim=DIM, start=INTEGER, length=INTEGER),
        *(
            _method(name, required=1, elements=count.newly_sized, size=INTEGER | SIZES, rest=INTEGER)
            for name in ("new_ones", "new_zeros")
        ),
        _method(
            "new_full",
            required=2,
            elements=lambda input, size, fill_value: count.sized(size),
            size=SIZES,
            fill_value=NUMBER,
        ),
        _method("norm", form=along(dim=None), p=REAL | one_of("fro"), dim=DIMS | NOTHING, keepdim=FLAG, **_OF_DTYPE),
        _method("numel", "number", form=alone),
        _method("permute", required=1, form=permuted, dims=DIMS, rest=DIM),
        _method("repeat", required=1, elements=count.repeated, sizes=INTEGER | SIZES, rest=INTEGER),
        _method("repeat_interleave", required=1, elements=count.interleaved, repeats=INTEGER, dim=DIM),
        _method("reshape", required=1, form=reshaped, shape=INTEGER | SIZES, rest=INTEGER),
        _method(
            "roll",
            required=1,
            elements=lambda input, *_, **__: 2 * input.numel(),
            shifts=INTEGER | several(INTEGER, MOST_DIMS),
            dims=DIMS,
        ),
        _method("rsub", required=1, **_TWO, other=OPERAND, alpha=REAL),
        _method("select", required=2, form=along(dim=0), dim=DIM, index=INTEGER),
        _method("size", _of_size, form=alone, dim=DIM),
        _method("softmax", required=1, form=along(dim=0), dim=DIM, **_OF_DTYPE),
        _method("split", "tensors", 1, elements=count.parts, form=along(dim=0), split_size=LENGTHS, dim=DIM),
        _method("squeeze", form=squeezed, dim=DIMS),
        _method("sub", required=1, **_TWO, other=OPERAND, alpha=REAL),
        _method("reshape_as", required=1, other=TENSOR),
        _method("view_as", required=1, other=TENSOR),
        _method("t"),
        _method("to", form=pointwise, required=1, dtype=DTYPE),
        _method("transpose", required=2, form=along(dim0=0, dim1=0), dim0=DIM, dim1=DIM),
        _method("unbind", "tensors", elements=count.parts, form=along(dim=0), dim=DIM),
        _method("unflatten", required=2, form=along(dim=0), dim=DIM, sizes=SIZES),
        _method("unfold", required=3, form=along(dimension=0), dimension=DIM, size=INTEGER, step=INTEGER),
        _method("unsqueeze", required=1, form=unsqueezed, dim=DIM),
        _method("view", required=1, form=reshaped, size=INTEGER | SIZES, rest=INTEGER),
    )
}
