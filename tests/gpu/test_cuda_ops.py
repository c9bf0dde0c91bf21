"""Every op of the C++/CUDA and the Triton backend on a GPU, against the reference on the CPU and against each other;
without a GPU, what needs none of the C++/CUDA kernels emulated.

y and grad_x must equal the float32 reference bit for bit; sums are compared with its terms added in float64.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from qkernels import backends, fake_quantize, fake_quantize_multi
from qkernels.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QMIN, QMAX, FACTOR = -8, 7, 0.3
REPEATS = 50 if DEVICE == "cuda" else 5


@pytest.fixture(autouse=True)
def sums_in_float64(monkeypatch):
    in_one_dtype = reference._sum_per_scale
    monkeypatch.setattr(reference, "_sum_per_scale", lambda terms, axis: in_one_dtype(terms.double(), axis))


def equal(actual, expected):
    """Same bits but for the sign of zero; same layout."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def sums_equal(actual, expected, magnitude):
    """magnitude: an upper bound of the sum of |terms|, per scale."""
    actual, expected = actual.double().cpu().reshape(expected.shape), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual - expected).abs().nan_to_num()
    bound = 1e-6 * magnitude.double().reshape(expected.shape) + 1e-5 * expected.abs().nan_to_num()
    assert (error <= bound).all(), (error / bound).max()


def laid_out(layout, shape, dtype, generator):
    """A CPU tensor of that shape and dtype in one of several memory layouts."""
    x = torch.randn(shape, generator=generator)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    elif layout == "every other":
        x = torch.stack([x, x], -1)[..., 0]
    return x.to(dtype)


def on_gpu(t, layout=""):
    """A copy on the GPU with the same strides; "unaligned": one element past a 16-byte boundary."""
    if t is None:
        return None
    if layout == "unaligned":
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape).copy_(t)
    if layout == "every other":
        return torch.stack([t, t], -1).to(DEVICE)[..., 0]
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)


def parameters(x, axis, with_offset, generator):
    """scale and offset on the CPU; two scales of many are invalid."""
    channels = 1 if axis is None else x.shape[axis]
    scale = torch.rand(channels, generator=generator) * 0.2 + 0.01
    if channels > 8:
        scale[3], scale[5] = 0.0, torch.inf
    offset = torch.randn(channels, generator=generator) * 0.1 if with_offset else None
    if axis is None:
        scale, offset = scale.reshape(()), None if offset is None else offset.reshape(())
    return scale, offset


def check_forward(backend, x, scale, offset, axis, out_dtype, layout=""):
    expected = reference.fake_quantize(x, scale, offset, QMIN, QMAX, axis, 1.0, False, out_dtype)
    actual = backend("fake_quantize")(
        on_gpu(x, layout), on_gpu(scale), on_gpu(offset), QMIN, QMAX, axis, 1.0, False, out_dtype
    )
    equal(actual, expected)
    if layout != "every other":
        assert actual.stride() == expected.stride()


def check_backward(backend, grad, x, scale, offset, axis, aten_edge, layout=""):
    arguments = (QMIN, QMAX, axis, FACTOR, aten_edge)
    expected = reference.fake_quantize_backward(grad, x, scale, offset, *arguments, True)
    on_device = on_gpu(grad), on_gpu(x, layout), on_gpu(scale), on_gpu(offset)
    actual = backend("fake_quantize_backward")(*on_device, *arguments, True)
    again = backend("fake_quantize_backward")(*on_device, *arguments, True)
    equal(actual[0], expected[0])
    assert actual[1].shape == scale.shape
    magnitude = FACTOR * QMAX * reference._sum_per_scale(grad.float().abs(), axis)
    sums_equal(actual[1], expected[1], magnitude)
    sums_equal(actual[2], expected[2], magnitude if offset is not None else torch.empty(0))
    for a, b in zip(actual, again, strict=True):
        equal(a, b)
    x_alone = backend("fake_quantize_backward")(*on_device, *arguments, False)
    equal(x_alone[0], expected[0])
    assert x_alone[1].numel() == x_alone[2].numel() == 0


# Long sums, long rows and many columns take many programs of a GPU, and on the small emulated one of fewer elements.
LARGE = [(1000003,), (2048, 2049), (512, 64, 3, 3)] if DEVICE == "cuda" else [(300007,), (80, 2049), (64, 64, 3, 3)]
SHAPES = [
    (1,),
    (7, 1),
    (64, 9),
    (16, 147),
    (300, 40),
    (3, 70001),
    (64, 3, 7, 7),
    (8, 512, 7, 7),
    (32, 1, 3, 3),
    (4, 96, 28, 28),
    *LARGE,
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "every other", "unaligned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_layouts_and_axes(backend, shape, layout):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last needs four dimensions")
    generator = torch.Generator().manual_seed(0)
    for axis in (None, *range(min(len(shape), 2))):
        x = laid_out(layout, shape, torch.float32, generator)
        scale, offset = parameters(x, axis, axis == 0, generator)
        grad = laid_out("contiguous" if axis == 0 else layout, shape, torch.float32, generator)
        check_forward(backend, x, scale, offset, axis, torch.float32, layout)
        check_backward(backend, grad, x, scale, offset, axis, False, layout)


@pytest.mark.parametrize(("x_dtype", "other"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_dtypes(backend, x_dtype, other):
    generator = torch.Generator().manual_seed(1)
    for shape, axis, layout in itertools.product(
        [(16, 147), (3, 4099), (6, 24, 5, 5)], [None, 0, 1], ["", "unaligned"]
    ):
        x = laid_out("", shape, x_dtype, generator)
        scale, offset = parameters(x, axis, shape[0] == 3, generator)
        grad = laid_out("", shape, other, generator)
        check_forward(backend, x, scale, offset, axis, other, layout)
        check_backward(backend, grad, x, scale, offset, axis, axis == 1, layout)


@pytest.mark.parametrize("aten_edge", [False, True])
def test_bounds_ties_and_values_that_are_not_finite(backend, aten_edge):
    row = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, 0.0, -8.0, 7.0, 7.25, 7.5, -8.5, 0.5, 1.5, 2.5, -0.5]
    x = torch.tensor([row] * 6)
    scale = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf, 1e-40])
    grad = torch.ones_like(x)
    for offset in (None, torch.zeros(6)):
        check_forward(backend, x, scale, offset, 0, torch.float32)
        check_backward(backend, grad, x, scale, offset, 0, aten_edge)
        check_backward(backend, grad[:, 3:], x[:, 3:].clone(), scale, offset, 0, aten_edge)


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 3), 0), ((0, 3), 1), ((2, 0, 4), 2)], ids=str)
def test_empty(backend, shape, axis):
    x = torch.empty(shape)
    scale = torch.ones(() if axis is None else x.shape[axis])
    check_forward(backend, x, scale, scale, axis, torch.bfloat16)
    check_backward(backend, x, x, scale, scale, axis, False)
    assert not backend("mean_abs")(x.to(DEVICE), axis).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_abs(backend, dtype):
    generator = torch.Generator().manual_seed(2)
    for shape, layout in itertools.product(SHAPES, ["contiguous", "transposed", "unaligned"]):
        for axis in (None, *range(min(len(shape), 2))):
            x = laid_out(layout, shape, dtype, generator)
            actual = backend("mean_abs")(on_gpu(x, layout), axis)
            expected = reference.mean_abs(x, axis).float()
            assert actual.shape == expected.shape
            assert_close(actual.cpu(), expected, rtol=1e-5, atol=0)


SMALL_LAYERS = [(64, 3, 7, 7), (32, 1, 3, 3), (1, 9), (0, 4)]
LAYERS = [*SMALL_LAYERS, (256, 64, 1, 1), (5, 4100), LARGE[-1], (1000 if DEVICE == "cuda" else 100, 513)]


def layers(axis, x_dtype, shapes=LAYERS):
    """xs, scales, qmins, qmaxs, grad_factors on the CPU, as a model may have them."""
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(s, generator=generator).to(x_dtype) for s in shapes]
    xs[0] = xs[0].contiguous(memory_format=torch.channels_last)
    scales = [torch.rand(() if axis is None else x.shape[axis], generator=generator) * 0.2 + 0.01 for x in xs]
    bits = [2 + i % 7 for i in range(len(xs))]
    return xs, scales, [-(2 ** (b - 1)) for b in bits], [2 ** (b - 1) - 1 for b in bits], [0.1 * b for b in bits]


@pytest.mark.parametrize("axis", [0, None, 1])
@pytest.mark.parametrize(("x_dtype", "other"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_multi(backend, axis, x_dtype, other):
    xs, scales, *rest = layers(axis, x_dtype)
    qmins, qmaxs, factors = rest
    grads = [torch.randn_like(x, dtype=torch.float32).to(other) for x in xs]
    gpu_xs, gpu_scales, gpu_grads = ([on_gpu(t) for t in ts] for ts in (xs, scales, grads))
    expected = reference.fake_quantize_multi(xs, scales, qmins, qmaxs, axis, factors, other)
    for a, e in zip(
        backend("fake_quantize_multi")(gpu_xs, gpu_scales, qmins, qmaxs, axis, factors, other), expected, strict=True
    ):
        equal(a, e)
    for param_grads in (True, False):
        arguments = (qmins, qmaxs, axis, factors, param_grads)
        got_xs, got_scales = backend("fake_quantize_multi_backward")(gpu_grads, gpu_xs, gpu_scales, *arguments)
        want_xs, want_scales = reference.fake_quantize_multi_backward(grads, xs, scales, *arguments)
        for a, e in zip(got_xs, want_xs, strict=True):
            equal(a, e)
        for a, e, grad, qmin, factor in zip(got_scales, want_scales, grads, qmins, factors, strict=True):
            bound = -qmin * factor * reference._sum_per_scale(grad.float().abs(), axis)
            sums_equal(a, e, bound if param_grads else torch.empty(0))


def test_more_layers_than_one_launch_takes(backend):
    xs, scales, qmins, qmaxs, factors = layers(0, torch.float32, SMALL_LAYERS * 160)
    expected = reference.fake_quantize_multi(xs, scales, qmins, qmaxs, 0, factors, None)
    actual = backend("fake_quantize_multi")(
        [on_gpu(x) for x in xs], [on_gpu(s) for s in scales], qmins, qmaxs, 0, factors, None
    )
    for a, e in zip(actual, expected, strict=True):
        equal(a, e)


@needs_gpu
def test_backends_agree_bit_for_bit():
    if any(r.device == "cuda" and r.backend != "cuda" for r in backends.report()):
        pytest.skip("only one backend serves CUDA tensors here")
    pytest.importorskip("triton")
    x = torch.randn(64, 1023, device=DEVICE) * 3
    scale, offset = torch.rand(64, device=DEVICE) * 0.2, torch.randn(64, device=DEVICE)
    for axis, s, b in ((0, scale, offset), (None, scale[:1], offset[:1])):
        arguments = (x, s, b, QMIN, QMAX, axis, 1.0, False, torch.bfloat16)
        equal(
            torch.ops.qkernels.fake_quantize.default(*arguments),
            backends.implementation("fake_quantize", "triton")(*arguments),
        )


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_repeats_bit_for_bit(backend, axis):
    generator = torch.Generator(device=DEVICE).manual_seed(4)
    x = torch.randn((96, 33, 257), generator=generator, device=DEVICE)
    grad = torch.randn((96, 33, 257), generator=generator, device=DEVICE)
    scale = torch.full(() if axis is None else (x.shape[axis],), 0.05, device=DEVICE)
    first = None
    for _ in range(REPEATS):
        got = backend("fake_quantize_backward")(grad, x, scale, scale, QMIN, QMAX, axis, FACTOR, False, True)
        mean = backend("mean_abs")(x, axis)
        first = first or (*got, mean)
        for a, b in zip((*got, mean), first, strict=True):
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.xdist_group("tens of gigabytes")
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_more_than_2_to_the_31_elements(backend, axis):
    columns = 2**31 // 64 + 13
    if torch.cuda.mem_get_info()[0] < 6 * 2 * 64 * columns:
        pytest.skip("needs 26 GB of free GPU memory")
    x = torch.empty((64, columns) if axis != 1 else (columns, 64), dtype=torch.bfloat16, device=DEVICE).normal_()
    grad = torch.empty_like(x).normal_()
    scale = torch.rand(() if axis is None else 64, device=DEVICE) * 0.1 + 0.01
    y = backend("fake_quantize")(x, scale, None, QMIN, QMAX, axis, 1.0, False, torch.bfloat16)
    grad_x, grad_scale, _ = backend("fake_quantize_backward")(
        grad, x, scale, None, QMIN, QMAX, axis, FACTOR, False, True
    )
    total = torch.zeros_like(scale, dtype=torch.float64)
    magnitude = torch.zeros_like(scale, dtype=torch.float64)
    along = 0 if axis == 1 else 1
    for start in range(0, columns, 2**21):
        part = slice(start, start + 2**21)
        index = part if along == 0 else (slice(None), part)
        x_part, grad_part = x[index].contiguous(), grad[index].contiguous()
        y_part = backend("fake_quantize")(x_part, scale, None, QMIN, QMAX, axis, 1.0, False, torch.bfloat16)
        assert torch.equal(y[index], y_part)
        got_x, got_scale, _ = backend("fake_quantize_backward")(
            grad_part, x_part, scale, None, QMIN, QMAX, axis, FACTOR, False, True
        )
        assert torch.equal(grad_x[index], got_x)
        total += got_scale.double()
        magnitude += FACTOR * QMAX * reference._sum_per_scale(grad_part.float().abs(), axis)
    sums_equal(grad_scale, total.cpu(), magnitude.cpu())


@needs_gpu
def test_runs_on_the_current_stream(backend):
    host = torch.randn(1 << 20)
    x, scale = torch.zeros(1 << 20, device=DEVICE), torch.tensor(0.05, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on any other stream would read x before it is written
        x.copy_(host)
        y = backend("fake_quantize")(x, scale, None, QMIN, QMAX, None, 1.0, False, torch.float32)
        sums = backend("fake_quantize_backward")(x, x, scale, None, QMIN, QMAX, None, 1.0, False, True)[1]
        mean = backend("mean_abs")(x, None)
    stream.synchronize()
    equal(y, reference.fake_quantize(host, scale.cpu(), None, QMIN, QMAX, None, 1.0, False, torch.float32))
    want = reference.fake_quantize_backward(host, host, scale.cpu(), None, QMIN, QMAX, None, 1.0, False, True)[1]
    sums_equal(sums, want, QMAX * host.abs().double().sum())
    assert_close(mean.cpu(), host.abs().mean(), rtol=1e-5, atol=0)


@needs_gpu
@pytest.mark.parametrize("axis", [0, None])
def test_multi_in_a_cuda_graph(backend, axis):
    xs, scales, qmins, qmaxs, factors = layers(axis, torch.float32)
    xs, scales = [on_gpu(x) for x in xs], [on_gpu(s) for s in scales]
    grads = [torch.randn_like(x) for x in xs]

    def step():
        ys = backend("fake_quantize_multi")(xs, scales, qmins, qmaxs, axis, factors, None)
        return ys, *backend("fake_quantize_multi_backward")(grads, xs, scales, qmins, qmaxs, axis, factors, True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for t in (*xs, *grads):
            t.normal_()
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            for a, b in zip(got, want, strict=True):
                equal(a, b)


@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_compiled_with_cuda_graphs():
    x = torch.randn(64, 128, device=DEVICE, requires_grad=True)
    scale = torch.full((64,), 0.1, device=DEVICE, requires_grad=True)

    def loss(x, scale):
        y = fake_quantize(x * 2, scale, QMIN, QMAX, axis=0, grad_factor=FACTOR)
        (z,) = fake_quantize_multi([y + x], [scale], [QMIN], [QMAX])
        return (z * z).sum()

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x, scale)
        got_grads = [g.clone() for g in torch.autograd.grad(got, (x, scale))]
        want = loss(x, scale)
        assert_close(got, want)
        for a, b in zip(got_grads, torch.autograd.grad(want, (x, scale)), strict=True):
            assert_close(a, b)
        with torch.no_grad():
            x.normal_()
