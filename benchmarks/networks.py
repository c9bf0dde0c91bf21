"""The networks that are measured, as timm builds them, with random weights."""

from typing import Any

import timm
import torch
from torch import nn

CLASSES = 7  # PACS has as many


def trained_like(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """A float model in eval mode whose batch norms have seen images, so that activations keep their size.

    Args:
        options: further ones of timm's model.
    """
    torch.manual_seed(seed)
    if name.startswith("resnet"):
        options["zero_init_last"] = False
    model = timm.create_model(name, num_classes=CLASSES, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches, which is one
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def conv_weights(name: str) -> list[torch.Tensor]:
    """The weights of all convolutions and linear layers but the classifier."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [m.weight.detach() for m in layers[:-1]]
