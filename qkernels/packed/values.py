"""The values that a program passes to layers, functions and methods: as JSON, and of which kind each may be."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from .kinds import LARGEST_NUMBER, ProgramError, object_of, shown
from .steps import Ref, mapped

MOST_DIMS = 8
Result = Literal["tensor", "tensors", "number", "shape", "device"]
DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}

# As JSON ---------------------------------------------------------------------------------------------------------


def value_json(value: Any) -> Any:
    """A value in plain types: see `read_value`."""
    if isinstance(value, Ref):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [value_json(v) for v in value]}
    if isinstance(value, list):
        return [value_json(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [value_json(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, float) and math.isinf(value):
        return {"float": str(value)}  # of which JSON has none
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ProgramError(f"the format has no {type(value).__name__}")


def read_value(plain: Any, depth: int = 4) -> Any:
    """The inverse of `value_json`. Whether its numbers make sense, and its Refs exist, is for others to say."""
    if not isinstance(plain, dict | list):
        return plain
    if depth == 0:
        raise ProgramError("values are nested too deeply")
    if isinstance(plain, list):
        return [read_value(part, depth - 1) for part in plain]
    key, inner = next(iter(plain.items())) if len(plain) == 1 else ("", None)
    if key == "node" and isinstance(inner, str):
        return Ref(inner)
    if key == "tuple" and isinstance(inner, list):
        return tuple([read_value(part, depth - 1) for part in inner])
    if key == "slice" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(read_value(part, depth - 1) for part in inner))
    if key == "float" and inner in ("inf", "-inf"):
        return float(inner)
    if key == "dtype" and isinstance(inner, str) and inner in DTYPES:
        return DTYPES[inner]
    if key == "ellipsis" and inner is True:
        return Ellipsis
    raise ProgramError(f"an unknown kind of value: {shown(plain)}")


def read_values(plain: Any) -> dict[str, Any]:
    """A JSON object of such values."""
    return {name: read_value(value) for name, value in object_of(plain).items()}


# Kinds -----------------------------------------------------------------------------------------------------------


class Known(NamedTuple):
    """In the place of a Ref: what is known of the result before anything runs.

    A number is one that images' sizes decide, a shape several of them; tensors are several.
    """

    result: Result


class Kind(NamedTuple):
    """What an argument may be; `fits` takes it with a Known for each Ref."""

    name: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.name} or {other.name}", lambda value: self.fits(value) or other.fits(value))


def resolved(value: Any, results: dict[str, Result]) -> Any:
    """A value with a Known in the place of each Ref.

    Raises:
        ProgramError: for a result that no earlier step gives.
    """

    def known(ref: Ref) -> Known:
        if ref.name not in results:
            raise ProgramError(f"the value {shown(ref.name)} is used before it is made")
        return Known(results[ref.name])

    return mapped(value, Ref, known)


def whole(least: int, most: int = LARGEST_NUMBER) -> Kind:
    """An integer within these bounds, as the file says it."""
    return Kind(f"an integer from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def one_of(*values: Any) -> Kind:
    """Exactly one of these, of the same type."""
    return Kind(
        " or ".join(map(repr, values)), lambda v: any(type(v) is type(value) and v == value for value in values)
    )


def several(kind: Kind, most: int) -> Kind:
    """A list or a tuple of up to that many."""
    return Kind(
        f"a list of up to {most}, each {kind.name}",
        lambda v: type(v) in (list, tuple) and 0 < len(v) <= most and all(map(kind.fits, v)),
    )


def for_each(kind: Kind, dims: int) -> Kind:
    """One for all dimensions of images, or one for each of so many."""
    return kind | Kind(
        f"{dims}, each {kind.name}", lambda v: type(v) in (list, tuple) and len(v) == dims and all(map(kind.fits, v))
    )


def pair(kind: Kind) -> Kind:
    """One for height and width, or one for each."""
    return for_each(kind, 2)


def up_to_three(kind: Kind) -> Kind:
    """One for all dimensions of images, or one for each."""
    return kind | several(kind, 3)


def _real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER  # not NaN either


def _index(value: Any) -> bool:
    if isinstance(value, slice):
        return all(part is None or INTEGER.fits(part) for part in (value.start, value.stop, value.step))
    return value is None or value is Ellipsis or INTEGER.fits(value)


TENSOR = Kind("a tensor", lambda v: v == Known("tensor"))
TENSORS = Kind("several tensors", lambda v: v == Known("tensors"))
SHAPE = Kind("a shape", lambda v: v == Known("shape"))
DEVICE = Kind("a device", lambda v: v == Known("device"))
FLAG = Kind("true or false", lambda v: type(v) is bool)
NOTHING = one_of(None)
REAL = Kind(f"a number within +-{LARGEST_NUMBER}", _real)
REAL_OR_INFINITE = REAL | one_of(math.inf, -math.inf)
NUMBER = REAL | Kind("a computed number", lambda v: v == Known("number"))
INTEGER = whole(-LARGEST_NUMBER) | Kind("a computed number", lambda v: v == Known("number"))
DTYPE = Kind("a dtype", lambda v: isinstance(v, torch.dtype) and v in DTYPES.values())
DIM = whole(-MOST_DIMS, MOST_DIMS - 1)
DIMS = DIM | several(DIM, MOST_DIMS)
SIZES = SHAPE | several(INTEGER, MOST_DIMS)
INDEX = Kind("an index", lambda v: all(map(_index, v)) if type(v) is tuple and len(v) <= MOST_DIMS else _index(v))
