import csv
import json
import shutil

import numpy as np
import pytest
import torch

import qkernels as qk
from qtdog.analysis import landscape, probe
from qtdog.analysis.landscape import LandscapeConfig
from qtdog.cli import main
from qtdog.files import seal
from qtdog.log import Log
from qtdog.models import build_model
from qtdog.results.runs import SEALED, ModelCard, save_model
from qtdog.training.evaluation import mean_loss


def read(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_filters_are_normalized_as_numpy_does_it():
    weights = [torch.randn(4, 3, 3, 3), torch.randn(2, 5), torch.zeros(2, 2)]
    drawn = probe.gaussian(weights, 0, 1)
    for d, w, got in zip(drawn, weights, landscape.filter_normalized(drawn, weights), strict=True):
        for i in range(len(w)):
            length = np.sqrt(np.sum(w[i].numpy().astype(np.float64) ** 2))
            unit = d[i].numpy() / np.sqrt(np.sum(d[i].numpy().astype(np.float64) ** 2))
            np.testing.assert_allclose(got[i].numpy(), length * unit, rtol=1e-5)


def test_surface_of_a_bowl():
    """L = ||w - w0||^2 at w0 + a d1 + b d2 is a^2 |d1|^2 + 2ab d1.d2 + b^2 |d2|^2; the filters' norms are |d|'s."""
    weights = [torch.randn(3, 4), torch.randn(2, 2, 2)]
    center = [w.clone() for w in weights]
    axis = [-0.5, 0.0, 0.5]
    measured = landscape.surface(
        lambda: [sum((w - c).double().square().sum().item() for w, c in zip(weights, center, strict=True)), 3.0],
        weights,
        axis,
        seed=2,
    )
    assert measured.shape == (2, 3, 3) and (measured[1] == 3).all()
    one, two = (
        torch.cat([d.flatten() for d in landscape.filter_normalized(probe.gaussian(weights, 2, k), weights)])
        for k in (0, 1)
    )
    a, b = torch.meshgrid(torch.tensor(axis), torch.tensor(axis), indexing="ij")
    expected = a**2 * one.dot(one) + 2 * a * b * one.dot(two) + b**2 * two.dot(two)
    torch.testing.assert_close(measured[0].float(), expected, rtol=1e-4, atol=1e-5)
    assert one.dot(one).sqrt() == pytest.approx(probe.norm(weights), rel=1e-5)
    assert all(torch.equal(w, c) for w, c in zip(weights, center, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--quantize-each"]])
def test_the_center_is_the_loss_of_the_run(trained, tmp_path, capsys, flags):
    folder, picture = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed1", tmp_path / "plots" / "l.png"
    arguments = ["landscape", str(folder), "--grid", "3", "--span", "0.5", "--max-images", "2", "--device", "cpu"]
    assert main([*arguments, "--output", str(picture), *flags]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "on the plane" in capsys.readouterr().out
    rows = read(picture.with_suffix(".csv"))
    assert [(row["a"], row["b"]) for row in rows[:4]] == [("-0.5", "-0.5"), ("-0.5", "0.0"), ("-0.5", "0.5"),
                                                          ("0.0", "-0.5")]  # fmt: skip
    assert len(rows) == 2 * 9 and len({row["loss"] for row in rows}) == 18
    (trained_probe,) = probe.probes(LandscapeConfig([str(folder)], max_images=2, device="cpu"), Log(), plain=False)
    center = [float(row["loss"]) for row in rows if row["a"] == row["b"] == "0.0"]
    assert center == pytest.approx(trained_probe.losses(), rel=1e-6)


@pytest.mark.slow
def test_interrupted_and_continued_gives_the_same_numbers(trained, tmp_path, monkeypatch):
    run = str(trained / "RotatedMNIST" / "erm")
    arguments = ["landscape", run, "--grid", "3", "--max-images", "1", "--device", "cpu", "--output"]
    assert main([*arguments, str(tmp_path / "whole.svg")]) == 0
    calls = []

    def stops_at_the_sixth(*given):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return mean_loss(*given)

    monkeypatch.setattr("qtdog.analysis.probe.mean_loss", stops_at_the_sixth)
    assert main([*arguments, str(tmp_path / "l.svg")]) == 130
    assert len((tmp_path / "l.partial.csv").read_text().splitlines()) == 2
    assert main([*arguments, str(tmp_path / "l.svg")]) == 0
    assert len(calls) == 2 * 9 + 2
    assert (tmp_path / "l.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "l.partial.csv").exists()


def test_inq_has_no_latent_weights_to_move(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0", tmp_path / "run")
    card = json.loads((run / "model.json").read_text())
    model = build_model("MNIST_CNN", 10, 1)
    card["quantization"] = qk.QConfig(quantizer="inq").to_dict()
    qk.quantize_(model, qk.QConfig(quantizer="inq"))
    qk.snap_(model, 1.0)
    save_model(run, model.state_dict(), ModelCard(**card))
    seal(run, SEALED)
    assert main(["landscape", str(run), "--quantize-each", "--output", str(tmp_path / "l.png")]) == 2
    assert "INQ's levels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--grid", "4"], "--grid must be odd"),
        (["--grid", "1"], "at least 3"),
        (["--span", "0"], "--span must be positive"),
        (["--output", "l.csv"], "must end in .png, .svg or .pdf"),
        (["--max-images", "0"], "--max-images must be at least 1"),
    ],
)
def test_mistakes_are_named(trained, capsys, wrong, told):
    assert main(["landscape", str(trained), *wrong]) == 2
    assert told in capsys.readouterr().err
