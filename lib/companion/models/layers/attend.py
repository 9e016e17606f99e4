"""timm's attention in parts, for papers that change what is between them, and attention that figures can read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter


def pre_norm(blocks: Iterable[nn.Module]) -> bool:
    """Whether these are timm's blocks x + attn(norm1(x)), then x + mlp(norm2(x)), with an attention that `qkv` and
    `output` compute."""
    return all(isinstance(block, Block) and type(block.attn) is Attention for block in blocks)


def check_pre_norm(name: str, vit: Any) -> None:
    """Raise `BadParameter` unless `vit` is of such blocks."""
    if not isinstance(vit, VisionTransformer) or not pre_norm(vit.blocks):
        found = ", ".join({type(block).__name__ for block in getattr(vit, "blocks", ())})
        accepted = "a timm VisionTransformer of its plain pre-norm blocks (`Block` with `Attention`)"
        raise BadParameter(name, f"{type(vit).__name__} of {found}", accepted)


def qkv(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (b, h, n, e) each, of tokens (b, n, d) in one of timm's attentions."""
    q, k, v = rearrange(attention.qkv(x), "b n (c h e) -> c b h n e", c=3, h=attention.num_heads)
    return attention.q_norm(q), attention.k_norm(k), v


def output(attention: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The output (b, n, d) of one of timm's attentions for the first n of its tokens x (b, N, d), from the values that
    these attend to, (b, h, n, e)."""
    y = rearrange(attended, "b h n e -> b n (h e)")
    norm, gate = (getattr(attention, name, None) for name in ("norm", "gate"))  # not in every release of timm
    y = y if norm is None else norm(y)
    y = y if gate is None else y * gate(x[:, : y.shape[1]]).sigmoid()
    return attention.proj_drop(attention.proj(y))


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask), (b, h, n, m) in float32, of queries (b, h, n, d) and keys (b, h, m, d).

    Args:
        mask: broadcastable to (b, h, n, m); boolean, True where a query may attend, or added to the scores. A query
            that may attend to nothing has a row of zeros, as it has zeros from `Attend`.
    """
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    if mask is None:
        return scores.softmax(-1)
    return (scores + mask).softmax(-1).masked_fill((mask == -math.inf).all(-1, keepdim=True), 0)


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
