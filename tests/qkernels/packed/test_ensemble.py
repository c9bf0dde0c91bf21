"""PackedEnsemble: the fused graph of all members gives what the fake-quantized models give."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk

timm = pytest.importorskip("timm")


def with_statistics(model):
    """Batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def members(make, bits=(7, 7, 5), **config):
    models = []
    for seed, b in enumerate(bits):
        torch.manual_seed(seed)
        model = with_statistics(make())
        qk.quantize_(model, qk.QConfig(weight_bits=b, **config))
        models.append(model.eval())
    return models


def logits_of(models, x):
    with torch.no_grad():
        return torch.stack([model(x) for model in models])


def assert_same_logits(ensemble, models, x):
    expected = logits_of(models, x)
    got = ensemble.member_logits(x)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    torch.testing.assert_close(ensemble(x), got.mean(0))
    return got


class Small(nn.Module):
    """Convolutions, batch norm, a residual and an activation; `body` is what happens between."""

    def __init__(self, body=lambda self, x: x):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)
        self.body = body

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.body(self, x)
        return self.head(self.norm(self.conv2(x) + x).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, in_other_layers",
    [
        ("resnet18", 32, (20, 8, 17)),
        ("tf_efficientnet_lite0", 32, (49, 9, 33)),
        ("convnext_atto", 32, (0, 12, 12)),
        ("mobilenetv3_small_100", 32, (34, 6, 42)),
    ],
)
def test_timm_models(name, size, in_other_layers):
    models = members(lambda: timm.create_model(name, num_classes=7))
    ensemble = qk.PackedEnsemble.from_models(models)
    assert_same_logits(ensemble, models, torch.randn(2, 3, size, size))
    report = ensemble.report
    assert report.in_turn is None
    assert (len(report.batch_norms), len(report.residuals), len(report.activations)) == in_other_layers


def test_a_vision_transformer():
    models = members(
        lambda: timm.create_model(
            "vit_tiny_patch16_224", num_classes=7, img_size=32, depth=2, embed_dim=48, num_heads=3
        )
    )
    ensemble = qk.PackedEnsemble.from_models(models)
    assert ensemble.report.in_turn is None and len(ensemble.report.residuals) == 4
    assert_same_logits(ensemble, models, torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize("first, last", [("same", "float"), ("float", "same"), (8, 8)])
def test_layers_may_stay_float(first, last):
    models = members(Small, first_layer=first, last_layer=last)
    ensemble = qk.PackedEnsemble.from_models(models)
    assert_same_logits(ensemble, models, torch.randn(2, 3, 8, 8))
    floating = [name for name, kept in (("conv1", first), ("head", last)) if kept == "float"]
    assert ensemble.report.floating == floating
    for word in ("packed", "fused: 1 batch norms", "residual"):
        assert word in str(ensemble.report)


def test_the_models_are_left_as_they_were():
    models = members(Small)
    models[1].train()
    state = copy.deepcopy(models[0].state_dict())
    qk.PackedEnsemble.from_models(models)
    assert models[1].training and models[1].bn1.training and not models[0].training
    assert all(torch.equal(v, state[k]) for k, v in models[0].state_dict().items())


@pytest.mark.parametrize(
    "body, reason",
    [
        (lambda self, x: x if x.sum() > 0 else -x, "decides by the values of its images"),
        (lambda self, x: x.view(-1).relu_().view_as(x) + x, "changes a value in place that is used again"),
        (lambda self, x: torch.special.airy_ai(x), "airy_ai, which the format does not know"),
    ],
)
def test_what_cannot_be_one_graph_runs_in_turn(body, reason):
    models = members(lambda: Small(body))
    ensemble = qk.PackedEnsemble.from_models(models)
    assert_same_logits(ensemble, models, torch.randn(2, 3, 8, 8))
    assert reason in ensemble.report.in_turn and "members run in turn" in str(ensemble.report)
    assert ensemble.report.floating == ["head"]
    assert ensemble.nbytes < sum(p.nbytes for model in models for p in model.parameters()) / 2


def test_a_layer_that_is_called_twice_is_not_fused():
    def twice(self, x):
        return self.conv2(F.relu(self.conv2(x)))

    models = members(lambda: Small(twice))
    ensemble = qk.PackedEnsemble.from_models(models)
    assert_same_logits(ensemble, models, torch.randn(2, 3, 8, 8))
    assert "called more than once" in ensemble.report.unfused["conv2"]


def test_an_input_that_is_not_only_convolved_is_repeated():
    class Normalized(Small):
        def forward(self, x):
            return super().forward((x - 0.5) * 2)

    models = members(Normalized)
    ensemble = qk.PackedEnsemble.from_models(models)
    assert ensemble.report.in_turn is None
    assert_same_logits(ensemble, models, torch.randn(2, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [4, 3])
def test_learned_activation_scales(act_bits):
    torch.manual_seed(0)
    models = []
    for _ in range(3):
        model = with_statistics(timm.create_model("resnet18", num_classes=7))
        qk.quantize_(
            model,
            qk.QConfig(weight_bits=4, act_bits=act_bits, granularity="tensor", first_layer=8, last_layer=8),
        )
        model.train()(torch.randn(4, 3, 32, 32))
        models.append(model.eval())
    ensemble = qk.PackedEnsemble.from_models(models)
    assert ensemble.integer
    x = torch.randn(2, 3, 32, 32)
    expected, got = logits_of(models, x), ensemble.member_logits(x)
    # A sum that is rounded otherwise can move an activation to the next of its few codes.
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_combinations():
    models = members(Small)
    ensemble = qk.PackedEnsemble.from_models(models)
    x = torch.randn(2, 3, 8, 8)
    probabilities = logits_of(models, x).softmax(-1).mean(0)
    torch.testing.assert_close(ensemble(x, combine="probs"), probabilities, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'vote'"):
        ensemble(x, combine="vote")


def test_gradients_are_refused():
    models = members(Small)
    ensemble = qk.PackedEnsemble.from_models(models)
    assert not ensemble(torch.randn(1, 3, 8, 8, requires_grad=True)).requires_grad
    packed = qk.PackedConv2d.from_layers([models[0].conv1])
    with pytest.raises(RuntimeError, match="for inference and have no gradient"):
        packed(torch.randn(1, 1, 3, 8, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
def test_other_dtypes_and_layouts(channels_last):
    models = members(Small)
    ensemble = qk.PackedEnsemble.from_models(models)
    x = torch.randn(2, 3, 8, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = assert_same_logits(ensemble, models, x)
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        got = ensemble.member_logits(x.to(dtype))
        assert got.dtype == dtype
        assert (got.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.slow
def test_compiles_into_one_graph():
    models = members(Small)
    ensemble = qk.PackedEnsemble.from_models(models)
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    for images in (2, 3):
        x = torch.randn(images, 3, 8, 8)
        torch.testing.assert_close(compiled(x), ensemble(x))


@pytest.mark.slow
def test_the_size_of_a_resnet50():
    model = timm.create_model("resnet50", num_classes=7)
    floats = sum(t.nbytes for t in model.state_dict().values())
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    qk.quantize_(model)
    ensemble = qk.PackedEnsemble.from_models([model])
    packed = sum(b.numel() for name, b in ensemble.named_buffers() if name.endswith("weight_packed"))
    assert packed <= 1.01 * codes * 7 / 8
    assert ensemble.nbytes <= 0.224 * floats


@pytest.mark.slow
def test_the_size_of_depthwise_layers():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    qk.quantize_(model, qk.QConfig(weight_bits=3))
    ensemble = qk.PackedEnsemble.from_models([model])
    packed = sum(b.numel() for name, b in ensemble.named_buffers() if name.endswith("weight_packed"))
    assert packed <= 1.03 * codes * 3 / 8


def test_bad_input_is_named():
    models = members(Small)
    with pytest.raises(ValueError, match="no models"):
        qk.PackedEnsemble.from_models([])
    with pytest.raises(ValueError, match=r"models\[1\] has no quantized layers"):
        qk.PackedEnsemble.from_models([models[0], Small()])
    other = Small()
    other.conv2 = nn.Conv2d(8, 8, 5, padding=2)
    qk.quantize_(other)
    with pytest.raises(ValueError, match=r"models\[1\] differs from models\[0\] at conv2"):
        qk.PackedEnsemble.from_models([models[0], other])
    untrained = Small()
    qk.quantize_(untrained, qk.QConfig(act_bits=4))
    with pytest.raises(ValueError, match=r"models\[0\].conv1 has not started to quantize its input"):
        qk.PackedEnsemble.from_models([untrained])


class Settings(nn.Module):
    """A network of layers with settings, all of which are arguments, and a factor that none of them has."""

    def __init__(self, padding=1, groups=2, eps=1e-5, slope=0.1, window=2, dropout=0.1, factor=1.0, stride=1):
        super().__init__()
        self.factor = factor
        self.stem = nn.Conv2d(3, 8, 3, padding=padding)
        self.same = timm.layers.Conv2dSame(8, 8, 3, stride=stride)
        self.norm = nn.GroupNorm(groups, 8, eps=eps)
        self.act = nn.LeakyReLU(slope)
        self.pool = nn.MaxPool2d(window, 2)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.drop(self.pool(self.act(self.norm(self.same(self.stem(x))))))
        return self.head(x.mean((2, 3))) * self.factor


@pytest.mark.parametrize(
    "setting, where",
    [
        ({"padding": 2}, "at stem: padding (2, 2) and (1, 1)"),
        ({"stride": 2}, "at same: stride (2, 2) and (1, 1)"),
        ({"groups": 4}, "at norm: num_groups 4 and 2"),
        ({"eps": 1e-3}, "at norm: eps 0.001 and 1e-05"),
        ({"slope": 0.2}, "at act: negative_slope 0.2 and 0.1"),
        ({"window": 3}, "at pool: kernel_size 3 and 2"),
        ({"factor": 2.0}, "does not compute what models[0] does: .*2.0.* and .*1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_members_that_differ_in_a_setting_are_refused(setting, where):
    models = [Settings(), Settings(**setting)]
    for model in models:
        qk.quantize_(model.eval(), qk.QConfig(first_layer="float"))
    pattern = where if ".*" in where else re.escape(where)
    with pytest.raises(ValueError, match=rf"models\[1\] .*{pattern}".replace("models[0]", r"models\[0\]")):
        qk.PackedEnsemble.from_models(models)


def test_members_may_differ_in_what_only_training_knows():
    models = [Settings(), Settings(dropout=0.5)]
    for model in models:
        qk.quantize_(model.eval(), qk.QConfig(first_layer="float"))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(qk.PackedEnsemble.from_models(models).member_logits(x), logits_of(models, x))


class Linear(nn.Linear):
    """Named as a type that has a stacked form, and computes something else; so do those below."""

    def forward(self, x):
        return 2 * super().forward(x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return 3 + super().forward(x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).abs()


class BatchNormAct2d(nn.BatchNorm2d):
    act = nn.Identity()

    def forward(self, x):
        return super().forward(x) - 1


class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).exp()


class Dropout(nn.Dropout):
    """In eval mode too, as Monte Carlo dropout does."""

    def forward(self, x):
        return x + 5


class MaxPool2d(nn.MaxPool2d):
    def forward(self, x):
        return -super().forward(-x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(8, 8),
        lambda: nn.Sequential(nn.Flatten(2), LayerNorm(64), nn.Unflatten(2, (8, 8))),
        lambda: LayerNorm2d(8),
        lambda: BatchNormAct2d(8),
        lambda: Conv2dSame(8, 8, 1),
        Dropout,
        lambda: MaxPool2d(2),
    ],
    ids=["Linear", "LayerNorm", "LayerNorm2d", "BatchNormAct2d", "Conv2dSame", "Dropout", "MaxPool2d"],
)
@pytest.mark.parametrize("integer", [False, True])
def test_subclasses_are_not_taken_for_what_their_name_says(make, integer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.own = nn.Conv2d(3, 8, 1), make()
            self.body, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.body(self.own(F.relu(self.stem(x)))).mean((2, 3)))

    models = members(Net)
    x = torch.randn(4, 3, 8, 8)
    ensemble = qk.PackedEnsemble.from_models(models)
    assert_same_logits(ensemble, models, x)
    if integer:
        report = ensemble.to_integer_([x])
        assert report.logit_error < 0.05, report
