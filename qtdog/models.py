"""Backbones: DomainBed's small CNN for digits, any timm model for photographs and drawings."""

import difflib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import timm.data
import timm.layers
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from qtdog.data import Preprocessing
from qtdog.data.modes import color_of
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


class SMALL_CNN(nn.Module):
    """A fortieth of MNIST_CNN's work, and it learns in fewer steps: images [N, C, 28, 28] to logits [N, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.block1 = halving(channels, 32)
        self.block2 = halving(32, 64)
        self.block3 = halving(64, 64)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(x)))
        return self.classifier(F.relu(self.hidden(x.flatten(1))))


def halving(channels: int, wide: int) -> nn.Sequential:
    """3x3 convolution with stride 2 to `wide` channels, batch norm, ReLU."""
    conv = nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(wide), relu=nn.ReLU()))


# Networks for the data sets of DIGITS: from (channels, classes).
DIGIT_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {"MNIST_CNN": MNIST_CNN, "SMALL_CNN": SMALL_CNN}


def preprocessing(backbone: str, image_size: int | None, background: str = "white") -> Preprocessing | None:
    """How to feed `backbone`, from timm's data config; None for DIGIT_NETWORKS, which take pixels in [0, 1]."""
    if backbone in DIGIT_NETWORKS:
        return None
    known_backbone(backbone)
    known = timm.get_pretrained_cfg(backbone)
    config = timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
    size, mean, std = image_size or config["input_size"][-1], tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(size, mean, std, color_of(background))


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
    image_size: int | None = None,
) -> nn.Module:
    """A float model, images [N, channels, H, W] to logits [N, classes].

    Args:
        backbone: one of DIGIT_NETWORKS or a timm name.
        weights: `none` (random), `timm` (timm's pretrained ones, fetched if not cached), or a local .safetensors file
            with the architecture's keys; the head's tensors in it are dropped if it has another number of classes.
        dropout: before the head (timm's drop_rate).
        image_size: of a backbone that fixes its input's size, as vision transformers do, whose position embedding is
            then resampled; None for timm's own. Others take any size.
    """
    if backbone in DIGIT_NETWORKS:
        return DIGIT_NETWORKS[backbone](channels, classes)
    known_backbone(backbone)
    known = timm.get_pretrained_cfg(backbone)
    size: dict[str, Any] = {"img_size": image_size} if image_size and known and known.fixed_input_size else {}
    try:
        model: Any = timm.create_model(
            backbone, pretrained=weights == "timm", num_classes=classes, in_chans=channels, drop_rate=dropout, **size
        )
    except Exception as error:
        if weights != "timm":
            raise
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot get timm's weights of {backbone} ({reason[0] if reason else type(error).__name__}): "
            "give a local file with --weights FILE.safetensors, or --weights none"
        ) from error
    classifier, trained_classes = head(model), model.default_cfg["num_classes"]
    if isinstance(classifier, nn.Linear) and not (weights == "timm" and classes == trained_classes):
        # As in DomainBed. Some of timm's own heads start so large that fine-tuning first has to undo it.
        classifier.reset_parameters()
    if weights not in ("timm", "none"):
        load_weights(model, weights, log)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def head(model: nn.Module) -> nn.Module:
    """The layer that turns features into logits; UserError for a plug-in's network that does not tell."""
    inner: Any = unwrapped(model)
    if isinstance(inner, (MNIST_CNN, SMALL_CNN)):
        return inner.classifier
    if not hasattr(inner, "get_classifier"):
        raise UserError("the network does not say which layer is its last: it needs get_classifier(), as timm's have")
    return inner.get_classifier()


def style_layers(model: nn.Module) -> list[nn.Module]:
    """Where MixStyle mixes: the last block at strides 4, 8 and 16 (a ResNet's layers 1-3); of DIGIT_NETWORKS the first.

    Raises:
        UserError: for a backbone without maps at these strides, such as a vision transformer.
    """
    inner: Any = unwrapped(model)
    if isinstance(inner, MNIST_CNN):
        return [inner.bn0, inner.bn1, inner.bn2]
    if isinstance(inner, SMALL_CNN):
        return [inner.block1, inner.block2, inner.block3]
    names = {stage["reduction"]: stage["module"] for stage in getattr(inner, "feature_info", [])}
    if not {4, 8, 16} <= names.keys():
        raise UserError(
            f"mixstyle needs a convolutional network with maps at strides 4, 8 and 16, not {type(inner).__name__}"
        )
    return [inner.get_submodule(names[stride]) for stride in (4, 8, 16)]


def head_names(model: nn.Module) -> list[str]:
    """The names of the layers that turn features into logits; none of a network that does not tell."""
    classifier = getattr(model, "default_cfg", {}).get("classifier")
    if classifier is not None:
        return [classifier] if isinstance(classifier, str) else list(classifier)
    try:
        last = head(model)
    except UserError:
        return []
    return [name for name, module in model.named_modules() if module is last]


def load_weights(model: nn.Module, file: str, log: Callable[[str], None] = print) -> None:
    """Fill a timm model from a local safetensors file; whatever does not fit is a UserError, but for another head."""
    if not Path(file).is_file():
        raise UserError(f"--weights {file} is neither a file nor the folder of a run (nor `timm` or `none`)")
    try:
        loaded = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"--weights {file} is not a safetensors file: {error}") from error
    fill(model, loaded, file, log)


def fill(model: nn.Module, loaded: dict[str, Tensor], file: str, log: Callable[[str], None] = print) -> None:
    """Fill a model with tensors by name, from `file`; whatever does not fit is a UserError, but for another head."""
    own = model.state_dict()
    heads = tuple(f"{name}." for name in head_names(model))
    dropped = [k for k in loaded if k.startswith(heads) and k in own and loaded[k].shape != own[k].shape]
    for key in dropped:
        log(f"dropped {key} {list(loaded[key].shape)} of {Path(file).name}: this head is {list(own[key].shape)}")
        del loaded[key]
    fit_positions(model, loaded)
    problems = {
        "not in the model": [k for k in loaded if k not in own],
        "not in the file": [k for k in own if k not in loaded and k not in dropped],
        "of another shape": [k for k in loaded if k in own and loaded[k].shape != own[k].shape],
    }
    if any(problems.values()):
        named = [f"{what}: {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for what, keys in problems.items() if keys]
        raise UserError(f"--weights {file} does not fit {type(model).__name__}: {'; '.join(named)}")
    model.load_state_dict(loaded, strict=False)


def fit_positions(model: nn.Module, loaded: dict[str, Tensor]) -> None:
    """Resample a vision transformer's position embedding [1, tokens, D] in `loaded` to the model's image size."""
    own, stored = getattr(model, "pos_embed", None), loaded.get("pos_embed")
    if own is None or stored is None or own.dim() != 3 or own.shape[1] == stored.shape[1]:
        return
    vit: Any = model
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    loaded["pos_embed"] = timm.layers.resample_abs_pos_embed(
        stored, vit.patch_embed.grid_size, num_prefix_tokens=prefix
    )


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """model.train(), but with `freeze_bn` BatchNorm keeps its statistics; scale and bias are trained all the same."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
