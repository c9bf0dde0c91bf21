"""`python -m benchmarks.accuracy` on a run that a test affords."""

import pytest

from benchmarks import accuracy
from qtdog.cli import main
from tiny import make_pictures


@pytest.mark.slow
def test_a_short_run(tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    pictures, runs = make_pictures(tmp_path / "tints"), tmp_path / "runs"
    train = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--test-envs", "0", "--device", "cpu"]
    train += ["--backbone", "resnet10t", "--weights", "none", "--image-size", "32", "--steps", "5", "--batch-size", "2"]
    assert main([*train, "--switch-step", "2", "--checkpoint-freq", "4", "--output-dir", str(runs)]) == 0
    (folder,) = (file.parent for file in runs.rglob("model.json"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["accuracy", str(folder), "--calibration", "8"])
    accuracy.main()
    header, _, *lines = capsys.readouterr().out.splitlines()[-6:]
    assert "sources, held out (8 images) | the same answer | targets (20 images)" in header
    names = ["as trained", "packed, integer", "ONNX Runtime, float32", "ONNX Runtime, int8"]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in names]
    assert lines[0].count("100.0%") >= 2 and lines[2].count("100.0%") >= 2
