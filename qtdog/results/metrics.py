"""How good predictions are, and how well their confidence tells it: pure functions of tensors, sums in float64.

What takes `scores` float [N, classes] needs their order within a row alone: probabilities, their logarithms or logits.
What takes log-probabilities wants `logits.double().log_softmax(1)`: probabilities that underflow have no logarithm, and
float32 makes equal what the logits tell apart.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ECE_BINS = 15  # Guo et al.'s number, and what papers compare by
NAMES = ("acc", "macro_acc", "macro_f1", "worst_class_acc", "nll", "ece")


def metrics(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The numbers of one part of a domain, as they stand in records: by NAMES.

    Args:
        log_probabilities: float [N, classes], natural logarithms.
        labels: int64 [N], 0 to classes - 1.

    Returns:
        `acc`, `macro_acc`, `macro_f1`, `worst_class_acc` and `ece` in 0..1, `nll` in nats.

    Raises:
        ValueError: for no images, other shapes, or a label that is no class.
    """
    confusion = confusion_matrix(log_probabilities, labels)
    values = (
        accuracy(confusion),
        macro_accuracy(confusion),
        macro_f1(confusion),
        worst_class(confusion)[1],
        negative_log_likelihood(log_probabilities, labels),
        reliability(log_probabilities, labels).ece,
    )
    return dict(zip(NAMES, values, strict=True))


def checked(scores: Tensor, labels: Tensor) -> None:
    """ValueError for what are no images with labels."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.numel():
        raise ValueError(f"{tuple(scores.shape)} scores and {tuple(labels.shape)} labels are not [N, classes] and [N]")
    least, greatest = labels.min().item(), labels.max().item()
    if least < 0 or greatest >= scores.shape[1]:
        raise ValueError(f"labels {least} to {greatest} are not 0 to {scores.shape[1] - 1}")


# Classes ---------------------------------------------------------------------------------------------------------


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class were taken for each class; of equal scores the first class is the prediction.

    Returns:
        int64 [classes, classes] on the CPU: rows are labels, columns predictions, as scikit-learn has it.
    """
    checked(scores, labels)
    classes = scores.shape[1]
    pairs = classes * labels.cpu() + scores.argmax(1).cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class ClassScores:
    """Of each class, [classes].

    Args:
        recall: float64, the share of its images that were recognized; 0 of a class without images.
        precision: float64, the share that is right of the images taken for it; 0 if none were.
        f1: float64, their harmonic mean, 2 tp / (2 tp + fp + fn); 0 of a class that neither occurs nor is predicted.
        support: int64, its images.
    """

    recall: Tensor
    precision: Tensor
    f1: Tensor
    support: Tensor


def class_scores(confusion: Tensor) -> ClassScores:
    """As scikit-learn's precision_recall_fscore_support(zero_division=0)."""
    right, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return part.double() / whole.clamp(min=1)

    return ClassScores(share(right, support), share(right, predicted), share(2 * right, support + predicted), support)


def accuracy(confusion: Tensor) -> float:
    """Share in 0..1 of the images that were recognized."""
    return confusion.diagonal().sum().item() / confusion.sum().item()


def macro_accuracy(confusion: Tensor) -> float:
    """Mean recall of the classes that occur, in 0..1: scikit-learn's balanced_accuracy_score."""
    scores = class_scores(confusion)
    return scores.recall[scores.support > 0].mean().item()


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 of the classes that occur among labels or predictions, in 0..1: scikit-learn's f1_score(average="macro").

    A class that is predicted but does not occur counts with an F1 of 0, one that is neither does not count.
    """
    present = (confusion.sum(0) + confusion.sum(1)) > 0
    return class_scores(confusion).f1[present].mean().item()


def worst_class(confusion: Tensor) -> tuple[int, float]:
    """The class with the smallest recall of those that occur, of equal ones the first, and its recall in 0..1."""
    scores = class_scores(confusion)
    recall = scores.recall.where(scores.support > 0, torch.inf)
    worst = int(recall.argmin())
    return worst, recall[worst].item()


# Probabilities ---------------------------------------------------------------------------------------------------


def negative_log_likelihood(log_probabilities: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats: the cross-entropy of the predictions."""
    checked(log_probabilities, labels)
    own = log_probabilities.gather(1, labels.to(log_probabilities.device)[:, None])
    return -own.double().mean().item()


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability diagram (Niculescu-Mizil and Caruana 2005), by the confidence in the predicted class.

    Args:
        edges: float64 [bins + 1]; bin i holds edges[i] < confidence <= edges[i + 1], the first also 0.
        counts: int64 [bins], images in each.
        confidence: float64 [bins], their mean confidence; 0 of an empty bin.
        accuracy: float64 [bins], the share of them that is right; 0 of an empty bin.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al. 2017, Eq. 3): |accuracy - confidence|, mean over the images."""
        gaps = (self.accuracy - self.confidence).abs()
        return ((self.counts * gaps).sum() / self.counts.sum()).item()


def reliability(log_probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> Reliability:
    """Images in `bins` bins of equal width by the greatest probability."""
    confidence, correct = predicted(log_probabilities, labels)
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    place = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(place, minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(place, values.double(), bins) / counts.clamp(min=1)

    return Reliability(edges, counts, mean(confidence), mean(correct))


def predicted(log_probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence in the predicted class, float64 [N] in 0..1, and whether it is right, bool [N]; on the CPU."""
    checked(log_probabilities, labels)
    greatest, prediction = log_probabilities.max(1)
    return greatest.double().exp().clamp(max=1).cpu(), prediction.cpu() == labels.cpu()


# Doubt -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RiskCoverage:
    """How accurate the decisions are that are left when the most doubtful are not taken (El-Yaniv and Wiener 2010).

    Args:
        coverage: float64 [N], 1/N to 1: the share of the images that are kept.
        accuracy: float64 [N], the selective accuracy, in 0..1; 1 - accuracy is the risk.
    """

    coverage: Tensor
    accuracy: Tensor

    @property
    def area(self) -> float:
        """Below the risk-coverage curve, in 0..1, less is better: the mean risk (AURC, Geifman et al. 2019)."""
        return (1 - self.accuracy).mean().item()

    def accuracy_at(self, coverage: float) -> float:
        """Selective accuracy of the smallest number of images that is at least this share, in 0..1."""
        if not 0 < coverage <= 1:
            raise ValueError(f"a coverage lies above 0 and is at most 1, not {coverage}")
        kept = math.ceil(coverage * len(self.accuracy) - 1e-9)  # .3 of 10 images are 3, also in floating point
        return self.accuracy[max(kept, 1) - 1].item()


def risk_coverage(doubt: Tensor, correct: Tensor) -> RiskCoverage:
    """The curve of decisions by how doubtful they are: 1 - confidence, or an ensemble's disagreement.

    Equally doubtful images have no order. Where only a part of them is kept, the curve has the mean over all the parts
    that it could be, so that it does not depend on the order in which images come.

    Args:
        doubt: float [N].
        correct: bool [N].

    Raises:
        ValueError: for no images, other shapes, or a doubt that is not a number.
    """
    if doubt.ndim != 1 or doubt.shape != correct.shape or not len(doubt) or doubt.isnan().any():
        raise ValueError(f"doubt {tuple(doubt.shape)} and correct {tuple(correct.shape)} are not numbers [N] and [N]")
    _, group, sizes = doubt.cpu().unique(return_inverse=True, return_counts=True)  # in ascending order
    share_right = torch.bincount(group, correct.cpu().double()) / sizes
    kept = torch.arange(1, len(doubt) + 1, dtype=torch.float64)
    return RiskCoverage(kept / len(doubt), share_right.repeat_interleave(sizes).cumsum(0) / kept)
