"""Judge networks of timm and torchvision, and write docs/models/networks.json and docs/models.md.

Without names: the smallest of each module, and the well-known ones; an hour on two cores.
"""

import argparse
import os
import sys

from . import networks
from .judging import judge_all
from .page import read_rows, write_rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help='of timm\'s networks, or "torchvision/<name>"; others keep their rows')
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="networks at a time")
    arguments = parser.parse_args()
    rows = read_rows() if arguments.names else {}
    for row in judge_all(arguments.names or networks.smallest(), arguments.jobs):
        rows[row.name] = row
        write_rows(rows)  # as they come: an hour is not lost to an interruption
    return 0 if all(row.fine for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
