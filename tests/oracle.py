"""Fake quantization in numpy, written from the equations and not from the package: codes in float32, sums in float64.

x and grad are float32 arrays (a half-precision tensor is widened first), scale and offset float32 [C], or 0-d without
an axis. Results are float32; rounding to a narrower dtype is the caller's.
"""

from typing import NamedTuple

import numpy as np


class Gradients(NamedTuple):
    """grad_x float32; sums over the elements that share a scale in float64, and the same sums of |terms|."""

    x: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    scale_magnitude: np.ndarray
    offset_magnitude: np.ndarray


def _broadcast(p, x, axis):
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    return np.asarray(p, np.float32).reshape(shape)


def _sum(terms, axis):
    return terms.sum(tuple(d for d in range(terms.ndim) if axis is None or d != axis), dtype=np.float64)


def _grid(x, scale, offset, axis):
    scale = _broadcast(scale, x, axis)
    scale = np.where((scale > 0) & np.isfinite(scale), scale, np.float32(np.nan))
    offset = np.float32(0) if offset is None else _broadcast(offset, x, axis)
    with np.errstate(all="ignore"):
        return (x - offset) / scale, scale, offset


def _code(v, qmin, qmax):
    return np.rint(np.clip(v, np.float32(qmin), np.float32(qmax)))


def fake_quantize(x, scale, offset, qmin, qmax, axis):
    v, scale, offset = _grid(x, scale, offset, axis)
    with np.errstate(all="ignore"):
        return _code(v, qmin, qmax) * scale + offset


def gradients(grad, x, scale, offset, qmin, qmax, axis, aten_edge):
    v, _, _ = _grid(x, scale, offset, axis)
    edge = np.rint(v) if aten_edge else v
    with np.errstate(all="ignore"):
        inside = (edge >= qmin) & (edge <= qmax)
        code = _code(v, qmin, qmax).astype(np.float64)
        scale_terms = grad * (code - np.where(inside, v, 0))
        offset_terms = np.where(inside, 0, grad)
    return Gradients(
        np.where(inside, grad, np.float32(0)),
        _sum(scale_terms, axis),
        _sum(offset_terms, axis),
        _sum(np.abs(scale_terms), axis),
        _sum(np.abs(offset_terms), axis),
    )


def mean_abs(x, axis):
    with np.errstate(all="ignore"):
        count = x.size if axis is None else x.size // max(x.shape[axis], 1)
        return _sum(np.abs(x), axis) / max(count, 1)
