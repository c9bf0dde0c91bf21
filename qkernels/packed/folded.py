"""Programs of files of version 1, whose functions take the members folded into the batch: [M * N, ...].

Their layers are those of other programs; here their images are unfolded before, and folded again after them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .by_members import Operands
from .float_layers import StackedConstant
from .functions import CALLS
from .kinds import LayerKind, Settings
from .program import Program
from .steps import Ref, Step, mapped


class FoldedProgram(Program):
    """A program of version 1.

    Args:
        sharing: the layers that take images which all members share.
    """

    def __init__(
        self,
        input: str,
        steps: Sequence[Step],
        output: Ref,
        layers: dict[str, nn.Module],
        members: int,
        sharing: Sequence[str],
    ) -> None:
        self._sharing = frozenset(sharing)
        super().__init__(input, steps, output, layers, members)

    def _find_own(self) -> frozenset[str]:
        super()._find_own()  # which finds what is not on the list
        return frozenset()

    def _share(self) -> None:
        for name, layer in self.layers().items():
            if isinstance(layer, LayerKind):
                layer.shared = name in self._sharing

    def _run(self, step: Step, layer: nn.Module | None, operands: Operands) -> Any:
        if layer is None:
            call = CALLS[step.op, step.target]
            return call.run(mapped(call.bound(step.args, step.kwargs), Ref, operands.value))
        x, *others = map(operands.value, step.args)
        if not isinstance(layer, LayerKind):
            return layer(x)
        if isinstance(layer, StackedConstant):
            images = x.shape[0] // self._members
            return layer(x).expand(-1, images, *layer.value.shape[2:]).flatten(0, 1)
        images = x if layer.shared or isinstance(layer, Repeat) else self._unfolded(x)
        return layer(images, *map(self._unfolded, others)).flatten(0, 1)

    def _result(self, operands: Operands) -> Tensor:
        return self._unfolded(operands.value(self._output))

    def _unfolded(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self._members, -1))


class Repeat(LayerKind):
    """Images that all members share, [N, ...], once for each member: [M, N, ...]."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = members

    def settings(self) -> dict[str, Any]:
        return {"members": self.members}

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "Repeat":
        return cls(members)

    def most_elements(self, x: Tensor) -> int:
        return self.members * x.numel()

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self.members, *x.shape)
