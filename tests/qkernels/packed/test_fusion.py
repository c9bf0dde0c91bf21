"""What follows a layer moves into it where it can, and only there: activations and factors of channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.packed.float_layers import Constant


class Pointwise(nn.Module):
    """Two layers with something between, of images or of rows."""

    def __init__(self, between, linear=False):
        super().__init__()
        self.first = nn.Linear(3, 8) if linear else nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Linear(8, 8) if linear else nn.Conv2d(8, 8, 1)
        self.between = between
        self.factor, self.column = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("alike", torch.linspace(-1, 2, 8))

    def forward(self, x):
        y = self.first(x)
        y = self.between(y) if isinstance(self.between, nn.Module) else self.between(self, y)
        return self.second(y).flatten(1)


def ensemble_of(between, linear=False, first_layer="same"):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Pointwise(between, linear)
        qk.quantize_(model, qk.QConfig(first_layer=first_layer, last_layer="same"))
        models.append(model.eval())
    return models, qk.PackedEnsemble.from_models(models, images(linear))


def images(linear=False, count=2):
    return torch.randn(count, 5, 3) if linear else torch.randn(count, 3, 8, 8)


def check(models, ensemble, linear=False):
    """It answers as its members do. Returns its first layer."""
    x = images(linear, 4)
    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(ensemble.member_logits(x), expected, rtol=1e-4, atol=1e-5)
    return ensemble.program.layers()["first"]


ACTIVATIONS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), lambda _, y: F.relu(y), lambda _, y: torch.relu_(y)],
    "relu6": [nn.ReLU6(), lambda _, y: F.relu6(y, inplace=True), lambda _, y: F.hardtanh(y, 0.0, 6.0)],
    "silu": [nn.SiLU(), lambda _, y: F.silu(y, True)],
    "hardswish": [nn.Hardswish(), nn.Hardswish(inplace=True), lambda _, y: F.hardswish(y)],
    "hardsigmoid": [nn.Hardsigmoid(inplace=True), lambda _, y: F.hardsigmoid(y), lambda _, y: F.hardsigmoid(y, True)],
    "sigmoid": [nn.Sigmoid(), lambda _, y: y.sigmoid(), lambda _, y: y.sigmoid_(), lambda _, y: torch.sigmoid(y)],
    "gelu": [nn.GELU(), lambda _, y: F.gelu(y), lambda _, y: F.gelu(y, approximate="none")],
    "gelu_tanh": [nn.GELU("tanh"), lambda _, y: F.gelu(y, approximate="tanh")],
}


@pytest.mark.parametrize(
    "name, between",
    [
        pytest.param(name, between, id=f"{name}-{i}")  # functions have no names that all processes know
        for name, ways in ACTIVATIONS.items()
        for i, between in enumerate(ways)
    ],
)
def test_activations(name, between):
    models, ensemble = ensemble_of(between)
    assert check(models, ensemble).activation == name
    assert ensemble.report.activations == ["first"] and len(ensemble.program.steps) == 3


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("linear", [False, True])
def test_saved_and_on_integers(name, linear, tmp_path):
    """A layer with an activation is what it was when loaded, and hands codes to the next."""
    _, ensemble = ensemble_of(ACTIVATIONS[name][0], linear)
    x = images(linear, 4)
    before = ensemble.member_logits(x)
    for path in ("floats", "integers"):
        loaded = qk.PackedEnsemble.load(ensemble.save(tmp_path / path))
        assert torch.equal(loaded.member_logits(x), ensemble.member_logits(x))
        assert loaded.program.layers()["first"].activation == name
        if path == "floats":
            report = ensemble.to_integer_([images(linear, 16), images(linear, 16)])
            assert (report.layers, report.connected) == (2, 1) and report.logit_error < 0.05
    assert ensemble.program.layers()["first"].output_scale is not None
    assert (ensemble.member_logits(x) - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize(
    "between",
    [
        nn.Hardtanh(),
        nn.LeakyReLU(),
        lambda _, y: F.gelu(y) * y,  # the layer's own result is used
        lambda _, y: y.sigmoid() + y.mean(),
    ],
)
def test_what_is_no_activation_of_the_layer(between):
    models, ensemble = ensemble_of(between)
    assert check(models, ensemble).activation == "none" and not ensemble.report.activations


def own(self, y):
    return self.factor if y.dim() == 3 else self.column


FACTORS = {
    "each member's own": lambda self, y: y * own(self, y),
    "from the left": lambda self, y: own(self, y) * y,
    "a method, in place": lambda self, y: y.mul_(own(self, y)),
    "a function": lambda self, y: torch.mul(own(self, y), y),
    "the same for all": lambda self, y: y * (self.alike if y.dim() == 3 else self.alike.view(8, 1, 1)),
    "before an activation": lambda self, y: F.gelu(y * own(self, y)),
    "two": lambda self, y: y * own(self, y) * (own(self, y) + 1),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("first_layer", ["same", "float"])
def test_factors(name, linear, first_layer):
    if linear and first_layer == "float":
        pytest.skip("nothing is fused into float linear layers")
    models, ensemble = ensemble_of(FACTORS[name], linear, first_layer)
    check(models, ensemble, linear)
    assert set(ensemble.report.factors) == {"first"}
    assert f"{len(ensemble.report.factors)} factors" in str(ensemble.report)
    assert not any(isinstance(layer, Constant) for layer in ensemble.program.layers().values())
    activations = 1 if name == "before an activation" and first_layer == "float" else 0
    assert len(ensemble.program.steps) == 3 + activations


def test_a_residual_follows_a_factor():
    class Block(Pointwise):
        def __init__(self):
            super().__init__(None)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.first(x)
            return self.head(F.silu(y + self.second(y) * self.column)).flatten(1)

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Block().eval())
        qk.quantize_(models[-1], qk.QConfig())
    ensemble = qk.PackedEnsemble.from_models(models, images())
    check(models, ensemble)
    report = ensemble.report
    assert report.factors == report.residuals == report.activations == ["second"]
    assert set(ensemble.program.layers()) == {"first", "second", "head"}


@pytest.mark.parametrize(
    "between",
    [
        lambda self, y: F.relu(y) * self.column,  # behind an activation
        lambda self, y: y * self.column + y,  # the layer's own result is used
        lambda self, y: y * self.factor,  # of columns of pixels, as many as channels
        lambda self, y: y * self.factor[:, None],  # of rows of pixels
        lambda self, y: y * self.column[0, 0],  # one for all
        lambda self, y: y * y,
        lambda self, y: y * 2.0,
    ],
)
def test_what_is_no_factor_of_channels(between):
    models, ensemble = ensemble_of(between)
    check(models, ensemble)
    assert not ensemble.report.factors
