"""The backends that these tests run: on a GPU C++/CUDA and Triton; without one C++/CUDA, emulated on the CPU."""

import pytest
import torch

import emulated_cuda
from qkernels import backends

EMULATED = pytest.param("emulated", marks=pytest.mark.slow)


@pytest.fixture(params=["cuda", "triton"] if torch.cuda.is_available() else [EMULATED])
def backend(request):
    """op name -> its function in one backend, called with the arguments of the op's schema."""
    if request.param == "emulated":
        if (why := emulated_cuda.why_not()) is not None:
            pytest.skip(why)
        return emulated_cuda.op
    if request.param == "triton":
        pytest.importorskip("triton")
        return lambda op: backends.implementation(op, "triton")
    for row in backends.report():
        if row.device == "cuda" and row.backend != "cuda" and row.op not in backends.NOT_IN_CUDA:
            pytest.skip(f"the C++/CUDA backend does not serve {row.op} here: {row.backend} does ({row.reason})")
    return lambda op: getattr(torch.ops.qkernels, op).default
