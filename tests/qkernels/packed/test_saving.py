"""Saving over another ensemble: at any moment there is a whole one, the old or the new."""

import os
import threading

import pytest

from killed_saves import found, make, save_killed_at
from qkernels.packed.file import CARD, CONFIG, MODEL


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
