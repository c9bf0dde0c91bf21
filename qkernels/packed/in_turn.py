"""Members that cannot run side by side: one after another, module by module, with packed layers in their places."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..quantize.layers import quantized_layers
from .answers import joined
from .forms import pack
from .packed_layer import PackedLayer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class MembersInTurn(nn.Module):
    """Members that could not be put into one graph: what they are called with goes through one after another."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The members' answers as one: see `answers.joined`."""
        return joined([member(*args, **kwargs) for member in self.members])


def pack_layers_(model: nn.Module) -> nn.Module:
    """Replace each quantized layer of `model` by a packed one of a single member, in place. Returns `model`.

    A layer that stands under several names is one layer afterwards, too. Hooks go over to it. Layers whose type has no
    packed form become float ones with the quantized weight.

    Raises:
        ValueError: for a layer whose type has no packed form and whose input is quantized.
    """
    for name, layer in list(quantized_layers(model)):
        packed = pack(layer, name) if layer.enabled else None
        if packed is None:  # it is no more than its weight
            layer.dequantize_()
            continue
        assert isinstance(packed, PackedLayer)
        put(model, layer, packed.stand_alone_())
        for hooks in HOOKS:
            getattr(packed, hooks).update(getattr(layer, hooks))
    return model.requires_grad_(False)  # PyTorch takes other ways, to other bits, for weights that might need one


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = new
