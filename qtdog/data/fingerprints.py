"""What an image is, wherever it lies: a hash of its content. One that was encoded anew is another image."""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

BYTES = 8  # of a fingerprint: among a million images, two share one with a probability of 3e-8
MANY = 1000  # files, for which a progress bar is worth it

Stamp = tuple[str, int, int]  # path, size, time of the last change in nanoseconds


def fingerprint(content: bytes | memoryview) -> str:
    """Of one image, from the bytes of its file or of its pixels: 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=BYTES).hexdigest()


def of_pixels(images: Tensor) -> list[str]:
    """Of images that are held in memory, [N, ...]."""
    return [fingerprint(memoryview(image.numpy()).cast("B")) for image in images.contiguous()]


def of_files(paths: Sequence[Path]) -> list[str]:
    """Of image files, as many at once as there are cores; those known by path, size and time are not read again."""
    with Known() as known:
        stamps = [stamp(path) for path in paths]
        found = known.look_up(stamps)
        new = [(path, its) for path, its in zip(paths, stamps, strict=True) if its not in found]
        if new:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and reading let go of Python's lock
                digests = pool.map(lambda one: fingerprint(one[0].read_bytes()), new)
                bar = tqdm(digests, desc="fingerprints", total=len(new), disable=None if len(new) > MANY else True)
                learned = {its: digest for (_, its), digest in zip(new, bar, strict=True)}
            known.learn(learned)
            found |= learned
    return [found[its] for its in stamps]


def stamp(path: Path) -> Stamp:
    """By what a file is known again without reading it."""
    status = path.stat()
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


class Known:
    """Fingerprints of files that were read before, in a database under the user's cache folder.

    Where that cannot be written nothing is known, and every file is read: nothing depends on it but the time it takes.
    """

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtdog"
        self.database: sqlite3.Connection | None = None
        try:
            cache.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(cache / "fingerprints.sqlite", timeout=60)
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path TEXT PRIMARY KEY, size INTEGER, time INTEGER, fingerprint TEXT) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error):
            self.forget()

    def __enter__(self) -> "Known":
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def forget(self) -> None:
        """Go on without the database."""
        if self.database is not None:
            self.database.close()
        self.database = None

    def look_up(self, stamps: Iterable[Stamp]) -> dict[Stamp, str]:
        """The fingerprints of those files that are as they were."""
        found: dict[Stamp, str] = {}
        try:
            for path, size, time in stamps:
                if self.database is None:
                    break
                with closing(self.database.execute("SELECT * FROM files WHERE path = ?", (path,))) as rows:
                    row = rows.fetchone()
                if row is not None and row[1:3] == (size, time):
                    found[path, size, time] = row[3]
        except sqlite3.Error:  # damaged, or another's who holds it for long
            self.forget()
            return {}
        return found

    def learn(self, fingerprints: dict[Stamp, str]) -> None:
        """Keep what was found out."""
        if self.database is None:
            return
        try:
            with self.database:
                rows = [(*its, digest) for its, digest in fingerprints.items()]
                self.database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error:
            self.forget()
