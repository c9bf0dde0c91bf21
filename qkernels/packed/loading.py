"""Reading the folder of a packed ensemble (docs/format.md), which anyone may have made.

First all that the files say is checked, against lists of what there may be and against each other, with no more memory
than the text takes. Then the tensors are read, once, into memory that is ours, and held against the checksum. What a
forward may take is up to `memory.py`.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.geometry import conv_geometry
from .file import (
    CONFIG,
    FORMAT,
    LARGEST_CONFIG,
    MODEL,
    VERSIONS,
    Contents,
    PackedFileError,
    config_sha256,
    locked,
    names_of,
    nbytes_of,
    staged,
    unique,
)
from .fusion import FusionReport
from .in_turn import MembersInTurn, put
from .kinds import Expected, LayerKind, ProgramError, object_of, only_keys, shown
from .layers import PackedConv2d, PackedLinear
from .memory import MemoryLimit
from .packed_layer import PackedLayer
from .program import Program
from .program_file import read_layer, read_program
from .signature import check_signature, read_private_key, read_public_key, write_signature
from .tensor_file import TensorFile

MOST_MEMBERS = 1024
KEYS = ("format", "version", "members", "nbytes", "info", "report", "program", "layers", "checksums")
CHANGED = "the checksums do not match: a file was damaged or changed; copy or save it again"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load(path: Path, model: nn.Module | None, max_bytes: int | None, public_key: str | Path | None) -> Contents:
    """See `PackedEnsemble.load`."""
    key = None if public_key is None else read_public_key(public_key)
    with _errors_of(path) as folder, _opened(folder, max_bytes, key) as (_, config, file):
        members, info = config["members"], object_of(config["info"])
        if config.get("program") is not None:
            program: nn.Module = read_program(config["program"], members, config["version"])
        elif model is None:
            raise PackedFileError("its members run in turn: pass load(path, model) a float model of their architecture")
        else:
            program = _members_in_turn(model, members, config, file.entries.keys())
        report = _read_report(config["report"])
        tensors = Tensors(program, members)
        tensors.expect(file)
        tensors.fill(_read_tensors(config, file))
        if nbytes_of(program) != config["nbytes"]:
            raise PackedFileError(f"its tensors take {nbytes_of(program)} bytes, not {shown(config['nbytes'])}")
        if isinstance(program, Program):
            program.limit = MemoryLimit(members, file.nbytes, max_bytes)
    return Contents(program, members, report, info)


def sign_packed_file(path: str | Path, private_key: str | Path) -> Path:
    """Write signature.json into the folder of a packed ensemble that is whole. Returns it.

    Args:
        path: the folder, or its model.safetensors.
        private_key: a PEM file of an Ed25519 key without a password, from `make_signing_key` or `openssl genpkey`.

    Raises:
        PackedFileError: if the ensemble is not whole.
        ImportError: without the package `cryptography`.
        ValueError: if the key is none.
    """
    key = read_private_key(private_key)
    with _errors_of(Path(path)) as folder, _opened(folder, None, None) as (content, config, file):
        _read_tensors(config, file)
    return write_signature(folder, content, key)


def verify_packed_file(path: str | Path, public_key: str | Path) -> None:
    """Make sure that a packed ensemble is whole, and signed by the owner of a key.

    Args:
        path: the folder, or its model.safetensors.
        public_key: a PEM file of an Ed25519 key.

    Raises:
        PackedFileError: if not.
        ImportError: without the package `cryptography`.
        ValueError: if the key is none.
    """
    key = read_public_key(public_key)
    with _errors_of(Path(path)) as folder, _opened(folder, None, key) as (_, config, file):
        _read_tensors(config, file)


@contextmanager
def _errors_of(path: Path) -> Iterator[Path]:
    """The folder of a path; whatever is raised is a PackedFileError that names it."""
    folder = path.parent if path.name == MODEL else path
    try:
        yield folder
    except PackedFileError as error:
        raise PackedFileError(f"{folder}: {error}") from error.__cause__
    except Exception as error:
        # A file that nobody has thought of ends here: whoever loads files from others has one error to handle.
        raise PackedFileError(f"{folder} is damaged or no packed ensemble: {error or type(error).__name__}") from error


@contextmanager
def _opened(folder: Path, max_bytes: int | None, key: Any) -> Iterator[tuple[bytes, dict[str, Any], TensorFile]]:
    """config.json, to the byte and as it is read, and the tensors that belong to it, of which the header is read."""
    for name in (CONFIG, MODEL):
        if not (folder / name).is_file():
            raise PackedFileError(f"it is no packed ensemble: it has no {name}")
    with locked(folder, exclusive=False):
        content = _read_limited(folder / CONFIG)
        if key is not None:
            check_signature(folder, content, key)
        config = _config(content)
        rest = staged(folder, config["checksums"][MODEL])  # a save was interrupted before it gave them their name
        file = TensorFile(rest if rest.is_file() else folder / MODEL)
    with file:
        if max_bytes is not None and file.nbytes > max_bytes:
            raise PackedFileError(f"its tensors take {file.nbytes:,} bytes, more than max_bytes={max_bytes:,}")
        yield content, config, file


def _read_tensors(config: dict[str, Any], file: TensorFile) -> dict[str, Tensor]:
    content = file.read()
    if file.sha256 != config["checksums"][MODEL]:
        raise PackedFileError(CHANGED)
    return content


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise PackedFileError(f"{CONFIG} is larger than {LARGEST_CONFIG >> 20} MiB")
    return content


def _config(content: bytes) -> dict[str, Any]:
    """config.json, with right checksums of its own and plausible keys."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PackedFileError(f"{CONFIG} is not of the format {FORMAT}")
    if type(config.get("version")) is not int or config["version"] not in VERSIONS:
        raise PackedFileError(f"{CONFIG} is of version {shown(config.get('version'))}; this qkernels reads 1 and 2")
    checksums = object_of(config.get("checksums"))
    if checksums.keys() != {MODEL, CONFIG} or checksums[CONFIG] != config_sha256(config):
        raise PackedFileError(CHANGED)
    if not isinstance(checksums[MODEL], str) or len(checksums[MODEL]) != 64 or not checksums[MODEL].isalnum():
        raise PackedFileError(f"the checksum {shown(checksums[MODEL])} is none")
    only_keys(config, KEYS)
    members = config.get("members")
    if type(members) is not int or not 1 <= members <= MOST_MEMBERS:
        raise PackedFileError(f"members={shown(members)} is not a number from 1 to {MOST_MEMBERS}")
    if missing := {"info", "report", "nbytes"} - config.keys():
        raise PackedFileError(f"{CONFIG} has no {min(missing)}")
    if not isinstance(config["info"], dict) or not isinstance(config["report"], dict):
        raise PackedFileError("info and report must be objects")
    return config


def _read_report(plain: dict[str, Any]) -> FusionReport:
    """What was packed and fused: names, and reasons."""
    only_keys(plain, [field.name for field in fields(FusionReport)])
    for name, value in plain.items():
        texts: Any = (
            [value] if name in ("in_turn", "verified") else list(value.values()) if name == "unfused" else value
        )
        if type(texts) is not list or not all(text is None or isinstance(text, str) for text in texts):
            raise ProgramError(f"report: {name} is {shown(value)}")
    return FusionReport(**plain)


def _members_in_turn(model: nn.Module, members: int, config: dict[str, Any], in_file: Iterable[str]) -> MembersInTurn:
    """Copies of a float model on the meta device, with the packed layers of each member in place of its own."""
    layers = object_of(config.get("layers"))
    names = [name for name, _ in model.named_modules() if f"members.0.{name}" in layers]
    wanted = [f"members.{member}.{name}" for member in range(members) for name in names]
    if set(wanted) != layers.keys() or not {f"{name}.weight_packed" for name in wanted} <= set(in_file):
        raise PackedFileError("its layers are not those of all members, or not layers of the model")
    read = {name: read_layer(layer, name, 1, config["version"]) for name, layer in layers.items()}
    for name, layer in read.items():
        own = model.get_submodule(name.split(".", 2)[2])
        if not _is_like(layer, own):
            raise PackedFileError(f"{name} is not what packing the model's {own} gives")
    copies = []
    for member in range(members):
        state = model.state_dict(keep_vars=True).values()
        copies.append(copy.deepcopy(model, {id(t): _without_memory(t) for t in state}).eval())
        for name in names:
            layer = read[f"members.{member}.{name}"]
            assert isinstance(layer, PackedLayer)
            put(copies[-1], copies[-1].get_submodule(name), layer.stand_alone_(like_torch=config["version"] > 1))
    return MembersInTurn(copies)


def _is_like(layer: nn.Module, model_layer: nn.Module) -> bool:
    """Whether a packed layer from a file can stand in the place of a float one."""
    own: Any = model_layer
    if isinstance(layer, PackedConv2d) and isinstance(model_layer, nn.Conv2d):
        padding = "tf_same" if layer.tf_same else own.padding
        geometry = conv_geometry(own.kernel_size, own.stride, padding, own.dilation, own.groups)
        channels = own.in_channels, own.out_channels, own.padding_mode
        return layer.geometry == geometry and (layer.in_channels, layer.out_channels, layer.padding_mode) == channels
    if isinstance(layer, PackedLinear) and isinstance(model_layer, nn.Linear):
        return (layer.in_channels, layer.out_channels) == (own.in_features, own.out_features)
    return False


def _without_memory(t: Tensor) -> Tensor:
    empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty


class Tensors:
    """The tensors of a program: what a file must have for it, and how they come to their layers."""

    def __init__(self, program: nn.Module, members: int) -> None:
        self.program = program
        self.names = names_of(program)
        self.layers = {name: layer for name, layer in program.named_modules() if isinstance(layer, LayerKind)}
        self.expected: dict[str, Expected] = {}
        if not isinstance(program, Program):  # float layers of the model that was given
            self.expected = {
                name: Expected(t.dtype, list(t.shape), finite=False) for name, t in unique(program).items()
            }
            members = 1
        for name, layer in self.layers.items():
            self.expected |= {f"{name}.{tensor}": what for tensor, what in layer.expected(members).items()}

    def expect(self, file: TensorFile) -> None:
        """Hold what a file's header says against the program, whose tensors then have shapes, but no memory.

        Raises:
            PackedFileError: naming the tensor that is missing, one too many, or of another dtype or shape.
        """
        there = file.entries.keys()
        required = {name for name, what in self.expected.items() if not what.optional}
        for name in sorted((required - there) | (there - self.expected.keys())):
            what = "missing" if name in required else "not part of the network"
            raise PackedFileError(f"the tensor {shown(name)} is {what}")
        for name, entry in sorted(file.entries.items()):
            dtype, shape, _, _ = self.expected[name]
            if not _fits(entry.shape, shape):
                raise PackedFileError(f"{name} has shape {entry.shape}, expected {_readable(shape)}")
            if entry.dtype not in (FLOATS if dtype is None else dtype if isinstance(dtype, tuple) else (dtype,)):
                raise PackedFileError(f"{name} has dtype {entry.dtype}, expected {dtype or 'a float'}")
            self._give(name, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        for layer in self.layers.values():
            layer.forget_missing()

    def fill(self, content: dict[str, Tensor]) -> None:
        """Give each layer its tensors, and have it look at them.

        Raises:
            PackedFileError: naming the tensor or the layer whose values cannot be.
        """
        for name, t in content.items():
            # A piece at a time: what finds out takes memory, too.
            checked = t.is_floating_point() and self.expected[name].finite
            pieces = t.flatten().split(1 << 20) if checked else ()
            if not all(bool(piece.isfinite().all()) for piece in pieces):
                raise PackedFileError(f"{name} holds NaN or infinity")
            self._give(name, t)
        for name, layer in self.layers.items():
            try:
                layer.check()
            except ProgramError as error:
                raise PackedFileError(f"{name} {error}") from error

    def _give(self, name: str, t: Tensor) -> None:
        """Under all names that its place has."""
        owner = self.layers.get(name.rpartition(".")[0])
        if owner is not None:
            try:
                owner.take(name.rpartition(".")[2], t)
            except ProgramError as error:
                raise PackedFileError(f"{name} {error}") from error
            return
        parameter = nn.Parameter(t, requires_grad=False) if t.is_floating_point() else t
        for each in self.names[name]:
            owner_name, _, attribute = each.rpartition(".")
            place = self.program.get_submodule(owner_name)
            if attribute in place._buffers:
                place._buffers[attribute] = t
            else:
                place._parameters[attribute] = parameter  # type: ignore[assignment]


def _fits(found: list[int], shape: list[Any]) -> bool:
    if shape and shape[-1] is ...:
        shape = shape[:-1] + [None] * (len(found) - len(shape) + 1)
    return len(found) == len(shape) and all(want in (None, n) for n, want in zip(found, shape, strict=True))


def _readable(shape: list[Any]) -> str:
    return "[" + ", ".join("..." if n is ... else "any" if n is None else str(n) for n in shape) + "]"
