"""The C++/CUDA kernels on a CPU: csrc/cuda compiled by the C++ compiler with the headers in tests/emulation, one op a
name in `torch.ops.qkernels_emulated`, for CPU tensors.

What runs is the kernels' own source, but for the few instructions in csrc/cuda/instructions.cuh. It shows what they
compute, not how nvcc compiles them, and nothing of their speed. The library stays in build/emulated_cuda, where ninja
compiles what has changed since.
"""

import fcntl
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels.backends import NOT_IN_CUDA, SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
EMULATION = Path(__file__).parent / "emulation"
BUILD = ROOT / "build" / "emulated_cuda"
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
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return "no ninja"
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.ops.load_library(str(build()))
    return None


def build() -> Path:
    """The library, made from a copy of csrc whose launches and instructions are the emulation's; by one process at a
    time, so that those which run tests side by side compile it once.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy_sources()
        (BUILD / "build.ninja").write_text(ninja_file())
        run(*(["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]), "-C", BUILD)
    return BUILD / "emulated.so"


def copy_sources() -> None:
    """Writes what differs alone: ninja goes by the files' times."""
    sources = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for path, text in sources.items():
        if path.parent.name == "cuda":
            sources[path] = LAUNCH.sub(r"emulation::launch(\1, \2, ", text)
    sources[Path("csrc/cuda/instructions.cuh")] = (EMULATION / "instructions.cuh").read_text()
    for path, text in sources.items():
        copy = BUILD / path
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)


def ninja_file() -> str:
    torch_home = Path(torch.__file__).parent
    flags = " ".join([*FLAGS, *TORCH_FLAGS, f"-I{EMULATION}", f"-isystem {torch_home / 'include'}"])
    lines = [
        "rule compile",
        f"  command = c++ -MD -MF $out.d {flags} $prelude -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = c++ -shared {' '.join(FLAGS)} $in -L{torch_home / 'lib'} -ltorch_cpu -o $out",
        f"build device.o: compile {EMULATION / 'device.cpp'}",
    ]
    objects = ["device.o"]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile csrc/cuda/{source.name}"]
        lines += [f"  prelude = -include {EMULATION / 'prelude.h'}"]
    lines.append(f"build emulated.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def run(*command: object) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
