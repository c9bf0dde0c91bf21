"""One graph for all members of an ensemble: each layer of the first becomes one that holds all members' tensors."""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, fx, nn

from .float_layers import Constant, SharedConstant, StackedConstant
from .forms import stack
from .tracing import CannotStack, Trace


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
            values = [trace.constants[str(node.target)] for trace in traces]
            if len({value.shape for value in values}) > 1:
                raise CannotStack(f"{node.name} has another shape in each member")
            modules[node.name] = _constant(values)
            new[node] = graph.call_module(node.name, (images,))
        elif node.op == "call_module":
            name = str(node.target)
            if name not in modules:
                modules[name] = _stacked(models, name)
            new[node] = graph.call_module(name, fx.map_arg(node.args, new.__getitem__))
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
        new[node].meta = dict(node.meta)
    return fx.GraphModule(modules, graph)


def _constant(values: Sequence[Tensor]) -> Constant:
    """Values, one a member, as a layer; float64 has no place in a network of float32."""
    values = [value.float() if value.dtype == torch.float64 else value for value in values]
    if all(torch.equal(value, values[0]) for value in values):
        return SharedConstant(values[0].clone())
    return StackedConstant(torch.stack(values))


def _stacked(models: Sequence[nn.Module], name: str) -> nn.Module:
    try:
        return stack([model.get_submodule(name) for model in models])
    except (TypeError, ValueError) as error:
        raise CannotStack(f"{name}: {error}") from error
