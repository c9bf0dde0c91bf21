"""Registers, for each op and device, the backend that serves it.

    cpp        C++ for CPU tensors, from the library `_cpu`
    cuda       C++/CUDA for CUDA tensors, from the library `_cuda`
    triton     Triton for CUDA tensors where `_cuda` is not there (for CPU tensors under TRITON_INTERPRET=1, if forced)
    reference  plain PyTorch for everything else

`QKERNELS_BACKEND=<one of these>` forces one for the devices that it serves; where it is missing, that is an error.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .ops import library, reference
from .ops.schemas import SCHEMAS

BACKENDS = ("cpp", "cuda", "triton", "reference")
STEMS = {  # the file that holds each op in qkernels/ops, qkernels/triton and csrc
    "fake_quantize": "fake_quantize",
    "fake_quantize_backward": "fake_quantize",
    "fake_quantize_multi": "fake_quantize_multi",
    "fake_quantize_multi_backward": "fake_quantize_multi",
    "mean_abs": "mean_abs",
    "pack": "packing",
    "unpack": "packing",
    "quantize": "packing",
    "dequantize_packed": "packing",
    "packed_conv2d": "packed_conv2d",
    "packed_conv2d_int8": "packed_conv2d",
    "packed_gemv": "packed_gemv",
    "packed_panels": "packed_panels",
    "packed_network": "packed_network",
}
FOR_CPUS = ("packed_panels", "packed_network")  # neither in C++/CUDA nor in Triton: a GPU has CUDA graphs
# Convolutions run on tensor cores through Triton alone.
NOT_IN_CUDA = ("packed_conv2d", "packed_conv2d_int8", *FOR_CPUS)


@dataclass(frozen=True)
class Served:
    """Who serves an op on a kind of device ("cpu", "cuda", "other"), and why."""

    op: str
    device: str
    backend: str
    reason: str


_served: list[Served] = []


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that implements `op` in a backend that is written in Python: "triton" or "reference"."""
    if backend == "reference":
        return getattr(reference, op)
    return getattr(importlib.import_module(f"qkernels.triton.{STEMS[op]}"), op)


def checked(op: str, backend: str) -> Callable[..., Any]:
    """`implementation` as it serves the op, behind the checks that C++ has in itself."""

    def call(*arguments: Any) -> Any:
        for argument in arguments:
            for t in argument if isinstance(argument, list) else (argument,):
                if isinstance(t, torch.Tensor) and t.layout != torch.strided:
                    raise TypeError(f"{op}: tensors must be dense, got one of layout {t.layout}; call to_dense()")
        library.run_check(op, *arguments)
        # Triton is imported at the first launch: importing it costs more than the rest of the package.
        return implementation(op, backend)(*arguments)

    return call


def _serve(op: str, device: str, key: str, backend: str, reason: str) -> None:
    if backend in ("triton", "reference"):
        library.library.impl(op, checked(op, backend), key)
    _served.append(Served(op, device, backend, reason))


def _choose(candidates: tuple[str, ...], op: str) -> tuple[str, str]:
    """The first backend that is there, and why those before it are not."""
    missing: list[str] = []
    if op in FOR_CPUS and (candidates != ("cpp",) or library.OTHER_ON_CPU):
        return "reference", f"{op} is written in C++ for CPUs alone"
    for backend in candidates:
        why = f"{op} is not written in C++/CUDA" if backend == "cuda" and op in NOT_IN_CUDA else library.load(backend)
        if why is None:
            return backend, "; ".join(missing) or "fastest here"
        missing.append(f"{backend}: {why}")
    return "reference", "; ".join(missing)


def load() -> None:
    """Register every op on every device; called once, when qkernels is imported."""
    forced = library.FORCED
    if forced is not None:
        if forced not in BACKENDS:
            raise RuntimeError(f"QKERNELS_BACKEND={forced!r}: choose one of {', '.join(BACKENDS)}, or unset it")
        why = library.load(forced)
        if why is not None:
            raise RuntimeError(f"QKERNELS_BACKEND={forced} cannot be had: {why}")
    forced_on = {
        "cpu": forced == "cpp" or library.OTHER_ON_CPU,
        "cuda": forced in ("cuda", "triton", "reference"),
    }
    for op in SCHEMAS:
        for device, key, candidates in (("cpu", "CPU", ("cpp",)), ("cuda", "CUDA", ("cuda", "triton"))):
            elsewhere = (forced == "cuda" and op in NOT_IN_CUDA) or (forced == "triton" and op in FOR_CPUS)
            if forced is not None and forced_on[device] and not elsewhere:
                _serve(op, device, key, forced, "QKERNELS_BACKEND")
            else:
                _serve(op, device, key, *_choose(candidates, op))
        _serve(op, "other", "CompositeExplicitAutograd", "reference", "only plain PyTorch runs everywhere")


def report() -> list[Served]:
    """One row an op and device: which backend serves it, and why."""
    return list(_served)
