"""The reliability diagram and the confusion matrix as pictures, each with its numbers as CSV."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from qtdog.files import csv_text
from qtdog.results.metrics import Reliability, class_scores

NUMBERS_UP_TO = 20  # classes; above that the numbers in the cells would overlap


def plot_reliability(bins: Reliability, title: str = "") -> Figure:
    """Accuracy by confidence, above how many images there are of each; on the diagonal, confidence is what it says."""
    figure = Figure(figsize=(4.8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, width = bins.edges[:-1].numpy(), bins.edges.diff().numpy()
    above.plot((0, 1), (0, 1), color="gray", linewidth=0.8, linestyle="--")
    above.bar(left, bins.accuracy.numpy(), width, align="edge", edgecolor="white")
    some = bins.counts > 0
    above.plot(bins.confidence[some].numpy(), bins.accuracy[some].numpy(), "o", color="C1", label="mean confidence")
    above.legend(fontsize="small")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), title=f"{title}  ECE {100 * bins.ece:.1f} %".strip())
    below.bar(left, bins.counts.numpy(), width, align="edge", edgecolor="white")
    below.set(xlabel="confidence", ylabel="images")
    return figure


def reliability_csv(bins: Reliability) -> str:
    """A line a bin; confidence and accuracy in 0..1, nothing for an empty bin."""
    lines = []
    for i, count in enumerate(bins.counts.tolist()):
        means = [bins.confidence[i].item(), bins.accuracy[i].item()] if count else ["", ""]
        lines.append([bins.edges[i].item(), bins.edges[i + 1].item(), count, *means])
    return csv_text(["above", "up_to", "images", "confidence", "accuracy"], lines)


def plot_confusion(confusion: Tensor, classes: Sequence[str], title: str = "") -> Figure:
    """What images of each class were taken for: the share of the row as a color, the number of images written in it."""
    size = len(classes)
    side = min(max(3.2, 0.45 * size), 24)
    figure = Figure(figsize=(side + 1.6, side + 0.8), layout="constrained")
    axis = figure.subplots()
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the class")
    axis.set_xticks(range(size), classes, rotation=90, fontsize="small")
    axis.set_yticks(range(size), classes, fontsize="small")
    axis.set(xlabel="predicted", ylabel="class", title=title)
    if size <= NUMBERS_UP_TO:
        for i, row in enumerate(confusion.tolist()):
            for j, count in enumerate(row):
                color = "white" if shares[i, j] > 0.5 else "black"
                axis.text(j, i, str(count), ha="center", va="center", color=color, fontsize="small")
    return figure


def confusion_csv(confusion: Tensor, classes: Sequence[str]) -> str:
    """A line a class: the images taken for each class, and its recall, precision, F1 and support."""
    scores = class_scores(confusion)
    columns = zip(scores.recall, scores.precision, scores.f1, scores.support, strict=True)
    lines = [
        [name, *row, *(value.item() for value in values)]
        for name, row, values in zip(classes, confusion.tolist(), columns, strict=True)
    ]
    header = ["class", *(f"as {name}" for name in classes), "recall", "precision", "f1", "support"]
    return csv_text(header, lines)
