"""What the packed ops refuse, and how they say so; results: test_packed_codes.py and test_packed_convolutions.py."""

import pytest
import torch

from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_conv2d import packed_conv2d, packed_conv2d_int8
from qkernels.ops.packed_gemv import packed_gemv
from qkernels.ops.packing import dequantize_packed, pack, quantize, unpack

CODES = torch.randint(-64, 64, (2, 6, 3, 3, 4), dtype=torch.int8)
PACKED = torch.stack([pack(codes, 7) for codes in CODES])
SCALE, BIAS = torch.rand(2, 6), torch.rand(2, 6)
X, GEOMETRY = torch.randn(4, 4, 8, 8), Geometry(kernel=(3, 3))
CONV = {"x": X, "packed": PACKED, "scale": SCALE, "bias": BIAS, "bits": 7, "geometry": GEOMETRY}
INT8 = {**CONV, "x": X.to(torch.int8), "x_scale": torch.ones(2)}
GEMV = {"x": torch.randn(2, 108), "packed": PACKED[:, :672], "scale": SCALE, "bias": BIAS, "bits": 7}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pack(torch.zeros(3), 7), TypeError, "codes must be int8 or uint8"),
        (lambda: pack(CODES, 9), ValueError, r"bits must be 2\.\.8, got 9"),
        (lambda: unpack(PACKED.float(), 7, (216,)), TypeError, "packed must be uint8"),
        (lambda: unpack(PACKED, 7, (999,)), ValueError, "999 codes of 7 bits take 896 bytes"),
        (lambda: quantize(X.double(), torch.ones(()), 0, 255), TypeError, "x must be float32"),
        (lambda: quantize(X, torch.ones(()), -1, 255), ValueError, "fit neither int8 nor uint8"),
        (lambda: quantize(X, torch.ones(3), 0, 255), ValueError, "must have one element without an axis"),
        (lambda: quantize(X, torch.ones(3), 0, 255, 1), ValueError, r"scale must have shape \(4,\)"),
        (lambda: quantize(X, torch.ones(3), 0, 255, 7), ValueError, "axis 7 is out of range"),
        (lambda: quantize(X, torch.ones(4).double(), 0, 255, 1), TypeError, "scale must be float32"),
        (lambda: dequantize_packed(PACKED, SCALE[0], 7, 216), ValueError, r"scale \[members, channels\]"),
        (lambda: dequantize_packed(PACKED, torch.rand(2, 5), 7, 216), ValueError, "do not divide into 5 channels"),
        (lambda: dequantize_packed(PACKED, SCALE, 7, 216, torch.int8), TypeError, "out_dtype must be float32"),
        (lambda: packed_gemv(**{**GEMV, "x": X}), ValueError, r"x must be \[rows, in\]"),
        (lambda: packed_gemv(**{**GEMV, "x": GEMV["x"].double()}), TypeError, "x must be float32"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": X[0]}, ValueError, r"x must be \[images, channels, height, width\]"),
        ({"x": X.double()}, TypeError, "x must be float32"),
        ({"x": X[:3]}, ValueError, "3 images do not divide among 2 members"),
        ({"x": X[:, :, :2]}, ValueError, "larger than the padded image"),
        ({"packed": PACKED[0]}, ValueError, r"packed must be \[members, bytes\]"),
        ({"packed": PACKED[:, :-1]}, ValueError, "216 codes of 7 bits take 224 bytes"),
        ({"bits": 1}, ValueError, r"bits must be 2\.\.8"),
        ({"bias": BIAS[:, :3]}, ValueError, r"bias must have shape \(2, 6\)"),
        ({"geometry": Geometry((3, 3), stride=(0, 1))}, ValueError, "must be positive"),
        ({"geometry": Geometry((3, 3), padding=(-1, 0, 0, 0))}, ValueError, "padding not negative"),
        ({"geometry": Geometry((3, 3), groups=3)}, ValueError, "do not divide by groups=3"),
        (
            {"activation": "mish"},
            ValueError,
            "activation must be one of none, relu, relu6, silu, hardswish, .*gelu_tanh",
        ),
        ({"residual": X}, ValueError, r"residual must have the output's shape \(4, 6, 6, 6\)"),
        ({"residual": torch.zeros(4, 6, 6, 6).half()}, TypeError, "residual must have x's dtype"),
        ({"scale": SCALE.to("meta")}, ValueError, "scale is on meta|must"),
    ],
)
def test_mistakes_in_convolutions_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        packed_conv2d(**{**CONV, **changed})


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": X}, TypeError, "x must be int8 or uint8 codes"),
        ({"x_scale": torch.ones(1)}, ValueError, r"x_scale must have shape \(2,\)"),
        ({"residual_scale": torch.ones(2)}, ValueError, "residual_scale goes with"),
        ({"residual": torch.zeros(4, 6, 6, 6).double()}, TypeError, "residual must be codes or"),
        ({"out_scale": torch.ones(2)}, ValueError, "out_scale goes with"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be int8"),
        (
            {"out_dtype": torch.int8, "out_scale": torch.ones(2), "code_range": (0, 255)},
            ValueError,
            r"codes in \[0, 255\] do not fit torch.int8",
        ),
        (
            {"out_dtype": torch.uint8, "out_scale": torch.ones(2), "code_range": (7, 7)},
            ValueError,
            "need qmin < qmax",
        ),
    ],
)
def test_mistakes_in_integer_convolutions_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        packed_conv2d_int8(**{**INT8, **changed})


def test_geometry():
    geometry = Geometry((3, 5), (2, 1), (1, 2, 3, 4), (1, 2), 4)
    assert Geometry.of(*geometry.arguments) == geometry
    x = torch.nn.functional.pad(torch.zeros(1, 4, 9, 20), (2, 4, 1, 3))
    expected = torch.nn.functional.conv2d(x, torch.zeros(8, 1, 3, 5), None, (2, 1), 0, (1, 2), 4).shape[2:]
    assert geometry.output_size(9, 20) == tuple(expected)
    assert geometry.weight_shape(8, 4) == (8, 3, 5, 1)
