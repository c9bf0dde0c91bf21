"""torchrun with two gloo processes: the run of one process, divided."""

import contextlib
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from qtdog.cli import main
from qtdog.results.runs import checkpoint_records


def torchrun(arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qtdog"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", ["1", "2"])
def test_two_processes_have_the_losses_of_one(pictures, tmp_path, pieces):
    """Augmented pictures, frozen BatchNorm, the switch to 4 bits at step 6; in pieces or not."""
    common = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--backbone", "test_resnet", "--weights",
              "none", "--image-size", "16", "--test-envs", "dark", "--device", "cpu", "--steps", "12",
              "--checkpoint-freq", "2", "--switch-step", "6", "--weight-bits", "4", "--batch-size", "4",
              "--num-workers", "0"]  # fmt: skip
    assert main([*common, "--output-dir", str(tmp_path / "one")]) == 0
    done = torchrun([*common, "--accumulate", pieces, "--output-dir", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / place / "tints" / "qtdog" / "dark" / "trial0_seed0" for place in ("one", "two"))
    assert done.stdout.count("QT-DoG on tints") == 1 and done.stdout.count("selected step") == 1  # the first one's
    rows = checkpoint_records(one), checkpoint_records(two)
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [0, 2, 4, 6, 8, 10, 11]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-4)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    weights = [torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-3)
    assert safetensors.torch.load_file(two / "model.safetensors").keys() == weights[0].keys()


def test_what_cannot_be_divided(digits_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    common = ["--data-dir", str(digits_dir), "--output-dir", str(tmp_path), "--test-envs", "0", "--device", "cpu"]
    monkeypatch.setattr("qtdog.distributed.processes", lambda device: contextlib.nullcontext())
    assert main(["train", *common, "--batch-size", "3"]) == 2
    assert "--batch-size 3 cannot be divided among 2 processes" in capsys.readouterr().err
    assert main(["train", *common, "--method", "coral", "--batch-size", "2"]) == 2
    assert "--batch-size must give each process at least 2 for CORAL" in capsys.readouterr().err
    assert main(["train", *common, "--jobs", "2"]) == 2
    assert "use one of them" in capsys.readouterr().err
    assert main(["sweep", *common]) == 2
    assert "without torchrun" in capsys.readouterr().err
