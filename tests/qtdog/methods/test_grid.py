"""Settings with several values: a run for each combination, each in a folder of its own."""

import json
import re

import pytest
import yaml

from qtdog.arguments import listed
from qtdog.cli import COMMANDS, build_parser, main
from qtdog.config import RunConfig, TrainConfig
from qtdog.errors import UserError
from qtdog.files import read_records
from qtdog.methods.grid import SETTINGS, points, takes_several
from qtdog.methods.method import rule_numbers
from qtdog.methods.presets import changed_from_preset, settle
from qtdog.results.runs import read_card
from qtdog.training import sweep
from qtdog.training.jobs import plan
from tiny import DIGITS

TINY = ["--steps", "3", "--checkpoint-freq", "2", "--eval-train-images", "2", "--backbone", "SMALL_CNN"]


def settings_of(*arguments):
    """What `qtdog train` or `sweep` understands."""
    given = build_parser().parse_args(listed(arguments))
    return COMMANDS[given.command].settle(given[given.command])


@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [
        ("--lr 1e-5 5e-5 --resume", "--lr=[1e-5, 5e-5] --resume"),
        ("--lr 1e-5 --rho 1 2", "--lr 1e-5 --rho=[1, 2]"),
        ("--seeds 0 1 --weight-decay -1 2", "--seeds 0 1 --weight-decay=[-1, 2]"),
        ("--lr=1e-5 --lr", "--lr=1e-5 --lr"),
        ("--unfreeze true false", "--unfreeze=[true, false]"),
    ],
)
def test_several_values_are_spelled_as_a_list(arguments, spelled):
    assert " ".join(listed(arguments.split())) == spelled


def test_values_are_read_from_flags_and_files(tmp_path):
    config = settings_of("train", "--lr", "1e-5", "5e-5", "--rho", "0.02", "0.05", "--method", "sam", "--dropout", "0")
    assert config.grid == {"lr": [1e-5, 5e-5], "rho": [0.02, 0.05]} and config.lr is None and config.numbers == {}
    assert config.dropout == 0
    one = settings_of("train", "--lr", "1e-5", "--rho", "0.02", "--swad-valley", "paper")
    assert one.grid == {} and one.lr == 1e-5 and one.numbers == {"rho": 0.02, "swad_valley": "paper"}
    assert settings_of("train", "--freeze-when", "below", "above").grid == {"freeze_when": ["below", "above"]}
    assert settings_of("sweep", "--unfreeze", "true", "false").grid == {"unfreeze": [True, False]}
    file = tmp_path / "settings.yaml"
    file.write_text("lr: [1e-5, 5e-5]\nrho: 0.1\nweight_decay: [0.1]\nswad_valley: [paper, released]\n")
    read = settings_of("train", "--config", str(file))
    assert read.grid == {"lr": [1e-5, 5e-5], "swad_valley": ["paper", "released"]}
    assert read.numbers == {"rho": 0.1} and read.weight_decay == 0.1
    over = settings_of("train", "--config", str(file), "--lr", "0.5")
    assert over.lr == 0.5 and over.grid == {"swad_valley": ["paper", "released"]}


def test_points_are_all_combinations():
    grid = {"lr": [1e-5, 5e-5], "rho": [0.02, 0.05, 0.1]}
    runs = [settle(point, 0, 0) for point in points(TrainConfig(method="sam", grid=grid))]
    assert [(run.lr, run.step["rho"]) for run in runs] == [(lr, rho) for lr in grid["lr"] for rho in grid["rho"]]
    assert {run.grid for run in runs} == {("lr", "rho")} and runs[0].point() == {"lr": 1e-5, "rho": 0.02}
    assert changed_from_preset(runs[1]) == {"lr": 1e-5}  # .05 is the preset's
    assert list(points(config := TrainConfig(lr=0.5))) == [config] and settle(config, 0, 0).grid == ()


def test_a_run_remembers_its_grid():
    (run, _) = (settle(point, 0, 0) for point in points(TrainConfig(method="qtdog", grid={"scale_lr": [1e-5, 1e-4]})))
    assert run.to_dict()["grid"] == ["scale_lr"] and run.quantization.scale_lr == 1e-5
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    alone = settle(TrainConfig(method="qtdog", scale_lr=1e-5), 0, 0)
    assert "grid" not in alone.to_dict() and RunConfig.from_dict(alone.to_dict()).grid == ()


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"lr": [0.1, 0.1]}, "--lr needs a value, or several that differ, not 0.1 0.1"),
        ({"lr": []}, "--lr needs a value, or several that differ, not none"),
        ({"lr": [None, 0.1]}, "--lr needs a value"),
        ({"steps": [1, 2]}, "--steps takes one value, not 2"),
        ({"rho": [0.1, 0.2]}, "--rho has no meaning for method qtdog"),
        ({"lr": [0.1, -1.0]}, "--lr must be greater than 0, not -1"),
    ],
)
def test_grids_that_make_no_sense(grid, told):
    with pytest.raises(UserError, match=told):
        plan(TrainConfig(grid=grid))


def test_a_flag_without_several_values_refuses_them(capsys):
    assert main(["train", "--steps", "1", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_says_which_flags_take_several(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    flags = {text.split()[0]: text for text in re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]}
    marked = {flag for flag, text in flags.items() if "several: a run for each" in " ".join(text.split())}
    assert marked == {f"--{name.replace('_', '-')}" for name in (*SETTINGS, *rule_numbers())}
    assert all(takes_several(name) for name in SETTINGS) and not takes_several("weight_bits")


@pytest.mark.slow
def test_each_point_has_its_folder_and_resumes(digits_dir, tmp_path, capsys):
    common = ["train", *DIGITS, *TINY, "--data-dir", str(digits_dir), "--output-dir", str(tmp_path), "--method", "sam"]
    grid = ["--lr", "1e-5", "5e-5", "--rho", "0.02", "0.05"]
    assert main([*common, *grid]) == 0
    folder = tmp_path / "RotatedMNIST" / "sam" / "0"
    names = {f"trial0_lr{lr}_rho{rho}_seed0" for lr in ("1e-05", "5e-05") for rho in ("0.02", "0.05")}
    assert {path.name for path in folder.iterdir()} == names
    one = folder / "trial0_lr5e-05_rho0.02_seed0"
    card, record = read_card(one), read_records(one / "results.jsonl")[-1]
    assert (card.run.lr, card.run.step["rho"], card.run.grid) == (5e-5, 0.02, ("lr", "rho"))
    assert record["hparams"]["grid"] == ["lr", "rho"] == yaml.safe_load((one / "config.yaml").read_text())["grid"]
    assert "changed" in (out := (one / "out.txt").read_text()) and "lr=5e-05" in out and "rho=0.02" in out
    capsys.readouterr()
    assert main([*common, *grid]) == 0
    assert capsys.readouterr().out.count("is finished, not run again") == 4
    assert main([*common, "--lr", "1e-5", "--rho", "0.02"]) == 0  # one value each: as without a grid
    assert (folder / "trial0_seed0" / "done").exists()
    assert main([*common, "--lr", "1e-5", "--rho", "0.02", "0.05"]) == 0
    (folder / "trial0_seed0" / "config.yaml").write_text((one / "config.yaml").read_text())
    (folder / "trial0_seed0" / "done").unlink()
    assert main([*common, "--lr", "5e-5", "--rho", "0.02", "--resume"]) == 2
    assert "grid was ['lr', 'rho'], is now []" in capsys.readouterr().err


def test_a_sweep_has_the_points_of_each_method_that_knows_them(capsys):
    config = sweep.SweepConfig(
        methods=["erm", "sam"], test_envs=["0"], n_trials=1, grid={"lr": [1e-4, 1e-3], "rho": [0.02, 0.1]}
    )
    jobs = sweep.jobs_of(config)
    assert [(job.run.method, job.run.grid) for job in jobs] == [("erm", ("lr",))] * 2 + [("sam", ("lr", "rho"))] * 4
    assert len({job.folder for job in jobs}) == 6
    assert str(jobs[-1]).endswith("hparams 0, lr 0.001, rho 0.1, seed 0")
    with pytest.raises(UserError, match="--coral-weight has no meaning for method erm"):
        sweep.jobs_of(sweep.SweepConfig(methods=["erm", "sam"], grid={"coral_weight": [1.0, 2.0]}))
