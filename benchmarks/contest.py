"""A contest: several ways to do the same work, checked against the reference and then timed side by side."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .costs import Cost, counted
from .machine import cache_bytes
from .timing import Run, captured, seconds_of, summary

Work = Callable[[int], Any]  # on input set i; what it returns is compared with the reference
MOST_SETS = 32
FEWEST_ROUNDS, MOST_ROUNDS = 5, 50
PHASE_ROUNDS = 3
WARM_CALLS = 2
TOO_SLOW, LONG = 20, 1.0  # a peer that takes so many times as long as the base, and as many seconds, runs once
ALLOWED_SHARE = 1e-3  # of elements that may differ: peers that multiply by 1/s put a few into a neighboring code


class Absent(Exception):
    """Why a peer cannot take part."""


@dataclass
class Contest:
    """The contenders of one benchmark; `measure` times them.

    Attributes:
        device: "cpu" or "cuda".
        seconds: about how long to measure.
        drive: calls its first argument, one round, as often as its second says (pytest-benchmark's loop).
        record: gets what was measured, plain types: what the report needs.
        slow: the pattern of peers that take part although they take minutes to prepare.
        profile: instead of timing, run each of ours once where a profiler that was told so looks.
        parameters: what tells this benchmark from others of the same function, for the report.
        size: elements or images, the x axis of the plot of time against size.
        sets: how many sets of inputs there are; a round does the work on each, so that none is found in a cache.
        graphs: on a GPU, whether contenders are captured in CUDA graphs.
        settle: seconds to wait before each contender's turn, which then runs twice before it is timed: the threads of
            some libraries spin on after their work, and take cores and caches from whoever comes next.
        absent: peer -> why it does not take part.
        work: contender -> the costs of the ops of qkernels that it runs.
        phases: contender -> the phases of its step, which are timed one by one too.
        facts: further lines for the report.
    """

    device: str
    seconds: float
    drive: Callable[[Run, int], None]
    record: Callable[[dict[str, Any]], None]
    slow: str | None = None
    profile: bool = False
    parameters: str = ""
    size: int | None = None
    sets: int = 1
    graphs: bool = True
    settle: float = 0
    contenders: dict[str, Work] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    work: dict[str, list[Cost]] = field(default_factory=dict)
    phases: dict[str, dict[str, Run]] = field(default_factory=dict)
    rounds: int = 0

    def rotate(self, make: Callable[[], Any]) -> list[Any]:
        """Sets of inputs, made by `make`, that together exceed the caches twice."""
        first = make()
        tensors = first if isinstance(first, (tuple, list)) else (first,)
        nbytes = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        self.sets = min(max(-(-2 * cache_bytes(self.device) // nbytes), 1), MOST_SETS)
        return [first, *(make() for _ in range(self.sets - 1))]

    def ours(self, name: str, work: Work, expected: Any = None, tolerance: float = 1e-4) -> None:
        """Enter a contender of this project. Its result must be `expected`, and its cost is counted.

        Raises:
            AssertionError: if the result is wrong.
        """
        if expected is not None:
            wrong = difference(work(0), expected, tolerance)
            assert wrong is None, f"{name}: {wrong}"
        self.contenders[name] = work
        with counted() as costs:
            work(0)
        self.work[name] = list(costs)

    def peer(self, name: str, make: Callable[[], Work], expected: Any = None, tolerance: float = 1e-4) -> None:
        """Enter a peer; one that fails, or whose result is not `expected`, is listed as absent with the reason."""
        try:
            work = make()
            wrong = difference(work(0), expected, tolerance) if expected is not None else None
        except Absent as reason:
            self.absent[name] = str(reason)
            return
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.absent[name] = f"{type(error).__name__}: {first_line}"[:200]
            return
        if wrong is not None:
            self.absent[name] = f"its result is not the reference's: {wrong}"
        else:
            self.contenders[name] = work

    def slow_peer(self, name: str, make: Callable[[], Work], expected: Any = None, tolerance: float = 1e-4) -> None:
        """A peer that takes too long to prepare or to run unless it is asked for."""
        if self.slow is not None and re.search(self.slow, name):
            self.peer(name, make, expected, tolerance)
        else:
            self.absent[name] = "slow: only with --full or --slow"

    def measure(self, base: str) -> None:
        """Time every contender once a round, and record the result; ratios are to `base` in the same round."""
        if self.profile:
            self._profile()
            return
        runs, launched = {}, []
        for name, work in self.contenders.items():
            runs[name] = self._over_all_sets(work)
            if self.device == "cuda":
                try:
                    runs[name] = captured(runs[name]) if self.graphs else runs[name]
                except RuntimeError:  # it waits for the GPU
                    torch.cuda.synchronize()
                    launched.append(name)
        seconds: dict[str, list[float]] = {name: [] for name in runs}

        def one_round() -> None:
            for name, run in runs.items():
                seconds[name].append(self._turn(run) / self.sets)

        one_round()  # warms up what the checks have not
        first = {name: times.pop() * self.sets for name, times in seconds.items()}
        for name in [n for n, once in first.items() if once > max(LONG, TOO_SLOW * first[base])]:
            self.absent[name] = f"too slow to repeat: one run took {first[name] / first[base]:.0f} times {base}'s"
            for of_contender in (runs, seconds, first):
                del of_contender[name]
        calls = 1 + WARM_CALLS * bool(self.settle)
        length = calls * sum(first.values()) + self.settle * len(first)
        self.rounds = min(max(int(self.seconds / length), FEWEST_ROUNDS), MOST_ROUNDS)
        self.drive(one_round, self.rounds)
        result = {
            "parameters": self.parameters,
            "size": self.size,
            "base": base,
            "rounds": self.rounds,
            "contenders": summary(seconds, base),
            "launched_from_python": launched,
            "absent": self.absent,
            "facts": self.facts,
            "work": {name: [list(cost) for cost in costs] for name, costs in self.work.items()},
            "phases": {name: self._phase_milliseconds(self.phases[name]) for name in runs if name in self.phases},
        }
        self.record(result)

    def _profile(self) -> None:
        for name in self.work:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            self.contenders[name](0)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()

    def _turn(self, run: Run) -> float:
        if self.settle:
            time.sleep(self.settle)
            for _ in range(WARM_CALLS):
                run()
        return seconds_of(run, self.device)

    def _over_all_sets(self, work: Work) -> Run:
        def run() -> None:
            for i in range(self.sets):
                work(i)

        return run

    def _phase_milliseconds(self, phases: dict[str, Run]) -> dict[str, float]:
        """The median time of each phase of a step, which are run in turn."""
        times: dict[str, list[float]] = {name: [] for name in phases}
        for _ in range(PHASE_ROUNDS):
            for name, run in phases.items():
                times[name].append(seconds_of(run, self.device) * 1e3)
        return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def difference(results: Any, expected: Any, tolerance: float) -> str | None:
    """None if the results are those expected but for a few elements, else how they differ.

    Args:
        tolerance: of an element, relative to the largest of its tensor.
    """
    for result, right in zip(as_tensors(results), as_tensors(expected), strict=True):
        result, right = result.detach().float(), right.detach().float()
        if result.shape != right.shape:
            return f"shape {tuple(result.shape)} instead of {tuple(right.shape)}"
        differing = ~((result - right).abs() <= tolerance * right.abs().max())
        # A few of very many; of a handful none.
        if differing.sum() > ALLOWED_SHARE * differing.numel():
            worst = ((result - right).abs().max() / right.abs().max()).item()
            return f"{differing.float().mean():.2%} of the elements are off, by up to {worst:.2g} of the largest"
    return None


def as_tensors(values: Any) -> Sequence[Tensor]:
    """One tensor or several; of quantized ones their codes."""
    tensors = [values] if isinstance(values, Tensor) else values
    return [t.int_repr() if t.is_quantized else t for t in tensors]
