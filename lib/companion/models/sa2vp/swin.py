"""SA²VP on a Swin transformer; shapes as in `model`."""

from __future__ import annotations

import math
from functools import partial

import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import check_input
from ...errors import BadParameter, Count, Share, check_choice
from ...io.config import configure
from .model import DROPOUT, LEAST, Adapter, Named, Pathways, TwoPathways, halves
from .official import ReleasedSwin


class SA2VPSwin(TwoPathways, ReleasedSwin):
    """SA²VP on a Swin transformer: both pathways pass every block and merging, the interaction is in one stage.

    Args:
        backbone: a timm `SwinTransformer`; a frozen copy is kept, with the stochastic depth that it was built with
            (`drop_path_rate`, 0.2 as released).
        classes, width, scale, attention: as in `model.SA2VP`.
        stage: which stage interacts, counted from 0 (the third, 14x14 tokens, in the paper); its number of blocks is
            divisible by 3, 6 or more.
        dropout: as released, in the interactions alone.

    Raises `BadParameter`: the stage has another number of blocks.
    """

    def __init__(
        self,
        backbone: SwinTransformer,
        classes: Count,
        width: Count = 8,
        scale: float = 0.5,
        *,
        stage: int = 2,
        attention: str = "aligned",
        dropout: Share = DROPOUT,
    ):
        configure(self, locals())
        check_choice("stage", stage, range(len(backbone.layers)))
        blocks = backbone.layers[stage].blocks
        if len(blocks) % 3 or len(blocks) < LEAST:
            accepted = f"one with {LEAST} blocks or more, divisible by 3"
            raise BadParameter("stage", f"{stage} with {len(blocks)} blocks", accepted)
        super().__init__(backbone, scale, blocks[0].input_resolution, False, attention, dropout)
        self.stage, self.period = stage, len(blocks) // 3
        self.prompt = nn.Parameter(torch.empty(1, math.prod(backbone.patch_embed.grid_size), width))
        self.prompt_proj = nn.Linear(width, backbone.patch_embed.proj.out_channels)
        dim = blocks[0].norm1.normalized_shape[0]
        self.adapters = nn.ModuleList(Adapter(dim, width, dropout) for _ in blocks)
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.trunc_normal_(self.prompt, std=0.02)
        for layer in (self.prompt_proj, self.head, *(x for a in self.adapters for x in (a.down, a.up))):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer is not self.head:  # its bias starts as PyTorch draws it, uniform in +-1 / sqrt(channels)
                nn.init.zeros_(layer.bias)

    def embed(self, images: Tensor) -> Pathways:
        """Image and prompt tokens before the interacting stage, two (b, rows, columns, D)."""
        swin = self.backbone
        check_input(swin, images)
        image = swin.patch_embed(images)
        prompt = swin.patch_embed.norm(self.prompt_proj(self.prompt)).view(1, *image.shape[1:]).expand_as(image)
        for layer in (*swin.layers[: self.stage], swin.layers[self.stage].downsample):
            image, prompt = layer(image), layer(prompt)
        return image, prompt

    def step(self, i: int, image: Tensor, prompt: Tensor, keep: int | None = None) -> tuple[Pathways, Named]:
        """As `SA2VP.step`, but all tokens leave a block."""
        block = self.backbone.layers[self.stage].blocks[i]
        to_prompt = i % self.period == 0
        source, query = (image, prompt) if to_prompt else (prompt, image)
        d = block.attn.proj.in_features
        (q,), (k, v) = self.projected(block, query, slice(d)), self.projected(block, source, slice(d, None))
        fusion = self.interaction(i, block.attn.proj, q, k, v, query.flatten(1, 2))  # (b, N, D)
        added = self.scale * fusion.view_as(image)
        image, prompt = halves(block(torch.cat([image, prompt])))  # as one batch
        pathways = (image, prompt + added) if to_prompt else (image + added, prompt)
        return pathways, {"fusion": fusion}

    @staticmethod
    def projected(block: nn.Module, x: Tensor, part: slice) -> Tensor:
        """q, or k and v, (1 or 2, b, h, N, e), of tokens (b, rows, columns, D); `part` of the rows of qkv.

        The released code copies LN1 with eps 1e-6 where Swin's own has 1e-5, so those of the block cannot be shared.
        """
        norm, attn = block.norm1, block.attn
        x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, 1e-6)
        x = F.linear(x, attn.qkv.weight[part], None if attn.qkv.bias is None else attn.qkv.bias[part])
        e = attn.proj.in_features // attn.num_heads
        return rearrange(x, "b y x (c h e) -> c b h (y x) e", h=attn.num_heads, e=e)

    def forward_features(self, images: Tensor) -> Pathways:
        """Input of the head: the pooled tokens of both pathways after the last norm, two (b, D)."""
        for pathways, _ in self.steps(*self.embed(images)):
            image, prompt = pathways
        for layer in (*self.backbone.layers[self.stage + 1 :], self.backbone.norm):
            image, prompt = layer(image), layer(prompt)
        pool = partial(self.backbone.forward_head, pre_logits=True)
        return pool(image), pool(prompt)
