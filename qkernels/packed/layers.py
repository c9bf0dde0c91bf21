"""PackedConv2d and PackedLinear, the kinds of packed layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.geometry import Geometry, conv_geometry
from ..ops.packed_gemv import packed_gemv
from ..quantize.layers import QuantizedLayer
from .float_layers import elements_of_conv
from .kinds import ProgramError, Settings, geometry_settings
from .packed_layer import INTEGERS, PackedLayer, bits_of, images_of

GEMV_ROWS = 8  # of a member, up to which `packed_gemv` multiplies


class PackedConv2d(PackedLayer):
    """The packed nn.Conv2d of M members: takes its arguments (as pairs or numbers), and each member's bits.

    Args:
        padding: as for nn.Conv2d; "tf_same" is TensorFlow's, computed from the input's size (timm's Conv2dSame).
        bits: one number for a single member, or one a member.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bits: int | Sequence[int] = 7,
    ) -> None:
        geometry = conv_geometry(kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, geometry, bias, [bits] if isinstance(bits, int) else bits)
        self.tf_same = padding == "tf_same"
        self.padding_mode = padding_mode

    @classmethod
    def from_layers(
        cls, layers: Sequence[QuantizedLayer], padding: int | tuple[int, int] | str | None = None
    ) -> "PackedConv2d":
        """Pack one quantized convolution a member; they agree in everything but their weights, scales and bits.

        Args:
            padding: instead of the layers' own.
        """
        first: Any = layers[0]
        layer = cls(
            first.in_channels,
            first.out_channels,
            first.kernel_size,
            first.stride,
            first.padding if padding is None else padding,
            first.dilation,
            first.groups,
            first.bias is not None,
            first.padding_mode,
            bits=[member.weight_quantizer.bits for member in layers],
        )
        layer.fill_(layers)
        return layer

    def settings(self) -> dict[str, Any]:
        own = {"tf_same": self.tf_same, "padding_mode": self.padding_mode}
        return super().settings() | geometry_settings(self.geometry) | own

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "PackedConv2d":
        sizes, geometry = (settings.number("in_channels"), settings.number("out_channels")), settings.geometry()
        if sizes[0] % geometry.groups or sizes[1] % geometry.groups:
            raise ProgramError(f"{sizes} channels do not divide into {geometry.groups} groups")
        layer = cls(*sizes, geometry.kernel, groups=geometry.groups, bits=bits_of(settings, members))
        layer.geometry, layer.tf_same = geometry, settings.flag("tf_same")
        layer.padding_mode = settings.choice("padding_mode", ("zeros", "reflect", "replicate", "circular"))
        layer._follow(settings)
        return layer

    def geometry_of(self, height: int, width: int) -> Geometry:
        return self.geometry.tf_same(height, width) if self.tf_same else self.geometry

    def most_elements(self, x: Tensor, residual: Tensor | None = None) -> int:
        geometry = self.geometry_of(*x.shape[-2:])
        images = math.prod(x.shape[:-3]) * (self.members if self.shared else 1)
        return 2 * images * elements_of_conv(geometry, self.out_channels, *x.shape[-3:])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Images or codes [M, N, C_in, H, W], or [N, ...] where they are shared, to [M, N, C_out, H', W'].

        `residual` [M, N, ...] is added before the activation and broadcasts to the result.
        """
        geometry, lead = self.geometry_of(*x.shape[-2:]), self._lead(x.shape[:-3])
        contiguous = self.like_torch and x.is_contiguous()
        x = x.reshape(-1, *x.shape[-3:])
        residual = None if residual is None else residual.reshape(-1, *residual.shape[-3:])
        if not self.tf_same and self.padding_mode != "zeros" and any(geometry.padding):
            top, left, bottom, right = geometry.padding
            # F.pad reflects no integers.
            padded = F.pad(x.float() if x.dtype in INTEGERS else x, (left, right, top, bottom), self.padding_mode)
            x = padded.to(x.dtype)
            geometry = replace(geometry, padding=(0, 0, 0, 0))
        y = self._convolve(x, residual, geometry)
        y = y.contiguous() if contiguous else y
        return y.reshape(*lead, *y.shape[1:])


class PackedLinear(PackedLayer):
    """The packed nn.Linear of M members, [M, ..., in] to [M, ..., out]: a convolution of 1x1 images."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, bits: int | Sequence[int] = 7
    ) -> None:
        super().__init__(in_features, out_features, Geometry(), bias, [bits] if isinstance(bits, int) else bits)

    @classmethod
    def from_layers(cls, layers: Sequence[QuantizedLayer]) -> "PackedLinear":
        """Pack one quantized linear layer a member."""
        first: Any = layers[0]
        bits = [member.weight_quantizer.bits for member in layers]
        layer = cls(first.in_features, first.out_features, first.bias is not None, bits=bits)
        layer.fill_(layers)
        return layer

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "PackedLinear":
        sizes = settings.number("in_channels"), settings.number("out_channels")
        layer = cls(*sizes, bits=bits_of(settings, members))
        layer._follow(settings)
        return layer

    @property
    def weight(self) -> Tensor:
        return super().weight.flatten(1)

    def most_elements(self, x: Tensor, residual: Tensor | None = None) -> int:
        rows = x.numel() // self.in_channels * (self.members if self.shared else 1)
        return rows * (self.in_channels + 2 * self.out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Floats or codes [M, ..., in], or [...] where they are shared, to [M, ..., out]: whatever rows there are.

        `residual` has the result's shape and is added before the activation.
        """
        rows = x.reshape(-1, self.in_channels)
        if self.multiplies(rows.shape[0], residual is not None):
            y = self._multiply(rows)
        else:
            added = None if residual is None else residual.reshape(-1, self.out_channels, 1, 1)
            y = self._convolve(rows[:, :, None, None], added, self.geometry)
        return y.reshape(*self._lead(x.shape[:-1]), self.out_channels)

    def multiplies(self, rows: int, adds: bool) -> bool:
        """Whether so many rows are few enough for `packed_gemv`, which adds no residual."""
        return self.input_scale is None and not adds and rows <= GEMV_ROWS * (1 if self.shared else self.members)

    def _multiply(self, rows: Tensor) -> Tensor:
        """Few rows [M * N, in] to [M * N, out]."""
        results = []
        for run in self.runs:
            packed = self.weight_packed[run.bytes].view(run.members.stop - run.members.start, -1)
            bias = None if self.biases is None else self.biases[run.members]
            x = rows if self.shared else images_of(rows, self.members, run.members)
            scale = self.weight_scale[run.members]
            results.append(
                packed_gemv(x, packed, scale, bias, run.bits, shared=self.shared, activation=self.activation)
            )
        return results[0] if len(results) == 1 else torch.cat(results)
