"""A checkpoint is what was written, or the one before it is, or it is said."""

import random

import pytest
import torch

from qtdog.errors import UserError
from qtdog.training import checkpoints
from qtdog.training.checkpoints import BEFORE, KEYS, LAST, read_checkpoint, write_checkpoint


def state(step):
    return {**dict.fromkeys(KEYS), "step": step, "model": {"weight": torch.arange(64.0) + step}}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, state(step))
    return tmp_path


def damage(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_both_are_kept_and_pytorch_reads_them(folder):
    said = []
    stored = read_checkpoint(folder, said.append)
    assert stored["step"] == 2 and torch.equal(stored["model"]["weight"], state(2)["model"]["weight"]) and not said
    assert [torch.load(folder / name, weights_only=True)["step"] for name in (LAST, BEFORE)] == [2, 1]
    write_checkpoint(folder, state(3))
    assert [torch.load(folder / name, weights_only=True)["step"] for name in (LAST, BEFORE)] == [3, 2]
    assert {path.name for path in folder.iterdir()} == {LAST, BEFORE}


def test_any_flipped_bit_is_noticed(folder):
    """In the content, in its checksum, in the mark of the checksum."""
    content = (folder / LAST).read_bytes()
    draw = random.Random(0)
    ends = [8 * len(content) - 1 - bit for bit in range(0, 8 * 80, 5)]
    for bit in [*ends, *(draw.randrange(8 * len(content)) for _ in range(200))]:
        (folder / LAST).write_bytes(content)
        damage(folder / LAST, bit)
        with pytest.raises(checkpoints.Damaged):
            checkpoints.load((folder / LAST).read_bytes())


def test_any_cut_is_noticed(folder):
    content = (folder / LAST).read_bytes()
    for size in [*range(0, len(content), 97), *range(len(content) - 80, len(content))]:
        with pytest.raises(checkpoints.Damaged):
            checkpoints.load(content[:size])


def test_nothing_is_unpickled_before_it_is_verified(folder, monkeypatch):
    monkeypatch.setattr(checkpoints.torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    damage(folder / LAST, 4000)
    with pytest.raises(checkpoints.Damaged):
        checkpoints.load((folder / LAST).read_bytes())


def test_the_one_before_serves_and_stays(folder):
    """Until another whole one lies beside it: the damaged one must not take its place."""
    damage(folder / LAST, 4000)
    said = []
    assert read_checkpoint(folder, said.append)["step"] == 1
    assert len(said) == 1 and str(folder / LAST) in said[0] and "going on from the checkpoint before it" in said[0]
    write_checkpoint(folder, state(2))
    assert [torch.load(folder / name, weights_only=True)["step"] for name in (LAST, BEFORE)] == [2, 1]


def test_a_kill_between_the_two_renames_leaves_the_one_before(folder):
    (folder / LAST).unlink()
    said = []
    assert read_checkpoint(folder, said.append)["step"] == 1 and not said


def test_without_a_whole_one_it_is_said(folder):
    for name in (LAST, BEFORE):
        damage(folder / name, 4000)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged .*, .*checkpoint\.previous\.pt is damaged"):
        read_checkpoint(folder, pytest.fail)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, [], {"step": 3}], ids=["empty", "junk", "a list", "a part"])
def test_what_is_no_checkpoint(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / LAST).write_bytes(content)
    else:
        torch.save(content, tmp_path / LAST)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        read_checkpoint(tmp_path, pytest.fail)


def test_earlier_versions_wrote_no_checksum(tmp_path):
    torch.save(state(7), tmp_path / LAST)
    assert read_checkpoint(tmp_path, pytest.fail)["step"] == 7


def test_a_write_that_did_not_arrive_leaves_the_old_ones(folder, monkeypatch):
    """What lies on the disk is compared before anything is renamed."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    monkeypatch.setattr(checkpoints, "is_whole", lambda content: False)
    with pytest.raises(OSError, match=r"Input/output error.*checkpoint\.pt"):
        write_checkpoint(folder, state(3))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
