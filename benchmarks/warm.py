"""`python -m benchmarks.warm` compiles what the packed ensembles launch on a GPU, in as many processes as there are
batches and dtypes: Triton compiles one kernel after another, and keeps them in its cache for the measurements after it.
"""

import copy
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch

import qkernels as qk

from .networks import trained_like

BATCHES = (8, 1, 64)
PATHS = ("integer", "float16", "float32")  # as bench_packed_ensemble has them
MEMBERS = 5


@torch.no_grad()
def run(batch: int, path: str) -> str:
    """One answer of an ensemble; returns how long it took."""
    start = time.monotonic()
    torch.set_num_threads(1)
    model = trained_like("resnet50").to("cuda")
    qk.quantize_(model)
    ensemble = qk.PackedEnsemble.from_models([copy.deepcopy(model) for _ in range(MEMBERS)])
    dtype = torch.float32 if path == "float32" else torch.float16
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    if path == "integer":
        ensemble.to_integer_([images[:2]], float_dtype=dtype)
    ensemble(images.to(dtype, memory_format=torch.channels_last))
    torch.cuda.synchronize()
    return f"batch {batch}, {path}: {time.monotonic() - start:.0f} s"


def main() -> None:
    todo = list(product(BATCHES, PATHS))
    workers = min(len(todo), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for line in pool.map(run, *zip(*todo, strict=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
