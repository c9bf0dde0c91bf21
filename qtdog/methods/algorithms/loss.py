"""What a loss is to the trainer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

Minibatches = list[tuple[Tensor, Tensor]]  # one (images float [B, C, H, W], labels int64 [B]) a source domain


@dataclass
class Loss:
    """Maps (model, minibatches of the source domains) to a scalar. A loss is a dataclass of its numbers."""

    least_domains: ClassVar[int] = 1  # source domains without which it is another loss
    least_batch: ClassVar[int] = 1  # images of each domain that it needs
    least_images: ClassVar[int] = 1  # images of all domains together that it needs
    whole_minibatch: ClassVar[bool] = False  # whether it is not the mean of what it is of equal pieces of a minibatch
    of_one_domain: ClassVar[str] = ""  # what it does less than it is known for, if there is one source domain

    @property
    def same_as(self) -> str | None:
        """The name of the loss that it is with its numbers, if that is another one."""
        return None

    def __call__(self, model: nn.Module, minibatches: Minibatches) -> Tensor:
        """The loss, differentiable.

        Args:
            model: maps images [N, C, H, W] to logits [N, classes].
        """
        raise NotImplementedError
