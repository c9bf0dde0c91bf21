"""Files from those who mean no good: nothing in them becomes code, takes the machine's memory, or changes under us."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkernels as qk
from hostile_files import code, mutate, nested, sign, with_right_checksums
from packed_files import InTurn
from qkernels.packed.file import CONFIG, MODEL, PackedFileError
from qkernels.packed.memory import MemoryLimit

FILES = Path(__file__).parent / "files_v1"
IMAGES = {name: load_file(FILES / name / "expected.safetensors")["images"] for name in ("resnet", "vit", "in_turn")}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FILES / "resnet", tmp_path / "packed")


def first_node(config, op):
    return next(node for node in config["program"]["nodes"] if node["op"] == op)


def rename_layer(config, old, new):
    layers = config["program"]["layers"]
    layers[new] = layers.pop(old)
    for node in config["program"]["nodes"]:
        if node.get("layer") == old:
            node["layer"] = new


def rename_tensors(folder, old, new):
    tensors = load_file(folder / MODEL)
    for name in [name for name in tensors if name.startswith(f"{old}.")]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)
    save_file(tensors, folder / MODEL)


# Code ------------------------------------------------------------------------------------------------------------


def rename_first_layer(config, name, folder):
    old = next(iter(config["program"]["layers"]))
    rename_layer(config, old, name)
    rename_tensors(folder, old, name)


PLACES_FOR_CODE = {
    "argument": lambda config, text, folder: first_node(config, "layer")["kwargs"].update({text: 1}),
    "layer": lambda config, text, folder: rename_first_layer(config, text, folder),
    "node": lambda config, text, folder: first_node(config, "layer").update(name=text),
    "input": lambda config, text, folder: first_node(config, "input").update(name=text),
    "method": lambda config, text, folder: first_node(config, "layer").update(op="method", method=text),
    "key": lambda config, text, folder: config["program"].update({text: 1}),
    "type": lambda config, text, folder: next(iter(config["program"]["layers"].values())).update(type=text),
}


@pytest.mark.parametrize("place", PLACES_FOR_CODE)
def test_no_text_of_a_file_becomes_code(folder, tmp_path, place):
    marker = tmp_path / "marker"
    with_right_checksums(folder, lambda config: PLACES_FOR_CODE[place](config, code(marker), folder))
    with pytest.raises(PackedFileError):
        qk.PackedEnsemble.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["forward", "half", "_steps", "steps", "class", "0", "block.forward.1"])
def test_a_layer_may_have_any_name_made_of_letters(folder, name):
    """Whatever the name means to Python, or to the module that holds the layer."""
    expected = qk.PackedEnsemble.load(folder).member_logits(IMAGES["resnet"])
    with_right_checksums(folder, lambda config: rename_first_layer(config, name, folder))
    loaded = qk.PackedEnsemble.load(folder)
    assert torch.equal(loaded.member_logits(IMAGES["resnet"]), expected)
    loaded.save(folder.parent / "again")
    again = qk.PackedEnsemble.load(folder.parent / "again")
    assert torch.equal(again.member_logits(IMAGES["resnet"]), expected)


def test_an_input_may_have_any_name(folder):
    def rename(config):
        text = json.dumps(config["program"]).replace('{"node": "x"}', '{"node": "class"}')
        config["program"] = json.loads(text)
        first_node(config, "input")["name"] = "class"

    expected = qk.PackedEnsemble.load(folder).member_logits(IMAGES["resnet"])
    with_right_checksums(folder, rename)
    assert torch.equal(qk.PackedEnsemble.load(folder).member_logits(IMAGES["resnet"]), expected)


# One kind of error -----------------------------------------------------------------------------------------------


def hardtanh(config):
    config["program"]["layers"]["tanh"] = {"type": "Hardtanh", "min_val": 2, "max_val": 1}


REFUSED = {
    "a list 210 deep": lambda c: first_node(c, "layer").update(args=nested(210)),
    "info 2,000 deep": lambda c: c.update(info={"x": nested(900)}, members=nested(900)),
    "no arguments": lambda c: first_node(c, "layer").update(args=[]),
    "Hardtanh of 2 to 1": hardtanh,
    "program is a number": lambda c: c.update(program=7),
    "no nodes": lambda c: c["program"].update(nodes=[]),
    "one node": lambda c: c["program"].update(nodes=c["program"]["nodes"][:1]),
    "a node is a list": lambda c: c["program"]["nodes"].insert(1, []),
    "a layer in a layer": lambda c: rename_layer(c, *list(c["program"]["layers"])[:1], "fc.a.b"),
    "a layer that hides the module's own": lambda c: rename_layer(c, *list(c["program"]["layers"])[:1], "training"),
    "two inputs": lambda c: c["program"]["nodes"].insert(1, {"name": "y", "op": "input"}),
    "an output of three": lambda c: c["program"]["nodes"][-1].update(args=[1, 2, 3]),
    "checksums are a list": lambda c: c.update(members=[]),
    "a key of its own": lambda c: c.update(surprise=1),
    "a setting of its own": lambda c: next(iter(c["program"]["layers"].values())).update(surprise=1),
    "a setting of another type": lambda c: next(iter(c["program"]["layers"].values())).update(tf_same=1),
    "a name of 1,000 letters": lambda c: first_node(c, "layer").update(name="a" * 1000),
    "a report of numbers": lambda c: c["report"].update(packed=[1]),
    "an unhashable type": lambda c: next(iter(c["program"]["layers"].values())).update(type=[]),
    "an unhashable function": lambda c: first_node(c, "layer").update(op="function", function=[]),
    "bytes of others": lambda c: c.update(nbytes=1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_a_packed_file_error(folder, what):
    config = json.loads((folder / CONFIG).read_text())
    REFUSED[what](config)
    sign(folder, config)
    with pytest.raises(PackedFileError) as error:
        qk.PackedEnsemble.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("seed", range(24))
def test_mutated_files(tmp_path, seed):
    """A few of the campaign's: see tests/campaigns/test_files.py."""
    name = ("resnet", "vit", "in_turn")[seed % 3]
    folder = shutil.copytree(FILES / name, tmp_path / "packed")
    before = qk.PackedEnsemble.load(folder, InTurn() if name == "in_turn" else None).member_logits(IMAGES[name])
    what = mutate(folder, seed, tmp_path / "marker")
    try:
        loaded = qk.PackedEnsemble.load(folder, InTurn() if name == "in_turn" else None)
    except PackedFileError:
        pass
    else:
        if what == "told":
            assert torch.equal(loaded.member_logits(IMAGES[name]), before)
    assert not (tmp_path / "marker").exists()


# Memory ----------------------------------------------------------------------------------------------------------


def append_steps(config, *steps):
    """Further steps before the output, each of (op, target, args); `{last}` is the result before them."""
    nodes = config["program"]["nodes"]
    output = nodes.pop()
    nodes += [{"name": f"s{i}", "op": op, op: target, "args": args} for i, (op, target, args) in enumerate(steps)]
    nodes.append({**output, "args": [{"node": f"s{len(steps) - 1}"}]})


def of(name):
    return {"node": name}


def squarings(count):
    """Numbers, not tensors: each has twice the digits of the one before."""
    steps = [("method", "size", [of("x"), 2])]
    steps += [("function", "mul", [of(f"s{i}"), of(f"s{i}")]) for i in range(count)]
    return [*steps, ("function", "mul", [of("x"), of(f"s{count}")])]


def doublings(count):
    """Of a shape."""
    steps = [("function", "getattr", [of("x"), "shape"])]
    steps += [("function", "add", [of(f"s{i}"), of(f"s{i}")]) for i in range(count)]
    return [*steps, ("method", "reshape", [of("x"), of(f"s{count}")])]


def outer_products(count):
    steps = [("method", "flatten", [of("x")])]
    for i in range(0, 4 * count, 4):
        steps += [
            ("method", "unsqueeze", [of(f"s{i}"), 0]),
            ("method", "unsqueeze", [of(f"s{i}"), 1]),
            ("function", "mul", [of(f"s{i + 1}"), of(f"s{i + 2}")]),
            ("method", "flatten", [of(f"s{i + 3}")]),
        ]
    return steps


BOMBS = {
    "30 squarings": squarings(30),
    "30 doublings of a shape": doublings(30),
    "30 outer products": outer_products(30),
    "30 concatenations": [
        ("function", "cat", [[of(f"s{i - 1}" if i else "x"), of(f"s{i - 1}" if i else "x")]]) for i in range(30)
    ],
    "a padding": [("function", "pad", [of("x"), [2**20, 2**20, 2**20, 2**20]])],
    "an expansion": [
        ("method", "unsqueeze", [of("x"), 0]),
        ("method", "expand", [of("s0"), 2**20, -1, -1, -1, -1]),
        ("method", "contiguous", [of("s1")]),
    ],
    "parts": [
        ("method", "unsqueeze", [of("x"), 0]),
        ("method", "expand", [of("s0"), 2**20, -1, -1, -1, -1]),
        ("method", "unbind", [of("s1")]),
        ("function", "getitem", [of("s2"), 0]),
    ],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_forward_takes_no_more_than_the_limit(folder, bomb):
    with_right_checksums(folder, lambda config: append_steps(config, *BOMBS[bomb]))
    ensemble = qk.PackedEnsemble.load(folder)
    with pytest.raises(PackedFileError, match=r"memory in use|beyond|shape of more|would be cut"):
        ensemble(IMAGES["resnet"])


def test_max_bytes_raises_the_limit(folder):
    steps = [("function", "pad", [of("x"), [0, 2**14, 0, 2**11]]), ("method", "mean", [of("s0"), [2, 3]])]
    steps.append(("function", "cat", [[of("s1")] * 3]))
    with_right_checksums(folder, lambda config: append_steps(config, *steps))
    images = torch.ones(1, 3, 8, 8)
    with pytest.raises(PackedFileError, match="max_bytes"):
        qk.PackedEnsemble.load(folder)(images)
    ensemble = qk.PackedEnsemble.load(folder, max_bytes=2**31)
    assert ensemble.program(images).shape == (3, 1, 3)
    with pytest.raises(PackedFileError, match="more than max_bytes=1,000"):
        qk.PackedEnsemble.load(folder, max_bytes=1000)


def test_padding_that_no_kernel_reads(tmp_path):
    """A kernel of one pixel, every 2^20th of an image that is padded by as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    qk.quantize_(model, qk.QConfig(weight_bits=4, last_layer="same"))
    folder = qk.PackedEnsemble.from_models([model]).save(tmp_path / "packed")
    wide = {"stride": [2**20, 2**20], "padding": [2**20] * 4}
    with_right_checksums(folder, lambda config: config["program"]["layers"]["0"].update(wide))
    ensemble = qk.PackedEnsemble.load(folder)
    with pytest.raises(PackedFileError, match="memory in use"):
        ensemble(torch.randn(4, 64, 4, 4))


def test_many_members_are_refused_before_there_are_as_many_models(tmp_path):
    folder = shutil.copytree(FILES / "in_turn", tmp_path / "packed")

    def claim(config):
        layers = config["layers"]
        own = {name: layer for name, layer in layers.items() if name.startswith("members.0.")}
        config["members"] = 1024
        layers.update({name.replace(".0.", f".{i}.", 1): layer for i in range(1024) for name, layer in own.items()})

    with_right_checksums(folder, claim)

    class Copied(InTurn):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    with pytest.raises(PackedFileError, match="not those of all members"):
        qk.PackedEnsemble.load(folder, Copied())


def test_layers_of_another_shape_than_the_models_are_refused(tmp_path):
    folder = shutil.copytree(FILES / "in_turn", tmp_path / "packed")
    name = "members.0.stem"
    with_right_checksums(folder, lambda config: config["layers"][name].update(padding=[2**20] * 4))
    with pytest.raises(PackedFileError, match="is not what packing the model's"):
        qk.PackedEnsemble.load(folder, InTurn())


MEMORY_OF_A_REFUSAL = """
import re, sys, qkernels as qk
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
try:
    qk.PackedEnsemble.load(sys.argv[1])
except qk.PackedFileError as error:
    print(peak() - before)
"""


def long_info(config):
    config["info"]["x"] = [[]] * (45 << 20 >> 2)


def many_nodes(config):
    nodes = config["program"]["nodes"]
    config["program"]["nodes"] = [*nodes[:-1], *({**nodes[1], "name": f"n{i}"} for i in range(100_000)), nodes[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("what", [long_info, many_nodes])
def test_a_long_config_is_refused_with_little_memory(folder, what):
    with_right_checksums(folder, what)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_A_REFUSAL, str(folder)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 200 << 20


MEASURED = """
import sys, threading, torch
import qkernels as qk
ensemble, images = qk.PackedEnsemble.load(sys.argv[1]), torch.ones(64, 3, 64, 64)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
torch.set_num_threads(1)
ensemble(images[:1])
before, most, done = resident(), 0, threading.Event()
def watch():
    global most
    while not done.is_set():
        most = max(most, resident() - before)
thread = threading.Thread(target=watch)
thread.start()
ensemble.program(images)
done.set()
thread.join()
print(most)
"""


def least_limit(folder, images):
    """The least limit under which an ensemble answers."""
    low, high = 0, 1 << 32
    program = qk.PackedEnsemble.load(folder).program
    while high - low > 1 << 16:
        program.limit = MemoryLimit(2, 0, (low + high) // 2)
        try:
            program(images)
            high = (low + high) // 2
        except PackedFileError:
            low = (low + high) // 2
    return high


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit", "efficientnet_lite"])
def test_what_is_counted_is_what_is_taken(name):
    """A forward takes no more than what is reckoned before its steps, and that is not far from it."""
    size = IMAGES["vit"].shape[-1] if name == "vit" else 64
    reckoned = least_limit(FILES / name, torch.ones(64, 3, size, size))
    script = MEASURED.replace("64, 3, 64, 64", f"64, 3, {size}, {size}")
    result = subprocess.run([sys.executable, "-c", script, FILES / name], capture_output=True, text=True, check=True)
    taken = int(result.stdout)
    assert taken <= 1.2 * reckoned + (16 << 20)
    assert reckoned < MemoryLimit(2, 0).of(torch.ones(64, 3, size, size))


# The bytes are ours ----------------------------------------------------------------------------------------------


def test_a_loaded_ensemble_does_not_change_with_its_file(folder):
    ensemble = qk.PackedEnsemble.load(folder)
    before = ensemble.member_logits(IMAGES["resnet"])
    size = (folder / MODEL).stat().st_size
    with (folder / MODEL).open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(ensemble.member_logits(IMAGES["resnet"]), before)
    with (folder / MODEL).open("r+b") as file:
        file.truncate(0)
    assert torch.equal(ensemble.member_logits(IMAGES["resnet"]), before)


def test_tensors_that_do_not_lie_where_their_elements_may_are_copied(folder):
    """A header that is not a multiple of 8 bytes long."""
    expected = qk.PackedEnsemble.load(folder).member_logits(IMAGES["resnet"])
    content = (folder / MODEL).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    (folder / MODEL).write_bytes((length + 3).to_bytes(8, "little") + header + b"   " + tensors)
    with_right_checksums(folder)
    assert torch.equal(qk.PackedEnsemble.load(folder).member_logits(IMAGES["resnet"]), expected)


HEADERS = {
    "a hole": lambda h: h["fc.bias"].update(data_offsets=[n + 4 for n in h["fc.bias"]["data_offsets"]]),
    "an overlap": lambda h: h["fc.bias"].update(data_offsets=[0, h["fc.bias"]["data_offsets"][1]]),
    "a size that overflows": lambda h: h["fc.bias"].update(shape=[2**40, 2**40]),
    "a negative size": lambda h: h["fc.bias"].update(shape=[-1, -h["fc.bias"]["shape"][-1]]),
    "no shape": lambda h: h["fc.bias"].pop("shape"),
    "an unknown dtype": lambda h: h["fc.bias"].update(dtype="F8_E4M3"),
    "a list": lambda h: h.update({"fc.bias": []}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie(folder, what):
    content = (folder / MODEL).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name.endswith(".bias"))
    header["fc.bias"] = header.pop(name)
    HEADERS[what](header)
    text = json.dumps(header).encode()
    (folder / MODEL).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with_right_checksums(folder)
    with pytest.raises(PackedFileError):
        qk.PackedEnsemble.load(folder)


def test_the_seeds_of_a_mutation_tell_it(tmp_path):
    """The same seed changes a folder in the same way, so that a finding can be looked at."""
    texts = []
    for name in ("a", "b"):
        folder = shutil.copytree(FILES / "vit", tmp_path / name)
        mutate(folder, 12, tmp_path / "marker")
        texts.append(((folder / CONFIG).read_bytes(), (folder / MODEL).read_bytes()))
    assert texts[0] == texts[1]
