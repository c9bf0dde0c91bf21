"""The graph of a model: what it does to images, recorded while it answers to some.

The model runs on real tensors, so that whatever it asks of them, it gets. Recorded is what is computed of images: calls
of functions, and of the layers that have a form for several members. Everything else (parameters, what follows from
them, tables) is a constant of the trace. Sizes of tensors are numbers that remember where they come from, so that the
graph computes them anew for other images.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..quantize.reading import weights_read_by
from .steps import mapped
from .targets import ASSERTIONS, CASTS, COPIES, FACTORIES, READS, canonical, changed_argument

Layer = tuple[Callable[..., Any], Sequence[str]]


class CannotStack(Exception):
    """Why a model's members cannot run side by side in one graph."""


@dataclass
class Trace:
    """What a model does.

    Attributes:
        graph: its nodes; `node.meta["shape"]` has the shape of a tensor.
        constants: the target of a `get_attr` node -> its tensor.
        weights: the targets of those that are weights of quantized layers -> the layer.
        decisions: what was asked of sizes, and the answers: for other images they may be others.
        answer: what the model gave.
    """

    graph: fx.Graph
    constants: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    decisions: list[tuple[str, int, bool]] = field(default_factory=list)
    answer: Any = None

    def steps(self) -> list[tuple[Any, ...]]:
        """What is done, to be compared with another trace: nodes among arguments go by their names."""
        return [
            (node.op, node.target, *fx.map_arg((node.args, dict(node.kwargs)), lambda used: f"%{used.name}"))
            for node in self.graph.nodes
        ]

    def same(self, other: "Trace", of_any_size: bool = False) -> bool:
        """Whether another does the same with the same constants; `of_any_size`: and was told the same of sizes."""
        alike = self.steps() == other.steps() and self.constants.keys() == other.constants.keys()
        if of_any_size and self.decisions != other.decisions:
            return False
        return alike and all(_equal(t, other.constants[name]) for name, t in self.constants.items())


class Size(int):
    """A size of a tensor, or what was computed of sizes: a number with the node that computes it."""

    node: fx.Node
    tracer: "Tracer"
    batch: bool  # whether it comes from the first dimension of a tensor, and so from the number of images

    @classmethod
    def of(cls, value: int, node: fx.Node, tracer: "Tracer", batch: bool) -> "Size":
        size = cls(value)
        size.node, size.tracer, size.batch = node, tracer, batch
        return size

    def __neg__(self) -> int:
        return 0 - self

    __hash__ = int.__hash__


def _computed(name: str) -> Callable[[Size, Any], Any]:
    plain, function = getattr(int, f"__{name}__"), getattr(operator, name.removeprefix("r"))

    def compute(self: Size, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented or not isinstance(other, int) or self.tracer.paused:
            return value
        operands = (other, self) if name.startswith("r") else (self, other)
        node = self.tracer.graph.call_function(function, self.tracer.nodes_in(operands))
        return Size.of(value, node, self.tracer, self.batch or getattr(other, "batch", False))

    return compute


def _asked(name: str) -> Callable[[Size, Any], Any]:
    plain = getattr(int, f"__{name}__")

    def ask(self: Size, other: Any) -> Any:
        answer = plain(self, other)
        if answer is not NotImplemented and not self.tracer.paused:
            self.tracer.trace.decisions.append((name, int(self) - int(other), answer))
        return answer

    return ask


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod"):
    setattr(Size, f"__{_name}__", _computed(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Size, f"__{_name}__", _asked(_name))


class Tracer(TorchFunctionMode):
    """Records what a model computes of x.

    Args:
        layer_of: of a module that is recorded as one node what it computes, and the names of its children that follow;
            None where what happens in it is recorded.
        forward_of: of a module that is not, what it computes, where its own forward does not show that.
        skipped: types of modules that do nothing.
        fixed: whether what is made of images' sizes alone, such as a range of numbers, is a constant.
    """

    def __init__(
        self,
        layer_of: Callable[[nn.Module], Layer | None],
        forward_of: Callable[[nn.Module], Callable[..., Any] | None],
        skipped: tuple[type, ...],
        fixed: bool,
    ) -> None:
        super().__init__()
        self.layer_of, self.forward_of, self.skipped, self.fixed = layer_of, forward_of, skipped, fixed
        self.trace = Trace(fx.Graph())
        self.graph = self.trace.graph
        self.paused = False
        self.nodes: dict[int, fx.Node] = {}  # by the ids of tensors, which are kept for as long
        self.stale: set[int] = set()
        self.kept: list[Tensor] = []
        self.names: dict[nn.Module, str] = {}
        self.weights: dict[nn.Module, Tensor] = {}  # as read, of quantized layers

    def run(self, model: nn.Module, x: Tensor) -> Trace:
        """Trace a model in eval mode that nobody else uses: its layers' forwards are replaced.

        Raises:
            CannotStack: with the reason.
        """
        self.enter(x, self.graph.placeholder("x"))
        for name, module in model.named_modules():
            self.names[module] = name
            if type(module) in self.skipped:
                module.forward = _first  # type: ignore[method-assign]
            elif (layer := self.layer_of(module)) is not None:
                recorded = partial(self.call_layer, name, layer[0])
                followers = [module.get_submodule(child) for child in layer[1]]
                module.forward = partial(_in_order, [recorded, *followers])  # type: ignore[method-assign]
            elif (forward := self.forward_of(module)) is not None:
                module.forward = forward  # type: ignore[method-assign]
        try:
            with torch.no_grad(), weights_read_by(self.read), self:
                answer = model(x)
            if not isinstance(answer, Tensor):
                raise CannotStack(f"its answer is a {type(answer).__name__}, not one tensor")
            self.graph.output(self.node_of(answer))
        except CannotStack:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise CannotStack(f"it cannot be traced: {lines[0] if lines else type(error).__name__}") from error
        self.trace.answer = answer
        remove_unused(self.graph)
        return self.trace

    # Tensors and their nodes -------------------------------------------------------------------------------------

    def enter(self, t: Tensor, node: fx.Node) -> None:
        node.meta["shape"] = tuple(map(int, t.shape))
        self.nodes[id(t)] = node
        self.stale.discard(id(t))
        self.kept.append(t)

    def node_of(self, t: Tensor) -> fx.Node:
        """The node of a tensor; that of a constant is made here."""
        if id(t) in self.stale:
            raise CannotStack("it changes a value in place that is used again under another name")
        if id(t) not in self.nodes:
            name = f"constant_{len(self.trace.constants)}"
            self.trace.constants[name] = t.detach()
            node = self.graph.create_node("get_attr", name)
            self.enter(t, node)
        return self.nodes[id(t)]

    def read(self, layer: Any) -> Tensor:
        """The quantized weight of a layer, for what does not call the layer: a constant that knows whose it is."""
        if layer not in self.weights:
            weight = layer.quantized_weight().detach()
            name = f"{self.names[layer]}.{layer.weight_name}"
            self.weights[layer], self.trace.weights[name] = weight, self.names[layer]
            self.trace.constants[name] = weight
            self.enter(weight, self.graph.create_node("get_attr", name))
        return self.weights[layer]

    def nodes_in(self, arguments: Any) -> Any:
        """Arguments with nodes in the places of tensors and sizes."""
        arguments = mapped(arguments, Tensor, self.node_of)
        return mapped(arguments, Size, lambda size: size.node)

    def of_images(self, arguments: Any) -> bool:
        """Whether tensors among arguments come from the images, or numbers from their sizes."""
        found: list[Any] = []
        mapped(arguments, Tensor, lambda t: found.append(id(t) in self.nodes and self.nodes[id(t)].op != "get_attr"))
        mapped(arguments, Size, lambda size: found.append(size.batch or not self.fixed))
        return any(found)

    # What is recorded ----------------------------------------------------------------------------------------------

    def call_layer(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer; what happens in it is its own."""
        if self.paused or not self.of_images((args, kwargs)):
            return forward(*args, **kwargs)
        if kwargs or len(args) != 1:
            raise CannotStack(f"{name} is called with more than the images")
        self.paused = True
        try:
            node = self.graph.call_module(name, self.nodes_in(args))
            return self.record(forward(*args), node)
        finally:
            self.paused = False

    def record(self, result: Any, node: fx.Node) -> Any:
        """Enter what a node gives: a tensor, or several."""
        if isinstance(result, Tensor):
            self.enter(result, node)
        else:
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.enter(part, self.graph.call_function(operator.getitem, (node, i)))
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        self.paused = True
        try:
            return self.call(func, args, kwargs)
        finally:
            self.paused = False

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        plain_args, plain_kwargs = mapped((args, kwargs), Size, int)
        if not self.of_images((args, kwargs)) or func in ASSERTIONS:
            return func(*plain_args, **plain_kwargs)
        name = getattr(func, "__name__", str(func))
        if self.fixed and name in FACTORIES:
            return func(*plain_args, **plain_kwargs)
        if name == "__get__":
            return self.attribute(func, args[0])
        if name in ("size", "numel"):
            return self.size(name, args, func(*plain_args, **plain_kwargs), kwargs)
        if name in READS:
            raise CannotStack(f"it decides by the values of its images ({name})")
        if kwargs.get("out") is not None or name == "__setitem__":
            raise CannotStack("it changes a part of a value in place")
        changed = changed_argument(name, func, args, kwargs)
        if changed is not None:  # what it takes is what there was before
            arguments = self.target(func, name, args, kwargs)
        result = func(*plain_args, **plain_kwargs)
        if changed is not None:
            self.change(changed)
            return self.record(changed, self.graph.create_node(*arguments)) if result is changed else result
        if not _tensors(result):
            return result
        if any(result is arg for arg in args):
            return result  # it does nothing
        if name in COPIES or ("dropout" in name and not kwargs.get("training", True)):
            self.enter(result, self.node_of(args[0]))
            return result
        if name in CASTS:
            return self.record(result, self.graph.call_method("to", (self.node_of(args[0]), result.dtype)))
        return self.record(result, self.graph.create_node(*self.target(func, name, args, kwargs)))

    def target(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """A call as a node's op, target and arguments."""
        op, target, args, kwargs = canonical(func, name, args, kwargs)
        if kwargs.get("device") is not None:  # wherever the images will be
            start = next(iter(self.graph.nodes))
            kwargs = {**kwargs, "device": self.graph.call_function(getattr, (start, "device"))}
        return op, target, self.nodes_in(args), self.nodes_in(kwargs)

    def attribute(self, get: Any, t: Tensor) -> Any:
        value = get(t)
        if isinstance(value, torch.Size):
            return torch.Size(self.sizes(t))
        if not isinstance(value, Tensor):
            return value
        transposes = {"T": "t", "mT": "mT"}
        name = getattr(get.__self__, "__name__", "")
        if value.data_ptr() == t.data_ptr() and value.shape == t.shape and value.stride() == t.stride():
            self.enter(value, self.node_of(t))  # .data and the like
            return value
        if name in transposes and (name == "mT" or t.dim() == 2):
            return self.record(value, self.graph.call_method("transpose", (self.node_of(t), -2, -1)))
        raise CannotStack(f"it takes the attribute {name} of a value")

    def sizes(self, t: Tensor) -> list[Size]:
        node = self.nodes[id(t)]  # also of what has been changed in place since
        return [Size.of(n, self.graph.call_method("size", (node, i)), self, i == 0) for i, n in enumerate(t.shape)]

    def size(self, name: str, args: Any, value: Any, kwargs: Any) -> Any:
        if isinstance(value, torch.Size):
            return torch.Size(self.sizes(args[0]))
        node = self.graph.call_method(name, self.nodes_in(args), kwargs)
        dim = (*args[1:], *kwargs.values(), 0)[0]  # numel has none
        return Size.of(value, node, self, dim in (0, -args[0].dim()))

    def change(self, t: Tensor) -> None:
        """t is changed in place: what shares its memory must not be used any more."""
        if id(t) not in self.nodes or self.nodes[id(t)].op == "get_attr":
            raise CannotStack("it changes a parameter or a constant in place")
        storage = t.untyped_storage().data_ptr()
        self.stale |= {
            id(other) for other in self.kept if other is not t and other.untyped_storage().data_ptr() == storage
        }


def _in_order(calls: list[Callable[[Any], Any]], x: Any, *args: Any, **kwargs: Any) -> Any:
    x = calls[0](x, *args, **kwargs)
    for call in calls[1:]:
        x = call(x)
    return x


def _first(x: Any, *rest: Any, **more: Any) -> Any:
    return x


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def _tensors(value: Any) -> bool:
    found: list[Tensor] = []
    mapped(value, Tensor, found.append)
    return bool(found)


def remove_unused(graph: fx.Graph) -> None:
    """Remove what nobody uses: all that is recorded computes something, and does nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
