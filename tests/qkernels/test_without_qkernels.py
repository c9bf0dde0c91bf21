"""A packed ensemble compiled ahead of time runs where `_cpu.so` alone is loaded: in C++, and in Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.ops.library import library_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library_path("_cpu") is None, reason="the C++ library was not built"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]
TORCH = Path(torch.__file__).parent
IN_PYTHON = """
import sys
import numpy as np, torch

torch.ops.load_library(sys.argv[1])
package = torch._inductor.aoti_load_package(sys.argv[2])
x = torch.from_numpy(np.fromfile(sys.argv[3], np.float32).reshape([int(n) for n in sys.argv[4:8]]))
package(x).numpy().tofile(sys.argv[8])
assert "qkernels" not in sys.modules
"""


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


@pytest.fixture(scope="module")
def ensemble():
    torch.manual_seed(0)
    members = [network().eval() for _ in range(2)]
    for member in members:
        qk.quantize_(member, qk.QConfig(weight_bits=5, last_layer="same"))
    return qk.PackedEnsemble.from_models(members)


@pytest.fixture(scope="module")
def package(ensemble, tmp_path_factory):
    """(path of the package, its input, what the ensemble says of it)."""
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(ensemble, (x,))
        path = tmp_path_factory.mktemp("package") / "ensemble.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        return path, x, ensemble(x)


def run(command: list[str | Path], package, folder: Path) -> np.ndarray:
    """What `command` writes for the package's input."""
    path, x, _ = package
    x.numpy().tofile(folder / "x")
    arguments = [library_path("_cpu"), path, folder / "x", *x.shape, folder / "y"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [str(word) for word in [*command, *arguments]], capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return np.fromfile(folder / "y", np.float32)


def assert_same_logits(actual: np.ndarray, package) -> None:
    np.testing.assert_allclose(actual, package[2].numpy().reshape(-1), rtol=1e-5, atol=1e-6)


def test_a_cpp_program_runs_it(package, tmp_path):
    program = tmp_path / "run_package"
    headers = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    source = Path(__file__).parents[1] / "cpp" / "run_package.cpp"
    includes = [word for header in headers for word in ("-isystem", header)]
    command = ["c++", "-std=c++20", "-O0", *includes, source, "-L", TORCH / "lib", *libraries, "-o", program]
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert_same_logits(run([program], package, tmp_path), package)


def test_a_python_that_loads_only_the_library_runs_it(package, tmp_path):
    script = tmp_path / "in_python.py"
    script.write_text(IN_PYTHON)
    assert_same_logits(run([sys.executable, script], package, tmp_path), package)


def test_cpp_and_python_define_the_ops_alike():
    script = (
        "import torch, runpy, sys; torch.ops.load_library(sys.argv[1]);"
        "schemas = runpy.run_path(sys.argv[2])['SCHEMAS'];"
        "parse = torch._C.parse_schema;"
        "wrong = [n for n, s in schemas.items()"
        " if str(getattr(torch.ops.qkernels, n).default._schema) != str(parse('qkernels::' + n + s))];"
        "assert len(schemas) > 10 and not wrong, wrong"
    )
    schemas = Path(qk.__file__).parent / "ops" / "schemas.py"
    subprocess.run([sys.executable, "-c", script, str(library_path("_cpu")), str(schemas)], check=True)
