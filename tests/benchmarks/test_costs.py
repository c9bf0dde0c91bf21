"""Bytes and operations of every op, and that each op is measured."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.costs import OPERATIONS, cost_of, counted, roofline_seconds
from qkernels.backends import SCHEMAS
from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_conv2d import packed_conv2d
from qkernels.ops.packed_network import Row, packed_network, table
from qkernels.ops.packing import packed_bytes

SOURCES = "\n".join(p.read_text() for p in (Path(__file__).parents[2] / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_schema_is_counted_and_measured(op):
    assert op in OPERATIONS
    # The backwards run in the benchmarks of their forwards; scales start from mean_abs.
    called = {"mean_abs": "init_scale"}.get(op, op.removesuffix("_backward"))
    assert re.search(rf"(?<!reference\.)\b{called}\(|qk\.{called}\b", SOURCES), op


def test_nothing_else_is_counted():
    assert set(OPERATIONS) == set(SCHEMAS)


def test_bytes_and_operations_of_a_convolution():
    x = torch.zeros(2, 8, 6, 6)
    packed = torch.zeros(1, packed_bytes(4 * 8 * 9, 7), dtype=torch.uint8)
    with counted() as costs:
        y = packed_conv2d(x, packed, torch.ones(1, 4), None, 7, Geometry((3, 3)))
    (cost,) = costs
    assert y.shape == (2, 4, 4, 4)
    assert cost.operations == 2 * y.numel() * 8 * 9
    assert cost.bytes == x.nbytes + packed.nbytes + 4 * 4 + y.nbytes
    assert cost.rate == "float32"


def test_rows_of_a_network():
    """A convolution's products, and what quantizes before it."""
    x, packed = torch.zeros(2, 8, 6, 6), torch.zeros(packed_bytes(4 * 8 * 9, 7), dtype=torch.uint8)
    constants = [torch.ones(1), packed, torch.ones(1, 4)]
    window = (3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    rows = [
        Row("quantize", 0, 1, torch.uint8, (2, 8, 6, 6), out_scale=0),
        Row(
            *("convolve", 1, 2, torch.float32, (2, 4, 4, 4)),
            **dict(images_of_member=2, bits=7, window=window, packed=1, scale=2, x_scale=0),
        ),
    ]
    with counted() as costs:
        y = packed_network([x], constants, table(rows), (2, 4, 4, 4), torch.float32)
    (cost,) = costs
    assert cost.operations == 4 * x.numel() + 2 * y.numel() * 8 * 9
    assert cost.rate == "int8"


def test_backwards_are_counted():
    x, scale = torch.randn(10, 3, requires_grad=True), torch.ones((), requires_grad=True)
    with counted() as costs:
        torch.ops.qkernels.fake_quantize(x, scale, None, -8, 7, None, 1.0, False, torch.float32).sum().backward()
    assert len(list(costs)) == 2


def test_roofline_takes_the_slower_of_bytes_and_operations():
    x = torch.zeros(100)
    cost = cost_of("mean_abs", (x, None), torch.zeros(()))
    assert (cost.bytes, cost.operations) == (404, 200)
    assert roofline_seconds([cost, cost], {"bandwidth": 404, "float32": 1e9}) == 2
    assert roofline_seconds([cost], {"bandwidth": 1e9, "float32": 100}) == 2
