"""The backend that a test of an op runs on: what is there, and how its ops are called."""

import importlib.metadata
import importlib.util
import os

import numpy as np
import pytest
import torch

import emulated_cuda
from qkernels import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()


def why_not(backend: str) -> str | None:
    """What keeps a backend from running here."""
    if backend == "emulated":
        return emulated_cuda.why_not()
    served = {(row.op, row.device): row.backend for row in backends.report()}
    if backend == "cpp":
        return None if served["mean_abs", "cpu"] == "cpp" else "the C++ library was not built"
    if backend == "cuda":
        return None if GPU and served["mean_abs", "cuda"] == "cuda" else "needs a GPU and the C++/CUDA library"
    if backend.startswith("triton"):
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not GPU and not INTERPRETED:
            return "Triton needs a GPU, or TRITON_INTERPRET=1"
        versions = [importlib.metadata.version(package) for package in ("triton", "numpy")]
        if not GPU and versions[0] < "3.7" and np.lib.NumpyVersion(versions[1]) >= "2.4.0":
            return "the interpreter of Triton < 3.7 cannot loop with numpy >= 2.4"
    return None


class Backend:
    """The ops of one backend, as functions of tensors on `device`."""

    def __init__(self, name: str) -> None:
        self.choose(name)

    def choose(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" or (name.startswith("triton") and GPU) else "cpu"
        self.interpreted = name.startswith("triton") and not GPU
        self.truncates_bfloat16 = self.interpreted

    def __getattr__(self, op: str):
        if self.name == "emulated":
            return emulated_cuda.op(op)
        if self.name in ("cpp", "cuda"):
            return getattr(torch.ops.qkernels, op).default
        return backends.implementation(op, self.name.split("-")[0])


def compiled(name: str):
    """A backend whose kernels are no Python: tracing the tests for coverage would show nothing and takes its time."""
    return pytest.param(name, marks=pytest.mark.untraced)


def slow(name: str):
    """A backend that is emulated or interpreted; under coverage's tracing it would be several times as slow."""
    return pytest.param(name, marks=[pytest.mark.slow, pytest.mark.untraced])


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_laid_out_like(actual: torch.Tensor, x: torch.Tensor) -> None:
    """The strides of torch.empty_like(x), but for dimensions of one element, whose strides mean nothing."""
    strides = zip(x.shape, actual.stride(), torch.empty_like(x).stride(), strict=True)
    assert not x.numel() or all(a == b for n, a, b in strides if n > 1)
