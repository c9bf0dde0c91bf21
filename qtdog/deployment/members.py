"""Which trained runs are members of one ensemble."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from qtdog.data.image_lists import ImageList, difference
from qtdog.deployment.seen import merged
from qtdog.errors import UserError
from qtdog.log import Log
from qtdog.results.runs import ModelCard, find_runs, read_card
from qtdog.results.variants import best_draws, described, distinguishing_settings, settings_of

Member = tuple[Path, ModelCard]


def groups(places: Sequence[str], mix: Collection[str], quantized: bool, log: Log) -> list[tuple[str, list[Member]]]:
    """The members of each ensemble that can be made of the runs in `places`, and what tells it from others, in words.

    Args:
        mix: what members may differ in besides their seed: `trials`, `draws`.
        quantized: whether they must be quantized.

    Raises:
        UserError: if there is none.
    """
    runs = [(folder, read_card(folder)) for folder in find_runs(places)]
    names = distinguishing_settings((folder, card.dataset, card.run) for folder, card in runs)
    found: dict[tuple[str, str, str, str, str], list[Member]] = defaultdict(list)
    for folder, card in runs:
        variant = described(settings_of(card.run), names[card.run.method])
        trial = "all trials" if "trials" in mix else f"trial {card.run.trial_seed}"
        found[card.dataset, card.run.method, variant, card.target, trial].append((folder, card))
    several = []
    for (dataset, method, variant, target, trial), candidates in sorted(found.items()):
        members = candidates if "draws" in mix else best_members(candidates)
        what = f"{' '.join(filter(None, [method, variant]))} on {dataset}, target {target}, {trial}"
        if len(members) == 1:
            log(f"one run of {what}: no ensemble of one")
        elif quantized and members[0][1].quantization is None:
            log(f"{what} is float: no integer activations for it")
        else:
            several.append((variant, sorted(members, key=in_order)))
    if not several:
        what, trial = "quantized runs" if quantized else "runs", "" if "trials" in mix else " and trial"
        raise UserError(f"no two {what} share data set, method, settings, target{trial}: train more --seeds")
    return several


def in_order(member: Member) -> tuple[int, int, int, str]:
    """Sorts members by trial, draw, seed and place."""
    folder, card = member
    return card.run.trial_seed, card.run.hparams_seed, card.run.seed, str(folder)


def best_members(members: Sequence[Member]) -> list[Member]:
    """Of each seed the draw with the best source validation accuracy."""
    return best_draws(members, lambda member: member[1].run, lambda member: member[1].source_validation_accuracy)


def same_task(members: Sequence[Member]) -> ModelCard:
    """The first member's card, after checking that the others saw the same images."""
    first_folder, first = members[0]
    for folder, card in members:
        for name in ("classes", "domains", "image_shape", "preprocessing", "images"):
            if getattr(card, name) != getattr(first, name):
                how = told(folder, first_folder) if name == "images" else ""
                raise UserError(
                    f"{folder} and {first_folder} differ in {name}{how} and cannot be one ensemble: name their folders "
                    "apart"
                )
        if card.run.holdout_fraction != first.run.holdout_fraction:
            raise UserError(
                f"{folder} and {first_folder} differ in holdout_fraction: a member would be tested on its own data"
            )
    return first


def told(folder: Path, first_folder: Path) -> str:
    """In which images two runs differ, where they do and say so."""
    images, first = ImageList.read(folder), ImageList.read(first_folder)
    what = difference(first, images) if images and first else ""
    return f" ({what})" if what else ""


def images_of_members(members: Sequence[Member]) -> ImageList | None:
    """Every image that they know, and whether one of them was trained on it; None if one of them does not say."""
    lists = [images for folder, _ in members if (images := ImageList.read(folder)) is not None]
    return merged(lists, members[0][1].targets) if len(lists) == len(members) else None
