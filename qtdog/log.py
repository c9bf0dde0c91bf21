"""What a command says."""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from qtdog.distributed import is_first
from qtdog.files import append_text


class Log:
    """Prints a line at once, above any progress bar, and keeps it in a file; of several processes, the first does.

    Args:
        file: where lines are kept, if anywhere.
        shown: False keeps them without printing them.
    """

    def __init__(self, file: Path | None = None, shown: bool = True) -> None:
        self.file, self.shown = file, shown

    def __call__(self, text: str) -> None:
        if self.shown and is_first():
            with tqdm.external_write_mode():
                try:
                    print(text, flush=True)
                except OSError as error:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes nowhere
                    if not isinstance(error, BrokenPipeError):  # who was reading has left, as `| head` does
                        raise OSError(error.errno, error.strerror, "standard output") from error
        self.keep(text)

    def keep(self, text: str) -> None:
        """Write a line to the file, if there is one, and do not print it."""
        if self.file is not None and is_first():
            append_text(self.file, text + "\n")


PRINT = Log()
