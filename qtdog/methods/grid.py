"""Grids: settings that a user gives several values, of whose combinations each is a run of its own."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from qtdog.config import TrainConfig
from qtdog.errors import UserError
from qtdog.methods.method import rule_numbers
from qtdog.methods.numbers import dashed

SETTINGS = ("lr", "weight_decay", "batch_size", "dropout", "scale_lr")


def takes_several(name: str) -> bool:
    """Whether a setting may have several values: `SETTINGS`, and the numbers of all losses and rules."""
    return name in SETTINGS or name in rule_numbers()


def points(config: TrainConfig) -> Iterator[TrainConfig]:
    """`config` with one value for each setting of its grid, for all combinations; the last setting changes fastest.

    Raises:
        UserError: for a setting that takes one value only, and for values that are not different ones.
    """
    for name, values in config.grid.items():
        if not takes_several(name):
            raise UserError(f"--{dashed(name)} takes one value, not {len(values)}")
        if len(set(values)) < len(values) or not values or None in values:
            listed = " ".join(map(str, values)) or "none"
            raise UserError(f"--{dashed(name)} needs a value, or several that differ, not {listed}")
    for combination in product(*config.grid.values()):
        yield replace(config, grid={name: [value] for name, value in zip(config.grid, combination, strict=True)})
