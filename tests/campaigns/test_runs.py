"""Runs that are killed, whose disk is full or cannot be written, whose files are damaged: nothing is lost or falsified.

Each campaign is there twice: a few cases of it among the slow tests, all of them by night.
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from campaigns_of import cases
from interrupting import SMALL, Fail, Kill, Limit, Nothing, run, told_in_one_line
from qtdog.files import read_records
from qtdog.results.runs import find_runs
from tiny import make_digits

SEED = 13
KILLS, DISKS, BITS, COMMANDS = 50, 50, 24, 12  # cases of each campaign
SECONDS = 1800  # that one may take
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

pytestmark = [pytest.mark.timeout(SECONDS), pytest.mark.untraced]


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits"))


def train(data: Path, output: Path) -> list[str]:
    return ["train", *SMALL, "--switch-step", "2", "--data-dir", str(data), "--output-dir", str(output)]


def sweep(data: Path, output: Path) -> list[str]:
    return ["sweep", *SMALL, "--methods", "erm", "qtdog", "--switch-step", "2", "--n-trials", "1",
            "--data-dir", str(data), "--output-dir", str(output)]  # fmt: skip


def again(arguments: list[str]) -> list[str]:
    """What goes on where a command was interrupted."""
    return [*arguments, "--resume"] if arguments[0] == "train" else arguments


def found(output: Path) -> dict[str, object]:
    """What runs have come to, but for times and places, by their folders; nothing else may lie there."""
    content: dict[str, object] = {}
    for folder in find_runs([str(output)]):
        rows = read_records(folder / "results.jsonl")
        for row in rows:
            del row["step_time"], row["eval_time"], row["args"]["output_dir"]
        card = json.loads((folder / "model.json").read_text())
        del card["date"]
        weights = (folder / "model.safetensors").read_bytes()
        names = sorted(path.name for path in folder.iterdir())
        content[str(folder.relative_to(output))] = (json.dumps(rows), json.dumps(card), weights, names)
    return content


def largest(output: Path) -> int:
    return max(path.stat().st_size for path in output.rglob("*") if path.is_file())


@cases(4, KILLS)
@pytest.mark.parametrize("command", [train, sweep])
def test_a_killed_run_comes_out_as_if_nothing_had_been(digits_dir, tmp_path, command, count, figures):
    """Killed before any operation on files, or in the middle of a write; every other one once more as it resumes."""
    undisturbed = tmp_path / "undisturbed"
    whole = run(command(digits_dir, undisturbed), undisturbed)
    assert whole.code == 0, whole.text
    expected, size = found(undisturbed), largest(undisturbed)
    draw = random.Random(SEED)
    for case in range(count):
        output = tmp_path / str(case)
        arguments = command(digits_dir, output)
        for kill in range(1 + case % 2):
            how: Nothing = Kill(draw.randint(1, whole.operations))
            if draw.random() < 0.25:
                how = Limit(draw.randrange(size), kills=True)
            outcome = run(again(arguments) if kill else arguments, output, how)
            assert outcome.code < 0 or kill, (case, how, outcome)  # less is left to do the second time
        outcome = run(again(arguments), output)
        assert outcome.code == 0, (case, how, outcome)
        assert found(output) == expected, (case, how)
        shutil.rmtree(output)
    figures(f"{command.__name__}, killed", count, {"resumed to the same bits": count})


@cases(4, DISKS)
@pytest.mark.parametrize("command", [train, sweep])
def test_a_disk_that_fails_loses_nothing(digits_dir, tmp_path, command, count, figures):
    """From any operation on files, or in the middle of a write: one line, and the same command goes on later."""
    undisturbed = tmp_path / "undisturbed"
    whole = run(command(digits_dir, undisturbed), undisturbed)
    expected, size = found(undisturbed), largest(undisturbed)
    draw = random.Random(SEED)
    for case in range(count):
        output = tmp_path / str(case)
        arguments = command(digits_dir, output)
        how: Nothing = Fail(draw.randint(1, whole.operations), ERRORS[case % len(ERRORS)])
        if draw.random() < 0.25:
            how = Limit(draw.randrange(size), kills=False)
        outcome = run(arguments, output, how)
        assert told_in_one_line(outcome) and str(output) in outcome.text, (case, how, outcome)
        outcome = run(again(arguments), output)
        assert outcome.code == 0, (case, how, outcome)
        assert found(output) == expected, (case, how)
        shutil.rmtree(output)
    figures(f"{command.__name__}, a disk that fails", count, {"one line, then resumed to the same bits": count})


def flip(file: Path, draw: random.Random) -> None:
    """Another value for one bit of a file."""
    content = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@cases(4, BITS)
def test_a_flipped_bit_in_a_checkpoint_is_noticed(digits_dir, tmp_path, count, figures):
    """In the last: the one before serves. In that one: it is not needed. In both: one line."""
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    whole = run(train(digits_dir, undisturbed), undisturbed)
    expected = found(undisturbed)
    for operation in range(whole.operations, 0, -1):  # the latest moment at which two checkpoints lie there
        shutil.rmtree(interrupted, ignore_errors=True)
        run(train(digits_dir, interrupted), interrupted, Kill(operation))
        if list(interrupted.rglob("checkpoint.previous.pt")) and not list(interrupted.rglob("model.safetensors")):
            break
    draw, outcomes = random.Random(SEED), Counter[str]()
    for case in range(count):
        last, before = "checkpoint.pt", "checkpoint.previous.pt"
        damaged = ([last], [last], [before], [last, before])[case % 4]
        output = Path(shutil.copytree(interrupted, tmp_path / str(case)))
        for name in damaged:
            (file,) = output.rglob(name)
            flip(file, draw)
        outcome = run(again(train(digits_dir, output)), output)
        outcomes["one line" if outcome.code else "resumed to the same bits"] += 1
        if len(damaged) == 2:
            assert told_in_one_line(outcome) and "is damaged" in outcome.text, (case, outcome)
        else:
            assert outcome.code == 0 and found(output) == expected, (case, outcome)
            noticed = "going on from the checkpoint before it" in outcome.text
            assert noticed == (damaged == [last]), (case, outcome)
        shutil.rmtree(output)
    figures("a bit flipped in a checkpoint", count, dict(outcomes))


FILE_SYSTEM = """\
set -u
mount -t tmpfs -o size=5m tmpfs "$OUT" || exit 77
"$@"; echo "full: $?"
mount -o remount,size=64m,ro "$OUT"
"$@"; echo "read-only: $?"
mount -o remount,rw "$OUT"
"$@"; echo "writable: $?"
cp -r "$OUT" "$KEPT"
"""


@pytest.mark.slow
def test_a_file_system_that_is_full_and_then_read_only(digits_dir, tmp_path):
    """A real one, of 5 MB: there is room for two checkpoints, and not for a third."""
    undisturbed, output, kept = tmp_path / "undisturbed", tmp_path / "out", tmp_path / "kept"
    assert run(train(digits_dir, undisturbed), undisturbed).code == 0
    output.mkdir()
    command = [sys.executable, "-m", "qtdog", *again(train(digits_dir, output))]
    environment = {**os.environ, "OUT": str(output), "KEPT": str(kept), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    mounted = ["unshare", "--map-root-user", "--mount", "bash", "-c", FILE_SYSTEM, "bash", *command]
    done = subprocess.run(mounted, env=environment, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a file system of his own")
    said = [line for line in done.stdout.splitlines() if line.startswith(("full", "read-only", "writable"))]
    assert said == ["full: 2", "read-only: 2", "writable: 0"], done
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 2 and "No space left on device: make room there" in errors[0], errors
    assert "Read-only file system: name a place that can be written" in errors[1], errors
    assert "resumed after step" in next(kept.rglob("out.txt")).read_text()
    assert found(kept) == found(undisturbed)
