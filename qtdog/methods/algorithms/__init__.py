"""What the loss is. An algorithm maps (model, minibatches of the source domains) to a scalar loss.

Its keyword arguments are its numbers: each is a flag of `qtdog train` of the same name, and a preset's number.
"""

from collections.abc import Callable

from torch import Tensor

from qtdog.methods.algorithms.coral import coral
from qtdog.methods.algorithms.erm import erm
from qtdog.methods.algorithms.mixstyle import mixstyle

Minibatches = list[tuple[Tensor, Tensor]]
Algorithm = Callable[..., Tensor]

ALGORITHMS: dict[str, Algorithm] = {"erm": erm, "coral": coral, "mixstyle": mixstyle}
