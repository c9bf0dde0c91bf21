"""The graph of a model, by torch.fx: every layer that owns tensors is one node, and in-place changes stay visible."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


class CannotStack(Exception):
    """Why a model's members cannot run side by side in one graph."""


IN_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; fx takes it for `x + y`, and whoever else holds x would miss the change."""


def _record(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _target in IN_PLACE:
    setattr(_Proxy, f"__{_target.__name__}__", _record(_target))


class _Tracer(fx.Tracer):
    """Stops at torch's own modules and at those that own tensors and no further layers."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        owns = any(t is not None for t in (*m._parameters.values(), *m._buffers.values()))
        below = any(True for child in m.children() for _ in child.parameters())
        return super().is_leaf_module(m, module_qualified_name) or (owns and not below)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a model of one input; further arguments take their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    try:
        graph = _Tracer().trace(model, concrete_args=defaults)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CannotStack(f"torch.fx cannot trace it: {reason[0] if reason else type(error).__name__}") from error
    for node in reversed(graph.nodes):
        # Assertions, and what they alone look at.
        if node.op == "call_function" and node.target in (torch._assert, torch.ops.aten._assert_async.msg):
            graph.erase_node(node)
    graph = fx.GraphModule(model, graph).graph
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[1:]:
        if node.users:
            raise CannotStack(f"its forward takes more than one input: {node.target}")
        graph.erase_node(node)
    return graph
