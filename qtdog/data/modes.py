"""Images of every mode of Pillow as RGB of 8 bits a color, by what their numbers mean.

`convert("RGB")` of Pillow cuts off what is above 255: gray of 16 bits becomes white, and of floats between 0 and 1 two
values are left. It also forgets transparency, so that black strokes on nothing become a black square.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageColor

from qtdog.errors import UserError

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
FLOAT_RANGES = (1, 255, 65535)  # that numbers may have where the file does not say
INTEGER_RANGES = (255, 65535)
BITS, PHOTOMETRIC = 0x0102, 0x0106  # tags of TIFF: of a number, and what 0 means
FACTORS = {"L;2": 85, "L;4": 17}  # from gray of 2 and 4 bits in a PNG to 8


class NoRange(ValueError):
    """Nobody knows which numbers of an image are black and white."""


@dataclass(frozen=True)
class Picture:
    """An image as RGB of 8 bits a color.

    Attributes:
        conversion: what was done to it, for people; empty for RGB and gray of 8 bits.
        range: what stands for white, if that was seen from its own numbers, as the file does not say.
    """

    image: Image.Image
    conversion: str = ""
    range: int | None = None


def scale_clear_color(image: Image.Image) -> None:
    """Bring the color that a PNG declares transparent to the 8 bits that its pixels get when they are decoded."""
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits a color, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int) and tiles and isinstance(tiles[0][3], str):
        image.info["transparency"] = clear * FACTORS.get(tiles[0][3], 1)


def as_rgb(image: Image.Image, background: Color) -> Picture:
    """`image`, decoded already, as RGB; transparent pixels show `background`.

    Raises:
        NoRange: for numbers without a known range.
        ValueError: for what else Pillow cannot convert.
    """
    mode = image.mode
    if mode in ("RGB", "L") and "transparency" not in image.info:
        return Picture(image if mode == "RGB" else image.convert("RGB"))
    if mode.startswith("I;16"):
        return from_16_bits(image, background)
    if mode in ("I", "F"):
        return from_unknown_range(image)
    if is_transparent(image):
        flat = Image.new("RGBA", image.size, (*background, 255))
        flat.alpha_composite(with_alpha(image))
        return Picture(flat.convert("RGB"), f"{mode}, transparency onto {color_name(background)}")
    if mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return Picture(converted, mode)
    return Picture(image.convert("RGB"), mode)


def is_transparent(image: Image.Image) -> bool:
    """Whether it has an alpha channel, a palette with one, or a color that stands for nothing."""
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A") or "transparency" in image.info


def with_alpha(image: Image.Image) -> Image.Image:
    """A transparent image as RGBA."""
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def from_16_bits(image: Image.Image, background: Color) -> Picture:
    """Gray of 16 bits by 65535, of 12 in a TIFF by 4095."""
    values = np.asarray(image).astype(np.int64)
    most = (1 << tag(image, BITS, 16)) - 1
    if is_negative(image):
        values = most - values
    gray = gray_image(values, most)
    conversion = f"{image.mode}, divided by {most}"
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return Picture(gray.convert("RGB"), conversion)
    opaque = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    flat = Image.new("RGB", image.size, background)
    flat.paste(gray.convert("RGB"), mask=opaque)
    return Picture(flat, f"{conversion}, transparency onto {color_name(background)}")


def from_unknown_range(image: Image.Image) -> Picture:
    """Integers of 32 bits and floats: by 65535 where the format says so, else by the least usual range that has them.

    Raises:
        NoRange: for numbers beyond these ranges, or that are none.
    """
    values = np.asarray(image).astype(np.float64)
    if image.format in ("PNG", "PPM") and image.mode == "I":  # 16 bits, and of PGM with any maxval, scaled to these
        return Picture(gray_image(values, 65535).convert("RGB"), f"{image.mode}, divided by 65535")
    kind, ranges = ("floats", FLOAT_RANGES) if image.mode == "F" else ("integers", INTEGER_RANGES)
    least, greatest = float(values.min()), float(values.max())
    fitting = [most for most in ranges if greatest <= most]
    if not (math.isfinite(least) and math.isfinite(greatest)) or least < 0 or not fitting:
        wanted = " or ".join(f"0 to {most}" for most in ranges)
        raise NoRange(
            f"its {kind} reach from {least:g} to {greatest:g}, and which of them are black and white is not known: "
            f"bring them to {wanted}, or save it with 8 or 16 bits"
        )
    if is_negative(image):
        values = fitting[0] - values
    converted = gray_image(values, fitting[0]).convert("RGB")
    return Picture(converted, f"{image.mode}, divided by {fitting[0]}", fitting[0] if greatest > 0 else None)


def gray_image(values: np.ndarray, most: int) -> Image.Image:
    """Values between 0 and `most` as gray of 8 bits, rounded."""
    return Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))


def is_negative(image: Image.Image) -> bool:
    """Whether 0 is white, which Pillow minds in TIFFs of up to 8 bits alone."""
    return tag(image, PHOTOMETRIC, 1) == 0


def tag(image: Image.Image, number: int, default: int) -> int:
    """A tag of a TIFF; the default of other files."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value


def color_of(name: str) -> Color:
    """A color by its name or as in HTML; UserError for what is none, or is transparent itself."""
    try:
        color = ImageColor.getrgb(name)
    except ValueError as error:
        raise UserError(f"--background {name} is no color: name one as in HTML, such as black or #808080") from error
    if len(color) != 3:
        raise UserError(f"--background {name} is transparent itself: leave its fourth number out")
    return color


def color_name(color: Color) -> str:
    """`white`, or as in HTML."""
    return "white" if color == WHITE else "#{:02x}{:02x}{:02x}".format(*color)
