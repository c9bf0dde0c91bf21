"""Settings that would silently make another method of a run are refused, or their log says what they come to."""

import shutil

import pytest

from qtdog.cli import main
from qtdog.config import TrainConfig
from qtdog.errors import UserError
from qtdog.methods.checks import check_minibatch, remarks
from qtdog.methods.method import rule_numbers
from qtdog.methods.presets import METHODS, find_method, seeds_of, settle
from qtdog.training import sweep


def settled(method, dataset="RotatedMNIST", **given):
    numbers = {name: given.pop(name) for name in rule_numbers() if name in given}
    return settle(TrainConfig(method=method, dataset=dataset, numbers=numbers, **given), test_env=0, seed=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "sma", "average_start": 50, "steps": 50}, "--average-start 50 is not reached in a run of 50 steps"),
        ({"method": "swad", "steps": 101}, "--swad-converge 3 is more than the 2 checkpoints"),
        ({"method": "swad", "swad_converge": 53}, "--swad-converge 53 is more than the 51 checkpoints"),
        ({"method": "qtdog+swad", "switch_step": 4950}, "is more than the 1 checkpoints of this run from step 4950 on"),
        (
            {"method": "gaqat", "steps": 349},
            "--disorder-window 350 is more than the 349 steps of this run, which would",
        ),
        ({"method": "fqat", "switch_step": 4700}, "the 301 steps of this run from the switch at 4700 on"),
        ({"method": "gaqat", "qat_mode": "rtn-frozen"}, "about learned scales, which --qat-mode rtn-frozen has not"),
        ({"method": "gaqat", "freeze_when": "beside"}, "--freeze-when must be below or above, not beside"),
        ({"method": "erm", "dataset": "PACS", "dropout": 1.0}, "--dropout must be less than 1"),
    ],
)
def test_what_would_not_be_the_method_it_is_called(given, told):
    with pytest.raises(UserError, match=told):
        settled(**given)


@pytest.mark.parametrize(("steps", "freq"), [(1, 1), (9, 2), (10, 3), (10, 100), (301, 100), (302, 100), (5001, 300)])
def test_checkpoints_are_counted_as_they_are_made(steps, freq):
    run = settled("erm", steps=steps, checkpoint_freq=freq)
    made = [step for step in range(steps) if step % freq == 0 or step == steps - 1]
    for start in range(steps):
        assert run.checkpoints_from(start) == sum(step >= start for step in made)


def test_the_least_that_is_enough():
    assert settled("swad", steps=201).averaging["swad_converge"] == 3  # checkpoints at 0, 100 and 200
    assert settled("gaqat", steps=350) and settled("gaqat", steps=450, switch_step=100)
    assert settled("sma", steps=101)


def test_minibatches_and_domains_that_a_loss_needs():
    coral, mixstyle = settled("coral"), settled("mixstyle", batch_size=1)
    check_minibatch(coral, find_method("coral"), 2)
    check_minibatch(mixstyle, find_method("mixstyle"), 2)  # two images, of one domain each
    check_minibatch(settled("erm", batch_size=1), find_method("erm"), 1)
    with pytest.raises(UserError, match="CORAL needs 2 source domains, here is 1"):
        check_minibatch(coral, find_method("coral"), 1)
    with pytest.raises(UserError, match="ERM needs 1 source domains, here are 0"):
        check_minibatch(settled("erm"), find_method("erm"), 0)
    with pytest.raises(UserError, match="MixStyle needs 2 images that it computes together"):
        check_minibatch(mixstyle, find_method("mixstyle"), 1)


@pytest.mark.parametrize("method", ["coral", "coral+qtdog"])
def test_coral_of_one_source_domain_is_refused_before_training(pictures, tmp_path, capsys, method):
    two = shutil.copytree(pictures, tmp_path / "two")
    shutil.rmtree(two / "middle")
    common = ["--data-dir", str(two), "--backbone", "test_resnet", "--weights", "none", "--device", "cpu"]
    common += ["--output-dir", str(tmp_path / "runs"), "--test-envs", "dark"]
    assert main(["train", "--dataset", "folder", *common, "--method", method]) == 2
    assert "CORAL" in (told := capsys.readouterr().err) and "needs 2 source domains, here is 1" in told
    assert main(["sweep", "--datasets", "folder", *common, "--methods", "erm", method, "--show"]) == 2
    assert "needs 2 source domains, here is 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_checks_the_minibatches_of_every_method():
    with pytest.raises(UserError, match="--batch-size must be at least 2 for CORAL"):
        sweep.jobs_of(sweep.SweepConfig(methods=["erm", "coral"], batch_size=1))


@pytest.mark.parametrize(
    ("given", "domains", "told"),
    [
        ({"method": "sam", "rho": 0.0}, 2, ["with these numbers the step sam is the step plain"]),
        ({"method": "sagm", "rho": 0.0}, 2, []),
        ({"method": "sagm", "rho": 0.0, "alpha": 0.0}, 2, ["with these numbers the step sagm is the step plain"]),
        ({"method": "weight-noise", "weight_noise": 0.0}, 2,
         ["with these numbers the step weight-noise is the step plain"]),
        ({"method": "gaqat", "disorder_threshold": 0.0}, 2, ["with these numbers the step gaqat is the step sagm"]),
        ({"method": "gaqat", "disorder_threshold": 1.0}, 2, []),
        ({"method": "gaqat", "disorder_threshold": 1.0, "freeze_when": "above"}, 2,
         ["with these numbers the step gaqat is the step sagm"]),
        ({"method": "coral", "coral_weight": 0.0}, 2, ["with these numbers the loss coral is the loss erm"]),
        ({"method": "mixstyle", "mixstyle_p": 0.0}, 2, ["with these numbers the loss mixstyle is the loss erm"]),
        ({"method": "mixstyle"}, 1, ["one source domain: the loss mixstyle mixes the styles within it"]),
    ],
)  # fmt: skip
def test_what_a_number_comes_to_is_said(given, domains, told):
    run = settled(**given)
    assert remarks(run, find_method(run.method), domains) == told


@pytest.mark.parametrize("method", METHODS)
def test_presets_are_what_they_are_called(method):
    assert remarks(settled(method), find_method(method), 2) == []


def test_the_log_says_what_a_run_comes_to(digits_dir, tmp_path):
    arguments = ["train", "--dataset", "RotatedMNIST", "--data-dir", str(digits_dir), "--output-dir", str(tmp_path),
                 "--test-envs", "0", "--device", "cpu", "--method", "sam", "--rho", "0", "--steps", "1",
                 "--batch-size", "2", "--eval-train-images", "2", "--backbone", "SMALL_CNN"]  # fmt: skip
    assert main(arguments) == 0
    log = (tmp_path / "RotatedMNIST" / "sam" / "0" / "trial0_seed0" / "out.txt").read_text()
    assert "with these numbers the step sam is the step plain" in log


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"steps": 300}, "never reaches: give --switch-step .*120"),
        ({"steps": 0}, "--steps must be greater than 0"),
        ({"lr": -1.0}, "--lr must be greater"),
        ({"seeds": [-1]}, "--seed must not be negative"),
        ({"holdout_fraction": 1.0}, "--holdout-fraction"),
        ({"eval_train_images": 0}, "--eval-train-images"),
        ({"backbone": "resnet18"}, "--backbone resnet18 does not take RotatedMNIST"),
        ({"dataset": "folder", "backbone": "MNIST_CNN"}, "MNIST_CNN does not take folder"),
        ({"dropout": 0.5}, "--dropout has no meaning for MNIST_CNN"),
        ({"weight_bits": 9}, "--weight-bits must be 2 to 8"),
        ({"scale_lr": -1.0}, "--scale-lr"),
        ({"method": "erm", "weight_bits": 7}, "--weight-bits has no meaning for method erm"),
    ],
)
def test_settings_that_make_no_sense(given, told):
    config = TrainConfig(**given)
    with pytest.raises(UserError, match=told):
        settle(config, test_env=0, seed=seeds_of(config)[0])
