"""DomainBed's split of a domain into a large `in` part and a small `out` part, bit for bit."""

import hashlib

import numpy as np


def seed_hash(*args: object) -> int:
    """DomainBed's integer in [0, 2^31) from any arguments: md5 of the string of their tuple."""
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % 2**31


def split(size: int, holdout_fraction: float, trial_seed: int, env: int) -> tuple[list[int], list[int]]:
    """Indices of the `in` part (trained on; for the target domain, tested on) and of the `out` part (validation).

    Args:
        size: number of images of the domain.
        holdout_fraction: share of `out`, rounded down to a whole image.
        trial_seed: the same for all runs that are to share a split.
        env: index of the domain.
    """
    keys = list(range(size))
    np.random.RandomState(seed_hash(trial_seed, env)).shuffle(keys)
    held_out = int(size * holdout_fraction)
    return keys[held_out:], keys[:held_out]
