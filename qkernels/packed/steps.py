"""What a program is made of: calls, and in their arguments references to the results of earlier ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Ref:
    """In the arguments of a step: the result of an earlier one, or the images."""

    name: str


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: of its result.
        op: what it calls: a layer by its name, a function, or a method of its first argument by its name.
        target: that name, or the function.
        args, kwargs: plain values and Refs, also inside of tuples, lists and slices.
    """

    name: str
    op: Literal["layer", "function", "method"]
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def uses(self) -> list[str]:
        """The names of the results that it takes."""
        return [ref.name for ref in refs_in((self.args, self.kwargs))]


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A value with `change(part)` in place of each part of that kind, in tuples, lists, dicts and slices."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple([mapped(part, kind, change) for part in value])
    if isinstance(value, list):
        return [mapped(part, kind, change) for part in value]
    if isinstance(value, dict):
        return {name: mapped(part, kind, change) for name, part in value.items()}
    if isinstance(value, slice):
        return slice(*mapped((value.start, value.stop, value.step), kind, change))
    return value


def refs_in(value: Any) -> list[Ref]:
    """The Refs among arguments, in order."""
    found: list[Ref] = []
    mapped(value, Ref, found.append)
    return found
