"""Trained models, opened to answer for images: a run, an ensemble of runs, or a packed ensemble."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import qkernels as qk
from qtdog.config import Device
from qtdog.data import Preprocessing
from qtdog.data.image_lists import FILE, ImageList
from qtdog.deployment.info import info_of, preprocessing_of
from qtdog.deployment.seen import Seen, merged
from qtdog.environment import pick_device
from qtdog.errors import UserError
from qtdog.files import REMEDY, is_done, read_sealed
from qtdog.methods.presets import find_method
from qtdog.results.predictions import Combine, MemberLogits, of_several
from qtdog.results.runs import MANIFEST, ModelCard, load_model, read_card

CONFIG = "config.json"  # of a packed ensemble


@dataclass
class ModelConfig:
    """What the commands that use a trained model have in common."""

    file: Annotated[str, "a run, an ensemble of `qtdog ensemble`, or the folder `packed` in it"] = ""
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    require_signature: Annotated[str | None, "public key of whoever must have signed it: see `qtdog sign`"] = None
    max_bytes: Annotated[
        int | None, "memory that a packed ensemble may take (default: docs/format.md), if it is refused"
    ] = None


@dataclass(frozen=True)
class Predictor:
    """One model or several, and what it takes to feed and to judge them.

    Args:
        title: what it is, in a line.
        member_logits: images [N, C, H, W] to logits [members, N, classes]; UserError for images that it cannot take.
        classes: their names, or None if it does not say.
        preprocessing: how images are prepared; None: digits of `image_shape`, as they are.
        data_kind, data_dir: the data that it was trained on, as `qtdog train` was told, as far as it is known.
        models: the members, where they are models of PyTorch.
    """

    title: str
    device: torch.device
    member_logits: MemberLogits
    combine: Combine
    classes: list[str] | None
    preprocessing: Preprocessing | None
    image_shape: Sequence[int]
    data_kind: str
    data_dir: str | None
    images: ImageList | None
    targets: Sequence[str]
    sources: Sequence[str]
    models: Sequence[nn.Module] = ()

    @property
    def seen(self) -> Seen:
        """What it knows from its training; nothing, as it were, if it does not say."""
        return Seen(self.images or ImageList([]), self.targets, self.sources)


def open_predictor(config: ModelConfig) -> Predictor:
    """The predictor in a folder.

    Raises:
        UserError: if there is none, it is damaged, takes too much memory, or is not signed as the settings require.
    """
    if not config.file:
        raise UserError("name a run, an ensemble, or a packed ensemble: `qtdog train` and `qtdog ensemble` make them")
    place, device = Path(config.file), pick_device(config.device)
    if (place / MANIFEST).is_file() and (place / "packed" / CONFIG).is_file():
        place = place / "packed"
    if (place / "config.yaml").is_file() and not is_done(place):
        raise UserError(f"{place} is not finished: `qtdog train --resume` finishes it")
    if (place / MANIFEST).is_file() or (place / "model.json").is_file():
        if config.require_signature:
            raise UserError(f"{place} is no packed ensemble, and those alone are signed: see `qtdog ensemble`")
        return of_ensemble(place, device) if (place / MANIFEST).is_file() else of_models([place], "logits", device)
    if not place.is_file() and not (place / CONFIG).is_file():
        raise UserError(f"{place} is no run, ensemble or packed ensemble: `qtdog train` and `qtdog ensemble` make them")
    return of_packed(place, config, device)


# Runs ------------------------------------------------------------------------------------------------------------


def of_ensemble(folder: Path, device: torch.device) -> Predictor:
    """The members of an ensemble, one after the other."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(read_sealed(file))
        combine = manifest["combine"]
        places = [(folder / str(member.get("from_here", "")), Path(member["folder"])) for member in manifest["members"]]
        if not places or combine not in ("logits", "probs"):
            raise ValueError("it names no members")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error
    found = []
    for places_of_one in places:
        there = [place for place in places_of_one if is_done(place) and place.resolve() != folder.resolve()]
        if not there:
            raise UserError(f"{folder} lacks its member {places_of_one[-1]}: bring it back, or make the ensemble again")
        found.append(there[0])
    return of_models(found, combine, device)


def of_models(folders: Sequence[Path], combine: Combine, device: torch.device) -> Predictor:
    """The models of runs that are one ensemble."""
    cards = [read_card(folder) for folder in folders]
    models = [load_model(folder, device) for folder in folders]
    card, lists = cards[0], [ImageList.read(folder) for folder in folders]
    known = [images for images in lists if images is not None]
    return Predictor(
        title=title_of(cards),
        device=device,
        member_logits=of_several(models),
        combine=combine,
        classes=card.classes,
        preprocessing=card.images_as_trained(),
        image_shape=card.image_shape,
        data_kind=card.run.dataset,
        data_dir=card.run.data_dir,
        images=merged(known, card.targets) if len(known) == len(lists) else None,
        targets=card.targets,
        sources=card.sources,
        models=models,
    )


def title_of(cards: Sequence[ModelCard]) -> str:
    """What a run or an ensemble of runs is."""
    card, nbytes = cards[0], sum(card.nbytes for card in cards)
    method = find_method(card.run.method)
    name = method.label if len(cards) == 1 else f"{method.ensemble_label} of {len(cards)} members"
    return f"{name}, {card.backbone}, {nbytes:,} bytes"


# Packed ensembles ------------------------------------------------------------------------------------------------


def of_packed(place: Path, config: ModelConfig, device: torch.device) -> Predictor:
    """A packed ensemble, from a file that anyone may have written."""
    try:
        ensemble = qk.PackedEnsemble.load(place, max_bytes=config.max_bytes, public_key=config.require_signature)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    ensemble, info = ensemble.to(device), info_of(ensemble, config.file)
    return Predictor(
        title=(
            f"{info.get('architecture', 'packed ensemble')}, {ensemble.members} members, {ensemble.nbytes:,} bytes, "
            f"{'integer' if ensemble.integer else 'float'} activations"
        ),
        device=device,
        member_logits=guarded(ensemble, info, config.file),
        combine=info.get("combine", "logits"),
        classes=info.get("classes"),
        preprocessing=preprocessing_of(info),
        image_shape=info.get("image_shape", []),
        data_kind=info.get("data_kind", "folder"),
        data_dir=None,
        images=images_of_packed(place, info),
        targets=info.get("targets", []),
        sources=info.get("sources", []),
    )


def images_of_packed(place: Path, info: dict[str, Any]) -> ImageList | None:
    """The images that a packed ensemble was trained on; None if it does not say that it knows them.

    Raises:
        UserError: if their list is not the one that the ensemble, and so its signature, vouches for.
    """
    if "images_sha256" not in info:
        return None
    folder = place if place.is_dir() else place.parent
    images = ImageList.read(folder)
    if images is None or images.division != info["images_sha256"]:
        raise UserError(
            f"{folder / FILE} is {'missing' if images is None else 'another'}, without which nobody can tell which "
            "images the ensemble was trained on: bring it back, or make the ensemble again"
        )
    return images


def guarded(ensemble: qk.PackedEnsemble, info: dict[str, Any], file: str) -> MemberLogits:
    """What gives the members' logits for images; UserError where the ensemble cannot take them."""

    def answer(images: Tensor) -> Tensor:
        try:
            logits = ensemble.member_logits(images)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{file} cannot take images of shape {list(images.shape)}: {error}") from error
        if "classes" in info and logits.shape[1:] != (len(images), len(info["classes"])):
            raise UserError(f"{file} names {len(info['classes'])} classes, its network gives {list(logits.shape)}")
        return logits

    return answer
