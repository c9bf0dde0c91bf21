"""What the tests of segments share: ensembles of small networks, run step by step and by segments."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import backends
from qkernels.packed import segments
from qkernels.packed.packed_layer import PackedLayer

needs_cpp = pytest.mark.skipif(
    all(row.backend != "cpp" for row in backends.report() if row.op == "packed_network"),
    reason="the C++ library was not built",
)


class Small(nn.Module):
    """A stem with a pool of codes, a residual block with a depthwise convolution, and a head of two layers."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, channels, 3, 2, 1), nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, groups=2 * channels)
        self.narrow = nn.Conv2d(2 * channels, channels, 1)
        self.hidden, self.head = nn.Linear(channels, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.pool(self.stem(x).relu())
        x = (self.narrow(self.depthwise(self.wide(x).relu()).relu()) + x).relu()
        return self.head(self.hidden(x.amax((2, 3))).relu())  # which all ways to compute agree on


def ensemble_of(make=Small, bits=(7, 7, 4), size=24, integer=True):
    models = []
    for seed, b in enumerate(bits):
        torch.manual_seed(seed)
        models.append(make().eval())
        qk.quantize_(models[-1], qk.QConfig(weight_bits=b))
    ensemble = qk.PackedEnsemble.from_models(models, example=images(1, size))
    if integer:
        ensemble.to_integer_([images(4, size)])
    return ensemble


def images(count=2, size=24):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@contextmanager
def watched():
    """Within, each layer is called by itself."""
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        yield seen
    finally:
        handle.remove()


def stepwise(ensemble, x):
    with watched() as seen:
        y = ensemble.member_logits(x)
    assert any(isinstance(module, PackedLayer) for module in seen)
    return y


def parts(ensemble, x):
    kept = ensemble.program._segments.parts(x, segments.state_of(list(ensemble.program.layers().values())))
    return [] if kept is None else [isinstance(part.call, segments.Segment) for part in kept.calls]


def assert_same(ensemble, x, tolerance=0.0):
    """Step by step, in the run that finds the segments, and by them; of the largest logit if they round otherwise."""
    expected = stepwise(ensemble, x)
    first, *later = (ensemble.member_logits(x) for _ in range(3))
    assert all(torch.equal(y, first) for y in later)
    assert (first - expected).abs().max() <= tolerance * expected.abs().max()
    assert any(parts(ensemble, x))


def assert_same_in_every_layout(ensemble, size, tolerance=0.0):
    for x in (images(1, size), images(3, size)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert_same(ensemble, x.contiguous(memory_format=memory_format), tolerance)
