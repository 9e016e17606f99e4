"""SA²VP: Spatially Aligned-and-Adapted Visual Prompt (Pei et al., AAAI 2024, arXiv 2312.10376).

A frozen vision transformer encodes the image; a second pathway passes a learned MAP of prompt tokens, one for every
image token, through the same frozen blocks. At each block a small interaction lets each token of one pathway attend to
the 3x3 neighbourhood of its own position in the other. Only the prompt maps, one bottleneck adapter per block and the
head are trained.

Written from the equations, and checked against outputs recorded from the authors' code (github tommy-xq/SA2VP, commit
35674e7, MIT). The backbones are timm's, by Ross Wightman. Section numbers are those of the method in the notebook.

Shapes: b images, N tokens (token 0 is the [CLS] token of a ViT, then the patches in raster order), of which n are
computed, D channels, h heads of e channels, r the width of the bottleneck, s the weight of the fusion.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from einops import rearrange
from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import BadCheckpoint, BadParameter, check_choice
from ..layers.attend import Attend
from ..layers.frozen import frozen_copy
from ..layers.state_dicts import Names, OfficialModel, depth, load_official, renamed
from ..layers.vpt import PLAIN_VIT, plain_vit

ATTENTION = ("aligned", "padded")
PROMPT_WEIGHT = 0.2  # of the prompt pathway in the loss, as released
DROPOUT = 0.1
LEAST = 6  # interacting blocks: the first of each third is image to prompt, the others are prompt to image

Pathways = tuple[Tensor, Tensor]  # of the image and of the prompt
Named = dict[str, Tensor]  # intermediate results by name


def _last(steps: Iterator[tuple[Pathways, Named]]) -> tuple[Pathways, Named]:
    return deque(steps, maxlen=1).pop()  # what the blocks before it return is freed at once


def _halves(x: Tensor) -> Pathways:
    """The two halves of a batch (2b, ...), of any b: `split` and `chunk` would fix it in an exported model."""
    first, second = rearrange(x, "(two b) ... -> two b ...", two=2).unbind()
    return first, second


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
    if isinstance(output, tuple):
        on_image, on_prompt = output
        return two_pathway_loss(on_image, on_prompt, target)
    return F.cross_entropy(output, target)


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


def padded_mask(mask: Tensor, radius: int, class_token: bool) -> Tensor:
    """The additive mask (N, N + 1) of the released `_acc` variant.

    There a neighbour outside the image is not masked: it is a key and a value of zeros. All of these have logit 0:
    m of them together are one zero key with log(m) added. The extra last column is that key.
    """
    outside = (2 * radius + 1) ** 2 - mask.sum(1, keepdim=True)
    if class_token:
        outside[0] = 0  # the [CLS] token attends to all tokens, none of them outside
    return torch.cat([torch.zeros(mask.shape).masked_fill(~mask, -math.inf), outside.float().log()], dim=1)


class AlignedAttention(Attend):
    """Cross-attention (3.2) as ONE masked attention: q (b, h, n, e), k and v (b, h, N, e), to (b, n, D).

    Queries fewer than N are the first ones.

    Args:
        mask: boolean (N, N), see `neighbourhood`, or the additive `padded_mask` (N, N + 1). With the latter the heads
            are joined to one as wide as the model, and a zero key and value are added at the end.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mask = self.mask[: q.shape[2]]  # (n, N)
        if mask.dtype != torch.bool:
            q, k, v = (rearrange(x, "b h n e -> b 1 n (h e)") for x in (q, k, v))
            k, v, mask = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), mask.to(q.dtype)  # a key more
        return q, k, v, mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]  # it has its own mask
        return rearrange(super().forward(*self._masked(q, k, v)), "b h n e -> b n (h e)")

    def attention_map(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().attention_map(*self._masked(q, k, v))


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


class TwoPathways(OfficialModel):
    """The part that SA²VP on a ViT and on a Swin share.

    Args:
        backbone: the encoder; a frozen copy is kept.
        scale: s, the weight of the fusion (0.1, 0.5 or 1.5 in the released settings).
        grid: rows and columns of the interacting tokens.
        class_token: whether a [CLS] token comes before them.
        attention: "aligned", the plain file that gave the paper's numbers, or "padded", the `_acc` file added later.
        dropout: probability after the cross-attention and in the adapters.
        frozen_dropout: whether dropout is active in the frozen blocks during training (as in the released code, unlike
            VPT's).
    """

    def __init__(
        self,
        backbone: nn.Module,
        scale: float,
        grid: tuple[int, int],
        class_token: bool,
        *,
        attention: str = "aligned",
        dropout: float = DROPOUT,
        frozen_dropout: bool = True,
    ):
        super().__init__()
        check_choice("attention", attention, ATTENTION)
        self.backbone = frozen_copy(backbone)
        self.scale, self.grid = scale, (grid[0], grid[1])
        self.frozen_dropout, self.grad_checkpointing = frozen_dropout, False
        self.dropout = nn.Dropout(dropout)
        mask = neighbourhood(grid, 1, class_token)
        self.cross = AlignedAttention(mask if attention == "aligned" else padded_mask(mask, 1, class_token))

    def train(self, mode: bool = True):
        """Training or eval mode; with `frozen_dropout=False` the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and self.frozen_dropout)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass, to save memory (timm's name for it)."""
        self.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    def count(self, head: bool = False) -> int:
        """The number of trainable parameters; the paper's percentage leaves the head out."""
        return sum(p.numel() for name, p in self.trained().items() if head or not name.startswith("head."))

    def forward(self, images: Tensor) -> Pathways:
        """Classify images (b, 3, H, W) by both pathways: two (b, classes); the first is the prediction."""
        image, prompt = self.forward_features(images)
        return self.head(image), self.head(prompt)

    def interaction(self, i: int, proj: nn.Linear, q: Tensor, k: Tensor, v: Tensor, query: Tensor) -> Tensor:
        """F (3.3), (b, n, D): the attended neighbourhood plus the query itself, through adapter i."""
        return self.adapters[i](query + self.dropout(proj(self.cross(q, k, v))))

    def step(self, i: int, image: Tensor, prompt: Tensor, keep: int | None = None) -> tuple[Pathways, Named]:
        """Block i on both pathways, and the interaction of their inputs (3.4): the pathways, and F as "fusion"."""
        raise NotImplementedError

    def _steps(self, image: Tensor, prompt: Tensor, keep: int | None = None) -> Iterator[tuple[Pathways, Named]]:
        """All blocks; of the last one only the first `keep` tokens, which the head reads."""
        for i in range(len(self.adapters)):
            kept = keep if i == len(self.adapters) - 1 else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                (image, prompt), out = checkpoint(self.step, i, image, prompt, kept, use_reentrant=False)
            else:
                (image, prompt), out = self.step(i, image, prompt, kept)
            yield (image, prompt), out

    # --- the authors' names ---

    def _renames(self) -> Sequence[tuple[str, str | Callable]]:
        """From our names to the authors': patterns and replacements, one after the other."""
        return (
            (r"^head\.", "class_head."),
            (r"(cross_attn\.\d+)\.norm", r"\1.ffn_norm"),
            (r"(cross_attn\.\d+)\.down", r"\1.ffn.fc1"),
            (r"(cross_attn\.\d+)\.up", r"\1.ffn.fc2"),
        )

    def official_names(self) -> Names:
        return renamed(self.state_dict(), self._renames())

    def _load_official(self, state: Mapping[str, Tensor], copies: Mapping[str, str]):
        """Load a state dict of the authors' code. `copies`: the frozen copies of a block in it, and their sources."""
        what, state, differ = f"SA²VP on {type(self.backbone).__name__}", dict(state), []
        for name in list(state):
            if name.endswith(("relative_position_index", "attn_mask", "num_batches_tracked")):
                del state[name]
            elif match := re.fullmatch(r"(.*)cross_attn\.(\d+)\.(attn\.\w+|attention_norm)\.(\w+)", name):
                stem, number, part, kind = match.groups()
                source, copied = f"{stem}{copies['block']}.{number}.{copies[part]}.{kind}", state.pop(name)
                if source in state and not torch.equal(copied, state[source]):
                    differ.append(f"{name} is no copy of {source}")
        if differ:
            raise BadCheckpoint(what, shapes=differ)
        load_official(self, state, self.official_names(), what)
        return self


class SA2VP(TwoPathways):
    """SA²VP on a plain ViT: any depth from 6 on divisible by 3, any width, patch grid and image size.

    Args:
        backbone: a timm `VisionTransformer` of the original's form (`vpt.plain_vit`); a frozen copy is kept.
        classes: number of classes.
        width: r, the width of the prompt maps and of the adapters (8, 16, 32 or 64 in the released settings).
        scale: s, the weight of the fusion.
        new_maps: how many new prompt maps join along the depth (2; a comment in the released code states 1 for Stanford
            Cars, but not at which block: here the first of the two).
        options: `attention`, `dropout` and `frozen_dropout` of `TwoPathways`. As released, `dropout` also acts after
            the embeddings and in the MLPs of the frozen blocks.

    Raises `BadParameter`: an option outside its choices, or a backbone that is not such a ViT.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        classes: int,
        width: int = 16,
        scale: float = 0.1,
        *,
        new_maps: int = 2,
        **options,
    ):
        blocks = getattr(backbone, "blocks", ())
        usual = all(isinstance(b, Block) and type(b.mlp) is Mlp and type(b.attn) is Attention for b in blocks)
        if not plain_vit(backbone) or not usual or len(blocks) % 3:
            raise BadParameter("backbone", type(backbone).__name__, f"{PLAIN_VIT}; pre-norm, depth divisible by 3")
        if len(blocks) < LEAST:
            accepted = f"{LEAST} or more: with {len(blocks)} the prompts never reach the prediction"
            raise BadParameter("backbone", f"depth {len(blocks)}", accepted)
        check_choice("new_maps", new_maps, (0, 1, 2))
        super().__init__(backbone, scale, backbone.patch_embed.grid_size, True, **options)
        dim, tokens, self.period = backbone.embed_dim, 1 + math.prod(self.grid), len(blocks) // 3
        self.attends = nn.ModuleList(Attend() for _ in blocks)
        for block in self.backbone.blocks:
            block.mlp.drop1.p = block.mlp.drop2.p = self.dropout.p

        self.prompt = nn.Parameter(torch.empty(1, tokens, width))
        self.prompt_proj = nn.Linear(width, dim)
        self.new_prompts = nn.Parameter(torch.empty(new_maps, 1, tokens, width))
        self.new_projs = nn.ModuleList(nn.Linear(width, dim) for _ in range(new_maps))
        self.gains = nn.Parameter(torch.empty(new_maps, dim))
        self.adapters = nn.ModuleList(Adapter(dim, width, self.dropout.p) for _ in blocks)
        self.head = nn.Linear(dim, classes)

        nn.init.trunc_normal_(self.prompt, std=0.02)
        nn.init.trunc_normal_(self.new_prompts, std=0.02)
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
        patches = vit.patch_embed(images)  # (b, N - 1, D)
        image = torch.cat([vit.cls_token.expand(b, -1, -1), patches], dim=1) + vit.pos_embed  # (b, N, D)
        prompt = self.prompt_proj(self.prompt) + vit.pos_embed  # (1, N, D)
        return self.dropout(image), self.dropout(self._for_each(b, prompt))

    def forward_features(self, images: Tensor) -> Pathways:
        """Input of the head (3.5): the [CLS] token of both pathways after the last norm, two (b, D)."""
        (image, prompt), _ = _last(self._steps(*self.embed(images), keep=1))
        norm = self.backbone.norm
        return norm(image[:, 0]), norm(prompt[:, 0]).expand(len(images), -1)

    def forward_intermediates(self, images: Tensor) -> tuple[Pathways, list[Named]]:
        """Both pathways' tokens after the last block, two (b, N, D), and of each block its tokens and F.

        The entries of a block are "image" and "prompt", the tokens after it, and "fusion", each (b, N, D).
        """
        steps = list(self._steps(*self.embed(images)))
        b = len(images)
        return steps[-1][0], [out | {"image": x, "prompt": y.expand(b, -1, -1)} for (x, y), out in steps]

    def attention(self, i: int, x: Tensor, keep: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The attention half of the frozen block T_i for the first `keep` tokens of x (b, N, D), and its q, k, v."""
        block, attn = self.backbone.blocks[i], self.backbone.blocks[i].attn
        qkv = attn.qkv(block.norm1(x))  # (b, N, 3 D)
        q, k, v = rearrange(qkv, "b n (c h e) -> c b h n e", c=3, h=attn.num_heads)  # each (b, h, N, e)
        q, k = attn.q_norm(q), attn.k_norm(k)
        a = rearrange(self.attends[i](q[:, :, :keep], k, v), "b h n e -> b n (h e)")  # (b, n, D)
        return x[:, :keep] + block.drop_path1(block.ls1(attn.proj(a))), (q, k, v)

    def mlp(self, i: int, x: Tensor) -> Tensor:
        """The MLP half of the frozen block T_i."""
        block = self.backbone.blocks[i]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def step(self, i: int, image: Tensor, prompt: Tensor, keep: int | None = None) -> tuple[Pathways, Named]:
        b, proj, to_prompt = len(image), self.backbone.blocks[i].attn.proj, i % self.period == 0
        if i == 0:  # apart: no autograd through the image yet, and the prompts may still be one map for all images
            x, (q, k, v) = self.attention(i, image, keep)
            y, (q_prompt, k_prompt, v_prompt) = self.attention(i, prompt, keep)
            next_image, next_prompt = self.mlp(i, x), self.mlp(i, self._for_each(b, y))
        else:  # as one batch
            both, qkv = self.attention(i, torch.cat([image, prompt.expand(b, -1, -1)]), keep)  # (2 b, n, D)
            next_image, next_prompt = _halves(self.mlp(i, both))
            (q, q_prompt), (k, k_prompt), (v, v_prompt) = map(_halves, qkv)

        new = i // self.period - 1
        if to_prompt and 0 <= new < len(self.new_projs):
            fresh, _ = self.attention(i, self.new_projs[new](self.new_prompts[new]), keep)  # (1, n, D)
            next_prompt = next_prompt + self.gains[new] * self.mlp(i, self._for_each(b, fresh))
        # F reads the block's inputs, through the q, k, v that T_i has computed
        if to_prompt:
            q = q_prompt.expand(b, -1, -1, -1)[:, :, :keep]
            fusion = self.interaction(i, proj, q, k, v, prompt[:, :keep])
            return (next_image, next_prompt + self.scale * fusion), {"fusion": fusion}
        fusion = self.interaction(i, proj, q[:, :, :keep], k_prompt, v_prompt, image[:, :keep])
        return (next_image + self.scale * fusion, next_prompt), {"fusion": fusion}

    def _for_each(self, images: int, x: Tensor) -> Tensor:
        """One map (1, n, D) for each image (b, n, D) where dropout draws for each; else as it is."""
        return x.expand(images, -1, -1) if self.dropout.training and self.dropout.p > 0 else x

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], *, heads: int | None = None, patch: int = 16, **options):
        """The model with a state dict of the authors' code (`Dual_model`, ViT) in it. The inverse is `to_official`.

        Sizes are read off the tensors; `heads` is not among them and defaults to heads of 64 channels. `options` are
        those of the class (scale and attention are not stored either).

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        root, need = "vit_base.transformer.", {"embeddings.position_embeddings", "embeddings.ppt", "encoder.deep_ppt"}
        absent = {root + n for n in need} | {"class_head.weight"}
        if absent - state.keys():
            raise BadCheckpoint("SA²VP on a ViT", missing=absent - state.keys())
        _, tokens, dim = state[root + "embeddings.position_embeddings"].shape
        mlp = state.get(root + "encoder.layer.0.ffn.fc1.bias", torch.empty(4 * dim))
        backbone = VisionTransformer(
            img_size=math.isqrt(tokens - 1) * patch,
            patch_size=patch,
            embed_dim=dim,
            depth=depth(state, root + "encoder.layer."),
            num_heads=heads or max(1, dim // 64),
            mlp_ratio=len(mlp) / dim,
            num_classes=0,
        )
        maps, width = state[root + "encoder.deep_ppt"].shape[0], state[root + "embeddings.ppt"].shape[-1]
        model = cls(backbone, len(state["class_head.weight"]), width, new_maps=maps, **options).eval()
        copies = {f"attn.to_{part[0]}": f"attn.{part}" for part in ("query", "key", "value")}
        copies |= {"block": "layer", "attn.to_out": "attn.out", "attention_norm": "attention_norm"}
        return model._load_official(state, copies)

    def _renames(self) -> Sequence[tuple[str, str | Callable]]:
        return (
            (r"^prompt", "embeddings.ppt"),
            (r"^new_prompts", "encoder.deep_ppt"),
            (r"^new_projs", "encoder.deep_proj"),
            (r"^gains", "encoder.cross_conv"),
            (r"^adapters", "encoder.cross_attn"),
            (r"^backbone\.pos_embed", "embeddings.position_embeddings"),
            (r"^backbone\.cls_token", "embeddings.cls_token"),
            (r"^backbone\.patch_embed\.proj", "embeddings.patch_embeddings"),
            (r"^backbone\.norm", "encoder.encoder_norm"),
            (r"^backbone\.blocks", "encoder.layer"),
            (r"(layer\.\d+)\.norm1", r"\1.attention_norm"),
            (r"(layer\.\d+)\.norm2", r"\1.ffn_norm"),
            (r"(layer\.\d+)\.mlp", r"\1.ffn"),
            (r"(layer\.\d+)\.attn\.proj", r"\1.attn.out"),
            *super()._renames(),
            (r"^(embeddings|encoder)", r"vit_base.transformer.\1"),
        )

    def official_names(self) -> Names:
        parts = ("query", "key", "value")
        return {
            ours: [str(name).replace("qkv", part) for part in parts] if ".attn.qkv." in name else name
            for ours, name in super().official_names().items()
        }


class SA2VPSwin(TwoPathways):
    """SA²VP on a Swin transformer: both pathways pass every block and merging, the interaction is in one stage.

    Args:
        backbone: a timm `SwinTransformer`; a frozen copy is kept.
        classes, width, scale: as in `SA2VP`.
        stage: which stage interacts, counted from 0 (the third, 14x14 tokens, in the paper); its number of blocks is
            divisible by 3, 6 or more.
        options: of `TwoPathways`. As released, `dropout` acts in the interactions alone; the frozen blocks have the
            stochastic depth that the backbone was built with (`drop_path_rate`, 0.2 as released).

    Raises `BadParameter`: an option outside its choices, or a backbone that is not such a Swin.
    """

    def __init__(
        self, backbone: SwinTransformer, classes: int, width: int = 8, scale: float = 0.5, *, stage: int = 2, **options
    ):
        if not isinstance(backbone, SwinTransformer):
            raise BadParameter("backbone", type(backbone).__name__, "a timm SwinTransformer")
        sizes = [len(layer.blocks) for layer in backbone.layers]
        usable = [number for number, size in enumerate(sizes) if size % 3 == 0 and size >= LEAST]
        if stage not in usable:
            raise BadParameter("stage", stage, f"one with {LEAST} blocks or more, divisible by 3: {usable}")
        blocks = backbone.layers[stage].blocks
        super().__init__(backbone, scale, blocks[0].input_resolution, False, **options)
        self.stage, self.period = stage, len(blocks) // 3
        self.prompt = nn.Parameter(torch.empty(1, math.prod(backbone.patch_embed.grid_size), width))
        self.prompt_proj = nn.Linear(width, backbone.patch_embed.proj.out_channels)
        dim = blocks[0].norm1.normalized_shape[0]
        self.adapters = nn.ModuleList(Adapter(dim, width, self.dropout.p) for _ in blocks)
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.trunc_normal_(self.prompt, std=0.02)
        for layer in (self.prompt_proj, self.head, *(x for a in self.adapters for x in (a.down, a.up))):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer is not self.head:  # its bias starts as PyTorch draws it, uniform in +-1 / sqrt(channels)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Pathways:
        """Classify images (b, 3, H, W) by both pathways: two (b, classes); the first is the prediction."""
        return _halves(self.head(torch.cat(self.forward_features(images))))

    def forward_features(self, images: Tensor) -> Pathways:
        """Input of the head: the mean of the tokens of both pathways after the last norm, two (b, D)."""
        both, _ = _last(self._steps(*self.embed(images)))
        x = torch.cat(both)  # (2 b, rows, columns, D)
        for layer in self.backbone.layers[self.stage + 1 :]:
            x = layer(x)
        return _halves(self.backbone.norm(x).mean((1, 2)))

    def forward_intermediates(self, images: Tensor) -> tuple[Pathways, list[Named]]:
        """Both pathways' tokens after the interacting stage, two (b, N, D), and of each of its blocks the tokens and F.

        The entries of a block are "image" and "prompt", the tokens after it, and "fusion", each (b, N, D).
        """
        found = []
        for (image, prompt), out in self._steps(*self.embed(images)):
            tokens = {"image": image.flatten(1, 2), "prompt": prompt.flatten(1, 2)}
            found.append(out | tokens)
        return (found[-1]["image"], found[-1]["prompt"]), found

    def embed(self, images: Tensor) -> Pathways:
        """Image and prompt tokens before the interacting stage, two (b, rows, columns, D)."""
        swin = self.backbone
        image = swin.patch_embed(images)
        prompt = swin.patch_embed.norm(self.prompt_proj(self.prompt)).view(1, *image.shape[1:]).expand_as(image)
        for layer in swin.layers[: self.stage]:  # the image pathway depends on no trainable parameter yet: no autograd
            image, prompt = layer(image), layer(prompt)
        downsample = swin.layers[self.stage].downsample
        return downsample(image), downsample(prompt)

    def step(self, i: int, image: Tensor, prompt: Tensor, keep: int | None = None) -> tuple[Pathways, Named]:
        block, attn = self.backbone.layers[self.stage].blocks[i], self.backbone.layers[self.stage].blocks[i].attn
        next_image, next_prompt = _halves(block(torch.cat([image, prompt])))
        to_prompt = i % self.period == 0
        source, query = (image, prompt) if to_prompt else (prompt, image)
        # the released code copies LN1 with eps 1e-6 where Swin's own has 1e-5, so q, k, v cannot be shared here
        norm = block.norm1
        normed = F.layer_norm(torch.cat([query, source]), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
        query_normed, source_normed = _halves(normed.flatten(1, 2))  # (b, N, D)
        d = attn.qkv.in_features
        q = F.linear(query_normed, attn.qkv.weight[:d], attn.qkv.bias[:d])  # (b, N, D)
        kv = F.linear(source_normed, attn.qkv.weight[d:], attn.qkv.bias[d:])  # (b, N, 2 D)
        q = rearrange(q, "b n (h e) -> b h n e", h=attn.num_heads)
        k, v = rearrange(kv, "b n (c h e) -> c b h n e", c=2, h=attn.num_heads)
        fusion = self.interaction(i, attn.proj, q, k, v, query.flatten(1, 2))  # (b, N, D)
        added = self.scale * fusion.view_as(image)
        both = (next_image, next_prompt + added) if to_prompt else (next_image + added, next_prompt)
        return both, {"fusion": fusion}

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        image_size: int = 224,
        heads: tuple[int, ...] | None = None,
        drop_path: float = 0.0,
        **options,
    ):
        """The model with a state dict of the authors' code (`Dual_model`, Swin) in it. The inverse is `to_official`.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        need = {"vit_base.patch_embed.deep_ppt", "vit_base.patch_embed.proj.weight", "class_head.weight"}
        if need - state.keys():
            raise BadCheckpoint("SA²VP on a Swin", missing=need - state.keys())
        table = r"vit_base\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table"
        blocks = [(int(m[1]), int(m[2])) for name in state if (m := re.match(table, name))]
        stages = sorted({stage for stage, _ in blocks})
        tables = [state[f"vit_base.layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in stages]
        kernel = state["vit_base.patch_embed.proj.weight"]
        backbone = SwinTransformer(
            img_size=image_size,
            patch_size=kernel.shape[-1],
            embed_dim=kernel.shape[0],
            depths=tuple(sum(stage == s for stage, _ in blocks) for s in stages),
            num_heads=heads or tuple(t.shape[1] for t in tables),
            window_size=(math.isqrt(len(tables[0])) + 1) // 2,
            drop_path_rate=drop_path,
            num_classes=0,
        )
        width = state["vit_base.patch_embed.deep_ppt"].shape[-1]
        copies = {"block": "blocks", "attn.qkv": "attn.qkv", "attn.to_out": "attn.proj", "attention_norm": "norm1"}
        return cls(backbone, len(state["class_head.weight"]), width, **options).eval()._load_official(state, copies)

    def _renames(self) -> Sequence[tuple[str, str | Callable]]:
        return (
            (r"^prompt_proj", "backbone.patch_embed.proj_ppt"),
            (r"^prompt$", "backbone.patch_embed.deep_ppt"),
            (r"^adapters", f"backbone.layers.{self.stage}.cross_attn"),
            # timm merges patches at the start of a stage, the original at the end of the one before
            (r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample"),
            *super()._renames(),
            (r"^backbone", "vit_base"),
        )
