"""Calls of the ops as nobody should make them: legal arguments, of which a few are changed at random.

    python tests/hostile_calls.py cpp --ops pack unpack --count 1000

An op either refuses (RuntimeError, ValueError, TypeError) or gives what the reference gives, and it refuses whatever
the checks in Python refuse. What its check lets pass it may refuse for its size alone. Each call follows from its op
and its number. `attack` makes them in another process, which may have no more than `MEGABYTES` beyond what it begins
with; a call that ends the process is a failure, and the others follow in a new one.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# ruff: noqa: E402  (this must stand before the tests' own modules, and qkernels, are imported)
TESTS = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

import hostile_arguments as arguments
from packed_oracle import INEXACT as INEXACT_ACTIVATIONS
from qkernels import backends
from qkernels.ops.library import run_check
from qkernels.ops.packed_network import ACTIVATION_NUMBERS, FIELDS, KINDS
from qkernels.ops.schemas import SCHEMAS

MEGABYTES = 256
MOST_FAILURES = 5  # of an attack; then it ends
REFUSALS = (RuntimeError, ValueError, TypeError, MemoryError)
# How an op says that what was asked for is too large: PyTorch's allocator, its tensors' sizes, and the kernels.
TOO_LARGE = re.compile(
    r"memory|too (large|big|many)|overflow|larger than|does not fit|numel|exceed|more than 2\^31|Storage size"
)
# Of sums, and of roundings of them, the backends promise a bound (docs/numerics.md), which this is well beyond.
INEXACT = {"fake_quantize_backward", "fake_quantize_multi_backward", "mean_abs", "packed_conv2d", "packed_gemv"}


@dataclass
class Report:
    """What became of the calls of an attack."""

    outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(self.outcomes.items()))
        return "\n".join([f"{self.outcomes.total()} calls in {self.seconds:.0f} s: {counts}", *self.failures])


# One call --------------------------------------------------------------------------------------------------------


def reference_ops() -> Any:
    """torch.ops.qkernels_expected: the same schemas, by the checks in Python and then the reference, on the CPU."""
    namespace = "qkernels_expected"
    for op, schema in SCHEMAS.items():
        torch.library.define(f"{namespace}::{op}", schema)

        def expected(*args: Any, op: str = op) -> Any:
            run_check(op, *args)
            return backends.checked(op, "reference")(*tree_map_only(Tensor, on_cpu, args))

        torch.library.impl(f"{namespace}::{op}", "CompositeExplicitAutograd", expected)
    return getattr(torch.ops, namespace)


def on_cpu(t: Tensor) -> Tensor:
    return t if t.is_meta else t.cpu()


def ops_of(backend: str) -> Callable[[str], Callable[..., Any]]:
    """op -> the op of a backend as PyTorch calls it, from its schema on."""
    if backend in ("cpp", "cuda"):
        return lambda op: getattr(torch.ops.qkernels, op).default
    if backend == "emulated":
        import emulated_cuda

        why = emulated_cuda.why_not()
        assert why is None, why
    namespace = f"qkernels_{backend}"
    for op, schema in SCHEMAS.items():
        if backend != "emulated":
            torch.library.define(f"{namespace}::{op}", schema)
            served_by = "reference" if op in backends.FOR_CPUS else backend
            torch.library.impl(f"{namespace}::{op}", ("CPU", "CUDA"), backends.checked(op, served_by))
        torch.library.impl(f"{namespace}::{op}", "CompositeExplicitAutograd", getattr(torch.ops.qkernels, op))
    return lambda op: getattr(getattr(torch.ops, namespace), op).default


def result_of(function: Callable[..., Any], args: list[Any]) -> list[Tensor] | Exception:
    try:
        with torch.no_grad():
            return tree_leaves(function(*args))
    except REFUSALS as error:
        return error


def differs(op: str, actual: Tensor, expected: Tensor, args: list[Any], coarse: bool) -> bool:
    if op == "packed_panels":  # which each lays out as it reads them
        return (actual.dtype, actual.shape[0]) != (expected.dtype, expected.shape[0])
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return True
    if actual.is_meta or expected.is_meta:
        return not (actual.is_meta and expected.is_meta)
    inexact = op in INEXACT or coarse or any(a in INEXACT_ACTIVATIONS for a in args if isinstance(a, str))
    if op == "packed_network" and (inexact := has_inexact_rows(args)) and len(args[2]) > 1:
        return False  # what such a row gives, those behind it make more of
    actual, exact = actual.cpu(), not inexact
    if exact or not expected.numel():
        return not torch.equal(actual.nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7))
    if not expected.dtype.is_floating_point:  # one code, where an exponential's rounding matters
        return bool((actual.int() - expected.int()).abs().max() > 1)
    scale = expected.float()[expected.isfinite()].abs().amax(dim=None).item() if expected.isfinite().any() else 1.0
    tolerance = max(1e-4, 4 * torch.finfo(expected.dtype).eps)
    terms = max(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor))
    return not torch.allclose(
        actual.float(), expected.float(), rtol=tolerance, atol=tolerance * max(scale, terms**0.5), equal_nan=True
    )


def has_inexact_rows(args: list[Any]) -> bool:
    """Whether a row of `packed_network` has an exponential, or is a float convolution or another sum of floats."""
    kind, activation, scale = (FIELDS.index(name) for name in ("kind", "activation", "x_scale"))
    rows = args[2].tolist()
    convolutions = [row for row in rows if row[kind] == KINDS.index("convolve")]
    return any(row[kind] in map(KINDS.index, ("mean", "norm", "attend")) for row in rows) or any(
        ACTIVATION_NUMBERS[row[activation]] in INEXACT_ACTIVATIONS or row[scale] < 0 for row in convolutions
    )


def outcome(op: str, args: list[Any], function: Callable[..., Any], expected: Callable[..., Any], coarse: bool) -> str:
    """What became of a call: "refused", "equal", "too large"; anything else is a failure."""
    wanted = result_of(expected, args)
    got = result_of(function, args)
    if isinstance(wanted, Exception):
        too_large = TOO_LARGE.search(str(wanted)) or isinstance(wanted, MemoryError)
        if isinstance(got, Exception):
            return "refused"
        if op == "packed_network" and all(t.is_meta for t in got):
            return "equal"  # a fake kernel sees no table
        return "too large for the reference" if too_large else f"accepted, though: {wanted}"
    if isinstance(got, Exception):
        return "too large" if TOO_LARGE.search(str(got)) or isinstance(got, MemoryError) else f"refused with {got!r}"
    wrong = len(wanted) != len(got) or any(differs(op, a, e, args, coarse) for a, e in zip(got, wanted, strict=True))
    return "another result" if wrong else "equal"


# Many calls ------------------------------------------------------------------------------------------------------


def limit_memory(megabytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Calls(NamedTuple):
    """Calls of a backend, op after op: `count` of each, numbered from `first` on."""

    backend: str
    ops: tuple[str, ...] = tuple(SCHEMAS)
    count: int = 100
    first: int = 0
    megabytes: int = MEGABYTES  # 0 for no limit, as AddressSanitizer and CUDA need it, which reserve terabytes

    def __len__(self) -> int:
        return self.count * len(self.ops)

    def __getitem__(self, i: int) -> tuple[str, int]:  # type: ignore[override]
        return self.ops[i // self.count], self.first + i % self.count


def make_calls(calls: Calls, skip: int) -> None:
    """Writes the index of each call before it, and its outcome after it."""
    torch.backends.mkldnn.enabled = False  # whose kernels are made in memory of their own, of which there is little
    function_of, expected = ops_of(calls.backend), reference_ops()
    device = "cuda" if calls.backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    if calls.megabytes:
        # What PyTorch loads with its first error, and for its first tensor without data, is not to be counted.
        for x in (torch.zeros(1).expand(2**60), torch.zeros(1, device="meta")):
            result_of(function_of("mean_abs"), [x, None])
            result_of(expected.mean_abs, [x, None])
        limit_memory(calls.megabytes)
    for i in range(skip, len(calls)):
        op, number = calls[i]
        print(i, end=" ", flush=True)
        args = arguments.hostile(op, number, device)
        print(outcome(op, args, function_of(op), getattr(expected, op).default, calls.backend == "triton"), flush=True)


def attack(calls: Calls, seconds: float, **environment: str) -> Report:
    """Make the calls in other processes, ended after so many seconds."""
    report, begin, skip = Report(), time.monotonic(), 0
    while skip < len(calls) and len(report.failures) < MOST_FAILURES:
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            report.failures.append(f"no time left after {skip} of {len(calls)} calls")
            break
        skip = one_process(calls, skip, report, left, environment)
    report.seconds = time.monotonic() - begin
    return report


def one_process(calls: Calls, skip: int, report: Report, seconds: float, environment: dict[str, str]) -> int:
    """Adds what one process comes to; returns how many calls are made then."""
    command = [sys.executable, __file__, calls.backend, "--ops", *calls.ops, "--skip", str(skip)]
    for name in ("count", "first", "megabytes"):
        command += [f"--{name}", str(getattr(calls, name))]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    # What nobody has written is not 0; what is large goes back when it is freed, for there is a limit.
    fixed |= {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | fixed | environment
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nended after {seconds:.0f} s"
    for line in output.splitlines():
        index, _, what = line.partition(" ")
        skip = int(index) + 1
        known = what in ("equal", "refused") or what.startswith("too large")
        report.outcomes[what if known else "FAILED" if what else "CRASHED"] += 1
        if not known:
            what = what or f"the process ended with {process.returncode}: {errors[-2000:]}"
            report.failures.append(f"{described(*calls[skip - 1])}: {what}")
    if process.returncode and (not output or output.endswith("\n")):  # of no call
        report.failures.append(f"the process ended with {process.returncode}: {errors[-2000:]}")
        return len(calls)
    return skip


def described(op: str, number: int) -> str:
    def short(value: Any) -> Any:
        if isinstance(value, Tensor):
            return f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
        return [short(v) for v in value] if isinstance(value, list) else value

    return f"{op}, call {number}, {[short(value) for value in arguments.hostile(op, number, 'cpu')]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cpp", "cuda", "emulated", "triton", "reference"])
    parser.add_argument("--ops", nargs="+", default=list(SCHEMAS), choices=list(SCHEMAS))
    for name, default in (("count", 100), ("first", 0), ("megabytes", MEGABYTES), ("skip", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--attack", type=float, metavar="SECONDS", help="in other processes, and report")
    chosen = parser.parse_args()
    calls = Calls(chosen.backend, tuple(chosen.ops), chosen.count, chosen.first, chosen.megabytes)
    if chosen.attack is None:
        return make_calls(calls, chosen.skip)
    report = attack(calls, chosen.attack)
    print(report)
    sys.exit(len(report.failures))


if __name__ == "__main__":
    main()
