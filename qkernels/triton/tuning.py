"""How the convolutions are cut into tiles, for each shape and device.

Shapes are bucketed by powers of two. tiles/ has what was measured, a file a kind of GPU; a bucket that is not in its
GPU's file follows `by_rule`. On any other GPU the first use of a bucket times a few candidates and remembers the
fastest, in memory and in a file of the user's cache folder. `python -m qkernels.triton.tune` measures such a file.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import next_power_of_2

from ..atomic import replace_file
from .launch import capability_of


class Tile(NamedTuple):
    """A program computes [channels, pixels] of an output, `depth` terms of the sums at a time, a `splits`th of them.

    decoded: the weights are first decoded into memory, once for all tiles of pixels, instead of by each.
    """

    channels: int
    pixels: int
    depth: int
    num_warps: int
    num_stages: int
    splits: int = 1
    decoded: bool = False


@dataclass(frozen=True)
class Bucket:
    """What a choice depends on: the type of the product, and the sizes of the problem, rounded up to powers of two.

    depth_per_tap: the largest power of two that divides it, up to 128: no larger tile of depth stays within a tap.
    batch: members times groups.
    """

    dot: str
    channels: int
    pixels: int
    depth: int
    depth_per_tap: int
    batch: int

    @classmethod
    def of(cls, dot: str, channels: int, pixels: int, depth: int, depth_per_tap: int, batch: int) -> "Bucket":
        return cls(
            dot,
            next_power_of_2(channels),
            next_power_of_2(pixels),
            next_power_of_2(depth),
            math.gcd(128, depth_per_tap),
            next_power_of_2(batch),
        )

    @property
    def key(self) -> str:
        return "-".join(map(str, astuple(self)))


@cache
def measured(capability: tuple[int, int]) -> dict[str, Tile] | None:
    """Bucket's key -> the fastest tile on GPUs of a compute capability; None for those that nobody measured."""
    major, minor = capability
    file = Path(__file__).parent / "tiles" / f"sm_{major}{minor}.json"
    return read_tiles(file) if file.exists() else None


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


DECODINGS = 4  # of the same codes, by so many tiles of pixels, take longer than to write them and read them back


def by_rule(bucket: Bucket, device: torch.device) -> Tile:
    """A choice by reasoning, and what was measured on an H200.

    Wide tiles use what they load often, as far as registers go: float32 keeps two parts of x, and odd channels many
    addresses. Where wide tiles leave multiprocessors idle, narrower ones, then splits of the sum; but decoded codes
    are multiplied faster than sums are folded. What follows integer sums takes long, and more programs hide that.
    """
    narrow = bucket.dot == "fp32" or bucket.depth_per_tap < 4
    channels = 128 if bucket.channels >= 128 and not narrow else 64  # 64 rows are the least that wgmma takes
    pixels = min(max(bucket.pixels, 16), 64 if narrow else 128)
    depth = 32 if bucket.depth_per_tap < 64 or bucket.dot == "fp32" else 64

    def programs() -> int:
        return bucket.batch * triton.cdiv(bucket.channels, channels) * triton.cdiv(bucket.pixels, pixels)

    available = _multiprocessors(device)
    if programs() < available:
        channels = 64
    while programs() < available and pixels > 32:
        pixels //= 2
    decoded = can_decode(bucket) and bucket.pixels >= DECODINGS * pixels
    if decoded and bucket.dot == "int8" and (channels, pixels) == (128, 128):
        pixels = 64
    splits = 1
    if programs() < 2 * available and not decoded:
        splits = max(1, min(4 * available // programs(), bucket.depth // (8 * depth), 16))
    return Tile(channels, pixels, depth, 8 if channels * pixels == 128 * 128 else 4, 3, splits, decoded)


def can_decode(bucket: Bucket) -> bool:
    """Whether decoded codes travel to shared memory 16 bytes at a time; float32 ones would take too much of it."""
    return bucket.dot != "fp32" and bucket.depth_per_tap >= 16


def candidates(bucket: Bucket, device: torch.device) -> list[Tile]:
    """A short list around the rule's choice, which comes first."""
    rule = by_rule(bucket, device)
    tiles = [rule, rule._replace(splits=1)]
    shapes = [(128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 64, 4), (64, 64, 4), (64, 32, 4)]
    if bucket.dot != "fp32":  # which has no registers left
        shapes += [(64, 256, 4), (128, 256, 8)]
    deep = bucket.depth_per_tap if bucket.dot == "int8" else min(bucket.depth_per_tap, 64)
    for channels, pixels, num_warps in shapes:
        if pixels <= max(32, bucket.pixels) and channels <= max(64, bucket.channels):
            tile = rule._replace(channels=channels, pixels=pixels, num_warps=num_warps)
            tiles += [tile, tile._replace(num_stages=4)]
            if deep > rule.depth:
                tiles.append(tile._replace(depth=deep))
    if can_decode(bucket):
        tiles += [tile._replace(decoded=not rule.decoded) for tile in tiles[:2]]
    if 2 * rule.splits * rule.depth <= bucket.depth:
        tiles.append(rule._replace(splits=2 * rule.splits))
    return list(dict.fromkeys(tiles))


def milliseconds(run: Callable[[], object]) -> float:
    """That a launch takes."""
    # In a graph: beside a short kernel its launch from Python takes longer, the more so where there are two.
    return triton.testing.do_bench_cudagraph(run, rep=2, return_mode="median")


def fastest(bucket: Bucket, device: torch.device, run: Callable[[Tile], object]) -> Tile:
    """The candidate under which `run` takes the least time; one that does not fit the GPU is skipped."""
    times: dict[Tile, float] = {}
    for tile in candidates(bucket, device):
        try:
            times[tile] = milliseconds(partial(run, tile))
        except triton.OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else by_rule(bucket, device)


def _cache_file(device: torch.device) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return Path(folder) / "qkernels" / f"{name}.json"


def read_tiles(file: Path) -> dict[str, Tile]:
    """What `write_tiles` wrote; nothing if the file is missing or corrupt."""
    try:
        entries = json.loads(file.read_text())
        tiles = {str(key): Tile(**entry) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: tile for key, tile in tiles.items() if _is_valid(tile)}


def _is_valid(tile: Tile) -> bool:
    """Whether a file's numbers are ones."""
    *sizes, decoded = tile
    return all(type(n) is int and n > 0 for n in sizes) and type(decoded) is bool


def write_tiles(file: Path, tiles: dict[str, Tile]) -> None:
    """Replace the file as a whole, so that no reader sees half of it."""
    text = json.dumps({key: tile._asdict() for key, tile in sorted(tiles.items())}, indent=1)
    replace_file(file, lambda temporary: temporary.write_text(text))


_tuned: dict[torch.device, dict[str, Tile]] = {}


def tile_of(bucket: Bucket, device: torch.device, run: Callable[[Tile], object]) -> Tile:
    """The tile for a bucket; `run` launches the problem at hand with a given one, to be timed."""
    capability = capability_of(device)
    known = {} if capability is None else measured(capability)  # None: Triton's interpreter
    if known is not None:
        return known.get(bucket.key) or by_rule(bucket, device)
    if device not in _tuned:
        _tuned[device] = read_tiles(_cache_file(device))
    tiles = _tuned[device]
    if bucket.key not in tiles:
        if torch.cuda.is_current_stream_capturing():
            return by_rule(bucket, device)
        tiles[bucket.key] = fastest(bucket, device, run)
        with suppress(OSError):  # a folder that cannot be written
            write_tiles(_cache_file(device), read_tiles(_cache_file(device)) | tiles)
    return tiles[bucket.key]
