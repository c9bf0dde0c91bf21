"""`python -m qkernels.triton.tune` times packed convolutions on the GPU at hand and prints the entries that
`tuning._MEASURED` should have for it. Most of the time goes into compiling: a dozen tiles for each kind of shape."""

import argparse
import time

import torch
from timm import create_model
from torch import nn

from ..packed_ops import Geometry, packed_bytes, packed_conv2d, packed_conv2d_int8
from . import tuning
from .launch import capability_of

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


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qkernels.triton.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="of timm (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="images (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further shape after so many seconds")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    start, arguments = time.monotonic(), parsed()
    device = torch.device("cuda", torch.cuda.current_device())
    tuning._MEASURED.clear()  # so that every shape is timed, as on a device without a table
    tuning._tuned[device] = {}
    shapes = sorted(set().union(*map(layers, arguments.models)), key=str)
    todo = [(*shape, b, DTYPES[d]) for d in arguments.dtypes for b in arguments.batches for shape in shapes]
    for convolution in todo:
        if arguments.limit and time.monotonic() - start > arguments.limit:
            break
        run(*convolution)
    print(f"{capability_of(device)}: {{")
    for key, tile in sorted(tuning._tuned[device].items()):
        print(f'    "{key}": {tile},')
    print("},")


if __name__ == "__main__":
    main()
