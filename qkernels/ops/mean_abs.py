"""`mean_abs`, from which scales start."""

import torch
from torch import Tensor

from .checks import check_x, normalized
from .library import call, library, register_fake


def _check_mean_abs(x, axis):
    check_x("mean_abs", x, axis)


@register_fake("mean_abs", _check_mean_abs)
def _mean_abs_fake(x, axis):
    return x.new_empty((), dtype=torch.float32) if axis is None else x.new_empty(x.shape[axis], dtype=torch.float32)


def _not_differentiable(ctx, grad):
    raise RuntimeError("mean_abs has no gradient: it is what scales start from")


torch.library.register_autograd("qkernels::mean_abs", _not_differentiable, lib=library)


@torch.no_grad()
def mean_abs(x: Tensor, axis: int | None = None) -> Tensor:
    """Mean |x| over the elements that share a scale, in one pass; not differentiable.

    Args:
        x: float32, bfloat16 or float16, any shape and memory format.
        axis: the dimension with one result an index; None for the whole tensor.

    Returns:
        float32 [C], or 0-d without an axis; 0 for an empty slice.
    """
    axis = normalized(axis, x)
    return call("mean_abs", torch.ops.qkernels.mean_abs.default, x.detach(), axis)
