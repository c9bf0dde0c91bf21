"""`qtdog ensemble` writes the packed file, `qtdog eval` judges it, `qtdog predict` uses it."""

import json
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import qkernels as qk
from qtdog.cli import main
from qtdog.files import read_records
from qtdog.results.runs import load_model
from tiny import ICON_STYLES, LITE0_WEIGHTS


@pytest.mark.slow
def test_the_packed_file_answers_as_the_trained_models(packed):
    ensemble = qk.PackedEnsemble.load(packed)
    models = [load_model(packed.parent.parent / f"trial0_seed{seed}") for seed in (0, 1)]
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack([model(images) for model in models])
    got = ensemble.member_logits(images)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert ensemble.info["classes"] == ["blue", "red"] and ensemble.info["targets"] == ["bright"]
    assert "| bright |" in (packed / "README.md").read_text()


def test_eval_gives_the_accuracies_of_the_ensemble(packed, pictures, capsys):
    assert main(["eval", str(packed), "--data-dir", str(pictures), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    (record,) = read_records(packed.parent / "results.jsonl")
    for name, env, part, role, count in (
        ("bright", 0, "in", "target", 16),
        ("dark", 1, "out", "source, held out", 4),
        ("middle", 2, "out", "source, held out", 4),
    ):
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1] == f"{100 * record[f'env{env}_{part}_acc']:.1f}"
        assert f"of {count:6} images" in line and role in line
    assert "2 members" in out and "float activations" in out


def test_predict(packed, pictures, capsys):
    images = [str(pictures / "dark" / label / "0.png") for label in ("blue", "red")]
    assert main(["predict", str(packed), *images, "--json", "--device", "cpu"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["image"] for record in records] == images
    for record in records:
        chances = list(record["classes"].values())
        assert set(record["classes"]) == {"blue", "red"} and sum(chances) == pytest.approx(1)
        assert chances == sorted(chances, reverse=True) and record["disagreement"] in (0, 0.5)
    assert main(["predict", str(packed), images[0], "--top", "1", "--device", "cpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(images[0]) and "(disagreement " in line and line.count(",") == 0


def test_predict_loses_nothing_before_a_broken_picture(packed, pictures, tmp_path, capsys):
    images = [str(path) for path in sorted((pictures / "dark").glob("*/*.png"))] * 2  # more than a batch
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    table = tmp_path / "answers.csv"
    assert main(["predict", str(packed), *images, str(broken), images[0], "--csv", str(table), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert f"cannot read the image {broken}" in told.err and len(told.out.splitlines()) == len(images) > 32
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["image", *images]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval"], "name a run, an ensemble, or a packed ensemble"),
        (["eval", "nowhere"], "nowhere is no run, ensemble or packed ensemble"),
        (["predict", "{packed}"], "name the images"),
        (["predict", "{packed}", "nothing.png"], "nothing.png is not a file"),
        (["predict", "{packed}", "{packed}/config.json"], "cannot read the image"),
    ],
)
def test_mistakes_are_named(packed, capsys, arguments, message):
    assert main([argument.format(packed=packed) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_preprocessing_says_so(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    qk.quantize_(model, qk.QConfig(last_layer="same"))
    qk.PackedEnsemble.from_models([model]).save(tmp_path)
    assert main(["predict", str(tmp_path), "x.png"]) == 2
    assert "does not say how images are prepared" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mse", "percentile", "max"])
def test_integer_activations(picture_runs, tmp_path, capsys, method):
    arguments = ["ensemble", str(picture_runs), "--integer", method, "--calibration-images", "12"]
    assert main([*arguments, "--output-dir", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("integer activations change the accuracy by") == 4 and "hand on codes" in out
    (record,) = read_records(next(tmp_path.rglob("results.jsonl")))
    assert record["integer"] == method and len(record["integer_change"]) == 4
    assert qk.PackedEnsemble.load(next(tmp_path.rglob("packed"))).integer


def test_integer_activations_need_quantized_members(float_runs, capsys):
    assert main(["ensemble", str(float_runs), "--integer", "mse", "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert "erm on RotatedMNIST, target 0, trial 0 is float: no integer activations" in told.out
    assert "no two quantized runs share" in told.err
    assert main(["ensemble", str(float_runs), "--device", "cpu"]) == 0
    assert not list(float_runs.rglob("packed"))


@pytest.mark.slow
def test_digits_are_predicted_too(trained, digits_dir, tmp_path, capsys):
    arguments = ["ensemble", str(trained), "--output-dir", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    (packed,) = tmp_path.rglob("packed")
    pixels = np.zeros((56, 56), np.uint8)
    pixels[20:24, 10:40] = 250
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    assert main(["eval", str(packed), "--data-dir", str(digits_dir), "--device", "cpu"]) == 0
    assert main(["predict", str(packed), str(tmp_path / "digit.png"), "--device", "cpu"]) == 0
    assert "digit.png" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not ICON_STYLES.exists(), reason="shared/data/icon_styles.zip is not here")
@pytest.mark.skipif(not LITE0_WEIGHTS.exists(), reason="shared/weights is not here")
def test_real_pictures_on_integers(tmp_path, capsys):
    """A short training of EfficientNet-Lite0 on some real drawings: 8-bit activations change little."""
    with zipfile.ZipFile(ICON_STYLES) as archive:
        taken: Counter[str] = Counter()
        for name in sorted(archive.namelist()):
            folder = name.rpartition("/")[0]
            if name.endswith(".png") and taken[folder] < 6:
                taken[folder] += 1
                archive.extract(name, tmp_path / "data")
    root = next(path.parent.parent.parent for path in sorted((tmp_path / "data").rglob("*.png")))
    train = ["train", "--dataset", "folder", "--data-dir", str(root), "--test-envs", "0", "--device", "cpu"]
    train += ["--backbone", "tf_efficientnet_lite0", "--weights", str(LITE0_WEIGHTS), "--image-size", "64"]
    train += ["--steps", "9", "--switch-step", "4", "--checkpoint-freq", "8", "--batch-size", "4", "--lr", "0.0005"]
    train += ["--seeds", "0", "1", "--eval-train-images", "8", "--output-dir", str(tmp_path / "runs")]
    assert main(train) == 0
    assert main(["ensemble", str(tmp_path / "runs"), "--integer", "mse", "--device", "cpu"]) == 0
    (record,) = read_records(next((tmp_path / "runs").rglob("trial0_ensemble/results.jsonl")))
    assert abs(record["integer_change"]["env0_in_acc"]) <= 0.05, capsys.readouterr().out
