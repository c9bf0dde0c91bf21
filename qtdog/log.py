"""What a command says."""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from qtdog.distributed import is_first


class Log:
    """Prints a line at once, above any progress bar, and keeps it in a file; of several processes, the first does.

    Args:
        file: where lines are kept, if anywhere.
        shown: False keeps them without printing them.
    """

    def __init__(self, file: Path | None = None, shown: bool = True) -> None:
        self.file, self.shown = file, shown
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str) -> None:
        if self.shown and is_first():
            with tqdm.external_write_mode():
                try:
                    print(text, flush=True)
                except BrokenPipeError:  # who was reading has left, as `| head` does; the work goes on
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self.keep(text)

    def keep(self, text: str) -> None:
        """Write a line to the file, if there is one, and do not print it."""
        if self.file is not None and is_first():
            with self.file.open("a", encoding="utf-8") as out:
                out.write(text + "\n")


PRINT = Log()
