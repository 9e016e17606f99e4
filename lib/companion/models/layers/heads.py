"""A pre-trained ViT of timm under a new head: its copy, its sizes in a state dict, and MAE's classifier."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from timm.layers import DropPath
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...errors import BadParameter, Count, Share, typed
from .state_dicts import check_names, depth


def like(encoder: VisionTransformer, drop_path: float = 0.0) -> VisionTransformer:
    """A copy of a ViT of timm in training mode, every tensor trainable; the encoder itself is not changed.

    Whatever its blocks have is copied: LayerScale, registers, norms of queries and keys, other heads in a block.

    Args:
        drop_path: stochastic depth, rising linearly from 0 to this probability in the last block.
    """
    if not isinstance(encoder, VisionTransformer | Eva | Beit) or isinstance(encoder, VisionTransformerDistilled):
        raise BadParameter("encoder", type(encoder).__name__, "a VisionTransformer of timm, or its EVA or BEiT")
    model = copy.deepcopy(encoder).train().requires_grad_(True)
    last = max(len(model.blocks) - 1, 1)
    for i, block in enumerate(model.blocks):
        dropped = drop_path * i / last
        block.drop_path1, block.drop_path2 = (DropPath(dropped) if dropped else nn.Identity() for _ in range(2))
    return model


def vit_sizes(state: Mapping[str, Tensor], heads: int | None = None, prefix: str = "") -> dict[str, Any]:
    """The arguments of timm's ViT for the encoder in a state dict.

    Args:
        heads: None: one for 64 channels.
        prefix: of the encoder's names.

    Raises `BadCheckpoint`: the state dict has no encoder.
    """
    needed = [prefix + name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")]
    check_names(state, needed, "a ViT")
    kernel, table, fc1 = (state[name] for name in needed)
    width, _, _, patch = kernel.shape
    return {
        "img_size": math.isqrt(table.shape[1] - 1) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth(state, f"{prefix}blocks."),
        "num_heads": heads or max(1, width // 64),
        "mlp_ratio": len(fc1) / width,
    }


def window_side(table: Tensor) -> int:
    """The side of the windows whose relative positions a table, ((2 side - 1)², heads), holds."""
    return (math.isqrt(len(table)) + 1) // 2


def swin_sizes(state: Mapping[str, Tensor], prefix: str, what: str) -> dict[str, Any]:
    """The arguments of timm's Swin for the encoder in a state dict, whose names begin with `prefix`.

    Raises `BadCheckpoint`: the state dict of `what` has no Swin.
    """
    stages = [f"{prefix}layers.{i}.blocks." for i in range(max(1, depth(state, f"{prefix}layers.")))]
    embed, tables = f"{prefix}patch_embed.proj.weight", [f"{s}0.attn.relative_position_bias_table" for s in stages]
    check_names(state, [embed, *tables], what)
    return {
        "patch_size": state[embed].shape[-1],
        "embed_dim": len(state[embed]),
        "depths": tuple(depth(state, stage) for stage in stages),
        "num_heads": tuple(state[table].shape[1] for table in tables),
        "window_size": window_side(state[tables[0]]),
    }


@typed
def classifier(
    encoder: VisionTransformer, classes: Count, *, probe: bool = False, drop_path: Share = 0.1
) -> VisionTransformer:
    """MAE's classifier on a copy of a ViT: images (B, 3, S, S) to logits (B, classes) of the mean patch token.

    The encoder's own last norm is dropped; `fc_norm` starts at 1 and 0, the last layer at N(0, 2e-5). A paper's own
    `classifier` calls it, and sets its config and what it predicts.

    Args:
        encoder: any ViT of timm, for instance `ECAMP.encoder`; it is copied.
        probe: train the last layer alone; `fc_norm` then keeps 1 and 0.
        drop_path: see `like`.
    """
    model = like(encoder, drop_path).requires_grad_(not probe)
    model.num_classes, model.global_pool, model.attn_pool, model.pool_include_prefix = classes, "avg", None, False
    model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.embed_dim, eps=1e-6)
    model.fc_norm.requires_grad_(not probe)
    model.head = nn.Linear(model.embed_dim, classes)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    return model
