"""Programs of version 2 from those who mean no good: what their functions take is known before they run."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from hostile_files import with_right_checksums
from qkernels.packed.file import PackedFileError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 3)
        self.p = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("q", torch.randn(4, 1, 1))

    def forward(self, x):
        return self.head(self.up(F.max_pool2d(self.conv(x), 2) * self.p + self.q).mean((2, 3)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Net()
        model.q = torch.ones(4, 1, 1)
        qk.quantize_(model, qk.QConfig(weight_bits=4))
        models.append(model)
    ensemble = qk.PackedEnsemble.from_models(models)
    assert ensemble.report.in_turn is None
    return ensemble.save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "packed")


def of(name):
    return {"node": name}


def append_steps(config, *steps):
    nodes = config["program"]["nodes"]
    output = nodes.pop()
    last = output["args"][0]["node"]
    for i, (op, target, *args) in enumerate(steps):
        args = [of(last) if arg == "last" else arg for arg in args]
        nodes.append({"name": f"s{i}", "op": op, op: target, "args": args})
        last = f"s{i}"
    nodes.append({**output, "args": [of(last)]})


# Of the logits [N, 3] of each member, or the images; the first ones are small, whatever becomes of them.
BOMBS = {
    "doublings": [("function", "cat", [of("conv"), of("conv")], 0)]
    + [("function", "cat", [of(f"s{i}"), of(f"s{i}")], 0) for i in range(28)],
    "repeats": [("method", "repeat", "last", [2**15, 2**15])],
    "interleaved": [("method", "repeat_interleave", "last", 2**20), ("method", "repeat_interleave", "last", 2**10)],
    "new zeros": [("method", "new_zeros", "last", [2**18, 2**18])],
    "numbers": [
        ("method", "size", of("x"), 2),
        *[("function", "mul", "last", "last")] * 4,
        ("function", "arange", "last"),
    ],
    "upsampled": [("function", "interpolate", of("x"), None, 2**12)],
    "upsampled to": [("function", "interpolate", of("x"), [2**16, 2**16])],
    "padded": [("function", "pad", of("x"), [2**19, 2**19, 2**19, 2**19])],
    "outer product": [
        ("method", "flatten", of("x")),
        ("function", "einsum", "a,b->ab", of("s0"), of("s0")),
        ("method", "flatten", "last"),
        ("function", "einsum", "a,b->ab", of("s2"), of("s2")),
    ],
    "windows": [("function", "pad", of("x"), [600, 600, 600, 600]), ("function", "unfold", "last", 200)],
    "expanded": [
        ("method", "unsqueeze", "last", 0),
        ("method", "unsqueeze", "last", 0),
        ("method", "expand", "last", [2**12, 2**12, -1, -1]),
        ("method", "contiguous", "last"),
    ],
    "products of columns and rows": [
        ("method", "flatten", of("conv")),
        ("method", "unsqueeze", "last", 1),
        ("method", "transpose", "last", 0, 1),
        ("function", "matmul", of("s1"), of("s2")),
        ("method", "flatten", "last"),
        ("method", "unsqueeze", "last", 1),
        ("method", "transpose", "last", 0, 1),
        ("function", "matmul", of("s5"), of("s6")),
    ],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_forward_takes_no_more_than_the_limit(folder, bomb):
    with_right_checksums(folder, lambda config: append_steps(config, *BOMBS[bomb]))
    ensemble = qk.PackedEnsemble.load(folder)
    with pytest.raises(PackedFileError, match=r"memory in use|beyond|shape of more|would be cut"):
        ensemble(IMAGES)


def layer_of(config, kind):
    return next(layer for layer in config["program"]["layers"].values() if layer["type"] == kind)


REFUSED = {
    r"image=\[0\] is not the shape": lambda c: c["program"].update(image=[0]),
    "image='large' is not the shape": lambda c: c["program"].update(image="large"),
    "unknown type 'ReLU'": lambda c: c["program"]["layers"].update(conv={"type": "ReLU"}),
    "unknown type 'Repeat'|'members' is not a key": lambda c: c["program"]["layers"].update(
        conv={"type": "Repeat", "members": 3}
    ),
    "'shared' is not a key": lambda c: layer_of(c, "PackedConv2d").update(shared=True),
    "has no shape with that axis": lambda c: layer_of(c, "PackedWeight").update(axis=4),
    "weight_packed has shape": lambda c: layer_of(c, "PackedWeight").update(shape=[2**20, 2**20, 2**20]),
    "shape='x' is not a number": lambda c: layer_of(c, "PackedWeight").update(shape=[4, "x"]),
    "equation of letters": lambda c: append_steps(c, ("function", "einsum", "...,...->...", of("x"), of("x"))),
    "takes a tensor, not two numbers": lambda c: append_steps(c, ("function", "pow", 2, 2**20)),
    "not a dtype|unknown kind of value": lambda c: append_steps(c, ("method", "to", "last", {"dtype": "complex128"})),
    "takes nothing after": lambda c: append_steps(c, ("method", "exp", "last", 1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_program_cannot_be_is_refused(folder, message):
    with_right_checksums(folder, REFUSED[message])
    with pytest.raises(PackedFileError, match=message):
        qk.PackedEnsemble.load(folder)


def test_a_constant_may_be_infinite_and_a_factor_not(folder):
    with_right_checksums(folder, change_tensors=lambda tensors: tensors["constant_0.value"].fill_(torch.inf))
    qk.PackedEnsemble.load(folder)
    with_right_checksums(folder, change_tensors=lambda tensors: tensors["conv.weight_scale"].fill_(torch.inf))
    with pytest.raises(PackedFileError, match="weight_scale holds NaN or infinity"):
        qk.PackedEnsemble.load(folder)
