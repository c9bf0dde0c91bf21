"""Deep CORAL: features whose mean and covariance are the same in all source domains (Sun & Saenko 2016)."""

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtdog.errors import UserError
from qtdog.methods.algorithms.loss import Loss, Minibatches
from qtdog.methods.numbers import number
from qtdog.models import head


@dataclass
class CORAL(Loss):
    """Mean cross-entropy of the domains plus `coral_weight` times the mean `distance` over all pairs of domains.

    The features are what the model's head takes. Of one domain it would be cross-entropy alone, so that is refused.
    """

    least_domains: ClassVar[int] = 2  # a pair
    least_batch: ClassVar[int] = 2  # a covariance
    whole_minibatch: ClassVar[bool] = True  # the penalty is not linear in the images
    coral_weight: float = number(1.0, "weight of CORAL's penalty", least=0)

    @property
    def same_as(self) -> str | None:
        return "erm" if self.coral_weight == 0 else None

    def __call__(self, model: nn.Module, minibatches: Minibatches) -> Tensor:
        if len(minibatches) < self.least_domains:
            raise UserError("CORAL compares source domains: it needs two of them")
        sizes = [len(y) for _, y in minibatches]
        features: list[Tensor] = []
        handle = head(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1).float()))
        try:
            logits = model(torch.cat([x for x, _ in minibatches]))
        finally:
            handle.remove()
        losses = [F.cross_entropy(z.float(), y) for z, (_, y) in zip(logits.split(sizes), minibatches, strict=True)]
        with torch.autocast(logits.device.type, enabled=False):  # not a product of the network
            pairs = [distance(a, b) for a, b in combinations(features[0].split(sizes), 2)]
        return torch.stack(losses).mean() + self.coral_weight * torch.stack(pairs).mean()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """mean((mu_a - mu_b)^2) + mean((C_a - C_b)^2) of features [n, D], with unbiased covariances C [D, D]: 0-d."""
    return (a.mean(0) - b.mean(0)).square().mean() + (covariance(a) - covariance(b)).square().mean()


def covariance(x: Tensor) -> Tensor:
    """[D, D] of x [n, D]."""
    centered = x - x.mean(0)
    return centered.T @ centered / (len(x) - 1)
