"""What the tests of the packed ops share: the backend under test, layouts and comparisons, random layers."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import packed_oracle as oracle
from backend_under_test import Backend, compiled, slow, why_not
from packed_oracle import ACTIVATIONS, Window
from qkernels.ops import library
from qkernels.ops.geometry import Geometry

backend = Backend("reference")  # which `each_backend` chooses anew for each test

# C++ with the kernels of every instruction set that this CPU has, and the others.
ISAS = ("portable", "emulated_amx", "avx2", "avxvnni", "avx512vnni", "amx")
BACKENDS = (
    "reference",
    *(compiled(f"cpp-{isa}") for isa in ISAS),
    compiled("cuda"),
    *map(slow, ("emulated", "triton")),
)


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request, monkeypatch):
    name, _, isa = request.param.partition("-")
    if (why := why_not(name)) is not None:
        pytest.skip(why)
    if isa:
        if isa not in ("portable", "emulated_amx", *library.cpu_features()):
            pytest.skip(f"this CPU lacks {isa}")
        monkeypatch.setenv("QKERNELS_CPU_ISA", isa)
    backend.choose(name)


LAYOUTS = ("contiguous", "channels_last", "strided", "unaligned")
INTEGERS = (torch.int8, torch.uint8)
RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**32 - 1)


def laid_out(values: np.ndarray | torch.Tensor, layout: str = "contiguous") -> torch.Tensor:
    """The values on the backend's device, in another memory layout."""
    t = torch.as_tensor(np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values).to(backend.device)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        padded = t.new_zeros([2 * n + 1 for n in t.shape])
        return padded[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
    if layout == "unaligned":
        return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
    return t


def array(t: torch.Tensor) -> np.ndarray:
    return t.float().cpu().numpy() if t.is_floating_point() else t.cpu().numpy()


def assert_equal(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and tuple(actual.shape) == expected.shape
    np.testing.assert_array_equal(array(actual), expected)


def assert_channels_last(t: torch.Tensor) -> None:
    assert t.is_contiguous(memory_format=torch.channels_last)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 values as a store to `dtype` makes them; Triton's interpreter truncates to bfloat16."""
    t = torch.from_numpy(np.array(values, np.float32))
    if backend.truncates_bfloat16 and dtype == torch.bfloat16:
        t = (t.view(torch.int32) & -65536).view(torch.float32)
    return array(t.to(dtype))


class Layer(NamedTuple):
    """What both convolutions take, x apart; codes in numpy, the rest on the backend's device."""

    images: int
    in_shape: tuple[int, int, int]
    codes: np.ndarray
    packed: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    bits: int
    geometry: Geometry
    shared: bool
    activation: str

    @property
    def members(self) -> int:
        return len(self.codes)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.images * (1 if self.shared else self.members), *self.in_shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        size = self.geometry.output_size(*self.in_shape[1:])
        return (self.images * self.members, self.codes.shape[1], *size)

    def sums(self, x: np.ndarray) -> np.ndarray:
        g = self.geometry
        window = Window(g.stride, g.padding, g.dilation, g.groups)
        return oracle.members_convolution(x, self.codes.astype(x.dtype), window, self.shared)

    def absolute(self) -> "Layer":
        return self._replace(codes=np.abs(self.codes))


def make_layer(
    rng, bits, members, images, in_shape, out_channels, geometry, shared, activation="none", bias=True, layout=None
) -> Layer:
    weight_shape = geometry.weight_shape(out_channels, in_shape[0])
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (members, *weight_shape))
    packed = np.stack([oracle.pack(c, bits) for c in codes])
    scale = (np.exp(rng.uniform(-4, 0, (members, out_channels))) / 2**bits).astype(np.float32)
    bias = rng.normal(size=(members, out_channels)).astype(np.float32) if bias else None
    return Layer(
        images,
        in_shape,
        codes,
        laid_out(packed, layout or "contiguous"),
        laid_out(scale, layout or "contiguous"),
        None if bias is None else laid_out(bias, layout or "contiguous"),
        bits,
        geometry,
        shared,
        activation,
    )


@st.composite
def layers(draw):
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (1, 3), (7, 7), (2, 5)]))
    small = st.integers(1, 2)
    stride, dilation = draw(st.tuples(small, small)), draw(st.tuples(small, small))
    padding = draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (3, 2, 0, 1), (2, 2, 2, 2)]))
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - pads), max(1, d * (k - 1) + 1 - pads) + 8))
        for k, d, pads in zip(kernel, dilation, (padding[0] + padding[2], padding[1] + padding[3]), strict=True)
    ]
    width = 7 if backend.interpreted else 21
    groups, depth, per_group = draw(
        st.one_of(
            st.tuples(st.just(1), st.integers(1, width), st.integers(1, 21)),
            st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9)),
            st.tuples(st.integers(2, 37), st.just(1), st.integers(1, 3)),  # depthwise, with a channel multiplier
            st.tuples(st.integers(2, 5), st.integers(2, 4), st.integers(1, 3)),
        )
    )
    return make_layer(
        np.random.default_rng(draw(SEEDS)),
        draw(BITS),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([0, 1, 1, 2, 3])),
        (groups * depth, *size),
        groups * per_group,
        Geometry(kernel, stride, padding, dilation, groups),
        draw(st.booleans()),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.booleans()),
        draw(st.sampled_from(["contiguous", "strided"])),
    )
