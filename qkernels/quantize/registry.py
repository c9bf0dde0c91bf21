"""Which exact types of layers have a quantized type, and which quantized types a packed form. Subclasses do not count:
what a user's subclass computes is not known.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .layers import QuantizedLayer
from .torch_layers import TYPES

Pack = Callable[[Sequence[Any]], nn.Module]  # one quantized layer a member -> one packed layer for all of them

QUANTIZED_TYPES: dict[type[nn.Module], type[QuantizedLayer]] = dict(TYPES)
PACKED_FORMS: dict[type[nn.Module], Pack] = {}


def register_layer(float_type: type[nn.Module], quantized_type: type[QuantizedLayer], pack: Pack | None = None) -> None:
    """Let `quantize_` turn layers of exactly `float_type` into `quantized_type`, and `PackedEnsemble` pack those.

    Args:
        quantized_type: derives from `QuantizedLayer` and `float_type`, in this order, and has the class attribute
            `float_type`. Its forward is `QuantizedLayer`'s: that of the float type, which reads the quantized weight as
            `self.weight`. Where the weight is quantized only after something is made of it, `float_weight` says of
            what; `timm_layers.py` shows both.
        pack: one quantized layer a member to a PackedConv2d or PackedLinear that computes the same, as
            `PackedConv2d.from_layers` does. Without it the layer's forward is traced, with a packed weight that is
            dequantized for it; where members run in turn the layer is a float one with its quantized weight.

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
    """What `quantize_` makes of a module, or has made; None if nothing."""
    if "timm.layers" in sys.modules:
        from . import timm_layers

        for float_type, kind in timm_layers.TYPES.items():
            QUANTIZED_TYPES.setdefault(float_type, kind)  # what a user registered stays
    if isinstance(module, QuantizedLayer):
        return type(module)
    return QUANTIZED_TYPES.get(type(module))


def why_float(module: nn.Module) -> str | None:
    """Why a module that has a matrix or a kernel cannot be quantized; None if it can, or has none."""
    kind = quantized_type(module)
    name = type(module).__name__
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        return f"{name} does not know its size yet: run a batch through the model first"
    if parametrize.is_parametrized(module):
        bases = [base.__name__ for base in QUANTIZED_TYPES if isinstance(module, base)]
        if bases:
            return "its weight is computed from others: torch.nn.utils.parametrize.remove_parametrizations it first"
    if kind is not None:
        weight = module._parameters.get(kind.weight_name)
        if weight is not None:
            return None
        if isinstance(module, nn.MultiheadAttention):
            return "queries, keys and values have projections of their own (kdim, vdim)"
        return (
            "its weight is recomputed before each forward (pruning, weight_norm, spectral_norm): make that permanent "
            "first"
        )
    if not any(p is not None and p.dim() >= 2 for p in module._parameters.values()):
        return None
    for base in QUANTIZED_TYPES:
        if isinstance(module, base):
            return f"{name} derives from {base.__name__} and may override its forward; see qkernels.register_layer"
    return f"{name} has no quantized type"
