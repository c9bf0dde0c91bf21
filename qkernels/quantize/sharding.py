"""Parameters that FSDP2 has spread over processes: a scale starts from all of a weight, wherever its parts are."""

import sys

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor; one can be there only where its module has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def whole(t: Tensor) -> Tensor:
    """All of a tensor; of one that is sharded, collected from all processes, each of which must call this."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


@torch.no_grad()
def fill_(t: Tensor, value: Tensor) -> None:
    """Set a tensor to a value of its whole shape, which every process has; a sharded one to its own part of it."""
    if is_sharded(t):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(t.dtype), t.device_mesh, t.placements)  # type: ignore[attr-defined]
    t.copy_(value)


def reshard_(model: nn.Module) -> bool:
    """Let FSDP2 put Parameters back that it has collected for a forward: what is written into those would be lost.

    Returns:
        Whether there are any of its modules.
    """
    library = sys.modules.get("torch.distributed.fsdp")
    sharded = [m for m in model.modules() if library is not None and isinstance(m, library.FSDPModule)]
    for module in sharded:
        module.reshard()
    return bool(sharded)
