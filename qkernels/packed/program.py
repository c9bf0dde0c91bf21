"""The graph of a packed ensemble as JSON: layers, and calls of functions that are on a list (docs/format.md).

A file is data, never code: reading one builds layers of the types below and calls the functions below and no others.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .float_layers import Repeat, StackedConstant, StackedConv2d, StackedLinear, StackedNorm
from .integer import CodesMaxPool2d
from .kinds import LARGEST_NUMBER, LayerKind, ProgramError, Settings, object_of
from .layers import PackedConv2d, PackedLinear

MOST_NODES = 100_000

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "neg": operator.neg,
    "getitem": operator.getitem,
    "getattr": getattr,
    "eq": operator.eq,
    "cat": torch.cat,
    "flatten": torch.flatten,
    "mean": torch.mean,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "torch.relu": torch.relu,
    "torch.add": torch.add,
    "torch.mul": torch.mul,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "max_pool2d": F.max_pool2d,
    "normalize": F.normalize,
    "pad": F.pad,
    "relu": F.relu,
    "relu6": F.relu6,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "silu": F.silu,
    "softmax": F.softmax,
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}

METHODS = frozenset(
    [
        *("add", "chunk", "contiguous", "expand", "flatten", "mean", "mul", "permute", "relu", "reshape", "sigmoid"),
        *("size", "softmax", "split", "squeeze", "sub", "sum", "tanh", "transpose", "unbind", "unflatten"),
        *("unsqueeze", "view"),
    ]
)

# Modules without tensors, and the attributes that their constructors take.
MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    CodesMaxPool2d: ("kernel_size", "stride", "padding"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.GELU: ("approximate",),
    nn.Hardsigmoid: (),
    nn.Hardswish: (),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.LeakyReLU: ("negative_slope",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.ReLU: (),
    nn.ReLU6: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Softmax: ("dim",),
    nn.Tanh: (),
}

# Our own layers, by the name of their type.
LAYERS: dict[str, type[LayerKind]] = {
    kind.__name__: kind
    for kind in (PackedConv2d, PackedLinear, StackedConv2d, StackedLinear, StackedNorm, StackedConstant, Repeat)
}
_MODULE_TYPES = {kind.__name__: kind for kind in MODULES}


# Writing ---------------------------------------------------------------------------------------------------------


def program_json(program: fx.GraphModule) -> dict[str, Any]:
    """Layers and nodes of a program, in plain types.

    Raises:
        ProgramError: naming the function or module that the format does not know.
    """
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
    layers = {name: layer_json(module, name) for name, module in program.named_modules() if name in called}
    return {"layers": layers, "nodes": [_node_json(node) for node in program.graph.nodes]}


def layer_json(module: nn.Module, name: str) -> dict[str, Any]:
    """The type of a layer and what rebuilds it, without its tensors."""
    kind = type(module).__name__
    if isinstance(module, LayerKind) and LAYERS.get(kind) is type(module):
        return {"type": kind, **module.settings(), **({"shared": module.shared} if module.shares else {})}
    if type(module) in MODULES:
        return {"type": kind, **{key: _value_json(getattr(module, key)) for key in MODULES[type(module)]}}
    raise ProgramError(f"{name} is a {kind}, which the format does not know")


def _value_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_value_json(v) for v in value]}
    if isinstance(value, list):
        return [_value_json(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_value_json(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ProgramError(f"the format has no {type(value).__name__}")


def _node_json(node: fx.Node) -> dict[str, Any]:
    kind: dict[str, Any] = {"name": node.name}
    if node.op == "placeholder":
        return kind | {"op": "input"}
    if node.op == "output":
        return kind | {"op": "output", "args": _value_json(list(node.args))}
    if node.op == "call_module":
        kind |= {"op": "layer", "layer": str(node.target)}
    elif node.op == "call_method" and node.target in METHODS:
        kind |= {"op": "method", "method": str(node.target)}
    elif node.op == "call_function" and node.target in _NAMES:
        kind |= {"op": "function", "function": _NAMES[node.target]}  # type: ignore[index]
    else:
        raise ProgramError(f"{node.name} calls {node.target}, which the format does not know")
    return kind | {"args": _value_json(list(node.args)), "kwargs": {k: _value_json(v) for k, v in node.kwargs.items()}}


# Reading ---------------------------------------------------------------------------------------------------------


def read_program(plain: dict[str, Any], members: int) -> fx.GraphModule:
    """The program that `program_json` wrote, on the meta device: its tensors have shapes and no memory.

    Raises:
        ProgramError: for anything that is not a program of `members` members.
    """
    with torch.device("meta"):
        modules = {name: read_layer(layer, name, members) for name, layer in object_of(plain.get("layers")).items()}
    nodes = plain.get("nodes")
    if not isinstance(nodes, list) or len(nodes) > MOST_NODES:
        raise ProgramError("nodes must be a list")
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for position, node in enumerate(nodes):
        node = object_of(node)
        name, op = node.get("name"), node.get("op")
        if not isinstance(name, str) or not name.isidentifier() or name in made:
            raise ProgramError(f"node {position} has no name of its own")
        if (op == "input") != (position == 0) or (op == "output") != (position == len(nodes) - 1):
            raise ProgramError("a program starts with its one input and ends with its one output")
        if op == "input":
            made[name] = graph.placeholder(name)
            continue
        args = _read_value(node.get("args", []), made)
        kwargs = _read_value({"kwargs": node.get("kwargs", {})}, made)
        if not isinstance(args, list):
            raise ProgramError(f"{name} has no list of arguments")
        if op == "output":
            if len(args) != 1 or not isinstance(args[0], fx.Node):
                raise ProgramError("the output is not one value")
            graph.output(args[0])
        else:
            made[name] = graph.create_node(*_target(node, modules), tuple(args), kwargs, name=name)
    program = fx.GraphModule(modules, graph)
    program.graph.lint()
    return program.eval()


def _target(node: dict[str, Any], modules: dict[str, nn.Module]) -> tuple[str, Any]:
    op, name = node["op"], node["name"]
    if op == "layer":
        if node.get("layer") not in modules:
            raise ProgramError(f"{name} calls the layer {node.get('layer')!r}, which is not there")
        return "call_module", node["layer"]
    if op == "method":
        if node.get("method") not in METHODS:
            raise ProgramError(f"{name} calls the method {node.get('method')!r}, which is not on the list")
        return "call_method", node["method"]
    if op == "function":
        if node.get("function") not in FUNCTIONS:
            raise ProgramError(f"{name} calls the function {node.get('function')!r}, which is not on the list")
        if node["function"] == "getattr" and (node["args"][1:2] != ["shape"]):
            raise ProgramError(f"{name} reads an attribute that is not on the list")
        return "call_function", FUNCTIONS[node["function"]]
    raise ProgramError(f"{name} has the unknown op {op!r}")


def _read_value(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, dict):
        key, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
        if key == "node":
            if inner not in made:
                raise ProgramError(f"the value {inner!r} is used before it is made")
            return made[inner]
        if key == "tuple" and isinstance(inner, list):
            return tuple(_read_value(v, made) for v in inner)
        if key == "slice" and isinstance(inner, list):
            return slice(*(_read_value(v, made) for v in inner))
        if key == "ellipsis":
            return Ellipsis
        if key == "kwargs":
            return {name: _read_value(v, made) for name, v in object_of(inner).items()}
        raise ProgramError(f"an unknown kind of value: {key!r}")
    if isinstance(value, list):
        return [_read_value(v, made) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= LARGEST_NUMBER:
        raise ProgramError(f"the number {value} is too large")
    return value


def read_layer(plain: dict[str, Any], name: str, members: int) -> nn.Module:
    """A layer as `layer_json` wrote it. Its tensors, where their shapes are not in the JSON, are still empty."""
    settings = Settings(plain)
    kind = settings.plain.get("type")
    try:
        if kind in LAYERS:
            layer = LAYERS[kind].from_settings(settings, members)
            layer.shared = layer.shares and settings.flag("shared")
            return layer
        if kind in _MODULE_TYPES:
            keys = MODULES[_MODULE_TYPES[kind]]
            if settings.plain.keys() - {"type"} != set(keys):
                raise ProgramError(f"a {kind} has {', '.join(keys) or 'no settings'}")
            return _MODULE_TYPES[kind](**{key: _read_value(settings.plain[key], {}) for key in keys})
    except (TypeError, ProgramError) as error:
        raise ProgramError(f"{name}: {error}") from error
    raise ProgramError(f"{name} has the unknown type {kind!r}")
