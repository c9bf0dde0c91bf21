"""Models as Hugging Face and torchvision have them: structures in and out, detectors, segmentation."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.packed.answers import called, difference, joined

pytestmark = pytest.mark.slow

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VIT = dict(**SIZES, image_size=32, patch_size=8)
TEXT = dict(**SIZES, vocab_size=50, max_position_embeddings=10, eos_token_id=2, bos_token_id=1)
SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
HUGGING_FACE = {  # the model's name, that of its configuration, what that is given
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", VIT),
    "CLIP": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "BEiT": ("BeitForImageClassification", "BeitConfig", VIT),
    "Swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig", dict(hidden_sizes=[8] * 4, depths=[1] * 4)),
}


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    model, config, sizes = HUGGING_FACE[name]
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


class Logits(nn.Module):
    """Answers with one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        answer = self.model(pixel_values=images)
        return next(answer[key] for key in ("logits", "image_embeds", "pooler_output") if key in answer)


def clip():
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VIT, text_config=TEXT))


def clip_inputs():
    words = torch.randint(3, 50, (2, 8))
    return {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": words, "attention_mask": torch.ones_like(words)}


def torchvision(name, **more):
    models = pytest.importorskip("torchvision").models
    return lambda: models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **more)


def pictures():
    return ([torch.rand(3, 96, 96), torch.rand(3, 80, 96)],)


IN_TURN = {
    "ViT": (lambda: hugging_face("ViT"), lambda: torch.randn(2, 3, 32, 32)),
    "CLIP": (clip, clip_inputs),
    "LR-ASPP": (torchvision("lraspp_mobilenet_v3_large"), lambda: torch.randn(2, 3, 64, 64)),
    "SSDlite": (torchvision("ssdlite320_mobilenet_v3_large"), pictures),
    "Faster R-CNN": (torchvision("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, max_size=128), pictures),
}


def members(make):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        qk.quantize_(model)
        models.append(model.eval())
    return models


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_with_one_answer_it_is_one_graph(name, tmp_path):
    models = members(lambda: Logits(hugging_face(name)))
    images = torch.randn(3, 3, 32, 32)
    ensemble = qk.PackedEnsemble.from_models(models, images)
    assert ensemble.report.in_turn is None, ensemble.report
    logits = ensemble.member_logits(images)
    with torch.no_grad():
        assert difference(logits, torch.stack([model(images) for model in models])) < 1e-5
    assert torch.equal(qk.PackedEnsemble.load(ensemble.save(tmp_path / "packed")).member_logits(images), logits)


@pytest.mark.parametrize("name", IN_TURN)
def test_structures_run_in_turn(name, tmp_path):
    make, inputs = IN_TURN[name]
    models, example = members(make), inputs()
    with torch.no_grad():
        called(models[0], example)  # some remember it
        expected = joined([called(model, example) for model in models])
    ensemble = qk.PackedEnsemble.from_models(models, example)
    assert ensemble.report.in_turn is not None and not ensemble.report.verified.startswith("not verified")
    answers = ensemble.member_logits(example)
    assert type(answers) is type(expected)
    if "those of their layers" not in ensemble.report.verified:
        assert difference(answers, expected) < 1e-4
    loaded = qk.PackedEnsemble.load(ensemble.save(tmp_path / "packed"), make())
    assert difference(loaded.member_logits(example), answers) == 0
