"""`packed_gemv` where no C++/CUDA kernel was built."""

from torch import Tensor

from ..ops.geometry import Geometry
from .packed_conv2d import convolve, output_of
from .packed_epilogue import Epilogue


def packed_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shared: bool, activation: str
) -> Tensor:
    """`reference.packed_gemv`: a convolution of 1x1 images, whose one tile of pixels reads each weight once."""
    images = x[:, :, None, None]
    out = output_of(images, scale.shape[0], scale.shape[1], Geometry(), shared, x.dtype)
    epilogue = Epilogue(None, scale, bias, None, None, None, out, 0.0, 0.0)
    return convolve(images, packed, epilogue, bits, Geometry(), shared, activation)[:, :, 0, 0].contiguous()
