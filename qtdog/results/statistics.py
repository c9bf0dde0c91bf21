"""Means over trials and their errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any


@dataclass(frozen=True)
class Cell:
    """Accuracies in percent: one value a trial."""

    trials: Mapping[Any, float]

    @property
    def mean(self) -> float:
        return fmean(self.trials.values())

    @property
    def stderr(self) -> float:
        """DomainBed's: population standard deviation over the trials / sqrt(their number)."""
        return pstdev(self.trials.values()) / math.sqrt(len(self.trials))

    def to_dict(self) -> dict[str, Any]:
        """Unrounded, for JSON."""
        return {"mean": self.mean, "stderr": self.stderr, "n": len(self.trials), "trials": dict(self.trials)}

    def text(self, digits: int = 1, plus_minus: str = "+/-", sign: str = "") -> str:
        """`60.4 +/- 0.3`. One trial says nothing about the error, so none is shown; sign="+" marks a gain."""
        error = f" {plus_minus} {self.stderr:.{digits}f}" if len(self.trials) > 1 else ""
        return f"{self.mean:{sign}.{digits}f}{error}"


def average(cells: Mapping[str, Cell], columns: Sequence[str], digits: int) -> str:
    """Mean over all columns, X if one is missing."""
    missing = any(column not in cells for column in columns)
    return "X" if missing else f"{fmean(cells[column].mean for column in columns):.{digits}f}"


def mean_cell(cells: Mapping[str, Cell], columns: Sequence[str]) -> Cell | None:
    """For each trial that has all columns the mean over them; None if there is no such trial."""
    trials = [set(cells[column].trials) if column in cells else set() for column in columns]
    complete = sorted(set.intersection(*trials))
    means = {trial: fmean(cells[column].trials[trial] for column in columns) for trial in complete}
    return Cell(means) if means else None
