"""`--test-envs` and `--sources`: what runs leave out, and what they are trained on."""

import pytest

from qtdog.cli import main
from qtdog.config import RunConfig, TrainConfig
from qtdog.data import domain_names, load_dataset
from qtdog.errors import UserError
from qtdog.methods.presets import settle
from qtdog.results.runs import checkpoint_records, read_card
from qtdog.training.evaluation import mean_out_accuracy
from qtdog.training.sweep import key_of
from qtdog.training.tasks import parse_tasks

ANGLES = domain_names("RotatedMNIST", None)[1]
COLORS = ["+90%", "+80%", "-90%"]


def test_domains_are_known_without_the_data(digits_dir):
    assert ANGLES == ["0", "15", "30", "45", "60", "75"]
    assert [domain.name for domain in load_dataset("RotatedMNIST", str(digits_dir), None).domains] == ANGLES


@pytest.mark.parametrize(
    ("domains", "test_envs", "sources", "expected"),
    [
        (ANGLES, ["all"], [], [((env,), ()) for env in range(6)]),
        (ANGLES, ["15", "5", "0", "75"], [], [((1,), ()), ((5,), ()), ((0,), ())]),
        (ANGLES, ["0+15", "45"], [], [((0, 1), ()), ((3,), ())]),
        (ANGLES, ["15+0", "0+15"], [], [((0, 1), ())]),
        (COLORS, ["+90%"], [], [((0,), ())]),
        (["Fr\xfcchte", "Photo"], ["Fru\u0308chte"], [], [((0,), ())]),  # as macOS types it
        (COLORS, ["+90%+-90%", "1++90%"], [], [((0, 2), ()), ((0, 1), ())]),
        (COLORS, ["all"], ["+80%"], [((0, 2), (1,))]),
        (ANGLES, ["0", "75"], ["30+45", "60"], [((0,), (2, 3, 4)), ((5,), (2, 3, 4))]),
    ],
)
def test_tasks(domains, test_envs, sources, expected):
    assert parse_tasks(test_envs, sources, "DATA", domains) == expected


@pytest.mark.parametrize(
    ("test_envs", "sources", "told"),
    [
        (["9"], [], "--test-envs 9: DATA has the domains 0 0, 1 15, 2 30"),
        (["0+9"], [], "--test-envs 0+9: DATA has the domains"),
        (["0"], ["photo"], "--sources photo: DATA has the domains"),
        (["30"], ["30"], "30 cannot be trained on and left out"),
        (["0+15+30+45+60+75"], [], "leaves no domain to train on"),
        (["all"], ANGLES, "leaves no domain to test on"),
    ],
)
def test_tasks_that_cannot_be(test_envs, sources, told):
    with pytest.raises(UserError) as error:
        parse_tasks(test_envs, sources, "DATA", ANGLES)
    assert told in str(error.value)


def test_settings_of_earlier_versions_are_read():
    """They had one target a run; a sweep of theirs goes on in its folders."""
    run = settle(TrainConfig(method="erm"), 3, 0)
    before = {("test_env" if name == "test_envs" else name): value for name, value in run.to_dict().items()}
    before["test_env"] = 3
    assert RunConfig.from_dict(before) == run and "sources" not in run.to_dict()
    assert key_of(run, "RotatedMNIST") == "e33f865161b744ccb7eef19e55da722c"


@pytest.mark.slow
def test_several_targets_and_chosen_sources(pictures, tmp_path, capsys):
    train = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--method", "erm", "--device", "cpu"]
    train += ["--backbone", "test_resnet", "--weights", "none", "--image-size", "16", "--steps", "5"]
    train += ["--checkpoint-freq", "2", "--batch-size", "4", "--output-dir", str(tmp_path)]
    assert main([*train, "--test-envs", "bright+dark"]) == 0
    assert main([*train, "--sources", "dark"]) == 0
    assert main([*train, "--sources", "dark", "--test-envs", "bright"]) == 0
    for task, targets, sources in (
        ("bright+dark", [0, 1], [2]),
        ("bright+middle_from_dark", [0, 2], [1]),
        ("bright_from_dark", [0], [1]),
    ):
        run = tmp_path / "tints" / "erm" / task / "trial0_seed0"
        card, records = read_card(run), checkpoint_records(run)
        assert (list(card.run.test_envs), card.source_envs, card.target) == (targets, sources, task)
        chosen = max(records, key=lambda record: mean_out_accuracy(record, sources))
        assert card.selected_step == chosen["step"] and chosen["args"]["test_envs"] == targets
        assert card.target_accuracy == sum(chosen[f"env{env}_in_acc"] for env in targets) / len(targets)
        capsys.readouterr()
        assert main(["eval", str(run), "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert out.count("(target)") == len(targets) and out.count("left out, as it was trained on them: 16") == 1
    assert main(["train", *train[1:], "--sources", "dark", "--loss", "coral", "--test-envs", "bright"]) == 2
    assert "source domain" in capsys.readouterr().err
    assert main(["collect", str(tmp_path / "tints" / "erm" / "bright+dark")]) == 0
    assert "bright+dark" in capsys.readouterr().out
