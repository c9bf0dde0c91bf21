"""From trained models to what answers like them: one graph for all members, or the members in turn.

Whatever comes of it is compared with the members before anybody else sees it.
"""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..quantize.registry import QUANTIZED_TYPES
from .answers import difference
from .examples import Example, answered, fresh, other_sizes
from .float_layers import StackedConv2d, StackedLinear
from .forms import NOTHING_IN_EVAL, forward_of, know_libraries, layer_of
from .fusion import FusionReport, fuse_
from .in_turn import HOOKS, MembersInTurn, pack_layers_
from .kinds import ProgramError
from .packed_layer import PackedLayer
from .program import Program
from .program_file import program_json, read_program
from .stacking import stack_traces
from .tracing import CannotStack, Trace, Tracer
from .verification import Verification
from .weights import PackedWeight


def pack_models(models: Sequence[nn.Module], given: Any) -> tuple[nn.Module, FusionReport]:
    """A program, or else the members in turn, and the report.

    Raises:
        ValueError: if the models do not compute the same, or what was packed does not answer as they do.
    """
    know_libraries()
    example = Example(models[0], given)
    reason = "no images are known that it takes: give from_models an example"
    if given is not None and not isinstance(given, Tensor):
        reason = "it takes more than one tensor"
    for shape, fixed in example.attempts():
        try:
            return _side_by_side(models, example, shape, fixed)
        except CannotStack as why:
            reason = reason if fixed else str(why)  # with more that is constant, what is wrong shows less well
    return _in_turn(models, example, reason)


def _side_by_side(
    models: Sequence[nn.Module], example: Example, shape: tuple[int, ...], fixed: bool
) -> tuple[Program, FusionReport]:
    """The program of all members.

    Raises:
        CannotStack: with the reason.
    """
    for model in models:
        _refuse_hooks(model)
    batches = [example.batch(shape, count) for count in (2, 3)]
    first = _traced(models[0], batches[0], fixed)
    if not first.same(_traced(models[0], batches[1], fixed)):
        raise CannotStack("what it computes depends on the number of images")
    image = None if _is_of_any_size(models[0], first, example, shape) else shape
    if image is not None and shape != example.shapes[-1]:
        raise CannotStack("what it computes depends on the size of the images")
    traces = [first, *(_traced(model, batches[0], fixed) for model in models[1:])]
    graph = stack_traces(models, traces)
    report = FusionReport()
    fuse_(graph, report)
    try:
        program = Program.from_graph(graph, len(models), image)
        read_program(json.loads(json.dumps(program_json(program))), len(models), 2)
    except ProgramError as error:
        raise CannotStack(str(error)) from error
    verification = Verification(models, batches)
    try:
        apart = verification.apart(program)
    except Exception as error:
        raise CannotStack(f"side by side it fails: {error}") from error
    if not verification.program_is_right(program, apart):
        raise CannotStack(f"side by side the answers differ by {apart:.1e} of the largest")
    for name, module in program.layers().items():
        if isinstance(module, PackedLayer | PackedWeight):
            report.packed.append(name)
        elif isinstance(module, StackedConv2d | StackedLinear):
            report.floating.append(name)
    report.verified = _verified(batches, apart)
    return program, report


def _in_turn(models: Sequence[nn.Module], example: Example, reason: str) -> tuple[nn.Module, FusionReport]:
    """The members one after another.

    Raises:
        ValueError: if they do not answer as the models do.
    """
    program = MembersInTurn([pack_layers_(fresh(model)) for model in models])
    layers = dict(program.members[0].named_modules())
    packed = [name for name, layer in layers.items() if isinstance(layer, PackedLayer)]
    floating = [name for name, layer in layers.items() if type(layer) in QUANTIZED_TYPES]
    inputs = example.inputs()
    report = FusionReport(packed, floating, in_turn=reason, verified="not verified: no inputs are known that it takes")
    if inputs:
        report.verified = _verified_in_turn(program, Verification(models, inputs), reason)
    return program, report


def _verified_in_turn(program: MembersInTurn, verification: Verification, reason: str) -> str:
    """What there is to say of the answers.

    Raises:
        ValueError: if they are not the members'.
    """
    apart = verification.apart(program)
    verified = _verified(verification.inputs, apart)
    if apart <= verification.tolerance:
        return verified
    if max(map(difference, verification.answers_of(verification.models), verification.answers)) > 0:
        return "not verified: the members' answers differ from one time to the next"
    layers = verification.layers_apart(program)
    if layers > verification.tolerance:
        raise ValueError(
            f"PackedEnsemble: packed, the members' answers differ by {apart:.1e} of the largest ({reason})"
        )
    return f"{verified}, those of their layers by {layers:.1e}"


def _traced(model: nn.Module, x: Tensor, fixed: bool) -> Trace:
    return Tracer(layer_of, forward_of, tuple(NOTHING_IN_EVAL), fixed).run(answered(model, x), x)


def _is_of_any_size(model: nn.Module, trace: Trace, example: Example, shape: tuple[int, ...]) -> bool:
    """Whether it does the same with images of another size, without asking how large they are."""
    if len(shape) == 1:
        return True
    for other in other_sizes(shape):
        try:
            return trace.same(_traced(model, example.batch(other, 2), fixed=False), of_any_size=True)
        except CannotStack:
            continue  # it does not take them
    return False


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        hooks = [hook for kind in HOOKS[:2] for hook in getattr(module, kind).values()]
        if any(not getattr(hook, "__module__", "").startswith("qkernels.quantize") for hook in hooks):
            raise CannotStack(f"{name or 'it'} has a forward hook")


def _verified(inputs: Sequence[Any], apart: float) -> str:
    shapes = " and ".join(str(list(x.shape)) if isinstance(x, Tensor) else "the example" for x in inputs)
    return f"on {shapes} the members' answers differ by {apart:.1e} of the largest"
