"""The other ways to fake-quantize a weight per channel with a learned scale, each as (weight, scale) -> weight."""

import torch
from torch import Tensor

QMIN, QMAX = -64, 63
torch._dynamo.config.recompile_limit = 64  # the compiled peer gets its best: one kernel for each shape


def _grad_factor(weight: Tensor) -> float:
    return (weight.numel() * QMAX) ** -0.5


def eager_lsq(weight: Tensor, scale: Tensor) -> Tensor:
    """LSQ composed of PyTorch ops, as research code writes it."""
    g = _grad_factor(weight)
    s = (scale * g + (scale - scale * g).detach()).view(-1, *[1] * (weight.dim() - 1))
    v = (weight / s).clamp(QMIN, QMAX)
    return (v + (v.round() - v).detach()) * s


def native(weight: Tensor, scale: Tensor) -> Tensor:
    """PyTorch's own op, the one that its learnable fake-quantize module calls."""
    zero_point = torch.zeros_like(scale)
    return torch._fake_quantize_learnable_per_channel_affine(
        weight, scale, zero_point, 0, QMIN, QMAX, _grad_factor(weight)
    )


compiled_lsq = torch.compile(eager_lsq, fullgraph=True, dynamic=False)
"""The eager composition under torch.compile: what fusing can gain without a kernel of one's own."""

PEERS = {"eager LSQ": eager_lsq, "native op": native, "compiled LSQ": compiled_lsq}
