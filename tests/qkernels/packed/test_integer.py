"""Integer activations: scales found on images, codes handed from layer to layer, and how little that changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.packed.codes_max_pool import CodesMaxPool2d
from qkernels.packed.integer import BINS, ActivationStatistics
from qkernels.packed.packed_layer import PackedLayer


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.conv3 = nn.Conv2d(16, 32, 3, groups=16)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        return self.head(F.relu6(self.conv3(x)).mean((2, 3)))


def ensemble_of(net=Residual, members=3, **config):
    models = []
    for seed in range(members):
        torch.manual_seed(seed)
        model = net()
        qk.quantize_(model, qk.QConfig(**config))
        models.append(model)
    return qk.PackedEnsemble.from_models(models)


@pytest.fixture
def batches():
    torch.manual_seed(9)
    return [torch.randn(8, 3, 16, 16) for _ in range(2)]


@pytest.mark.parametrize("method", ["mse", "percentile", "max"])
def test_eight_bits_change_little(batches, method):
    ensemble = ensemble_of()
    x = torch.randn(8, 3, 16, 16)
    before = ensemble.member_logits(x)
    report = ensemble.to_integer_(batches, method)
    change = (ensemble.member_logits(x) - before).norm() / before.norm()
    assert 0 < change < 0.03 and 0 < report.logit_error < 0.03 and report.agreement > 0.85
    assert ensemble.integer and report.layers == 4
    assert "4 integer layers, 3 of them hand on codes" in str(report)


def test_fewer_bits_change_more(batches):
    errors = []
    for bits in (8, 6, 4):
        errors.append(ensemble_of().to_integer_(batches, bits=bits).logit_error)
    assert errors == sorted(errors)


def test_what_flows_between_layers(batches):
    ensemble = ensemble_of()
    ensemble.to_integer_(batches)
    seen = {}
    for name, layer in ensemble.program.named_modules():
        if isinstance(layer, PackedLayer):
            layer.register_forward_pre_hook(lambda layer, args, name=name: seen.update({name: args}))
    ensemble(batches[0])
    dtypes = {name: [a.dtype for a in args] for name, args in seen.items()}
    uint8 = torch.uint8
    assert dtypes == {"stem": [torch.float32], "conv1": [uint8], "conv2": [uint8, uint8], "conv3": [uint8]}
    assert isinstance(ensemble.program.pool, CodesMaxPool2d)
    assert ensemble.program.stem.input_range == (-128, 127)  # images have negative pixels
    assert ensemble.program.stem.one_input_scale and not ensemble.program.conv1.one_input_scale


def test_codes_from_layer_to_layer_are_those_that_each_layer_would_make(batches):
    """Connecting layers saves passes over memory and changes nothing: max pools and requantization commute."""
    connected, separate = ensemble_of(), ensemble_of()
    connected.to_integer_(batches)
    separate.to_integer_(batches)
    for layer in separate.modules():
        if isinstance(layer, PackedLayer) and layer.residual_scale is None:
            layer.output_scale = None
    separate.program.stem.output_scale = connected.program.stem.output_scale  # the residual's codes
    assert torch.equal(connected.member_logits(batches[0]), separate.member_logits(batches[0]))


def test_learned_scales_are_kept(batches):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Residual()
        qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=4))
        model.train()(batches[0])
        models.append(model.eval())
    ensemble = qk.PackedEnsemble.from_models(models)
    scales = {n: b.clone() for n, b in ensemble.named_buffers() if n.endswith("input_scale")}
    before = ensemble.member_logits(batches[1])
    report = ensemble.to_integer_(batches)
    assert all(torch.equal(dict(ensemble.named_buffers())[n], s) for n, s in scales.items())
    # conv1 reads the pooled stem and conv2 adds it: with learned scales it is rounded to codes for both.
    assert report.connected == 3
    assert (ensemble.member_logits(batches[1]) - before).norm() < 0.2 * before.norm()


def test_half_precision_floats(batches):
    ensemble = ensemble_of()
    before = ensemble(batches[0])
    ensemble.to_integer_(batches, float_dtype=torch.bfloat16)
    assert (ensemble(batches[0]) - before).norm() < 0.05 * before.norm()


def test_members_in_turn_work_on_integers_too(batches):
    class Branching(Residual):
        def forward(self, x):
            return super().forward(x if x.sum() < 1e9 else -x)

    ensemble = ensemble_of(Branching)
    assert ensemble.report.in_turn
    report = ensemble.to_integer_(batches)
    assert (report.layers, report.connected) == (12, 0) and report.logit_error < 0.03


def test_scales_against_numpy(batches):
    x = torch.cat([torch.rand(1000), torch.tensor([10.0, -3.0])])
    seen = ActivationStatistics(1)
    seen.see_range(x, shared=False)
    seen.see_histogram(x, shared=False)
    assert (seen.least.item(), seen.largest.item()) == (-3.0, 10.0)
    assert seen.scale("max", 0, 255).item() == pytest.approx(10 / 255)
    # 99 % lie within 1; a bin is 10 / BINS wide.
    assert seen.scale("percentile", 99, 255).item() == pytest.approx(1 / 255, abs=2 * 10 / BINS / 255)
    tried = torch.arange(1, 101) / 100 * 10 / 15
    magnitude = x.abs()
    errors = [((magnitude / s).round().clamp(max=15) * s - magnitude).square().sum().item() for s in tried]
    best = seen.scale("mse", 0, 15).item()
    error_of_best = ((magnitude / best).round().clamp(max=15) * best - magnitude).square().sum().item()
    assert error_of_best <= 1.01 * min(errors)


def test_activations_of_zeros_have_a_scale():
    seen = ActivationStatistics(2)
    for see in (seen.see_range, seen.see_histogram):
        see(torch.zeros(2, 10), shared=False)
    for method in ("mse", "percentile", "max"):
        assert torch.equal(seen.scale(method, 99, 255), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (2, 2, 0), ((3, 2), (1, 2), (1, 0))])
def test_max_pool_of_codes(dtype, kernel, stride, padding):
    codes = torch.randint(-128 if dtype == torch.int8 else 0, 127, (2, 5, 9, 8), dtype=torch.int16).to(dtype)
    pool = CodesMaxPool2d(kernel, stride, padding)
    pooled = pool(codes)
    assert pooled.dtype == dtype
    assert torch.equal(pooled.float(), pool(codes.float()))


def test_sums_that_may_overflow_are_refused():
    layer = qk.PackedLinear.from_layers([qk.QLinear(65_794, 2)])
    layer.quantize_input_(torch.ones(1), (0, 255))
    with pytest.raises(ValueError, match="may exceed int32"):
        layer(torch.ones(1, 65_794))
    layer = qk.PackedLinear.from_layers([qk.QLinear(65_793, 2)])
    layer.quantize_input_(torch.ones(1), (0, 255))
    layer(torch.ones(1, 65_793))


def test_bad_input_is_named(batches):
    ensemble = ensemble_of()
    with pytest.raises(ValueError, match="'entropy'"):
        ensemble.to_integer_(batches, "entropy")
    with pytest.raises(ValueError, match="percentile must be in"):
        ensemble.to_integer_(batches, "percentile", percentile=0)
    with pytest.raises(ValueError, match="no batches"):
        ensemble.to_integer_([])
    with pytest.raises(ValueError, match="NaN or infinity"):
        ensemble.to_integer_([torch.full((1, 3, 16, 16), torch.nan)])
    with pytest.raises(TypeError, match="not an iterator"):
        ensemble.to_integer_(iter(batches))
