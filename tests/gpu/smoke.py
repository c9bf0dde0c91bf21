"""Every op in every GPU backend, one case for each dtype and layout, against numpy oracles, without pytest.

    python tests/gpu/smoke.py --processes 8 --limit 60

On a GPU C++/CUDA and Triton run; without one C++/CUDA emulated and Triton interpreted. What fails is printed at once,
with its arguments and the first wrong element, and the run goes on, in a new process where a kernel has left the GPU
unusable or has ended the process. The end is a table, and the exit status tells.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# ruff: noqa: E402  (this must stand before the tests' own modules, and qkernels, are imported)
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_cuda
import smoke_cases
from qkernels import backends
from smoke_cases import Case, Expected


class Backend(NamedTuple):
    """Where the ops of a backend are found, and where their tensors lie."""

    name: str
    device: str
    function: Callable[[str], Callable[..., Any]]
    truncates_bfloat16: bool = False  # as Triton's interpreter does where hardware rounds

    def has(self, op: str) -> bool:
        return op not in (backends.FOR_CPUS if self.name == "triton" else backends.NOT_IN_CUDA)


def in_cuda(op: str) -> Callable[..., Any]:
    for row in backends.report():
        if (row.op, row.device) == (op, "cuda") and row.backend != "cuda":
            raise RuntimeError(f"{row.backend} serves {op}, not C++/CUDA: {row.reason}")
    return getattr(torch.ops.qkernels, op).default


def in_triton(op: str) -> Callable[..., Any]:
    return backends.implementation(op, "triton")


def emulated(op: str) -> Callable[..., Any]:
    if (why := emulated_cuda.why_not()) is not None:
        raise RuntimeError(why)
    return emulated_cuda.op(op)


BACKENDS = {
    b.name: b
    for b in (
        [Backend("cuda", "cuda", in_cuda), Backend("triton", "cuda", in_triton)]
        if GPU
        else [Backend("emulated", "cpu", emulated), Backend("triton", "cpu", in_triton, truncates_bfloat16=True)]
    )
}


# One case --------------------------------------------------------------------------------------------------------


def on(device: str, t: Tensor) -> Tensor:
    """A copy on a device with the same strides and offset, so that what is unaligned stays so."""
    room = t.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True) if n)
    return torch.empty(room, dtype=t.dtype, device=device).as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


def difference(actual: Tensor, expected: Expected, truncates_bfloat16: bool = False) -> str | None:
    """None if `actual` is what is expected, else how it differs; of wrong elements the first."""
    values, bound = expected.values.double(), torch.as_tensor(expected.bound)
    if (actual.dtype, actual.shape) != (expected.dtype, values.shape):
        want = f"{expected.dtype} {list(values.shape)}"
        return f"is {actual.dtype} {list(actual.shape)}, expected {want}".replace("torch.", "")
    if truncates_bfloat16 and actual.dtype == torch.bfloat16:
        bound = bound + torch.finfo(torch.bfloat16).eps * values.abs()
    got = actual.double().cpu()
    right = (got == values) | (got.isnan() & values.isnan()) | ((got - values).abs() <= bound)
    if not right.all():
        first = tuple((~right).nonzero()[0].tolist())
        allowed = bound.expand(values.shape)[first].item()
        return (
            f"{int((~right).sum())} of {right.numel()} elements are wrong, the first at {list(first)}: "
            f"expected {values[first].item():.9g}, got {got[first].item():.9g} (may differ by {allowed:.3g})"
        )
    if expected.strides is not None and actual.numel():
        found = [s for n, s in zip(actual.shape, actual.stride(), strict=True) if n > 1]
        if found != (want := [s for n, s in zip(actual.shape, expected.strides, strict=True) if n > 1]):
            return f"is laid out with strides {found}, expected {want}"
    return None


def described(op: str, arguments: tuple[Any, ...]) -> str:
    """The arguments by their names in the schema, tensors by dtype, shape, strides and offset."""

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            place = f"strides {value.stride()}" + f" offset {value.storage_offset()}" * bool(value.storage_offset())
            return f"{value.dtype} {tuple(value.shape)} {place}".replace("torch.", "")
        return f"[{', '.join(map(text, value))}]" if isinstance(value, list) else str(value)

    names = [argument.name for argument in getattr(torch.ops.qkernels, op).default._schema.arguments]
    return "\n".join(f"    {name} = {text(value)}" for name, value in zip(names, arguments, strict=True))


def check(backend: Backend, case: Case) -> str | None:
    """None, or what is wrong with a case."""
    problem = smoke_cases.PROBLEMS[case.op](np.random.default_rng(0), **case.parameters)
    arguments = tree_map_only(Tensor, lambda t: on(backend.device, t), problem.arguments)
    try:
        results = tree_leaves(backend.function(case.op)(*arguments))
        if GPU:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:1500]}\n{described(case.op, arguments)}"
    if len(results) != len(problem.results):
        return f"{len(results)} tensors came out, expected {len(problem.results)}"
    for number, (actual, expected) in enumerate(zip(results, problem.results, strict=True)):
        if (wrong := difference(actual, expected, backend.truncates_bfloat16)) is not None:
            return f"result {number} {wrong}\n{described(case.op, arguments)}"
    return None


# All cases, in processes that may die ------------------------------------------------------------------------------


def todo(names: list[str]) -> list[tuple[Backend, Case]]:
    """Every case in every backend that has its op, backend by backend."""
    return [(b, case) for b in (BACKENDS[name] for name in names) for case in smoke_cases.cases() if b.has(case.op)]


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def run_share(arguments: argparse.Namespace) -> None:
    """Each case of a share that has not begun yet, noted in the results file when it begins and when it ends."""
    begun = {row["case"] for row in read(arguments.results)}
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills what torch.empty gives with NaN
    with arguments.results.open("a", buffering=1) as file:
        for backend, case in todo(arguments.backends)[arguments.share :: arguments.processes]:
            name = f"{backend.name} {case}"
            if name in begun:
                continue
            if time.time() > arguments.until:
                return
            row = {"case": name, "backend": backend.name, "op": case.op, "share": arguments.share}
            file.write(json.dumps(row) + "\n")
            start = time.perf_counter()
            wrong = check(backend, case)
            file.write(json.dumps(row | {"wrong": wrong, "seconds": time.perf_counter() - start}) + "\n")
            if wrong is not None:
                print(f"FAILED {name}: {wrong}", flush=True)
                if GPU and not gpu_answers():
                    os._exit(1)  # after a bad access nothing runs in this process any more


def gpu_answers() -> bool:
    try:
        return torch.ones(1, device="cuda").item() == 1
    except RuntimeError:
        return False


def run_all(arguments: argparse.Namespace) -> bool:
    """Start a process for each share, again where one died in the middle; returns whether every case passed."""
    arguments.results.write_text("")
    begun = dict.fromkeys(range(arguments.processes), 0)
    running = {share: start_share(arguments, share) for share in begun}
    while running:
        time.sleep(0.05)
        for share, process in list(running.items()):
            if (code := process.poll()) is None:
                continue
            del running[share]
            progress = sum(row["share"] == share for row in read(arguments.results))
            if code != 0 and progress > begun[share]:
                print(f"process {share} ended with {code}; the next one leaves out what has begun", flush=True)
                begun[share], running[share] = progress, start_share(arguments, share)
    return summarize(arguments)


def start_share(arguments: argparse.Namespace, share: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--share", str(share), "--processes", str(arguments.processes)]
    command += ["--until", str(arguments.until), "--results", str(arguments.results)]
    return subprocess.Popen([*command, "--backends", *arguments.backends])


def summarize(arguments: argparse.Namespace) -> bool:
    """Print a line an op: how many cases passed in each backend."""
    rows = read(arguments.results)
    ended = {row["case"]: row for row in rows if "wrong" in row}
    died = {row["case"] for row in rows} - set(ended)
    for name in sorted(died):
        print(f"FAILED {name}: the process ended in it")
    passed = Counter((r["op"], r["backend"]) for r in ended.values() if r["wrong"] is None)
    total = Counter((case.op, backend.name) for backend, case in todo(arguments.backends))
    print(f"{'passed of all':30}" + "".join(f"{name:>14}" for name in arguments.backends))
    for op in smoke_cases.PARAMETERS:
        cells = [f"{passed[op, b]} of {total[op, b]}" if total[op, b] else "-" for b in arguments.backends]
        print(f"{op:30}" + "".join(f"{cell:>14}" for cell in cells))
    slowest = max(ended.values(), key=lambda row: row["seconds"], default=None)
    unreached = total.total() - len(ended) - len(died)
    print(
        f"{passed.total()} passed, {len(ended) + len(died) - passed.total()} failed, {unreached} not reached"
        + (f"; the slowest took {slowest['seconds']:.1f} s: {slowest['case']}" if slowest else "")
    )
    return passed.total() == total.total()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="that share the cases (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=3600, metavar="SECONDS", help="begin no case after so many")
    parser.add_argument("--results", type=Path, default=Path("smoke.jsonl"), help="a line when a case begins or ends")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.list:
        print(*(f"{backend.name} {case}" for backend, case in todo(arguments.backends)), sep="\n")
    elif arguments.share is not None:
        run_share(arguments)
    else:
        arguments.until = time.time() + arguments.limit
        sys.exit(not run_all(arguments))


if __name__ == "__main__":
    main()
