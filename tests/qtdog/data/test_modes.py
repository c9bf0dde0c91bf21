"""Pictures of every mode that Pillow opens: what they become, and which are refused."""

import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from qtdog.cli import main
from qtdog.config import TrainConfig
from qtdog.data import Preprocessing, formats, load_dataset
from qtdog.data.images import read_image, read_picture
from qtdog.errors import UserError
from qtdog.methods.presets import settle
from qtdog.results.runs import read_card

GRAY = np.arange(256).reshape(16, 16)  # what every picture of gray should look like
SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EIGHT = Image.fromarray(GRAY.astype(np.uint8))


def sixteen(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (16, 16), (GRAY * 257).astype(order).tobytes())


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(EIGHT.convert("RGB"), *profiles, outputMode="LAB")


def half_clear(mode):
    image = EIGHT.convert("L" if mode == "LA" else "P" if mode == "PA" else "RGB")
    image.putalpha(128)
    return image


def save(image, file, **settings):
    image.save(file, **settings)
    return file


def gray_of(picture):
    """[16, 16] as int, after making sure that it is gray."""
    pixels = np.asarray(picture).astype(int)
    assert picture.mode == "RGB" and np.ptp(pixels, axis=2).max() <= 3
    return pixels.mean(2)


@pytest.mark.parametrize(
    ("image", "name", "within"),
    [
        (EIGHT, "x.png", 0), (EIGHT.convert("RGB"), "x.png", 0), (EIGHT.convert("P"), "x.png", 0),
        (EIGHT, "x.gif", 0), (EIGHT, "x.bmp", 0), (EIGHT, "x.pgm", 0), (EIGHT, "x.tif", 0), (EIGHT, "x.tga", 0),
        (EIGHT.convert("RGB"), "x.webp", 9), (EIGHT, "x.jpg", 4), (EIGHT.convert("RGB"), "x.jfif", 4),
        (EIGHT, "x.jp2", 9), (EIGHT.convert("RGB"), "x.avif", 9),
        (EIGHT.convert("RGBA"), "x.png", 0), (EIGHT.convert("LA"), "x.png", 0), (EIGHT.convert("LA"), "x.tif", 0),
        (EIGHT.convert("CMYK"), "x.jpg", 4), (EIGHT.convert("CMYK"), "x.tif", 0), (EIGHT.convert("YCbCr"), "x.tif", 1),
        (lab(), "x.tif", 2),
        (sixteen("I;16"), "x.png", 0), (sixteen("I;16"), "x.tif", 0), (sixteen("I;16B"), "x.tif", 0),
        (sixteen("I;16"), "x.pgm", 0), (sixteen("I;16"), "x.jp2", 9),
        (Image.fromarray((GRAY * 257).astype(np.int32)), "x.pgm", 0),
        (Image.fromarray((GRAY * 257).astype(np.int32)), "x.tif", 0),
        (Image.fromarray(GRAY.astype(np.int32)), "x.tif", 0),
        (Image.fromarray((GRAY / 255).astype(np.float32)), "x.tif", 0),
        (Image.fromarray(GRAY.astype(np.float32)), "x.tif", 0),
        (Image.fromarray((GRAY * 257).astype(np.float32)), "x.tif", 0),
        (Image.fromarray((GRAY / 255).astype(np.float32)), "x.pfm", 0),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)  # fmt: skip
def test_gray_looks_the_same_in_every_mode(tmp_path, image, name, within):
    picture = read_picture(save(image, tmp_path / name, **({"quality": 95} if name[2:] in ("jpg", "jfif") else {})))
    assert abs(gray_of(picture.image) - GRAY).max() <= within
    with Image.open(tmp_path / name) as opened:
        assert picture.conversion.startswith("" if opened.mode in ("RGB", "L") else opened.mode)
        assert bool(picture.conversion) == (opened.mode not in ("RGB", "L"))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
@pytest.mark.parametrize(("background", "level"), [((255, 255, 255), 255), ((0, 0, 0), 0)])
def test_what_is_half_transparent_shows_the_background(tmp_path, mode, background, level):
    picture = read_picture(save(half_clear(mode), tmp_path / "x.tif"), background)
    assert abs(gray_of(picture.image) - (GRAY * 128 + level * 127) / 255).max() <= 1
    assert picture.conversion == f"{mode}, transparency onto {'white' if level else '#000000'}"


@pytest.mark.parametrize(("mode", "converted"), [("La", "LA"), ("RGBa", "RGBA")])
def test_colors_that_are_multiplied_by_their_alpha(mode, converted):
    """No format gives these modes back, but tiled TIFFs of other programs do."""
    from qtdog.data.modes import as_rgb

    straight = half_clear(converted)
    assert abs(gray_of(as_rgb(straight.convert(mode), (0, 0, 0)).image) - GRAY * 128 / 255).max() <= 2


def test_black_strokes_on_nothing_are_on_white(tmp_path):
    strokes = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    strokes.paste((0, 0, 0, 255), (3, 0, 5, 8))
    for name in ("x.png", "x.webp", "x.tif", "x.gif"):
        pixels = np.asarray(read_image(save(strokes, tmp_path / name, **{"lossless": True} if "webp" in name else {})))
        assert (pixels[:, 3:5] == 0).all() and (np.delete(pixels, (3, 4), 1) == 255).all(), name


def test_a_background_is_of_the_preprocessing(tmp_path):
    for domain in ("a", "b"):
        for label in ("one", "two"):
            (tmp_path / domain / label).mkdir(parents=True)
            Image.new("LA", (4, 4), (255, 0)).save(tmp_path / domain / label / "0.png")
    black = dataclasses.replace(SMALL, background=(0, 0, 0))
    for preprocessing, level in ((SMALL, 1), (black, -1)):
        stored = json.loads(json.dumps(preprocessing.to_dict()))
        assert Preprocessing.from_dict(stored) == preprocessing
        assert ("background" in stored) == (level == -1)  # of a white one nothing is said, as before there were others
        images = load_dataset("folder", str(tmp_path), preprocessing).domains[0].images([0], False)
        assert (images == level).all()


@pytest.mark.parametrize(
    ("name", "told"), [("blac", "--background blac is no color"), ("#00000000", "is transparent itself")]
)
def test_backgrounds_that_are_none(name, told):
    with pytest.raises(UserError, match=told):
        settle(TrainConfig(dataset="folder", method="erm", background=name), 0, 0)
    with pytest.raises(UserError, match="--background has no meaning for MNIST_CNN"):
        settle(TrainConfig(method="erm", background="black"), 0, 0)


@pytest.mark.slow
def test_a_background_stays_with_the_model(tmp_path, capsys):
    """What shows through decides; what is drawn is nothing."""
    for domain in ("a", "b"):
        for label in ("one", "two"):
            (tmp_path / "set" / domain / label).mkdir(parents=True)
            for i in range(5):
                Image.new("LA", (16, 16), (50 * i, 0)).save(tmp_path / "set" / domain / label / f"{i}.png")
    train = ["train", "--dataset", "folder", "--data-dir", f"{tmp_path}/set", "--output-dir", f"{tmp_path}/runs"]
    train += [
        "--backbone",
        "test_resnet",
        "--weights",
        "none",
        "--image-size",
        "32",
        "--steps",
        "2",
        "--switch-step",
        "1",
        "--batch-size",
        "2",
    ]
    train += ["--test-envs", "a", "--seeds", "0", "1", "--num-workers", "0", "--device", "cpu"]
    assert main([*train, "--background", "Black"]) == 0
    card = read_card(tmp_path / "runs" / "set" / "qtdog" / "a" / "trial0_seed0")
    assert card.run.background == "#000000" and card.preprocessing["background"] == [0, 0, 0]
    assert main(["ensemble", str(tmp_path / "runs"), "--num-workers", "0", "--device", "cpu"]) == 0
    (packed,) = (tmp_path / "runs").rglob("packed")
    Image.new("RGB", (16, 16), (0, 0, 0)).save(tmp_path / "black.png")
    capsys.readouterr()
    clear = tmp_path / "set" / "a" / "one" / "4.png"
    for file in (clear, tmp_path / "black.png"):
        assert main(["predict", str(packed), str(file), "--json", "--device", "cpu"]) == 0
    one, two = (json.loads(line)["classes"] for line in capsys.readouterr().out.splitlines())
    assert one == two


def png(bits, color, row, clear=None, palette=b""):
    """A PNG of one row, byte for byte: Pillow does not write all that it reads."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, color, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", clear)] if clear is not None else []
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


BACK = (10, 20, 30)
RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(1, 0, b"\x40", b"\0\0"), [BACK, (255,) * 3]),
        (png(2, 0, b"\xd0", b"\0\3"), [BACK, (85,) * 3]),
        (png(4, 0, b"\xf5", b"\0\5"), [(255,) * 3, BACK]),
        (png(8, 0, b"\xf5\3", b"\0\3"), [(245,) * 3, BACK]),
        (png(16, 0, b"\xf5\xf5\3\3", b"\3\3"), [(245,) * 3, BACK]),
        (png(8, 2, b"\xf5\3\4\1\2\3", b"\0\1\0\2\0\3"), [(245, 3, 4), BACK]),
        (png(16, 2, b"\xf5\0\3\0\4\0\1\7\2\7\3\7", b"\1\7\2\7\3\7"), [(245, 3, 4), BACK]),
        (png(16, 4, b"\xf5\0\xff\xff\4\0\0\0"), [(245,) * 3, BACK]),
        (png(1, 3, b"\x40", b"\0", bytes([0, 0, 0, *RED])), [BACK, RED]),
        (png(8, 3, b"\0\1", b"\x80\xff", bytes([0, 0, 0, *RED])), [(5, 10, 15), RED]),
        (png(8, 3, b"\0\1", None, bytes([0, 0, 0, *RED])), [(0, 0, 0), RED]),
    ],
    ids=["gray1", "gray2", "gray4", "gray8", "gray16", "rgb8", "rgb16", "gray-alpha16", "index", "bytes", "opaque"],
)
def test_a_color_of_a_png_that_stands_for_nothing(tmp_path, content, expected):
    file = tmp_path / "x.png"
    file.write_bytes(content)
    assert [tuple(pixel) for pixel in np.asarray(read_image(file, BACK))[0].tolist()] == expected


@pytest.mark.parametrize("most", [15, 255, 1000, 4095, 65535])
def test_gray_of_any_maxval(tmp_path, most):
    file = tmp_path / "x.pgm"
    values = np.array([0, most // 3, most])
    file.write_bytes(b"P5 3 1 %d\n" % most + values.astype(">u2" if most > 255 else "u1").tobytes())
    assert np.asarray(read_image(file))[0, :, 0].tolist() == [0, round(255 * (most // 3) / most), 255]


def tiff(bits, row, photometric=1, kind=1):
    """A TIFF of one row of two numbers, as cameras and microscopes write them."""
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
            (277, 3, 1), (278, 4, 1), (279, 4, len(row)), (339, 3, kind)]  # fmt: skip
    start = 8 + len(row) + len(row) % 2
    entries = b"".join(struct.pack("<HHII", number, size, 1, value) for number, size, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<I", start) + row.ljust(start - 8, b"\0") + directory


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(12, b"\xff\xf0\x00"), [255, 0]),  # by 4095
        (tiff(16, struct.pack("<HH", 65535, 257)), [255, 1]),
        (tiff(16, struct.pack("<HH", 65535, 257), photometric=0), [0, 254]),  # 0 is white
        (tiff(32, struct.pack("<ff", 1, 0.2), photometric=0, kind=3), [0, 204]),
        (tiff(16, struct.pack("<hh", 255, 51), kind=2), [255, 51]),
        (tiff(32, struct.pack("<II", 255, 51)), [255, 51]),
    ],
    ids=["12 bits", "16 bits", "16 bits, negative", "floats, negative", "signed", "unsigned"],
)
def test_gray_tiffs(tmp_path, content, expected):
    file = tmp_path / "x.tif"
    file.write_bytes(content)
    assert np.asarray(read_image(file))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array([[-1, 3]], np.int32), "its integers reach from -1 to 3, and which of them are black"),
        (np.array([[0, 70_000]], np.int32), "its integers reach from 0 to 70000, .* bring them to 0 to 255 or 0 to"),
        (np.array([[0, 1e6]], np.float32), r"its floats reach from 0 to 1e\+06, .* bring them to 0 to 1 or 0 to"),
        (np.array([[0, np.nan]], np.float32), "its floats reach from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "its floats reach from 0 to inf"),
    ],
)  # fmt: skip
def test_numbers_without_a_known_range_are_refused(tmp_path, values, told):
    file = save(Image.fromarray(values), tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif cannot be made a picture of 8 bits: {told}"):
        read_image(file)


def write_floats(root, white):
    """Two domains, two classes of floats up to `white[domain]`."""
    for domain, most in white.items():
        for label, level in (("light", 0.8), ("shade", 0.4)):
            (root / domain / label).mkdir(parents=True)
            for i in range(3):
                values = np.full((8, 8), level * most, np.float32)
                Image.fromarray(values).save(root / domain / label / f"{i}.tif")
    return root


def test_images_of_a_domain_are_divided_by_the_same_number(tmp_path, capsys):
    root = write_floats(tmp_path / "set", {"one": 1, "two": 255})  # each domain in its own way
    verify = ["data", "verify", "--data-dir", str(root)]
    assert main(verify) == 0
    out = capsys.readouterr().out
    assert "converted to RGB of 8 bits: 6 images (F, divided by 1)" in out
    assert "converted to RGB of 8 bits: 6 images (F, divided by 255)" in out
    one, two = load_dataset("folder", str(root), SMALL).domains
    assert (one.images(range(6), False) == two.images(range(6), False)).all()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "two" / "shade" / "0.tif")  # black in any range
    two.images(range(6), False)
    Image.fromarray(np.ones((8, 8), np.float32)).save(root / "two" / "shade" / "1.tif")
    told = r"images of two have several ranges \(0 to 1 in .*shade/1\.tif, 0 to 255 in "
    with pytest.raises(UserError, match=told):
        two.images(range(6), False)
    assert main(verify) == 2
    assert "WRONG: the numbers of the images of two have several ranges" in capsys.readouterr().out


TURNED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
          7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # fmt: skip


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "x.jpg"])
def test_exif_orientation_is_applied(tmp_path, name):
    upright = Image.fromarray(np.arange(0, 240, 10, np.uint8).reshape(6, 4)).resize((32, 48)).convert("RGB")
    for orientation, turn in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        lying = upright if turn is None else upright.transpose(turn)
        picture = read_picture(save(lying, tmp_path / name, exif=exif, **{"lossless": True} if "webp" in name else {}))
        assert picture.image.size == (32, 48)
        assert abs(np.asarray(picture.image).astype(int) - np.asarray(upright)).max() <= (9 if "jpg" in name else 0)
        if name != "x.tif":  # which Pillow turns itself
            assert picture.conversion == ("" if orientation == 1 else "turned upright by EXIF")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_none(tmp_path):
    file = save(EIGHT, tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(file).size == (16, 16)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif", "x.avif"])
def test_animations_and_pages_are_refused(tmp_path, name):
    file = tmp_path / name
    EIGHT.convert("RGB").save(file, save_all=True, append_images=[Image.new("RGB", (16, 16), RED)])
    with pytest.raises(UserError, match=rf"{name} holds 2 images, an animation or pages: save one of them"):
        read_image(file)
    EIGHT.convert("RGB").save(file, save_all=True)
    read_image(file)


def test_the_photograph_of_a_camera_with_a_preview_behind_it(tmp_path):
    EIGHT.save(tmp_path / "x.jpg", "MPO", quality=95, save_all=True, append_images=[Image.new("L", (16, 16))])
    assert Image.open(tmp_path / "x.jpg").n_frames == 2
    assert abs(gray_of(read_image(tmp_path / "x.jpg")) - GRAY).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_usual_images_have_the_bits_of_pillow(tmp_path, mode, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    file = tmp_path / "x"
    Image.fromarray(pixels).convert(mode).save(file, kind)
    picture = read_picture(file)
    with Image.open(file) as image:
        assert picture.image.tobytes() == image.convert("RGB").tobytes() and picture.conversion == ""
    assert picture.image.resize((5, 5)).tobytes()  # also after its file has been closed


def test_verify_counts_what_was_converted(pictures, tmp_path, capsys):
    for domain in ("a", "b"):
        for label in ("red", "blue"):
            (tmp_path / domain / label).mkdir(parents=True)
            EIGHT.save(tmp_path / domain / label / "0.png")
            half_clear("RGBA").save(tmp_path / domain / label / "1.png")
    assert main(["data", "verify", "--data-dir", str(tmp_path)]) == 0
    assert "images: 4 images (RGBA" not in (out := capsys.readouterr().out)
    assert "8 of 8 images can be decoded" in out
    assert out.count("converted") == 1
    assert "converted to RGB of 8 bits: 4 images (RGBA, transparency onto white)" in out


@pytest.fixture
def pillow_without(monkeypatch):
    """A function that takes a feature from Pillow."""

    def take(feature):
        check = formats.features.check
        monkeypatch.setattr(formats.features, "check", lambda name: name != feature and check(name))
        formats.extensions.cache_clear()

    yield take
    monkeypatch.undo()
    formats.extensions.cache_clear()


def test_extensions_are_those_that_pillow_can_open(pillow_without):
    usual = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif"}
    assert usual <= formats.extensions() <= formats.PICTURES.keys()
    pillow_without("avif")
    assert ".avif" not in formats.extensions() and ".png" in formats.extensions()
    assert formats.way_to_open("x.AVIF") == "install Pillow 11.3 or newer, built with AVIF"
    assert formats.way_to_open("x.png") is None and formats.way_to_open("x.txt") is None


@pytest.mark.parametrize(
    ("feature", "name", "way"), [("avif", "x.avif", "install Pillow 11.3"), ("", "x.heic", "pip install pillow-heif")]
)
def test_a_picture_that_needs_a_plug_in_names_it(tmp_path, pillow_without, monkeypatch, feature, name, way):
    monkeypatch.setattr(formats, "register_plugins", lambda: None)
    known = {end: kind for end, kind in Image.registered_extensions().items() if end != ".heic"}
    monkeypatch.setattr(formats.Image, "registered_extensions", lambda: known)
    pillow_without(feature)
    for domain in ("a", "b"):
        for label in ("red", "blue"):
            (tmp_path / "set" / domain / label).mkdir(parents=True)
            EIGHT.save(tmp_path / "set" / domain / label / "0.png")
    file = tmp_path / "set" / "a" / "red" / name
    file.write_bytes(b"\0\0\0 ftyp")
    with pytest.raises(UserError, match=rf"images that this Pillow cannot open, {way}.*, or convert them: .*{name}$"):
        load_dataset("folder", str(tmp_path / "set"), SMALL)
    with pytest.raises(UserError, match=rf"cannot read the image .*{name} .*: {way}"):
        read_image(file)


def test_an_installed_plug_in_of_pillow_is_used(monkeypatch):
    called = []
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        formats.importlib, "import_module",
        lambda name: type("plug-in", (), {"register_heif_opener": staticmethod(lambda: called.append(name))}),
    )  # fmt: skip
    formats.register_plugins()
    assert called == ["pillow_heif"]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it has made of them
def test_damaged_files_of_every_format_are_named(tmp_path):
    """Whatever Pillow raises for them."""
    random = np.random.default_rng(0)
    for name in ("x.png", "x.jpg", "x.gif", "x.tif", "x.webp", "x.bmp", "x.pgm", "x.jp2", "x.avif", "x.tga"):
        out = io.BytesIO()
        mode, kind = "RGB" if name in ("x.webp", "x.avif") else "L", Image.registered_extensions()[name[1:]]
        EIGHT.convert(mode).save(out, kind)
        for _ in range(30):
            content = bytearray(out.getvalue())
            for position in random.integers(0, len(content), 4):
                content[position] = random.integers(256)
            file = tmp_path / name
            file.write_bytes(content[: random.integers(1, len(content) + 1)])
            try:
                assert read_image(file).mode == "RGB"
            except UserError as error:
                assert name in str(error)
