"""PromptPAR's image tower: a CLIP with deep prompts, in one global group and one group for each strip of the image.

Shapes: b images, R regions (strips), P prompts per layer, J prompted layers, N = Gh · Gw patches, L = 1 + R + P + N
tokens, W the width of the tower, E that of the space it shares with the text. Tokens are in the layout of the paper's
figure 2,

    [CLS, P_0] [LC_1, P_1] ... [LC_R, P_R] [patches, row by row]

with LC_r the [CLS] token of region r and P_r its prompts. A prompt that the next layer replaces contributes keys and
values only, and no token, which changes no output.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import BadParameter, Share, Whole, check_images, typed
from ..layers.attend import attention_map
from ..layers.clip_prompting import check_depth, checked_clip
from ..layers.frozen import frozen_copy

Out = dict[str, Tensor]  # intermediate results by name


@typed
@dataclass(frozen=True)
class Settings:
    """What PromptPAR adds to its CLIP and its ViT; the defaults are the published ones.

    Attributes:
        prompts: P, the number of prompts in all 1 + R groups together. 0: the tower without prompts.
        regions: R. 0: all prompts are global, and there is no similarity.
        depth: J, the prompted layers; None: all layers of the tower.
        overlap: rows that neighbouring strips share.
        masked: whether the regions' tokens attend to their strips only.
        text_prompts: prompts of the text tower per layer and sentence. They have no effect; they exist, frozen, so that
            the authors' checkpoints load and their parameters are counted.
        mm_layers: blocks of the fusion. 0: one linear layer over the token axis (the authors' ablation).
        visual_embed: a trained linear layer on the image tokens before the fusion, which the authors added in May 2025.
            Without it E and the width of the fusion must be equal.
        drop_path: probability that the last fusion block is skipped for an image during training.
        threshold: of `PromptPAR.aggregate`.
        official_quirks: as released, where the code differs from the method: no last norm on the image tower's tokens;
            row 0 of the similarity is the first global prompt, not [CLS]; the last image's regions count for the whole
            batch; prompts start as for patches of 14 pixels; and `released_strips`. Requires 4 regions, or none, and
            groups of equal size.
    """

    prompts: Whole = 50
    regions: Whole = 4
    depth: int | None = None
    overlap: Whole = 2
    masked: bool = True
    text_prompts: Whole = 3
    mm_layers: Whole = 1
    visual_embed: bool = False
    drop_path: Share = 0.1
    threshold: Share = 0.5
    official_quirks: bool = False


PUBLISHED = Settings()


# --- strips and groups ------------------------------------------------------------------------------------------------


def strips(rows: int, regions: int, overlap: int) -> list[tuple[int, int]]:
    """The first row and the row after the last of each strip; neighbours share `overlap` rows.

    16 rows in 4 strips with 2 shared ones: 0 to 4, 3 to 8, 7 to 12, 11 to 15, as published.
    """
    cuts = [r * rows // regions for r in range(regions + 1)]
    above = overlap // 2
    return [(max(0, low - above), min(rows, high + overlap - above)) for low, high in itertools.pairwise(cuts)]


def group_sizes(prompts: int, regions: int) -> list[int]:
    """The number of prompts, of P, in each of the 1 + R groups: as even as possible, larger groups first."""
    return [prompts // (regions + 1) + (r < prompts % (regions + 1)) for r in range(regions + 1)]


def released_strips(grid: tuple[int, int], overlap: int) -> list[tuple[int, int]]:
    """The first patch and the patch after the last of each of four strips, as released.

    Strips begin at patches 0, 48, 112 and 176 for every grid, and have the correct number of patches: right only for
    16x16 patches and an overlap of 2.
    """
    rows, columns = grid
    inner, outer = rows // 4 + 2 * (overlap // 2), rows // 4 + overlap // 2
    return [(s, s + columns * size) for s, size in zip((0, 48, 112, 176), (outer, inner, inner, outer), strict=True)]


def region_mask(
    grid: tuple[int, int], prompts: int, regions: int = 4, overlap: int = 2, official_quirks: bool = False
) -> Tensor:
    """(L, L), True where a token (row) must not attend to another (column), both in the layout of the paper.

    A token of region r >= 1 attends to its own group and the patches of its strip; all others attend to everything.

    Args:
        grid: rows and columns of patches.
        official_quirks: with `released_strips`.
    """
    rows, columns = grid
    spans = [(columns * first, columns * last) for first, last in strips(rows, regions, overlap)] if regions else []
    if official_quirks:
        spans = released_strips(grid, overlap)
    sizes = enumerate(group_sizes(prompts, regions))
    group = torch.tensor([r for r, size in sizes for _ in range(1 + size)])  # of each token before the patches
    strip = torch.zeros(regions + 1, rows * columns, dtype=torch.bool)
    for r, (first, last) in enumerate(spans, 1):
        strip[r, first:last] = True
    seen = torch.cat([group[:, None] == group, strip[group]], dim=1) | (group == 0)[:, None]
    return torch.cat([~seen, torch.zeros(rows * columns, seen.shape[1], dtype=torch.bool)])


def tower_order(prompts: int, regions: int, patches: int) -> Tensor:
    """(L,), for each token of the paper's layout its position inside the tower: [CLS, LC_1 ... LC_R] [patches]
    [prompts]. There the prompts are last, so that no other token is moved when they are replaced."""
    before = 1 + regions + patches
    own = torch.arange(before, before + prompts).split(group_sizes(prompts, regions))
    groups = [torch.cat([torch.tensor([r]), group]) for r, group in enumerate(own)]
    return torch.cat([*groups, torch.arange(1 + regions, before)])


# --- the tower --------------------------------------------------------------------------------------------------------


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A norm computed in its own precision, float32 also in a CLIP of float16; the activations keep theirs."""
    return layer(x.to(next(layer.parameters(), x).dtype)).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> tuple[Tensor, Out]:
    """Attention of queries (b, n, W) to keys and values (b, m, W): (b, n, W), and "q" and "k" with a head axis."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))  # (b, h, n, d)
    return rearrange(a, "b h n d -> b n (h d)"), {"q": q, "k": k}


def prompted_block(block: nn.Module, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Out]:
    """One block of open_clip's on tokens (b, n, W), which also attend to `prompts` (m, W), the same for every image."""
    attn, width = block.attn, x.shape[-1]
    q, k, v = F.linear(norm(block.ln_1, x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)  # (b, n, W) each
    if prompts is not None:
        prompts = norm(block.ln_1, prompts.to(x.dtype))
        more = F.linear(prompts, attn.in_proj_weight[width:], attn.in_proj_bias[width:]).chunk(2, -1)  # (m, W) each
        k, v = (torch.cat([own, new.expand(len(x), -1, -1)], 1) for own, new in zip((k, v), more, strict=True))
    a, out = attention(q, k, v, attn.num_heads, mask)  # keys and values are (b, n + m, W)
    x = x + block.ls_1(attn.out_proj(a))
    return x + block.ls_2(block.mlp(norm(block.ln_2, x))), out


def uniform(*shape: int, patch: int) -> nn.Parameter:
    """A prompt initialised as in Visual Prompt Tuning: U(-v, v), v² = 6 / (3 patch² + width)."""
    bound = math.sqrt(6 / (3 * patch**2 + shape[-1]))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class PromptedTower(nn.Module):
    """The image tower of a frozen CLIP, from images (b, 3, H, W) to all tokens (b, L, E), with trained prompts and
    region tokens.

    Args:
        clip: an open_clip `CLIP` with a ViT; the model shares its tensors, frozen.

    Raises `BadParameter`: a CLIP or setting that does not match.
    """

    def __init__(self, clip: CLIP, settings: Settings):
        super().__init__()
        self.settings = s = settings
        self.clip = frozen_copy(checked_clip(clip))
        self.grad_checkpointing = False
        visual = self.clip.visual
        if other := [type(b).__name__ for b in visual.transformer.resblocks if type(b) is not ResidualAttentionBlock]:
            raise BadParameter("clip", f"one with a {other[0]}", "one whose image tower has plain blocks")
        self.grid = tuple(visual.grid_size)
        width, layers = visual.conv1.out_channels, len(visual.transformer.resblocks)
        depth = 0 if s.prompts == 0 else layers if s.depth is None else s.depth
        if s.prompts:
            check_depth(clip, depth)
        if s.official_quirks and s.regions and (s.regions != 4 or s.prompts % 5 or not s.prompts):
            accepted = "4 regions, or none, and a multiple of 5 prompts: the released code has no others"
            raise BadParameter("official_quirks", True, accepted)

        self.prompts = uniform(depth, s.prompts, width, patch=self.patch)
        self.region_tokens = nn.Parameter(torch.randn(s.regions, width) * width**-0.5)
        order, mask = tower_order(s.prompts, s.regions, math.prod(self.grid)), None
        inside = order.argsort()  # of each token in the tower, its position in the layout of the paper
        if s.regions and s.masked:
            forbidden = region_mask(self.grid, s.prompts, s.regions, s.overlap, s.official_quirks)
            mask = torch.zeros(forbidden.shape).masked_fill(forbidden[inside][:, inside], -torch.inf)
        positions = inside[: 1 + s.regions].clone()  # of [CLS] and each LC_r
        if s.official_quirks:
            positions[0] = 1
        for name, value in (("order", order), ("class_positions", positions), ("mask", mask)):
            self.register_buffer(name, value, persistent=False)

    @property
    def patch(self) -> int:
        """The side of a patch that the prompts' initial range assumes: as released 14 for every tower."""
        return 14 if self.settings.official_quirks else self.clip.visual.patch_size[0]

    def encode(self, images: Tensor) -> tuple[Tensor, Out]:
        """All tokens of the tower, (b, L, E), of images (b, 3, H, W); and `out` of its last layer."""
        visual, dtype = self.clip.visual, self.clip.visual.conv1.weight.dtype
        check_images(images, 3, *visual.image_size)
        trained = len(self.prompts) > 0 or len(self.region_tokens) > 0 or visual.proj.requires_grad
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            patches = rearrange(visual.conv1(images.to(dtype)), "b w gh gw -> b (gh gw) w")
            cls = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
            x = norm(visual.ln_pre, torch.cat([cls, patches], 1) + visual.positional_embedding.to(dtype))
            regions = norm(visual.ln_pre, self.region_tokens.to(dtype)).expand(len(images), -1, -1)  # (b, R, W)
            x, out = self.tower(torch.cat([x[:, :1], regions, x[:, 1:]], 1))  # (b, L, W)
            x = (x if self.settings.official_quirks else norm(visual.ln_post, x)) @ visual.proj  # (b, L, E)
            return x.float() if dtype == torch.float16 else x, out  # everything after CLIP is in float32

    def tower(self, x: Tensor) -> tuple[Tensor, Out]:
        """The prompted layers: (b, 1 + R + N, W), [CLS] tokens first, after CLIP's first norm, to (b, L, W) in the
        layout of the paper; and `out` of the last layer, see `tower_map`."""
        depth = len(self.prompts)
        out: Out = {}
        for i, block in enumerate(self.clip.visual.transformer.resblocks, 1):
            if i < depth:  # the next layer replaces these prompts: they contribute keys and values only
                x, out = self.layer(block, x, self.prompts[i - 1])
                continue
            if i == depth:
                x = torch.cat([x, self.prompts[-1].to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (b, L, W)
            x, out = self.layer(block, x)
        return x[:, self.order], out

    def layer(self, block: nn.Module, x: Tensor, prompts: Tensor | None = None) -> tuple[Tensor, Out]:
        """`prompted_block` with the mask of the regions, recomputed in the backward pass if set so."""
        mask = None if self.mask is None else self.mask[: x.shape[1]]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(prompted_block, block, x, prompts, mask, use_reentrant=False)
        return prompted_block(block, x, prompts, mask)

    def tower_map(self, out: Out) -> Tensor:
        """The attention map of the tower's last layer, (b, heads, L, L) in the layout of the paper, from its `out`."""
        return attention_map(out["q"], out["k"], self.mask)[:, :, self.order][..., self.order]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each layer in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable
