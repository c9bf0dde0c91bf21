"""Who may write in a run's folder."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import yaml

from interrupting import start
from qtdog.config import TrainConfig
from qtdog.errors import UserError
from qtdog.files import write_text
from qtdog.methods.presets import settle
from qtdog.training import sweep
from qtdog.training.folders import TrainedElsewhere, is_claimed, prepare_folder, sole_owner

RUN = settle(TrainConfig(method="erm"), test_env=0, seed=0)


def holder(folder):
    """A process that claims a folder and holds it until it is killed."""
    code = "import sys, pathlib\nfrom qtdog.training.folders import sole_owner\n"
    code += f"with sole_owner(pathlib.Path({str(folder)!r})):\n    print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_claim_outlives_whatever_is_replaced_and_ends_with_its_process(tmp_path):
    folder = tmp_path / "job"
    assert sweep.state(folder) == "missing"
    process = holder(folder)
    prepare_folder(RUN, folder, resume=False, overwrite=False)
    for _ in range(2):
        write_text(folder / "config.yaml", yaml.safe_dump(RUN.to_dict()))  # another file under the same name
        assert sweep.state(folder) == "running" and is_claimed(folder)
        with pytest.raises(TrainedElsewhere, match="is being trained by another process"), sole_owner(folder):
            pass
    process.kill()
    process.wait()
    assert sweep.state(folder) == "interrupted" and not is_claimed(folder)
    (folder / "failed").write_text("UserError: the loss is nan\n")
    assert sweep.state(folder) == "failed"
    (folder / "done").touch()
    assert sweep.state(folder) == "done"


def test_two_threads_of_a_process_are_two(tmp_path):
    told = []

    def claim():
        try:
            with sole_owner(tmp_path):
                told.append("claimed")
        except TrainedElsewhere as error:
            told.append(str(error))

    with sole_owner(tmp_path):
        thread = threading.Thread(target=claim)
        thread.start()
        thread.join()
        assert is_claimed(tmp_path)
    assert told == [f"{tmp_path} is being trained by this process already"] and not is_claimed(tmp_path)
    claim()
    assert told[1:] == ["claimed"]


def asks_and_claims(folder, answers):
    """In a forked child, which has all that its parent knows, and none of its locks."""
    answers.put(is_claimed(folder))
    try:
        with sole_owner(folder):
            answers.put("claimed")
    except TrainedElsewhere:
        answers.put("refused")


def test_neither_a_question_nor_a_refusal_drops_the_claim(tmp_path):
    """POSIX drops a process's lock when it closes any descriptor of the file."""
    context = multiprocessing.get_context("fork")
    with sole_owner(tmp_path):
        assert is_claimed(tmp_path)
        with pytest.raises(TrainedElsewhere), sole_owner(tmp_path):
            pass
        answers = context.SimpleQueue()
        child = context.Process(target=asks_and_claims, args=(tmp_path, answers))
        child.start()
        child.join()
        assert (answers.get(), answers.get()) == (True, "refused")


def test_a_lock_file_that_was_removed_meanwhile_is_not_a_claim(tmp_path, monkeypatch):
    """Between opening it and locking it another process has removed it, and a third one has made it anew."""
    from qtdog.training import folders

    lockf, removed = folders.fcntl.lockf, []

    def late(descriptor, how):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
            (tmp_path / ".lock").touch()
        lockf(descriptor, how)

    monkeypatch.setattr(folders.fcntl, "lockf", late)
    with sole_owner(tmp_path):
        monkeypatch.undo()
        answers = multiprocessing.get_context("fork").SimpleQueue()
        child = multiprocessing.get_context("fork").Process(target=asks_and_claims, args=(tmp_path, answers))
        child.start()
        child.join()
        assert (answers.get(), answers.get()) == (True, "refused")


def test_leftovers_of_a_killed_run_go_at_the_next_start(tmp_path):
    left = tmp_path / f".checkpoint.pt.{'ab' * 8}.tmp"
    left.write_text("half")
    assert not is_claimed(tmp_path) and left.exists()  # whoever only looks removes nothing
    with sole_owner(tmp_path):
        assert not left.exists()


@pytest.mark.parametrize("content", ["", "5", "[1, 2]", "a: [", "\0\1", "plugins: 3", "plugins: [{}]"])
def test_a_damaged_config_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        prepare_folder(RUN, tmp_path, resume=True, overwrite=False)
    assert prepare_folder(RUN, tmp_path, resume=False, overwrite=True)


@pytest.mark.parametrize("name", ["done", "checkpoint.pt", "checkpoint.previous.pt"])
def test_a_trained_run_without_its_config_is_not_removed(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="is missing beside a trained run"):
        prepare_folder(RUN, tmp_path, resume=True, overwrite=False)
    assert (tmp_path / name).read_text() == "precious"


def sweeping(digits_dir, output, *more):
    return ["sweep", "--batch-size", "2", "--device", "cpu", "--steps", "8", "--checkpoint-freq", "2",
            "--eval-train-images", "4", "--backbone", "SMALL_CNN", "--test-envs", "0", "1", "--methods", "erm",
            "--n-trials", "2", "--data-dir", str(digits_dir), "--output-dir", str(output), *more]  # fmt: skip


@pytest.mark.slow
def test_two_sweeps_share_a_folder(digits_dir, tmp_path):
    """Neither reports the other's run as failed, each trains what the other does not, and nothing is trained twice."""
    output = tmp_path / "sweep"
    both = [start(sweeping(digits_dir, output), output) for _ in range(2)]
    outcomes = [each.outcome() for each in both]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert not any("FAILED" in outcome.text for outcome in outcomes) and not list(output.rglob("failed"))
    folders = sorted(path.parent for path in output.rglob("done"))
    assert len(folders) == 4
    assert all((folder / "out.txt").read_text().count("selected step") == 1 for folder in folders)


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_running_not_failed(digits_dir, tmp_path):
    output = tmp_path / "sweep"
    config = sweep.SweepConfig(
        batch_size=2, steps=8, checkpoint_freq=2, eval_train_images=4, backbone="SMALL_CNN", test_envs=["0", "1"],
        methods=["erm"], n_trials=2, data_dir=str(digits_dir), output_dir=str(output), device="cpu",
    )  # fmt: skip
    first, *_, last = sweep.jobs_of(config)
    process = holder(last.folder)
    try:
        going = start(sweeping(digits_dir, output), output)
        while not (first.folder / "done").exists():
            time.sleep(0.01)
        outcome = going.outcome()
    finally:
        process.kill()
        process.wait()
    assert outcome.code == 0, outcome
    assert "1 running" in outcome.text and "FAILED" not in outcome.text and not (last.folder / "failed").exists()
    assert len(list(output.rglob("done"))) == 3
    assert start(sweeping(digits_dir, output), output).outcome().code == 0
    assert len(list(output.rglob("done"))) == 4 and os.listdir(last.folder).count("failed") == 0
