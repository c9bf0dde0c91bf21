"""`qtdog` in a process of its own, which dies or whose disk fails at a chosen operation on files.

The processes are forked from a server that has imported qtdog and has computed nothing, so that each starts at once and
as a fresh one would.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# A training of seconds.
SMALL = ["--batch-size", "2", "--device", "cpu", "--steps", "5", "--checkpoint-freq", "2", "--eval-train-images", "4",
         "--backbone", "SMALL_CNN", "--test-envs", "0"]  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.mkdir", "fcntl.lockf")  # of the interpreter's audit events


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit code, negative for a signal; what it printed; how many operations on files it did."""

    code: int
    text: str
    operations: int


def told_in_one_line(outcome: Outcome) -> bool:
    """Exit code 2, no traceback, and a last line that says why."""
    return (
        outcome.code == 2
        and "Traceback" not in outcome.text
        and outcome.text.count("qtdog: error: ") == 1
        and outcome.text.splitlines()[-1].startswith("qtdog: error: ")
    )


@dataclass(frozen=True)
class Nothing:
    """Disturbs nothing, and counts the operations on files."""

    def at(self, operation: int, path: str) -> None:
        """Called before each operation that changes files, of which this is the `operation`-th from 1."""


@dataclass(frozen=True)
class Kill(Nothing):
    """Kills the process before its `at_operation`-th operation."""

    at_operation: int

    def at(self, operation: int, path: str) -> None:
        if operation == self.at_operation:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fail(Nothing):
    """From its `first` operation on, `count` operations of the process fail with the error `number`."""

    first: int
    number: int
    count: int = 10**9

    def at(self, operation: int, path: str) -> None:
        if self.first <= operation < self.first + self.count:
            raise OSError(self.number, os.strerror(self.number), path)


@dataclass(frozen=True)
class Limit(Nothing):
    """No file grows above `size` bytes: a larger one kills the process in the middle of a write, or fails the write."""

    size: int
    kills: bool

    def begin(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kills else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def watch(disturbance: Nothing, folder: str, counter: Any) -> None:
    """From now on tell `disturbance` of every operation of this process on files in or under `folder`."""
    fsync = os.fsync

    def happens(path: str) -> None:
        counter.value += 1
        disturbance.at(counter.value, path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in CHANGES:
            return
        path = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else str(arguments[0])
        if os.path.abspath(path).startswith(folder):
            happens(path)

    def watched(descriptor: int) -> None:  # the one of them that is no audit event
        happens(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched
    sys.addaudithook(hook)
    if isinstance(disturbance, Limit):
        disturbance.begin()


def _run(arguments: Sequence[str], disturbance: Nothing, folder: str, printed: str, counter: Any) -> None:
    import torch

    from qtdog.cli import main

    out = os.open(printed, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    watch(disturbance, folder, counter)
    sys.exit(main(arguments))


@dataclass(frozen=True)
class Started:
    """A process that is on its way."""

    process: Any
    printed: Path
    counter: Any

    def outcome(self) -> Outcome:
        """How it ends, when it has."""
        self.process.join()
        text = self.printed.read_text(errors="replace")
        self.printed.unlink()
        return Outcome(self.process.exitcode, text, self.counter.value)


def start(arguments: Sequence[str], folder: Path, disturbance: Nothing | None = None) -> Started:
    """`qtdog` with these arguments, disturbed in what it does in and under `folder`."""
    descriptor, printed = tempfile.mkstemp()
    os.close(descriptor)
    with _server() as context:
        counter = context.Value("q", 0, lock=False)
        work = (arguments, disturbance or Nothing(), str(folder), printed, counter)
        process = context.Process(target=_run, args=work)
        process.start()
    return Started(process, Path(printed), counter)


def run(arguments: Sequence[str], folder: Path, disturbance: Nothing | None = None) -> Outcome:
    """`start`, and how it ends."""
    return start(arguments, folder, disturbance).outcome()


@contextmanager
def _server() -> Any:
    """Where processes are forked: it finds this module, and computes in one thread."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), before["PYTHONPATH"] or ""])
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtdog.cli"])
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
