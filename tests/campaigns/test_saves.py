"""Saves over another ensemble that are killed: one of the two is there, whole, and the next save clears up."""

import random
from collections import Counter

import pytest

from campaigns_of import cases
from killed_saves import found, make, save_killed_at
from qkernels.packed.file import CARD, CONFIG, MODEL

KILLS, SEED, SECONDS = 50, 13, 900
OPERATIONS = 30  # about as many as a save has


@pytest.mark.timeout(SECONDS)
@cases(5, KILLS)
def test_killed_saves(tmp_path, count, figures):
    draw, outcomes = random.Random(SEED), Counter[str]()
    for case in range(count):
        folder = make(1).save(tmp_path / str(case))
        while not save_killed_at(draw.randint(1, OPERATIONS), draw.choice(["before", "after"]), folder):
            make(1).save(folder)  # it had ended before
        outcomes[{1: "the old one whole", 2: "the new one whole"}[found(folder)]] += 1
        make(3).save(folder)
        assert found(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, MODEL]
    figures("a save over another, killed", count, dict(outcomes))
