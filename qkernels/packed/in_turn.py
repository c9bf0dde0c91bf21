"""Members that cannot run side by side: one after another, module by module, with packed layers in their places."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..quantize.layers import quantized_layers
from .stacking import pack


class MembersInTurn(nn.Module):
    """Members that could not be put into one graph: images [N, ...] through one after another, [M * N, ...]."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([member(x) for member in self.members])


def pack_layers_(model: nn.Module) -> nn.Module:
    """Replace each quantized layer of `model` by a packed one of a single member, in place. Returns `model`.

    Raises:
        ValueError: for a layer whose type has no packed form.
    """
    for name, layer in list(quantized_layers(model)):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, pack([layer], name))
    return model
