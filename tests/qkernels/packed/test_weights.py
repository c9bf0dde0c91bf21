"""Weights that code reads without calling their layers, and layers that are no more than their weights, stay packed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.packed.layers import PackedLinear
from qkernels.packed.weights import PackedWeight


def members(make, bits=(7, 4)):
    models = []
    for seed, b in enumerate(bits):
        torch.manual_seed(seed)
        model = make()
        qk.quantize_(model, qk.QConfig(weight_bits=b, first_layer="same", last_layer="same"))
        models.append(model.eval())
    return models


def packed_like(models, tmp_path, x):
    """One graph that answers as the members do, before and after it was saved; its layers."""
    ensemble = qk.PackedEnsemble.from_models(models, x[:2])
    assert ensemble.report.in_turn is None, ensemble.report
    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
    got = ensemble.member_logits(x)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    loaded = qk.PackedEnsemble.load(ensemble.save(tmp_path / "packed"))
    assert torch.equal(loaded.member_logits(x), got)
    return ensemble, list(ensemble.program.layers().values())


class ReadsWeights(nn.Module):
    """As torchvision's Swin, BEiT and others do."""

    def __init__(self, bias):
        super().__init__()
        self.qkv, self.bias, self.head = nn.Linear(8, 24, bias=False), bias, nn.Linear(8, 3)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]) if self.bias else None
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v).mean(1), self.head.weight, self.head.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_whose_weight_is_read(bias, tmp_path):
    ensemble, layers = packed_like(members(lambda: ReadsWeights(bias)), tmp_path, torch.randn(5, 6, 8))
    assert [type(layer) for layer in layers] == [PackedLinear] * 2
    assert len(ensemble.report.packed) == 2


@pytest.mark.parametrize("use", [lambda w: w[:8], lambda w: w.T[:, :8] @ w[:8], lambda w: w.float().softmax(-1)[:8]])
def test_what_is_made_of_a_weight_is_a_constant(use, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(x @ use(self.wide.weight))

    packed_like(members(Net), tmp_path, torch.randn(5, 8))


class Convolutions(nn.Module):
    def __init__(self, dims, groups):
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        self.conv, self.up = conv(4, 6, 3, groups=groups, padding=1), up(6, 4, 2, stride=2, groups=groups)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.up(F.relu(self.conv(x))).flatten(2).mean(2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_all_dimensions(dims, groups, tmp_path):
    models = members(lambda: Convolutions(dims, groups))
    _, layers = packed_like(models, tmp_path, torch.randn(3, 4, *[6] * dims))
    assert sum(isinstance(layer, PackedWeight) for layer in layers) == (1 if dims == 2 else 2)


class Attention(nn.Module):
    def __init__(self, batch_first, cross, mask):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.head, self.cross = nn.Linear(8, 3), cross
        self.images = 0 if batch_first else 1
        self.register_buffer("mask", None if mask is None else torch.ones(6, 6).triu(1).to(mask))

    def forward(self, x):
        x = x if self.images == 0 else x.transpose(0, 1)
        other = x * 2 if self.cross else x
        mask = self.mask.log() if self.mask is not None and self.mask.is_floating_point() else self.mask
        mask = mask if mask is None or mask.dtype == torch.bool else -mask.nan_to_num(neginf=-5.0)
        y = self.attention(x, other, other, attn_mask=mask, need_weights=False)[0]
        return self.head(self.layer(x + y)).mean(1 - self.images)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_attention(batch_first, cross, mask, tmp_path):
    models = members(lambda: Attention(batch_first, cross, mask))
    _, layers = packed_like(models, tmp_path, torch.randn(5, 6, 8))
    assert sum(isinstance(layer, PackedLinear) for layer in layers) >= 5


def test_layers_that_are_not_enabled_are_float(tmp_path):
    models = members(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)))
    for model in models:
        qk.disable_(model)
    with pytest.raises(ValueError, match=r"models\[0\] has no quantized layers: quantize_ or enable_ it"):
        qk.PackedEnsemble.from_models(models)
    for model in models:
        qk.enable_(model)
        model[0].enabled = False
    ensemble, _ = packed_like(models, tmp_path, torch.randn(4, 3, 8, 8))
    assert ensemble.report.floating == ["0"] and ensemble.report.packed == ["3"]


def test_standardized_weights(tmp_path):
    timm_layers = pytest.importorskip("timm.layers")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = timm_layers.ScaledStdConv2dSame(3, 8, 3, stride=2)
            self.second = timm_layers.StdConv2d(8, 8, 3, padding=1)
            self.third = timm_layers.StdConv2dSame(8, 8, 3, stride=2)
            self.head = timm_layers.Linear(8, 3)

        def forward(self, x):
            return self.head(self.third(self.second(self.first(x).relu()).relu()).mean((2, 3)))

    ensemble, _ = packed_like(members(Net), tmp_path, torch.randn(3, 3, 13, 16))
    assert len(ensemble.report.packed) == 4
