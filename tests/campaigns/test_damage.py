"""What commands say of a disk that fails and of damaged files: one line, or what they said of the whole ones.

Each campaign is there twice: a few cases of it among the slow tests, all of them by night.
"""

import errno
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from campaigns_of import cases
from interrupting import SMALL, Fail, run, told_in_one_line
from tiny import make_digits

SEED = 13
DISKS, DAMAGES = 5, 200  # cases: of each command; of all files together
SECONDS = 3600  # that a campaign may take
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

pytestmark = [pytest.mark.timeout(SECONDS), pytest.mark.untraced]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with `digits`, and `runs` of GAQAT and of ERM with their ensembles, one of them packed."""
    root = tmp_path_factory.mktemp("work")
    make_digits(root / "digits")
    for method, more in (("gaqat", ["--seeds", "0", "1", "--disorder-window", "2"]), ("erm", ["--seeds", "0", "1"])):
        arguments = ["train", *SMALL, "--method", method, *more, "--data-dir", str(root / "digits")]
        outcome = run([*arguments, "--output-dir", str(root / "runs")], root)
        assert outcome.code == 0, outcome.text
    outcome = run(commands(root)["ensemble"], root)
    assert outcome.code == 0, outcome.text
    return root


def commands(root: Path) -> dict[str, list[str]]:
    """Command lines by what they are for; all they write goes below `root`."""
    runs, data, device = str(root / "runs"), ["--data-dir", str(root / "digits")], ["--device", "cpu"]
    one = next((root / "runs").rglob("trial0_seed0"), root)
    packed = next((root / "runs").rglob("packed"), root)
    few = ["--max-images", "2", *data, *device, "--output"]
    return {
        "train": ["train", *SMALL, "--method", "erm", *data, "--output-dir", str(root / "new")],
        "again": ["train", *SMALL, "--method", "erm", "--seeds", "0", "1", *data, "--output-dir", runs],
        "sweep": ["sweep", *SMALL, "--methods", "erm", "--n-trials", "1", *data, "--output-dir", str(root / "sweep")],
        "ensemble": ["ensemble", runs, *data, *device],
        "collect": ["collect", runs],
        "flatness": ["flatness", str(one), "--radii", "0", "1", "--directions", "2", *few, str(root / "f" / "f.png")],
        "landscape": ["landscape", str(one), "--grid", "3", *few, str(root / "l" / "l.svg")],
        "curvature": ["curvature", str(one), "--vectors", "2", *few, str(root / "c" / "c.csv")],
        "diagnostics": ["diagnostics", runs, "--output-dir", str(root / "d")],
        "eval": ["eval", str(packed), *data, *device],
    }


@cases(1, DISKS)
@pytest.mark.parametrize("name", ["ensemble", "collect", "flatness", "landscape", "curvature", "diagnostics"])
def test_a_disk_that_fails_is_one_line_of_any_command(work, tmp_path, name, count, figures):
    whole = Path(shutil.copytree(work, tmp_path / "whole"))
    operations = run(commands(whole)[name], whole).operations
    assert operations
    draw = random.Random(SEED)
    for case in range(count):
        root = Path(shutil.copytree(work, tmp_path / str(case)))
        how = Fail(draw.randint(1, operations), ERRORS[case % len(ERRORS)])
        outcome = run(commands(root)[name], root, how)
        assert told_in_one_line(outcome) and str(root) in outcome.text, (case, how, outcome)
        outcome = run(commands(root)[name], root)
        assert outcome.code == 0, (case, how, outcome)
        shutil.rmtree(root)
    figures(f"{name}, a disk that fails", count, {"one line, then done": count})


def damage(file: Path, draw: random.Random) -> str:
    """Something happens to a file; what."""
    content = bytearray(file.read_bytes())
    how = draw.choice(["flip", "flip", "cut", "empty", "junk", "folder", "gone", "zeros"])
    if how == "flip":
        bit = draw.randrange(8 * max(len(content), 1))
        content = content or bytearray(1)
        content[bit // 8] ^= 1 << bit % 8
    elif how == "cut":
        del content[draw.randrange(len(content) + 1) :]
    elif how == "zeros":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    elif how == "junk":
        content = bytearray(draw.randbytes(len(content)))
    elif how == "empty":
        content.clear()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(content)
    return how


@cases(10, DAMAGES)
def test_damaged_files_are_one_line_of_any_command(work, tmp_path, count, figures):
    """Any file of a run or an ensemble, with its seal and with the mere mark of earlier versions."""
    draw = random.Random(SEED)
    outcomes, wrong = Counter[str](), []
    for case in range(count):
        root = Path(shutil.copytree(work, tmp_path / str(case)))
        if case % 2:
            for mark in root.rglob("done"):
                mark.write_text("done\n")
        file = draw.choice(sorted(path for path in (root / "runs").rglob("*") if path.is_file()))
        name = draw.choice(sorted(commands(root)))
        arguments = commands(root)[name]
        how = damage(file, draw)
        outcome = run(arguments, root)
        outcomes["one line" if outcome.code else "done, without what was damaged"] += 1
        if outcome.code != 0 and not told_in_one_line(outcome):
            wrong.append((case, name, how, os.path.relpath(file, root), outcome))
        shutil.rmtree(root)
    assert not wrong, "\n".join(map(str, wrong))
    assert len(outcomes) == 2
    figures("damaged files of runs and ensembles", count, dict(outcomes))
