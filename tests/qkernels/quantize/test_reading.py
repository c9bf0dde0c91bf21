"""Quantized means quantized, whoever reads the weight."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import qkernels as qk
from qkernels.quantize.layers import quantized_layers

CONFIG = qk.QConfig(weight_bits=2, last_layer="same")


class Reads(nn.Module):
    """Multiplies by the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        return F.linear(x, self.qkv.weight)


class ReadsAView(Reads):
    def forward(self, x):
        return x @ self.qkv.weight[:, 4:].t().reshape(12, 48) if x.shape[1] == 12 else x @ self.qkv.weight.t()


@pytest.mark.parametrize("kind", [Reads, ReadsAView])
@pytest.mark.parametrize("fused", [False, True])
def test_who_reads_the_weight_multiplies_by_the_quantized_one(kind, fused):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 16)
    report = qk.quantize_(model, CONFIG)
    if fused:
        qk.fuse_weights_(model)
    layer = model.qkv
    assert [row.name for row in report.quantized] == ["qkv"]
    expected = x @ layer.quantized_weight().detach().T
    assert torch.equal(model(x), F.linear(x, layer.quantized_weight())) and len(layer.weight.unique()) <= 48 * 4
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    reference = copy.deepcopy(layer)
    reference.zero_grad()
    reference.bias = None
    reference(x).square().sum().backward()
    assert torch.equal(layer.latent_weight.grad, reference.latent_weight.grad)
    assert torch.equal(layer.weight_scale.grad, reference.weight_scale.grad)


def every_layer_counts(model, x):
    """Each weight has an influence through its quantizer alone: scales have gradients, and a latent weight that moves
    to the middle of its code changes nothing."""
    model.eval()
    y = model(x)
    y.float().square().mean().backward()
    for name, layer in quantized_layers(model):
        assert layer.weight_scale.grad is not None, name
    with torch.no_grad():
        for _, layer in quantized_layers(model):
            layer.latent_weight.copy_(layer.quantized_weight())
        torch.testing.assert_close(model(x), y.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
@pytest.mark.slow
def test_torchvision_swin(name):
    model = torchvision.models.get_model(name, num_classes=4)
    report = qk.quantize_(model)
    assert report.quantized_share > 0.97 and set(report.skipped) >= {"head"}
    every_layer_counts(model, torch.randn(1, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"])
def test_timm_attention(name):
    model = (
        timm.create_model(name, num_classes=4, img_size=56, depth=1)
        if "vit" not in name
        else timm.create_model(name, num_classes=4, img_size=56 if "14" in name else 32, depth=1)
    )
    qk.quantize_(model, qk.QConfig(weight_bits=3))
    every_layer_counts(model, torch.randn(1, 3, *[model.patch_embed.img_size[0]] * 2))


def test_multihead_attention_and_transformer_encoder_in_both_modes():
    """In eval mode PyTorch would take paths of its own, with the float weights or past the layers' inputs."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
    x = torch.randn(3, 5, 16)
    report = qk.quantize_(encoder, qk.QConfig(weight_bits=3, act_bits=8, last_layer="same"))
    names = {row.name for row in report.quantized}
    assert names == {
        f"layers.{i}.{layer}" for i in (0, 1) for layer in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    }
    encoder(x)
    plain = copy.deepcopy(encoder)
    for name, layer in quantized_layers(encoder):
        if layer.act_quantizer is not None:
            plain.get_submodule(name).register_forward_pre_hook(lambda m, a, layer=layer: layer.quantized_input(a[0]))
    qk.dequantize_(plain)
    with torch.no_grad():
        trained = encoder(x)
        torch.testing.assert_close(encoder.eval()(x), trained)
        torch.testing.assert_close(plain.train()(x), trained)
    attention = nn.MultiheadAttention(16, 2, kdim=8)
    assert (
        "projections of their own"
        in qk.quantize_(nn.Sequential(attention, nn.Linear(2, 2), nn.Linear(2, 2))).skipped["0"]
    )


def test_vit_b_16_is_quantized_but_for_head_and_embedding():
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    report = qk.quantize_(model)
    assert report.quantized_share > 0.98


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 3, padding="same", bias=False), (1, 2, 4, 5, 6)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (1, 2, 3, 3, 3)),
    "Linear of timm": (lambda: timm.layers.Linear(8, 5), (2, 8)),
    "Conv2dSame": (lambda: timm.layers.Conv2dSame(3, 4, 3, 2), (2, 3, 7, 7)),
}


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name, granularity):
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    latent = layer.weight
    qk.quantize_(layer, qk.QConfig(weight_bits=3, granularity=granularity, act_bits=8))
    assert layer.latent_weight is latent
    axis = layer.weight_quantizer.axis
    assert layer.weight_scale.shape == ((1,) if axis is None else (latent.shape[axis],))
    assert axis is None or axis == int("Transpose" in name)
    layer(x).square().sum().backward()
    assert layer.weight_scale.grad.abs().min() > 0 and latent.grad is not None and layer.act_scale.grad is not None
    scale = qk.positive_scale(layer.weight_scale)
    if axis is not None:
        scale = scale.view([-1 if d == axis else 1 for d in range(latent.dim())])
    codes = layer.weight / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    y = layer(x)
    rounded = layer.quantized_input(x)
    qk.dequantize_(layer)
    assert type(layer) is type(make()) and layer.weight is latent
    torch.testing.assert_close(layer(rounded), y)


STANDARDIZED = {
    kind.__name__: kind
    for kind in (
        timm.layers.StdConv2d,
        timm.layers.StdConv2dSame,
        timm.layers.ScaledStdConv2d,
        timm.layers.ScaledStdConv2dSame,
    )
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", STANDARDIZED)
def test_what_is_quantized_of_a_standardized_weight_is_what_multiplies(name, fused):
    torch.manual_seed(2)
    layer, x = STANDARDIZED[name](3, 4, 3, 2), torch.randn(2, 3, 9, 9)
    before = layer(x)
    qk.quantize_(layer, qk.QConfig(weight_bits=8), enabled=False)
    assert torch.equal(layer(x), before)
    qk.enable_(layer)
    if fused:
        qk.fuse_weights_(layer)
    y = layer(x)
    assert 0 < (y - before).abs().max() < 0.1 * before.abs().max()
    codes = layer.weight / layer.weight_scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    y.square().sum().backward()
    assert layer.latent_weight.grad.abs().sum() > 0 and layer.weight_scale.grad.abs().min() > 0
    qk.dequantize_(layer)  # a plain convolution: the standardization is in the weight
    assert type(layer) in (nn.Conv2d, timm.layers.Conv2dSame)
    torch.testing.assert_close(layer(x), y)


def test_writing_to_a_weight_that_is_computed_is_refused_and_what_means_the_parameter_reaches_it():
    layer = nn.Linear(4, 3)
    qk.quantize_(layer, CONFIG)
    for write in (
        lambda: layer.weight.data,
        lambda: setattr(layer.weight, "data", torch.zeros(3, 4)),
        lambda: nn.init.zeros_(layer.weight),
        lambda: layer.weight.add_(1),
        lambda: layer.weight.__setitem__(0, 1.0),
        lambda: exec("layer.weight -= 1", {"layer": layer}),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match="`latent_weight`, the Parameter behind it"):
            write()
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is layer.latent_weight.grad is not None
    layer.weight.grad = None
    assert layer.latent_weight.grad is None
    layer.weight.requires_grad_(False)
    assert not layer.latent_weight.requires_grad and not layer.weight.requires_grad
    layer.weight = nn.Parameter(torch.ones(3, 4))
    assert torch.equal(layer.latent_weight, torch.ones(3, 4))
    assert isinstance(layer.get_parameter("weight"), nn.Parameter)
    plain = layer.weight + 0
    assert type(plain) is torch.Tensor and layer.weight.shape == (3, 4) and layer.weight.dtype == torch.float32


def test_weights_that_are_recomputed_are_refused_with_the_reason():
    def with_(change):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        change(model[0])
        return qk.quantize_(model).skipped["0"]

    for change in (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: torch.nn.utils.weight_norm(m),
        lambda m: torch.nn.utils.spectral_norm(m),
    ):
        assert "recomputed before each forward" in with_(change)
    for change in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        assert "remove_parametrizations" in with_(change)
    for change in (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: torch.nn.utils.spectral_norm(m),
        lambda m: torch.nn.utils.weight_norm(m),
        nn.utils.parametrizations.spectral_norm,
    ):
        layer = nn.Linear(4, 4)
        qk.quantize_(layer)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            change(layer)


def test_inputs_of_layers_that_are_read_but_not_called_stay_float_and_say_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.reads, self.calls, self.head = Reads(), nn.Linear(48, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.calls(self.reads(x)))

    model, x = Model(), torch.randn(4, 16)
    qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=8))
    with pytest.warns(UserWarning, match=r"the inputs of reads\.qkv stay float"):
        model(x)
    assert model.reads.qkv.act_quantizer is None and not hasattr(model.reads.qkv, "act_scale")
    assert model.calls.act_range is not None and not model._forward_hooks
    model(x)


def test_torch_fx_takes_a_layer_as_a_node_and_refuses_who_reads_its_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    qk.quantize_(model, qk.QConfig(last_layer="same"))
    traced, x = torch.fx.symbolic_trace(model), torch.randn(2, 3, 8, 8)
    assert torch.equal(traced(x), model(x))
    model[0].weight_scale.data.mul_(2)  # it has the layer itself, not a copy of its weight
    assert torch.equal(traced(x), model(x))
    with pytest.raises(RuntimeError, match=r"torch\.fx cannot trace code that reads the weight"):
        reads = Reads()
        qk.quantize_(reads, CONFIG)
        torch.fx.symbolic_trace(reads)


def test_feature_extractor_and_flop_counter():
    model = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False) as floats:
        model(x)
    qk.quantize_(model)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == floats.get_total_flops()
    extractor = create_feature_extractor(model, {"layer2": "middle", "fc": "out"})
    assert torch.equal(extractor.eval()(x)["out"], y)


def test_reparameterized_branches_are_the_quantized_ones():
    from timm.utils.model import reparameterize_model

    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=4).eval()
    qk.quantize_(model, qk.QConfig(weight_bits=3))
    x = torch.randn(1, 3, 32, 32)
    y = model(x)
    torch.testing.assert_close(reparameterize_model(model)(x), y, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_exported_reads(dynamic):
    model, x = ReadsAView(), torch.randn(4, 16)
    qk.quantize_(model, CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
