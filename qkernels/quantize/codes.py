"""From a quantized layer to the integer codes that packed inference stores."""

import torch
from torch import Tensor

from ..ops.packing import quantize
from .layers import QuantizedLayer
from .quantizers import LSQ, positive_scale


@torch.no_grad()
def weight_codes(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """The integers that the layer's fake-quantized weight is made of, and the scale of each output channel.

    Returns:
        int8 codes of the weight's shape and float32 scales, one for each index of the layer's `channel_axis`: codes *
        scale is `layer.quantized_weight()` in float32, bit for bit.

    Raises:
        TypeError: for a quantizer whose levels are not equally spaced.
    """
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, LSQ):
        raise TypeError(f"{type(quantizer).__name__} weights are not integers times a scale and cannot be packed")
    scale = positive_scale(layer.weight_scale)
    codes = quantize(layer.float_weight(), scale, *quantizer.range, quantizer.axis)
    return codes, scale.expand(codes.shape[layer.channel_axis]).contiguous()
