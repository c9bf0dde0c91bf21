"""The numbers of losses, step rules and averaging rules: each stands in the dataclass of the rule that uses it.

A number is a flag of `qtdog train` of the same name, and may have another value in a preset.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints


def number(default: Any, help: str, least: float = -math.inf, most: float = math.inf) -> Any:
    """A field of a rule: its default, what it is, and the least and greatest value that it may have."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True)
class Number:
    """What a rule's field says of a number."""

    name: str
    type: Any
    default: Any
    help: str
    least: float
    most: float

    @property
    def limits(self) -> str:
        """`at least 0`, `between 0 and 1`."""
        if self.most == math.inf:
            return f"at least {self.least:g}"
        return f"at most {self.most:g}" if self.least == -math.inf else f"between {self.least:g} and {self.most:g}"


@cache  # a sweep asks for them a hundred times a run
def numbers_of(rule: type) -> Mapping[str, Number]:
    """Name -> number of a rule, in order."""
    types = get_type_hints(rule)
    return {
        f.name: Number(f.name, types[f.name], f.default, **f.metadata) for f in fields(rule) if "help" in f.metadata
    }


def dashed(name: str) -> str:
    """A field's name as its flag is spelled."""
    return name.replace("_", "-")
