"""`python -m benchmarks`: measure every case, write results/<machine>.json, and write docs/performance.md from them."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .cases import CASES
from .report import write_performance_page

RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=int, help="rounds of each case, each with every contender once")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = f"{cpu_name()}, {arguments.threads} threads"
    result = {
        "machine": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "cases": {},
    }
    for case, (measure, rounds) in CASES.items():
        print(case, flush=True)
        result["cases"][case] = measure(arguments.rounds or rounds)
        for contender, row in result["cases"][case].items():
            print(f"  {contender:20} {row['milliseconds']:9.2f} ms  {row['over_ours']:6.2f}x", flush=True)
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path} and {write_performance_page(RESULTS)}")


if __name__ == "__main__":
    main()
