import errno
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from qtdog import cli, environment
from qtdog.cli import main
from qtdog.errors import UserError
from qtdog.results.runs import read_card
from tiny import DIGITS, ICON_STYLES, make_pictures

COMMANDS = [
    *("train", "sweep", "ensemble", "flatness", "landscape", "curvature", "diagnostics", "collect", "demo"),
    *("data verify", "data prepare"),
]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    if command is None:
        assert all(name.split()[0] in out for name in COMMANDS)
    else:
        assert "examples:\n" in out and f"qtdog {command}" in out and "--config" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "command"),
        (["trian"], "invalid choice"),
        (["train", "--stepz", "3"], "--stepz"),
        (["train", "--steps", "three"], "steps"),
        (["train", "--method", "magic"], "magic"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--steps", "300"], "never reaches"),
        (["train", "--dataset", "folder", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["train", "--seeds", "1", "1"], "different"),
        (["train", "--num-workers", "-1"], "--num-workers"),
        (["ensemble"], "name at least one run folder"),
        (["ensemble", "nowhere"], "nowhere is not a folder"),
        (["flatness", "nowhere"], "nowhere is not a folder"),
        (["collect", "nowhere"], "nowhere is not a folder"),
        (["data"], 'expected "data.action" to be one of {verify,prepare}'),
        (["data", "verify", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (
            ["train", "--dataset", "PACS"],
            "--dataset PACS needs --data-dir ROOT with ROOT/PACS/<domain>/<class>/<image>",
        ),
        (["sweep", "--n-hparams", "0"], "--n-hparams"),
        (["demo", "--members", "1"], "--members"),
        (["demo", "--steps", "4"], "--steps"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("qtdog: error: ") and err.count("\n") == 1 and told in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_exit_codes_of_the_process(tmp_path):
    command = [sys.executable, "-m", "qtdog", "collect", "nowhere"]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "collect", cli.dataclasses.replace(cli.COMMANDS["collect"], run=lambda _: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main(["collect"])


@pytest.mark.slow
def test_nobody_reads_the_output_to_its_end(trained, tmp_path):
    """`qtdog collect runs | true` still writes its files."""
    command = [sys.executable, "-m", "qtdog", "collect", str(trained), "--output-dir", str(tmp_path / "tables")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert (tmp_path / "tables" / "table.json").is_file()


def test_interrupt_tells_how_to_resume(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    for name in ("train", "collect", "demo"):
        monkeypatch.setitem(cli.COMMANDS, name, cli.dataclasses.replace(cli.COMMANDS[name], run=interrupt))
    assert main(["train", "--overwrite", "--steps", "9000", "--output-dir", "my runs"]) == 130
    assert "qtdog train --steps 9000 --output-dir 'my runs' --resume\n" in capsys.readouterr().err
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.endswith("continue with: qtdog demo\n")
    assert main(["collect"]) == 130
    assert capsys.readouterr().err == "\nqtdog: interrupted\n"


def test_flags_and_yaml_fill_the_same_settings(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "train", cli.dataclasses.replace(cli.COMMANDS["train"], run=seen.append))
    file = tmp_path / "run.yaml"
    settings = {"test_envs": ["15", "all"], "seeds": [3, 4], "trial_seed": 2, "steps": 70, "freeze_bn": False}
    file.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(file)]) == 0
    dashes = ["train", "--test-envs", "15", "all", "--seeds", "3", "4", "--trial-seed=2", "--steps", "70"]
    assert main([*dashes, "--freeze-bn", "false"]) == 0
    assert (
        main([("--" + a[2:].replace("-", "_") if a.startswith("--") else a) for a in [*dashes, "--freeze-bn=false"]])
        == 0
    )
    assert seen[0] == seen[1] == seen[2] and seen[0].seeds == [3, 4] and seen[0].freeze_bn is False
    assert main(["train", "--config", str(file), "--steps", "80", "--seed", "5"]) == 0
    assert (seen[3].steps, seen[3].seeds, seen[3].trial_seed) == (80, [5], 2)
    file.write_text("stepz: 3")
    assert main(["train", "--config", str(file)]) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            "runs/x: No space left on device: make room there",
        ),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), "runs/x: Read-only file system: name a place that"),
        (OSError(errno.ENXIO, "No such device", "runs/x"), "runs/x: No such device: mend that, or name another place"),
        (ConnectionError("no Ray at 10.0.0.1"), "no Ray at 10.0.0.1"),
    ],
)
def test_errors_of_the_operating_system_are_one_line(monkeypatch, capsys, error, told):
    def fails(config):
        raise error

    for name in ("train", "collect"):
        monkeypatch.setitem(cli.COMMANDS, name, cli.dataclasses.replace(cli.COMMANDS[name], run=fails))
        assert main([name]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"qtdog: error: {told}") and err.count("\n") == 1
        assert ("continue with: qtdog train --resume" in err) == (name == "train")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["collect", "train"])
def test_standard_output_that_is_full(trained, digits_dir, tmp_path, command):
    """The interpreter's own flush at its end would fail once more, with another exit code and a traceback."""
    arguments = {
        "collect": ["collect", str(trained), "--output-dir", str(tmp_path)],
        "train": ["train", *DIGITS, "--data-dir", str(digits_dir), "--output-dir", str(tmp_path), "--method", "erm"],
    }
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "qtdog", *arguments[command]], stdout=full, stderr=subprocess.PIPE)
    err = done.stderr.decode()
    assert done.returncode == 2 and err.startswith("qtdog: error: standard output: No space left on device")
    assert err.count("\n") == 1


def test_device_and_workers(monkeypatch):
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    assert environment.pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="--device cuda"):
        environment.pick_device("cuda")
    assert environment.pick_workers(8, reads_files=False) == 0
    assert environment.pick_workers(0, reads_files=True) == 0
    assert 1 <= environment.pick_workers(10**6, reads_files=True) <= len(environment.os.sched_getaffinity(0))


@pytest.mark.slow
def test_every_target_of_colored_mnist(digits_dir, tmp_path):
    arguments = ["train", *DIGITS, "--dataset", "ColoredMNIST", "--test-envs", "all", "--method", "erm", "--steps", "1",
                 "--data-dir", str(digits_dir), "--output-dir", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    assert {path.parent.parent.name for path in tmp_path.rglob("done")} == {"+90%", "+80%", "-90%"}


@pytest.mark.slow
def test_runs_at_once_give_the_same_as_one_by_one(digits_dir, tmp_path, capsys):
    arguments = [
        "train",
        *DIGITS,
        "--method",
        "erm",
        "--steps",
        "2",
        "--seeds",
        "0",
        "1",
        "--data-dir",
        str(digits_dir),
    ]
    assert main([*arguments, "--output-dir", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--output-dir", str(tmp_path / "two"), "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(fact) == 1 for fact in ("data: ", "environment: ", "method preset erm", "protocol preset"))
    for seed in (0, 1):  # what came out of each run in a line, all else in its file
        assert out.count(f"ERM, target domain 0, trial 0, seed {seed}: source out ") == 1
        kept = (tmp_path / "two" / "RotatedMNIST" / "erm" / "0" / f"trial0_seed{seed}" / "out.txt").read_text()
        assert "environment: " in kept and "step     1  loss" in kept
    assert "  loss " not in out
    for seed in (0, 1):
        file = Path("RotatedMNIST", "erm", "0", f"trial0_seed{seed}", "model.safetensors")
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
def test_error_in_one_of_several_runs_is_one_line(tmp_path, capsys):
    root = make_pictures(tmp_path / "set", 5)
    (root / "dark" / "red" / "1.png").write_bytes(b"broken")
    arguments = ["train", "--dataset", "folder", "--data-dir", str(root), "--backbone", "test_resnet",
                 "--weights", "none", "--image-size", "16", "--method", "erm", "--steps", "2", "--batch-size", "2",
                 "--jobs", "2", "--test-envs", "0", "1", "--num-workers", "0",
                 "--output-dir", str(tmp_path / "runs")]  # fmt: skip
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "1.png" in err and err.count("\n") == 1
    assert main([*arguments, "--jobs", "0"]) == 2


def test_too_few_images_to_hold_out(digits_dir, tmp_path, capsys):
    arguments = ["train", *DIGITS, "--method", "erm", "--holdout-fraction", "0.01", "--data-dir", str(digits_dir),
                 "--output-dir", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 2
    assert "too few to hold out 1%" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not ICON_STYLES.is_file(), reason=f"{ICON_STYLES} is not there")
def test_icon_styles(tmp_path):
    """Real pictures in four drawing styles, all subcommands."""
    with zipfile.ZipFile(ICON_STYLES) as archive:
        wanted = [n for n in archive.namelist() if n.endswith(".png") and n.split("/")[1] in ("building", "weather")]
        archive.extractall(tmp_path / "icons", wanted)
    runs = tmp_path / "runs"
    common = ["train", "--dataset", "folder", "--data-dir", str(tmp_path / "icons"), "--backbone", "test_resnet",
              "--weights", "none", "--image-size", "32", "--steps", "8", "--checkpoint-freq", "4", "--batch-size", "4",
              "--test-envs", "noto", "--output-dir", str(runs), "--device", "cpu"]  # fmt: skip
    assert main([*common, "--method", "erm"]) == 0
    assert main([*common, "--switch-step", "4", "--seeds", "0", "1"]) == 0
    card = read_card(runs / "icons" / "qtdog" / "noto" / "trial0_seed0")
    assert card.domains == ["fluent3d", "noto", "openmoji_line", "twemoji"] and card.run.test_envs == (1,)
    assert card.classes == ["building", "weather"] and card.preprocessing["image_size"] == 32
    assert main(["ensemble", str(runs)]) == 0
    assert main(["flatness", str(runs / "icons" / "erm"), "--radii", "0", "1", "--directions", "1", "--max-images", "8",
                 "--output", str(tmp_path / "f.svg")]) == 0  # fmt: skip
    assert main(["collect", str(runs)]) == 0
    assert "EoQ" in (runs / "table.md").read_text()
