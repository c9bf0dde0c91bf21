"""`qtdog data prepare`: from any layout to the expected one, whole or not at all, and the source as it was."""

import os
import shutil
from pathlib import Path

import pytest

from layouts import CAPITALS, benchmark, pictures, vlcs, write
from qtdog.cli import main
from qtdog.data import image_files, prepare
from qtdog.data.benchmarks import BENCHMARKS


def run(dataset, data_dir, output, *more):
    return main(["data", "prepare", "--dataset", dataset, "--data-dir", str(data_dir), "--output", str(output), *more])


def snapshot(root: Path):
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size, p.is_symlink()) for p in root.rglob("*")}


def images(dataset, root):
    """Every image by domain and class, in order, with where it really lies."""
    found = image_files(dataset, str(root), lambda line: None)
    return {d: {c: [p.resolve() for p in paths] for c, paths in files.items()} for d, files in found.files.items()}


@pytest.mark.parametrize(
    ("dataset", "write_source"),
    [
        ("folder", lambda root: write(pictures(root / "a" / "set"), "../__MACOSX/x", "list.txt")),
        ("folder", lambda root: pictures(root / "set", between="train/")),
        ("PACS", lambda root: benchmark(root / "PACS" / "PACS", "PACS", str.upper)),
        ("VLCS", lambda root: vlcs(root / "VLCS", CAPITALS, {"train": 11, "crossval": 2, "test": 3, "full": 16})),
        ("OfficeHome", lambda root: benchmark(root / "OfficeHomeDataset_10072016", "OfficeHome")),
        ("TerraIncognita", lambda root: benchmark(root / "x", "TerraIncognita", lambda d: f"L{d[9:]}")),
    ],
    ids=["wrapped", "parts", "PACS", "VLCS", "OfficeHome", "TerraIncognita"],
)
def test_links_to_any_layout(tmp_path, capsys, dataset, write_source):
    source = tmp_path / "source"
    write_source(source)
    before = snapshot(source)
    output = tmp_path / "data" / "out"
    assert run(dataset, source, output) == 0
    assert snapshot(source) == before and not list(tmp_path.glob("data/*.partial"))
    given = images(dataset, source)
    assert images(dataset, output) == given  # in the same order, so that the splits are the same
    names = BENCHMARKS[dataset].images if dataset in BENCHMARKS else {"photo", "sketch"}
    assert {entry.name for entry in output.iterdir()} == {*names, ".prepared.json"}
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".prepared.json"]
    assert all(path.is_symlink() and len(path.relative_to(output).parts) == 3 for path in files)
    out = capsys.readouterr().out
    number = sum(len(paths) for by_class in given.values() for paths in by_class.values())
    assert f"linked {number:,} images to {output}" in out
    assert f"use it with: --dataset {dataset} --data-dir {output}" in out
    if dataset in BENCHMARKS:
        first, expected = next(iter(BENCHMARKS[dataset].images.items()))
        assert f"domain 0 {first}: " in out and f", expected {expected:,}" in out


def test_counts_as_expected_say_so(tmp_path, capsys, monkeypatch):
    benchmark(tmp_path / "PACS", "PACS")
    monkeypatch.setitem(BENCHMARKS["PACS"].images, "photo", 7)
    assert run("PACS", tmp_path, tmp_path / "out") == 0
    assert "domain 2 photo: 7 images of 7 classes, as expected" in capsys.readouterr().out


def test_copies_are_files_of_their_own(tmp_path, capsys):
    source, output = pictures(tmp_path / "source"), tmp_path / "out"
    assert run("folder", source, output, "--copy") == 0
    assert "copied 8 images" in capsys.readouterr().out
    shutil.rmtree(source)
    copies = [path for path in output.rglob("*.jpg")]
    assert len(copies) == 8 and all(path.is_file() and not path.is_symlink() for path in copies)


def manifest(root: Path, *rows: str) -> Path:
    (root / "list.csv").write_text("\n".join(["path,label,domain,split", *rows]))
    return root / "list.csv"


def test_a_list_becomes_folders(tmp_path, capsys):
    """Names that collide, or would change the order of images, are numbered."""
    write(tmp_path, "x/1.jpg", "y/1.jpg", "y/2.jpg", "y/3.jpg", "z/1.jpg", "z/2.jpg", "z/9.jpg", "z/3.jpg")
    one = ["x/1.jpg,cat,one,in", "y/1.jpg,cat,one,out", "y/2.jpg,dog,one,in", "y/3.jpg,dog,one,in"]
    two = ["z/1.jpg,cat,two,in", "z/2.jpg,cat,two,out", "z/9.jpg,dog,two,in", "z/3.jpg,dog,two,in"]
    file = manifest(tmp_path, *one, *two)
    assert run("csv", file, tmp_path / "out") == 0
    assert images("folder", tmp_path / "out") == images("csv", file)
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.jpg"))
    assert names == ["one/cat/0_1.jpg", "one/cat/1_1.jpg", "one/dog/2.jpg", "one/dog/3.jpg",
                     "two/cat/1.jpg", "two/cat/2.jpg", "two/dog/0_9.jpg", "two/dog/1_3.jpg"]  # fmt: skip
    out = capsys.readouterr().out
    assert "the column `split` is not carried over" in out and "use it with: --dataset folder" in out


def test_again_it_is_there_and_nothing_is_done(tmp_path, capsys):
    source, output = pictures(tmp_path / "source"), tmp_path / "out"
    assert run("folder", source, output) == 0
    before = snapshot(output)
    assert run("folder", source, output) == 0
    assert f"{output} is prepared already, nothing was done" in capsys.readouterr().out
    assert snapshot(output) == before
    (output / "photo" / "cat" / "1.jpg").unlink()
    assert run("folder", source, output) == 2
    assert "images that are gone or changed since, remove the folder" in capsys.readouterr().err
    for changed in (["--copy"], []):
        if not changed:
            write(source, "photo/cat/3.jpg")
        assert run("folder", source, output, *changed) == 2
        assert f"{output} was prepared from other images, or in another way (from {source})" in capsys.readouterr().err


@pytest.mark.parametrize("copy", [[], ["--copy"]])
def test_an_interrupted_command_goes_on(tmp_path, monkeypatch, copy):
    source, output = pictures(tmp_path / "source"), tmp_path / "out"
    done = []
    what = (prepare.shutil, "copy2") if copy else (prepare.Path, "symlink_to")
    original = getattr(*what)

    def interrupted(*arguments):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(*what, interrupted)
    assert run("folder", source, output, *copy) == 130
    assert not output.exists()  # nobody takes the half for the whole
    partial = tmp_path / "out.partial"
    assert len(list(partial.rglob("*.jpg"))) == 5
    (partial / "photo" / "cat" / ".2.jpg").write_bytes(b"half a copy")
    write(partial, "gone/cat/1.jpg")  # of an image that the source no longer has
    monkeypatch.setattr(*what, lambda *arguments: done.append(arguments) or original(*arguments))
    assert run("folder", source, output, *copy) == 0
    assert len(done) == 8 and not partial.exists()
    assert sorted(entry.name for entry in output.iterdir()) == [".prepared.json", "photo", "sketch"]
    assert sorted(os.listdir(output / "photo" / "cat")) == ["1.jpg", "2.jpg"]


def test_a_changed_image_is_copied_anew_when_a_command_goes_on(tmp_path):
    source, output = pictures(tmp_path / "source"), tmp_path / "out"
    partial = tmp_path / "out.partial"
    write(partial, ".prepared.json", "photo/cat/1.jpg")
    (partial / "photo" / "cat" / "1.jpg").write_bytes(b"half")
    assert run("folder", source, output, "--copy") == 0
    assert (output / "photo" / "cat" / "1.jpg").read_bytes() == (source / "photo" / "cat" / "1.jpg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--output must name the folder to make"),
        (["--output", "source/out"], "--output source/out lies in the data that it is made of"),
        (["--output", "source"], "--output source lies in the data that it is made of"),
        (["--output", "link/photo/out"], "lies in the data that it is made of"),
        (["--output", "full"], "full is not empty, and not made by qtdog data prepare: name another --output"),
        (["--output", "blocked"], "blocked.partial is in the way, and not made by qtdog data prepare"),
        (["--output", "file"], "--output file is a file: name a folder"),
        (["--output", "out", "--dataset", "RotatedMNIST"], "RotatedMNIST is read as it comes"),
        (["--output", "out", "--data-dir", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_prepared(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "source")
    write(tmp_path, "full/a.txt", "blocked.partial/a.txt", "file")
    (tmp_path / "link").symlink_to("source")
    before = snapshot(tmp_path)
    assert main(["data", "prepare", "--data-dir", "source", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and snapshot(tmp_path) == before


def test_names_that_cannot_be_folders_are_listed(tmp_path, capsys):
    write(tmp_path, "1.jpg", "2.jpg", "3.dat", ".4.jpg")
    file = manifest(tmp_path, "1.jpg,a/b,.one,in", "2.jpg,dog,.one,out", "3.dat,a/b,two,in", ".4.jpg,cat,two,out")
    assert run("csv", file, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "names that cannot be those of folders here, write others: .one, a/b" in err
    assert f"rename them: {tmp_path}/3.dat" in err
    assert f"{tmp_path}/.4.jpg" in err
    assert "classes that a domain lacks, which only a list may (--dataset csv): .one/cat, two/dog" in err
