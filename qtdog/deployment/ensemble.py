"""`qtdog ensemble`: independently trained models whose logits are averaged (EoQ: QT-DoG, section 3.3)."""

import datetime
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from torch import nn
from tqdm import tqdm

import qkernels as qk
from qtdog.config import Device
from qtdog.data.image_lists import ImageList
from qtdog.data.loaders import EvaluationImages, Part
from qtdog.deployment.members import Member, groups, images_of_members, same_task
from qtdog.deployment.packed import calibration_batches, pack_members
from qtdog.environment import describe_environment, pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.files import DONE, seal, write_json, write_records
from qtdog.log import PRINT, Log
from qtdog.methods.presets import find_method
from qtdog.results.data_of_runs import DataOfRuns
from qtdog.results.predictions import Combine, Predictions, of_several, predict_images
from qtdog.results.runs import MANIFEST, RESULTS, ModelCard, load_model
from qtdog.results.variants import common, settings_of


@dataclass
class EnsembleConfig:
    """Settings of `qtdog ensemble`."""

    runs: Annotated[list[str], "run folders, or folders that hold them at any depth"] = field(default_factory=list)
    combine: Annotated[Combine, "average the members' logits (EoQ) or their probabilities"] = "logits"
    mix: Annotated[
        list[Literal["trials", "draws"]],
        "what members may differ in besides their seed, as EoA's do: splits (then the whole target is judged, and of "
        "the sources what none was trained on) and hyper-parameters (else the best of each seed is taken)",
    ] = field(default_factory=list)
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

    A seed that was trained with several hyper-parameters contributes the best by source validation, unless those are
    mixed, too.

    Returns:
        The folders written, each with results.jsonl and members.json.
    """
    device = pick_device(config.device)
    written = []
    data = DataOfRuns(config.data_dir, log)
    for variant, members in groups(config.runs, config.mix, config.integer != "none", log):
        ensemble = open_ensemble(members, data, config, device, log)
        judged = ensemble.judge()
        change: dict[str, float] = {}
        if config.integer != "none":
            before, judged = judged, ensemble.to_integer()
            change = ensemble.change(before, judged)
        folder = place(members[0], variant, config)
        ensemble.write(folder, judged, change)
        written.append(folder)
    return written


def place(member: Member, variant: str, config: EnsembleConfig) -> Path:
    """The folder of an ensemble: beside its members where they lie as `qtdog train` puts them, else in `ensembles`."""
    folder, card = member
    variant = re.sub(r"[^\w.+-]+", "_", variant)
    own = [] if "trials" in config.mix else [f"trial{card.run.trial_seed}"]
    name = "_".join(filter(None, [*own, *sorted(config.mix), variant, "ensemble"]))
    task = (card.dataset, card.run.method, card.target)
    if config.output_dir is None and folder.absolute().parts[-4:-1] == task:
        return folder.parent / name
    return Path(config.output_dir or folder.parent / "ensembles", *task, name)


def open_ensemble(
    members: Sequence[Member], data: DataOfRuns, config: EnsembleConfig, device: torch.device, log: Log
) -> "Ensemble":
    """Load the members' models, pack them if they are quantized, and find the images that they are judged on."""
    card, images = same_task(members), images_of_members(members)
    if images is None and config.mix:
        raise UserError(f"{members[0][0]}, or another member, has no list of its images: an earlier version trained it")
    parts = data.parts_of(members[0][0], card, images)
    trials = sorted({member.run.trial_seed for _, member in members})
    task = f"{card.dataset}, target domain {card.target}, trial {', '.join(map(str, trials))}"
    log(f"{find_method(card.run.method).ensemble_label} of {len(members)} members on {task}")
    models = [load_model(path, device) for path, _ in members]
    packed = None
    if card.quantization is not None:
        packed = pack_members(models, card, images, config.combine)
        log(textwrap.indent(str(packed.report), "  "))
    return Ensemble(members, models, packed, images, parts, config, device, log)


@dataclass
class Ensemble:
    """Trained runs of one task, their models, and the data as they divided it.

    Args:
        packed: the models in one, if they are quantized.
        images: every image that they know; None if one of them does not say.
        parts: env0_in, env0_out, env1_in, ...: no member was trained on a source's out part, nor on a target.
    """

    members: Sequence[Member]
    models: Sequence[nn.Module]
    packed: qk.PackedEnsemble | None
    images: ImageList | None
    parts: dict[str, Part]
    config: EnsembleConfig
    device: torch.device
    log: Log

    @property
    def card(self) -> ModelCard:
        """Of the first member, which shares with the others what is asked of it."""
        return self.members[0][1]

    @property
    def wanted(self) -> list[str]:
        """The parts to judge, targets first: those with images, as trials together may hold none out."""
        targets, sources = self.card.run.test_envs, self.card.source_envs
        names = [f"env{env}_in" for env in targets] + [f"env{env}_out" for env in (*targets, *sources)]
        return [name for name in names if self.parts[name].indices]

    def judge(self) -> dict[str, Predictions]:
        """What the ensemble answers for every wanted part."""
        network = of_several(self.models) if self.packed is None else self.packed.member_logits
        workers = pick_workers(self.config.num_workers, self.card.preprocessing is not None)
        shown = tqdm(self.wanted, desc="evaluating", disable=None)
        return {
            part: predict_images(network, EvaluationImages(self.parts[part], workers), self.device, self.config.combine)
            for part in shown
        }

    def to_integer(self) -> dict[str, Predictions]:
        """Find scales for 8-bit activations on training images; returns what it answers then."""
        assert self.packed is not None and self.config.integer != "none"  # float members are refused
        seen = [self.parts[f"env{env}_in"] for env in self.card.source_envs]
        batches = calibration_batches(seen, self.config.calibration_images, self.device)
        self.log(f"  {self.packed.to_integer_(batches, self.config.integer)}")
        return self.judge()

    def change(self, before: dict[str, Predictions], after: dict[str, Predictions]) -> dict[str, float]:
        """By how much integer activations change the accuracy on each part, in -1..1."""
        found = {}
        for part in after:
            found[f"{part}_acc"] = after[part].accuracy - before[part].accuracy
            of = f"{self.parts[part].domain.name}, {part.rpartition('_')[2]} part"
            self.log(f"  integer activations change the accuracy by {100 * found[f'{part}_acc']:+.1f} points on {of}")
        return found

    def write(self, folder: Path, judged: dict[str, Predictions], change: dict[str, float]) -> None:
        """members.json, results.jsonl and, of quantized members, the folder `packed`."""
        record = self.record(judged, change)
        alone = {f"{part}_acc": of.member_accuracies for part, of in judged.items()}
        manifest = [
            manifest_entry(member, {part: of[i] for part, of in alone.items()}, folder)
            for i, member in enumerate(self.members)
        ]
        (folder / DONE).unlink(missing_ok=True)
        write_json(folder / MANIFEST, {"combine": self.config.combine, "members": manifest})
        write_records(folder / RESULTS, [record])
        if self.packed is not None:
            accuracy = {
                self.parts[part].domain.name: of.accuracy
                for part, of in judged.items()
                if part not in [f"env{env}_out" for env in self.card.run.test_envs]
            }
            seeds = [member.run.seed for _, member in self.members]
            self.packed.save(folder / "packed", accuracy=accuracy, seeds=seeds)
            if self.images is not None:
                self.images.without_names().write(folder / "packed")
        seal(folder, [MANIFEST, RESULTS])
        targets = [judged[f"env{env}_in"].member_accuracies for env in self.card.run.test_envs]
        singles = ", ".join(f"{100 * fmean(one):.1f}" for one in zip(*targets, strict=True))
        self.log(f"  target accuracy {100 * record['target_accuracy']:.1f} (members alone: {singles}) -> {folder}")

    def record(self, judged: dict[str, Predictions], change: dict[str, float]) -> dict[str, Any]:
        """How good the ensemble is, and all else that tables need."""
        card, run = self.card, self.card.run
        return {
            **{f"{part}_{name}": value for part, of in judged.items() for name, value in of.metrics().items()},
            "combine": self.config.combine,
            "integer": self.config.integer,
            "integer_change": change,
            "mix": sorted(self.config.mix),
            "members": len(self.members),
            "dataset": card.dataset,
            "data_source": card.data_source,
            "domains": card.domains,
            "method": run.method,
            "target": card.target,
            "test_envs": list(run.test_envs),
            "source_envs": card.source_envs,
            "trial_seed": run.trial_seed,
            "settings": common([settings_of(member.run) for _, member in self.members]),
            "target_accuracy": fmean(judged[f"env{env}_in"].accuracy for env in run.test_envs),
            "nbytes": sum(member.nbytes for _, member in self.members) if self.packed is None else self.packed.nbytes,
            "float_nbytes": card.float_nbytes,
            "environment": describe_environment(self.device),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


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
