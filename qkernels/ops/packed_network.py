"""`packed_network`: successive packed layers in one call. Not differentiable.

Between the layers there is no Python, no allocation and no start of threads. What is computed is what the ops of the
single layers compute, bit for bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import KERNEL_DTYPES
from .library import call, register_fake
from .packed_conv2d import ACTIVATIONS
from .transforms import unrecorded

ops = torch.ops.qkernels

# The columns of the table, in the order of csrc/cpu/packed_network.h.
FIELDS = (
    *("kind", "x", "residual", "result", "part", "dtype", "images", "channels", "height", "width"),
    *("first", "members", "member", "images_of_member", "shared", "bits", "byte"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left", "pad_bottom", "pad_right"),
    *("dilation_h", "dilation_w", "groups", "activation", "qmin", "qmax"),
    *("heads", "tokens", "query", "key", "value"),
    *("packed", "panels", "scale", "bias", "x_scale", "residual_scale", "out_scale"),
)
KINDS = ("quantize", "convolve", "max_pool", "mean", "gate", "norm", "attend")
ACTIVATION_NUMBERS = tuple(ACTIVATIONS)
# As the C++ numbers them.
DTYPES = {torch.uint8: 0, torch.int8: 1, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


class Row(NamedTuple):
    """One row of the table; values are numbered, the inputs first, and so are constants, -1 being none.

    Attributes:
        kind: "quantize" (x by `out_scale`), "convolve" (as `packed_conv2d`, of codes `packed_conv2d_int8`), "max_pool"
            (of codes); of float32 "mean" (of an image's pixels), "gate" (x times `residual`, which has one pixel),
            "norm" (layer norm over the channels, by `scale`, `bias` and the epsilon `x_scale`) and "attend" (softmax of
            queries times keys times the number `scale`, times values).
        x, residual: values.
        result: the value that comes of it: those of the rows are numbered one after another. Runs of members whose
            weights differ in bits give it in several rows, this one being `part`.
        dtype: of the result.
        shape: of the result, [images, channels, height, width].
        first: the first of its images that this row gives.
        members: that this row computes, from `member` on of those that the constants have.
        images_of_member: N.
        shared: every member sees the same x. Quantized with the scales of M members, x is repeated M times.
        packed: constant of uint8, the members' codes from `byte` on, `bits` each.
        panels: what `packed_panels` made of the codes of all members that the constants have, or none.
        window: kernel, stride, padding, dilation (as Geometry has them) and groups.
        code_range: of the result.
        heads, tokens: of attention, whose x has images * height * width / tokens sequences.
        query, key, value: the first of x's channels that are the heads' queries, keys and values.
        scale, bias, x_scale, residual_scale, out_scale: constants of float32, [M, C] the first two and else [M].
    """

    kind: str
    x: int
    result: int
    dtype: torch.dtype
    shape: Sequence[int]
    residual: int = -1
    part: int = 0
    first: int = 0
    members: int = 1
    member: int = 0
    images_of_member: int = 1
    shared: bool = False
    bits: int = 8
    byte: int = 0
    window: Sequence[int] = (1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    activation: str = "none"
    code_range: tuple[int, int] = (0, 255)
    heads: int = 1
    tokens: int = 1
    query: int = 0
    key: int = 0
    value: int = 0
    packed: int = -1
    panels: int = -1
    scale: int = -1
    bias: int = -1
    x_scale: int = -1
    residual_scale: int = -1
    out_scale: int = -1

    def numbers(self) -> list[int]:
        """In the order of FIELDS."""
        return [
            *(KINDS.index(self.kind), self.x, self.residual, self.result, self.part),
            *(DTYPES[self.dtype], *self.shape, self.first, self.members, self.member, self.images_of_member),
            *(int(self.shared), self.bits, self.byte, *self.window, ACTIVATION_NUMBERS.index(self.activation)),
            *(*self.code_range, self.heads, self.tokens, self.query, self.key, self.value),
            *(self.packed, self.panels, self.scale, self.bias, self.x_scale, self.residual_scale, self.out_scale),
        ]


def table(rows: Sequence[Row]) -> Tensor:
    """int64 [rows, FIELDS], what the op takes."""
    return torch.tensor([row.numbers() for row in rows], dtype=torch.int64)


def _check_packed_network(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    steps: Tensor,
    out_sizes: Sequence[int],
    out_dtype: torch.dtype,
) -> None:
    op = "packed_network"
    if not inputs:
        raise ValueError(f"{op}: there are no inputs")
    for x in inputs:
        if x.dim() != 4:
            raise ValueError(f"{op}: inputs must be [images, channels, height, width], got shape {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{op}: inputs must have elements, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: inputs must be codes or floats, got {x.dtype}")
    if steps.dtype != torch.int64 or steps.dim() != 2 or steps.shape[0] == 0 or steps.shape[1] != len(FIELDS):
        raise ValueError(
            f"{op}: steps must be an int64 table [steps, {len(FIELDS)}], got {steps.dtype} {tuple(steps.shape)}"
        )
    if len(out_sizes) != 4 or min(out_sizes) < 1:
        raise ValueError(f"{op}: out_sizes must be four positive numbers, got {list(out_sizes)}")
    if any(t.device != inputs[0].device for t in (*inputs, *constants)) or steps.device.type != "cpu":
        raise ValueError(f"{op}: inputs and constants must be on one device, and steps on the CPU")
    if out_dtype not in (torch.int8, torch.uint8, *KERNEL_DTYPES):
        raise TypeError(f"{op}: out_dtype must be of codes or floats, got {out_dtype}")


@register_fake("packed_network", _check_packed_network)
def _packed_network_fake(inputs, constants, steps, out_sizes, out_dtype):
    return inputs[0].new_empty(out_sizes, dtype=out_dtype).to(memory_format=torch.channels_last)


def packed_network(
    inputs: Sequence[Tensor], constants: Sequence[Tensor], steps: Tensor, out_sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The result of the last row of a table of layers; on CPU tensors.

    Args:
        inputs: codes or floats [images, channels, height, width].
        constants: what the rows take by number.
        steps: see `table`.
        out_sizes, dtype: of the result.

    Returns:
        `dtype` [images, channels, height, width], channels_last.

    Raises:
        RuntimeError: for a table that takes what is not there, or whose sizes do not fit each other; it names the row.
            By the reference a ValueError.
    """
    arguments = (list(inputs), list(constants), steps, list(out_sizes), dtype)
    return call("packed_network", partial(unrecorded, ops.packed_network.default), *arguments)
