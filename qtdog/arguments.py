"""How flags and their values may be spelled on the command line."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from types import GenericAlias
from typing import Any, get_args

from qtdog.methods.grid import takes_several
from qtdog.methods.numbers import dashed

SEVERAL = "; several: a run for each"  # in the help of the flags that take several values


def values_of(flag: str, arguments: Sequence[str]) -> list[str]:
    """What follows a flag, each time that it is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, action="append", default=[], dest="values")
    return parser.parse_known_args(arguments)[0].values


def with_dashes(argument: str) -> str:
    """`--test_envs=0` as `--test-envs=0`; jsonargparse's own --print_config stays."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and name != "--print_config":
        name = dashed(name)
    return name + equals + value


def listed(arguments: Sequence[str]) -> list[str]:
    """`--lr 1e-5 5e-5` as `--lr=[1e-5, 5e-5]`, as a file of settings has it, for the flags that take several values."""
    spelled, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        values = []
        if argument.startswith("--") and takes_several(argument[2:].replace("-", "_")):
            values = list(takewhile(lambda value: not value.startswith("--"), left))
        if len(values) > 1:
            argument, left = f"{argument}=[{', '.join(values)}]", left[len(values) :]
        spelled.append(argument)
    return spelled


def or_several(hint: Any) -> Any:
    """The type of a setting of type `hint`, `some type | None`, or of several values of it."""
    return hint | GenericAlias(tuple, (get_args(hint)[0], ...))  # of lists, there would be a second flag that appends
