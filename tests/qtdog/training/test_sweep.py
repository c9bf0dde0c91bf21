import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qtdog.cli import main
from qtdog.config import TrainConfig
from qtdog.errors import UserError
from qtdog.files import read_records
from qtdog.methods.hparams import random_hparams
from qtdog.methods.presets import settle
from qtdog.training import jobs, sweep
from qtdog.training.sweep import SweepConfig

TINY = ["--batch-size", "2", "--device", "cpu", "--steps", "3", "--checkpoint-freq", "1", "--eval-train-images", "4"]


def arguments(digits_dir, output, *more):
    return ["sweep", *TINY, "--data-dir", str(digits_dir), "--output-dir", str(output), "--test-envs", "0", *more]


@pytest.mark.parametrize(
    ("dataset", "hparams_seed", "trial_seed", "drawn", "mmd_gamma"),
    [  # printed by DomainBed's own random_hparams, seeded with seed_hash(hparams_seed, trial_seed) as its train.py does
        ("PACS", 1, 0, (2.7028930742148706e-05, 0.00044832883881609976, 39, 0.5), 1.4227570299330277),
        ("DomainNet", 2, 1, (0.0002692684204277505, 3.539788355410888e-06, 15, 0.5), 0.17339913420118555),
        ("RotatedMNIST", 3, 2, (9.376027078720673e-05, 0.0, 114, 0.0), 1.3558814959381456),
        ("VLCS", 5, 1, (4.057057661309337e-05, 4.206907223916248e-05, 33, 0.1), 0.4840982765873347),
    ],
)
def test_random_hyper_parameters_are_domainbeds(dataset, hparams_seed, trial_seed, drawn, mmd_gamma):
    found = random_hparams(dataset, "erm", hparams_seed, trial_seed)
    assert random_hparams(dataset, "coral", hparams_seed, trial_seed) == {**found, "coral_weight": mmd_gamma}
    for method in ("coral", "coral+qtdog"):
        coral = TrainConfig(dataset=dataset, hparams_seed=hparams_seed, trial_seed=trial_seed, method=method)
        assert settle(coral, 0, 0).loss == {"coral_weight": mmd_gamma}
        assert settle(replace(coral, numbers={"coral_weight": 2.0}), 0, 0).loss == {"coral_weight": 2.0}
    assert (found["lr"], found["weight_decay"], found["batch_size"], found["dropout"]) == drawn
    config = TrainConfig(dataset=dataset, hparams_seed=hparams_seed, trial_seed=trial_seed, method="qtdog")
    run, preset = settle(config, 0, 0), settle(TrainConfig(dataset=dataset, method="qtdog"), 0, 0)
    assert (run.lr, run.weight_decay, run.batch_size, run.dropout) == drawn
    assert run.quantization.scale_lr / run.lr == pytest.approx(preset.quantization.scale_lr / preset.lr)


def test_all_combinations_each_with_its_own_folder():
    config = SweepConfig(
        datasets=["RotatedMNIST", "PACS"], methods=["erm", "qtdog"], n_trials=2, n_hparams=3, members=2, switch_step=7
    )
    jobs = sweep.jobs_of(config)
    assert len(jobs) == (6 + 4) * 2 * 2 * 3 * 2 and len({job.folder for job in jobs}) == len(jobs)
    assert all(len(job.folder.name) == 32 and job.folder.parent == Path("sweep") for job in jobs)
    assert {(job.run.trial_seed, job.run.hparams_seed, job.run.seed) for job in jobs} == {
        (trial, draw, seed) for trial in range(2) for draw in range(3) for seed in range(2)
    }
    assert [job.run.quantization.switch_step for job in jobs if job.run.quantization] == [7] * (len(jobs) // 2)
    elsewhere = sweep.jobs_of(SweepConfig(**{**vars(config), "data_dir": "moved"}))
    assert [job.folder for job in elsewhere] == [job.folder for job in jobs]
    longer = sweep.jobs_of(SweepConfig(**{**vars(config), "steps": 9000}))
    assert not {job.folder for job in longer} & {job.folder for job in jobs}


def test_members_are_the_methods_own_unless_given():
    def seeds(**given):
        return [job.run.seed for job in sweep.jobs_of(SweepConfig(test_envs=["0"], n_trials=1, **given))]

    assert seeds(methods=["eoq"]) == [0, 1, 2, 3, 4] and seeds(methods=["eoq"], members=2) == [0, 1]
    assert seeds(methods=["qtdog", "eoq"]) == [0, 1, 2, 3, 4]  # the first member is the single model


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"n_trials": 0}, "--n-trials must be at least 1"),
        ({"members": 0}, "--members must be at least 1"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"retries": -1}, "--retries must not be negative"),
        ({"methods": ["erm", "sam"], "weight_bits": 7}, "--weight-bits has no meaning for method erm"),
        ({"test_envs": ["ninety"]}, "RotatedMNIST has the domains 0 0, 1 15"),
    ],
)
def test_sweeps_that_make_no_sense(given, told):
    with pytest.raises(UserError, match=told):
        sweep.sweep(SweepConfig(**given))


@pytest.mark.slow
def test_nothing_is_trained_twice(digits_dir, tmp_path, capsys):
    command = arguments(digits_dir, tmp_path, "--methods", "erm", "--n-trials", "2", "--n-hparams", "2")
    assert main([*command, "--show"]) == 0
    assert "4 runs: 0 done, 0 running, 0 interrupted, 0 failed, 4 missing" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    assert main([*command[:-4], "--n-trials", "1", "--n-hparams", "2"]) == 0
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("results.jsonl")}
    assert len(times) == 2
    capsys.readouterr()
    assert main(command) == 0
    assert "4 runs: 2 done, 0 running, 0 interrupted, 0 failed, 2 missing; 2 to train" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert main([*command, "--show"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 5 and "done " in out and "RotatedMNIST erm, target 0, trial 1, hparams 1, seed 0" in out
    assert main(["collect", str(tmp_path)]) == 0
    assert "ERM: 2 sets of hyper-parameters." in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(digits_dir, tmp_path, capsys, monkeypatch):
    train, ill = jobs.train, [True]

    def fails_on_trial_0(run, *rest):
        if run.trial_seed == 0 and ill:
            raise UserError("the loss is nan at step 1")
        return train(run, *rest)

    monkeypatch.setattr(jobs, "train", fails_on_trial_0)
    command = arguments(digits_dir, tmp_path, "--methods", "erm", "--n-trials", "2")
    assert main(command) == 2
    assert "1 of 2 runs failed" in capsys.readouterr().err
    assert main([*command, "--show"]) == 0
    out = capsys.readouterr().out
    assert "UserError: the loss is nan at step 1" in out and "1 done, 0 running, 0 interrupted, 1 failed" in out
    ill.clear()
    assert main(command) == 0
    assert not list(tmp_path.rglob("failed")) and len(list(tmp_path.rglob("done"))) == 2


def killed(job, progress):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_one_line():
    with pytest.raises(UserError, match="a process was killed, perhaps for want of memory: try fewer --jobs"):
        list(jobs.run_each(["one", "two"], 2, killed))


@pytest.mark.slow
def test_an_unexpected_error_is_not_hidden(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "train", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments(digits_dir, tmp_path, "--methods", "erm", "--n-trials", "1"))
    assert next(tmp_path.rglob("failed")).read_text() == "ZeroDivisionError: division by zero\n"


def test_ray_is_optional(digits_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments(digits_dir, tmp_path, "--engine", "ray", "--methods", "erm")) == 2
    assert "--engine ray needs Ray: pip install 'qtdog[ray]'" in capsys.readouterr().err


def processes_that_hold(file):
    """Of this machine, but for this one: those that have `file` open."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                if any(os.path.samefile(link, file) for link in (process / "fd").iterdir() if link.exists()):
                    yield int(process.name)
            except OSError:
                continue  # it has ended, or is not ours


@pytest.mark.slow
def test_a_killed_workers_run_continues_from_its_checkpoint_on_ray(ray_cluster, digits_dir, tmp_path, capsys):
    """The worker is killed by SIGKILL after its first checkpoints; the result is that of an undisturbed run."""
    sizes = ["--steps", "60", "--checkpoint-freq", "6", "--methods", "erm", "--n-trials", "1"]
    on_ray = arguments(digits_dir, tmp_path / "ray", *sizes, "--engine", "ray")
    exit_codes = []
    sweeping = threading.Thread(target=lambda: exit_codes.append(main(on_ray)))
    sweeping.start()
    killed = []
    while sweeping.is_alive() and not killed:
        for checkpoint in (tmp_path / "ray").glob("*/checkpoint.pt"):
            for process in processes_that_hold(checkpoint.with_name(".lock")):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
        time.sleep(0.02)
    sweeping.join()
    assert exit_codes == [0] and killed
    (folder,) = (tmp_path / "ray").iterdir()
    assert "resumed after step" in (folder / "out.txt").read_text()
    assert main(arguments(digits_dir, tmp_path / "local", *sizes)) == 0
    undisturbed = tmp_path / "local" / folder.name
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()

    def accuracies(place):
        rows = read_records(place / "results.jsonl")
        return json.dumps([{name: value for name, value in row.items() if name.endswith("acc")} for row in rows])

    assert accuracies(folder) == accuracies(undisturbed)
    assert main([*on_ray, "--cpus-per-job", "64", "--n-trials", "2"]) == 2
    assert "a job wants 64 CPU, the Ray cluster has 2" in capsys.readouterr().err
