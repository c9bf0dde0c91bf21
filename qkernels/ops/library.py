"""The compiled libraries, and the definition of each op.

`_cpu` defines every op when it is loaded, `library` those that nobody has defined: all where `_cpu` is not built, or
not wanted because QKERNELS_BACKEND forces another backend on CPU tensors.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .schemas import SCHEMAS

NAMESPACE = "qkernels"
FORCED = os.environ.get("QKERNELS_BACKEND")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OTHER_ON_CPU = FORCED == "reference" or (FORCED == "triton" and INTERPRETED)


def library_path(name: str) -> Path | None:
    """The compiled library `_cpu` or `_cuda` of this package, if it was built."""
    path = Path(__file__).parents[1] / f"{name}.so"
    return path if path.exists() else None


@cache
def load(backend: str) -> str | None:
    """Load what `backend` needs. Returns None, or what is missing and the way out."""
    if backend in ("cpp", "cuda"):
        name = {"cpp": "_cpu", "cuda": "_cuda"}[backend]
        path = library_path(name)
        if backend == "cuda" and torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        if path is None:
            needs = "a C++ compiler" if backend == "cpp" else "nvcc (QKERNELS_BUILD_CUDA=1 makes its absence an error)"
            return f"qkernels/{name} was not built; reinstall qtdog with {needs}"
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            return f"{path.name} does not load: {error}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    return None


def _text(function: str) -> str:
    """What a function of `_cpu` without arguments says."""
    call = getattr(ctypes.CDLL(str(library_path("_cpu"))), function)
    call.restype = ctypes.c_char_p
    return call().decode()


def cpu_features() -> list[str]:
    """The instruction sets that matter here and that this CPU has, as `_cpu` finds them; it must be loaded."""
    return _text("qkernels_cpu_features").split()


def build_info() -> str:
    """The compiler and C++ standard that `_cpu` was built with; it must be loaded."""
    return _text("qkernels_build_info")


if not OTHER_ON_CPU:
    load("cpp")
library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.qkernels, _name):
        library.define(_name + _schema)

# op -> its check of the schema's arguments, which raises TypeError or ValueError.
CHECKS: dict[str, Callable[..., None]] = {}


def call(op: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, which hands them to the op; what is refused is refused in the words of the op's check.

    Every backend refuses what the check does, so the check comes first only under a transform, which hands other
    arguments to the op than it is given. While the compiler traces the fake kernel begins with it.
    """
    if torch.compiler.is_compiling():
        return function(*arguments)
    if torch._C._are_functorch_transforms_active():
        run_check(op, *arguments)
    try:
        return function(*arguments)
    except RuntimeError:
        explain(op, *arguments)
        raise


def explain(op: str, *arguments: Any) -> None:
    """Raise, in the words of the op's check, what is wrong with arguments that a backend has refused."""
    try:
        run_check(op, *arguments)
    except (TypeError, ValueError) as error:
        raise error from None


def run_check(op: str, *arguments: Any) -> None:
    """What fake kernels and the backends in Python begin with: raises what is wrong with the schema's arguments."""
    for position, name in _tensors(op):
        if arguments[position] is None:  # which PyTorch lets pass for a tensor
            raise TypeError(f"{op}: {name} must be a tensor, got None")
    try:
        CHECKS[op](*arguments)
    except AttributeError as error:  # None in a list
        raise TypeError(f"{op}: a tensor is missing: {error}") from None


@cache
def _tensors(op: str) -> list[tuple[int, str]]:
    """Position and name of the arguments that must be tensors."""
    arguments = [argument.split() for argument in SCHEMAS[op][1:].partition(")")[0].split(", ")]
    return [(position, name) for position, (kind, name) in enumerate(arguments) if kind == "Tensor"]


def register_fake(op: str, check: Callable[..., None]) -> Callable[[Callable[..., Any]], None]:
    """Decorates an op's fake kernel, and names the check that goes before it."""
    CHECKS[op] = check

    def register(fake: Callable[..., Any]) -> None:
        def checked(*arguments: Any) -> Any:
            run_check(op, *arguments)
            return fake(*arguments)

        torch.library.register_fake(f"{NAMESPACE}::{op}", checked, lib=library)

    return register
