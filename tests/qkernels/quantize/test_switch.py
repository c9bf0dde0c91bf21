"""The switch in mid-training: quantized from the start, enabled later; schedulers, averages, checkpoints."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qkernels as qk
from qkernels.quantize.layers import quantized_layers

CONFIG = qk.QConfig(weight_bits=3, last_layer="same")
W4A4 = qk.QConfig(weight_bits=4, act_bits=4, granularity="tensor", last_layer="same")


def net(seed=7):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def batch(seed):
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def steps(model, optimizer, first, last, scheduler=None):
    for step in range(first, last):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("config", [CONFIG, W4A4, qk.QConfig(weight_bits=4, quantizer="inq", last_layer="same")])
@pytest.mark.parametrize("fused", [False, True])
def test_enabling_gives_the_weights_of_a_late_switch_bit_for_bit(config, fused):
    late = net()
    optimizer = torch.optim.Adam(late.parameters(), lr=1e-2, weight_decay=0.1)
    steps(late, optimizer, 0, 4)
    qk.quantize_(late, config)
    qk.add_scales_(optimizer, late, lr=1e-3)
    steps(qk.fuse_weights_(late) if fused else late, optimizer, 4, 8)
    model = net()
    report = qk.quantize_(model, config, enabled=False)
    assert "not enabled" in str(report) and "not enabled" in repr(model)
    x = batch(9)
    assert torch.equal(model(x), net()(x))
    model = net()
    qk.quantize_(model, config, enabled=False)
    if fused:
        qk.fuse_weights_(model)
    optimizer = torch.optim.Adam(qk.param_groups(model, lr=1e-2, weight_decay=0.1, scale_lr=1e-3))
    steps(model, optimizer, 0, 4)
    assert all(scale.grad is None for _, scale in qk.named_scales(model))
    qk.enable_(model)
    steps(model, optimizer, 4, 8)
    expected = late.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_disabling_is_float_and_enabling_again_goes_on():
    model, x = net().eval(), batch(0)
    qk.quantize_(model, CONFIG)
    with torch.no_grad():
        model[0].weight_scale.mul_(1.5)
    y = model(x)
    qk.disable_(model)
    plain = net().eval()
    assert torch.equal(model(x), plain(x)) and not torch.equal(model(x), y)
    assert model[0].weight is model[0].latent_weight
    assert torch.equal(qk.enable_(model)(x), y)
    waiting = net().eval()
    qk.quantize_(waiting, CONFIG, enabled=False)
    with torch.no_grad():
        waiting[0].latent_weight.mul_(3)
        qk.enable_(waiting)
    assert torch.equal(waiting[0].weight_scale, qk.init_scale(waiting[0].latent_weight, 3, 0))
    assert torch.equal(qk.dequantize_(qk.disable_(model))(x), plain(x))
    with pytest.raises(ValueError, match="no quantized layers"):
        qk.enable_(nn.Linear(2, 2))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """Enabled at the switch, every scheduler moves the scales' rate; added late, it goes on in proportion."""
    rates = {}
    for way in ("enabled", "added"):
        model = net()
        if way == "enabled":
            qk.quantize_(model, CONFIG, enabled=False)
            optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.1, scale_lr=0.01))
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        steps(model, optimizer, 0, 5, scheduler)
        if way == "enabled":
            qk.enable_(model)
        else:
            qk.quantize_(model, CONFIG)
            with pytest.raises(ValueError, match="pass it as scheduler="):
                qk.add_scales_(optimizer, model, lr=0.01)
            assert len(optimizer.param_groups) == 1
            qk.add_scales_(
                optimizer,
                model,
                lr=0.01 if name != "OneCycleLR" else 0.1 * optimizer.param_groups[0]["initial_lr"],
                scheduler=scheduler,
            )
        rates[way] = []
        for step in range(5, 10):
            steps(model, optimizer, step, step + 1, scheduler)
            rates[way].append([group["lr"] for group in optimizer.param_groups])
    if name != "OneCycleLR":  # whose rate is its own, for all groups alike, where they are there from the start
        assert rates["added"] == [pytest.approx(pair) for pair in rates["enabled"]]
    assert all(scale == pytest.approx(0.1 * weight) for weight, scale in rates["added"])


def test_schedulers_of_timm_and_others_are_refused_late_and_work_enabled():
    from timm.scheduler import CosineLRScheduler

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = CosineLRScheduler(optimizer, 10)
    qk.quantize_(model, CONFIG)
    with pytest.raises(ValueError, match="CosineLRScheduler cannot be told of new scales"):
        qk.add_scales_(optimizer, model, scheduler=scheduler)
    with pytest.raises(ValueError, match="pass it as scheduler="):
        qk.add_scales_(optimizer, model)
    model = net()
    qk.quantize_(model, CONFIG, enabled=False)
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.1, scale_lr=0.01))
    scheduler = CosineLRScheduler(optimizer, 10)
    qk.enable_(model)
    scheduler.step(5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])


def test_several_optimizers_that_hold_parts_of_the_model():
    model = net()
    parts = [torch.optim.SGD(model[i].parameters(), lr=lr) for i, lr in ((0, 0.1), (1, 0.1), (4, 0.2))]
    qk.quantize_(model, W4A4)
    assert qk.add_scales_(parts, model) == 4 and qk.add_scales_(parts, model) == 0
    assert [len(opt.param_groups) for opt in parts] == [2, 1, 2]
    assert {id(p) for p in parts[2].param_groups[1]["params"]} == {id(model[4].weight_scale), id(model[4].act_scale)}
    assert parts[2].param_groups[1]["lr"] == 0.2
    with pytest.raises(ValueError, match="the weight of 4 is in no optimizer"):
        qk.quantize_(other := net(), CONFIG)
        qk.add_scales_(torch.optim.SGD(other[0].parameters(), lr=0.1), other)


@pytest.mark.parametrize("config", [CONFIG, W4A4])
def test_averages_made_before_the_switch(config):
    """SWA and EMA of PyTorch and of timm know the scales from the start; a copy is enabled by a call of its own."""
    model = net()
    qk.quantize_(model, config, enabled=False)
    averages = [
        AveragedModel(model),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        timm.utils.ModelEmaV2(model, decay=0.5),
        timm.utils.ModelEmaV3(model, decay=0.5),
    ]
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.05))

    def update():
        for average in averages:
            average.update_parameters(model) if isinstance(average, AveragedModel) else average.update(model)

    steps(model, optimizer, 0, 3)
    update()
    for each in (model, *averages):
        qk.enable_(each)
    steps(model, optimizer, 3, 6)
    update()
    for average in averages:
        layers = [layer for _, layer in quantized_layers(average)]
        own = [layer for _, layer in quantized_layers(model)]
        assert all(a.act_range == b.act_range and a.enabled for a, b in zip(layers, own, strict=True))
        ratios = torch.cat([(a.weight_scale / b.weight_scale).abs() for a, b in zip(layers, own, strict=True)])
        assert ratios.min() > 0.5 and ratios.max() < 2
        assert average.eval()(batch(0)).isfinite().all() if isinstance(average, AveragedModel) else True
        codes = layers[0].weight / layers[0].weight_scale.abs().view(-1, 1, 1, 1)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


# Checkpoints -------------------------------------------------------------------------------------------------------


def stored(model):
    return safetensors.torch.load(safetensors.torch.save(model.state_dict()))


def test_a_checkpoint_says_how_its_layers_are_quantized():
    model = net()
    qk.quantize_(model, qk.QConfig(weight_bits=8, last_layer="same"))
    other = net()
    qk.quantize_(other, qk.QConfig(weight_bits=2, last_layer="same"))
    with pytest.raises(
        RuntimeError, match=r"0: the weight of the checkpoint is .*'bits': 8.*that of the model .*'bits': 2"
    ) as error:
        other.load_state_dict(stored(model))
    assert "qkernels.quantize_like_" in str(error.value)
    with pytest.raises(RuntimeError, match="the input of the checkpoint is float"):
        qk.quantize_(other, qk.QConfig(weight_bits=8, act_bits=4, last_layer="same"))
        other.load_state_dict(stored(model), strict=False)
    with pytest.raises(RuntimeError, match="granularity"):
        qk.quantize_(other, qk.QConfig(weight_bits=8, granularity="tensor", last_layer="same"))
        other.load_state_dict(stored(model))


@pytest.mark.parametrize("config", [CONFIG, W4A4, qk.QConfig(weight_bits=4, quantizer="inq", overrides={"0": 5})])
@pytest.mark.parametrize("enabled", [True, False])
def test_quantize_like_makes_a_float_model_ready(config, enabled):
    model, x = net(), batch(0)
    qk.quantize_(model, config, enabled=enabled)
    model(x)
    model.eval()
    for make in (net, lambda: net().to("meta")):
        fresh = make()
        qk.quantize_like_(fresh, stored(model))
        fresh.load_state_dict(stored(model), assign=True)
        assert torch.equal(fresh.eval()(x), model(x))
        assert [layer.described() for _, layer in quantized_layers(fresh)] == [
            layer.described() for _, layer in quantized_layers(model)
        ]
    wrong = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"has no layer '[04]' that can be quantized"):
        qk.quantize_like_(nn.Sequential(nn.ReLU()), stored(model))
    with pytest.raises(ValueError, match="does not say how"):
        qk.quantize_like_(wrong, wrong.state_dict())


def test_whether_a_layer_is_enabled_comes_with_the_checkpoint():
    model, other = net(), net()
    qk.quantize_(model, CONFIG)
    qk.quantize_(other, CONFIG, enabled=False)
    before = stored(other)
    other.load_state_dict(stored(model))
    x = batch(1)
    assert torch.equal(other.eval()(x), model.eval()(x))
    other.load_state_dict(before)
    assert torch.equal(other(x), net().eval()(x)) and not any(layer.started for _, layer in quantized_layers(other))


def test_state_dicts_from_before_layers_said_so():
    """Scales without a dimension, and no word on bits: they load into a model that was quantized alike."""
    model = net()
    qk.quantize_(model, W4A4)
    model(batch(0))
    old = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    old = {name: value.reshape(()) if name.endswith("scale") else value for name, value in old.items()}
    for enabled in (True, False):
        other = net(8)
        qk.quantize_(other, W4A4, enabled=enabled)
        other.load_state_dict(old, strict=True)
        assert torch.equal(other.eval()(batch(1)), model.eval()(batch(1)))
    with pytest.raises(ValueError, match="does not say how"):
        qk.quantize_like_(net(), old)


@pytest.mark.parametrize("bad", [b"{}", b"[1]", b"{", b'{"weight": {"quantizer": "x"}}', b"\xff"])
def test_a_state_that_says_nothing_is_one_error(bad):
    model = net()
    qk.quantize_(model, CONFIG)
    state = model.state_dict()
    state["0._extra_state"] = torch.frombuffer(bytearray(bad), dtype=torch.uint8)
    with pytest.raises((RuntimeError, ValueError), match="does not say how it is quantized"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="does not say how it is quantized"):
        qk.quantize_like_(net(), state)


def test_pickles_and_saves_keep_all_of_it():
    model = net()
    qk.quantize_(model, W4A4, enabled=False)
    assert [m.described() for _, m in quantized_layers(pickle.loads(pickle.dumps(model)))] == [
        m.described() for _, m in quantized_layers(model)
    ]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    copy.deepcopy(model).load_state_dict(torch.load(buffer, weights_only=True))
