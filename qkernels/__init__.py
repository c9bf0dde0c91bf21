"""Fused kernels for quantization-aware training and packed low-bit inference."""

from . import backends
from .atomic import remove_leftovers, replace_file
from .ops.fake_quantize import fake_quantize
from .ops.fake_quantize_multi import fake_quantize_multi
from .ops.mean_abs import mean_abs
from .ops.packing import pack, unpack
from .packed.ensemble import PackedEnsemble
from .packed.file import PackedFileError
from .packed.layers import PackedConv2d, PackedLinear
from .packed.loading import sign_packed_file, verify_packed_file
from .packed.signature import make_signing_key
from .quantize.config import QConfig
from .quantize.convert import dequantize_, quantize_, quantize_like_
from .quantize.fusing import fuse_weights_
from .quantize.inq import snap_
from .quantize.layers import QuantizedLayer, quantized_layers
from .quantize.optimizers import add_scales_, named_scales, param_groups
from .quantize.quantizers import INQ, LSQ, ActivationLSQ, init_scale, positive_scale
from .quantize.registry import register_layer
from .quantize.report import QuantizationReport, packed_nbytes
from .quantize.switch import disable_, enable_
from .quantize.torch_layers import (
    QAttentionOutput,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QLinear,
    QMultiheadAttention,
)

__version__ = "0.1.0"

backends.load()

__all__ = [
    "INQ",
    "LSQ",
    "ActivationLSQ",
    "PackedConv2d",
    "PackedEnsemble",
    "PackedFileError",
    "PackedLinear",
    "QAttentionOutput",
    "QConfig",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QLinear",
    "QMultiheadAttention",
    "QuantizationReport",
    "QuantizedLayer",
    "add_scales_",
    "backends",
    "dequantize_",
    "disable_",
    "enable_",
    "fake_quantize",
    "fake_quantize_multi",
    "fuse_weights_",
    "init_scale",
    "make_signing_key",
    "mean_abs",
    "named_scales",
    "pack",
    "packed_nbytes",
    "param_groups",
    "positive_scale",
    "quantize_",
    "quantize_like_",
    "quantized_layers",
    "register_layer",
    "remove_leftovers",
    "replace_file",
    "sign_packed_file",
    "snap_",
    "unpack",
    "verify_packed_file",
]
