"""Means over trials and their errors, and Student's t."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any


@dataclass(frozen=True)
class Cell:
    """Numbers in the unit of their table, accuracies in percent: one value a trial."""

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


def average(cells: Mapping[str, Cell], columns: Sequence[str]) -> float | None:
    """Mean over all columns of their means; None if one is missing."""
    missing = any(column not in cells for column in columns)
    return None if missing else fmean(cells[column].mean for column in columns)


def mean_cell(
    cells: Mapping[str, Cell], columns: Sequence[str], mean: Callable[[Iterable[float]], float] = fmean
) -> Cell | None:
    """For each trial that has all columns the mean over them, or what else; None if there is no such trial."""
    trials = [set(cells[column].trials) if column in cells else set() for column in columns]
    complete = sorted(set.intersection(*trials))
    means = {trial: mean([cells[column].trials[trial] for column in columns]) for trial in complete}
    return Cell(means) if means else None


# Student's t -----------------------------------------------------------------------------------------------------


def t_within(t: float, degrees: int) -> float:
    """The probability that |T| <= t, where T has Student's distribution with an integer number of degrees of freedom.

    A finite sum of powers of a cosine (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {degrees}")
    angle = math.atan2(t, math.sqrt(degrees))
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return min(2 / math.pi * (angle + total) if odd else total, 1.0)


def t_quantile(confidence: float, degrees: int) -> float:
    """The t for which |T| <= t with this probability, by bisection: 12.71 for .95 and one degree of freedom."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, not {confidence}")
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    while low < (middle := (low + high) / 2) < high:
        if t_within(math.sqrt(degrees) * math.tan(middle), degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)
