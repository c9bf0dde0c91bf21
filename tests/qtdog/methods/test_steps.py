"""Each step rule against its equations, written out by hand in float64."""

import copy
import csv
import io
from functools import partial

import pytest
import torch
from torch import nn

import qkernels as qk
from qtdog.methods.steps import GAQAT, SAGM, SAM, STEPS, Disorder, InPieces, Plain, WeightNoise, kept_statistics
from qtdog.models import MNIST_CNN
from two_processes import in_two_processes

OPTIONS = {"disorder_window": 4, "disorder_threshold": 0.3, "freeze_when": "below", "freeze_granularity": "scale"}
RULES = {
    "plain": Plain(),
    "sam": SAM(rho=0.05),
    "sagm": SAGM(rho=0.05, alpha=1e-3),
    "gaqat": GAQAT(rho=0.05, alpha=1e-3, unfreeze=True, **OPTIONS),
    "weight-noise": WeightNoise(1e-3),
}


def problem(dtype=torch.float64, batch_norm=False):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if batch_norm else []), nn.Tanh(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).to(dtype)
    x, y = torch.randn(6, 4, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def gradient_at(model, loss, offsets=None):
    """The gradient at the weights plus `offsets`, by a copy of the weights, and the loss there."""
    before = [p.detach().clone() for p in model.parameters()]
    if offsets is not None:
        for p, offset in zip(model.parameters(), offsets, strict=True):
            p.data = p.data + offset
    value = loss()
    gradients = torch.autograd.grad(value, list(model.parameters()))
    for p, old in zip(model.parameters(), before, strict=True):
        p.data = old
    return value.detach(), gradients


def norm(gradients):
    return sum(g.square().sum() for g in gradients).sqrt()


def expected_gradient(name, model, loss):
    _, g1 = gradient_at(model, loss)
    if name == "plain":
        return g1
    if name == "sam":
        return gradient_at(model, loss, [0.05 * g / norm(g1) for g in g1])[1]
    _, g2 = gradient_at(model, loss, [(0.05 / norm(g1) - 1e-3) * g for g in g1])
    return [(a + b) / 2 for a, b in zip(g1, g2, strict=True)]


def rule(name):
    return copy.deepcopy(RULES[name])


@pytest.mark.parametrize("name", ["plain", "sam", "sagm", "gaqat"])
def test_gradient_and_update(name):
    model, loss = problem()
    expected = expected_gradient(name, model, loss)
    value, _ = gradient_at(model, loss)
    before = [p.detach().clone() for p in model.parameters()]
    told = rule(name)(loss, model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.testing.assert_close(told, value)
    assert not told.requires_grad
    for p, old, g in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p.detach(), old - 0.1 * g, rtol=1e-9, atol=1e-12)


def test_weight_noise_moves_matrices_only_and_within_its_bound():
    model, loss = problem()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []

    def watched():
        seen.append({n: (p.detach() - before[n]).abs().max().item() for n, p in model.named_parameters()})
        return loss()

    rule("weight-noise")(watched, model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert all((0.5e-3 < moved <= 1e-3) == n.endswith("weight") for n, moved in seen[0].items())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["sam", "sagm", "gaqat", "weight-noise"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit(name, fails):
    model, loss = problem(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def watched():
        calls.append([p.detach().clone() for p in model.parameters()])
        if fails and len(calls) == (1 if name == "weight-noise" else 2):
            raise ZeroDivisionError
        return loss()

    try:
        rule(name)(watched, model, torch.optim.SGD(model.parameters(), lr=0.0))
    except ZeroDivisionError:
        assert fails
    assert not torch.equal(calls[-1][0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["sam", "sagm", "gaqat"])
@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_statistics_see_the_first_pass_only(name, frozen):
    model, loss = problem(batch_norm=True)
    model[1].train(not frozen)
    twin, twin_loss = problem(batch_norm=True)
    twin[1].train(not frozen)
    twin_loss()
    rule(name)(loss, model, torch.optim.SGD(model.parameters(), lr=0.0))
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other)
    assert model[1].track_running_stats


def test_second_pass_normalizes_by_the_batch():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(8, 3) + 5
    expected = norm(x)
    statistics = norm.running_mean.clone()
    with kept_statistics(norm):
        assert torch.equal(norm(x), expected)
    assert torch.equal(norm.running_mean, statistics)


@pytest.mark.parametrize("name", ["plain", "sam", "sagm", "gaqat", "weight-noise"])
def test_a_grad_scaler_changes_nothing(name):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model, loss = problem()
        step = rule(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            torch.manual_seed(0)
            step(loss, model, optimizer, scaler)
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # the scaler's scale is float32


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["plain", "sam", "sagm", "gaqat", "weight-noise"])
def test_pieces_have_the_gradients_of_the_whole(name, scaled):
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    results = []
    for count in (1, 2, 3):
        model, sizes = problem()[0], []

        def loss_of(part, model=model, sizes=sizes):
            sizes.append(len(part))
            return nn.functional.cross_entropy(model(x[part]), y[part])

        loss = InPieces([partial(loss_of, part) for part in torch.arange(6).chunk(count)])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4) if scaled else None
        step, optimizer = rule(name), torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            torch.manual_seed(0)
            value = step(loss, model, optimizer, scaler)
        assert set(sizes) == {6 // count}
        assert loss().item() == pytest.approx(loss_of(torch.arange(6)).item(), rel=1e-12)
        results.append([value, *(p.detach().clone() for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["plain", "sam", "sagm"])
def test_a_grad_scaler_skips_a_step_that_is_not_finite(name):
    model, loss = problem()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rule(name)(lambda: loss() * torch.inf, model, torch.optim.SGD(model.parameters(), lr=0.1), scaler)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**9


# disorder --------------------------------------------------------------------------------------------------------


def disorder_of(signs, window):
    """Feed [steps, scales] and return the disorder of each window."""
    d = Disorder([f"layer{i}.weight_scale" for i in range(signs.shape[1])], [()] * signs.shape[1])
    for row in signs:
        if d.record([g.reshape(()) for g in row]) == window:
            d.close_window(0.3, "below", "scale", True)
    return d, [disorder for _, disorder, _ in d.history]


def test_disorder_of_constant_alternating_and_random_signs():
    steps = 401
    torch.manual_seed(0)
    alternating = torch.tensor([1.0, -1.0]).repeat(steps)[:steps]
    signs = torch.stack([torch.ones(steps), -torch.ones(steps), alternating, torch.randn(steps)], 1)
    d, (disorder,) = disorder_of(signs * torch.rand(steps, 1), steps)
    assert disorder[:3].tolist() == [0, 0, 1] and 0.4 < disorder[3] < 0.6
    assert d.frozen.tolist() == [True, True, False, False]


def test_windows_follow_each_other_without_a_gap():
    """Flips at the border count in the later window; zero gradients have no sign of their own."""
    signs = torch.tensor([[1.0, 1], [1, 0], [-1, -1], [-1, 0], [1, 1], [-1, 0]])
    _, (first, second) = disorder_of(signs, 3)
    torch.testing.assert_close(first, torch.tensor([1 / 2, 1 / 2]))
    torch.testing.assert_close(second, torch.tensor([2 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("freeze_when", "granularity", "unfreeze", "expected"),
    [
        ("below", "scale", True, [[True, False, False, True], [False, True, False, True]]),
        ("above", "scale", True, [[False, True, True, False], [True, False, True, False]]),
        ("below", "scale", False, [[True, False, False, True], [True, True, False, True]]),
        ("below", "layer", True, [[False, False, False, False], [False, False, False, False]]),
        ("above", "layer", True, [[True, True, True, True], [True, True, True, True]]),
    ],
)
def test_what_is_frozen(freeze_when, granularity, unfreeze, expected):
    d = Disorder(["a.weight_scale", "a.act_scale", "b.weight_scale", "b.act_scale"], [()] * 4)
    still, flipping = torch.tensor([1.0, 1, 1, 1]), torch.tensor([1.0, -1, 1, -1])
    for columns, frozen in zip(
        ([still, flipping, flipping, still], [flipping, still, flipping, still]), expected, strict=True
    ):
        for row in zip(*columns, strict=True):
            d.record(list(row))
        d.close_window(0.4, freeze_when, granularity, unfreeze)
        assert d.frozen.tolist() == frozen


def quantized_problem():
    """A loss whose task gradient for the first layer's weight scale the test decides, by a linear term."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=4, granularity="tensor", last_layer="same"))
    x = torch.randn(6, 4)
    return model, lambda slope: model(x).square().mean() + slope * model[0].weight_scale


def test_frozen_scales_get_half_the_smooth_gradient_are_watched_and_thaw():
    model, loss = quantized_problem()
    step = GAQAT(rho=0.05, alpha=1e-3, unfreeze=True, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    frozen_at = []
    # the task gradient of 0.weight_scale: the same sign for eight steps, then alternating
    slopes = [100.0] * 8 + [100.0, -100.0] * 4
    for slope in slopes:
        passes = []

        def watched(slope=slope, passes=passes):
            passes.append(None)
            return loss(slope)

        step(watched, model, optimizer)
        assert len(passes) == 2
        g = model[0].weight_scale.grad.item()
        assert abs(g - slope) < 60 or abs(g - slope / 2) < 30  # (g1 + g2) / 2 or g2 / 2, and g1 = g2 = slope nearly
        frozen_at.append(abs(g) < 75)
    # windows of 4: frozen from the 4th step's decision on; alternating from the 9th step on thaws it at the 12th
    assert frozen_at == [False] * 3 + [True] * 8 + [False] * 5
    disorders = [row[1][0].item() for row in step.disorder.history]
    assert disorders[:2] == [0, 0] and disorders[2:] == pytest.approx([0.75, 1.0])


def test_frozen_scale_gets_exactly_half_of_the_second_gradient():
    model, loss = quantized_problem()
    loss(0.0)  # the activation scales start
    scales = [name for name, _ in qk.named_scales(model)]
    step = GAQAT(rho=0.05, alpha=1e-3, unfreeze=True, **OPTIONS)
    step.disorder = Disorder(scales, [()] * 4)
    step.disorder.frozen[1] = True
    gradients = []  # of the rule's two passes, at the weights where it evaluates the loss

    def watched():
        gradients.append(torch.autograd.grad(loss(0.0), list(model.parameters())))
        return loss(0.0)

    step(watched, model, torch.optim.SGD(model.parameters(), lr=0.0))
    for (name, p), g1, g2 in zip(model.named_parameters(), *gradients, strict=True):
        assert torch.equal(p.grad, g2 / 2 if name == scales[1] else (g1 + g2) / 2), name


def test_scales_that_appear_later_and_state():
    """Before the switch GAQAT is SAGM; its state continues bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = rule("gaqat")
    x = torch.randn(6, 4)
    loss = lambda: model(x).square().mean()  # noqa: E731
    step(loss, model, optimizer)
    assert step.state_dict() == {} and step.files() == {}
    qk.quantize_(model, qk.QConfig(weight_bits=3, last_layer="same"))
    qk.add_scales_(optimizer, model)
    for _ in range(6):
        step(loss, model, optimizer)
    assert [w[0] for w in step.disorder.history] == [4] and step.disorder.window_steps == 2
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    buffer.seek(0)
    again, copied = rule("gaqat"), copy.deepcopy(model)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    copied_loss = lambda: copied(x).square().mean()  # noqa: E731
    copied_optimizer = torch.optim.SGD(copied.parameters(), lr=0.05)
    for _ in range(6):
        step(loss, model, optimizer)
        again(copied_loss, copied, copied_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert again.files() == step.files()
    rows = list(csv.DictReader(io.StringIO(step.files()["disorder.csv"])))
    assert [(r["steps"], r["scale"]) for r in rows] == [
        (str(n), f"{layer}.weight_scale") for n in (4, 8, 12) for layer in (0, 2)
    ]
    assert all(0 <= float(r["disorder"]) <= 1 and 0 <= float(r["frozen"]) <= 1 for r in rows)


# DistributedDataParallel -----------------------------------------------------------------------------------------


def small():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    qk.quantize_(model, qk.QConfig(weight_bits=4, last_layer="same"))
    return model


def halves():
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))


def worker(rank, path):
    for name in ("sam", "sagm", "gaqat"):
        model = small()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step, gradients = rule(name), []
        for _ in range(5):
            step(lambda parallel=parallel: parallel(halves()[rank]).square().mean(), parallel, optimizer)
            gradients.append([p.grad.clone() for p in model.parameters()])
        stored = {"model": model.state_dict(), "first": gradients[0], "rule": step.state_dict()}
        torch.save(stored, path / f"{name}{rank}.pt")


@pytest.mark.slow
def test_each_process_moves_along_its_own_gradient_and_all_agree(tmp_path):
    in_two_processes(worker, tmp_path)
    for name in ("sam", "sagm", "gaqat"):
        one, two = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
        if name == "gaqat":
            assert torch.equal(one["rule"]["signs"], two["rule"]["signs"])
        model = small()
        each = [
            expected_gradient(name, model, lambda model=model, rank=rank: model(halves()[rank]).square().mean())
            for rank in (0, 1)
        ]
        for told, a, b in zip(one["first"], *each, strict=True):
            torch.testing.assert_close(told, (a + b) / 2, rtol=1e-4, atol=1e-6)


def test_all_rules_are_tested():
    assert RULES.keys() == STEPS.keys()


def test_mnist_cnn_takes_a_gaqat_step():
    model = MNIST_CNN(1, 10)
    qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=4, granularity="tensor", first_layer=8, last_layer=8))
    qk.fuse_weights_(model)
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([1, 2, 3, 4])
    rule("gaqat")(lambda: nn.functional.cross_entropy(model(x), y), model, torch.optim.Adam(model.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
