"""What the reference of `packed_network` asks of a table: as csrc/cpu/packed_network.cpp does."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import KERNEL_DTYPES
from .packed_conv2d import MOST_TERMS
from .packed_network import ACTIVATION_NUMBERS, DTYPES, FIELDS, KINDS
from .packing import packed_bytes

MOST_SIZE = 2**40  # of a number in the table
CODES = (torch.int8, torch.uint8)

Shape = tuple[int, int, int, int]


class Row(dict[str, int]):
    """One row of a table, and the values that are there when it runs.

    Attributes:
        inputs: the values before those of the rows.
        shape, dtype: of the result.
    """

    def __init__(self, index: int, numbers: Sequence[int], values: Sequence[Tensor], inputs: int) -> None:
        super().__init__(zip(FIELDS, numbers, strict=True))
        self._index, self._values, self.inputs = index, values, inputs
        self.check(max(map(abs, numbers)) <= MOST_SIZE, "has a number out of range")
        dtypes = [dtype for dtype, number in DTYPES.items() if number == self["dtype"]]
        self.check(bool(dtypes), "has a dtype of neither codes nor floats")
        self.dtype = dtypes[0]
        self.shape: Shape = (self["images"], self["channels"], self["height"], self["width"])
        self.check(min(self.shape) > 0, "has a size that is too small")

    def check(self, right: bool, what: str) -> None:
        """Raises ValueError."""
        if not right:
            raise ValueError(f"packed_network: row {self._index} {what}")

    def value(self, field: str) -> Tensor:
        """x, or the residual."""
        there = len(self._values) - (1 if self["part"] else 0)
        self.check(0 <= self[field] < there, "takes what is not there")
        return self._values[self[field]]

    def some_floats(self, field: str, constants: Sequence[Tensor], each: int = 1) -> Tensor:
        """`floats` of a constant that there must be."""
        constant = self.floats(field, constants, each)
        if constant is None:
            raise ValueError(f"packed_network: row {self._index} takes a constant that is not there")
        return constant

    def floats(self, field: str, constants: Sequence[Tensor], each: int = 1) -> Tensor | None:
        """What the row's members have of a constant, [members, each]."""
        if self[field] < 0:
            return None
        self.check(self[field] < len(constants), "takes a constant that is not there")
        constant, begin = constants[self[field]].reshape(-1), self["member"] * each
        end = begin + self["members"] * each
        right = constant.dtype == torch.float32 and end <= constant.numel()
        self.check(right, "takes more of a constant than is there")
        return constant[begin:end].view(self["members"], each)

    def weights(self, constants: Sequence[Tensor], window: int) -> Tensor:
        """The packed codes of the row's members, each channel having `window`."""
        self.check(2 <= self["bits"] <= 8 and self["byte"] >= 0, "has bits that are not 2..8, or no byte")
        self.check(0 <= self["packed"] < len(constants), "takes a constant that is not there")
        constant = constants[self["packed"]].reshape(-1)
        size = packed_bytes(self["channels"] * window, self["bits"])
        end = self["byte"] + self["members"] * size
        self.check(constant.dtype == torch.uint8 and end <= constant.numel(), "takes more weights than there are")
        if self["panels"] >= 0:
            self.check(self["panels"] < len(constants), "takes a constant that is not there")
            panels, last = constants[self["panels"]], self["member"] + self["members"]
            right = panels.dtype == torch.uint8 and panels.dim() == 2 and last <= panels.shape[0]
            self.check(right, "takes more panels than there are")
        return constant[self["byte"] : end].view(self["members"], size)


def check_begin(row: Row, complete: bool, given: Tensor | None, images: int) -> None:
    """`given`: what earlier parts gave of the row's result, which has so many `images`."""
    row.check(0 <= row["kind"] < len(KINDS), "is of an unknown kind")
    last = len(row._values) - 1
    if given is None:
        row.check(row["result"] == last + 1 and complete, "begins a result that is not the next")
    else:
        row.check(last >= row.inputs and row["result"] == last, "goes on with another result")
        right = row.shape == (images, *given.shape[1:]) and row.dtype == given.dtype
        row.check(right, "goes on with another result")


def check_whole(row: Row, written: int, images: int) -> None:
    """Of a row that gives all of its result's images."""
    whole = row["first"] == written == 0 and row["images"] == images
    row.check(whole, "does not go on where the one before it ended")


def check_quantize(row: Row, x: Tensor) -> None:
    """Of a row that quantizes x."""
    row.check(row["members"] > 0, "has a size that is too small")
    row.check(x.dtype in KERNEL_DTYPES and row.dtype in CODES, "quantizes codes, or to floats")
    images = row.shape[0]
    right = images in (x.shape[0], row["members"] * x.shape[0]) and images % row["members"] == 0
    row.check(right and row.shape[1:] == tuple(x.shape[1:]), "quantizes to another shape")
    check_range(row)


def check_range(row: Row) -> None:
    """Of the result's codes."""
    least, most = (-128, 127) if row.dtype == torch.int8 else (0, 255)
    right = least <= row["qmin"] < row["qmax"] <= most
    row.check(row.dtype not in CODES or right, "has a range of codes that its dtype does not hold")


def check_window(row: Row, x: Tensor) -> None:
    """That the windows lie in the image and its padding."""
    least = {"images_of_member": 1, "kernel": 1, "stride": 1, "pad": 0, "dilation": 1, "groups": 1}
    for name in FIELDS:
        key = name if name in least else name.partition("_")[0]
        row.check(key not in least or row[name] >= least[key], "has a size that is too small")
    for d, (axis, before, after) in enumerate((("h", "pad_top", "pad_bottom"), ("w", "pad_left", "pad_right"))):
        reach = (row.shape[2 + d] - 1) * row[f"stride_{axis}"] + (row[f"kernel_{axis}"] - 1) * row[f"dilation_{axis}"]
        inside = reach < x.shape[2 + d] + row[before] + row[after]
        row.check(inside, "has windows that reach behind the image")
    divides = x.shape[1] % row["groups"] == 0 and row.shape[1] % row["groups"] == 0
    row.check(divides, "has channels that do not divide by its groups")


def check_pool(row: Row, x: Tensor) -> None:
    """Of a max pool of x."""
    check_window(row, x)
    sides = (("top", "h"), ("left", "w"), ("bottom", "h"), ("right", "w"))
    row.check(
        x.dtype in CODES
        and x.dtype == row.dtype
        and tuple(x.shape[:2]) == row.shape[:2]
        and row["images_of_member"] == x.shape[0]
        and all(row[f"pad_{side}"] < row[f"kernel_{axis}"] for side, axis in sides)
        and row["dilation_h"] == row["dilation_w"] == 1,
        "is no max pool of codes",
    )


def check_mean(row: Row, x: Tensor) -> None:
    """Of a mean over x's pixels."""
    right = _float32(x, row) and row.shape == (*x.shape[:2], 1, 1)
    row.check(right, "is no mean of images of float32")


def check_gate(row: Row, x: Tensor, factors: Tensor) -> None:
    """Of a product of x and a factor for each of its channels."""
    row.check(_float32(x, factors, row) and row.shape == tuple(x.shape), "is no product of images of float32")
    right = tuple(factors.shape) == (*x.shape[:2], 1, 1)
    row.check(right, "has other factors than one for each channel of an image")


def check_norm(row: Row, x: Tensor) -> None:
    """Of a layer norm of x."""
    row.check(row["members"] > 0, "has a size that is too small")
    right = _float32(x, row) and row.shape == tuple(x.shape) and x.shape[0] % row["members"] == 0
    row.check(right, "is no norm of float32")


def check_attend(row: Row, x: Tensor) -> None:
    """Of attention in x."""
    row.check(row["heads"] > 0 and row["tokens"] > 0, "has a size that is too small")
    images, channels, *pixels = row.shape
    right = (
        _float32(x, row)
        and (images, *pixels) == (x.shape[0], *x.shape[2:])
        and math.prod((images, *pixels)) % row["tokens"] == 0
        and channels % row["heads"] == 0
    )
    row.check(right, "is no attention of tokens of float32")
    there = all(0 <= row[name] <= x.shape[1] - channels for name in ("query", "key", "value"))
    row.check(there, "takes channels that are not there")


def _float32(*values: Tensor | Row) -> bool:
    return all(value.dtype == torch.float32 for value in values)


def check_convolve(row: Row, x: Tensor, written: int, images: int) -> None:
    """Of a convolution of x, the first `written` of whose `images` are there."""
    row.check(row["members"] > 0 and row["member"] >= 0, "has a size that is too small")
    check_window(row, x)
    gives = row["members"] * row["images_of_member"]
    row.check(row["first"] == written, "does not go on where the one before it ended")
    row.check(written + gives <= images, "gives more images than its result has")
    there = x.shape[0] == row["images_of_member"] if row["shared"] else written + gives <= x.shape[0]
    row.check(there, "takes more images than there are")
    row.check(0 <= row["activation"] < len(ACTIVATION_NUMBERS), "has an unknown activation")
    check_range(row)
    residual = row.value("residual") if row["residual"] >= 0 else None
    if residual is not None:
        right = tuple(residual.shape) == (images, *row.shape[1:])
        row.check(right, "adds a residual of another shape")
    pairs = ((x, "x_scale"), (residual, "residual_scale"), (row, "out_scale"))
    for t, name in pairs:
        has = t is not None and t.dtype in CODES
        row.check(has == (row[name] >= 0), f"has an {name} and no codes, or codes and none")
    if x.dtype not in CODES:
        row.check(residual is None or residual.dtype == x.dtype, "adds a residual of another dtype")
        row.check(row.dtype == x.dtype, "gives another dtype than it takes")
    terms = math.prod(row[name] for name in ("kernel_h", "kernel_w")) * (x.shape[1] // row["groups"])
    row.check(x.dtype not in CODES or terms <= MOST_TERMS, "has sums that may exceed int32")
