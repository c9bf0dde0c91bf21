"""The activations of packed layers by themselves, on every backend, beside PyTorch's: their values, bits and limits."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import packed_oracle as oracle
from backend_under_test import DTYPES
from packed_cases import (
    assert_equal,
    backend,
    each_backend,  # noqa: F401, a fixture
    laid_out,
)
from packed_oracle import ACTIVATIONS, EXACT
from qkernels.ops.geometry import Geometry
from qkernels.ops.packing import packed_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter computes with NaN
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

PYTORCH = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": F.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
SPREAD = torch.cat([torch.linspace(-20, 20, 1501), torch.linspace(-1e-3, 1e-3, 99)])
STEP = 0.01  # of the codes


def activated(activation: str, values: Tensor, residual: Tensor | None = None, dtype=torch.float32) -> Tensor:
    """What a convolution makes of `values` [members, channels] as its bias, the sums being 0: of the same shape."""
    members, channels = values.shape
    codes = dtype in (torch.int8, torch.uint8)
    x = torch.zeros((1, 1, 1, 1), dtype=torch.uint8, device=backend.device)
    packed = torch.zeros((members, packed_bytes(channels, 4)), dtype=torch.uint8, device=backend.device)
    ones = laid_out(np.ones((members, channels), np.float32))
    added = None if residual is None else laid_out(residual[:, :, None, None])
    scales = (ones[:, 0] if residual is not None and not residual.is_floating_point() else None,)
    scales += (STEP * ones[:, 0] if codes else None,)
    tensors = (x, ones[:, 0].contiguous(), packed, ones, laid_out(values), added, *scales)
    low, high = (-128, 127) if dtype == torch.int8 else (0, 255)
    return backend.packed_conv2d_int8(*tensors, 4, *Geometry().arguments, True, activation, low, high, dtype).view(
        members, channels
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(activation):
    """Those of PyTorch in float64 within a few roundings."""
    y = activated(activation, SPREAD.view(20, 80)).cpu().double()
    expected = PYTORCH[activation](SPREAD.view(20, 80).double())
    assert ((y - expected).abs() <= torch.from_numpy(oracle.activation_slack(expected.numpy(), activation))).all()


@pytest.mark.parametrize("activation", EXACT)
def test_the_bits_of_pytorch(activation):
    """On CPUs, as floats and as codes: their operations are IEEE's, in PyTorch's order."""
    values = torch.linspace(-4, 4, 9 * 70).view(9, 70)
    expected = PYTORCH[activation](values).numpy()
    assert_equal(activated(activation, values), expected, torch.float32)
    for dtype, (low, high) in ((torch.uint8, (0, 255)), (torch.int8, (-128, 127))):
        codes = oracle.quantize(expected, np.full(9, STEP, np.float32), low, high, 0)
        assert_equal(activated(activation, values, dtype=dtype), codes, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_the_limits(activation):
    """Infinities and NaN as PyTorch has them, as floats; NaN is code 0."""
    values = torch.tensor([[-math.inf, math.inf, math.nan, -1e30, -1000.0, -90.0, -5.0, 0.0, 0.1, 90.0, 1e30]])
    expected = PYTORCH[activation](values.double()).numpy()
    np.testing.assert_allclose(activated(activation, values).cpu(), expected, rtol=1e-6, atol=8e-7)
    codes = oracle.quantize(expected.astype(np.float32), np.full(1, STEP, np.float32), 0, 255, 0)
    assert_equal(activated(activation, values, dtype=torch.uint8), codes, torch.uint8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_instruction_sets_agree(monkeypatch, activation):
    """Bit for bit, whichever have vectors of what there is to do."""
    if backend.name != "cpp":
        pytest.skip("instruction sets are the C++ backend's")
    generator = torch.Generator().manual_seed(0)
    for channels, dtype, residual_dtype in itertools.product(
        (7, 75), (torch.uint8, torch.int8, *DTYPES), (None, torch.uint8, torch.float32, torch.float16)
    ):
        values = 4 * torch.randn(6, channels, generator=generator)
        residual = None if residual_dtype is None else (values * 2).abs().to(residual_dtype)
        y = activated(activation, values, residual, dtype)
        with monkeypatch.context() as portable:
            portable.setenv("QKERNELS_CPU_ISA", "portable")
            assert torch.equal(y, activated(activation, values, residual, dtype))
