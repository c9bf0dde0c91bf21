"""What the layers of timm become in a packed ensemble; loaded where timm is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, LayerNorm, LayerNorm2d, Linear
from torch import nn

from ..quantize.timm_layers import (
    QConv2dSame,
    QScaledStdConv2d,
    QScaledStdConv2dSame,
    QStdConv2d,
    QStdConv2dSame,
    QTimmLinear,
)
from .float_layers import FloatForm, StackedConv2d, StackedLinear, StackedNorm
from .layers import PackedConv2d, PackedLinear

__all__ = ["FLOAT", "PACKED", "DropPath"]


def _standardized(layers: Sequence[Any]) -> PackedConv2d:
    """Their codes are of the standardized weight."""
    return PackedConv2d.from_layers(layers, padding="tf_same" if getattr(layers[0], "same_pad", False) else None)


PACKED: dict[type[nn.Module], Callable[[Sequence[Any]], nn.Module]] = {
    QConv2dSame: partial(PackedConv2d.from_layers, padding="tf_same"),
    QTimmLinear: PackedLinear.from_layers,
    **dict.fromkeys((QStdConv2d, QStdConv2dSame, QScaledStdConv2d, QScaledStdConv2dSame), _standardized),
}
FLOAT: dict[type[nn.Module], FloatForm] = {
    BatchNormAct2d: FloatForm(
        StackedNorm.from_batch_norms,
        lambda norm: norm.running_mean is not None,
        nn.BatchNorm2d.forward,
        ("drop", "act"),
    ),
    Conv2dSame: FloatForm(partial(StackedConv2d.from_layers, padding="tf_same")),
    LayerNorm: FloatForm(StackedNorm.from_layer_norms),
    LayerNorm2d: FloatForm(StackedNorm.from_images_layer_norms),
    Linear: FloatForm(StackedLinear.from_layers),
}
