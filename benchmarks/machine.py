"""What the measurements ran on."""

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def cpu_name() -> str:
    for line in CPU_INFO.read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


INSTRUCTIONS = {  # the best first, and the flags of a CPU that has them
    "AMX": {"amx_tile", "amx_int8", "amx_bf16"},
    "AVX-512 VNNI": {"avx512_vnni"},
    "AVX-512": {"avx512f"},
    "AVX2": {"avx2"},
}
CPU_INFO = Path("/proc/cpuinfo")


def instructions() -> str | None:
    """The best vector instructions of this CPU that the kernels know; None where the system does not tell."""
    flags = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
    return next((name for name, needed in INSTRUCTIONS.items() if needed <= flags), None)


def machine_name(device: str, threads: int) -> str:
    """What a report calls this machine: the GPU, or the CPU, whose model alone may not tell, with its threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return ", ".join(filter(None, (cpu_name(), instructions(), f"{threads} threads")))


def file_name(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json"


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; 64 MB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(s.removesuffix("K")) * 1024 for s in sizes if s.endswith("K")], default=64 * 10**6)


def commit() -> str:
    """The commit of this checkout, and whether what runs differs from it; QTDOG_COMMIT where git cannot tell."""
    if (told := os.environ.get("QTDOG_COMMIT")) or shutil.which("git") is None:
        return told or "unknown"
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    sources = [
        "--",
        ":/",
        ":(exclude,top)benchmarks/results",
        ":(exclude,top)docs",
    ]  # these a measurement itself writes
    changed = subprocess.run([*git, "status", "--porcelain", *sources], capture_output=True, text=True, check=False)
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "") if head.stdout else "unknown"


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
