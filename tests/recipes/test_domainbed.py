"""QT-DoG as an algorithm of DomainBed, in DomainBed's trainer: where that is there, it is not fetched.

git clone https://github.com/facebookresearch/DomainBed && DOMAINBED=DomainBed pytest tests/recipes
"""

import copy
import os
import runpy
import sys

import pytest
import torch

import qkernels as qk
from recipe import plain, programs, recording

STEPS, SWITCH = 8, 4


@pytest.fixture
def algorithms(monkeypatch):
    """The module of DomainBed that the recipe extends."""
    if "DOMAINBED" in os.environ:
        monkeypatch.syspath_prepend(os.environ["DOMAINBED"])
    try:
        from domainbed import algorithms, datasets
    except ImportError as error:
        pytest.skip(f"DomainBed is not there, see $DOMAINBED: {error}")
    monkeypatch.setattr(datasets.MultipleDomainDataset, "N_WORKERS", 0)
    names = dict(vars(algorithms))
    yield algorithms
    vars(algorithms).clear()
    vars(algorithms).update(names)
    algorithms.ALGORITHMS.remove("QTDoG")


def train(algorithm, seed, monkeypatch):
    """DomainBed's own command, on the images that it has for debugging. It puts itself between Python and stdout."""
    hparams = f'{{"switch_step": {SWITCH}, "batch_size": 4}}'
    command = f"train --dataset Debug28 --algorithm {algorithm} --seed {seed} --steps {STEPS} --checkpoint_freq 3"
    with monkeypatch.context() as patch, recording() as seen:
        patch.setattr(sys, "argv", [*command.split(), "--hparams", hparams, "--output_dir", f"member{seed}"])
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(sys, "stderr", sys.stderr)
        runpy.run_module("domainbed.scripts.train", run_name="__main__")
    return seen


@pytest.mark.slow
@pytest.mark.untraced
def test_domainbed(algorithms, monkeypatch):
    in_domainbed, packing = programs("DomainBed")
    exec(compile(in_domainbed, "DomainBed", "exec"), vars(algorithms))
    of_float = train("ERM", 0, monkeypatch)
    started = []

    class Started(algorithms.QTDoG):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(copy.deepcopy(self.network))

    algorithms.Started = Started
    train("Started", 1, monkeypatch)
    seen = train("Started", 0, monkeypatch)
    model, hparams = started[-1], torch.load("member0/model.pkl", weights_only=True)["model_hparams"]
    lr, weight_decay = hparams["lr"], hparams["weight_decay"]
    optimizer = torch.optim.Adam(qk.param_groups(model, lr, weight_decay, scale_lr=lr / 10))
    assert seen.losses == plain(model, optimizer, seen, SWITCH)
    assert seen.losses[:SWITCH] == of_float.losses[:SWITCH] and seen.losses[SWITCH] != of_float.losses[SWITCH]

    names = {}
    exec(compile(packing, "DomainBed", "exec"), names)
    assert all(map(torch.equal, names["networks"][0].state_dict().values(), model.state_dict().values()))
    architecture = algorithms.ERM(*names["arguments"]).network
    ensemble = qk.PackedEnsemble.load("packed", architecture)
    images = seen.images[0]
    with torch.no_grad():
        logits = torch.stack([network.eval()(images) for network in names["networks"]])
    assert (ensemble.member_logits(images) - logits).abs().max() < 1e-4 * logits.abs().max()
