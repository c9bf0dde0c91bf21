"""QConv2d and QLinear: drop-in subclasses that fake-quantize their weight in each forward pass."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantizers import LSQ


def weight_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies: autocast's where it is on, so that no second pass converts."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class QuantizedWeight(nn.Module):
    """What a quantized layer adds to its float type: `weight_scale` beside `weight`, and the quantizer.

    The float type's state-dict keys stay as they are. A float checkpoint loads strictly, and the scales start anew
    from the loaded weights; a quantized one restores them.
    """

    float_type: ClassVar[type[nn.Module]]
    weight: Tensor  # a Parameter; nn.Conv2d and nn.Linear declare it so
    weight_scale: nn.Parameter
    weight_quantizer: LSQ
    fused_weight: Tensor | None  # set for the length of one forward pass by `fuse_weights_`

    def quantize_weight_(self, quantizer: LSQ) -> None:
        """Begin to quantize `weight` with `quantizer`, the scale starting from the weight as it is."""
        self.weight_quantizer = quantizer
        self.fused_weight = None
        scale = torch.empty(self.weight.shape[:1] if quantizer.axis == 0 else (), device="meta")
        if not self.weight.is_meta:
            scale = quantizer.init_scale(self.weight)
        self.weight_scale = nn.Parameter(scale, requires_grad=quantizer.learn_scale)

    @torch.no_grad()
    def dequantize_weight_(self) -> None:
        """Write the dequantized values into `weight`, in place, and drop the scale."""
        self.weight.copy_(self.weight_quantizer(self.weight, self.weight_scale))
        del self.weight_scale, self.weight_quantizer, self.fused_weight

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight, of `weight`'s shape; differentiable in `weight` and `weight_scale`."""
        if self.fused_weight is not None:
            return self.fused_weight
        return self.weight_quantizer(self.weight, self.weight_scale, weight_dtype(self.weight))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        key = prefix + "weight_scale"
        if prefix + "weight" in state_dict and key not in state_dict:
            if key in missing:
                missing.remove(key)
            with torch.no_grad():
                self.weight_scale.copy_(self.weight_quantizer.init_scale(self.weight))

    def extra_repr(self) -> str:
        q = self.weight_quantizer
        fixed = "" if q.learn_scale else ", fixed scale"
        return f"{super().extra_repr()}, weight={q.bits} bit per {q.granularity}{fixed}"


class QConv2d(QuantizedWeight, nn.Conv2d):
    """nn.Conv2d with a fake-quantized weight; takes all its arguments, and the quantizer.

    `quantize_` turns an nn.Conv2d into one in place; constructing one starts from a new weight.
    """

    float_type = nn.Conv2d

    def __init__(self, *args: Any, quantizer: LSQ | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantize_weight_(quantizer or LSQ())

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantized_weight(), self.bias)


class QLinear(QuantizedWeight, nn.Linear):
    """nn.Linear with a fake-quantized weight; takes all its arguments, and the quantizer."""

    float_type = nn.Linear

    def __init__(self, *args: Any, quantizer: LSQ | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantize_weight_(quantizer or LSQ())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quantized_weight(), self.bias)
