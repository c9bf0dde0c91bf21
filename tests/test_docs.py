"""Every example of README and docs runs: Python blocks as they are, qtdog commands with small numbers added."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtdog.cli import main
from qtdog.data.benchmarks import BENCHMARKS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run by .ci/run or other tests.
ELSEWHERE = ("make ", "pip install", "python -m benchmarks", "python -m domainbed", "python -m qkernels")
ELSEWHERE += ("unzip ", "torchrun ")
SMALL = "--steps 2 --checkpoint-freq 2 --batch-size 2 --eval-train-images 4 --device cpu"
READERS = ("train", "sweep", "ensemble", "eval", "features", "flatness", "landscape", "curvature")  # of images
MEASURE = {
    "flatness": "--radii 0 1 --directions 2 --max-images 2",
    "landscape": "--grid 3 --max-images 2",
    "curvature": "--vectors 2 --iterations 2 --max-images 1",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


PYTHON = [
    pytest.param(code, id=f"{page.stem}{i}")
    for page in PAGES
    if page.stem not in ("extending", "recipes")  # whose blocks run in tests/qtdog/test_plugins.py and tests/recipes
    for i, code in enumerate(blocks(page, "python"))
]


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_python_example_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for domain in ("photo", "sketch", "cartoon"):
        for label in ("dog", "house"):
            folder = tmp_path / "pictures" / domain / label
            folder.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [f"{p},{p.parent.name},{p.parts[-3]}" for p in sorted((tmp_path / "pictures").rglob("*.png"))]
    (tmp_path / "pictures.csv").write_text("\n".join(["path,label,domain", *rows]))


@pytest.fixture
def digits(tmp_path):
    """MNIST's files with 60 digits of noise, for commands that would use 5,000."""
    (tmp_path / "digits" / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (30, 28, 28)), ("labels-idx1", (30,))):
            values = np.random.default_rng(0).integers(0, 10, shape, dtype=np.uint8)
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            file = tmp_path / "digits" / "MNIST" / "raw" / f"{part}-{kind}-ubyte"
            file.write_bytes(header + values.tobytes())


@pytest.fixture
def pacs(tmp_path):
    """PACS by number and name: the same image 9,991 times."""
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    for domain, counts in BENCHMARKS["PACS"].class_images.items():
        for label, count in zip(BENCHMARKS["PACS"].classes, counts, strict=True):
            folder = tmp_path / "data" / "PACS" / domain / label
            folder.mkdir(parents=True)
            for index in range(count):
                os.link(tmp_path / "dot.png", folder / f"{index}.png")


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(c[0] == "qtdog" for c in commands(p))], ids=lambda p: p.stem)
def test_qtdog_commands_run(page, pictures, digits, tmp_path, monkeypatch, request):
    if page.stem == "results":  # on other pictures, with another network
        shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
        (tmp_path / "icon_styles").symlink_to(tmp_path / "pictures")
    if page.stem == "data":
        request.getfixturevalue("pacs")
    if page.stem == "extending":
        request.getfixturevalue("plugin")
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if command[0] != "qtdog":
            continue
        if command[1] in READERS:
            command += ["--num-workers", "0"]
        if command[1] == "train":
            command += shlex.split(SMALL + " --jobs 1" + (" --test-envs 0" if page.stem == "README" else ""))
            if "erm" not in command:
                command += ["--switch-step", "1"]
            if "folder" in command or "csv" in command:
                command += ["--image-size", "32"]
        if any("MNIST" in word for word in command[2:]) and command[1] in ("train", "sweep"):
            command += ["--data-dir", "digits"]
        if command[1] == "sweep":
            trials = 2 if page.stem == "metrics" else 1  # whose differences have an error
            command += shlex.split(SMALL + f" --n-trials {trials} --members 2 --test-envs 0 --jobs 1")
            if {"eoq", "lsq", "qtdog", "vrex+qtdog"} & set(command[2:]):
                command += ["--switch-step", "1"]
        if {"gaqat", "fqat"} & set(command):
            command += ["--steps", "3", "--disorder-window", "2"]
        if "swad" in command:
            command += ["--swad-converge", "1"]
        if {"eoa", "sma"} & set(command):
            command += ["--average-start", "1"]
        if {"tf_efficientnet_lite0", "docs/results/icon_styles.yaml", "docs/results/ablation.yaml"} & set(command):
            command += shlex.split("--backbone test_efficientnet --weights none --image-size 32 --test-envs 0")
        command += shlex.split(MEASURE.get(command[1], ""))
        monkeypatch.setattr(sys, "argv", command)
        assert main(command[1:]) in (0, None), command


def test_every_shell_command_is_run_somewhere():
    for page in PAGES:
        for command in commands(page):
            line = " ".join(command)
            assert command[0] == "qtdog" or line.startswith(ELSEWHERE), f"{page.name}: {line}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_results_page_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import results

    assert results.page() == (ROOT / "docs" / "results.md").read_text()
    (icon_styles,) = json.loads((ROOT / "docs" / "results" / "icon_styles.json").read_text())["tables"]
    text = (ROOT / "README.md").read_text()
    assert results.readme(text, icon_styles) == text


def test_the_table_of_reliability_is_that_of_the_committed_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import reliability

    text = (ROOT / "docs" / "reliability.md").read_text()
    assert reliability.page(text) == text and "| mutated packed files | 10,000 |" in text
