"""Visual Prompt Tuning, shallow and deep (Jia et al., ECCV 2022, arXiv 2203.12119): the nearest baseline."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import check_input
from ...errors import BadParameter, Count, Share, Whole
from ...io.config import configure
from ..layers.classifying import OnFrozen, head
from .model import PLAIN_VIT, plain_vit


class VPT(OnFrozen):
    """Visual Prompt Tuning on a ViT or a Swin: a few learned tokens join the sequence of the frozen encoder.

    Shallow: p tokens enter before the first block and go through all of them. Deep: each block has its own p tokens,
    which replace those of the previous block. On a ViT they are between the [CLS] token and the patches; on a Swin they
    are added to every window and removed before patch merging.

    Args:
        backbone: a timm `VisionTransformer` (see `plain_vit`) or `SwinTransformer`; its copy is frozen, and in eval
            mode while training, as in VPT's own code.
        classes: number of classes.
        tokens: p, the number of prompt tokens; 0: the backbone alone.
        deep: VPT-Deep, else VPT-Shallow.
        dropout: probability on the prompts while training (0.1 in VPT).

    Raises `BadParameter`: another backbone, or a Swin whose windows do not divide its maps.
    """

    def __init__(self, backbone: nn.Module, classes: Count, tokens: Whole = 8, deep: bool = True, dropout: Share = 0.1):
        configure(self, locals())
        super().__init__(backbone)
        if plain_vit(backbone):
            dims = [backbone.embed_dim] * (len(backbone.blocks) if deep else 1)
        elif isinstance(backbone, SwinTransformer):
            blocks = [block for layer in backbone.layers for block in layer.blocks]
            dims = [block.norm1.normalized_shape[0] for block in (blocks if deep else blocks[:1])]
            for sides, window in ((block.input_resolution, block.window_size) for block in blocks):
                if sides[0] % window[0] or sides[1] % window[1]:
                    raise BadParameter("backbone", f"maps of {sides}", f"a Swin whose windows of {window} divide them")
        else:
            raise BadParameter("backbone", type(backbone).__name__, f"{PLAIN_VIT}; or a SwinTransformer")
        self.tokens, self.deep = tokens, deep
        self.dropout = nn.Dropout(dropout)
        patch = math.prod(backbone.patch_embed.patch_size)
        bounds = [math.sqrt(6 / (3 * patch + dim)) for dim in dims]
        self.prompts = nn.ParameterList(
            nn.Parameter(torch.empty(1, tokens, dim).uniform_(-v, v)) for v, dim in zip(bounds, dims, strict=True)
        )
        self.head = head(backbone.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        check_input(self.backbone, images)
        run = self._vit if isinstance(self.backbone, VisionTransformer) else self._swin
        return self.head(run(images))

    def _prompt(self, i: int, batch: int) -> Tensor:
        return self.dropout(self.prompts[i].expand(batch, -1, -1))

    def _vit(self, images: Tensor) -> Tensor:
        vit, b = self.backbone, len(images)
        x = torch.cat([vit.cls_token.expand(b, -1, -1), vit.patch_embed(images)], dim=1) + vit.pos_embed
        for i, block in enumerate(vit.blocks):
            if i == 0:
                x = torch.cat([x[:, :1], self._prompt(0, b), x[:, 1:]], dim=1)
            elif self.deep:
                x = torch.cat([x[:, :1], self._prompt(i, b), x[:, 1 + self.tokens :]], dim=1)
            x = block(x)
        return vit.norm(x[:, 0])

    def _swin(self, images: Tensor) -> Tensor:
        swin, b, i = self.backbone, len(images), 0
        x = swin.patch_embed(images)
        prompt = self._prompt(0, b)
        for layer in swin.layers:
            x = layer.downsample(x)
            if not self.deep and prompt.shape[-1] != x.shape[-1]:
                # merging concatenates four neighbours: a prompt of the shallow variant is concatenated with itself
                merging = layer.downsample
                prompt = merging.reduction(merging.norm(prompt.repeat(1, 1, 4)))
            for block in layer.blocks:
                if self.deep:
                    prompt = self._prompt(i, b)
                x, prompt = self._swin_block(block, x, prompt, onward=not self.deep)
                i += 1
        return swin.forward_head(swin.norm(x), pre_logits=True)

    @staticmethod
    def _swin_block(block: nn.Module, x: Tensor, prompt: Tensor, onward: bool) -> tuple[Tensor, Tensor]:
        """A frozen Swin block on x (b, rows, columns, D) with prompts (b, p, D) in front of each of N windows.

        Prompts have no position, so there is no relative position bias to or from them, and shifting does not mask
        them. Where they go `onward` to the next block, their output is the mean over the windows.
        """
        attn, p, (wr, wc) = block.attn, prompt.shape[1], block.window_size
        shift = tuple(block.shift_size)
        if x.shape[1] % wr or x.shape[2] % wc:
            accepted = f"of a size that has whole windows of {wr} x {wc} at each level, such as the one of the weights"
            raise BadParameter("images", f"{x.shape[1]} x {x.shape[2]} positions at a level", accepted)
        windows = {"b": len(x), "h": x.shape[1] // wr, "p": wr, "q": wc}
        normed = torch.roll(block.norm1(x), (-shift[0], -shift[1]), dims=(1, 2))
        y = rearrange(normed, "b (h p) (w q) d -> b (h w) (p q) d", **windows)
        tokens = torch.cat([block.norm1(prompt)[:, None].expand(-1, y.shape[1], -1, -1), y], dim=2)  # (b, N, p + n, D)
        q, k, v = rearrange(attn.qkv(tokens.flatten(0, 1)), "n t (c h e) -> c n h t e", c=3, h=attn.num_heads)
        bias = attn._get_rel_pos_bias()
        mask = block.get_attn_mask(x) if block.dynamic_mask else block.attn_mask  # dynamic: of images of any size
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x), 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(bias, (p, 0, p, 0)))
        y = attn.proj(rearrange(y, "(b n) h t e -> b n t (h e)", b=len(x)))  # (b, N, p + n, D)
        if onward:
            prompt = prompt + y[:, :, :p].mean(1)
        y = rearrange(y[:, :, p:], "b (h w) (p q) d -> b (h p) (w q) d", **windows)
        x = x + torch.roll(y, shift, dims=(1, 2))
        x = x + block.mlp(block.norm2(x))
        return x, prompt + block.mlp(block.norm2(prompt)) if onward else prompt
