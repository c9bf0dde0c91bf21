"""One graph for all members of an ensemble: each layer of the first becomes one that holds all members' tensors.

The graph runs once on images [M * N, ...], member after member.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..quantize.layers import QConv2d, QLinear, QuantizedWeight
from .float_layers import Repeat, StackedConstant, StackedConv2d, StackedLinear, StackedNorm
from .layers import PackedConv2d, PackedLinear, conv_geometry, padding_of
from .tracing import IN_PLACE, CannotStack, trace

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


class Stacker:
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
        if target in IN_PLACE or (node.op == "call_method" and str(target).endswith("_")):
            if self.used_later(node.args[0], node):
                raise CannotStack(f"{node.name} changes a value in place that is used again")
            target = IN_PLACE.get(target) or str(target).removesuffix("_")  # type: ignore[call-overload]
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
