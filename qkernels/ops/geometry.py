"""The shape of a convolution."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.modules.utils import _pair


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution, each pair (height, width); padding is zeros at (top, left, bottom, right)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the ops' schemas."""
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> "Geometry":
        """From the arguments of an op, which come as lists."""
        return cls(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        (kernel_h, kernel_w), (stride_h, stride_w), (dilation_h, dilation_w) = self.kernel, self.stride, self.dilation
        return (
            (height + top + bottom - dilation_h * (kernel_h - 1) - 1) // stride_h + 1,
            (width + left + right - dilation_w * (kernel_w - 1) - 1) // stride_w + 1,
        )

    def tf_same(self, height: int, width: int) -> "Geometry":
        """With TensorFlow's "same" padding for an image of this size (timm's Conv2dSame)."""
        total = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, k, s, d in zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        ]
        top, left = total[0] // 2, total[1] // 2
        return replace(self, padding=(top, left, total[0] - top, total[1] - left))

    def weight_shape(self, out_channels: int, in_channels: int) -> tuple[int, int, int, int]:
        """[out, kernel_h, kernel_w, in / groups], the order in which the codes of a weight are packed."""
        return out_channels, *self.kernel, in_channels // self.groups


def conv_geometry(
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Geometry:
    """The Geometry of nn.Conv2d's arguments; for "tf_same", which needs the image's size, without its padding."""
    kernel, strides, dilations = _pair(kernel_size), _pair(stride), _pair(dilation)
    for pair in (kernel, strides, dilations, (0, 0) if isinstance(padding, str) else _pair(padding)):
        if len(pair) != 2:
            raise ValueError(f"a convolution of images takes pairs of numbers, not {pair}")
    if padding == "same":
        # PyTorch puts the odd pixel at the end.
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        edges = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    elif isinstance(padding, str):
        if padding not in ("valid", "tf_same"):
            raise ValueError(f"padding {padding!r} is neither numbers nor 'same', 'valid' or 'tf_same'")
        edges = (0, 0, 0, 0)
    else:
        edges = (*_pair(padding), *_pair(padding))
    return Geometry(kernel, strides, edges, dilations, groups)
