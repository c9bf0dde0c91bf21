"""`python -m benchmarks.measure CASE THREADS ROUNDS`: measure one case in this process and print it as JSON."""

import json
import sys

import torch

from .cases import CASES


def main(case: str, threads: str, rounds: str) -> None:
    torch.set_num_threads(int(threads))
    print(json.dumps(CASES[case](int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
