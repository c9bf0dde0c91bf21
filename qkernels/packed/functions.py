"""The functions and methods that a program may call, and with which arguments. There are no others.

A function has one name. What PyTorch has as a function and as a method is a method here, arithmetic is an operator, and
what has neither is a function; `ONLY_OLD` are those that files of version 1 call by another name.
"""

import operator
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from . import elements as count
from .by_members import (
    alone,
    along,
    attended,
    concatenated,
    item,
    multiplied,
    pointwise,
    pooled,
    stacked,
)
from .calls import Call, Rule
from .elements import MOST_PARTS
from .kinds import ProgramError, shown
from .methods import METHODS
from .values import (
    DEVICE,
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
    REAL_OR_INFINITE,
    SHAPE,
    SIZES,
    TENSOR,
    TENSORS,
    Kind,
    Known,
    Result,
    for_each,
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
    "an equation of letters",
    lambda v: isinstance(v, str) and bool(re.fullmatch(r"[a-zA-Z ]+(,[a-zA-Z ]+)?->[a-zA-Z ]*", v)),
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


def _arithmetic(function: Any, operand: Kind = OPERAND, result: Rule = _of_operands) -> Call:
    return Call(function, result, 2, elements=count.broadcast, form=pointwise, a=operand, b=operand)


def _elementwise(function: Any, **more: Any) -> Call:
    return Call(function, form=pointwise, input=TENSOR, **more)


def _pool(function: Any, dims: int, **more: Any) -> Call:
    size, edge = for_each(SIZE, dims), for_each(EDGE, dims)
    kernel: dict[str, Any] = {"kernel_size": size, "stride": size | NOTHING, "padding": edge}
    return Call(function, required=2, input=TENSOR, **kernel, **more)


def _average(function: Any, dims: int, **more: Any) -> Call:
    return _pool(function, dims, ceil_mode=FLAG, count_include_pad=FLAG, **more)


def _largest(function: Any, dims: int, **more: Any) -> Call:
    dilation = for_each(SIZE, dims)
    return _pool(function, dims, dilation=dilation, ceil_mode=FLAG, return_indices=one_of(False), **more)


def _adaptive(function: Any, dims: int, **more: Any) -> Call:
    elements, size = partial(count.pooled, dims=dims), for_each(INTEGER | NOTHING, dims)
    return Call(function, required=2, elements=elements, input=TENSOR, output_size=size, **more)


def _filter(function: Any, elements: Any, **more: Any) -> Call:
    """A convolution, of whatever kind and dimensions."""
    weights: dict[str, Any] = {"weight": TENSOR, "bias": OPTIONAL, "stride": up_to_three(SIZE)}
    return Call(function, required=2, elements=elements, input=TENSOR, **weights, **more)


def _convolution(function: Any) -> Call:
    padding = up_to_three(EDGE) | one_of("same", "valid")
    return _filter(function, count.convolved, padding=padding, dilation=up_to_three(SIZE), groups=SIZE)


def _transposed(function: Any) -> Call:
    edges: dict[str, Any] = {"padding": up_to_three(EDGE), "output_padding": up_to_three(EDGE)}
    return _filter(function, count.transposed, **edges, groups=SIZE, dilation=up_to_three(SIZE))


_AFFINE: dict[str, Any] = {"weight": OPTIONAL, "bias": OPTIONAL}
_FACTORY: dict[str, Any] = {"dtype": DTYPE | NOTHING, "device": DEVICE | NOTHING}

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
    "getattr": Call(getattr, lambda object, name: name, 2, form=alone, object=TENSOR, name=one_of("shape", "device")),
    "cat": Call(torch.cat, form=concatenated, tensors=TENSORS | several(TENSOR, MOST_PARTS), dim=DIM),
    "stack": Call(torch.stack, form=stacked, tensors=TENSORS | several(TENSOR, MOST_PARTS), dim=DIM),
    "where": Call(
        torch.where,
        required=3,
        elements=count.broadcast,
        form=pointwise,
        condition=TENSOR,
        input=OPERAND,
        other=OPERAND,
    ),
    "einsum": Call(
        torch.einsum, required=2, elements=count.contracted, equation=EQUATION, operands=TENSOR, rest=TENSOR
    ),
    "arange": Call(torch.arange, elements=count.counted, start=NUMBER, end=NUMBER, step=NUMBER, **_FACTORY),
    "linspace": Call(
        torch.linspace,
        required=3,
        elements=lambda start, end, steps, **_: steps,
        start=NUMBER,
        end=NUMBER,
        steps=INTEGER,
        **_FACTORY,
    ),
    "zeros": Call(torch.zeros, elements=count.sized, size=INTEGER | SIZES, **_FACTORY),
    "ones": Call(torch.ones, elements=count.sized, size=INTEGER | SIZES, **_FACTORY),
    "full": Call(torch.full, required=2, elements=count.filled, size=SIZES, fill_value=NUMBER, **_FACTORY),
    "one_hot": Call(
        F.one_hot, required=2, elements=count.one_hot, form=pointwise, input=TENSOR, num_classes=SIZE | COMPUTED
    ),
    "zeros_like": _elementwise(torch.zeros_like),
    "ones_like": _elementwise(torch.ones_like),
    "full_like": _elementwise(torch.full_like, fill_value=NUMBER),
    "meshgrid": Call(
        torch.meshgrid,
        "tensors",
        elements=count.grids,
        tensors=TENSOR | several(TENSOR, 3),
        indexing=one_of("ij", "xy"),
    ),
    "adaptive_avg_pool1d": _adaptive(F.adaptive_avg_pool1d, 1),
    "adaptive_avg_pool2d": _adaptive(F.adaptive_avg_pool2d, 2, form=pooled),
    "adaptive_avg_pool3d": _adaptive(F.adaptive_avg_pool3d, 3),
    "adaptive_max_pool1d": _adaptive(F.adaptive_max_pool1d, 1, return_indices=one_of(False)),
    "adaptive_max_pool2d": _adaptive(F.adaptive_max_pool2d, 2, return_indices=one_of(False), form=pooled),
    "adaptive_max_pool3d": _adaptive(F.adaptive_max_pool3d, 3, return_indices=one_of(False)),
    "avg_pool1d": _average(F.avg_pool1d, 1),
    "avg_pool2d": _average(F.avg_pool2d, 2, divisor_override=SIZE | NOTHING, form=pooled),
    "avg_pool3d": _average(F.avg_pool3d, 3, divisor_override=SIZE | NOTHING),
    "max_pool1d": _largest(F.max_pool1d, 1),
    "max_pool2d": _largest(F.max_pool2d, 2, form=pooled),
    "max_pool3d": _largest(F.max_pool3d, 3),
    "lp_pool2d": Call(
        F.lp_pool2d,
        required=3,
        input=TENSOR,
        norm_type=REAL,
        kernel_size=pair(SIZE),
        stride=pair(SIZE) | NOTHING,
        ceil_mode=FLAG,
    ),
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
        value=REAL_OR_INFINITE | NOTHING,
    ),
    "unfold": Call(
        F.unfold,
        required=2,
        elements=count.unfolded,
        input=TENSOR,
        kernel_size=pair(SIZE),
        dilation=pair(SIZE),
        padding=pair(EDGE),
        stride=pair(SIZE),
    ),
    "fold": Call(
        F.fold,
        required=3,
        elements=lambda input, output_size, *_, **__: 2 * input.numel(),
        input=TENSOR,
        output_size=pair(INTEGER),
        kernel_size=pair(SIZE),
        dilation=pair(SIZE),
        padding=pair(EDGE),
        stride=pair(SIZE),
    ),
    "pixel_shuffle": Call(F.pixel_shuffle, required=2, input=TENSOR, upscale_factor=SIZE),
    "pixel_unshuffle": Call(F.pixel_unshuffle, required=2, input=TENSOR, downscale_factor=SIZE),
    "channel_shuffle": Call(F.channel_shuffle, required=2, input=TENSOR, groups=SIZE),
    "linear": Call(
        F.linear,
        required=2,
        elements=lambda input, weight, bias=None: (
            input.numel() + weight.numel() + input.numel() // max(1, weight.shape[-1]) * weight.shape[0]
        ),
        input=TENSOR,
        weight=TENSOR,
        bias=OPTIONAL,
    ),
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "conv3d": _convolution(F.conv3d),
    "conv_transpose1d": _transposed(F.conv_transpose1d),
    "conv_transpose2d": _transposed(F.conv_transpose2d),
    "conv_transpose3d": _transposed(F.conv_transpose3d),
    "batch_norm": Call(
        F.batch_norm,
        required=3,
        input=TENSOR,
        running_mean=OPTIONAL,
        running_var=OPTIONAL,
        **_AFFINE,
        training=FLAG,
        momentum=REAL,
        eps=REAL,
    ),
    "instance_norm": Call(
        F.instance_norm,
        input=TENSOR,
        running_mean=OPTIONAL,
        running_var=OPTIONAL,
        **_AFFINE,
        use_input_stats=FLAG,
        momentum=REAL,
        eps=REAL,
    ),
    "layer_norm": Call(F.layer_norm, required=2, input=TENSOR, normalized_shape=SIZES, **_AFFINE, eps=REAL),
    "rms_norm": Call(F.rms_norm, required=2, input=TENSOR, normalized_shape=SIZES, weight=OPTIONAL, eps=REAL | NOTHING),
    "group_norm": Call(F.group_norm, required=2, input=TENSOR, num_groups=SIZE, **_AFFINE, eps=REAL),
    "local_response_norm": Call(
        F.local_response_norm,
        required=2,
        elements=lambda input, *_, **__: 4 * input.numel(),
        input=TENSOR,
        size=SIZE,
        alpha=REAL,
        beta=REAL,
        k=REAL,
    ),
    "normalize": Call(
        F.normalize,
        form=along(dim=1),
        elements=lambda input, *_, **__: 2 * input.numel(),
        input=TENSOR,
        p=REAL,
        dim=DIMS,
        eps=REAL,
        out=NOTHING,
    ),
    "softmax": Call(
        F.softmax, form=along(dim=0), input=TENSOR, dim=DIM, _stacklevel=whole(0, 16), dtype=DTYPE | NOTHING
    ),
    "log_softmax": Call(
        F.log_softmax, form=along(dim=0), input=TENSOR, dim=DIM, _stacklevel=whole(0, 16), dtype=DTYPE | NOTHING
    ),
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


# By what a step calls.
CALLS: dict[tuple[str, Any], Call] = {
    **{("function", call.target): call for call in (ONLY_OLD | FUNCTIONS).values()},
    **{("method", call.target): call for call in METHODS.values()},
}
