"""Trained pictures, for the commands that use trained models."""

import json
import shutil

import pytest

from qtdog.cli import main
from tiny import write_card


@pytest.fixture(scope="session")
def picture_runs(pictures, tmp_path_factory):
    """Two QT-DoG runs on the tints, target `bright`."""
    output = tmp_path_factory.mktemp("tints") / "runs"
    train = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--test-envs", "0", "--device", "cpu"]
    train += ["--backbone", "resnet10t", "--weights", "none", "--image-size", "32", "--steps", "9", "--batch-size", "2"]
    train += ["--switch-step", "3", "--checkpoint-freq", "4", "--seeds", "0", "1", "--output-dir", str(output)]
    assert main(train) == 0
    return output


@pytest.fixture(scope="session")
def packed(picture_runs):
    assert main(["ensemble", str(picture_runs), "--device", "cpu"]) == 0
    (folder,) = picture_runs.rglob("packed")
    return folder


@pytest.fixture
def float_runs(trained, tmp_path):
    """Two runs of ERM on digits, the second a copy with another seed."""
    runs = shutil.copytree(trained / "RotatedMNIST" / "erm", tmp_path / "erm")
    (first,) = runs.rglob("trial0_seed0")
    second = shutil.copytree(first, first.parent / "trial0_seed1")
    card = json.loads((second / "model.json").read_text())
    card["config"]["seed"] = 1
    write_card(second, card)
    return runs
