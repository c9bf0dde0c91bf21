"""What every layer of a packed program knows about its kind, so that no one else needs to.

How it is built from the members' layers (`from_layers`), what rebuilds it (`settings`, `from_settings`), the tensors
that a file must have for it (`expected`), and what must hold between them (`check`). The list of kinds that a file may
name is in `program.py`.
"""

from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..ops.geometry import Geometry

LARGEST_NUMBER = 2**20  # of a setting, or of what a program passes to a function: no file needs more


class ProgramError(ValueError):
    """A program that cannot be written, or read."""


class Expected(NamedTuple):
    """A tensor that a file has for a layer: its dtype (None: a kernel's float), and its shape.

    In a shape None is any extent, and ... at the end any further ones.
    """

    dtype: torch.dtype | None
    shape: list[Any]
    optional: bool = False


class LayerKind(nn.Module):
    """A layer of a packed program: images [M * N, ...], or with `shared` [N, ...] for all members, to [M * N, ...]."""

    shares: ClassVar[bool] = True  # whether it can take images that all members share

    def __init__(self) -> None:
        super().__init__()
        self.shared = False

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

    def expected(self, members: int) -> dict[str, Expected]:
        """Name -> what a file must hold for this layer."""
        return {}

    def take(self, name: str, t: Tensor) -> None:
        """Accept a tensor as a file has it; its dtype and shape are as expected."""
        self._buffers[name] = t

    def check(self) -> None:
        """Make sure that the tensors, all of which are there now, fit each other.

        Raises:
            ProgramError: if not.
        """
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_meta:  # optional, and not in the file
                self._buffers[name] = None


class Settings:
    """What a file says of a layer, read with suspicion.

    Raises:
        ProgramError: from every method, for what is missing or not of its kind.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = object_of(plain)

    def number(self, key: str, least: int = 1) -> int:
        value = self.plain.get(key)
        if type(value) is not int or not least <= value <= LARGEST_NUMBER:
            raise ProgramError(f"{key}={value!r} is not a number from {least} to {LARGEST_NUMBER}")
        return value

    def numbers(self, key: str, length: int, least: int) -> tuple[int, ...]:
        values = self.plain.get(key)
        if not isinstance(values, list) or len(values) != length:
            raise ProgramError(f"{key}={values!r} is not a list of {length} numbers")
        return tuple(Settings({key: value}).number(key, least) for value in values)

    def share(self, key: str) -> float:
        value: Any = self.plain.get(key)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ProgramError(f"{key}={value!r} is not a number from 0 to 1")
        return float(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> Any:
        value = self.plain.get(key)
        if value not in allowed:
            raise ProgramError(f"{key}={value!r} is none of {', '.join(allowed)}")
        return value

    def flag(self, key: str) -> bool:
        return self.plain.get(key) is True

    def geometry(self) -> Geometry:
        return Geometry(
            self.numbers("kernel", 2, 1),  # type: ignore[arg-type]
            self.numbers("stride", 2, 1),  # type: ignore[arg-type]
            self.numbers("padding", 4, 0),  # type: ignore[arg-type]
            self.numbers("dilation", 2, 1),  # type: ignore[arg-type]
            self.number("groups"),
        )


def object_of(value: Any) -> dict[str, Any]:
    """A JSON object, or a ProgramError."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProgramError(f"expected an object, got {type(value).__name__}")
    return value


def geometry_settings(g: Geometry) -> dict[str, Any]:
    """The inverse of `Settings.geometry`."""
    return {name: list(getattr(g, name)) for name in ("kernel", "stride", "padding", "dilation")} | {"groups": g.groups}
