"""Mistakes and misfortunes that a user can mend; the command line says each in one line and exits with 2."""

import errno
from collections.abc import Sequence

LISTED = 5  # names of things in a message


class UserError(Exception):
    """Names the thing that is wrong and the way out, in one line."""


REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "the file system or `ulimit -f` allows no larger file",
    errno.EROFS: "name a place that can be written, or have this one made so",
    errno.EACCES: "have it made accessible, or name another place",
    errno.EPERM: "have it made accessible, or name another place",
    errno.ENOENT: "look whether it has been moved, or name another place",
    errno.EISDIR: "a folder lies where a file should: move it away, or name another place",
    errno.ENOTDIR: "a file lies where a folder should: move it away, or name another place",
    errno.EEXIST: "a file lies where a folder should: move it away, or name another place",
    errno.EIO: "the device fails: name a place on another one",
    errno.ENAMETOOLONG: "name a shorter place",
}


def listing(things: Sequence[object], shown: int = LISTED) -> str:
    """`a, b, c`, of many the first ones and how many there are more."""
    more = f" and {len(things) - shown:,} more" if len(things) > shown else ""
    return ", ".join(map(str, things[:shown])) + more


def one_line(error: BaseException) -> str:
    """What is wrong and the way out, joined to one line; of an OSError path, reason and remedy."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}: {REMEDIES.get(error.errno, 'mend that, or name another place')}"
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())
