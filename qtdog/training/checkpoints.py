"""What a run resumes from: checkpoint.pt, which ends with the SHA-256 of all before, and the one written before it.

PyTorch reads such a file as it reads any other. The checkpoint before is there for the day that the last one is
damaged; a run that is resumed from it comes out the same, bit for bit.
"""

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qkernels import replace_file
from qtdog.errors import UserError

LAST, BEFORE = "checkpoint.pt", "checkpoint.previous.pt"
MARK = b"\nsha256 "
HEX_DIGITS = 64
KEYS = {"step", "data", "model", "optimizer", "step_rule", "averaging", "scaler", "best"}


class Damaged(Exception):
    """A checkpoint is not what was written."""


def write_checkpoint(folder: Path, stored: dict[str, Any]) -> None:
    """Tensors and plain types. The last checkpoint becomes the one before when the new one lies whole beside it."""
    buffer = io.BytesIO()
    torch.save({**stored, "sealed": True}, buffer)
    content = buffer.getbuffer()
    digest = MARK + hashlib.sha256(content).hexdigest().encode()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out:
            out.write(content)
            out.write(digest)
        if not is_whole(temporary.read_bytes()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if (folder / LAST).is_file():
            os.replace(folder / LAST, folder / BEFORE)

    replace_file(folder / LAST, write)


def read_checkpoint(folder: Path, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The last checkpoint, or if that is damaged the one before; None if there is none.

    Raises:
        UserError: if what is there is damaged.
    """
    damaged = []
    for file in (folder / LAST, folder / BEFORE):
        if not file.is_file():
            continue
        try:
            stored = load(file.read_bytes())
        except Damaged as error:
            damaged.append(f"{file} is damaged ({error})")
            continue
        if damaged:
            log(f"{damaged[0]}: going on from the checkpoint before it")
            (folder / LAST).unlink(missing_ok=True)  # it must not become the one before
        return stored
    if damaged:
        raise UserError(
            f"{', '.join(damaged)}, and there is no other checkpoint: bring a copy back, or remove {folder} to start "
            "the run again"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything to resume from, damaged or not."""
    return any((folder / name).is_file() for name in (LAST, BEFORE))


def remove_checkpoints(folder: Path, *names: str) -> None:
    """Those of these names, by default all."""
    for name in names or (LAST, BEFORE):
        (folder / name).unlink(missing_ok=True)


def is_whole(content: bytes) -> bool:
    """Whether a file's bytes end with the digest of those before."""
    end = len(content) - len(MARK) - HEX_DIGITS
    digest = hashlib.sha256(memoryview(content)[: max(end, 0)]).hexdigest().encode()
    return content[max(end, 0) :] == MARK + digest


def load(content: bytes) -> dict[str, Any]:
    """A checkpoint from the bytes of its file: nothing in it is looked at before its digest is.

    Raises:
        Damaged: for any other bytes than were written. Of a checkpoint without a digest, as earlier versions wrote
            them, only for what cannot be read at all.
    """
    whole = is_whole(content)
    if not whole and MARK in content[-2 * (len(MARK) + HEX_DIGITS) :]:
        raise Damaged("it is not what its checksum was made for")
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle it may be any
        raise Damaged("it is no checkpoint") from error
    if not isinstance(stored, dict) or not stored.keys() >= KEYS or (not whole and "sealed" in stored):
        raise Damaged("a part of it is missing")
    return stored
