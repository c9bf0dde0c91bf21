import csv
import json
import shutil

import pytest
import torch

import qkernels as qk
from qtdog.analysis.diagnostics import HISTORIES, accuracy_points
from qtdog.cli import main
from qtdog.errors import UserError
from qtdog.results.runs import read_card
from tiny import DIGITS, write_card


def read(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def gaqat(digits_dir, tmp_path_factory):
    """A GAQAT run of 8 steps with two windows of disorder and checkpoints at 0, 3, 6 and 7."""
    output = tmp_path_factory.mktemp("gaqat")
    arguments = ["train", *DIGITS, "--data-dir", str(digits_dir), "--output-dir", str(output), "--method", "gaqat"]
    arguments += ["--steps", "8", "--checkpoint-freq", "3", "--disorder-window", "4", "--eval-train-images", "4"]
    assert main(arguments) == 0
    return output / "RotatedMNIST" / "gaqat" / "0" / "trial0_seed0"


@pytest.mark.slow
def test_disorder_and_scales_by_layer(gaqat, tmp_path, capsys):
    assert main(["diagnostics", str(gaqat), "--output-dir", str(tmp_path)]) == 0
    names = {"disorder.csv", "disorder.png", "scales.csv", "scales.png", "bits.csv", "bits.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    layers = ["conv1", "conv2", "conv3", "conv4", "classifier"]
    scales = [f"{layer}.{kind}" for layer in layers for kind in ("weight_scale", "act_scale")]

    disorder = read(tmp_path / "disorder.csv")
    assert [(row["step"], row["scale"]) for row in disorder] == [(step, s) for step in ("4", "8") for s in scales]
    assert {row["method"] for row in disorder} == {"GAQAT 4/4 bit trial 0 seed 0"}
    recorded = read(gaqat / "disorder.csv")
    assert [float(row["disorder"]) for row in disorder] == [float(row["disorder"]) for row in recorded]
    assert [float(row["frozen"]) for row in disorder] == [float(row["frozen"]) for row in recorded]

    rows = read(tmp_path / "scales.csv")
    assert [(row["step"], row["scale"]) for row in rows] == [(t, s) for t in ("0", "3", "6", "7") for s in scales]
    last = torch.load(gaqat / "checkpoint.pt", weights_only=True)["model"]
    first = {row["scale"]: float(row["mean"]) for row in rows if row["step"] == "0"}
    for row in rows:
        assert float(row["relative"]) == pytest.approx(float(row["mean"]) / first[row["scale"]])
        if row["step"] == "7":
            scale = last[row["scale"]].abs()
            expected = [scale.mean().item(), scale.min().item(), scale.max().item()]
            assert [float(row[name]) for name in ("mean", "least", "greatest")] == pytest.approx(expected)


def test_what_runs_do_not_have_is_said(trained, tmp_path, capsys):
    arguments = ["diagnostics", str(trained / "RotatedMNIST" / "erm"), "--format", "svg"]
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no plot of disorder: no run of GAQAT" in out and "no plot of scales: no run" in out
    assert {path.name for path in tmp_path.iterdir()} == {"bits.csv", "bits.svg"}


@pytest.mark.parametrize("layers", [6, 7])
def test_many_layers_are_told_apart_by_color(gaqat, layers):
    names = [f"layer{i}.{kind}" for i in range(layers) for kind in ("weight_scale", "act_scale")]
    rows = [[step, name, 0.5, 0.0] for step in (4, 8) for name in names]
    figure = HISTORIES["disorder"].plot({gaqat: rows}, {gaqat: read_card(gaqat)})
    panel, *colorbar = figure.axes
    assert len(panel.lines) == 2 * layers + 1
    assert len(colorbar) == (layers == 7) and (panel.get_legend() is None) == (layers == 7)


def copy_of(run, place, bits, accuracy, **settings):
    """A run folder with other bits, target accuracy and settings in its card."""
    shutil.copytree(run, place)
    card = json.loads((place / "model.json").read_text())
    card["quantization"] = qk.QConfig(weight_bits=bits).to_dict()
    card["nbytes"] = 1000 * bits
    card["target"] = settings.pop("target", card["target"])
    card["source_validation_accuracy"] = settings.pop("validation", 0.5)
    card["config"]["quantization"] |= {"weight_bits": bits, "qat_mode": settings.pop("qat_mode", "qat")}
    card["config"].update(settings)
    (env,) = card["config"]["test_envs"]
    card["accuracies"][f"env{env}_in_acc"] = accuracy
    write_card(place, card)
    return place


@pytest.mark.slow
def test_accuracy_against_bits_and_size(trained, tmp_path, capsys):
    run = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0"
    copy_of(run, tmp_path / "runs" / "a", 4, 0.5)
    copy_of(run, tmp_path / "runs" / "b", 4, 0.7, seed=1)  # trial 0: 60 %
    copy_of(run, tmp_path / "runs" / "c", 4, 0.8, trial_seed=1)  # trial 1: 80 %
    copy_of(run, tmp_path / "runs" / "d", 3, 0.4)
    erm = trained / "RotatedMNIST" / "erm"
    assert main(["diagnostics", str(erm), str(tmp_path / "runs"), "--output-dir", str(tmp_path / "plots")]) == 0
    rows = read(tmp_path / "plots" / "bits.csv")
    assert [(row["method"], row["weight_bits"]) for row in rows] == [("ERM", "32"), ("QT-DoG", "3"), ("QT-DoG", "4")]
    assert [(row["trials"], row["stderr"]) for row in rows[:2]] == [("1", ""), ("1", "")]
    assert float(rows[1]["accuracy"]) == pytest.approx(40)
    # Trials of 60 and 80 %: population std 10, over sqrt(2).
    assert float(rows[2]["accuracy"]) == pytest.approx(70) and float(rows[2]["stderr"]) == pytest.approx(10 / 2**0.5)
    assert rows[2]["nbytes"] == "4000.0" and float(rows[0]["size"]) == 1
    assert float(rows[2]["size"]) == pytest.approx(4000 / float(rows[0]["nbytes"]))


def test_trials_without_all_targets_do_not_count(trained, tmp_path):
    run, told = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0", []
    folders = [
        copy_of(run, tmp_path / "a", 4, 0.5),
        copy_of(run, tmp_path / "b", 4, 0.7, target="15", test_envs=[1]),
        copy_of(run, tmp_path / "c", 4, 0.9, trial_seed=1),
        copy_of(run, tmp_path / "d", 3, 0.9),
    ]
    (point,) = accuracy_points({folder: read_card(folder) for folder in folders}, told.append)
    assert (point.weight_bits, point.targets, point.trials, point.accuracy) == (4, 2, 1, pytest.approx(60))
    assert len(told) == 1 and "QT-DoG at 3 bit" in told[0] and "['0', '15']" in told[0]


def test_of_several_hyper_parameters_the_validated_ones_count(trained, tmp_path):
    run = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0"
    folders = [
        copy_of(run, tmp_path / "a", 4, 0.5, validation=0.6),
        copy_of(run, tmp_path / "b", 4, 0.7, validation=0.4, hparams_seed=1),
    ]
    (point,) = accuracy_points({folder: read_card(folder) for folder in folders}, print)
    assert point.accuracy == pytest.approx(50)
    folders.append(copy_of(run, tmp_path / "c", 4, 0.5, validation=0.3, qat_mode="rtn-frozen"))
    points = accuracy_points({folder: read_card(folder) for folder in folders}, print)
    assert [point.method for point in points] == ["QT-DoG, qat-mode qat", "QT-DoG, qat-mode rtn-frozen"]
    folders.append(copy_of(run, tmp_path / "d", 4, 0.5))
    with pytest.raises(UserError, match="collect their folders apart"):
        accuracy_points({folder: read_card(folder) for folder in folders}, print)
