"""What a forward of a program from a file may take, found by running it on tensors that have no memory."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.geometry import Geometry
from .kinds import ProgramError
from .program import Program

LEAST_LIMIT = 256 << 20
CHANNELS = 1024  # float32 at each pixel of each member's images; networks keep a few hundred at most
LARGEST_IMAGE = 2**13
MOST_PARTS = 2**16  # of a tensor that is cut up: each is a Python object

_CONVOLUTIONS = {torch.ops.qkernels.packed_conv2d.default: 6, torch.ops.qkernels.packed_conv2d_int8.default: 9}


class MemoryLimit:
    """Refuses what takes more than a network from a stranger should.

    Args:
        max_bytes: of all that lives at once during a forward, beside the weights. By default 256 MiB, the weights four
            times over, and 1,024 float channels at each pixel of the images for each member.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._passed: set[tuple[Any, ...]] = set()

    def check(self, program: Program, members: int, x: Tensor) -> None:
        """Make sure, once for each shape and dtype, that images may be given to a program.

        Raises:
            ProgramError: if they would take more; whatever the program raises for such images.
        """
        if (x.shape, x.dtype) not in self._passed:
            dry_run(program, x, self.of(program, members, x))
            self._passed.add((x.shape, x.dtype))

    def of(self, program: Program, members: int, x: Tensor) -> int:
        """Bytes that a program may take for images x."""
        if self.max_bytes is not None:
            return self.max_bytes
        pixels = x.numel() // max(1, x.shape[1]) if x.dim() == 4 else x.numel()
        weights = sum(t.nbytes for t in program.buffers())
        return LEAST_LIMIT + 4 * weights + 4 * CHANNELS * pixels * members


def dry_run(program: Program, x: Tensor, most: int | None = None) -> Tensor:
    """What a program gives for images x, on the meta device.

    Raises:
        ProgramError: if that would take more than `most` bytes.
    """
    empty = {id(t): torch.empty_like(t, device="meta") for t in program.buffers()}
    with torch.no_grad(), _Counting(most):
        return copy.deepcopy(program, empty)(torch.empty_like(x, device="meta"))


def check_images(program: Program, members: int, info: dict[str, Any], limit: MemoryLimit | None = None) -> None:
    """Where `info` says of which `image_shape` [channels, height, width] images are, make sure that they can be.

    Raises:
        ProgramError: if the program does not run on them, or takes more than the limit.
    """
    shape = info.get("image_shape")
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(type(n) is int for n in shape):
        return
    if not all(1 <= n <= LARGEST_IMAGE for n in shape):
        raise ProgramError(f"image_shape={list(shape)}: each is a number from 1 to {LARGEST_IMAGE}")
    for images in (1, 2):
        x = torch.empty(images, *shape, device="meta")
        try:
            y = dry_run(program, x, limit.of(program, members, x) if limit else None)
        except ProgramError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise ProgramError(f"images of image_shape={list(shape)} cannot be given to it: {error}") from error
        if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != members * images:
            raise ProgramError(f"it does not give the logits of {members} members")


class _Counting(TorchDispatchMode):
    """Adds up the memory of the results that live at the same time."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self.most = most
        self.living: dict[StorageWeakRef, int] = {}
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuts = any("List" in str(result.type) for result in func._schema.returns)
        if cuts and max(args[0].shape, default=0) > MOST_PARTS:
            raise ProgramError(f"{func} would cut a tensor into up to {max(args[0].shape)} parts")
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor) and (storage := StorageWeakRef(t.untyped_storage())) not in self.living:
                self.living[storage] = t.untyped_storage().nbytes()
                self.total += self.living[storage]
        if self.most is not None and self.total + _padded_copy(func, args) > self.most:
            self._refuse_if_too_much(func, _padded_copy(func, args), self.most)
        return result

    def _refuse_if_too_much(self, func: Any, scratch: int, most: int) -> None:
        # Only now, since it takes a while: what has been freed does not count.
        self.living = {storage: size for storage, size in self.living.items() if not storage.expired()}
        self.total = sum(self.living.values())
        if self.total + scratch > most:
            raise ProgramError(
                f"{func} would bring the memory in use to {self.total + scratch >> 20:,} MiB, more than the "
                f"{most >> 20:,} MiB that a file may take for these images; if you trust it, load(path, max_bytes=...) "
                "raises the limit"
            )


def _padded_copy(func: Any, args: Any) -> int:
    """Bytes of the copy of its input that a packed convolution on the CPU makes for itself."""
    if func not in _CONVOLUTIONS:
        return 0
    x, first = args[0], _CONVOLUTIONS[func]
    top, left, bottom, right = Geometry.of(*args[first : first + 5]).padding
    images, channels, height, width = x.shape
    return 4 * images * channels * (height + top + bottom) * (width + left + right)
