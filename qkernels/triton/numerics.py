"""The arithmetic of fake quantization: csrc/numerics.h in Triton, operation for operation.

The contract is IEEE float32 without contraction of a*b+c: launch every kernel with `enable_fp_fusion=False`.
"""

import math

import triton
import triton.language as tl

# Adding 1.5 * 2**23 leaves no bits below the point, and the addition rounds half to even; exact within +-2**22.
_ROUNDING = tl.constexpr(12582912.0)


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
    return (v + _ROUNDING) - _ROUNDING


@triton.jit
def fake_quantize(x, scale, offset, qmin, qmax):
    y = code(grid(x, scale, offset), qmin, qmax) * scale
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
