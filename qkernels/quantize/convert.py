"""Turning a model's layers into quantized ones and back, and what an optimizer needs to know of their scales."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.fake_quantize_multi import fake_quantize_multi
from ..ops.packing import packed_bytes
from .layers import QuantizedLayer, multiply_dtype
from .quantizers import INQ, LSQ, ActivationLSQ, GradScale, Granularity, positive_scale
from .registry import QUANTIZED_TYPES, quantized_type

LayerPolicy = Literal["same", "float"] | int


@dataclass(frozen=True)
class QConfig:
    """How `quantize_` quantizes a model.

    Args:
        weight_bits: 2..8.
        act_bits: of each quantized layer's input, 2..8; None leaves activations float.
        act_signed: whether the codes of an input have a sign; None lets the first training batch decide for each layer
            (unsigned if nothing in it is negative, as after ReLU).
        quantizer: of weights, "lsq" (learned scales) or "inq" (powers of two, see `INQ` and `snap_`).
        granularity: one weight scale an output "channel", or one a "tensor".
        narrow: leave out the least weight code, for a symmetric range; INQ's is symmetric anyway.
        learn_scale: False keeps the scales where they started; INQ's always stay.
        grad_scale: the N of LSQ's gradient factor for weights, see `LSQ`.
        first_layer, last_layer: "same" as the others, "float", or their own number of bits, which is that of their
            input too where `act_bits` is given; first and last by the order in which the model registers its layers.
            The default is QT-DoG's: only the classifier stays float.
        overrides: layer name, or "re:" and a pattern for `re.fullmatch`, to bits (as for the first layer), a QConfig,
            or None for float. An exact name goes before a pattern, an earlier pattern before a later one, and all
            before first and last.

    Raises:
        ValueError: for bits outside 2..8 or an unknown choice.
    """

    weight_bits: int = 7
    act_bits: int | None = None
    act_signed: bool | None = None
    quantizer: Literal["lsq", "inq"] = "lsq"
    granularity: Granularity = "channel"
    narrow: bool = False
    learn_scale: bool = True
    grad_scale: GradScale = "tensor"
    first_layer: LayerPolicy = "same"
    last_layer: LayerPolicy = "float"
    overrides: Mapping[str, "QConfig | int | None"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "weight_bits": tuple(range(2, 9)),
            "act_bits": (None, *range(2, 9)),
            "act_signed": (None, False, True),
            "quantizer": ("lsq", "inq"),
            "granularity": ("channel", "tensor"),
            "grad_scale": ("tensor", "scale", "none"),
            "first_layer": ("same", "float", *range(2, 9)),
            "last_layer": ("same", "float", *range(2, 9)),
        }
        chosen = {name: getattr(self, name) for name in choices}
        for name, layer in self.overrides.items():
            if layer is not None and not isinstance(layer, QConfig):
                choices[f"overrides[{name!r}]"] = choices["weight_bits"]
                chosen[f"overrides[{name!r}]"] = layer
        for name, allowed in choices.items():
            if chosen[name] not in allowed:
                raise ValueError(f"QConfig: {name}={chosen[name]!r}; choose one of {allowed}")

    def weight_quantizer(self) -> LSQ | INQ:
        """Of one layer's weight."""
        if self.quantizer == "inq":
            return INQ(self.weight_bits, self.granularity)
        return LSQ(self.weight_bits, self.granularity, self.narrow, self.learn_scale, self.grad_scale)

    def act_quantizer(self) -> ActivationLSQ | None:
        """Of one layer's input; None leaves it float."""
        return None if self.act_bits is None else ActivationLSQ(self.act_bits, self.act_signed, self.learn_scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON and YAML."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["overrides"] = {k: v.to_dict() if isinstance(v, QConfig) else v for k, v in self.overrides.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "QConfig":
        """From plain types, as `dataclasses.asdict` or a JSON file has them."""
        overrides = {
            name: cls.from_dict(layer) if isinstance(layer, Mapping) else layer
            for name, layer in plain.get("overrides", {}).items()
        }
        return cls(**{**plain, "overrides": overrides})


@dataclass(frozen=True)
class LayerReport:
    name: str
    type: str
    shape: tuple[int, ...]
    bits: int
    granularity: str
    act_bits: int | None


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did. Printing it gives a table.

    `model` is the model, `quantized` the layers with their bits, `skipped` the others that own a weight matrix or
    kernel, with the reason; `nbytes` the size when packed.
    """

    model: nn.Module
    quantized: list[LayerReport]
    skipped: dict[str, str]
    nbytes: int

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.quantized] + [len(name) for name in self.skipped])
        lines = [
            f"{layer.name:{width}}  {layer.type:12} {'x'.join(map(str, layer.shape)):>16}  "
            f"{layer.bits} bit per {layer.granularity}" + (f", input {layer.act_bits} bit" if layer.act_bits else "")
            for layer in self.quantized
        ]
        lines += [f"{name:{width}}  float: {reason}" for name, reason in self.skipped.items()]
        lines.append(f"{len(self.quantized)} layers quantized, {len(self.skipped)} float, {self.nbytes:,} bytes packed")
        return "\n".join(lines)


def _why_unsupported(module: nn.Module) -> str | None:
    """The reason to report for a module that owns a matrix or kernel but has no quantized type; else None."""
    if not any(p is not None and p.dim() >= 2 for p in module._parameters.values()):
        return None
    name = type(module).__name__
    if isinstance(module, QuantizedLayer):
        return "quantized already"
    for base in QUANTIZED_TYPES:
        if isinstance(module, base):
            return f"{name} derives from {base.__name__} and may override its forward; see qkernels.register_layer"
    return f"{name} has no quantized type"


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


def _layer_config(config: QConfig, layer: LayerPolicy | QConfig | None) -> QConfig | None:
    """What one layer gets: a QConfig, or None for float."""
    if layer is None or layer == "float":
        return None
    if isinstance(layer, QConfig):
        return layer
    if layer == "same":
        return config
    bits = int(layer)
    return replace(config, weight_bits=bits, act_bits=None if config.act_bits is None else bits)


def _plan(
    config: QConfig,
    modules: dict[str, nn.Module],
    candidates: list[str],
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> tuple[dict[str, QConfig], dict[str, str]]:
    """What each layer gets, and why the others stay float."""
    overrides = _match_overrides(config, candidates)
    plan: dict[str, QConfig] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        if name not in candidates:
            if (why := _why_unsupported(module)) is not None:
                skipped[name] = why
            continue
        layer: QConfig | None = config
        reason = ""
        if name in overrides:
            layer, reason = _layer_config(config, overrides[name]), "override"
        elif name and name == candidates[-1]:
            layer, reason = _layer_config(config, config.last_layer), f"last layer (last_layer={config.last_layer!r})"
        elif name and name == candidates[0]:
            layer = _layer_config(config, config.first_layer)
            reason = f"first layer (first_layer={config.first_layer!r})"
        if layer is not None and filter_fn is not None and not filter_fn(module, name):
            layer, reason = None, "filter_fn"
        if layer is None:
            skipped[name] = reason
        else:
            plan[name] = layer
    return plan, skipped


def quantize_(
    model: nn.Module, config: QConfig | None = None, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> QuantizationReport:
    """Turn the convolutions and linear layers of `model` into quantized ones, in place.

    Modules and Parameters stay the same objects, so references, hooks and an optimizer's state survive; new are only
    `weight_scale` and, with `act_bits`, `act_scale` (see `add_scales_`). The scale of an input starts from the first
    batch in training mode, in a distributed run from the parts of all processes together. Call `quantize_` before
    wrapping the model in DistributedDataParallel.

    Args:
        model: any module; also a single nn.Conv2d or nn.Linear, which is then quantized whatever the first and last
            layer's policy.
        config: by default QT-DoG's, 7 bit a channel with a float classifier.
        filter_fn: called with (module, name); False leaves the layer float.

    Returns:
        What was quantized, what was not and why.

    Raises:
        ValueError: if an override matches no layer, or nothing at all would be quantized.
    """
    config = config or QConfig()
    modules = dict(model.named_modules())
    candidates = {name: kind for name, m in modules.items() if (kind := quantized_type(m)) is not None}
    plan, skipped = _plan(config, modules, list(candidates), filter_fn)
    if not plan:
        reasons = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(f"quantize_: nothing to quantize in {type(model).__name__} ({reasons or 'no layers'})")
    for name, layer_config in plan.items():
        module = modules[name]
        # Changing the class keeps the module's identity: names, hooks, Parameters and other references to it.
        module.__class__ = candidates[name]
        assert isinstance(module, QuantizedLayer)
        module.quantize_weight_(layer_config.weight_quantizer())
        module.quantize_input_(layer_config.act_quantizer())
    return QuantizationReport(model, list(_describe(model)), skipped, packed_nbytes(model))


def _describe(model: nn.Module) -> Iterator[LayerReport]:
    for name, m in quantized_layers(model):
        q, act_bits = m.weight_quantizer, m.act_quantizer.bits if m.act_quantizer else None
        yield LayerReport(name, m.float_type.__name__, tuple(m.weight.shape), q.bits, q.granularity, act_bits)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of every quantized layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLayer))


def dequantize_(model: nn.Module) -> nn.Module:
    """Back to plain layers, in place: each weight becomes its dequantized value and the scales go. Returns `model`.

    Inputs are no longer quantized either, so where they were the outputs change.
    """
    for _, layer in list(quantized_layers(model)):
        layer.dequantize_()
        layer.__class__ = layer.float_type  # type: ignore[assignment]
    return model


def _fuse(model: nn.Module, args: Any) -> None:
    weights: dict[Any, list[tuple[QuantizedLayer, LSQ]]] = {}
    inputs: dict[Any, list[QuantizedLayer]] = {}
    for _, layer in quantized_layers(model):
        if isinstance(layer.weight_quantizer, LSQ):
            key = (layer.weight_quantizer.axis, layer.weight.device, layer.weight.dtype)
            weights.setdefault(key, []).append((layer, layer.weight_quantizer))
        if layer.act_range is not None:  # else the input to come decides its scale
            inputs.setdefault(layer.act_scale.device, []).append(layer)
    for (axis, _, _), members in weights.items():
        layers, quantizers = zip(*members, strict=True)
        fused = fake_quantize_multi(
            [layer.weight for layer in layers],
            _positive_scales([layer.weight_scale for layer in layers]),
            [q.range[0] for q in quantizers],
            [q.range[1] for q in quantizers],
            axis,
            [q.grad_factor(layer.weight) for q, layer in zip(quantizers, layers, strict=True)],
            multiply_dtype(layers[0].weight),
        )
        for layer, weight in zip(layers, fused, strict=True):
            layer.fused_weight = weight
    for rounding in inputs.values():
        for layer, scale in zip(rounding, _positive_scales([r.act_scale for r in rounding]), strict=True):
            layer.fused_act_scale = scale


def _positive_scales(scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`positive_scale` of each, flat, in a few launches for all of them."""
    return positive_scale(torch.cat([s.flatten() for s in scales])).split([s.numel() for s in scales])


def _unfuse(model: nn.Module, args: Any, output: Any) -> None:
    for _, layer in quantized_layers(model):
        layer.fused_weight = layer.fused_act_scale = None


def fuse_weights_(model: nn.Module) -> nn.Module:
    """From now on fake-quantize all LSQ weights of `model` in one kernel call at the start of each of its forwards.

    Same numbers as layer by layer, fewer launches. Call it on the module whose forward you call (inside
    DistributedDataParallel: the inner one), any time after or before `quantize_`, once. Returns `model`.
    """
    if _fuse not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_fuse)
        model.register_forward_hook(_unfuse, always_call=True)
    return model


def named_scales(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the state dict, learned scale) of each quantized weight and input of `model`."""
    for name, layer in quantized_layers(model):
        for kind in ("weight_scale", "act_scale"):
            scale = getattr(layer, kind, None)
            if scale is not None and scale.requires_grad:
                yield f"{name}.{kind}" if name else kind, scale


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of `model`, of weights and inputs."""
    return [scale for _, scale in named_scales(model)]


@torch.no_grad()
def snap_(model: nn.Module, fraction: float) -> None:
    """Freeze more weights of every INQ layer at their levels, the largest free ones first.

    Args:
        fraction: share in 0..1 of each layer's weights that is frozen afterwards; those frozen already stay, also where
            `fraction` is less than before. The paper's schedule is .5, .75, .875, 1.

    Raises:
        ValueError: for a fraction outside 0..1, or a model without an INQ layer.

    Source: Zhou et al. 2017, pruning-inspired partition.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"snap_: fraction must lie in 0..1, got {fraction}")
    layers = [layer for _, layer in quantized_layers(model) if isinstance(layer.weight_quantizer, INQ)]
    if not layers:
        raise ValueError('snap_: the model has no INQ layer; see QConfig(quantizer="inq")')
    for layer in layers:
        assert isinstance(layer.weight_quantizer, INQ)
        weight, frozen = layer.weight.detach(), layer.weight_frozen
        more = round(fraction * weight.numel()) - int(frozen.isfinite().sum())
        if more > 0:
            magnitude = torch.where(frozen.isinf(), weight.abs(), -1).flatten()
            largest = magnitude.argsort(descending=True, stable=True)[:more]
            chosen = torch.zeros_like(magnitude, dtype=torch.bool).index_fill_(0, largest, True).view_as(weight)
            frozen.copy_(torch.where(chosen, layer.weight_quantizer.snap(weight, layer.weight_scale), frozen))


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of a quantized model: its parameters, and its scales with their own lr and no weight decay.

    `scale_lr` is `lr` by default. Parameters that do not require gradients are left out.
    """
    own = scales(model)
    ids = {id(s) for s in own}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    if own:
        groups.append({"params": own, "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0})
    return groups


def add_scales_(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float | None = None) -> int:
    """Give the scales that `quantize_` made to a running optimizer, as a group without weight decay.

    Args:
        lr: of the scales; by default that of the optimizer's first group.

    Returns:
        How many scales were added; those that the optimizer has already are left as they are.

    Raises:
        ValueError: if a quantized layer's weight is not in the optimizer, as when it was built for another model.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in quantized_layers(model):
        if layer.weight.requires_grad and id(layer.weight) not in known:
            raise ValueError(f"add_scales_: {name}.weight is not in the optimizer; was it built for this model?")
    new = [s for s in scales(model) if id(s) not in known]
    if new:
        group = {"params": new, "weight_decay": 0.0, "lr": optimizer.param_groups[0]["lr"] if lr is None else lr}
        optimizer.add_param_group(group)
    return len(new)


def packed_nbytes(model: nn.Module) -> int:
    """Bytes of `model` with each quantized weight at its bits, and everything else as it is in memory.

    The bookkeeping of INQ, which its weights no longer need when all are frozen, does not count.
    """
    bits = {id(layer.weight): layer.weight_quantizer.bits for _, layer in quantized_layers(model)}
    tensors: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for _, layer in quantized_layers(model):
        if isinstance(layer.weight_quantizer, INQ):
            del tensors[id(layer.weight_frozen)]
    return sum(packed_bytes(t.numel(), bits[key]) if key in bits else t.nbytes for key, t in tensors.items())
