"""Files of settings: what people write in them, records of runs, and what is told of mistakes."""

import pytest
import yaml

from qtdog import cli
from qtdog.cli import main
from qtdog.config import TrainConfig
from qtdog.data import MNIST_DOMAINS
from qtdog.methods.presets import METHODS, settle
from qtdog.settings import read_settings
from qtdog.training.tasks import parse_tasks
from tiny import DIGITS, make_pictures


@pytest.fixture
def seen(monkeypatch):
    """The settings that commands were called with, which do nothing else."""
    found = []
    for name in ("train", "sweep", "collect", "data verify"):
        monkeypatch.setitem(cli.COMMANDS, name, cli.dataclasses.replace(cli.COMMANDS[name], run=found.append))
    return found


def give(tmp_path, content, *arguments):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return main([*arguments, "--config", str(file)])


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("test_envs: 0", "test_envs", ["0"]),
        ("test_envs: [0]", "test_envs", ["0"]),
        ("test_envs: sketch", "test_envs", ["sketch"]),
        ("test_envs: [1, sketch]", "test_envs", ["1", "sketch"]),
        ("test_envs: [010, no, 1.10, 2024-01-02]", "test_envs", ["010", "no", "1.10", "2024-01-02"]),  # as written
        ("test-envs: all", "test_envs", ["all"]),
        ("seeds: 3", "seeds", [3]),
        ("seed: 3", "seeds", [3]),
        ("seeds: [3, 4]", "seeds", [3, 4]),
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: 1", "lr", 1.0),
        ("lr: [1e-3, 2]", "grid", {"lr": [1e-3, 2.0]}),  # a run for each
        ("rho: [.1, .2]", "grid", {"rho": [0.1, 0.2]}),
        ("sources: 1", "sources", ["1"]),
        ("holdout_fraction: .25", "holdout_fraction", 0.25),
        ("data_dir: 2024", "data_dir", "2024"),
        ("data_dir: ~", "data_dir", None),
        ("act_bits: none", "act_bits", None),
        ("weights: none", "weights", "none"),
        ("quantizer: none", "quantizer", "none"),
        ("freeze_bn: no", "freeze_bn", False),
        ("resume: true", "resume", True),
        ("precision: bfloat16", "precision", "bfloat16"),
        ("swad_ratio: 1e-1", "numbers", {"swad_ratio": 0.1}),
        ("steps: &x 70\nswitch_step: *x", "switch_step", 70),
        ("<<: {steps: 70}", "steps", 70),
    ],
)  # fmt: skip
def test_settings_as_people_write_them(tmp_path, seen, content, name, value):
    assert give(tmp_path, content, "train") == 0
    assert getattr(seen[0], name) == value and type(getattr(seen[0], name)) is type(value)


def test_lists_of_other_commands(tmp_path, seen):
    assert give(tmp_path, "methods: erm\ndatasets: PACS", "sweep") == 0
    assert (seen[0].methods, seen[0].datasets) == (["erm"], ["PACS"])
    assert give(tmp_path, "folder: 2024", "collect") == 0 and seen[1].folder == "2024"
    assert give(tmp_path, "dataset: csv", "data", "verify") == 0 and seen[2].dataset == "csv"


def test_flags_after_a_file_override_it_and_files_override_each_other(tmp_path, seen):
    (tmp_path / "one.yaml").write_text("steps: 5\nlr: 1e-3\nseeds: 4")
    (tmp_path / "two.yaml").write_text("steps: 6")
    files = [f"--config={tmp_path}/one.yaml", "--config", f"{tmp_path}/two.yaml"]
    assert main(["train", *files, "--lr", "0.5"]) == 0
    assert (seen[0].steps, seen[0].lr, seen[0].seeds) == (6, 0.5, [4])


def test_what_print_config_writes_can_be_given(tmp_path, seen, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--steps", "70", "--print_config"])
    assert give(tmp_path, capsys.readouterr().out, "train") == 0
    assert seen[0] == TrainConfig(steps=70)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no settings: write `name: value` in each line"),
        (b"5", "holds no settings: write `name: value` in each line"),
        (b"steps: [1", "is not YAML in UTF-8"),
        (b"\xff\xfe\xfd", "is not YAML in UTF-8"),
        (b"data_dir: !!python/object/apply:os.getcwd []", "is not YAML in UTF-8"),
        (b"config: other.yaml", "names another file of settings"),
        (b"plugin: x.py", "plug-ins are named on the command line"),
        (b"stepz: 3", "does not fit qtdog train: there is no setting stepz (near names: step, steps)"),
        (b"test_env: 3", "there is no setting test_env (near names: test_envs)"),
        (b"datasets: PACS", "there is no setting datasets (near names: dataset)"),
        (b"5: x", "there is no setting 5\n"),
        (b"numbers: {rho: 1}", "there is no setting numbers (near"),
        (b"seed: 1\nseeds: 2", "seeds is there twice"),
        (b"steps: three", "steps is 'three', an integer or none is wanted"),
        (b"steps: 1.5", "steps is 1.5, an integer or none is wanted"),
        (b"steps: true", "steps is True, an integer or none is wanted"),
        (b"lr: fast", "lr is 'fast', a number or none or a list of numbers is wanted"),
        (b"lr: [1, fast]", "lr is [1, 'fast'], a number or none or a list of numbers is wanted"),
        (b"image_size: [1, 2]", "image_size is [1, 2], an integer or none is wanted"),
        (b"seeds: [a]", "seeds is ['a'], a list of integers is wanted"),
        (b"seeds: 0 1 2", "seeds is '0 1 2', a list of integers is wanted"),
        (b"test_envs:", "test_envs is empty, a list of names is wanted"),
        (b"method:", "method is empty, text is wanted"),
        (b"method: [erm]", "method is ['erm'], text is wanted"),
        (b"resume: 5", "resume is 5, true or false is wanted"),
        (b"precision: bf16", "precision is 'bf16', one of float32, bfloat16, float16 or none is wanted"),
        (b"stepz: 3\nsteps: x\nlr: y", "near names: step, steps); steps is 'x', an integer or none is wanted; lr is "),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, capsys, content, told):
    assert give(tmp_path, content, "train") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"qtdog: error: --config {tmp_path}/settings.yaml") and told in err and err.count("\n") == 1


def test_a_file_that_is_not_there(capsys):
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml is not a file" in capsys.readouterr().err


COMPOSED = [
    {"method": "erm", "loss": "coral", "averaging": "swad"},
    {"method": "qtdog", "quantizer": "none"},
    {"method": "sagm", "step": "none"},
    {"method": "gaqat", "act_bits": 8},
    {"method": "erm", "hparams_seed": 3},
    {"method": "qtdog", "qat_mode": "rtn-frozen"},
    {"method": "erm", "background": "gray"},
]


@pytest.mark.parametrize("dataset", ["RotatedMNIST", "PACS"])
@pytest.mark.parametrize(
    "own", [*({"method": name} for name in METHODS), *COMPOSED], ids=lambda own: "-".join(map(str, own.values()))
)
def test_the_record_of_a_run_trains_it_again(tmp_path, own, dataset):
    if "background" in own:
        dataset = "PACS"
    own = {name: "plain" if value == "none" and name == "step" else value for name, value in own.items()}
    config = TrainConfig(dataset=dataset, trial_seed=2, steps=4001, eval_train_images=5, **own)
    run = settle(config, test_env=3, seed=7)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run.to_dict(), sort_keys=False))
    command = cli.COMMANDS["train"]
    settings = read_settings(str(file), "train", command.hints())
    assert settings["test_envs"] == ["45" if dataset == "RotatedMNIST" else "sketch"] and settings["seeds"] == [7]
    again = {**cli.dataclasses.asdict(TrainConfig()), **dict.fromkeys(command.numbers()), **settings}
    assert settle(command.settle(again), test_env=3, seed=7) == run


def test_the_target_of_a_record_is_found_by_its_place(tmp_path, seen):
    """Whose index may be the name of another domain; and wherever the data now lie."""
    root = make_pictures(tmp_path / "there" / "set", 1)
    for old, new in (("bright", "1"), ("dark", "2"), ("middle", "3")):
        (root / old).rename(root / new)
    run = settle(TrainConfig(dataset="folder", data_dir="gone", method="erm"), test_env=1, seed=7)
    assert give(tmp_path, yaml.safe_dump(run.to_dict()), "train", "--data-dir", str(root)) == 0
    assert (seen[0].test_envs, seen[0].dataset, seen[0].method) == (["2"], "folder", "erm")


def test_the_record_of_several_targets_and_chosen_sources(tmp_path, seen):
    run = settle(TrainConfig(dataset="ColoredMNIST", method="erm"), test_env=0, seed=7)
    run = cli.dataclasses.replace(run, test_envs=(0, 2), sources=(1,))
    assert give(tmp_path, yaml.safe_dump(run.to_dict()), "train") == 0
    (task,) = parse_tasks(seen[0].test_envs, seen[0].sources, "ColoredMNIST", list(MNIST_DOMAINS["ColoredMNIST"]))
    assert task == ((0, 2), (1,))
    old = {**run.to_dict(), "test_env": 2}  # of an earlier version
    del old["test_envs"], old["sources"]
    assert give(tmp_path, yaml.safe_dump(old), "train") == 0 and seen[1].test_envs == ["-90%"]


@pytest.mark.parametrize(
    ("changes", "arguments", "told"),
    [
        ({}, ["sweep"], "is the record of one run: `qtdog train --config "),
        ({"test_envs": [9]}, ["train"], "has a domain 9 of RotatedMNIST, which has 6"),
        ({"steps": "x"}, ["train"], "is a run's record that this version cannot read: steps cannot be 'x'"),
        ({"plugins": [{"path": "/x/a.py", "sha256": "0"}]}, ["train"], "that is not here: give --plugin /x/a.py"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_trained_again(tmp_path, capsys, changes, arguments, told):
    run = settle(TrainConfig(), test_env=3, seed=7)
    assert give(tmp_path, yaml.safe_dump({**run.to_dict(), **changes}), *arguments) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_run_from_its_own_record_is_the_same(digits_dir, tmp_path):
    common = ["train", *DIGITS, "--data-dir", str(digits_dir), "--steps", "4", "--switch-step", "2", "--seed", "5"]
    assert main([*common, "--eval-train-images", "4", "--output-dir", str(tmp_path / "one")]) == 0
    place = "RotatedMNIST/qtdog/0/trial0_seed5"
    again = ["train", "--config", f"{tmp_path}/one/{place}/config.yaml", "--device", "cpu"]
    assert main([*again, "--output-dir", str(tmp_path / "two")]) == 0
    for name in ("config.yaml", "model.safetensors"):
        assert (tmp_path / "one" / place / name).read_bytes() == (tmp_path / "two" / place / name).read_bytes()
