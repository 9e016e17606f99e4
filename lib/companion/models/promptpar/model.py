"""PromptPAR: Pedestrian Attribute Recognition via CLIP based Prompt Vision-Language Fusion.

Wang et al., IEEE TCSVT 2024, arXiv 2312.10692.

A frozen CLIP encodes one sentence for each attribute. Deep prompts adapt its image tower in one global group and one
group for each horizontal strip of the image; the tokens of a strip's group attend to their group and their strip only.
One frozen ViT block fuses sentences and image tokens, and each attribute's token has its own linear head. A second loss
compares the strips' [CLS] tokens with the sentences.

Of the paper's text only the abstract and the figures were available: every formula here was read from the authors' code
(Event-AHU/OpenPAR, folder PromptPAR, MIT, read at 210ff55; the release nearest to the paper is f3be678) and implemented
independently; outputs are checked against recorded ones. The mistakes of that code are behind one argument,
`official_quirks`.

Three computations are saved without changing any output:

* Sentences are constants. The released prompts of the text tower come after the end of the text, and the tower is
  causal: they cannot reach the feature (`prompted_text` shows it). So the features are computed once.
* A prompt that the next layer replaces contributes keys and values only, and no token.
* Only the attributes' tokens are output by the fusion block; the others contribute keys and values only.

Shapes: b images, A attributes, R regions (strips), P prompts per layer, J prompted layers, N = Gh · Gw patches,
L = 1 + R + P + N tokens, W the width of the image tower, E that of the space it shares with the text, D that of the
fusion block, Wt that of the text tower. Tokens are in the layout of the paper's figure 2,

    [CLS, P_0] [LC_1, P_1] ... [LC_R, P_R] [patches, row by row]

with LC_r the [CLS] token of region r and P_r its prompts.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from open_clip.model import CLIP, convert_weights_to_lp
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import BadParameter, CorruptFile, check_choice
from ...ops.unpickle import load_torch
from ..layers import state_dicts
from ..layers.attend import attention_map
from ..layers.clip_prompting import Texts, Tokenizer, check_depth, checked_clip, clip_of, embed_texts, encode_text
from ..layers.frozen import frozen_copy
from ..layers.precision import without_autocast

Out = dict[str, Tensor]  # intermediate results by name


class Output(NamedTuple):
    """The outputs for a batch of images, before the sigmoid."""

    logits: Tensor  # (b, A), the prediction
    similarity: Tensor | None  # (b, A), of the regions and the sentences, for the loss only; None without regions


class Maps(NamedTuple):
    """Attention (mean over heads) and similarity maps on the grid of patches."""

    regions: Tensor  # (b, 1 + R, Gh, Gw): [CLS] and each LC_r in the last layer of the image tower
    attributes: Tensor  # (b, A, Gh, Gw): each attribute's token in the fusion block
    cosines: Tensor  # (b, A, Gh, Gw): of each patch's token with each sentence


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
    return [len(group) for group in np.array_split(np.arange(prompts), regions + 1)]


def region_mask(
    grid: tuple[int, int], prompts: int, regions: int = 4, overlap: int = 2, official_quirks: bool = False
) -> Tensor:
    """(L, L), True where a token (row) must not attend to another (column), both in the layout of the paper.

    A token of region r >= 1 attends to its own group and the patches of its strip; all others attend to everything.

    Args:
        grid: rows and columns of patches.
        official_quirks: strips begin at patches 0, 48, 112 and 176 for every grid, as released, and have the correct
            number of patches. Right only for 16x16 patches and an overlap of 2.
    """
    rows, columns = grid
    patches = rows * columns
    group = torch.tensor([r for r, size in enumerate(group_sizes(prompts, regions)) for _ in range(1 + size)])
    if official_quirks:
        inner = rows // 4 + 2 * (overlap // 2)
        sizes = [inner - overlap // 2, inner, inner, inner - overlap // 2]
        spans = [(start, start + columns * size) for start, size in zip((0, 48, 112, 176), sizes, strict=True)]
    else:
        spans = [(columns * low, columns * high) for low, high in strips(rows, regions, overlap)]
    own = group[:, None] == group
    strip = torch.zeros(regions + 1, patches, dtype=torch.bool)
    for r, (start, stop) in enumerate(spans, 1):
        strip[r, start:stop] = True
    seen = torch.cat([own, strip[group]], dim=1) | (group == 0)[:, None]
    return torch.cat([~seen, torch.zeros(patches, seen.shape[1], dtype=torch.bool)])


def tower_order(prompts: int, regions: int, patches: int) -> list[int]:
    """For each token of the paper's layout, its position inside the tower: [CLS, LC_1 ... LC_R] [patches] [prompts].

    There the prompts are last, so that no other token is moved when they are replaced.
    """
    classes, before = range(1 + regions), 1 + regions + patches
    own = iter(range(before, before + prompts))
    groups = zip(classes, group_sizes(prompts, regions), strict=True)
    return [i for r, size in groups for i in (r, *itertools.islice(own, size))] + [*range(1 + regions, before)]


# --- blocks -----------------------------------------------------------------------------------------------------------


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A norm computed in float32; the activations keep their precision."""
    return layer(x.float()).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> tuple[Tensor, Out]:
    """Attention of queries (b, n, W) to keys and values (b, m, W): (b, n, W), and "q" and "k" with a head axis."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))  # (b, h, n, d)
    return rearrange(a, "b h n d -> b n (h d)"), {"q": q, "k": k}


def prompted_block(block: nn.Module, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Out]:
    """One block of open_clip's on tokens (b, n, W), which also attend to `prompts` (m, W), the same for every image."""
    attn, width = block.attn, x.shape[-1]
    q, k, v = F.linear(_norm(block.ln_1, x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)  # (b, n, W) each
    if prompts is not None:
        prompts = _norm(block.ln_1, prompts.to(x.dtype))
        more = F.linear(prompts, attn.in_proj_weight[width:], attn.in_proj_bias[width:]).chunk(2, -1)  # (m, W) each
        k, v = (torch.cat([own, new.expand(len(x), -1, -1)], 1) for own, new in zip((k, v), more, strict=True))
    a, out = _attend(q, k, v, attn.num_heads, mask)  # keys and values are (b, n + m, W)
    x = x + block.ls_1(attn.out_proj(a))
    return x + block.ls_2(block.mlp(_norm(block.ln_2, x))), out


def first_tokens(block: Block, x: Tensor, count: int) -> tuple[Tensor, Out]:
    """The first `count` output tokens (b, count, D) of one of timm's blocks, from tokens (b, n, D)."""
    attn, h, width = block.attn, block.norm1(x), x.shape[-1]
    q = F.linear(h[:, :count], attn.qkv.weight[:width], attn.qkv.bias[:width])  # (b, count, D)
    k, v = F.linear(h, attn.qkv.weight[width:], attn.qkv.bias[width:]).chunk(2, -1)  # (b, n, D) each
    a, out = _attend(q, k, v, attn.num_heads)
    x = x[:, :count] + block.drop_path1(block.ls1(attn.proj(a)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), out


class Heads(nn.Module):
    """One linear head for each attribute on its own token: (b, A, D) to (b, A), initialised as `nn.Linear`."""

    def __init__(self, width: int, attributes: int):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(attributes, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(attributes, 1).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight[:, 0]).sum(-1) + self.bias[:, 0]


# --- the model --------------------------------------------------------------------------------------------------------


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
            Without it E and D must be equal.
        drop_path: probability that the last fusion block is skipped for an image during training.
        threshold: of `PromptPAR.aggregate`.
        tuned: "prompts", as published, or "all", the baseline that trains the whole image tower as well.
        official_quirks: as released, where the code differs from the method: no last norm on the image tower's tokens;
            row 0 of the similarity is the first global prompt, not [CLS]; the last image's regions count for the whole
            batch; and strips as in `region_mask`. Requires 4 regions, or none, and groups of equal size.
    """

    prompts: int = 50
    regions: int = 4
    depth: int | None = None
    overlap: int = 2
    masked: bool = True
    text_prompts: int = 3
    mm_layers: int = 1
    visual_embed: bool = False
    drop_path: float = 0.1
    threshold: float = 0.5
    tuned: str = "prompts"
    official_quirks: bool = False


class PromptPAR(state_dicts.OfficialModel):
    """PromptPAR on an open_clip CLIP and a timm ViT of any size.

        v = encode(image; P, LC)                            L tokens; P replaced at each of the first J layers
        x = fuse(v) = norm(block([word_embed(T) ; v]))      T (A, E): the sentences' features, constants
        logits_i = BN(w_i x_i + b_i)                        attribute i from its own token
        s = softmax_A(100 cos(region, T) / tau)             (1 + R, A): row 0 global, then each region
        similarity = BN((pick_R(s) + s_0) / 2)              pick: the largest over regions above 0.5, else the smallest

    Args:
        clip: an open_clip `CLIP` with a ViT; the model shares its tensors, frozen (or, for `tuned` "all", copies them).
        sentences: one for each attribute, or their embedded `Texts`.
        tokenizer: texts to ids, as `open_clip.get_tokenizer`; None with `Texts`.
        fusion: a timm ViT, ViT-B/16 of ImageNet as published; its last `mm_layers` blocks and its norm are copied, and
            the norms of both are trained.

    Raises `BadParameter`: a CLIP, tokenizer, ViT or setting that does not match.
    """

    def __init__(
        self,
        clip: CLIP,
        sentences: Sequence[str] | Texts,
        tokenizer: Tokenizer | None,
        fusion: VisionTransformer,
        settings: Settings = Settings(),
    ):
        super().__init__()
        _check(settings, checked_clip(clip), fusion)
        self.settings = s = settings
        self.clip = clip = frozen_copy(copy.deepcopy(clip) if s.tuned == "all" else clip)
        self.grad_checkpointing = False
        visual = clip.visual.requires_grad_(s.tuned == "all")
        self.grid = tuple(visual.grid_size)
        width, shared, inner, patch = visual.conv1.out_channels, visual.output_dim, fusion.embed_dim, visual.patch_size
        layers, text_layers = (len(tower.transformer.resblocks) for tower in (visual, clip))

        self._read(sentences, tokenizer)
        attributes, text_width = len(self.text_features), clip.positional_embedding.shape[1]
        depth = 0 if s.prompts == 0 else s.depth or layers
        self.prompts = _uniform(depth, s.prompts, width, patch=patch[0])
        self.region_tokens = nn.Parameter(torch.randn(s.regions, width) * width**-0.5)
        self.text_prompts = _uniform(text_layers, s.text_prompts, attributes, text_width, patch=patch[0])
        self.text_prompts.requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.0)) if s.regions else None
        self.agg_bn = nn.BatchNorm1d(attributes) if s.regions else None

        self.word_embed = nn.Linear(shared, inner)
        self.visual_embed = nn.Linear(shared, inner) if s.visual_embed else nn.Identity()
        last = list(fusion.blocks)[len(fusion.blocks) - s.mm_layers :]
        self.blocks = nn.ModuleList(copy.deepcopy(last)).requires_grad_(False)
        self.norm = copy.deepcopy(fusion.norm).requires_grad_(True)
        for block in self.blocks:
            block.norm1.requires_grad_(True)
            block.norm2.requires_grad_(True)
        if s.mm_layers:
            self.blocks[-1].drop_path1, self.blocks[-1].drop_path2 = DropPath(s.drop_path), DropPath(s.drop_path)
        patches = self.grid[0] * self.grid[1]
        tokens = attributes + 1 + s.regions + s.prompts + patches
        self.linear_layer = None if s.mm_layers else nn.Linear(tokens, attributes)
        self.heads = Heads(inner, attributes)
        self.bn = nn.BatchNorm1d(attributes)

        order = torch.tensor(tower_order(s.prompts, s.regions, patches))
        self.register_buffer("order", order, persistent=False)
        positions = order.argsort()[: 1 + s.regions]  # of [CLS] and each LC_r
        if s.official_quirks:
            positions[0] = 1
        self.register_buffer("class_positions", positions, persistent=False)
        mask = None
        if s.regions and s.masked:  # with rows and columns as inside the tower
            forbidden = region_mask(self.grid, s.prompts, s.regions, s.overlap, s.official_quirks)
            inside = order.argsort()
            mask = torch.zeros(forbidden.shape).masked_fill(forbidden[inside][:, inside], -torch.inf)
        self.register_buffer("mask", mask, persistent=False)

    # --- from images to outputs ---

    def tower(self, x: Tensor) -> tuple[Tensor, Out]:
        """The prompted layers of the image tower: (b, 1 + R + N, W), [CLS] tokens first, after CLIP's first norm, to
        (b, L, W) in the layout of the paper; and `out` of the last layer, see `tower_map`."""
        depth, run = len(self.prompts), prompted_block
        out: Out = {}
        if self.grad_checkpointing and torch.is_grad_enabled():
            run = functools.partial(checkpoint, prompted_block, use_reentrant=False)
        for i, block in enumerate(self.clip.visual.transformer.resblocks, 1):
            if i < depth:  # the next layer replaces these prompts: they contribute keys and values only
                mask = None if self.mask is None else self.mask[: x.shape[1]]
                x, out = run(block, x, self.prompts[i - 1], mask)
                continue
            if i == depth:
                x = torch.cat([x, self.prompts[-1].to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (b, L, W)
            x, out = run(block, x, None, self.mask)
        return x[:, self.order], out

    def tower_map(self, out: Out) -> Tensor:
        """The attention map of the tower's last layer, (b, heads, L, L) in the layout of the paper, from its `out`."""
        return attention_map(out["q"], out["k"], self.mask)[:, :, self.order][..., self.order]

    def encode(self, images: Tensor) -> tuple[Tensor, Out]:
        """All tokens of the image tower, (b, L, E), of images (b, 3, H, W); and `out` of its last layer."""
        visual, dtype = self.clip.visual, self.clip.visual.conv1.weight.dtype
        trained = visual.proj.requires_grad or len(self.prompts) > 0 or len(self.region_tokens) > 0
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            patches = rearrange(visual.conv1(images.to(dtype)), "b w gh gw -> b (gh gw) w")
            cls = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
            x = _norm(visual.ln_pre, torch.cat([cls, patches], 1) + visual.positional_embedding.to(dtype))
            regions = _norm(visual.ln_pre, self.region_tokens.to(dtype)).expand(len(images), -1, -1)  # (b, R, W)
            x, out = self.tower(torch.cat([x[:, :1], regions, x[:, 1:]], 1))  # (b, L, W)
            x = (x if self.settings.official_quirks else _norm(visual.ln_post, x)) @ visual.proj  # (b, L, E)
            return x.float() if dtype == torch.float16 else x, out  # everything after CLIP is in float32

    def fuse(self, tokens: Tensor) -> tuple[Tensor, Out]:
        """The attributes' tokens, (b, A, D), after the last norm, from image tokens (b, L, E); and `out` of the last
        block."""
        text = self.word_embed(self.text_features).expand(len(tokens), -1, -1)
        x, count = torch.cat([text, self.visual_embed(tokens)], dim=1), len(self.text_features)  # (b, A + L, D)
        if self.linear_layer is not None:
            return self.norm(self.linear_layer(x.mT).mT), {}
        for block in self.blocks[:-1]:
            x = block(x)
        x, out = first_tokens(self.blocks[-1], x, count)
        return self.norm(x), out

    def similarities(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines times CLIP's scale, and their softmax over attributes, both (b, 1 + R, A); regions (b, 1 + R, E)."""
        with without_autocast(regions.device):  # 100 times a cosine needs full precision
            cosines = F.normalize(regions.float(), dim=-1) @ F.normalize(self.text_features.float(), dim=-1).mT
            logits = self.clip.logit_scale.exp() * cosines
            return logits, (logits / self.temperature).softmax(-1)

    def aggregate(self, shares: Tensor) -> Tensor:
        """The similarity of each attribute, (b, A), before the BatchNorm, from softmax scores (b, 1 + R, A)."""
        highest, lowest = shares[:, 1:].amax(1), shares[:, 1:].amin(1)
        local = torch.where(highest > self.settings.threshold, highest, lowest)
        if self.settings.official_quirks:
            local = local[-1:]
        return (local + shares[:, 0]) / 2

    def decide(self, tokens: Tensor) -> tuple[Output, Out]:
        """Logits (b, A) and similarity (b, A) from image tokens (b, L, E); and `out` of the fusion's last block.

        In float32 also under autocast: the authors' half precision is that of CLIP alone.
        """
        with without_autocast(tokens.device):
            tokens = tokens.float()
            x, out = self.fuse(tokens)
            logits = self.bn(self.heads(x))
        if self.agg_bn is None:
            return Output(logits, None), out
        _, shares = self.similarities(tokens[:, self.class_positions])
        return Output(logits, self.agg_bn(self.aggregate(shares))), out

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens of the image tower, (b, L, E), of images (b, 3, H, W).

        Without prompts and regions nothing in the tower is trained: it runs without autograd, and its tokens may be
        cached for `forward_head`.
        """
        return self.encode(images)[0]

    def forward_head(self, tokens: Tensor) -> Output:
        """Logits (b, A) and similarity (b, A) from the tokens (b, L, E) of `forward_features`."""
        return self.decide(tokens)[0]

    def forward(self, images: Tensor) -> Output:
        """Logits (b, A) and similarity (b, A) of images (b, 3, H, W)."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(self, images: Tensor) -> tuple[Output, Out]:
        """The output of images (b, 3, H, W), and by name: "tokens" (b, L, E), the attention "in the tower"
        (b, heads, L, L) and "in the fusion" (b, heads, A, A + L), each of the last layer."""
        tokens, last = self.encode(images)
        output, fused = self.decide(tokens)
        maps = {"in the fusion": attention_map(fused["q"], fused["k"])} if fused else {}
        return output, {"tokens": tokens, "in the tower": self.tower_map(last)} | maps

    @torch.no_grad()
    def maps(self, images: Tensor) -> Maps:
        """Attention and similarity maps of images (b, 3, H, W). Raises `BadParameter` without a fusion block."""
        if self.linear_layer is not None:
            raise BadParameter("mm_layers", 0, "1 or more: one linear layer over all tokens has no attention")
        _, out = self.forward_intermediates(images)
        patches = self.grid[0] * self.grid[1]
        classes = [0, *self.class_positions[1:].tolist()]  # [CLS], also where the released code reads its neighbour
        regions = out["in the tower"].mean(1)[:, classes, -patches:]  # (b, 1 + R, N)
        attributes = out["in the fusion"].mean(1)[..., -patches:]  # (b, A, N)
        tokens = F.normalize(out["tokens"][:, -patches:], dim=-1)
        cosines = F.normalize(self.text_features, dim=-1) @ tokens.mT  # (b, A, N)
        found = (regions, attributes, cosines)
        return Maps(*(rearrange(x, "b r (gh gw) -> b r gh gw", gh=self.grid[0]) for x in found))

    # --- sentences, precision, what is trained ---

    def _read(self, sentences: Sequence[str] | Texts, tokenizer: Tokenizer | None) -> None:
        """Encode the sentences; store their features, `text_features` (A, E), not normalised."""
        if not isinstance(sentences, Texts):
            if tokenizer is None:
                raise BadParameter("tokenizer", None, "the CLIP's tokenizer, when sentences are given as text")
            sentences = embed_texts(tokenizer, self.clip, sentences)
        length = int(sentences.ends.max()) + 1
        with torch.no_grad():
            features = encode_text(self.clip, sentences.embedded[:, :length], sentences.ends)
        self.register_buffer("text_features", features, persistent=False)

    def half_clip(self) -> PromptPAR:
        """Convert CLIP's convolution, linear layers, attention and projections to float16, in place, as the authors do.

        Prompts, norms, fusion and heads stay in float32; training then needs no autocast, and has no loss scaling."""
        convert_weights_to_lp(self.clip, torch.float16)
        self.register_buffer("text_features", self.text_features.half().float(), persistent=False)
        return self

    def train(self, mode: bool = True) -> PromptPAR:
        """As `nn.Module.train`, but the CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each layer of the image tower in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the authors' two optimisers: "prompts", of the image tower, and "heads"."""
        own = ("clip.", "prompts", "region_tokens", "temperature", "agg_bn.")
        groups: dict[str, list[nn.Parameter]] = {"prompts": [], "heads": []}
        for name, p in self.trained().items():
            groups["prompts" if name.startswith(own) else "heads"].append(p)
        return [{"name": name, "params": parameters} for name, parameters in groups.items() if parameters]

    def count(self, inert: bool = False) -> int:
        """The number of trainable parameters; `inert`: including the text tower's prompts, as the authors count."""
        return sum(p.numel() for p in self.trained().values()) + inert * self.text_prompts.numel()

    # --- the authors' names ---

    def official_names(self) -> dict[str, str | list]:
        """Our tensor names to those in the authors' two modules."""
        names: dict[str, str | list] = {}
        for name, tensor in self.state_dict().items():
            part, _, rest = name.partition(".")
            if part == "clip":
                names[name] = f"clip_model.{rest}"
            elif part == "agg_bn":
                names[name] = f"clip_model.{name}"
            elif part == "heads":
                names[name] = [f"model.weight_layer.{i}.{rest}" for i in range(len(tensor))]
            elif tensor.numel():  # the authors have no empty prompts
                names[name] = _OWN.get(name, f"model.{name}")
        return names

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        sentences: Sequence[str],
        tokenizer: Tokenizer,
        *,
        clip: CLIP | None = None,
        heads: tuple[int, int, int] | None = None,
        official_quirks: bool = True,
        **options: Any,
    ) -> PromptPAR:
        """The model with the authors' tensors, all sizes read from them; the inverse is `to_official`.

        Args:
            state: "clip_model.<name>" and "model.<name>", as `read_checkpoint` returns it.
            clip: one of the right shape, of which a copy gets the weights; None: built for square images.
            heads: of the image tower, the text tower and the fusion; None: 64 channels per head, as released.
            official_quirks: True, as the weights were trained.
            options: `overlap`, `masked`, `drop_path` and `threshold`, which a state dict does not contain.

        Raises:
            BadCheckpoint: names that are missing, unknown or of another shape, all of them listed.
            BadParameter: as the class.
        """
        what, state, visual = "PromptPAR (the authors' names)", dict(state), "clip_model.visual."
        needed = [f"{visual}{name}" for name in ("conv1.weight", "positional_embedding", "proj")]
        needed += [f"clip_model.{name}" for name in ("positional_embedding", "token_embedding.weight")]
        state_dicts.check_names(state, [*needed, "model.word_embed.weight", "model.bn.weight"], what)
        if len(sentences) != (attributes := len(state["model.bn.weight"])):
            raise BadParameter("sentences", len(sentences), f"{attributes}, one for each attribute")
        deep, text_deep, regions = (_OWN[name] for name in ("prompts", "text_prompts", "region_tokens"))
        if deep in state:
            state[deep] = state[deep].squeeze(2)
        depth, prompts = state[deep].shape[:2] if deep in state else (None, 0)
        inner, mm_layers = len(state["model.word_embed.weight"]), state_dicts.depth(state, "model.blocks.")
        hidden = len(state.get("model.blocks.0.mlp.fc1.bias", torch.empty(4 * inner)))
        image, text, mixed = heads or (None, None, None)
        fusion = VisionTransformer(
            img_size=16,
            embed_dim=inner,
            depth=mm_layers,
            num_heads=mixed or inner // 64,
            mlp_ratio=hidden / inner,
            num_classes=0,
        )
        if clip is None:
            words = len(state["clip_model.token_embedding.weight"])
            clip = clip_of(state, visual, "clip_model.", (image, text), words)
        settings = Settings(
            prompts=prompts,
            depth=depth,
            regions=len(state.get(regions, ())),
            text_prompts=state[text_deep].shape[1] if text_deep in state else 0,
            mm_layers=mm_layers,
            visual_embed="model.visual_embed.weight" in state,
            official_quirks=official_quirks,
            **options,
        )
        model = cls(copy.deepcopy(clip), sentences, tokenizer, fusion, settings).eval()
        state_dicts.load_official(model, state, model.official_names(), what, optional=("num_batches_tracked",))
        model._read(sentences, tokenizer)  # by the weights that were just loaded
        return model

    def to_official(self) -> dict[str, Tensor]:
        """All tensors under the authors' names, "clip_model.<name>" and "model.<name>"."""
        state, deep = super().to_official(), _OWN["prompts"]
        return state | ({deep: state[deep].unsqueeze(2)} if deep in state else {})


_OWN = {
    "prompts": "clip_model.visual.transformer.prompt_deep",
    "text_prompts": "clip_model.transformer.prompt_text_deep",
    "region_tokens": "clip_model.visual.part_class_embedding",
    "temperature": "clip_model.softmax_model.temperature",
}


def _check(s: Settings, clip: CLIP, fusion: VisionTransformer) -> None:
    """Raise `BadParameter` for a setting that does not match the networks."""
    check_choice("tuned", s.tuned, ("prompts", "all"))
    rows, blocks = clip.visual.grid_size[0], len(fusion.blocks)
    for name, value, most in (
        ("regions", s.regions, rows),
        ("overlap", s.overlap, rows),
        ("mm_layers", s.mm_layers, blocks),
    ):
        if not 0 <= value <= most:
            raise BadParameter(name, value, f"0 to {most}")
    if s.prompts and s.depth is not None:
        check_depth(clip, s.depth)
    if s.official_quirks and s.regions and (s.regions != 4 or s.prompts % 5 or not s.prompts):
        accepted = "4 regions, or none, and a multiple of 5 prompts: the released code has no others"
        raise BadParameter("official_quirks", True, accepted)
    shared, inner = clip.visual.output_dim, fusion.embed_dim
    if not s.visual_embed and shared != inner:
        raise BadParameter("visual_embed", False, f"True: the CLIP gives {shared} channels, the ViT has {inner}")


def _uniform(*shape: int, patch: int) -> nn.Parameter:
    """A prompt initialised as in Visual Prompt Tuning: U(-v, v), v² = 6 / (3 patch² + width)."""
    bound = math.sqrt(6 / (3 * patch**2 + shape[-1]))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def prompted_text(clip: CLIP, texts: Texts, prompts: Tensor, place: str = "end") -> Tensor:
    """Sentence features (A, E), not normalised, with prompts (layers, n, A, Wt): n for each sentence and layer.

    The model does not need this: with `place` "end", as released, any prompts give the features without prompts, and
    the gradient is exactly zero. With "start", after the start token, they have an effect.
    """
    check_choice("place", place, ("end", "start"))
    n, length = prompts.shape[1], texts.embedded.shape[1]
    start, ends = (length, texts.ends) if place == "end" else (1, texts.ends + n)
    x = texts.embedded + clip.positional_embedding
    x = torch.cat([x[:, :start], x.new_zeros(len(x), n, x.shape[-1]), x[:, start:]], dim=1)  # (A, length + n, Wt)
    mask = torch.full((length + n, length + n), -torch.inf, device=x.device).triu(1)
    for i, block in enumerate(clip.transformer.resblocks):
        if i < len(prompts):
            x = torch.cat([x[:, :start], rearrange(prompts[i], "n a w -> a n w"), x[:, start + n :]], dim=1)
        x = block(x, attn_mask=mask)
    return clip.ln_final(x[torch.arange(len(x)), ends]) @ clip.text_projection


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint file of the authors' code, for `from_official`; no code in the file is run.

    Their files have two state dicts: the CLIP under "ViT_model" (released) or "clip_model" (as their training writes
    it; their test script expects the other name), the rest under "model_state_dict".

    Raises `CorruptFile` for any other file.
    """
    found = load_torch(path)
    parts = {"clip_model.": ("ViT_model", "clip_model"), "model.": ("model_state_dict",)}
    state: dict[str, Tensor] = {}
    for prefix, entries in parts.items():
        part = next((found[e] for e in entries if e in found), None) if isinstance(found, Mapping) else None
        if not isinstance(part, Mapping):
            raise CorruptFile(path, f"no {' or '.join(repr(e) for e in entries)} in it: not a checkpoint of PromptPAR")
        state |= {prefix + name: value for name, value in part.items()}
    return state


# --- losses -----------------------------------------------------------------------------------------------------------


def label_weights(labels: Tensor, ratio: Tensor) -> Tensor:
    """The weight of each label (b, A), in [1, e]: exp(1 - r) where the attribute is present, else exp(r).

    `ratio` (A,) is the share r of training images with the attribute: rare attributes have large weights. An unclear
    label, 2, has the weight of a present one: the released code intends to leave it out, but does not.
    """
    return torch.where(labels > 0.5, 1 - ratio, ratio).exp()


def weighted_loss(logits: Tensor, labels: Tensor, ratio: Tensor, unclear: bool = True) -> Tensor:
    """Binary cross-entropy times `label_weights`, summed over attributes, mean over images. All (b, A).

    `unclear`: labels of 2 count, as released, as targets of 2, whose cross-entropy has no lower bound; False: they are
    left out."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    losses = losses if unclear else losses.masked_fill(labels > 1, 0)
    return (label_weights(labels, ratio) * losses).sum(1).mean()


def loss(output: Output, labels: Tensor, ratio: Tensor, similarity: float = 0.5, unclear: bool = True) -> Tensor:
    """The training loss: that of the logits plus `similarity` times that of the regions' similarity.

    `unclear`: see `weighted_loss`."""
    value = weighted_loss(output.logits, labels, ratio, unclear)
    if output.similarity is None or not similarity:
        return value
    return value + similarity * weighted_loss(output.similarity, labels, ratio, unclear)
