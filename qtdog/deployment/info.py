"""What a packed ensemble says of itself, beside its network: from a file that anyone may have written."""

import math
from collections.abc import Callable
from typing import Any

import qkernels as qk
from qtdog.data import Preprocessing
from qtdog.errors import UserError

LARGEST_IMAGE = 8192  # pixels high and wide


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_IMAGE


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(each) is int and 0 <= each <= 255 for each in value)


def is_preprocessing(value: Any) -> bool:
    """None for digits, which are taken as they are."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() - {"background"} != {"image_size", "mean", "std"}:
        return False
    if "background" in value and not is_color(value["background"]):
        return False
    colors = [*value["mean"], *value["std"]] if all(isinstance(value[key], list) for key in ("mean", "std")) else []
    return is_size(value["image_size"]) and len(colors) == 6 and all(map(is_number, colors)) and min(value["std"]) > 0


KNOWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "architecture": ("a name", is_text),
    "classes": ("a list of names", is_texts),
    "combine": ("logits or probs", lambda value: value in ("logits", "probs")),
    "data_kind": ("a name", is_text),
    "dataset": ("a name", is_text),
    "domains": ("a list of names", is_texts),
    "image_shape": ("three sizes", lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_size, v))),
    "images_sha256": ("a hash", is_text),
    "preprocessing": ("an image_size, and the mean and std of three colors", is_preprocessing),
    "sources": ("a list of names", is_texts),
    "targets": ("a list of names", is_texts),
}


def info_of(ensemble: qk.PackedEnsemble, file: str) -> dict[str, Any]:
    """What `file` says of its ensemble, as far as the commands use it.

    Raises:
        UserError: naming what is missing, or is not what it should be.
    """
    info = {key: ensemble.info[key] for key in KNOWN if key in ensemble.info}
    for key, value in info.items():
        what, fits = KNOWN[key]
        if not fits(value):
            raise UserError(f"{file} says {key}={str(value)[:80]}, which is not {what}: make it again")
    if "preprocessing" not in info:
        raise UserError(f"{file} does not say how images are prepared: save(preprocessing=..., classes=...)")
    if info["preprocessing"] is None and "image_shape" not in info:
        raise UserError(f"{file} does not say of which size its images are: save(image_shape=...)")
    return info


def preprocessing_of(info: dict[str, Any]) -> Preprocessing | None:
    """How to prepare images; None for digits, which are taken as they are."""
    stored = info["preprocessing"]
    if stored is None:
        return None
    return Preprocessing.from_dict(stored)
