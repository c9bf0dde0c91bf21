"""What nn.MultiheadAttention computes, in functions that a program has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The answer of an nn.MultiheadAttention in eval mode, without the attention itself.

    Raises:
        ValueError: for what is left to the module's own forward.
    """
    causal = is_causal and attn_mask is None
    if (
        causal
        or key_padding_mask is not None
        or not self._qkv_same_embed_dim
        or self.bias_k is not None
        or self.add_zero_attn
    ):
        raise ValueError("attention with masks for keys, other keys and values, or tokens of its own has no form")
    if query is key and key is value:
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    else:
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        qkv = tuple(F.linear(*part) for part in parts)
    one, sequence_first = query.dim() == 2, query.dim() == 3 and not self.batch_first
    q, k, v = [_heads(t[None] if one else t.transpose(0, 1) if sequence_first else t, self.num_heads) for t in qkv]
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
        attn_mask = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask
    merged = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)
    merged = merged[0] if one else merged.transpose(0, 1) if sequence_first else merged
    return F.linear(merged, self.out_proj.weight, self.out_proj.bias), None


def _heads(t: Tensor, count: int) -> Tensor:
    """[N, heads, length, depth] of [N, length, channels]."""
    return t.unflatten(-1, (count, -1)).transpose(1, 2)
