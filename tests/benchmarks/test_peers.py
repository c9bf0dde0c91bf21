"""What stands beside our kernels in the benchmarks on a GPU: here on the CPU, under Triton's interpreter."""

import pytest
import torch
from torch.testing import assert_close

import qkernels as qk
from benchmarks import peers
from benchmarks.contest import Contest

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by the benchmarks themselves"),
    pytest.mark.filterwarnings("ignore"),  # numpy's, in the interpreter
]


@pytest.mark.parametrize("axis", [None, 0])
def test_fake_quantize_in_triton(axis):
    pytest.importorskip("triton")
    x = torch.randn(6, 40, requires_grad=True)
    scale = torch.full((1 if axis is None else 6,), 0.1, requires_grad=True)
    grad = torch.randn_like(x)

    def passes(quantize):
        y = quantize(x, scale, -8, 7, axis, 0.3)
        return y.detach(), *torch.autograd.grad(y, (x, scale), grad)

    assert_close(passes(peers.fake_quantize_in_triton), passes(qk.fake_quantize))


def test_fake_quantize_multi_in_triton():
    pytest.importorskip("triton")
    xs = [torch.randn(4, 9), torch.randn(3, 2, 3, 3)]
    scales, grads = [torch.full((len(x),), 0.1) for x in xs], [torch.randn_like(x) for x in xs]
    found = peers.fake_quantize_multi_in_triton(xs, scales, grads, -8, 7, [0.3, 0.4])
    expected = torch.ops.qkernels.fake_quantize_multi_backward(
        grads, xs, scales, [-8] * 2, [7] * 2, 0, [0.3, 0.4], True
    )
    assert_close(found, [*expected[0], *expected[1]])


def test_a_profiler_sees_each_of_ours_once(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
    contest = Contest("cpu", 0, lambda *_: pytest.fail("timed"), lambda _: pytest.fail("recorded"), profile=True)
    contest.ours("ours", lambda i: events.append("ours") or torch.ones(1))
    contest.peer("peer", lambda: lambda i: events.append("peer"))
    events.clear()
    contest.measure("ours")
    assert events == ["start", "ours", "stop"]
