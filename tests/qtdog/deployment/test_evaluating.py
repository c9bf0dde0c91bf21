"""`qtdog eval` and `qtdog features`: no image that a model was trained on says how good it is, wherever it lies."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss

from qtdog.cli import main
from qtdog.data.image_lists import ImageList
from qtdog.files import read_records
from qtdog.models import head
from qtdog.results.runs import load_model, read_card
from tiny import make_pictures

TARGET, SOURCES = "bright", ("dark", "middle")


@pytest.fixture
def run(picture_runs):
    return next(picture_runs.rglob("trial0_seed0"))


@pytest.fixture
def elsewhere(pictures, tmp_path):
    """A copy of the pictures, to change."""
    return shutil.copytree(pictures, tmp_path / "tints")


def judged(capsys, *arguments):
    """Domain -> (percent, images, what they were), and everything that was said."""
    assert main(["eval", *map(str, arguments), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    lines = re.findall(r"^  (\S+) +([\d.]+) %  of +(\d+) images  \((.*?)(?:; members alone.*)?\)$", out, re.M)
    return {name: (percent, int(count), role) for name, percent, count, role in lines}, out


def refused(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def expected(run):
    """What `judged` says of a run on its own data."""
    card = read_card(run)
    target = {TARGET: (f"{100 * card.accuracies['env0_in_acc']:.1f}", 16, "target")}
    held_out = {
        name: (f"{100 * card.accuracies[f'env{env}_out_acc']:.1f}", 4, "source, held out")
        for env, name in enumerate(SOURCES, 1)
    }
    return target | held_out


def test_a_run_on_its_own_data(run, capsys):
    found, out = judged(capsys, run)
    assert found == expected(run)
    assert "QT-DoG, resnet10t" in out and out.count("left out, as it was trained on them: 16 images") == 2


def test_copies_and_renamed_files_are_recognized(run, packed, elsewhere, capsys):
    """The training pictures in a folder of another name are no new domain."""
    for index, file in enumerate(sorted(elsewhere.glob("*/*/*"))):
        file.rename(file.with_name(f"{37 * index % 61:03}.png"))
    (elsewhere / "dark").rename(elsewhere / "night")
    for model in (run, run.parent / "trial0_ensemble", packed):
        found, out = judged(capsys, model, "--data-dir", elsewhere)
        names = {"dark": "night"}
        of_run = {names.get(name, name): numbers for name, numbers in expected(run).items()}
        assert {name: numbers[1:] for name, numbers in found.items()} == {n: v[1:] for n, v in of_run.items()}
        assert "night: left out, as it was trained on them: 16 images (night/blue/" in out
        if model == run:
            assert found == of_run


def test_an_added_picture_moves_nothing(run, elsewhere, capsys):
    Image.effect_noise((20, 16), 90).convert("RGB").save(elsewhere / "dark" / "red" / "000.png")
    found, _ = judged(capsys, run, "--data-dir", elsewhere)
    assert found.pop("dark")[1:] == (5, "4 source, held out; 1 never seen")
    assert found == {name: numbers for name, numbers in expected(run).items() if name != "dark"}


def test_changed_pictures_are_refused(run, packed, elsewhere, capsys):
    """A picture that was encoded anew may be one that was trained on: nobody can tell."""
    (trained, *_) = [image for image in ImageList.read(run).images if (image.domain, image.part) == ("dark", "in")]
    file = elsewhere / str(trained)
    Image.open(file).save(file.with_suffix(".bmp"))
    file.unlink()
    for model in (run, packed):
        told = refused(capsys, model, "--data-dir", elsewhere)
        assert (
            f"1 image(s) of dark/{trained.label} are new or changed" in told
            and "1 that were trained on are gone" in told
        )
    file.with_suffix(".bmp").rename(file)
    assert f"1 image(s) of dark/{trained.label} are changed ({trained})" in refused(
        capsys, run, "--data-dir", elsewhere
    )
    for path in elsewhere.glob("*/*/*"):
        Image.open(path).rotate(180).save(path, "PNG")
    for model in (run, packed):
        found, out = judged(capsys, model, "--data-dir", elsewhere)
        assert {role for _, _, role in found.values()} == {"never seen"}
        assert out.count("if they are the same pictures encoded anew, it was trained on them") == 2


def test_what_is_no_model_is_named(run, tmp_path, capsys):
    assert "is no run, ensemble or packed ensemble" in refused(capsys, tmp_path)
    begun = shutil.copytree(run, tmp_path / "begun")
    (begun / "done").unlink()
    assert "is not finished" in refused(capsys, begun)
    (begun / "model.json").unlink()
    assert "is not finished" in refused(capsys, begun)


def test_nothing_is_left(run, elsewhere, capsys):
    for image in ImageList.read(run).images:
        if (image.domain, image.part) != ("dark", "in"):
            (elsewhere / str(image)).unlink()
    for name in (TARGET, "middle"):
        shutil.rmtree(elsewhere / name)
    assert "was trained on all images of" in refused(capsys, run, "--data-dir", elsewhere)


def test_one_domain_and_some_classes(run, tmp_path, capsys):
    """A single folder of <class>/<image>, one domain, one class, other spellings, a list: none of them seen."""
    fresh = make_pictures(tmp_path / "fresh", count=3)
    for file in fresh.glob("*/*/*"):  # the same random numbers as those trained on
        Image.open(file).rotate(180).save(file)
    (fresh / "dark" / "red").rename(fresh / "dark" / "RED")
    assert judged(capsys, run, "--data-dir", fresh / "dark")[0].keys() == {"dark"}
    for name in ("bright", "middle"):
        shutil.rmtree(fresh / name)
    found, _ = judged(capsys, run, "--data-dir", fresh)
    assert found["dark"][1:] == (6, "never seen")
    shutil.rmtree(fresh / "dark" / "RED")
    assert judged(capsys, run, "--data-dir", fresh)[0]["dark"][1:] == (3, "never seen")
    (tmp_path / "list.csv").write_text("path,label,domain\nfresh/dark/blue/0.png,blue,noon\n")
    found, _ = judged(capsys, run, "--dataset", "csv", "--data-dir", tmp_path / "list.csv")
    assert found["noon"][1:] == (1, "never seen")
    (fresh / "dark" / "green").mkdir()
    shutil.copy(fresh / "dark" / "blue" / "0.png", fresh / "dark" / "green")
    told = refused(capsys, run, "--data-dir", fresh)
    assert "dark/green" in told and "blue, red" in told
    assert "qtdog predict" in refused(capsys, run, "--data-dir", fresh / "dark" / "blue")


def test_ensembles_and_single_runs(trained, float_runs, digits_dir, tmp_path, capsys):
    """Float runs, quantized ones and an ensemble of float ones, on digits."""
    for run in trained.rglob("trial0_seed?"):
        found, out = judged(capsys, run)
        card = read_card(run)
        assert found["0"] == (f"{100 * card.target_accuracy:.1f}", 16, "target") and len(found) == 6
    assert main(["ensemble", str(float_runs), "--device", "cpu"]) == 0
    moved = shutil.copytree(float_runs, tmp_path / "moved")
    shutil.rmtree(float_runs)
    (record,) = read_records(next(moved.rglob("trial0_ensemble/results.jsonl")))
    found, out = judged(capsys, next(moved.rglob("trial0_ensemble")), "--data-dir", digits_dir)
    assert "of 2 members" in out and found["0"][0] == f"{100 * record['target_accuracy']:.1f}"


def test_predictions_and_metrics(run, tmp_path, capsys):
    table, folder = tmp_path / "answers.csv", tmp_path / "judged"
    found, _ = judged(capsys, run, "--predictions", table, "--output-dir", folder)
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    report = json.loads((folder / "metrics.json").read_text())["domains"]
    assert report.keys() == found.keys() and len(rows) == sum(count for _, count, _ in found.values())
    for name, numbers in report.items():
        own = [row for row in rows if row["domain"] == name]
        labels, predicted = [row["label"] for row in own], [row["predicted"] for row in own]
        chances = np.array([[float(row["p(blue)"]), float(row["p(red)"])] for row in own])
        assert numbers["acc"] == pytest.approx(np.mean([a == b for a, b in zip(labels, predicted, strict=True)]))
        assert numbers["macro_acc"] == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert numbers["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
        assert numbers["nll"] == pytest.approx(log_loss(labels, chances, labels=["blue", "red"]))
        assert np.sum(numbers["confusion"]) == len(own) == sum(numbers["images"].values())
    mask = os.umask(0o077)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (*run.rglob("*.*"), *folder.iterdir(), table)} == {0o666 & ~mask}
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.json"} | {
        f"{name}_{what}.{suffix}"
        for name in found
        for what in ("reliability", "confusion")
        for suffix in ("png", "csv")
    }
    card = read_card(run)
    assert report[TARGET]["ece"] == pytest.approx(card.accuracies["env0_in_ece"])


@pytest.mark.parametrize(
    ("file", "told"),
    [("answers.txt", "must end in .csv or .parquet"), ("answers.parquet", "pip install 'qtdog[parquet]'")],
)
def test_tables_that_cannot_be_written(run, tmp_path, capsys, monkeypatch, file, told):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert told in refused(capsys, run, "--predictions", tmp_path / file)


def test_parquet(run, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    judged(capsys, run, "--predictions", tmp_path / "answers.parquet")
    columns = parquet.read_table(tmp_path / "answers.parquet").to_pydict()
    assert set(columns["domain"]) == {TARGET, *SOURCES} and len(columns["p(red)"]) == 24


def test_features(run, packed, tmp_path, capsys):
    file = tmp_path / "tints.npz"
    assert main(["features", str(run), "--output", str(file), "--device", "cpu"]) == 0
    arrays = np.load(file)
    assert arrays["features"].shape == (60, 512) and set(arrays["roles"]) == {
        "trained", "source, held out", "target", "target, held out"
    }  # fmt: skip
    model = load_model(run)
    with torch.no_grad():
        logits = head(model)(torch.from_numpy(arrays["features"]))
    accuracy = (logits.argmax(1).numpy() == arrays["labels"])[arrays["roles"] == "target"].mean()
    assert accuracy == pytest.approx(read_card(run).target_accuracy)
    assert main(["features", str(packed.parent), "--device", "cpu"]) == 2
    assert "is no single run" in capsys.readouterr().err


def test_members_see_the_same_images(picture_runs, packed, elsewhere, tmp_path, capsys):
    """A seed that was trained on one picture more joins no ensemble; a new picture is left out, a lost one told."""
    runs = shutil.copytree(picture_runs, tmp_path / "runs")
    ensemble = ["ensemble", str(runs), "--data-dir", str(elsewhere), "--device", "cpu"]
    (before,) = read_records(next(runs.rglob("trial0_ensemble/results.jsonl")))
    Image.effect_noise((20, 16), 90).convert("RGB").save(elsewhere / "dark" / "red" / "000.png")
    assert main(ensemble) == 0
    assert "1 image(s) are new since the training" in capsys.readouterr().out
    (after,) = read_records(next(runs.rglob("trial0_ensemble/results.jsonl")))
    assert {name: value for name, value in after.items() if name.startswith("env")} == {
        name: value for name, value in before.items() if name.startswith("env")
    }
    third = ["train", "--dataset", "folder", "--data-dir", str(elsewhere), "--test-envs", "0", "--device", "cpu"]
    third += ["--backbone", "resnet10t", "--weights", "none", "--image-size", "32", "--steps", "9", "--batch-size", "2"]
    third += ["--switch-step", "3", "--checkpoint-freq", "4", "--seed", "2", "--output-dir", str(runs)]
    assert main(third) == 0
    assert main(ensemble) == 2
    assert "differ in images (1 gone (dark/red/000.png))" in capsys.readouterr().err.replace("1 new", "1 gone")
    shutil.rmtree(next(runs.rglob("trial0_seed2")))
    (elsewhere / "dark" / "blue" / "3.png").unlink()
    assert main(ensemble) == 2
    assert "1 gone (dark/blue/3.png)" in capsys.readouterr().err
