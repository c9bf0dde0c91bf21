"""How learning rates change along a run."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from qtdog.config import RunConfig


def rate_factor(run: RunConfig, step: int) -> float:
    """What all learning rates are multiplied by for the update of `step`.

    They grow in proportion to the steps until the first after `warmup_steps` has the whole rate, and stay so or, with
    `cosine`, fall from there along half a wave that would be 0 one step after the last.
    """
    warmup = run.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if run.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / (run.steps - warmup))) / 2


def set_rates(optimizer: Optimizer, rates: Sequence[float], factor: float) -> None:
    """Give each group of parameters its rate times `factor`; the same whatever the rates were before."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
