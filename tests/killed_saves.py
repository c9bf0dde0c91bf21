"""Saves of packed ensembles in processes that kill themselves at one of their operations on files."""

import os
import signal

import torch
from torch import nn

import qkernels as qk

IMAGES = torch.ones(2, 8)


def make(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    qk.quantize_(model, qk.QConfig(weight_bits=4))
    return qk.PackedEnsemble.from_models([model], seed=seed)


def found(folder):
    """Which of `make`'s ensembles a folder holds; its answer and what it says of itself are of the same."""
    loaded = qk.PackedEnsemble.load(folder)
    seed = loaded.info["seed"]
    assert torch.equal(loaded(IMAGES), make(seed)(IMAGES))
    return seed


def save_killed_at(operation, when, folder):
    """Save make(2) to a folder in a process that kills itself at a file operation; whether it got there."""
    ensemble = make(2)
    child = os.fork()
    if child == 0:
        left = operation

        def counted(call):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                mine = left == 0  # a call may make further ones
                if mine and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return call(*args, **kwargs)
                finally:
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)

            return run

        for name in ("replace", "unlink", "open", "fsync", "mkdir", "close"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            ensemble.save(folder)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
