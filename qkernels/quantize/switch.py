"""When quantization begins and where it stops: `enable_`, `disable_`."""

import warnings
from typing import Any

from torch import nn

from .layers import QuantizedLayer, quantized_layers
from .sharding import fill_, reshard_


def enable_(model: nn.Module) -> nn.Module:
    """Begin to quantize: the switch of QT-DoG, after `quantize_(model, config, enabled=False)`. Returns `model`.

    The scales of weights start from the weights as they are now, those of inputs from the next batch in training mode.
    After `disable_` all go on as they were. No Parameter is new, so optimizers, schedulers, averages and wrappers that
    know the model need not be told. An averaged copy of the model (EMA, SWA) is enabled by a call of its own.

    Raises:
        ValueError: for a model without quantized layers.
    """
    layers = _layers(model, "enable_")
    reshard_(model)
    for layer in layers:
        layer.enable_()
    watch_inputs_(model)
    return model


def disable_(model: nn.Module) -> nn.Module:
    """From now on `model` computes in float with its latent weights, until `enable_`. Scales are kept. Returns `model`.

    Raises:
        ValueError: for a model without quantized layers.
    """
    for layer in _layers(model, "disable_"):
        layer.enabled = False
    return model


def _layers(model: nn.Module, caller: str) -> list[QuantizedLayer]:
    layers = [layer for _, layer in quantized_layers(model)]
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no quantized layers; call qkernels.quantize_ first")
    return layers


def watch_inputs_(model: nn.Module) -> None:
    """See to it that no layer's input is quantized in name only: some weights are read by code that calls no layer."""
    waits = any(layer.act_quantizer is not None and layer.act_range is None for _, layer in quantized_layers(model))
    if waits and _passed_by not in model._forward_hooks.values():
        model.register_forward_hook(_passed_by)


def _passed_by(model: nn.Module, args: Any, output: Any) -> None:
    """After a forward: inputs of layers that were not called, but whose weights were read, are float."""
    layers = [(name, layer) for name, layer in quantized_layers(model) if layer.act_quantizer is not None]
    if any(layer.act_start is not None for _, layer in layers) and reshard_(model):
        for _, layer in layers:
            if layer.act_start is not None:
                fill_(layer.act_scale, layer.act_start)  # which was written to what FSDP had collected
    for _, layer in layers:
        layer.act_start = None
    waiting = [(name, layer) for name, layer in layers if layer.act_range is None]
    read = [(name, layer) for name, layer in waiting if layer.weight_was_read]
    if model.training and read:
        warnings.warn(
            f"the inputs of {', '.join(name for name, _ in read)} stay float: the model reads these layers' weights "
            "without calling them",
            stacklevel=2,
        )
        for _, layer in read:
            layer.quantize_input_(None)
    if len(waiting) == len(read) * model.training:
        hooks = model._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _passed_by]:
            del hooks[key]
