"""Files that are written whole or not at all."""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside `path`, then rename: an interruption leaves the old file or the new one.

    The temporary is a new file under a name that nobody can foresee, with the mode of any new file, so that no link is
    followed and no other writer shares it. File and folder are on the disk when this returns.

    Raises:
        OSError: names `path`, which is as it was.
    """
    with errors_that_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            write(temporary)
            synchronize(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        synchronize_names(path.parent)


def synchronize(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def synchronize_names(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk, where the folder may be read and the file system can wait."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries of killed writers from a folder in which, the caller makes sure, nobody writes now."""
    for file in folder.iterdir():
        if _TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)


@contextmanager
def errors_that_name(path: Path) -> Iterator[None]:
    """An OSError within names `path`: that of a write names nothing, that of a temporary what is gone."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
