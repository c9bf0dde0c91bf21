import pytest
import safetensors.torch
import timm
import torch

import qkernels as qk
from qtdog.errors import UserError
from qtdog.models import MNIST_CNN, build_model, head, load_weights, preprocessing, style_layers, train_mode

TINY = "test_resnet"


def test_mnist_cnn_is_domainbeds():
    model = MNIST_CNN(2, 3)
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes["conv1.weight"] == (64, 2, 3, 3) and sizes["conv2.weight"] == (128, 64, 3, 3)
    assert sizes["conv3.weight"] == sizes["conv4.weight"] == (128, 128, 3, 3)
    assert model.conv2.stride == (2, 2) and {m.num_groups for m in (model.bn0, model.bn3)} == {8}
    x = torch.rand(2, 2, 28, 28)
    assert model(x).shape == (2, 3)
    # features are averaged over positions last
    features = model.bn0(model.conv1(x).relu())
    for conv, norm in ((model.conv2, model.bn1), (model.conv3, model.bn2), (model.conv4, model.bn3)):
        features = norm(conv(features).relu())
    torch.testing.assert_close(model(x), model.classifier(features.mean((2, 3))))


def test_small_cnn_takes_digits_and_all_its_layers_but_the_classifier_are_quantized():
    model = build_model("SMALL_CNN", classes=3, channels=2)
    assert model(torch.rand(4, 2, 28, 28)).shape == (4, 3) and head(model) is model.classifier
    assert style_layers(model) == [model.block1, model.block2, model.block3]
    report = qk.quantize_(model)
    assert len(report.quantized) == 4 and list(report.skipped) == ["classifier"]


def test_preprocessing_is_timms():
    config = preprocessing("tf_efficientnet_lite0", None)
    assert config.mean == config.std == (0.5, 0.5, 0.5) and config.image_size == 224
    assert preprocessing("resnet50.tv_in1k", 64).image_size == 64
    assert preprocessing("resnet50.tv_in1k", None).mean == pytest.approx((0.485, 0.456, 0.406))
    assert preprocessing("MNIST_CNN", None) is preprocessing("SMALL_CNN", None) is None


@pytest.mark.parametrize(
    ("name", "told"), [("resnet5o", "near names: resnet50"), ("resnet50.tv_in2k", "it has: .*tv_in1k")]
)
def test_unknown_backbone(name, told):
    with pytest.raises(UserError, match=told):
        preprocessing(name, None)


def test_head_and_dropout():
    model = build_model(TINY, 5, 3, dropout=0.3)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5) and model.drop_rate == 0.3


def test_transformer_takes_another_image_size():
    model = build_model("test_vit", 5, 3, image_size=48)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 5) and model.patch_embed.grid_size == (3, 3)
    assert build_model("deit_small_patch16_224", 2, 3, image_size=32).pos_embed.shape == (1, 5, 384)
    assert build_model(TINY, 5, 3, image_size=48)(torch.rand(2, 3, 48, 48)).shape == (2, 5)  # takes any size


def test_local_weights_of_a_transformer_fit_another_image_size(tmp_path):
    file = str(tmp_path / "w.safetensors")
    original = timm.create_model("test_vit", num_classes=4)
    safetensors.torch.save_file(original.state_dict(), file)
    model = build_model("test_vit", 4, 3, weights=file, image_size=48)
    grid = original.pos_embed[:, -100:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, -9:], expected)
    same = build_model("test_vit", 4, 3, weights=file)
    assert torch.equal(same.pos_embed, original.pos_embed)


def test_new_head_starts_small():
    head = build_model("tf_efficientnet_lite0", 10, 3).classifier
    assert 0.9 / 1280**0.5 < head.weight.abs().max() <= 1 / 1280**0.5  # timm's own: up to 1 / 10**.5


def test_local_weights_drop_only_another_head(tmp_path):
    file = str(tmp_path / "w.safetensors")
    original = timm.create_model(TINY, num_classes=10)
    safetensors.torch.save_file(original.state_dict(), file)
    said = []
    loaded = build_model(TINY, 4, 3, weights=file, log=said.append)
    assert torch.equal(loaded.state_dict()["conv1.0.weight"], original.state_dict()["conv1.0.weight"])
    assert len(said) == 2 and all("dropped fc." in line for line in said)
    said.clear()
    same = build_model(TINY, 10, 3, weights=file, log=said.append)
    assert not said and torch.equal(same.fc.weight, original.fc.weight)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda s: s.pop("conv1.0.weight"), "not in the file: conv1.0.weight"),
        (lambda s: s.pop("fc.weight"), "not in the file: fc.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "not in the model: extra"),
        (lambda s: s.update({"conv1.0.weight": torch.ones(1)}), "of another shape: conv1.0.weight"),
    ],
)
def test_local_weights_that_do_not_fit(tmp_path, spoil, told):
    file = str(tmp_path / "w.safetensors")
    model = timm.create_model(TINY, num_classes=10)
    state = dict(model.state_dict())
    spoil(state)
    safetensors.torch.save_file(state, file)
    with pytest.raises(UserError, match=told):
        load_weights(model, file)


def test_weights_that_are_no_file(tmp_path):
    model = timm.create_model(TINY)
    with pytest.raises(UserError, match="is neither a file nor the folder of a run"):
        load_weights(model, str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_weights(model, str(tmp_path / "bad.safetensors"))


def test_timm_weights_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match=r"no route to host\): give a local file with --weights"):
        build_model("resnet50.tv_in1k", 5, 3, weights="timm")
    with pytest.raises(ConnectionError):
        build_model("resnet50.tv_in1k", 5, 3)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_frozen_batch_norm_keeps_statistics_and_trains_scale(freeze_bn):
    model = build_model(TINY, 2, 3)
    train_mode(model, freeze_bn)
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(torch.rand(4, 3, 32, 32) + 1).sum().backward()
    assert torch.equal(norm.running_mean, before) == freeze_bn
    assert norm.weight.requires_grad and norm.weight.grad is not None
    assert model.training
