"""`packed_gemv`: a linear layer of M members, made for few rows. Not differentiable."""

from functools import partial

import torch
from torch import Tensor

from .checks import check_element
from .geometry import Geometry
from .library import call, register_fake
from .packed_conv2d import Activation, check_conv
from .transforms import unrecorded

ops = torch.ops.qkernels


def _check_packed_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shared: bool, activation: str
) -> None:
    if x.dim() != 2:
        raise ValueError(f"packed_gemv: x must be [rows, in], got shape {tuple(x.shape)}")
    check_element("packed_gemv", "x", x.dtype)
    images = x[:, :, None, None]
    check_conv("packed_gemv", images, packed, scale, bias, None, bits, Geometry(), shared, activation)


@register_fake("packed_gemv", _check_packed_gemv)
def _packed_gemv_fake(x, packed, scale, bias, bits, shared, activation):
    return x.new_empty(x.shape[0] * (scale.shape[0] if shared else 1), scale.shape[1])


def packed_gemv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    *,
    shared: bool = False,
    activation: Activation = "none",
) -> Tensor:
    """activation(x @ codes.T * scale + bias) of M members, made for few rows: it reads each weight once.

    Args:
        x: float32, bfloat16 or float16 [M * N, in], member after member; [N, in] with `shared`.
        packed: uint8 [M, bytes]: signed codes of each member's weight [out, in].
        scale, bias: float32 [M, out].

    Returns:
        x's dtype [M * N, out]. Sums are taken in float32.
    """
    arguments = (x, packed, scale, bias, bits, shared, activation)
    return call("packed_gemv", partial(unrecorded, ops.packed_gemv.default), *arguments)
