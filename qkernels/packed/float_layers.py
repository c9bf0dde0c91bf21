"""What stays float in a packed ensemble, of M members side by side: images are [M * N, ...], member after member.

With `shared` all members see the same [N, ...]. Each layer takes its tensors stacked, [M, ...].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.geometry import Geometry


def by_member(x: Tensor, members: int, shared: bool) -> Tensor:
    """[M, N, ...] of images [M * N, ...], or of the [N, ...] that all members share."""
    return x.expand(members, *x.shape) if shared else x.unflatten(0, (members, -1))


class StackedConv2d(nn.Module):
    """Float convolutions: weight [M, C_out, C_in / groups, h, w], bias [M, C_out] or None. They run one by one."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, tf_same: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.geometry = geometry
        self.tf_same = tf_same
        self.shared = False

    @torch.no_grad()
    def rescale_(self, factor: Tensor, shift: Tensor) -> None:
        """Fold y * factor + shift (float64 [M, C_out]) into weight and bias."""
        bias = 0 if self.bias is None else self.bias.double()
        self.bias = (bias * factor + shift).to(self.weight.dtype)
        self.weight = (self.weight.double() * factor[:, :, None, None, None]).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry.tf_same(*x.shape[2:]) if self.tf_same else self.geometry
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
        return torch.cat(results)


class StackedLinear(nn.Module):
    """Float linear layers: weight [M, out, in], bias [M, out] or None; one batched product."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.shared = False

    def forward(self, x: Tensor) -> Tensor:
        members, out, _ = self.weight.shape
        rows = by_member(x, members, self.shared)
        y = rows.flatten(1, -2) @ self.weight.to(x.dtype).mT
        if self.bias is not None:
            y = y + self.bias[:, None].to(x.dtype)
        return y.view(*rows.shape[:-1], out).flatten(0, 1)


class StackedNorm(nn.Module):
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
        kind: Literal["batch", "group", "layer", "layer2d"],
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
        self.shared = False

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.shape[1:]
        if self.kind == "group":
            x = F.group_norm(x, self.groups, eps=self.eps)
        elif self.kind == "layer":
            x = F.layer_norm(x, channels, eps=self.eps)
        elif self.kind == "layer2d":
            x = F.layer_norm(x.movedim(1, -1), channels, eps=self.eps).movedim(-1, 1)
        members = self.weight.shape[0]
        images = by_member(x, members, self.shared)
        ones = [1] * (images.dim() - 2 - len(channels))
        shape = (members, 1, *ones, *channels) if self.kind == "layer" else (members, 1, *channels, *ones)
        y = images * self.weight.to(x.dtype).view(shape) + self.bias.to(x.dtype).view(shape)
        return y.flatten(0, 1)


class StackedConstant(nn.Module):
    """A parameter [M, 1, ...] that meets the images (a position embedding, a layer's scale): [M * N, ...]."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """The value repeated for the images of x [M * N, ...]."""
        members = self.value.shape[0]
        images = x.shape[0] // members
        return self.value.expand(members, images, *self.value.shape[2:]).flatten(0, 1).to(x.dtype)


class Repeat(nn.Module):
    """Images that all members share, [N, ...], once for each member: [M * N, ...]."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self.members, *x.shape).flatten(0, 1)
