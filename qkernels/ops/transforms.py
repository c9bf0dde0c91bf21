"""Autograd and vmap: what the ops share.

Gradients through `torch.func.grad` are not supported: PyTorch's `register_autograd` has no such path. Gradients of a
`torch.vmap`ped call are.
"""

from typing import Any

import torch
from torch import Tensor

from .library import library
from .schemas import PACKED


def calls_op() -> bool:
    """Whether a call must reach the op with its gradient still to be recorded, as tracing and transforms need it.

    Eager training goes through a Function of our own instead: for what `register_autograd` makes, PyTorch compares the
    arguments with the schema's anew in each call, which takes several times as long as everything else.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled()


def unrecorded(op: Any, *arguments: Any) -> Any:
    """Call an op: where no gradient is wanted, not by way of the Python code that would see to it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op._op(*arguments)


def raise_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fake_quantize has no second derivative: the straight-through gradient is not a function to differentiate. "
        "Take higher derivatives of the loss through the dequantized weights instead (qkernels.dequantize_)."
    )


def as_channels(t: Tensor, bdim: int | None, axis: int | None, batch: int) -> Tensor:
    """[..., batch at bdim, ...] with channels along `axis` -> [batch * C, rest]; per tensor -> [batch, numel]."""
    t = t.movedim(bdim, 0) if bdim is not None else t.expand(batch, *t.shape)
    return t.flatten(1) if axis is None else t.movedim(axis + 1, 1).flatten(0, 1).flatten(1)


def from_channels(t: Tensor, like: Tensor, bdim: int | None, axis: int | None, batch: int) -> Tensor:
    """Inverse of `as_channels`, batch first."""
    shape = list(like.shape) if bdim is None else [n for d, n in enumerate(like.shape) if d != bdim % like.dim()]
    if axis is None:
        return t.reshape(batch, *shape)
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    return t.reshape(batch, *moved).movedim(1, axis + 1)


def per_scale_channels(t: Tensor | None, bdim: int | None, batch: int) -> Tensor | None:
    if t is None:
        return None
    return (t.movedim(bdim, 0) if bdim is not None else t.expand(batch, *t.shape)).reshape(-1)


def _not_differentiable(ctx, *grads):
    raise RuntimeError(
        "packed weights are for inference and have no gradient: train the model they were packed from, or call the "
        "packed one under torch.no_grad()"
    )


for _name in PACKED:
    torch.library.register_autograd(f"qkernels::{_name}", _not_differentiable, lib=library)
