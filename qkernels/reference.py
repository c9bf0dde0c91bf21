"""Each op in plain PyTorch: the definition that every backend is tested against.

These functions also serve any device that no faster backend serves. They compute in float32 (float64 for float64
input, which only they accept). Source of the equations: Esser et al., "Learned Step Size Quantization" (2020), and for
`offset` Bhalgat et al., "LSQ+" (2020). `docs/numerics.md` is the contract in words.
"""

import torch
from torch import Tensor


def _per_element(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A per-channel vector [C] shaped to broadcast along `axis` of x; a per-tensor one stays 0-d."""
    if axis is None:
        return scale.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _sum_per_scale(terms: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return terms.sum()
    return terms.movedim(axis, 0).reshape(terms.shape[axis], -1 if terms.numel() else 0).sum(1)


def _codes(
    x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """v = (x - offset) / scale and its code round(clamp(v)), with scale and offset broadcast against x.

    A scale that is not positive and finite becomes NaN, and so does everything computed from it.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.nan)
    s = _per_element(scale.to(compute), x, axis)
    b = None if offset is None else _per_element(offset.to(compute), x, axis)
    v = (x.to(compute) if b is None else x.to(compute) - b) / s
    return v, v.clamp(qmin, qmax).round(), s, b


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    grad_factor: float,
    aten_edge: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = round(clamp((x - offset) / scale, qmin, qmax)) * scale + offset, rounding half to even."""
    _, q, s, b = _codes(x, scale, offset, qmin, qmax, axis)
    y = q * s if b is None else q * s + b
    return torch.empty_like(x, dtype=out_dtype).copy_(y)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    grad_factor: float,
    aten_edge: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradient of x, and the gradients of scale and offset summed over the elements that share them.

    Inside the range (bounds included) dy/dx = 1, dy/dscale = round(v) - v and dy/doffset = 0; outside they are 0, the
    bound and 1. `aten_edge` takes "inside" on round(v), as PyTorch's own learnable op does.
    """
    v, q, _, _ = _codes(x, scale, offset, qmin, qmax, axis)
    edge = v.round() if aten_edge else v
    inside = (edge >= qmin) & (edge <= qmax)
    grad_x = torch.empty_like(x).copy_(torch.where(inside, grad, 0))
    grad_scale = scale.new_empty(0)
    grad_offset = scale.new_empty(0)
    if param_grads:
        g = grad.to(v.dtype)
        term = q - torch.where(inside, v, 0)
        grad_scale = (_sum_per_scale(g * term, axis) * grad_factor).to(scale.dtype).reshape(scale.shape)
        if offset is not None:
            grad_offset = (_sum_per_scale(torch.where(inside, 0, g), axis) * grad_factor).to(scale.dtype)
            grad_offset = grad_offset.reshape(scale.shape)
    return grad_x, grad_scale, grad_offset


def fake_quantize_multi(
    xs: list[Tensor],
    scales: list[Tensor],
    qmins: list[int],
    qmaxs: list[int],
    axis: int | None,
    grad_factors: list[float],
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """`fake_quantize` of every (x, scale, qmin, qmax)."""
    return [
        fake_quantize(x, s, None, lo, hi, axis, g, False, out_dtype or x.dtype)
        for x, s, lo, hi, g in zip(xs, scales, qmins, qmaxs, grad_factors, strict=True)
    ]


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
    """`fake_quantize_backward` of every layer: the gradients of all xs, then of all scales."""
    results = [
        fake_quantize_backward(d, x, s, None, lo, hi, axis, g, False, param_grads)
        for d, x, s, lo, hi, g in zip(grads, xs, scales, qmins, qmaxs, grad_factors, strict=True)
    ]
    return [r[0] for r in results], [r[1] for r in results]


def mean_abs(x: Tensor, axis: int | None) -> Tensor:
    """Mean |x| over the elements that share a scale: float32 [C], or 0-d for `axis=None`; 0 for an empty slice."""
    magnitude = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    total = _sum_per_scale(magnitude, axis)
    return total / max(x.numel() // max(total.numel(), 1), 1)
