"""What the layers of timm become in a packed ensemble; loaded where timm is."""

from functools import partial

from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, LayerNorm, LayerNorm2d, Linear
from torch import nn

from ..quantize.timm_layers import QConv2dSame
from .float_layers import FloatForm, StackedConv2d, StackedLinear, StackedNorm
from .layers import PackedConv2d

__all__ = ["FLOAT", "PACKED", "DropPath"]

PACKED = {QConv2dSame: partial(PackedConv2d.from_layers, padding="tf_same")}
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
