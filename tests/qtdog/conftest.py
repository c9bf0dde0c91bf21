"""Fixtures on the data of tiny.py."""

import os

import pytest
import torch

from qtdog.cli import main
from tiny import DIGITS, make_digits, make_pictures

# Tiny networks gain nothing from a second thread, and threads that wait for each other suffer on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

RUNS = {"trained", "picture_runs", "gaqat"}  # fixtures that train


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """A test of a run waits for its training, which the first of them pays for."""
    for item in items:
        if RUNS & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "tints")


@pytest.fixture
def ray_cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="Ray is optional: pip install 'qtdog[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def trained(digits_dir, tmp_path_factory):
    """Output folder with ERM (seed 0) and QT-DoG (seeds 0 and 1), trained by the command line on the tiny digits."""
    output = tmp_path_factory.mktemp("trained")
    common = ["train", *DIGITS, "--data-dir", str(digits_dir), "--output-dir", str(output), "--steps", "9"]
    common += ["--checkpoint-freq", "2", "--eval-train-images", "8"]
    assert main([*common, "--method", "erm"]) == 0
    assert main([*common, "--switch-step", "4", "--seeds", "0", "1"]) == 0
    return output
