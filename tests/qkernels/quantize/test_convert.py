"""quantize_, dequantize_, the layers and their scales, on real architectures."""

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

import qkernels as qk
from qkernels.quantize import registry
from qkernels.quantize.layers import QuantizedLayer, quantized_layers
from qkernels.quantize.optimizers import scales
from qkernels.quantize.timm_layers import QConv2dSame


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.Linear(16, 4),
    )


def loss_of(model, x):
    return (model(x) ** 2).mean()


MODELS = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=7),
    "resnet50": lambda: timm.create_model("resnet50", num_classes=7),
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=7),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=7),
    "vit_small": lambda: timm.create_model("vit_small_patch16_224", num_classes=7, img_size=32),
    "torchvision_mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
    "torchvision_resnet18": lambda: torchvision.models.resnet18(num_classes=7),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_models_quantize_train_and_come_back(name):
    model = MODELS[name]()
    model.eval()
    parameters = dict(model.named_parameters())
    kinds = {n: type(m) for n, m in model.named_modules() if n}
    report = qk.quantize_(model)
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    matrices = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {layer.name for layer in report.quantized} | set(report.skipped) >= set(matrices)
    assert len(report.quantized) == len(matrices) - 1
    assert "last layer" in report.skipped[matrices[-1]]

    x = torch.randn(2, 3, 32, 32)
    separate = model(x)
    qk.fuse_weights_(model)
    fused = model(x)
    assert torch.equal(fused, separate)
    loss_of(model, x).backward()
    for n, layer in quantized_layers(model):
        assert layer.weight.grad is not None and layer.weight_scale.grad is not None, n
        assert layer.weight_scale.grad.isfinite().all()
        assert layer.fused_weight is None

    qk.dequantize_(model)
    assert {n: type(m) for n, m in model.named_modules() if n} == kinds
    torch.testing.assert_close(model(x), fused)


CONVOLUTIONS = [
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2},
    {"padding": (1, 2), "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "bias": False},
    {"padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_qconv2d_takes_all_arguments_of_conv2d(arguments):
    torch.manual_seed(1)
    layer = qk.QConv2d(4, 6, (3, 3), **arguments)
    plain = nn.Conv2d(4, 6, (3, 3), **arguments)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    with torch.no_grad():
        plain.weight.copy_(layer.quantized_weight())
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), plain(x))
    assert layer.weight_scale.shape == (6,)
    assert "7 bit per channel" in repr(layer)


def test_qlinear_is_a_linear_with_quantized_weights():
    layer = qk.QLinear(5, 3, bias=False)
    codes = layer.quantized_weight() / layer.weight_scale[:, None]
    torch.testing.assert_close(codes, codes.round())
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), x @ layer.quantized_weight().T)


def test_optimizer_survives_the_switch():
    model, x = small_net(), torch.randn(8, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    moments = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    qk.quantize_(model)
    assert qk.add_scales_(optimizer, model, lr=1e-4) == 3
    assert qk.add_scales_(optimizer, model) == 0
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in model.parameters() if id(p) in moments
    )
    assert optimizer.param_groups[-1]["lr"] == 1e-4 and optimizer.param_groups[-1]["weight_decay"] == 0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_published_switch_trains_neither_weights_nor_scales():
    """What the tests above would say of QT-DoG's released code, which makes new Parameters at the switch."""
    model, x = small_net(), torch.randn(8, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    qk.quantize_(model)
    for _, layer in quantized_layers(model):
        layer.weight = nn.Parameter(layer.latent_weight.detach())
    with pytest.raises(ValueError, match="the weight of 0 is in no optimizer"):
        qk.add_scales_(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {f"{i}.{p}" for i in (0, 3, 6) for p in ("weight", "weight_scale")}


def test_param_groups_keep_scales_from_weight_decay():
    model = small_net()
    assert len(qk.param_groups(model, lr=0.1)) == 1
    qk.quantize_(model)
    weights, own = qk.param_groups(model, lr=0.1, weight_decay=0.01, scale_lr=0.5)
    assert own["params"] == scales(model) and own["weight_decay"] == 0 and own["lr"] == 0.5
    assert len(weights["params"]) + len(own["params"]) == len(list(model.parameters()))
    fixed = small_net()
    qk.quantize_(fixed, qk.QConfig(learn_scale=False))
    assert len(qk.param_groups(fixed, lr=0.1)) == 1


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=50.0), lambda p: torch.optim.Adam(p, lr=0.5)])
def test_scales_in_use_stay_positive_and_finite_under_any_optimizer(make):
    layer = qk.QLinear(16, 8)
    optimizer = make([layer.weight_scale])
    crossed = False
    for step in range(60):
        optimizer.zero_grad()
        (layer(torch.randn(4, 16)) * (-1) ** step).sum().backward()
        assert layer.weight_scale.grad.isfinite().all()
        optimizer.step()
        crossed |= bool((layer.weight_scale <= 0).any())
        assert layer.quantized_weight().isfinite().all()
    assert crossed  # or the test showed nothing


def test_zero_channel_and_zero_scale_give_no_nan():
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[2] = 0
    model = nn.Sequential(conv)
    qk.quantize_(model, qk.QConfig(last_layer="same"))
    with torch.no_grad():
        conv.weight_scale[0] = 0
    loss_of(model, torch.randn(1, 3, 5, 5)).backward()
    assert conv.quantized_weight().isfinite().all() and conv.weight_scale.grad.isfinite().all()


def test_layer_policy_and_overrides():
    config = qk.QConfig(
        weight_bits=4,
        first_layer=8,
        last_layer="same",
        overrides={"3": None, "re:[36]": 3, "6": qk.QConfig(weight_bits=5, granularity="tensor")},
    )
    model = small_net()
    report = qk.quantize_(model, config)
    assert {layer.name: layer.bits for layer in report.quantized} == {"0": 8, "6": 5, "7": 4}
    assert report.skipped == {"3": "override"}
    assert model[6].weight_scale.shape == (1,) and model[0].weight_scale.shape == (8,)
    assert "3  float, 13.7% of the parameters: override" in str(report)
    assert "3 layers quantized with 77.9% of the parameters, 1 float" in str(report)
    assert report.quantized_share == pytest.approx(
        (8 * 27 + 16 * 8 + 8 * 8) / sum(p.numel() for p in small_net().parameters())
    )
    assert qk.QConfig.from_dict(config.to_dict()) == config


def test_filter_fn_and_reasons():
    model = small_net()
    report = qk.quantize_(model, filter_fn=lambda module, name: module.weight.shape[1] > 1)
    assert report.skipped == {"3": "filter_fn", "7": "last layer (last_layer='float')"}
    skipped = qk.quantize_(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 2))).skipped
    assert skipped == {"0": "Embedding has no quantized type", "2": "last layer (last_layer='float')"}


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * self._conv_forward(x, self.weight, self.bias)


class QScaled(QuantizedLayer, Scaled):
    float_type = Scaled


@pytest.fixture
def forgetful_registry():
    """What a test registers is forgotten after it."""
    tables = (registry.QUANTIZED_TYPES, registry.PACKED_FORMS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_subclasses_are_reported_until_registered(forgetful_registry):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Scaled(3, 3, 1), nn.Linear(3, 3))
    assert "register_layer" in qk.quantize_(model).skipped["1"]
    qk.register_layer(Scaled, QScaled)
    qk.quantize_(model)
    assert type(model[1]) is QScaled
    with pytest.raises(TypeError, match="must derive from QuantizedLayer and Linear"):
        qk.register_layer(nn.Linear, QScaled)

    class Unsaid(QuantizedLayer, nn.Conv1d):
        pass

    class OfAnother(qk.QConv2d, Scaled):
        """Its float_type is QConv2d's: `dequantize_` would make an nn.Conv2d of it."""

    for float_type, kind in ((nn.Conv1d, Unsaid), (Scaled, OfAnother)):
        with pytest.raises(TypeError, match=f"{kind.__name__} needs the class attribute float_type"):
            qk.register_layer(float_type, kind)


@pytest.mark.parametrize("make", [lambda: QScaled(3, 4, 3), lambda: QConv2dSame(3, 4, 3, stride=2)])
def test_every_quantized_type_can_be_constructed(make):
    layer = make()
    assert "weight=7 bit per channel" in repr(layer) and layer(torch.randn(1, 3, 8, 8)).shape[1] == 4


def test_a_registered_layer_is_packed_by_its_own_form(forgetful_registry):
    def trained(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        qk.quantize_(model)
        return model.eval()

    def pack(layers):
        packed = qk.PackedConv2d.from_layers(layers)
        packed.rescale_(torch.full_like(packed.weight_scale, 2), torch.zeros_like(packed.weight_scale))
        return packed

    qk.register_layer(Scaled, QScaled)
    models = [trained(seed) for seed in range(2)]
    x = torch.randn(3, 3, 3, 3)
    expected = torch.stack([model(x) for model in models])
    ensemble = qk.PackedEnsemble.from_models(models, x)  # by what its forward does with the weight
    assert ensemble.report.packed == ["0", "_1_weight"] and ensemble.report.in_turn is None
    torch.testing.assert_close(ensemble.member_logits(x), expected)
    qk.register_layer(Scaled, QScaled, pack)
    ensemble = qk.PackedEnsemble.from_models(models, x)
    assert ensemble.report.packed == ["0", "1"] and ensemble.report.in_turn is None
    torch.testing.assert_close(ensemble.member_logits(x), expected)


def test_a_root_layer_is_quantized_and_returned():
    layer = nn.Conv2d(3, 4, 3)
    report = qk.quantize_(layer)
    assert report.model is layer and type(layer) is qk.QConv2d and report.quantized[0].name == ""


ERRORS = {
    "nothing to quantize in ReLU": lambda: qk.quantize_(nn.ReLU()),
    r"nothing to quantize in Sequential \(0: last layer": lambda: qk.quantize_(nn.Sequential(nn.Linear(2, 2))),
    "override '7x' matches no layer; there are": lambda: qk.quantize_(small_net(), qk.QConfig(overrides={"7x": 4})),
    "override 're:layer' matches no layer": lambda: qk.quantize_(small_net(), qk.QConfig(overrides={"re:layer": 4})),
    "weight_bits=9": lambda: qk.QConfig(weight_bits=9),
    "granularity='row'": lambda: qk.QConfig(granularity="row"),
    "last_layer='none'": lambda: qk.QConfig(last_layer="none"),
    r"overrides\['0'\]=1": lambda: qk.QConfig(overrides={"0": 1}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_one_clear_error(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def test_a_float_checkpoint_loads_strictly_and_starts_the_scales():
    source, model = small_net(), small_net()
    qk.quantize_(model)
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(model[0].latent_weight, source[0].weight)
    assert torch.equal(model[0].weight_scale, qk.init_scale(source[0].weight, 63, 0))
    bad = source.state_dict()
    del bad["0.weight"]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        model.load_state_dict(bad)


def test_a_quantized_checkpoint_restores_the_scales():
    model, other = small_net(), small_net()
    qk.quantize_(model)
    qk.quantize_(other)
    with torch.no_grad():
        model[0].weight_scale.mul_(3)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other[0].weight_scale, model[0].weight_scale)


def test_copies_pickles_and_averages_right_after_construction():
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    qk.quantize_(model)
    qk.fuse_weights_(model)
    qk.fuse_weights_(model)
    model.eval()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(x), expected)


def test_a_failed_forward_leaves_no_fused_weight_behind():
    model = small_net()
    qk.quantize_(model)
    qk.fuse_weights_(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 5, 8, 8))
    assert all(layer.fused_weight is None for _, layer in quantized_layers(model))


def test_meta_device():
    with torch.device("meta"):
        model = small_net()
    qk.quantize_(model)
    assert model[0].weight_scale.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(small_net().state_dict())
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(fused):
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    qk.quantize_(model)
    if fused:
        qk.fuse_weights_(model)
    seen = []
    model[0].register_forward_pre_hook(lambda m, a: seen.append(m.quantized_weight().dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and seen == [torch.bfloat16]
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == model[0].weight_scale.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)
    qk.quantize_(model)
    loss_of(model, torch.randn(3, 8, dtype=dtype)).backward()
    assert model[0].weight_scale.dtype == dtype and model[0].weight_scale.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_model_has_one_graph_and_equal_gradients(fused):
    model, x = small_net().eval(), torch.randn(2, 3, 8, 8)
    qk.quantize_(model)
    if fused:
        qk.fuse_weights_(model)
    loss_of(model, x).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        loss_of(compiled, x).backward()
    assert all(layer.fused_weight is None for _, layer in quantized_layers(model))
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], msg=n)


def test_export_of_a_quantized_model():
    model, x = small_net().eval(), torch.randn(2, 3, 8, 8)
    qk.quantize_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_packed_nbytes_counts_bits():
    """32 bytes a bit for every 256 codes begun, as they are packed."""
    model = small_net()
    floats = qk.packed_nbytes(model)
    assert floats == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    qk.quantize_(model)
    weights = [8 * 3 * 9, 8 * 9, 8 * 16]
    packed = sum(-(-n // 256) * 32 * 7 for n in weights)
    assert qk.packed_nbytes(model) == floats - 4 * sum(weights) + packed + 4 * (8 + 8 + 16)
