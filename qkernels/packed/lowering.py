"""Steps of a program as rows of the table that `packed_network` takes."""

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..ops.geometry import Geometry
from ..ops.packed_network import Row
from .by_members import Bound
from .codes_max_pool import CodesMaxPool2d
from .float_layers import StackedNorm
from .functions import CALLS
from .layers import PackedConv2d, PackedLinear
from .packed_layer import INTEGERS, PackedLayer
from .record import Record, Seen, lies_in_order, same_strides
from .steps import Ref, Step

Shape = tuple[int, int, int, int]
Form = Literal["rows", "images"]  # how a step reads a tensor: as [..., C], or as [..., C, H, W]

AVERAGES = (F.adaptive_avg_pool2d, "mean")


class Constant(NamedTuple):
    """A layer's tensor, looked up in each call."""

    tensors: dict[str, Tensor | None]
    name: str


class Value(NamedTuple):
    """What rows take and give: pixels with their channels one after another.

    Attributes:
        number: of a result, counted from the first of the rows, or -2 and less for the inputs.
        shape: [images, channels, height, width].
        order: in which the dimensions of the step's own tensor lie in it, outermost first.
        in_order: whether they lay so when it was seen: then views of it are views of the value.
    """

    number: int
    shape: Shape
    order: tuple[int, ...]
    in_order: bool


def shape_of(shape: Sequence[int], form: Form) -> Shape:
    """[images, C, H, W]."""
    if form == "rows":
        return (torch.Size(shape[:-1]).numel(), shape[-1], 1, 1)
    return (torch.Size(shape[:-3]).numel(), *shape[-3:])  # type: ignore[return-value]


def order_of(dims: int, form: Form) -> tuple[int, ...]:
    """Of a tensor's dimensions, channels last."""
    order = list(range(dims))
    if form == "images":
        order.append(order.pop(-3))
    return tuple(order)


class Lowered:
    """The rows of some steps.

    Attributes:
        constants: of `packed_network`.
        inputs: what it takes: name -> value.
        rounds: whether something is computed in another order than by the steps, and rounds otherwise.
    """

    def __init__(self, record: Record) -> None:
        self._rows: list[Row] = []
        self.constants: list[Constant] = []
        self.inputs: dict[str, Value] = {}
        self.rounds = False
        self._record = record
        self._made: dict[str, Value] = {}

    def rows(self) -> list[Row]:
        """Of `packed_network`, where the inputs are the first values."""
        inputs = len(self.inputs)

        def numbered(value: int) -> int:
            return value + inputs if value >= 0 else -2 - value if value < -1 else -1

        return [
            row._replace(x=numbered(row.x), residual=numbered(row.residual), result=numbered(row.result))
            for row in self._rows
        ]

    def value(self, name: str) -> Value | None:
        """What a step gives, if rows give it."""
        return self._made.get(name)

    def may_end_with(self, name: str) -> bool:
        """Whether rows give it, and not a mean alone: PyTorch's takes as long, and has the bits of the steps."""
        kinds = {row.result: row.kind for row in self._rows}
        return name in self._made and kinds[self._made[name].number] != "mean"

    def add(self, step: Step, layer: nn.Module | None) -> bool:
        """Add a step; False, and of no further use, if the op does not know what it does, or with such arguments."""
        record = self._record
        if step.name in record.numbers:
            return True
        if step.name in record.views:
            return record.views[step.name] in self._made
        if step.name not in record.tensors or 0 in record.tensors[step.name].shape:
            return False
        if layer is None:
            return self._call(step)
        if step.kwargs or not all(isinstance(arg, Ref) for arg in step.args) or "forward" in vars(layer):
            return False
        names = [arg.name for arg in step.args]
        if type(layer) is CodesMaxPool2d:
            return self._pool(layer, step.name, *names)
        if type(layer) is StackedNorm:
            return self._norm(layer, step.name, *names)
        return type(layer) in (PackedConv2d, PackedLinear) and self._convolve(layer, step.name, *names)  # type: ignore[arg-type]

    def _call(self, step: Step) -> bool:
        """A function, or a method."""
        if (step.op, step.target) not in CALLS:
            return False
        bound = CALLS[step.op, step.target].bound(step.args, step.kwargs)
        if step.target in AVERAGES:
            return self._mean(step, bound)
        if step.target is operator.mul:
            return self._gate(step, bound)
        return step.target is F.scaled_dot_product_attention and self._attend(step, bound)

    # What is taken, and what is given --------------------------------------------------------------------------------

    def _seen(self, name: str) -> Seen:
        return self._record.tensors[name]

    def _taken(self, name: str, form: Form) -> Value | None:
        """The value of a name, read in a form; None if its memory does not hold it so."""
        if name not in self._record.tensors or 0 in self._seen(name).shape:
            return None
        seen, base = self._seen(name), self._record.base(name)
        if len(seen.shape) < (3 if form == "images" else 1):
            return None
        shape, order = shape_of(seen.shape, form), order_of(len(seen.shape), form)
        if base not in self._made:
            value = self.inputs.setdefault(name, Value(-2 - len(self.inputs), shape, order, False))
            return value if value.order == order else None
        value = self._made[base]
        if base == name and value.order == order:
            return value
        same = (_pixels(shape), shape[1]) == (_pixels(value.shape), value.shape[1])
        if form == "images":
            same = same and shape == value.shape
        return value if same and value.in_order and lies_in_order(seen, order) else None

    def _give(self, name: str, rows: Sequence[Row], order: tuple[int, ...]) -> bool:
        """The rows that give the result of a step."""
        self._rows += rows
        in_order = lies_in_order(self._seen(name), order)
        self._made[name] = Value(rows[0].result, rows[0].shape, order, in_order)  # type: ignore[arg-type]
        return True

    def _give_as(self, name: str, rows: Sequence[Row], form: Form) -> bool:
        return self._give(name, rows, order_of(len(self._seen(name).shape), form))

    @property
    def _next(self) -> int:
        """The number of the next result, not counting the inputs."""
        return self._rows[-1].result + 1 if self._rows else 0

    def _constant(self, tensors: dict[str, Tensor | None], name: str) -> int:
        if tensors[name] is None:
            return -1
        self.constants.append(Constant(tensors, name))
        return len(self.constants) - 1

    # Layers ----------------------------------------------------------------------------------------------------------

    def _pool(self, layer: CodesMaxPool2d, name: str, x: str) -> bool:
        given, seen = self._taken(x, "images"), self._seen(name)
        inside = all(p < k for p, k in zip(_pair(layer.padding), _pair(layer.kernel_size), strict=True))
        if given is None or seen.dtype not in INTEGERS or len(seen.shape) != 5 or not inside:
            return False
        shape = shape_of(seen.shape, "images")
        window = _window(layer.geometry)
        row = Row(
            "max_pool", given.number, self._next, seen.dtype, shape, images_of_member=given.shape[0], window=window
        )
        return self._give_as(name, [row], "images")

    def _norm(self, layer: StackedNorm, name: str, x: str) -> bool:
        form: Form = "rows" if layer.kind == "layer" else "images"
        given, seen = self._taken(x, form), self._seen(name)
        if (
            given is None
            or layer.kind not in ("layer", "layer2d")
            or layer.weight.dim() != 2
            or {layer.weight.dtype, layer.bias.dtype, self._seen(x).dtype, seen.dtype} != {torch.float32}
            or self._seen(x).shape != seen.shape
        ):
            return False
        self.rounds = True
        row = Row(
            "norm",
            given.number,
            self._next,
            seen.dtype,
            given.shape,
            members=layer.weight.shape[0],
            scale=self._constant(layer._buffers, "weight"),
            bias=self._constant(layer._buffers, "bias"),
            x_scale=self._constant({"eps": torch.tensor([layer.eps])}, "eps"),
        )
        return self._give_as(name, [row], form)

    def _convolve(self, layer: PackedConv2d | PackedLinear, name: str, x: str, residual: str | None = None) -> bool:
        form: Form = "rows" if isinstance(layer, PackedLinear) else "images"
        given, seen, seen_x = self._taken(x, form), self._seen(name), self._seen(x)
        added = None if residual is None else self._taken(residual, form)
        if given is None or (residual is not None and not self._may_add(layer, residual, added, seen)):
            return False
        if layer.alone or not (layer.shared or len(seen_x.shape) == len(seen.shape)):
            return False  # or it takes what members share in one step, and their own in another
        if layer.input_scale is None and seen_x.dtype in INTEGERS:
            return False
        if isinstance(layer, PackedLinear) and layer.multiplies(_pixels(given.shape), residual is not None):
            return False
        if isinstance(layer, PackedConv2d) and layer.padding_mode != "zeros":
            return False
        number, shared = given.number, layer.shared
        if layer.input_scale is not None and seen_x.dtype not in INTEGERS:
            number, shared = self._quantize(layer, given)
        geometry = layer.geometry_of(*given.shape[2:]) if form == "images" else layer.geometry
        shape = shape_of(seen.shape, "images")
        if form == "rows":  # as many pixels as x has
            shape = (given.shape[0] * (layer.members if layer.shared else 1), layer.out_channels, *given.shape[2:])
        if added is not None and added.shape != shape:
            return False
        rows = self._members(layer, number, shared, shape, seen.dtype, geometry, added)
        return self._give_as(name, rows, form)

    def _may_add(self, layer: PackedLayer, residual: str, added: Value | None, result: Seen) -> bool:
        seen = self._record.tensors.get(residual)
        return (
            added is not None
            and seen is not None
            and seen.shape == result.shape
            and (seen.dtype in INTEGERS) == (layer.residual_scale is not None)
        )

    def _members(
        self,
        layer: PackedLayer,
        x: int,
        shared: bool,
        shape: Shape,
        dtype: torch.dtype,
        geometry: Geometry,
        residual: Value | None,
    ) -> list[Row]:
        """A row for each run of members whose weights have the same bits."""
        images, result = shape[0] // layer.members, self._next
        packed, scale, bias = (self._constant(layer._buffers, key) for key in ("weight_packed", "weight_scale", "bias"))
        panels = self._constant(layer._buffers, "weight_panels") if layer.has_panels else -1
        scales = [self._constant(layer._buffers, key) for key in ("input_scale", "residual_scale", "output_scale")]
        return [
            Row(
                "convolve",
                x,
                result,
                dtype,
                shape,
                residual=-1 if residual is None else residual.number,
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
                panels=panels,
                scale=scale,
                bias=bias,
                x_scale=scales[0],
                residual_scale=-1 if residual is None else scales[1],
                out_scale=scales[2],
            )
            for part, run in enumerate(layer.runs)
        ]

    def _quantize(self, layer: PackedLayer, x: Value) -> tuple[int, bool]:
        """The codes of a layer's float input, and whether the members still share them."""
        shared = layer.shared and layer.one_input_scale
        images = x.shape[0] * (layer.members if layer.shared and not shared else 1)
        row = Row(
            "quantize",
            x.number,
            self._next,
            torch.int8 if layer.input_range[0] < 0 else torch.uint8,
            (images, *x.shape[1:]),
            members=1 if shared else layer.members,
            code_range=layer.input_range,
            out_scale=self._constant(layer._buffers, "input_scale"),
        )
        self._rows.append(row)
        return row.result, shared

    # Functions -------------------------------------------------------------------------------------------------------

    def _floats(self, *refs: Any) -> bool:
        """Whether these are references to tensors of float32, which each member has of its own."""
        names = [ref.name for ref in refs if isinstance(ref, Ref) and ref.name in self._record.own]
        tensors = [self._record.tensors.get(name) for name in names]
        return len(tensors) == len(refs) and all(t is not None and t.dtype == torch.float32 for t in tensors)

    def _mean(self, step: Step, bound: Bound) -> bool:
        """Over the pixels of each image."""
        x, *_ = bound.values()
        if step.target == "mean":
            dim = bound.get("dim")
            dims = sorted(d % 4 for d in dim) if isinstance(dim, tuple | list) else None
            right = dims == [2, 3] and bound.get("dtype") is None
        else:
            right = bound.get("output_size") in (1, (1, 1), [1, 1])
        if not right or not self._floats(x) or len(self._seen(x.name).shape) != 5:
            return False
        given, seen = self._taken(x.name, "images"), self._seen(step.name)
        if given is None:
            return False
        self.rounds = True
        row = Row("mean", given.number, self._next, seen.dtype, (*given.shape[:2], 1, 1))
        form: Form = "images" if len(seen.shape) == 5 else "rows"
        return self._give_as(step.name, [row], form)

    def _gate(self, step: Step, bound: Bound) -> bool:
        """Images times one factor for each of their channels."""
        if not self._floats(*bound.values()):
            return False
        x, factors = sorted((ref.name for ref in bound.values()), key=lambda name: -self._seen(name).shape.numel())
        seen = self._seen(x)
        fits = self._seen(step.name).shape == seen.shape and self._seen(factors).shape == (*seen.shape[:3], 1, 1)
        if len(seen.shape) != 5 or not fits:
            return False
        given, taken = self._taken(x, "images"), self._taken(factors, "images")
        if given is None or taken is None:
            return False
        row = Row("gate", given.number, self._next, seen.dtype, given.shape, residual=taken.number)
        return self._give_as(step.name, [row], "images")

    def _attend(self, step: Step, bound: Bound) -> bool:
        """Attention whose queries, keys and values are channels of one value."""
        parts = [bound[name] for name in ("query", "key", "value")]
        plain = bound.get("attn_mask") is None and not bound.get("is_causal") and not bound.get("enable_gqa")
        if not plain or not self._floats(*parts):
            return False
        seen = [self._seen(ref.name) for ref in parts]
        bases = {self._record.base(ref.name) for ref in parts}
        given = self._made.get(next(iter(bases)))
        if len(bases) > 1 or given is None or not given.in_order or len(seen[0].shape) != 5:
            return False
        members, images, heads, tokens, depth = shape = seen[0].shape
        width = given.shape[1]
        strides = (images * tokens * width, tokens * width, depth, width, 1)
        right = members * images * tokens == _pixels(given.shape) and all(
            t.shape == shape and same_strides(t, strides) and t.offset + heads * depth <= width for t in seen
        )
        if not right:
            return False
        scale = bound.get("scale")
        scale = self._record.numbers[scale.name] if isinstance(scale, Ref) else scale
        self.rounds = True
        row = Row(
            "attend",
            given.number,
            self._next,
            torch.float32,
            (given.shape[0], heads * depth, *given.shape[2:]),
            heads=heads,
            tokens=tokens,
            query=seen[0].offset,
            key=seen[1].offset,
            value=seen[2].offset,
            scale=self._constant({"scale": torch.tensor([depth**-0.5 if scale is None else scale])}, "scale"),
        )
        # The heads' results of a token lie one after another.
        return self._give(step.name, [row], (0, 1, 3, 2, 4))


def _pixels(shape: Shape) -> int:
    images, _, height, width = shape
    return images * height * width


def _window(geometry: Geometry) -> tuple[int, ...]:
    return (*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups)
