"""One graph for all members of an ensemble: each layer of the first becomes one that holds all members' tensors.

The graph runs once on images [M * N, ...], member after member.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..quantize.layers import QuantizedLayer
from ..quantize.registry import PACKED_FORMS
from ..quantize.torch_layers import QConv2d, QLinear
from .float_layers import Repeat, StackedConstant, StackedConv2d, StackedLinear, StackedNorm
from .kinds import LayerKind
from .layers import PackedConv2d, PackedLinear
from .tracing import IN_PLACE, CannotStack, trace

# What makes of M layers of exactly these types one, or several that follow each other -------------------------------

Stack = Callable[[Sequence[Any]], nn.Module | list[nn.Module]]

PACKED_FORMS |= {QConv2d: PackedConv2d.from_layers, QLinear: PackedLinear.from_layers}
FLOAT_FORMS: dict[type[nn.Module], Stack] = {
    nn.Conv2d: StackedConv2d.from_layers,
    nn.Linear: StackedLinear.from_layers,
    nn.BatchNorm1d: StackedNorm.from_batch_norms,
    nn.BatchNorm2d: StackedNorm.from_batch_norms,
    nn.GroupNorm: StackedNorm.from_group_norms,
    nn.LayerNorm: StackedNorm.from_layer_norms,
}
NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def _know_libraries() -> None:
    """Take up the types of timm and torchvision where these have been imported."""
    if "timm.layers" in sys.modules:
        from . import timm_forms

        for kind, pack_form in timm_forms.PACKED.items():
            PACKED_FORMS.setdefault(kind, pack_form)  # what a user registered stays
        FLOAT_FORMS.update(timm_forms.FLOAT)
    if "torchvision.models.convnext" in sys.modules:
        from torchvision.models.convnext import LayerNorm2d

        FLOAT_FORMS[LayerNorm2d] = StackedNorm.from_images_layer_norms


def pack(layers: Sequence[QuantizedLayer], name: str) -> nn.Module:
    """One packed layer for one quantized layer a member.

    Raises:
        ValueError: for a type that has no packed form.
    """
    _know_libraries()
    kind = type(layers[0])
    if kind not in PACKED_FORMS:
        raise ValueError(
            f"PackedEnsemble: {name} is a {kind.__name__}, which has no packed form; see qkernels.register_layer"
        )
    return PACKED_FORMS[kind](layers)


def _stacking(module: nn.Module) -> Stack | None:
    """What makes one layer out of M like this; None if it holds no tensors and serves all members as it is."""
    _know_libraries()
    if (form := PACKED_FORMS.get(type(module)) or FLOAT_FORMS.get(type(module))) is not None:
        return form
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        raise CannotStack(f"there is no stacked form of {type(module).__name__}")
    return None


# The members' graph ----------------------------------------------------------------------------------------------


class Stacker:
    """Rewrites the traced graph of the first member into one for all."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        self.source, *others = map(trace, models)
        for index, other in enumerate(others, start=1):
            for own, first in zip_longest(other.nodes, self.source.nodes):
                if own is None or first is None or _step(own) != _step(first):
                    steps = " and ".join(
                        "nothing" if node is None else str(node.format_node()) for node in (own, first)
                    )
                    raise ValueError(f"PackedEnsemble: models[{index}] does not compute what models[0] does: {steps}")
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.followers: dict[str, list[nn.Module]] = {}  # of a stacked layer that became several
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
        if type(first) in NOTHING_IN_EVAL:
            return args[0]
        if node.kwargs:
            raise CannotStack(f"{name} is called with keyword arguments")
        if getattr(first, "inplace", False) and self.used_later(node.args[0], node):
            raise CannotStack(f"{name} changes a value in place that is used again")
        stack = _stacking(first)
        if stack is None:
            return self.add(name if name not in self.modules else f"{name}_{node.name}", _not_in_place(first), *args)
        if name not in self.followers:
            try:
                stacked = stack(layers)
            except (TypeError, ValueError) as error:
                raise CannotStack(f"{name}: {error}") from error
            self.modules[name], *self.followers[name] = stacked if isinstance(stacked, list) else [stacked]
        self.images = self.graph.call_module(name, args)
        for follower in self.followers[name]:
            self.images = self.add(f"{name}_act", _not_in_place(follower), self.images)
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
        layers = [module for module in users if isinstance(module, LayerKind) and module.shares]
        if len(layers) == len(users):
            for layer in layers:
                layer.shared = True
            return
        with self.graph.inserting_after(placeholder):
            self.modules["repeat"] = Repeat(len(self.models))
            repeated = self.graph.call_module("repeat", (placeholder,))
        placeholder.replace_all_uses_with(repeated, delete_user_cb=lambda user: user is not repeated)


def _step(node: fx.Node) -> tuple[Any, ...]:
    """What a node does, to be compared with one of another graph: nodes among its arguments go by their names."""
    return node.op, node.target, *fx.map_arg((node.args, dict(node.kwargs)), lambda used: f"%{used.name}")


def _not_in_place(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    if hasattr(module, "inplace"):
        module.inplace = False  # type: ignore[assignment]
    return module


def _attribute(model: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)
