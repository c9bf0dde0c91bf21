"""Data sets as people have them: what is recognized, and what is told, all of it in one message."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from layouts import CAPITALS, benchmark, pictures, vlcs, write
from qtdog.data import Preprocessing, image_files, load_dataset
from qtdog.data.benchmarks import BENCHMARKS
from qtdog.errors import UserError

SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def shape(found):
    """Domain -> class -> names of files."""
    return {domain: {c: [p.name for p in paths] for c, paths in files.items()} for domain, files in found.files.items()}


def told(dataset: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        image_files(dataset, str(root), lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


USUAL = {domain: {label: ["1.jpg", "2.jpg"] for label in ("cat", "dog")} for domain in ("photo", "sketch")}


def test_what_systems_and_archives_leave_behind_is_skipped(tmp_path):
    root = pictures(tmp_path / "set")
    write(
        root, "__MACOSX/photo/._cat", "__MACOSX/._photo", ".DS_Store", "Thumbs.db", "desktop.ini", "photo/Desktop.ini"
    )
    write(root, ".ipynb_checkpoints/a.jpg", "photo/.ipynb_checkpoints/a.jpg", "photo/cat/.ipynb_checkpoints/1.jpg")
    write(root, "photo/cat/._1.jpg", "photo/cat/Thumbs.db", "photo/__MACOSX/a", "sketch/dog/@eaDir/1.jpg/x")
    assert shape(image_files("folder", str(root))) == USUAL


@pytest.mark.parametrize("place", ["set", "set/set", "archive/a/b/set"])
def test_folders_around_everything(tmp_path, place):
    pictures(tmp_path / "root" / place)
    write(tmp_path / "root", "__MACOSX/x", "archive.zip", "notes/read.txt")
    lines = []
    found = image_files("folder", str(tmp_path / "root"), lines.append)
    assert shape(found) == USUAL and found.name == "set"
    assert found.source == f"8 images under {tmp_path / 'root' / place}"


def test_folders_within_domains(tmp_path):
    root = pictures(tmp_path / "set", domains=["sketch"])
    pictures(root / "photo", domains=["photo"])  # photo/photo/<class>, as unpacked beside its archive
    write(root, "photo/__MACOSX/x")
    assert shape(image_files("folder", str(root))) == USUAL


def test_lists_beside_the_domains_are_left_alone_and_named(tmp_path):
    root = write(pictures(tmp_path / "set"), "labels.csv", "image_list/photo.txt", "image_list/sketch.txt", "all.zip")
    lines = []
    assert shape(image_files("folder", str(root), lines.append)) == USUAL
    assert lines[0] == "  left alone: all.zip, image_list, labels.csv"


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("train", "crossval", "test"), ("Train", "Test"), ("full",)]
)
def test_parts_between_domain_and_class(tmp_path, names):
    root = tmp_path / "set"
    for part in names:
        for domain in ("photo", "sketch"):
            write(root, f"{domain}/{part}/cat/{part}.jpg", f"{domain}/{part}/dog/{part}.jpg")
    expected = [f"{part}.jpg" for part in sorted(names)]
    assert shape(image_files("folder", str(root))) == {d: {"cat": expected, "dog": expected} for d in USUAL}


@pytest.mark.parametrize(
    ("parts", "number"),
    [
        ({"train": 3, "crossval": 1, "test": 2}, 6),
        ({"train": 3, "crossval": 1, "test": 2, "full": 6}, 6),  # the same once more
        ({"train": 3, "crossval": 1, "full": 6}, 6),
        ({"train": 3, "crossval": 1, "test": 2, "full": 4}, 6),  # without the test images
        ({"full": 6}, 6),
    ],
)
def test_vlcs_with_its_parts_and_numbers_for_classes(tmp_path, parts, number):
    vlcs(tmp_path / "VLCS" / "VLCS", CAPITALS, parts)
    found = image_files("VLCS", str(tmp_path))
    assert list(found.files) == ["Caltech101", "LabelMe", "SUN09", "VOC2007"]
    assert all(len(paths) == number for files in found.files.values() for paths in files.values())
    assert found.files["SUN09"]["chair"][0].relative_to(tmp_path / "VLCS" / "VLCS").parts[::2] == ("SUN", "2")


@pytest.mark.parametrize(
    ("name", "place", "beside"),
    [
        ("PACS", "PACS/PACS", ["PACS/__MACOSX/PACS/._x", "PACS.zip"]),
        ("PACS", "PACS/pacs_data/pacs_data", ["PACS/pacs_label/art_painting_test_kfold.txt"]),
        ("PACS", "kfold", ["kfold/splits/photo_train_kfold.txt", "kfold/files.txt"]),
        ("PACS", "downloads/data", []),  # by what is in it
        ("OfficeHome", "OfficeHomeDataset_10072016", ["OfficeHomeDataset_10072016/image_list/Art.txt"]),
        ("OfficeHome", "office_home/OfficeHomeDataset_10072016", ["office_home/image_list/Art.txt"]),
        ("TerraIncognita", "terra_incognita/terra_incognita", []),
    ],
)
def test_benchmarks_where_archives_put_them(tmp_path, name, place, beside):
    benchmark(tmp_path / place, name)
    write(tmp_path, *beside)
    write(tmp_path, "other/sketch/x/1.jpg")  # of DomainNet, which shares a name of a domain
    for root in (tmp_path, tmp_path / place.split("/")[0]):
        found = image_files(name, str(root))
        assert list(found.files) == list(BENCHMARKS[name].images)
        assert all(
            path.is_relative_to(tmp_path / place) for files in found.files.values() for (path,) in files.values()
        )


def test_a_data_set_that_shares_a_domain_is_not_the_benchmark(tmp_path):
    write(tmp_path, "other/sketch/dog/1.jpg", "other/real/dog/1.jpg")
    assert "no PACS under ROOT: expected PACS/ with the domains" in told("PACS", tmp_path)


def test_domains_of_a_benchmark_in_folders_of_their_own(tmp_path):
    """As of archives, one a domain, each unpacked beside itself."""
    benchmark(tmp_path / "PACS", "PACS", lambda domain: f"{domain}/{domain}")
    assert len(image_files("PACS", str(tmp_path)).files["photo"]["dog"]) == 1


def test_accents_in_one_piece_or_two_are_the_same(tmp_path):
    one, two = "Äpfel", unicodedata.normalize("NFD", "Äpfel")
    assert one != two
    root = write(tmp_path / "set", *(f"{domain}/Birnen/1.jpg" for domain in ("Fotos", "Gemälde")))
    write(root, f"Fotos/{one}/1.jpg")
    (root / "Gemälde").rename(root / unicodedata.normalize("NFD", "Gemälde"))
    write(root, f"{unicodedata.normalize('NFD', 'Gemälde')}/{two}/1.jpg")
    found = image_files("folder", str(root))
    assert found.classes == ["Birnen", "Äpfel"] and list(found.files) == ["Fotos", "Gemälde"]
    assert all(len(files["Äpfel"]) == 1 and files["Äpfel"][0].is_file() for files in found.files.values())
    write(root, f"Fotos/{two}/2.jpg")
    assert "folders that are the same class, put them together: " in told("folder", root)


def test_accents_in_a_manifest(tmp_path):
    two = unicodedata.normalize("NFD", "Äpfel")
    write(tmp_path, f"{two}.jpg", "a.jpg", "b.jpg")
    (tmp_path / "x.csv").write_text(f"path,label,domain\nÄpfel.jpg,Äpfel,one\na.jpg,{two},two\nb.jpg,Birnen,two\n")
    found = image_files("csv", str(tmp_path / "x.csv"))
    assert found.classes == ["Birnen", "Äpfel"]
    assert [path.name for path in found.files["one"]["Äpfel"]] == [f"{two}.jpg"]


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    root = pictures(tmp_path / "set", classes=("cat", "dog", "owl"))
    shutil.rmtree(root / "photo" / "owl")
    write(root, "poster.jpg", "photo/poster.png", "photo/list.txt", "photo/cat/notes.txt", "photo/cat/more/1.jpg")
    (root / "photo" / "cat" / "empty.jpg").touch()
    (root / "photo" / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "photo" / "mouse").symlink_to("nowhere")
    (root / "cartoon").symlink_to("nowhere")
    (root / "bare").mkdir()
    message = told("folder", root)
    assert message.startswith("the data set ROOT cannot be used; ")
    for kind in (
        "broken links, mend or remove them: ROOT/cartoon, ROOT/photo/mouse, ROOT/photo/cat/gone.jpg",
        "stray images in no class folder, sort them into <domain>/<class>/ or move them away: ROOT/poster.jpg, "
        "ROOT/photo/poster.png",
        "stray files, move them away: ROOT/photo/list.txt",
        "move them away: ROOT/photo/cat/notes.txt",
        "stray folders among images, move them away: ROOT/photo/cat/more",
        "images that are empty, replace or remove them: ROOT/photo/cat/empty.jpg",
        "domains that hold no images, fill them as <root>/<domain>/<class>/<image> or remove them: ROOT/bare",
        "a domain may lack some: owl in photo",
    ):
        assert kind in message


def test_ten_of_a_kind_are_named_and_the_others_counted(tmp_path):
    root = pictures(tmp_path / "set", classes=[f"c{i:02}" for i in range(15)])
    for i in range(13):
        shutil.rmtree(root / "photo" / f"c{i:02}")
        write(root, f"sketch/c14/{i:02}.txt")
    message = told("folder", root)
    assert "c09 in photo and 3 more" in message and "ROOT/sketch/c14/09.txt and 3 more" in message


def test_classes_that_differ_in_spelling_between_domains(tmp_path):
    root = pictures(tmp_path / "set", classes=("cat", "dog", "polar bear"))
    (root / "photo" / "dog").rename(root / "photo" / "Dog")
    (root / "photo" / "polar bear").rename(root / "photo" / "polar_bear")
    assert (
        "classes that domains spell in several ways, name them alike: "
        "Dog in photo, dog in sketch, polar bear in sketch, polar_bear in photo"
    ) in told("folder", root)
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(root.rglob("*.jpg"))]
    (tmp_path / "x.csv").write_text("\n".join(["path,label,domain", *rows]))
    assert "labels that domains spell in several ways, write them alike: Dog in photo, dog" in told(
        "csv", tmp_path / "x.csv"
    )
    letters = pictures(tmp_path / "letters", classes=("a", "A"))  # each domain has both
    assert image_files("folder", str(letters)).classes == ["A", "a"]


def test_one_class_is_nothing_to_learn(tmp_path):
    assert "at least 2 classes are needed (<root>/<domain>/<class>/<image>), there are 1: cat" in told(
        "folder", pictures(tmp_path / "set", classes=["cat"])
    )
    parts = pictures(tmp_path / "parts", between="train/", domains=["photo"])
    pictures(parts, between="test/", domains=["photo"])
    assert "there are 1: photo" in told("folder", parts)  # train and test are no domains
    one = pictures(tmp_path / "one", domains=["photo"])
    assert "at least 2 domain folders are needed (<root>/<domain>/<class>/<image>), there are 1: photo" in told(
        "folder", one
    )


def test_everything_that_is_wrong_with_a_benchmark_is_told_at_once(tmp_path):
    root = benchmark(tmp_path / "PACS", "PACS")
    for label in ("dog", "horse"):
        shutil.rmtree(root / "photo" / label)
    (root / "photo" / "Haus").mkdir()
    shutil.rmtree(root / "sketch")
    (root / "cartoon" / "dog" / "2.jpg").symlink_to("nowhere")
    write(root, "quickdraw/dog/1.jpg")
    message = told("PACS", tmp_path)
    assert message.startswith("PACS under ROOT/PACS cannot be used; ")
    domains = "PACS has 4 domains: art_painting, cartoon, photo, sketch"
    for kind in (
        f"stray folders, move them away ({domains}): ROOT/PACS/quickdraw",
        f"domains that are missing, bring them back ({domains}): sketch in ROOT/PACS",
        "stray folders, move them away (PACS has 7 classes: dog, elephant, giraffe, guitar, horse, house, person): "
        "ROOT/PACS/photo/Haus",
        "guitar, horse, house, person): dog, horse in photo",
        "broken links, mend or remove them: ROOT/PACS/cartoon/dog/2.jpg",
    ):
        assert kind in message


def test_everything_that_is_wrong_with_a_manifest_is_told_at_once(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    rows = ["a.jpg,cat,one,in", "b.jpg,dog,two,out", "gone.jpg,cat,one,in", "empty.jpg,cat,one,in", "a.jpg,dog,two,in",
            ",dog,,in", "c.jpg,dog,two,test", "link.jpg,dog,two,in"]  # fmt: skip
    (tmp_path / "x.csv").write_text("\n".join(["path,label,domain,split", *rows]))
    message = told("csv", tmp_path / "x.csv").replace(str(tmp_path), "HERE")
    for kind in (
        "lines that lack something, fill it in: line 7: no path and no domain",
        "lines whose split is not `in` or `out`, write one of these: line 8: `test`",
        "images that are not there, bring them back or leave them out: line 4: HERE/gone.jpg is missing, "
        "line 9: HERE/link.jpg leads nowhere",
        "images that are empty, replace them or leave them out: line 5: HERE/empty.jpg",
        "images listed twice, leave one of the lines out: line 6: HERE/a.jpg of line 2",
    ):
        assert kind in message


def test_pictures_of_other_formats_are_read_and_trained_on(tmp_path):
    for domain in ("photo", "sketch"):
        for label in ("cat", "dog"):
            (tmp_path / domain / label).mkdir(parents=True)
            for name in ("1.avif", "2.jp2", "3.jfif", "4.gif", "5.JPG"):
                kind = Image.registered_extensions()[Path(name).suffix.lower()]
                Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / domain / label / name, kind)
    domain = load_dataset("folder", str(tmp_path), SMALL).domains[0]
    assert domain.images(range(10), False).shape == (10, 3, 16, 16)
