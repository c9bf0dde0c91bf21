"""What a forward of a program from a file may take: known before each step, from the shapes of what it is given."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .by_members import Operands
from .elements import padded, pooled
from .functions import CALLS
from .kinds import LayerKind, ProgramError
from .program import Watch
from .steps import Ref, Step, mapped

LEAST_LIMIT = 256 << 20
CHANNELS = 1024  # float32 at each pixel of each member's images; networks keep a few hundred at most


class MemoryLimit:
    """Refuses what takes more than a network from a stranger should.

    Args:
        members: of the ensemble.
        weights: bytes of its tensors.
        max_bytes: of all results that live at once during a forward, and what the step that runs makes. By default
            256 MiB, the weights four times over, and 1,024 float channels at each pixel of each member's images.
    """

    def __init__(self, members: int, weights: int, max_bytes: int | None = None) -> None:
        self.members = members
        self.weights = weights
        self.max_bytes = max_bytes
        self._passed: set[tuple[Any, ...]] = set()

    def of(self, x: Tensor) -> int:
        """Bytes for images x."""
        if self.max_bytes is not None:
            return self.max_bytes
        pixels = x.numel() // max(1, x.shape[1]) if x.dim() == 4 else x.numel()
        return LEAST_LIMIT + 4 * self.weights + 4 * CHANNELS * pixels * self.members

    def let_pass(self, x: Tensor) -> None:
        """What is known of images of one shape and dtype holds for the next: they need no watch."""
        self._passed.add((x.shape, x.dtype))

    def watch(self, x: Tensor) -> Watch | None:
        """What `Program` calls before each step; None for images like those that have passed.

        Raises:
            ProgramError: from that, if the step would take too much.
        """
        if (x.shape, x.dtype) in self._passed:
            return None
        most = self.of(x)

        def watch(step: Step, layer: nn.Module | None, operands: Operands) -> None:
            if layer is None:
                elements = elements_of_call(step, operands)
            else:
                args = mapped(step.args, Ref, operands.value)
                elements = layer.most_elements(*args) if isinstance(layer, LayerKind) else most_elements(layer, *args)
            needed = held(operands.values) + max(4, x.element_size()) * elements
            if needed > most:
                raise ProgramError(
                    f"{step.name} would bring the memory in use to {needed >> 20:,} MiB, more than the "
                    f"{most >> 20:,} MiB that a file may take for these images; if you trust it, "
                    "max_bytes raises the limit"
                )

        return watch


def elements_of_call(step: Step, operands: Operands) -> int:
    """How many elements a function makes at most: for one member, times the members."""
    call = CALLS[step.op, step.target]
    args, kwargs = mapped((step.args, step.kwargs), Ref, operands.one)
    if operands.own.isdisjoint(step.uses):
        return call.most_elements(*args, **kwargs)
    # Member by member there are the parts, and then the whole.
    return operands.members * call.most_elements(*args, **kwargs) * (1 if call.form else 2)


def most_elements(module: Any, x: Tensor) -> int:
    """How many elements a module of PyTorch without tensors makes at most of x."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return pooled(x, module.output_size, dims=2)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        height, width = _pair(module.padding)
        return padded(x, (width, width, height, height))
    return x.numel()


def held(values: Any) -> int:
    """Bytes of the memory behind tensors, each piece once."""
    pieces: dict[int, int] = {}

    def add(t: Tensor) -> None:
        storage = t.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()

    mapped(values, Tensor, add)
    return sum(pieces.values())
