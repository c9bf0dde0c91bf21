"""One graph for all members of an ensemble: traced from the first, packed, and fused.

`torch.fx` traces the model. Each layer becomes one that holds all members' tensors, so the graph runs once on images
[M * N, ...], member after member. Then batch norms are folded into scale and bias, and residual additions and
activations move into the epilogue of the convolution before them.
"""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .layers import QConv2d, QLinear, QuantizedWeight
from .packed_layers import PackedConv2d, PackedLayer, PackedLinear, conv_geometry, padding_of
from .packed_ops import Activation
from .stacked_layers import Repeat, StackedConstant, StackedConv2d, StackedLinear, StackedNorm


class CannotStack(Exception):
    """Why a model's members cannot run side by side in one graph."""


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


_IN_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; fx takes it for `x + y`, and whoever else holds x would miss the change."""


def _record(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _target in _IN_PLACE:
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


# One layer of M members from M layers ----------------------------------------------------------------------------


def _vector(tensors: Sequence[Tensor | None], like: Tensor, otherwise: float) -> Tensor:
    """[M, C] of the members' vectors, or a constant where they have none."""
    return torch.stack([torch.full_like(like, otherwise) if t is None else t.detach() for t in tensors])


def _stack_conv(layers: list[Any], name: str) -> nn.Module:
    first = layers[0]
    if isinstance(first, QuantizedWeight):
        return PackedConv2d.from_layers(layers)
    if first.padding_mode != "zeros":
        raise CannotStack(f"{name} is a float convolution with padding_mode={first.padding_mode!r}")
    padding = padding_of(first)
    geometry = conv_geometry(first.kernel_size, first.stride, padding, first.dilation, first.groups)
    weight = torch.stack([layer.weight.detach() for layer in layers])
    bias = None if first.bias is None else torch.stack([layer.bias.detach() for layer in layers])
    return StackedConv2d(weight, bias, geometry, padding == "tf_same")


def _stack_linear(layers: list[Any], name: str) -> nn.Module:
    if isinstance(layers[0], QuantizedWeight):
        return PackedLinear.from_layers(layers)
    bias = None if layers[0].bias is None else torch.stack([layer.bias.detach() for layer in layers])
    return StackedLinear(torch.stack([layer.weight.detach() for layer in layers]), bias)


def _stack_batch_norm(layers: list[Any], name: str) -> nn.Module:
    factors, shifts = [], []
    for layer in layers:
        if layer.running_mean is None:
            raise CannotStack(f"{name} has no running statistics: its result depends on the batch")
        mean = layer.running_mean.double()
        weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().double()
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
        factor = weight / (layer.running_var.double() + layer.eps).sqrt()
        factors.append(factor)
        shifts.append(bias - mean * factor)
    # float64 until it is folded or found to stay.
    return StackedNorm("batch", torch.stack(factors), torch.stack(shifts))


def _stack_group_norm(layers: list[Any], name: str) -> nn.Module:
    first = layers[0]
    like = torch.empty(first.num_channels)
    weight, bias = _vector([m.weight for m in layers], like, 1.0), _vector([m.bias for m in layers], like, 0.0)
    return StackedNorm("group", weight, bias, first.eps, first.num_groups)


def _stack_layer_norm(layers: list[Any], name: str) -> nn.Module:
    first = layers[0]
    like = torch.empty(first.normalized_shape)
    weight, bias = _vector([m.weight for m in layers], like, 1.0), _vector([m.bias for m in layers], like, 0.0)
    return StackedNorm("layer2d" if type(first).__name__ == "LayerNorm2d" else "layer", weight, bias, first.eps)


def _stacking(module: nn.Module) -> Callable[[list[Any], str], nn.Module] | None:
    """What makes one layer out of M like this; None if it holds no tensors and serves all members as it is."""
    name = type(module).__name__
    if isinstance(module, QuantizedWeight):
        if type(module) in (QConv2d, QLinear) or name == "QConv2dSame":
            return _stack_linear if isinstance(module, nn.Linear) else _stack_conv
    elif name == "Linear" and isinstance(module, nn.Linear):  # timm has one of its own that casts
        return _stack_linear
    elif type(module) is nn.Conv2d or name == "Conv2dSame":
        return _stack_conv
    elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) or name == "BatchNormAct2d":
        return _stack_batch_norm
    elif type(module) is nn.GroupNorm:
        return _stack_group_norm
    elif name in ("LayerNorm", "LayerNorm2d") and isinstance(module, nn.LayerNorm):
        return _stack_layer_norm
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        raise CannotStack(f"there is no stacked form of {name}")
    return None


# The members' graph ----------------------------------------------------------------------------------------------


class _Stacker:
    """Rewrites the traced graph of the first member into one for all."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        self.source = trace(models[0])
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.constants: dict[fx.Node, list[Any]] = {}  # values that depend on parameters alone, one a member
        self.images: fx.Node | None = None  # the latest [M * N, ...] that a layer gave

    def run(self) -> fx.GraphModule:
        for node in self.source.nodes:
            if node.op == "placeholder":
                self.new[node] = self.graph.placeholder("x")
            elif node.op == "get_attr":
                self.constants[node] = [_attribute(model, str(node.target)) for model in self.models]
            elif node.op == "call_module":
                self.new[node] = self.module(node)
            elif node.op in ("call_function", "call_method"):
                self.call(node)
            else:
                self.graph.output(fx.map_arg(node.args[0], self.value))
        self.share_input()
        program = fx.GraphModule(self.modules, self.graph)
        program.graph.eliminate_dead_code()
        return program

    def value(self, node: fx.Node) -> fx.Node:
        """The new node for an old one; a parameter becomes a layer that gives its value for each image."""
        if node not in self.constants:
            return self.new[node]
        values = self.constants[node]
        if not all(isinstance(v, Tensor) and v.dim() > 1 and v.shape[0] == 1 for v in values):
            raise CannotStack(f"{node.target} meets the images without a batch dimension")
        if self.images is None:
            raise CannotStack(f"{node.target} is used before any layer")
        return self.add(
            f"{node.name}_constant", StackedConstant(torch.stack([v.detach() for v in values])), self.images
        )

    def add(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        self.modules[name] = module
        return self.graph.call_module(name, args)

    def module(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        layers = [model.get_submodule(name) for model in self.models]
        args: Any = fx.map_arg(node.args, self.value)
        first: Any = layers[0]
        if isinstance(first, nn.Identity | nn.Dropout | nn.Dropout2d | nn.AlphaDropout):
            return args[0]
        if node.kwargs:
            raise CannotStack(f"{name} is called with keyword arguments")
        if getattr(first, "inplace", False) and self.used_later(node.args[0], node):
            raise CannotStack(f"{name} changes a value in place that is used again")
        stack = _stacking(first)
        if stack is None:
            return self.add(name if name not in self.modules else f"{name}_{node.name}", _not_in_place(first), *args)
        if name not in self.modules:
            try:
                self.modules[name] = stack(layers, name)
            except (TypeError, ValueError) as error:
                raise CannotStack(f"{name}: {error}") from error
        self.images = self.graph.call_module(name, args)
        # timm's batch norm ends with an activation.
        if type(first).__name__ == "BatchNormAct2d" and not isinstance(first.act, nn.Identity):
            self.images = self.add(f"{name}_act", _not_in_place(first.act), self.images)
        return self.images

    def call(self, node: fx.Node) -> None:
        used = node.all_input_nodes
        if used and all(n in self.constants for n in used):
            self.constants[node] = [self.evaluate(node, member) for member in range(len(self.models))]
            return
        target = node.target
        if target in _IN_PLACE or (node.op == "call_method" and str(target).endswith("_")):
            if self.used_later(node.args[0], node):
                raise CannotStack(f"{node.name} changes a value in place that is used again")
            target = _IN_PLACE.get(target) or str(target).removesuffix("_")  # type: ignore[call-overload]
        kwargs = fx.map_arg(node.kwargs, self.value)
        if kwargs.get("inplace"):
            if self.used_later(node.args[0], node):
                raise CannotStack(f"{node.name} changes a value in place that is used again")
            kwargs = {**kwargs, "inplace": False}
        self.new[node] = self.graph.create_node(node.op, target, fx.map_arg(node.args, self.value), kwargs)

    def evaluate(self, node: fx.Node, member: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.constants[n][member])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def used_later(self, value: Any, node: fx.Node) -> bool:
        """Whether others use `value` after `node` has changed it; a graph holds its nodes in order."""
        order = {n: i for i, n in enumerate(self.source.nodes)}
        return isinstance(value, fx.Node) and any(order[user] > order[node] for user in value.users)

    def share_input(self) -> None:
        """Let the first layers read one copy of the images if they alone use them; else repeat the images."""
        (placeholder,) = (node for node in self.graph.nodes if node.op == "placeholder")
        users = [self.modules.get(str(node.target)) for node in placeholder.users]
        if all(hasattr(module, "shared") for module in users):
            for module in users:
                module.shared = True  # type: ignore[union-attr, assignment]
            return
        with self.graph.inserting_after(placeholder):
            self.modules["repeat"] = Repeat(len(self.models))
            repeated = self.graph.call_module("repeat", (placeholder,))
        placeholder.replace_all_uses_with(repeated, delete_user_cb=lambda user: user is not repeated)


def _not_in_place(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    if hasattr(module, "inplace"):
        module.inplace = False  # type: ignore[assignment]
    return module


def _attribute(model: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)


# Fusion ----------------------------------------------------------------------------------------------------------

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


def fuse_(program: fx.GraphModule, report: FusionReport) -> None:
    """Fold what follows each layer into it, in place."""
    graph, modules = program.graph, dict(program.named_modules())
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
    program.delete_all_unused_submodules()
    program.recompile()


def stack_members(models: Sequence[nn.Module]) -> tuple[fx.GraphModule, FusionReport]:
    """One fused graph for all members.

    Raises:
        CannotStack: with the reason, if the members have to run one after another.
    """
    with eval_mode(models):
        program = _Stacker(models).run()
    report = FusionReport()
    fuse_(program, report)
    for name, module in program.named_modules():
        if isinstance(module, PackedLayer):
            report.packed.append(name)
        elif isinstance(module, StackedConv2d | StackedLinear):
            report.floating.append(name)
    return program.eval(), report
