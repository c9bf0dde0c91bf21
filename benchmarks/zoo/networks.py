"""Which networks stand for all, and how each is built and fed."""

import timm
import torch
import torchvision
from torch import Tensor, nn

CLASSES = 7  # PACS has as many
SIZES = (64, 128, 224)  # of images, where a network takes any
SEEN = 8  # images, by batch norms: fewer leave variances near zero, which make much of rounding
TORCHVISION = "torchvision/"  # begins the names of its networks; the others are timm's
# What people begin with, where the smallest of its module is another.
WELL_KNOWN = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "resnetv2_50x1_bit",
    "regnety_008",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "convnext_tiny",
    "convnextv2_atto",
    "vit_small_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
    "mixer_s32_224",
    "torchvision/resnet50",
    "torchvision/resnext50_32x4d",
    "torchvision/swin_v2_t",
)


def smallest() -> list[str]:
    """The network with the fewest parameters of each module of timm and of torchvision, and the well-known ones."""
    parameters = {name: _parameters_of_timm(name) for name in timm.list_models(exclude_filters="test_*")}
    for own in torchvision.models.list_models(module=torchvision.models):
        (*_, weights) = torchvision.models.get_model_weights(own)
        parameters[TORCHVISION + own] = weights.meta["num_params"]
    of_each: dict[str, str] = {}
    for name in sorted(parameters, key=lambda name: (parameters[name], name)):
        of_each.setdefault(family(name), name)
    return list(dict.fromkeys([*of_each.values(), *WELL_KNOWN]))


def family(name: str) -> str:
    """The module that a network stands in."""
    own = name.removeprefix(TORCHVISION)
    entry = timm.models.model_entrypoint(name) if own == name else torchvision.models.get_model_builder(own)
    return ("" if own == name else "torchvision ") + str(entry.__module__).rpartition(".")[2]


def _parameters_of_timm(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def build(name: str) -> nn.Module:
    """One network in eval mode, with random weights."""
    own = name.removeprefix(TORCHVISION)
    if own == name:
        model: nn.Module = timm.create_model(name, num_classes=CLASSES)
    else:
        several = {"aux_logits": False, "init_weights": True} if own in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(own, num_classes=CLASSES, **several)
    with torch.no_grad():
        for p in model.parameters():
            if p.min() == p.max():  # zeros, as some heads and scales begin, would hide what comes before them
                p.add_(0.02 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def show(model: nn.Module, like: Tensor) -> None:
    """Let its batch norms see some images [N, ...] like these, so that activations keep their size."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all batches, which is one
    model.train()(torch.randn(SEEN, *like.shape[1:]))
    model.eval()


@torch.no_grad()
def images_of(model: nn.Module) -> Tensor:
    """Two images, of the least size that it takes.

    Raises:
        ValueError: if it takes none.
    """
    config = getattr(model, "pretrained_cfg", {})
    channels, *_, own = config.get("input_size", (3, 224, 224))
    least = config.get("min_input_size", (3, 1, 1))[-1]
    smaller = [] if config.get("fixed_input_size", False) else [size for size in SIZES if least <= size < own]
    for size in [*smaller, own]:
        images = torch.randn(2, channels, size, size)
        try:
            model(images)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        return images
    raise ValueError(f"it takes no images of {' or '.join(map(str, [*smaller, own]))} pixels")
