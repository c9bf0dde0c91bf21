"""What tables and comparisons report: `--metric`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

MetricName = Literal["accuracy", "macro-accuracy", "macro-f1", "worst-class", "nll", "ece", "worst"]


@dataclass(frozen=True)
class Metric:
    """A number of a run on its domains.

    Args:
        flag: its name on the command line.
        key: its name in records, behind `env0_in_`.
        title: what it is, in a sentence.
        unit: in which tables have it.
        scale: the unit's number of what records have.
        digits: decimals more than a percent gets.
        worst: of several values the one that is least good.
        across: of a run's values on several domains, the run's number.
    """

    flag: MetricName
    key: str
    title: str
    unit: str = "percent"
    scale: int = 100
    digits: int = 0
    worst: Callable[[Iterable[float]], float] = min
    across: Callable[[Iterable[float]], float] = fmean

    @property
    def is_of_the_worst_domain(self) -> bool:
        """Whether a number is that of the worst domain, so that there are no averages over domains."""
        return self.across is self.worst

    def name(self, env: int, part: str) -> str:
        """The key in records of a domain's `in` or `out` part."""
        return f"env{env}_{part}_{self.key}"

    def of(self, values: Mapping[str, Any], envs: Iterable[int], part: str) -> float:
        """The number, in `unit`, of a record on these domains' `in` or `out` parts."""
        return self.scale * self.across([values[self.name(env, part)] for env in envs])


METRICS = {
    metric.flag: metric
    for metric in (
        Metric("accuracy", "acc", "accuracy"),
        Metric("macro-accuracy", "macro_acc", "macro accuracy, the mean recall of the classes,"),
        Metric("macro-f1", "macro_f1", "macro F1, the mean F1 of the classes,"),
        Metric("worst-class", "worst_class_acc", "accuracy of the worst class"),
        Metric("nll", "nll", "negative log likelihood", "nats", scale=1, digits=2, worst=max),
        Metric("ece", "ece", "expected calibration error, 15 bins,", worst=max),
        Metric("worst", "acc", "accuracy of the worst domain", across=min),
    )
}
ACCURACY = METRICS["accuracy"]
