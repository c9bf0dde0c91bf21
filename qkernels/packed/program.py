"""Program: the network of a packed ensemble as a list of steps, and the interpreter that runs them.

A value of a program is either shared, as the images are, or of the members: [M, *what one member has]. Which of the two
follows from the steps. A step does to each member's value what the member's model does to its own.

No code is made of a program, neither here nor by what reads one from a file: a step names a layer, or calls a function
or a method of a tensor, and running it is a loop. torch.compile and torch.export see through the loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from .by_members import Operands, on_planes
from .functions import CALLS
from .kinds import LayerKind, ProgramError
from .record import Record
from .segments import Parts, Segment, Segments, may_run, parts_of, state_of
from .steps import Ref, Step, mapped
from .values import Result, resolved

LARGEST_SIZE = 2**48  # of a number that a program computes from the images' sizes
LARGEST_SHAPE = 1024  # of several of them

# Is told before each step: the step, its layer, and the results that are still needed.
Watch = Callable[[Step, nn.Module | None, Operands], None]


class Limit(Protocol):
    """What a program from a file may take: see `memory.py`."""

    def watch(self, x: Tensor) -> Watch | None:
        """For images x, if such have not passed before."""

    def let_pass(self, x: Tensor) -> None:
        """Such images have passed."""


class Program(nn.Module):
    """Steps over layers: images [N, ...] to each member's logits [M, N, classes].

    Args:
        input: the name under which steps take the images.
        output: the result that is the program's.
        layers: by the names under which steps call them.
        members: M.
        image: the shape of the images, [channels, height, width], if it takes no others.

    Attributes:
        limit: of a program from a file.

    Raises:
        ProgramError: for a function, or arguments, that the format does not have.
    """

    def __init__(
        self,
        input: str,
        steps: Sequence[Step],
        output: Ref,
        layers: dict[str, nn.Module],
        members: int,
        image: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._input, self._steps, self._output, self._members = input, tuple(steps), output, members
        self._image = None if image is None else tuple(image)
        self.limit: Limit | None = None
        self._segments = Segments()
        last = {step.name: i for i, step in enumerate(steps)}
        last |= {name: i for i, step in enumerate(steps) for name in step.uses}
        # What is not needed after each step: a result is kept no longer than it is used.
        self._done_after: list[list[str]] = [[] for _ in steps]
        for name, i in last.items():
            if name != output.name:
                self._done_after[i].append(name)
        self._places: list[tuple[dict[str, Any], str]] = []  # of the layers that steps call: their owners' children
        for name, layer in layers.items():
            self.put_layer(name, layer)
        self._places = [self._place(name) for name in layers if self.callers(name)]
        self._own = self._find_own()
        self._share()
        self.eval()

    def _find_own(self) -> frozenset[str]:
        """The names of the results of which each member has its own."""
        results: dict[str, Result] = {self._input: "tensor"}
        own: set[str] = set()
        for step in self._steps:
            results[step.name] = result_of(step, results)
            layer = self.layer(step.target) if step.op == "layer" else None
            by_member = layer.gives_own if isinstance(layer, LayerKind) else not own.isdisjoint(step.uses)
            if by_member and results[step.name] in ("tensor", "tensors"):
                own.add(step.name)
        if results.get(self._output.name) != "tensor":
            raise ProgramError("the output is not one value")
        return frozenset(own)

    def _share(self) -> None:
        """Let layers know whether what they take is shared."""
        for name, layer in self.layers().items():
            if isinstance(layer, LayerKind):
                layer.shared = all(ref.name not in self._own for step in self.callers(name) for ref in step.args[:1])

    @classmethod
    def from_graph(cls, module: fx.GraphModule, members: int, image: Sequence[int] | None = None) -> "Program":
        """What a traced graph computes; its layers are taken over."""
        start, *nodes, end = module.graph.nodes
        steps = [
            Step(node.name, _OPS[node.op], node.target, _with_refs(node.args), _with_refs(node.kwargs))
            for node in nodes
        ]
        layers = {step.target: module.get_submodule(step.target) for step in steps if step.op == "layer"}
        return cls(start.name, steps, _with_refs(end.args[0]), layers, members, image)

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

    @property
    def image(self) -> tuple[int, ...] | None:
        """The shape of an image, if it takes no others."""
        return self._image

    # Layers are kept as children, so that whoever walks modules finds them, but looked up as such and never as
    # attributes: a model may call a layer `steps`.

    def layer(self, name: str) -> nn.Module:
        """The layer of that name, "block.0.conv" being `conv` of `0` of `block`."""
        children, own = self._place(name)
        return children[own]

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        """The children among which the layer of that name is, and its name there."""
        *owners, own = name.split(".")
        children: dict[str, Any] = self._modules
        for owner in owners:
            children = children[owner]._modules
        return children, own

    def put_layer(self, name: str, layer: nn.Module) -> None:
        """Put a layer under a name, in place of what is there."""
        *owners, own = name.split(".")
        module: nn.Module = self
        for part in owners:
            module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        module._modules[own] = layer
        self._segments = Segments()

    def layers(self) -> dict[str, nn.Module]:
        """Name -> layer, of those that steps call, in the order in which they are called first."""
        return {step.target: self.layer(step.target) for step in self._steps if step.op == "layer"}

    def callers(self, layer: str) -> list[Step]:
        """The steps that call a layer."""
        return [step for step in self._steps if step.op == "layer" and step.target == layer]

    def done_after(self, i: int) -> Sequence[str]:
        """The results that are not needed after step i."""
        return self._done_after[i]

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
            ValueError: for images of another size than the program is for.
        """
        if self._image is not None and tuple(x.shape[1:]) != self._image:
            raise ValueError(f"this ensemble takes images of shape {list(self._image)}, not {list(x.shape[1:])}")
        layers = [children[name] for children, name in self._places]
        quick = may_run(x, layers)
        passed = self.limit is None or (quick and self.limit.watch(x) is None)
        state = state_of(layers) if quick else []
        parts = self._segments.parts(x, state) if quick and passed else None
        if parts is None:
            record = Record(self._input, x, self._own) if quick else None
            y = self._run_steps(x, record)
            if record is None:
                return y
            parts = parts_of(self, record)
            self._segments.keep(x, state, parts)
            if not parts.rounds:
                return y
        return self._run_parts(parts, x)  # the first images like these get the answer, too, that others will

    def _operands(self, x: Tensor) -> Operands:
        return Operands({self._input: x}, self._own, self._members)

    def _run_steps(self, x: Tensor, record: Record | None = None) -> Tensor:
        """Run them one by one."""
        limit = None if torch.compiler.is_compiling() else self.limit
        watch = limit.watch(x) if limit is not None else None
        operands = self._operands(x)
        values = operands.values
        for step, done in zip(self._steps, self._done_after, strict=True):
            layer = self.layer(step.target) if step.op == "layer" else None
            if watch is not None:
                watch(step, layer, operands)
            value = values[step.name] = checked(step, self._run(step, layer, operands))
            if record is not None:
                record.see(step, value, values)
            for name in done:
                del values[name]
        if limit is not None:
            limit.let_pass(x)
        return self._result(operands)

    def _run_parts(self, parts: Parts, x: Tensor) -> Tensor:
        """Run what images of this shape have passed before, with its segments."""
        operands = self._operands(x)
        values = operands.values
        values |= parts.numbers
        for call, done in parts.calls:
            if isinstance(call, Segment):
                values[call.name] = call.run(values)
            else:
                layer = self.layer(call.target) if call.op == "layer" else None
                values[call.name] = checked(call, self._run(call, layer, operands))
            for name in done:
                del values[name]
        return self._result(operands)

    def _run(self, step: Step, layer: nn.Module | None, operands: Operands) -> Any:
        if layer is None:
            call = CALLS[step.op, step.target]
            if self._own.isdisjoint(step.uses):
                return call.run(mapped(call.bound(step.args, step.kwargs), Ref, operands.value))
            return call.of_members(step.args, step.kwargs, operands)
        if not isinstance(layer, LayerKind):
            return on_planes(layer, operands.value(step.args[0]))
        # A layer that takes what is shared may add a residual that is not, and the other way round.
        first, *others = step.args
        images = operands.value(first) if layer.shared or not layer.shares else operands.expanded(first)
        return layer(images, *map(operands.expanded, others))

    def _result(self, operands: Operands) -> Tensor:
        return operands.expanded(self._output)


def result_of(step: Step, results: dict[str, Result]) -> Result:
    """What a step gives, from what those before it give.

    Raises:
        ProgramError: for a function or arguments that are not on the list.
    """
    if step.op == "layer":
        return "tensor"
    if (step.op, step.target) not in CALLS:
        name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", step.target)
        raise ProgramError(f"{step.name} calls {name}, which the format does not know")
    try:
        return CALLS[step.op, step.target].check(resolved(list(step.args), results), resolved(step.kwargs, results))
    except ProgramError as error:
        raise ProgramError(f"{step.name}: {error}") from error


def checked(step: Step, value: Any) -> Any:
    """The result of a step; a number, or a shape, of a size that images may have.

    Raises:
        ProgramError: if it is not.
    """
    if isinstance(value, int) and abs(value) > LARGEST_SIZE:
        raise ProgramError(f"{step.name} is a number beyond {LARGEST_SIZE}")
    if step.op == "function" and isinstance(value, tuple) and len(value) > LARGEST_SHAPE:
        raise ProgramError(f"{step.name} is a shape of more than {LARGEST_SHAPE} sizes")
    return value


_OPS: dict[str, Any] = {"call_module": "layer", "call_function": "function", "call_method": "method"}


def _with_refs(value: Any) -> Any:
    return mapped(value, fx.Node, lambda node: Ref(node.name))
