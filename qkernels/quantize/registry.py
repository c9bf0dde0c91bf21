"""Which exact types of layers have a quantized type, and which quantized types a packed form. Subclasses do not count:
what a user's subclass computes is not known.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .layers import QConv2d, QLinear, QuantizedLayer

Pack = Callable[[Sequence[Any]], nn.Module]  # one quantized layer a member -> one packed layer for all of them

QUANTIZED_TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {nn.Conv2d: QConv2d, nn.Linear: QLinear}
PACKED_FORMS: dict[type[nn.Module], Pack] = {}


def register_layer(float_type: type[nn.Module], quantized_type: type[QuantizedLayer], pack: Pack | None = None) -> None:
    """Let `quantize_` turn layers of exactly `float_type` into `quantized_type`, and `PackedEnsemble` pack those.

    Args:
        quantized_type: derives from `QuantizedLayer` and `float_type`, in this order, has the class attribute
            `float_type`, and in its forward takes `self.quantized_weight()` where the float type uses `self.weight`,
            and `self.quantized_input(x)` for x; `timm_layers.py` shows one.
        pack: one quantized layer a member to a PackedConv2d or PackedLinear that computes the same, as
            `PackedConv2d.from_layers` does; without it such layers cannot be packed. Where such a layer stays float,
            the members of an ensemble run in turn.

    Raises:
        TypeError: for a quantized type that is not of this kind.
    """
    if not (issubclass(quantized_type, QuantizedLayer) and issubclass(quantized_type, float_type)):
        raise TypeError(
            f"register_layer: {quantized_type.__name__} must derive from QuantizedLayer and {float_type.__name__}"
        )
    if getattr(quantized_type, "float_type", None) is not float_type:
        raise TypeError(
            f"register_layer: {quantized_type.__name__} needs the class attribute float_type = {float_type.__name__}"
        )
    QUANTIZED_TYPES[float_type] = quantized_type
    if pack is not None:
        PACKED_FORMS[quantized_type] = pack


def quantized_type(module: nn.Module) -> type[QuantizedLayer] | None:
    """What `quantize_` makes of a module; None if nothing."""
    if "timm.layers" in sys.modules:
        from .timm_layers import Conv2dSame, QConv2dSame

        QUANTIZED_TYPES.setdefault(Conv2dSame, QConv2dSame)  # what a user registered stays
    return QUANTIZED_TYPES.get(type(module))
