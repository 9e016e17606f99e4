"""BAT: Bi-directional Adapter for Multi-modal Tracking (Cao, Guo, Zhu, Hu; AAAI 2024, arXiv 2312.10611).

A tracker made for one camera, OSTrack, runs on two aligned streams: RGB, and thermal or event images. Its weights are
shared by the streams and frozen. Per block two bottleneck adapters pass features across, from either stream to the
other, and only they are trained. No stream is the main one: swapping them changes nothing.

    X'  = X  + MHSA(LN1(X )) + A1(LN1(Xi))        X"  = X'  + MLP(LN2(X' )) + A2(LN2(Xi'))
    Xi' = Xi + MHSA(LN1(Xi)) + A1(LN1(X ))        Xi" = Xi' + MLP(LN2(Xi')) + A2(LN2(X' ))

Both streams are the two halves of ONE batch, so that every frozen layer is called once.
Written from SparkTempest/BAT at ccf9b2f and botaoye/OSTrack; their tensors load by `from_official`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from ... import backbones
from ...errors import BadCheckpoint, BadParameter, MissingWeights
from ...toy import encoders

DIRECTIONS = ("both", "first to second", "second to first")
STAGES = ("attention", "mlp")
FUSIONS = ("sum", "mean")
BRANCHES = ("ctr", "offset", "size")


class Prediction(NamedTuple):
    """What the head says of a search crop of f x f tokens; coordinates are fractions of the crop.

    Attributes:
        score: (B, 1, f, f) how likely the target's centre is in each cell, in (0, 1).
        size: (B, 2, f, f) width and height, were the centre here.
        offset: (B, 2, f, f) of the centre from the cell's corner, in cells.
        box: (B, 4) cx, cy, w, h at the highest score.
    """

    score: Tensor
    size: Tensor
    offset: Tensor
    box: Tensor


class CentreHead(nn.Module):
    """OSTrack's head: where the centre is, its offset and the box's size, each by five convolutions.

    Args:
        dim: channels of the features.
        channels: width of the first convolution; each further one has half of it.
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
    """The box (B, 4), cx, cy, w, h, at the highest score; of equal ones the first in reading order.

    `score` may be weighted by a window (`hann`): the box is still read from the same maps.
    """
    f = score.shape[-1]
    best = score.flatten(1).argmax(1)
    at = best[:, None, None].expand(-1, 2, 1)
    wh, shift = size.flatten(2).gather(2, at)[..., 0], offset.flatten(2).gather(2, at)[..., 0]
    cell = torch.stack([best % f, best.div(f, rounding_mode="floor")], 1)
    return torch.cat([(cell + shift) / f, wh], 1)


def hann(f: int) -> Tensor:
    """The Hann window (1, 1, f, f) that holds a tracker near the last place; nowhere zero (section 5.1)."""
    window = torch.hann_window(f + 2, periodic=False)[1:-1]
    return (window[:, None] * window)[None, None]


class OSTrack(nn.Module):
    """The one-stream tracker that BAT freezes: template and search tokens attend to one another in a plain ViT.

    Args:
        vit: a timm ViT; its blocks, patch embedding and last norm are used, its class token and table are not.
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
        """Tokens (B, n, D) of template crops (B, 3, t, t): they are the same for a whole video."""
        return self._patches(images, self.template) + self.position_template

    def embed_search(self, images: Tensor) -> Tensor:
        """Tokens (B, m, D) of search crops (B, 3, s, s)."""
        return self._patches(images, self.search) + self.position_search

    def _patches(self, images: Tensor, side: int) -> Tensor:
        if images.shape[1:] != (3, side, side):
            raise BadParameter("crop", tuple(images.shape), f"(B, 3, {side}, {side}) for each stream")
        return self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """Track one stream: template (B, 3, t, t), search (B, 3, s, s)."""
        return self.locate(self.features(template, search))

    def features(self, template: Tensor, search: Tensor) -> Tensor:
        """Normed tokens (B, n + m, D), template first."""
        x = torch.cat([self.embed_template(template), self.embed_search(search)], 1)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)

    def locate(self, tokens: Tensor) -> Prediction:
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

        Raises:
            BadCheckpoint: names that are missing, unknown, or of another shape.
        """
        tracker = _ostrack_of(state, heads)
        _load(tracker, state, tracker.official_names(), "OSTrack")
        return tracker

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

    def to_official(self) -> dict[str, Tensor]:
        """The tensors under the authors' names."""
        state = self.state_dict()
        return {official: state[name] for name, official in self.official_names().items()}


def foundation(name: str, weights: str | Path = "pretrained") -> OSTrack:
    """The tracker that BAT stands on.

    Args:
        name: "ostrack_b256" (ViT-B/16, crops of 128 and 256 pixels) or "pocket_ostrack" (crops of 32 and 64).
        weights: "pretrained" (pocket: the shipped weights), "random" (torch's current seed), or a file: OSTrack's
            checkpoint under its authors' names. For "ostrack_b256" also "mae": the ViT that OSTrack started from, with
            its position table resized, and an untrained head; it runs, and does not track.

    Raises:
        BadParameter: another name.
        MissingWeights: no pretrained weights are at hand.
        CorruptFile, BadCheckpoint: a file that cannot be read, or does not fit.
    """
    if name == "pocket_ostrack":
        vit = VisionTransformer(
            img_size=64,
            patch_size=8,
            embed_dim=64,
            depth=4,
            num_heads=4,
            mlp_ratio=2,
            num_classes=0,
            class_token=False,
            pos_embed="none",
            global_pool="",
        )
        tracker = OSTrack(vit, template=32, search=64, head_channels=64)
        if weights in ("pretrained", "pocket"):
            weights = encoders.weights_file(name)
        if weights != "random":
            _load(tracker, backbones.read_state(weights), tracker.official_names(), name)
        return tracker.eval()
    if name != "ostrack_b256":
        raise BadParameter("name", name, ("ostrack_b256", "pocket_ostrack"))
    if weights == "pretrained":
        ways = [
            "download OSTrack_ep0300.pth.tar (vitb_256_mae_ce_32x4_ep300) by the links in the README of "
            "github.com/botaoye/OSTrack and give its path as weights",
            "weights = 'mae' starts from the ViT that OSTrack started from (it runs, and does not track)",
        ]
        raise MissingWeights("OSTrack-256", "nowhere: the authors put it on a drive that no program may fetch", ways)
    if weights not in ("random", "mae"):
        return OSTrack.from_official(backbones.read_state(weights))
    mae = weights == "mae"
    vit = backbones.build("vit_base_patch16_224.mae", "pretrained" if mae else "random", drop_path_rate=0.1)
    tracker = OSTrack(vit)
    if mae:
        table = vit.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        for own, f in ((tracker.position_template, tracker.f_template), (tracker.position_search, tracker.f)):
            resized = F.interpolate(table, (f, f), mode="bicubic", align_corners=False)
            own.data = resized.flatten(2).mT.contiguous()
    return tracker.eval()


class Adapter(nn.Module):
    """The universal adapter A(h) = W_up . Dropout(W_mid (W_down h + b_down) + b_mid) + b_up (section 3.3).

    There is no nonlinearity in it: in eval mode it is one affine map of rank at most `width`.

    Args:
        std: of the truncated normal that the weights start from. The released constructor writes zeros, but the ViT's
            initialiser runs afterwards and overwrites them with 0.02; 0 gives the zeros, from which it never learns.
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
    """The adapters at one place of one block: what each stream receives from the other.

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
        """From the normed tokens (2B, N, D) of both streams, the first in the first half, to what is added to each."""
        first, second = h.chunk(2)
        if self.directions == "first to second":
            return torch.cat([torch.zeros_like(first), self.adapters[0](first)])
        if self.directions == "second to first":
            return torch.cat([self.adapters[0](second), torch.zeros_like(second)])
        if len(self.adapters) == 2:
            return torch.cat([self.adapters[1](second), self.adapters[0](first)])
        return self.adapters[0](torch.cat([second, first]))


class BAT(nn.Module):
    """OSTrack on two streams with bi-directional adapters.

    Args:
        tracker: the foundation, frozen here and shared by both streams.
        width: of the adapters' bottleneck; 0 for no adapters at all.
        dropout, std: see `Adapter`.
        directions, shared: see `Exchange`.
        stages: where adapters stand in a block, of `STAGES`.
        fusion: how the streams' last features meet: their sum, as released, or their mean.
        elimination: candidate elimination, block -> share of search tokens kept (section 3.5). OSTrack has
            {3: 0.7, 6: 0.7, 9: 0.7}; BAT's released configurations have none: each stream keeps its own tokens, and the
            MLP's adapters then mix different places.
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
        for name, value, accepted in (
            ("directions", directions, DIRECTIONS),
            ("fusion", fusion, FUSIONS),
            ("tuned", tuned, ("adapters", "all")),
        ):
            if value not in accepted:
                raise BadParameter(name, value, accepted)
        if not set(stages) <= set(STAGES):
            raise BadParameter("stages", stages if isinstance(stages, str) else tuple(stages), STAGES)
        if width < 0:
            raise BadParameter("width", width, "0 or more")
        depth = len(tracker.vit.blocks)
        self.elimination = dict(elimination or {})
        for i, keep in self.elimination.items():
            if not (0 <= i < depth and 0 < keep <= 1):
                raise BadParameter("elimination", {i: keep}, f"blocks 0 to {depth - 1}, shares above 0 and up to 1")
        self.tracker, self.fusion, self.tuned = tracker, fusion, tuned
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
        tracker.requires_grad_(tuned == "all")
        # kept from the released checkpoints, never used: they get no gradient
        for name in ("cls_token", "pos_embed"):
            if getattr(tracker.vit, name, None) is not None:
                getattr(tracker.vit, name).requires_grad_(False)

    def train(self, mode: bool = True) -> BAT:
        """As usual, but the head's BatchNorms keep the statistics of the foundation (FIX_BN in the released code)."""
        super().train(mode)
        self.tracker.head.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, template: Tensor, search: Tensor, trace: dict | None = None) -> Prediction:
        """Track: template (B, 6, t, t) and search (B, 6, s, s), channels 0-2 the first stream, 3-5 the second.

        `trace`, when given, is filled with what the pictures show (see `features`).
        """
        return self.locate(self.embed_template(template), search, trace)

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (2B, n, D) of crops (B, 6, t, t), for `locate`: once a video."""
        return self.tracker.embed_template(streams(template))

    def locate(self, template_tokens: Tensor, search: Tensor, trace: dict | None = None) -> Prediction:
        """The target in search crops (B, 6, s, s), with the tokens of `embed_template`."""
        return self.tracker.locate(self.features(template_tokens, search, trace))

    def features(self, template_tokens: Tensor, search: Tensor, trace: dict | None = None) -> Tensor:
        """The fused tokens F (B, n + m, D), template first.

        `trace` receives lists, one entry a block: "tokens" (2B, N, D); "attention" (2B, heads, m), from the template's
        central token to the search tokens; "traffic" {stage: (2B, N)}, the norm of what the adapter brings over the
        norm of the frozen term that it stands beside; "kept" (2B, k), indices of the search tokens still there.
        """
        tracker = self.tracker
        x = torch.cat([template_tokens, tracker.embed_search(streams(search))], 1)
        n, m = tracker.f_template**2, tracker.f**2
        kept = torch.arange(m, device=x.device).expand(len(x), m)
        for i, (block, exchange) in enumerate(zip(tracker.vit.blocks, self.exchanges, strict=True)):
            x, kept = self._block(block, exchange, x, kept, self.elimination.get(i, 1.0), trace)
        x = tracker.vit.norm(x)
        if self.elimination:  # what was eliminated comes back as zeros, everything at its own place
            whole = x.new_zeros(len(x), m, x.shape[-1])
            x = torch.cat([x[:, :n], whole.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), x[:, n:])], 1)
        first, second = x.chunk(2)
        return first + second if self.fusion == "sum" else (first + second) / 2

    def _block(
        self, block: nn.Module, exchange: nn.ModuleDict, x: Tensor, kept: Tensor, keep: float, trace: dict | None
    ) -> tuple[Tensor, Tensor]:
        """One frozen block on both streams (2B, N, D), and what they pass to one another."""
        n, asked = self.tracker.f_template**2, trace is not None
        h = block.norm1(x)
        term, row = attend(block.attn, h, self.tracker.centre if keep < 1 or asked else None)
        passed = {"attention": exchange["attention"](h)} if "attention" in exchange else {}
        traffic = {s: p.norm(dim=-1) / term.norm(dim=-1) for s, p in passed.items()} if asked else {}
        x = x + block.drop_path1(term) + sum(map(block.drop_path1, passed.values()))
        if keep < 1:
            x, kept = eliminate(x, row[..., n:].mean(1), kept, keep, n)

        h = block.norm2(x)
        term = block.mlp(h)
        passed = {"mlp": exchange["mlp"](h)} if "mlp" in exchange else {}
        if asked:
            traffic |= {s: p.norm(dim=-1) / term.norm(dim=-1) for s, p in passed.items()}
        x = x + block.drop_path2(term) + sum(map(block.drop_path2, passed.values()))
        if asked:
            for key, value in (("tokens", x), ("attention", row[..., n:]), ("traffic", traffic), ("kept", kept)):
                trace.setdefault(key, []).append(value)
        return x, kept

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, **options: object) -> BAT:
        """BAT from its released tensors (BAT_rgbt.pth, or the entry `net` of a training checkpoint).

        Args:
            heads: heads of the attention; one for every 64 channels by default.
            options: of the constructor, besides `width`, which is read from the tensors.

        Raises:
            BadCheckpoint: names that are missing, unknown, or of another shape.
        """
        first = "backbone.blocks.0.adap_t.adapter_down.weight"
        if first not in state:
            raise BadCheckpoint("BAT (an OSTrack checkpoint has no adapters: OSTrack.from_official)", missing=[first])
        model = cls(_ostrack_of(state, heads), len(state[first]), **options)
        _load(model, state, model.official_names(), "BAT")
        return model.eval()

    def official_names(self) -> dict[str, str]:
        """Our name -> the authors', for every tensor. The released network has shared adapters at both stages.

        Raises:
            BadParameter: one adapter for each direction, for which the authors have no names.
        """
        names = {f"tracker.{ours}": official for ours, official in self.tracker.official_names().items()}
        place = {"attention": "adap_t", "mlp": "adap2_t"}
        for name in self.state_dict():
            if ".adapters.1." in name:
                raise BadParameter("shared", False, "True: the released network has one adapter for both directions")
            if found := re.fullmatch(r"exchanges\.(\d+)\.(\w+)\.adapters\.0\.(\w+)\.(\w+)", name):
                block, stage, layer, kind = found.groups()
                names[name] = f"backbone.blocks.{block}.{place[stage]}.adapter_{layer}.{kind}"
        return names

    def to_official(self) -> dict[str, Tensor]:
        """The tensors under the authors' names."""
        state = self.state_dict()
        return {official: state[name] for name, official in self.official_names().items()}


def streams(images: Tensor) -> Tensor:
    """From (B, 6, H, W) to (2B, 3, H, W): the first streams, then the second ones."""
    if images.ndim != 4 or images.shape[1] != 6:
        raise BadParameter("crop", tuple(images.shape), "(B, 6, H, W): three channels of each stream")
    return torch.cat(images.chunk(2, 1))


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


def keep_rate(epoch: int, start: int, stop: int, ratio: float) -> float:
    """OSTrack's schedule of elimination: all tokens before epoch `start`, `ratio` from `stop` on, a cosine between."""
    done = min(max((epoch - start) / (stop - start), 0.0), 1.0)
    return ratio + (1 - ratio) * (1 + math.cos(math.pi * done)) / 2


# --- baselines --------------------------------------------------------------------------------------------------------


class SingleStream(nn.Module):
    """The foundation on one stream of the pair, nothing trained. `stream` is 0 (RGB) or 1 (thermal, events)."""

    def __init__(self, tracker: OSTrack, stream: int):
        super().__init__()
        if stream not in (0, 1):
            raise BadParameter("stream", stream, (0, 1))
        self.tracker, self.stream = tracker.requires_grad_(False), stream

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """As `BAT.forward`."""
        return self.locate(self.embed_template(template), search)

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (B, n, D)."""
        return self.tracker.embed_template(template.chunk(2, 1)[self.stream])

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """As `BAT.locate`."""
        return _whole(self.tracker, template_tokens, search.chunk(2, 1)[self.stream])


class HigherPeak(nn.Module):
    """The foundation on each stream by itself; for each sample the stream whose highest score is higher is believed."""

    def __init__(self, tracker: OSTrack):
        super().__init__()
        self.tracker = tracker.requires_grad_(False)

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """As `BAT.forward`."""
        return self.locate(self.embed_template(template), search)

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (2B, n, D)."""
        return self.tracker.embed_template(streams(template))

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """As `BAT.locate`."""
        both = _whole(self.tracker, template_tokens, streams(search))
        first, second = both.score.flatten(1).amax(1).chunk(2)
        chosen = torch.arange(len(first), device=first.device) + len(first) * (second > first)
        return Prediction(*(part[chosen] for part in both))


def _whole(tracker: OSTrack, template_tokens: Tensor, images: Tensor) -> Prediction:
    x = torch.cat([template_tokens, tracker.embed_search(images)], 1)
    for block in tracker.vit.blocks:
        x = block(x)
    return tracker.locate(tracker.vit.norm(x))


# --- losses (section 4) -----------------------------------------------------------------------------------------------


def centre_map(boxes: Tensor, f: int, overlap: float = 0.7) -> Tensor:
    """The target score map (B, 1, f, f): a Gaussian around the centre's cell, 1 at the centre.

    Its radius is CornerNet's: the largest shift of a box's corners that leaves the IoU above `overlap`, in the
    well-known variant that divides by 2 throughout.

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
    """CenterNet's focal loss (alpha 2, beta 4) of a score map against `centre_map`, by the number of centres."""
    p, centre = score.clamp_min(1e-12), target == 1
    positive = (p.log() * (1 - p) ** 2)[centre].sum()
    negative = ((1 - p).log() * p**2 * (1 - target) ** 4)[~centre].sum()
    return -(positive + negative) / max(int(centre.sum()), 1)


def losses(prediction: Prediction, boxes: Tensor) -> dict[str, Tensor]:
    """The three terms and their sum "total" = focal + 2 GIoU + 5 L1.

    Args:
        boxes: (B, 4) x, y, w, h as fractions of the search crop.
    """
    predicted = box_convert(prediction.box, "cxcywh", "xyxy")
    wanted = box_convert(boxes, "xywh", "xyxy").clamp(0, 1)
    terms = {
        "focal": focal(prediction.score, centre_map(boxes, prediction.score.shape[-1])),
        "giou": generalized_box_iou_loss(predicted, wanted, reduction="mean"),
        "l1": F.l1_loss(predicted, wanted),
    }
    return terms | {"total": terms["focal"] + 2 * terms["giou"] + 5 * terms["l1"]}


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
    if missing := [name for name in needed if name not in state]:
        raise BadCheckpoint("OSTrack or BAT", missing=missing)
    kernel, z, x, fc1, conv = (state[name] for name in needed)
    dim, patch = kernel.shape[0], kernel.shape[-1]
    tables = any(f"backbone.{name}" in state for name in ("cls_token", "pos_embed"))
    table = state.get("backbone.pos_embed")
    image = patch if table is None else patch * math.isqrt(table.shape[1] - 1)
    vit = VisionTransformer(
        img_size=image,
        patch_size=patch,
        embed_dim=dim,
        depth=1 + max(int(name.split(".")[2]) for name in state if name.startswith("backbone.blocks.")),
        num_heads=heads or dim // 64,
        mlp_ratio=len(fc1) / dim,
        num_classes=0,
        class_token=tables,
        pos_embed="learn" if tables else "none",
        global_pool="",
        drop_path_rate=0.1,
    )
    sides = (patch * math.isqrt(table.shape[1]) for table in (z, x))
    return OSTrack(vit, *sides, head_channels=len(conv)).eval()


def _load(model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> None:
    """Load official tensors strictly; BatchNorm's counters, which nothing reads, may be absent."""
    own = model.state_dict()
    wanted = {official: ours for ours, official in names.items()}
    missing = [o for o in wanted if o not in state and not o.endswith("num_batches_tracked")]
    unknown = [o for o in state if o not in wanted]
    shapes = [
        f"{o} {tuple(state[o].shape)}, expected {tuple(own[wanted[o]].shape)}"
        for o in state
        if o in wanted and state[o].shape != own[wanted[o]].shape
    ]
    if missing or unknown or shapes:
        raise BadCheckpoint(what, missing=missing, unknown=unknown, shapes=shapes)
    model.load_state_dict({wanted[o]: value for o, value in state.items()}, strict=False)
