"""What stays float in a packed ensemble, of M members side by side: images are [M, N, ...].

With `shared` all members see the same [N, ...]. Each layer takes its tensors stacked, [M, ...].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.geometry import Geometry, conv_geometry
from .kinds import Expected, LayerKind, ProgramError, Settings, geometry_settings
from .values import DTYPES

Stack = Callable[[Sequence[Any]], nn.Module]  # M layers to one


class FloatForm(NamedTuple):
    """What stacks layers of one type.

    Attributes:
        stack: makes one of M.
        fits: whether a layer of the type is of the kind that `stack` knows.
        forward: what the layer computes, where its own forward does more; `children` follow.
    """

    stack: Stack
    fits: Callable[[Any], bool] = lambda layer: True
    forward: Callable[..., Any] | None = None
    children: tuple[str, ...] = ()


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The members' tensors as one, [M, ...]; None where they have none."""
    there = [t.detach() for t in tensors if t is not None]
    return torch.stack(there) if there else None


def affine(layers: Sequence[Any], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weight and bias [M, *shape] of norms, constants where they have none."""
    weights = [torch.ones(*shape) if layer.weight is None else layer.weight.detach() for layer in layers]
    biases = [torch.zeros(*shape) if layer.bias is None else layer.bias.detach() for layer in layers]
    return torch.stack(weights), torch.stack(biases)


def check_bias(weight: Tensor, bias: Tensor | None) -> None:
    """A bias [M, out] beside a weight [M, out, ...]."""
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ProgramError(f"has weight {list(weight.shape)} and bias {list(bias.shape)}")


def elements_of_conv(g: Geometry, out_channels: int, channels: int, height: int, width: int) -> int:
    """Of the result of a convolution of one image, and of the copy of the image with its padding."""
    top, left, bottom, right = g.padding
    h, w = g.output_size(height, width)
    repeated = out_channels // g.groups if g.groups == channels else 1  # channels of a depthwise one
    return channels * max(1, repeated) * (height + top + bottom) * (width + left + right) + out_channels * max(h * w, 0)


def by_member(x: Tensor, members: int, shared: bool) -> Tensor:
    """[M, N, ...] of such images, or of the [N, ...] that all members share."""
    return x.expand(members, *x.shape) if shared else x


class StackedConv2d(LayerKind):
    """Float convolutions: weight [M, C_out, C_in / groups, h, w], bias [M, C_out] or None. They run one by one."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, tf_same: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.geometry = geometry
        self.tf_same = tf_same

    @classmethod
    def from_layers(cls, layers: Sequence[Any], padding: int | tuple[int, int] | str | None = None) -> "StackedConv2d":
        """One convolution a member, alike in everything but their weights; `padding` stands instead of their own."""
        first = layers[0]
        if first.padding_mode != "zeros":
            raise ValueError(f"a float convolution with padding_mode={first.padding_mode!r} has no stacked form")
        padding = first.padding if padding is None else padding
        geometry = conv_geometry(first.kernel_size, first.stride, padding, first.dilation, first.groups)
        weight, bias = stacked([layer.weight for layer in layers]), stacked([layer.bias for layer in layers])
        assert weight is not None
        return cls(weight, bias, geometry, padding == "tf_same")

    def settings(self) -> dict[str, Any]:
        return geometry_settings(self.geometry) | {"tf_same": self.tf_same}

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "StackedConv2d":
        return cls(torch.empty(0), torch.empty(0), settings.geometry(), settings.flag("tf_same"))

    def expected(self, members: int) -> dict[str, Expected]:
        return {
            "weight": Expected(None, [members, None, None, *self.geometry.kernel]),
            "bias": Expected(None, [members, None], optional=True),
        }

    def check(self) -> None:
        check_bias(self.weight, self.bias)

    @torch.no_grad()
    def rescale_(self, factor: Tensor, shift: Tensor) -> None:
        """Fold y * factor + shift (float64 [M, C_out]) into weight and bias."""
        bias = 0 if self.bias is None else self.bias.double()
        self.bias = (bias * factor + shift).to(self.weight.dtype)
        self.weight = (self.weight.double() * factor[:, :, None, None, None]).to(self.weight.dtype)

    def most_elements(self, x: Tensor) -> int:
        members, out = self.weight.shape[:2]
        images = math.prod(x.shape[:-3]) * (members if self.shared else 1)
        # Each member's result, and all of them together.
        return self.weight.numel() + 2 * images * elements_of_conv(self._geometry(x), out, *x.shape[-3:])

    def _geometry(self, x: Tensor) -> Geometry:
        return self.geometry.tf_same(*x.shape[-2:]) if self.tf_same else self.geometry

    def forward(self, x: Tensor) -> Tensor:
        g = self._geometry(x)
        top, left, bottom, right = g.padding
        results = [
            F.conv2d(
                F.pad(images, (left, right, top, bottom)),
                weight.to(x.dtype),
                None if self.bias is None else self.bias[member].to(x.dtype),
                g.stride,
                0,
                g.dilation,
                g.groups,
            )
            for member, (images, weight) in enumerate(
                zip(by_member(x, self.weight.shape[0], self.shared), self.weight, strict=True)
            )
        ]
        return torch.stack(results)


class StackedLinear(LayerKind):
    """Float linear layers: weight [M, out, in], bias [M, out] or None; one batched product."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def from_layers(cls, layers: Sequence[Any]) -> "StackedLinear":
        """One linear layer a member."""
        weight, bias = stacked([layer.weight for layer in layers]), stacked([layer.bias for layer in layers])
        assert weight is not None
        return cls(weight, bias)

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "StackedLinear":
        return cls(torch.empty(0), torch.empty(0))

    def expected(self, members: int) -> dict[str, Expected]:
        return {
            "weight": Expected(None, [members, None, None]),
            "bias": Expected(None, [members, None], optional=True),
        }

    def check(self) -> None:
        check_bias(self.weight, self.bias)

    def most_elements(self, x: Tensor) -> int:
        members, out, depth = self.weight.shape
        rows = x.numel() // max(1, depth) * (members if self.shared else 1)
        return self.weight.numel() + 2 * rows * out

    def forward(self, x: Tensor) -> Tensor:
        members, out, depth = self.weight.shape
        images = by_member(x, members, self.shared)
        y = images.reshape(members, -1, depth) @ self.weight.to(x.dtype).mT
        if self.bias is not None:
            y = y + self.bias[:, None].to(x.dtype)
        return y.view(*images.shape[:-1], out)


Kind = Literal["batch", "group", "layer", "layer2d"]


class StackedNorm(LayerKind):
    """Batch norm (in eval mode), group norm or layer norm, with each member's own weight and bias.

    Args:
        kind: "batch" is the affine map alone, into which the statistics are folded; "group" and "layer" normalize each
            image by itself; "layer2d" is layer norm over the channels of [N, C, H, W].
        weight, bias: [M, C], for "layer" [M, *normalized shape].
        groups: of group norm.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        kind: Kind,
        weight: Tensor,
        bias: Tensor,
        eps: float = 0.0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.groups = groups
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def from_batch_norms(cls, layers: Sequence[Any]) -> "StackedNorm":
        """Batch norms as in eval mode, in float64 until they are folded or found to stay."""
        factors, shifts = [], []
        for layer in layers:
            if layer.running_mean is None:
                raise ValueError("it has no running statistics: its result depends on the batch")
            mean = layer.running_mean.double()
            weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().double()
            bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
            factor = weight / (layer.running_var.double() + layer.eps).sqrt()
            factors.append(factor)
            shifts.append(bias - mean * factor)
        return cls("batch", torch.stack(factors), torch.stack(shifts))

    @classmethod
    def from_group_norms(cls, layers: Sequence[Any]) -> "StackedNorm":
        first = layers[0]
        return cls("group", *affine(layers, (first.num_channels,)), first.eps, first.num_groups)

    @classmethod
    def from_layer_norms(cls, layers: Sequence[Any]) -> "StackedNorm":
        return cls("layer", *affine(layers, layers[0].normalized_shape), layers[0].eps)

    @classmethod
    def from_images_layer_norms(cls, layers: Sequence[Any]) -> "StackedNorm":
        """Of layer norms over the channels of [N, C, H, W]."""
        return cls("layer2d", *affine(layers, layers[0].normalized_shape), layers[0].eps)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "eps": self.eps, "groups": self.groups}

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> "StackedNorm":
        kind, nothing = settings.choice("kind", ("batch", "group", "layer", "layer2d")), torch.empty(0)
        return cls(kind, nothing, nothing, settings.share("eps"), settings.number("groups"))

    def expected(self, members: int) -> dict[str, Expected]:
        return {name: Expected(None, [members, ...]) for name in ("weight", "bias")}

    def check(self) -> None:
        if self.weight.shape != self.bias.shape:
            raise ProgramError(f"has weight {list(self.weight.shape)} and bias {list(self.bias.shape)}")

    def most_elements(self, x: Tensor) -> int:
        return 3 * x.numel() * (self.weight.shape[0] if self.shared else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the dimensions on which a member's norm acts: with "layer" the last ones, else the one after N."""
        members, *channels = self.weight.shape
        x = by_member(x, members, self.shared)
        if self.kind == "group":
            x = F.group_norm(x.flatten(0, 1), self.groups, eps=self.eps).view(x.shape)
        elif self.kind == "layer":
            x = F.layer_norm(x, channels, eps=self.eps)
        elif self.kind == "layer2d":
            x = F.layer_norm(x.movedim(2, -1), channels, eps=self.eps).movedim(-1, 2)
        ones = [1] * (x.dim() - 2 - len(channels))
        shape = (members, 1, *ones, *channels) if self.kind == "layer" else (members, 1, *channels, *ones)
        if self.kind == "layer" and x.dim() - 1 == len(channels):
            shape = (members, *channels)  # of a single image
        return x * self.weight.to(x.dtype).view(shape) + self.bias.to(x.dtype).view(shape)


class Constant(LayerKind):
    """What meets images and does not come from them, be it of floats or, as an index, of integers."""

    shares: ClassVar[bool] = False
    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    @classmethod
    def from_settings(cls, settings: Settings, members: int) -> Self:
        return cls(torch.empty(0))

    def most_elements(self, x: Tensor) -> int:
        return 2 * self.value.numel() * max(1, x.shape[0])  # in files of version 1 once for each image

    def forward(self, x: Tensor) -> Tensor:
        """The value, where it is of floats in the dtype of x."""
        return self.value.to(x.dtype) if self.value.is_floating_point() else self.value


class StackedConstant(Constant):
    """What each member has of its own, such as a position embedding: [M, *its shape]."""

    def expected(self, members: int) -> dict[str, Expected]:
        return {"value": Expected(tuple(DTYPES.values()), [members, ...], finite=False)}


class SharedConstant(Constant):
    """What is the same for all members, such as a table of indices: in its own shape."""

    gives_own: ClassVar[bool] = False

    def expected(self, members: int) -> dict[str, Expected]:
        return {"value": Expected(tuple(DTYPES.values()), [...], finite=False)}
