"""Turning a model's layers into quantized ones and back."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .config import QConfig, layer_config
from .described import from_tensor, quantizers
from .layers import STATE, QuantizedLayer, quantized_layers
from .quantizers import INQ, LSQ, ActivationLSQ
from .registry import quantized_type, why_float
from .report import QuantizationReport, packed_nbytes, reported, shares
from .switch import watch_inputs_

FilterFn = Callable[[nn.Module, str], bool]
Quantizers = tuple[LSQ | INQ, ActivationLSQ | None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_(
    model: nn.Module, config: QConfig | None = None, filter_fn: FilterFn | None = None, enabled: bool = True
) -> QuantizationReport:
    """Turn the convolutions, linear layers and attentions of `model` into quantized ones, in place.

    Modules and Parameters stay the same objects, so references, hooks and an optimizer's state survive; new are only
    `weight_scale` and, with `act_bits`, `act_scale`. The scale of an input starts from the first batch in training
    mode, in a distributed run from the parts of all processes together.

    To begin in mid-training, call it at the start with `enabled=False`, before optimizer, scheduler, averages and
    DistributedDataParallel are made; `enable_` is the switch. Called again, layers of other bits begin anew from their
    latent weights, the others stay as they are. If it fails, the model is as before.

    Args:
        model: any module; also a single layer, which is then quantized whatever the first and last layer's policy.
        config: by default QT-DoG's, 7 bit a channel with a float classifier.
        filter_fn: called with (module, name); False leaves the layer as it is.
        enabled: whether to quantize from now on; False waits for `enable_`.

    Returns:
        What was quantized, what was not and why.

    Raises:
        ValueError: if an override matches no layer, nothing at all would be quantized, a weight is of a dtype that is
            not quantized, or layers that share a weight would get different bits.
    """
    config = config or QConfig()
    modules = dict(model.named_modules())
    plan, floating, skipped = _plan(config, modules, filter_fn)
    if not plan:
        reasons = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(f"quantize_: nothing to quantize in {type(model).__name__} ({reasons or 'no layers'})")
    return _convert(model, {name: (q, enabled) for name, q in plan.items()}, floating, skipped)


def quantize_like_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> QuantizationReport:
    """Quantize a float model as the model was that a state dict is of, layer by layer: then `load_state_dict` fits.

    Works on the meta device, too (`load_state_dict(..., assign=True)`), and for what loads for you: call it where the
    model is built.

    Raises:
        ValueError: if the state dict does not say how (it is float, or of a version before it did), or has layers that
            the model lacks.
    """
    described = {key.rpartition(".")[0]: from_tensor(t) for key, t in state_dict.items() if _is_state(key)}
    if not described:
        raise ValueError("quantize_like_: the state dict does not say how its layers are quantized")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in described:
        if name not in modules or quantized_type(modules[name]) is None or why_float(modules[name]):
            raise ValueError(f"quantize_like_: {type(model).__name__} has no layer {name!r} that can be quantized")
    plan = {name: (quantizers(plain), plain["enabled"]) for name, plain in described.items()}
    report = _convert(model, plan, [], {})
    for name, plain in described.items():
        modules[name].started = plain["started"]  # type: ignore[assignment]
    return report


def _is_state(key: str) -> bool:
    return key.rpartition(".")[2] == STATE


def dequantize_(model: nn.Module) -> nn.Module:
    """Back to plain layers, in place: each weight becomes its dequantized value and the scales go. Returns `model`.

    Inputs are no longer quantized either, so where they were the outputs change. A weight that others use as well gets
    its dequantized value once; where they use it otherwise (float, or with other bits) the layer gets one of its own.
    """
    owners: dict[int, list[Any]] = {}  # of each Parameter: the scale that it is quantized with, None where it is not
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                quantized = isinstance(module, QuantizedLayer) and name == module.weight_name and module.enabled
                owners.setdefault(id(p), []).append(module.weight_scale if quantized else None)
    written: set[int] = set()
    for _, layer in list(quantized_layers(model)):
        latent = layer.latent_weight
        if id(latent) in written:
            layer.forget_()
        elif any(scale is not layer.weight_scale for scale in owners[id(latent)]) and layer.enabled:
            layer._parameters[layer.weight_name] = nn.Parameter(latent.detach().clone(), latent.requires_grad)
            layer.dequantize_()
        else:
            layer.dequantize_()
            written.add(id(latent))
    return model


# What becomes of each layer ----------------------------------------------------------------------------------------


def _plan(
    config: QConfig, modules: dict[str, nn.Module], filter_fn: FilterFn | None
) -> tuple[dict[str, Quantizers], list[str], dict[str, str]]:
    """What each layer gets, which quantized layers are to be float again, and why others are float."""
    candidates = [name for name, m in modules.items() if quantized_type(m) is not None and why_float(m) is None]
    overrides = _match_overrides(config, candidates)
    first, last = _first_and_last(modules)
    plan: dict[str, Quantizers] = {}
    floating, skipped = [], {}
    for name, module in modules.items():
        if name not in candidates:
            if (why := why_float(module)) is not None:
                skipped[name] = why
            continue
        layer: QConfig | None = config
        reason = ""
        if name in overrides:
            layer, reason = layer_config(config, overrides[name]), "override"
        elif name in last:
            layer, reason = layer_config(config, config.last_layer), f"last layer (last_layer={config.last_layer!r})"
        elif name == first:
            layer = layer_config(config, config.first_layer)
            reason = f"first layer (first_layer={config.first_layer!r})"
        if layer is not None and filter_fn is not None and not filter_fn(module, name):
            if not isinstance(module, QuantizedLayer):
                skipped[name] = "filter_fn"
        elif layer is None:
            skipped[name] = reason
            if isinstance(module, QuantizedLayer):
                floating.append(name)
        else:
            plan[name] = layer.weight_quantizer(), layer.act_quantizer()
    return plan, floating, skipped


def _first_and_last(modules: dict[str, nn.Module]) -> tuple[str | None, list[str]]:
    """The first layer and the last ones, of all that own a weight matrix or kernel; the root itself is neither.

    Last are the heads that stand beside each other: they give as many outputs, and none takes another's.
    """
    weights = {}
    for name, module in modules.items():
        kind = quantized_type(module)
        weight = module._parameters.get("weight" if kind is None else kind.weight_name)
        if name and weight is not None and not is_lazy(weight) and weight.dim() >= 2:
            weights[name] = weight.shape
    if not weights:
        return None, []
    *others, last = weights
    heads = [last]
    while others:
        shape, after = weights[others[-1]], weights[heads[-1]]
        if len(shape) != len(after) or shape[0] != after[0] or after[1] == shape[0]:
            break
        heads.append(others.pop())
    return next(iter(weights)), heads


def _match_overrides(config: QConfig, names: list[str]) -> dict[str, QConfig | int | None]:
    """Layer name -> override, exact names first; an override that matches no layer is an error."""
    matched: dict[str, QConfig | int | None] = {}
    for exact in (True, False):
        for key, layer in config.overrides.items():
            if key.startswith("re:") == exact:
                continue
            hits = [n for n in names if n == key] if exact else [n for n in names if re.fullmatch(key[3:], n)]
            if not hits:
                close = difflib.get_close_matches(key.removeprefix("re:"), names, n=3) or names[:3]
                raise ValueError(f"quantize_: override {key!r} matches no layer; there are {', '.join(close)}, ...")
            for name in hits:
                matched.setdefault(name, layer)
    return matched


# Doing it ------------------------------------------------------------------------------------------------------------


def _convert(
    model: nn.Module, plan: dict[str, tuple[Quantizers, bool]], floating: list[str], skipped: dict[str, str]
) -> QuantizationReport:
    """Carry out a plan: name -> its quantizers and whether it is enabled."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before = {layer.name: str(layer) for layer in reported(model)}
    with _all_or_nothing([modules[name] for name in [*plan, *floating]]):
        for name in floating:
            modules[name].forget_()  # type: ignore[operator]
        of_weight: dict[int, tuple[str, QuantizedLayer]] = {}
        for name, (own, enabled) in plan.items():
            layer = _quantized(name, modules[name], own, enabled)
            other, first = of_weight.setdefault(id(layer.latent_weight), (name, layer))
            if first is not layer:
                if first.weight_quantizer != layer.weight_quantizer:
                    raise ValueError(
                        f"quantize_: {other} and {name} share one weight, so they must be quantized alike; give them "
                        "the same bits by overrides, or let one stay float"
                    )
                layer.weight_scale = first.weight_scale
    now = {layer.name: str(layer) for layer in reported(model)}
    changed = {
        name: f"{was} -> {now.get(name, 'float')}" for name, was in before.items() if was != now.get(name, "float")
    }
    layers = list(quantized_layers(model))
    enabled = all(layer.enabled for _, layer in layers)
    if enabled:
        watch_inputs_(model)
    return QuantizationReport(
        model,
        list(reported(model)),
        skipped,
        changed,
        shares(model, [*(name for name, _ in layers), *skipped]),
        packed_nbytes(model),
        enabled,
    )


def _quantized(name: str, module: nn.Module, own: Quantizers, enabled: bool) -> QuantizedLayer:
    """Make a module a quantized layer with quantizers of its own; one that has them already stays as it is."""
    kind = quantized_type(module)
    assert kind is not None
    latent = module._parameters[kind.weight_name]
    assert latent is not None
    if latent.dtype not in FLOATS:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(
            f"quantize_: {name} has a weight of {latent.dtype}; quantized are {dtypes}: call model.float()"
        )
    new = not isinstance(module, QuantizedLayer)
    # Changing the class keeps the module's identity: names, hooks, Parameters and other references to it.
    module.__class__ = kind
    assert isinstance(module, QuantizedLayer)
    if new:
        module.enabled = module.started = False
    weight, input = own
    anew = new or not module.quantizes_alike(weight)
    if anew:
        module.quantize_weight_(weight)
    if new or module.act_quantizer != (input if module.quantizes_input else None):
        anew = True
        module.quantize_input_(input)
    if anew:
        module.enabled = module.started = enabled
    return module


@contextmanager
def _all_or_nothing(modules: list[nn.Module]) -> Iterator[None]:
    """If something goes wrong within, the modules are what they were: their types, and what they have."""
    before = [
        (m, m.__class__, {k: v.copy() if isinstance(v, dict | set) else v for k, v in m.__dict__.items()})
        for m in modules
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise
