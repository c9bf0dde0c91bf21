"""ONNX Runtime beside a small network: the same answers, nearly the same from int8, and absent where it is not."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks import onnxruntime_peers, peers
from benchmarks.contest import Absent, difference


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def test_absent_where_a_package_is_missing(model, monkeypatch):
    monkeypatch.setattr(peers, "version_of", lambda package: None if package == "onnxscript" else "1")
    with pytest.raises(Absent, match="not installed"):
        onnxruntime_peers.float_session(model, torch.randn(1, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["AMX", "AVX2"])
@torch.no_grad()
def test_answers(model, instructions, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(onnxruntime_peers, "instructions", lambda: instructions)
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = model(images)
    x = images.contiguous()
    assert_close(onnxruntime_peers.float_session(model, images)(x), expected)
    for share_cores in (False, True):
        int8 = onnxruntime_peers.int8_session(model, images, torch.cat([images, -images]), share_cores)
        found = int8(x)
        assert difference(found, expected, 0.1) is None and (found != expected).any()
