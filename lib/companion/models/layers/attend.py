"""Attention that figures can read: the one call of `scaled_dot_product_attention` of a paper's own layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask), (b, h, n, m) in float32, of queries (b, h, n, d) and keys (b, h, m, d).

    Args:
        mask: broadcastable to (b, h, n, m); boolean, True where a query may attend, or added to the scores.
    """
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    return (scores if mask is None else scores + mask).softmax(-1)


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v, (b, h, n, d), of queries (b, h, n, d), keys and values (b, h, m, d).

    It has no parameters. As a module of its own it can be watched: `viz.attention.Recorder` computes the map of each
    call from its inputs, so that the model keeps the fused kernel, which never forms a map.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def attention_map(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The map of a call with these arguments, (b, h, n, m)."""
        return attention_map(q, k, mask)
