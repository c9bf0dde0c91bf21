"""Empirical risk minimization (Vapnik, 1998; the baseline of Gulrajani & Lopez-Paz, 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def erm(model: nn.Module, minibatches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean cross-entropy over the minibatches of all source domains together.

    Args:
        model: maps images [N, C, H, W] to logits [N, classes].
        minibatches: one (images float [B, C, H, W], labels int64 [B]) a source domain.

    Returns:
        A scalar in nats.
    """
    images = torch.cat([x for x, _ in minibatches])
    labels = torch.cat([y for _, y in minibatches])
    return F.cross_entropy(model(images).float(), labels)
