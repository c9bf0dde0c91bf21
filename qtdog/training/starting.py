"""Runs that start from the selected model of another run."""

from collections.abc import Collection
from pathlib import Path

import safetensors.torch
from torch import nn

from qtdog.config import RunConfig
from qtdog.data.image_lists import BEFORE, Image, ImageList
from qtdog.errors import UserError, listing
from qtdog.files import is_done, read_sealed
from qtdog.log import Log
from qtdog.methods.presets import find_method
from qtdog.models import build_model, fill
from qtdog.results.runs import ModelCard, read_card


def starts_from_run(run: RunConfig) -> bool:
    """Whether `--weights` names the folder of a run."""
    return run.weights not in ("timm", "none") and Path(run.weights).is_dir()


def check_start(run: RunConfig) -> None:
    """Raises UserError, before anything is trained, for a start from what is no finished run or another network."""
    if not starts_from_run(run):
        return
    folder = Path(run.weights)
    if not is_done(folder):
        raise UserError(f"--weights {folder} is not the folder of a finished run: `qtdog train` makes them")
    card = read_card(folder)
    architecture, own = card.backbone.partition(".")[0], run.backbone.partition(".")[0]
    if architecture != own:
        raise UserError(
            f"--weights {run.weights} are of a {architecture}, not of a {own}: give --backbone {card.backbone}, or "
            "another run"
        )


def start_from_run(model: nn.Module, run: RunConfig, log: Log) -> None:
    """Fill a float `model` with the selected model of the run that `--weights` names.

    Of a quantized run these are the latent weights. Its scales are left behind: those of this run begin at its switch,
    from the weights of that moment, as in any other. The head is left as it is if it has another number of classes.

    Raises:
        UserError: for tensors of other names or shapes.
    """
    folder = Path(run.weights)
    card = read_card(folder)
    stored = safetensors.torch.load(read_sealed(folder / "model.safetensors"))  # whose checksum it has compared
    twin = build_model(card.backbone, len(card.classes), card.image_shape[0], image_size=card.image_shape[-1])
    fill(model, {name: stored[name] for name in twin.state_dict() if name in stored}, str(folder), log)
    log(
        f"weights of {folder}: {find_method(card.run.method).label} on {card.dataset}, target domain {card.target}, "
        f"step {card.selected_step}{left_behind(card)}"
    )
    if ImageList.read(folder) is None:
        log(f"{folder}, of an earlier version, does not say which images it was trained on, the target's perhaps")


def trained_before(run: RunConfig) -> list[Image]:
    """The images that the run, from which this one starts, or one before it was trained on; none if it does not say."""
    if not starts_from_run(run):
        return []
    folder = Path(run.weights)
    images = ImageList.read(folder)
    return images.trained(read_card(folder).sources) if images is not None else []


def refuse_seen_targets(run: RunConfig, targets: Collection[str], images: ImageList) -> None:
    """UserError if the run from which this one starts was trained on images of its target."""
    before = {image.fingerprint for image in images.images if image.part == BEFORE}
    if seen := [image for image in images.own if image.domain in targets and image.fingerprint in before]:
        raise UserError(
            f"--weights {run.weights} was trained on {len(seen):,} images of the target {', '.join(targets)} "
            f"({listing(seen)}): start from a run that left it out"
        )


def left_behind(card: ModelCard) -> str:
    """What of a quantized run's model a run does not start from."""
    return "" if card.quantization is None else "; latent weights, without its quantization scales"
