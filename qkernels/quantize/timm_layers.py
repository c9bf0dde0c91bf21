"""Quantized counterparts of timm's convolutions that override nn.Conv2d's forward; loaded when a model has them."""

from typing import Any

from timm.layers import Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor

from .layers import QuantizedLayer


class QConv2dSame(QuantizedLayer, Conv2dSame):
    """timm's Conv2dSame (TensorFlow's padding, computed from the input's size), weight and input fake-quantized."""

    float_type = Conv2dSame

    def forward(self, x: Tensor) -> Tensor:
        geometry: dict[str, Any] = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        return conv2d_same(self.quantized_input(x), self.quantized_weight(), self.bias, **geometry)
