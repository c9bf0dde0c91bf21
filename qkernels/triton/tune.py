"""`python -m qkernels.triton.tune` times the convolutions of ResNet-50 and EfficientNet-Lite0 on the GPU at hand and
prints the entries that `tuning._MEASURED` should have for it."""

import torch
from timm import create_model
from torch import nn

from ..packed_ops import Geometry, packed_bytes, packed_conv2d, packed_conv2d_int8
from . import tuning
from .launch import capability_of

MODELS = ("resnet50", "tf_efficientnet_lite0")
MEMBERS, BITS, BATCHES = 5, 7, (1, 8, 64)


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
def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tuning._MEASURED.clear()  # so that every shape is timed, as on a device without a table
    tuning._tuned[device] = {}
    for shape, channels, geometry in sorted(set().union(*map(layers, MODELS)), key=str):
        codes = channels * geometry.kernel[0] * geometry.kernel[1] * shape[0]
        packed = torch.randint(256, (MEMBERS, packed_bytes(codes, BITS)), dtype=torch.uint8, device=device)
        scale = torch.ones(MEMBERS, channels, device=device)
        ones = scale[:, 0].contiguous()
        for batch in BATCHES:
            x = torch.randint(256, (MEMBERS * batch, *shape), dtype=torch.uint8, device=device)
            packed_conv2d_int8(
                x, ones, packed, scale, scale, BITS, geometry, activation="relu", out_scale=ones, out_dtype=torch.uint8
            )
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                packed_conv2d(x.to(dtype), packed, scale, scale, BITS, geometry, activation="relu")
    print(f"{capability_of(device)}: {{")
    for key, tile in sorted(tuning._tuned[device].items()):
        print(f'    "{key}": {tile},')
    print("},")


if __name__ == "__main__":
    main()
