"""`packed_panels`: weights unpacked once, laid out as `packed_network` reads them on this CPU. Not differentiable."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .library import call, register_fake
from .packed_conv2d import MOST_TERMS
from .packing import packed_bytes
from .transforms import unrecorded

ops = torch.ops.qkernels


def _check_packed_panels(
    packed: Tensor, channels: int, depth: int, bits: int, kernel: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    op = "packed_panels"
    if packed.dtype != torch.uint8 or packed.dim() != 2 or not packed.shape[0]:
        raise ValueError(f"{op}: packed must be uint8 [members, bytes], got {packed.dtype} {tuple(packed.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits must be 2..8, got {bits}")
    if len(kernel) != 2 or len(dilation) != 2 or min(channels, depth, *kernel, *dilation, groups) < 1:
        raise ValueError(f"{op}: channels, depth, kernel, dilation and groups must be positive")
    if channels % groups:
        raise ValueError(f"{op}: {channels} channels do not divide into {groups} groups")
    window = kernel[0] * kernel[1] * depth
    if window > MOST_TERMS:
        raise ValueError(f"{op}: a sum of {window} products may exceed int32")
    if packed.shape[1] != packed_bytes(channels * window, bits):
        raise ValueError(
            f"{op}: packed has {packed.shape[1]} bytes a member, {channels * window} codes of {bits} bits have "
            f"{packed_bytes(channels * window, bits)}"
        )


@register_fake("packed_panels", _check_packed_panels)
def _packed_panels_fake(packed, channels, depth, bits, kernel, dilation, groups):
    plain = type(packed) is Tensor  # on the meta device, where no CPU says how many bytes there are
    return packed.new_empty(packed.shape[0], 0 if plain else torch.library.get_ctx().new_dynamic_size())


def packed_panels(
    packed: Tensor, channels: int, depth: int, bits: int, kernel: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The weights of a convolution of codes as `packed_network` takes them by `Row.panels`; on CPU tensors.

    Args:
        packed: uint8 [M, bytes], the codes of each member, [C_out, kernel height, kernel width, depth].
        channels, depth: C_out, and the input channels of a group.

    Returns:
        uint8 [M, n], of 8 bits a weight. What is in it depends on the CPU, and is for this process alone: a row that
        brings panels which are not what the CPU's kernels read, or none as the reference makes them, unpacks its own.

    Raises:
        ValueError: for sizes that do not fit each other.
    """
    arguments = (packed, channels, depth, bits, list(kernel), list(dilation), groups)
    return call("packed_panels", partial(unrecorded, ops.packed_panels.default), *arguments)
