"""MixStyle: images borrow the style of others, that is the mean and deviation of their feature maps (Zhou et al. 2021).

It acts after the last block at strides 4, 8 and 16, layers 1 to 3 of a ResNet (see `qtdog.models.style_layers`), while
the loss is computed and never in evaluation.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qtdog.methods.algorithms.erm import ERM
from qtdog.methods.algorithms.loss import Minibatches
from qtdog.methods.numbers import number
from qtdog.models import style_layers


@dataclass
class MixStyle(ERM):
    """Mean cross-entropy of all source domains' images, in nats, their styles mixed. The network is convolutional."""

    least_images: ClassVar[int] = 2  # whose styles differ
    of_one_domain: ClassVar[str] = "mixes the styles within it"
    mixstyle_p: float = number(0.5, "probability that a layer mixes the styles of a minibatch", least=0, most=1)
    mixstyle_alpha: float = number(
        0.1, "the share of its own style that an image keeps is drawn from Beta(alpha, alpha)", least=1e-12
    )

    @property
    def same_as(self) -> str | None:
        return "erm" if self.mixstyle_p == 0 else None

    def __call__(self, model: nn.Module, minibatches: Minibatches) -> Tensor:
        def mix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if torch.rand(()) >= self.mixstyle_p:
                return output
            share = torch.distributions.Beta(self.mixstyle_alpha, self.mixstyle_alpha).sample((len(output),))
            return mixed(output, torch.randperm(len(output)).to(output.device), share.to(output.device))

        with ExitStack() as hooks:
            for layer in style_layers(model):
                hooks.callback(layer.register_forward_hook(mix).remove)
            return super().__call__(model, minibatches)


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
