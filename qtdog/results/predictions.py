"""What a model, or an ensemble of several, answers for images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qtdog.data.loaders import EvaluationImages
from qtdog.results import metrics

Combine = Literal["logits", "probs"]
MemberLogits = Callable[[Tensor], Tensor]  # images [N, C, H, W] to logits [members, N, classes]


@dataclass(frozen=True)
class Answers:
    """On the CPU.

    Args:
        log_probabilities: float64 [N, classes], of the ensemble.
        votes: int64 [members, N], each member's class.
    """

    log_probabilities: Tensor
    votes: Tensor

    @property
    def classes(self) -> Tensor:
        """int64 [N], what the ensemble decides."""
        return self.log_probabilities.argmax(1)

    @property
    def disagreement(self) -> Tensor:
        """float64 [N] in 0..1, the share of members that would have decided otherwise."""
        return (self.votes != self.classes).double().mean(0)


@dataclass(frozen=True)
class Predictions(Answers):
    """For images whose classes are known.

    Args:
        labels: int64 [N].
    """

    labels: Tensor

    @property
    def accuracy(self) -> float:
        """Share of correct decisions, in 0..1."""
        return (self.classes == self.labels).double().mean().item()

    @property
    def member_accuracies(self) -> list[float]:
        """Those of each member alone."""
        return (self.votes == self.labels).double().mean(1).tolist()

    def metrics(self) -> dict[str, float]:
        """See `qtdog.results.metrics.metrics`."""
        return metrics.metrics(self.log_probabilities, self.labels)


def combined(logits: Tensor, combine: Combine) -> Tensor:
    """Logarithms of the class probabilities of an ensemble.

    Args:
        logits: float [members, N, classes].
        combine: `logits` takes the softmax of their mean over the members (EoQ), `probs` the mean of the softmaxes.

    Returns:
        float64 [N, classes]: what is ordered by float32 logits stays so.
    """
    if combine == "logits":
        return logits.double().mean(0).log_softmax(-1)
    return logits.double().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def of_several(models: Sequence[nn.Module]) -> MemberLogits:
    """Models one after the other; one is an ensemble, too."""
    return lambda images: torch.stack([model(images) for model in models])


@torch.no_grad()
def answer(member_logits: MemberLogits, images: Tensor, device: torch.device, combine: Combine) -> Answers:
    """For a batch of images [N, C, H, W]; the modes of the models are the caller's."""
    logits = member_logits(images.to(device, memory_format=torch.channels_last)).float().cpu()
    return Answers(combined(logits, combine), logits.argmax(-1))


def predict_images(
    member_logits: MemberLogits, images: EvaluationImages, device: torch.device, combine: Combine = "logits"
) -> Predictions:
    """For all images of a part."""
    answers, labels = [], []
    for batch, its_labels in images:
        answers.append(answer(member_logits, batch, device, combine))
        labels.append(its_labels)
    log_probabilities = torch.cat([each.log_probabilities for each in answers])
    return Predictions(log_probabilities, torch.cat([each.votes for each in answers], 1), torch.cat(labels))
