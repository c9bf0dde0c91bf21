"""The members' graph, fused: what follows a convolution moves into it.

Batch norms are folded into scale and bias, residual additions and activations into the epilogue.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..ops.packed_conv2d import Activation
from .float_layers import StackedConv2d, StackedLinear, StackedNorm
from .packed_layer import PackedLayer
from .program import Program
from .stacking import Stacker


@dataclass
class FusionReport:
    """What became of the layers. Printing it gives a few lines.

    `packed` and `floating` name the layers with and without packed weights; `batch_norms`, `residuals` and
    `activations` those that were fused into another layer, `unfused` what was left, with the reason; `in_turn` says why
    the members run one after another instead of side by side, None if they do not.
    """

    packed: list[str] = field(default_factory=list)
    floating: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    unfused: dict[str, str] = field(default_factory=dict)
    in_turn: str | None = None

    def __str__(self) -> str:
        lines = [
            f"{len(self.packed)} layers packed, {len(self.floating)} float ({', '.join(self.floating) or 'none'})",
            f"fused: {len(self.batch_norms)} batch norms, {len(self.residuals)} residual additions, "
            f"{len(self.activations)} activations",
        ]
        lines += [f"not fused: {name}: {reason}" for name, reason in self.unfused.items()]
        if self.in_turn is not None:
            lines.append(f"members run in turn, module by module, with nothing fused: {self.in_turn}")
        return "\n".join(lines)


@contextmanager
def eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """All modules in eval mode, and back as each was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


_ADDITIONS = (operator.add, torch.add, "add")
_ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    "relu": "relu",
}


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    key = type(modules[str(node.target)]) if node.op == "call_module" else node.target
    return _ACTIVATIONS.get(key)


def _is_addition(node: fx.Node) -> bool:
    tensors = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS and tensors and not node.kwargs


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
                if calls[str(after.target)] > 1:
                    break
                layer.rescale_(norm.weight, norm.bias)
                report.batch_norms.append(str(after.target))
                after.replace_all_uses_with(node)
                graph.erase_node(after)
            elif packed and _is_addition(after) and len(node.args) == 1 and after.args[0] is not after.args[1]:
                other = after.args[1] if after.args[0] is node else after.args[0]
                with graph.inserting_before(after):
                    moved = graph.call_module(name, (node.args[0], other))
                after.replace_all_uses_with(moved)
                graph.erase_node(after)
                graph.erase_node(node)
                node = moved
                report.residuals.append(name)
            elif packed and (activation := _activation(after, modules)) is not None:
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
    graph.lint()


def stack_members(models: Sequence[nn.Module]) -> tuple[Program, FusionReport]:
    """One fused program for all members.

    Raises:
        CannotStack: with the reason, if the members have to run one after another.
    """
    with eval_mode(models):
        graph = Stacker(models).run()
    report = FusionReport()
    fuse_(graph, report)
    program = Program.from_graph(graph)
    for name, module in program.layers().items():
        if isinstance(module, PackedLayer):
            report.packed.append(name)
        elif isinstance(module, StackedConv2d | StackedLinear):
            report.floating.append(name)
    return program, report
