"""Saving over another ensemble: at any moment there is a whole one, the old or the new."""

import os
import signal
import threading

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.packed.file import CARD, CONFIG, MODEL

IMAGES = torch.ones(2, 8)


def make(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    qk.quantize_(model, qk.QConfig(weight_bits=4))
    return qk.PackedEnsemble.from_models([model], seed=seed)


def found(folder):
    """Which of `make`'s ensembles a folder holds; its answer and what it says of itself are of the same."""
    loaded = qk.PackedEnsemble.load(folder)
    seed = loaded.info["seed"]
    assert torch.equal(loaded(IMAGES), make(seed)(IMAGES))
    return seed


def save_killed_at(operation, when, folder):
    """Save make(2) to a folder in a process that kills itself at a file operation; whether it got there."""
    ensemble = make(2)
    child = os.fork()
    if child == 0:
        left = operation

        def counted(call):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                mine = left == 0  # a call may make further ones
                if mine and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return call(*args, **kwargs)
                finally:
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)

            return run

        for name in ("replace", "unlink", "open", "fsync", "mkdir", "close"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            ensemble.save(folder)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_that_is_killed_loses_neither(tmp_path, when):
    operation, seeds = 1, []
    while True:
        folder = make(1).save(tmp_path / str(operation))
        killed = save_killed_at(operation, when, folder)
        seeds.append(found(folder))
        make(3).save(folder)
        assert found(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, MODEL]  # what was left is gone
        if not killed:
            break
        operation += 1
    assert operation > 10 and seeds == sorted(seeds) and {1, 2} == set(seeds)


def test_saves_at_the_same_time_mix_nothing(tmp_path):
    ensembles = [make(seed) for seed in range(8)]
    mixed: list[Exception] = []

    def save(ensemble):
        for _ in range(5):
            ensemble.save(tmp_path / "packed")

    def load():
        try:
            for _ in range(20):
                found(tmp_path / "packed")
        except Exception as error:
            mixed.append(error)

    ensembles[0].save(tmp_path / "packed")
    threads = [threading.Thread(target=save, args=[e]) for e in ensembles] + [threading.Thread(target=load)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed and found(tmp_path / "packed") in range(8)
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [CARD, CONFIG, MODEL]


def test_a_save_writes_through_no_link(tmp_path):
    """Whoever may write into the folder has none of the names that a save will use to lay a link under."""
    folder = make(1).save(tmp_path / "packed")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (MODEL, CONFIG, CARD):
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
        (folder / f".{name}.{os.getpid()}").symlink_to(victim)
    make(2).save(folder)
    assert victim.read_text() == "precious" and found(folder) == 2


def test_what_a_folder_holds_beside_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    make(1).save(tmp_path)
    make(2).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and found(tmp_path) == 2


def test_an_ensemble_that_cannot_be_saved_leaves_the_one_that_is_there(tmp_path):
    make(1).save(tmp_path)
    with pytest.raises(TypeError, match="plain types"):
        make(2).save(tmp_path, classes={1})
    assert found(tmp_path) == 1
