"""`python -m qkernels.triton.tune` times packed convolutions on the GPU at hand and writes its file of tiles/, which
`tuning.measured` reads. Most of the time goes into compiling, so many processes do that, each its share of the tiles:
no two compile the same. Then one alone times what they left in Triton's cache."""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from timm import create_model
from torch import nn

from ..ops.geometry import Geometry
from ..ops.packed_conv2d import packed_conv2d, packed_conv2d_int8
from ..ops.packing import packed_bytes
from . import tuning

MODELS = ("resnet50", "tf_efficientnet_lite0")
BATCHES = (1, 8, 64)
DTYPES = {"int8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MEMBERS, BITS = 5, 7


def layers(name: str) -> set[tuple[tuple[int, ...], int, Geometry]]:
    """(shape of one input image, output channels, geometry) of every convolution but the depthwise ones."""
    found = set()

    def record(conv: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        assert isinstance(conv, nn.Conv2d)
        if conv.groups == 1:
            (kernel_h, kernel_w), (stride_h, stride_w) = conv.kernel_size, conv.stride
            padding = (kernel_h // 2, kernel_w // 2, kernel_h // 2, kernel_w // 2)
            geometry = Geometry((kernel_h, kernel_w), (stride_h, stride_w), padding)
            found.add((tuple(inputs[0].shape[1:]), conv.out_channels, geometry))

    with torch.device("meta"):
        model = create_model(name)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(record)
        model(torch.empty(1, 3, 224, 224))
    return found


@torch.no_grad()
def run(shape: tuple[int, ...], channels: int, geometry: Geometry, batch: int, dtype: torch.dtype) -> None:
    """One convolution of MEMBERS members, which tunes its kind of shape at first use."""
    codes = channels * geometry.kernel[0] * geometry.kernel[1] * shape[0]
    packed = torch.randint(256, (MEMBERS, packed_bytes(codes, BITS)), dtype=torch.uint8, device="cuda")
    scale = torch.ones(MEMBERS, channels, device="cuda")
    ones = scale[:, 0].contiguous()
    x = torch.randint(256, (MEMBERS * batch, *shape), dtype=torch.uint8, device="cuda")
    if dtype == torch.uint8:
        packed_conv2d_int8(
            x, ones, packed, scale, scale, BITS, geometry, activation="relu", out_scale=ones, out_dtype=torch.uint8
        )
    else:
        packed_conv2d(x.to(dtype), packed, scale, scale, BITS, geometry, activation="relu")


def forget_tiles() -> None:
    """So that every shape is tuned, as on a device without a table."""
    tuning.measured = lambda capability: None  # type: ignore[assignment]
    tuning._tuned[torch.device("cuda", torch.cuda.current_device())] = {}


class _Compiled(Exception):
    """Ends a convolution of which only the tiles were wanted."""


def compile_share(share: int, shares: int, convolutions: list[tuple[Any, ...]]) -> None:
    """Launch all convolutions in this process, each with the tiles of one share, to have these compiled."""

    def launch(bucket: tuning.Bucket, device: torch.device, run: Callable[[tuning.Tile], object]) -> tuning.Tile:
        for tile in tuning.candidates(bucket, device):
            if hash(tile._replace(splits=1)) % shares == share:  # without the splits, which are no constant of a kernel
                with suppress(triton.OutOfResources):
                    run(tile)
        raise _Compiled

    forget_tiles()
    tuning.fastest = launch
    for convolution in convolutions:
        with suppress(_Compiled):
            run(*convolution)


def found() -> dict[str, tuning.Tile]:
    """Bucket's key -> tile, so far."""
    return tuning._tuned[torch.device("cuda", torch.cuda.current_device())]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qkernels.triton.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="of timm (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="images (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="time no further convolution after so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the file, rewritten whenever there are more (default: of this GPU)")
    parser.add_argument("--list", action="store_true", help="print the shapes in their order and stop")
    return parser.parse_args()


def main() -> None:
    start, arguments = time.monotonic(), parsed()
    shapes = sorted(set().union(*map(layers, arguments.models)), key=str)
    todo = {d: [(*shape, b, DTYPES[d]) for b in arguments.batches for shape in shapes] for d in arguments.dtypes}
    if arguments.list:
        print(*chain(*todo.values()), sep="\n")
        return
    forget_tiles()
    major, minor = torch.cuda.get_device_capability()
    out = arguments.out or Path(tuning.__file__).parent / "tiles" / f"sm_{major}{minor}.json"
    shares = arguments.processes
    with ProcessPoolExecutor(shares, get_context("spawn")) as pool:
        for dtype, convolutions in todo.items():
            list(pool.map(compile_share, range(shares), repeat(shares), repeat(convolutions)))
            for number, convolution in enumerate(convolutions):
                if arguments.limit and time.monotonic() - start > arguments.limit:
                    print(f"stopped after {number} of {len(convolutions)} convolutions in {dtype}")
                    return
                run(*convolution)
                tuning.write_tiles(out, tuning.read_tiles(out) | found())
    print(f"wrote {len(found())} tiles to {out}")


if __name__ == "__main__":
    main()
