"""PromptPAR: Pedestrian Attribute Recognition via CLIP based Prompt Vision-Language Fusion.

Wang et al., IEEE TCSVT 2024, arXiv 2312.10692.

A frozen CLIP encodes one sentence for each attribute. Deep prompts adapt its image tower in one global group and one
group for each horizontal strip of the image (`tower`). One frozen ViT block fuses sentences and image tokens, and each
attribute's token has its own linear head. A second loss compares the strips' [CLS] tokens with the sentences.

Of the paper's text only the abstract and the figures were available: every formula here was read from the authors' code
(Event-AHU/OpenPAR, folder PromptPAR, MIT, read at 210ff55; the release nearest to the paper is f3be678) and implemented
independently; outputs are checked against recorded ones. The mistakes of that code are behind one setting,
`official_quirks`.

The features of the sentences are constants, computed once: the released prompts of the text tower come after the end of
the text, and the tower is causal, so they cannot reach the feature (`prompted_text` shows it).

Shapes: as in `tower`, with A attributes, E channels of CLIP's shared space, D of the fusion block, Wt of the text
tower.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from open_clip.model import CLIP, convert_weights_to_lp
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter
from ...io.config import configure, reconfigure
from ..layers import attend
from ..layers.attend import attention_map
from ..layers.clip_prompting import Texts, Tokenizer, WithTexts, encode_text
from ..layers.precision import without_autocast
from ..layers.predicting import Images, Names, Transform, named, outputs
from .official import Released, prompted_text, read_checkpoint
from .tower import PUBLISHED, Out, PromptedTower, Settings, region_mask, uniform
from .transforms import square_transform

__all__ = ["PromptPAR", "Settings", "loss", "prompted_text", "read_checkpoint", "region_mask"]


class Output(NamedTuple):
    """The outputs for a batch of images, before the sigmoid."""

    logits: Tensor  # (b, A), the prediction
    similarity: Tensor | None  # (b, A), of the regions and the sentences, for the loss only; None without regions


class Maps(NamedTuple):
    """Attention (mean over heads) and similarity maps on the grid of patches."""

    regions: Tensor  # (b, 1 + R, Gh, Gw): [CLS] and each LC_r in the last layer of the image tower
    attributes: Tensor  # (b, A, Gh, Gw): each attribute's token in the fusion block
    cosines: Tensor  # (b, A, Gh, Gw): of each patch's token with each sentence


def first_tokens(block: Block, x: Tensor, count: int) -> tuple[Tensor, Out]:
    """The first `count` output tokens (b, count, D) of one of timm's blocks, from tokens (b, n, D)."""
    attn, h, d = block.attn, block.norm1(x), x.shape[-1]
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(h[:, :count], weight[:d], None if bias is None else bias[:d])  # no query of the other tokens
    kv = F.linear(h, weight[d:], None if bias is None else bias[d:]).chunk(2, -1)  # (b, n, D) each
    q, k, v = (rearrange(part, "b n (h e) -> b h n e", h=attn.num_heads) for part in (q, *kv))
    q, k = attn.q_norm(q), attn.k_norm(k)
    a = attend.output(attn, h, F.scaled_dot_product_attention(q, k, v))
    x = x[:, :count] + block.drop_path1(block.ls1(a))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), {"q": q, "k": k}


class Heads(nn.Module):
    """One linear head for each attribute on its own token: (b, A, D) to (b, A), initialised as `nn.Linear`."""

    def __init__(self, width: int, attributes: int):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(attributes, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(attributes, 1).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight[:, 0]).sum(-1) + self.bias[:, 0]


class PromptPAR(PromptedTower, WithTexts, Released):
    """PromptPAR on an open_clip CLIP and a timm ViT of any size.

        v = encode(image; P, LC)                            L tokens; P replaced at each of the first J layers
        x = fuse(v) = norm(block([word_embed(T) ; v]))      T (A, E): the sentences' features, constants
        logits_i = BN(w_i x_i + b_i)                        attribute i from its own token
        s = softmax_A(100 cos(region, T) / tau)             (1 + R, A): row 0 global, then each region
        similarity = BN((pick_R(s) + s_0) / 2)              pick: the largest over regions above 0.5, else the smallest

    Args:
        clip: an open_clip `CLIP` with a ViT; the model shares its tensors, frozen.
        sentences: one for each attribute, or their embedded `Texts`.
        tokenizer: texts to ids, as `open_clip.get_tokenizer`; None with `Texts`.
        fusion: a timm ViT, ViT-B/16 of ImageNet as published; its last `mm_layers` blocks and its norm are copied, and
            the norms of both are trained.

    Raises `BadParameter`: a CLIP, tokenizer or setting that does not match.
    """

    constants = ("embedded", "text_features")

    def __init__(
        self,
        clip: CLIP,
        sentences: Sequence[str] | Texts,
        tokenizer: Tokenizer | None,
        fusion: VisionTransformer,
        settings: Settings = PUBLISHED,
    ):
        configure(self, locals())
        super().__init__(clip, settings)
        attend.check_pre_norm("fusion", fusion)
        s, width = settings, fusion.embed_dim
        shared, text_width = self.clip.text_projection.shape[::-1]
        if not 0 <= s.mm_layers <= len(fusion.blocks):
            raise BadParameter("mm_layers", s.mm_layers, f"0 to {len(fusion.blocks)}, the blocks of the fusion")
        if not s.visual_embed and shared != width:
            raise BadParameter("visual_embed", False, f"True where the fusion's width {width} is not CLIP's, {shared}")
        self._read(sentences, tokenizer)
        attributes = self.num_classes
        text_layers = len(self.clip.transformer.resblocks)
        self.text_prompts = uniform(text_layers, s.text_prompts, attributes, text_width, patch=self.patch)
        self.text_prompts.requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.0)) if s.regions else None
        self.agg_bn = nn.BatchNorm1d(attributes) if s.regions else None

        self.word_embed = nn.Linear(shared, width)
        self.visual_embed = nn.Linear(shared, width) if s.visual_embed else nn.Identity()
        last = list(fusion.blocks)[len(fusion.blocks) - s.mm_layers :]
        self.blocks = nn.ModuleList(copy.deepcopy(last)).requires_grad_(False)
        self.norm = copy.deepcopy(fusion.norm).requires_grad_(True)
        for block in self.blocks:
            block.norm1.requires_grad_(True)
            block.norm2.requires_grad_(True)
        if s.mm_layers:
            self.blocks[-1].drop_path1, self.blocks[-1].drop_path2 = DropPath(s.drop_path), DropPath(s.drop_path)
        self.linear_layer = None if s.mm_layers else nn.Linear(attributes + len(self.order), attributes)
        self.heads = Heads(width, attributes)
        self.bn = nn.BatchNorm1d(attributes)

    def _read(self, sentences: Sequence[str] | Texts, tokenizer: Tokenizer | None) -> None:
        """Exchange the sentences, whose features are `text_features` (A, E), not normalised."""
        self.hold(sentences, tokenizer)
        self.sentences = () if isinstance(sentences, Texts) else tuple(sentences)
        self.tokenizer = tokenizer

    def reset_classifier(self, sentences: Sequence[str] | Texts, tokenizer: Tokenizer | None) -> None:
        """Exchange the sentences, any number of them; what is trained for each attribute starts anew."""
        self._read(sentences, tokenizer)
        count, like = self.num_classes, self.heads.weight
        self.heads = Heads(like.shape[-1], count).to(like.device, like.dtype)
        self.bn = nn.BatchNorm1d(count).to(like.device, like.dtype)
        if self.agg_bn is not None:
            self.agg_bn = nn.BatchNorm1d(count).to(like.device, like.dtype)
        if self.linear_layer is not None:
            self.linear_layer = nn.Linear(count + len(self.order), count).to(like.device, like.dtype)
        layers, prompts, _, width = self.text_prompts.shape
        self.text_prompts = uniform(layers, prompts, count, width, patch=self.patch)
        self.text_prompts.requires_grad_(False).to(like.device, like.dtype)
        reconfigure(self, sentences=sentences, tokenizer=tokenizer)

    def encode_texts(self) -> Tensor:
        if self.clip.text_projection.dtype != torch.float16:
            return super().encode_texts()
        clip = copy.deepcopy(self.clip).float()
        return encode_text(clip, self.embedded[:, : self.length], self.ends).half().float()

    def predict(self, images: Images, names: Names, transform: Transform = None) -> list[dict[str, float]]:
        """The probability of each attribute, by default under its sentence."""
        transform = transform or square_transform(self.clip.visual.image_size[0])
        return named(outputs(self, images, transform).sigmoid(), names or self.sentences)

    def fuse(self, tokens: Tensor) -> tuple[Tensor, Out]:
        """The attributes' tokens, (b, A, D), after the last norm, from image tokens (b, L, E); and `out` of the last
        block, of which the other tokens contribute keys and values only."""
        text = self.word_embed(self.text_features.to(tokens.dtype)).expand(len(tokens), -1, -1)
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
            regions = F.normalize(regions.to(self.clip.visual.proj.dtype), dim=-1).float()  # float16 as CLIP's weights
            cosines = regions @ F.normalize(self.text_features.float(), dim=-1).mT
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
            tokens = tokens.to(self.word_embed.weight.dtype)
            x, out = self.fuse(tokens)
            logits = self.bn(self.heads(x))
        if self.agg_bn is None:
            return Output(logits, None), out
        _, shares = self.similarities(tokens[:, self.class_positions])
        return Output(logits, self.agg_bn(self.aggregate(shares).to(logits.dtype))), out

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens of the image tower, (b, L, E), of images (b, 3, H, W).

        Without prompts and regions nothing in the tower is trained: it runs without autograd, and its tokens may be
        cached for `forward_head`.
        """
        return self.encode(images)[0]

    def forward_head(self, tokens: Tensor) -> Tensor | Output:
        """As `forward`, from the tokens (b, L, E) of `forward_features`."""
        output = self.decide(tokens)[0]
        return output if self.training else output.logits

    def forward(self, images: Tensor) -> Tensor | Output:
        """Logits (b, A) of images (b, 3, H, W); in training with the similarity (b, A), for `loss`."""
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
        """Attention and similarity maps of images (b, 3, H, W). Raises `BadParameter`: there is no fusion block."""
        if not self.blocks:
            raise BadParameter("mm_layers", 0, "1 or more: the maps are of the last block of the fusion")
        _, out = self.forward_intermediates(images)
        patches = self.grid[0] * self.grid[1]
        classes = [0, *self.class_positions[1:].tolist()]  # [CLS], also where the released code reads its neighbour
        tokens = F.normalize(out["tokens"][:, -patches:], dim=-1)  # (b, N, E)
        by_patch = (
            out["in the tower"].mean(1)[:, classes, -patches:],  # (b, 1 + R, N)
            out["in the fusion"].mean(1)[..., -patches:],  # (b, A, N)
            F.normalize(self.text_features, dim=-1) @ tokens.mT,  # (b, A, N)
        )
        return Maps(*(rearrange(x, "b r (gh gw) -> b r gh gw", gh=self.grid[0]) for x in by_patch))

    def half_clip(self) -> PromptPAR:
        """Convert CLIP's convolution, linear layers, attention and projections to float16, in place, as the authors do.

        Prompts, norms, fusion and heads stay in float32; training then needs no autocast, and has no loss scaling. The
        sentences are encoded again."""
        convert_weights_to_lp(self.clip, torch.float16)
        return self

    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the authors' two optimisers: "prompts", of the image tower, and "heads"."""
        tower = ("prompts", "region_tokens", "temperature", "agg_bn.")
        groups: dict[str, list[nn.Parameter]] = {"prompts": [], "heads": []}
        for name, p in self.trained().items():
            groups["prompts" if name.startswith(tower) else "heads"].append(p)
        return [{"name": name, "params": parameters} for name, parameters in groups.items() if parameters]

    def count(self, inert: bool = False) -> int:
        """The number of trainable parameters; `inert`: including the text tower's prompts, as the authors count."""
        return sum(p.numel() for p in self.trained().values()) + inert * self.text_prompts.numel()


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
