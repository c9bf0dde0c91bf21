"""The ops as PyTorch sees them: schemas, fakes, autograd, vmap, compile, export, AMP, and the errors users get."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
import qkernels as qk
from network_cases import random_network
from qkernels.backends import SCHEMAS
from qkernels.ops import schemas
from qkernels.ops.geometry import Geometry
from qkernels.ops.packing import pack, packed_bytes

ops = torch.ops.qkernels
X = torch.linspace(-1, 1, 120)


def opcheck_cases():
    """op name -> argument lists. A schema without one fails `test_every_schema_has_fake_reference_and_opcheck`."""
    x = X.reshape(2, 3, 4, 5).clone()
    scale = torch.tensor([0.05, 0.1, 0.2])
    one = torch.tensor(0.1)
    layouts = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[..., ::2], x.to(torch.bfloat16)]
    cases: dict[str, list[tuple]] = {name: [] for name in SCHEMAS}
    for t, offset in itertools.product(layouts, (None, scale * 0.5)):
        grad = torch.randn_like(t)
        for axis, s, b in ((1, scale, offset), (None, one, None if offset is None else one * 0.5)):
            cases["fake_quantize"].append((t, s, b, -8, 7, axis, 0.5, False, t.dtype))
            cases["fake_quantize_backward"].append((grad, t, s, b, -8, 7, axis, 0.5, False, True))
            cases["fake_quantize_backward"].append((grad, t, s, b, -8, 7, axis, 0.5, True, False))
    for out_dtype in (None, torch.bfloat16):
        xs, scales = [x[:, 0], x[:, 1, :3]], [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.1])]
        grads = [torch.randn_like(t) for t in xs]
        cases["fake_quantize_multi"].append((xs, scales, [-8, -4], [7, 3], 0, [1.0, 0.5], out_dtype))
        cases["fake_quantize_multi_backward"].append((grads, xs, scales, [-8, -4], [7, 3], 0, [1.0, 0.5], True))
    cases["mean_abs"] = [(x, 1), (x, None), (layouts[1], 0)]
    return cases | packed_cases(layouts)


def packed_cases(layouts):
    """Arguments of the ops of packed inference; the images are those of `layouts`, [2, 3, height, width]."""
    cases: dict[str, list[tuple]] = {name: [] for name in schemas.PACKED}
    codes = torch.arange(-64, 56, dtype=torch.int8).reshape(2, 3, 4, 5)
    cases["pack"] = [(codes, 7), (codes.view(torch.uint8)[..., ::2], 3), (codes[:0], 4)]
    packed = pack(codes, 7).repeat(2, 1)
    cases["unpack"] = [(packed, 7, 120, True), (packed[0], 7, 120, False), (packed[:, :0], 5, 0, True)]
    scale, one = torch.tensor([0.05, 0.1, 0.2]), torch.tensor(0.1)
    cases["quantize"] = [(t, s, *r) for t in layouts for s, r in ((scale, (-8, 7, 1)), (one, (0, 15, None)))]
    members, bias = torch.rand(2, 4) + 0.1, torch.randn(2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        cases["dequantize_packed"].append((packed, members, 7, 120, dtype))
    # Every layout, and every kernel shared and not, but not all of their pairs.
    for t, (kernel, shared) in zip(layouts, itertools.cycle(itertools.product((1, 3), (True, False))), strict=False):
        geometry = Geometry((kernel, kernel), padding=(kernel // 2,) * 4).arguments
        nbytes = packed_bytes(4 * 3 * kernel * kernel, 7)
        weight = torch.randint(0, 256, (2, nbytes), dtype=torch.uint8)
        residual = torch.randn(4 if shared else 2, 4, *t.shape[2:]).to(t.dtype)
        for b, r, activation in ((bias, residual, "relu"), (None, None, "none")):
            cases["packed_conv2d"].append((t, weight, members, b, r, 7, *geometry, shared, activation))
        x, scales, end = (t * 50).to(torch.int8), torch.rand(2) + 0.1, (7, *geometry, shared)
        cases["packed_conv2d_int8"] += [
            (x, scales, weight, members, None, None, None, None, *end, "none", 0, 255, torch.float32),
            (x, scales, weight, members, bias, residual, None, scales, *end, "relu", 0, 255, torch.uint8),
            (x, scales, weight, members, bias, residual.char(), scales, scales, *end, "none", -8, 7, torch.int8),
        ]
        if kernel == 1:
            cases["packed_gemv"].append((t[:, :, 0, 0], weight, members, bias, 7, shared, "silu"))
    cases["packed_panels"] = [(packed, 8, 5, 7, [3, 1], [1, 2], 4), (packed[:1], 120, 1, 7, [1, 1], [1, 1], 1)]
    cases["packed_network"] = [tuple(random_network(number).arguments()) for number in range(6)]
    return cases


CASES = opcheck_cases()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_has_fake_reference_and_opcheck(name):
    assert CASES[name], "no arguments in opcheck_cases, or for an op of PACKED in packed_cases"
    assert hasattr(qk.backends.reference, name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{name}", "Meta") or (
        torch._library.simple_registry.singleton.find(f"qkernels::{name}").fake_impl.kernel is not None
    )
    assert name in qk.backends.STEMS


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name):
    for arguments in CASES[name]:
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_multi"])
def test_opcheck_with_gradients(name):
    def requiring(a):
        if isinstance(a, torch.Tensor):
            return a.detach().requires_grad_()
        return [requiring(t) for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a

    for arguments in CASES[name]:
        torch.library.opcheck(getattr(ops, name).default, tuple(requiring(a) for a in arguments))


def ste(x, scale, qmin, qmax, axis, factor, offset=None):
    """LSQ composed of differentiable PyTorch ops in float64; the gradient of scale and offset times `factor`."""
    shape = [-1 if d == axis else 1 for d in range(x.dim())] if axis is not None else []

    def scaled_gradient(t):
        return (t * factor + (t * (1 - factor)).detach()).reshape(shape)

    s = scaled_gradient(scale)
    b = 0.0 if offset is None else scaled_gradient(offset)
    v = ((x - b) / s).clamp(qmin, qmax)
    return (v + (v.round() - v).detach()) * s + b


def off_the_boundaries(x, scale, qmin, qmax, axis, offset):
    """x moved off the points where rounding or clamping jumps, where float32 and float64 may differ."""
    shape = [-1 if d == axis else 1 for d in range(x.dim())] if axis is not None else []
    s, b = scale.reshape(shape), 0 if offset is None else offset.reshape(shape)
    v = (x - b) / s
    near = ((v * 2 - (v * 2).round()).abs() < 1e-3) & ((v * 2).round() % 2 != 0)
    near |= ((v - qmin).abs() < 1e-3) | ((v - qmax).abs() < 1e-3)
    return torch.where(near, x + 0.01 * s, x)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("qmin, qmax", [(-64, 63), (0, 15), (-1, 1)])
@pytest.mark.parametrize("with_offset", [False, True])
def test_gradients_equal_autograd_of_the_straight_through_estimator(axis, qmin, qmax, with_offset):
    x = torch.randn(6, 5, 7)
    channels = () if axis is None else (x.shape[axis],)
    scale, offset = torch.rand(channels) * 0.1 + 0.05, torch.randn(channels) * 0.2 if with_offset else None
    x = off_the_boundaries(x, scale, qmin, qmax, None if axis is None else axis % 3, offset)
    upstream = torch.randn(x.shape)

    leaves = [t.clone().requires_grad_() for t in (x, scale, offset) if t is not None]
    y = qk.fake_quantize(*leaves[:2], qmin, qmax, axis, 0.25, offset=leaves[2] if with_offset else None)
    y.backward(upstream)

    doubles = [t.double().requires_grad_() for t in (x, scale, offset) if t is not None]
    exact = ste(*doubles[:2], qmin, qmax, None if axis is None else axis % 3, 0.25, *doubles[2:])
    exact.backward(upstream.double())
    np.testing.assert_allclose(y.detach(), exact.detach(), rtol=1e-6, atol=1e-6)
    for leaf, double in zip(leaves, doubles, strict=True):
        np.testing.assert_allclose(leaf.grad, double.grad, rtol=1e-4, atol=2e-5)


def test_published_edge_cases():
    """x/s = 7.2 at qmax = 7 is outside in the paper and inside in PyTorch's op; the bounds themselves are inside."""
    x = torch.tensor([7.2, 7.0, -8.0, -8.4, 0.3], requires_grad=True)
    for edge, inside, terms in (
        ("lsq", [0, 1, 1, 0, 1], [7, 0, 0, -8, -0.3]),
        ("aten", [1, 1, 1, 1, 1], [-0.2, 0, 0, 0.4, -0.3]),
    ):
        scale = torch.ones((), requires_grad=True)
        (grad_x,) = torch.autograd.grad(qk.fake_quantize(x, scale, -8, 7, edge=edge).sum(), x, retain_graph=False)
        assert grad_x.tolist() == inside
        qk.fake_quantize(x, scale, -8, 7, edge=edge).sum().backward()
        assert scale.grad.item() == pytest.approx(sum(terms), abs=1e-6)


def test_aten_edge_matches_the_native_op():
    x, scale = torch.randn(40, 30), torch.rand(40) * 0.2 + 0.1
    near = ((x / scale[:, None] * 2).round() - x / scale[:, None] * 2).abs() < 1e-3  # it multiplies by 1/s
    x = torch.where(near, x + 0.01, x)
    ours = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    native = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    y = qk.fake_quantize(*ours, -8, 7, axis=0, grad_factor=0.5, edge="aten")
    z = torch._fake_quantize_learnable_per_channel_affine(*native, torch.zeros(40), 0, -8, 7, 0.5)
    torch.testing.assert_close(y, z)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    z.backward(upstream)
    for a, b in zip(ours, native, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_unwritten(poisoned_empty):
    for name, cases in CASES.items():
        for arguments in cases:
            results = getattr(qk.backends.reference, name)(*arguments)
            for t in results if isinstance(results, (tuple, list)) else [results]:
                for leaf in t if isinstance(t, list) else [t]:
                    assert not leaf.isnan().any(), name


def test_special_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    y = qk.fake_quantize(x, torch.tensor(0.5), -8, 7)
    assert y[0].isnan() and y[1:].tolist() == [3.5, -4.0, 1.0]


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_invalid_scale_poisons_its_slice_alone(bad):
    x = torch.ones(2, 3, requires_grad=True)
    scale = torch.tensor([bad, 0.5], requires_grad=True)
    y = qk.fake_quantize(x, scale, -8, 7, axis=0)
    assert y[0].isnan().all() and y[1].tolist() == [1, 1, 1]
    y[1].sum().backward()
    assert x.grad.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert scale.grad[0].isnan() and scale.grad[1] == 0


def test_no_gradient_is_computed_for_a_fixed_scale():
    x = torch.randn(5, requires_grad=True)
    y = qk.fake_quantize(x, torch.tensor(0.1), -8, 7)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    assert any(e.key == "qkernels::fake_quantize_backward" for e in profile.key_averages())
    arguments = (x.detach(), x.detach(), torch.tensor(0.1), None, -8, 7, None, 1.0, False, False)
    _, scale, offset = ops.fake_quantize_backward(*arguments)
    assert scale.numel() == offset.numel() == 0


def test_double_backward_says_what_to_do():
    x = torch.randn(5, requires_grad=True)
    (g,) = torch.autograd.grad((qk.fake_quantize(x, torch.tensor(0.1), -8, 7) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*dequantize_"):
        g.sum().backward()
    (ys,) = qk.fake_quantize_multi([x], [torch.tensor(0.1)], [-8], [7], axis=None)
    (g,) = torch.autograd.grad((ys**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


ERRORS = {
    "x must be float32": (TypeError, {"x": X.double()}),
    "scale must be float32, got torch.float16": (TypeError, {"scale": torch.tensor(0.1).half()}),
    "without an axis": (ValueError, {"scale": torch.ones(3)}),
    r"shape \(120,\), one element": (ValueError, {"axis": 0, "scale": torch.ones(3)}),
    "axis 4 is out of range": (ValueError, {"axis": 4}),
    "axis -2 is out of range": (ValueError, {"axis": -2}),
    "qmin=7, qmax=7": (ValueError, {"qmin": 7}),
    "within": (ValueError, {"qmax": 2**23}),
    "offset must have one element": (ValueError, {"offset": torch.ones(3)}),
    "out_dtype must be float32": (TypeError, {"out_dtype": torch.int8}),
    "edge must be": (ValueError, {"edge": "paper"}),
    "scale is on meta but x is on cpu": (ValueError, {"scale": torch.ones((), device="meta")}),
}


@pytest.mark.parametrize("message", ERRORS)
@pytest.mark.parametrize("compiled", [False, True])
def test_one_clear_error(message, compiled):
    kind, changed = ERRORS[message]
    arguments = {"x": X, "scale": torch.tensor(0.1), "qmin": -8, "qmax": 7} | changed
    if not compiled:
        with pytest.raises(kind, match=message):
            qk.fake_quantize(**arguments)
    elif kind is ValueError and "edge" not in changed:
        with pytest.raises(Exception, match=message):
            torch.compile(qk.fake_quantize, fullgraph=True, backend="eager")(**arguments)


def test_multi_names_the_layer():
    xs, scales = [torch.ones(2, 2), torch.ones(3, 2)], [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match="layer 1: scale must have shape"):
        qk.fake_quantize_multi(xs, scales, [-8, -8], [7, 7])
    with pytest.raises(ValueError, match="one entry a layer"):
        qk.fake_quantize_multi(xs, scales[:1], [-8, -8], [7, 7])
    with pytest.raises(ValueError, match="share dtype and device"):
        qk.fake_quantize_multi([xs[0], torch.ones(2, 2).half()], scales, [-8, -8], [7, 7])
    with pytest.raises(ValueError, match="axis -1 is out of range"):
        qk.fake_quantize_multi(xs, scales, [-8, -8], [7, 7], axis=-1)
    assert qk.fake_quantize_multi([], [], [], []) == []


def test_multi_equals_single_forward_and_backward():
    shapes = [(64, 3, 7, 7), (8, 1, 3, 3), (550, 2000), (5, 2000)]  # the third has pages of its own
    xs = [torch.randn(s).requires_grad_() for s in shapes]
    scales = [qk.init_scale(x, 7, 0).requires_grad_() for x in xs]
    factors = [0.1, 0.2, 0.3, 0.4]
    ys = qk.fake_quantize_multi(xs, scales, [-8] * 4, [7] * 4, 0, factors)
    sum((y**2).sum() for y in ys[:3]).backward()
    assert xs[3].grad is scales[3].grad is None  # its result is not used: an optimizer must leave it alone
    for x, scale, y, factor in zip(xs, scales, ys, factors, strict=True):
        a, s = x.detach().requires_grad_(), scale.detach().requires_grad_()
        z = qk.fake_quantize(a, s, -8, 7, 0, factor)
        assert torch.equal(y, z)
        if x.grad is not None:
            (z**2).sum().backward()
            assert torch.equal(x.grad, a.grad)
            torch.testing.assert_close(scale.grad, s.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    def f(x, scale):
        y = qk.fake_quantize(x * 1.5, scale, -8, 7, axis=0)
        (z,) = qk.fake_quantize_multi([x], [scale], [-4], [3])
        return (y * z).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for width in (5, 9):
        x, scale = torch.randn(4, width, requires_grad=True), torch.full((4,), 0.1, requires_grad=True)
        expected = torch.autograd.grad(f(x, scale), (x, scale))
        actual = torch.autograd.grad(compiled(x, scale), (x, scale))
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_compile_with_inductor():
    scale = torch.tensor(0.1, requires_grad=True)
    x = torch.randn(64, requires_grad=True)
    compiled = torch.compile(lambda x, s: (qk.fake_quantize(x, s, -8, 7) * 2).sum(), fullgraph=True)
    expected = torch.autograd.grad((qk.fake_quantize(x, scale, -8, 7) * 2).sum(), (x, scale))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, scale), (x, scale)), expected)


def test_export():
    class Quantize(torch.nn.Module):
        def forward(self, x, scale):
            return qk.fake_quantize(x, scale, -8, 7, axis=0)

    arguments = (torch.randn(4, 5), torch.full((4,), 0.1))
    program = torch.export.export(Quantize(), arguments)
    assert any("qkernels.fake_quantize" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*arguments), Quantize()(*arguments))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("x_dim, scale_dim", [(0, 0), (1, 0), (0, None), (None, 0)])
def test_vmap_equals_a_loop(axis, x_dim, scale_dim):
    x = torch.randn(4, 5, 6)
    channels = () if axis is None else (x.shape[axis + 1],)
    scale = torch.rand(4, *channels) * 0.1 + 0.05
    xs = list(x) if x_dim is not None else [x[0]] * 4
    ss = list(scale) if scale_dim is not None else [scale[0]] * 4

    leaves = [t.clone().requires_grad_() for t in (*xs, *ss)]
    loop = torch.stack([qk.fake_quantize(a, s, -8, 7, axis) for a, s in zip(leaves[:4], leaves[4:], strict=True)])
    (loop**2).sum().backward()

    batched_x = (x[0] if x_dim is None else x.movedim(0, x_dim)).clone().requires_grad_()
    batched_s = (scale[0] if scale_dim is None else scale).clone().requires_grad_()
    quantize = torch.vmap(lambda x, s: qk.fake_quantize(x, s, -8, 7, axis), in_dims=(x_dim, scale_dim))
    batched = quantize(batched_x, batched_s)
    (batched**2).sum().backward()

    assert torch.equal(batched, loop)
    for batched_leaf, dim, singles in ((batched_x, x_dim, leaves[:4]), (batched_s, scale_dim, leaves[4:])):
        gradients = torch.stack([leaf.grad for leaf in singles])
        expected = gradients.sum(0) if dim is None else gradients.movedim(0, dim)
        torch.testing.assert_close(batched_leaf.grad, expected)


@pytest.mark.parametrize("with_offset", [False, True])
def test_vmap_of_backward_equals_a_loop(with_offset):
    grad, x, scale = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4) + 0.05
    offset = torch.randn(3, 4) if with_offset else None

    def backward(grad, x, scale, offset):
        return ops.fake_quantize_backward.default(grad, x, scale, offset, -8, 7, 0, 0.5, False, True)

    batched = torch.vmap(backward, in_dims=(0, 0, 0, 0 if with_offset else None))(grad, x, scale, offset)
    for i in range(3):
        single = backward(grad[i], x[i], scale[i], None if offset is None else offset[i])
        for actual, expected in zip(batched, single, strict=True):
            torch.testing.assert_close(actual[i], expected)


def test_vmap_of_multi_equals_a_loop():
    x, scale = torch.randn(3, 4, 5), torch.rand(3, 4) + 0.1
    actual = torch.vmap(lambda x, s: qk.fake_quantize_multi([x, x * 2], [s, s], [-8, -4], [7, 3])[1])(x, scale)
    expected = [qk.fake_quantize_multi([a * 2], [s], [-4], [3])[0] for a, s in zip(x, scale, strict=True)]
    assert torch.equal(actual, torch.stack(expected))


@pytest.mark.parametrize("axis", [None, 0, 1])  # one scale, rows, columns
def test_results_do_not_depend_on_the_number_of_threads(axis):
    """Which take blocks as they come: the sums of the blocks are added in the same order all the same."""
    x, grad = torch.randn(300, 700), torch.randn(300, 700)
    scale = torch.full(() if axis is None else (x.shape[axis],), 0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 7, 7, 7):
            torch.set_num_threads(n)
            results.append(ops.fake_quantize_backward(grad, x, scale, None, -8, 7, axis, 1.0, False, True)[:2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format).requires_grad_()
    y = qk.fake_quantize(x, torch.full((3,), 0.1), -8, 7, axis=1)
    y.sum().backward()
    assert y.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_too_large_for_the_caches(dtype):
    """Such results are written another way; odd rows start at every alignment."""
    x, grad = torch.randn(7, 1_300_001).to(dtype), torch.randn(7, 1_300_001).to(dtype)
    scale = torch.rand(7) * 0.1 + 0.1
    arguments = (scale, None, -8, 7, 0, 1.0, False)
    y = ops.fake_quantize(x, *arguments, dtype)
    assert torch.equal(y, qk.backends.reference.fake_quantize(x, *arguments, dtype))
    grad_x, grad_scale, _ = ops.fake_quantize_backward(grad, x, *arguments, True)
    expected = qk.backends.reference.fake_quantize_backward(grad, x, *arguments, True)
    assert torch.equal(grad_x, expected[0])
    # float64 may put a few elements on the other side of an edge, each worth a few units of sums of millions of terms.
    exact = qk.backends.reference.fake_quantize_backward(
        grad.double(), x.double(), scale.double(), *arguments[1:], True
    )
    torch.testing.assert_close(grad_scale.double(), exact[1], rtol=1e-3, atol=10)


def available_gib():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0


@pytest.mark.slow
@pytest.mark.skipif(available_gib() < 16, reason="needs 16 GiB of free memory")
def test_more_elements_than_32_bits_count():
    x = torch.zeros(2**31 + 40, dtype=torch.bfloat16)
    x[5], x[-3:] = 0.25, torch.tensor([1.0, -2.0, 100.0])
    scale = torch.tensor(0.5)
    y = qk.fake_quantize(x, scale, -8, 7)
    assert y[-3:].tolist() == [1, -2, 3.5] and y.count_nonzero() == 3  # 0.25 / 0.5 is a tie: to even
    del y
    grad_x, grad_scale, _ = ops.fake_quantize_backward(x, x, scale, None, -8, 7, None, 1.0, False, True)
    assert grad_x[-3:].tolist() == [1, -2, 0]
    assert grad_scale.item() == 100 * 7 + 0.25 * (0 - 0.5)
    assert (qk.mean_abs(x) * x.numel()).item() == pytest.approx(103.25, rel=1e-6)


def test_init_scale_is_lsqs_and_never_zero():
    w = torch.randn(4, 3, 3, 3)
    w[1] = 0
    scale = qk.init_scale(w, 63, axis=0)
    expected = 2 * oracle.mean_abs(w.numpy(), 0) / np.sqrt(63)
    np.testing.assert_allclose(scale[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-6)
    assert scale[1].item() == pytest.approx(expected[[0, 2, 3]].mean(), rel=1e-6)
    assert qk.init_scale(torch.zeros(3, 2), 63, axis=0).tolist() == [1, 1, 1]
