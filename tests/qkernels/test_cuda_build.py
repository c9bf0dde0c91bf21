"""The C++/CUDA library built for a GPU that need not be here: it loads, registers every op, spills nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_multi",
    "fake_quantize_multi_backward",
    "mean_abs",
    "pack",
    "unpack",
    "quantize",
    "dequantize_packed",
    "packed_gemv",
)
KERNELS = re.compile(  # more than one of each: for other dtypes and bits
    r"(forward|backward|mean_abs|quantize)_(rows|columns)|fold_kernel|(pack|unpack|dequantize_packed|gemv)_kernel"
)
ARCHITECTURES = "8.0 9.0"
MAX_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor of 65536 registers

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def build_library(into: Path) -> Path:
    """`_cuda.so`, made by setup.py without touching what is installed."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={into}/lib", f"--build-temp={into}/temp"],
        cwd=ROOT,
        env=os.environ | {"QKERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES},
        check=True,
    )
    return into / "lib" / "qkernels" / "_cuda.so"


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


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_library(tmp_path_factory.mktemp("cuda"))


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA and cannot load the library")
def test_library_loads_and_registers_every_op(library):
    script = f"""
import torch
from qkernels.backends import NOT_IN_CUDA, SCHEMAS
torch.ops.load_library({str(library)!r})
assert set(SCHEMAS) - set(NOT_IN_CUDA) == {set(OPS)!r}, SCHEMAS
for op in {OPS!r}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qkernels::" + op, "CUDA"), op
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "QKERNELS_BACKEND": "reference"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kernels_spill_nothing_and_keep_registers_low(library):
    resources = kernel_resources(library)
    assert {a for a, _ in resources} == {"sm_80", "sm_90"}
    kernels = {KERNELS.search(kernel)[0] for _, kernel in resources}
    assert len(kernels) == 13, kernels
    wrong = {
        key: used for key, used in resources.items() if used["LOCAL"] or used["STACK"] or used["REG"] > MAX_REGISTERS
    }
    assert not wrong
