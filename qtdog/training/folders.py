"""The folder of a run that is to be trained: who may write in it, and whether it still has to be trained."""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qkernels import remove_leftovers
from qtdog import distributed
from qtdog.config import LATER, RunConfig, with_targets
from qtdog.errors import UserError
from qtdog.files import DONE, REMEDY, is_done, read_sealed, write_text
from qtdog.results.runs import SEALED
from qtdog.training.checkpoints import has_checkpoint, remove_checkpoints

LOCK = ".lock"
CONFIG = "config.yaml"
WRITTEN = (*SEALED, "failed", "out.txt", "disorder.csv")  # by a run, besides its checkpoints


class TrainedElsewhere(UserError):
    """Another process, or another thread of this one, trains the run now."""


_mutex = threading.Lock()
_claims: set[tuple[int, int, int]] = set()  # process, device and inode of the lock files that this process holds


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Claims a run's folder until this process lets go or ends, and removes what a killed one has left unfinished.

    Of the processes of one run, the first claims it for all.

    Raises:
        TrainedElsewhere: if it is claimed already.
    """
    if not distributed.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _mutex:
        descriptor, claim = _claim(folder)
        _claims.add(claim)
    try:
        remove_leftovers(folder)
        yield
    finally:
        with _mutex:
            _claims.discard(claim)
            os.close(descriptor)


def _claim(folder: Path) -> tuple[int, tuple[int, int, int]]:
    """The lock file's descriptor, which holds the lock while it is open, and its entry in `_claims`."""
    file = folder / LOCK
    while True:
        if _is_ours(file):  # not to be opened: closing it again would drop the lock
            raise TrainedElsewhere(f"{folder} is being trained by this process already")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            # Not flock: the reader processes of a killed run would inherit the claim and hold it until they notice.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked, there = os.fstat(descriptor), os.stat(file)
        except FileNotFoundError:
            os.close(descriptor)  # removed since: what is locked says nothing any more
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise TrainedElsewhere(f"{folder} is being trained by another process") from error
            raise OSError(error.errno, error.strerror, str(file)) from error
        if (locked.st_dev, locked.st_ino) == (there.st_dev, there.st_ino):
            return descriptor, (os.getpid(), locked.st_dev, locked.st_ino)
        os.close(descriptor)


def _is_ours(file: Path) -> bool:
    """Whether this process holds the lock. (A forked child knows its parent's claims, and has none of them.)"""
    try:
        there = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (os.getpid(), there.st_dev, there.st_ino) in _claims


def is_claimed(folder: Path) -> bool:
    """Whether some process trains the run now; asks without claiming, so that nobody is turned away meanwhile."""
    file = folder / LOCK
    with _mutex:
        if _is_ours(file):
            return True
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            lock = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length (0: all), process
            asked = lock.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return lock.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
        finally:
            os.close(descriptor)


def prepare_folder(run: RunConfig, folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the run is still to be trained. To be called by the folder's owner.

    Raises:
        UserError: if the folder holds another run, or half of this one, or cannot be read.
    """
    stored = folder / CONFIG
    if overwrite or not stored.is_file():
        if not overwrite and (is_done(folder) or has_checkpoint(folder)):
            raise UserError(f"{stored} is missing beside a trained run: bring it back, or start again with --overwrite")
        (folder / DONE).unlink(missing_ok=True)
        remove_checkpoints(folder)
        for name in WRITTEN:
            (folder / name).unlink(missing_ok=True)
        write_text(stored, yaml.safe_dump(run.to_dict(), sort_keys=False))
        return True
    old, new = read_config(stored), without_places(run.to_dict())
    changed = [f"{name} was {old.get(name)}, is now {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): use another --output-dir, or --overwrite"
        )
    if is_done(folder):
        return False
    if has_checkpoint(folder) and not resume:
        raise UserError(f"{folder} holds this run unfinished: continue with --resume, or start again with --overwrite")
    return True


def read_config(file: Path) -> dict[str, Any]:
    """A run's config.yaml, without the places of its data and plug-ins; UserError for what is none."""
    try:
        values = yaml.safe_load(read_sealed(file))
        if not isinstance(values, dict):
            raise TypeError("no settings in it")
        return without_places(values)
    except (yaml.YAMLError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error


def without_places(values: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, also those left out, wherever its data lies; its plug-ins by what is in them."""
    values = {name: value for name, value in with_targets(values).items() if name != "data_dir"}
    return {**LATER, **values, "plugins": [plugin["sha256"][:8] for plugin in values.get("plugins", [])]}
