"""Which files are pictures, and whether this Pillow can open them."""

import importlib.util
import os.path
from functools import cache

from PIL import Image, features

# Extension -> the feature of Pillow that it needs, and what to do where that is missing.
_BUILT_IN = ("", "")
_AVIF = ("avif", "install Pillow 11.3 or newer, built with AVIF")
_HEIF = ("", "pip install pillow-heif")
_JPEG_2000 = ("jpg_2000", "install a Pillow built with JPEG 2000 (OpenJPEG)")
_WEBP = ("webp", "install a Pillow built with WebP")
PICTURES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib"), _BUILT_IN),
    **dict.fromkeys((".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga"), _BUILT_IN),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), _JPEG_2000),
    ".webp": _WEBP,
    ".avif": _AVIF,
    **dict.fromkeys((".heic", ".heif"), _HEIF),
}


@cache
def extensions() -> frozenset[str]:
    """The extensions of PICTURES that this Pillow, with the plug-ins that are installed, can open."""
    register_plugins()
    known = Image.registered_extensions()
    return frozenset(
        extension
        for extension, (feature, _) in PICTURES.items()
        if known.get(extension) in Image.OPEN and (feature not in features.modules | features.codecs or _has(feature))
    )


def is_picture(name: str) -> bool:
    """Whether a file's name says that it is a picture, be it one that can be opened or not."""
    return os.path.splitext(name)[1].lower() in PICTURES


def way_to_open(name: str) -> str | None:
    """What to do before a picture of this name can be opened; None where nothing is missing, or nothing would help."""
    extension = os.path.splitext(name)[1].lower()
    return None if extension in extensions() or extension not in PICTURES else PICTURES[extension][1] or None


def register_plugins() -> None:
    """Have Pillow open what packages beside it can open, where they are installed."""
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()


def _has(feature: str) -> bool:
    return bool(features.check(feature))
