"""What is wrong with a data set, all of it, for one message."""

from collections.abc import Sequence

from qtdog.errors import UserError

SHOWN = 10


class Problems:
    """Collects what is wrong, by kind, each kind with the way out."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, thing: object) -> None:
        """One more of a kind; `kind` ends with what to do about it."""
        self.found.setdefault(kind, []).append(str(thing))

    def refuse(self, what: object) -> None:
        """UserError with all that was added, if anything was."""
        if self.found:
            kinds = [f"{kind}: {some(things)}" for kind, things in self.found.items()]
            raise UserError(f"{what} cannot be used; {'; '.join(kinds)}")


def some(things: Sequence[str], shown: int = SHOWN) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(things) - shown:,} more" if len(things) > shown else ""
    return ", ".join(things[:shown]) + more
