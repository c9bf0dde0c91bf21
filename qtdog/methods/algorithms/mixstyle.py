"""MixStyle: images borrow the style of others, that is the mean and deviation of their feature maps (Zhou et al. 2021).

It acts after the last block at strides 4, 8 and 16, layers 1 to 3 of a ResNet (see `qtdog.models.style_layers`), while
the loss is computed and never in evaluation.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qtdog.methods.algorithms.erm import erm
from qtdog.models import style_layers


def mixstyle(
    model: nn.Module, minibatches: list[tuple[Tensor, Tensor]], *, mixstyle_p: float, mixstyle_alpha: float
) -> Tensor:
    """Mean cross-entropy of all source domains' images, their styles mixed.

    Args:
        model: a convolutional network, images [N, C, H, W] to logits [N, classes].
        minibatches: one (images float [B, C, H, W], labels int64 [B]) a source domain.
        mixstyle_p: probability, for each layer, that it mixes the styles of this minibatch.
        mixstyle_alpha: the share of its own style that an image keeps is drawn from Beta(alpha, alpha).

    Returns:
        A scalar in nats.
    """

    def mix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if torch.rand(()) >= mixstyle_p:
            return output
        share = torch.distributions.Beta(mixstyle_alpha, mixstyle_alpha).sample((len(output),))
        return mixed(output, torch.randperm(len(output)).to(output.device), share.to(output.device))

    with ExitStack() as hooks:
        for layer in style_layers(model):
            hooks.callback(layer.register_forward_hook(mix).remove)
        return erm(model, minibatches)


def mixed(x: Tensor, order: Tensor, share: Tensor) -> Tensor:
    """x, normalized for each image and channel, with the mixed style of image i and image order[i].

    Mean and deviation are constants for the gradient.

    Args:
        x: feature maps [N, C, H, W].
        order: int64 [N], a permutation.
        share: [N], of an image's own style.
    """
    with torch.no_grad():
        mean = x.mean((2, 3), keepdim=True)
        correction = int(x.shape[2] * x.shape[3] > 1)  # a single position has no unbiased variance
        deviation = (x.var((2, 3), correction=correction, keepdim=True) + 1e-6).sqrt()
        own = share.to(x.dtype)[:, None, None, None]
        new_mean = own * mean + (1 - own) * mean[order]
        new_deviation = own * deviation + (1 - own) * deviation[order]
    return (x - mean) / deviation * new_deviation + new_mean
