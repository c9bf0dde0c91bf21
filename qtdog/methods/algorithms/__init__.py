"""What the loss is, a file each."""

from qtdog.methods.algorithms.coral import CORAL
from qtdog.methods.algorithms.erm import ERM
from qtdog.methods.algorithms.loss import Loss
from qtdog.methods.algorithms.mixstyle import MixStyle

LOSSES: dict[str, type[Loss]] = {"erm": ERM, "coral": CORAL, "mixstyle": MixStyle}
