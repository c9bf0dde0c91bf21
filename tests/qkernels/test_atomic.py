"""Files are written whole, by one writer, where they were meant to be."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from qkernels import atomic, replace_file
from qkernels.atomic import remove_leftovers


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "there" / "file", lambda temporary: temporary.write_text("new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "there" / "file").stat().st_mode) == 0o640
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Even of someone who guesses the name of the temporary."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "0" * 16)
    (tmp_path / f".file.{'0' * 16}.tmp").symlink_to(victim)
    (tmp_path / f".file.{os.getpid()}").symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    monkeypatch.undo()
    replace_file(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    assert victim.read_text() == "precious" and (tmp_path / "file").read_text() == "new"


def test_two_threads_do_not_write_one_temporary(tmp_path):
    both = threading.Barrier(2)

    def slowly(content: str, temporary: Path) -> None:
        both.wait()
        temporary.write_text(content)
        both.wait()

    threads = [
        threading.Thread(target=replace_file, args=(tmp_path / "file", lambda t, content=content: slowly(content, t)))
        for content in ("one" * 100, "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in ("one" * 100, "two")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("wrong")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def fails(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)) as raised:
        replace_file(tmp_path / "file", fails)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    if isinstance(error, OSError):
        assert raised.value.filename == str(tmp_path / "file")  # not that of a temporary, nor none


def test_content_and_name_reach_the_disk_before_it_returns(tmp_path, monkeypatch):
    """The content before the rename: a crash must not leave the new name with nothing under it."""
    calls, fsync, replace = [], os.fsync, os.replace

    def seen(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", seen)
    monkeypatch.setattr(atomic.os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    replace_file(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    assert calls[0].startswith(str(tmp_path / ".file.")) and calls[1:] == ["rename", str(tmp_path)]


def test_leftovers_of_a_killed_writer_go_and_nothing_else(tmp_path):
    for name in (f".checkpoint.pt.{'0a' * 8}.tmp", "notes.tmp", ".hidden.tmp", "file"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", ".hidden.tmp", "file"}
