"""Packing, unpacking, quantizing and dequantizing on every backend, bit for bit against a numpy oracle.

A backend that does not implement an op is served by the reference, as users are.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import packed_oracle as oracle
from backend_under_test import DTYPES, assert_laid_out_like
from packed_cases import (
    BITS,
    INTEGERS,
    LAYOUTS,
    RANGES,
    SEEDS,
    array,
    assert_equal,
    backend,
    each_backend,  # noqa: F401, a fixture
    laid_out,
    rounded,
)
from qkernels.ops.packing import packed_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter computes with NaN
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


@given(SEEDS, BITS, st.lists(st.integers(0, 40), max_size=3), st.sampled_from(INTEGERS), st.sampled_from(LAYOUTS))
@example(0, 7, [255], torch.int8, "contiguous")
@example(0, 7, [256], torch.int8, "unaligned")
@example(0, 3, [3, 300], torch.uint8, "strided")
@example(0, 5, [70_001], torch.int8, "contiguous")
def test_pack(seed, bits, shape, dtype, layout):
    codes = np.random.default_rng(seed).integers(*RANGES[dtype], shape, endpoint=True)
    x = laid_out(codes.astype(np.int8 if dtype == torch.int8 else np.uint8), layout)
    packed = backend.pack(x, bits)
    assert packed.shape == (packed_bytes(codes.size, bits),)
    assert_equal(packed, oracle.pack(codes, bits), torch.uint8)


@given(
    SEEDS, BITS, st.lists(st.integers(0, 3), max_size=2), st.integers(0, 1500), st.booleans(), st.sampled_from(LAYOUTS)
)
@example(0, 7, [], 70_001, True, "contiguous")
@example(0, 8, [2], 256, True, "unaligned")
def test_unpack(seed, bits, leading, count, signed, layout):
    """Any bytes are codes: also those that `pack` would not have written behind the last code."""
    nbytes = packed_bytes(count, bits)
    packed = np.random.default_rng(seed).integers(0, 256, [*leading, nbytes]).astype(np.uint8)
    codes = backend.unpack(laid_out(packed, layout), bits, count, signed)
    flat = packed.reshape(-1, nbytes) if nbytes else np.zeros((math.prod(leading), 0), np.uint8)
    expected = np.array([oracle.unpack(p, bits, count, signed) for p in flat], np.int64).reshape(*leading, count)
    assert_equal(codes, expected, torch.int8 if signed else torch.uint8)


@given(st.data(), SEEDS, st.lists(st.integers(0, 9) | st.integers(1, 40), max_size=4), st.sampled_from(DTYPES))
def test_quantize(data, seed, shape, dtype):
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    qmin, qmax = data.draw(st.sampled_from([(-64, 63), (-128, 127), (0, 255), (-2, 1), (3, 9), (-9, -4)]))
    layout = data.draw(st.sampled_from(LAYOUTS))
    rng = np.random.default_rng(seed)
    per_scale = () if axis is None else (shape[axis],)
    scale = np.exp(rng.uniform(-6, 2, per_scale)).astype(np.float32)
    if data.draw(st.booleans()):
        scale = np.where(rng.random(per_scale) < 0.3, rng.choice([0, -1, np.nan, np.inf]), scale).astype(np.float32)
    elif data.draw(st.booleans()):
        scale = np.full(per_scale, 0.25, np.float32)  # so that multiples of 1/8 are ties
    values = np.where(rng.random(shape) < 0.5, rng.normal(size=shape) * 30, rng.integers(-600, 600, shape) / 8)
    values = np.where(rng.random(shape) < 0.05, rng.choice([np.nan, np.inf, -np.inf, 3e38, -0.0], shape), values)
    x = laid_out(torch.from_numpy(np.asarray(values, np.float32)).to(dtype), layout)
    codes = backend.quantize(x, laid_out(np.asarray(scale)), qmin, qmax, axis)
    assert_laid_out_like(codes, x)
    expected = oracle.quantize(array(x), scale, qmin, qmax, axis)
    assert_equal(codes, expected, torch.int8 if qmin < 0 else torch.uint8)


@given(SEEDS, BITS, st.integers(1, 4), st.integers(1, 40), st.integers(0, 60), st.sampled_from(DTYPES), st.booleans())
@example(0, 7, 2, 300, 300, torch.float32, True)
def test_dequantize_packed(seed, bits, members, channels, depth, dtype, strided):
    count = channels * depth
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (members, packed_bytes(count, bits))).astype(np.uint8)
    scale = rng.normal(size=(members, channels)).astype(np.float32)
    layout = "strided" if strided else "contiguous"
    result = backend.dequantize_packed(laid_out(packed, layout), laid_out(scale, layout), bits, count, dtype)
    codes = np.array([oracle.unpack(p, bits, count, True) for p in packed], np.float32)
    expected = codes.reshape(members, channels, depth) * scale[..., None]
    assert_equal(result, rounded(expected, dtype), dtype)
