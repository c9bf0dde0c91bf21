"""Whether what was read from JSON or YAML has the types that a dataclass declares."""

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Class = TypeVar("Class")


def checked(cls: type[Class], values: Any) -> Class:
    """A dataclass from its fields' values; TypeError names one that is missing, unknown or of another type."""
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} is no group of settings")
    made = cls(**values)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        if not fits(getattr(made, field.name), hints[field.name]):
            raise TypeError(f"{field.name} cannot be {getattr(made, field.name)!r}")
    return made


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type; an int is a float, a bool is neither."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
