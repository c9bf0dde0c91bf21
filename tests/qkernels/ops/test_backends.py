"""Every backend against `reference.py` and a numpy oracle: C++ on the CPU, C++/CUDA on a GPU or emulated on the CPU,
Triton on a GPU or interpreted on the CPU.

Triton's interpreter truncates float32 to bfloat16 where hardware rounds to nearest even; `rounded` follows whichever
runs.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from backend_under_test import DTYPES, Backend, assert_laid_out_like, compiled, slow, why_not
from qkernels.ops import reference

# The hypothesis strategies below make tensors where this backend wants them.
backend = Backend("reference")

BACKENDS = ("reference", *map(compiled, ("cpp", "cuda")), *map(slow, ("emulated", "triton", "triton-tiny")))


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request, monkeypatch):
    if (why := why_not(request.param)) is not None:
        pytest.skip(why)
    backend.choose(request.param)
    if request.param == "triton-tiny":
        from qkernels.triton import launch

        few = {"num_warps": 1}
        tiny = {  # so that small tensors take many programs, loops and partial sums
            "forward": launch.Launch(block=32, **few),
            "backward": launch.Launch(block=32, programs=3, **few),
            "mean_abs": launch.Launch(block=32, programs=3, **few),
            "multi_forward": launch.Launch(block=16, segment=32, **few),
            "multi_backward": launch.Launch(block=16, segment=32, **few),
            "multi_fold": launch.Launch(block=4, **few),
        }
        monkeypatch.setattr(launch, "_TABLE", {None: tiny})


RANGES = ((-2, 1), (-1, 1), (-64, 63), (-63, 63), (0, 255), (-128, 127), (3, 9), (-9, -4), (-(2**22), 2**22))
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter computes with NaN
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float32 values in `dtype`, as the kernels' store makes them."""
    values = torch.from_numpy(np.array(values, np.float32))
    if backend.truncates_bfloat16 and dtype == torch.bfloat16:
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


def laid_out(values: torch.Tensor, layout: str, order: list[int]) -> torch.Tensor:
    """The same values on the backend's device, in another memory layout."""
    values = values.to(backend.device)
    if layout == "permuted":
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return values.permute(order).contiguous().permute(inverse)
    if layout == "strided":
        padded = values.new_zeros([2 * n + 1 for n in values.shape])
        view = padded[tuple(slice(1, None, 2) for _ in values.shape)]
        return view.copy_(values)
    if layout == "unaligned":
        return values.new_zeros(values.numel() + 1)[1:].view(values.shape).copy_(values)
    return values


def numpy32(t: torch.Tensor) -> np.ndarray:
    return t.detach().float().cpu().numpy()


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal elements and dtypes; NaN equals NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(numpy32(actual), numpy32(expected))


def assert_sums(actual: torch.Tensor, exact: np.ndarray, magnitude: np.ndarray, scale: torch.Tensor) -> None:
    """Within 1e-6 of the sum of |terms|, as float32 sums of short chains are; NaN and infinity where exact is."""
    assert actual.dtype == torch.float32 and actual.shape == scale.shape
    actual = numpy32(actual).reshape(exact.shape).astype(np.float64)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(actual[~finite], exact[~finite])
    assert np.all(np.abs(actual - exact)[finite] <= (1e-6 * magnitude + 1e-30)[finite])


@st.composite
def layers(draw, axis=None, any_axis=True, dtype=None, special=True, most=1500):
    """A quantizer's arguments: x, scale, offset, qmin, qmax, axis, with ties, range edges and special values in x."""
    shape = draw(st.lists(st.integers(0, 9) | st.integers(1, 40), min_size=0 if any_axis else 1, max_size=4))
    while np.prod(shape, dtype=np.int64) > most:
        shape.pop()
    if any_axis:
        axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    qmin, qmax = draw(st.sampled_from(RANGES))
    per_scale = () if axis is None else (shape[axis],)
    scale = np.exp(rng.uniform(-6, 2, per_scale)).astype(np.float32)
    offset = rng.normal(size=per_scale).astype(np.float32) if draw(st.booleans()) else None
    if special and draw(st.booleans()):
        scale = np.where(rng.random(per_scale) < 0.3, rng.choice([0, -1, np.nan, np.inf]), scale).astype(np.float32)
    elif draw(st.booleans()):
        scale = np.full(per_scale, 0.25, np.float32)  # so that multiples of 1/8 are ties
    x = rng.normal(size=shape) * np.exp(rng.uniform(-3, 3))
    ties = rng.integers(min(qmin, -9) - 2, min(qmax, 99) + 3, shape) / 8
    x = np.where(rng.random(shape) < 0.5, x, ties)
    if special:
        x = np.where(rng.random(shape) < 0.05, rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38], shape), x)
    order = draw(st.permutations(range(len(shape))))
    layout = draw(st.sampled_from(["contiguous", "permuted", "strided", "unaligned"]))
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    x = laid_out(torch.from_numpy(np.asarray(x, np.float32)).to(dtype), layout, order)
    scale = torch.from_numpy(np.asarray(scale)).to(backend.device)
    offset = None if offset is None else torch.from_numpy(np.asarray(offset)).to(backend.device)
    return x, scale, offset, qmin, qmax, axis


def gradient_of(draw, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grad = torch.from_numpy(np.asarray(rng.normal(size=x.shape), np.float32)).to(dtype)
    return laid_out(grad, draw(st.sampled_from(["contiguous", "permuted", "strided"])), list(range(x.dim()))[::-1])


@given(layers(), st.sampled_from(DTYPES))
def test_fake_quantize(layer, out_dtype):
    x, scale, offset, qmin, qmax, axis = layer
    y = backend.fake_quantize(x, scale, offset, qmin, qmax, axis, 1.0, False, out_dtype)
    assert_laid_out_like(y, x)
    exact = oracle.fake_quantize(numpy32(x), numpy32(scale), None if offset is None else numpy32(offset), *layer[3:])
    assert_same(y, rounded(exact, out_dtype))
    y = backend.fake_quantize(x, scale, offset, qmin, qmax, axis, 1.0, False, torch.float32)
    assert_same(y, reference.fake_quantize(x, scale, offset, qmin, qmax, axis, 1.0, False, torch.float32))


@given(st.data(), layers(), st.sampled_from(DTYPES), st.booleans())
def test_fake_quantize_backward(data, layer, grad_dtype, aten_edge):
    x, scale, offset, qmin, qmax, axis = layer
    grad = gradient_of(data.draw, x, grad_dtype)
    arguments = (grad, x, scale, offset, qmin, qmax, axis, 0.3, aten_edge)
    grad_x, grad_scale, grad_offset = backend.fake_quantize_backward(*arguments, True)
    assert_laid_out_like(grad_x, x)
    exact = oracle.gradients(
        numpy32(grad), numpy32(x), numpy32(scale), None if offset is None else numpy32(offset), *layer[3:], aten_edge
    )
    assert_same(grad_x, rounded(exact.x, x.dtype))
    assert_sums(grad_scale / 0.3, exact.scale, exact.scale_magnitude, scale)
    if offset is None:
        assert grad_offset.shape == (0,)
    else:
        assert_sums(grad_offset / 0.3, exact.offset, exact.offset_magnitude, scale)
    if x.dtype == torch.float32:
        assert_same(grad_x, reference.fake_quantize_backward(*arguments, False)[0])
    if not backend.interpreted:  # whose programs take turns
        for first, again in zip(
            (grad_x, grad_scale, grad_offset), backend.fake_quantize_backward(*arguments, True), strict=True
        ):
            assert_same(again, first)
    without = backend.fake_quantize_backward(*arguments, False)
    assert_same(without[0], grad_x)
    assert without[1].shape == without[2].shape == (0,)


@st.composite
def models(draw):
    """Layers that share dtype and axis; the lists that `fake_quantize_multi` takes, then the axis."""
    axis = draw(st.sampled_from([None, 0]))
    dtype = draw(st.sampled_from(DTYPES))
    layer = layers(axis=axis, any_axis=False, dtype=dtype, most=100 if backend.interpreted else 200)
    several = draw(st.lists(layer, min_size=1, max_size=4))
    xs, scales, _, qmins, qmaxs, _ = (list(column) for column in zip(*several, strict=True))
    return xs, scales, qmins, qmaxs, axis


@given(models(), st.sampled_from([None, *DTYPES]))
def test_fake_quantize_multi(model, out_dtype):
    xs, scales, qmins, qmaxs, axis = model
    ys = backend.fake_quantize_multi(xs, scales, qmins, qmaxs, axis, [1.0] * len(xs), out_dtype)
    for x, scale, qmin, qmax, y in zip(xs, scales, qmins, qmaxs, ys, strict=True):
        assert_laid_out_like(y, x)
        exact = oracle.fake_quantize(numpy32(x), numpy32(scale), None, qmin, qmax, axis)
        assert_same(y, rounded(exact, out_dtype or x.dtype))


@given(st.data(), models(), st.sampled_from(DTYPES))
def test_fake_quantize_multi_backward(data, model, grad_dtype):
    xs, scales, qmins, qmaxs, axis = model
    grads = [gradient_of(data.draw, x, grad_dtype) for x in xs]
    factors = [0.5 + i for i in range(len(xs))]
    grad_xs, grad_scales = backend.fake_quantize_multi_backward(grads, xs, scales, qmins, qmaxs, axis, factors, True)
    for grad, x, scale, qmin, qmax, factor, grad_x, grad_scale in zip(
        grads, xs, scales, qmins, qmaxs, factors, grad_xs, grad_scales, strict=True
    ):
        assert_laid_out_like(grad_x, x)
        exact = oracle.gradients(numpy32(grad), numpy32(x), numpy32(scale), None, qmin, qmax, axis, False)
        assert_same(grad_x, rounded(exact.x, x.dtype))
        assert_sums(grad_scale / factor, exact.scale, exact.scale_magnitude, scale)
    if not backend.interpreted:
        again = backend.fake_quantize_multi_backward(grads, xs, scales, qmins, qmaxs, axis, factors, True)
        for first, second in zip([*grad_xs, *grad_scales], [*again[0], *again[1]], strict=True):
            assert_same(second, first)
    without = backend.fake_quantize_multi_backward(grads, xs, scales, qmins, qmaxs, axis, factors, False)
    for first, second, nothing in zip(grad_xs, *without, strict=True):
        assert_same(second, first)
        assert nothing.shape == (0,)


@given(layers(special=False))
def test_mean_abs(layer):
    x, scale, _, _, _, axis = layer
    exact = oracle.mean_abs(numpy32(x), axis)
    result = backend.mean_abs(x, axis)
    assert result.shape == (() if axis is None else (x.shape[axis],))
    assert_sums(result, exact, exact, scale)
    assert_same(backend.mean_abs(x, axis), result)


def test_mean_abs_passes_nan():
    assert backend.mean_abs(torch.tensor([[1.0, float("nan")], [1.0, -3.0]], device=backend.device), 0)[0].isnan()


@pytest.mark.parametrize("qmin, qmax", [*RANGES, (-1, 0), (0, 1), (-3, -1), (1, 2), (4194301, 4194303)])
def test_aten_edge_between_neighboring_floats(qmin, qmax):
    """Inside is decided on round(v): exactly so on the floats next to every rounding boundary."""
    edges = np.array([q + d for q in (qmin, qmax) for d in (-1, -0.5, 0, 0.5, 1)], np.float32)
    v = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    x, scale = torch.from_numpy(v).to(backend.device), torch.ones((), device=backend.device)
    grad_x, _, _ = backend.fake_quantize_backward(torch.ones_like(x), x, scale, None, qmin, qmax, None, 1.0, True, True)
    inside = (np.rint(v) >= qmin) & (np.rint(v) <= qmax)
    np.testing.assert_array_equal(numpy32(grad_x), inside.astype(np.float32))


def near_ties(rng: np.random.Generator, qmin: int, qmax: int) -> tuple[np.ndarray, np.ndarray]:
    """x [64, n] and scales [64] of every magnitude: ties, ends of the range and their neighbors, and what is tiny."""
    exponent = np.concatenate([np.arange(-149, 106, 5), np.full(13, -4)])
    scale = np.ldexp(rng.uniform(1, 2, 64), exponent).astype(np.float32)
    codes = np.concatenate([rng.integers(qmin, qmax, (64, 8)) + 0.5, np.full((64, 2), (qmin, qmax))], 1)
    with np.errstate(over="ignore"):
        ties = (codes * scale[:, None]).astype(np.float32)
    ends = np.float32([np.inf, -np.inf, 3e38, 0, -0.0, 1e-45, -1e-45, -1e-40, 1e-33, -2e-31, 7e-31, -3e-30])
    to = np.float32([-np.inf, np.inf])
    x = np.concatenate([ties, *(np.nextafter(ties, t) for t in to), np.broadcast_to(ends, (64, len(ends)))], 1)
    return x, scale


@pytest.mark.parametrize("qmin, qmax", [(-64, 63), (0, 255), (-3, 0), (0, 2**22), (-(2**22), 2**22)])
def test_division_is_ieee(qmin, qmax):
    """Quotients that a multiplication by the reciprocal, or an approximate division, sends to another code."""
    x, scale = near_ties(np.random.default_rng(0), qmin, qmax)
    x_on, scale_on = (torch.from_numpy(t).to(backend.device) for t in (x, scale))
    y = backend.fake_quantize(x_on, scale_on, None, qmin, qmax, 0, 1.0, False, torch.float32)
    np.testing.assert_array_equal(numpy32(y), oracle.fake_quantize(x, scale, None, qmin, qmax, 0))


@pytest.mark.parametrize("qmin, qmax", [(-64, 63), (0, 255), (-3, 0), (0, 2**22)])
def test_quotients_are_ieee(qmin, qmax):
    """Which element is inside, and the gradient of a scale that has no other element: code - quotient."""
    x, scale = near_ties(np.random.default_rng(1), qmin, qmax)
    scale = np.repeat(scale, x.shape[1])
    x_on, scale_on = (torch.from_numpy(t).to(backend.device) for t in (x.reshape(-1, 1), scale))
    grad = torch.ones_like(x_on)
    actual = backend.fake_quantize_backward(grad, x_on, scale_on, None, qmin, qmax, 0, 1.0, False, True)
    exact = oracle.gradients(numpy32(grad), x.reshape(-1, 1), scale, None, qmin, qmax, 0, False)
    np.testing.assert_array_equal(numpy32(actual[0]), exact.x)
    np.testing.assert_array_equal(numpy32(actual[1]), exact.scale.astype(np.float32))


def test_expanded_x_and_grad():
    x = torch.randn(1, 5, device=backend.device).expand(6, 5)
    grad = torch.ones((), device=backend.device).expand(6, 5)
    scale = torch.full((5,), 0.1, device=backend.device)
    y = backend.fake_quantize(x, scale, None, -8, 7, 1, 1.0, False, torch.float32)
    assert_same(y, reference.fake_quantize(x, scale, None, -8, 7, 1, 1.0, False, torch.float32))
    result = backend.fake_quantize_backward(grad, x, scale, None, -8, 7, 1, 1.0, False, True)
    expected = reference.fake_quantize_backward(grad, x, scale, None, -8, 7, 1, 1.0, False, True)
    assert_same(result[0], expected[0])


def test_gradients_have_the_shape_of_scale():
    x = torch.randn(4, 5, device=backend.device)
    scale, offset = torch.full((1, 1), 0.1, device=backend.device), torch.zeros((), device=backend.device)
    _, *gradients = backend.fake_quantize_backward(x, x, scale, offset, -8, 7, None, 1.0, False, True)
    assert [g.shape for g in gradients] == [(1, 1), (1, 1)]


def test_long_sums_stay_accurate():
    """Chains of additions: error within the bound where one program walks the whole tensor."""
    x = torch.rand(1 << 14, device=backend.device) + 0.1
    grad = torch.rand(1 << 14, device=backend.device)
    scale = torch.full((), 0.01, device=backend.device)
    grad_scale = backend.fake_quantize_backward(grad, x, scale, None, -8, 7, None, 1.0, False, True)[1]
    exact = oracle.gradients(numpy32(grad), numpy32(x), numpy32(scale), None, -8, 7, None, False)
    assert_sums(grad_scale, exact.scale, exact.scale_magnitude, scale)


@pytest.mark.slow
def test_results_too_large_for_malloc_to_reuse():
    """40 MB: written around the caches, on pages of 2 MiB."""
    if backend.name != "cpp":
        pytest.skip("the C++ CPU kernels' own")
    x, grad = torch.randn(5, 2_000_003), torch.randn(5, 2_000_003)
    scale = torch.rand(5) + 0.01
    arguments = (-8, 7, 0, 1.0, False)
    assert_same(
        backend.fake_quantize(x, scale, None, *arguments, torch.float32),
        reference.fake_quantize(x, scale, None, *arguments, torch.float32),
    )
    result = backend.fake_quantize_backward(grad, x, scale, None, *arguments, True)
    expected = reference.fake_quantize_backward(grad, x, scale, None, *arguments, True)
    assert_same(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-2)


def test_matrix_tiles_cover_every_element_once():
    if backend.name != "triton":
        pytest.skip("Triton's own")
    from qkernels.triton.layout import matrix

    for shape, axis, order in [
        ((2, 3, 4, 5), 1, [0, 2, 3, 1]),  # columns
        ((7, 3, 2), 1, [0, 1, 2]),
        ((2, 3, 4), 1, [0, 1, 2]),  # rows
        ((3, 40), 0, [0, 1]),
        ((9,), None, [0]),
    ]:
        inverse = sorted(range(len(order)), key=order.__getitem__)
        x = torch.arange(int(np.prod(shape))).view([shape[d] for d in order]).permute(inverse)
        m = matrix(x, axis)
        at = [k * m.kept_stride + s * m.summed_stride for k in range(m.kept) for s in range(m.summed)]
        assert sorted(at) == list(range(x.numel()))
        channel_at = {v: c for c in range(x.shape[axis or 0]) for v in x.select(axis or 0, c).flatten().tolist()}
        for k in range(m.kept):
            for s in range(m.summed):
                channel = k // m.group % m.channels
                assert axis is None or channel_at[k * m.kept_stride + s * m.summed_stride] == channel
