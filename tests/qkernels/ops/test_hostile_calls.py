"""Ops that are called directly, as compiled and exported programs call them, with what they must refuse.

Each call runs in a process of its own, so that one which writes where it must not fails its test alone; what is named
here once did, or gave a wrong answer. tests/campaigns/test_ops.py and tests/gpu/test_hostile_calls.py make many more.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hostile_calls
from hostile_calls import Calls
from qkernels import backends
from qkernels.ops.geometry import Geometry
from qkernels.ops.library import run_check
from qkernels.ops.packed_conv2d import packed_conv2d
from qkernels.ops.packing import pack

ops = torch.ops.qkernels
ROOT = Path(__file__).resolve().parents[3]
HELPERS = """
import torch, qkernels
from qkernels.ops.geometry import Geometry
ops = torch.ops.qkernels
f32, f16, u8 = torch.float32, torch.float16, torch.uint8
x, scale, one = torch.ones(4, 6), torch.ones(4), torch.ones(())
images, scales, packed = torch.ones(2, 4, 8, 8), torch.ones(1, 4), torch.zeros(1, 224, dtype=u8)

def quantize(x=x, scale=one, offset=None, qmin=-8, qmax=7, axis=None, out_dtype=f32):
    return ops.fake_quantize(x, scale, offset, qmin, qmax, axis, 1.0, False, out_dtype)

def backward(grad, x=x, scale=one, axis=None):
    return ops.fake_quantize_backward(grad, x, scale, None, -8, 7, axis, 1.0, False, True)

def multi(xs, scales, qmins=(-8, -8), qmaxs=(7, 7), factors=(1.0, 1.0), axis=None, out_dtype=None):
    return ops.fake_quantize_multi(xs, scales, qmins, qmaxs, axis, factors, out_dtype)

def multi_backward(grads, xs, scales, qmins=(-8, -8), qmaxs=(7, 7), factors=(1.0, 1.0)):
    return ops.fake_quantize_multi_backward(grads, xs, scales, qmins, qmaxs, None, factors, True)

def conv(x=images, kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), residual=None, packed=packed):
    return ops.packed_conv2d(x, packed, scales, None, residual, 7, kernel, stride, padding, dilation, 1, True, "none")

def int8(x=images.to(u8), residual=None, residual_scale=None, out_scale=None, qmin=0, qmax=255, out_dtype=f32):
    window = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    end = (7, *window, True, "none", qmin, qmax, out_dtype)
    return ops.packed_conv2d_int8(
        x, torch.ones(1), packed, scales, None, residual, residual_scale, out_scale, *end)

def gemv(x=torch.ones(1, 4), activation="none"):
    return ops.packed_gemv(x, packed, scales, None, 7, True, activation)

"""
REFUSED = {
    # sizes
    "conv(padding=(0, 100_000, 0, -100_000))": "padding not negative",
    "conv(stride=(2**32, 2**32), padding=(2**62, 2**62, 2**62, 2**62))": "does not fit 64 bits",
    "conv(kernel=(2, 1), dilation=(2**63 - 1, 1), padding=(2**61, 0, 2**61, 0))": "larger than the padded image",
    "conv(kernel=(3, 1), dilation=(2**62, 1))": "does not fit 64 bits",
    "conv(kernel=(2**40, 2**40))": "does not fit 64 bits",
    "conv(kernel=(1, 1, 1))": "two numbers each",
    "conv(padding=(1, 1))": "two numbers each",
    "ops.unpack(packed, 7, 2**63 - 1, True)": "must have 224 bytes for every 256",
    "ops.unpack(packed, 7, -1, True)": "must have 224 bytes for every 256",
    "ops.dequantize_packed(packed, scales, 7, -256, f32)": "must have 224 bytes for every 256",
    # lists of fake_quantize_multi
    "multi([x, x], [one])": "one entry a layer",
    "multi([x, x], [one, one], qmins=(-8,))": "one entry a layer",
    "multi([x, x], [one, one], qmaxs=(7,))": "one entry a layer",
    "multi([x, x], [one, one], factors=(1.0,))": "one entry a layer",
    "multi([], [one, one])": "one entry a layer",
    "multi([x, x.half()], [one, one])": "layer 1: all xs must share a dtype",
    "multi([x, x], [one, one], out_dtype=torch.int8)": "out_dtype must be float32",
    "multi([x, x], [scale, scale[:2]], axis=0)": r"layer 1: scale must have shape \(4\)",
    "multi_backward([x], [x, x], [one, one])": "grads and xs must have one entry a layer",
    "multi_backward([x, x], [x, x], [one, one], factors=())": "one entry a layer",
    "multi_backward([x, x[:0]], [x, x], [one, one])": "layer 1: grad must have the shape of x",
    "multi_backward([x, x.half()], [x, x], [one, one])": "layer 1: all grads must share a dtype",
    # gradients
    "backward(x[:0])": "grad must have the shape of x",
    "backward(x[0])": "grad must have the shape of x",
    "backward(x.T)": "grad must have the shape of x",
    "backward(x.double())": "grad must be float32",
    # quantizers
    "quantize(axis=2, scale=scale)": "axis 2 is out of range",
    "quantize(axis=-2, scale=scale)": "axis -2 is out of range",
    "quantize(qmin=7)": "need qmin < qmax",
    "quantize(qmin=-2**62)": "need qmin < qmax",
    "quantize(scale=torch.ones(2, 2), axis=0)": r"scale must have shape \(4\)",
    "quantize(offset=torch.ones(3))": "offset must have one element",
    "quantize(offset=one.double())": "offset must be float32",
    "quantize(out_dtype=torch.int32)": "out_dtype must be float32",
    "quantize(x=x.int())": "x must be float32",
    "ops.mean_abs(x, 7)": "axis 7 is out of range",
    "ops.mean_abs(x, -1)": "axis -1 is out of range",
    # packed codes
    "ops.pack(x, 7)": "codes must be int8 or uint8",
    "ops.pack(packed, 9)": r"bits must be 2\.\.8",
    "ops.unpack(packed, 0, 256, True)": r"bits must be 2\.\.8",
    "ops.quantize(x, one, 0, 256, None)": "fit neither int8 nor uint8",
    "ops.quantize(x, one, -1, 255, None)": "fit neither int8 nor uint8",
    "ops.quantize(x, scale, 0, 255, None)": "scale must have one element",
    "ops.dequantize_packed(packed, scales, 7, 256, torch.int8)": "out_dtype must be float32",
    "ops.dequantize_packed(packed, torch.ones(1, 3), 7, 256, f32)": "do not divide into 3 channels",
    # packed layers
    "conv(x=images.to(u8))": "x must be float32",
    "conv(x=images[:, :0])": "x must have channels",
    "conv(residual=images.bool())": "residual must have the dtype of x",
    "conv(residual=images[:1])": "residual must have the output's shape",
    "int8(x=images)": "x must be int8 or uint8",
    "int8(residual=images.bool())": "residual must be codes or",
    "int8(residual=images.to(u8))": "residual_scale goes with",
    "int8(out_dtype=u8)": "out_scale goes with",
    "int8(out_dtype=torch.int64)": "out_dtype must be float32",
    "int8(out_dtype=u8, out_scale=torch.ones(1), qmin=-1)": r"codes in \[-1, 255\] do not fit",
    "int8(out_dtype=u8, out_scale=torch.ones(0))": "one element for each member",
    "ops.packed_conv2d_int8(torch.ones(1, 70_000, 1, 1, dtype=u8), torch.ones(1), "
    "torch.zeros(1, 274 * 224, dtype=u8), torch.ones(1, 1), None, None, None, None, 7, "
    "(1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, True, 'none', 0, 255, f32)": "70000 products may exceed int32",
    "gemv(torch.ones(1, 4, dtype=u8))": "x must be float32",
    "gemv(torch.ones(4))": r"x must be \[rows, in\]",
    "gemv(torch.ones(1, 0))": "x must have channels",
    "gemv(activation='mish')": "activation must be",
}


# A convolution is right whatever its stride, dilation and padding are, and takes no memory for what no window reads.
RIGHT = (
    # Outputs (0, 0) .. (1, 1) read rows and columns -2**32 + 1 and 1.
    "y = conv(stride=(2**32, 2**32), padding=(2**32 - 1, 2**32 - 1, 0, 0)); assert (y[:, :, :1] == 0).all(); "
    "assert y.shape == (2, 4, 2, 2) and torch.equal(y[..., 1:, 1:], conv(images[..., 1:2, 1:2]))",
    # 2**64 bytes with its padding.
    "y = ops.packed_conv2d(torch.ones(4, 2**20, 1, 1), torch.full((1, 2**17 * 7), 255, dtype=u8), torch.ones(1, 1), "
    "None, None, 7, (1, 1), (2**20, 2**20), (2**20, 2**20, 2**20 - 1, 2**20 - 1), (1, 1), 1, True, 'none'); "
    "assert y.shape == (4, 1, 2, 2) and y.flatten(1).tolist() == [[0, 0, 0, -(2.0**20)]] * 4",
    # Taps at rows -2**40, 0 and 2**40.
    "ones = torch.full((1, 224), 255, dtype=u8); "
    "y = conv(kernel=(3, 1), dilation=(2**40, 1), padding=(2**40, 0, 2**40, 0), packed=ones); "
    "assert torch.equal(y, conv(packed=ones))",
    "assert multi([x, x], [one, one])[1].shape == x.shape",
)


@pytest.fixture(scope="module")
def results():
    """What became of each call, some of which would end their process: its message, or "accepted"."""
    if backends.report()[0].backend != "cpp":
        pytest.skip("the C++ library was not built")
    left, found = [*REFUSED, *RIGHT], {}
    while left:
        script = HELPERS + "".join(
            f"print({i}, end=' ', flush=True)\ntry:\n    {call}\n    print('accepted', flush=True)\n"
            "except (RuntimeError, ValueError, TypeError, AssertionError) as error:\n"
            "    print(repr(error), flush=True)\n"
            for i, call in enumerate(left)
        )
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        lines = [line.partition(" ")[2] for line in process.stdout.splitlines()]
        assert lines, process.stderr
        found |= dict(zip(left, lines, strict=False))
        if process.returncode:
            found[left[len(lines) - 1]] = f"the process ended with {process.returncode}"
        left = left[len(lines) :]
    return found


@pytest.mark.parametrize("call", REFUSED)
def test_refused(results, call):
    assert re.search(REFUSED[call], results[call]), results[call]


@pytest.mark.parametrize("call", RIGHT)
def test_right(results, call):
    assert results[call] == "accepted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("kernel, dilation", [(1, 1), (2, 9), (3, 4)])
def test_padding_larger_than_the_image(dtype, kernel, dilation):
    """Where an image is cut into windows, and where it is not, on the two axes apart."""
    x, bits = torch.randint(0, 9, (2, 6, 3, 4)).to(dtype), 5
    packed = pack(torch.randint(-16, 16, (4, kernel, kernel, 3), dtype=torch.int8), bits)[None]
    one, scale = torch.ones(1), torch.rand(1, 4)
    strides, paddings = [(1, 1), (30, 1), (1, 30), (7, 11)], [(20, 7, 9, 7), (7, 9, 7, 30), (9, 9, 9, 9)]
    for stride, padding in itertools.product(strides, paddings):
        geometry = Geometry((kernel, kernel), stride, padding, (dilation, dilation), 2)
        rest = (bits, *geometry.arguments, True, "none")
        if dtype == torch.uint8:
            arguments = (x, one, packed, scale, None, None, None, None, *rest, 0, 255, torch.float32)
            y, expected = (o(*arguments) for o in (ops.packed_conv2d_int8, backends.reference.packed_conv2d_int8))
            assert torch.equal(y, expected)
        else:
            arguments = (x, packed, scale, None, None, *rest)
            y, expected = (o(*arguments) for o in (ops.packed_conv2d, backends.reference.packed_conv2d))
            torch.testing.assert_close(y, expected)


def test_public_functions_refuse_sizes_that_overflow():
    packed = torch.zeros(1, 224, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="does not fit 64 bits"):
        packed_conv2d(
            torch.ones(1, 4, 1, 1), packed, torch.ones(1, 4), None, 7, Geometry((1, 1), padding=(2**62, 0, 2**62, 0))
        )


def test_a_tensor_that_is_missing_is_named():
    """Also where nothing that the check looks at tells that it is."""
    with pytest.raises(TypeError, match="quantize: scale must be a tensor, got None"):
        run_check("quantize", torch.zeros(7, 9), None, 0, 255, 1)


@pytest.mark.slow
def test_random_calls():
    if backends.report()[0].backend != "cpp":
        pytest.skip("the C++ library was not built")
    report = hostile_calls.attack(Calls("cpp"), seconds=120)
    assert not report.failures, report
    assert report.outcomes["equal"] > 300 and report.outcomes["refused"] > 300


@pytest.mark.slow
def test_random_calls_of_triton():
    pytest.importorskip("triton")
    report = hostile_calls.attack(Calls("triton", count=20), seconds=300)
    assert not report.failures, report
