"""Hostile calls of the ops on a GPU, in C++/CUDA and in Triton; without one C++/CUDA emulated on the CPU.

An access outside of its tensor does not show at once on a GPU: PyTorch's allocator gives each tensor its own memory
here, and after each call the device is asked for errors. compute-sanitizer sees more (.ci/gpu).
"""

import pytest
import torch

import emulated_cuda
import hostile_calls
from hostile_calls import Calls
from qkernels.backends import FOR_CPUS, NOT_IN_CUDA
from qkernels.ops.schemas import SCHEMAS

CALLS = 200 if torch.cuda.is_available() else 25  # of each op
COMPILED = 8  # of each op in Triton, which compiles a kernel for nearly every one
OPS = tuple(op for op in SCHEMAS if op not in NOT_IN_CUDA)
SHARES = [(op,) for op in OPS] if torch.cuda.is_available() else [OPS]  # a process for each where there are cores
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("ops", SHARES, ids=lambda ops: ops[0] if len(ops) == 1 else "all")
def test_of_cuda(ops):
    backend = "cuda" if torch.cuda.is_available() else "emulated"
    if backend == "emulated" and (why := emulated_cuda.why_not()) is not None:
        pytest.skip(why)
    limit = 0 if backend == "cuda" else hostile_calls.MEGABYTES  # CUDA reserves addresses beyond any
    report = hostile_calls.attack(Calls(backend, ops, CALLS, megabytes=limit), 300, **ALONE)
    print(f"\nhostile calls, {backend}: {report}")
    assert not report.failures, report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", [op for op in SCHEMAS if op not in FOR_CPUS])
def test_of_triton(op):
    report = hostile_calls.attack(Calls("triton", (op,), COMPILED, megabytes=0), 300, **ALONE)
    print(f"\nhostile calls, Triton: {report}")
    assert not report.failures, report
