"""What the ops ask of their arguments.

Each check stands once, so eager and compiled code give the same message. While the compiler traces the op's fake kernel
begins with it (Dynamo cannot trace a message that speaks of tensors), in eager code the backends in Python do
(`library.CHECKS`). Those in C++ have the same checks in csrc/arguments.h: what they refuse the function that users call
refuses in the words of these (`library.call`).
"""

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CODE = 2**22  # float32 rounds to the nearest integer exactly up to here, on every backend


def check_x(op: str, x: Tensor, axis: int | None) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}; convert it, or use qkernels.ops.reference"
        )
    if axis is not None and not 0 <= axis < x.dim():
        raise ValueError(f"{op}: axis {axis} is out of range for x with {x.dim()} dimensions")


def check_range(op: str, qmin: int, qmax: int) -> None:
    if not -MAX_CODE <= qmin < qmax <= MAX_CODE:
        raise ValueError(f"{op}: need qmin < qmax within +-2**22, got qmin={qmin}, qmax={qmax}")


def check_per_scale(op: str, name: str, t: Tensor, x: Tensor, axis: int | None) -> None:
    """`t` (scale or offset) is float32 on x's device, with one element, or one a channel."""
    if t.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device} but x is on {x.device}")
    if axis is None:
        if t.numel() != 1:
            raise ValueError(
                f"{op}: {name} must have one element without an axis, got shape {tuple(t.shape)}; "
                "pass axis for one scale a channel"
            )
    elif t.dim() != 1 or t.shape[0] != x.shape[axis]:
        raise ValueError(
            f"{op}: {name} must have shape ({x.shape[axis]},), one element for each channel along axis {axis} "
            f"of x {tuple(x.shape)}, got {tuple(t.shape)}"
        )


def check_element(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {dtype}")


def check_grad(op: str, grad: Tensor, x: Tensor) -> None:
    check_element(op, "grad", grad.dtype)
    if grad.device != x.device:
        raise ValueError(f"{op}: grad is on {grad.device} but x is on {x.device}")
    if tuple(grad.shape) != tuple(x.shape):
        raise ValueError(f"{op}: grad must have x's shape {tuple(x.shape)}, got {tuple(grad.shape)}")


def normalized(axis: int | None, x: Tensor) -> int | None:
    return axis + x.dim() if axis is not None and -x.dim() <= axis < 0 else axis


def check_same_device(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device} but the first argument on {x.device}")


def check_members(op: str, **vectors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Each (tensor, shape) is float32 and of that shape, or None."""
    for name, (t, shape) in vectors.items():
        if t is None:
            continue
        if t.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {t.dtype}")
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(t.shape)}")
