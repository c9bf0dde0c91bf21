"""Settings that must stand before torch or triton are imported by a test."""

import importlib.util
import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as qtdog does, see qtdog/__init__.py
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU, slowly


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty* filled with NaN, so that an element that nobody writes shows up in a comparison."""

    def poisoned(allocate):
        def allocate_and_poison(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

        return allocate_and_poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
