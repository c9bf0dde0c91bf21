"""Measure the kernels on this machine, and write benchmarks/results/<machine>.json and docs/performance.md.

Without options: a quick set, on the GPU if there is one, on the CPU if not. Each case is measured in a process of its
own, so that no case inherits another's heap; results of cases that are not run now stay as they are.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from . import gate, machine, peers, roofline
from .report import RESULTS, write_performance_page

FOLDER = Path(__file__).parent
FILES = (  # the most telling first, for runs with a limit
    "bench_training_step.py",
    "bench_packed_ensemble.py",
    "bench_deployed.py",
    "bench_fake_quantize.py",
    "bench_packed_conv.py",
    "bench_packing.py",
)
KEEP = "8000000000"
ALLOCATORS = {
    "default": {},
    "keeping memory": {"MALLOC_TRIM_THRESHOLD_": KEEP, "MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TOP_PAD_": "256000000"},
}


class Collected:
    """A pytest plugin that remembers the benchmarks: name -> the ids of its parameters, and its markers."""

    def __init__(self) -> None:
        self.parameters: dict[str, list[str]] = {}
        self.markers: dict[str, set[str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            name, _, parameters = item.nodeid.partition("[")
            self.parameters.setdefault(name, []).append(parameters.rstrip("]"))
            self.markers[name] = {marker.name for marker in item.iter_markers()}


def options(arguments: argparse.Namespace, case: str = "") -> list[str]:
    """pytest's arguments for the benchmarks that are asked for and match `case`."""
    chosen = [f"--device={arguments.device}", f"--threads={arguments.threads}", f"--seconds={arguments.seconds}"]
    chosen += ["--full"] * arguments.full + [f"--case={case}"]
    chosen += [f"--slow={arguments.slow}"] * (arguments.slow is not None)
    chosen += ["--rootdir", str(FOLDER), "-c", str(FOLDER / "pytest.ini")]
    return [*chosen, "-qq", "--no-header", "--disable-warnings", "-s"]


def collect(arguments: argparse.Namespace, case: str) -> Collected:
    collected = Collected()
    files = [str(FOLDER / file) for file in FILES]
    with contextlib.redirect_stdout(io.StringIO()):  # pytest's own list
        pytest.main([*options(arguments, case), "--collect-only", *files], plugins=[collected])
    return collected


def measure(name: str, case: str, allocator: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Run one benchmark in a process of its own; returns what it measured, and whether nothing failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", *options(arguments, case), f"--benchmark-json={file}"]
        command += ["--benchmark-quiet", str(FOLDER / name)]
        environment = os.environ | ALLOCATORS[allocator]
        process = subprocess.run(command, env=environment, check=False, cwd=FOLDER.parent)
        measured = json.loads(file.read_text())["benchmarks"] if file.exists() and file.stat().st_size else []
    return [row["extra_info"] | {"allocator": allocator} for row in measured], process.returncode == 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all parameters and peers; an hour or more")
    parser.add_argument(
        "--case",
        nargs="+",
        default=[""],
        metavar="PATTERN",
        help="only names that match one of these regular expressions, those of the first before those of the next",
    )
    parser.add_argument(
        "--slow",
        metavar="PATTERN",
        help="peers that take minutes to prepare take part if their names match (default: none; with --full: all)",
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--report", action="store_true", help="write docs/performance.md from what is there and stop")
    parser.add_argument("--gate", action="store_true", help="check ratios that hold on known CPUs, write nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--seconds", type=float, help="of measuring, for each set of parameters (default: 1, full: 10)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further case after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or (10.0 if arguments.full else 1.0)
    if arguments.full and arguments.slow is None:
        arguments.slow = ""
    return arguments


def main() -> None:
    start = time.monotonic()
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    if arguments.report:
        print(f"wrote {write_performance_page()}")
        return
    if arguments.gate:
        sys.exit("; ".join(gate.check()) or 0)
    chosen = [(case, collect(arguments, case)) for case in arguments.case]
    for case, collected in chosen:
        if not collected.parameters:
            sys.exit(f"no benchmark matches --case {case!r}")
    if arguments.list:
        for _, collected in chosen:
            for name, parameters in collected.parameters.items():
                print(name, *filter(None, parameters), sep="\n    ")
        return
    path = arguments.results / machine.file_name(machine.machine_name(arguments.device, arguments.threads))
    results = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    print("measuring the roofline", flush=True)
    results |= {
        "machine": machine.machine_name(arguments.device, arguments.threads),
        "device": arguments.device,
        "roofline": best_rates(roofline.measure(arguments.device), results.get("roofline", {})),
    }
    todo = [
        (name, case, allocator)
        for case, collected in chosen
        for name in collected.parameters
        for allocator in (ALLOCATORS if both_allocators(collected.markers[name], arguments) else ["default"])
    ]
    failed = []
    for number, (name, case, allocator) in enumerate(todo, 1):
        seconds = time.monotonic() - start
        if arguments.limit and seconds > arguments.limit:
            sys.exit(f"stopped after {seconds:.0f} s, before {name}")
        print(f"[{number}/{len(todo)}, {seconds:.0f} s] {name}, allocator {allocator}", flush=True)
        rows, fine = measure(name, case, allocator, arguments)
        if not fine:
            failed.append(f"{name}, allocator {allocator}")
        if rows:
            merge(results["cases"], rows, arguments.full)
            write(path, results)
    print(f"wrote {path} in {time.monotonic() - start:.0f} s")
    if failed:
        sys.exit("FAILED: " + "; ".join(failed))


def best_rates(measured: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """The roofline is the best that a machine has shown: rows that stay were measured in other, faster hours."""
    return {name: max(rate, before.get(name, 0)) for name, rate in measured.items()}


def both_allocators(markers: set[str], arguments: argparse.Namespace) -> bool:
    return arguments.full and arguments.device == "cpu" and "both_allocators" in markers


def merge(cases: dict[str, Any], rows: list[dict[str, Any]], full: bool) -> None:
    """Put newly measured rows in the place of older ones with the same parameters and allocator."""
    now = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": machine.commit(),
        "set": "full" if full else "quick",
        "versions": peers.versions(),
    }
    for row in rows:
        case = cases.setdefault(row.pop("case"), {"rows": []})
        case["text"] = row.pop("text")
        key = (row["parameters"], row["allocator"])
        case["rows"] = [r for r in case["rows"] if (r["parameters"], r["allocator"]) != key] + [row | now]


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if path.parent == RESULTS:
        write_performance_page()


if __name__ == "__main__":
    main()
