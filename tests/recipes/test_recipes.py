"""Recipes of docs/recipes.md: the losses of a plain loop, resumed before and after the switch, a packed file."""

import copy
import math
import os

import pytest
import timm
import torch
import torchvision
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import qkernels as qk
from recipe import STEPS, Interrupted, Recording, plain, quantized, recording, run

pytestmark = [pytest.mark.slow, pytest.mark.untraced]
MISSING = "pip install 'qtdog[recipes]'"


def same(model, other):
    """Whether all parts of their states are."""
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def check(title, plain_loop, switch, resumed_from, architecture=None):
    """Run a recipe of twelve steps a member and hold it to `plain_loop(recipe, seen, switch)`; then resume it.

    Args:
        plain_loop: gives losses and the model at the end.
        switch: the first step that quantizes.
        resumed_from: step -> what the recipe's `train` takes to go on from there; interrupted it is after the latest.
        architecture: of the recipe, the float model that loads its packed file, where members run in turn.

    Returns:
        The recipe, which has run.
    """
    with recording() as seen:
        recipe = run(title)
    assert len(seen.losses) == 2 * STEPS
    first = Recording(seen.losses[:STEPS], seen.images[:STEPS], seen.labels[:STEPS])
    losses, model = plain_loop(recipe, first, switch)
    assert first.losses == losses
    of_float, _ = plain_loop(recipe, first, None)
    assert first.losses[: switch + 1] != of_float[: switch + 1] and first.losses[:switch] == of_float[:switch]
    assert same(recipe.models[0], model)

    os.mkdir("again")
    os.chdir("again")
    with recording(max(resumed_from) + 1) as seen, pytest.raises(Interrupted):
        recipe.train(0)
    for step, checkpoint in resumed_from.items():
        with recording() as resumed:
            model = recipe.train(0, checkpoint)
        assert seen.losses[:step] + resumed.losses == first.losses
        assert same(recipe.models[0], model)
    os.chdir("..")

    ensemble = qk.PackedEnsemble.load("packed", architecture and architecture(recipe))
    assert torch.equal(recipe.answers, ensemble(recipe.images))
    with torch.no_grad():
        logits = torch.stack([model.eval()(recipe.images) for model in recipe.models])
    apart = (ensemble.member_logits(recipe.images) - logits).abs().max() / logits.abs().max()
    assert apart < 1e-4
    return recipe


def test_lightning():
    pytest.importorskip("lightning", reason=MISSING)

    def plain_loop(recipe, seen, switch):
        torch.manual_seed(0)
        model = quantized(timm.create_model("test_resnet", num_classes=3))
        average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.Adam(qk.param_groups(model, lr=1e-3, scale_lr=1e-4))
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 12)

        def after(step):
            scheduler.step()
            average.update_parameters(model)

        return plain(model, optimizer, seen, switch, after=after, average=average), average.module

    check("PyTorch Lightning", plain_loop, 5, {9: "member0/epoch=2-step=9.ckpt", 3: "member0/epoch=0-step=3.ckpt"})


def test_hugging_face_trainer():
    transformers = pytest.importorskip("transformers", reason=MISSING)
    pytest.importorskip("accelerate", reason=MISSING)

    def plain_loop(recipe, seen, switch):
        torch.manual_seed(0)
        model = quantized(transformers.ViTForImageClassification(recipe.config))
        logits = recipe.Logits(model)
        optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3, weight_decay=0.01, scale_lr=1e-4))
        scheduler = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 0, 12, num_cycles=2)
        return plain(logits, optimizer, seen, switch, after=lambda step: scheduler.step(), max_norm=1.0), model

    def architecture(recipe):
        return recipe.Logits(transformers.ViTForImageClassification(recipe.config))

    recipe = check(
        "Hugging Face Trainer", plain_loop, 6, {8: "member0/checkpoint-8", 4: "member0/checkpoint-4"}, architecture
    )
    assert same(recipe.plain, recipe.models[0])
    _, found = transformers.AutoModelForImageClassification.from_pretrained("member0", output_loading_info=True)
    assert "vit.layers.0.mlp.fc1.weight_scale" in found["unexpected_keys"]


def test_accelerate():
    transformers = pytest.importorskip("transformers", reason=MISSING)
    pytest.importorskip("accelerate", reason=MISSING)

    def plain_loop(recipe, seen, switch):
        torch.manual_seed(0)
        model = quantized(recipe.Classifier())
        optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3, weight_decay=0.01, scale_lr=1e-4))
        scheduler = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 2, 12, num_cycles=2)
        return plain(model, optimizer, seen, switch, after=lambda step: scheduler.step()), model

    check("accelerate", plain_loop, 6, {9: 3, 3: 1}, lambda recipe: recipe.Classifier())


def test_timm():
    def plain_loop(recipe, seen, switch):
        torch.manual_seed(0)
        model = quantized(timm.create_model("test_efficientnet", num_classes=3))
        average = copy.deepcopy(model).eval()
        optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3, weight_decay=0.05, scale_lr=1e-4))

        def after(step):
            for mean, now in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.lerp_(now, 0.1) if mean.is_floating_point() else mean.copy_(now)
            if step % 3 == 2:
                for group, rate in zip(optimizer.param_groups, (1e-3, 1e-4), strict=True):
                    group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * (step // 3 + 1) / 4))

        for group in optimizer.param_groups:
            group["lr"] = 1e-5  # where timm's warmup begins
        return plain(model, optimizer, seen, switch, after=after, average=average), average

    check("timm", plain_loop, 6, {9: "member0/checkpoint-2.pth.tar", 3: "member0/checkpoint-0.pth.tar"})


def test_torchvision():
    def plain_loop(recipe, seen, switch):
        torch.manual_seed(0)
        model = quantized(torchvision.models.get_model("mobilenet_v2", width_mult=0.25, dropout=0.0, num_classes=3))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.01, weight_decay=1e-4, scale_lr=1e-3), momentum=0.9)
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=1)
        scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 3)], [1])

        def after(step):
            average.update_parameters(model)
            if step % 3 == 2:
                scheduler.step()

        return plain(model, optimizer, seen, switch, after=after, average=average), average.module

    check("torchvision's references", plain_loop, 6, {9: "member0_2.pth", 3: "member0_0.pth"})
