"""DistributedDataParallel over two gloo processes takes the step that one process takes on the whole batch."""

import pytest
import torch
from torch import nn

import qkernels as qk
from two_processes import in_two_processes


def net():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    qk.quantize_(model, qk.QConfig(weight_bits=4))
    return qk.fuse_weights_(model)


def batch():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def step(model, x):
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.1, scale_lr=0.01))
    (model(x) ** 2).mean().backward()
    optimizer.step()


def worker(rank, path):
    model = net()
    step(nn.parallel.DistributedDataParallel(model), batch()[rank * 4 : rank * 4 + 4])
    torch.save(model.state_dict(), path / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    in_two_processes(worker, tmp_path)
    model = net()
    step(model, batch())
    expected = model.state_dict()
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def switching(model, network, part):
    """Two float steps, and after the switch two quantized ones."""
    optimizer = torch.optim.Adam(qk.param_groups(model, lr=0.1, scale_lr=0.01))
    for step in range(4):
        if step == 2:
            qk.enable_(model)
        optimizer.zero_grad()
        (network(batch()[part] + step) ** 2).mean().backward()
        optimizer.step()


def waiting_net():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=8), enabled=False)
    return qk.fuse_weights_(model)


def switching_worker(rank, path):
    model = waiting_net()
    # Until the switch no scale has a gradient, which is what the flag is for.
    network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    switching(model, network, slice(rank * 4, rank * 4 + 4))
    torch.save(model.state_dict(), path / f"{rank}.pt")


@pytest.mark.slow
def test_the_switch_after_wrapping(tmp_path):
    in_two_processes(switching_worker, tmp_path)
    model = waiting_net()
    switching(model, model, slice(None))
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5, msg=name)
