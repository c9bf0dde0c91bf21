"""Reading a safetensors file: its header first, then all bytes, once, into memory that is ours.

`safetensors` maps files, so that what was verified can still change, or vanish, under whoever uses it. Here the bytes
that are hashed are the bytes that are kept.
"""

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

LARGEST_HEADER = 16 << 20
MOST_DIMS = 8
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorFileError(ValueError):
    """A file that is not safetensors, or has tensors of dtypes that networks do not have."""


class Entry(NamedTuple):
    """A tensor that a file holds: the bytes [begin, end) after the header."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file.

    Attributes:
        entries: name -> what the header says of each tensor; together they are all of the file.
        nbytes: of all tensors.
        sha256: of the file, once `read` has read it.

    Raises:
        TensorFileError: for what is not such a file.
        OSError: if it cannot be read.

    Source: the format is defined by the documentation of safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        try:
            size = os.fstat(self.file.fileno()).st_size
            prefix = self.file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise TensorFileError(f"{path.name} is cut off, or no safetensors file: its header has no place in it")
            header = self.file.read(length)
            self.entries = _entries(header, size - 8 - length)
        except BaseException:
            self.file.close()
            raise
        self._digest = hashlib.sha256(prefix + header)
        self.nbytes = size - 8 - length

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self) -> dict[str, Tensor]:
        """All tensors, each in memory of its own that is aligned as any: kernels add in an order that hangs on it."""
        in_file = sorted(self.entries.items(), key=lambda item: item[1].begin)
        return {name: self._tensor(entry) for name, entry in in_file}

    def _tensor(self, entry: Entry) -> Tensor:
        content = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        view = memoryview(content.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = self.file.readinto(view[done:])
            if not count:
                raise TensorFileError("the file became shorter while it was read")
            done += count
        self._digest.update(view)
        return content.view(entry.dtype).view(entry.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def _entries(header: bytes, size: int) -> dict[str, Entry]:
    """The tensors of a header, which must take `size` bytes, one after another."""
    try:
        plain = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"the header is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise TensorFileError("the header is no JSON object")
    plain.pop("__metadata__", None)
    entries = {name: _entry(name, value) for name, value in plain.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise TensorFileError(f"{name} does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        raise TensorFileError(f"the tensors take {end} bytes, the file has {size}")
    return entries


def _entry(name: str, value: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise TensorFileError(f"{name} has no dtype, shape and data_offsets that are known here") from error
    whole = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MOST_DIMS else [None]
    if not all(type(n) is int and 0 <= n < 2**48 for n in whole):
        raise TensorFileError(f"{name} has a shape or offsets that are not sizes")
    bytes_needed = dtype.itemsize
    for n in shape:
        bytes_needed *= n
    if bytes_needed != end - begin:
        raise TensorFileError(f"{name} of {dtype} {shape} takes {bytes_needed} bytes, not {end - begin}")
    return Entry(dtype, shape, begin, end)
