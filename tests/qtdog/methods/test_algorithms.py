"""CORAL and MixStyle against numpy, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qtdog.errors import UserError
from qtdog.methods.algorithms.coral import CORAL, distance
from qtdog.methods.algorithms.erm import ERM
from qtdog.methods.algorithms.mixstyle import MixStyle, mixed
from qtdog.models import MNIST_CNN, build_model, style_layers


def batches(domains=3, size=4, shape=(1, 28, 28), classes=10):
    torch.manual_seed(0)
    return [(torch.rand(size, *shape), torch.randint(classes, (size,))) for _ in range(domains)]


def test_distance_against_numpy():
    a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64) * 2 + 1
    mu = (a.numpy().mean(0) - b.numpy().mean(0)) ** 2
    cov = (np.cov(a.numpy(), rowvar=False) - np.cov(b.numpy(), rowvar=False)) ** 2
    assert distance(a, b).item() == pytest.approx(mu.mean() + cov.mean(), rel=1e-12)
    assert distance(a, a).item() == 0


def test_coral_is_cross_entropy_plus_the_mean_over_pairs():
    model, data = MNIST_CNN(1, 10), batches()
    features = []
    handle = model.classifier.register_forward_pre_hook(lambda m, inputs: features.append(inputs[0]))
    each = [nn.functional.cross_entropy(model(x), y) for x, y in data]
    handle.remove()
    pairs = [distance(features[i], features[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    for weight in (0.0, 1.0, 2.5):
        expected = sum(each) / 3 + weight * sum(pairs) / 3
        torch.testing.assert_close(CORAL(coral_weight=weight)(model, data), expected)
    assert not model.classifier._forward_pre_hooks
    with pytest.raises(UserError, match="it needs two of them"):
        CORAL(coral_weight=1.0)(model, data[:1])
    loss = CORAL(coral_weight=1.0)(model, data)
    loss.backward()
    assert model.conv1.weight.grad.abs().max() > 0


def test_coral_takes_timm_models_and_fused_quantized_ones():
    model = build_model("test_resnet", 3, 3)
    data = batches(shape=(3, 32, 32), classes=3)
    qk.quantize_(model, qk.QConfig(act_bits=8))
    qk.fuse_weights_(model)
    CORAL(coral_weight=1.0)(model, data).backward()
    assert all(scale.grad is not None for _, scale in qk.named_scales(model))


def test_mixed_against_numpy():
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 5, 6, dtype=torch.float64) * 2 + 1).requires_grad_()
    order, share = torch.tensor([2, 0, 3, 1]), torch.rand(4, dtype=torch.float64)
    y = mixed(x, order, share)
    a, k = x.detach().numpy(), share.numpy()[:, None, None, None]
    mu = a.mean((2, 3), keepdims=True)
    sigma = np.sqrt(a.var((2, 3), ddof=1, keepdims=True) + 1e-6)
    new_mu = k * mu + (1 - k) * mu[order.numpy()]
    new_sigma = k * sigma + (1 - k) * sigma[order.numpy()]
    np.testing.assert_allclose(y.detach().numpy(), (a - mu) / sigma * new_sigma + new_mu, rtol=1e-12)
    (gradient,) = torch.autograd.grad(y.sum(), x)  # the statistics are constants
    np.testing.assert_allclose(gradient.numpy(), np.broadcast_to(new_sigma / sigma, a.shape), rtol=1e-12)
    own = mixed(x, order, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(own, x)
    assert mixed(torch.rand(2, 3, 1, 1), torch.tensor([1, 0]), torch.rand(2)).isfinite().all()


@pytest.mark.slow
def test_mixstyle_acts_on_three_layers_with_its_probability_and_in_the_loss_only():
    model, data = MNIST_CNN(1, 10), batches()
    plain = ERM()(model, data)
    never = MixStyle(mixstyle_p=0.0, mixstyle_alpha=0.1)(model, data)
    assert torch.equal(never, plain)
    always = [MixStyle(mixstyle_p=1.0, mixstyle_alpha=0.1)(model, data) for _ in range(2)]
    assert always[0] != plain and always[0] != always[1]
    torch.manual_seed(5)
    one = MixStyle(mixstyle_p=1.0, mixstyle_alpha=0.1)(model, data)
    torch.manual_seed(5)
    assert torch.equal(MixStyle(mixstyle_p=1.0, mixstyle_alpha=0.1)(model, data), one)
    assert not any(m._forward_hooks for m in model.modules())
    changed = 0
    for _ in range(40):
        changed += MixStyle(mixstyle_p=0.5, mixstyle_alpha=0.1)(model, data).item() != plain.item()
    assert 25 <= changed < 40  # 1 - .5^3 = 7/8 of them, less draws near 1


@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0", "convnext_atto"])
def test_mixstyle_layers_of_timm_models(name):
    model = build_model(name, 3, 3)
    shapes = []
    for layer in style_layers(model):
        layer.register_forward_hook(lambda m, i, out: shapes.append(out.shape[-1]))
    model(torch.rand(1, 3, 64, 64))
    assert shapes == [16, 8, 4]


def test_mixstyle_layers_of_a_resnet_are_its_layers():
    model = build_model("test_resnet", 3, 3)
    assert style_layers(model) == [model.layer1, model.layer2, model.layer3]
    MixStyle(mixstyle_p=1.0)(model, batches(shape=(3, 32, 32), classes=3)).backward()


def test_mixstyle_refuses_a_transformer():
    with pytest.raises(UserError, match="convolutional network"):
        style_layers(build_model("test_vit", 3, 3))
