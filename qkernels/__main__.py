"""`python -m qkernels`: versions, what was built, and which backend serves each op on each device, with the reason."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator

import torch

from . import backends
from .ops import library


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built_lines() -> Iterator[str]:
    for name in ("_cpu", "_cuda"):
        yield f"{name:13} {library.library_path(name) or 'not built'}"
    codec = importlib.util.find_spec("qkernels._codec")
    yield f"{'_codec':13} {codec.origin if codec else 'not in wheels, which fit every Python: it is for tests'}"
    if any(row.backend == "cpp" for row in backends.report()):
        yield f"{'built with':13} {library.build_info()}"
        yield f"{'CPU':13} {' '.join(library.cpu_features()) or 'no vector extensions that matter here'}"


def main(write: Callable[[str], object] = print) -> None:
    for package in ("qtdog", "torch", "triton", "numpy"):
        write(f"{package:13} {_version(package)}")
    write(f"{'python':13} {platform.python_version()}")
    write(f"{'CUDA':13} {torch.version.cuda or 'none: a CPU-only build of PyTorch'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    write(f"{'GPUs':13} {', '.join(devices) or 'none'}")
    for line in _built_lines():
        write(line)
    write("")
    write(f"{'device':7} {'op':30} {'backend':10} why")
    for row in backends.report():
        write(f"{row.device:7} {row.op:30} {row.backend:10} {row.reason}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
