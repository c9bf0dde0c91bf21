"""The rows of `packed_network` that compute with floats, against numpy in float64, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packed_cases import SEEDS, array, backend, each_backend  # noqa: F401, a fixture
from qkernels.ops.packed_network import Row, table

FLOAT = torch.float32
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def cpu_alone(each_backend):  # noqa: F811
    if backend.name not in ("cpp", "reference"):
        pytest.skip("packed_network is written in C++ for CPUs alone")


def run(row, inputs, constants=()):
    """What one row gives, of numpy arrays."""
    inputs = [torch.from_numpy(x.astype(np.float32)) for x in inputs]
    row = row._replace(result=len(inputs))
    constants = [torch.from_numpy(np.asarray(c, dtype=np.float32)) for c in constants]
    return array(backend.packed_network(inputs, constants, table([row]), list(row.shape), row.dtype))


def floats(rng, *shape):
    """float32 as float64, of several magnitudes."""
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 4)).astype(np.float32).astype(np.float64)


def assert_near(actual, expected, tolerance):
    np.testing.assert_array_less(np.abs(actual - expected), tolerance + np.zeros_like(expected))


SIZE = st.integers(1, 7)


@given(SEEDS, SIZE, st.integers(1, 150), SIZE, SIZE)
def test_mean(seed, images, channels, height, width):
    x = floats(np.random.default_rng(seed), images, channels, height, width)
    y = run(Row("mean", 0, 1, FLOAT, (images, channels, 1, 1)), [x])
    terms = height * width
    assert_near(y, x.mean((2, 3), keepdims=True), (terms + 1) * EPSILON * np.abs(x).mean((2, 3), keepdims=True) + 1e-30)


@given(SEEDS, SIZE, st.integers(1, 150), SIZE, SIZE)
def test_gate(seed, images, channels, height, width):
    rng = np.random.default_rng(seed)
    x, factors = floats(rng, images, channels, height, width), floats(rng, images, channels, 1, 1)
    y = run(Row("gate", 0, 2, FLOAT, x.shape, residual=1), [x, factors])
    np.testing.assert_array_equal(y, (x * factors).astype(np.float32))


@given(SEEDS, st.integers(1, 3), SIZE, st.integers(1, 150), st.sampled_from([1e-6, 1e-5, 0.1]))
def test_norm(seed, members, images, channels, eps):
    """Of pixels whose values are not all nearly the same, where the epsilon says all."""
    rng = np.random.default_rng(seed)
    x = floats(rng, members * images, channels, 2, 3)
    weight, bias = floats(rng, members, channels), floats(rng, members, channels)
    row = Row("norm", 0, 1, FLOAT, x.shape, members=members, scale=0, bias=1, x_scale=2)
    y = run(row, [x], [weight, bias, [eps]])
    centered = x - x.mean(1, keepdims=True)
    factor = 1 / np.sqrt((centered**2).mean(1, keepdims=True) + np.float32(eps))
    by_image = [np.repeat(t, images, 0)[:, :, None, None] for t in (weight, bias)]
    expected = centered * factor * by_image[0] + by_image[1]
    magnitude = np.abs(x).max(1, keepdims=True) * factor * np.abs(by_image[0]) + np.abs(by_image[1])
    assert_near(y, expected, (channels + 8) * EPSILON * magnitude)


@given(SEEDS, st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 70), st.booleans())
def test_attend(seed, images, tokens, heads, depth, as_image):
    rng = np.random.default_rng(seed)
    channels = heads * depth
    starts = rng.integers(0, 5, 3) + np.array([0, channels, 2 * channels])
    x = rng.standard_normal((images * tokens, 3 * channels + 4)).astype(np.float32).astype(np.float64)
    scale = float(np.float32(rng.choice([depth**-0.5, 1.0, -0.25])))
    shape = (images, channels, tokens, 1) if as_image else (images * tokens, channels, 1, 1)
    given_shape = (shape[0], x.shape[1], *shape[2:])
    names = dict(zip(("query", "key", "value"), map(int, starts), strict=True))
    row = Row("attend", 0, 1, FLOAT, shape, heads=heads, tokens=tokens, scale=0, **names)
    order = (0, 3, 1, 2)
    y = run(row, [x.reshape(given_shape[0], *given_shape[2:], -1).transpose(order)], [[scale]])
    q, k, v = (
        x[:, s : s + channels].reshape(images, tokens, heads, depth).transpose(0, 2, 1, 3) for s in starts.tolist()
    )
    scores = q @ k.swapaxes(-1, -2) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
    expected = expected.reshape(shape[0], *shape[2:], channels).transpose(order)
    assert_near(y, expected, 1e-6 * (8 + depth * np.abs(scores).max() / 8) * np.abs(v).max() + tokens * EPSILON)


def test_attention_of_large_scores():
    """The largest takes all, whatever exp() of it would be; infinities leave NaN."""
    x = np.zeros((4, 6, 1, 1))
    x[:, 0, 0, 0], x[:, 2, 0, 0], x[:, 4, 0, 0] = 1e4, [-1e4, 3e4, 0, 1e3], [1, 2, 3, 4]
    row = Row("attend", 0, 1, FLOAT, (4, 2, 1, 1), heads=1, tokens=4, query=0, key=2, value=4, scale=0)
    y = run(row, [x], [[1.0]])
    np.testing.assert_array_equal(y[:, 0, 0, 0], [2, 2, 2, 2])
    x[0, 2] = math.inf
    assert np.isnan(run(row, [x], [[1.0]])[:, 0, 0, 0]).all()


SHAPE = (4, 6, 2, 3)
LEGAL = {
    "mean": Row("mean", 0, 2, FLOAT, (4, 6, 1, 1)),
    "gate": Row("gate", 0, 2, FLOAT, SHAPE, residual=1),
    "norm": Row("norm", 0, 2, FLOAT, SHAPE, members=2, scale=0, bias=0, x_scale=1),
    "attend": Row("attend", 0, 2, FLOAT, (4, 4, 2, 3), heads=2, tokens=6, query=2, key=1, value=0, scale=1),
}
MISTAKES = [
    ("mean", {"shape": (4, 6, 2, 1)}, "is no mean of images of float32"),
    ("mean", {"shape": (2, 6, 1, 1)}, "is no mean of images of float32"),
    ("mean", {"shape": (4, 5, 1, 1)}, "is no mean of images of float32"),
    ("mean", {"dtype": torch.bfloat16}, "is no mean of images of float32"),
    ("mean", {"first": 1}, "does not go on where"),
    ("gate", {"residual": -1}, "takes what is not there"),
    ("gate", {"residual": 2}, "takes what is not there"),
    ("gate", {"residual": 0}, "has other factors than one for each channel"),
    ("gate", {"shape": (4, 6, 3, 2)}, "is no product of images of float32"),
    ("gate", {"dtype": torch.uint8}, "is no product of images of float32"),
    ("norm", {"members": 0}, "has a size that is too small"),
    ("norm", {"members": 3}, "is no norm of float32"),
    ("norm", {"members": 4}, "takes more of a constant than is there"),
    ("norm", {"scale": 1}, "takes more of a constant than is there"),
    ("norm", {"scale": -1}, "takes a constant that is not there"),
    ("norm", {"bias": 2}, "takes a constant that is not there"),
    ("norm", {"x_scale": -1}, "takes a constant that is not there"),
    ("norm", {"shape": (4, 6, 3, 2)}, "is no norm of float32"),
    ("norm", {"dtype": torch.float16}, "is no norm of float32"),
    ("attend", {"heads": 0}, "has a size that is too small"),
    ("attend", {"heads": 3}, "is no attention of tokens of float32"),
    ("attend", {"tokens": 0}, "has a size that is too small"),
    ("attend", {"tokens": 5}, "is no attention of tokens of float32"),
    ("attend", {"tokens": 2**40}, "is no attention of tokens of float32"),
    ("attend", {"query": 3}, "takes channels that are not there"),
    ("attend", {"key": -1}, "takes channels that are not there|has a size that is too small"),
    ("attend", {"value": 2**40}, "takes channels that are not there"),
    ("attend", {"scale": -1}, "takes a constant that is not there"),
    ("attend", {"shape": (4, 8, 2, 3)}, "takes channels that are not there"),
    ("attend", {"shape": (4, 4, 3, 2)}, "is no attention of tokens of float32"),
]


def call(row):
    rng = np.random.default_rng(0)
    x, factors = (torch.from_numpy(floats(rng, *shape)).float() for shape in (SHAPE, (4, 6, 1, 1)))
    return backend.packed_network(
        [x, factors], [torch.ones(3, 6), torch.tensor([0.1])], table([row]), list(row.shape), row.dtype
    )


@pytest.mark.parametrize("kind", LEGAL)
def test_what_the_mistakes_are_made_in_is_legal(kind):
    assert call(LEGAL[kind]).shape == LEGAL[kind].shape


@pytest.mark.parametrize("kind, fields, message", MISTAKES)
def test_mistakes_are_named(kind, fields, message):
    with pytest.raises((RuntimeError, ValueError), match=f"row 0 ({message})"):
        call(LEGAL[kind]._replace(**fields))


@pytest.mark.parametrize("kind", LEGAL)
def test_codes_are_refused(kind):
    codes = torch.zeros(SHAPE, dtype=torch.uint8)
    row = LEGAL[kind]
    with pytest.raises((RuntimeError, ValueError), match=r"row 0 is no .* float32"):
        backend.packed_network(
            [codes, codes], [torch.ones(3, 6), torch.tensor([0.1])], table([row]), list(row.shape), row.dtype
        )
