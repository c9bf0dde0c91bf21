"""DomainBed's random search: the hyper-parameters of `--hparams-seed`, bit for bit.

Spaces of `domainbed/hparams_registry.py` (2024): for pictures lr 10^U(-5, -3.5), weight decay 10^U(-6, -2), batch size
2^U(3, 5.5) (DomainNet 2^U(3, 5)) and dropout 0, .1 or .5; for digits lr 10^U(-4.5, -2.5) and batch size 2^U(3, 9). Of
CORAL also its weight, 10^U(-1, 1), which DomainBed calls `mmd_gamma`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from qtdog.data import DIGITS
from qtdog.data.splits import seed_hash

DROPOUTS = [0.0, 0.1, 0.5]


def random_hparams(dataset: str, loss: str, hparams_seed: int, trial_seed: int) -> dict[str, Any]:
    """The draw `hparams_seed` > 0 by the names of the flags; another trial draws others.

    These are lr, weight_decay, batch_size and dropout, and the numbers of the loss that DomainBed draws.
    """
    draw_seed = seed_hash(hparams_seed, trial_seed)

    def drawn(name: str, draw: Callable[[np.random.RandomState], Any]) -> Any:
        return draw(np.random.RandomState(seed_hash(draw_seed, name)))

    weight = {"coral_weight": float(drawn("mmd_gamma", lambda random: 10 ** random.uniform(-1, 1)))}
    own = weight if loss == "coral" else {}
    if dataset in DIGITS:
        return own | {
            "lr": float(drawn("lr", lambda random: 10 ** random.uniform(-4.5, -2.5))),
            "weight_decay": 0.0,
            "batch_size": drawn("batch_size", lambda random: int(2 ** random.uniform(3, 9))),
            "dropout": 0.0,
        }
    largest = 5 if dataset == "DomainNet" else 5.5
    return own | {
        "lr": float(drawn("lr", lambda random: 10 ** random.uniform(-5, -3.5))),
        "weight_decay": float(drawn("weight_decay", lambda random: 10 ** random.uniform(-6, -2))),
        "batch_size": drawn("batch_size", lambda random: int(2 ** random.uniform(3, largest))),
        "dropout": float(drawn("resnet_dropout", lambda random: random.choice(DROPOUTS))),
    }
