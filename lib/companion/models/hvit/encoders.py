"""The two encoders of H-ViT: patches of 256 px, and regions as grids of their patch embeddings.

Both are pre-norm ViTs, read out at the [CLS] token. Numbers in brackets are those of the equations in the notebook.

Shapes: b inputs of h w tokens, d the width, h heads of e channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import Amount, BadParameter, Count, Positive, Share, check_parts, typed
from ...io.config import configure
from ..layers.attend import attention_map, qkv
from ..layers.pos_embed import resize_pos_embed
from ..layers.state_dicts import OfficialModel, below
from . import official

LARGEST_CROP = 0.875  # of the side: DINO's global crops, for which both encoders' position embeddings are made

Named = dict[str, Any]  # intermediate results by name


class Encoder(OfficialModel):
    """A ViT over a grid of tokens, read out at its [CLS] token: the base of `PatchEncoder` and `RegionEncoder`.

    Args:
        side: tokens a side of the position embedding, which is resized to the input's grid on every forward pass.
        std: of the truncated normal that linear weights, [CLS] token and positions are drawn from. None: 1/sqrt(fan in)
            for weights, 0.3 for [CLS] token and positions: a small width needs it for outputs that depend on the input.
        drop_path: largest drop probability of stochastic depth, that of the last block.
    """

    FIRST: str  # the first layer's weight, in the authors' tensors too

    @typed
    def __init__(
        self,
        side: Count,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: Positive = 4,
        *,
        drop_path: Share = 0.0,
        std: Amount | None = 0.02,
    ):
        super().__init__()
        check_parts("heads", dim, heads)
        self.dim, self.heads, self.std, self.grad_checkpointing = dim, heads, std, False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, dim))
        rates, norm = [drop_path * i / max(depth - 1, 1) for i in range(depth)], partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
        )  # (2)
        self.norm = norm(dim)

    def _initialise(self) -> None:
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=self.std or 0.3)
        # at the paper's sizes the convolution keeps PyTorch's default, as in the authors' code
        drawn = nn.Linear if self.std else (nn.Linear, nn.Conv2d)
        for module in self.modules():
            if isinstance(module, drawn):
                nn.init.trunc_normal_(module.weight, std=self.std or module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (b, d, h, w) without positions."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> Tensor:
        """The input of the blocks (b, 1 + h w, d), z^0 = [cls; t] + p."""
        t = self.embed(x)  # (b, d, h, w)
        p = resize_pos_embed(self.pos_embed, t.shape[-2:])  # (1, 1 + h w, d)
        cls = self.cls_token.expand(len(t), -1, -1)  # (b, 1, d)
        return torch.cat([cls, rearrange(t, "b d h w -> b (h w) d")], 1) + p

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The [CLS] token (b, d) after the last norm.

        Args:
            x: (b, 3, H, W) pixels, or (b, d_in, n, n) embeddings.
            keep: (b, h w) bool, row by row: tokens that show tissue. The others are keys in no block. The [CLS] token
                always is a key, so in an image without tissue it attends to itself alone.
        """
        return self.norm(self._through(self.blocks, self.tokens(x), key_mask(keep))[:, 0])

    def forward_intermediates(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Named]:
        """As `forward`, and named results: all "tokens" (b, 1 + h w, d) after the last norm, and "attention"
        (b, h, 1 + h w), that of the last block's [CLS] query."""
        (*lower, last), mask = self.blocks, key_mask(keep)
        z = self._through(lower, self.tokens(x), mask)
        q, k, _ = qkv(last.attn, last.norm1(z))
        tokens = self.norm(self._through([last], z, mask))
        return tokens[:, 0], {"tokens": tokens, "attention": attention_map(q[:, :, :1], k, mask)[:, :, 0]}

    def _through(self, blocks: Iterable[nn.Module], z: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (b, 1 + h w, d) after some blocks, with the keys of `key_mask`."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            z = checkpoint(block, z, mask, use_reentrant=False) if recompute else block(z, mask)
        return z

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, which takes less memory."""
        self.grad_checkpointing = enable

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> Self:
        """The encoder of HIPT's or the authors' tensors (see `official.read_checkpoint`); DINO's head is not read.

        Args:
            heads: which no tensor depends on; None: as many as released encoders of that width have.

        Raises `BadCheckpoint`: names that are missing, unknown, or of another shape.
        """
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        return cls(**official.encoder_sizes(state, cls.FIRST, heads)).loaded(state, f"H-ViT's {cls.__name__}")


def key_mask(keep: Tensor | None) -> Tensor | None:
    """Which keys are attended to, (b, 1, 1, 1 + n) bool, of tokens `keep` (b, n); the [CLS] token always is."""
    return None if keep is None else rearrange(F.pad(keep.bool(), (1, 0), value=True), "b n -> b 1 1 n")


class PatchEncoder(Encoder):
    """The patch level: a ViT-S/16 on patches of 256 px, at pocket size anything smaller.

    Args:
        image: side of a patch in pixels.
        token: side of a token in pixels.
        side: of the position embedding, in tokens; by default that of DINO's largest crop.
        others: see `Encoder`.
    """

    FIRST = "patch_embed.proj.weight"

    def __init__(
        self,
        image: Count = 256,
        token: Count = 16,
        dim: Count = 384,
        depth: Count = 12,
        heads: Count = 6,
        *,
        side: Count | None = None,
        **others: Any,
    ):
        configure(
            self, {"image": image, "token": token, "dim": dim, "depth": depth, "heads": heads, "side": side} | others
        )
        super().__init__(side or int(image * LARGEST_CROP // token), dim, depth, heads, **others)
        self.image, self.token = image, token
        self.patch_embed = PatchEmbed(None, token, 3, dim, flatten=False)
        self._initialise()

    def embed(self, x: Tensor) -> Tensor:
        """(1), from pixels (b, 3, H, W), any multiple of the token's side."""
        if x.shape[-2] % self.token or x.shape[-1] % self.token:
            raise BadParameter("patches", tuple(x.shape), f"(B, 3, H, W), H and W multiples of {self.token}")
        return self.patch_embed(x)

    @classmethod
    def from_timm(cls, vit: VisionTransformer) -> Self:
        """The encoder with the outputs of a timm ViT, as `forward_features` of it; see `official.timm_encoder`."""
        sizes, state = official.timm_encoder(vit)
        return cls(**sizes).loaded(state, f"H-ViT's {cls.__name__}")


def patch_encoder(weights: str | Path, heads: int | None = None) -> PatchEncoder:
    """The frozen patch level of a file of HIPT's or the authors', or of a file of several levels, "patch." first.

    Args:
        heads: attention heads; by default one for each 64 channels.
    """
    state = official.read_checkpoint(weights)
    return PatchEncoder.from_official(below(state, "patch.", "vit_patch.") or state, heads)


class RegionEncoder(Encoder):
    """The region level: a ViT of width 192 over the grid of a region's patch embeddings.

    Args:
        patches: patches a side of the region that the position embedding is made for: 4, 8, 16 for 1024, 2048, 4096 px.
        inputs: width of the patch embeddings.
        side: of the position embedding, in patches; by default that of DINO's largest crop: 3, 7, 14.
        others: see `Encoder`.
    """

    FIRST = "phi.0.weight"

    def __init__(
        self,
        patches: Count = 8,
        inputs: Count = 384,
        dim: Count = 192,
        depth: Count = 6,
        heads: Count = 6,
        *,
        side: Count | None = None,
        **others: Any,
    ):
        sizes = {"patches": patches, "inputs": inputs, "dim": dim, "depth": depth, "heads": heads, "side": side}
        configure(self, sizes | others)
        super().__init__(side or int(patches * LARGEST_CROP), dim, depth, heads, **others)
        self.inputs = inputs
        self.phi = nn.Sequential(nn.Linear(inputs, dim), nn.GELU())
        self._initialise()

    def embed(self, x: Tensor) -> Tensor:
        """phi of (3), from patch embeddings (b, d_in, n, n), rows first."""
        return rearrange(self.phi(rearrange(x, "b d h w -> b h w d")), "b h w d -> b d h w")


def patches_of(regions: Tensor, side: int) -> Tensor:
    """The patches (m n n, 3, side, side) of regions (m, 3, n side, n side), row by row.

    Raises `BadParameter`: regions that are not square, or no whole patches."""
    if regions.shape[-2] != regions.shape[-1] or regions.shape[-1] % side:
        raise BadParameter("regions", tuple(regions.shape), f"(m, 3, R, R), R a multiple of {side}")
    return rearrange(regions, "m c (i h) (j w) -> (m i j) c h w", h=side, w=side)


def grids(patches: Tensor) -> Tensor:
    """The grids (m, d, n, n) of patch embeddings (m, n n, d)."""
    n = math.isqrt(patches.shape[1])
    return rearrange(patches, "m (i j) d -> m d i j", i=n, j=n)
