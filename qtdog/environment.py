"""Where a run ran: versions, device, threads. Written into every result."""

import os
import platform

import numpy
import timm
import torch
import torchvision

import qkernels as qk
from qtdog.errors import UserError


def pick_device(choice: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def pick_workers(wanted: int | None, reads_files: bool, jobs: int = 1) -> int:
    """Reader processes: none for data in memory, else `wanted` (by default 4), at most a job's share of the cores."""
    if wanted is not None and wanted < 0:
        raise UserError(f"--num-workers must not be negative, not {wanted}")
    return min(4 if wanted is None else wanted, max(1, cores() // jobs)) if reads_files else 0


def describe_environment(device: torch.device) -> dict[str, str]:
    """Plain strings by name."""
    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, timm, numpy)}
    kernels = sorted({served.backend for served in qk.backends.report() if served.device == device.type})
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "qtdog": qk.__version__,
        "python": platform.python_version(),
        **versions,
        "qkernels": "+".join(kernels),
        "platform": platform.platform(),
        "device": gpu or f"cpu, {torch.get_num_threads()} threads",
    }
