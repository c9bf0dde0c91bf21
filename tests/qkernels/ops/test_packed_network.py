"""`packed_network`: random tables against the ops of the single layers and the reference, and what it refuses."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import packed_oracle as oracle
from network_cases import CODES, FLOATS, Network, random_network
from packed_cases import backend, each_backend  # noqa: F401, a fixture
from qkernels import backends
from qkernels.ops import packed_network as op
from qkernels.ops.geometry import Geometry
from qkernels.ops.network_checks import MOST_TERMS
from qkernels.ops.packed_network import FIELDS, Row, packed_network, table
from qkernels.ops.packing import pack, packed_bytes

NUMBERS = range(12)


@pytest.fixture(autouse=True)
def cpu_alone(each_backend):  # noqa: F811
    if backend.name not in ("cpp", "reference"):
        pytest.skip("packed_network is written in C++ for CPUs alone")


def constant(arguments, row, name, count=1):
    """What a row's members have of a constant."""
    if getattr(row, name) < 0:
        return None
    flat = arguments[1][getattr(row, name)].reshape(-1)[row.member * count :][: row.members * count]
    return flat if count == 1 and name != "scale" and name != "bias" else flat.view(row.members, count)


def by_single_ops(network, arguments):
    """What the ops of the single layers give, a row after another."""
    values = list(network.inputs)
    for row in network.rows:
        x = values[row.x]
        if row.kind == "quantize":
            by_member = x.repeat(row.shape[0] // x.shape[0], 1, 1, 1).unflatten(0, (row.members, -1))
            scale = arguments[1][row.out_scale][: row.members]
            y = backend.quantize(by_member, scale, *row.code_range, 0).flatten(0, 1).view(row.dtype)
        elif row.kind == "max_pool":
            window = Geometry.of(*[list(row.window[i : i + n]) for i, n in ((0, 2), (2, 2), (4, 4), (8, 2))], 1)
            top, left, bottom, right = window.padding
            padded = torch.nn.functional.pad(x.float(), (left, right, top, bottom), value=-np.inf)
            y = torch.nn.functional.max_pool2d(padded, window.kernel, window.stride).to(x.dtype)
        elif row.kind == "convolve":
            y = convolved(row, values, arguments)
        else:  # what is no op by itself, in a table of its own
            taken = [x] if row.residual < 0 else [x, values[row.residual]]
            alone = row._replace(x=0, residual=-1 if row.residual < 0 else 1, result=len(taken))
            y = backend.packed_network(taken, arguments[1], table([alone]), list(row.shape), row.dtype)
        y = y[:, :, : row.shape[2], : row.shape[3]]
        if row.part:
            values[-1] = torch.cat([values[-1], y])
        else:
            values.append(y)
    return values[-1]


def convolved(row, values, arguments):
    geometry = Geometry.of(*[list(row.window[i : i + n]) for i, n in ((0, 2), (2, 2), (4, 4), (8, 2))], row.window[10])
    images = slice(row.first, row.first + row.members * row.images_of_member)
    x = values[row.x] if row.shared else values[row.x][images]
    size = packed_bytes(torch.Size(geometry.weight_shape(row.shape[1], x.shape[1])).numel(), row.bits)
    packed = arguments[1][row.packed][row.byte :][: row.members * size].view(row.members, size)
    scale, bias = (constant(arguments, row, name, row.shape[1]) for name in ("scale", "bias"))
    residual = None
    if row.residual >= 0:  # which may be a part of what there are windows for
        residual = values[row.residual][images]
        height, width = geometry.output_size(*x.shape[2:])
        residual = torch.nn.functional.pad(residual, (0, width - row.shape[3], 0, height - row.shape[2]))
    rest = (row.bits, *geometry.arguments, row.shared, row.activation)
    if x.dtype in FLOATS:
        return backend.packed_conv2d(x, packed, scale, bias, residual, *rest)
    x_scale, residual_scale, out_scale = (
        constant(arguments, row, name) for name in ("x_scale", "residual_scale", "out_scale")
    )
    scales = (residual_scale, out_scale)
    return backend.packed_conv2d_int8(
        x, x_scale, packed, scale, bias, residual, *scales, *rest, *row.code_range, row.dtype
    )


def assert_same(y, expected):
    assert y.dtype == expected.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("most", [9, 70])
def test_bits_of_the_single_ops(number, most):
    """Of codes and of floats, exponentials included."""
    network = random_network(number, most=most)
    arguments = network.arguments()
    assert_same(backend.packed_network(*arguments), by_single_ops(network, arguments))


@pytest.mark.parametrize("number", range(100, 120))
def test_bits_of_the_reference(number):
    """Of codes, without an exponential: what all backends compute alike."""
    arguments = random_network(number, exact=True).arguments()
    assert_same(backend.packed_network(*arguments), backends.reference.packed_network(*arguments))


def chain(number, channels=40):
    """A network with every kind of row, large enough to be cut into blocks and slices."""
    network = Network(random.Random(number), members=2, exact=True)
    x = network.input(torch.float32, (4, 3, 40, 41), shared=True)
    x = network.convolve(network.quantize(x), Geometry((7, 7), (2, 2), (3, 3, 3, 3)), channels)
    x = x if x.dtype in CODES else network.quantize(x)
    x = network.pool(x)
    for groups in (1, channels, 4):
        x = network.convolve(x, Geometry((3, 3), padding=(1, 1, 1, 1), groups=groups), channels)
        x = x if x.dtype in CODES else network.quantize(x)
    return network


@pytest.mark.parametrize("state", range(4))
def test_results_do_not_depend_on_the_number_of_threads(state):
    arguments = chain(state).arguments()
    expected = backend.packed_network(*arguments)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7, 7):
            torch.set_num_threads(n)
            assert_same(backend.packed_network(*arguments), expected)
    finally:
        torch.set_num_threads(threads)
    assert_same(expected, backends.reference.packed_network(*arguments))


def test_threads_do_not_share_memory():
    """Of what arenas and scratch have, each call its own."""
    cases = [chain(i).arguments() for i in range(3)]
    expected = [backend.packed_network(*arguments) for arguments in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: backend.packed_network(*cases[i % 3]), range(24)))
    for i, y in enumerate(results):
        assert_same(y, expected[i % 3])


def test_one_convolution_of_the_oracle():
    rng = np.random.default_rng(0)
    x, codes = rng.integers(-128, 128, (4, 6, 5, 7)), rng.integers(-16, 16, (2, 6, 3, 2, 3))
    window = oracle.Window((2, 1), (1, 0, 2, 1), (1, 2), 2)
    packed = torch.from_numpy(np.concatenate([oracle.pack(c, 5) for c in codes]))
    scale = rng.uniform(0.01, 0.02, (2, 6)).astype(np.float32)
    x_scale = rng.uniform(0.01, 0.02, 2).astype(np.float32)
    sums = oracle.members_convolution(x.astype(np.int64), codes, window, False).astype(np.float32)
    expected = oracle.epilogue(sums, scale * x_scale[:, None], None, None, "relu")
    shape = (4, *expected.shape[2:])
    row = Row(
        *("convolve", 0, 1, torch.float32, shape),
        **dict(members=2, images_of_member=2, bits=5, window=(3, 2, 2, 1, 1, 0, 2, 1, 1, 2, 2), activation="relu"),
        **dict(packed=0, scale=1, x_scale=2),
    )
    constants = [packed, torch.from_numpy(scale), torch.from_numpy(x_scale)]
    y = backend.packed_network([torch.from_numpy(x).to(torch.int8)], constants, table([row]), shape, torch.float32)
    np.testing.assert_array_equal(y.numpy(), expected.reshape(shape))


@pytest.mark.parametrize("dtype", CODES)
def test_a_pool_of_the_padding_alone_has_no_part(dtype):
    """Codes as small as there are: padding is less than any."""
    least = torch.iinfo(dtype).min
    x = torch.full((2, 3, 4, 5), least, dtype=dtype)
    x[1, 2, 3, 4] = least + 1
    row = Row("max_pool", 0, 1, dtype, (2, 3, 4, 5), images_of_member=2, window=(3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1))
    y = backend.packed_network([x], [], table([row]), (2, 3, 4, 5), dtype)
    expected = torch.full_like(x, least)
    expected[1, 2, 2:, 3:] = least + 1
    assert_same(y, expected)


def test_more_terms_than_sums_of_codes_may_have_are_floats(number=MOST_TERMS + 1):
    """As in packed_conv2d."""
    packed, scale = pack(torch.full((number,), -1, dtype=torch.int8), 2), torch.ones(1, 1)
    row = Row("convolve", 0, 1, torch.float32, (1, 1, 1, 1), bits=2, packed=0, scale=1)
    x = torch.ones(1, number, 1, 1)
    y = backend.packed_network([x], [packed, scale], table([row]), (1, 1, 1, 1), torch.float32)
    assert y.item() == -number
    codes = table([row._replace(x_scale=2)])
    with pytest.raises((RuntimeError, ValueError), match="row 0 has sums that may exceed int32"):
        backend.packed_network([x.byte()], [packed, scale, scale[0]], codes, (1, 1, 1, 1), torch.float32)


# What it refuses ---------------------------------------------------------------------------------------------------

SHAPE = (4, 4, 6, 6)
WINDOW = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)
ROWS = [
    Row("quantize", 0, 2, torch.uint8, SHAPE, members=2, out_scale=2),
    Row(
        *("convolve", 2, 3, torch.uint8, SHAPE, 1),
        **dict(images_of_member=2, bits=7, window=WINDOW, packed=0, scale=1, bias=1, x_scale=2),
        **dict(residual_scale=2, out_scale=2),
    ),
    Row(
        *("convolve", 2, 3, torch.uint8, SHAPE, 1),
        **dict(part=1, first=2, member=1, images_of_member=2, bits=7, byte=224, window=WINDOW),
        **dict(packed=0, scale=1, bias=1, x_scale=2, residual_scale=2, out_scale=2),
    ),
    Row("max_pool", 3, 4, torch.uint8, SHAPE, images_of_member=4, window=WINDOW),
]
HUGE = (2**40 + 1, -(2**40) - 1, 2**63 - 1, -(2**63))
MISTAKES = [  # the row, its numbers, and the message
    *((0, {"bits": n}, "row 0 has a number out of range") for n in HUGE),
    (0, {"kind": len(op.KINDS)}, "row 0 is of an unknown kind"),
    (0, {"kind": -1}, "row 0 is of an unknown kind"),
    *((0, {"x": n}, "row 0 takes what is not there") for n in (-1, 2, 3, 2**40)),
    *((0, {"result": n}, "row 0 begins a result that is not the next") for n in (0, 1, 3, -1)),
    (0, {"part": 1, "result": 1}, "row 0 goes on with another result"),
    (0, {"dtype": 3}, "row 0 has a dtype of neither"),
    (0, {"dtype": 256}, "row 0 has a dtype of neither"),
    (0, {"dtype": 6}, "row 0 quantizes codes, or to floats"),
    (0, {"x": 1}, "row 0 quantizes codes, or to floats"),
    (0, {"height": 7}, "row 0 quantizes to another shape"),
    (0, {"images": 0}, "row 0 has a size that is too small"),
    (0, {"members": 0}, "row 0 has a size that is too small"),
    (0, {"members": 3}, "row 0 (takes more of a constant than is there|quantizes to another shape)"),
    (0, {"out_scale": -1}, "a constant that is not there"),
    (0, {"out_scale": 3}, "a constant that is not there"),
    (0, {"out_scale": 0}, "row 0 takes more of a constant than is there"),
    (0, {"qmax": 256}, "row 0 has a range of codes that its dtype does not hold"),
    (0, {"qmin": 255}, "row 0 has a range of codes that its dtype does not hold"),
    (0, {"first": 1}, "row 0 does not go on where the one before it ended"),
    (1, {"x": 3}, "row 1 takes what is not there"),
    (1, {"residual": 3}, "row 1 takes what is not there"),
    (1, {"residual": 0}, "row 1 has an? .*residual.*codes"),
    (1, {"residual_scale": -1}, "row 1 has an? .*residual.*codes"),
    (1, {"x_scale": -1}, "row 1 has an? .*codes"),
    (1, {"out_scale": -1}, "row 1 has an? .*codes"),
    (1, {"members": 3}, "row 1 gives more images than its result has"),
    (1, {"member": 2}, "row 1 takes more of a constant than is there"),
    (1, {"member": -1}, "row 1 has a size that is too small"),
    (1, {"images_of_member": 5}, "row 1 gives more images than its result has"),
    (1, {"images_of_member": 1}, "row 2 does not go on where the one before it ended"),
    (1, {"shared": 1}, "row 1 takes more images than there are"),
    (1, {"groups": 3}, "row 1 has channels that do not divide by its groups"),
    (1, {"groups": 0}, "row 1 has a size that is too small"),
    (1, {"bits": 1}, "bits"),
    (1, {"bits": 9}, "bits"),
    (1, {"byte": 225}, "row 1 takes more weights than there are"),
    (1, {"byte": -1}, "row 1 has (a size that is too small|bits)"),
    (1, {"packed": 1}, "row 1 takes more weights than there are"),
    (1, {"packed": -1}, "row 1 takes a constant that is not there"),
    (1, {"scale": -1}, "a constant that is not there"),
    (1, {"scale": 2}, "row 1 takes more of a constant than is there"),
    (1, {"kernel_h": 4}, "row 1 has windows that reach behind the image"),
    (1, {"stride_w": 2**40}, "row 1 has windows that reach behind the image"),
    (1, {"pad_top": -1}, "row 1 has a size that is too small"),
    (1, {"pad_right": 0}, "row 1 has windows that reach behind the image"),
    (1, {"dilation_w": 2}, "row 1 has windows that reach behind the image"),
    (1, {"activation": len(op.ACTIVATION_NUMBERS)}, "row 1 has an unknown activation"),
    (1, {"activation": -1}, "row 1 has an unknown activation"),
    (1, {"dtype": 15}, "row 1 has an? .*codes"),
    (2, {"bits": 8}, "row 2 takes more weights than there are"),
    (2, {"part": 0}, "row 2 begins a result that is not the next"),
    (2, {"first": 3}, "row 2 does not go on where the one before it ended"),
    (2, {"height": 5}, "row 2 goes on with another result"),
    (2, {"dtype": 1}, "row 2 goes on with another result"),
    (2, {"result": 2}, "row 2 goes on with another result"),
    (2, {"images": 2}, "row 2 goes on with another result"),
    (3, {"x": 0}, "row 3 is no max pool of codes"),
    (3, {"dtype": 1}, "row 3 (is no max pool of codes|ends with another result)"),
    (3, {"pad_top": 3}, "row 3 is no max pool of codes"),
    (3, {"dilation_h": 2, "pad_top": 2, "pad_bottom": 2}, "row 3 is no max pool of codes"),
    (3, {"images_of_member": 3}, "row 3 is no max pool of codes"),
    (3, {"channels": 3}, "row 3 (is no max pool of codes|ends with another result)"),
    (3, {"part": 1}, "row 3 goes on with another result"),
    (3, {"result": 3, "part": 1, "x": 2}, "row 3 does not go on where the one before it ended"),
]


def legal():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    codes, scale = torch.ones(2, 4, 4, 9, dtype=torch.int8), torch.rand(2, 4)
    packed = torch.cat([pack(c, 7) for c in codes])
    return [[x, x.to(torch.uint8)], [packed, scale, torch.tensor([0.01, 0.02])], table(ROWS), list(SHAPE), torch.uint8]


def test_what_the_mistakes_are_made_in_is_legal():
    arguments = legal()
    assert_same(backend.packed_network(*arguments), backends.reference.packed_network(*arguments))


@pytest.mark.parametrize("row, numbers, message", MISTAKES)
def test_mistakes_in_rows_are_named(row, numbers, message):
    inputs, constants, steps, *rest = legal()
    kept = [x.clone() for x in inputs]
    for name, number in numbers.items():
        steps[row, FIELDS.index(name)] = number
    with pytest.raises((RuntimeError, ValueError), match=message):
        backend.packed_network(inputs, constants, steps, *rest)
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))


@pytest.mark.parametrize(
    "at, value, error, message",
    [
        (0, [], ValueError, "there are no inputs"),
        (0, [torch.zeros(4, 4, 6)] * 2, ValueError, r"inputs must be \[images, channels"),
        (0, [torch.zeros(4, 4, 0, 6)] * 2, ValueError, "inputs must have elements"),
        (0, [torch.zeros(SHAPE).double()] * 2, TypeError, "inputs must be codes or floats"),
        (0, [torch.zeros(3, 4, 6, 6)] * 2, RuntimeError, "row 0 quantizes to another shape"),
        (1, [], RuntimeError, "row 0 takes a constant that is not there"),
        (1, [torch.ones(2)] * 3, RuntimeError, "row 1 takes more of a constant|row 1 takes more weights"),
        (1, [torch.ones(2, device="meta")] * 3, ValueError, "must be on one device"),
        (2, table(ROWS)[:, :-1], ValueError, rf"steps must be an int64 table \[steps, {len(FIELDS)}\]"),
        (2, table(ROWS)[:0], ValueError, rf"steps must be an int64 table \[steps, {len(FIELDS)}\]"),
        (2, table(ROWS).int(), ValueError, rf"steps must be an int64 table \[steps, {len(FIELDS)}\]"),
        (2, table(ROWS[:2]), RuntimeError, "row 1 ends with another|lacks images"),
        (2, table(ROWS[:1]), RuntimeError, "."),
        (2, table(ROWS[1:]), RuntimeError, "row 0 begins a result that is not the next"),
        (3, [4, 4, 6], ValueError, "out_sizes must be four positive numbers"),
        (3, [4, 4, 6, 0], ValueError, "out_sizes must be four positive numbers"),
        (3, [4, 4, 6, 5], RuntimeError, "ends with another result than the op is told to give"),
        (3, [2**40, 2**40, 6, 6], RuntimeError, "does not fit 64 bits"),
        (4, torch.int8, RuntimeError, "ends with another result than the op is told to give"),
        (4, torch.int32, TypeError, "out_dtype must be of codes or floats"),
    ],
)
def test_mistakes_are_named(at, value, error, message):
    if backend.name != "cpp":
        pytest.skip("the function calls the op")
    arguments = legal()
    arguments[at] = value
    if at == 2 and len(value) == 1:  # a table of its own, that is right
        assert packed_network(*arguments).dtype == torch.uint8
        return
    with pytest.raises(error, match=message):
        packed_network(*arguments)


def test_any_layout_will_do():
    arguments = random_network(7, exact=True).arguments()
    expected = backend.packed_network(*arguments)
    spread = [[torch.stack([t, t], -1)[..., 0] for t in tensors] for tensors in arguments[:2]]
    steps = torch.stack([arguments[2]] * 2, -1)[..., 0]
    assert not steps.is_contiguous()
    assert_same(backend.packed_network(*spread, steps, *arguments[3:]), expected)


def test_what_no_one_takes_is_computed_for_nothing():
    inputs, constants, _, *rest = legal()
    unused = [ROWS[0], ROWS[0]._replace(result=3), ROWS[0]._replace(result=4)]
    y = backend.packed_network(inputs, constants, table(unused), *rest)
    assert_same(y, backend.packed_network(inputs, constants, table(ROWS[:1]), *rest))


def test_results_that_no_memory_holds():
    """2**54 bytes are an error, and leave an arena as it was."""
    if backend.name != "cpp":
        pytest.skip("an arena is the C++ backend's")
    inputs, constants, steps, *rest = legal()
    expected = backend.packed_network(inputs, constants, steps, *rest)
    large = {"height": 2**40, "pad_bottom": 2**40, "width": 2**10, "pad_right": 2**10}
    huge = steps.clone()
    for name, number in large.items():
        huge[1:3, FIELDS.index(name)] = number
    for _ in range(2):
        with pytest.raises(RuntimeError, match="there is no memory for"):
            backend.packed_network(inputs, constants, huge, *rest)
        assert_same(backend.packed_network(inputs, constants, steps, *rest), expected)


def test_the_columns_are_those_of_the_header():
    header = (Path(__file__).parents[3] / "csrc" / "cpu" / "packed_table.h").read_text()
    fields = header.partition("enum class Field : int64_t {")[2].partition("count")[0]
    assert tuple(name.strip() for name in fields.split(",") if name.strip()) == FIELDS
    kinds = header.partition("enum Kind : int64_t {")[2].partition("}")[0]
    assert [k.strip().lower()[1:] for k in kinds.replace("MaxPool", "max_pool").split(",")] == list(op.KINDS)


def test_in_a_process_of_its_own():
    """The first call of all, with as many threads as there are."""
    if backend.name != "cpp":
        pytest.skip("threads are the C++ backend's")
    tests = Path(__file__).parents[2]
    script = (
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]; import torch, qkernels, network_cases;"
        "torch.set_num_threads(3); a = network_cases.random_network(5, exact=True).arguments();"
        "y = torch.ops.qkernels.packed_network(*a);"
        "assert torch.equal(y, qkernels.backends.reference.packed_network(*a))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
