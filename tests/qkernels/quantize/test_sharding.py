"""FSDP2 over two gloo processes: the losses of one process, the switch in the middle, checkpoints."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from two_processes import in_two_processes

CONFIGS = {
    "channel": qk.QConfig(weight_bits=4, last_layer="same"),
    "tensor": qk.QConfig(weight_bits=4, granularity="tensor", last_layer="same"),
    "inputs": qk.QConfig(weight_bits=4, act_bits=4, last_layer="same"),
}


def net(config):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Sequential(nn.Linear(10, 7), nn.ReLU()), nn.Linear(7, 2))
    qk.quantize_(model, config, enabled=False)
    return qk.fuse_weights_(model)


def batch(step):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def losses(model, optimizer, part):
    """Of six steps, of which the last four quantize."""
    found = []
    for step in range(6):
        if step == 2:
            with torch.no_grad():
                model(batch(7))  # an evaluation, after which FSDP keeps what it has collected of the outermost module
            qk.enable_(model)
        optimizer.zero_grad()
        loss = (model(batch(step)[part]) ** 2).mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def worker(rank, path):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name, config in CONFIGS.items():
        for blocks in (False, True):
            model = net(config)
            if blocks:
                fully_shard(model[2], mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.1, scale_lr=0.01), foreach=False)
            found = losses(model, optimizer, slice(rank * 4, rank * 4 + 4))
            torch.distributed.all_reduce(found)
            state = get_model_state_dict(model)
            set_model_state_dict(model, copy.deepcopy(state))
            again = (model(batch(9)) ** 2).mean().detach()
            model.reshard()
            scales = {n: s.full_tensor().detach() for n, s in qk.named_scales(model)}
            if rank == 0:
                torch.save({"losses": found / 2, "again": again, "scales": scales}, path / f"{name}{blocks}.pt")


@pytest.mark.slow
def test_two_sharded_processes_have_the_losses_of_one(tmp_path):
    in_two_processes(worker, tmp_path)
    for name, config in CONFIGS.items():
        model = net(config)
        optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.1, scale_lr=0.01))
        expected = losses(model, optimizer, slice(None))
        for blocks in (False, True):
            stored = torch.load(tmp_path / f"{name}{blocks}.pt", weights_only=True)
            torch.testing.assert_close(stored["losses"], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(stored["again"], (model(batch(9)) ** 2).mean().detach(), rtol=1e-5, atol=1e-6)
            for scale, own in qk.named_scales(model):
                torch.testing.assert_close(stored["scales"][scale], own.detach(), rtol=1e-4, atol=1e-6)
