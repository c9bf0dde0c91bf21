"""A program that runs by segments gives the bits of its steps, and runs step by step where somebody looks."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from segment_cases import (
    assert_same,
    assert_same_in_every_layout,
    ensemble_of,
    images,
    needs_cpp,
    parts,
    stepwise,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk
from qkernels.packed import segments
from qkernels.packed.codes_max_pool import CodesMaxPool2d
from qkernels.packed.packed_layer import PackedLayer

pytestmark = needs_cpp


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("bits", [(7,), (7, 7), (8, 3, 3), (2, 5, 6)])
def test_segments_give_the_bits_of_the_steps(bits, integer):
    assert_same_in_every_layout(ensemble_of(bits=bits, integer=integer), 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("integer", [False, True])
def test_other_dtypes(dtype, integer):
    ensemble, x = ensemble_of(bits=(7, 5), integer=integer), images()
    if integer:
        assert_same(ensemble, x.to(dtype))
    assert_same(ensemble, x)
    assert_same(ensemble.to(dtype), x.to(dtype))


def test_results_do_not_depend_on_the_number_of_threads():
    ensemble, x = ensemble_of(bits=(7, 4)), images(3)
    expected = stepwise(ensemble, x)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            assert all(torch.equal(ensemble.member_logits(x), expected) for _ in range(3))
    finally:
        torch.set_num_threads(threads)


def test_threads_may_share_an_ensemble():
    ensemble, sizes = ensemble_of(bits=(7, 4)), (16, 20, 24)
    expected = {size: stepwise(ensemble, images(2, size)) for size in sizes}

    def right(i):
        size = sizes[i % len(sizes)]
        return torch.equal(ensemble.member_logits(images(2, size)), expected[size])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(120)))


def test_no_more_than_so_many_shapes_are_kept():
    ensemble = ensemble_of(bits=(4,))
    sizes = range(16, 16 + segments.MOST_SHAPES + 3)
    for size in (*sizes, *sizes):
        x = images(1, size)
        assert torch.equal(ensemble.member_logits(x), stepwise(ensemble, x))
    assert len(ensemble.program._segments._parts) == segments.MOST_SHAPES
    assert parts(ensemble, images(1, sizes[-1])) and not parts(ensemble, images(1, sizes[0]))


@pytest.mark.parametrize("shape", [(0, 3, 24, 24), (2, 3, 24, 0)])
def test_empty_images_stay_what_they_were(shape):
    ensemble, x = ensemble_of(bits=(7, 4)), torch.zeros(shape)

    def outcome(run):
        try:
            return run(ensemble, x).shape
        except (RuntimeError, ValueError) as error:
            return str(error)

    expected = outcome(stepwise)
    assert all(outcome(lambda e, x: e.member_logits(x)) == expected for _ in range(3))


# Who looks at the steps --------------------------------------------------------------------------------------------


def test_hooks_see_their_layers():
    ensemble, x = ensemble_of(), images()
    expected = [ensemble.member_logits(x) for _ in range(2)][-1]
    seen = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(ensemble.program.layer("wide"), register)(lambda *_: seen.append(1))
        assert torch.equal(ensemble.member_logits(x), expected)
        handle.remove()
    assert len(seen) == 2 and torch.equal(ensemble.member_logits(x), expected) and len(seen) == 2


def test_a_mode_sees_each_op():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func._opname)
            return func(*args, **(kwargs or {}))

    ensemble, x, names = ensemble_of(), images(), set()
    expected = [ensemble.member_logits(x) for _ in range(2)][-1]
    with Names():
        assert torch.equal(ensemble.member_logits(x), expected)
    assert "packed_conv2d_int8" in names and "packed_network" not in names


def test_subclasses_see_each_op():
    class Own(torch.Tensor):
        pass

    ensemble, x = ensemble_of(), images()
    expected = [ensemble.member_logits(x) for _ in range(2)][-1]
    assert torch.equal(ensemble.member_logits(x.as_subclass(Own)).as_subclass(torch.Tensor), expected)


def test_a_forward_of_ones_own_is_called():
    ensemble, x = ensemble_of(), images()
    expected = [ensemble.member_logits(x) for _ in range(2)][-1]
    layer, calls = ensemble.program.layer("wide"), []
    forward = layer.forward
    layer.forward = lambda *args: (calls.append(1), forward(*args))[1]
    for n in (1, 2, 3):
        assert torch.equal(ensemble.member_logits(x), expected) and len(calls) == n


class Mixed(nn.Module):
    """A product of floats between packed layers, which autocast lets have another dtype."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        x = self.second((x @ x.transpose(2, 3)).relu())
        return self.head(self.second(x).mean((2, 3)))


def test_autocast():
    ensemble, x = ensemble_of(Mixed, integer=False), images()

    def autocast(run):
        with torch.autocast("cpu", torch.bfloat16):
            return run(ensemble, x)

    expected, other = stepwise(ensemble, x), autocast(stepwise)
    for _ in range(3):
        assert torch.equal(ensemble.member_logits(x), expected)
        assert torch.equal(autocast(qk.PackedEnsemble.member_logits), other)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_what_has_run_compiles_and_exports(strict):
    ensemble, x = ensemble_of(bits=(7, 4)), images()
    expected = [ensemble(x) for _ in range(2)][-1]
    compiled = torch.compile(ensemble, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    shapes = ({0: torch.export.Dim("images", min=2, max=8)},)  # of more rows linear layers take another kernel
    exported = torch.export.export(ensemble, (x,), dynamic_shapes=shapes, strict=strict)
    assert "packed_network" not in str(exported.graph)
    assert torch.equal(exported.module()(images(5)), ensemble(images(5)))


def test_gradients_stay_an_error():
    ensemble, x = ensemble_of(bits=(7, 4), integer=False), images()
    ensemble.member_logits(x)
    for _ in range(2):
        y = ensemble.program(x.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="packed weights are for inference"):
            y.sum().backward()


# What changes ------------------------------------------------------------------------------------------------------


def assert_changed(ensemble, x, before):
    y = ensemble.member_logits(x)
    assert not torch.equal(y, before)
    assert_same(ensemble, x)


def test_to_integer_after_weights_only():
    ensemble, x = ensemble_of(integer=False), images()
    assert_same(ensemble, x)
    before = ensemble.member_logits(x)
    ensemble.to_integer_([images(4)])
    assert_changed(ensemble, x, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "activation", "silu"),
        lambda layer: setattr(layer, "output_range", (0, 3)),
        lambda layer: setattr(layer, "weight_scale", layer.weight_scale * 2),
        lambda layer: layer.weight_scale.mul_(2),
        lambda layer: layer.weight_packed.bitwise_not_(),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "bias": layer.bias + 1}),
        lambda layer: layer.rescale_(torch.tensor(2.0), torch.tensor(0.5)),
    ],
)
def test_a_changed_layer(change):
    ensemble, x = ensemble_of(), images()
    assert_same(ensemble, x)
    before = ensemble.member_logits(x)
    change(ensemble.program.layer("wide"))
    assert_changed(ensemble, x, before)


@pytest.mark.parametrize("put", [lambda p, new: p.put_layer("wide", new), lambda p, new: setattr(p, "wide", new)])
def test_another_layer(put):
    ensemble, x = ensemble_of(), images()
    assert_same(ensemble, x)
    before, layer = ensemble.member_logits(x), ensemble.program.layer("wide")
    other = copy.deepcopy(layer)
    other.weight_packed.bitwise_not_()
    put(ensemble.program, other)
    assert_changed(ensemble, x, before)
    put(ensemble.program, layer)
    assert torch.equal(ensemble.member_logits(x), before)


def test_a_changed_pool():
    ensemble, x = ensemble_of(), images()
    assert_same(ensemble, x)
    before = ensemble.member_logits(x)
    (pool,) = (layer for layer in ensemble.program.layers().values() if isinstance(layer, CodesMaxPool2d))
    pool.kernel_size, pool.padding = 2, 0
    assert_changed(ensemble, x, before)


def test_a_layer_of_shared_and_of_own_images():
    """One layer, called on what the members share and on what each has of its own."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.conv(self.conv(x).relu()).mean((2, 3)))

    for integer in (False, True):
        ensemble, x = ensemble_of(Twice, integer=integer), images()
        expected = stepwise(ensemble, x)
        assert all(torch.equal(ensemble.member_logits(x), expected) for _ in range(3))


# Copies and files --------------------------------------------------------------------------------------------------


def reloaded(ensemble, path):
    return qk.PackedEnsemble.load(ensemble.save(path / "packed"))


@pytest.mark.parametrize(
    "copied",
    [
        lambda e, _: copy.deepcopy(e),
        lambda e, _: copy.copy(e),
        lambda e, _: pickle.loads(pickle.dumps(e)),
        reloaded,
    ],
)
def test_copies_of_what_has_run(tmp_path, copied):
    ensemble, x = ensemble_of(), images()
    assert_same(ensemble, x)
    expected = ensemble.member_logits(x)
    other = copied(ensemble, tmp_path)
    assert_same(other, x)
    assert torch.equal(other.member_logits(x), expected)
    if other.program is not ensemble.program:
        other.program.layer("wide").weight_scale.mul_(2)
        assert_changed(other, x, expected)
    assert torch.equal(ensemble.member_logits(x), ensemble.member_logits(x))


def test_a_file_is_watched_for_each_new_shape(tmp_path):
    ensemble, x, larger = ensemble_of(), images(), images(64, 40)
    path = ensemble.save(tmp_path / "packed")
    loaded = qk.PackedEnsemble.load(path, max_bytes=1_000_000)
    expected = stepwise(ensemble, x)
    for _ in range(3):
        assert torch.equal(loaded.member_logits(x), expected)
        with pytest.raises(qk.PackedFileError, match="max_bytes"):
            loaded.member_logits(larger)
    assert any(parts(loaded, x)) and not parts(loaded, larger)


# Weights that are kept unpacked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(7,), (8, 3, 3)])
def test_unpacked_weights_give_the_same_bits(bits, tmp_path):
    ensemble, x = ensemble_of(bits=bits), images()
    expected, packed = ensemble.member_logits(x), ensemble.nbytes
    assert ensemble.unpack_() is ensemble
    weights = sum(layer.count for layer in ensemble.program.modules() if isinstance(layer, PackedLayer))
    assert ensemble.nbytes > packed + weights * 0.8
    for _ in range(3):
        assert torch.equal(ensemble.member_logits(x), expected)
    assert torch.equal(copy.deepcopy(ensemble).member_logits(x), expected)
    ensemble.save(tmp_path / "packed")
    assert qk.PackedEnsemble.load(tmp_path / "packed").nbytes == packed
    assert ensemble.unpack_(False).nbytes == packed
    assert torch.equal(ensemble.member_logits(x), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight_packed.bitwise_not_(),
        lambda layer: setattr(layer, "weight_packed", ~layer.weight_packed),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "weight_packed": ~layer.weight_packed}),
    ],
)
def test_other_weights_are_not_those_that_were_unpacked(change):
    ensemble, x = ensemble_of().unpack_(), images()
    before = [ensemble.member_logits(x) for _ in range(2)][-1]
    change(ensemble.program.layer("wide"))
    assert_changed(ensemble, x, before)
    before = [ensemble.member_logits(x) for _ in range(2)][-1]
    assert torch.equal(ensemble.unpack_().member_logits(x), before)


def test_what_is_not_unpacked():
    with pytest.raises(ValueError, match="call to_integer_ first"):
        ensemble_of(integer=False).unpack_()
    with pytest.raises(ValueError, match="a GPU's kernels read the packed bits"):
        ensemble_of().to("meta").unpack_()
    moved = ensemble_of().unpack_().to("meta")
    assert all(layer.weight_panels is None for layer in moved.modules() if isinstance(layer, PackedLayer))
