"""One run in several processes, started by torchrun: each takes its share of every minibatch.

`torchrun --nproc-per-node 2 -m qtdog train ...` sets RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process
and everything here does nothing. The first process alone prints and writes files.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Connects the processes: by NCCL where they train on GPUs, each on its own, else by gloo."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def synchronized(model: nn.Module, some_unused: bool = False) -> nn.Module:
    """`model`, with gradients averaged over the processes. To be called again when other parameters have gradients.

    Args:
        some_unused: whether some parameters that could have gradients have none, such as scales before the switch.
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=some_unused)


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm statistics that are not frozen differ after training."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes, the same bits in each."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= world_size()
    return value


def first_says(value: bool) -> bool:
    """The first process's value, in all of them: files may have changed between two processes' looks at them."""
    said = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(said, 0)
    return said[0]


def share(names: list[str]) -> list[str]:
    """The names whose work this process does; the processes' shares together are `names`."""
    return names[rank() :: world_size()]


def merged(values: dict[str, Value], names: list[str]) -> dict[str, Value]:
    """What all processes have found out about their `share(names)`, in the order of `names`."""
    found = [values]
    if dist.is_initialized():
        found = [values] * world_size()
        dist.all_gather_object(found, values)
    everything = {name: value for part in found for name, value in part.items()}
    return {name: everything[name] for name in names}
