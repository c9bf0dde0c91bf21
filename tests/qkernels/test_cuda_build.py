"""The C++/CUDA library that was built, for GPUs that need not be here: it registers every op, spills nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qkernels import backends
from qkernels.ops.library import library_path

OPS = [op for op in backends.SCHEMAS if op not in backends.NOT_IN_CUDA]
KERNELS = {  # more than one of each: for other dtypes and bits
    *(f"{walked}_{by}" for walked in ("forward", "backward", "mean_abs", "quantize") for by in ("rows", "columns")),
    *("fold_kernel", "pack_kernel", "unpack_kernel", "dequantize_packed_kernel", "gemv_kernel"),
}
MAX_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor of 65536 registers
EXAMINED = ("sm_80", "sm_90")
LIBRARY = library_path("_cuda")

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the C++/CUDA kernels were not built")


def kernel_resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> {"REG": registers, "STACK": bytes, "LOCAL": bytes, ...}, as cuobjdump prints them."""
    out = subprocess.run(
        [find_cuobjdump(), "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    architecture, resources = "", {}
    for line, following in zip(out.splitlines(), out.splitlines()[1:], strict=False):
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        if found := re.match(r"\s*Function ([^:\s]+):", line):
            resources[architecture, found[1]] = {k: int(v) for k, v in re.findall(r"\b([A-Z]+):(\d+)", following)}
    return resources


def find_cuobjdump() -> str:
    """cuobjdump on PATH, or the one that the package triton carries; the test skips where neither is."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, and no triton that carries one")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not Path(found).is_file():
        pytest.skip("no cuobjdump on PATH or in the package triton")
    return found


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA and cannot load the library")
def test_library_registers_every_op():
    torch.ops.load_library(str(LIBRARY))
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", "CUDA"), op


def test_kernels_spill_nothing_and_keep_registers_low():
    resources = {key: used for key, used in kernel_resources(LIBRARY).items() if key[0] in EXAMINED}
    if not resources:
        pytest.skip(f"the library was built for none of {', '.join(EXAMINED)}")
    known = re.compile("|".join(sorted(KERNELS, key=len, reverse=True)))  # unpack_kernel is no pack_kernel
    for architecture in {architecture for architecture, _ in resources}:
        names = [kernel for a, kernel in resources if a == architecture]
        assert not [kernel for kernel in names if not known.search(kernel)], "kernels that are not among KERNELS"
        assert {known.search(kernel)[0] for kernel in names} == KERNELS, architecture
    wrong = {
        key: used for key, used in resources.items() if used["LOCAL"] or used["STACK"] or used["REG"] > MAX_REGISTERS
    }
    assert not wrong
