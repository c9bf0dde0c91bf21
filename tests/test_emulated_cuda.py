"""The emulated GPU finds the mistakes for which it is there."""

import subprocess

import pytest

import emulated_cuda

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    if (why := emulated_cuda.why_not()) is not None:
        pytest.skip(why)
    program = tmp_path_factory.mktemp("mistakes") / "mistakes"
    sources = [emulated_cuda.EMULATION / name for name in ("mistakes.cpp", "device.cpp")]
    emulated_cuda.run("c++", *emulated_cuda.FLAGS, *sources, "-o", program)
    return lambda name: subprocess.run([str(program), name], capture_output=True, text=True, check=False)


def test_a_correct_kernel_passes(mistakes):
    assert mistakes("none").returncode == 0


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("no barrier", "a result is wrong"),
        ("half a warp", "a lane waits for others of its warp that do not come"),
        ("barrier for some", "a thread waits at a barrier that others do not reach"),
        ("between words", "misaligned address"),
    ],
)
def test_mistakes_are_found(mistakes, name, finding):
    process = mistakes(name)
    assert process.returncode != 0 and finding in process.stdout + process.stderr


@pytest.mark.parametrize("op", ["packed_conv2d", "packed_conv2d_int8"])
def test_what_is_not_in_cuda_skips(op):
    with pytest.raises(pytest.skip.Exception, match="not written in C"):
        emulated_cuda.op(op)
