"""`packed_gemv`: a linear layer of M members, made for few rows. Not differentiable."""

import torch
from torch import Tensor

from .checks import KERNEL_DTYPES
from .geometry import Geometry
from .library import library
from .packed_conv2d import Activation, check_conv
from .transforms import unrecorded

ops = torch.ops.qkernels


def _check_packed_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shared: bool, activation: str
) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"packed_gemv: x must be [rows, in], got shape {tuple(x.shape)}")
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"packed_gemv: x must be float32, bfloat16 or float16, got {x.dtype}")
    images = x[:, :, None, None]
    shape = check_conv("packed_gemv", images, packed, scale, bias, None, bits, Geometry(), shared, activation)
    return shape[:2]


@torch.library.register_fake("qkernels::packed_gemv", lib=library)
def _packed_gemv_fake(x, packed, scale, bias, bits, shared, activation):
    return x.new_empty(_check_packed_gemv(x, packed, scale, bias, bits, shared, activation))


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
    if not torch.compiler.is_compiling():
        _check_packed_gemv(x, packed, scale, bias, bits, shared, activation)
    return unrecorded(ops.packed_gemv.default, x, packed, scale, bias, bits, shared, activation)
