"""The folder of a packed ensemble: model.safetensors, config.json and README.md. docs/format.md is its definition.

Reading trusts nothing: checksums catch damage, and whatever a file claims is held against what its tensors are before
memory is taken for it.
"""

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from ..atomic import replace_file
from .fusion import FusionReport
from .in_turn import MembersInTurn
from .kinds import Expected, LayerKind, ProgramError
from .packed_layer import PackedLayer
from .program import layer_json, program_json, read_layer, read_program

FORMAT = "qkernels.packed_ensemble"
VERSION = 1
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LARGEST_CONFIG = 64 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedFileError(ValueError):
    """A packed file that is truncated, corrupt or not what it claims to be."""


class Contents(NamedTuple):
    """What a folder holds: see `PackedEnsemble`."""

    program: nn.Module
    members: int
    report: FusionReport
    info: dict[str, Any]


def nbytes_of(program: nn.Module) -> int:
    """Bytes of all tensors."""
    return sum(t.nbytes for t in [*program.parameters(), *program.buffers()])


def works_on_integers(program: nn.Module) -> bool:
    """Whether layers take codes, or make them of their input."""
    return any(layer.input_scale is not None for layer in packed_layers(program).values())


# Writing ---------------------------------------------------------------------------------------------------------


def save(contents: Contents, folder: Path) -> Path:
    """See `PackedEnsemble.save`."""
    program, members, report, info = contents
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "members": members,
        "nbytes": nbytes_of(program),
        "info": info,
        "report": dataclasses.asdict(report),
    }
    if isinstance(program, fx.GraphModule):
        config["program"] = program_json(program)
    else:
        config["layers"] = {name: layer_json(layer, name) for name, layer in packed_layers(program).items()}
    tensors = {name: t.contiguous() for name, t in program.state_dict().items()}
    for name, layer in packed_layers(program).items():
        shape = layer.geometry.weight_shape(layer.out_channels, layer.in_channels)
        tensors[f"{name}.weight_shape"] = torch.tensor(shape)
    try:
        json.dumps(config)
    except TypeError as error:
        raise TypeError(f"PackedEnsemble.save: info must hold plain types only: {error}") from error
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"PackedEnsemble.save: {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "kind": FORMAT, "version": str(VERSION)}
    replace_file(folder / MODEL, lambda path: safetensors.torch.save_file(tensors, path, metadata))
    config["checksums"] = {MODEL: _sha256(folder / MODEL), CONFIG: _config_sha256(config)}
    replace_file(folder / CARD, lambda path: path.write_text(model_card(contents)))
    # Last, since its checksum of the model makes the folder whole.
    replace_file(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1)))
    return folder


def packed_layers(program: nn.Module) -> dict[str, PackedLayer]:
    """Name -> layer of all packed layers."""
    return {name: layer for name, layer in program.named_modules() if isinstance(layer, PackedLayer)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_sha256(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "checksums"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def model_card(contents: Contents) -> str:
    """README.md, with the front matter that model hubs read."""
    program, members, _, info = contents
    layers = packed_layers(program).values()
    bits = sorted({b for layer in layers for b in layer.bits})
    facts = {
        "members": members,
        "bits": ", ".join(map(str, bits)),
        "activations": "integer" if works_on_integers(program) else "float",
        "size": f"{nbytes_of(program):,} bytes",
        **{key: value for key, value in info.items() if isinstance(value, str | int | float)},
        **{key: ", ".join(map(str, value)) for key, value in info.items() if key in ("classes", "domains")},
    }
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    accuracies = info.get("accuracy")
    results = ""
    if isinstance(accuracies, dict):
        lines = "\n".join(f"| {name} | {100 * value:.1f} |" for name, value in accuracies.items())
        results = f"\n## Accuracy\n\n| images | % |\n|---|---|\n{lines}\n"
    return f"""---
library_name: qtdog
pipeline_tag: image-classification
tags: [quantization, ensemble, domain-generalization]
---
# Packed ensemble of {members} quantized networks

| | |
|---|---|
{rows}
{results}
## Use

```python
import qkernels as qk

ensemble = qk.PackedEnsemble.load("{MODEL}")
probabilities = ensemble(images).softmax(-1)  # images: float [N, channels, height, width]
```
"""


# Reading ---------------------------------------------------------------------------------------------------------


def load(path: Path, model: nn.Module | None) -> Contents:
    """See `PackedEnsemble.load`."""
    folder = path.parent if path.name == MODEL else path
    for name in (CONFIG, MODEL):
        if not (folder / name).is_file():
            raise PackedFileError(f"{folder} is no packed ensemble: it has no {name}")
    try:
        config = read_config(folder)
        members = config["members"]
        if config.get("program") is not None:
            program: nn.Module = read_program(config["program"], members)
        elif model is None:
            raise PackedFileError("its members run in turn: pass load(path, model) a float model of their architecture")
        else:
            program = MembersInTurn(_with_packed_layers(copy.deepcopy(model), config, i) for i in range(members))
        read_tensors(folder / MODEL, program, members)
        report = FusionReport(**config["report"])
    except PackedFileError as error:
        raise PackedFileError(f"{folder}: {error}") from error.__cause__
    except (ProgramError, safetensors.SafetensorError, OSError, KeyError, TypeError, RecursionError) as error:
        raise PackedFileError(f"{folder} is damaged or no packed ensemble: {error or type(error).__name__}") from error
    return Contents(program, members, report, config["info"])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, after its checksums and those of the model were held against the files."""
    if (folder / CONFIG).stat().st_size > LARGEST_CONFIG:
        raise PackedFileError(f"{CONFIG} is larger than {LARGEST_CONFIG >> 20} MiB")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise PackedFileError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PackedFileError(f"{CONFIG} is not of the format {FORMAT}")
    if config.get("version") != VERSION:
        raise PackedFileError(f"{CONFIG} is of version {config.get('version')!r}; this qkernels reads {VERSION}")
    if config["checksums"] != {MODEL: _sha256(folder / MODEL), CONFIG: _config_sha256(config)}:
        raise PackedFileError("the checksums do not match: a file was damaged or changed; copy or save it again")
    members = config["members"]
    if type(members) is not int or not 1 <= members <= 1024:
        raise PackedFileError(f"members={members!r} is not a number from 1 to 1024")
    if not isinstance(config["info"], dict) or not isinstance(config["report"], dict):
        raise PackedFileError("info and report must be objects")
    return config


def _with_packed_layers(model: nn.Module, config: dict[str, Any], member: int) -> nn.Module:
    """A float model with the packed layers of one member in place of its own, on the meta device."""
    prefix = f"members.{member}."
    for full_name, layer in config["layers"].items():
        if not full_name.startswith(prefix):
            continue
        name = full_name.removeprefix(prefix)
        owner, _, attribute = name.rpartition(".")
        with torch.device("meta"):
            setattr(model.get_submodule(owner), attribute, read_layer(layer, name, 1))
    return model.eval()


def read_tensors(path: Path, program: nn.Module, members: int) -> None:
    """Fill the tensors of a program from the file; each is checked before it is read."""
    layers = {name: layer for name, layer in program.named_modules() if isinstance(layer, LayerKind)}
    expected: dict[str, Expected] = {}
    if not isinstance(program, fx.GraphModule):  # float layers of the model that was given
        expected = {name: Expected(t.dtype, list(t.shape)) for name, t in program.state_dict().items()}
        members = 1
    for name, layer in layers.items():
        expected |= {f"{name}.{tensor}": what for tensor, what in layer.expected(members).items()}
    with safetensors.safe_open(path, framework="pt") as file:
        there = set(file.keys())
        required = {name for name, what in expected.items() if not what.optional}
        for name in sorted((required - there) | (there - expected.keys())):
            raise PackedFileError(
                f"the tensor {name} is {'missing' if name in required else 'not part of the network'}"
            )
        for name in sorted(there):
            dtype, shape, _ = expected[name]
            found = file.get_slice(name)
            if not _fits(found.get_shape(), shape):
                raise PackedFileError(f"{name} has shape {found.get_shape()}, expected {_readable(shape)}")
            t = file.get_tensor(name)
            if t.dtype != dtype if dtype is not None else t.dtype not in FLOATS:
                raise PackedFileError(f"{name} has dtype {t.dtype}, expected {dtype or 'a float'}")
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise PackedFileError(f"{name} holds NaN or infinity")
            _fill(program, name, t)
    for name, layer in layers.items():
        try:
            layer.check()
        except ProgramError as error:
            raise PackedFileError(f"{name} {error}") from error


def _fits(found: list[int], shape: list[Any]) -> bool:
    if shape and shape[-1] is ...:
        shape = shape[:-1] + [None] * (len(found) - len(shape) + 1)
    return len(found) == len(shape) and all(want in (None, n) for n, want in zip(found, shape, strict=True))


def _readable(shape: list[Any]) -> str:
    return "[" + ", ".join("..." if n is ... else "any" if n is None else str(n) for n in shape) + "]"


def _fill(program: nn.Module, name: str, t: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = program.get_submodule(owner_name)
    if isinstance(owner, LayerKind):
        try:
            owner.take(attribute, t)
        except ProgramError as error:
            raise PackedFileError(f"{name} {error}") from error
    elif attribute in owner._buffers:
        owner._buffers[attribute] = t
    else:
        owner._parameters[attribute] = nn.Parameter(t, requires_grad=False)
