"""Long measurements that an interruption does not lose."""

import csv
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from qtdog.errors import UserError
from qtdog.files import append_text, write_text


def line_of(cells: Sequence[str | float]) -> str:
    """A line of CSV that ends with the checksum of what is before it."""
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return f"{out.getvalue()},{checksum(out.getvalue())}\n"


def is_whole(line: str) -> bool:
    """Whether a line is one of `line_of`, without its end."""
    content, _, digits = line.rpartition(",")
    return digits == checksum(content)


def checksum(content: str) -> str:
    """CRC-32, which notices a bit and any cut."""
    return f"{zlib.crc32(content.encode()):08x}"


class Recall(Protocol):
    """Calls `measure` for the numbers named `what`, unless they are known."""

    def __call__(self, what: str, measure: Callable[[], Sequence[float]]) -> list[float]: ...


def measured_anew(what: str, measure: Callable[[], Sequence[float]]) -> list[float]:
    """Remembers nothing."""
    return list(measure())


class Partial:
    """What is measured so far, in a CSV file: subject, what, numbers, checksum. Lines are appended as they are known.

    The same command after an interruption finds the file and goes on; what other settings would measure differently has
    another subject or another `what`, and is left alone. A line that is cut or damaged is measured again.
    """

    def __init__(self, table: Path) -> None:
        """For the numbers that are to end up in `table`: those of x.csv are kept in x.partial.csv."""
        self.file = table.with_suffix(".partial.csv")
        self.known: dict[tuple[str, str], list[float]] = {}
        if not self.file.is_file():
            return
        text = self.file.read_bytes().decode(errors="replace")
        *lines, rest = text.split("\n")  # a kill may have cut the last one
        whole = [line for line in lines if is_whole(line)]
        if lines and not whole:
            raise UserError(f"{self.file} holds no measurements of qtdog: move it away")
        for subject, what, *numbers, _ in csv.reader(whole):
            self.known[subject, what] = [float(number) for number in numbers]
        if rest or whole != lines:
            write_text(self.file, "".join(f"{line}\n" for line in whole))

    def of(self, subject: str) -> Recall:
        """The memory of one subject."""

        def recall(what: str, measure: Callable[[], Sequence[float]]) -> list[float]:
            if (subject, what) not in self.known:
                numbers = list(measure())
                append_text(self.file, line_of([subject, what, *numbers]))
                self.known[subject, what] = numbers
            return self.known[subject, what]

        return recall

    def forget(self) -> None:
        """All is measured and written elsewhere."""
        self.file.unlink(missing_ok=True)
