"""Which exact types of layers have a form for several members. What has none is looked into: `tracing.py`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..quantize.layers import QuantizedLayer
from ..quantize.quantizers import LSQ
from ..quantize.registry import PACKED_FORMS
from ..quantize.torch_layers import QConv2d, QLinear
from .attention import attend
from .float_layers import FloatForm, StackedConv2d, StackedLinear, StackedNorm
from .layers import PackedConv2d, PackedLinear

PACKED_FORMS |= {QConv2d: PackedConv2d.from_layers, QLinear: PackedLinear.from_layers}


def _has_statistics(norm: Any) -> bool:
    return norm.running_mean is not None  # otherwise the batch decides


_BATCH_NORM = FloatForm(StackedNorm.from_batch_norms, _has_statistics)
FLOAT_FORMS: dict[type[nn.Module], FloatForm] = {
    nn.Conv2d: FloatForm(StackedConv2d.from_layers, lambda conv: conv.padding_mode == "zeros"),
    nn.Linear: FloatForm(StackedLinear.from_layers),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.GroupNorm: FloatForm(StackedNorm.from_group_norms),
    nn.LayerNorm: FloatForm(StackedNorm.from_layer_norms),
}
NOTHING_IN_EVAL: set[type[nn.Module]] = {
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
}


def know_libraries() -> None:
    """Take up the types of timm and torchvision where these have been imported."""
    if "timm.layers" in sys.modules:
        from . import timm_forms

        for kind, pack_form in timm_forms.PACKED.items():
            PACKED_FORMS.setdefault(kind, pack_form)  # what a user registered stays
        FLOAT_FORMS.update(timm_forms.FLOAT)
        NOTHING_IN_EVAL.add(timm_forms.DropPath)
    if "torchvision.models.convnext" in sys.modules:
        from torchvision.models.convnext import LayerNorm2d

        FLOAT_FORMS[LayerNorm2d] = FloatForm(StackedNorm.from_images_layer_norms)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The type of what a module computes: a quantized layer that is not enabled is a float one."""
    return module.float_type if isinstance(module, QuantizedLayer) and not module.enabled else type(module)


def layer_of(module: nn.Module) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """What a module computes that has a form, and its children that follow; None for one that has none."""
    kind = kind_of(module)
    if kind in PACKED_FORMS or _passes_codes(module):
        return module.forward, ()
    form = FLOAT_FORMS.get(kind)
    if form is None or not form.fits(module):
        return None
    return (module.forward if form.forward is None else form.forward.__get__(module)), form.children


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a module that has no form and is looked into, where its own would not show what it computes."""
    if isinstance(module, nn.MultiheadAttention):
        return attend.__get__(module)
    if isinstance(module, QuantizedLayer) and module.act_quantizer is None:
        return module.float_type.forward.__get__(module)
    return None


def _passes_codes(module: Any) -> bool:
    """Max pools stay layers, as between integer layers they take codes."""
    return type(module) is nn.MaxPool2d and not module.return_indices


def stack(layers: Sequence[Any]) -> nn.Module:
    """One layer of M for which there is a `layer_of`."""
    kind = kind_of(layers[0])
    if kind in PACKED_FORMS:
        return PACKED_FORMS[kind](layers)
    if kind in FLOAT_FORMS:
        return FLOAT_FORMS[kind].stack(layers)
    pool = layers[0]
    return nn.MaxPool2d(pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)


def pack(layer: QuantizedLayer, name: str) -> nn.Module | None:
    """A packed layer of one member; None where its type has no packed form, but is no more than its quantized weight.

    Raises:
        ValueError: for a type without a packed form whose input is quantized.
    """
    know_libraries()
    if type(layer) in PACKED_FORMS:
        return PACKED_FORMS[type(layer)]([layer])
    if layer.act_quantizer is None and isinstance(layer.weight_quantizer, LSQ):
        return None
    raise ValueError(
        f"PackedEnsemble: {name} is a {type(layer).__name__}, which has no packed form; see qkernels.register_layer"
    )
