"""SMA, SWAD and the averaged model, against independent versions."""

import io

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
        weights = rule.averaged_weights(final=False)
        if step < 3:
            assert weights is None
        else:
            assert weights["weight"][0, 0].item() == pytest.approx(np.mean([s**2 for s in range(3, step + 1)]))


# SWAD ------------------------------------------------------------------------------------------------------------


def loss_valley(losses, segments, converge, tolerance, ratio):
    """Average and end of the run by indices: which segments are averaged, and at which one the run ends, if it does.

    Segment i is averaged if all before it since the valley's first were, and the least of the losses of the
    `tolerance` segments from i on, or of those that there are at the end, is at most the threshold.
    """
    for now in range(converge - 1, len(losses)):
        first = now - converge + 1
        if losses[first] == min(losses[first : now + 1]):
            break
    else:
        return [len(losses) - 1], None
    threshold = np.mean(losses[first : now + 1]) * (1 + ratio)
    chosen = []
    for i in range(first, len(losses)):
        if min(losses[i : i + tolerance]) > threshold:
            # the run ends when the whole window is known, or not, if the losses end before
            end = max(i + tolerance - 1, now)
            return chosen, end if end < len(losses) else None
        chosen.append(i)
    return chosen, None


def run_swad(losses, values, start=0, freq=3, **numbers):
    rule = SWAD(average_start=start, **numbers)
    end = None
    for segment, loss in enumerate(losses):
        for k in range(freq):
            step = segment * freq + k
            rule.update(model_of(values[step]), step)
        rule.end_segment(step, loss)
        assert rule.averaged_weights(final=False) is None
        if rule.finished:
            end = segment
            break
    return rule, end


@pytest.mark.parametrize("seed", range(60))
def test_loss_valley_against_an_independent_version(seed):
    random = np.random.RandomState(seed)
    count = random.randint(1, 40)
    shape = np.abs(np.linspace(-1, random.uniform(0, 2), count)) + random.uniform(0, 0.5) * random.rand(count)
    losses = (0.3 + shape).tolist()
    values = random.randn(3 * count)
    converge, tolerance = (3, 6) if seed % 2 else (random.randint(1, 5), random.randint(1, 8))
    ratio = random.choice([0.0, 0.05, 0.2, 0.3])
    rule, end = run_swad(losses, values, swad_converge=converge, swad_tolerance=tolerance, swad_ratio=ratio)
    segments = values.reshape(count, 3).mean(1)
    chosen, expected_end = loss_valley(losses, segments, converge, tolerance, ratio)
    assert end == expected_end
    weight = rule.averaged_weights(final=True)["weight"]
    np.testing.assert_allclose(weight.numpy(), segments[chosen].mean(), rtol=1e-9)


def test_loss_valley_by_hand():
    """Falls, rests, rises: averaged from the valley's first segment until six losses in a row exceed the threshold."""
    losses = [3, 2, 1, 1.1, 1.2, 1.0, 2, 2, 2, 2, 2, 2, 2]
    values = np.repeat(np.arange(13.0), 3)
    rule, end = run_swad(losses, values, swad_converge=3, swad_tolerance=6, swad_ratio=0.3)
    assert rule.threshold == pytest.approx(1.1 * 1.3) and end == 11  # losses 6..11 are the first six above it
    assert rule.averaged_weights(final=True)["weight"][0, 0].item() == pytest.approx(np.mean([2, 3, 4, 5]))


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
    assert torch.equal(rule.averaged_weights(True)["weight"], fresh.averaged_weights(True)["weight"])


def test_a_switch_within_a_segment_counts_only_what_is_after_it():
    rule = SWAD(average_start=2, swad_converge=1, swad_tolerance=1, swad_ratio=0.3)
    for step in range(4):
        rule.update(model_of(step), step)
    rule.end_segment(3, 1.0)
    assert rule.averaged_weights(final=True)["weight"][0, 0].item() == 2.5


def test_swad_without_a_valley_is_its_last_segment():
    rule, _ = run_swad([3.0, 2.0, 1.0], np.arange(9.0), swad_converge=3, swad_tolerance=6, swad_ratio=0.3)
    assert rule.averaged_weights(final=True)["weight"][0, 0].item() == 7
    nothing = SWAD(average_start=5, swad_converge=3, swad_tolerance=6, swad_ratio=0.3)
    assert nothing.averaged_weights(final=True) is None


RULES = {
    "none": AveragingRule,
    "sma": lambda: SMA(average_start=2),
    "swad": lambda: SWAD(average_start=0, swad_converge=2, swad_tolerance=3, swad_ratio=0.3),
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
    one, two = whole.averaged_weights(True), resumed.averaged_weights(True)
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
    with holding(model, rule.averaged_weights(final=True)):
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
