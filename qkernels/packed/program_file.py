"""A program as JSON: layers, and calls of functions and methods that are on a list (docs/format.md).

A file is data, never code: reading one builds layers of the types below and calls what `calls.py` lists and nothing
else, and all that a file says is checked before any of it is used.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .calls import Call
from .codes_max_pool import CodesMaxPool2d
from .float_layers import SharedConstant, StackedConstant, StackedConv2d, StackedLinear, StackedNorm
from .folded import FoldedProgram, Repeat
from .functions import EDGE, FUNCTIONS, METHODS, ONLY_OLD, SIZE
from .kinds import LayerKind, ProgramError, Settings, object_of, only_keys, shown
from .layers import PackedConv2d, PackedLinear
from .packed_layer import PackedLayer
from .program import Program
from .steps import Step
from .values import (
    DIM,
    FLAG,
    MOST_DIMS,
    NOTHING,
    REAL,
    TENSOR,
    Kind,
    Result,
    one_of,
    pair,
    read_value,
    read_values,
    resolved,
    several,
    value_json,
)
from .weights import PackedWeight

MOST_NODES = 10_000
MOST_RESULTS = 1024  # at the same time
LONGEST_NAME = 512

_KERNEL = {"kernel_size": pair(SIZE), "stride": pair(SIZE), "padding": pair(EDGE)}
# Modules without tensors, and the attributes that their constructors take.
POOLS: dict[type[nn.Module], dict[str, Kind]] = {
    CodesMaxPool2d: _KERNEL,
    nn.MaxPool2d: {**_KERNEL, "dilation": pair(SIZE), "ceil_mode": FLAG},
}
MODULES: dict[type[nn.Module], dict[str, Kind]] = {
    **POOLS,  # the others are in files of version 1 alone
    nn.AdaptiveAvgPool2d: {"output_size": pair(SIZE | NOTHING)},
    nn.AvgPool2d: {**_KERNEL, "ceil_mode": FLAG, "count_include_pad": FLAG},
    nn.Flatten: {"start_dim": DIM, "end_dim": DIM},
    nn.GELU: {"approximate": one_of("none", "tanh")},
    nn.Hardsigmoid: {},
    nn.Hardswish: {},
    nn.Hardtanh: {"min_val": REAL, "max_val": REAL},
    nn.LeakyReLU: {"negative_slope": REAL},
    nn.ReLU: {},
    nn.ReLU6: {},
    nn.SiLU: {},
    nn.Sigmoid: {},
    nn.Softmax: {"dim": DIM | NOTHING},
    nn.Tanh: {},
}
_MODULE_TYPES = {kind.__name__: kind for kind in MODULES}

# Our own layers, by the name of their type.
LAYERS: dict[str, type[LayerKind]] = {
    kind.__name__: kind
    for kind in (
        PackedConv2d,
        PackedLinear,
        StackedConv2d,
        StackedLinear,
        StackedNorm,
        StackedConstant,
        SharedConstant,
        PackedWeight,
        Repeat,
    )
}

_FUNCTION_NAMES = {call.target: name for name, call in (ONLY_OLD | FUNCTIONS).items()}
_CALLS = {"function": ONLY_OLD | FUNCTIONS, "method": METHODS}
_CALL_LAYER = Call(None, x=TENSOR)
_CALL_PACKED_LAYER = Call(None, x=TENSOR, residual=TENSOR)


# Writing ---------------------------------------------------------------------------------------------------------


def program_json(program: Program) -> dict[str, Any]:
    """Layers and nodes of a program, in plain types.

    Raises:
        ProgramError: naming what the format does not know, be it a function, a layer or an argument.
    """
    layers = {name: layer_json(layer, name) for name, layer in program.layers().items()}
    output = {"name": "output", "op": "output", "args": [value_json(program.output)]}
    nodes = [{"name": program.input, "op": "input"}, *map(_step_json, program.steps), output]
    for name in layers:
        _check_layer_name(name)
    if isinstance(program, FoldedProgram):
        for name, layer in program.layers().items():
            if isinstance(layer, LayerKind) and layer.shares:
                layers[name]["shared"] = layer.shared
    image = {} if program.image is None else {"image": list(program.image)}
    return {"layers": layers, "nodes": nodes, **image}


def layer_json(module: nn.Module, name: str) -> dict[str, Any]:
    """The type of a layer and what rebuilds it, without its tensors."""
    kind = type(module).__name__
    if isinstance(module, LayerKind) and LAYERS.get(kind) is type(module):
        return {"type": kind, **module.settings()}
    if type(module) in MODULES:
        return {"type": kind, **{key: value_json(getattr(module, key)) for key in MODULES[type(module)]}}
    raise ProgramError(f"{name} is a {kind}, which the format does not know")


def _step_json(step: Step) -> dict[str, Any]:
    target = _FUNCTION_NAMES.get(step.target) if step.op == "function" else step.target
    if step.op != "layer" and target not in _CALLS[step.op]:
        raise ProgramError(f"{step.name} calls {step.target}, which the format does not know")
    kwargs = {name: value_json(value) for name, value in step.kwargs.items()}
    return {"name": step.name, "op": step.op, step.op: target, "args": value_json(list(step.args)), "kwargs": kwargs}


# Reading ---------------------------------------------------------------------------------------------------------


def read_program(plain: Any, members: int, version: int) -> Program:
    """The program that `program_json` wrote, on the meta device: its tensors have shapes and no memory.

    Raises:
        ProgramError: for anything that is not a program of `members` members.
    """
    plain = object_of(plain)
    only_keys(plain, ("layers", "nodes") if version == 1 else ("layers", "nodes", "image"))
    nodes, layers = plain.get("nodes"), object_of(plain.get("layers"))
    if not isinstance(nodes, list) or not 2 <= len(nodes) <= MOST_NODES or len(layers) > MOST_NODES:
        raise ProgramError(f"nodes must be a list of up to {MOST_NODES}, from the input to the output")
    for name in layers:
        _check_layer_name(name)
    owners = {name[: dot.start()] for name in layers for dot in re.finditer(r"\.", name)}
    if nested := owners & layers.keys():
        raise ProgramError(f"the layer {min(nested)} has layers in it")
    modules = {name: read_layer(layer, name, members, version) for name, layer in layers.items()}

    first, *between, last = map(object_of, nodes)
    if (
        first.get("op") != "input"
        or last.get("op") != "output"
        or any(n.get("op") in ("input", "output") for n in between)
    ):
        raise ProgramError("a program starts with its one input and ends with its one output")
    results: dict[str, Result] = {}
    _name_result(first, results, "tensor", ("name", "op"))
    steps = [_read_step(node, results, modules) for node in between]
    only_keys(last, ("name", "op", "args"))
    output = read_value(last.get("args"))
    if not isinstance(output, list) or len(output) != 1 or not TENSOR.fits(resolved(output[0], results)):
        raise ProgramError("the output is not one value")
    if version == 1:
        sharing = [name for name, module in modules.items() if isinstance(module, LayerKind) and module.shared]
        program: Program = FoldedProgram(first["name"], steps, output[0], modules, members, sharing)
    else:
        program = Program(first["name"], steps, output[0], modules, members, _image(plain.get("image")))
    if program.most_results > MOST_RESULTS:
        raise ProgramError(f"{program.most_results} results are needed at the same time, more than {MOST_RESULTS}")
    return program


def _image(plain: Any) -> list[int] | None:
    if plain is not None and not several(SIZE, MOST_DIMS).fits(plain):
        raise ProgramError(f"image={shown(plain)} is not the shape of one")
    return plain


def _check_layer_name(name: str) -> None:
    """Identifiers or numbers, with dots between; none that a module keeps something else under."""
    made_of_words = len(name) <= LONGEST_NAME and re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII)
    if not made_of_words or not vars(nn.Module()).keys().isdisjoint(name.split(".")):
        raise ProgramError(
            f"the layer name {shown(name)} is not made of letters, digits, _ and dots, or means something"
        )


def _name_result(node: dict[str, Any], results: dict[str, Result], result: Result, keys: Sequence[str]) -> None:
    """Enter the result of a node, under its name, into `results`."""
    name = node.get("name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > LONGEST_NAME or name in results:
        raise ProgramError(f"the node {shown(name)} has no name of its own")
    only_keys(node, keys)
    results[name] = result


def _read_step(node: dict[str, Any], results: dict[str, Result], modules: dict[str, nn.Module]) -> Step:
    op, name = node.get("op"), shown(node.get("name"))
    if op == "layer":
        target = node.get("layer")
        if not isinstance(target, str) or target not in modules:
            raise ProgramError(f"{name} calls the layer {shown(target)}, which is not there")
        call = _CALL_PACKED_LAYER if isinstance(modules[target], PackedLayer) else _CALL_LAYER
    elif op in ("function", "method"):
        called = node.get(op)
        if not isinstance(called, str) or called not in _CALLS[op]:
            raise ProgramError(f"{name} calls the {op} {shown(called)}, which is not on the list")
        call = _CALLS[op][called]
        target = call.target
    else:
        raise ProgramError(f"{name} has the unknown op {shown(op)}")
    args, kwargs = read_value(node.get("args", [])), read_values(node.get("kwargs", {}))
    if not isinstance(args, list):
        raise ProgramError(f"{name} has no list of arguments")
    try:
        result = call.check(resolved(args, results), resolved(kwargs, results))
    except ProgramError as error:
        raise ProgramError(f"{name}: {node[op]} {error}") from error
    _name_result(node, results, result, ("name", "op", op, "args", "kwargs"))
    return Step(node["name"], op, target, tuple(args), kwargs)


def read_layer(plain: Any, name: str, members: int, version: int) -> nn.Module:
    """A layer as `layer_json` wrote it, on the meta device; tensors of shapes that the JSON does not say are empty.

    In files of version 1 layers say whether they take shared images, and there are more types of them.
    """
    settings = Settings(plain)
    kind = settings.plain.get("type")
    try:
        with torch.device("meta"):
            if kind in LAYERS:
                layer = LAYERS[kind].from_settings(settings, members)
                if version == 1:
                    layer.shared = settings.flag("shared") and layer.shares
                settings.expect_no_more()
                if version == 1 or kind != Repeat.__name__:
                    return layer
            elif kind in _MODULE_TYPES and (version == 1 or _MODULE_TYPES[kind] in POOLS):
                return _read_module(_MODULE_TYPES[kind], settings.plain)
    except (TypeError, ValueError, AssertionError) as error:
        raise ProgramError(f"{name}: {error}") from error
    raise ProgramError(f"{name} has the unknown type {shown(kind)}")


def _read_module(kind: type[nn.Module], plain: dict[str, Any]) -> nn.Module:
    kinds = MODULES[kind]
    if plain.keys() - {"type"} != kinds.keys():
        raise ProgramError(f"a {kind.__name__} has {', '.join(kinds) or 'no settings'}")
    values = {key: read_value(plain[key]) for key in kinds}
    for key, value in values.items():
        if not kinds[key].fits(value):
            raise ProgramError(f"{key} is {kinds[key].name}, not {shown(value)}")
    return kind(**values)
