"""OSTrack, the tracker of one stream that BAT freezes (Ye et al., ECCV 2022): a plain ViT and a head for boxes.

Shapes: b pairs of crops, n tokens of the template and m = f x f of the search crop, d channels. Boxes are fractions of
the search crop. Written from botaoye/OSTrack; its tensors load by `from_official`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ... import backbones
from ...errors import BadParameter, Count, MissingWeights, check_images, check_parts
from ...io.config import configure
from ..layers import state_dicts
from ..layers.heads import vit_sizes
from ..layers.pos_embed import resize_pos_embed

BRANCHES = {"ctr": 1, "offset": 2, "size": 2}  # of the head: output channels


class Prediction(NamedTuple):
    """The head's prediction on a search crop of f x f tokens; coordinates are fractions of the crop.

    Attributes:
        score: (b, 1, f, f) probability that the target's centre is in each cell, in (0, 1).
        size: (b, 2, f, f) width and height of the box if its centre is in the cell.
        offset: (b, 2, f, f) of the centre from the cell's corner, in cells.
        box: (b, 4) cx, cy, w, h at the highest score.
    """

    score: Tensor
    size: Tensor
    offset: Tensor
    box: Tensor


def decode(score: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """The box (b, 4), cx, cy, w, h, at the highest score; of equal scores the first, row by row.

    `score` may be weighted by a window (`hann`).
    """
    f = score.shape[-1]
    best = score.flatten(1).argmax(1)  # (b,)
    at = best[:, None, None].expand(-1, 2, 1)  # (b, 2, 1)
    wh, shift = size.flatten(2).gather(2, at)[..., 0], offset.flatten(2).gather(2, at)[..., 0]  # (b, 2)
    cell = torch.stack([best % f, best.div(f, rounding_mode="floor")], 1)  # (b, 2): column, row
    return torch.cat([(cell + shift) / f, wh], 1)


def hann(f: int) -> Tensor:
    """The Hann window (1, 1, f, f) that prefers positions near the last one; nowhere zero (section 5.1)."""
    window = torch.hann_window(f + 2, periodic=False)[1:-1]
    return (window[:, None] * window)[None, None]


class CentreHead(nn.Module):
    """The head: centre score, offset and size of the box, each by five convolutions.

    Args:
        dim: channels of the features.
        channels: width of the first convolution; each further one has half as many.
    """

    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        widths = [dim, *(channels // 2**i for i in range(4))]
        for name, out in BRANCHES.items():
            layers = [
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
            ]
            setattr(self, name, nn.Sequential(*layers, nn.Conv2d(widths[-1], out, 1)))
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, features: Tensor) -> Prediction:
        """From features (b, d, f, f). The maps are float32 whatever the precision of the convolutions.

        In half precision the largest score, 1 - 1e-4, would be 1, its loss infinite, and boxes would snap to a grid.
        """
        score, size, offset = (branch(features).float() for branch in (self.ctr, self.size, self.offset))
        score, size = (logits.sigmoid().clamp(1e-4, 1 - 1e-4) for logits in (score, size))
        return Prediction(score, size, offset, decode(score, size, offset))


class OSTrack(state_dicts.OfficialModel):
    """The one-stream tracker: template and search tokens attend to one another in a plain ViT.

    Args:
        vit: a timm ViT, which becomes a part of the tracker; its [CLS] token and position embedding are not used.
        template, search: sides of the two crops, in pixels.
        head_channels: see `CentreHead`.
    """

    rules = (
        (r"^position_template$", "backbone.pos_embed_z"),
        (r"^position_search$", "backbone.pos_embed_x"),
        (r"^vit\.", "backbone."),
        (r"^head\.(\w+)\.(\d)\.", lambda match: f"box_head.conv{int(match[2]) + 1}_{match[1]}."),
    )

    def __init__(self, vit: VisionTransformer, template: Count = 128, search: Count = 256, head_channels: Count = 256):
        configure(self, locals())
        super().__init__()
        usual = isinstance(vit, VisionTransformer) and isinstance(vit.fc_norm, nn.Identity)
        if not usual or vit.num_prefix_tokens > 1:
            raise BadParameter("vit", type(vit).__name__, "a timm VisionTransformer without registers and `fc_norm`")
        check_parts("head_channels", head_channels, 8)
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

    @property
    def centre(self) -> int:
        """Index of the template's central token: row and column f/2 - 1 (27 of 64), as OSTrack takes it."""
        return (self.f_template // 2 - (self.f_template + 1) % 2) * (self.f_template + 1)

    def embed_template(self, images: Tensor) -> Tensor:
        """Tokens (b, n, d) of template crops (b, 3, t, t); they are the same for a whole video."""
        return self.vit.norm_pre(self._patches(images, self.template) + self.position_template)

    def embed_search(self, images: Tensor) -> Tensor:
        """Tokens (b, m, d) of search crops (b, 3, s, s)."""
        return self.vit.norm_pre(self._patches(images, self.search) + self.position_search)

    def _patches(self, images: Tensor, side: int) -> Tensor:
        check_images(images, 3, side, side)
        patches = self.vit.patch_embed
        return patches.norm(rearrange(patches.proj(images), "b d h w -> b (h w) d"))

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """The prediction on one stream: template crops (b, 3, t, t), search crops (b, 3, s, s)."""
        return self.locate(self.embed_template(template), search)

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        """The prediction on search crops (b, 3, s, s), with the tokens of `embed_template`."""
        return self.forward_head(self.forward_features(template_tokens, search))

    def forward_features(self, template_tokens: Tensor, search: Tensor) -> Tensor:
        """Tokens (b, n + m, d) after the last norm, template first."""
        x = torch.cat([template_tokens, self.embed_search(search)], 1)  # (b, n + m, d)
        blocks = self.vit.blocks
        return self.vit.norm(checkpoint_seq(blocks, x) if self.vit.grad_checkpointing else blocks(x))

    def forward_head(self, tokens: Tensor) -> Prediction:
        """The head on the search tokens, the last f x f of (b, n + m, d)."""
        return self.head(rearrange(tokens[:, -(self.f**2) :], "b (h w) d -> b d h w", h=self.f))

    # --- the authors' names ---

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> OSTrack:
        """OSTrack from its released tensors (the entry `net` of OSTrack_ep0300.pth.tar); sizes are read from them.

        Args:
            heads: heads of the attention; one for every 64 channels by default.

        Raises `BadCheckpoint`: names that are missing, unknown, or of another shape.
        """
        return cls.like(state, heads).loaded(state, "OSTrack")

    @classmethod
    def like(cls, state: Mapping[str, Tensor], heads: int | None = None) -> OSTrack:
        """An OSTrack of the sizes of the authors' tensors; see `from_official`."""
        needed = ["backbone.pos_embed_z", "backbone.pos_embed_x", "box_head.conv1_ctr.0.weight"]
        state_dicts.check_names(state, needed, "OSTrack or BAT")
        z, x, conv = (state[name] for name in needed)
        # the released files have a [CLS] token and a position embedding, which are not used
        unused = {"backbone.pos_embed", "backbone.cls_token"} & state.keys()
        sizes = vit_sizes({"backbone.pos_embed": x, **state}, heads, "backbone.")
        options = {"class_token": bool(unused), "pos_embed": "learn" if unused else "none", "drop_path_rate": 0.1}
        vit = VisionTransformer(**sizes, **options, num_classes=0, global_pool="")
        template, search = (sizes["patch_size"] * math.isqrt(positions.shape[1]) for positions in (z, x))
        return cls(vit, template, search, head_channels=len(conv))


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
        for table, f in ((tracker.position_template, tracker.f_template), (tracker.position_search, tracker.f)):
            table.data = resize_pos_embed(vit.pos_embed, (f, f))[:, 1:].contiguous()
    return tracker.eval()
