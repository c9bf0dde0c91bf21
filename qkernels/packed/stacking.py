"""One graph for all members of an ensemble: each layer of the first becomes one that holds all members' tensors."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .float_layers import SharedConstant, StackedConstant
from .forms import stack
from .layers import PackedLinear
from .tracing import CannotStack, Trace, remove_unused
from .weights import PackedWeight


def check_same(traces: Sequence[Trace]) -> None:
    """Make sure that all members compute the same.

    Raises:
        ValueError: with the first step that differs.
    """
    first, *others = traces
    for index, other in enumerate(others, start=1):
        for own, expected in zip_longest(other.steps(), first.steps()):
            if own != expected:
                raise ValueError(
                    f"PackedEnsemble: models[{index}] does not compute what models[0] does: {own} and {expected}"
                )


def stack_traces(models: Sequence[nn.Module], traces: Sequence[Trace]) -> fx.GraphModule:
    """The members' graph.

    Args:
        models: the members.
        traces: what each does, which is the same.

    Raises:
        CannotStack: with the reason.
    """
    check_same(traces)
    graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    start, *nodes = traces[0].graph.nodes
    images = graph.node_copy(start)
    new = {start: images}
    for node in nodes:
        if node.op == "get_attr":
            modules[node.name] = _constant(models, traces, str(node.target))
            new[node] = graph.call_module(node.name, (images,))
        elif (linear := _linear(models, traces, node)) is not None:
            name = f"{node.name}_{str(node.all_input_nodes[1].target).replace('.', '_')}"
            modules[name] = linear
            new[node] = graph.call_module(name, (new[node.all_input_nodes[0]],))
        elif node.op == "call_module":
            name = re.sub(r"[^\w.]", "_", str(node.target))  # as a file may have it
            if name not in modules:
                modules[name] = _stacked(models, str(node.target))
            new[node] = graph.call_module(name, fx.map_arg(node.args, new.__getitem__))
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
        new[node].meta = dict(node.meta)
    remove_unused(graph)
    return fx.GraphModule(modules, graph)


def _linear(models: Sequence[nn.Module], traces: Sequence[Trace], node: fx.Node) -> PackedLinear | None:
    """What `F.linear` of a quantized layer's weight is; None for other nodes."""
    if node.target is not F.linear:
        return None
    weight, bias = [*node.all_input_nodes, None][1:3]  # type: ignore[list-item]
    constant = bias is None or bias.op == "get_attr"
    if weight is None or not constant or weight.target not in traces[0].weights:
        return None
    layers: list[Any] = [model.get_submodule(traces[0].weights[str(weight.target)]) for model in models]
    if layers[0].act_quantizer is not None:
        return None
    out, depth = layers[0].latent_weight.shape
    linear = PackedLinear(depth, out, bias is not None, bits=[layer.weight_quantizer.bits for layer in layers])
    linear.pack_(layers)
    if bias is not None:
        linear.bias = torch.stack([trace.constants[str(bias.target)].float() for trace in traces])
    return linear


def _constant(models: Sequence[nn.Module], traces: Sequence[Trace], name: str) -> nn.Module:
    """A constant, of which each member has a value, as a layer; float64 has no place in a network of float32."""
    if name in traces[0].weights:
        return PackedWeight.from_layers([model.get_submodule(traces[0].weights[name]) for model in models])  # type: ignore[misc]
    values = [trace.constants[name] for trace in traces]
    if len({value.shape for value in values}) > 1:
        raise CannotStack(f"{name} has another shape in each member")
    values = [value.float() if value.dtype == torch.float64 else value for value in values]
    if all(torch.equal(value, values[0]) for value in values):
        return SharedConstant(values[0].clone())
    return StackedConstant(torch.stack(values))


def _stacked(models: Sequence[nn.Module], name: str) -> nn.Module:
    try:
        return stack([model.get_submodule(name) for model in models])
    except (TypeError, ValueError) as error:
        raise CannotStack(f"{name}: {error}") from error
