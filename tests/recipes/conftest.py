"""Where recipes run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_cpu(tmp_path, monkeypatch):
    """In a folder of its own, and on the CPU, where sums have one order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
