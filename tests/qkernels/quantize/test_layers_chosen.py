"""Which layers `quantize_` takes, again and again, and what it leaves where it fails; weights that several share."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import qkernels as qk
from qkernels.quantize.layers import quantized_layers

SAME = qk.QConfig(weight_bits=3, last_layer="same")


def net():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)
    )


LAST = {
    "mobilenetv3_small_050": ["classifier"],
    "mobilenetv4_conv_small": ["classifier"],
    "ghostnet_050": ["classifier"],
    "lcnet_035": ["classifier"],
    "fbnetv3_b": ["classifier"],
    "hardcorenas_a": ["classifier"],
    "fasternet_t0": ["classifier"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "repvit_m0_9": ["head.head.l", "head.head_dist.l"],
    "crossvit_tiny_240": ["head.0", "head.1"],
    "resnet18": ["fc"],
    "vgg11": ["head.fc"],
    "resnetv2_50x1_bit": ["head.fc"],
    "nfnet_f0": ["head.fc"],
}


@pytest.mark.parametrize("name", LAST)
def test_the_classifier_stays_float_and_nothing_else(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    skipped = qk.quantize_(model).skipped
    assert [layer for layer, why in skipped.items() if "last layer" in why] == LAST[name]
    assert qk.quantize_(model, qk.QConfig(first_layer="float")).quantized_share > 0.85


def test_alexnet_has_one_last_layer():
    """A layer before it of as many outputs is its input, not a second head."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert list(qk.quantize_(model).skipped) == ["4"]
    with torch.device("meta"):
        assert list(qk.quantize_(torchvision.models.alexnet()).skipped) == ["classifier.6"]


def test_a_subset_and_then_the_rest_have_the_first_and_last_of_the_model():
    model = net()
    config = qk.QConfig(weight_bits=4, first_layer=8)
    qk.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    report = qk.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    assert {row.name: row.bits for row in report.quantized} == {"0": 8, "2": 4, "4": 4}
    assert report.skipped == {"5": "last layer (last_layer='float')"} and not report.changed
    model = net()
    qk.quantize_(model[4], config)
    assert {row.name: row.bits for row in qk.quantize_(model, config).quantized} == {"0": 8, "2": 4, "4": 4}


def test_quantizing_again_keeps_the_latent_weights_and_says_what_changed():
    model = net()
    latent = {n: p for n, p in model.named_parameters()}
    qk.quantize_(model, qk.QConfig(weight_bits=8, last_layer="same"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = {n: s for n, s in qk.named_scales(model)}
    before = {n: p.detach().clone() for n, p in latent.items()}
    report = qk.quantize_(model, qk.QConfig(weight_bits=3, overrides={"2": 8}))
    assert report.changed == {
        "0": "8 bit per channel -> 3 bit per channel",
        "4": "8 bit per channel -> 3 bit per channel",
        "5": "8 bit per channel -> float",
    }
    assert "0  changed: 8 bit per channel -> 3 bit per channel" in str(report)
    now = dict(model.named_parameters())
    assert all(now[n] is p and torch.equal(p, before[n]) for n, p in latent.items())
    assert type(model[5]) is nn.Linear and model[2].weight_scale is scales["2.weight_scale"]
    assert torch.equal(model[0].weight_scale, qk.init_scale(latent["0.weight"], 3, 0))
    assert all(scale is scales[n] for n, scale in qk.named_scales(model))  # the optimizer holds them still
    assert optimizer and not qk.quantize_(model, qk.QConfig(weight_bits=3, overrides={"2": 8})).changed
    qk.quantize_(model, qk.QConfig(weight_bits=3, granularity="tensor", act_bits=4))
    assert model[0].weight_scale.shape == (1,) and model[0].act_quantizer.bits == 4
    qk.quantize_(model, qk.QConfig(weight_bits=3, granularity="tensor"))
    assert model[0].act_quantizer is None and not hasattr(model[0], "act_scale")


def state(model):
    return {n: (type(m), dict(m._parameters), dict(m._buffers), set(vars(m))) for n, m in model.named_modules()}


def test_what_fails_leaves_the_model_as_it_was():
    def refuse(module, name):
        if name == "4":
            raise KeyError(name)
        return True

    for change, config, filter_fn, error in (
        (lambda m: m[4].double(), SAME, None, "4 has a weight of torch.float64"),
        (lambda m: m, SAME, refuse, "4"),
        (lambda m: m, qk.QConfig(overrides={"nowhere": 4}), None, "matches no layer"),
        (lambda m: setattr(m[4], "weight", m[2].weight), qk.QConfig(overrides={"4": 4}), None, "share one weight"),
    ):
        model = net()
        change(model)
        before = state(model)
        with pytest.raises((ValueError, KeyError), match=error):
            qk.quantize_(model, config, filter_fn)
        assert state(model) == before
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert "does not know its size yet" in qk.quantize_(lazy).skipped["0"]


class Tied(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), last
        self.second.weight = self.first.weight
        self.again = self.first  # under two names

    def forward(self, x):
        return self.third(self.again(self.second(self.first(x)).relu()).relu())


def test_layers_that_share_a_weight_share_its_scale_and_are_dequantized_once():
    torch.manual_seed(5)
    model, x = Tied(nn.Linear(6, 3)), torch.randn(4, 6)
    qk.quantize_(model, SAME)
    assert model.first.weight_scale is model.second.weight_scale
    assert len(dict(qk.named_scales(model))) == 2 and qk.param_groups(model, lr=0.1)
    copied = copy.deepcopy(model)
    assert copied.first.weight_scale is copied.second.weight_scale
    y = model(x)
    y.square().sum().backward()
    qk.dequantize_(model)
    torch.testing.assert_close(model(x), y)
    assert model.first.weight is model.second.weight and model.again is model.first
    both = copy.deepcopy(copied)
    both.load_state_dict(copied.state_dict())
    torch.testing.assert_close(both(x), y)


def test_a_weight_that_others_use_in_float_stays_theirs():
    torch.manual_seed(6)
    model, x = Tied(nn.Linear(6, 6)), torch.randn(4, 6)
    model.third.weight = model.first.weight
    qk.quantize_(model, qk.QConfig(weight_bits=3))  # the last layer is float
    y, latent = model(x), model.third.weight.detach().clone()
    qk.dequantize_(model)
    torch.testing.assert_close(model(x), y)
    assert torch.equal(model.third.weight, latent) and model.first.weight is not model.third.weight
    embedding, linear = nn.Embedding(6, 6), nn.Linear(6, 6)
    linear.weight = embedding.weight
    tokens = nn.Sequential(embedding, linear)
    qk.quantize_(tokens, SAME)
    y = tokens(torch.arange(6))
    torch.testing.assert_close(qk.dequantize_(tokens)(torch.arange(6)), y)


def test_scales_of_frozen_weights_are_frozen():
    model = net()
    model[0].requires_grad_(False)
    qk.quantize_(model, SAME)
    assert not model[0].weight_scale.requires_grad
    assert [name for name, _ in qk.named_scales(model)] == ["2.weight_scale", "4.weight_scale", "5.weight_scale"]


def test_shares_add_up():
    model = net()
    report = qk.quantize_(model)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    total = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("scale"))
    assert sum(report.shares.values()) == pytest.approx(1 - biases / total)
    assert report.quantized_share == pytest.approx(
        sum(layer.latent_weight.numel() for _, layer in quantized_layers(model)) / total
    )
