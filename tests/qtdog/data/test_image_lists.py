"""What an image is does not depend on where it lies, and a run's images are found again by that."""

import os
import shutil
import sqlite3

import pytest
import torch

from qtdog.data import domain_names, fingerprints, load_dataset
from qtdog.data.image_lists import ImageList, difference
from qtdog.data.images import Preprocessing
from qtdog.data.loaders import Part
from qtdog.errors import UserError
from tiny import make_pictures

SHAPE = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qtdog" / "fingerprints.sqlite"


@pytest.fixture
def root(tmp_path):
    return make_pictures(tmp_path / "tints", count=5)


def read(root):
    return load_dataset("folder", str(root), SHAPE, lambda line: None)


def divided(dataset):
    halves = {}
    for env, domain in enumerate(dataset.domains):
        order = torch.randperm(len(domain.labels), generator=torch.Generator().manual_seed(env)).tolist()
        halves |= {f"env{env}_in": Part(domain, env, order[2:]), f"env{env}_out": Part(domain, env, order[:2])}
    return halves


def test_a_list_is_written_and_read(root, tmp_path):
    dataset = read(root)
    images = ImageList.of(dataset, divided(dataset))
    images.write(tmp_path)
    again = ImageList.read(tmp_path)
    assert again.images == images.images and again.division == images.division
    assert {(i.domain, i.label, i.name) for i in images.images} == {
        (path.parts[-3], path.parts[-2], path.name) for path in root.glob("*/*/*")
    }
    assert len({image.fingerprint for image in images.images}) == 30
    assert ImageList.read(root) is None
    (tmp_path / "images.csv").write_text("domain,label\na,b\n")
    with pytest.raises(UserError, match=r"images\.csv is damaged"):
        ImageList.read(tmp_path)


def test_images_are_found_wherever_they_lie_and_whatever_they_are_called(root, tmp_path):
    dataset = read(root)
    parts = divided(dataset)
    images = ImageList.of(dataset, parts)
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "tints")
    for index, path in enumerate(sorted(moved.glob("*/*/*"))):
        path.rename(path.with_name(f"{97 * index % 31:02}-{path.name}"))
    now = read(moved)
    found, new = images.parts_of(now)
    assert not new and found.keys() == parts.keys()
    for name, part in parts.items():
        assert torch.equal(
            found[name].domain.images(found[name].indices, False), part.domain.images(part.indices, False)
        )
    other = ImageList.of(now, divided(now))
    assert other.content == images.content and other.division != images.division
    assert ImageList.of(now, found).division == images.division and difference(images, other) == ""


@pytest.mark.parametrize(
    ("change", "told", "new"),
    [
        (lambda root: (root / "dark/red/0.png").unlink(), "1 gone (dark/red/0.png)", 0),
        (
            lambda root: shutil.copy(root / "dark/red/0.png", root / "dark/blue/0.png"),
            "1 changed (dark/blue/0.png)",
            0,
        ),
        (
            lambda root: (root / "dark/red/0.png").rename(root / "dark/blue/x.png"),
            "1 moved (dark/red/0.png as dark/blue/x.png)",
            0,
        ),
        (lambda root: (root / "dark/red/new.png").write_bytes((root / "dark/red/0.png").read_bytes() + b" "), None, 1),
    ],
)  # fmt: skip
def test_what_has_changed_is_told(root, change, told, new):
    dataset = read(root)
    images = ImageList.of(dataset, divided(dataset))
    change(root)
    now = read(root)
    if told is None:
        parts, found = images.parts_of(now)
        assert [str(image) for image in found] == ["dark/red/new.png"] and len(found) == new
        assert ImageList.of(now, parts).division == images.division
        assert difference(images, ImageList.of(now, divided(now))) == "1 new (dark/red/new.png)"
        return
    with pytest.raises(UserError) as error:
        images.parts_of(now)
    assert told in str(error.value)
    assert told in difference(images, ImageList.of(now, divided(now)))


def test_copies_of_training_images_are_told(root):
    shutil.copy(root / "dark/red/0.png", root / "bright/red/copy.png")
    dataset = read(root)
    parts = {
        f"env{env}_in": Part(domain, env, list(range(len(domain.labels)))) for env, domain in enumerate(dataset.domains)
    }
    images = ImageList.of(dataset, parts)
    (told,) = images.copies(["bright"], ["dark", "middle"])
    assert (
        told
        == "1 image(s) of the target bright are trained on as well, as copies or by the run before: bright/red/copy.png"
    )
    assert images.copies(["bright"], ["middle"]) == []


def test_known_files_are_not_read_again(root, cache, monkeypatch):
    paths = sorted(root.glob("*/*/*"))
    first = fingerprints.of_files(paths)
    monkeypatch.setattr(fingerprints, "fingerprint", lambda content: "read anew")
    assert fingerprints.of_files(paths) == first
    paths[3].write_bytes(paths[4].read_bytes() + b"longer")
    os.utime(paths[5], ns=(0, 1))
    assert fingerprints.of_files(paths) == [*first[:3], "read anew", first[4], "read anew", *first[6:]]
    with sqlite3.connect(cache) as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (30,)


@pytest.mark.parametrize("broken", ["damaged", "a folder", "no folder"])
def test_without_a_cache_every_file_is_read(root, cache, broken):
    paths = sorted(root.glob("*/*/*"))
    if broken == "no folder":
        cache.parent.parent.mkdir(exist_ok=True)
        cache.parent.write_bytes(b"")
    else:
        cache.parent.mkdir(parents=True)
        cache.mkdir() if broken == "a folder" else cache.write_bytes(b"no database" * 1000)
    assert fingerprints.of_files(paths) == [fingerprints.fingerprint(path.read_bytes()) for path in paths]


def test_digits_are_known_by_their_pixels(digits_dir):
    dataset = load_dataset("RotatedMNIST", str(digits_dir), None)
    assert [domain.name for domain in dataset.domains] == domain_names("RotatedMNIST", None)[1]
    for domain in dataset.domains:
        expected = [fingerprints.fingerprint(pixels.numpy().tobytes()) for pixels in domain.pixels]
        assert domain.fingerprints() == expected and len(domain.names()) == len(domain.labels)
