"""The packed convolutions on every backend against a numpy oracle: on integers bit for bit, on floats within the bound
of a float32 sum.

A backend that does not implement an op is served by the reference, as users are.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packed_oracle as oracle
from backend_under_test import DTYPES
from packed_cases import (
    BITS,
    INTEGERS,
    ISAS,
    LAYOUTS,
    RANGES,
    SEEDS,
    Layer,
    array,
    assert_channels_last,
    assert_equal,
    backend,
    each_backend,  # noqa: F401, a fixture
    laid_out,
    layers,
    make_layer,
    rounded,
)
from packed_oracle import ACTIVATIONS, FLOAT32_UNIT, INEXACT
from qkernels.ops import library
from qkernels.ops.geometry import Geometry

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter computes with NaN
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of a store to `dtype`."""
    truncated = backend.truncates_bfloat16 and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (1.0 if truncated else 0.5)


def assert_within_float32(actual, dtype, exact, magnitude, terms, activation):
    """|actual - exact| is at most what rounding every product, sum and store can add up to.

    magnitude: the sum of |terms| behind each element. Activations stretch differences and have their own few roundings.
    """
    assert actual.dtype == dtype and tuple(actual.shape) == exact.shape
    bound = FLOAT32_UNIT * (terms + 4) * magnitude
    if activation not in ("none", "relu", "relu6"):
        bound = oracle.STRETCH.get(activation, 1) * bound + oracle.activation_slack(exact, activation)
    bound = bound + (np.abs(exact) + bound) * (unit(dtype) if dtype != torch.float32 else 0) + 1e-30
    if dtype == torch.float16:
        bound = bound + 2.0**-24  # denormals
    error = np.abs(actual.double().cpu().numpy() - exact)
    assert np.all(error <= bound), f"{(error / bound).max()} times the bound"


def check_float(layer: Layer, rng, dtype, layout, with_residual=False, op="packed_conv2d") -> torch.Tensor:
    x = laid_out(torch.from_numpy(rng.normal(size=layer.x_shape).astype(np.float32)).to(dtype), layout)
    residual = None
    if with_residual:
        residual = laid_out(torch.from_numpy(rng.normal(size=layer.out_shape).astype(np.float32)).to(dtype), layout)
    if op == "packed_gemv":
        y = backend.packed_gemv(
            x[:, :, 0, 0], layer.packed, layer.scale, layer.bias, layer.bits, layer.shared, layer.activation
        )
        assert y.dim() == 2 and y.is_contiguous()
        y = y[:, :, None, None]
    else:
        y = backend.packed_conv2d(
            x,
            layer.packed,
            layer.scale,
            layer.bias,
            residual,
            layer.bits,
            *layer.geometry.arguments,
            layer.shared,
            layer.activation,
        )
        assert_channels_last(y)
    values = array(x).astype(np.float64)
    epilogue = [None if t is None else array(t).astype(np.float64) for t in (layer.scale, layer.bias, residual)]
    exact = oracle.epilogue(layer.sums(values), *epilogue, layer.activation).reshape(layer.out_shape)
    positive = [None if t is None else np.abs(t) for t in epilogue]
    magnitude = oracle.epilogue(layer.absolute().sums(np.abs(values)), *positive, "none").reshape(layer.out_shape)
    assert_within_float32(y, dtype, exact, magnitude, math.prod(layer.codes.shape[2:]), layer.activation)
    return y


@given(layers(), SEEDS, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans())
def test_packed_conv2d(layer, seed, dtype, layout, with_residual):
    check_float(layer, np.random.default_rng(seed), dtype, layout, with_residual)


@given(
    SEEDS,
    BITS,
    st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(1, 300), st.integers(1, 40)),
    st.booleans(),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)
def test_packed_gemv(seed, bits, sizes, shared, activation, bias, dtype, layout):
    members, rows, in_features, out_features = sizes
    rng = np.random.default_rng(seed)
    layer = make_layer(
        rng, bits, members, rows, (in_features, 1, 1), out_features, Geometry(), shared, activation, bias
    )
    check_float(layer, rng, dtype, layout, op="packed_gemv")


class Codes(NamedTuple):
    """The integer convolution's own choices."""

    x_dtype: torch.dtype = torch.uint8
    residual_dtype: torch.dtype | None = None
    out_dtype: torch.dtype = torch.float32
    code_range: tuple[int, int] = (0, 255)
    layout: str = "contiguous"


@st.composite
def code_choices(draw):
    out_dtype = draw(st.sampled_from([*INTEGERS, *DTYPES]))
    code_range = draw(st.sampled_from([RANGES.get(out_dtype, (0, 255)), (0, 63)]))
    residual_dtype = draw(st.sampled_from([None, *INTEGERS, *DTYPES]))
    return Codes(draw(st.sampled_from(INTEGERS)), residual_dtype, out_dtype, code_range, draw(st.sampled_from(LAYOUTS)))


def random_codes(rng, shape, dtype: torch.dtype) -> torch.Tensor:
    """Codes of the whole range, its ends more often than the rest."""
    low, high = RANGES[dtype]
    codes = np.where(rng.random(shape) < 0.1, rng.choice([low, high], shape), rng.integers(low, high, shape))
    return torch.from_numpy(codes.astype(np.int8 if dtype == torch.int8 else np.uint8))


def check_int8(layer: Layer, rng, codes: Codes) -> torch.Tensor:
    x = laid_out(random_codes(rng, layer.x_shape, codes.x_dtype), codes.layout)
    member_scales = np.exp(rng.uniform(-5, -3, (3, layer.members))).astype(np.float32)
    x_scale, residual_scale, out_scale = (laid_out(s) for s in member_scales)
    residual = None
    if codes.residual_dtype in INTEGERS:
        residual = laid_out(random_codes(rng, layer.out_shape, codes.residual_dtype), codes.layout)
    elif codes.residual_dtype is not None:
        values = rng.normal(size=layer.out_shape).astype(np.float32)
        residual = laid_out(torch.from_numpy(values).to(codes.residual_dtype), codes.layout)
    integers_out = codes.out_dtype in INTEGERS
    y = backend.packed_conv2d_int8(
        x,
        x_scale,
        layer.packed,
        layer.scale,
        layer.bias,
        residual,
        residual_scale if codes.residual_dtype in INTEGERS else None,
        out_scale if integers_out else None,
        layer.bits,
        *layer.geometry.arguments,
        layer.shared,
        layer.activation,
        *codes.code_range,
        codes.out_dtype,
    )
    assert_channels_last(y)

    sums = layer.sums(array(x).astype(np.int64)).astype(np.float32)
    addend = None
    if residual is not None:
        addend = array(residual).astype(np.float32).reshape(sums.shape)
        if codes.residual_dtype in INTEGERS:
            addend = addend * member_scales[1][:, None, None, None, None]
    bias = None if layer.bias is None else array(layer.bias)
    multiplier = array(layer.scale) * member_scales[0][:, None]
    expected = oracle.epilogue(sums, multiplier, bias, addend, layer.activation)
    if layer.activation in INEXACT:
        slack = oracle.activation_slack(expected, layer.activation)
        assert_near(y, expected, slack, member_scales[2] if integers_out else None, codes)
    elif integers_out:
        expected = oracle.quantize(expected, member_scales[2], *codes.code_range, 0)
        assert_equal(y, expected.reshape(layer.out_shape), codes.out_dtype)
    else:
        assert_equal(y, rounded(expected, codes.out_dtype).reshape(layer.out_shape), codes.out_dtype)
    return y


def assert_near(
    y: torch.Tensor, expected: np.ndarray, slack: np.ndarray, out_scale: np.ndarray | None, codes: Codes
) -> None:
    """A few roundings apart: codes may differ by one where the value lies as close as that to a tie."""
    assert y.dtype == codes.out_dtype and y.shape[0] == expected.shape[0] * expected.shape[1]
    actual = array(y).reshape(expected.shape)
    if out_scale is None:
        store = unit(codes.out_dtype) if codes.out_dtype != torch.float32 else 0
        assert np.all(np.abs(actual - expected.astype(np.float64)) <= slack + 1.01 * store * np.abs(expected) + 6e-8)
    else:
        for nudge, compare in ((-1, np.greater_equal), (1, np.less_equal)):
            assert np.all(compare(actual, oracle.quantize(expected + nudge * slack, out_scale, *codes.code_range, 0)))


@given(layers(), SEEDS, code_choices())
def test_packed_conv2d_int8(layer, seed, codes):
    check_int8(layer, np.random.default_rng(seed), codes)


# More than one block of every kind: pixels, channels, depth, members.
LARGER = {
    "pointwise": dict(in_shape=(150, 9, 11), out_channels=140, geometry=Geometry()),
    "pointwise stride 2": dict(in_shape=(64, 15, 15), out_channels=72, geometry=Geometry(stride=(2, 2))),
    "3x3": dict(in_shape=(68, 9, 10), out_channels=67, geometry=Geometry((3, 3), padding=(1, 1, 1, 1))),
    "deep": dict(in_shape=(520, 3, 3), out_channels=33, geometry=Geometry((3, 3), padding=(1, 1, 1, 1))),
    "stem": dict(in_shape=(3, 30, 31), out_channels=64, geometry=Geometry((7, 7), (2, 2), (3, 3, 3, 3))),
    "depthwise": dict(
        in_shape=(130, 13, 12), out_channels=130, geometry=Geometry((5, 5), (2, 2), (1, 1, 2, 2), groups=130)
    ),
    "groups": dict(in_shape=(96, 7, 7), out_channels=120, geometry=Geometry((3, 3), padding=(1, 1, 1, 1), groups=3)),
}
# The same of the small tiles that Triton's interpreter computes.
LARGER_INTERPRETED = {
    "pointwise": dict(in_shape=(42, 3, 4), out_channels=20),
    "pointwise stride 2": dict(in_shape=(32, 5, 5), out_channels=20),
    "3x3": dict(in_shape=(10, 3, 4), out_channels=17),
    "deep": dict(in_shape=(66, 2, 3), out_channels=17),
    "stem": dict(in_shape=(3, 7, 8), out_channels=20),
    "depthwise": dict(in_shape=(70, 5, 4), out_channels=70, geometry=Geometry((5, 5), (2, 2), (1, 1, 2, 2), groups=70)),
    "groups": dict(in_shape=(64, 3, 3), out_channels=34, geometry=Geometry((2, 2), groups=2)),
}


def larger(name: str) -> dict[str, Any]:
    """Arguments of make_layer."""
    return LARGER[name] | (LARGER_INTERPRETED[name] if backend.interpreted else {})


@pytest.fixture
def tiles(monkeypatch):
    """In turn, how Triton cuts a convolution: with packed codes and with decoded ones; one way in other backends."""
    if backend.name != "triton":
        return [None]
    from qkernels.triton import tuning

    rule = tuning.by_rule

    def cut(decoded: bool) -> None:
        def tile_of(bucket, device, _):
            small = tuning.Tile(16, 16, 32, 4, 3, bucket.depth // 256 or 1)
            return (small if backend.interpreted else rule(bucket, device))._replace(decoded=decoded)

        monkeypatch.setattr(tuning, "tile_of", tile_of)

    return map(cut, (False, True))


@pytest.mark.parametrize("name", LARGER)
@pytest.mark.parametrize("shared", [False, True])
def test_larger_convolutions(tiles, name, shared):
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 7, 2, 2, shared=shared, activation="relu", **larger(name))
    for _ in itertools.islice(tiles, 1) if name == "depthwise" else tiles:  # which is not cut
        for dtype in (torch.float32, torch.bfloat16):
            check_float(layer, rng, dtype, "channels_last", with_residual=True)
        check_int8(layer, rng, Codes(torch.uint8, torch.uint8, torch.uint8, layout="channels_last"))
        check_int8(layer, rng, Codes(torch.int8, None, torch.int8, (-128, 127)))


@pytest.mark.parametrize("multiplier", range(1, 6))
def test_depthwise_convolutions_of_colors(multiplier):
    """Three channels that are repeated, as often as pictures' are filled up, are no pictures."""
    rng = np.random.default_rng(0)
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1), groups=3)
    layer = make_layer(rng, 5, 2, 1, (3, 4, 5), 3 * multiplier, geometry, False)
    check_float(layer, rng, torch.float32, "channels_last")
    check_int8(layer, rng, Codes(torch.uint8, None, torch.float32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_extreme_codes_do_not_saturate(bits):
    """Products of 255 or -128 with the least weight, all of one sign: sums of a few overflow 16 bits, not 32."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, bits, 1, 1, (64, 3, 3), 32, Geometry((3, 3), padding=(1, 1, 1, 1)), True, bias=False)
    codes = np.full_like(layer.codes, -(2 ** (bits - 1)))
    layer = layer._replace(codes=codes, packed=laid_out(oracle.pack(codes, bits)[None]))
    one = laid_out(np.ones(1, np.float32))
    for dtype, value in ((torch.uint8, 255), (torch.int8, -128), (torch.int8, 127)):
        x = torch.full((1, 64, 3, 3), value, dtype=dtype, device=backend.device)
        geometry = layer.geometry.arguments
        y = backend.packed_conv2d_int8(
            x,
            one,
            layer.packed,
            one.expand(1, 32),
            None,
            None,
            None,
            None,
            bits,
            *geometry,
            True,
            "none",
            0,
            255,
            torch.float32,
        )
        assert_equal(y, layer.sums(array(x).astype(np.int64))[0].astype(np.float32), torch.float32)


def test_nan_and_infinity_follow_the_contract():
    """NaN reaches float results and becomes code 0; infinity saturates; an invalid out_scale gives code 0."""
    layer = make_layer(np.random.default_rng(0), 4, 3, 1, (2, 2, 2), 2, Geometry(), True, activation="relu")
    bias = laid_out(np.array([[np.nan, 1], [np.inf, -np.inf], [1, 2]], np.float32))
    x = torch.zeros((1, 2, 2, 2), dtype=torch.uint8, device=backend.device)
    ones, out_scale = laid_out(np.ones(3, np.float32)), laid_out(np.array([0.5, 0.5, 0], np.float32))

    def conv(out_scale: Any, code_range, dtype) -> np.ndarray:
        y = backend.packed_conv2d_int8(
            x,
            ones,
            layer.packed,
            layer.scale,
            bias,
            None,
            None,
            out_scale,
            4,
            *layer.geometry.arguments,
            True,
            "relu",
            *code_range,
            dtype,
        )
        return array(y)[:, :, 0, 0]

    np.testing.assert_array_equal(conv(None, (0, 255), torch.float32), [[np.nan, 1], [np.inf, 0], [1, 2]])
    np.testing.assert_array_equal(conv(out_scale, (0, 100), torch.uint8), [[0, 2], [100, 0], [0, 0]])
    np.testing.assert_array_equal(conv(out_scale, (3, 100), torch.int8), [[3, 3], [100, 3], [3, 3]])


def test_every_element_is_written(tiles, poisoned_empty):
    rng = np.random.default_rng(0)
    for _ in tiles:
        for name, shared in (("3x3", True), ("depthwise", False)):
            layer = make_layer(rng, 5, 2, 1, shared=shared, **larger(name))
            check_float(layer, rng, torch.float32, "contiguous")
            check_int8(layer, rng, Codes())
    x = laid_out(rng.normal(size=(5, 7)).astype(np.float32))
    scale = laid_out(np.full(5, 0.1, np.float32))
    assert_equal(backend.quantize(x, scale, -8, 7, 0), oracle.quantize(array(x), array(scale), -8, 7, 0), torch.int8)


def test_members_do_not_see_each_other(tiles):
    """One call of M members gives the bits of M calls."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 6, 3, 2, shared=False, **larger("3x3"))
    x = laid_out(random_codes(rng, layer.x_shape, torch.uint8), "channels_last")
    x_scale = laid_out(np.exp(rng.uniform(-5, -3, 3)).astype(np.float32))

    def conv(x, members) -> torch.Tensor:
        m = slice(*members)
        return backend.packed_conv2d_int8(
            x,
            x_scale[m],
            layer.packed[m],
            layer.scale[m],
            layer.bias[m],
            None,
            None,
            None,
            6,
            *layer.geometry.arguments,
            False,
            "none",
            0,
            255,
            torch.float32,
        )

    for _ in tiles:
        together = conv(x, (0, 3))
        apart = torch.cat([conv(x[2 * m : 2 * m + 2], (m, m + 1)) for m in range(3)])
        assert torch.equal(together, apart)


def test_results_do_not_depend_on_the_number_of_threads():
    if backend.name != "cpp":
        pytest.skip("threads are the C++ backend's")
    threads = torch.get_num_threads()
    for name in ("3x3", "pointwise", "depthwise"):
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            rng = np.random.default_rng(0)
            layer = make_layer(rng, 7, 2, 2, shared=False, **LARGER[name])
            floats = [check_float(layer, rng, dtype, "contiguous") for dtype in (torch.float32, torch.bfloat16)]
            results.append([*floats, check_int8(layer, rng, Codes())])
        torch.set_num_threads(threads)
        for actual in results[1:]:
            assert all(map(torch.equal, actual, results[0]))


def test_an_instruction_set_that_cannot_be_had_is_an_error(monkeypatch):
    if backend.name != "cpp":
        pytest.skip("instruction sets are the C++ backend's")
    layer = make_layer(np.random.default_rng(0), 7, 1, 1, (4, 1, 1), 4, Geometry(), True)
    x = torch.zeros(1, 4, 1, 1)
    lacking = [
        (isa, "cannot be had") for isa in ISAS if isa not in ("portable", "emulated_amx", *library.cpu_features())
    ]
    for isa, why in (("sse2", "choose one of portable, avx2, avxvnni, avx512vnni, amx"), *lacking):
        monkeypatch.setenv("QKERNELS_CPU_ISA", isa)
        with pytest.raises(RuntimeError, match=f"QKERNELS_CPU_ISA.*{isa}.*{why}"):
            backend.packed_conv2d(x, layer.packed, layer.scale, None, None, 7, *layer.geometry.arguments, True, "none")
        with pytest.raises(RuntimeError, match=f"QKERNELS_CPU_ISA.*{isa}.*{why}"):
            backend.packed_gemv(x[:, :, 0, 0], layer.packed, layer.scale, None, 7, True, "none")
