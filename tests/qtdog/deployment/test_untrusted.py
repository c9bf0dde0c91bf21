"""Files from others in `qtdog eval` and `predict`, and `qtdog sign` and `verify`: one line, exit code 2."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qkernels as qk
from hostile_files import code, with_right_checksums
from qtdog.cli import main

SAID = {
    "preprocessing": {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "image_shape": [3, 32, 32],
    "classes": ["a", "b", "c"],
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A network for pictures of 32 x 32."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )
    qk.quantize_(model, qk.QConfig(weight_bits=5))
    return qk.PackedEnsemble.from_models([model, model]).save(tmp_path_factory.mktemp("made") / "packed", **SAID)


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "packed")


def refused(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("qtdog: error: ") and captured.err.count("\n") == 1 and len(captured.err) < 600
    return captured.err


def test_a_good_file_answers(folder, picture, capsys):
    assert main(["predict", str(folder), picture, "--device", "cpu", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["classes"]) == {"a", "b", "c"}


def test_a_file_with_code_in_it(folder, picture, tmp_path, capsys):
    marker = tmp_path / "marker"
    with_right_checksums(folder, lambda c: c["program"]["nodes"][1]["kwargs"].update({code(marker): 1}))
    refused(["predict", str(folder), picture, "--device", "cpu"], capsys)
    refused(["eval", str(folder), "--device", "cpu"], capsys)
    assert not marker.exists()


INFO = {
    "an image of 65536 pixels": lambda i: i["preprocessing"].update(image_size=65536),
    "an image of text": lambda i: i["preprocessing"].update(image_size="32"),
    "no standard deviation": lambda i: i["preprocessing"].update(std=[0, 0, 0]),
    "a mean of NaN": lambda i: i["preprocessing"].update(mean=[float("nan")] * 3),
    "a background of four": lambda i: i["preprocessing"].update(background=[0, 0, 0, 0]),
    "a background that is no color": lambda i: i["preprocessing"].update(background=[0, 0, 256]),
    "a preprocessing with more": lambda i: i["preprocessing"].update(foreground=[0, 0, 0]),
    "a mean that is none": lambda i: i["preprocessing"].update(mean=None),
    "a preprocessing that is a list": lambda i: i.update(preprocessing=[]),
    "no preprocessing": lambda i: i.pop("preprocessing"),
    "no size": lambda i: i.update(preprocessing=None) or i.pop("image_shape"),
    "classes that are numbers": lambda i: i.update(classes=[1, 2, 3]),
    "one class": lambda i: i.update(classes=["a"]),
    "classes that are text": lambda i: i.update(classes="abc"),
    "another combination": lambda i: i.update(combine=["x"]),
    "sizes that do not go together": lambda i: i["preprocessing"].update(image_size=1),
}


@pytest.mark.parametrize("what", INFO)
def test_what_a_file_says_of_itself(folder, picture, capsys, what):
    with_right_checksums(folder, lambda config: INFO[what](config["info"]))
    refused(["predict", str(folder), picture, "--device", "cpu"], capsys)


def test_sign_verify_and_require(folder, picture, tmp_path, capsys):
    pytest.importorskip("cryptography")
    key, public = str(tmp_path / "me.pem"), str(tmp_path / "me.pem.pub")
    predict = ["predict", str(folder), picture, "--device", "cpu", "--require-signature", public]
    assert main(["sign", str(folder), "--key", key, "--new-key"]) == 0
    assert main(["verify", str(folder), "--key", public]) == 0
    assert main(predict) == 0
    assert "signed by the owner" in capsys.readouterr().out
    assert "is there already" in refused(["sign", str(folder), "--key", key, "--new-key"], capsys)
    with_right_checksums(folder, lambda config: config["info"].update(classes=["x", "y", "z"]))
    assert main(["predict", str(folder), picture, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert "not of this file" in refused(predict, capsys)
    assert "not of this file" in refused(["verify", str(folder), "--key", public], capsys)
    assert "is no private key" in refused(["sign", str(folder), "--key", public], capsys)
    assert "name the key" in refused(["sign", str(folder)], capsys)
    assert "no packed ensemble" in refused(["verify", str(tmp_path / "nowhere"), "--key", public], capsys)
    assert "no packed ensemble" in refused(["sign", str(tmp_path), "--key", key], capsys)
    assert not Path(tmp_path / "signature.json").exists()
