"""Quantized counterparts of timm's convolutions and linear layers; loaded when a model may have them."""

from typing import Any, cast

from timm.layers import (
    Conv2dSame,
    Linear,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import QuantizedLayer


class QConv2dSame(QuantizedLayer, Conv2dSame):
    """timm's Conv2dSame (TensorFlow's padding, computed from the input's size), weight and input fake-quantized."""

    float_type = Conv2dSame


class QTimmLinear(QuantizedLayer, Linear):
    """timm's Linear, which is nn.Linear but for TorchScript."""

    float_type = Linear


class QStandardized(QuantizedLayer):
    """A convolution that standardizes its weight in each forward: what is quantized is the standardized one.

    So the codes are those that are multiplied, and `dequantize_` leaves a plain convolution.
    """

    def float_weight(self) -> Tensor:
        """The standardized weight, times gain and scale where the layer has these."""
        layer: Any = self
        gain = (layer.gain * layer.scale).view(-1) if hasattr(self, "gain") else None
        latent = self.latent_weight
        rows = latent.reshape(1, layer.out_channels, -1)
        return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=layer.eps).reshape_as(latent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, layer = args[0] if args else kwargs["x"], cast(Any, self)
        if not self.enabled or not isinstance(x, Tensor):  # float, or traced by torch.fx
            return super().forward(x)
        x = self.quantized_input(x)
        if getattr(self, "same_pad", False):
            x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        return F.conv2d(
            x, self.quantized_weight(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )

    def dequantize_(self) -> None:
        plain: type[nn.Module] = Conv2dSame if getattr(self, "same_pad", False) else nn.Conv2d
        baked = self.enabled
        super().dequantize_()
        if baked:
            self._parameters.pop("gain", None)
            self.__class__ = plain  # type: ignore[assignment]


class QStdConv2d(QStandardized, StdConv2d):
    """timm's StdConv2d (weight standardization), weight and input fake-quantized."""

    float_type = StdConv2d


class QStdConv2dSame(QStandardized, StdConv2dSame):
    """timm's StdConv2dSame (weight standardization, TensorFlow's padding), weight and input fake-quantized."""

    float_type = StdConv2dSame


class QScaledStdConv2d(QStandardized, ScaledStdConv2d):
    """timm's ScaledStdConv2d (of normalizer-free networks), weight and input fake-quantized."""

    float_type = ScaledStdConv2d


class QScaledStdConv2dSame(QStandardized, ScaledStdConv2dSame):
    """timm's ScaledStdConv2dSame (of normalizer-free networks), weight and input fake-quantized."""

    float_type = ScaledStdConv2dSame


TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.float_type: kind
    for kind in (QConv2dSame, QTimmLinear, QStdConv2d, QStdConv2dSame, QScaledStdConv2d, QScaledStdConv2dSame)
}
