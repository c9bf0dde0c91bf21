"""`python -m qkernels.triton.tune` times packed convolutions on the GPU at hand and writes its file of tiles/, which
`tuning.measured` reads. Most of the time goes into compiling, a dozen tiles for each kind of shape, so
that is done by many processes; then one alone times what they left in Triton's cache."""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from timm import create_model
from torch import nn

from ..packed_ops import Geometry, packed_bytes, packed_conv2d, packed_conv2d_int8
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


def only_compile() -> None:
    """In this process a tile is launched once where it would be timed, and no choice is kept."""

    def launched(run: Callable[[], object]) -> float:
        run()
        return 0.0

    forget_tiles()
    tuning.milliseconds = launched
    os.environ["XDG_CACHE_HOME"] = os.devnull


def found() -> dict[str, tuning.Tile]:
    """Bucket's key -> tile, so far."""
    return tuning._tuned[torch.device("cuda", torch.cuda.current_device())]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qkernels.triton.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="of timm (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="images (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further shapes after so many seconds")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the file, rewritten whenever there are more (default: of this GPU)")
    parser.add_argument("--list", action="store_true", help="print the shapes in their order and stop")
    return parser.parse_args()


def main() -> None:
    start, arguments = time.monotonic(), parsed()
    shapes = sorted(set().union(*map(layers, arguments.models)), key=str)
    todo = [(*shape, b, DTYPES[d]) for d in arguments.dtypes for b in arguments.batches for shape in shapes]
    if arguments.list:
        print(*todo, sep="\n")
        return
    forget_tiles()
    major, minor = torch.cuda.get_device_capability()
    out = arguments.out or Path(tuning.__file__).parent / "tiles" / f"sm_{major}{minor}.json"
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), only_compile) as pool:
        for begin in range(0, len(todo), arguments.processes):
            if arguments.limit and time.monotonic() - start > arguments.limit:
                print(f"stopped after {begin} of {len(todo)} shapes")
                break
            some = todo[begin : begin + arguments.processes]
            list(pool.map(run, *zip(*some, strict=True)))
            for convolution in some:
                run(*convolution)
            tuning.write_tiles(out, tuning.read_tiles(out) | found())
    print(f"wrote {len(found())} tiles to {out}")


if __name__ == "__main__":
    main()
