"""H-ViT's checkpoints: tensors under the authors' names, sizes read from them, and the weights of timm's ViTs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ...backbones import read_state
from ...errors import BadParameter
from ..layers.attend import check_pre_norm
from ..layers.state_dicts import check_names, depth

# our names to the authors'
NAMES = (
    (r"^(patch|region)\.", r"vit_\1."),
    (r"^slide\.(phi|rho)\.", r"global_\1."),
    (r"^slide\.transformer\.", "global_transformer."),
    (r"^slide\.pool\.content\.", "global_attn_pool.attention_a.0."),
    (r"^slide\.pool\.gate\.", "global_attn_pool.attention_b.0."),
    (r"^slide\.pool\.score\.", "global_attn_pool.attention_c."),
    (r"^slide\.classifier\.", "classifier."),
    (r"^slide\.thresholds$", "b"),
    (r"^slide\.position\.embedder\.", "pos_encoder.embedder."),
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of HIPT's or the authors' file without the prefixes of wrappers; of a DINO checkpoint, the teacher.

    Raises `CorruptFile` for a file that cannot be read.
    """
    return {re.sub(r"^(module\.)?(backbone\.)?", "", name): value for name, value in read_state(path).items()}


def encoder_sizes(state: Mapping[str, Tensor], layer: str, heads: int | None = None) -> dict[str, Any]:
    """The sizes of an encoder, as arguments of its class.

    Args:
        layer: the name of its first layer's weight, of the patch or of the region level.
        heads: None: one for 64 channels at the patch level, 32 at the region level.

    Raises `BadCheckpoint`: a state dict without such an encoder.
    """
    check_names(state, [layer, "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"], "an encoder of H-ViT")
    side, dim = math.isqrt(state["pos_embed"].shape[1] - 1), state["cls_token"].shape[-1]
    if layer == "phi.0.weight":
        inputs, width = {"inputs": state[layer].shape[1]}, 32
    else:  # a position embedding of 14 x 14 is made for patches of 16 x 16 tokens, see LARGEST_CROP
        token, width = state[layer].shape[-1], 64
        inputs = {"image": math.ceil(side / 0.875) * token, "token": token}
    mlp_ratio, count = len(state["blocks.0.mlp.fc1.weight"]) / dim, max(dim // width, 1) if heads is None else heads
    return {
        **inputs,
        "side": side,
        "dim": dim,
        "depth": depth(state, "blocks."),
        "heads": count,
        "mlp_ratio": mlp_ratio,
    }


def timm_encoder(vit: VisionTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a `PatchEncoder` that gives the outputs of a timm ViT, and its tensors.

    LayerScale, which H-ViT's blocks lack, multiplies the output of a linear layer: it is folded into that layer.

    Raises `BadParameter`: a ViT with register tokens, without a [CLS] token, or for images that are not square.
    """
    check_pre_norm("vit", vit)
    side, columns = vit.patch_embed.grid_size
    token = vit.patch_embed.patch_size[0]
    if vit.num_prefix_tokens != 1 or columns != side:
        made = f"{vit.num_prefix_tokens} prefix tokens, grid {(side, columns)}"
        raise BadParameter("vit", made, "one [CLS] token and a square grid of patches")
    state = {name: value for name, value in vit.state_dict().items() if ".ls" not in name and "head." not in name}
    for i, block in enumerate(vit.blocks):
        for layer, scale in ((f"blocks.{i}.attn.proj", block.ls1), (f"blocks.{i}.mlp.fc2", block.ls2)):
            gamma = getattr(scale, "gamma", torch.ones(1)).detach()
            state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
            state[f"{layer}.bias"] = gamma * state.get(f"{layer}.bias", torch.zeros(len(state[f"{layer}.weight"])))
    sizes = encoder_sizes(state, "patch_embed.proj.weight", vit.blocks[0].attn.num_heads)
    return sizes | {"image": side * token}, state
