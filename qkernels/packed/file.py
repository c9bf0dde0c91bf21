"""The folder of a packed ensemble: model.safetensors, config.json and README.md. docs/format.md is its definition.

config.json decides: it has the checksum of the tensors that belong to it. A save writes them under a name made of that
checksum, replaces config.json, and only then gives them the name that people look for: at any moment there is a whole
ensemble in the folder, the old one or the new one.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import nn

from ..atomic import remove_leftovers, replace_file
from .folded import FoldedProgram
from .fusion import FusionReport
from .kinds import PackedFileError as PackedFileError
from .packed_layer import PackedLayer
from .program import Program
from .program_file import layer_json, program_json, read_layer, read_program

FORMAT = "qkernels.packed_ensemble"
VERSIONS = (1, 2)  # 1 of programs that were read from such a file alone
LARGEST_CONFIG = 4 << 20
MODEL, CONFIG, CARD, SIGNATURE = "model.safetensors", "config.json", "README.md", "signature.json"


class Contents(NamedTuple):
    """What a folder holds: see `PackedEnsemble`."""

    program: nn.Module
    members: int
    report: FusionReport
    info: dict[str, Any]


def version_of(program: nn.Module) -> int:
    """Of the format that holds a program."""
    return 1 if isinstance(program, FoldedProgram) else 2


def nbytes_of(program: nn.Module) -> int:
    """Bytes of all tensors."""
    return sum(t.nbytes for t in unique(program).values())


def names_of(program: nn.Module) -> dict[str, list[str]]:
    """The first name -> all names of each tensor: a model may hold one in several places."""
    names: dict[int, list[str]] = {}
    for name, t in program.state_dict(keep_vars=True).items():
        names.setdefault(id(t), []).append(name)
    return {same[0]: same for same in names.values()}


def unique(program: nn.Module) -> dict[str, torch.Tensor]:
    """First name -> tensor, of each that a program holds."""
    tensors = program.state_dict()
    return {name: tensors[name] for name in names_of(program)}


def works_on_integers(program: nn.Module) -> bool:
    """Whether layers take codes, or make them of their input."""
    return any(layer.input_scale is not None for layer in packed_layers(program).values())


def packed_layers(program: nn.Module) -> dict[str, PackedLayer]:
    """Name -> layer of all packed layers."""
    return {name: layer for name, layer in program.named_modules() if isinstance(layer, PackedLayer)}


# The folder ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, exclusive: bool) -> Iterator[None]:
    """Keep saves of other threads and processes out, and with `exclusive` those that look into the folder, too.

    Where the file system knows no locks of folders (some network ones do not), nobody is kept out.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def staged(folder: Path, sha256: str) -> Path:
    """Where the tensors of that checksum lie until a save is over; one that was interrupted leaves them there."""
    return folder / f".{MODEL}.{sha256[:16]}"


def config_sha256(config: dict[str, Any]) -> str:
    """Of the rest of a config, beside its checksums."""
    rest = {key: value for key, value in config.items() if key != "checksums"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# Saving ----------------------------------------------------------------------------------------------------------


def save(contents: Contents, folder: Path) -> Path:
    """See `PackedEnsemble.save`."""
    config, model = _config(contents), _model(contents.program)
    sha256 = hashlib.sha256(model).hexdigest()
    config["checksums"] = {MODEL: sha256, CONFIG: config_sha256(config)}
    text = json.dumps(config, indent=1)
    if len(text.encode()) > LARGEST_CONFIG:
        raise ValueError(
            f"PackedEnsemble.save: {CONFIG} would be larger than {LARGEST_CONFIG >> 20} MiB: say less in info"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"PackedEnsemble.save: {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, exclusive=True):
        stale = set(folder.glob(f".{MODEL}.*"))
        remove_leftovers(folder)
        replace_file(staged(folder, sha256), lambda path: path.write_bytes(model))
        replace_file(folder / CONFIG, lambda path: path.write_text(text))  # from here on the folder is the new one
        os.replace(staged(folder, sha256), folder / MODEL)
        (folder / SIGNATURE).unlink(missing_ok=True)
        replace_file(folder / CARD, lambda path: path.write_text(model_card(contents)))
        for path in stale:
            path.unlink(missing_ok=True)
    return folder


def _config(contents: Contents) -> dict[str, Any]:
    """config.json, but for its checksums.

    Raises:
        ProgramError: for what could not be read back.
        TypeError: for an `info` that is not made of plain types.
    """
    program, members, report, info = contents
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": version_of(program),
        "members": members,
        "nbytes": nbytes_of(program),
        "info": info,
        "report": dataclasses.asdict(report),
    }
    if isinstance(program, Program):
        config["program"] = program_json(program)
    else:
        config["layers"] = {name: layer_json(layer, name) for name, layer in packed_layers(program).items()}
    try:
        written = json.loads(json.dumps(config))
    except TypeError as error:
        raise TypeError(f"PackedEnsemble.save: info must hold plain types only: {error}") from error
    if isinstance(program, Program):
        read_program(written["program"], members, written["version"])
    else:
        for name, layer in written["layers"].items():
            read_layer(layer, name, 1, written["version"])
    return config


def _model(program: nn.Module) -> bytes:
    """model.safetensors."""
    tensors = {name: t.contiguous() for name, t in unique(program).items()}
    storages: set[int] = set()
    for name, t in tensors.items():
        if t.untyped_storage().data_ptr() in storages:  # a part of another's memory
            tensors[name] = t.clone()
        storages.add(t.untyped_storage().data_ptr())
    for name, layer in packed_layers(program).items():
        shape = layer.geometry.weight_shape(layer.out_channels, layer.in_channels)
        tensors[f"{name}.weight_shape"] = torch.tensor(shape)
    return safetensors.torch.save(tensors, {"format": "pt", "kind": FORMAT, "version": str(version_of(program))})


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


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
        **{key: ", ".join(value) for key, value in info.items() if _are_texts(value)},
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
