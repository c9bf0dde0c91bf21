import json
import shutil
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qtdog.cli import main
from qtdog.data import load_dataset
from qtdog.data.image_lists import ImageList
from qtdog.data.splits import split
from qtdog.deployment import ensemble
from qtdog.deployment.ensemble import EnsembleConfig
from qtdog.errors import UserError
from qtdog.files import read_records
from qtdog.results.predictions import combined, predict_images
from qtdog.results.runs import load_model
from tiny import DIGITS, write_card


def test_mean_of_logits_is_not_mean_of_probabilities():
    # one member is very sure of class 0, two lean to class 1
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
    eoq = combined(logits, "logits").exp()
    torch.testing.assert_close(eoq, torch.tensor([[9 / 3, 4 / 3]], dtype=torch.float64).softmax(-1))
    assert eoq.argmax() == 0
    probs = combined(logits, "probs").exp()
    torch.testing.assert_close(probs, torch.stack([row.double().softmax(-1) for row in logits]).sum(0) / 3)
    assert probs.argmax() == 1


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of the trained runs, to write ensembles into."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["logits", "probs"])
def test_ensemble_of_trained_members(runs, digits_dir, capsys, combine):
    assert main(["ensemble", str(runs), "--combine", combine, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "one run of erm on RotatedMNIST, target 0, trial 0: no ensemble of one" in out
    assert "EoQ of 2 members on RotatedMNIST, target domain 0, trial 0" in out
    members = [runs / "RotatedMNIST" / "qtdog" / "0" / f"trial0_seed{seed}" for seed in (0, 1)]
    folder = members[0].parent / "trial0_ensemble"
    (record,) = read_records(folder / "results.jsonl")

    dataset = load_dataset("RotatedMNIST", str(digits_dir), None)
    models = [load_model(member) for member in members]
    for name in ["env0_in", *(f"env{env}_out" for env in range(6))]:
        env, part = int(name[3]), name[5:]
        indices = split(20, 0.2, 0, env)[part == "out"]
        images, labels = dataset.domains[env].images(indices, False), dataset.domains[env].labels[indices]
        with torch.no_grad():
            outputs = [model(images) if combine == "logits" else model(images).softmax(-1) for model in models]
        expected = ((outputs[0] + outputs[1]).argmax(-1) == labels).double().mean().item()
        assert record[f"{name}_acc"] == expected
    assert record["target_accuracy"] == record["env0_in_acc"] and record["combine"] == combine
    manifest = json.loads((folder / "members.json").read_text())
    assert [member["seed"] for member in manifest["members"]] == [0, 1]
    cards = [json.loads((member / "model.json").read_text()) for member in members]
    for member, card in zip(manifest["members"], cards, strict=True):
        assert member["accuracies"]["env0_in_acc"] == card["accuracies"]["env0_in_acc"]
    packed = qk.PackedEnsemble.load(folder / "packed")
    assert record["nbytes"] == packed.nbytes == sum(card["nbytes"] for card in cards)
    expected = torch.stack([model(images) for model in models])
    torch.testing.assert_close(
        packed.member_logits(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )


def test_output_dir(runs, tmp_path):
    written = ensemble.make_ensembles(EnsembleConfig([str(runs)], output_dir=str(tmp_path / "e"), device="cpu"))
    assert written == [tmp_path / "e" / "RotatedMNIST" / "qtdog" / "0" / "trial0_ensemble"]
    assert (written[0] / "members.json").is_file()


@pytest.mark.slow
def test_members_of_a_sweep(runs, tmp_path, digits_dir):
    """Folders named by a hash, two settings, two draws each: one ensemble a setting, of the best draws."""
    trained, sweep = runs / "RotatedMNIST" / "qtdog" / "0", tmp_path / "sweep"
    made = {}
    for mode in ("qat", "rtn-frozen"):
        for seed in (0, 1):
            for draw in (0, 1):
                name = f"{mode}{seed}{draw}"
                made[name] = shutil.copytree(trained / f"trial0_seed{seed}", sweep / name)
                card = json.loads((made[name] / "model.json").read_text())
                card["config"]["hparams_seed"] = draw
                card["config"]["quantization"]["qat_mode"] = mode
                card["source_validation_accuracy"] = 0.5 + (draw == seed)
                write_card(made[name], card)
    written = ensemble.make_ensembles(EnsembleConfig([str(sweep)], device="cpu"))
    place = sweep / "ensembles" / "RotatedMNIST" / "qtdog" / "0"
    assert written == [place / f"trial0_qat-mode_{mode}_ensemble" for mode in ("qat", "rtn-frozen")]
    for mode, folder in zip(("qat", "rtn-frozen"), written, strict=True):
        members = json.loads((folder / "members.json").read_text())["members"]
        assert [member["folder"] for member in members] == [str(made[f"{mode}00"]), str(made[f"{mode}11"])]
        (record,) = read_records(folder / "results.jsonl")
        assert record["settings"]["qat_mode"] == mode and "seed" not in record["settings"]
    assert main(["collect", str(sweep)]) == 0
    assert "EoQ, qat-mode rtn-frozen" in (sweep / "table.txt").read_text()


def change(folder, **values):
    card = json.loads((folder / "model.json").read_text())
    for name, value in values.items():
        if name in card:
            card[name] = value
        else:
            card["config"][name] = value
    write_card(folder, card)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"classes": ["a"]}, "differ in classes"),
        ({"images": "other"}, "differ in images"),
        ({"holdout_fraction": 0.3}, "differ in holdout_fraction"),
        ({"seed": 0}, "have the same method, settings, target, trial, seed"),
    ],
)
def test_members_that_do_not_belong_together(runs, values, told):
    change(runs / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed1", **values)
    with pytest.raises(UserError, match=told):
        ensemble.make_ensembles(EnsembleConfig([str(runs)], device="cpu"))


def test_data_that_changed_since_training(runs):
    for seed in (0, 1):
        change(runs / "RotatedMNIST" / "qtdog" / "0" / f"trial0_seed{seed}", domains=["a", "b"])
    with pytest.raises(UserError, match="see --data-dir"):
        ensemble.make_ensembles(EnsembleConfig([str(runs)], device="cpu"))


@pytest.mark.parametrize(
    ("place", "told"),
    [("RotatedMNIST/erm", "no two runs share"), ("nowhere", "is not a folder"), ("empty", "holds no finished run")],
)
def test_nothing_to_average(runs, place, told):
    (runs / "empty").mkdir()
    with pytest.raises(UserError, match=told):
        ensemble.make_ensembles(EnsembleConfig([str(runs / place)], device="cpu"))


def test_broken_card(runs):
    member = runs / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed1"
    whole = json.loads((member / "model.json").read_text())
    for wrong in ({"classes": 5}, {"config": {}}, {"config": {**whole["config"], "loss": 1.5}}, {"test_env": 1}):
        write_card(member, whole | wrong)
        with pytest.raises(UserError, match="is not a model card"):
            ensemble.make_ensembles(EnsembleConfig([str(runs)], device="cpu"))
    write_card(member, {})
    with pytest.raises(UserError, match="is not a model card"):
        ensemble.make_ensembles(EnsembleConfig([str(runs)], device="cpu"))
    with pytest.raises(UserError, match=r"holds no model\.json"):
        load_model(member.parent)


def test_images_are_read_once_for_all_members():
    reads = []

    class Images:
        def __iter__(self):
            reads.append(None)
            yield torch.ones(3, 1, 1, 2), torch.tensor([0, 1, 0])
            yield torch.zeros(1, 1, 1, 2), torch.tensor([1])

    def member_logits(images):
        assert images.dim() == 4
        always = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        return always[:, None].expand(3, len(images), 2)

    found = predict_images(member_logits, Images(), torch.device("cpu"))
    assert (found.accuracy, found.member_accuracies) == (0.5, [0.5, 0.5, 0.5]) and len(reads) == 1
    assert found.disagreement.tolist() == [2 / 3] * 4 and found.metrics()["acc"] == 0.5


@pytest.mark.slow
def test_members_of_several_splits_and_draws(digits_dir, tmp_path, capsys):
    """EoA's way: judged on the whole target, and in the sources on what no member was trained on."""
    runs = tmp_path / "runs"
    train = [
        "train",
        *DIGITS,
        "--data-dir",
        str(digits_dir),
        "--method",
        "erm",
        "--steps",
        "3",
        "--output-dir",
        str(runs),
    ]
    for trial in ("0", "1"):
        for draw in ("0", "1"):
            extra = [] if draw == "0" else ["--batch-size", "3"]
            assert (
                main([*train, "--trial-seed", trial, "--hparams-seed", draw, "--holdout-fraction", "0.5", *extra]) == 0
            )
    mixed = ["ensemble", str(runs), "--device", "cpu", "--mix", "trials", "draws"]
    assert main(mixed) == 0
    (folder,) = runs.rglob("draws_trials_ensemble")
    (record,) = read_records(folder / "results.jsonl")
    members = [Path(member["folder"]) for member in json.loads((folder / "members.json").read_text())["members"]]
    assert [member.name for member in members] == [
        "trial0_seed0", "trial0_hparams1_seed0", "trial1_seed0", "trial1_hparams1_seed0"
    ]  # fmt: skip
    lists = [ImageList.read(member).images for member in members]
    dataset = load_dataset("RotatedMNIST", str(digits_dir), None)
    with torch.no_grad():
        for env, domain in enumerate(dataset.domains):
            trained = {i.fingerprint for images in lists for i in images if i.part == "in" and i.domain == domain.name}
            unseen = [i for i, mark in enumerate(domain.fingerprints()) if env == 0 or mark not in trained]
            pixels, labels = domain.images(unseen, False), domain.labels[unseen]
            logits = torch.stack([load_model(member)(pixels) for member in members]).mean(0)
            part = "in" if env == 0 else "out"
            assert record[f"env{env}_{part}_acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
            assert len(unseen) == len(labels) and (env == 0) == (len(unseen) == 20)
    assert record["target_accuracy"] == record["env0_in_acc"] and "env0_out_acc" not in record
    capsys.readouterr()
    assert main(["eval", str(folder), "--data-dir", str(digits_dir), "--device", "cpu"]) == 0
    assert "of     20 images  (target;" in capsys.readouterr().out
    assert main(["collect", str(runs)]) == 0
    assert "Ensemble of ERM, mixed draws and trials" in capsys.readouterr().out
