"""What lies next to a window in memory, and next to the whole input: kernels load more than they multiply."""

import ctypes
import mmap

import numpy as np
import pytest
import torch

import packed_oracle as oracle
from packed_cases import (
    INTEGERS,
    Layer,
    array,
    backend,
    each_backend,  # noqa: F401, a fixture
    laid_out,
    make_layer,
)
from qkernels.ops.geometry import Geometry

PROT_NONE = 0  # of <sys/mman.h>
CHANNELS = (1, 2, 3, 5, 16, 34, 48, 64, 67, 134)  # of them pairs, fours, full rows of tiles, and primes
GEOMETRIES = (Geometry(), Geometry((3, 3)), Geometry((3, 3), padding=(1, 1, 1, 1)), Geometry((1, 2), stride=(2, 2)))
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's and the interpreter's, of infinities
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


def convolved(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    end = (layer.bits, *layer.geometry.arguments, layer.shared, "none")
    if x.dtype not in INTEGERS:
        return backend.packed_conv2d(x, layer.packed, layer.scale, layer.bias, None, *end)
    ones = laid_out(np.ones(layer.members, np.float32))
    begin = (x, ones, layer.packed, layer.scale, layer.bias, None, None, None)
    return backend.packed_conv2d_int8(*begin, *end, 0, 255, torch.float32)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_reach_the_windows_that_hold_them(dtype, channels):
    """And no others, whatever zeros they are multiplied by on the way."""
    if backend.interpreted and channels > 16:
        pytest.skip("the interpreter takes a minute")
    rng = np.random.default_rng(channels)
    for geometry in GEOMETRIES:
        layer = make_layer(rng, 4, 1, 2, (channels, 5, 4), 3, geometry, True)
        layer = layer._replace(codes=np.where(layer.codes == 0, 1, layer.codes))
        layer = layer._replace(packed=packed(layer))
        values = rng.normal(size=layer.x_shape).astype(np.float32)
        values[rng.random(values.shape) < 1 / (4 * channels)] = np.inf
        x = laid_out(torch.from_numpy(values).to(dtype), "channels_last")
        # Positive weights in place of all: what is infinite comes out so, and NaN is not in question.
        finite = np.isfinite(layer.absolute().sums(np.abs(array(x)))[0])
        np.testing.assert_array_equal(np.isfinite(array(convolved(layer, x))), finite)


def packed(layer: Layer) -> torch.Tensor:
    return laid_out(np.stack([oracle.pack(codes, layer.bits) for codes in layer.codes]))


@pytest.fixture
def at_the_end():
    """Copies of a tensor in the memory format channels_last, behind whose last byte nothing may be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = mmap.mmap(-1, 256 * mmap.PAGESIZE)
    memory = np.frombuffer(pages, np.uint8)
    size = len(memory) - mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + size), mmap.PAGESIZE, PROT_NONE) == 0

    def copied(x: torch.Tensor) -> torch.Tensor:
        pixels = x.permute(0, 2, 3, 1)
        placed = torch.frombuffer(pages, dtype=x.dtype, count=x.numel(), offset=size - x.numel() * x.element_size())
        return placed.view(pixels.shape).copy_(pixels).permute(0, 3, 1, 2)

    return copied


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_nothing_is_read_behind_the_input(dtype, at_the_end):
    if backend.name != "cpp":
        pytest.skip("the C++ kernels walk memory themselves")
    rng = np.random.default_rng(0)
    for channels in CHANNELS:
        for geometry in GEOMETRIES:
            for size in ((3, 3), (5, 4), (9, 11)):
                layer = make_layer(rng, 7, 2, 1, (channels, *size), 17, geometry, False)
                x = torch.from_numpy(rng.integers(0, 100, layer.x_shape)).to(dtype)
                assert torch.equal(convolved(layer, at_the_end(x)), convolved(layer, x))
