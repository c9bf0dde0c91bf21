import pytest
import torch

from qtdog.data import Preprocessing, TensorDomain, load_dataset
from qtdog.data.loaders import (
    EvaluationImages,
    Minibatches,
    Part,
    balanced_likelihoods,
    fits_in_memory,
    training_batches,
)
from qtdog.errors import UserError
from tiny import make_pictures

SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def parts(pictures):
    dataset = load_dataset("folder", str(pictures), SMALL)
    return [Part(domain, env, list(range(2, 17))) for env, domain in enumerate(dataset.domains)]


def same(one, two):
    pairs = [(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.mark.slow
def test_batches_depend_on_nothing_but_seed_domain_and_step(parts):
    whole = list(training_batches(parts, 4, seed=0, start=0, stop=6, workers=0))
    assert len(whole) == 6 and len(whole[0]) == 3 and whole[0][0][0].shape == (4, 3, 16, 16)
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        assert same(whole, training_batches(parts, 4, seed=0, start=0, stop=6, workers=workers))
    assert same(whole[4:], training_batches(parts, 4, seed=0, start=4, stop=6, workers=2))
    assert same([w[1:] for w in whole], training_batches(parts[1:], 4, seed=0, start=0, stop=6, workers=0))
    assert not same(whole, training_batches(parts, 4, seed=1, start=0, stop=6, workers=0))
    assert not same(whole[:1], whole[1:2])


def test_callers_random_state_is_untouched(parts):
    before = torch.get_rng_state()
    list(training_batches(parts, 4, seed=0, start=0, stop=2, workers=0))
    list(training_batches(parts, 4, seed=0, start=0, stop=2, workers=1))
    list(EvaluationImages(parts[0], workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_drawn_with_replacement_from_the_part_only(parts):
    part = parts[0]
    images, labels = Minibatches([part], 200, seed=0).minibatch(part, step=0)
    plain = part.domain.images(part.indices, augment=False)
    assert len(images) == 200 and labels.bincount().min() > 60
    assert images.flatten(1).unique(dim=0).shape[0] > len(plain)  # augmented: more pictures than originals


def test_balanced_minibatches_have_every_class_that_occurs_alike():
    """Of 90, 9 and 1 images, and a class that does not occur: a third each, and of a class every image alike."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    domain = TensorDomain("one", torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1), labels)
    part = Part(domain, 0, list(range(99, -1, -1)))
    drawn = Minibatches([part], 30000, seed=0, augment=False, balanced=True)
    images, classes = drawn.minibatch(part, step=0)
    numbers = (images.flatten() * 255).round().long()
    assert torch.equal(labels[numbers], classes)
    shares = classes.bincount(minlength=4) / 30000
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]), atol=0.015, rtol=0)
    counts = numbers.bincount(minlength=100)
    assert counts[:90].min() > 60 and counts[:90].max() < 170 and counts[90:99].min() > 950
    again = [Minibatches([part], 64, 0, False, share, True).minibatch(part, 3)[1] for share in ((0, 2), (1, 2), (0, 1))]
    assert torch.equal(torch.stack(again[:2], 1).flatten(), again[2])
    assert torch.equal(balanced_likelihoods(torch.tensor([5, 7, 7, 5])), torch.full((4,), 0.25, dtype=torch.float64))
    uniform = Minibatches([part], 300, seed=0, augment=False).minibatch(part, step=0)[1]
    assert uniform.bincount()[0] > 240


def test_evaluation_images_are_plain_in_order_and_kept(parts):
    part = parts[0]
    images = EvaluationImages(part, workers=1, keep=True)
    first = list(images)
    assert torch.equal(torch.cat([x for x, _ in first]), part.domain.images(part.indices, augment=False))
    assert torch.equal(torch.cat([y for _, y in first]), part.domain.labels[part.indices])
    assert [x.data_ptr() for x, _ in images] == [x.data_ptr() for x in images.kept]
    assert not EvaluationImages(part).kept


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_reaches_the_user_in_one_line(tmp_path, workers):
    root = make_pictures(tmp_path / "set", 2)
    (root / "dark" / "red" / "1.png").write_bytes(b"broken")
    dark = load_dataset("folder", str(root), SMALL).domains[1]
    part = Part(dark, 1, [0, 1, 2, 3])
    for read in (
        lambda: list(EvaluationImages(part, workers)),
        lambda: list(training_batches([part], 16, seed=0, start=0, stop=1, workers=workers)),
    ):
        with pytest.raises(UserError, match=r"cannot read the image .*1\.png") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("augment", [True, False])
def test_shares_of_processes_are_the_minibatch_of_one(parts, augment):
    whole, first, second = (
        next(training_batches(parts, 6, seed=0, start=3, stop=4, workers=0, augment=augment, share=share))
        for share in ((0, 1), (0, 2), (1, 2))
    )
    for (images, labels), one, two in zip(whole, first, second, strict=True):
        assert torch.equal(images[::2], one[0]) and torch.equal(images[1::2], two[0])
        assert torch.equal(labels[::2], one[1]) and torch.equal(labels[1::2], two[1])


def test_training_without_augmentation(parts):
    (batch,) = training_batches(parts[:1], 8, seed=0, start=0, stop=1, workers=0, augment=False)
    plain = parts[0].domain.images(parts[0].indices, augment=False)
    assert all((plain == image).flatten(1).all(1).any() for image in batch[0][0])


def test_augmented_evaluation_is_the_same_at_every_pass(parts):
    plain = torch.cat([x for x, _ in EvaluationImages(parts[0])])
    for workers in (0, 1):
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        first = torch.cat([x for x, _ in EvaluationImages(parts[0], workers, augment=True)])
        assert torch.equal(before, torch.get_rng_state()) and not torch.equal(first, plain)
        assert torch.equal(first, torch.cat([x for x, _ in EvaluationImages(parts[0], augment=True)]))


def test_cache_limit():
    assert fits_in_memory(1000, (3, 224, 224)) and not fits_in_memory(10_000, (3, 224, 224))
