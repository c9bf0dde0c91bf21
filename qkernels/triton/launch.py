"""Launch parameters, and the device that a launch goes to. `tuning.py` chooses those of the convolutions."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    block: elements of the tile that a program works on at a time, a power of two
        (`pack`: blocks of 256 codes; `depthwise`: elements a warp)
    num_warps: warps a program; block / (32 * num_warps) elements a thread, 16 bytes of them an access
    programs: about so many programs share a reduction, and each leaves a partial sum
    segment: elements of a channel that a program of `fake_quantize_multi` handles, a multiple of `block`
    """

    block: int
    num_warps: int
    programs: int = 0
    segment: int = 0


# Values by rule of thumb: 8 or 16 elements a thread, several waves of programs.
# Keyed by compute capability; None is any other device.
_TABLE: dict[tuple[int, int] | None, dict[str, Launch]] = {
    None: {
        "forward": Launch(block=4096, num_warps=8),
        "backward": Launch(block=1024, num_warps=4, programs=1024),
        "mean_abs": Launch(block=4096, num_warps=8, programs=1024),
        "multi_forward": Launch(block=256, num_warps=1, segment=4096),
        "multi_backward": Launch(block=256, num_warps=1, segment=4096),
        "multi_fold": Launch(block=1024, num_warps=4),
        "pack": Launch(block=8, num_warps=4),
        "unpack": Launch(block=2048, num_warps=4),
        "quantize": Launch(block=4096, num_warps=8),
        "depthwise": Launch(block=1024, num_warps=1),
        "decode": Launch(block=2048, num_warps=4),
        "fold": Launch(block=512, num_warps=4),
    },
}


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for the CPU, seen by the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def launch_of(kernel: str, x: Tensor) -> Launch:
    """The table's entry for `kernel` on x's device."""
    table = _TABLE.get(capability_of(x.device), _TABLE[None])
    if kernel not in table:
        raise KeyError(f"qkernels/triton/launch.py has no launch parameters for {kernel}")
    return table[kernel]


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's GPU the current one, where Triton launches; does nothing for CPU tensors, seen by the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
