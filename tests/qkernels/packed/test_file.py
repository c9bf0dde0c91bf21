"""The packed file: what is written is read back, and what is damaged or hostile is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from hostile_files import with_right_checksums
from qkernels.packed import loading
from qkernels.packed.file import CARD, CONFIG, MODEL, PackedFileError
from qkernels.packed.kinds import LayerKind
from qkernels.packed.program_file import LAYERS


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.norm(F.relu6(self.conv2(x) + x))
        return self.head(x.mean((2, 3)))


class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def make(net=Net, bits=(7, 5, 7), integer=False):
    models = []
    for seed, b in enumerate(bits):
        torch.manual_seed(seed)
        model = net()
        qk.quantize_(model, qk.QConfig(weight_bits=b))
        models.append(model)
    ensemble = qk.PackedEnsemble.from_models(models, classes=["a", "b", "c", "d"])
    if integer:
        ensemble.to_integer_([IMAGES])
    return ensemble


@pytest.fixture(scope="module", params=[False, True], ids=["float", "integer"])
def saved(request, tmp_path_factory):
    """An ensemble and the folder that it was saved to, for tests that copy the folder."""
    ensemble = make(integer=request.param)
    return ensemble, ensemble.save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def saved_integer(tmp_path_factory):
    return make(integer=True).save(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("integer", [False, True])
def test_round_trip(tmp_path, integer):
    ensemble = make(integer=integer)
    folder = ensemble.save(tmp_path / "net", domains=["photo"], accuracy={"photo": 0.5})
    for path in (folder, folder / MODEL):
        loaded = qk.PackedEnsemble.load(path)
        assert torch.equal(loaded.member_logits(IMAGES), ensemble.member_logits(IMAGES))
    assert loaded.info == {"classes": ["a", "b", "c", "d"], "domains": ["photo"], "accuracy": {"photo": 0.5}}
    assert (loaded.members, loaded.nbytes, loaded.integer) == (3, ensemble.nbytes, integer)
    assert str(loaded.report) == str(ensemble.report)
    card = (folder / CARD).read_text()
    assert "classes | a, b, c, d" in card and "| photo | 50.0 |" in card
    names = safetensors.torch.load_file(folder / MODEL).keys()
    assert {"conv1.weight_packed", "conv1.weight_scale", "conv1.weight_shape", "head.weight"} <= names


def test_members_in_turn_need_the_model(tmp_path):
    ensemble = make(Branching)
    ensemble.save(tmp_path)
    with pytest.raises(PackedFileError, match="pass load"):
        qk.PackedEnsemble.load(tmp_path)
    loaded = qk.PackedEnsemble.load(tmp_path, Branching())
    assert torch.equal(loaded.member_logits(IMAGES), ensemble.member_logits(IMAGES))
    other = Branching()
    other.norm = nn.GroupNorm(2, 8, affine=False)
    with pytest.raises(PackedFileError, match="not part of the network"):
        qk.PackedEnsemble.load(tmp_path, other)


def kinds_of(kind):
    """The kinds of layers that derive from one, but for those that others derive from."""
    below = kind.__subclasses__()
    return {k for each in below for k in kinds_of(each)} if below else {kind}


def test_every_kind_of_layer_may_stand_in_a_file_and_is_documented():
    ours = {kind for kind in kinds_of(LayerKind) if kind.__module__.startswith("qkernels.")}
    assert set(LAYERS.values()) == ours
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    for name in LAYERS:
        assert f"| `{name}` |" in page, name


def test_saving_again_replaces(tmp_path):
    make().save(tmp_path)
    second = make(bits=(4, 4))
    second.save(tmp_path)
    assert torch.equal(qk.PackedEnsemble.load(tmp_path)(IMAGES), second(IMAGES))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CARD, CONFIG, MODEL]


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TypeError, match="plain types"):
        make().save(tmp_path, classes={1, 2})
    with pytest.raises(ValueError, match="say less in info"):
        make().save(tmp_path, classes=["a" * 1000] * 5000)

    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        make().save(tmp_path / "file")
    assert not (tmp_path / CONFIG).exists()


def test_what_the_format_does_not_know_runs_in_turn(tmp_path):
    class Airy(Net):
        def forward(self, x):
            return torch.special.airy_ai(super().forward(x))

    ensemble = make(Airy)
    assert "calls special_airy_ai, which the format does not know" in ensemble.report.in_turn
    loaded = qk.PackedEnsemble.load(ensemble.save(tmp_path), Airy())
    assert torch.equal(loaded.member_logits(IMAGES), ensemble.member_logits(IMAGES))


def test_no_file_at_all(tmp_path):
    with pytest.raises(PackedFileError, match=r"it has no config\.json"):
        qk.PackedEnsemble.load(tmp_path)


@pytest.mark.parametrize("seed", range(100))
def test_damaged_files_are_refused(saved, tmp_path, seed):
    """Bytes flipped, cut off, doubled or zeroed, anywhere in either file."""
    ensemble, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rng = np.random.default_rng(seed)
    path = tmp_path / (MODEL, CONFIG)[rng.integers(2)]
    content = bytearray(path.read_bytes())
    at = int(rng.integers(len(content)))
    kind = rng.integers(4)
    if kind == 0:
        content[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at:at] = content[at : at + 64]
    else:
        content[at : at + 16] = bytes(16)
    path.write_bytes(content)
    try:
        loaded = qk.PackedEnsemble.load(tmp_path)
    except PackedFileError as error:
        assert str(tmp_path) in str(error)
    else:
        # White space between the values of the JSON says nothing; zeros may have been zeros.
        assert torch.equal(loaded.member_logits(IMAGES), ensemble.member_logits(IMAGES))


def layer(config, name="conv1"):
    return config["program"]["layers"][name]


def node(config, op):
    return next(n for n in config["program"]["nodes"] if n["op"] == op)


HOSTILE_CONFIGS = {
    "each is 2..8": lambda c: layer(c)["bits"].__setitem__(0, 0),
    "9\\]; each is 2..8": lambda c: layer(c)["bits"].__setitem__(2, 9),
    "for 2 members": lambda c: c.update(members=2),
    "members=1000000": lambda c: c.update(members=1000000),
    "members=True": lambda c: c.update(members=True),
    "has shape .* expected": lambda c: layer(c).update(out_channels=2**19),
    "out_channels=1099511627776": lambda c: layer(c).update(out_channels=2**40),
    "in_channels=-3": lambda c: layer(c).update(in_channels=-3),
    "but the layer's weight has shape": lambda c: layer(c).update(kernel=[9, 1]),
    "do not divide": lambda c: layer(c, "conv2").update(groups=3),
    "is not a list of 2 numbers": lambda c: layer(c).update(stride=[1]),
    "padding=-1": lambda c: layer(c).update(padding=[0, 0, 0, -1]),
    "activation='exp' is none of": lambda c: layer(c).update(activation="exp"),
    "fits neither int8 nor uint8": lambda c: layer(c).update(input_range=[-1, 255]),
    "unknown type 'Embedding'": lambda c: layer(c).update(type="Embedding"),
    "unknown type None": lambda c: layer(c).pop("type"),
    "which is not there": lambda c: node(c, "layer").update(layer="conv9"),
    "'apply_', which is not on the list": lambda c: node(c, "method").update(method="apply_"),
    "function 'eval'": lambda c: node(c, "method").update(op="function", function="eval"),
    "takes as name 'shape' or 'device', not '__class__'": lambda c: node(c, "method").update(
        op="function", function="getattr", args=[{"node": "x"}, "__class__"]
    ),
    "used before it is made": lambda c: node(c, "layer").update(args=[{"node": "later"}]),
    "unknown kind of value": lambda c: node(c, "layer").update(args=[{"import": "os"}]),
    "takes as keepdim true or false, not 1125899906842624": lambda c: node(c, "method").update(
        kwargs={"keepdim": 2**50}
    ),
    "given dim twice": lambda c: node(c, "method").update(kwargs={"dim": 1}),
    "no name of its own": lambda c: node(c, "layer").update(name="x"),
    "no list of arguments": lambda c: node(c, "layer").update(args={"node": "x"}),
    "unknown op 'import'": lambda c: node(c, "layer").update(op="import"),
    "starts with its one input": lambda c: c["program"]["nodes"].reverse(),
    "nodes must be a list": lambda c: c["program"].update(nodes=7),
    "expected an object": lambda c: c["program"].update(layers=[]),
    "the output is not one value": lambda c: node(c, "output").update(args=[1]),
    "info and report": lambda c: c.update(info=[]),
    "version 3": lambda c: c.update(version=3),
    "is not of the format": lambda c: c.update(format="onnx"),
    "'surprise' is not a key": lambda c: c["report"].update(surprise=1),
    "has pool settings|kernel_size": lambda c: layer(c, "pool").pop("kernel_size"),
    "eps=-1": lambda c: layer(c, "norm").update(eps=-1),
}


@pytest.mark.parametrize("message", HOSTILE_CONFIGS)
def test_hostile_configs_are_refused(saved_integer, tmp_path, message):
    shutil.copytree(saved_integer, tmp_path, dirs_exist_ok=True)
    with_right_checksums(tmp_path, change_config=HOSTILE_CONFIGS[message])
    with pytest.raises(PackedFileError, match=message):
        qk.PackedEnsemble.load(tmp_path)


def test_a_file_does_not_decide_what_follows_from_its_tensors(saved_integer, tmp_path):
    """Whether the members' input scales are equal: files of earlier versions say so, and might say it wrongly."""
    shutil.copytree(saved_integer, tmp_path, dirs_exist_ok=True)
    scale = torch.tensor([0.03, 0.02, 0.01])
    with_right_checksums(
        tmp_path,
        change_config=lambda c: layer(c).update(one_input_scale=True),
        change_tensors=lambda tensors: tensors.update({"conv1.input_scale": scale}),
    )
    loaded = qk.PackedEnsemble.load(tmp_path)
    expected = qk.PackedEnsemble.load(saved_integer)
    expected.program.conv1.quantize_input_(scale, expected.program.conv1.input_range)
    assert torch.equal(loaded.member_logits(IMAGES), expected.member_logits(IMAGES))


def replace(name, change):
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous())


HOSTILE_TENSORS = {
    "weight_scale holds NaN": replace("conv1.weight_scale", lambda t: t.clone().fill_(torch.nan)),
    "bias holds NaN or infinity": replace("conv1.bias", lambda t: t.clone().fill_(torch.inf)),
    "weight_scale has shape": replace("conv1.weight_scale", lambda t: t[:, :5]),
    "weight_packed has shape": replace("conv1.weight_packed", lambda t: t[:-1]),
    "weight_packed has dtype": replace("conv1.weight_packed", lambda t: t.view(torch.int8)),
    "weight_scale has dtype": replace("conv1.weight_scale", lambda t: t.double()),
    "weight_shape is": replace("conv1.weight_shape", lambda t: t.flip(0)),
    "not positive": replace("conv1.input_scale", lambda t: -t),
    "is missing": lambda tensors: tensors.pop("head.weight"),
    "not part of the network": lambda tensors: tensors.update(extra=torch.zeros(1)),
    "takes none": lambda tensors: tensors.pop("conv1.input_scale"),
    "head has weight": replace("head.bias", lambda t: t[:, :2]),
    "norm has weight": replace("norm.bias", lambda t: t[:, :2]),
    "head.weight has dtype": replace("head.weight", lambda t: t.to(torch.int32)),
}


@pytest.mark.parametrize("message", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(saved_integer, tmp_path, message):
    shutil.copytree(saved_integer, tmp_path, dirs_exist_ok=True)
    with_right_checksums(tmp_path, change_tensors=HOSTILE_TENSORS[message])
    with pytest.raises(PackedFileError, match=message):
        qk.PackedEnsemble.load(tmp_path)


@pytest.mark.parametrize("header", [2**62, 2**31, 7])
def test_an_oversized_header_is_refused(tmp_path, header):
    make().save(tmp_path)
    content = bytearray((tmp_path / MODEL).read_bytes())
    content[:8] = header.to_bytes(8, "little")
    (tmp_path / MODEL).write_bytes(content)
    with_right_checksums(tmp_path)
    with pytest.raises(PackedFileError, match="damaged or no packed ensemble"):
        qk.PackedEnsemble.load(tmp_path)


def test_deep_and_large_configs_are_refused(tmp_path, monkeypatch):
    make().save(tmp_path)
    (tmp_path / CONFIG).write_text("[" * 100_000)
    with pytest.raises(PackedFileError):
        qk.PackedEnsemble.load(tmp_path)
    monkeypatch.setattr(loading, "LARGEST_CONFIG", 10)
    with pytest.raises(PackedFileError, match="larger than"):
        qk.PackedEnsemble.load(tmp_path)


PEAK_WHILE_LOADING = """
import re, sys, torch, qkernels as qk
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
qk.PackedEnsemble.load(sys.argv[1] + "/small")(torch.zeros(1, 4))
before = peak()
ensemble = qk.PackedEnsemble.load(sys.argv[1] + "/large")
print((peak() - before) / ensemble.nbytes)
"""


@pytest.mark.slow
def test_loading_takes_little_more_than_the_packed_size(tmp_path):
    for name, width in (("small", 4), ("large", 5000)):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 2))
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        qk.quantize_(model, qk.QConfig(weight_bits=8))
        qk.PackedEnsemble.from_models([model]).save(tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", PEAK_WHILE_LOADING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) <= 1.3


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_a_loaded_program_compiles_and_exports(saved, strict):
    """The compiler and torch.export see through the interpreter, for any number of images."""
    ensemble, folder = saved
    loaded = qk.PackedEnsemble.load(folder)
    expected = ensemble.member_logits(IMAGES)
    compiled = torch.compile(loaded.program, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IMAGES), expected)
    shapes = ({0: torch.export.Dim("images", min=1, max=64)},)
    exported = torch.export.export(loaded, (IMAGES,), dynamic_shapes=shapes, strict=strict).module()
    assert torch.equal(exported(IMAGES), ensemble(IMAGES))
    assert torch.equal(exported(torch.cat([IMAGES] * 3)), ensemble(torch.cat([IMAGES] * 3)))
