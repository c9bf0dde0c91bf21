"""A training step and packed ensembles of ResNet-50 on a GPU, against the CPU's numbers. Without a GPU of a smaller
network, where layouts, the fusing of launches and the packing differ, but not the device.
"""

import copy
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
NETWORK, IMAGES, PIXELS = ("resnet50", 8, 96) if DEVICE == "cuda" else ("resnet18", 4, 32)
MEMBERS, CLASSES, LEARNING_RATE = 3, 7, 0.01


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """Not TF32, in which GPUs convolve by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=generator)
    return images, torch.randint(CLASSES, (IMAGES,), generator=generator)


class Stepped(NamedTuple):
    """The loss of a step, the gradients, and the parameters after it."""

    loss: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def step(
    device: str,
    act_bits: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    fused: bool = False,
    autocast: torch.dtype | None = None,
) -> Stepped:
    torch.manual_seed(0)
    model = timm.create_model(NETWORK, num_classes=CLASSES)
    qk.quantize_(model, qk.QConfig(weight_bits=4 if act_bits else 7, act_bits=act_bits))
    model = model.to(device, memory_format=memory_format)
    images, labels = (t.to(device) for t in images_and_labels())
    images = images.to(memory_format=memory_format)
    with torch.no_grad():
        model(images)  # the first batch decides the scales of activations
    run = qk.fuse_weights_(model) if fused else model
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    scaler = torch.amp.GradScaler(device, enabled=autocast == torch.float16, init_scale=256.0)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        loss = F.cross_entropy(run(images), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    scaler.step(optimizer)
    return Stepped(loss.detach().cpu(), gradients, {name: p.detach().cpu() for name, p in model.named_parameters()})


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {
        name: float((actual[name].double() - e.double()).norm() / (e.double().norm() + 1e-12))
        for name, e in expected.items()
    }


def similarity(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The cosine between all gradients."""
    a, b = (torch.cat([t[name].double().flatten() for name in expected]) for t in (actual, expected))
    return float(F.cosine_similarity(a, b, dim=0))


def test_training_step():
    """Float32: codes are the same everywhere, so only roundings differ."""
    expected = step("cpu")
    actual = step(DEVICE, memory_format=torch.channels_last, fused=True)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=0)
    errors = relative_errors(actual.gradients, expected.gradients)
    assert max(errors.values()) < 2e-2, max(errors.items(), key=lambda item: item[1])
    assert similarity(actual.gradients, expected.gradients) > 0.9999
    errors = relative_errors(actual.parameters, expected.parameters)
    assert max(errors.values()) < 1e-3, max(errors.items(), key=lambda item: item[1])


def test_training_step_with_quantized_activations():
    """A rounding can move an activation to the next code, and all that follow."""
    expected = step("cpu", act_bits=4)
    actual = step(DEVICE, act_bits=4, memory_format=torch.channels_last, fused=True)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=5e-2, atol=0)
    assert similarity(actual.gradients, expected.gradients) > 0.95


@needs_gpu
@pytest.mark.parametrize(
    ("act_bits", "dtype", "least"),
    [(None, torch.bfloat16, 0.9), (None, torch.float16, 0.99), (4, torch.bfloat16, 0.4), (4, torch.float16, 0.7)],
)
def test_training_step_under_autocast(act_bits, dtype, least):
    """`least`: the similarity of the gradients, which bfloat16 moves to other codes most."""
    expected = step("cpu", act_bits)
    actual = step(DEVICE, act_bits, torch.channels_last, fused=True, autocast=dtype)
    torch.testing.assert_close(actual.loss.float(), expected.loss, rtol=5e-2, atol=0)
    assert similarity(actual.gradients, expected.gradients) > least
    assert all(torch.isfinite(p).all() for p in actual.parameters.values())


@pytest.fixture(scope="module")
def members() -> list[nn.Module]:
    """Quantized models on the CPU whose batch norms have seen images, so that activations keep their size."""
    models = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        model = timm.create_model(NETWORK, num_classes=CLASSES, zero_init_last=False)
        qk.quantize_(model, qk.QConfig(weight_bits=7))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # its statistics are those of the one batch that it sees
        with torch.no_grad():
            model.train()(torch.randn(IMAGES, 3, PIXELS, PIXELS))
        models.append(model.eval())
    return models


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest logit."""
    assert actual.shape == expected.shape
    return float((actual.float().cpu() - expected).abs().max() / expected.abs().max())


def logits_of(members: list[nn.Module], images: Tensor) -> Tensor:
    return torch.stack([member(images) for member in members])


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5), (torch.float16, 0.1)], ids=str
)
def test_packed_ensemble(members, dtype, bound):
    """The roundings of narrow activations grow through the layers of a network that is not trained."""
    images, _ = images_and_labels()
    ensemble = qk.PackedEnsemble.from_models([copy.deepcopy(member).to(DEVICE) for member in members])
    x = images.to(DEVICE, dtype, memory_format=torch.channels_last)
    assert error(ensemble.member_logits(x), logits_of(members, images)) < bound


@torch.no_grad()
def test_integer_ensemble(members):
    """Codes and sums are the CPU's, bit for bit; only the classifier behind them is float."""
    images, _ = images_and_labels()
    on_cpu = qk.PackedEnsemble.from_models(members)
    on_cpu.to_integer_([images])
    expected = on_cpu.member_logits(images)
    assert error(expected, logits_of(members, images)) < 0.5
    ensemble = copy.deepcopy(on_cpu).to(DEVICE)
    assert error(ensemble.member_logits(images.to(DEVICE, memory_format=torch.channels_last)), expected) < 1e-3
    ensemble.to_integer_([images.to(DEVICE)])  # calibrates anew, there
    assert error(ensemble.member_logits(images.to(DEVICE)), logits_of(members, images)) < 0.5
