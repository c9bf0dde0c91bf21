"""PackedWeight: quantized weights that are multiplied by functions, not in a layer of their own."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.packing import dequantize_packed, pack
from ..quantize.codes import weight_codes
from ..quantize.layers import QuantizedLayer
from .kinds import Expected, LayerKind, ProgramError, Settings
from .packed_layer import bits_of, runs_of


class PackedWeight(LayerKind):
    """The members' quantized weights [M, *shape], dequantized where they are needed.

    Args:
        shape: of one weight.
        axis: its dimension with a scale for each index.
        bits: of each member's.
    """

    shares: ClassVar[bool] = False
    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, shape: Sequence[int], axis: int, bits: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.axis, self.bits = tuple(shape), axis, tuple(bits)
        self.runs = runs_of(self.bits, math.prod(self.shape))
        self.register_buffer("weight_packed", torch.zeros(self.runs[-1].bytes.stop, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(len(self.bits), self.shape[axis]))

    @classmethod
    def from_layers(cls, layers: Sequence[QuantizedLayer]) -> "PackedWeight":
        """The weights of one quantized layer a member."""
        codes, scales = zip(*map(weight_codes, layers), strict=True)
        axis, bits = layers[0].channel_axis, [layer.weight_quantizer.bits for layer in layers]
        weight = cls(codes[0].shape, axis, bits)
        weight.weight_packed = torch.cat([pack(c.movedim(axis, 0), b) for c, b in zip(codes, bits, strict=True)])
        weight.weight_scale = torch.stack(scales)
        return weight

    def settings(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "axis": self.axis, "bits": list(self.bits)}

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "PackedWeight":
        shape, axis = settings.get("shape"), settings.number("axis", 0)
        if not isinstance(shape, list) or not 1 <= len(shape) <= 5 or axis >= len(shape):
            raise ProgramError("has no shape with that axis")
        return cls(settings.numbers("shape", len(shape), 1), axis, bits_of(settings, members))

    def expected(self, members: int) -> dict[str, Expected]:
        return {
            "weight_packed": Expected(torch.uint8, list(self.weight_packed.shape)),
            "weight_scale": Expected(torch.float32, list(self.weight_scale.shape)),
        }

    def most_elements(self, x: Tensor) -> int:
        return 3 * len(self.bits) * math.prod(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The weights in the dtype of x."""
        count = math.prod(self.shape)
        moved = [self.shape[self.axis], *self.shape[: self.axis], *self.shape[self.axis + 1 :]]
        weights = [
            dequantize_packed(
                self.weight_packed[run.bytes].view(run.members.stop - run.members.start, -1),
                self.weight_scale[run.members],
                run.bits,
                count,
                x.dtype,
            ).view(-1, *moved)
            for run in self.runs
        ]
        return torch.cat(weights).movedim(1, self.axis + 1)
