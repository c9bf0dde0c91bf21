import pytest
import torch

from qtdog.config import TrainConfig
from qtdog.data import Preprocessing, load_dataset
from qtdog.data.images import AUGMENTATIONS
from qtdog.environment import cores, pick_workers
from qtdog.errors import UserError
from qtdog.methods.presets import settle
from qtdog.training.evaluation import domain_parts, evaluation_images

SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_only_domainbed_validates_on_augmented_source_images(pictures, augmentation):
    dataset = load_dataset("folder", str(pictures), SMALL)
    run = settle(TrainConfig(dataset="folder", augmentation=augmentation), test_env=1, seed=0)
    parts = domain_parts(run, dataset)
    for name, images in evaluation_images(run, dataset, parts, workers=0).items():
        seen = torch.cat([batch for batch, _ in images])
        plain = torch.equal(seen, parts[name].domain.images(parts[name].indices, augment=False))
        assert plain == (augmentation != "domainbed" or name.startswith("env1"))


def test_augmentation_is_not_for_digits():
    with pytest.raises(UserError, match="--augmentation has no meaning for MNIST_CNN"):
        settle(TrainConfig(augmentation="swad"), test_env=0, seed=0)


def test_jobs_share_the_cores_among_their_workers():
    assert pick_workers(10**6, reads_files=True) == cores()
    assert pick_workers(10**6, reads_files=True, jobs=2) == max(1, cores() // 2)
    assert pick_workers(None, reads_files=True, jobs=10**6) == 1
