"""`fake_quantize_multi`: every layer of a model in one launch forward and one backward.

The layers stand in a table of int64 on the device, addresses and numbers alike, one column a layer. A layer is
[channels, inner] in memory (without an axis [1, elements]), and a program works on a segment of one channel. A layer
whose channels are not outermost in memory (a transposed weight) goes through `fake_quantize` by itself.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import numerics
from .fake_quantize import fake_quantize, fake_quantize_backward
from .launch import launch_of, on_device_of
from .layout import Matrix, dense, laid_out_as, matrix

# Rows of the table: a layer's first program, the elements of its channel, whether every channel starts at a 16-byte
# boundary, its range, the addresses of its tensors, and its grad_factor as the bits of a float32.
FIRST = tl.constexpr(0)
INNER = tl.constexpr(1)
WIDE = tl.constexpr(2)
QMIN = tl.constexpr(3)
QMAX = tl.constexpr(4)
SCALE = tl.constexpr(5)
X = tl.constexpr(6)
OUT = tl.constexpr(7)  # y forward, grad_x backward
GRAD = tl.constexpr(8)
GRAD_SCALE = tl.constexpr(9)
FACTOR = tl.constexpr(10)

_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _layer_of(pid, table_ptr, layers, LAYERS: tl.constexpr):
    """The column of the table that program `pid` works on.

    Programs are numbered layer after layer, so it is the last layer that starts at or before this one. One load of all
    the starts and a count takes less time than a binary search, whose loads wait for each other.
    """
    i = tl.arange(0, LAYERS)
    first = tl.load(table_ptr + FIRST * layers + i, i < layers, other=2**62)
    return table_ptr + tl.sum((first <= pid).to(tl.int32), 0) - 1


@triton.jit
def _channel_pointer(address, channel, inner, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + channel * inner


@triton.jit
def _forward_segment(
    column,
    layers,
    program,
    segment,
    X_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inner = tl.load(column + INNER * layers)
    if ALIGNED:
        inner = inner // 8 * 8  # changes nothing, but tells the compiler that 16-byte accesses stay inside
    segments = tl.cdiv(inner, segment)
    channel = program // segments
    begin = program % segments * segment
    x_ptr = _channel_pointer(tl.load(column + X * layers), channel, inner, X_TYPE, ALIGNED)
    y_ptr = _channel_pointer(tl.load(column + OUT * layers), channel, inner, OUT_TYPE, ALIGNED)
    scale_ptr = tl.load(column + SCALE * layers).to(tl.pointer_type(tl.float32))
    scale = numerics.valid_scale(tl.load(scale_ptr + channel))
    qmin = tl.load(column + QMIN * layers).to(tl.float32)
    qmax = tl.load(column + QMAX * layers).to(tl.float32)
    for start in range(begin, tl.minimum(begin + segment, inner), BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < inner).to(tl.float32)
        y = numerics.fake_quantize(x, scale, None, qmin, qmax)
        tl.store(y_ptr + i, y.to(OUT_TYPE), i < inner)


@triton.jit(do_not_specialize=["layers"])
def _forward_kernel(
    table_ptr,
    layers,
    segment,
    X_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program quantizes `segment` (a multiple of BLOCK) elements of a channel: 4 B + 4 B an element in float32."""
    pid = tl.program_id(0).to(tl.int64)
    column = _layer_of(pid, table_ptr, layers, LAYERS)
    program = pid - tl.load(column + FIRST * layers)
    if tl.load(column + WIDE * layers) != 0:
        _forward_segment(column, layers, program, segment, X_TYPE, OUT_TYPE, True, BLOCK)
    else:
        _forward_segment(column, layers, program, segment, X_TYPE, OUT_TYPE, False, BLOCK)


@triton.jit
def _backward_segment(
    column,
    layers,
    program,
    segment,
    partials_ptr,
    PARAM_GRADS: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    X_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inner = tl.load(column + INNER * layers)
    if ALIGNED:
        inner = inner // 8 * 8
    segments = tl.cdiv(inner, segment)
    channel = program // segments
    begin = program % segments * segment
    grad_ptr = _channel_pointer(tl.load(column + GRAD * layers), channel, inner, GRAD_TYPE, ALIGNED)
    x_ptr = _channel_pointer(tl.load(column + X * layers), channel, inner, X_TYPE, ALIGNED)
    grad_x_ptr = _channel_pointer(tl.load(column + OUT * layers), channel, inner, X_TYPE, ALIGNED)
    scale_ptr = tl.load(column + SCALE * layers).to(tl.pointer_type(tl.float32))
    scale = numerics.valid_scale(tl.load(scale_ptr + channel))
    qmin = tl.load(column + QMIN * layers).to(tl.float32)
    qmax = tl.load(column + QMAX * layers).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, tl.minimum(begin + segment, inner), BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < inner, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + i, i < inner, other=0.0).to(tl.float32)
        v = numerics.grid(x, scale, None)
        inside = numerics.is_inside(v, qmin, qmax)
        tl.store(grad_x_ptr + i, tl.where(inside, grad, 0.0).to(X_TYPE), i < inner)
        if PARAM_GRADS:
            sums += numerics.scale_term(v, inside, grad, qmin, qmax)
    if PARAM_GRADS:
        if partials_ptr is None:
            sum_ptr = tl.load(column + GRAD_SCALE * layers).to(tl.pointer_type(tl.float32)) + channel
        else:
            sum_ptr = partials_ptr + tl.program_id(0)
        factor = tl.load(column + FACTOR * layers).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(sum_ptr, tl.sum(sums, 0) * factor)


@triton.jit(do_not_specialize=["layers"])
def _backward_kernel(
    table_ptr,
    partials_ptr,
    layers,
    segment,
    PARAM_GRADS: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    X_TYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes `segment` elements of a channel: 12 B an element in float32, 6 B in bfloat16.

    Its sum is the gradient of the channel's scale, or where several programs share a scale goes to `partials_ptr`, one
    a program. Elements beyond the edge load grad = 0, so their terms are 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    column = _layer_of(pid, table_ptr, layers, LAYERS)
    program = pid - tl.load(column + FIRST * layers)
    if tl.load(column + WIDE * layers) != 0:
        _backward_segment(column, layers, program, segment, partials_ptr, PARAM_GRADS, GRAD_TYPE, X_TYPE, True, BLOCK)
    else:
        _backward_segment(column, layers, program, segment, partials_ptr, PARAM_GRADS, GRAD_TYPE, X_TYPE, False, BLOCK)


@triton.jit(do_not_specialize=["layers", "programs"])
def _fold_kernel(table_ptr, partials_ptr, layers, programs, BLOCK: tl.constexpr):
    """The gradient of each layer's one scale: its programs' partial sums, in a fixed order. One program a layer."""
    layer = tl.program_id(0)
    first = tl.load(table_ptr + FIRST * layers + layer)
    is_last = layer == layers - 1
    end = tl.load(table_ptr + FIRST * layers + layer + 1, not is_last, other=programs)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + i, i < end, other=0.0)
    grad_scale_ptr = tl.load(table_ptr + GRAD_SCALE * layers + layer).to(tl.pointer_type(tl.float32))
    tl.store(grad_scale_ptr, tl.sum(sums, 0))


# A CUDA graph that captured the copy of a table reads the host's memory at every replay, and nothing tells when the
# graph is destroyed: these tables, of a few KB, live as long as the process.
_captured_tables: list[Tensor] = []


def _device_table(columns: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """int64 [rows, layers] on the device, copied from pinned memory without waiting for the device."""
    host = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    if device.type != "cuda":
        return host
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured_tables.append(host)
    return host.to(device, non_blocking=True)


def _stacked(x: Tensor, axis: int | None) -> Matrix | None:
    """The matrix of a dense layer whose channels are outermost in memory; None for any other, and for an empty one."""
    if x.numel() == 0:
        return None
    m = matrix(x, axis)
    return m if m.kept == m.channels and m.summed_stride == 1 else None


def _is_wide(m: Matrix, *tensors: Tensor) -> bool:
    """Whether every channel of every tensor starts at a 16-byte boundary, whatever the dtype."""
    return m.summed % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)


def fake_quantize_multi(
    xs: list[Tensor],
    scales: list[Tensor],
    qmins: list[int],
    qmaxs: list[int],
    axis: int | None,
    grad_factors: list[float],
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """`reference.fake_quantize_multi`, in one launch. All xs share dtype and device."""
    xs = [dense(x) for x in xs]
    scales = [s.contiguous() for s in scales]
    out_dtype = out_dtype or xs[0].dtype
    launch = launch_of("multi_forward", xs[0])
    ys, columns, programs = [], [], 0
    for x, scale, qmin, qmax, factor in zip(xs, scales, qmins, qmaxs, grad_factors, strict=True):
        m = _stacked(x, axis)
        if m is None:
            y = fake_quantize(x, scale, None, qmin, qmax, axis, factor, False, out_dtype)
        else:
            y = torch.empty_like(x, dtype=out_dtype)
            addresses = [t.data_ptr() for t in (scale, x, y)]
            columns.append((programs, m.summed, _is_wide(m, x, y), qmin, qmax, *addresses))
            programs += m.channels * triton.cdiv(m.summed, launch.segment)
        ys.append(y)
    if columns:
        with on_device_of(xs[0]):
            _forward_kernel[(programs,)](
                _device_table(columns, xs[0].device),
                len(columns),
                launch.segment,
                X_TYPE=_TL[xs[0].dtype],
                OUT_TYPE=_TL[out_dtype],
                LAYERS=triton.next_power_of_2(len(columns)),
                BLOCK=launch.block,
                num_warps=launch.num_warps,
                enable_fp_fusion=False,
            )
    return ys


def fake_quantize_multi_backward(
    grads: list[Tensor],
    xs: list[Tensor],
    scales: list[Tensor],
    qmins: list[int],
    qmaxs: list[int],
    axis: int | None,
    grad_factors: list[float],
    param_grads: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """`reference.fake_quantize_multi_backward`, in one launch; without an axis a second one folds partial sums."""
    xs = [dense(x) for x in xs]
    grads = [laid_out_as(grad, x) for grad, x in zip(grads, xs, strict=True)]
    scales = [s.contiguous() for s in scales]
    factor_bits = torch.tensor(grad_factors, dtype=torch.float32).view(torch.int32).tolist()
    matrices = [_stacked(x, axis) for x in xs]
    launch = launch_of("multi_backward", xs[0])
    segment = launch.segment
    if axis is not None:  # one program sums a whole channel, and no partial sums are left to fold
        longest = max((m.summed for m in matrices if m is not None), default=1)
        segment = triton.cdiv(longest, launch.block) * launch.block
    grad_xs, grad_scales, columns, programs = [], [], [], 0
    for grad, x, scale, qmin, qmax, factor, bits, m in zip(
        grads, xs, scales, qmins, qmaxs, grad_factors, factor_bits, matrices, strict=True
    ):
        if m is None:
            grad_x, grad_scale, _ = fake_quantize_backward(
                grad, x, scale, None, qmin, qmax, axis, factor, False, param_grads
            )
        else:
            grad_x = torch.empty_like(x)
            grad_scale = torch.empty_like(scale) if param_grads else scale.new_empty(0)
            addresses = [t.data_ptr() for t in (scale, x, grad_x, grad, grad_scale)]
            columns.append((programs, m.summed, _is_wide(m, grad, x, grad_x), qmin, qmax, *addresses, bits))
            programs += m.channels * triton.cdiv(m.summed, segment)
        grad_xs.append(grad_x)
        grad_scales.append(grad_scale)
    if columns:
        partials = scales[0].new_empty(programs) if param_grads and axis is None else None
        with on_device_of(xs[0]):
            _launch_backward(columns, programs, segment, grads[0], xs[0], partials, param_grads)
    return grad_xs, grad_scales


def _launch_backward(
    columns: list[tuple[int, ...]],
    programs: int,
    segment: int,
    grad: Tensor,
    x: Tensor,
    partials: Tensor | None,
    param_grads: bool,
) -> None:
    """`columns` describe the layers; `grad` and `x` are the first's, and tell the dtypes of all."""
    table, launch = _device_table(columns, x.device), launch_of("multi_backward", x)
    _backward_kernel[(programs,)](
        table,
        partials,
        len(columns),
        segment,
        PARAM_GRADS=param_grads,
        GRAD_TYPE=_TL[grad.dtype],
        X_TYPE=_TL[x.dtype],
        LAYERS=triton.next_power_of_2(len(columns)),
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    if partials is not None:
        fold = launch_of("multi_fold", x)
        _fold_kernel[(len(columns),)](
            table,
            partials,
            len(columns),
            programs,
            BLOCK=fold.block,
            num_warps=fold.num_warps,
            enable_fp_fusion=False,
        )
