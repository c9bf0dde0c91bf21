"""Program: the network of a packed ensemble as a list of steps, and the interpreter that runs them.

No code is made of a program, neither here nor by what reads one from a file: a step names a layer, or calls a function
or a method of a tensor, and running it is a loop. torch.compile and torch.export see through the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from .kinds import ProgramError

LARGEST_SIZE = 2**48  # of a number that a program computes from the images' sizes
LARGEST_SHAPE = 1024  # of several of them


@dataclass(frozen=True)
class Ref:
    """In the arguments of a step: the result of an earlier one, or the images."""

    name: str


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: of its result.
        op: what it calls: a layer by its name, a function, or a method of its first argument by its name.
        target: that name, or the function.
        args, kwargs: plain values and Refs, also inside of tuples, lists and slices.
    """

    name: str
    op: Literal["layer", "function", "method"]
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def uses(self) -> list[str]:
        """The names of the results that it takes."""
        names: list[str] = []
        mapped((self.args, self.kwargs), Ref, lambda ref: names.append(ref.name))
        return names


# Is told before each step: the step, its layer, its arguments, and the results that are still needed.
Watch = Callable[[Step, nn.Module | None, tuple[Any, ...], dict[str, Any], dict[str, Any]], None]


class Limit(Protocol):
    """What a program from a file may take: see `memory.py`."""

    def watch(self, x: Tensor) -> Watch | None:
        """For images x, if such have not passed before."""

    def let_pass(self, x: Tensor) -> None:
        """Such images have passed."""


class Program(nn.Module):
    """Steps over layers: images [N, ...] to [M * N, classes].

    Attributes:
        limit: of a program from a file.
    """

    def __init__(self, input: str, steps: Sequence[Step], output: Ref, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self._input, self._steps, self._output = input, tuple(steps), output
        self.limit: Limit | None = None
        last = {step.name: i for i, step in enumerate(steps)}
        last |= {name: i for i, step in enumerate(steps) for name in step.uses}
        # What is not needed after each step: a result is kept no longer than it is used.
        self._done_after: list[list[str]] = [[] for _ in steps]
        for name, i in last.items():
            if name != output.name:
                self._done_after[i].append(name)
        for name, layer in layers.items():
            self.put_layer(name, layer)
        self.eval()

    @classmethod
    def from_graph(cls, module: fx.GraphModule) -> "Program":
        """What a traced graph computes; its layers are taken over."""
        start, *nodes, end = module.graph.nodes
        steps = [
            Step(node.name, _OPS[node.op], node.target, _with_refs(node.args), _with_refs(node.kwargs))
            for node in nodes
        ]
        layers = {step.target: module.get_submodule(step.target) for step in steps if step.op == "layer"}
        return cls(start.name, steps, _with_refs(end.args[0]), layers)

    @property
    def input(self) -> str:
        """The name under which steps take the images."""
        return self._input

    @property
    def steps(self) -> tuple[Step, ...]:
        """In the order in which they run."""
        return self._steps

    @property
    def output(self) -> Ref:
        """The result that is the program's."""
        return self._output

    # Layers are kept as children, so that whoever walks modules finds them, but looked up as such and never as
    # attributes: a model may call a layer `steps`.

    def layer(self, name: str) -> nn.Module:
        """The layer of that name, "block.0.conv" being `conv` of `0` of `block`."""
        module: nn.Module = self
        for part in name.split("."):
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def put_layer(self, name: str, layer: nn.Module) -> None:
        """Put a layer under a name, in place of what is there."""
        *owners, own = name.split(".")
        module: nn.Module = self
        for part in owners:
            module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        module._modules[own] = layer

    def layers(self) -> dict[str, nn.Module]:
        """Name -> layer, of those that steps call, in the order in which they are called first."""
        return {step.target: self.layer(step.target) for step in self._steps if step.op == "layer"}

    def callers(self, layer: str) -> list[Step]:
        """The steps that call a layer."""
        return [step for step in self._steps if step.op == "layer" and step.target == layer]

    @property
    def most_results(self) -> int:
        """How many results are needed at the same time."""
        needed = most = 0
        for done in self._done_after:
            needed += 1
            most = max(most, needed)
            needed -= len(done)
        return most

    def users(self, name: str) -> list[Step]:
        """The steps that take the result `name`."""
        return [step for step in self._steps if name in step.uses]

    def forward(self, x: Tensor) -> Tensor:
        """Run the steps.

        Raises:
            ProgramError: for numbers that no image is large enough for, and beyond the limit.
        """
        values: dict[str, Any] = {self._input: x}
        limit = None if torch.compiler.is_compiling() else self.limit
        watch = limit.watch(x) if limit is not None else None

        def value_of(ref: Ref) -> Any:
            return values[ref.name]

        for step, done in zip(self._steps, self._done_after, strict=True):
            args, kwargs = mapped(step.args, Ref, value_of), mapped(step.kwargs, Ref, value_of)
            layer = self.layer(step.target) if step.op == "layer" else None
            if watch is not None:
                watch(step, layer, args, kwargs, values)
            if layer is not None:
                value = layer(*args, **kwargs)
            elif step.op == "method":
                value = getattr(args[0], step.target)(*args[1:], **kwargs)
            else:
                value = step.target(*args, **kwargs)
                if isinstance(value, int) and abs(value) > LARGEST_SIZE:
                    raise ProgramError(f"{step.name} is a number beyond {LARGEST_SIZE}")
                if isinstance(value, tuple) and len(value) > LARGEST_SHAPE:
                    raise ProgramError(f"{step.name} is a shape of more than {LARGEST_SHAPE} sizes")
            values[step.name] = value
            for name in done:
                del values[name]
        if limit is not None:
            limit.let_pass(x)
        return values[self._output.name]


_OPS: dict[str, Any] = {"call_module": "layer", "call_function": "function", "call_method": "method"}


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A value with `change(part)` in place of each part of that kind, in tuples, lists, dicts and slices."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple([mapped(part, kind, change) for part in value])
    if isinstance(value, list):
        return [mapped(part, kind, change) for part in value]
    if isinstance(value, dict):
        return {name: mapped(part, kind, change) for name, part in value.items()}
    if isinstance(value, slice):
        return slice(*mapped((value.start, value.stop, value.step), kind, change))
    return value


def _with_refs(value: Any) -> Any:
    return mapped(value, fx.Node, lambda node: Ref(node.name))
