"""Bytes and operations of each op: the least that any implementation must move and compute.

Bytes are those of all tensors that go in and come out, each once. Operations are counted per element as the formulas of
`qkernels/ops/reference.py` have them; a multiplication with its addition counts as two.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_network import FIELDS, KINDS
from qkernels.ops.reference import plane_widths

QUANTIZE = 4  # divide, clamp from below and above, round
FAKE_QUANTIZE = QUANTIZE + 1  # and multiply by the scale
BACKWARD = QUANTIZE + 5  # two comparisons, the selection of grad, the term of the scale, its product with grad


class Cost(NamedTuple):
    """What one call costs at least; `rate` names the arithmetic: a dtype's name."""

    bytes: int
    operations: int
    rate: str


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def elements(tensors: Any) -> int:
    """Elements of a tensor, or of all tensors in a list."""
    return sum(t.numel() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def planes(codes: Tensor, bits: int) -> int:
    """Packing takes a mask, a shift and an or for each plane of a code; unpacking the same."""
    return 3 * len(plane_widths(bits)) * codes.numel()


def products(x: Tensor, out: Tensor, geometry: Geometry) -> int:
    """Operations of a convolution."""
    _, height, width, depth = geometry.weight_shape(out.shape[1], x.shape[1])
    return 2 * out.numel() * height * width * depth


def rows_of(steps: Tensor) -> list[dict[str, int]]:
    """Of a table of packed_network."""
    return [dict(zip(FIELDS, numbers, strict=True)) for numbers in steps.tolist()]


def operations_of_rows(inputs: list[Tensor], steps: Tensor) -> int:
    """Of all rows of packed_network; a maximum is one operation, a norm eight for each element."""
    shapes = [tuple(x.shape) for x in inputs]
    total = 0
    for row in rows_of(steps):
        kind, pixels = KINDS[row["kind"]], row["channels"] * row["height"] * row["width"]
        taps = row["kernel_h"] * row["kernel_w"]
        _, depth, height, width = shapes[row["x"]]
        if kind == "convolve":
            total += 2 * row["members"] * row["images_of_member"] * pixels * taps * depth // row["groups"]
        else:
            of_result = {"quantize": QUANTIZE, "max_pool": taps, "mean": height * width, "gate": 1, "norm": 8}
            total += row["images"] * pixels * of_result.get(kind, 4 * row["tokens"])  # of attention, its products
        if row["part"] == 0:
            shapes.append((row["images"], row["channels"], row["height"], row["width"]))
    return total


OPERATIONS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {  # from the arguments of the schema, and the result
    "fake_quantize": lambda a, y: FAKE_QUANTIZE * elements(y),
    "fake_quantize_backward": lambda a, y: BACKWARD * elements(a[0]),
    "fake_quantize_multi": lambda a, y: FAKE_QUANTIZE * elements(y),
    "fake_quantize_multi_backward": lambda a, y: BACKWARD * elements(a[0]),
    "mean_abs": lambda a, y: 2 * elements(a[0]),
    "pack": lambda a, y: planes(a[0], a[1]),
    "unpack": lambda a, y: planes(y, a[1]),
    "quantize": lambda a, y: QUANTIZE * elements(y),
    "dequantize_packed": lambda a, y: planes(y, a[2]) + y.numel(),
    "packed_conv2d": lambda a, y: products(a[0], y, Geometry.of(*a[6:11])),
    "packed_conv2d_int8": lambda a, y: products(a[0], y, Geometry.of(*a[9:14])),
    "packed_gemv": lambda a, y: 2 * y.numel() * a[0].shape[1],
    "packed_panels": lambda a, y: planes(y, a[3]),
    "packed_network": lambda a, y: operations_of_rows(a[0], a[2]),
}


def rate_of(op: str, arguments: tuple[Any, ...]) -> str:
    """Products run at the rate of the activations' dtype, everything else in float32."""
    if op == "packed_conv2d_int8":
        return "int8"
    if op == "packed_network":
        return (
            "int8" if any(row["x_scale"] >= 0 for row in rows_of(arguments[2])) else dtype_name(arguments[0][0].dtype)
        )
    if op in ("packed_conv2d", "packed_gemv"):
        return dtype_name(arguments[0].dtype)
    return "float32"


def cost_of(op: str, arguments: tuple[Any, ...], result: Any) -> Cost:
    """The cost of one call of an op of qkernels, from its arguments in the schema's order."""
    moved = sum(t.nbytes for t in tree_leaves((arguments, result)) if isinstance(t, Tensor))
    return Cost(moved, OPERATIONS[op](arguments, result), rate_of(op, arguments))


class counted(TorchDispatchMode):
    """Within, collects the cost of every op of qkernels that runs; iterate over it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "qkernels":
            self.costs.append(cost_of(func._opname, args, result))
        return result

    def __iter__(self) -> Iterator[Cost]:
        return iter(self.costs)


def roofline_seconds(costs: list[Cost], roofline: dict[str, float]) -> float:
    """The time of these calls one after another on a machine that reaches its roofline in each.

    Args:
        roofline: bytes a second as "bandwidth", operations a second by dtype; see `roofline.py`.
    """
    return sum(
        max(c.bytes / roofline["bandwidth"], c.operations / roofline.get(c.rate, roofline["float32"])) for c in costs
    )
