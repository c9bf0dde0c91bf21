"""Runs a function in two processes that gloo connects."""

import os
from collections.abc import Callable
from pathlib import Path

import torch


def _enter(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work(rank, folder)
    torch.distributed.destroy_process_group()
    # Leaves without the interpreter's clean-up, in which PyTorch 2.15's gloo threads abort about once in 50 exits.
    os._exit(0)


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """work(rank, folder) in both; it stands at the top of its module. What it finds it leaves in the empty `folder`."""
    torch.multiprocessing.spawn(_enter, args=(work, folder), nprocs=2)
