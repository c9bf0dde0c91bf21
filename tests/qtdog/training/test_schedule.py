"""Learning rates along a run."""

import math

import pytest
import torch

from qtdog.config import TrainConfig
from qtdog.errors import UserError
from qtdog.methods.presets import changed_from_preset, settle
from qtdog.training.schedule import rate_factor, set_rates


def factors(**given):
    run = settle(TrainConfig(method="erm", **given), test_env=0, seed=0)
    return [rate_factor(run, step) for step in range(run.steps)]


def test_constant_is_one():
    assert set(factors(steps=20)) == {1.0}


def test_warmup_grows_to_the_whole_rate():
    assert factors(steps=8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_falls_as_pytorchs(warmup):
    steps = 12
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
    expected = []
    for _ in range(steps - warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = factors(steps=steps, schedule="cosine", warmup_steps=warmup)
    assert found[warmup:] == pytest.approx(expected) and found[warmup] == 1 and 0 < found[-1] < 0.05
    assert found[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    assert math.isclose(found[warmup + (steps - warmup) // 3], (1 + math.cos(math.pi / 3)) / 2)


def test_all_groups_keep_their_proportion():
    optimizer = torch.optim.Adam([{"params": [torch.zeros(1)], "lr": 1e-3}, {"params": [torch.zeros(1)], "lr": 1e-5}])
    for factor in (0.5, 0.25, 1.0):
        set_rates(optimizer, [1e-3, 1e-5], factor)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3 * factor, 1e-5 * factor]


def test_they_show_as_changed_and_are_stored_if_they_are():
    run = settle(TrainConfig(method="erm"), 0, 0)
    names = {"sampling", "accumulate", "schedule", "warmup_steps"}
    assert not names & run.to_dict().keys() and names <= run.settings().keys()
    given = {"sampling": "balanced", "accumulate": 4, "schedule": "cosine", "warmup_steps": 10}
    changed = settle(TrainConfig(method="erm", **given), 0, 0)
    assert changed_from_preset(changed) == given and given.items() <= changed.to_dict().items()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"warmup_steps": -1}, "--warmup-steps must lie between 0 and 5000, .*not -1"),
        ({"steps": 10, "method": "erm", "warmup_steps": 10}, "--warmup-steps must lie between 0 and 9, so that"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"accumulate": 3}, "--accumulate 3 does not divide the 64 images"),
        ({"accumulate": 2, "method": "coral"}, "--accumulate 2 would make another loss of CORAL"),
    ],
)
def test_settings_that_make_no_sense(given, told):
    with pytest.raises(UserError, match=told):
        settle(TrainConfig(**given), 0, 0)
