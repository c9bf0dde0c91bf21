"""Threads, forks and spawned processes: the ops give the bits that one thread gives, and files stay whole."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from campaigns_of import cases
from qkernels import replace_file

SEED = 13
THREADS, ROUNDS = 16, 25  # callers at once, calls of each
COUNTS = (1, 2, 3, 4, 7, 8, 16, 31, 32, 48, 64)  # threads of one op
SECONDS = 900  # that a campaign may take

pytestmark = [pytest.mark.timeout(SECONDS), pytest.mark.untraced]


class Network(nn.Module):
    """Convolutions, plain and depthwise, with norms and a residual, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.norm2 = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 48, 3, stride=2)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.depthwise(x)).relu()
        return self.head(self.conv2(x).relu().mean((2, 3)))


def ensemble(integer: bool) -> qk.PackedEnsemble:
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Network()
        qk.quantize_(model, qk.QConfig(weight_bits=5))
        models.append(model.eval())
    packed = qk.PackedEnsemble.from_models(models)
    if integer:
        packed.to_integer_([torch.rand(8, 3, 16, 16)], "max")
    return packed


def operations() -> dict[str, Callable[[], list[Tensor]]]:
    """What is called: large enough that each is divided among threads; all inputs are there before."""
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, scale, images = random(64, 96, 33), random(64).abs() + 0.1, random(16, 3, 16, 16)
    codes = torch.randint(-16, 16, (300, 257), generator=generator, dtype=torch.int8)
    weights, scales = [random(64, 96, 33), random(48, 500)], [random(64).abs() + 0.1, random(48).abs() + 0.1]
    floating, integer = ensemble(False), ensemble(True)

    def gradients() -> list[Tensor]:
        leaf, own = x.clone().requires_grad_(), scale.clone().requires_grad_()
        qk.fake_quantize(leaf, own, -8, 7, axis=0).square().sum().backward()
        return [leaf.grad, own.grad]

    def many() -> list[Tensor]:
        leaves = [weight.clone().requires_grad_() for weight in weights]
        own = [scale.clone().requires_grad_() for scale in scales]
        outputs = qk.fake_quantize_multi(leaves, own, [-8, -64], [7, 63])
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        return [*(leaf.grad for leaf in leaves), *(scale.grad for scale in own)]

    return {
        "fake_quantize": gradients,
        "fake_quantize_multi": many,
        "mean_abs": lambda: [qk.mean_abs(x, axis=0)],
        "packing": lambda: [qk.pack(codes, 5), qk.unpack(qk.pack(codes, 5), 5, codes.shape)],
        "float activations": lambda: [floating.member_logits(images)],
        "integer activations": lambda: [integer.member_logits(images)],
    }


def results() -> dict[str, list[Tensor]]:
    return {name: call() for name, call in operations().items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@cases(2, ROUNDS)
def test_sixteen_threads_get_what_one_gets(count, figures):
    with threads(1):
        calls = operations()
        expected = {name: call() for name, call in calls.items()}

    def caller(number: int) -> list[str]:
        """The names of what came out otherwise; each thread begins with another op."""
        names = list(calls)[number % len(calls) :] + list(calls)[: number % len(calls)]
        return [name for _ in range(count) for name in names if not same(calls[name](), expected[name])]

    with threads(2), ThreadPoolExecutor(THREADS) as pool:
        assert [wrong for wrong in pool.map(caller, range(THREADS)) if wrong] == []
    calls_made = THREADS * count * len(calls)
    figures(f"calls by {THREADS} threads at once", calls_made, {"the bits of one": calls_made})


@cases((1, 3, 64), COUNTS, "counts")
def test_the_number_of_threads_changes_no_bit(counts, figures):
    with threads(1):
        calls = operations()
        expected = {name: call() for name, call in calls.items()}
    for count in counts:
        with threads(count):
            assert [name for name, call in calls.items() if not same(call(), expected[name])] == [], count
    compared = len(counts) * len(calls)
    figures(f"calls of 1 to {max(counts)} threads", compared, {"the bits of one": compared})


def compare(expected: dict[str, list[Tensor]], count: int | None) -> None:
    """In a process of its own: leaves with 0 if all is the same, else with 1."""
    if count is not None:
        torch.set_num_threads(count)
    found = results()
    os._exit(0 if all(same(found[name], expected[name]) for name in expected) else 1)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "count"), [("fork", 1), ("spawn", 1), ("spawn", 4), ("forkserver", 4)])
def test_a_child_gets_what_its_parent_gets(start, count):
    """Forked, it computes in one thread: see the next test."""
    with threads(4):
        expected = results()
        child = multiprocessing.get_context(start).Process(target=compare, args=(expected, count))
        child.start()
        child.join()
    assert child.exitcode == 0


def hang(expected: dict[str, list[Tensor]]) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what pytest has made of it
    signal.alarm(10)
    compare(expected, None)


@pytest.mark.slow
def test_a_forked_child_that_goes_on_with_several_threads_waits_or_is_right():
    """What GNU's OpenMP does to all of PyTorch: the child waits for threads that it has not inherited.

    `torch.set_num_threads(1)` in the child, or another start method, is the way out. A wrong answer it never is.
    """
    with threads(4):
        expected = results()
        child = multiprocessing.get_context("fork").Process(target=hang, args=(expected,))
        child.start()
        child.join()
    assert child.exitcode in (0, -signal.SIGALRM)


@cases(10, 200)
def test_sixteen_writers_leave_one_whole_file(tmp_path, count, figures):
    contents = [bytes([number]) * (10_000 + number) for number in range(THREADS)]

    def write(number: int) -> None:
        for _ in range(count):
            replace_file(tmp_path / "file", lambda temporary: Path(temporary).write_bytes(contents[number]))
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(THREADS)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    figures(f"writes of one file by {THREADS} threads", THREADS * count, {"a whole file each time": THREADS * count})
