"""The schema of each op, which C++ and Python define alike: setup.py compiles them into `_cpu.so`, so that a program
without Python knows the ops, and `library.py` defines them where that is not loaded. This file imports nothing."""

# Of training, with a gradient or without.
TRAINING = {
    "fake_quantize": (
        "(Tensor x, Tensor scale, Tensor? offset, int qmin, int qmax, int? axis, float grad_factor, bool aten_edge, "
        "ScalarType out_dtype) -> Tensor"
    ),
    "fake_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor? offset, int qmin, int qmax, int? axis, float grad_factor, "
        "bool aten_edge, bool param_grads) -> (Tensor, Tensor, Tensor)"
    ),
    "fake_quantize_multi": (
        "(Tensor[] xs, Tensor[] scales, int[] qmins, int[] qmaxs, int? axis, float[] grad_factors, "
        "ScalarType? out_dtype) -> Tensor[]"
    ),
    "fake_quantize_multi_backward": (
        "(Tensor[] grads, Tensor[] xs, Tensor[] scales, int[] qmins, int[] qmaxs, int? axis, float[] grad_factors, "
        "bool param_grads) -> (Tensor[], Tensor[])"
    ),
    "mean_abs": "(Tensor x, int? axis) -> Tensor",
}

_GEOMETRY = "int[2] kernel, int[2] stride, int[4] padding, int[2] dilation, int groups"
# Of packed inference: their backward says that packed weights have no gradient.
PACKED = {
    "pack": "(Tensor codes, int bits) -> Tensor",
    "unpack": "(Tensor packed, int bits, int count, bool signed) -> Tensor",
    "quantize": "(Tensor x, Tensor scale, int qmin, int qmax, int? axis) -> Tensor",
    "dequantize_packed": "(Tensor packed, Tensor scale, int bits, int count, ScalarType out_dtype) -> Tensor",
    "packed_conv2d": (
        f"(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor? residual, int bits, {_GEOMETRY}, "
        "bool shared, str activation) -> Tensor"
    ),
    "packed_conv2d_int8": (
        "(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, Tensor? residual, "
        f"Tensor? residual_scale, Tensor? out_scale, int bits, {_GEOMETRY}, bool shared, str activation, "
        "int qmin, int qmax, ScalarType out_dtype) -> Tensor"
    ),
    "packed_gemv": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int bits, bool shared, str activation) -> Tensor"
    ),
    "packed_panels": (
        "(Tensor packed, int channels, int depth, int bits, int[2] kernel, int[2] dilation, int groups) -> Tensor"
    ),
    "packed_network": (
        "(Tensor[] inputs, Tensor[] constants, Tensor steps, int[] out_sizes, ScalarType out_dtype) -> Tensor"
    ),
}

SCHEMAS = TRAINING | PACKED
