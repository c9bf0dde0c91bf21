"""Runs that were never trained may have several targets."""

import pytest

import made_up_runs
from qtdog.config import RunConfig


@pytest.fixture(autouse=True)
def several_targets(monkeypatch):
    monkeypatch.setattr(RunConfig, "test_envs", property(made_up_runs.targets_of))
