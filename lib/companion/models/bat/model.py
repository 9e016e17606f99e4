"""BAT: Bi-directional Adapter for Multi-modal Tracking (Cao, Guo, Zhu, Hu; AAAI 2024, arXiv 2312.10611).

A tracker for one camera, OSTrack, runs on two aligned streams: RGB, and thermal or event images. Its weights are shared
by the streams and frozen. Two bottleneck adapters in each block pass features from either stream to the other; only
they are trained. Neither stream is the main one: swapping them changes nothing.

    A(h) = W_up . Dropout(W_mid (W_down h + b_down) + b_mid) + b_up                                           (1)
    X'   = X  + MHSA(LN1(X )) + A1(LN1(Xi))        Xi' = Xi  + MHSA(LN1(Xi)) + A1(LN1(X ))                    (2)
    X"   = X' + MLP(LN2(X' )) + A2(LN2(Xi'))       Xi" = Xi' + MLP(LN2(Xi')) + A2(LN2(X' ))                   (3)
    F    = LN(X) + LN(Xi)                          after the last block; OSTrack's head reads it              (4)

The streams are the two halves of one batch, so that every frozen layer is called once.
Written from SparkTempest/BAT at ccf9b2f and botaoye/OSTrack; their tensors load by `from_official`.

Shapes: b pairs of crops, n template tokens and m search tokens of each stream, d channels, h heads of e channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, cat, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from ...errors import Amount, BadParameter, Count, Share
from ...io.config import configure
from ...saving import Pretrained
from ..layers import attend, state_dicts
from ..layers.attend import attention_map
from ..layers.frozen import frozen_copy
from .official import ADAPTERS, STAGES
from .ostrack import OSTrack, Prediction


def streams(images: Tensor) -> Tensor:
    """From (b, 6, H, W) to (2b, 3, H, W): the first streams, then the second ones."""
    if images.ndim != 4 or images.shape[1] != 6:
        raise BadParameter("crop", tuple(images.shape), "(B, 6, H, W): three channels of each stream")
    return rearrange(images, "b (two c) h w -> (two b) c h w", two=2)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two streams of a batch (2b, ...), of any b: `chunk` would fix it in an exported model."""
    first, second = rearrange(x, "(two b) ... -> two b ...", two=2).unbind()
    return first, second


def swap(x: Tensor) -> Tensor:
    """The batch (2b, ...) with its two streams swapped."""
    return rearrange(rearrange(x, "(two b) ... -> two b ...", two=2).flip(0), "two b ... -> (two b) ...")


class Adapter(nn.Module):
    """The universal adapter (1), from (..., dim) to (..., dim) (section 3.3).

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
        return self.up(self.dropout(self.mid(self.down(h))))


class Tracks(Pretrained, nn.Module):
    """The calls of BAT and its baselines, which have `locate`, and what `companion.predict`
    read."""

    tracker: OSTrack

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """The prediction on template (b, 6, t, t) and search (b, 6, s, s) crops.

        Channels 0-2 are the first stream, 3-5 the second.
        """
        return self.locate(self.embed_template(template), search)

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (2b, n, d) of crops (b, 6, t, t), for `locate`; computed once per video."""
        return self.tracker.embed_template(streams(template))

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """The prediction on search crops (b, 6, s, s), with the tokens of `embed_template`."""
        raise NotImplementedError

    def predict(self, images: Sequence[Any], names: Sequence[str], *, box: Sequence[float], **options: Any) -> Any:
        """The `tracking.Track` of `box` (x, y, w, h) in two folders or video files; options as of `tracking.track`."""
        from .tracking import track  # imported here: OpenCV

        if len(images) != 2:
            raise BadParameter("images", f"{len(images)} of them", "two folders or two video files, RGB and thermal")
        return track(images[0], images[1], box, self, **options)


class BAT(Tracks, state_dicts.OfficialModel):
    """OSTrack on two streams with bi-directional adapters.

    Args:
        tracker: the foundation; the model shares its tensors, frozen.
        width: of the adapters' bottleneck.
        dropout, std: see `Adapter`.
        elimination: candidate elimination, block -> share of search tokens that remain: none in BAT's released
            configurations, {3: 0.7, 6: 0.7, 9: 0.7} in OSTrack.

    Raises `BadParameter`: a tracker of other blocks than timm's pre-norm ones, or an elimination that does not exist.
    """

    rules = ((r"^tracker\.", ""), *OSTrack.rules, *ADAPTERS)

    def __init__(
        self,
        tracker: OSTrack,
        width: Count = 8,
        *,
        dropout: Share = 0.1,
        std: Amount = 0.02,
        elimination: Mapping[int, float] | None = None,
    ):
        configure(self, locals())
        super().__init__()
        attend.check_pre_norm("tracker", tracker.vit)
        self.tracker, self.grad_checkpointing = frozen_copy(tracker), False
        self.elimination = checked(elimination or {}, len(tracker.vit.blocks))
        sizes = tracker.vit.embed_dim, width, dropout, std
        self.adapters = nn.ModuleList(
            nn.ModuleDict({stage: self.adapter(stage, *sizes) for stage in STAGES}) for _ in tracker.vit.blocks
        )

    def adapter(self, stage: str, dim: int, width: int, dropout: float, std: float) -> nn.Module:
        """A new adapter of a stage, "attention" or "mlp"; a subclass may return another module."""
        return Adapter(dim, width, dropout, std)

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        return self.tracker.forward_head(self.forward_features(template_tokens, search))

    def forward_features(self, template_tokens: Tensor, search: Tensor) -> Tensor:
        """The fused tokens F (b, n + m, d), template first."""
        x, kept = self.embed(template_tokens, search)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        block = partial(checkpoint, self.block, use_reentrant=False) if recompute else self.block
        for i in range(len(self.adapters)):
            x, kept = block(i, x, kept)[:2]
        return self.fuse(x, kept)

    def forward_intermediates(self, template_tokens: Tensor, search: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """F as of `forward_features`, and of each block the results of `block`, its tokens "x" and "kept"."""
        x, kept = self.embed(template_tokens, search)
        blocks = []
        for i in range(len(self.adapters)):
            x, kept, out = self.block(i, x, kept)
            blocks.append(out | {"x": x, "kept": kept})
        return self.fuse(x, kept), blocks

    def embed(self, template_tokens: Tensor, search: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of both streams (2b, n + m, d), and the positions of the search tokens (2b, m)."""
        x = torch.cat([template_tokens, self.tracker.embed_search(streams(search))], 1)  # (2b, n + m, d)
        return x, torch.arange(self.tracker.f**2, device=x.device).expand(len(x), -1)

    def block(self, i: int, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Block i on the tokens (2b, n + m, d) of both streams, of which the search tokens at `kept` (2b, m) remain.

        Returns the tokens, `kept`, and by name what they are made of: "MHSA", "A1", "MLP" and "A2", (2b, n + m, d); "q"
        and "k", the queries and keys of the attention, (2b, h, n + m, e).
        """
        frozen, A1, A2 = self.tracker.vit.blocks[i], *(self.adapters[i][stage] for stage in STAGES)
        h = frozen.norm1(x)  # (2b, n + m, d)
        q, k, v = attend.qkv(frozen.attn, h)  # (2b, h, n + m, e) each
        attended = frozen.ls1(attend.output(frozen.attn, h, F.scaled_dot_product_attention(q, k, v)))
        received = A1(swap(h))
        x = x + frozen.drop_path1(attended) + frozen.drop_path1(received)  # (2)
        out = {"MHSA": attended, "A1": received, "q": q, "k": k}

        if i in self.elimination:
            x, kept = eliminate(x, kept, self.template_attention(q, k).mean(1), self.elimination[i])

        h = frozen.norm2(x)
        transformed, received = frozen.ls2(frozen.mlp(h)), A2(swap(h))
        x = x + frozen.drop_path2(transformed) + frozen.drop_path2(received)  # (3)
        return x, kept, out | {"MLP": transformed, "A2": received}

    def fuse(self, x: Tensor, kept: Tensor) -> Tensor:
        """F (b, n + m, d) (4), from the tokens after the last block; eliminated ones are zeros."""
        x = self.tracker.vit.norm(x)  # (2b, n + m, d)
        first, second = halves(restore(x, kept, self.tracker.f**2) if self.elimination else x)  # (b, n + m, d) each
        return first + second

    def template_attention(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention (2b, h, m) of the template's central token to the search tokens; no other row is formed."""
        row = attention_map(q[:, :, self.tracker.centre, None], k)  # (2b, h, 1, n + m)
        return row[:, :, 0, self.tracker.f_template**2 :]

    # --- training ---

    def train(self, mode: bool = True) -> BAT:
        """As `nn.Module.train`, but the head's BatchNorms keep their statistics (FIX_BN in the released code)."""
        super().train(mode)
        self.tracker.head.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    # --- the authors' names ---

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, **options: Any) -> BAT:
        """BAT from its released tensors (BAT_rgbt.pth, or the entry `net` of a training checkpoint), in eval mode.

        Args:
            heads: heads of the attention; one for every 64 channels by default.
            options: of the constructor, besides `width`, which is read from the tensors.

        Raises `BadCheckpoint`: names that are missing, unknown, or of another shape.
        """
        down = "backbone.blocks.0.adap_t.adapter_down.weight"
        state_dicts.check_names(state, [down], "BAT (an OSTrack checkpoint has no adapters: OSTrack.from_official)")
        model = cls(OSTrack.like(state, heads), len(state[down]), **options)
        return model.loaded(state, "BAT")


# --- candidate elimination (section 3.5) ------------------------------------------------------------------------------


def checked(shares: Mapping[int, float], depth: int) -> dict[int, float]:
    """Block -> share of the search tokens that remain, without the blocks that remove none.

    Raises `BadParameter`: a block or a share that does not exist.
    """
    accepted = f"a mapping of blocks 0 to {depth - 1} to shares above 0 and up to 1"
    try:
        remaining = {int(str(i)): float(share) for i, share in shares.items()}  # in a JSON file blocks are text
    except (AttributeError, TypeError, ValueError):
        raise BadParameter("elimination", shares, accepted) from None
    if any(i not in range(depth) or not 0 < share <= 1 for i, share in remaining.items()):
        raise BadParameter("elimination", dict(shares), accepted)
    return {i: share for i, share in remaining.items() if share < 1}


def eliminate(x: Tensor, kept: Tensor, attention: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The tokens without the eliminated ones, and what remains of `kept`, in falling order of attention.

    Args:
        x: (b, n + m, d), n template tokens first.
        kept: (b, m), the position of each search token in the crop.
        attention: (b, m), of the template to the search tokens.
        share: of the search tokens that remain: k = ceil(share m).
    """
    order = attention.topk(math.ceil(share * attention.shape[1]), dim=1).indices  # (b, k)
    n = x.shape[1] - kept.shape[1]
    search = x[:, n:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))  # (b, k, d)
    return cat([x[:, :n], search], 1), kept.gather(1, order)


def restore(x: Tensor, kept: Tensor, m: int) -> Tensor:
    """The tokens (b, n + m, d) of (b, n + k, d): those that remain at their positions, zeros for the others."""
    n = x.shape[1] - kept.shape[1]
    search = x.new_zeros(len(x), m, x.shape[-1])
    return cat([x[:, :n], search.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), x[:, n:])], 1)


# --- loss (section 4); boxes (b, 4) are x, y, w, h as fractions of the search crop ------------------------------------


def losses(prediction: Prediction, boxes: Tensor) -> dict[str, Tensor]:
    """The terms "focal", "giou" and "l1", and their sum "loss" = focal + 2 GIoU + 5 L1, for boxes (b, 4)."""
    predicted, target = corners(prediction.box, boxes)
    terms = {
        "focal": focal(prediction.score, centre_map(boxes, prediction.score.shape[-1])),
        # of all pairs: torchvision's loss of matched pairs takes masks as indices
        "giou": 1 - generalized_box_iou(predicted, target).diagonal().mean(),
        "l1": F.l1_loss(predicted, target),
    }
    return terms | {"loss": terms["focal"] + 2 * terms["giou"] + 5 * terms["l1"]}


def overlaps(prediction: Prediction, boxes: Tensor) -> Tensor:
    """The IoU (b,) of each predicted box with that of `boxes` (b, 4), without gradient."""
    return box_iou(*corners(prediction.box.detach(), boxes)).diagonal()


def corners(predicted: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners x1, y1, x2, y2 of predicted boxes cx, cy, w, h, and of true ones, which are clipped to the crop."""
    return box_convert(predicted, "cxcywh", "xyxy"), box_convert(boxes, "xywh", "xyxy").clamp(0, 1)


def centre_map(boxes: Tensor, f: int, overlap: float = 0.7) -> Tensor:
    """The target score map (b, 1, f, f): a Gaussian around the centre's cell, 1 at the centre.

    Its radius is CornerNet's, the largest shift of a box's corners that leaves the IoU above `overlap`, in the variant
    that divides by 2 throughout. Of its three cases that of two corners shifted outwards has always the smallest
    radius, at most sqrt(w h); the others have (w + h) / 2 or more.
    """
    x, y, w, h = (boxes * f).unbind(1)  # (b,) each
    cx, cy = (x + w / 2).round(), (y + h / 2).round()

    b = -2 * overlap * (h + w)
    radius = (b + (b**2 + 16 * overlap * (1 - overlap) * w * h).sqrt()) / 2
    r = radius.clamp_min(0).floor()[:, None, None]  # (b, 1, 1)
    cells = torch.arange(f, device=boxes.device, dtype=boxes.dtype)
    dx, dy = cells - cx[:, None, None], cells[:, None] - cy[:, None, None]  # (b, 1, f), (b, f, 1)
    near = (dx.abs() <= r) & (dy.abs() <= r)  # (b, f, f)
    return (near * torch.exp(-(dx**2 + dy**2) / (2 * ((2 * r + 1) / 6) ** 2)))[:, None]


def focal(score: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss (alpha 2, beta 4) of a score map and `centre_map`, over the number of centres."""
    # no masks as indices, which would synchronise with a GPU
    p, centre = score.clamp_min(1e-12), target == 1
    positive = (p.log() * (1 - p) ** 2 * centre).sum()
    negative = ((1 - p).clamp_min(1e-12).log() * p**2 * (1 - target) ** 4).sum()
    return -(positive + negative) / centre.sum().clamp_min(1)
