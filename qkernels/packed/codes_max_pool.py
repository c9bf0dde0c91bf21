"""CodesMaxPool2d: a max pool of codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..ops.geometry import Geometry, conv_geometry
from .packed_layer import INTEGERS


class CodesMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d that takes codes as well: quantization keeps the order, so the largest code is the largest value."""

    @property
    def geometry(self) -> Geometry:
        return conv_geometry(self.kernel_size, self.stride, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in INTEGERS:
            return super().forward(x)
        kernel, stride, padding = _pair(self.kernel_size), _pair(self.stride), _pair(self.padding)
        least = torch.iinfo(x.dtype).min
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=least)
        # Rows, then columns: as many steps as the kernel is high and wide.
        for dim, k, s in ((2, kernel[0], stride[0]), (3, kernel[1], stride[1])):
            length = (x.shape[dim] - k) // s * s + 1
            windows = [x.narrow(dim, i, length)[(slice(None),) * dim + (slice(None, None, s),)] for i in range(k)]
            x = windows[0]
            for window in windows[1:]:
                x = torch.maximum(x, window)
        return x.contiguous(memory_format=torch.channels_last)
