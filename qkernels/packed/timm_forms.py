"""What the layers of timm become in a packed ensemble; loaded where timm is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame, LayerNorm, LayerNorm2d, Linear
from torch import nn

from ..quantize.timm_layers import QConv2dSame
from .float_layers import StackedConv2d, StackedLinear, StackedNorm
from .layers import PackedConv2d


def _norm_and_activation(layers: Sequence[Any]) -> list[nn.Module]:
    """timm's batch norm ends with an activation."""
    act = layers[0].act
    return [StackedNorm.from_batch_norms(layers), *([] if type(act) is nn.Identity else [act])]


PACKED = {QConv2dSame: partial(PackedConv2d.from_layers, padding="tf_same")}
FLOAT: dict[type[nn.Module], Callable[[Sequence[Any]], nn.Module | list[nn.Module]]] = {
    BatchNormAct2d: _norm_and_activation,
    Conv2dSame: partial(StackedConv2d.from_layers, padding="tf_same"),
    LayerNorm: StackedNorm.from_layer_norms,
    LayerNorm2d: StackedNorm.from_images_layer_norms,
    Linear: StackedLinear.from_layers,
}
