"""What the tests of kernels on a GPU share: the device, comparisons, tensors, and CUDA graphs."""

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_near(actual: Tensor, exact: Tensor) -> None:
    """Within float32's rounding of the sums and one store; `exact` is float64."""
    assert actual.shape == exact.shape and bool(actual.isfinite().all())
    unit = 2e-6 + torch.finfo(actual.dtype).eps / 2
    error = actual.double() - exact
    assert error.norm() <= unit * exact.norm()
    assert error.abs().max() <= 16 * unit * exact.abs().max()


def unaligned(t: Tensor) -> Tensor:
    """The same values one element past a 16-byte boundary."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def random_codes(shape, dtype=torch.int8) -> Tensor:
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(low, high, shape, dtype=dtype, device=DEVICE)


def captured(function):
    """function() in a CUDA graph: the graph and the tensor that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
