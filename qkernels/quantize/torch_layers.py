"""The quantized counterparts of PyTorch's layers. `quantize_` turns a layer into one in place."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .layers import QuantizedLayer
from .reading import ReadWeight


class QConv1d(QuantizedLayer, nn.Conv1d):
    """nn.Conv1d with a fake-quantized weight; takes all its arguments, and the quantizers."""

    float_type = nn.Conv1d


class QConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d with a fake-quantized weight; takes all its arguments, and the quantizers."""

    float_type = nn.Conv2d


class QConv3d(QuantizedLayer, nn.Conv3d):
    """nn.Conv3d with a fake-quantized weight; takes all its arguments, and the quantizers."""

    float_type = nn.Conv3d


class QConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with a fake-quantized weight; with groups, channels of one index share a scale."""

    float_type = nn.ConvTranspose1d
    channel_axis = 1


class QConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with a fake-quantized weight; with groups, channels of one index share a scale."""

    float_type = nn.ConvTranspose2d
    channel_axis = 1


class QConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with a fake-quantized weight; with groups, channels of one index share a scale."""

    float_type = nn.ConvTranspose3d
    channel_axis = 1


class QLinear(QuantizedLayer, nn.Linear):
    """nn.Linear with a fake-quantized weight; takes all its arguments, and the quantizers."""

    float_type = nn.Linear


class QMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention whose projection of queries, keys and values is fake-quantized.

    Its `out_proj` is a layer of its own. Inputs stay float: PyTorch's attention takes what it is given.
    """

    float_type = nn.MultiheadAttention
    weight_name = "in_proj_weight"
    quantizes_input = False
    in_proj_weight = ReadWeight()  # type: ignore[assignment]


class QAttentionOutput(QuantizedLayer, NonDynamicallyQuantizableLinear):
    """The `out_proj` of nn.MultiheadAttention, whose weight that reads: its own forward is never called."""

    float_type = NonDynamicallyQuantizableLinear
    quantizes_input = False


TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.float_type: kind
    for kind in (
        QConv1d,
        QConv2d,
        QConv3d,
        QConvTranspose1d,
        QConvTranspose2d,
        QConvTranspose3d,
        QLinear,
        QMultiheadAttention,
        QAttentionOutput,
    )
}
