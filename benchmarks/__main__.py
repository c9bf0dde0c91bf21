"""`python -m benchmarks`: measure every case, write results/<machine>.json, and write docs/performance.md from them."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from .report import CASES, write_performance_page

RESULTS = Path(__file__).parent / "results"
KEEP = "8000000000"
ALLOCATORS = {
    "default": {},
    "keeping memory": {"MALLOC_TRIM_THRESHOLD_": KEEP, "MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TOP_PAD_": "256000000"},
}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "") if head.stdout else "unknown"


def measure(case: str, threads: int, rounds: int, environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """A process of its own for each case, so that no case inherits another's heap."""
    command = [sys.executable, "-m", "benchmarks.measure", case, str(threads), str(rounds)]
    result = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each case, each with every contender once")
    arguments = parser.parse_args()
    cases: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    result = {
        "machine": f"{cpu_name()}, {arguments.threads} threads",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "cases": cases,
    }
    for case in CASES:
        cases[case] = {}
        for allocator, environment in ALLOCATORS.items():
            print(f"{case}, allocator {allocator}", flush=True)
            cases[case][allocator] = measure(case, arguments.threads, arguments.rounds, environment)
            for contender, row in cases[case][allocator].items():
                print(f"  {contender:20} {row['milliseconds']:9.2f} ms  {row['ratio']:6.2f}", flush=True)
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", str(result["machine"]).lower()).strip("-") + ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path} and {write_performance_page(RESULTS)}")


if __name__ == "__main__":
    main()
