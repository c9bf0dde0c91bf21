"""SMA, SWAD and the averaged model, against independent versions."""

import io
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qtdog.methods.averaging import SMA, SWAD, AveragingRule, Mean, estimate_statistics, holding


def model_of(value):
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(float(value))
    return model


def test_mean_is_the_mean():
    values = torch.randn(57, 3, dtype=torch.float64)
    mean = Mean()
    for row in values:
        mean.add({"w": row})
    torch.testing.assert_close(mean.weights["w"], values.mean(0), rtol=1e-12, atol=1e-14)


def test_sma_averages_from_its_start():
    rule = SMA(average_start=3)
    for step in range(10):
        rule.update(model_of(step**2), step)
        weights = rule.averaged_weights()
        if step < 3:
            assert weights is None
        else:
            assert weights["weight"][0, 0].item() == pytest.approx(np.mean([s**2 for s in range(3, step + 1)]))


# SWAD ------------------------------------------------------------------------------------------------------------


def released(losses, converge, tolerance, ratio):
    """The averaged segments by index, each as often as it counts, and that at which the run ends, by the released code.

    Its bookkeeping: two queues of the latest segments, and a model whose count begins at 0, so that the first segment
    that is averaged replaces what it was made of.
    """
    latest, smooth = deque(maxlen=converge), deque(maxlen=tolerance)
    made_of, averaged, begun, threshold = None, [], None, None
    for now, _ in enumerate(losses):
        latest.append(now)
        smooth.append(now)
        if begun is None:
            if len(latest) == converge and np.argmin([losses[i] for i in latest]) == 0:
                begun = made_of = latest[0]
                threshold = np.mean([losses[i] for i in latest]) * (1 + ratio)
                if tolerance < converge:
                    averaged += list(latest)[1 : 1 + converge - tolerance]
                elif tolerance > converge:
                    early = list(smooth)[: tolerance - converge + 1]
                    start = 0
                    for place, i in enumerate(early):
                        if losses[i] > threshold:
                            start = place + 1
                    averaged += early[start + 1 :]
        elif smooth[0] >= begun:
            if min(losses[i] for i in smooth) > threshold:
                return averaged or [made_of], now
            averaged.append(smooth[0])
    if begun is None:
        return [len(losses) - 1], None
    smooth.popleft()
    while smooth and min(losses[i] for i in smooth) <= threshold:
        averaged.append(smooth.popleft())
    return averaged or [made_of], None


def paper(losses, converge, tolerance, ratio):
    """The same by algorithm 1 of the paper, over segments; without a valley the last, as the paper does not say."""
    first, last, threshold, end = 0, len(losses) - 1, None, None
    for i in range(len(losses)):
        if threshold is None:
            window = losses[max(i - converge + 1, 0) : i + 1]
            if len(window) == converge and window[0] == min(window):
                first, threshold = i - converge + 1, np.mean(window) * (1 + ratio)
        elif i - first + 1 >= tolerance and threshold < min(losses[i - tolerance + 1 : i + 1]):
            last, end = i - tolerance, i
            break
    return list(range(len(losses) - 1 if threshold is None else first, last + 1)) or [first], end


def run_swad(losses, values, start=0, freq=3, **numbers):
    rule = SWAD(average_start=start, **numbers)
    end = None
    for segment, loss in enumerate(losses):
        for k in range(freq):
            step = segment * freq + k
            rule.update(model_of(values[step]), step)
        rule.end_segment(step, loss)
        assert rule.averaged_weights() is not None or step < start  # asking changes nothing of what comes
        if rule.finished:
            end = segment
            break
    return rule, end


def curves(count):
    """Random validation losses with the numbers of SWAD: falling and rising, flat, with ties, short and long."""
    random = np.random.RandomState(0)
    for _ in range(count):
        length = random.randint(1, 30)
        falling = np.abs(np.linspace(-1, random.uniform(0, 2), length)) * random.uniform(0, 2)
        losses = 0.3 + falling + random.uniform(0, 1) * random.rand(length)
        if random.rand() < 0.3:
            losses = losses.round(1)  # ties
        numbers = (3, 6) if random.rand() < 0.3 else (random.randint(1, 7), random.randint(1, 9))
        yield losses.tolist(), *numbers, random.choice([0.0, 0.05, 0.2, 0.3])


SIMULATORS = {"released": released, "paper": paper}


@pytest.mark.parametrize("valley", SIMULATORS)
def test_which_segments_are_averaged_and_how_often(valley):
    """Of 300 curves; the weights of segment i are the i-th unit vector, so that the average shows the share of each."""
    kinds = set()
    for losses, converge, tolerance, ratio in curves(300):
        rule = SWAD(0, valley, converge, tolerance, ratio)
        chosen, end = SIMULATORS[valley](losses, converge, tolerance, ratio)
        for i, loss in enumerate(losses):
            one_hot = nn.Linear(len(losses), 1, bias=False).double()
            one_hot.weight.data = torch.eye(len(losses), dtype=torch.float64)[i : i + 1]
            rule.update(one_hot, i)
            rule.end_segment(i, loss)
            assert len(rule.last) <= max(converge, tolerance)
            if rule.finished:
                break
        assert (i if rule.finished else None) == end
        share = rule.averaged_weights()["weight"][0].numpy()
        expected = np.bincount(chosen, minlength=len(losses)) / len(chosen)
        np.testing.assert_allclose(share, expected, atol=1e-12, err_msg=f"{losses} {converge} {tolerance} {ratio}")
        kinds.add(
            (np.sign(tolerance - converge), rule.threshold is None, rule.finished, len(set(chosen)) < len(chosen))
        )
    assert {kind[:3] for kind in kinds} >= {(sign, *rest) for sign in (-1, 0, 1) for rest in ((True, False),
            (False, False), (False, True))}  # fmt: skip
    assert any(kind[3] for kind in kinds) == (valley == "released")


@pytest.mark.parametrize("valley", SIMULATORS)
def test_a_valley_that_ends_as_it_begins_is_its_first_segment(valley):
    """The mean of three losses of .7 is less than .7 in floating point, so that they lie above their own threshold."""
    numbers = {"swad_valley": valley, "swad_converge": 3, "swad_tolerance": 4, "swad_ratio": 0.0}
    rule, end = run_swad([0.8, *[0.7] * 5], np.arange(18.0), **numbers)
    assert rule.threshold < 0.7 and end == 4
    assert rule.averaged_weights()["weight"][0, 0].item() == 4  # of steps 3, 4 and 5


def test_valleys_by_hand():
    """Falls, rests, rises: until six losses in a row exceed the threshold. The released code begins a segment early."""
    losses = [3, 2, 1.4, 1, 1.1, 1.2, 1.0, 2, 2, 2, 2, 2, 2, 2]
    values = np.repeat(np.arange(14.0), 3)
    for valley, segments in (("paper", [3, 4, 5, 6]), ("released", [3, 3, 4, 5, 6])):
        rule, end = run_swad(losses, values, swad_valley=valley, swad_converge=3, swad_tolerance=6, swad_ratio=0.3)
        assert rule.threshold == pytest.approx(1.1 * 1.3) and end == 12  # losses 7..12 are the first six above it
        assert rule.averaged_weights()["weight"][0, 0].item() == pytest.approx(np.mean(segments))


def test_swad_restarts_at_the_switch_and_cannot_end_a_run_before_it():
    numbers = {"swad_converge": 2, "swad_tolerance": 2, "swad_ratio": 0.1}
    early = [1.0, 1.5, 9, 9, 9, 9]  # converges at once, and then the valley is dead
    late = [3.0, 2.0, 1.0, 1.1, 1.05, 1.02]
    values = np.random.RandomState(0).randn(36)
    _, dead = run_swad(early + late, values, **numbers)
    assert dead is not None and dead < 6
    rule, end = run_swad(early + late, values, start=18, **numbers)
    fresh, fresh_end = run_swad(late, values[18:], **numbers)
    assert end is None and fresh_end is None
    assert torch.equal(rule.averaged_weights()["weight"], fresh.averaged_weights()["weight"])


def test_a_switch_within_a_segment_counts_only_what_is_after_it():
    rule = SWAD(average_start=2, swad_converge=1, swad_tolerance=1, swad_ratio=0.3)
    for step in range(4):
        rule.update(model_of(step), step)
    rule.end_segment(3, 1.0)
    assert rule.averaged_weights()["weight"][0, 0].item() == 2.5


def test_swad_without_a_valley_is_its_last_segment():
    rule, _ = run_swad([3.0, 2.0, 1.0], np.arange(9.0), swad_converge=3, swad_tolerance=6, swad_ratio=0.3)
    assert rule.averaged_weights()["weight"][0, 0].item() == 7
    nothing = SWAD(average_start=5, swad_converge=3, swad_tolerance=6, swad_ratio=0.3)
    assert nothing.averaged_weights() is None


RULES = {
    "none": AveragingRule,
    "sma": lambda: SMA(average_start=2),
    "swad": lambda: SWAD(average_start=0, swad_converge=2, swad_tolerance=3, swad_ratio=0.3),
    "swad, paper": lambda: SWAD(
        average_start=0, swad_valley="paper", swad_converge=2, swad_tolerance=3, swad_ratio=0.3
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_state_continues_bit_for_bit(name):
    losses = [2.0, 1.0, 1.2, 1.1, 1.3, 1.2, 1.25, 3.0]
    whole, half = RULES[name](), RULES[name]()
    values = np.random.RandomState(0).randn(24)

    def go(rule, segments):
        for segment in segments:
            for step in range(3 * segment, 3 * segment + 3):
                rule.update(model_of(values[step]), step)
            rule.end_segment(step, losses[segment])

    go(whole, range(8))
    go(half, range(5))
    buffer = io.BytesIO()
    torch.save(half.state_dict(), buffer)
    buffer.seek(0)
    resumed = RULES[name]()
    resumed.load_state_dict(torch.load(buffer, weights_only=True), torch.device("cpu"))
    go(resumed, range(5, 8))
    one, two = whole.averaged_weights(), resumed.averaged_weights()
    assert (one is None) == (two is None) == (name == "none")
    assert one is None or torch.equal(one["weight"], two["weight"])
    assert whole.finished == resumed.finished


# the averaged model ----------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def test_averaged_model_is_quantize_of_the_mean_latent():
    torch.manual_seed(0)
    model = net()
    qk.quantize_(model, qk.QConfig(weight_bits=3, granularity="tensor", act_bits=4, last_layer="same"))
    qk.fuse_weights_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule, latents, scales, x = SMA(average_start=0), [], [], torch.randn(5, 3, 8, 8)
    for step in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        rule.update(model, step)
        latents.append(model[0].latent_weight.detach().clone().double())
        scales.append(model[0].weight_scale.detach().clone().double())
    model.eval()
    expected_output, before = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with holding(model, rule.averaged_weights()):
        w, s = torch.stack(latents).mean(0), torch.stack(scales).mean(0)
        expected = (w / s).clamp(-4, 3).round() * s
        torch.testing.assert_close(model[0].quantized_weight().double(), expected, rtol=1e-5, atol=1e-7)
        assert len(model[0].quantized_weight().unique()) <= 8
        assert not torch.equal(model(x), expected_output)
    assert torch.equal(model(x), expected_output)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_statistics_are_estimated_for_the_averaged_weights_and_put_back():
    torch.manual_seed(0)
    model = net().train()
    model(torch.randn(4, 3, 8, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {n: p.detach() + 1 for n, p in model.named_parameters()}
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    twin = net()
    twin.load_state_dict({**before, **weights})
    maps = [twin[0](x).transpose(0, 1).flatten(1) for x in batches]
    with holding(model, weights, iter(batches)):
        torch.testing.assert_close(model[1].running_mean, torch.stack([m.mean(1) for m in maps]).mean(0))
        torch.testing.assert_close(model[1].running_var, torch.stack([m.var(1) for m in maps]).mean(0))
        assert model[1].momentum == 0.1 and model.training and model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_estimate_reads_no_batch():
    def unread():
        raise AssertionError
        yield

    estimate_statistics(nn.Linear(2, 2), unread())
    with holding(net(), None, unread()):
        pass
