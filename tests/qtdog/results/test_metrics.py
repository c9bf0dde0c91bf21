import csv
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from qtdog.analysis.pictures import save_picture
from qtdog.results import metric_plots
from qtdog.results import metrics as ours
from qtdog.results.predictions import Answers


def random_case(seed, n=200, classes=7, sharpness=3.0, absent=()):
    """Log-probabilities that often know the label, which is none of `absent`."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor([c for c in range(classes) if c not in absent])
    labels = kept[torch.randint(len(kept), (n,), generator=generator)]
    logits = sharpness * torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 2
    return logits.double().log_softmax(1), labels


def one_hot(predictions, classes):
    """Log-probabilities that are sure of `predictions`."""
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).double().log()


CASES = {
    "random": random_case(0),
    "unsure": random_case(1, sharpness=0.1),
    "absent classes": random_case(2, n=60, absent=(0, 3)),
    "predicted, but absent": (one_hot([0, 1, 2, 2], 4), torch.tensor([0, 0, 2, 2])),
    "never predicted": (one_hot([1, 1, 1], 3), torch.tensor([0, 1, 2])),
    "one image, right": (one_hot([2], 5), torch.tensor([2])),
    "one image, wrong": (torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([1])),
    "one class": (one_hot([0, 0], 1), torch.tensor([0, 0])),
    "ties": (torch.full((6, 3), 1 / 3).log(), torch.tensor([0, 1, 2, 0, 1, 2])),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_as_scikit_learn(case):
    log_probabilities, labels = case
    classes = range(log_probabilities.shape[1])
    true, predicted = labels.numpy(), log_probabilities.numpy().argmax(1)
    found = ours.metrics(log_probabilities, labels)
    assert list(found) == list(ours.NAMES) and all(type(value) is float for value in found.values())
    confusion = ours.confusion_matrix(log_probabilities, labels)
    assert (confusion.numpy() == sk.confusion_matrix(true, predicted, labels=classes)).all()
    assert found["acc"] == sk.accuracy_score(true, predicted)
    assert found["macro_acc"] == pytest.approx(sk.balanced_accuracy_score(true, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro", zero_division=0), abs=1e-12)
    scores = ours.class_scores(confusion)
    expected = sk.precision_recall_fscore_support(true, predicted, labels=classes, zero_division=0)
    for mine, theirs in zip((scores.precision, scores.recall, scores.f1, scores.support), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
    recalls = {c: np.mean(predicted[true == c] == c) for c in classes if (true == c).any()}
    assert found["worst_class_acc"] == pytest.approx(min(recalls.values()))
    assert ours.worst_class(confusion)[0] == min(recalls, key=recalls.get)


@pytest.mark.parametrize("name", ["random", "unsure", "absent classes"])
def test_likelihood_as_scikit_learn(name):
    log_probabilities, labels = CASES[name]
    expected = sk.log_loss(labels, log_probabilities.exp(), labels=range(log_probabilities.shape[1]))
    assert ours.metrics(log_probabilities, labels)["nll"] == pytest.approx(expected, rel=1e-9)


def test_likelihood_of_probabilities_that_underflow():
    logits = torch.tensor([[0.0, 2000.0], [0.0, 1000.0]])
    log_probabilities = logits.log_softmax(1)
    assert log_probabilities.exp()[0, 0] == 0
    assert ours.negative_log_likelihood(log_probabilities, torch.tensor([0, 1])) == 1000
    assert ours.metrics(one_hot([0], 2), torch.tensor([1]))["nll"] == math.inf


def numpy_ece(log_probabilities, labels, bins):
    """Guo et al.'s Eq. 3, a bin at a time."""
    probabilities = np.exp(log_probabilities.numpy().astype(np.float64))
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bins", [1, 3, 15])
def test_ece_as_numpy(case, bins):
    assert ours.reliability(*case, bins).ece == pytest.approx(numpy_ece(*case, bins), abs=1e-12)
    assert ours.metrics(*case)["ece"] == ours.reliability(*case, 15).ece


def test_bins_hold_their_upper_edge():
    probabilities = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.76, 0.24], [1.0, 0.0]], dtype=torch.float64)
    bins = ours.reliability(probabilities.log(), torch.tensor([0, 1, 0, 0]), bins=4)
    assert bins.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert bins.counts.tolist() == [0, 1, 1, 2]
    assert bins.accuracy.tolist() == [0, 1, 0, 1]
    assert bins.confidence.tolist() == pytest.approx([0, 0.5, 0.75, 0.88])
    assert bins.ece == pytest.approx((0.5 + 0.75 + 0.24) / 4)


def test_log_probabilities_a_little_above_zero():
    bins = ours.reliability(torch.tensor([[1e-7, -20.0]]), torch.tensor([0]))
    assert bins.counts[-1] == 1 and bins.ece == 0


def test_disagreement():
    together = torch.tensor([[2.0, 1], [2, 1], [1, 2]])
    members = torch.stack([together, together.flip(1), torch.tensor([[2.0, 1], [1, 2], [1, 2]])])
    answers = Answers(together, members.argmax(-1))
    assert answers.disagreement.tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3])


def test_risk_coverage_by_hand():
    doubt = torch.tensor([0.3, 0.1, 0.2, 0.4])
    curve = ours.risk_coverage(doubt, torch.tensor([False, True, True, True]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.accuracy.tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert curve.area == pytest.approx((1 / 3 + 1 / 4) / 4)
    assert curve.accuracy_at(0.5) == curve.accuracy_at(0.3) == 1 and curve.accuracy_at(1) == 0.75
    for coverage in (0, 1.01):
        with pytest.raises(ValueError, match="coverage"):
            curve.accuracy_at(coverage)


def test_shares_in_floating_point_keep_no_image_more():
    curve = ours.risk_coverage(torch.arange(10), torch.arange(10) < 3)
    assert [curve.accuracy_at(k / 10) for k in (1, 2, 3)] == [1, 1, 1] and curve.accuracy_at(0.31) == 0.75


def test_ties_are_the_mean_over_all_orders():
    doubt = [0.5, 0.5, 0.1, 0.5, 0.9]
    correct = [True, False, True, False, True]
    orders = []
    for order in itertools.permutations(range(5)):
        if all(doubt[a] <= doubt[b] for a, b in itertools.pairwise(order)):
            right = np.cumsum([correct[i] for i in order])
            orders.append(right / np.arange(1, 6))
        curve = ours.risk_coverage(torch.tensor(doubt)[list(order)], torch.tensor(correct)[list(order)])
        first = ours.risk_coverage(torch.tensor(doubt), torch.tensor(correct))
        assert torch.equal(curve.accuracy, first.accuracy)
    assert len(orders) == 6 and first.accuracy.tolist() == pytest.approx(np.mean(orders, 0).tolist())


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([-1, 0])),
    ],
)
def test_what_are_no_images_with_labels(scores, labels):
    with pytest.raises(ValueError, match=r"labels"):
        ours.metrics(scores, labels)


def test_what_is_no_doubt():
    for doubt, correct in ((torch.zeros(0), torch.zeros(0)), (torch.zeros(2), torch.zeros(3)),
                           (torch.tensor([math.nan]), torch.ones(1))):  # fmt: skip
        with pytest.raises(ValueError, match="doubt"):
            ours.risk_coverage(doubt, correct)


def test_pictures_and_their_numbers(tmp_path):
    log_probabilities, labels = CASES["absent classes"]
    bins, confusion = ours.reliability(log_probabilities, labels), ours.confusion_matrix(log_probabilities, labels)
    classes = [f"class {c}" for c in range(7)]
    figure = metric_plots.plot_reliability(bins, "sketch")
    assert f"ECE {100 * bins.ece:.1f} %" in figure.axes[0].get_title()
    assert [bar.get_height() for bar in figure.axes[1].patches] == bins.counts.tolist()
    table = save_picture(tmp_path / "bins.png", figure, metric_plots.reliability_csv(bins))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [int(row["images"]) for row in rows] == bins.counts.tolist() and len(rows) == 15
    assert rows[0]["accuracy"] == "" and float(rows[-1]["accuracy"]) == bins.accuracy[-1].item()

    figure = metric_plots.plot_confusion(confusion, classes)
    assert [text.get_text() for text in figure.axes[0].texts] == [str(n) for n in confusion.flatten().tolist()]
    table = save_picture(tmp_path / "confusion.svg", figure, metric_plots.confusion_csv(confusion, classes))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [[int(row[f"as {name}"]) for name in classes] for row in rows] == confusion.tolist()
    assert rows[0]["support"] == "0" and float(rows[1]["recall"]) == ours.class_scores(confusion).recall[1].item()
    many = metric_plots.plot_confusion(torch.eye(30, dtype=torch.int64), [str(c) for c in range(30)])
    assert not many.axes[0].texts
    assert (tmp_path / "bins.png").stat().st_size > 1000 and (tmp_path / "confusion.svg").stat().st_size > 1000
