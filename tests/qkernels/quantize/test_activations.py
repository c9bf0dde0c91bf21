"""Quantizers of a layer's input: their start, gradient, state, and what they promise to optimizers and compilers."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import qkernels as qk
from qkernels.quantize.layers import quantized_layers
from qkernels.quantize.optimizers import scales
from two_processes import in_two_processes

W4A4 = qk.QConfig(weight_bits=4, act_bits=4, granularity="tensor", first_layer=8, last_layer=8)


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2)
    )


def batch(seed=5, n=4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def started():
    model = net()
    qk.quantize_(model, W4A4)
    model(batch())
    return model


def test_first_batch_decides_sign_and_scale():
    model = net()
    report = qk.quantize_(model, W4A4)
    assert [(layer.bits, layer.act_bits) for layer in report.quantized] == [(8, 8), (4, 4), (4, 4), (8, 8)]
    assert "4 bit per tensor, input 4 bit" in str(report)
    inputs = {}
    for name, layer in quantized_layers(model):
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, args[0]))
    model(batch())
    ranges = {name: layer.act_range for name, layer in quantized_layers(model)}
    assert ranges == {"0": (-128, 127), "2": (0, 15), "5": (-8, 7), "6": (-128, 127)}
    for name, layer in quantized_layers(model):
        expected = 2 * np.abs(inputs[name].detach().numpy().astype(np.float64)).mean() / math.sqrt(ranges[name][1])
        assert layer.act_scale.item() == pytest.approx(expected, rel=1e-6)
        assert layer.act_scale.shape == (1,) and layer.act_signed.item() == (ranges[name][0] < 0)
    before = [s.item() for s in scales(model)]
    model(100 * batch())
    assert [s.item() for s in scales(model)] == before


@pytest.mark.parametrize("signed", [False, True])
def test_sign_can_be_said(signed):
    layer = nn.Linear(4, 2)
    qk.quantize_(layer, qk.QConfig(act_bits=3, act_signed=signed))
    layer(torch.rand(3, 4))
    assert layer.act_range == ((-4, 3) if signed else (0, 7))


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_forward_and_lsq_gradient_against_numpy(low):
    """Gradient of the scale: sum g * (round(v) - v | qmin | qmax) / sqrt(qmax * features of a sample)."""
    layer = nn.Linear(6, 3, bias=False)
    qk.quantize_(layer, qk.QConfig(weight_bits=8, act_bits=3))
    layer(torch.rand(5, 6) + low)
    with torch.no_grad():
        layer.act_scale.fill_(0.11)
    x = (torch.rand(5, 6) * 1.5 + 1.5 * low).requires_grad_()
    y = layer(x)
    upstream = torch.randn(5, 3)
    y.backward(upstream)
    qmin, qmax = layer.act_range
    w, s = layer.quantized_weight().detach().double().numpy(), np.float64(layer.act_scale.item())
    v = x.detach().double().numpy() / s
    codes = np.round(np.clip(v, qmin, qmax))
    np.testing.assert_allclose(y.detach().numpy(), codes * s @ w.T, rtol=1e-5, atol=1e-6)
    g = upstream.double().numpy() @ w
    inside = (v >= qmin) & (v <= qmax)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-5, atol=1e-7)
    expected = (g * (codes - np.where(inside, v, 0))).sum() / math.sqrt(qmax * 6)
    assert layer.act_scale.grad.item() == pytest.approx(expected, rel=1e-4)
    assert 0 < inside.mean() < 1  # or a part of the equation was not tested


def test_before_the_first_batch_inputs_are_float_in_eval_mode_and_one_warning_says_so():
    """As in Lightning's sanity check, which validates before it trains."""
    model, x = net(), batch()
    qk.quantize_(model, W4A4)
    with pytest.warns(UserWarning, match="evaluated before the first training batch") as caught:
        y = model.eval()(x)
    assert len({str(warning.message) for warning in caught}) == 1
    weights_alone = net()
    qk.quantize_(weights_alone, qk.QConfig(weight_bits=4, granularity="tensor", first_layer=8, last_layer=8))
    assert torch.equal(y, weights_alone.eval()(x))
    assert all(layer.act_range is None for _, layer in quantized_layers(model))


@pytest.mark.parametrize("first", [torch.empty(0, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)])
def test_a_batch_that_is_empty_or_not_finite_does_not_decide(first):
    layer = nn.Conv2d(3, 4, 3)
    qk.quantize_(layer, qk.QConfig(act_bits=4))
    layer(first)
    assert layer.act_range is None and layer.act_scale.item() == 1
    layer(batch())
    assert layer.act_range is not None and layer.act_scale.isfinite().all() and layer.act_scale.item() != 1


def test_a_copy_made_before_the_first_batch_starts_with_its_source():
    """An average of the weights (EMA) only ever evaluates: it must not average the scale from a placeholder."""
    model = net()
    qk.quantize_(model, W4A4)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    twice = copy.deepcopy(averaged)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    for copied in (averaged, twice):
        assert copied.eval()(batch()).isfinite().all()
        for (_, own), (_, layer) in zip(quantized_layers(copied), quantized_layers(model), strict=True):
            assert own.act_range == layer.act_range and 0.5 < (own.act_scale / layer.act_scale).item() < 2


def test_optimizers_hold_the_scales_from_the_start():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    qk.quantize_(model, W4A4)
    assert [name for name, _ in qk.named_scales(model)] == [
        f"{layer}.{kind}" for layer in (0, 2, 5, 6) for kind in ("weight_scale", "act_scale")
    ]
    assert qk.add_scales_(optimizer, model, lr=1e-2) == 8
    assert len(qk.param_groups(model, lr=1.0)[1]["params"]) == 8
    model(batch()).square().mean().backward()
    before = {name: scale.item() for name, scale in qk.named_scales(model)}
    optimizer.step()
    assert all(scale.item() != before[name] for name, scale in qk.named_scales(model))
    fixed = net()
    qk.quantize_(fixed, qk.QConfig(act_bits=4, learn_scale=False))
    assert not scales(fixed)


def test_a_checkpoint_restores_and_a_float_one_starts_anew():
    model, other, floats = started(), net(), net()
    with torch.no_grad():
        model[2].act_scale.mul_(3)
    qk.quantize_(other, W4A4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(batch()), model.eval()(batch()))  # restored: eval needs no training batch
    before = other[2].act_scale.item()
    other.train()(50 * batch())
    assert other[2].act_scale.item() == before and other[2].act_range == (0, 15)
    other.load_state_dict(floats.state_dict(), strict=True)
    assert other[2].act_range is None
    other(50 * batch())
    assert other[2].act_scale.item() != before
    uninitialized = net()
    qk.quantize_(uninitialized, W4A4)
    other.load_state_dict(uninitialized.state_dict())
    assert other[2].act_range is None


def test_deepcopy_half_precision_and_dequantize():
    model = started()
    x = batch()
    expected = model.eval()(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).isfinite().all() and half[2].act_range == (0, 15)
    qk.dequantize_(model)
    assert type(model[0]) is nn.Conv2d and not any("scale" in name for name in model.state_dict())
    assert not hasattr(model[0], "act_range")


def test_autocast_keeps_float32_scales():
    model = started()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(batch())
        assert model[0].quantized_input(batch()).dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(s.dtype == s.grad.dtype == torch.float32 and s.grad.isfinite() for s in scales(model))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_with_one_graph_once_started(fused):
    model, x = started(), batch()
    if fused:
        qk.fuse_weights_(model)
    model(x).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], msg=n)


@pytest.mark.slow
def test_compiling_before_the_first_batch_says_what_to_do():
    model = net()
    qk.quantize_(model, W4A4)
    with pytest.raises(Exception, match="run one before compiling"):
        torch.compile(model, fullgraph=True, backend="eager")(batch())
    torch.compile(model, backend="eager")(batch())  # with a graph break it starts
    assert model[0].act_range == (-128, 127)


def test_export_once_started():
    model, x = started().eval(), batch()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224", "test_resnet", "test_convnext"])
def test_timm_models(name):
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, **size)
    qk.quantize_(model, W4A4)
    qk.fuse_weights_(model)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(layer.act_range is not None for _, layer in quantized_layers(model))
    assert all(s.grad is not None and s.grad.isfinite().all() for s in scales(model))
    ranges = {name: layer.act_range for name, layer in quantized_layers(model)}
    unsigned = [name for name, (qmin, _) in ranges.items() if qmin == 0]
    if name == "tf_efficientnet_lite0":  # ReLU6 before depthwise convolutions, linear bottlenecks before the others
        assert "blocks.1.0.conv_dw" in unsigned and "blocks.1.0.conv_pw" not in unsigned and "conv_head" not in unsigned
    if name.startswith("vit"):
        assert not unsigned
    model.eval()(torch.randn(2, 3, 32, 32))


def worker(rank, path):
    model = net()
    qk.quantize_(model, W4A4)
    x = torch.cat([batch().abs(), batch(6)])  # only the second process sees negative numbers
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    torch.save({"state": model.state_dict(), "grads": [p.grad for p in model.parameters()]}, path / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_start_as_one_would_on_the_whole_batch(tmp_path):
    in_two_processes(worker, tmp_path)
    model = net()
    qk.quantize_(model, W4A4)
    model(torch.cat([batch().abs(), batch(6)])).square().mean().backward()
    for rank in range(2):
        stored = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(stored["state"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        for grad, p in zip(stored["grads"], model.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 9])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match=f"act_bits={bits}"):
        qk.QConfig(act_bits=bits)
