"""Long measurements that an interruption does not lose."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from qtdog.errors import UserError
from qtdog.files import write_text


class Recall(Protocol):
    """Calls `measure` for the numbers named `what`, unless they are known."""

    def __call__(self, what: str, measure: Callable[[], Sequence[float]]) -> list[float]: ...


def measured_anew(what: str, measure: Callable[[], Sequence[float]]) -> list[float]:
    """Remembers nothing."""
    return list(measure())


class Partial:
    """What is measured so far, in a CSV file: subject, what, numbers. A line is appended as soon as it is known.

    The same command after an interruption finds the file and goes on; what other settings would measure differently has
    another subject or another `what`, and is left alone.
    """

    def __init__(self, table: Path) -> None:
        """For the numbers that are to end up in `table`: those of x.csv are kept in x.partial.csv."""
        self.file = table.with_suffix(".partial.csv")
        self.known: dict[tuple[str, str], list[float]] = {}
        if not self.file.is_file():
            return
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        try:
            for subject, what, *numbers in csv.reader(io.StringIO(whole)):
                self.known[subject, what] = [float(number) for number in numbers]
        except ValueError as error:
            raise UserError(f"{self.file} holds no measurements of qtdog: move it away ({error})") from error
        if whole != text:
            write_text(self.file, whole)

    def of(self, subject: str) -> Recall:
        """The memory of one subject."""

        def recall(what: str, measure: Callable[[], Sequence[float]]) -> list[float]:
            if (subject, what) not in self.known:
                numbers = list(measure())
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8", newline="") as out:
                    csv.writer(out, lineterminator="\n").writerow([subject, what, *numbers])
                self.known[subject, what] = numbers
            return self.known[subject, what]

        return recall

    def forget(self) -> None:
        """All is measured and written elsewhere."""
        self.file.unlink(missing_ok=True)
