"""`python -m qkernels`: versions, what was built, and which backend serves each op on each device, with the reason."""

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator

import torch

from . import backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _codec_lines() -> Iterator[str]:
    try:
        _codec = importlib.import_module("qkernels._codec")
    except ImportError as error:
        yield f"_codec        not built: {error}"
        return
    info = _codec.build_info()
    yield f"_codec        built with {info['compiler']}, C++ {info['cxx_standard']}"
    yield f"CPU           {' '.join(_codec.cpu_features()) or 'no vector extensions that matter here'}"


def main(write: Callable[[str], object] = print) -> None:
    for package in ("qtdog", "torch", "triton", "numpy"):
        write(f"{package:13} {_version(package)}")
    write(f"{'python':13} {platform.python_version()}")
    write(f"{'CUDA':13} {torch.version.cuda or 'none: a CPU-only build of PyTorch'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    write(f"{'GPUs':13} {', '.join(devices) or 'none'}")
    for name in ("_cpu", "_cuda"):
        write(f"{name:13} {backends.library_path(name) or 'not built'}")
    for line in _codec_lines():
        write(line)
    write("")
    write(f"{'device':7} {'op':30} {'backend':10} why")
    for row in backends.report():
        write(f"{row.device:7} {row.op:30} {row.backend:10} {row.reason}")


if __name__ == "__main__":
    main()
