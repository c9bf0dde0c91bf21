"""Layers of a program as rows of the table that `packed_network` takes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..ops.geometry import Geometry
from ..ops.packed_network import Row
from .codes_max_pool import CodesMaxPool2d
from .layers import PackedConv2d, PackedLinear
from .packed_layer import INTEGERS, PackedLayer
from .steps import Ref, Step

Shape = tuple[int, int, int, int]


class Seen(NamedTuple):
    """What a value was when images passed."""

    shape: torch.Size
    dtype: torch.dtype


class Constant(NamedTuple):
    """A layer's tensor, looked up in each call."""

    tensors: dict[str, Tensor | None]
    name: str


def known(step: Step, layer: nn.Module | None, seen: dict[str, Seen]) -> bool:
    """Whether the op knows the layer that a step calls, with such arguments."""
    if step.kwargs or not all(isinstance(arg, Ref) and arg.name in seen for arg in step.args) or step.name not in seen:
        return False
    x, *residual = [seen[arg.name] for arg in step.args]
    result = seen[step.name]
    if 0 in x.shape or 0 in result.shape or layer is None or "forward" in vars(layer):
        return False
    if type(layer) is CodesMaxPool2d:
        inside = all(p < k for p, k in zip(_pair(layer.padding), _pair(layer.kernel_size), strict=True))
        return x.dtype in INTEGERS and len(x.shape) == 5 and inside
    if type(layer) not in (PackedConv2d, PackedLinear) or layer.alone:
        return False
    if not layer.shared and len(x.shape) != len(result.shape):
        return False  # it takes what members share in one step, and their own in another
    if layer.input_scale is None and (isinstance(layer, PackedLinear) or x.dtype in INTEGERS):
        return False  # linear layers of few rows are left to `packed_gemv`
    if isinstance(layer, PackedConv2d) and layer.padding_mode != "zeros":
        return False
    return all(
        r.shape == result.shape and (r.dtype in INTEGERS) == (layer.residual_scale is not None) for r in residual
    )


def image_dims(layer: nn.Module) -> int:
    """How many dimensions of its values are an image's: those of [..., C, H, W], or of rows [..., C]."""
    return 1 if isinstance(layer, PackedLinear) else 3


def image_shape(shape: Sequence[int], dims: int) -> Shape:
    """[images, C, H, W]."""
    images = torch.Size(shape[:-dims]).numel()
    return (images, *shape[-3:]) if dims == 3 else (images, shape[-1], 1, 1)  # type: ignore[return-value]


class Lowered:
    """The rows of some steps.

    Attributes:
        rows, constants: of `packed_network`.
    """

    def __init__(self, inputs: Sequence[str], seen: dict[str, Seen]) -> None:
        self.rows: list[Row] = []
        self.constants: list[Constant] = []
        self._seen = seen
        self._numbers = {name: number for number, name in enumerate(inputs)}
        self._values = len(inputs)

    def add(self, step: Step, layer: nn.Module) -> None:
        """The rows of a layer that is `known`."""
        dims = image_dims(layer)
        x, *residual = [arg.name for arg in step.args]
        shape = image_shape(self._seen[step.name].shape, dims)
        given = image_shape(self._seen[x].shape, dims)
        if isinstance(layer, CodesMaxPool2d):
            self._pool(layer, step.name, x, given, shape)
        elif isinstance(layer, PackedConv2d | PackedLinear):
            self._convolve(layer, step.name, x, residual, given, shape)

    def _constant(self, layer: PackedLayer, name: str) -> int:
        if layer._buffers[name] is None:
            return -1
        self.constants.append(Constant(layer._buffers, name))
        return len(self.constants) - 1

    def _result(self) -> int:
        self._values += 1
        return self._values - 1

    def _pool(self, layer: CodesMaxPool2d, name: str, x: str, given: Shape, shape: Shape) -> None:
        window = _window(layer.geometry)
        self.rows.append(
            Row(
                "max_pool",
                self._numbers[x],
                self._result(),
                self._seen[name].dtype,
                shape,
                images_of_member=given[0],
                window=window,
            )
        )
        self._numbers[name] = self._values - 1

    def _convolve(self, layer: PackedLayer, name: str, x: str, residual: list[str], given: Shape, shape: Shape) -> None:
        geometry = layer.geometry_of(*given[2:])
        number, shared = self._numbers[x], layer.shared
        if layer.input_scale is not None and self._seen[x].dtype not in INTEGERS:
            number, shared = self._quantize(layer, number, given)
        images, result = shape[0] // layer.members, self._result()
        packed, scale, bias = (self._constant(layer, key) for key in ("weight_packed", "weight_scale", "bias"))
        scales = [self._constant(layer, key) for key in ("input_scale", "residual_scale", "output_scale")]
        for part, run in enumerate(layer.runs):
            self.rows.append(
                Row(
                    "convolve",
                    number,
                    result,
                    self._seen[name].dtype,
                    shape,
                    residual=self._numbers[residual[0]] if residual else -1,
                    part=part,
                    first=run.members.start * images,
                    members=run.members.stop - run.members.start,
                    member=run.members.start,
                    images_of_member=images,
                    shared=shared,
                    bits=run.bits,
                    byte=run.bytes.start,
                    window=_window(geometry),
                    activation=layer.activation,
                    code_range=layer.output_range,
                    packed=packed,
                    scale=scale,
                    bias=bias,
                    x_scale=scales[0],
                    residual_scale=scales[1] if residual else -1,
                    out_scale=scales[2],
                )
            )
        self._numbers[name] = result

    def _quantize(self, layer: PackedLayer, x: int, given: Shape) -> tuple[int, bool]:
        """The codes of a layer's float input, and whether the members still share them."""
        shared = layer.shared and layer.one_input_scale
        images = given[0] * (layer.members if layer.shared and not shared else 1)
        result = self._result()
        self.rows.append(
            Row(
                "quantize",
                x,
                result,
                torch.int8 if layer.input_range[0] < 0 else torch.uint8,
                (images, *given[1:]),
                members=1 if shared else layer.members,
                code_range=layer.input_range,
                out_scale=self._constant(layer, "input_scale"),
            )
        )
        return result, shared


def _window(geometry: Geometry) -> tuple[int, ...]:
    return (*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups)
