"""Backbones: DomainBed's small CNN for digits, any timm model for photographs and drawings."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import timm.data
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtdog.data import Preprocessing
from qtdog.errors import UserError


class MNIST_CNN(nn.Module):
    """DomainBed's network for 28x28 digits: images [N, C, 28, 28] to logits [N, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(128, 128, 3, 1, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, 1, padding=1)
        self.bn0 = nn.GroupNorm(8, 64)
        self.bn1 = nn.GroupNorm(8, 128)
        self.bn2 = nn.GroupNorm(8, 128)
        self.bn3 = nn.GroupNorm(8, 128)
        self.classifier = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(F.relu(self.conv1(x)))
        x = self.bn1(F.relu(self.conv2(x)))
        x = self.bn2(F.relu(self.conv3(x)))
        x = self.bn3(F.relu(self.conv4(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def preprocessing(backbone: str, image_size: int | None) -> Preprocessing | None:
    """How to feed `backbone`, from timm's data config; None for MNIST_CNN, which takes pixels in [0, 1]."""
    if backbone == "MNIST_CNN":
        return None
    known_backbone(backbone)
    known = timm.get_pretrained_cfg(backbone)
    config = timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
    return Preprocessing(image_size or config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))


def known_backbone(backbone: str) -> None:
    """UserError with the nearest names for a model that timm does not have."""
    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise UserError(f"timm has no model {backbone}{'; near names: ' + ', '.join(near) if near else ''}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        raise UserError(f"timm has no weights {tag} of {architecture}; it has: {', '.join(tags) or 'none'}")


def build_model(
    backbone: str,
    classes: int,
    channels: int,
    weights: str = "none",
    dropout: float = 0.0,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """A float model, images [N, channels, H, W] to logits [N, classes].

    Args:
        backbone: MNIST_CNN or a timm name.
        weights: `none` (random), `timm` (timm's pretrained ones, fetched if not cached), or a local .safetensors file
            with the architecture's keys; the head's tensors in it are dropped if it has another number of classes.
        dropout: before the head (timm's drop_rate).
    """
    if backbone == "MNIST_CNN":
        return MNIST_CNN(channels, classes)
    known_backbone(backbone)
    try:
        model: Any = timm.create_model(
            backbone, pretrained=weights == "timm", num_classes=classes, in_chans=channels, drop_rate=dropout
        )
    except Exception as error:
        if weights != "timm":
            raise
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot get timm's weights of {backbone} ({reason[0] if reason else type(error).__name__}): "
            "give a local file with --weights FILE.safetensors, or --weights none"
        ) from error
    head, trained_classes = model.get_classifier(), model.default_cfg["num_classes"]
    if isinstance(head, nn.Linear) and not (weights == "timm" and classes == trained_classes):
        # As in DomainBed. Some of timm's own heads start so large that fine-tuning first has to undo it.
        head.reset_parameters()
    if weights not in ("timm", "none"):
        load_weights(model, weights, log)
    return model


def load_weights(model: nn.Module, file: str, log: Callable[[str], None] = print) -> None:
    """Fill a timm model from a local safetensors file; whatever does not fit is a UserError, but for another head."""
    if not Path(file).is_file():
        raise UserError(f"--weights {file} is not a file (nor `timm` or `none`)")
    try:
        loaded = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"--weights {file} is not a safetensors file: {error}") from error
    own = model.state_dict()
    head = getattr(model, "default_cfg", {})["classifier"]
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    dropped = [k for k in loaded if k.startswith(heads) and k in own and loaded[k].shape != own[k].shape]
    for key in dropped:
        log(f"dropped {key} {list(loaded[key].shape)} of {Path(file).name}: this head is {list(own[key].shape)}")
        del loaded[key]
    problems = {
        "not in the model": [k for k in loaded if k not in own],
        "not in the file": [k for k in own if k not in loaded and k not in dropped],
        "of another shape": [k for k in loaded if k in own and loaded[k].shape != own[k].shape],
    }
    if any(problems.values()):
        named = [f"{what}: {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for what, keys in problems.items() if keys]
        raise UserError(f"--weights {file} does not fit {type(model).__name__}: {'; '.join(named)}")
    model.load_state_dict(loaded, strict=False)


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """model.train(), but with `freeze_bn` BatchNorm keeps its statistics; scale and bias are trained all the same."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
