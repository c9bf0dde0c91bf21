"""The folder of a run: what lies in it, how it is written, found and read back.

    config.yaml         every setting of the run
    out.txt             what was printed
    images.csv          every image of the data, the part that it was in and what it is
    checkpoints.jsonl   one record a checkpoint, with DomainBed's keys
    results.jsonl       those of the checkpoints that may be selected: what the method would answer
    checkpoint.pt       to resume from: tensors and plain types only
    model.safetensors   the selected model
    model.json          what is needed to rebuild and to judge it
    done                the run has finished, with these files' checksums (but for the checkpoint's, which has its own)

While it is trained also .lock, which its process holds, and checkpoint.previous.pt. Files are written beside themselves
and then renamed, so that a kill leaves the old or the new one, never a half.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels import replace_file
from qtdog.config import RunConfig
from qtdog.data import Preprocessing, image_lists
from qtdog.errors import UserError, one_line
from qtdog.files import is_done, read_records, read_sealed, write_json
from qtdog.methods.numbers import dashed
from qtdog.models import build_model
from qtdog.plain_types import checked
from qtdog.plugins import require

CHECKPOINTS, RESULTS = "checkpoints.jsonl", "results.jsonl"
MANIFEST = "members.json"  # of an ensemble
SEALED = ("config.yaml", image_lists.FILE, CHECKPOINTS, RESULTS, "model.safetensors", "model.json")


def checkpoint_records(folder: Path) -> list[dict[str, Any]]:
    """The records of all of a run's checkpoints. (Earlier versions kept one file of records, not two.)"""
    file = folder / CHECKPOINTS
    return read_records(file if file.is_file() else folder / RESULTS)


def seconds_of(records: Sequence[dict[str, Any]]) -> float:
    """What a run took, training and evaluation, from the records of all its checkpoints."""
    done = [0, *(record["step"] + 1 for record in records)]
    return sum(
        (after - before) * record["step_time"] + record["eval_time"]
        for before, after, record in zip(done, done[1:], records, strict=False)
    )


def on_targets(accuracies: Mapping[str, float], run: RunConfig) -> float:
    """The accuracy on the `in` part of a run's target; of several targets the mean."""
    return fmean(accuracies[f"env{env}_in_acc"] for env in run.test_envs)


def task_of(domains: Sequence[str], run: RunConfig) -> str:
    """What a run leaves out, and where it was chosen what it is trained on: `photo+sketch`, `photo_from_sketch`."""
    targets = "+".join(domains[env] for env in run.test_envs)
    return targets + (f"_from_{'+'.join(domains[env] for env in run.sources)}" if run.sources else "")


@dataclass(frozen=True)
class ModelCard:
    """model.json: all that is needed to rebuild the selected model and to judge it."""

    config: dict[str, Any]
    dataset: str
    data_source: str
    domains: list[str]
    target: str
    classes: list[str]
    image_shape: list[int]
    preprocessing: dict[str, Any] | None
    backbone: str
    quantization: dict[str, Any] | None
    selection: str
    selected_step: int
    source_validation_accuracy: float
    accuracies: dict[str, float]
    nbytes: int
    float_nbytes: int
    environment: dict[str, str]
    date: str
    images: str | None = None  # ImageList.content; None: of an earlier version, which kept no list

    @cached_property
    def run(self) -> RunConfig:
        return RunConfig.from_dict(self.config)

    @property
    def targets(self) -> list[str]:
        """The names of the domains that were left out."""
        return [self.domains[env] for env in self.run.test_envs]

    @property
    def sources(self) -> list[str]:
        """The names of the domains that it was trained on."""
        return [self.domains[env] for env in self.source_envs]

    @property
    def source_envs(self) -> list[int]:
        """Their indices."""
        return self.run.source_envs(len(self.domains))

    @property
    def target_accuracy(self) -> float:
        """Share in 0..1 of the target's `in` part, as DomainBed reports it; of several targets the mean."""
        return on_targets(self.accuracies, self.run)

    def images_as_trained(self) -> Preprocessing | None:
        """How the images were prepared; None for the MNIST sets."""
        if self.preprocessing is None:
            return None
        return Preprocessing.from_dict(self.preprocessing)


def save_model(folder: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """model.safetensors, then model.json."""
    # As bytes: what save_file raises on a full disk is no OSError.
    content = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    replace_file(folder / "model.safetensors", lambda temporary: temporary.write_bytes(content))
    write_json(folder / "model.json", asdict(card))


def read_card(folder: Path) -> ModelCard:
    """The model.json of a run folder."""
    file = folder / "model.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no model.json: not a finished run of `qtdog train`")
    try:
        card = checked(ModelCard, json.loads(read_sealed(file)))
        plugins, _ = card.run.plugins, card.target_accuracy
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is not a model card of this version of qtdog: {error}") from error
    require(plugins, str(folder), unchanged=False)
    return card


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The selected model of a finished run, in eval mode: images [N, C, H, W] to logits [N, classes].

    Its layers are quantized if the run's were. How to prepare images stands in model.json under `preprocessing`.
    """
    folder = Path(folder)
    card = read_card(folder)
    require(card.run.plugins, str(folder), unchanged=True)
    model = build_model(card.backbone, len(card.classes), card.image_shape[0], image_size=card.image_shape[-1])
    weights = folder / "model.safetensors"
    try:
        state = safetensors.torch.load(read_sealed(weights))
        if card.quantization is not None:
            if any(name.endswith("_extra_state") for name in state):
                qk.quantize_like_(model, state)
            else:  # of an earlier version, which did not write down how each layer is quantized
                qk.quantize_(model, qk.QConfig.from_dict(card.quantization))
            qk.fuse_weights_(model)
        model.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{weights} is damaged, or not that of the model.json beside it: {one_line(error)}") from error
    return model.to(device).to(memory_format=torch.channels_last).eval()


def run_folder(output_dir: str, dataset: str, target: str, run: RunConfig) -> Path:
    """Where `qtdog train` puts a run."""
    draw = f"_hparams{run.hparams_seed}" if run.hparams_seed else ""
    for name, value in run.point().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        draw += f"_{dashed(name)}{'' if is_number else '-'}{value}"
    return Path(output_dir) / dataset / run.method / target / f"trial{run.trial_seed}{draw}_seed{run.seed}"


def find_runs(places: Sequence[str]) -> list[Path]:
    """The finished runs in and under `places`, each once, by path."""
    if not places:
        raise UserError("name at least one run folder, or a folder that holds runs")
    found = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise UserError(f"{place} is not a folder")
        finished = [card.parent for card in sorted(place.rglob("model.json")) if is_done(card.parent)]
        if not finished:
            raise UserError(f"{place} holds no finished run: `qtdog train` makes them, `--resume` finishes them")
        found.update({folder.resolve(): folder for folder in finished})
    return sorted(found.values())
