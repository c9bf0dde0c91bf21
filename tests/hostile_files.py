"""Packed files as somebody might write them who means no good: mutations of real ones, with right checksums."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from qkernels.packed.file import CONFIG, MODEL, config_sha256
from qkernels.packed.functions import FUNCTIONS, METHODS


def sign(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json with the checksums that it should have."""
    config["checksums"] = {
        MODEL: hashlib.sha256((folder / MODEL).read_bytes()).hexdigest(),
        CONFIG: config_sha256(config),
    }
    (folder / CONFIG).write_text(json.dumps(config))


def with_right_checksums(folder, change_config=None, change_tensors=None):
    """Somebody changes a file and its checksums."""
    config = json.loads((folder / CONFIG).read_text())
    if change_tensors is not None:
        tensors = safetensors.torch.load_file(folder / MODEL)
        change_tensors(tensors)
        safetensors.torch.save_file(tensors, folder / MODEL)
    if change_config is not None:
        change_config(config)
    sign(folder, config)


def code(marker: Path) -> str:
    """What would make a file of Python's if it were pasted into a source as the name of an argument or of a layer."""
    return f"x=0)\ropen({str(marker)!r},'w')\rdef other(self, x):\r    f(a"


# Mutations at random ---------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def values(marker: Path) -> list[Any]:
    """What may stand where something else is expected."""
    numbers = [-1, 0, 1, 2, 3, 7, 8, 255, 2**20, 2**20 + 1, 2**31, 2**32, 2**62, -(2**63), 10**30, 0.5, 1e308, -1e-9]
    texts = ["", "forward", "class", "x", "__class__", "conv1", "output", "relu", code(marker), "a" * 10_000, "\0", "é"]
    others = [None, True, False, float("nan"), float("inf"), [], {}, [[]], nested(210), [1] * 1000]
    refs = [
        {"node": "x"},
        {"node": "later"},
        {"tuple": [1]},
        {"slice": [None, None, 0]},
        {"slice": []},
        {"ellipsis": 1},
    ]
    return [*numbers, *texts, *others, *refs]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in inside for place in places(part, (*path, key))]


def owner(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        config = config[key]
    return config


def mutate_config(config: dict[str, Any], rng: np.random.Generator, marker: Path) -> None:
    """One change, in place."""
    found = [path for path in places(config) if path[0] != "checksums"]

    def one() -> tuple[Any, ...]:
        return found[rng.integers(len(found))]

    path = one()
    holder, key = owner(config, path), path[-1]
    kind = rng.integers(6)
    pool = values(marker)
    if kind <= 1:
        holder[key] = pool[rng.integers(len(pool))]
    elif kind == 2:
        other = one()
        holder[key] = copy.deepcopy(owner(config, other)[other[-1]])
    elif kind == 3:
        del holder[key]
    elif kind == 4 and isinstance(holder, dict):
        names = [value for value in pool if isinstance(value, str)]
        holder[names[rng.integers(len(names))]] = holder.pop(key)
    else:
        mutate_node(config, rng)


def mutate_node(config: dict[str, Any], rng: np.random.Generator) -> None:
    """Another call, or nodes in another order, or one twice."""
    program = config.get("program")
    nodes = program.get("nodes") if isinstance(program, dict) else None
    if not isinstance(nodes, list) or len(nodes) < 3 or not all(isinstance(node, dict) for node in nodes):
        return
    i, j = rng.integers(1, len(nodes) - 1, 2)
    kind = rng.integers(3)
    if kind == 0:
        nodes[i], nodes[j] = nodes[j], nodes[i]
    elif kind == 1:
        nodes.insert(i, {**nodes[j], "name": "again"})
    else:
        names = sorted(FUNCTIONS) if rng.integers(2) else sorted(METHODS)
        op = "function" if names[0] in FUNCTIONS and names == sorted(FUNCTIONS) else "method"
        node = {key: value for key, value in nodes[i].items() if key not in ("layer", "function", "method")}
        nodes[i] = {**node, "op": op, op: names[rng.integers(len(names))]}


def mutate_tensors(tensors: dict[str, torch.Tensor], rng: np.random.Generator) -> None:
    """One change, in place."""
    names = sorted(tensors)
    name, other = (names[i] for i in rng.integers(len(names), size=2))
    t = tensors[name]
    kind = rng.integers(7)
    if kind == 0:
        tensors[name] = tensors[other].clone()
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[f"{name}x"] = t.clone()
    elif kind == 3:
        dtypes = (torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
        tensors[name] = t.to(dtypes[rng.integers(len(dtypes))])
    elif kind == 4:
        tensors[name] = t.flatten()[: rng.integers(t.numel() + 1)].clone()
    elif kind == 5:
        tensors[name] = torch.full_like(t, (0, 1, -1, 127)[rng.integers(4)] if t.dtype != torch.uint8 else 255)
    elif t.is_floating_point():
        tensors[name] = torch.full_like(t, (torch.nan, torch.inf, -torch.inf, 1e30, 1e-40)[rng.integers(5)])


def mutate_bytes(path: Path, rng: np.random.Generator) -> None:
    """A few bytes of the header or of the tensors, or the length."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(8 + header if rng.integers(4) else len(content)))
        content[at] = (content[at] ^ (1 << rng.integers(8))) if rng.integers(2) else int(rng.integers(32, 127))
    if not rng.integers(4):
        del content[int(rng.integers(len(content))) :]
    path.write_bytes(content)


def mutate(folder: Path, seed: int, marker: Path) -> str:
    """Change the ensemble in a folder, and its checksums; returns what was changed."""
    rng = np.random.default_rng(seed)
    config = json.loads((folder / CONFIG).read_text())
    what = ("config", "config", "config", "tensors", "bytes")[rng.integers(5)]
    if what == "config":
        before = copy.deepcopy(config)
        for _ in range(rng.integers(1, 4)):
            mutate_config(config, rng, marker)
        told = ("info", "report")  # what no answer depends on
        if {k: v for k, v in before.items() if k not in told} == {k: v for k, v in config.items() if k not in told}:
            what = "told"
    elif what == "tensors":
        tensors = safetensors.torch.load_file(folder / MODEL)
        mutate_tensors(tensors, rng)
        safetensors.torch.save_file(tensors, folder / MODEL)
    else:
        mutate_bytes(folder / MODEL, rng)
    sign(folder, config)
    return what
