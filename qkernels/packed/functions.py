"""The functions and methods that a program may call, and with which arguments. There are no others.

A function has one name. What PyTorch has as a function and as a method is a method here, arithmetic is an operator, and
what has neither is a function; `ONLY_OLD` are those that files of version 1 call by another name.
"""

import operator
import re
from typing import Any

import torch
import torch.nn.functional as F

from . import elements as count
from .by_members import (
    along,
    alone,
    attended,
    concatenated,
    expanded,
    item,
    multiplied,
    permuted,
    pointwise,
    pooled,
    reshaped,
    squeezed,
    stacked,
    unsqueezed,
)
from .calls import Call, Rule
from .elements import MOST_PARTS
from .kinds import ProgramError, shown
from .values import (
    DIM,
    DIMS,
    DTYPE,
    FLAG,
    INDEX,
    INTEGER,
    MOST_DIMS,
    NOTHING,
    NUMBER,
    REAL,
    SHAPE,
    SIZES,
    TENSOR,
    TENSORS,
    Kind,
    Known,
    Result,
    one_of,
    pair,
    several,
    up_to_three,
    whole,
)

SIZE, EDGE = whole(1), whole(0)  # of a kernel or a stride; of a padding
OPERAND = TENSOR | NUMBER
OPTIONAL = TENSOR | NOTHING
LENGTHS = INTEGER | several(INTEGER, MOST_PARTS)
COMPUTED = Kind("a computed number", lambda v: v == Known("number"))
EQUATION = Kind(
    "an equation of letters", lambda v: isinstance(v, str) and bool(re.fullmatch(r"[a-zA-Z ]+(,[a-zA-Z ]+)?->[a-zA-Z ]*", v))
)


def _of_operands(a: Any, b: Any) -> Result:
    if Known("shape") in (a, b):
        if a != b:
            raise ProgramError("adds a shape to what is none")
        return "shape"
    return "tensor" if Known("tensor") in (a, b) else "number"


def _of_tensors(a: Any, b: Any) -> Result:
    if Known("tensor") not in (a, b):
        raise ProgramError("takes a tensor, not two numbers")
    return "tensor"


def _of_item(a: Known, b: Any) -> Result:
    if a.result == "tensor":
        return "tensor"
    if isinstance(b, slice):
        return a.result
    if not INTEGER.fits(b):
        raise ProgramError(f"takes {shown(b)} of a {a.result}")
    return "number" if a.result == "shape" else "tensor"


def _of_size(input: Known, dim: Any = None) -> Result:
    return "shape" if dim is None else "number"


def _arithmetic(function: Any, operand: Kind = OPERAND, result: Rule = _of_operands) -> Call:
    return Call(function, result, 2, elements=count.broadcast, form=pointwise, a=operand, b=operand)


def _elementwise(function: Any, **more: Kind) -> Call:
    return Call(function, form=pointwise, input=TENSOR, **more)


def _pool(function: Any, **more: Any) -> Call:
    stride = pair(SIZE) | NOTHING
    kernel = {"kernel_size": pair(SIZE), "stride": stride, "padding": pair(EDGE)}
    return Call(function, required=2, form=pooled, input=TENSOR, **kernel, **more)


def _convolution(function: Any) -> Call:
    three = {"stride": up_to_three(SIZE), "padding": up_to_three(EDGE) | one_of("same", "valid")}
    return Call(
        function,
        required=2,
        elements=count.convolved,
        input=TENSOR,
        weight=TENSOR,
        bias=OPTIONAL,
        **three,
        dilation=up_to_three(SIZE),
        groups=SIZE,
    )


def _transposed(function: Any) -> Call:
    three = {"stride": up_to_three(SIZE), "padding": up_to_three(EDGE), "output_padding": up_to_three(EDGE)}
    return Call(
        function,
        required=2,
        elements=count.transposed,
        input=TENSOR,
        weight=TENSOR,
        bias=OPTIONAL,
        **three,
        groups=SIZE,
        dilation=up_to_three(SIZE),
    )


_AFFINE = {"weight": OPTIONAL, "bias": OPTIONAL}
_ADAPTIVE = {"elements": count.pooled, "form": pooled, "input": TENSOR, "output_size": pair(INTEGER | NOTHING)}
_FACTOR = {"dtype": NOTHING, "device": NOTHING}

FUNCTIONS: dict[str, Call] = {
    "add": _arithmetic(operator.add, OPERAND | SHAPE),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    "truediv": _arithmetic(operator.truediv),
    "floordiv": _arithmetic(operator.floordiv),
    "mod": _arithmetic(operator.mod),
    "pow": _arithmetic(operator.pow, TENSOR | REAL, _of_tensors),
    "eq": _arithmetic(operator.eq),
    "ne": _arithmetic(operator.ne, result=_of_tensors),
    "lt": _arithmetic(operator.lt, result=_of_tensors),
    "le": _arithmetic(operator.le, result=_of_tensors),
    "gt": _arithmetic(operator.gt, result=_of_tensors),
    "ge": _arithmetic(operator.ge, result=_of_tensors),
    "neg": Call(operator.neg, lambda a: a.result, form=pointwise, a=TENSOR | COMPUTED),
    "matmul": Call(operator.matmul, required=2, elements=count.multiplied, form=multiplied, a=TENSOR, b=TENSOR),
    "getitem": Call(operator.getitem, _of_item, 2, form=item, a=TENSOR | SHAPE | TENSORS, b=INDEX),
    "getattr": Call(getattr, "shape", 2, form=alone, object=TENSOR, name=one_of("shape")),
    "cat": Call(torch.cat, form=concatenated, tensors=TENSORS | several(TENSOR, MOST_PARTS), dim=DIM),
    "stack": Call(torch.stack, form=stacked, tensors=TENSORS | several(TENSOR, MOST_PARTS), dim=DIM),
    "where": Call(torch.where, required=3, elements=count.broadcast, form=pointwise, condition=TENSOR, input=OPERAND, other=OPERAND),
    "einsum": Call(torch.einsum, required=2, elements=count.contracted, equation=EQUATION, operands=TENSOR, rest=TENSOR),
    "arange": Call(torch.arange, elements=count.counted, start=NUMBER, end=NUMBER, **_FACTOR),
    "zeros": Call(torch.zeros, elements=count.sized, size=INTEGER | SIZES, rest=INTEGER, **_FACTOR),
    "ones": Call(torch.ones, elements=count.sized, size=INTEGER | SIZES, rest=INTEGER, **_FACTOR),
    "adaptive_avg_pool2d": Call(F.adaptive_avg_pool2d, required=2, **_ADAPTIVE),
    "adaptive_max_pool2d": Call(F.adaptive_max_pool2d, required=2, **_ADAPTIVE),
    "avg_pool1d": Call(
        F.avg_pool1d, required=2, input=TENSOR, kernel_size=up_to_three(SIZE), stride=up_to_three(SIZE) | NOTHING,
        padding=up_to_three(EDGE), ceil_mode=FLAG, count_include_pad=FLAG,
    ),
    "avg_pool2d": _pool(F.avg_pool2d, ceil_mode=FLAG, count_include_pad=FLAG, divisor_override=SIZE | NOTHING),
    "max_pool2d": _pool(F.max_pool2d, dilation=pair(SIZE), ceil_mode=FLAG, return_indices=one_of(False)),
    "lp_pool2d": Call(F.lp_pool2d, required=3, input=TENSOR, norm_type=REAL, kernel_size=pair(SIZE), stride=pair(SIZE) | NOTHING, ceil_mode=FLAG),
    "interpolate": Call(
        F.interpolate,
        elements=count.interpolated,
        input=TENSOR,
        size=up_to_three(INTEGER) | SHAPE | NOTHING,
        scale_factor=up_to_three(REAL) | NOTHING,
        mode=one_of("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"),
        align_corners=FLAG | NOTHING,
        recompute_scale_factor=FLAG | NOTHING,
        antialias=FLAG,
    ),
    "pad": Call(
        F.pad,
        required=2,
        elements=count.padded,
        input=TENSOR,
        pad=several(INTEGER, 2 * MOST_DIMS),
        mode=one_of("constant", "reflect", "replicate", "circular"),
        value=REAL | NOTHING,
    ),
    "unfold": Call(
        F.unfold, required=2, elements=count.unfolded, input=TENSOR, kernel_size=pair(SIZE), dilation=pair(SIZE),
        padding=pair(EDGE), stride=pair(SIZE),
    ),
    "fold": Call(
        F.fold, required=3, elements=lambda input, output_size, *_, **__: 2 * input.numel(), input=TENSOR, output_size=pair(INTEGER), kernel_size=pair(SIZE),
        dilation=pair(SIZE), padding=pair(EDGE), stride=pair(SIZE),
    ),
    "pixel_shuffle": Call(F.pixel_shuffle, required=2, input=TENSOR, upscale_factor=SIZE),
    "pixel_unshuffle": Call(F.pixel_unshuffle, required=2, input=TENSOR, downscale_factor=SIZE),
    "channel_shuffle": Call(F.channel_shuffle, required=2, input=TENSOR, groups=SIZE),
    "linear": Call(F.linear, required=2, elements=lambda input, weight, bias=None: input.numel() + weight.numel() + input.numel() // max(1, weight.shape[-1]) * weight.shape[0], input=TENSOR, weight=TENSOR, bias=OPTIONAL),
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "conv3d": _convolution(F.conv3d),
    "conv_transpose1d": _transposed(F.conv_transpose1d),
    "conv_transpose2d": _transposed(F.conv_transpose2d),
    "conv_transpose3d": _transposed(F.conv_transpose3d),
    "batch_norm": Call(
        F.batch_norm, required=3, input=TENSOR, running_mean=OPTIONAL, running_var=OPTIONAL, **_AFFINE, training=FLAG, momentum=REAL, eps=REAL
    ),
    "instance_norm": Call(
        F.instance_norm, input=TENSOR, running_mean=OPTIONAL, running_var=OPTIONAL, **_AFFINE, use_input_stats=FLAG, momentum=REAL, eps=REAL
    ),
    "layer_norm": Call(F.layer_norm, required=2, input=TENSOR, normalized_shape=SIZES, **_AFFINE, eps=REAL),
    "rms_norm": Call(F.rms_norm, required=2, input=TENSOR, normalized_shape=SIZES, weight=OPTIONAL, eps=REAL | NOTHING),
    "group_norm": Call(F.group_norm, required=2, input=TENSOR, num_groups=SIZE, **_AFFINE, eps=REAL),
    "local_response_norm": Call(F.local_response_norm, required=2, elements=lambda input, *_, **__: 4 * input.numel(), input=TENSOR, size=SIZE, alpha=REAL, beta=REAL, k=REAL),
    "normalize": Call(F.normalize, form=along(dim=1), elements=lambda input, *_, **__: 2 * input.numel(), input=TENSOR, p=REAL, dim=DIMS, eps=REAL, out=NOTHING),
    "softmax": Call(F.softmax, form=along(dim=0), input=TENSOR, dim=DIM, _stacklevel=whole(0, 16), dtype=NOTHING),
    "log_softmax": Call(F.log_softmax, form=along(dim=0), input=TENSOR, dim=DIM, _stacklevel=whole(0, 16), dtype=NOTHING),
    "glu": Call(F.glu, form=along(dim=-1), input=TENSOR, dim=DIM),
    "scaled_dot_product_attention": Call(
        F.scaled_dot_product_attention,
        required=3,
        elements=count.attention,
        form=attended,
        query=TENSOR,
        key=TENSOR,
        value=TENSOR,
        attn_mask=OPTIONAL,
        dropout_p=one_of(0, 0.0),
        is_causal=FLAG,
        scale=NUMBER | NOTHING,
        enable_gqa=FLAG,
    ),
    "celu": _elementwise(F.celu, alpha=REAL),
    "elu": _elementwise(F.elu, alpha=REAL),
    "gelu": _elementwise(F.gelu, approximate=one_of("none", "tanh")),
    "hardsigmoid": _elementwise(F.hardsigmoid, inplace=one_of(False)),
    "hardswish": _elementwise(F.hardswish, inplace=one_of(False)),
    "hardtanh": _elementwise(F.hardtanh, min_val=REAL, max_val=REAL, inplace=one_of(False)),
    "leaky_relu": _elementwise(F.leaky_relu, negative_slope=REAL, inplace=one_of(False)),
    "logsigmoid": _elementwise(F.logsigmoid),
    "mish": _elementwise(F.mish),
    "prelu": Call(F.prelu, required=2, input=TENSOR, weight=TENSOR),
    "relu": _elementwise(F.relu, inplace=one_of(False)),
    "relu6": _elementwise(F.relu6, inplace=one_of(False)),
    "selu": _elementwise(F.selu),
    "silu": _elementwise(F.silu, inplace=one_of(False)),
    "softplus": _elementwise(F.softplus, beta=REAL, threshold=REAL),
    "softsign": _elementwise(F.softsign),
    "tanhshrink": _elementwise(F.tanhshrink),
}

ONLY_OLD: dict[str, Call] = {
    "flatten": Call(torch.flatten, input=TENSOR, start_dim=DIM, end_dim=DIM),
    "mean": Call(torch.mean, input=TENSOR, dim=DIMS | NOTHING, keepdim=FLAG, dtype=NOTHING),
    "sigmoid": Call(torch.sigmoid, input=TENSOR),
    "tanh": Call(torch.tanh, input=TENSOR),
    "torch.relu": Call(torch.relu, input=TENSOR),
    "torch.add": Call(torch.add, required=2, elements=count.broadcast, input=TENSOR, other=OPERAND, alpha=REAL),
    "torch.mul": Call(torch.mul, required=2, elements=count.broadcast, input=TENSOR, other=OPERAND),
}


def _method(name: str, result: Rule = "tensor", required: int = 0, **more: Any) -> Call:
    """Of a tensor; what is required, and the parameters, come after it."""
    own = {key: more.pop(key) for key in ("rest", "elements", "form") if key in more}
    return Call(name, result, 1 + required, **own, input=TENSOR, **more)


def _pointwise(name: str, **more: Any) -> Call:
    return _method(name, form=pointwise, elements=count.broadcast, required=len(more), **more)


def _reduced(name: str, **more: Any) -> Call:
    return _method(name, form=along(dim=None), dim=DIMS | NOTHING, keepdim=FLAG, **more)


_TWO = {"elements": count.broadcast, "form": pointwise}
METHODS: dict[str, Call] = {
    call.target: call
    for call in (
        *map(
            _pointwise,
            "abs acos asin atan ceil clone contiguous cos erf exp expm1 floor log log1p log2 logical_not reciprocal "
            "relu round rsqrt sigmoid sign sin sqrt square tan tanh".split(),
        ),
        *(_pointwise(name, other=TENSOR) for name in ("maximum", "minimum", "logical_and", "logical_or", "atan2")),
        *(_reduced(name) for name in ("amax", "amin")),
        *(_reduced(name, dtype=NOTHING) for name in ("mean", "sum")),
        *(_reduced(name, unbiased=FLAG, correction=REAL) for name in ("std", "var")),
        _method("add", required=1, **_TWO, other=OPERAND, alpha=REAL),
        _method("addcmul", required=2, **_TWO, tensor1=TENSOR, tensor2=TENSOR, value=REAL),
        _method("baddbmm", required=2, elements=lambda i, a, b, **_: i.numel() + count.multiplied(a, b), batch1=TENSOR, batch2=TENSOR, beta=REAL, alpha=REAL),
        _method("bmm", required=1, elements=count.multiplied, mat2=TENSOR),
        _method("chunk", "tensors", 1, elements=count.parts, form=along(dim=0), chunks=whole(1, MOST_PARTS), dim=DIM),
        _method("clamp", form=pointwise, elements=count.broadcast, min=OPERAND | NOTHING, max=OPERAND | NOTHING),
        _method("cumsum", required=1, form=along(dim=0), dim=DIM),
        _method("div", required=1, **_TWO, other=OPERAND, rounding_mode=one_of("floor", "trunc", None)),
        _method("expand", required=1, form=expanded, size=INTEGER | SIZES, rest=INTEGER),
        _method("expand_as", required=1, elements=count.broadcast, other=TENSOR),
        _method("flatten", form=along(start_dim=0, end_dim=-1), start_dim=DIM, end_dim=DIM),
        _method("flip", required=1, form=along(dims=0), dims=DIMS, rest=DIM),
        _method("logsumexp", required=1, form=along(dim=0), dim=DIMS, keepdim=FLAG),
        _method("masked_fill", required=2, **_TWO, mask=TENSOR, value=REAL),
        _method("movedim", required=2, form=along(source=0, destination=0), source=DIMS, destination=DIMS),
        _method("mul", required=1, **_TWO, other=OPERAND),
        _method("narrow", required=3, form=along(dim=0), dim=DIM, start=INTEGER, length=INTEGER),
        _method("new_zeros", required=1, elements=count.newly_sized, size=INTEGER | SIZES, rest=INTEGER),
        _method("norm", form=along(dim=None), p=REAL | one_of("fro"), dim=DIMS | NOTHING, keepdim=FLAG),
        _method("numel", "number", form=alone),
        _method("permute", required=1, form=permuted, dims=DIMS, rest=DIM),
        _method("repeat", required=1, elements=count.repeated, sizes=INTEGER | SIZES, rest=INTEGER),
        _method("repeat_interleave", required=1, elements=count.interleaved, repeats=whole(0), dim=DIM),
        _method("reshape", required=1, form=reshaped, shape=INTEGER | SIZES, rest=INTEGER),
        _method("roll", required=1, elements=lambda input, *_, **__: 2 * input.numel(), shifts=INTEGER | several(INTEGER, MOST_DIMS), dims=DIMS),
        _method("rsub", required=1, **_TWO, other=OPERAND, alpha=REAL),
        _method("select", required=2, form=along(dim=0), dim=DIM, index=INTEGER),
        _method("size", _of_size, form=alone, dim=DIM),
        _method("softmax", required=1, form=along(dim=0), dim=DIM, dtype=NOTHING),
        _method("split", "tensors", 1, elements=count.parts, form=along(dim=0), split_size=LENGTHS, dim=DIM),
        _method("squeeze", form=squeezed, dim=DIMS),
        _method("sub", required=1, **_TWO, other=OPERAND, alpha=REAL),
        _method("t"),
        _method("to", form=pointwise, required=1, dtype=DTYPE),
        _method("transpose", required=2, form=along(dim0=0, dim1=0), dim0=DIM, dim1=DIM),
        _method("unbind", "tensors", elements=count.parts, form=along(dim=0), dim=DIM),
        _method("unflatten", required=2, form=along(dim=0), dim=DIM, sizes=SIZES),
        _method("unsqueeze", required=1, form=unsqueezed, dim=DIM),
        _method("view", required=1, form=reshaped, size=INTEGER | SIZES, rest=INTEGER),
    )
}

# By what a step calls.
CALLS: dict[tuple[str, Any], Call] = {
    **{("function", call.target): call for call in (ONLY_OLD | FUNCTIONS).values()},
    **{("method", call.target): call for call in METHODS.values()},
}
