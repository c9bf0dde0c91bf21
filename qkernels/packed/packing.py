"""From trained models to what answers like them: one graph for all members, or the members in turn.

Whatever comes of it is compared with the members before anybody else sees it.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.layers import quantized_layers
from ..quantize.registry import QUANTIZED_TYPES
from .answers import called, difference, joined
from .examples import Example, fresh, other_sizes
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
from .weights import PackedWeight

TOLERANCE = 1e-4  # of the largest logit
HARDLY, AMPLIFIED = 2.0**-22, 10  # a difference of images by rounding; how much more all layers' rounding may make
LARGEST_TOLERANCE = 0.1
TOLERANCE_OF_CODES = 0.3  # where activations are rounded: a sum in another order may take one to the next of few codes
TOLERANCE_OF_FEW_BITS = 3e-2  # on GPUs, whose products are of TF32, and in half precision


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
    try:
        with torch.no_grad():
            answers = [program(x) for x in batches]
        apart = _apart(answers, _answers(models, batches))
    except Exception as error:
        raise CannotStack(f"side by side it fails: {error}") from error
    if not _is_near(apart, models, example, batches):
        raise CannotStack(f"side by side the answers differ by {apart:.1e} of the largest logit")
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
        ValueError: if their packed layers do not answer as the models' own.
    """
    program = MembersInTurn([pack_layers_(fresh(model)) for model in models])
    layers = dict(program.members[0].named_modules())
    packed = [name for name, layer in layers.items() if isinstance(layer, PackedLayer)]
    floating = [name for name, layer in layers.items() if type(layer) in QUANTIZED_TYPES]
    inputs = example.inputs()
    report = FusionReport(packed, floating, in_turn=reason, verified="not verified: no inputs are known that it takes")
    if inputs:
        expected = _answers(models, inputs)
        with torch.no_grad():
            apart = _apart([called(program, x) for x in inputs], expected)
        again = _apart(_answers(models, inputs), expected)
        report.verified = _verified(inputs, apart)
        if again > 0:
            report.verified = "not verified: the members' answers differ from one time to the next"
        elif not _is_near(apart, models, example, inputs):
            raise ValueError(
                f"PackedEnsemble: packed, the members' answers differ by {apart:.1e} of the largest logit ({reason})"
            )
    return program, report


def _traced(model: nn.Module, x: Tensor, fixed: bool) -> Trace:
    return Tracer(layer_of, forward_of, tuple(NOTHING_IN_EVAL), fixed).run(fresh(model), x)


@torch.no_grad()
def _answers(models: Sequence[nn.Module], inputs: Sequence[Any]) -> list[Any]:
    """What the members answer to each input."""
    by_member = []
    for model in models:
        copied = fresh(model)
        by_member.append([called(copied, x) for x in inputs])
    return [joined(answers) for answers in zip(*by_member, strict=True)]


def _apart(answers: Sequence[Any], expected: Sequence[Any]) -> float:
    return max(map(difference, answers, expected))


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


def _is_near(apart: float, models: Sequence[nn.Module], example: Example, inputs: Sequence[Any]) -> bool:
    """Whether answers that are so far apart differ by rounding: some models make much of images that hardly differ."""
    if any(layer.act_quantizer is not None for model in models for _, layer in quantized_layers(model)):
        return apart <= TOLERANCE_OF_CODES
    if example.device.type != "cpu" or example.dtype in (torch.float16, torch.bfloat16):
        return apart <= TOLERANCE_OF_FEW_BITS
    if apart <= TOLERANCE:
        return True
    if not apart <= LARGEST_TOLERANCE or not all(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
        return False
    nearby = [x * (1 + HARDLY) for x in inputs]
    return apart <= AMPLIFIED * _apart(_answers(models, nearby), _answers(models, inputs))


def _verified(inputs: Sequence[Any], apart: float) -> str:
    shapes = " and ".join(str(list(x.shape)) if isinstance(x, Tensor) else "the example" for x in inputs)
    return f"on {shapes} the members' answers differ by {apart:.1e} of the largest"
