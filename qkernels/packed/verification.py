"""Whether what was packed answers as the members do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.layers import QuantizedLayer, quantized_layers
from .answers import called, difference, joined
from .examples import fresh
from .in_turn import MembersInTurn
from .packed_layer import PackedLayer
from .program import Program

TOLERANCE = 1e-4  # of the largest number in an answer
TOLERANCE_OF_FEW_BITS = 3e-2  # on GPUs, whose products are of TF32, and in half precision
HARDLY, AMPLIFIED = 2.0**-22, 10  # a difference of images by rounding; how much more all layers' rounding may make
LARGEST_TOLERANCE = 0.1
TOLERANCE_OF_CODES = 0.3  # where inputs are rounded: a sum in another order may take one to the next of few codes


class Verification:
    """The answers of the members to some inputs, and how far others are from them.

    Args:
        models: the members.
        inputs: what they are called with.
    """

    def __init__(self, models: Sequence[nn.Module], inputs: Sequence[Any]) -> None:
        self.models, self.inputs = models, inputs
        self.rounds_inputs = any(layer.act_quantizer is not None for m in models for _, layer in quantized_layers(m))
        tensors = [t for model in models for t in model.parameters()] + [x for x in inputs if isinstance(x, Tensor)]
        few = any(t.is_cuda or t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
        self.tolerance = TOLERANCE_OF_FEW_BITS if few else TOLERANCE
        self.answers = self.answers_of(models)

    @torch.no_grad()
    def answers_of(self, models: Sequence[nn.Module], inputs: Sequence[Any] | None = None) -> list[Any]:
        """The members' answers to each input."""
        by_member = []
        for model in models:
            copied = fresh(model)
            by_member.append([called(copied, x) for x in (self.inputs if inputs is None else inputs)])
        return [joined(answers) for answers in zip(*by_member, strict=True)]

    @torch.no_grad()
    def apart(self, program: nn.Module) -> float:
        """How far a program's answers are from the members', relative to the largest number in them."""
        answers = [called(program, x) for x in self.inputs]
        return max(map(difference, answers, self.answers))

    def program_is_right(self, program: Program, apart: float) -> bool:
        """Whether its answers, so far apart, differ by rounding alone.

        Some models make much of images that hardly differ. Where inputs are quantized, rounding takes one to the next
        code; then it is also compared without.
        """
        if self.rounds_inputs:
            with _float_inputs(program):
                models = [_with_float_inputs(fresh(model)) for model in self.models]
                plain = Verification(models, self.inputs)
                return apart <= TOLERANCE_OF_CODES and plain.program_is_right(program, plain.apart(program))
        if apart <= self.tolerance:
            return True
        if not apart <= LARGEST_TOLERANCE:
            return False
        nearby = self.answers_of(self.models, [x * (1 + HARDLY) for x in self.inputs])
        return apart <= AMPLIFIED * max(map(difference, nearby, self.answers))

    def layers_apart(self, program: MembersInTurn) -> float:
        """How far the packed layers are from the members', each called with what the member's is called with.

        With each layer's answer replaced by the member's own, all else has to answer as the members do, to the bit or
        nearly so: infinity where it does not.
        """
        largest = [0.0]
        with _replaced_answers(program, [fresh(model) for model in self.models], largest.append):
            rest = self.apart(program)
        return max(largest) if rest <= TOLERANCE else float("inf")


@contextmanager
def _replaced_answers(
    program: MembersInTurn, models: Sequence[nn.Module], report: Callable[[float], None]
) -> Iterator[None]:
    """Packed layers answer what the models' layers of the same names do; how far theirs are apart is reported."""
    handles = []
    for member, model in zip(program.members, models, strict=True):
        own = dict(quantized_layers(model))
        for name, layer in member.named_modules():
            if isinstance(layer, PackedLayer):
                handles.append(layer.register_forward_hook(_replacing(own[name], report), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replacing(layer: QuantizedLayer, report: Callable[[float], None]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
        own = layer(*args, **kwargs)
        report(difference(answer, own))
        return own

    return hook


@contextmanager
def _float_inputs(program: Program) -> Iterator[None]:
    """Packed layers do not round what they are called with."""
    scales = {layer: layer.input_scale for layer in program.layers().values() if isinstance(layer, PackedLayer)}
    for layer in scales:
        layer.input_scale = None
    try:
        yield
    finally:
        for layer, scale in scales.items():
            layer.input_scale = scale


def _with_float_inputs(model: nn.Module) -> nn.Module:
    for _, layer in quantized_layers(model):
        layer.act_quantizer = None
    return model
