"""BAT: Bi-directional Adapter for Multi-modal Tracking (Cao, Guo, Zhu, Hu; AAAI 2024, arXiv 2312.10611).

A tracker for one camera, OSTrack, runs on two aligned streams: RGB, and thermal or event images. Its weights are shared
by the streams and frozen. Two bottleneck adapters in each block pass features from either stream to the other; only
they are trained. Neither stream is the main one: swapping them changes nothing.

    X'  = X  + MHSA(LN1(X )) + A1(LN1(Xi))        X"  = X'  + MLP(LN2(X' )) + A2(LN2(Xi'))
    Xi' = Xi + MHSA(LN1(Xi)) + A1(LN1(X ))        Xi" = Xi' + MLP(LN2(Xi')) + A2(LN2(X' ))

The streams are the two halves of one batch, so that every frozen layer is called once.
Written from SparkTempest/BAT at ccf9b2f and botaoye/OSTrack; their tensors load by `from_official`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from ... import backbones
from ...errors import BadCheckpoint, BadParameter, MissingWeights, check_choice
from ...ops.recorded import Recorded
from ..layers import state_dicts
from ..layers.frozen import frozen_copy
from ..layers.pos_embed import resize_pos_embed

DIRECTIONS = ("both", "first to second", "second to first")
STAGES = ("attention", "mlp")
FUSIONS = ("sum", "mean")
BRANCHES = ("ctr", "offset", "size")
COUNTERS = ("num_batches_tracked",)  # of BatchNorms; unused, and may be absent


class Prediction(NamedTuple):
    """The head's prediction on a search crop of f x f tokens; coordinates are fractions of the crop.

    Attributes:
        score: (B, 1, f, f) probability that the target's centre is in each cell, in (0, 1).
        size: (B, 2, f, f) width and height of the box if its centre is in the cell.
        offset: (B, 2, f, f) of the centre from the cell's corner, in cells.
        box: (B, 4) cx, cy, w, h at the highest score.
    """

    score: Tensor
    size: Tensor
    offset: Tensor
    box: Tensor


class CentreHead(nn.Module):
    """OSTrack's head: centre score, offset and size of the box, each by five convolutions.

    Args:
        dim: channels of the features.
        channels: width of the first convolution; each further one has half as many.
    """

    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        widths = [dim, *(channels // 2**i for i in range(4))]
        for name, out in zip(BRANCHES, (1, 2, 2), strict=True):
            layers = [
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
            ]
            setattr(self, name, nn.Sequential(*layers, nn.Conv2d(widths[-1], out, 1)))
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, features: Tensor) -> Prediction:
        """From features (B, dim, f, f). The maps are float32 whatever the precision of the convolutions.

        In half precision the largest score, 1 - 1e-4, would be 1, its loss infinite, and boxes would snap to a grid.
        """
        score, size, offset = (getattr(self, name)(features) for name in ("ctr", "size", "offset"))
        score, size, offset = self._probability(score.float()), self._probability(size.float()), offset.float()
        return Prediction(score, size, offset, decode(score, size, offset))

    @staticmethod
    def _probability(logits: Tensor) -> Tensor:
        return logits.sigmoid().clamp(1e-4, 1 - 1e-4)


def decode(score: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """The box (B, 4), cx, cy, w, h, at the highest score; of equal scores the first, row by row.

    `score` may be weighted by a window (`hann`).
    """
    f = score.shape[-1]
    best = score.flatten(1).argmax(1)
    at = best[:, None, None].expand(-1, 2, 1)
    wh, shift = size.flatten(2).gather(2, at)[..., 0], offset.flatten(2).gather(2, at)[..., 0]
    cell = torch.stack([best % f, best.div(f, rounding_mode="floor")], 1)
    return torch.cat([(cell + shift) / f, wh], 1)


def hann(f: int) -> Tensor:
    """The Hann window (1, 1, f, f) that prefers positions near the last one; nowhere zero (section 5.1)."""
    window = torch.hann_window(f + 2, periodic=False)[1:-1]
    return (window[:, None] * window)[None, None]


class OSTrack(state_dicts.OfficialModel):
    """The one-stream tracker that BAT freezes: template and search tokens attend to one another in a plain ViT.

    Args:
        vit: a timm ViT, which becomes a part of the tracker; its [CLS] token and position embedding are not used.
        template, search: sides of the two crops, in pixels.
        head_channels: see `CentreHead`.
    """

    def __init__(self, vit: VisionTransformer, template: int = 128, search: int = 256, head_channels: int = 256):
        super().__init__()
        patch = vit.patch_embed.patch_size[0]
        if template % patch or search % patch:
            raise BadParameter("template, search", (template, search), f"multiples of the patch size {patch}")
        self.vit, self.template, self.search = vit, template, search
        self.f_template, self.f = template // patch, search // patch
        self.position_template = nn.Parameter(torch.zeros(1, self.f_template**2, vit.embed_dim))
        self.position_search = nn.Parameter(torch.zeros(1, self.f**2, vit.embed_dim))
        for table in (self.position_template, self.position_search):
            nn.init.trunc_normal_(table, std=0.02)
        self.head = CentreHead(vit.embed_dim, head_channels)

    def embed_template(self, images: Tensor) -> Tensor:
        """Tokens (B, n, D) of template crops (B, 3, t, t); they are the same for a whole video."""
        return self._patches(images, self.template) + self.position_template

    def embed_search(self, images: Tensor) -> Tensor:
        """Tokens (B, m, D) of search crops (B, 3, s, s)."""
        return self._patches(images, self.search) + self.position_search

    def _patches(self, images: Tensor, side: int) -> Tensor:
        if images.shape[1:] != (3, side, side):
            raise BadParameter("crop", tuple(images.shape), f"(B, 3, {side}, {side}) for each stream")
        return self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """The prediction on one stream: template crops (B, 3, t, t), search crops (B, 3, s, s)."""
        return self.locate(self.embed_template(template), search)

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """The prediction on search crops (B, 3, s, s), with the tokens of `embed_template`."""
        return self.forward_head(self.forward_features(template_tokens, search))

    def forward_features(self, template_tokens: Tensor, search: Tensor) -> Tensor:
        """Tokens (B, n + m, D) after the last norm, template first."""
        x = torch.cat([template_tokens, self.embed_search(search)], 1)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)

    def forward_head(self, tokens: Tensor) -> Prediction:
        """The head on the last f x f tokens of (B, n + m, D)."""
        return self.head(tokens[:, -(self.f**2) :].mT.unflatten(2, (self.f, self.f)))

    @property
    def centre(self) -> int:
        """Index of the template's central token: row and column f/2 - 1 (27 of 64), as OSTrack takes it."""
        return (self.f_template // 2 - (self.f_template + 1) % 2) * (self.f_template + 1)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> OSTrack:
        """OSTrack from its released tensors (the entry `net` of OSTrack_ep0300.pth.tar); sizes are read from them.

        Args:
            heads: heads of the attention; one for every 64 channels by default.

        Raises `BadCheckpoint`: names that are missing, unknown, or of another shape.
        """
        tracker = _ostrack_of(state, heads)
        tracker.load_official(state)
        return tracker

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Copy the authors' tensors into this tracker. Raises `BadCheckpoint` when one does not match."""
        state_dicts.load_official(self, state, self.official_names(), "OSTrack", optional=COUNTERS)

    def official_names(self) -> dict[str, str]:
        """Our name -> the authors', for every tensor."""
        fixed = {"position_template": "backbone.pos_embed_z", "position_search": "backbone.pos_embed_x"}
        found = {}
        for name in self.state_dict():
            if name.startswith("head."):
                _, branch, i, *rest = name.split(".")
                found[name] = ".".join([f"box_head.conv{int(i) + 1}_{branch}", *rest])
            else:
                found[name] = fixed.get(name, name.replace("vit.", "backbone.", 1))
        return found


def foundation(weights: str | Path = "pretrained") -> OSTrack:
    """OSTrack-256, the tracker that BAT adapts: ViT-B/16, crops of 128 and 256 pixels; in eval mode.

    Args:
        weights: "random" (torch's current seed), or a file: OSTrack's checkpoint under its authors' names, whose sizes
            are then the model's. "mae": the ViT that OSTrack was initialised from, with resized position embeddings and
            a random head; it runs, and does not track.

    Raises:
        MissingWeights: "pretrained", which cannot be downloaded, with what to do.
        CorruptFile, BadCheckpoint: a file that cannot be read, or does not match.
    """
    if weights == "pretrained":
        ways = [
            "download OSTrack_ep0300.pth.tar (vitb_256_mae_ce_32x4_ep300) by the links in the README of "
            "github.com/botaoye/OSTrack and give its path as weights",
            "weights = 'mae' starts from the ViT that OSTrack was initialised from (it runs, and does not track)",
        ]
        raise MissingWeights("OSTrack-256", "nowhere: the authors put it on a drive that no program may fetch", ways)
    if weights not in ("random", "mae"):
        return OSTrack.from_official(backbones.read_state(weights))
    mae = weights == "mae"
    vit = backbones.build("vit_base_patch16_224.mae", "pretrained" if mae else "random", drop_path_rate=0.1)
    tracker = OSTrack(vit)
    if mae:
        for own, f in ((tracker.position_template, tracker.f_template), (tracker.position_search, tracker.f)):
            own.data = resize_pos_embed(vit.pos_embed, (f, f))[:, 1:].contiguous()
    return tracker.eval()


class Adapter(nn.Module):
    """The universal adapter A(h) = W_up . Dropout(W_mid (W_down h + b_down) + b_mid) + b_up (section 3.3).

    It has no activation function: in eval mode it is one affine map of rank at most `width`.

    Args:
        std: of the truncated normal that initialises the weights. The released constructor writes zeros, but the ViT's
            initialiser runs afterwards and overwrites them with 0.02; 0 gives the zeros, which never learn.
    """

    def __init__(self, dim: int, width: int = 8, dropout: float = 0.1, std: float = 0.02):
        super().__init__()
        self.down, self.mid, self.up = nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.down, self.mid, self.up):
            nn.init.zeros_(layer.bias)
            if std:
                nn.init.trunc_normal_(layer.weight, std=std, a=-2, b=2)
            else:
                nn.init.zeros_(layer.weight)

    def forward(self, h: Tensor) -> Tensor:
        """From (..., dim) to (..., dim)."""
        return self.up(self.dropout(self.mid(self.down(h))))


class Exchange(nn.Module):
    """The adapters of one stage of one block: what each stream receives from the other.

    Args:
        directions: one of `DIRECTIONS`; with one direction the other stream receives nothing.
        shared: one adapter for both directions, as in the paper, or one for each.
    """

    def __init__(self, directions: str, shared: bool, dim: int, width: int, dropout: float, std: float):
        super().__init__()
        self.directions = directions
        two = directions == "both" and not shared
        self.adapters = nn.ModuleList(Adapter(dim, width, dropout, std) for _ in range(1 + two))

    def forward(self, h: Tensor) -> Tensor:
        """What is added to each stream, from the normed tokens (2B, N, D) of both, the first stream first."""
        first, second = _halves(h)
        if self.directions == "first to second":
            return torch.cat([torch.zeros_like(first), self.adapters[0](first)])
        if self.directions == "second to first":
            return torch.cat([self.adapters[0](second), torch.zeros_like(second)])
        if len(self.adapters) == 2:
            return torch.cat([self.adapters[1](second), self.adapters[0](first)])
        return self.adapters[0](torch.cat([second, first]))


class BAT(state_dicts.OfficialModel):
    """OSTrack on two streams with bi-directional adapters.

    Args:
        tracker: the foundation; the model shares its tensors, frozen (or, for `tuned` "all", copies them).
        width: of the adapters' bottleneck; 0 for no adapters at all.
        dropout, std: see `Adapter`.
        directions, shared: see `Exchange`.
        stages: the sublayers of a block that have adapters, of `STAGES`.
        fusion: of the streams' last features: their sum, as released, or their mean.
        elimination: candidate elimination, block -> share of search tokens that remain (section 3.5). OSTrack has
            {3: 0.7, 6: 0.7, 9: 0.7}, BAT's released configurations none: each stream keeps its own tokens, so that the
            MLP's adapters mix different positions.
        tuned: "adapters" (the paper) or "all" (full fine-tuning of the same network).
    """

    def __init__(
        self,
        tracker: OSTrack,
        width: int = 8,
        *,
        dropout: float = 0.1,
        std: float = 0.02,
        directions: str = "both",
        shared: bool = True,
        stages: Sequence[str] = STAGES,
        fusion: str = "sum",
        elimination: Mapping[int, float] | None = None,
        tuned: str = "adapters",
    ):
        super().__init__()
        check_choice("directions", directions, DIRECTIONS)
        check_choice("fusion", fusion, FUSIONS)
        check_choice("tuned", tuned, ("adapters", "all"))
        if not set(stages) <= set(STAGES):
            raise BadParameter("stages", stages if isinstance(stages, str) else tuple(stages), STAGES)
        if width < 0:
            raise BadParameter("width", width, "0 or more")
        depth = len(tracker.vit.blocks)
        self.elimination = dict(elimination or {})
        for i, keep in self.elimination.items():
            if not (0 <= i < depth and 0 < keep <= 1):
                raise BadParameter("elimination", {i: keep}, f"blocks 0 to {depth - 1}, shares above 0 and up to 1")
        self.tracker = frozen_copy(tracker) if tuned == "adapters" else copy.deepcopy(tracker).requires_grad_(True)
        self.fusion, self.tuned, self.grad_checkpointing = fusion, tuned, False
        self.exchanges = nn.ModuleList(
            nn.ModuleDict(
                {
                    stage: Exchange(directions, shared, tracker.vit.embed_dim, width, dropout, std)
                    for stage in STAGES
                    if stage in stages and width
                }
            )
            for _ in range(depth)
        )
        for name in ("cls_token", "pos_embed"):  # in the released checkpoints, and never used
            if getattr(self.tracker.vit, name, None) is not None:
                getattr(self.tracker.vit, name).requires_grad_(False)

    def train(self, mode: bool = True) -> BAT:
        """As `nn.Module.train`, but the head's BatchNorms keep their statistics (FIX_BN in the released code)."""
        super().train(mode)
        self.tracker.head.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def forward(self, template: Tensor, search: Tensor, trace: dict | None = None) -> Prediction:
        """The prediction on template (B, 6, t, t) and search (B, 6, s, s) crops.

        Channels 0-2 are the first stream, 3-5 the second. For `trace` see `forward_features`.
        """
        return self.locate(self.embed_template(template), search, trace)

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (2B, n, D) of crops (B, 6, t, t), for `locate`; computed once per video."""
        return self.tracker.embed_template(streams(template))

    def locate(self, template_tokens: Tensor, search: Tensor, trace: dict | None = None) -> Prediction:
        """The prediction on search crops (B, 6, s, s), with the tokens of `embed_template`."""
        return self.tracker.forward_head(self.forward_features(template_tokens, search, trace))

    def forward_features(self, template_tokens: Tensor, search: Tensor, trace: dict | None = None) -> Tensor:
        """The fused tokens F (B, n + m, D), template first.

        `trace` receives lists, one entry per block: "tokens" (2B, N, D); "attention" (2B, heads, m), from the
        template's central token to the search tokens; "traffic" {stage: (2B, N)}, the norm of the adapter's output over
        the norm of the frozen term next to it; "kept" (2B, k), indices of the remaining search tokens.
        """
        tracker = self.tracker
        x = torch.cat([template_tokens, tracker.embed_search(streams(search))], 1)
        n, m = tracker.f_template**2, tracker.f**2
        kept = torch.arange(m, device=x.device).expand(len(x), m)
        for i, (block, exchange) in enumerate(zip(tracker.vit.blocks, self.exchanges, strict=True)):
            arguments = block, exchange, x, kept, self.elimination.get(i, 1.0), trace
            if self.grad_checkpointing and torch.is_grad_enabled() and trace is None:
                x, kept = checkpoint(self._block, *arguments, use_reentrant=False)
            else:
                x, kept = self._block(*arguments)
        x = tracker.vit.norm(x)
        if self.elimination:  # eliminated tokens become zeros, all others return to their positions
            whole = x.new_zeros(len(x), m, x.shape[-1])
            x = torch.cat([x[:, :n], whole.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), x[:, n:])], 1)
        first, second = _halves(x)
        return first + second if self.fusion == "sum" else (first + second) / 2

    def _block(
        self, block: nn.Module, exchange: nn.ModuleDict, x: Tensor, kept: Tensor, keep: float, trace: dict | None
    ) -> tuple[Tensor, Tensor]:
        """One frozen block on both streams (2B, N, D), and the adapters between them."""
        n, traced = self.tracker.f_template**2, trace is not None
        h = block.norm1(x)
        term, row = attend(block.attn, h, self.tracker.centre if keep < 1 or traced else None)
        passed = {"attention": exchange["attention"](h)} if "attention" in exchange else {}
        traffic = {s: p.norm(dim=-1) / term.norm(dim=-1) for s, p in passed.items()} if traced else {}
        x = x + block.drop_path1(term) + sum(map(block.drop_path1, passed.values()))
        if keep < 1 and row is not None:
            x, kept = eliminate(x, row[..., n:].mean(1), kept, keep, n)

        h = block.norm2(x)
        term = block.mlp(h)
        passed = {"mlp": exchange["mlp"](h)} if "mlp" in exchange else {}
        if traced:
            traffic |= {s: p.norm(dim=-1) / term.norm(dim=-1) for s, p in passed.items()}
        x = x + block.drop_path2(term) + sum(map(block.drop_path2, passed.values()))
        if trace is not None and row is not None:
            for key, value in (("tokens", x), ("attention", row[..., n:]), ("traffic", traffic), ("kept", kept)):
                trace.setdefault(key, []).append(value)
        return x, kept

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, **options: Any) -> BAT:
        """BAT from its released tensors (BAT_rgbt.pth, or the entry `net` of a training checkpoint).

        Args:
            heads: heads of the attention; one for every 64 channels by default.
            options: of the constructor, besides `width`, which is read from the tensors.

        Raises `BadCheckpoint`: names that are missing, unknown, or of another shape.
        """
        first = "backbone.blocks.0.adap_t.adapter_down.weight"
        if first not in state:
            raise BadCheckpoint("BAT (an OSTrack checkpoint has no adapters: OSTrack.from_official)", missing=[first])
        model = cls(_ostrack_of(state, heads), len(state[first]), **options)
        state_dicts.load_official(model, state, model.official_names(), "BAT", optional=COUNTERS)
        return model.eval()

    def official_names(self) -> dict[str, str]:
        """Our name -> the authors', for every tensor. The released network has shared adapters at both stages.

        Raises `BadParameter`: one adapter for each direction, for which the authors have no names.
        """
        names = {f"tracker.{ours}": official for ours, official in self.tracker.official_names().items()}
        adapter = {"attention": "adap_t", "mlp": "adap2_t"}
        for name in self.state_dict():
            if ".adapters.1." in name:
                raise BadParameter("shared", False, "True: the released network has one adapter for both directions")
            if found := re.fullmatch(r"exchanges\.(\d+)\.(\w+)\.adapters\.0\.(\w+)\.(\w+)", name):
                block, stage, layer, kind = found.groups()
                names[name] = f"backbone.blocks.{block}.{adapter[stage]}.adapter_{layer}.{kind}"
        return names


def streams(images: Tensor) -> Tensor:
    """From (B, 6, H, W) to (2B, 3, H, W): the first streams, then the second ones."""
    if images.ndim != 4 or images.shape[1] != 6:
        raise BadParameter("crop", tuple(images.shape), "(B, 6, H, W): three channels of each stream")
    return torch.cat(images.chunk(2, 1))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two streams of a batch (2B, ...), of any B: `chunk` would fix it in an exported model."""
    first, second = x.unflatten(0, (2, -1)).unbind()
    return first, second


def attend(attn: Attention, h: Tensor, query: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Multi-head self-attention of a timm block on normed tokens (B, N, D), and the weights of one query token.

    Only that one row (B, heads, N) of the map is ever formed, and only when `query` is given.
    """
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    x = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    row = None if query is None else ((q[:, :, query, None] @ k.mT) * attn.scale).softmax(-1)[:, :, 0]
    return x, row


def eliminate(x: Tensor, attention: Tensor, kept: Tensor, keep: float, n: int) -> tuple[Tensor, Tensor]:
    """Candidate elimination: the share `keep` of the search tokens, in falling order of the template's attention.

    Args:
        x: (B, n + m, D), n template tokens first.
        attention: (B, m), mean over heads.
        kept: (B, m) index of each search token in the crop.

    Returns:
        x (B, n + k, D) and its `kept` (B, k), k = ceil(keep m).
    """
    order = attention.topk(math.ceil(keep * attention.shape[1]), dim=1).indices
    search = x[:, n:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :n], search], 1), kept.gather(1, order)


# --- baselines --------------------------------------------------------------------------------------------------------


class _Baseline(Recorded, nn.Module):
    """A frozen tracker on the two streams, called as `BAT`: subclasses have `embed_template` and `locate`."""

    def __init__(self, tracker: OSTrack):
        super().__init__()
        self.tracker = frozen_copy(tracker)

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """As `BAT.forward`."""
        return self.locate(self.embed_template(template), search)


class SingleStream(_Baseline):
    """The frozen foundation on one stream of the pair. `stream` is 0 (RGB) or 1 (thermal, events)."""

    def __init__(self, tracker: OSTrack, stream: int):
        super().__init__(tracker)
        check_choice("stream", stream, (0, 1))
        self.stream = stream

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (B, n, D)."""
        return self.tracker.embed_template(template.chunk(2, 1)[self.stream])

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """As `BAT.locate`."""
        return self.tracker.locate(template_tokens, search.chunk(2, 1)[self.stream])


class HigherPeak(_Baseline):
    """The frozen foundation on each stream; for each sample the prediction of the stream with the higher peak score."""

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (2B, n, D)."""
        return self.tracker.embed_template(streams(template))

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """As `BAT.locate`."""
        both = self.tracker.locate(template_tokens, streams(search))
        first, second = _halves(both.score.flatten(1).amax(1))
        chosen = torch.arange(len(first), device=first.device) + len(first) * (second > first)
        return Prediction(*(part[chosen] for part in both))


# --- losses (section 4) -----------------------------------------------------------------------------------------------


def centre_map(boxes: Tensor, f: int, overlap: float = 0.7) -> Tensor:
    """The target score map (B, 1, f, f): a Gaussian around the centre's cell, 1 at the centre.

    Its radius is CornerNet's, the largest shift of a box's corners that leaves the IoU above `overlap`, in the variant
    that divides by 2 throughout.

    Args:
        boxes: (B, 4) x, y, w, h as fractions of the crop.
    """
    x, y, w, h = (boxes * f).unbind(1)
    cx, cy = (x + w / 2).round(), (y + h / 2).round()

    def root(b: Tensor, c: Tensor, a: float) -> Tensor:
        return (b + (b**2 - 4 * a * c).sqrt()) / 2

    radius = torch.stack(
        [
            root(h + w, w * h * (1 - overlap) / (1 + overlap), 1),
            root(2 * (h + w), (1 - overlap) * w * h, 4),
            root(-2 * overlap * (h + w), (overlap - 1) * w * h, 4 * overlap),
        ]
    )
    r = radius.amin(0).clamp_min(0).floor()[:, None, None]
    cells = torch.arange(f, device=boxes.device, dtype=boxes.dtype)
    dx, dy = cells - cx[:, None, None], cells[:, None] - cy[:, None, None]
    near = (dx.abs() <= r) & (dy.abs() <= r)
    return (near * torch.exp(-(dx**2 + dy**2) / (2 * ((2 * r + 1) / 6) ** 2)))[:, None]


def focal(score: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss (alpha 2, beta 4) of a score map and `centre_map`, over the number of centres."""
    # no masks as indices, which would synchronise with a GPU
    p, centre = score.clamp_min(1e-12), target == 1
    positive = (p.log() * (1 - p) ** 2 * centre).sum()
    negative = ((1 - p).clamp_min(1e-12).log() * p**2 * (1 - target) ** 4).sum()
    return -(positive + negative) / centre.sum().clamp_min(1)


def mean_iou(prediction: Prediction, boxes: Tensor) -> Tensor:
    """The mean IoU of the predicted boxes with `boxes` (B, 4) as in `losses`, without gradient."""
    predicted = box_convert(prediction.box.detach(), "cxcywh", "xyxy")
    return box_iou(predicted, box_convert(boxes, "xywh", "xyxy").clamp(0, 1)).diagonal().mean()


def losses(prediction: Prediction, boxes: Tensor) -> dict[str, Tensor]:
    """The terms "focal", "giou" and "l1", and their sum "loss" = focal + 2 GIoU + 5 L1.

    Args:
        boxes: (B, 4) x, y, w, h as fractions of the search crop.
    """
    predicted = box_convert(prediction.box, "cxcywh", "xyxy")
    target = box_convert(boxes, "xywh", "xyxy").clamp(0, 1)
    terms = {
        "focal": focal(prediction.score, centre_map(boxes, prediction.score.shape[-1])),
        # of all pairs: torchvision's loss of matched pairs takes masks as indices
        "giou": 1 - generalized_box_iou(predicted, target).diagonal().mean(),
        "l1": F.l1_loss(predicted, target),
    }
    return terms | {"loss": terms["focal"] + 2 * terms["giou"] + 5 * terms["l1"]}


# --- the authors' names -----------------------------------------------------------------------------------------------


def _ostrack_of(state: Mapping[str, Tensor], heads: int | None) -> OSTrack:
    """An OSTrack whose sizes are those of the authors' tensors."""
    needed = [
        "backbone.patch_embed.proj.weight",
        "backbone.pos_embed_z",
        "backbone.pos_embed_x",
        "backbone.blocks.0.mlp.fc1.weight",
        "box_head.conv1_ctr.0.weight",
    ]
    state_dicts.check_names(state, needed, "OSTrack or BAT")
    kernel, z, x, fc1, conv = (state[name] for name in needed)
    dim, patch = kernel.shape[0], kernel.shape[-1]
    tables = any(f"backbone.{name}" in state for name in ("cls_token", "pos_embed"))
    table = state.get("backbone.pos_embed")
    image = patch if table is None else patch * math.isqrt(table.shape[1] - 1)
    vit = VisionTransformer(
        img_size=image,
        patch_size=patch,
        embed_dim=dim,
        depth=state_dicts.depth(state, "backbone.blocks."),
        num_heads=heads or dim // 64,
        mlp_ratio=len(fc1) / dim,
        num_classes=0,
        class_token=tables,
        pos_embed="learn" if tables else "none",
        global_pool="",
        drop_path_rate=0.1,
    )
    template, search = (patch * math.isqrt(table.shape[1]) for table in (z, x))
    return OSTrack(vit, template, search, head_channels=len(conv)).eval()
