"""How one step is taken. A step rule gets the loss as a closure, so that a rule may evaluate it more than once."""

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

StepRule = Callable[[Callable[[], Tensor], Optimizer], Tensor]


def plain(loss: Callable[[], Tensor], optimizer: Optimizer) -> Tensor:
    """One gradient step; returns the loss before it (a detached scalar)."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return value.detach()


STEPS: dict[str, StepRule] = {"plain": plain}
