"""Finished runs and ensembles, and the ways to choose what of them is reported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from qtdog.results.runs import ModelCard
from qtdog.training.evaluation import mean_out_accuracy


@dataclass(frozen=True)
class Result:
    """A finished run: its selected model's card, and the step and numbers of each checkpoint that it could select."""

    folder: Path
    card: ModelCard
    records: Sequence[Mapping[str, float]]

    @property
    def targets(self) -> list[int]:
        """Indices of the domains that it left out."""
        return list(self.card.run.test_envs)

    @property
    def sources(self) -> list[int]:
        """Indices of the domains that it was trained on."""
        return self.card.source_envs

    @property
    def column(self) -> str:
        """Where it stands in a table: `art`, or `art+photo` of a run that left out both."""
        return column_of(self.card.domains, self.targets)

    @property
    def last(self) -> Mapping[str, float]:
        """The record of the last step."""
        return max(self.records, key=lambda record: record["step"])


def column_of(domains: Sequence[str], targets: Sequence[int]) -> str:
    """The name of the column of these target domains."""
    return "+".join(domains[env] for env in targets)


def targets_of(ensemble: Mapping[str, Any]) -> list[int]:
    """Indices of the domains that an ensemble's members left out, from its record."""
    return list(ensemble["test_envs"]) if "test_envs" in ensemble else [ensemble["test_env"]]


def sources_of(ensemble: Mapping[str, Any]) -> list[int]:
    """Indices of the domains that an ensemble's members were trained on, from its record."""
    others = [env for env in range(len(ensemble["domains"])) if env not in targets_of(ensemble)]
    return list(ensemble.get("source_envs", others))


@dataclass(frozen=True)
class Choice:
    """The checkpoint of a run that a selection takes.

    Args:
        score: by which runs of other hyper-parameters compare with it.
        values: its numbers, by their names in records.
    """

    score: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Selection:
    """A way to choose what is reported; of several hyper-parameters those whose choice has the greatest score.

    `choose` takes a run and the runs that left out one domain more, all else being equal; None if it needs what is not
    there.
    """

    definition: str
    choose: Callable[[Result, Sequence[Result]], Choice | None]


def source_validation(result: Result, wider: Sequence[Result]) -> Choice:
    """The model that the run has kept."""
    return Choice(result.card.source_validation_accuracy, result.card.accuracies)


def last_step(result: Result, wider: Sequence[Result]) -> Choice:
    """The last checkpoint, whose source validation compares it."""
    return Choice(mean_out_accuracy(dict(result.last), result.sources), result.last)


def oracle(result: Result, wider: Sequence[Result]) -> Choice:
    """The last checkpoint, compared by what no real task has."""
    return Choice(fmean(result.last[f"env{env}_out_acc"] for env in result.targets), result.last)


def leave_one_out(result: Result, wider: Sequence[Result]) -> Choice | None:
    """The step at which runs that left out a source domain, too, were the best there, on average over the sources.

    As DomainBed's LeaveOneOutSelectionMethod: a step counts that all these runs have a record of; None without one.
    """
    beside: dict[int, dict[float, Mapping[str, float]]] = {}
    for other in wider:
        if set(result.targets) < set(other.targets):
            (env,) = set(other.targets) - set(result.targets)
            beside[env] = {record["step"]: record for record in other.records}
    choices = []
    for record in sorted(result.records, key=lambda record: record["step"]):
        step = record["step"]
        if all(step in beside.get(env, {}) for env in result.sources):
            accuracies = [beside[env][step][f"env{env}_in_acc"] for env in result.sources]
            choices.append(Choice(float(np.mean(accuracies)), record))
    return max(choices, key=lambda choice: choice.score, default=None)


SELECTIONS = {
    "source validation": Selection(
        "checkpoint and hyper-parameters with the best mean accuracy on the source domains' out parts",
        source_validation,
    ),
    "last step": Selection("the last checkpoint, hyper-parameters by its source validation", last_step),
    "leave-one-out": Selection(
        "checkpoint step and hyper-parameters with the best mean accuracy of the runs that left out a source domain, "
        "too, on that domain",
        leave_one_out,
    ),
    "oracle": Selection(
        "the last checkpoint, hyper-parameters by its accuracy on the target's out part, which no real task has",
        oracle,
    ),
}
