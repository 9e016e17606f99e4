"""SA²VP: Spatially Aligned-and-Adapted Visual Prompt (Pei et al., AAAI 2024, arXiv 2312.10376).

A frozen vision transformer encodes the image; a second pathway passes a learned MAP of prompt tokens, one for every
image token, through the same frozen blocks. At each block a small interaction lets each token of one pathway attend to
the 3x3 neighbourhood of its own position in the other. Only the prompt maps, one bottleneck adapter per block and the
head are trained.

Written from the equations, and checked against outputs recorded from the authors' code (github tommy-xq/SA2VP, commit
35674e7, MIT). The backbones are timm's, by Ross Wightman. Section numbers are those of the method in the notebook. The
variant on a Swin is in `swin`; the authors' names of tensors and their second attention in `released`.

Shapes: b images, N tokens (token 0 is the [CLS] token of a ViT, then the patches in raster order), of which n are
computed, D channels, h heads of e channels, r the width of the bottleneck, s the weight of the fusion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...backbones import check_input
from ...errors import BadParameter, Count, Share, check_choice
from ...io.config import configure
from ..layers import attend
from ..layers.attend import Attend
from ..layers.frozen import frozen_copy
from ..layers.mae import PLAIN_INPUT, plain_input
from ..layers.predicting import OnBackbone
from ..layers.state_dicts import OfficialModel
from .official import PaddedAttention, ReleasedViT


def plain_vit(backbone: nn.Module) -> bool:
    """Whether `backbone` is a timm ViT of the original's form, which the prompting methods run block by block: of
    `plain_input`, and its [CLS] token is read after the last norm."""
    return (
        plain_input(backbone)
        and backbone.global_pool == "token"
        and all(isinstance(part, nn.Identity) for part in (backbone.fc_norm, backbone.patch_drop))
    )


PLAIN_VIT = f"{PLAIN_INPUT}, whose [CLS] token is read"


PROMPT_WEIGHT = 0.2  # of the prompt pathway in the loss, as released
DROPOUT = 0.1
LEAST = 6  # interacting blocks: the first of each third is image to prompt, the others are prompt to image

Pathways = tuple[Tensor, Tensor]  # of the image and of the prompt
Named = dict[str, Tensor]  # intermediate results by name


def two_pathway_loss(
    logits_image: Tensor, logits_prompt: Tensor, target: Tensor, prompt_weight: float = PROMPT_WEIGHT
) -> Tensor:
    """(1 - w) CE(image pathway) + w CE(prompt pathway). Logits (b, classes), target (b,)."""
    on_image, on_prompt = F.cross_entropy(logits_image, target), F.cross_entropy(logits_prompt, target)
    return (1 - prompt_weight) * on_image + prompt_weight * on_prompt


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss for `fit`: cross-entropy, or `two_pathway_loss` where the model has two outputs. batch: images, labels."""
    images, target = batch
    output = model(images)
    if not isinstance(output, tuple):
        return F.cross_entropy(output, target)
    on_image, on_prompt = output
    return two_pathway_loss(on_image, on_prompt, target)


def neighbourhood(grid: tuple[int, int], radius: int | None = 1, class_token: bool = True) -> Tensor:
    """Attention mask of the interaction: boolean (N, N), rows are queries, True where a query may attend.

    A patch attends to the patches at most `radius` away in row and in column (None: all tokens, the unaligned control).
    The [CLS] token attends to all tokens, and no patch attends to it.
    """
    position = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    near = (position[:, None] - position[None]).abs().amax(-1) <= (math.inf if radius is None else radius)
    if not class_token:
        return near
    mask = F.pad(near, (1, 0, 1, 0), value=radius is None)
    mask[0] = True
    return mask


class AlignedAttention(Attend):
    """Cross-attention (3.2) as ONE masked attention: q (b, h, n, e), k and v (b, h, N, e), to (b, n, D).

    Queries fewer than N are the first ones. `mask`: boolean (N, N), see `neighbourhood`.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]  # it has its own mask
        return rearrange(super().forward(q, k, v, self.mask[: q.shape[2]]), "b h n e -> b n (h e)")

    def attention_map(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().attention_map(q, k, v, self.mask[: q.shape[2]])


class Adapter(nn.Module):
    """The trained part of an interaction: W2 GELU(W1 LN(z) + b1) + b2, with NO residual around it. z: (b, N, D)."""

    def __init__(self, dim: int, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor) -> Tensor:
        return self.dropout(self.up(self.dropout(F.gelu(self.down(self.norm(z))))))


class TwoPathways(OnBackbone, OfficialModel):
    """The part that SA²VP on a ViT and on a Swin share.

    Args:
        backbone: the encoder; a frozen copy is kept. As released, its dropout is active in training (VPT's is not).
        scale: s, the weight of the fusion (0.1, 0.5 or 1.5 in the released settings).
        grid: rows and columns of the interacting tokens.
        class_token: whether a [CLS] token comes before them.
        attention: "aligned", the plain file that gave the paper's numbers, or "padded", the `_acc` file added later.
        dropout: probability after the cross-attention and in the adapters.
    """

    def __init__(
        self,
        backbone: nn.Module,
        scale: float,
        grid: tuple[int, int],
        class_token: bool,
        attention: str = "aligned",
        dropout: float = DROPOUT,
    ):
        super().__init__()
        kinds = {"aligned": AlignedAttention, "padded": PaddedAttention}
        check_choice("attention", attention, kinds)
        self.backbone = frozen_copy(backbone)
        self.scale, self.grid = scale, (grid[0], grid[1])
        self.grad_checkpointing = False
        self.dropout = nn.Dropout(dropout)
        self.cross = kinds[attention](neighbourhood(grid, 1, class_token))

    def forward(self, images: Tensor) -> Tensor | Pathways:
        """Logits (b, classes) of images (b, 3, H, W), by the image pathway; in training by both, for `loss`."""
        image, prompt = self.forward_features(images)
        return (self.head(image), self.head(prompt)) if self.training else self.head(image)

    def interaction(self, i: int, proj: nn.Linear, q: Tensor, k: Tensor, v: Tensor, query: Tensor) -> Tensor:
        """F (3.3), (b, n, D): the attended neighbourhood plus the query itself, through adapter i."""
        return self.adapters[i](query + self.dropout(proj(self.cross(q, k, v))))

    def step(self, i: int, image: Tensor, prompt: Tensor, keep: int | None = None) -> tuple[Pathways, Named]:
        """Block i on both pathways, and the interaction of their inputs (3.4): the pathways, and F as "fusion"."""
        raise NotImplementedError

    def steps(self, image: Tensor, prompt: Tensor, keep: int | None = None) -> Iterator[tuple[Pathways, Named]]:
        """All blocks; of the last one only the first `keep` tokens, which the head reads."""
        for i in range(len(self.adapters)):
            kept = keep if i == len(self.adapters) - 1 else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                (image, prompt), out = checkpoint(self.step, i, image, prompt, kept, use_reentrant=False)
            else:
                (image, prompt), out = self.step(i, image, prompt, kept)
            yield (image, prompt), out

    def forward_intermediates(self, images: Tensor) -> tuple[Pathways, list[Named]]:
        """Both pathways' tokens after the last interacting block, two (b, N, D), and of each block its tokens and F.

        The entries of a block are "image" and "prompt", the tokens after it, and "fusion", each (b, N, D).
        """
        named = [
            out | {"image": image.flatten(1, -2), "prompt": prompt.flatten(1, -2)}
            for (image, prompt), out in self.steps(*self.embed(images))
        ]
        return (named[-1]["image"], named[-1]["prompt"]), named

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass, to save memory (timm's name for it)."""
        self.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    def count(self, head: bool = False) -> int:
        """The number of trainable parameters; the paper's percentage leaves the head out."""
        return sum(p.numel() for name, p in self.trained().items() if head or not name.startswith("head."))


class SA2VP(TwoPathways, ReleasedViT):
    """SA²VP on a plain ViT: any depth from 6 on divisible by 3, any width, patch grid and image size.

    Args:
        backbone: a timm `VisionTransformer` of the original's form (`vpt.plain_vit`); a frozen copy is kept.
        classes: number of classes.
        width: r, the width of the prompt maps and of the adapters (8, 16, 32 or 64 in the released settings).
        scale, attention: see `TwoPathways`.
        new_maps: how many new prompt maps join along the depth (2; a comment in the released code states 1 for Stanford
            Cars, but not at which block: here the first of the two).
        dropout: as released, also after the embeddings and in the MLPs of the frozen blocks.

    Raises `BadParameter`: a backbone that is not such a ViT.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        classes: Count,
        width: Count = 16,
        scale: float = 0.1,
        *,
        new_maps: int = 2,
        attention: str = "aligned",
        dropout: Share = DROPOUT,
    ):
        configure(self, locals())
        blocks = getattr(backbone, "blocks", ())
        usual = attend.pre_norm(blocks) and all(
            type(b.mlp) is Mlp and not any(n.startswith(("norm.", "gate.")) for n, _ in b.attn.named_parameters())
            for b in blocks  # the interaction has no norm and no gate before the projection
        )
        if not plain_vit(backbone) or not usual or len(blocks) % 3 or len(blocks) < LEAST:
            accepted = f"{PLAIN_VIT}; pre-norm, depth divisible by 3, {LEAST} or more"
            raise BadParameter("backbone", f"{type(backbone).__name__} of depth {len(blocks)}", accepted)
        check_choice("new_maps", new_maps, range(3))  # one joins at the start of each third but the first
        super().__init__(backbone, scale, backbone.patch_embed.grid_size, True, attention, dropout)
        dim, tokens, self.period = backbone.embed_dim, 1 + math.prod(self.grid), len(blocks) // 3
        self.attends = nn.ModuleList(Attend() for _ in blocks)
        for block in self.backbone.blocks:
            block.mlp.drop1.p = block.mlp.drop2.p = dropout

        self.prompt = nn.Parameter(torch.empty(1, tokens, width))
        self.prompt_proj = nn.Linear(width, dim)
        self.new_prompts = nn.Parameter(torch.empty(new_maps, 1, tokens, width))
        self.new_projs = nn.ModuleList(nn.Linear(width, dim) for _ in range(new_maps))
        self.gains = nn.Parameter(torch.empty(new_maps, dim))
        self.adapters = nn.ModuleList(Adapter(dim, width, dropout) for _ in blocks)
        self.head = nn.Linear(dim, classes)

        for tensor in (self.prompt, self.new_prompts):
            nn.init.trunc_normal_(tensor, std=0.02)
        nn.init.normal_(self.gains, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        for layer in (self.prompt_proj, *self.new_projs, *(x for a in self.adapters for x in (a.down, a.up))):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def embed(self, images: Tensor) -> Pathways:
        """Image tokens (b, N, D) and prompt tokens (3.1). Both get the SAME frozen position embedding.

        The prompt tokens do not depend on the image: (1, N, D), or (b, N, D) when dropout draws for each image.
        """
        vit, b = self.backbone, len(images)
        check_input(vit, images)
        patches = vit.patch_embed(images)  # (b, N - 1, D)
        image = torch.cat([vit.cls_token.expand(b, -1, -1), patches], dim=1) + vit.pos_embed  # (b, N, D)
        prompt = self.prompt_proj(self.prompt) + vit.pos_embed  # (1, N, D)
        return self.dropout(image), self.dropout(self._for_each(b, prompt))

    def step(self, i: int, image: Tensor, prompt: Tensor, keep: int | None = None) -> tuple[Pathways, Named]:
        """Block i on both pathways, and the interaction of their inputs (3.4): the pathways, and F as "fusion".

        F reads the block's inputs, through the q, k, v that T_i has computed.
        """
        b, proj, new = len(image), self.backbone.blocks[i].attn.proj, i // self.period - 1
        (image_out, prompt_out), ((q, k, v), (q_prompt, k_prompt, v_prompt)) = self.both(i, image, prompt, keep)
        if i % self.period:  # prompt to image
            fusion = self.interaction(i, proj, q[:, :, :keep], k_prompt, v_prompt, image[:, :keep])  # (b, n, D)
            return (image_out + self.scale * fusion, prompt_out), {"fusion": fusion}
        if 0 <= new < len(self.new_projs):
            fresh, _ = self.block(i, self.new_projs[new](self.new_prompts[new]), b, keep)
            prompt_out = prompt_out + self.gains[new] * fresh
        q_prompt = q_prompt.expand(b, -1, -1, -1)[:, :, :keep]
        fusion = self.interaction(i, proj, q_prompt, k, v, prompt[:, :keep])
        return (image_out, prompt_out + self.scale * fusion), {"fusion": fusion}

    def forward_features(self, images: Tensor) -> Pathways:
        """Input of the head (3.5): the [CLS] token of both pathways after the last norm, two (b, D)."""
        for pathways, _ in self.steps(*self.embed(images), keep=1):
            image, prompt = pathways
        return self.backbone.norm(image[:, 0]), self.backbone.norm(prompt[:, 0])

    # --- the frozen block T_i ---

    def both(self, i: int, image: Tensor, prompt: Tensor, keep: int | None) -> tuple[Pathways, tuple]:
        """T_i on both pathways: the first `keep` tokens of each, two (b, n, D), and q, k, v of each."""
        b = len(image)
        if i == 0:  # apart: no autograd through the image yet, and the prompts may still be one map for all images
            (image, qkv), (prompt, qkv_prompt) = self.block(i, image, b, keep), self.block(i, prompt, b, keep)
            return (image, prompt), (qkv, qkv_prompt)
        x, qkv = self.block(i, torch.cat([image, prompt]), 2 * b, keep)  # as one batch
        return halves(x), tuple(zip(*map(halves, qkv), strict=True))

    def block(self, i: int, x: Tensor, images: int, keep: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """T_i for the first `keep` tokens of x (b, N, D), or of one map (1, N, D); and its q, k, v (b, h, N, e)."""
        block, attn = self.backbone.blocks[i], self.backbone.blocks[i].attn
        h = block.norm1(x)
        q, k, v = attend.qkv(attn, h)  # each (b, h, N, e)
        a = attend.output(attn, h, self.attends[i](q[:, :, :keep], k, v))  # (b, n, D)
        x = x[:, :keep] + block.drop_path1(block.ls1(a))
        x = self._for_each(images, x)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), (q, k, v)

    def _for_each(self, images: int, x: Tensor) -> Tensor:
        """One map (1, n, D) for each image (b, n, D) where dropout draws for each; else as it is."""
        return x.expand(images, -1, -1) if self.dropout.training and self.dropout.p > 0 else x


def halves(x: Tensor) -> Pathways:
    """The two halves of a batch (2b, ...), of any b: `split` and `chunk` would fix it in an exported model."""
    first, second = rearrange(x, "(two b) ... -> two b ...", two=2).unbind()
    return first, second
