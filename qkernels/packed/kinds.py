"""What every layer of a packed program knows about its kind, so that no one else needs to.

How it is built from the members' layers (`from_layers`), what rebuilds it (`settings`, `from_settings`), the tensors
that a file must have for it (`expected`), and what must hold between them (`check`). The list of kinds that a file may
name is in `program_file.py`.
"""

import reprlib
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..ops.geometry import Geometry

LARGEST_NUMBER = 2**20  # of a setting, or of what a program passes to a function: no file needs more


class PackedFileError(ValueError):
    """A packed file that is truncated, corrupt or not what it claims to be, or takes too much memory."""


class ProgramError(PackedFileError):
    """A program that a file cannot hold, or should not."""


class Expected(NamedTuple):
    """A tensor that a file has for a layer: its dtype (None: a kernel's float; or one of several), and its shape.

    In a shape None is any extent, and ... at the end any further ones.
    """

    dtype: torch.dtype | tuple[torch.dtype, ...] | None
    shape: list[Any]
    optional: bool = False
    finite: bool = True  # which is not asked of masks, bounds and the like


class LayerKind(nn.Module):
    """A layer of a packed program: each member's images [M, N, ...], or with `shared` [N, ...], to [M, N, ...].

    What `shared` is follows from the program (`Program`).
    """

    shares: ClassVar[bool] = True  # whether it computes something of images, be they shared or not
    gives_own: ClassVar[bool] = True  # whether each member has a result of its own

    def __init__(self) -> None:
        super().__init__()
        self.shared = False
        self._taken: set[str] = set()  # the tensors that a file has given

    def settings(self) -> dict[str, Any]:
        """What rebuilds the layer, without its tensors: plain types."""
        return {}

    @classmethod
    def from_settings(cls, settings: "Settings", members: int) -> Self:
        """The layer with tensors that are yet to come.

        Raises:
            ProgramError: for settings that no layer of the kind has.
        """
        raise NotImplementedError

    def most_elements(self, x: Tensor) -> int:
        """How many elements a forward on x makes at most, of its result and on the way to it."""
        raise NotImplementedError

    def expected(self, members: int) -> dict[str, Expected]:
        """Name -> what a file must hold for this layer."""
        return {}

    def take(self, name: str, t: Tensor) -> None:
        """Accept a tensor as a file has it; its dtype and shape are as expected."""
        self._buffers[name] = t
        self._taken.add(name)

    def forget_missing(self) -> None:
        """Let optional tensors go that a file does not have: those that are still as `from_settings` made them."""
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._taken:
                self._buffers[name] = None

    def check(self) -> None:
        """Make sure that the tensors, all of which are there now, fit each other.

        Raises:
            ProgramError: if not.
        """


class Settings:
    """What a file says of a layer, read with suspicion.

    Raises:
        ProgramError: from every method, for what is missing or not of its kind.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = object_of(plain)
        self._read = {"type", "one_input_scale"}  # of which the latter stands in files of earlier writers, unread

    def get(self, key: str) -> Any:
        """The value, None if there is none."""
        self._read.add(key)
        return self.plain.get(key)

    def number(self, key: str, least: int = 1) -> int:
        """An integer that is not smaller."""
        return _number(key, self.get(key), least)

    def numbers(self, key: str, length: int, least: int) -> tuple[int, ...]:
        """So many of them."""
        values = self.get(key)
        if not isinstance(values, list) or len(values) != length:
            raise ProgramError(f"{key}={shown(values)} is not a list of {length} numbers")
        return tuple(_number(key, value, least) for value in values)

    def share(self, key: str) -> float:
        """A number from 0 to 1."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ProgramError(f"{key}={shown(value)} is not a number from 0 to 1")
        return float(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> Any:
        """One of these words."""
        value = self.get(key)
        if value not in allowed:
            raise ProgramError(f"{key}={shown(value)} is none of {', '.join(allowed)}")
        return value

    def flag(self, key: str) -> bool:
        """True or false; false if it is missing."""
        value = self.get(key)
        if value not in (None, True, False) or type(value) is int:
            raise ProgramError(f"{key}={shown(value)} is neither true nor false")
        return value is True

    def expect_no_more(self) -> None:
        """Make sure that all settings have been read."""
        only_keys(self.plain, self._read)

    def geometry(self) -> Geometry:
        return Geometry(
            self.numbers("kernel", 2, 1),  # type: ignore[arg-type]
            self.numbers("stride", 2, 1),  # type: ignore[arg-type]
            self.numbers("padding", 4, 0),  # type: ignore[arg-type]
            self.numbers("dilation", 2, 1),  # type: ignore[arg-type]
            self.number("groups"),
        )


def _number(key: str, value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= LARGEST_NUMBER:
        raise ProgramError(f"{key}={shown(value)} is not a number from {least} to {LARGEST_NUMBER}")
    return value


def shown(value: Any) -> str:
    """For a message: cut short, as files may hold anything."""
    return reprlib.repr(value)


def only_keys(plain: dict[str, Any], allowed: Iterable[str]) -> None:
    """Raises ProgramError for a key that is none of these."""
    if surplus := plain.keys() - set(allowed):
        raise ProgramError(f"{shown(min(surplus))} is not a key that the format has here")


def object_of(value: Any) -> dict[str, Any]:
    """A JSON object, or a ProgramError."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProgramError(f"expected an object, got {type(value).__name__}")
    return value


def geometry_settings(g: Geometry) -> dict[str, Any]:
    """The inverse of `Settings.geometry`."""
    return {name: list(getattr(g, name)) for name in ("kernel", "stride", "padding", "dilation")} | {"groups": g.groups}
