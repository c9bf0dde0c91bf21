"""What a method is made of: a loss, a step rule, an averaging rule and a quantizer, each independent of the others."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qtdog.methods.algorithms import LOSSES
from qtdog.methods.averaging import AVERAGING
from qtdog.methods.numbers import Number, numbers_of
from qtdog.methods.steps import STEPS


@dataclass(frozen=True)
class Method:
    """One loss (algorithms/), step rule (steps), averaging rule (averaging) and quantizer, or none.

    `numbers` are those that differ from the protocol: for "all" data sets, for "pictures", or for a data set by name.
    """

    label: str
    loss: str = "erm"
    step: str = "plain"
    averaging: str = "none"
    quantizer: Literal["lsq", "inq"] | None = None
    ensemble: str | None = None
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ensemble_label(self) -> str:
        return self.ensemble or f"Ensemble of {self.label}"

    def rules(self) -> dict[str, type]:
        """Its loss, step rule and averaging rule, by the groups of a run's settings."""
        return {kind: rules[getattr(self, kind)] for kind, rules in RULES.items()}

    def options(self) -> dict[str, list[str]]:
        """The names of the numbers that they take."""
        return {group: list(numbers_of(rule)) for group, rule in self.rules().items()}


RULES: dict[str, Mapping[str, type]] = {"loss": LOSSES, "step": STEPS, "averaging": AVERAGING}
PARTS: dict[str, Collection[str]] = {**RULES, "quantizer": ("lsq", "inq", "none")}


def rule_numbers() -> dict[str, tuple[str, Number]]:
    """Name -> (kind of rule, number) of every number that any rule has."""
    return {
        name: (kind, number)
        for kind, rules in RULES.items()
        for rule in rules.values()
        for name, number in numbers_of(rule).items()
    }
