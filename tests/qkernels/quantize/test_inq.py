"""INQ: levels, rounding and fractions against numpy; frozen weights under optimizers; its state."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.quantize.quantizers import INQ


def levels(bits, largest):
    """Zhou et al. 2017 with n2 = n1 + 2 - 2^bits / 2, in float64."""
    n1 = math.floor(math.log2(4 * largest / 3))
    n2 = n1 + 2 - 2**bits // 2
    return np.array([0.0] + [2.0**i for i in range(n2, n1 + 1)])


def nearest(w, allowed):
    """For |w| in [(a + b) / 2, 3 b / 2) with neighbors a < b: b."""
    out = np.zeros_like(w)
    for a, b in itertools.pairwise(allowed):
        out = np.where((np.abs(w) >= (a + b) / 2) & (np.abs(w) < 3 * b / 2), np.sign(w) * b, out)
    return out


@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_levels_and_rounding(bits):
    w = torch.randn(40, 30)
    w[0, :5] = torch.tensor([0.75, 0.375, 0.74999994, 0.0, 1e-8])
    q = INQ(bits)
    scale = q.init_scale(w)
    allowed = levels(bits, w.abs().max().item())
    assert len(allowed) * 2 - 1 == 2**bits - 1 and scale.item() == allowed[-1]
    np.testing.assert_array_equal(q.snap(w, scale).double().numpy(), nearest(w.double().numpy(), allowed))


def test_one_n1_a_channel():
    w = torch.randn(3, 4, 2, 2) * torch.tensor([0.01, 1, 30.0])[:, None, None, None]
    w[1] = 0
    q = INQ(4, "channel")
    scale = q.init_scale(w)
    for channel in (0, 2):
        allowed = levels(4, w[channel].abs().max().item())
        snapped = q.snap(w, scale)[channel].double().numpy()
        np.testing.assert_array_equal(snapped, nearest(w[channel].double().numpy(), allowed))
    assert q.snap(w, scale)[1].eq(0).all()


def inq_net(bits=3):
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    qk.quantize_(model, qk.QConfig(weight_bits=bits, quantizer="inq", granularity="tensor"))
    return model


def test_fractions_take_the_largest_free_weights():
    model = inq_net()
    layer = model[0]
    weight = layer.weight.detach().clone()
    assert torch.equal(layer.quantized_weight(), weight)  # nothing is frozen yet
    for fraction in (0.5, 0.75, 0.875, 1.0):
        held = layer.weight_frozen.clone()
        qk.snap_(model, fraction)
        frozen = layer.weight_frozen.isfinite()
        assert frozen.sum() == round(fraction * 80)
        assert weight.abs()[frozen].min() >= (weight.abs()[~frozen].max() if fraction < 1 else 0)
        assert torch.equal(layer.weight_frozen[held.isfinite()], held[held.isfinite()])
        expected = torch.where(frozen, layer.weight_quantizer.snap(weight, layer.weight_scale), weight)
        assert torch.equal(layer.quantized_weight(), expected)
    qk.snap_(model, 0.5)
    assert layer.weight_frozen.isfinite().all()
    assert {abs(v) for v in layer.quantized_weight().unique().tolist()} <= set(levels(3, weight.abs().max().item()))


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_frozen_weights_stay_and_free_ones_move_under_any_optimizer(make):
    model = inq_net()
    optimizer = make(model.parameters())

    def step():
        optimizer.zero_grad()
        model(torch.randn(5, 10)).square().mean().backward()
        optimizer.step()

    step()  # momentum from before the freeze
    qk.snap_(model, 0.5)
    layer = model[0]
    frozen, before = layer.weight_frozen.isfinite(), layer.quantized_weight().detach().clone()
    for _ in range(3):
        step()
        assert layer.weight.grad[frozen].eq(0).all()
    after = layer.quantized_weight()
    assert torch.equal(after[frozen], before[frozen]) and after[~frozen].ne(before[~frozen]).any()
    qk.dequantize_(model)
    assert torch.equal(layer.weight, after) and not hasattr(layer, "weight_frozen")


def test_state_resumes_and_a_float_checkpoint_starts_anew():
    model, other, x = inq_net(), inq_net(), torch.randn(2, 10)
    qk.snap_(model, 0.75)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    qk.snap_(other, 1.0)
    qk.snap_(model, 1.0)
    assert torch.equal(other(x), model(x))
    plain = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other(x), plain(x)) and not other[0].weight_frozen.isfinite().any()


@pytest.mark.slow
def test_works_with_fusing_compile_activations_and_counts_bits():
    model, x = inq_net(), torch.randn(2, 10)
    assert qk.packed_nbytes(model) == 32 * 3 + 4 * (8 + 1 + 24 + 3)  # 80 codes are one block of 256
    qk.snap_(model, 0.5)
    expected = model(x)
    qk.fuse_weights_(model)
    assert torch.equal(model(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert "3 bit INQ per tensor, fixed scale" in repr(model)
    assert not list(qk.named_scales(model))
    both = nn.Linear(4, 2)
    qk.quantize_(both, qk.QConfig(quantizer="inq", act_bits=4))
    both(torch.rand(3, 4))
    assert both.act_range == (0, 15)


def test_errors():
    with pytest.raises(ValueError, match="no INQ layer"):
        qk.snap_(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="fraction"):
        qk.snap_(inq_net(), 1.5)
    with pytest.raises(ValueError, match="quantizer='dorefa'"):
        qk.QConfig(quantizer="dorefa")
