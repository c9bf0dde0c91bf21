"""`packed_panels`: weights that are unpacked once give the bits of those that are unpacked each time."""

import random

import numpy as np
import pytest
import torch

import packed_oracle as oracle
from network_cases import CODES, Network
from packed_cases import backend, each_backend  # noqa: F401, a fixture
from qkernels.ops.geometry import Geometry
from qkernels.ops.packed_network import Row, packed_network, table
from qkernels.ops.packed_panels import packed_panels
from qkernels.ops.packing import pack


@pytest.fixture(autouse=True)
def cpu_alone(each_backend):  # noqa: F811
    if backend.name not in ("cpp", "reference"):
        pytest.skip("packed_panels is written in C++ for CPUs alone")


def one_convolution(seed, geometry, in_channels, channels, dtype):
    """The arguments of one convolution of codes, with several members."""
    network = Network(random.Random(seed), members=3, exact=True)
    x = network.input(dtype, (3 * network.images, in_channels, 8, 9), shared=False)
    network.convolve(x, geometry, channels)
    network.rows = [row._replace(panels=-1) for row in network.rows]
    return network


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(
    "geometry, in_channels, channels",
    [
        (Geometry(), 5, 7),
        (Geometry(), 64, 130),
        (Geometry((3, 3), padding=(1, 1, 1, 1)), 3, 20),
        (Geometry((3, 3), (2, 1), (0, 1, 2, 1)), 70, 33),
        (Geometry((3, 2), padding=(1, 1, 1, 1), dilation=(1, 2)), 8, 65),
        (Geometry((2, 3), groups=2), 12, 34),
        (Geometry((1, 3), dilation=(2, 1), groups=3), 9, 6),
        (Geometry((5, 5), stride=(9, 9), padding=(20, 20, 20, 20)), 4, 17),
    ],
)
def test_the_bits_of_what_is_unpacked_each_time(geometry, in_channels, channels, dtype):
    """And panels are what is multiplied: those of other weights give another result, unless they are of no use."""
    depth = in_channels // geometry.groups
    of_window = (list(geometry.kernel), list(geometry.dilation), geometry.groups)
    for seed in range(3):
        network = one_convolution(seed, geometry, in_channels, channels, dtype)
        inputs, constants, _, *result = network.arguments()
        parts: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for row in network.rows:
            size = oracle.packed_nbytes(channels * depth * np.prod(geometry.kernel), row.bits)
            packed = constants[row.packed][row.byte :][: row.members * size].view(row.members, size)
            parts.append(backend.packed_panels(packed, channels, depth, row.bits, *of_window))
            others.append(backend.packed_panels(~packed, channels, depth, row.bits, *of_window))
        rows = [row._replace(panels=len(constants)) for row in network.rows]

        def run(panels, inputs=inputs, constants=constants, rows=rows, result=result):
            return backend.packed_network(inputs, [*constants, panels], table(rows), *result)

        expected = backend.packed_network(inputs, constants, table(network.rows), *result)
        panels = torch.cat(parts)
        assert torch.equal(run(panels), expected)
        assert torch.equal(run(torch.cat(others)), expected) == (backend.name == "reference")
        for useless in (panels[:, :-1], panels[:, 64:], panels + 1, torch.zeros_like(panels)):
            assert torch.equal(run(useless), expected)


def test_panels_are_what_is_read():
    """Other weights under the same header: those are multiplied."""
    if backend.name != "cpp":
        pytest.skip("the reference lays nothing out")
    rng = np.random.default_rng(0)
    codes = [torch.from_numpy(rng.integers(-8, 8, (20, 1, 1, 12)).astype(np.int8)) for _ in range(2)]
    packed, other = (pack(c, 4)[None] for c in codes)
    x = torch.from_numpy(rng.integers(-128, 128, (1, 12, 3, 3)).astype(np.int8))
    panels = backend.packed_panels(other, 20, 12, 4, [1, 1], [1, 1], 1)
    row = Row("convolve", 0, 1, torch.float32, (1, 20, 3, 3), bits=4, packed=0, panels=1, scale=2, x_scale=2)
    constants = [packed[0], panels, torch.ones(1, 20)]
    y = backend.packed_network([x], constants, table([row]), [1, 20, 3, 3], torch.float32)
    expected = np.einsum("oc,chw->ohw", codes[1][:, 0, 0].numpy().astype(int), x[0].numpy().astype(int))
    np.testing.assert_array_equal(y[0].numpy(), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packed": torch.zeros(8, dtype=torch.uint8)}, "packed must be uint8"),
        ({"packed": torch.zeros(1, 96)}, "packed must be uint8"),
        ({"packed": torch.zeros(0, 96, dtype=torch.uint8)}, "packed must be uint8"),
        ({"packed": torch.zeros(1, 95, dtype=torch.uint8)}, "packed has 95 bytes a member"),
        ({"channels": 0}, "must be positive"),
        ({"channels": 2**62}, "packed has|does not fit 64 bits"),
        ({"depth": -1}, "must be positive"),
        ({"depth": 2**40}, "may exceed int32"),
        ({"bits": 9}, "bits must be 2..8"),
        ({"bits": 5}, "packed has"),
        ({"kernel": [0, 1]}, "must be positive"),
        ({"dilation": [1, -3]}, "must be positive"),
        ({"groups": 0}, "must be positive"),
        ({"groups": 3}, "do not divide into 3 groups"),
    ],
)
def test_mistakes_are_named(change, message):
    if backend.name != "cpp":
        pytest.skip("the function calls the op")
    legal = dict(packed=pack(torch.ones(20, 12, dtype=torch.int8), 4)[None], channels=20, depth=12, bits=4)
    legal |= dict(kernel=[1, 1], dilation=[1, 1], groups=1)
    packed_panels(**legal)
    with pytest.raises((ValueError, RuntimeError), match=message):
        packed_panels(**{**legal, **change})


def test_rows_ask_for_panels_of_their_members():
    codes = pack(torch.ones(4, 12, dtype=torch.int8), 4)
    row = Row("convolve", 0, 1, torch.float32, (1, 4, 3, 3), bits=4, packed=0, panels=1, scale=2, x_scale=2)
    x = torch.ones(1, 12, 3, 3, dtype=torch.int8)
    for panels, message in (
        (torch.zeros(0, 64, dtype=torch.uint8), "row 0 takes more panels than there are"),
        (torch.zeros(1, 64), "row 0 takes more panels than there are"),
        (torch.zeros(64, dtype=torch.uint8), "row 0 takes more panels than there are"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            constants = [codes, panels, torch.ones(1, 4)]
            backend.packed_network([x], constants, table([row]), [1, 4, 3, 3], torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="row 0 takes a constant that is not there"):
        constants = [codes, codes, torch.ones(1, 4)]
        backend.packed_network([x], constants, table([row._replace(panels=3)]), [1, 4, 3, 3], torch.float32)


def test_the_function_serves_the_network():
    """By the registered ops."""
    if backend.name != "cpp":
        pytest.skip("the functions call the ops")
    codes = torch.from_numpy(np.random.default_rng(1).integers(-8, 8, (20, 3, 3, 12)).astype(np.int8))
    packed = pack(codes, 4)
    panels = packed_panels(packed[None], 20, 12, 4, (3, 3), (1, 1), 1)
    window = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    row = Row("convolve", 0, 1, torch.float32, (1, 20, 5, 5), bits=4, window=window, packed=0, scale=1, x_scale=1)
    x = torch.randint(0, 256, (1, 12, 5, 5), dtype=torch.uint8)
    y, with_panels = (
        packed_network([x], [packed, torch.ones(1, 20), panels], table([r]), [1, 20, 5, 5], torch.float32)
        for r in (row, row._replace(panels=2))
    )
    assert torch.equal(y, with_panels)
