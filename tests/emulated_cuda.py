"""The C++/CUDA kernels on a CPU: csrc/cuda compiled by the C++ compiler with the headers in tests/emulation, one op a
name in `torch.ops.qkernels_emulated`, for CPU tensors.

What runs is the kernels' own source, but for the few instructions in csrc/cuda/instructions.cuh. It shows what they
compute, not how nvcc compiles them, and nothing of their speed.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels.backends import NOT_IN_CUDA, SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
EMULATION = Path(__file__).parent / "emulation"
NAMESPACE = "qkernels_emulated"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
TORCH_FLAGS = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # as setup.py gives nvcc
LAUNCH = re.compile(r"(\S+)<<<(.+), 0, [\w.]+>>>\(")  # kernel<<<blocks, threads, 0, stream>>>( ... which C++ has not


def op(name: str) -> Callable[..., Any]:
    """An emulated op; the test skips where C++/CUDA has none."""
    if name in NOT_IN_CUDA:
        pytest.skip(f"{name} is not written in C++/CUDA")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@cache
def why_not() -> str | None:
    """None once the emulated ops are compiled and loaded, the first time in a process, or what is missing for that."""
    if not (ROOT / "csrc").is_dir():
        return "no sources of the kernels beside these tests"
    if shutil.which("c++") is None:
        return "no C++ compiler"
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(str(build(Path(folder))))
    return None


def build(folder: Path) -> Path:
    """The library, made in `folder` from a copy of csrc whose launches and instructions are the emulation's."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for file in (folder / "csrc" / "cuda").iterdir():
        file.write_text(LAUNCH.sub(r"emulation::launch(\1, \2, ", file.read_text()))
    shutil.copy(EMULATION / "instructions.cuh", folder / "csrc" / "cuda")
    torch_home = Path(torch.__file__).parent
    flags = [*FLAGS, *TORCH_FLAGS, "-I", EMULATION, "-isystem", torch_home / "include"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        prelude = ["-include", EMULATION / "prelude.h"] if source.suffix == ".cu" else []
        run("c++", *flags, *prelude, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*(folder / "csrc" / "cuda").glob("*.cu"), EMULATION / "device.cpp"]))
    library = folder / "emulated.so"
    run("c++", "-shared", *FLAGS, *objects, "-L", torch_home / "lib", "-ltorch_cpu", "-o", library)
    return library


def run(*command: object) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
