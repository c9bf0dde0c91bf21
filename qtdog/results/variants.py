"""Variants of a method: runs that differ in a setting make rows, and ensembles, of their own."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qtdog.config import RunConfig
from qtdog.errors import UserError
from qtdog.methods.presets import dashed

T = TypeVar("T")

# What may differ within a row: where the data lies, and what a row is the mean over or has its columns for.
_WITHIN_A_ROW = {"data_dir", "test_env", "test_envs", "trial_seed", "seed", "hparams_seed", "grid"}
SEARCHED = "searched"  # stands for the value of a setting that the points of a grid differ in


def settings_of(run: RunConfig) -> dict[str, Any]:
    """What makes runs of a row alike, by the names of the flags; of a grid's points all but what was searched."""
    values = {name: value for name, value in run.settings().items() if name not in _WITHIN_A_ROW}
    return values | dict.fromkeys(run.grid, SEARCHED)


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The names that do not have the same value in all of them."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]


def common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What has the same value in all of them."""
    apart = differing(settings)
    return {name: value for name, value in settings[0].items() if name not in apart}


def distinguishing_settings(runs: Iterable[tuple[Path, str, RunConfig]]) -> dict[str, list[str]]:
    """For each method the settings that tell its variants apart.

    These are the settings in which runs differ that otherwise would claim the same place in a table, and versions of
    plug-ins in any case. Points of a grid share a place.

    Args:
        runs: folder, data set and settings of each.

    Raises:
        UserError: for two runs of one place that differ in nothing.
    """
    methods: dict[str, set[Any]] = defaultdict(set)
    places: dict[tuple[Any, ...], list[tuple[Path, RunConfig]]] = defaultdict(list)
    for folder, dataset, run in runs:
        place = (dataset, run.method, tuple(run.test_envs), run.trial_seed, run.seed, run.hparams_seed)
        places[place].append((folder, run))
        methods[run.method].add(run.settings().get("plugins"))
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for (_, method, *_), claimants in places.items():
        settings = [settings_of(run) for _, run in claimants]
        whole = [(each, run.point()) for each, (_, run) in zip(settings, claimants, strict=True)]
        for i, each in enumerate(whole):
            if each in whole[:i]:
                first, second = claimants[whole.index(each)][0], claimants[i][0]
                raise UserError(
                    f"{first} and {second} have the same method, settings, target, trial, seed and hyper-parameter "
                    "seed: name one of them, or collect their folders apart"
                )
        several = {"plugins": None} if len(methods[method]) > 1 else {}
        found[method].update(several | dict.fromkeys(differing(settings)))
    return {method: list(names) for method, names in found.items()}


def best_draws(runs: Iterable[T], settings: Callable[[T], RunConfig], score: Callable[[T], float]) -> list[T]:
    """Of the runs of a target, trial and seed, which differ in their hyper-parameters, the one with the best score.

    These are random draws and points of a grid. Of equal ones the last draw, as in DomainBed; in the order of targets,
    trials and seeds.
    """
    drawn: dict[tuple[tuple[int, ...], int, int], list[T]] = defaultdict(list)
    for one in sorted(runs, key=lambda one: settings(one).hparams_seed, reverse=True):
        run = settings(one)
        drawn[tuple(run.test_envs), run.trial_seed, run.seed].append(one)
    return [max(drawn[place], key=score) for place in sorted(drawn)]


def described(settings: dict[str, Any], names: Sequence[str]) -> str:
    """`weight-bits 4, act-bits none`, or nothing where there is nothing to tell apart."""
    return ", ".join(f"{dashed(name)} {value_text(settings.get(name))}" for name in names)


def value_text(value: Any) -> str:
    """A setting's value as it is written in labels."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
