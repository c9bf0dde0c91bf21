"""What a user's file adds is as good as what is there; whoever reads a run of it must have it."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import timm

from qtdog import UserError, load_model, plugins
from qtdog.cli import main
from qtdog.config import TrainConfig
from qtdog.methods.checks import check_minibatch
from qtdog.methods.presets import composed, find_method, settle
from qtdog.results.runs import find_runs, read_card

QUICK = ["--steps", "4", "--checkpoint-freq", "2", "--eval-train-images", "4", "--device", "cpu"]


def train(plugin, output, *arguments):
    switch = [] if "erm" in arguments else ["--switch-step", "1"]
    command = ["train", "--plugin", str(plugin), "--output-dir", str(output), *QUICK, *switch]
    assert main([*command, "--dataset", "Bars", *arguments]) == 0


def test_a_plugin_is_under_sixty_lines(plugin):
    assert len(Path(plugin).read_text().splitlines()) < 60


@pytest.mark.slow
def test_a_loss_step_rule_method_data_set_and_backbone_through_all_commands(
    plugin, forget, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    train(plugin, runs, "--method", "vrex+qtdog", "--step", "centered", "--vrex-penalty", "2", "--seeds", "0", "1")
    (folder, *_) = folders = find_runs([str(runs)])
    run = read_card(folder).run
    assert len(folders) == 6 and (run.backbone, run.loss) == ("tiny", {"vrex_penalty": 2.0})
    assert [Path(used.path).name for used in run.plugins] == ["plugin.py"]
    forget()  # as a command in a process of its own begins
    for command in (
        ["ensemble", str(runs)],
        ["collect", str(runs)],
        ["flatness", str(folder), "--radii", "0", "1", "--directions", "2"],
        ["curvature", str(folder), "--vectors", "2", "--iterations", "2"],
        ["data", "verify", "--dataset", "Bars"],
        ["eval", str(runs / "Bars" / run.method / "40" / "trial0_ensemble" / "packed")],
    ):
        reads_the_run = command[0] not in ("data", "eval")  # a packed file needs no plug-in, its images do
        assert main(command) == 2
        error = capsys.readouterr().err
        assert (
            f"give --plugin {Path(plugin).resolve()}, or where it lies now" if reads_the_run else "Bars"
        ) in error, command
        assert main([*command, "--plugin", str(plugin)]) == 0
        forget()
    rows = list(csv.DictReader((runs / "table.csv").open()))
    assert {row["algorithm"] for row in rows} >= {"VREx + QT-DoG, step centered"}


@pytest.mark.slow
def test_what_the_docs_show_is_one_file(plugin, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "extending.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    _, *shown = [block for block in blocks if "class EMA" not in block]
    assert len(shown) == 5 and all(block in Path(plugin).read_text() for block in shown)
    (tmp_path / "docs.py").write_text("\n".join(blocks))
    train(tmp_path / "docs.py", tmp_path, "--method", "vrex+qtdog", "--averaging", "ema", "--ema-decay", "0.5")
    assert {read_card(folder).run.averaging["ema_decay"] for folder in find_runs([str(tmp_path)])} == {0.5}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_sweep_in_processes_of_its_own(plugin, forget, tmp_path, engine, capsys, request):
    if engine == "ray":
        request.getfixturevalue("ray_cluster")
    command = ["sweep", "--plugin", str(plugin), "--output-dir", str(tmp_path / "sweep"), *QUICK, "--switch-step", "1"]
    command += ["--datasets", "Bars", "--methods", "erm", "vrex+qtdog", "--n-trials", "1", "--test-envs", "0"]
    assert main([*command, "--engine", engine, "--jobs", "2"]) == 0
    used = {run.method: run.plugins for run in (read_card(f).run for f in find_runs([str(tmp_path / "sweep")]))}
    assert set(used) == {"erm", "vrex+qtdog"}
    assert main([*command, "--show"]) == 0
    assert "2 done" in capsys.readouterr().out
    assert main(["collect", str(tmp_path / "sweep"), "--plugin", str(plugin)]) == 0


def test_a_run_remembers_what_it_has_something_of(plugin, forget):
    plugins.load([plugin])
    own = plugins.described(Path(plugin))

    def used(**settings):
        return plugins.remembered(settle(TrainConfig(**settings), 0, 0)).plugins

    assert used() == used(dataset="folder", data_dir=".", method="erm") == ()
    assert used(dataset="Bars", method="erm") == (own,)
    assert used(loss="vrex") == used(step="centered") == used(method="vrex+qtdog") == (own,)


def test_a_model_that_a_plugin_registers_with_timm(forget, tmp_path):
    file = tmp_path / "timm_model.py"
    file.write_text("""
from timm.models import register_model, resnet18

@register_model
def resnet_of_a_plugin(pretrained=False, **options):
    return resnet18(pretrained=False, **options)
""")
    plugins.load([str(file)])
    config = TrainConfig(dataset="folder", data_dir=".", backbone="resnet_of_a_plugin", weights="none")
    assert plugins.remembered(settle(config, 0, 0)).plugins == (plugins.described(file),)
    assert timm.is_model("resnet_of_a_plugin")


def test_results_may_be_read_with_a_changed_plugin_but_no_model(plugin, forget, tmp_path, capsys):
    runs = tmp_path / "runs"
    train(plugin, runs, "--method", "erm", "--test-envs", "0")
    (folder,) = find_runs([str(runs)])
    forget()
    with Path(plugin).open("a") as file:
        file.write("# changed\n")
    assert main(["collect", str(runs), "--plugin", str(plugin)]) == 0
    with pytest.raises(UserError, match=r"plugin\.py, which has changed since: give it as it was"):
        load_model(folder)
    command = ["train", "--plugin", str(plugin), "--output-dir", str(runs), *QUICK, "--dataset", "Bars"]
    assert main([*command, "--method", "erm", "--test-envs", "0"]) == 2
    assert "holds a run with other settings (plugins was ['" in capsys.readouterr().err
    assert main([*command, "--method", "erm", "--test-envs", "0", "--output-dir", str(tmp_path / "again")]) == 0
    assert main(["collect", str(tmp_path), "--plugin", str(plugin)]) == 0
    labels = [row["label"] for row in json.loads((tmp_path / "table.json").read_text())["tables"][0]["rows"]]
    assert len(set(labels)) == 2 and all("plugin.py" in label for label in labels)  # versions are told apart


@pytest.mark.parametrize(
    "code, message",
    [
        ("plugins.register_loss('erm')(Mine)", "loss 'erm' of a plug-in is there already"),
        ("plugins.register_loss('a b')(Mine)", "loss 'a b' of a plug-in: a name is of letters"),
        ("plugins.register_loss('mine')(Plain)", "put @dataclass right above the class"),
        ("plugins.register_loss('mine')(Method)", "does not derive from Loss"),
        ("plugins.register_loss('mine')(print)", "does not derive from Loss"),
        ("plugins.register_loss('mine')(Wrong)", "has the number 'steps', which means something else"),
        ("plugins.register_loss('mine')(Other)", "has the number 'rho', which means something else"),
        ("plugins.register_loss('mine')(Unsaid)", "has the number 'rate', which means something else"),
        ("plugins.register_method('m', Method('M', step='sgm'))", "has step='sgm': there are plain, "),
        ("plugins.register_method('m', Method('ERM'))", "is called 'ERM' in tables, as another is"),
        ("plugins.register_method('m', Method('M', numbers={'all': {'rate': 2, 'leer': 1}}))", "has no number leer"),
        (
            "plugins.register_method('m', Method('M', numbers={'picture': {}}))",
            "numbers for 'picture', which is no data",
        ),
        ("plugins.register_dataset('d', stpes=1)", "a protocol has no stpes"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_registered_leaves_nothing(forget, tmp_path, code, message, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"""
from dataclasses import dataclass
from qtdog import plugins
from qtdog.plugins import Loss, Method, number

@plugins.register_loss("first")
@dataclass
class Mine(Loss):
    rate: float = number(1.0, "a rate")

class Plain(Loss):
    pass

@dataclass
class Unsaid(Loss):
    rate: float = number(2.0, "another rate")

@dataclass
class Wrong(Loss):
    steps: int = number(1, "not the run's")

@dataclass
class Other(Loss):
    rho: float = number(7.0, "not SAM's")

{code}
""")
    for _ in range(2):  # the second time as the first
        assert main(["train", "--plugin", str(file), "--loss", "first"]) == 2
        error = capsys.readouterr().err
        line = file.read_text().splitlines().index(code) + 1
        assert message in error and f"--plugin {file}, line {line}: " in error and error.count("\n") == 1


def test_a_plugin_that_cannot_be_read(tmp_path, capsys):
    for file, message in ((tmp_path / "none.py", "No such file or directory"), (tmp_path, "Is a directory")):
        assert main(["collect", str(tmp_path), "--plugin", str(file)]) == 2
        assert f"--plugin {file}: {message}" in capsys.readouterr().err


def test_a_plugin_may_be_moved_and_its_run_continued(plugin, forget, tmp_path, capsys):
    command = ["--method", "erm", "--test-envs", "0"]
    train(plugin, tmp_path / "runs", *command)
    forget()
    moved = Path(plugin).rename(tmp_path / "moved.py")
    (done,) = (tmp_path / "runs").rglob("done")
    done.unlink()
    train(moved, tmp_path / "runs", *command, "--resume")
    assert done.exists()


@pytest.mark.slow
def test_processes_load_plugins_in_the_order_in_which_they_were_given(plugin, forget, tmp_path):
    source = Path(plugin).read_text()
    line = next(line for line in source.splitlines() if line.startswith("plugins.register_method"))
    Path(plugin).write_text(source.replace(line, ""))
    (tmp_path / "method.py").write_text(f"from qtdog import plugins\nfrom qtdog.plugins import Method\n{line}\n")
    second = ["--plugin", str(tmp_path / "method.py")]
    train(plugin, tmp_path / "runs", *second, "--method", "vrex+qtdog", "--test-envs", "0", "1", "--jobs", "2")
    assert [len(read_card(folder).run.plugins) for folder in find_runs([str(tmp_path / "runs")])] == [2, 2]


def test_versions_of_a_plugin_are_never_averaged(plugin, forget, tmp_path):
    """Two seeds, between which the file has changed."""
    for seed in ("0", "1"):
        train(plugin, tmp_path, "--method", "erm", "--test-envs", "0", "--seeds", seed)
        forget()
        with Path(plugin).open("a") as file:
            file.write("# changed\n")
    assert main(["collect", str(tmp_path), "--plugin", str(plugin)]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["tables"][0]["rows"]
    assert len({row["label"] for row in rows}) == 2


def test_a_loss_says_what_it_needs(plugin, forget, tmp_path, capsys):
    command = ["train", "--plugin", str(plugin), "--output-dir", str(tmp_path), *QUICK, "--dataset", "Bars"]
    assert main([*command, "--method", "erm", "--loss", "vrex", "--accumulate", "2", "--test-envs", "0"]) == 2
    assert "--accumulate 2 would make another loss of ERM, loss vrex" in capsys.readouterr().err
    run = settle(TrainConfig(dataset="Bars", method="erm", loss="vrex"), 0, 0)
    with pytest.raises(UserError, match="ERM, loss vrex needs 2 source domains"):
        check_minibatch(run, find_method(run.method), 1)


def test_a_network_that_does_not_tell_its_last_layer(plugin, forget, tmp_path, capsys):
    command = ["train", "--plugin", str(plugin), "--output-dir", str(tmp_path), *QUICK, "--dataset", "Bars"]
    assert main([*command, "--method", "coral", "--test-envs", "0"]) == 2
    assert "it needs get_classifier(), as timm's have" in capsys.readouterr().err


def test_help_lists_what_plugins_add(plugin, forget, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help", "--plugin", str(plugin)])
    words = " ".join(capsys.readouterr().out.split())
    for listed in ("erm, coral, mixstyle, vrex", "weight-noise, centered", "folder, csv, Bars", "--vrex-penalty"):
        assert listed in words, listed


def test_a_file_of_settings_names_no_plugin(plugin, forget, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(f"plugin: [{plugin}]\n")
    assert main(["train", "--config", str(tmp_path / "settings.yaml")]) == 2
    assert "plug-ins are named on the command line" in capsys.readouterr().err


def test_installed_packages_add_plugins_to_every_command(forget, tmp_path, monkeypatch, capsys):
    (tmp_path / "dg_extra.py").write_text(
        "from qtdog import plugins\nplugins.register_method('extra', plugins.Method('Extra', step='sam'))\n"
    )
    info = tmp_path / "dg_extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dg-extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qtdog.plugins]\nextra = dg_extra\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_installed()
    assert find_method("extra").step == "sam"
    run = plugins.remembered(settle(TrainConfig(method="extra"), 0, 0))
    assert run.plugins == (plugins.described(tmp_path / "dg_extra.py"),)
    forget()
    monkeypatch.delitem(sys.modules, "dg_extra")
    (tmp_path / "dg_extra.py").write_text("import no_such_module\n")
    assert main(["collect", str(tmp_path)]) == 2
    assert "the installed plug-in dg_extra, line 1: ModuleNotFoundError" in capsys.readouterr().err


def test_parts_in_place_of_a_presets():
    config = TrainConfig(method="eoq", loss="coral", step="sagm", averaging="swad")
    assert composed(config) == "qtdog+loss=coral+step=sagm+averaging=swad"
    method = find_method(composed(config))
    assert (method.loss, method.step, method.averaging, method.quantizer) == ("coral", "sagm", "swad", "lsq")
    assert method.label == "QT-DoG, loss coral, step sagm, averaging swad"
    run = settle(config, 0, 0)
    assert run.averaging["average_start"] == run.quantization.switch_step and set(run.step) == {"rho", "alpha"}
    assert composed(TrainConfig(method="qtdog", loss="erm", quantizer="lsq")) == "qtdog"  # its own parts
    assert settle(TrainConfig(method="qtdog", quantizer="none"), 0, 0).quantization is None
    with pytest.raises(UserError, match=r"--loss corall: there are erm, coral"):
        settle(TrainConfig(loss="corall"), 0, 0)
    with pytest.raises(UserError, match="no rule has the number coral_wait"):
        settle(TrainConfig(loss="coral", numbers={"coral_wait": 2.0}), 0, 0)
    for quantizer in (None, "inq"):
        with pytest.raises(UserError, match="--step gaqat is about learned scales"):
            settle(TrainConfig(method="erm", step="gaqat", quantizer=quantizer), 0, 0)
    with pytest.raises(UserError, match="--coral-weight has no meaning"):
        settle(TrainConfig(method="coral", loss="erm", numbers={"coral_weight": 2.0}), 0, 0)


@pytest.mark.slow
def test_a_composition_trains_sweeps_and_is_collected_and_ensembled(digits_dir, tmp_path):
    parts = ["--loss", "coral", "--step", "sagm", "--averaging", "swad", "--quantizer", "lsq", "--coral-weight", "2"]
    parts += ["--swad-converge", "2"]
    common = [*QUICK, "--batch-size", "4", "--data-dir", str(digits_dir), "--switch-step", "1", "--test-envs", "0"]
    common += [*parts, "--output-dir", str(tmp_path)]
    assert main(["train", *common, "--method", "erm", "--seeds", "0", "1"]) == 0
    assert main(["sweep", *common, "--methods", "erm", "sam", "--n-trials", "1", "--output-dir", f"{tmp_path}/s"]) == 0
    assert main(["ensemble", str(tmp_path / "RotatedMNIST")]) == 0
    assert main(["collect", str(tmp_path / "RotatedMNIST")]) == 0
    assert "ERM, loss coral, step sagm" in (tmp_path / "RotatedMNIST" / "table.txt").read_text()
