"""The folder of a packed ensemble: model.safetensors, config.json and README.md. docs/format.md is its definition.

Reading trusts nothing: checksums catch damage, and whatever a file claims is held against what its tensors are before
memory is taken for it.
"""

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from ..atomic import replace_file
from .ensemble import MembersInTurn, PackedEnsemble
from .float_layers import StackedConstant, StackedConv2d, StackedLinear, StackedNorm
from .fusion import FusionReport
from .layers import PackedLayer
from .program import ProgramError, layer_json, program_json, read_layer, read_program

FORMAT = "qkernels.packed_ensemble"
VERSION = 1
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LARGEST_CONFIG = 64 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedFileError(ValueError):
    """A packed file that is truncated, corrupt or not what it claims to be."""


# Writing ---------------------------------------------------------------------------------------------------------


def save(ensemble: PackedEnsemble, folder: Path, info: dict[str, Any]) -> Path:
    """See `PackedEnsemble.save`."""
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "members": ensemble.members,
        "nbytes": ensemble.nbytes,
        "info": info,
        "report": dataclasses.asdict(ensemble.report),
    }
    if isinstance(ensemble.program, fx.GraphModule):
        config["program"] = program_json(ensemble.program)
    else:
        config["layers"] = {name: layer_json(layer, name) for name, layer in packed_layers(ensemble.program).items()}
    tensors = {name: t.contiguous() for name, t in ensemble.program.state_dict().items()}
    for name, layer in packed_layers(ensemble.program).items():
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
    replace_file(folder / CARD, lambda path: path.write_text(model_card(ensemble, info)))
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


def model_card(ensemble: PackedEnsemble, info: dict[str, Any]) -> str:
    """README.md, with the front matter that model hubs read."""
    layers = packed_layers(ensemble.program).values()
    bits = sorted({b for layer in layers for b in layer.bits})
    facts = {
        "members": ensemble.members,
        "bits": ", ".join(map(str, bits)),
        "activations": "integer" if ensemble.integer else "float",
        "size": f"{ensemble.nbytes:,} bytes",
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
# Packed ensemble of {ensemble.members} quantized networks

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


def load(path: Path, model: nn.Module | None) -> PackedEnsemble:
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
    return PackedEnsemble(program, members, report, config["info"])


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


def expected_shapes(module: nn.Module, name: str, members: int) -> dict[str, tuple[torch.dtype | None, list[Any]]]:
    """Tensor -> dtype (None: any of a kernel's floats) and shape (None: any extent) of a layer of a program."""
    key = f"{name}." if name else ""
    if isinstance(module, PackedLayer):
        members = module.members
        by_channel: list[Any] = [members, module.out_channels]
        return {
            f"{key}weight_packed": (torch.uint8, list(module.weight_packed.shape)),
            f"{key}weight_scale": (torch.float32, by_channel),
            f"{key}weight_shape": (torch.int64, [4]),
            f"{key}bias": (torch.float32, by_channel),
            **{f"{key}{a}_scale": (torch.float32, [members]) for a in ("input", "residual", "output")},
        }
    if isinstance(module, StackedConv2d):
        return {
            f"{key}weight": (None, [members, None, None, *module.geometry.kernel]),
            f"{key}bias": (None, [members, None]),
        }
    if isinstance(module, StackedLinear):
        return {f"{key}weight": (None, [members, None, None]), f"{key}bias": (None, [members, None])}
    if isinstance(module, StackedNorm):
        return {f"{key}weight": (None, [members, ...]), f"{key}bias": (None, [members, ...])}
    if isinstance(module, StackedConstant):
        return {f"{key}value": (None, [members, 1, ...])}
    return {}


OPTIONAL = ("bias", "input_scale", "residual_scale", "output_scale")


def read_tensors(path: Path, program: nn.Module, members: int) -> None:
    """Fill the tensors of a program from the file; each is checked before it is read."""
    expected: dict[str, tuple[torch.dtype | None, list[Any]]] = {}
    if isinstance(program, fx.GraphModule):
        for name, module in program.named_modules():
            expected |= expected_shapes(module, name, members)
    else:
        expected = {name: (t.dtype, list(t.shape)) for name, t in program.state_dict().items()}
        for name, layer in packed_layers(program).items():
            expected |= expected_shapes(layer, name, 1)
    with safetensors.safe_open(path, framework="pt") as file:
        there = set(file.keys())
        required = {
            name for name in expected if name.rpartition(".")[2] not in OPTIONAL or not _in_layer(name, program)
        }
        for name in sorted((required - there) | (there - expected.keys())):
            raise PackedFileError(
                f"the tensor {name} is {'missing' if name in required else 'not part of the network'}"
            )
        for name in sorted(there):
            dtype, shape = expected[name]
            found = file.get_slice(name)
            if not _fits(found.get_shape(), shape):
                raise PackedFileError(f"{name} has shape {found.get_shape()}, expected {_readable(shape)}")
            t = file.get_tensor(name)
            if t.dtype != dtype if dtype is not None else t.dtype not in FLOATS:
                raise PackedFileError(f"{name} has dtype {t.dtype}, expected {dtype or 'a float'}")
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise PackedFileError(f"{name} holds NaN or infinity")
            _fill(program, name, t)
    for name, module in program.named_modules():
        _check_layer(module, name)


def _in_layer(name: str, program: nn.Module) -> bool:
    """Whether a tensor belongs to one of our layers, whose bias is optional, and not to a float module in between."""
    owner = program.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, PackedLayer | StackedConv2d | StackedLinear)


def _fits(found: list[int], shape: list[Any]) -> bool:
    if shape and shape[-1] is ...:
        shape = shape[:-1] + [None] * (len(found) - len(shape) + 1)
    return len(found) == len(shape) and all(want in (None, n) for n, want in zip(found, shape, strict=True))


def _readable(shape: list[Any]) -> str:
    return "[" + ", ".join("..." if n is ... else "any" if n is None else str(n) for n in shape) + "]"


def _fill(program: nn.Module, name: str, t: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = program.get_submodule(owner_name)
    if attribute == "weight_shape" and isinstance(owner, PackedLayer):
        shape = owner.geometry.weight_shape(owner.out_channels, owner.in_channels)
        if tuple(t.tolist()) != shape:
            raise PackedFileError(f"{name} is {t.tolist()}, but the layer's weight has shape {list(shape)}")
    elif attribute in owner._buffers:
        owner._buffers[attribute] = t
    else:
        owner._parameters[attribute] = nn.Parameter(t, requires_grad=False)


def _check_layer(module: nn.Module, name: str) -> None:
    """What takes more than one tensor to see."""
    if isinstance(module, PackedLayer):
        if module.bias is not None and module.bias.is_meta:
            module.bias = None
        if module.output_scale is not None and module.input_scale is None:
            raise PackedFileError(f"{name} gives codes but takes none: it has no input_scale")
        for scale in (module.input_scale, module.residual_scale, module.output_scale):
            if scale is not None and not bool((scale > 0).all()):
                raise PackedFileError(f"{name} has an activation scale that is not positive")
    elif isinstance(module, StackedConv2d | StackedLinear):
        if module.bias is not None and module.bias.is_meta:
            module.bias = None
        elif module.bias is not None and module.bias.shape != module.weight.shape[:2]:
            raise PackedFileError(f"{name} has weight {list(module.weight.shape)} and bias {list(module.bias.shape)}")
    elif isinstance(module, StackedNorm) and module.weight.shape != module.bias.shape:
        raise PackedFileError(f"{name} has weight {list(module.weight.shape)} and bias {list(module.bias.shape)}")
