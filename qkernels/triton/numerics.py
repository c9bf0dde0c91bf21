"""The arithmetic of fake quantization: csrc/numerics.h in Triton, operation for operation.

The contract is IEEE float32 without contraction of a*b+c: launch every kernel with `enable_fp_fusion=False`.
"""

import importlib
import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

# Adding 1.5 * 2**23 leaves no bits below the point, and the addition rounds half to even; exact within +-2**22.
_ROUNDING = tl.constexpr(12582912.0)
_ROUNDING_BITS = tl.constexpr(0x4B400000)

if triton.knobs.runtime.interpret:  # its fma rounds twice
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """Of float32: their product is exact in float64."""
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fma


@triton.jit
def valid_scale(scale):
    """A scale that is not positive and finite poisons its slice: NaN."""
    return tl.where((scale > 0) & (scale < float("inf")), scale, float("nan"))


@triton.jit
def grid(x, scale, offset):
    """v = (x - offset) / scale; `offset` is None where the grid has none.

    A GPU's division has a slow path for rare operands and counts 0 among them, which behind a ReLU is every other
    activation: there scale / scale takes its place, and 1 - 1 (or NaN - NaN) is the result.
    """
    if offset is not None:
        x = x - offset
    v = tl.div_rn(tl.where(x == 0, scale, x), scale)
    return tl.where(x == 0, v - v, v)


@triton.jit
def code(v, qmin, qmax):
    """round(clamp(v)) to the even neighbor; NaN passes through both comparisons."""
    v = tl.where(v < qmin, qmin, v)
    v = tl.where(v > qmax, qmax, v)
    return rounded(v)


@triton.jit
def quotient(x, scale, offset, qmin, qmax):
    """What rounds to code(grid(x, scale, offset), qmin, qmax), in half of the instructions.

    csrc/cuda/fast_quantizer.cuh says why the codes are the same: `FastQuantizer`, operation for operation.
    """
    if offset is not None:
        x = x - offset
    exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 255
    power = ((254 - tl.minimum(exponent, 253)) << 23).to(tl.float32, bitcast=True)
    scaled = scale * power
    reciprocal = tl.div_rn(scale * 0.0 + 1.0, scaled)
    v = tl.clamp(x * power, qmin * scaled, qmax * scaled, propagate_nan=tl.PropagateNan.ALL)
    q = v * reciprocal
    q = tl.fma(tl.fma(-q, scaled, v), reciprocal, q)
    return tl.fma(tl.fma(-q, scaled, v), reciprocal, q)


@triton.jit
def rounded(v):
    """To the nearest integer, ties to even."""
    return (v + _ROUNDING) - _ROUNDING


@triton.jit
def rounded_to_int32(v):
    """The same as int32; NaN gives anything. A conversion would take longer."""
    return (v + _ROUNDING).to(tl.int32, bitcast=True) - _ROUNDING_BITS


@triton.jit
def fake_quantize(x, scale, offset, qmin, qmax):
    y = rounded(quotient(x, scale, offset, qmin, qmax)) * scale
    if offset is not None:
        y = y + offset
    return y


@triton.jit
def is_inside(v, inside_min, inside_max):
    """Whether the gradient passes straight through; NaN is outside."""
    return (v >= inside_min) & (v <= inside_max)


@triton.jit
def scale_term(v, inside, grad, qmin, qmax):
    """One element's term of the gradient of its scale: round(v) - v inside the range, the bound outside."""
    return grad * (code(v, qmin, qmax) - tl.where(inside, v, 0.0))


def inside_bounds(qmin: int, qmax: int, aten_edge: bool) -> tuple[float, float]:
    """The least and largest float32 v that count as inside [qmin, qmax]: before rounding, or for `aten_edge` after it.

    q + 0.5 rounds to q where q is even, and to its other neighbor where q is odd: then the next float32 towards q.
    """
    if not aten_edge:
        return float(qmin), float(qmax)
    return -_last_that_rounds_to(-qmin), _last_that_rounds_to(qmax)


def _last_that_rounds_to(q: int) -> float:
    """The largest float32 that rounds half to even to q."""
    half = q + 0.5
    float32_ulp = math.ulp(half) * 2.0**29
    # Towards zero from a power of two the spacing would be halved, but q + 0.5 is one only for q = 0 and q = -1, and
    # q = -1 moves away from zero.
    return half if q % 2 == 0 else half - float32_ulp
