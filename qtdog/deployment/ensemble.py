"""EoQ: independently trained quantized models whose logits are averaged (QT-DoG, section 3.3)."""

import datetime
import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from qtdog.config import Device
from qtdog.data import DomainSet
from qtdog.data.image_lists import ImageList, difference
from qtdog.data.loaders import EvaluationImages
from qtdog.deployment.packed import calibration_batches, pack_members
from qtdog.deployment.seen import merged
from qtdog.environment import describe_environment, pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.files import DONE, seal, write_json, write_records
from qtdog.log import PRINT, Log
from qtdog.methods.presets import find_method
from qtdog.results.data_of_runs import DataOfRuns
from qtdog.results.predictions import Combine, Predictions, of_several, predict_images
from qtdog.results.runs import ModelCard, find_runs, load_model, read_card
from qtdog.results.variants import best_draws, common, described, distinguishing_settings, settings_of
from qtdog.training.evaluation import sources

Member = tuple[Path, ModelCard]


@dataclass
class EnsembleConfig:
    """Settings of `qtdog ensemble`."""

    runs: Annotated[list[str], "run folders, or folders that hold them at any depth"] = field(default_factory=list)
    combine: Annotated[Combine, "average the members' logits (EoQ) or their probabilities"] = "logits"
    integer: Annotated[
        Literal["none", "mse", "percentile", "max"],
        "8-bit activations in the packed file, with scales found on training images by this rule; the change in "
        "accuracy is printed",
    ] = "none"
    calibration_images: Annotated[int, "training images that find them"] = 512
    output_dir: Annotated[
        str | None, "where to write (default: trial<t>_ensemble beside the members; of a sweep, its folder `ensembles`)"
    ] = None
    data_dir: Annotated[str | None, "root of the data, if it has moved since training"] = None
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[int | None, "processes that read images, at most the CPU cores"] = None


def make_ensembles(config: EnsembleConfig, log: Log = PRINT) -> list[Path]:
    """Group runs by data set, method, settings, target and trial; write an ensemble of each group of two or more.

    A seed that was trained with several draws of hyper-parameters contributes the best by source validation.

    Returns:
        The folders written, each with results.jsonl and members.json.
    """
    device = pick_device(config.device)
    runs = [(folder, read_card(folder)) for folder in find_runs(config.runs)]
    names = distinguishing_settings((folder, card.dataset, card.run) for folder, card in runs)
    groups: dict[tuple[str, str, str, str, int], list[Member]] = defaultdict(list)
    for folder, card in runs:
        variant = described(settings_of(card.run), names[card.run.method])
        groups[card.dataset, card.run.method, variant, card.target, card.run.trial_seed].append((folder, card))
    several: dict[tuple[str, str, str, str, int], list[Member]] = {}
    for key, members in sorted((key, best_members(members)) for key, members in groups.items()):
        dataset, method, variant, target, trial = key
        what = f"{' '.join(filter(None, [method, variant]))} on {dataset}, target {target}, trial {trial}"
        if len(members) == 1:
            log(f"one run of {what}: no ensemble of one")
        elif config.integer != "none" and members[0][1].quantization is None:
            log(f"{what} is float: no integer activations for it")
        else:
            several[key] = members
    if not several:
        quantized = "" if config.integer == "none" else "quantized "
        raise UserError(
            f"no two {quantized}runs share data set, method, settings, target and trial: train more --seeds"
        )
    written = []
    data = DataOfRuns(config.data_dir, log)
    for (_, _, variant, _, _), members in several.items():
        folder = place(members[0], variant, config.output_dir)
        written.append(ensemble(members, data, folder, config, device, log))
    return written


def best_members(members: Sequence[Member]) -> list[Member]:
    """Of each seed the draw with the best source validation accuracy."""
    return best_draws(members, lambda member: member[1].run, lambda member: member[1].source_validation_accuracy)


def place(member: Member, variant: str, output_dir: str | None) -> Path:
    """The folder of an ensemble: beside its members where they lie as `qtdog train` puts them, else in `ensembles`."""
    folder, card = member
    variant = re.sub(r"[^\w.+-]+", "_", variant)
    name = "_".join(filter(None, [f"trial{card.run.trial_seed}", variant, "ensemble"]))
    task = (card.dataset, card.run.method, card.target)
    if output_dir is None and folder.absolute().parts[-4:-1] == task:
        return folder.parent / name
    return Path(output_dir or folder.parent / "ensembles", *task, name)


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


def ensemble(
    members: Sequence[Member],
    data: DataOfRuns,
    folder: Path,
    config: EnsembleConfig,
    device: torch.device,
    log: Log,
) -> Path:
    """Evaluate one ensemble on the target's in and out parts and the sources' out parts, and write it to `folder`."""
    card = same_task(members)
    run, dataset, parts = card.run, data.of(card), data.parts_of(*members[0])
    task = f"{card.dataset}, target domain {card.target}, trial {run.trial_seed}"
    log(f"{find_method(run.method).ensemble_label} of {len(members)} members on {task}")
    models = [load_model(path, device) for path, _ in members]
    images_seen = images_of_members(members)
    packed = None
    if card.quantization is not None:
        packed = pack_members(models, card, images_seen, config.combine)
        log(textwrap.indent(str(packed.report), "  "))
    wanted = [f"env{run.test_env}_in"] + [f"env{env}_out" for env in (run.test_env, *sources(run, dataset))]
    workers = pick_workers(config.num_workers, card.preprocessing is not None)
    images = {part: EvaluationImages(parts[part], workers) for part in wanted}

    def judge() -> dict[str, Predictions]:
        """What the ensemble answers for every wanted part."""
        network = of_several(models) if packed is None else packed.member_logits
        shown = tqdm(images.items(), desc="evaluating", disable=None)
        return {part: predict_images(network, each, device, config.combine) for part, each in shown}

    judged = judge()
    change = {}
    if packed is not None and config.integer != "none":
        seen = [parts[f"env{env}_in"] for env in sources(run, dataset)]
        log(f"  {packed.to_integer_(calibration_batches(seen, config.calibration_images, device), config.integer)}")
        before, judged = judged, judge()
        for part in wanted:
            change[f"{part}_acc"] = judged[part].accuracy - before[part].accuracy
            of = f"{parts[part].domain.name}, {'in' if part.endswith('in') else 'out'} part"
            log(f"  integer activations change the accuracy by {100 * change[f'{part}_acc']:+.1f} points on {of}")
    settings = {"combine": config.combine, "integer": config.integer, "integer_change": change}
    record = {
        **{f"{part}_{name}": value for part, of in judged.items() for name, value in of.metrics().items()},
        **settings,
        **facts_of(members, dataset, device),
        "target_accuracy": judged[f"env{run.test_env}_in"].accuracy,
        "nbytes": sum(member.nbytes for _, member in members) if packed is None else packed.nbytes,
    }
    alone = {f"{part}_acc": of.member_accuracies for part, of in judged.items()}
    manifest = [
        manifest_entry(member, {part: of[i] for part, of in alone.items()}, folder) for i, member in enumerate(members)
    ]
    (folder / DONE).unlink(missing_ok=True)
    write_json(folder / "members.json", {"combine": config.combine, "members": manifest})
    write_records(folder / "results.jsonl", [record])
    if packed is not None:
        accuracy = {
            parts[part].domain.name: judged[part].accuracy for part in wanted if part != f"env{run.test_env}_out"
        }
        packed.save(folder / "packed", accuracy=accuracy, seeds=[member.run.seed for _, member in members])
        if images_seen is not None:
            images_seen.write(folder / "packed")
    seal(folder, ["members.json", "results.jsonl"])
    on_target = judged[f"env{run.test_env}_in"]
    singles = ", ".join(f"{100 * one:.1f}" for one in on_target.member_accuracies)
    log(f"  target accuracy {100 * on_target.accuracy:.1f} (members alone: {singles}) -> {folder}")
    return folder


def images_of_members(members: Sequence[Member]) -> ImageList | None:
    """Every image that they know, as it lies beside their packed file; None if one of them does not say."""
    lists = [images for folder, _ in members if (images := ImageList.read(folder)) is not None]
    return merged(lists, members[0][1].targets).without_names() if len(lists) == len(members) else None


def manifest_entry(member: Member, accuracies: dict[str, float], ensemble_folder: Path) -> dict[str, Any]:
    """What members.json says of one."""
    folder, card = member
    return {
        "folder": str(folder),
        "from_here": os.path.relpath(folder, ensemble_folder),  # still true when both are moved
        "seed": card.run.seed,
        "selected_step": card.selected_step,
        "nbytes": card.nbytes,
        "accuracies": accuracies,
    }


def facts_of(members: Sequence[Member], dataset: DomainSet, device: torch.device) -> dict[str, Any]:
    """What a record says of an ensemble besides how good it is."""
    card = members[0][1]
    return {
        "members": len(members),
        "dataset": card.dataset,
        "data_source": dataset.source,
        "domains": card.domains,
        "method": card.run.method,
        "target": card.target,
        "test_env": card.run.test_env,
        "trial_seed": card.run.trial_seed,
        "settings": common([settings_of(member.run) for _, member in members]),
        "float_nbytes": card.float_nbytes,
        "environment": describe_environment(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
