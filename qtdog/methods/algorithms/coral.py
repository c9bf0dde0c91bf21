"""Deep CORAL: features whose mean and covariance are the same in all source domains (Sun & Saenko 2016)."""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtdog.models import head


def coral(model: nn.Module, minibatches: list[tuple[Tensor, Tensor]], *, coral_weight: float) -> Tensor:
    """Mean cross-entropy of the domains plus `coral_weight` times the mean `distance` over all pairs of domains.

    Args:
        model: maps images [N, C, H, W] to logits [N, classes]; its features are what its head takes.
        minibatches: one (images float [B, C, H, W], labels int64 [B]) a source domain, B at least 2.

    Returns:
        A scalar.
    """
    sizes = [len(y) for _, y in minibatches]
    features: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1).float()))
    try:
        logits = model(torch.cat([x for x, _ in minibatches]))
    finally:
        handle.remove()
    losses = [F.cross_entropy(z.float(), y) for z, (_, y) in zip(logits.split(sizes), minibatches, strict=True)]
    with torch.autocast(logits.device.type, enabled=False):  # a covariance is a matrix product, but not the network's
        pairs = [distance(a, b) for a, b in combinations(features[0].split(sizes), 2)]
    loss = torch.stack(losses).mean()
    return loss + coral_weight * torch.stack(pairs).mean() if pairs else loss


def distance(a: Tensor, b: Tensor) -> Tensor:
    """mean((mu_a - mu_b)^2) + mean((C_a - C_b)^2) of features [n, D], with unbiased covariances C [D, D]: 0-d."""
    return (a.mean(0) - b.mean(0)).square().mean() + (covariance(a) - covariance(b)).square().mean()


def covariance(x: Tensor) -> Tensor:
    """[D, D] of x [n, D]."""
    centered = x - x.mean(0)
    return centered.T @ centered / (len(x) - 1)
