"""Timing contenders side by side: each round runs every one of them once, so that a slow moment hits all alike.

On a CPU by the wall clock. On a GPU by events, around the replay of a CUDA graph where the contender can be captured:
then the time is that of its kernels, without Python's launches.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Run = Callable[[], object]


def seconds_of(run: Run, device: str) -> float:
    """Seconds that one call takes."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def work_stream(device: str) -> AbstractContextManager[object]:
    """Within, work goes to a stream that `captured` can capture.

    Also what is only prepared must be in it: a backward runs on the stream of its forward.
    """
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def captured(run: Run) -> Run:
    """`run` as the replay of a CUDA graph; to be called in `work_stream`.

    Raises:
        RuntimeError: if it waits for the GPU, as an `.item()` does, and cannot be captured.
    """
    run()
    # A capture that fails halfway leaves the allocator unusable, so what waits must show before.
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def quartiles(values: list[float]) -> list[float]:
    """The first, second (median) and third quartile of at least two values."""
    return statistics.quantiles(values, n=4, method="inclusive")


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Per contender the quartiles of its milliseconds, and of its time over that of `base` in the same round."""
    return {
        name: {
            "milliseconds": quartiles([t * 1e3 for t in times]),
            "ratio": quartiles([t / o for t, o in zip(times, seconds[base], strict=True)]),
        }
        for name, times in seconds.items()
    }
