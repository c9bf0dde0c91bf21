"""Empirical risk minimization (Vapnik, 1998; the baseline of Gulrajani & Lopez-Paz, 2021)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtdog.methods.algorithms.loss import Loss, Minibatches


@dataclass
class ERM(Loss):
    """Mean cross-entropy over the minibatches of all source domains together, in nats."""

    def __call__(self, model: nn.Module, minibatches: Minibatches) -> Tensor:
        images = torch.cat([x for x, _ in minibatches])
        labels = torch.cat([y for _, y in minibatches])
        return F.cross_entropy(model(images).float(), labels)
