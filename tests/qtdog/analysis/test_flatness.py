import csv
import math

import pytest
import torch
from torch import nn

import qkernels as qk
from qtdog.analysis import flatness
from qtdog.analysis.flatness import FlatnessConfig
from qtdog.cli import main
from qtdog.data import load_dataset
from qtdog.data.splits import split
from qtdog.errors import UserError
from qtdog.results.runs import load_model
from qtdog.training.evaluation import mean_loss


def test_quadratic_bowl_has_known_flatness():
    """L = c/2 ||w - w0||^2 rises by c/2 gamma^2 in every direction of length 1 over both parameters."""
    parameters = [torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([4.0])]
    center = [p.clone() for p in parameters]

    def losses():
        distance = sum((p - c).square().sum().item() for p, c in zip(parameters, center, strict=True))
        return [0.5 * distance, 7 + 1.5 * distance]

    radii = [0.0, 1.0, 2.0, 10.0]
    at_zero, increases = flatness.loss_increase(losses, parameters, radii, directions=6, seed=1)
    assert at_zero == [0, 7] and increases.shape == (2, 4, 6)
    expected = torch.tensor(radii, dtype=torch.float64).square()
    torch.testing.assert_close(increases[0], (0.5 * expected)[:, None].expand(4, 6), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(increases[1], (1.5 * expected)[:, None].expand(4, 6), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, c) for p, c in zip(parameters, center, strict=True))


def test_linear_loss_is_flat_on_average_and_bounded_by_the_radius():
    parameters = [torch.zeros(3)]
    _, increases = flatness.loss_increase(lambda: [parameters[0][0].item()], parameters, [2.0], directions=400)
    assert increases.abs().max() <= 2 and increases.std() == pytest.approx(2 / math.sqrt(3), rel=0.1)
    assert abs(increases.mean()) < 0.2


def test_parameters_come_back_after_an_error():
    parameters = [torch.ones(2)]
    calls = []

    def losses():
        calls.append(None)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [0.0]

    with pytest.raises(KeyboardInterrupt):
        flatness.loss_increase(losses, parameters, [5.0], directions=1)
    assert torch.equal(parameters[0], torch.ones(2))


def test_directions_are_shared_by_models_of_one_architecture_and_unit_length():
    one, two = (list(nn.Linear(3, 4).parameters()) for _ in range(2))
    a, b = flatness.direction(one, 0, 5), flatness.direction(two, 0, 5)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert sum(x.square().sum() for x in a).item() == pytest.approx(1)
    assert not torch.equal(a[0], flatness.direction(one, 0, 6)[0])
    assert not torch.equal(a[0], flatness.direction(one, 1, 5)[0])


@pytest.mark.slow
def test_command_measures_the_dequantized_model(trained, digits_dir, tmp_path, capsys):
    picture = tmp_path / "plots" / "flat.png"
    folder = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed1"
    arguments = ["flatness", str(folder), str(trained / "RotatedMNIST" / "erm"), "--output", str(picture),
                 "--radii", "0", "0.5", "--directions", "3", "--max-images", "3", "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with picture.with_suffix(".csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 2 * 2 and {row["side"] for row in rows} == {"source", "target"}
    assert all(float(row["increase"]) == 0 for row in rows if row["radius"] == "0.0")
    mine = [row for row in rows if row["method"] == "QT-DoG 7 bit trial 0 seed 1" and row["side"] == "target"]

    # the same by hand: bake the weights, walk along the directions, average
    dataset = load_dataset("RotatedMNIST", str(digits_dir), None)
    indices = split(20, 0.2, 0, 0)[0][:3]
    images, labels = dataset.domains[0].images(indices, False), dataset.domains[0].labels[indices]
    model = qk.dequantize_(load_model(folder))
    assert not any(name.endswith("scale") for name, _ in model.named_parameters())
    with torch.no_grad():
        start = nn.functional.cross_entropy(model(images), labels).item()
        assert start == pytest.approx(nn.functional.cross_entropy(load_model(folder)(images), labels).item(), rel=1e-5)
        assert start == pytest.approx(float(mine[0]["loss"]), rel=1e-5)
        rises = []
        for k in range(3):
            moved = qk.dequantize_(load_model(folder))
            for p, d in zip(moved.parameters(), flatness.direction(list(moved.parameters()), 0, k), strict=True):
                p += 0.5 * d
            rises.append(nn.functional.cross_entropy(moved(images), labels).item() - start)
    assert float(mine[1]["increase"]) == pytest.approx(sum(rises) / 3, rel=1e-3, abs=1e-5)


def test_runs_of_several_seeds_are_thin_lines_with_their_mean_and_spread(trained, tmp_path):
    picture, curves = flatness.measure_flatness(
        FlatnessConfig([str(trained)], output=str(tmp_path / "flat.png"), radii=[0.0, 1.0], directions=1, max_images=1)
    )
    assert picture.is_file() and len(curves) == 3 * 2
    source, _ = flatness.plot(curves).axes
    assert [line.get_label() for line in source.lines if not line.get_label().startswith("_")] == [
        "ERM trial 0 seed 0", "QT-DoG 7 bit trial 0, 2 seeds"
    ]  # fmt: skip
    ends = [curve.mean[-1] for curve in curves if curve.side == "source"]
    drawn = sorted(line.get_ydata()[-1] for line in source.lines)
    assert drawn == pytest.approx(sorted([*ends, sum(ends[1:]) / 2]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"directions": 0}, {"radii": []}, {"radii": [-1.0]}, {"max_images": 0}])
def test_settings_that_make_no_sense(trained, wrong):
    with pytest.raises(UserError):
        flatness.measure_flatness(FlatnessConfig([str(trained)], **wrong))


def test_picture_of_unknown_kind(trained, capsys):
    assert main(["flatness", str(trained), "--output", "flat.txt"]) == 2
    assert "must end in .png" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_and_continued_gives_the_same_numbers(trained, tmp_path, monkeypatch, capsys):
    arguments = ["flatness", str(trained / "RotatedMNIST" / "qtdog"), "--radii", "0", "1", "--directions", "2",
                 "--max-images", "2", "--device", "cpu", "--output"]  # fmt: skip
    assert main([*arguments, str(tmp_path / "whole.svg")]) == 0
    calls = []

    def stops_at_the_sixth(*given):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return mean_loss(*given)

    monkeypatch.setattr("qtdog.analysis.probe.mean_loss", stops_at_the_sixth)
    output = str(tmp_path / "flat.svg")
    assert main([*arguments, output]) == 130
    assert f"what is measured is kept, continue with: qtdog {' '.join([*arguments, output])}" in capsys.readouterr().err
    assert main([*arguments, output]) == 0
    # Of 12 evaluations, one was interrupted, and the other one of the same direction was lost with it.
    assert len(calls) == 12 + 2
    assert (tmp_path / "flat.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "flat.svg").read_text().startswith("<?xml")
    assert {path.name for path in tmp_path.iterdir()} == {"flat.csv", "flat.svg", "whole.csv", "whole.svg"}
