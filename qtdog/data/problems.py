"""What is wrong with a data set, all of it, for one message."""

from qtdog.errors import UserError, listing

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
            kinds = [f"{kind}: {listing(things, SHOWN)}" for kind, things in self.found.items()]
            raise UserError(f"{what} cannot be used; {'; '.join(kinds)}")
