"""Runs that start from the selected model of another run, and minibatches in pieces."""

import re
import shutil

import pytest
import safetensors.torch
import torch

from qtdog import load_model
from qtdog.cli import main
from qtdog.data.image_lists import ImageList
from qtdog.files import read_records
from qtdog.training import sweep
from tiny import DIGITS

SHORT = ["--steps", "3", "--checkpoint-freq", "2", "--eval-train-images", "2"]


def train(digits_dir, output, *more):
    return main(["train", *DIGITS, *SHORT, "--data-dir", str(digits_dir), "--output-dir", str(output), *more])


def folder_of(output, method, dataset="RotatedMNIST", target="0"):
    return output / dataset / method / target / "trial0_seed0"


def first_weights(monkeypatch):
    """The state dicts of the models that runs begin with."""
    from qtdog.training import trainer

    seen, prepare = [], trainer.qk.packed_nbytes

    def watched(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return prepare(model)

    monkeypatch.setattr(trainer.qk, "packed_nbytes", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("erm", []),
        ("qtdog", ["--switch-step", "1"]),
        ("lsq", []),
        ("qtdog-inq", ["--switch-step", "0", "--steps", "4"]),
        ("sma", ["--average-start", "1"]),
    ],
)
def test_the_latent_weights_of_any_run(digits_dir, tmp_path, monkeypatch, method, more):
    assert train(digits_dir, tmp_path / "first", "--method", method, *more) == 0
    source = folder_of(tmp_path / "first", method)
    stored = safetensors.torch.load_file(source / "model.safetensors")
    seen = first_weights(monkeypatch)
    start = ["--method", "qtdog", "--switch-step", "1", "--weights", str(source)]
    assert train(digits_dir, tmp_path / "second", *start) == 0
    assert seen[0].keys() == {n for n in stored if n.endswith((".weight", ".bias"))}
    assert all(torch.equal(value, stored[name]) for name, value in seen[0].items())
    folder = folder_of(tmp_path / "second", "qtdog")
    assert f"weights of {source}: " in (log := (folder / "out.txt").read_text())
    assert ("without its quantization scales" in log) == (method not in ("erm", "sma"))
    assert load_model(folder)(torch.rand(1, 1, 28, 28)).isfinite().all()
    assert read_records(folder / "results.jsonl")[-1]["hparams"]["weights"] == str(source)


@pytest.mark.slow
def test_another_target_or_network(digits_dir, tmp_path, capsys):
    assert train(digits_dir, tmp_path / "first", "--method", "erm", "--backbone", "SMALL_CNN") == 0
    source = folder_of(tmp_path / "first", "erm")
    start = ["--method", "erm", "--weights", str(source)]
    assert train(digits_dir, tmp_path / "other", *start) == 2
    assert "are of a SMALL_CNN, not of a MNIST_CNN: give --backbone SMALL_CNN" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    small = [*start, "--backbone", "SMALL_CNN"]
    assert train(digits_dir, tmp_path / "other", *small, "--dataset", "ColoredMNIST") == 2  # two channels
    assert "does not fit SMALL_CNN: of another shape: block1.conv.weight" in capsys.readouterr().err
    assert train(digits_dir, tmp_path / "other", *small, "--test-envs", "15") == 2
    assert "was trained on 16 images of the target 15 (15/" in capsys.readouterr().err
    assert train(digits_dir, tmp_path / "first", *small, "--overwrite") == 2
    assert "is where this run goes" in capsys.readouterr().err and (source / "done").exists()
    assert train(digits_dir, tmp_path / "other", "--method", "erm", "--weights", str(tmp_path)) == 2
    assert "is not the folder of a finished run" in capsys.readouterr().err
    assert train(digits_dir, tmp_path / "other", "--method", "erm", "--weights", "missing") == 2
    assert "--weights has no meaning for MNIST_CNN, but for the folder of a finished run" in capsys.readouterr().err
    arguments = {"datasets": ["RotatedMNIST"], "data_dir": str(digits_dir), "weights": str(source)}
    with pytest.raises(sweep.UserError, match="are of a SMALL_CNN"):
        sweep.jobs_of(sweep.SweepConfig(**arguments))


@pytest.mark.slow
def test_what_was_trained_on_before_is_known(digits_dir, tmp_path, capsys):
    """Of another split: what this run holds out the first one may have been trained on."""
    small = ["--method", "erm", "--backbone", "SMALL_CNN"]
    assert train(digits_dir, tmp_path / "first", *small, "--trial-seed", "1") == 0
    (first,) = (path.parent for path in (tmp_path / "first").rglob("done"))
    assert train(digits_dir, tmp_path / "second", *small, "--weights", str(first)) == 0
    assert train(digits_dir, tmp_path / "third", *small, "--weights", str(folder_of(tmp_path / "second", "erm"))) == 0
    third = folder_of(tmp_path / "third", "erm")
    before = {i.fingerprint for i in ImageList.read(first).images if i.part == "in" and i.domain != "0"}
    held_out = [i for i in ImageList.read(third).images if i.part == "out" and i.domain != "0"]
    left = sum(i.fingerprint not in before for i in held_out)
    assert (
        0 < left < len(held_out)
        and f"{len(held_out) - left} image(s) of the validation parts" in (third / "out.txt").read_text()
    )
    capsys.readouterr()
    assert main(["eval", str(third), "--device", "cpu"]) == 0
    counts = re.findall(r"of +(\d+) images  \(source, held out\)", capsys.readouterr().out)
    assert sum(map(int, counts)) == left


@pytest.mark.slow
def test_the_head_begins_anew_for_other_classes(pictures, tmp_path, monkeypatch):
    pictures = shutil.copytree(pictures, tmp_path / "pictures")
    common = ["train", "--dataset", "folder", "--backbone", "test_resnet", "--image-size", "16", "--test-envs", "dark",
              "--device", "cpu", *SHORT, "--method", "erm", "--batch-size", "2", "--num-workers", "0"]  # fmt: skip
    assert main([*common, "--data-dir", str(pictures), "--weights", "none", "--output-dir", str(tmp_path / "one")]) == 0
    (source,) = (path.parent for path in (tmp_path / "one").rglob("done"))
    for domain in pictures.iterdir():
        (domain / "green").mkdir()
        for file in (domain / "red").iterdir():
            (domain / "green" / file.name).write_bytes(file.read_bytes())
    seen = first_weights(monkeypatch)
    second = [*common, "--data-dir", str(pictures), "--weights", str(source), "--output-dir", str(tmp_path / "two")]
    assert main(second) == 0
    stored = safetensors.torch.load_file(source / "model.safetensors")
    assert seen[0]["fc.weight"].shape[0] == 3 and stored["fc.weight"].shape[0] == 2
    assert all(torch.equal(value, stored[name]) for name, value in seen[0].items() if not name.startswith("fc."))
    assert "dropped fc.weight" in next((tmp_path / "two").rglob("out.txt")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["erm", "sagm"])
def test_pieces_have_the_losses_of_the_whole(digits_dir, tmp_path, method):
    common = ["--method", method, "--batch-size", "4", "--steps", "4", "--checkpoint-freq", "1"]
    for pieces in ("1", "2", "4"):
        assert train(digits_dir, tmp_path / pieces, *common, "--accumulate", pieces) == 0
    losses = [
        [row["loss"] for row in read_records(folder_of(tmp_path / pieces, method) / "results.jsonl")]
        for pieces in ("1", "2", "4")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] != losses[0]
