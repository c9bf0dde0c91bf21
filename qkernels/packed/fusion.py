"""The members' graph, fused: what follows a convolution moves into it.

Batch norms and constant factors are folded into scale and bias, residual additions and activations into the epilogue.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops.packed_conv2d import Activation
from .float_layers import SharedConstant, StackedConstant, StackedConv2d, StackedNorm
from .layers import PackedLinear
from .packed_layer import PackedLayer
from .tracing import remove_unused


@dataclass
class FusionReport:
    """What became of the layers. Printing it gives a few lines.

    `packed` and `floating` name the layers with and without packed weights; `batch_norms` those that were fused into
    another layer, `factors`, `residuals` and `activations` the layers into which such were fused, `unfused` what was
    left, with the reason; `in_turn` says why the members run one after another instead of side by side, None if they do
    not; `verified` how near the answers come to the members' own.
    """

    packed: list[str] = field(default_factory=list)
    floating: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    factors: list[str] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    unfused: dict[str, str] = field(default_factory=dict)
    in_turn: str | None = None
    verified: str = ""

    def __str__(self) -> str:
        lines = [
            f"{len(self.packed)} layers packed, {len(self.floating)} float ({', '.join(self.floating) or 'none'})",
            f"fused: {len(self.batch_norms)} batch norms, {len(self.factors)} factors, "
            f"{len(self.residuals)} residual additions, {len(self.activations)} activations",
        ]
        lines += [f"not fused: {name}: {reason}" for name, reason in self.unfused.items()]
        if self.in_turn is not None:
            lines.append(f"members run in turn, module by module, with nothing fused: {self.in_turn}")
        lines += [self.verified] * bool(self.verified)
        return "\n".join(lines)


_ACTIVATIONS: dict[Any, Activation] = {
    F.relu: "relu",
    "relu": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    "sigmoid": "sigmoid",
}


def _activation(node: fx.Node) -> Activation | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is F.hardtanh and dict(node.kwargs) == {"min_val": 0.0, "max_val": 6.0}:
        return "relu6"  # nn.ReLU6 calls it so
    if node.target is F.gelu:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)


def _other_of_addition(node: fx.Node, own: fx.Node) -> fx.Node | None:
    """What of a result's own shape is added to it."""
    if node.target is not operator.add or len(node.args) != 2 or node.args[0] is node.args[1]:
        return None
    other = node.args[1] if node.args[0] is own else node.args[0]
    same = isinstance(other, fx.Node) and other.meta.get("shape") == own.meta["shape"]
    return other if same else None  # type: ignore[return-value]


def _factor(
    node: fx.Node, own: fx.Node, layer: PackedLayer | StackedConv2d, modules: dict[str, nn.Module]
) -> Tensor | None:
    """The constants, float64 [M, C_out], by which the channels of a layer's result are multiplied (layer scale)."""
    if node.target is not operator.mul or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is own else node.args[0]
    constant = modules.get(str(other.target)) if isinstance(other, fx.Node) and other.op == "call_module" else None
    if not isinstance(constant, StackedConstant | SharedConstant) or not constant.value.is_floating_point():
        return None
    members = layer.members if isinstance(layer, PackedLayer) else layer.weight.shape[0]
    value = constant.value
    value = value if isinstance(constant, StackedConstant) else value.expand(members, *value.shape)
    shape = own.meta["shape"]
    # Of one element a channel and 1 in all other dimensions, counted from the last as they are where shapes broadcast.
    behind = 0 if isinstance(layer, PackedLinear) else 2
    channels = shape[-1 - behind]
    broadcast = [1] * (len(shape) - 1 - behind) + [channels] + [1] * behind
    dims = value.dim() - 1
    if not behind < dims <= len(shape) or list(value.shape[1:]) != broadcast[-dims:]:
        return None
    return value.double().reshape(-1, channels)


def _has_channels_next(layer: nn.Module, node: fx.Node) -> bool:
    """Whether the channels of a layer's result are in the dimension after that of the images, where batch norms act."""
    return len(node.meta["shape"]) == (2 if isinstance(layer, PackedLinear) else 4)


def fuse_(traced: fx.GraphModule, report: FusionReport) -> None:
    """Fold what follows each layer into it, in place."""
    graph, modules = traced.graph, dict(traced.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, PackedLayer | StackedConv2d):
            continue
        name = str(node.target)
        if calls[name] > 1:
            report.unfused[name] = "it is called more than once"
            continue
        while len(node.users) == 1:
            (after,) = node.users
            norm = modules.get(str(after.target)) if after.op == "call_module" else None
            packed = isinstance(layer, PackedLayer)
            if isinstance(norm, StackedNorm) and norm.kind == "batch" and len(node.args) == 1:
                if calls[str(after.target)] > 1 or not _has_channels_next(layer, node):
                    break
                layer.rescale_(norm.weight, norm.bias)
                report.batch_norms.append(str(after.target))
                after.replace_all_uses_with(node)
                graph.erase_node(after)
            elif len(node.args) == 1 and (factor := _factor(after, node, layer, modules)) is not None:
                layer.rescale_(factor, torch.zeros_like(factor))
                report.factors.append(name)
                after.replace_all_uses_with(node)
                graph.erase_node(after)
            elif packed and len(node.args) == 1 and (other := _other_of_addition(after, node)) is not None:
                with graph.inserting_before(after):
                    moved = graph.call_module(name, (node.args[0], other))
                moved.meta = dict(node.meta)
                after.replace_all_uses_with(moved)
                graph.erase_node(after)
                graph.erase_node(node)
                node = moved
                report.residuals.append(name)
            elif packed and (activation := _activation(after)) is not None:
                layer.activation = activation
                after.replace_all_uses_with(node)
                graph.erase_node(after)
                report.activations.append(name)
                break
            else:
                break
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, StackedNorm) and module.kind == "batch":
            report.unfused[str(node.target)] = "a batch norm without a convolution of its own before it"
            module.weight, module.bias = module.weight.float(), module.bias.float()
    remove_unused(graph)  # constants that were folded
    graph.lint()
