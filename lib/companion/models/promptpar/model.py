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
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import BadParameter, CorruptFile, check_choice
from ...ops.recorded import made_by
from ...ops.unpickle import load_torch
from ..layers import state_dicts
from ..layers.clip_prompting import Texts, Tokenizer, check_depth, checked_clip, clip_of, embed_texts, encode_text
from ..layers.frozen import frozen_copy
from ..layers.precision import without_autocast

TUNED = ("prompts", "all")


class Output(NamedTuple):
    """The outputs for a batch of images, before the sigmoid."""

    logits: Tensor  # (b, A), the prediction
    similarity: Tensor | None  # (b, A), of the regions and the sentences, for the loss only; None without regions


class Maps(NamedTuple):
    """Attention (mean over heads) and similarity maps on the grid of patches."""

    regions: Tensor  # (b, 1 + R, Gh, Gw): [CLS] and each LC_r in the last layer of the image tower
    attributes: Tensor  # (b, A, Gh, Gw): each attribute's token in the fusion block
    cosines: Tensor  # (b, A, Gh, Gw): of each patch's token with each sentence


# --- strips -----------------------------------------------------------------------------------------------------------


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


# --- the text tower ---------------------------------------------------------------------------------------------------


def prompted_text(clip: CLIP, texts: Texts, prompts: Tensor, place: str = "end") -> Tensor:
    """Sentence features (A, E), not normalised, with prompts (layers, n, A, Wt): n for each sentence and layer.

    The model does not need this: with `place` "end", as released, any prompts give the features without prompts, and
    the gradient is exactly zero. With "start", after the start token, they have an effect.
    """
    check_choice("place", place, ("end", "start"))
    n, length = prompts.shape[1], texts.embedded.shape[1]
    start, ends = (length, texts.ends) if place == "end" else (1, texts.ends + n)
    x = texts.embedded + clip.positional_embedding
    x = torch.cat([x[:, :start], x.new_zeros(len(x), n, x.shape[-1]), x[:, start:]], dim=1)
    mask = torch.full((length + n, length + n), -torch.inf, device=x.device).triu(1)
    for i, block in enumerate(clip.transformer.resblocks):
        if i < len(prompts):
            x = torch.cat([x[:, :start], prompts[i].transpose(0, 1), x[:, start + n :]], dim=1)
        x = block(x, attn_mask=mask)
    return clip.ln_final(x[torch.arange(len(x)), ends]) @ clip.text_projection


# --- attention --------------------------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, maps: list[Tensor] | None) -> Tensor:
    """Attention of (b, n, W) to (b, m, W); the attention map (b, n, m), the mean over heads, is appended to `maps`."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask.to(q.dtype)
    if maps is not None:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        maps.append((scores if mask is None else scores + mask).softmax(-1).mean(1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _clip_block(
    block: nn.Module, x: Tensor, more: Tensor | None, mask: Tensor | None, maps: list[Tensor] | None
) -> Tensor:
    """One block of open_clip's on tokens (b, n, W), which also attend to `more` (m, W), the same for every image."""
    attn = block.attn
    q, k, v = F.linear(_norm(block.ln_1, x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    if more is not None:
        width = x.shape[-1]
        more = _norm(block.ln_1, more.to(x.dtype))
        seen = F.linear(more, attn.in_proj_weight[width:], attn.in_proj_bias[width:]).chunk(2, -1)
        k, v = (torch.cat([own, new.expand(len(x), -1, -1)], 1) for own, new in zip((k, v), seen, strict=True))
    x = x + block.ls_1(attn.out_proj(_attend(q, k, v, attn.num_heads, mask, maps)))
    return x + block.ls_2(block.mlp(_norm(block.ln_2, x)))


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A norm computed in float32; the activations keep their precision."""
    return layer(x.float()).to(x.dtype)


def _first_tokens(block: Block, x: Tensor, count: int, maps: list[Tensor] | None) -> Tensor:
    """The first `count` output tokens (b, count, D) of one of timm's blocks, from tokens (b, n, D)."""
    attn, h = block.attn, block.norm1(x)
    width, first = x.shape[-1], x[:, :count]
    q = F.linear(h[:, :count], attn.qkv.weight[:width], attn.qkv.bias[:width])
    k, v = F.linear(h, attn.qkv.weight[width:], attn.qkv.bias[width:]).chunk(2, -1)
    first = first + block.drop_path1(block.ls1(attn.proj(_attend(q, k, v, attn.num_heads, None, maps))))
    return first + block.drop_path2(block.ls2(block.mlp(block.norm2(first))))


# --- the model --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """One linear head for each attribute on its own token: (b, A, D) to (b, A), initialised as `nn.Linear`."""

    def __init__(self, width: int, attributes: int):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(attributes, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(attributes, 1).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight[:, 0]).sum(-1) + self.bias[:, 0]


class PromptPAR(state_dicts.OfficialModel):
    """PromptPAR on an open_clip CLIP and a timm ViT of any size.

        v = tower(image, P, LC)                             L tokens; P replaced at each of the first J layers
        x = norm(block([word_embed(T) ; v]))                T (A, E): the sentences' features, constants
        logits_i = BN(w_i x_i + b_i)                        attribute i from its own token
        s = softmax_A(100 cos(region, T) / tau)             (1 + R, A): row 0 global, then each region
        similarity = BN((pick_R(s) + s_0) / 2)              pick: the largest over regions above 0.5, else the smallest

    Args:
        clip: an open_clip `CLIP` with a ViT; the model shares its tensors, frozen (or, for `tuned` "all", copies them).
        sentences: one for each attribute, or their embedded `Texts`.
        tokenizer: texts to ids, as `open_clip.get_tokenizer`; None with `Texts`.
        fusion: a timm ViT, ViT-B/16 of ImageNet as published; its last `mm_layers` blocks and its norm are copied, and
            the norms of both are trained.
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
        threshold: see `pick` above.
        tuned: "prompts", as published, or "all", the baseline that trains the whole image tower as well.
        official_quirks: as released, where the code differs from the method: no last norm on the image tower's tokens;
            row 0 of the similarity is the first global prompt, not [CLS]; the last image's regions count for the whole
            batch; and strips as in `region_mask`. Requires 4 regions and groups of equal size.

    Raises `BadParameter`: a CLIP, tokenizer, ViT or option that does not match.
    """

    def __init__(
        self,
        clip: CLIP,
        sentences: Sequence[str] | Texts,
        tokenizer: Tokenizer | None,
        fusion: VisionTransformer,
        *,
        prompts: int = 50,
        regions: int = 4,
        depth: int | None = None,
        overlap: int = 2,
        masked: bool = True,
        text_prompts: int = 3,
        mm_layers: int = 1,
        visual_embed: bool = False,
        drop_path: float = 0.1,
        threshold: float = 0.5,
        tuned: str = "prompts",
        official_quirks: bool = False,
    ):
        super().__init__()
        check_choice("tuned", tuned, TUNED)
        checked_clip(clip)
        self.clip = clip = frozen_copy(copy.deepcopy(clip) if tuned == "all" else clip)
        self.grad_checkpointing = False
        visual, layers = clip.visual, len(clip.visual.transformer.resblocks)
        self.grid = rows, _ = tuple(visual.grid_size)
        if not isinstance(fusion, VisionTransformer):
            raise BadParameter("fusion", type(fusion).__name__, "a timm VisionTransformer")
        for name, value, low, high in (
            ("prompts", prompts, 0, math.inf),
            ("regions", regions, 0, rows),
            ("overlap", overlap, 0, rows),
            ("text_prompts", text_prompts, 0, math.inf),
            ("mm_layers", mm_layers, 0, len(fusion.blocks)),
            ("threshold", threshold, 0, 1),
        ):
            if not low <= value <= high:
                raise BadParameter(name, value, f"{low} or more" if high == math.inf else f"{low} to {high}")
        visual.requires_grad_(tuned == "all")
        if official_quirks and regions and (regions != 4 or prompts % 5 or not prompts):
            raise BadParameter(
                "official_quirks",
                True,
                "4 regions, or none, and a multiple of 5 prompts: the released code has no others",
            )
        depth = 0 if prompts == 0 else layers if depth is None else depth
        if prompts:
            check_depth(clip, depth)
        width, shared, inner = visual.conv1.out_channels, visual.output_dim, fusion.embed_dim
        if not visual_embed and shared != inner:
            raise BadParameter("visual_embed", False, f"True: the CLIP gives {shared} channels, the ViT has {inner}")
        self.overlap, self.masked, self.threshold = overlap, masked, threshold
        self.official_quirks = official_quirks

        self.set_sentences(sentences, tokenizer)
        attributes, text_width = self.text_features.shape[0], clip.positional_embedding.shape[1]
        self.prompts = _uniform(depth, prompts, width, patch=visual.patch_size[0])
        self.region_tokens = nn.Parameter(torch.randn(regions, width) * width**-0.5)
        text_layers = len(clip.transformer.resblocks)
        self.text_prompts = _uniform(
            text_layers, text_prompts, attributes, text_width, patch=visual.patch_size[0]
        ).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.0)) if regions else None
        self.agg_bn = nn.BatchNorm1d(attributes) if regions else None

        self.word_embed = nn.Linear(shared, inner)
        self.visual_embed = nn.Linear(shared, inner) if visual_embed else nn.Identity()
        last = list(fusion.blocks)[len(fusion.blocks) - mm_layers :]
        self.blocks = nn.ModuleList(copy.deepcopy(last)).requires_grad_(False)
        self.norm = copy.deepcopy(fusion.norm).requires_grad_(True)
        for block in self.blocks:
            block.norm1.requires_grad_(True)
            block.norm2.requires_grad_(True)
        if mm_layers:
            self.blocks[-1].drop_path1, self.blocks[-1].drop_path2 = DropPath(drop_path), DropPath(drop_path)
        tokens = 1 + regions + prompts + self.grid[0] * self.grid[1]
        self.linear_layer = None if mm_layers else nn.Linear(attributes + tokens, attributes)
        self.heads = Heads(inner, attributes)
        self.bn = nn.BatchNorm1d(attributes)
        self._lay_out(prompts, regions)

    def set_sentences(self, sentences: Sequence[str] | Texts, tokenizer: Tokenizer | None = None) -> None:
        """Encode the sentences, as many as before; store their features, `text_features` (A, E), not normalised."""
        self._made["args"]["sentences"] = made_by(sentences)
        if not isinstance(sentences, Texts):
            if tokenizer is None:
                raise BadParameter("tokenizer", None, "the CLIP's tokenizer, when sentences are given as text")
            sentences = embed_texts(tokenizer, self.clip, sentences)
        known = getattr(self, "text_features", None)
        if known is not None and len(known) != len(sentences.ends):
            raise BadParameter("sentences", len(sentences.ends), f"{len(known)}, one for each attribute")
        length = int(sentences.ends.max()) + 1
        clip, half = self.clip, self.clip.text_projection.dtype == torch.float16
        if half:  # after `half_clip`: embeddings and norms are in float32, linear layers are not
            clip = copy.deepcopy(clip).float()
        with torch.no_grad():
            features = encode_text(clip, sentences.embedded[:, :length], sentences.ends)
        self.register_buffer("text_features", features.half().float() if half else features, persistent=False)

    def _lay_out(self, prompts: int, regions: int) -> None:
        """Set the order of tokens: inside the tower the prompts are last, so that no other token is moved."""
        patches = self.grid[0] * self.grid[1]
        sizes, before = group_sizes(prompts, regions), 1 + regions + patches
        starts = np.cumsum([0, *sizes])
        order = [i for r, s in enumerate(sizes) for i in (r, *range(before + starts[r], before + starts[r] + s))]
        order = torch.tensor([*order, *range(1 + regions, before)])
        self.register_buffer("order", order, persistent=False)
        positions = torch.tensor([r + int(starts[r]) for r in range(regions + 1)])  # of [CLS] and each LC_r
        if self.official_quirks:
            positions[0] = 1
        self.register_buffer("class_positions", positions, persistent=False)
        mask = None
        if regions and self.masked:
            forbidden = region_mask(self.grid, prompts, regions, self.overlap, self.official_quirks)
            inside = order.argsort()
            mask = torch.zeros(forbidden.shape).masked_fill(forbidden[inside][:, inside], -torch.inf)
        self.register_buffer("mask", mask, persistent=False)

    def train(self, mode: bool = True) -> PromptPAR:
        """As `nn.Module.train`, but the CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def half_clip(self) -> PromptPAR:
        """Convert CLIP's convolution, linear layers, attention and projections to float16, in place, as the authors do.

        Prompts, norms, fusion and heads stay in float32; training then needs no autocast, and has no loss scaling."""
        convert_weights_to_lp(self.clip, torch.float16)
        self.register_buffer("text_features", self.text_features.half().float(), persistent=False)
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

    def tower(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The prompted layers of the image tower: (b, 1 + R + N, W), [CLS] tokens first, after CLIP's first norm, to
        (b, L, W) in the layout of the paper. The attention map of the last layer, (b, L, L), is appended to `maps`."""
        blocks, depth = self.clip.visual.transformer.resblocks, len(self.prompts)
        for i, block in enumerate(blocks, 1):
            more, mask = None, self.mask
            if i < depth:  # the next layer replaces these prompts: they contribute keys and values only
                more, mask = self.prompts[i - 1], None if mask is None else mask[: x.shape[1]]
            elif i == depth:
                x = torch.cat([x, self.prompts[-1].to(x.dtype).expand(len(x), -1, -1)], dim=1)
            arguments = block, x, more, mask, maps if i == len(blocks) else None
            if self.grad_checkpointing and torch.is_grad_enabled() and maps is None:
                x = checkpoint(_clip_block, *arguments, use_reentrant=False)
            else:
                x = _clip_block(*arguments)
        if maps is not None:
            maps[-1] = maps[-1][:, self.order][:, :, self.order]
        return x[:, self.order]

    def forward_features(self, images: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """All tokens of the image tower, (b, L, E), of images (b, 3, H, W); `maps` as in `tower`.

        Without prompts and regions nothing in the tower is trained: it runs without autograd, and its tokens may be
        cached for `forward_head`.
        """
        visual, dtype = self.clip.visual, self.clip.visual.conv1.weight.dtype
        tuned = visual.proj.requires_grad and torch.is_grad_enabled()
        prompted = len(self.prompts) > 0 or len(self.region_tokens) > 0
        with torch.set_grad_enabled(tuned or (prompted and torch.is_grad_enabled())):
            with torch.set_grad_enabled(tuned):
                patches = visual.conv1(images.to(dtype)).flatten(2).mT
                first = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
                x = _norm(visual.ln_pre, torch.cat([first, patches], dim=1) + visual.positional_embedding.to(dtype))
            regions = _norm(visual.ln_pre, self.region_tokens.to(dtype)).expand(len(images), -1, -1)
            x = self.tower(torch.cat([x[:, :1], regions, x[:, 1:]], dim=1), maps)
            x = (x if self.official_quirks else _norm(visual.ln_post, x)) @ visual.proj
            return x.float() if dtype == torch.float16 else x  # everything after CLIP is in float32

    def similarities(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines times CLIP's scale, and their softmax over attributes, both (b, 1 + R, A); regions (b, 1 + R, E)."""
        with without_autocast(regions.device):  # 100 times a cosine needs full precision
            cosines = F.normalize(regions.float(), dim=-1) @ F.normalize(self.text_features.float(), dim=-1).mT
            logits = self.clip.logit_scale.exp() * cosines
            return logits, (logits / self.temperature).softmax(-1)

    def aggregate(self, shares: Tensor) -> Tensor:
        """The similarity of each attribute, (b, A), before the BatchNorm, from softmax scores (b, 1 + R, A)."""
        highest, lowest = shares[:, 1:].amax(1), shares[:, 1:].amin(1)
        local = torch.where(highest > self.threshold, highest, lowest)
        if self.official_quirks:
            local = local[-1:]
        return (local + shares[:, 0]) / 2

    def fuse(self, tokens: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The attributes' tokens, (b, A, D), after the last norm, from image tokens (b, L, E).

        The attention map of the last block, (b, A, A + L), is appended to `maps`.
        """
        text = self.word_embed(self.text_features).expand(len(tokens), -1, -1)
        x, count = torch.cat([text, self.visual_embed(tokens)], dim=1), len(self.text_features)
        if self.linear_layer is not None:
            return self.norm(self.linear_layer(x.mT).mT)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(_first_tokens(self.blocks[-1], x, count, maps))

    def forward_head(self, tokens: Tensor) -> Output:
        """Logits (b, A) and similarity (b, A) from the tokens (b, L, E) of `forward_features`.

        In float32 also under autocast: the authors' half precision is that of CLIP alone.
        """
        with without_autocast(tokens.device):
            tokens = tokens.float()
            logits = self.bn(self.heads(self.fuse(tokens)))
        if self.agg_bn is None:
            return Output(logits, None)
        _, shares = self.similarities(tokens[:, self.class_positions])
        return Output(logits, self.agg_bn(self.aggregate(shares)))

    def forward(self, images: Tensor) -> Output:
        """Logits (b, A) and similarity (b, A) of images (b, 3, H, W)."""
        return self.forward_head(self.forward_features(images))

    @torch.no_grad()
    def maps(self, images: Tensor) -> Maps:
        """Attention and similarity maps of images (b, 3, H, W). Raises `BadParameter` without a fusion block."""
        if self.linear_layer is not None:
            raise BadParameter("mm_layers", 0, "1 or more: one linear layer over all tokens has no attention")
        tower: list[Tensor] = []
        fused: list[Tensor] = []
        tokens = self.forward_features(images, tower)
        self.fuse(tokens, fused)
        patches = self.grid[0] * self.grid[1]
        classes = self.class_positions.clone()
        classes[0] = 0  # [CLS], also where the released code reads its neighbour
        cosines = F.normalize(self.text_features, dim=-1) @ F.normalize(tokens[:, -patches:], dim=-1).mT
        found = (tower[0][:, classes, -patches:], fused[0][:, :, -patches:], cosines)
        return Maps(*(x.unflatten(-1, self.grid) for x in found))

    # --- the authors' names ---

    def official_names(self) -> dict[str, str | list]:
        """Our tensor names to those in the authors' two modules."""
        attributes, clip = len(self.text_features), "clip_model"
        names: dict[str, str | list] = {
            n: f"{clip}.{n.removeprefix('clip.')}" for n in self.state_dict() if n.startswith("clip.")
        }
        if self.prompts.numel():
            names["prompts"] = f"{clip}.visual.transformer.prompt_deep"
        if self.text_prompts.numel():
            names["text_prompts"] = f"{clip}.transformer.prompt_text_deep"
        if len(self.region_tokens):
            names["region_tokens"] = f"{clip}.visual.part_class_embedding"
            names["temperature"] = f"{clip}.softmax_model.temperature"
        for name in self.state_dict():
            part, _, kind = name.partition(".")
            if part == "agg_bn":
                names[name] = f"{clip}.{name}"
            elif part == "heads":
                names[name] = [f"model.weight_layer.{i}.{kind}" for i in range(attributes)]
            elif part in ("word_embed", "visual_embed", "blocks", "norm", "bn", "linear_layer"):
                names[name] = f"model.{name}"
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
        what, state = "PromptPAR (the authors' names)", dict(state)
        own, fused = "clip_model.visual.", "model."
        needed = {
            f"{own}conv1.weight",
            f"{own}positional_embedding",
            f"{own}proj",
            "clip_model.positional_embedding",
            "clip_model.token_embedding.weight",
            "model.word_embed.weight",
            "model.bn.weight",
        }
        state_dicts.check_names(state, needed, what)
        if len(sentences) != (attributes := len(state["model.bn.weight"])):
            raise BadParameter("sentences", len(sentences), f"{attributes}, one for each attribute")
        deep, texts = f"{own}transformer.prompt_deep", "clip_model.transformer.prompt_text_deep"
        if deep in state:
            state[deep] = state[deep].squeeze(2)
        inner = len(state["model.word_embed.weight"])
        depth, prompts = state[deep].shape[:2] if deep in state else (None, 0)
        image, text, mixed = heads or (None, None, None)
        words = len(state["clip_model.token_embedding.weight"])
        mm_layers = state_dicts.depth(state, f"{fused}blocks.")
        fusion = VisionTransformer(
            img_size=16,
            embed_dim=inner,
            depth=mm_layers,
            num_heads=mixed or inner // 64,
            mlp_ratio=len(state.get(f"{fused}blocks.0.mlp.fc1.bias", torch.empty(4 * inner))) / inner,
            num_classes=0,
        )
        model = cls(
            copy.deepcopy(clip) or clip_of(state, own, "clip_model.", (image, text), words),
            sentences,
            tokenizer,
            fusion,
            prompts=prompts,
            depth=depth,
            regions=len(state.get(f"{own}part_class_embedding", ())),
            text_prompts=state[texts].shape[1] if texts in state else 0,
            mm_layers=mm_layers,
            visual_embed="model.visual_embed.weight" in state,
            official_quirks=official_quirks,
            **options,
        ).eval()
        state_dicts.load_official(model, state, model.official_names(), what, optional=("num_batches_tracked",))
        model.set_sentences(sentences, tokenizer)  # by the weights that were just loaded
        return model

    def to_official(self) -> dict[str, Tensor]:
        """All tensors under the authors' names, "clip_model.<name>" and "model.<name>"."""
        state = super().to_official()
        deep = "clip_model.visual.transformer.prompt_deep"
        return state | ({deep: state[deep].unsqueeze(2)} if deep in state else {})


def _uniform(*shape: int, patch: int) -> nn.Parameter:
    """A prompt initialised as in Visual Prompt Tuning: U(-v, v), v² = 6 / (3 patch² + width)."""
    bound = math.sqrt(6 / (3 * patch**2 + shape[-1]))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


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
