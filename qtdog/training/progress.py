"""How far several runs together are, on a terminal and off it."""

import time
from types import TracebackType

from tqdm import tqdm

from qtdog.log import Log


class Progress:
    """A bar of all steps on a terminal; elsewhere a line at each fifth of them.

    Args:
        what: the bar's name.
        total: steps of all runs together.
        log: says the lines.
    """

    def __init__(self, what: str, total: int, log: Log) -> None:
        self.total, self.log = total, log
        self.bar = tqdm(total=total, desc=what, unit="step", disable=None)
        self.began, self.fifths = time.monotonic(), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def __call__(self, done: int) -> None:
        """Show that so many of the steps are done."""
        self.bar.update(done - self.bar.n)
        fifths = 5 * done // self.total
        if self.bar.disable and self.fifths < fifths < 5:
            elapsed = time.monotonic() - self.began
            left = elapsed * (self.total - done) / done
            self.log(f"{20 * fifths} % of the steps in {clock(elapsed)}, about {clock(left)} left")
            self.fifths = fifths


def clock(seconds: float) -> str:
    """`2:05`, or `1:02:05`."""
    return tqdm.format_interval(seconds)
