"""Backend choice, the diagnosis that `python -m qkernels` prints, and the bit codec."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qkernels as qk
from qkernels.ops import library

_codec = pytest.importorskip("qkernels._codec")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


PRINT_CPU_BACKENDS = (
    "import qkernels as qk; rows = [r for r in qk.backends.report() if r.device == 'cpu'];"
    "alone = qk.backends.FOR_CPUS; print({r.backend for r in rows if r.op not in alone});"
    "print({r.backend for r in rows if r.op in alone})"
)


@pytest.mark.slow
@pytest.mark.parametrize("forced, served", [("reference", "reference"), ("cpp", "cpp"), ("triton", "triton")])
def test_a_forced_backend_serves(forced, served):
    result = python(PRINT_CPU_BACKENDS, QKERNELS_BACKEND=forced, TRITON_INTERPRET="1")
    alone = "cpp" if served == "cpp" else "reference"
    assert result.stdout.split() == [f"{{'{served}'}}", f"{{'{alone}'}}"], result.stderr


@pytest.mark.slow
def test_a_forced_backend_computes():
    code = (
        "import torch, qkernels as qk; x = torch.randn(5, requires_grad=True);"
        "qk.fake_quantize(x, torch.tensor(.1), -8, 7).sum().backward(); print(x.grad)"
    )
    outputs = {
        python(f"import torch; torch.manual_seed(0); {code}", QKERNELS_BACKEND=b).stdout for b in ("reference", "cpp")
    }
    assert len(outputs) == 1 and "tensor" in outputs.pop()


@pytest.mark.slow
def test_a_forced_backend_that_is_missing_is_an_error():
    assert "choose one of" in python("import qkernels", QKERNELS_BACKEND="fortran").stderr
    hide = (
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a); import qkernels"
    )
    result = python(hide, QKERNELS_BACKEND="triton")
    assert "QKERNELS_BACKEND=triton cannot be had: the package triton is not installed" in result.stderr


def test_every_op_has_a_backend_and_a_reason_on_every_device():
    rows = qk.backends.report()
    assert {(r.op, r.device) for r in rows} == {(o, d) for o in qk.backends.SCHEMAS for d in ("cpu", "cuda", "other")}
    assert all(r.reason for r in rows)


@pytest.mark.slow
def test_python_m_qkernels_prints_what_was_built():
    result = subprocess.run([sys.executable, "-m", "qkernels"], capture_output=True, text=True, check=True)
    for word in ("torch", "triton", "_cpu", "_cuda", "_codec", "built with", "packed_conv2d_int8", "other"):
        assert word in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["-m qkernels", "-m qtdog --help"])
def test_a_reader_that_stops_early_ends_it_quietly(command):
    """As `| head -1` does."""
    process = subprocess.Popen(
        [sys.executable, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 31, 256, 257, 4097])
def test_codec_round_trip_against_numpy(bits, count):
    codes = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint8)
    packed = _codec.pack(codes, bits)
    blocks = np.pad(codes, (0, -count % 256)).reshape(-1, 8, 32)  # block, chunk, code
    rows, start = [], 0
    for width in {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[bits]:
        plane = (blocks >> start) & (2**width - 1)
        for row in range(width):
            chunks = plane[:, row::width]  # chunk j is in row j % width, shifted by width * (j // width)
            rows.append(sum(chunks[:, i] << (width * i) for i in range(8 // width)))
        start += width
    np.testing.assert_array_equal(packed, np.stack(rows, axis=1).reshape(-1))
    np.testing.assert_array_equal(_codec.unpack(packed, bits, count), codes)


def test_codec_refuses_what_does_not_fit():
    packed = _codec.pack(np.zeros(40, np.uint8), 7)
    for bits, count in ((7, 257), (6, 40), (7, -1), (7, 2**62)):
        with pytest.raises(ValueError, match="do not hold"):
            _codec.unpack(packed, bits, count)
    for bits in (0, 1, 9):
        with pytest.raises(ValueError, match=r"2\.\.8"):
            _codec.pack(packed, bits)


def test_cpu_features_are_those_of_this_machine():
    flags = Path("/proc/cpuinfo").read_text().replace("_", "").split()
    for feature in library.cpu_features():
        assert set(feature.replace("amx", "amxtile amxint8 amxbf16").split()) <= set(flags)
