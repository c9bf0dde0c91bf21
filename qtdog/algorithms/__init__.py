"""What the loss is. An algorithm maps (model, minibatches of the source domains) to a scalar loss."""

from collections.abc import Callable

from torch import Tensor, nn

from qtdog.algorithms.erm import erm

Minibatches = list[tuple[Tensor, Tensor]]
Algorithm = Callable[[nn.Module, Minibatches], Tensor]

ALGORITHMS: dict[str, Algorithm] = {"erm": erm}
