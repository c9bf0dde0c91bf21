"""How many elements a function makes at most, from its arguments: what `memory.py` reckons with."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kinds import ProgramError
from .steps import mapped

MOST_PARTS = 1024  # of a tensor that is cut, or of what is put together
LONGEST_CUT = 2**16  # of a tensor that is cut into single ones


def elements_of(*args: Any, **kwargs: Any) -> int:
    """Of all tensors among arguments, those that expand counted as often as they are read."""
    counts: list[int] = []
    mapped((args, kwargs), Tensor, lambda t: counts.append(t.numel()))
    return sum(counts)


def broadcast(*operands: Any, **kwargs: Any) -> int:
    tensors = [operand for operand in (*operands, *kwargs.values()) if isinstance(operand, Tensor)]
    return math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))) if tensors else 0


def multiplied(a: Tensor, b: Tensor) -> int:
    """A product of matrices, whose operands are expanded where they broadcast."""
    batch = math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    rows, columns = (a.shape[-2] if a.dim() > 1 else 1), (b.shape[-1] if b.dim() > 1 else 1)
    depth = a.shape[-1] if a.dim() else 1
    return batch * (rows * columns + depth * (rows + columns))


def padded(input: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> int:
    shape = list(input.shape)
    for i in range(0, len(pad) - 1, 2):
        shape[-1 - i // 2] += max(0, pad[i]) + max(0, pad[i + 1])
    return math.prod(shape)


def pooled(input: Tensor, output_size: Any, dims: int, **_: Any) -> int:
    wanted = list(output_size) if isinstance(output_size, list | tuple) else [output_size] * dims
    sizes = [own if size is None else size for size, own in zip(wanted, input.shape[-dims:], strict=True)]
    return input.numel() + math.prod((*input.shape[:-dims], *sizes))


def extremes(input: Tensor, *_: Any, **__: Any) -> int:
    """Values, and positions, which are of 8 bytes."""
    return 3 * input.numel()


def one_hot(input: Tensor, num_classes: int) -> int:
    """Integers of 8 bytes."""
    return 2 * input.numel() * max(0, num_classes)


def selected(input: Tensor, dim: int, index: Tensor) -> int:
    return math.prod(input.shape[:dim]) * index.numel() * math.prod(input.shape[dim:][1:])


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * scores + elements_of(query, key, value, *args, **kwargs)


def parts(input: Tensor, *_: Any, **__: Any) -> int:
    """None, as they share the tensor's memory; but each of them is an object."""
    if max(input.shape, default=0) > LONGEST_CUT:
        raise ProgramError(f"a tensor of shape {list(input.shape)} would be cut up, of more than {LONGEST_CUT}")
    return 0


def repeated(input: Tensor, sizes: Any, *more: int) -> int:
    repeats = (*sizes, *more) if isinstance(sizes, tuple | list) else (sizes, *more)
    return input.numel() * math.prod(max(0, n) for n in repeats)


def interleaved(input: Tensor, repeats: int, *_: Any, **__: Any) -> int:
    return input.numel() * max(0, repeats)


def sized(*sizes: Any, **_: Any) -> int:
    """What is made of sizes alone."""
    first = sizes[0] if isinstance(sizes[0], tuple | list) else sizes
    return math.prod(max(0, n) for n in first)


def newly_sized(input: Tensor, *sizes: Any, **_: Any) -> int:
    return sized(*sizes)


def filled(size: Any, *_: Any, **__: Any) -> int:
    return sized(size)


def counted(*bounds: Any, **_: Any) -> int:
    """The numbers up to one, or from one to another, in steps."""
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
    return int(max(0, (end - start) / step)) + 1 if step else 0


def interpolated(input: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> int:
    spatial = input.shape[2:]
    if size is not None:
        sizes = size if isinstance(size, tuple | list) else [size] * len(spatial)
    else:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor] * len(spatial)
        sizes = [int(n * f) + 1 for n, f in zip(spatial, factors, strict=True)]
    return input.numel() + math.prod((*input.shape[:2], *sizes))


def _each(value: Any, count: int) -> Sequence[int]:
    return value if isinstance(value, tuple | list) else [value] * count


def convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int:
    """The result, the input with its padding, and the weight."""
    dims = weight.dim() - 2
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    edges = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if isinstance(padding, str):
        pads = edges if padding == "same" else [0] * dims
    else:
        pads = [2 * p for p in _each(padding, dims)]
    wide = [n + p for n, p in zip(input.shape[-dims:], pads, strict=True)]
    out = [max(0, (n - e - 1) // s + 1) for n, e, s in zip(wide, edges, strides, strict=True)]
    images = input.shape[0] if input.dim() == dims + 2 else 1
    return weight.numel() + images * (input.shape[-dims - 1] * math.prod(wide) + weight.shape[0] * math.prod(out))


def transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> int:
    """Of a transposed convolution, with each pixel's share of the result laid out."""
    dims = weight.dim() - 2
    sizes = zip(
        input.shape[-dims:],
        weight.shape[2:],
        *(_each(v, dims) for v in (stride, output_padding, dilation)),
        strict=True,
    )
    out = [(n - 1) * s + d * (k - 1) + o + 1 for n, k, s, o, d in sizes]
    images = input.shape[0] if input.dim() == dims + 2 else 1
    channels, columns = weight.shape[1] * groups, input.numel() * math.prod(weight.shape[1:])
    return weight.numel() + columns + images * channels * math.prod(max(0, n) for n in out)


def unfolded(input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> int:
    sizes = zip(input.shape[-2:], *(_each(v, 2) for v in (kernel_size, dilation, padding, stride)), strict=True)
    blocks = math.prod(max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1) for n, k, d, p, s in sizes)
    return input.numel() // max(1, math.prod(input.shape[-2:])) * math.prod(_each(kernel_size, 2)) * blocks


def contracted(equation: str, *tensors: Any) -> int:
    """Of einsum: the product of its operands, whatever of it is summed."""
    operands = tensors[0] if isinstance(tensors[0], tuple | list) else tensors
    inputs, output = equation.replace(" ", "").split("->")
    terms = zip(inputs.split(","), operands, strict=True)
    size = {letter: n for term, t in terms for letter, n in zip(term, t.shape, strict=True)}
    return math.prod(size[letter] for letter in output) + 2 * elements_of(*operands)


def grids(*tensors: Any, **_: Any) -> int:
    """Of meshgrid: each as large as all of them span, should somebody write them out."""
    axes = tensors[0] if isinstance(tensors[0], tuple | list) else tensors
    return len(axes) * math.prod(t.numel() for t in axes)
