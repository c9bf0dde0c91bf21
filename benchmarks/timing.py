"""Timing contenders side by side: each round runs every one of them once, so that a slow moment hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Per contender: median milliseconds; median and quartiles of its time over that of `base` in the same round."""
    result = {}
    for name, times in seconds.items():
        ratios = [t / o for t, o in zip(times, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        result[name] = {
            "milliseconds": statistics.median(times) * 1e3,
            "ratio": middle,
            "low": low,
            "high": high,
        }
    return result
