"""Why a kernel is slow: those farthest below their roofline, under Nsight Compute.

    python -m benchmarks.profile benchmarks/results/SOME-GPU.json

reads what was measured, chooses the cases whose ops of ours reach the least share of the roofline, runs each of them
once under `ncu`, and prints a line a kernel: its time, the bytes that it moved, how busy memory, arithmetic and warps
were, and what the warps waited for. Where ncu is missing or may not read the counters, that is said and no error.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .costs import Cost, roofline_seconds

FOLDER = Path(__file__).parent
LEAST = 10e-6  # seconds by the roofline; below, the launch decides
MOST_OPS = 2  # of a case: one op, or its forward and backward; whole networks are not profiled
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum")
NOT_ALLOWED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded")
DRAM = re.compile(r"(gpu__)?dram_?_throughput\.avg\.pct_of_peak_sustained_elapsed$")
STALL = re.compile(r"issue_stalled_(\w+)_per_issue_active\.ratio$")


class Slow(NamedTuple):
    """A case of the results, and the share of its time that the roofline explains."""

    case: str
    id: str
    parameters: str
    share: float


def farthest(results: dict[str, Any], count: int) -> list[Slow]:
    """The `count` cases farthest below their roofline, one of each benchmark function at most."""
    found: dict[str, Slow] = {}
    for case, of_case in results["cases"].items():
        for row in of_case["rows"]:
            name = row["base"]
            costs = [Cost(*cost) for cost in row["work"].get(name, [])]
            least = roofline_seconds(costs, results["roofline"])
            if row.get("id") is None or not 1 <= len(costs) <= MOST_OPS or least < LEAST:
                continue
            share = least * 1e3 / row["contenders"][name]["milliseconds"][1]
            if case not in found or share < found[case].share:
                found[case] = Slow(case, row["id"], row["parameters"], share)
    return sorted(found.values(), key=lambda slow: slow.share)[:count]


def find_ncu() -> str | None:
    """On PATH, or where CUDA and Nsight Compute install it."""
    beside = sorted(
        map(str, [*Path("/opt/nvidia").glob("nsight-compute/*/ncu"), *Path("/usr/local").glob("cuda*/bin/ncu")])
    )
    return shutil.which("ncu") or next(reversed(beside), None)


def command_of(ncu: str, slow: Slow) -> list[str]:
    """Clocks stay as they are; only what runs between the profiler's start and stop is looked at."""
    look = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
    for section in SECTIONS:
        look += ["--section", section]
    run = [sys.executable, "-m", "pytest", "--device=cuda", "--full", "--profile"]
    run += [
        f"--case={re.escape(f'{slow.case}[{slow.id}]')}",
        "--rootdir",
        str(FOLDER),
        "-c",
        str(FOLDER / "pytest.ini"),
    ]
    return [*look, "--metrics", ",".join(METRICS), *run, "-qq", str(FOLDER / slow.case)]


def kernels(output: str) -> list[dict[str, str]]:
    """ncu's table, which follows whatever the program printed: a row a kernel, by the names of the metrics."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = [row for row in csv.reader(lines[start:]) if row]
    units = dict(zip(table[0], table[1], strict=False))
    rows = [dict(zip(table[0], row, strict=False)) for row in table[2:] if len(row) == len(table[0])]
    return [{name: in_base_unit(value, units[name]) for name, value in row.items()} for row in rows]


SCALES = {"ns": 1.0, "us": 1e3, "ms": 1e6, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def in_base_unit(value: str, unit: str) -> str:
    """Nanoseconds and bytes without thousands' commas, whatever unit ncu chose."""
    number = value.replace(",", "")
    if unit not in SCALES or not re.fullmatch(r"[\d.]+", number):
        return value
    return f"{float(number) * SCALES[unit]:.0f}"


def table_lines(rows: list[dict[str, str]]) -> Iterator[str]:
    """A line a kernel."""
    yield f"  {'kernel':44} {'us':>8} {'MB':>8} {'DRAM':>6} {'SM':>6} {'warps':>6} {'regs':>5}  waits for"
    for row in rows:

        def number(name: str, row: dict[str, str] = row) -> float:
            try:
                return float(row[name].replace(",", ""))
            except (KeyError, ValueError):
                return float("nan")

        megabytes = (number("dram__bytes_read.sum") + number("dram__bytes_write.sum")) / 1e6
        stalls = {found[1]: number(name) for name in row if (found := STALL.search(name))}
        waits = sorted(((v, k) for k, v in stalls.items() if v == v and k != "selected"), reverse=True)[:2]
        yield (
            f"  {re.sub(r'[(<].*', '', row.get('Kernel Name', '?'))[-44:]:44} "
            f"{number('gpu__time_duration.sum') / 1e3:8.1f} {megabytes:8.1f} "
            f"{number(next((name for name in row if DRAM.match(name)), '')):5.0f}% "
            f"{number('sm__throughput.avg.pct_of_peak_sustained_elapsed'):5.0f}% "
            f"{number('sm__warps_active.avg.pct_of_peak_sustained_active'):5.0f}% "
            f"{number('launch__registers_per_thread'):5.0f}  " + ", ".join(f"{k} {v:.1f}" for v, k in waits)
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a file of `python -m benchmarks`")
    parser.add_argument("--kernels", type=int, default=3, help="how many cases (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--out", type=Path, help="folder for ncu's whole tables, a file a case")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for each (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if not arguments.results.exists():
        sys.exit(f"{arguments.results} is not there: measure first, with `python -m benchmarks` or `.ci/gpu 2`")
    chosen = farthest(json.loads(arguments.results.read_text()), arguments.kernels)
    ncu = find_ncu()
    for number, slow in enumerate(chosen, 1):
        print(f"{slow.share:.0%} of the roofline: {slow.case}, {slow.parameters}", flush=True)
        if arguments.list:
            continue
        if ncu is None:
            print("ncu is not here: nothing is profiled")
            return
        start = time.monotonic()
        try:
            process = subprocess.run(
                command_of(ncu, slow), capture_output=True, text=True, cwd=FOLDER.parent, timeout=arguments.limit
            )
        except subprocess.TimeoutExpired:
            print(f"  stopped after {arguments.limit:.0f} s")
            continue
        output = process.stdout + process.stderr
        if arguments.out is not None:
            (arguments.out / f"ncu-{number}.csv").write_text(output)
        if (why := next((word for word in NOT_ALLOWED if word in output), None)) is not None:
            print(f"ncu may not read the counters here ({why}): nothing is profiled")
            return
        if not (rows := kernels(process.stdout)):
            sys.exit("no kernel was profiled:\n" + "\n".join(output.splitlines()[-15:]))
        print(*table_lines(rows), f"  {time.monotonic() - start:.0f} s", sep="\n", flush=True)


if __name__ == "__main__":
    main()
