"""MetaSegNet: land-cover segmentation of an image with a text on its climate zone (Wang et al., TGRS 2024).

The appearance of a class depends on the climate. The climate zone follows from an image's coordinates; the image's
features attend to a text that describes the zone, and a decoder predicts the map.

    image (B, 3, H, W) --Swin--> four maps X_k --LayerNorm each--> fusion(X_k, words) --decoder--> logits (B, C, H, W)
    text of the zone   --text encoder--> one state per word ------------^

Neither the paper's text nor its code is available (section 1). So this has two parts:

* read from the first author's image-only code (WangLibo1995/GeoSeg at 9453fe4, GPL-3.0: read and reimplemented, nothing
  copied) and checked against outputs recorded from it: Swin, decoder, losses, optimiser, test-time augmentation. It is
  likely, but not known, that MetaSegNet uses them.
* RECONSTRUCTION: the text encoders (`text`), the fusion, and which parameters are trained.

Shapes: B images, C classes, L words; k = 1 ... 4 the stages, finest first, of width C_k and stride 4, 8, 16, 32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.rasters import Raster, pixels
from ...errors import BadParameter, Count, check_choice, check_images, check_parts
from ...io.config import configure
from ..layers.attend import Attend
from ..layers.frozen import frozen_copy
from ..layers.heads import swin_sizes
from ..layers.predicting import Images, Names
from ..layers.state_dicts import OfficialModel, load_official
from . import official
from .decoder import Decoder
from .maps import NODATA, segment
from .text import TextEncoder

# of the Swin and the rest of the network: the author's largest one, and that of the pocket profile
SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "swin": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
        "model": {},
    },
    "pocket": {
        "swin": {
            "embed_dim": 24,
            "depths": (1, 1, 2, 1),
            "num_heads": (2, 2, 4, 4),
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
        "model": {"width": 32, "heads": 4, "window": 4, "fusion_heads": 4},
    },
}


# --- image encoder ----------------------------------------------------------------------------------------------------


class SwinBlock(SwinTransformerBlock):
    """A block of timm's on maps (b, h, w, c), computed as the author does.

    It pads to whole windows BEFORE the shift; timm's block, after it.
    """

    def __init__(self, block: SwinTransformerBlock):
        nn.Module.__init__(self)
        self.__dict__.update(vars(block))  # its layers and settings

    def _attn(self, x: Tensor) -> Tensor:
        """Attention inside each window of n x n positions; every second block shifts the windows by half of one."""
        height, width = x.shape[1:3]
        n = self.window_size[0]
        x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))  # (b, H, W, c), whole windows
        return super()._attn(x)[:, :height, :width]


def swin(**sizes: Any) -> SwinTransformer:
    """A timm Swin without classifier, for images of any size, which computes what the author's does (section 3.2).

    Windows are always whole and always shifted, and padding precedes the shift. `sizes` go to timm: `embed_dim`,
    `depths`, `num_heads`, `window_size`, `drop_path_rate`. timm's released weights can be loaded, and give timm's
    outputs if all maps are whole windows.
    """
    model = SwinTransformer(num_classes=0, always_partition=True, strict_img_size=False, **sizes)
    for stage in model.layers:
        stage.blocks = nn.Sequential(*map(SwinBlock, stage.blocks))
    return configure(model, sizes, swin)


# --- cross-modal fusion -----------------------------------------------------------------------------------------------


class Fusion(nn.Module):
    """RECONSTRUCTION (section 3.5). Cross-attention: X + g · attention(LN X, T, T), then + g' · MLP(LN X).

    The learned gates g and g' start at 1; at 0 the network is the image-only one.

    Args:
        channels: width of the image's map.
        text_width: of the states of the words.
        heads: of the attention, a divisor of `channels`.
    """

    def __init__(self, channels: int, text_width: int, heads: int):
        super().__init__()
        check_parts("fusion_heads", channels, heads)
        self.heads, self.attend = heads, Attend()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.key, self.value = nn.Linear(text_width, channels), nn.Linear(text_width, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.gates = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The map (b, c, h, w) after the fusion with words (b, l, d); `mask` (b, l): True at words."""
        height = x.shape[-2]
        x = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(y, "b n (heads d) -> b heads n d", heads=self.heads)
            for y in (self.query(self.norm1(x)), self.key(text), self.value(text))
        )
        y = self.attend(q, k, v, mask[:, None, None])  # (b, heads, h * w, d)
        x = x + self.gates[0] * self.out(rearrange(y, "b heads n d -> b n (heads d)"))
        x = x + self.gates[1] * self.mlp(self.norm2(x))
        return rearrange(x, "b (h w) c -> b c h w", h=height)


# --- the network ------------------------------------------------------------------------------------------------------


class MetaSegNet(OfficialModel):
    """The network; with `text` None the unimodal network, the same encoder and decoder without text and fusion.

    Args:
        encoder: a timm model with four or more maps, which is copied; `swin(**sizes)` for the author's.
        classes: number of classes.
        text: `Words` or `BertText`, which is copied. RECONSTRUCTION.
        width, heads, window: see `Decoder`.
        fusion_stages: of the stages 1 to 4, those with a fusion. RECONSTRUCTION: all.
        fusion_heads: heads of the fusion; None: C_k / 32. RECONSTRUCTION.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: Count,
        text: TextEncoder | None = None,
        *,
        width: Count = 256,
        heads: Count = 16,
        window: Count = 8,
        fusion_stages: Sequence[int] = (1, 2, 3, 4),
        fusion_heads: Count | None = None,
    ):
        configure(self, locals())
        super().__init__()
        self.indices = list(range(len(encoder.feature_info)))[-4:]
        info = [encoder.feature_info[i] for i in self.indices]
        if len(info) < 4:
            raise BadParameter("encoder", f"{type(encoder).__name__} of {len(info)} maps", "one of four maps or more")
        channels, self.stride = [i["num_chs"] for i in info], info[0]["reduction"]
        self.encoder = copy.deepcopy(encoder)
        self.encoder.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        frozen = text is not None and not any(p.requires_grad for p in text.parameters())  # BERT takes 0.4 GB
        self.text, self.fusions = frozen_copy(text) if frozen else copy.deepcopy(text), nn.ModuleDict()
        if text is not None:
            for k in fusion_stages:
                check_choice("fusion_stages", k, (1, 2, 3, 4))
                c = channels[k - 1]
                self.fusions[str(k)] = Fusion(c, text.width, fusion_heads or max(1, c // 32))
        check_parts("heads", width, heads)
        if window % 2:
            raise BadParameter("window", window, "an even number")
        self.decoder = Decoder(channels, classes, width, heads, window)

    @classmethod
    def build(cls, classes: int, text: TextEncoder | None = None, size: str = "paper", **options) -> MetaSegNet:
        """A network with random weights, of one of `SIZES`; `options` override those of the size."""
        check_choice("size", size, SIZES)
        return cls(swin(**SIZES[size]["swin"]), classes, text, **(SIZES[size]["model"] | options))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The encoder's four maps (B, C_k, h, w), finest first; images are padded below and right to whole patches."""
        check_images(images, 3)
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        maps = self.encoder.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        return [norm(m.movedim(1, -1)).movedim(-1, 1) for norm, m in zip(self.norms, maps, strict=True)]

    def fused(self, maps: Sequence[Tensor], texts: Sequence[str] | Tensor | None) -> list[Tensor]:
        """The maps after the fusion with the words of the texts; without a text encoder they do not change."""
        if (texts is None) != (self.text is None):
            raise BadParameter("texts", texts, "a text for each image; None for the unimodal network")
        if self.text is None or texts is None:
            return list(maps)
        ids = texts if isinstance(texts, Tensor) else self.text.ids(texts)
        ids = ids.to(maps[0].device).expand(len(maps[0]), -1)
        return self.fuse(maps, self.text(ids), self.text.mask(ids))

    def fuse(self, maps: Sequence[Tensor], states: Tensor, mask: Tensor) -> list[Tensor]:
        """The maps after the fusion with the states (B, L, D) of words; `mask` (B, L): True at words."""
        fused = list(maps)
        for k, fusion in self.fusions.items():
            fused[int(k) - 1] = fusion(maps[int(k) - 1], states, mask)
        return fused

    def forward(self, images: Tensor, texts: Sequence[str] | Tensor | None = None) -> Tensor:
        """Logits (B, C, H, W) of normalised images (B, 3, H, W) of any size.

        Args:
            texts: one for each image, or one for all: strings, or their ids (B or 1, L) by `ids`. None for the unimodal
                network only.
        """
        return self.decoder(self.fused(self.maps(images), texts), images.shape[-2:])[0]

    def forward_intermediates(
        self, images: Tensor, texts: Sequence[str] | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits as `forward`, and by name the maps before ("maps") and after ("fused") the fusion and those of the
        decoder."""
        maps = self.maps(images)
        fused = self.fused(maps, texts)
        logits, out = self.decoder(fused, images.shape[-2:])
        return logits, {"maps": maps, "fused": fused, **out}

    def predict(
        self,
        images: Images,
        names: Names,
        texts: str | Sequence[str] | None = None,
        tile: int = 512,
        overlap: int = 128,
    ) -> list[Tensor]:
        """The class of each pixel (H, W), uint8, 255 without data, of image files or GeoTIFF.

        Args:
            texts: one for each image, or one for all.
            tile, overlap: see `segment`.
        """
        given = [texts] if texts is None or isinstance(texts, str) else list(texts)
        if len(given) not in (1, len(images)):
            raise BadParameter("texts", f"{len(given)} of them", f"1, or one for each of {len(images)} images")
        device, found = next(self.parameters()).device, []
        for image, text in zip(images, given if len(given) == len(images) else given * len(images), strict=True):
            if isinstance(image, Image.Image):
                raw, there = np.asarray(image.convert("RGB")).transpose(2, 0, 1), np.ones(image.size[::-1], bool)
            else:
                with Raster(image) as raster:
                    raw, there = raster.read(), raster.valid(0, 0, *raster.size)
            x, ids = torch.from_numpy(np.asarray(pixels(raw))).to(device), None if text is None else self.ids([text])
            labels = segment(partial(self.forward, texts=ids), x, tile=tile, overlap=overlap)
            found.append(labels.masked_fill(torch.from_numpy(~there), NODATA))
        return found

    def ids(self, texts: Sequence[str]) -> Tensor:
        """The ids (n, L) of texts. Raises `BadParameter`: the unimodal network has no text."""
        if self.text is None:
            raise BadParameter("texts", texts, "None for the unimodal network")
        return self.text.ids(texts)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the image encoder's activations in the backward pass: less memory, more time."""
        self.encoder.set_grad_checkpointing(enable)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], text: TextEncoder | None = None, **options) -> MetaSegNet:
        """The network of a state dict of GeoSeg's FT-UNetFormer, with a Swin of any size.

        The names may begin with "net.", as in its Lightning checkpoints. With `text` a new fusion is added, see
        `options`.

        Raises `BadCheckpoint`: missing and unknown names and other shapes, all of them listed.
        """
        state = official.cleaned(state)
        sizes, encoder = official.decoder_sizes(state) | options, swin_sizes(state, "backbone.", official.WHAT)
        model = cls(swin(**encoder, drop_path_rate=0.3), sizes.pop("classes"), text, **sizes).eval()
        load_official(model, state, model.official_names(), official.WHAT)
        return model

    def official_names(self) -> dict[str, str]:
        return official.names(self)


# --- losses -----------------------------------------------------------------------------------------------------------
# those of the author's image-only networks; MetaSegNet's own are not known


def soft_cross_entropy(logits: Tensor, labels: Tensor, ignore: int, smoothing: float = 0.05) -> Tensor:
    """Cross-entropy with label smoothing; ignored pixels count 0, and the mean is over ALL pixels, ignored ones too.

    logits (B, C, H, W), labels (B, H, W) int64."""
    return F.cross_entropy(logits, labels, ignore_index=ignore, label_smoothing=smoothing, reduction="none").mean()


def dice_loss(logits: Tensor, labels: Tensor, ignore: int, smooth: float = 0.05) -> Tensor:
    """1 - Dice of the softmax, of each class over the whole batch, averaged over all classes.

    A class without a true pixel counts 0 in this mean."""
    classes, valid = logits.shape[1], (labels != ignore)[:, None]
    p = logits.softmax(1) * valid  # (B, C, H, W)
    truth = F.one_hot(labels.where(valid[:, 0], 0), classes).movedim(-1, 1) * valid  # (B, C, H, W)
    over = (0, 2, 3)
    score = (2 * (p * truth).sum(over) + smooth) / ((p + truth).sum(over) + smooth).clamp_min(1e-7)  # (C,)
    return ((1 - score) * (truth.sum(over) > 0)).mean()


def joint_loss(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Soft cross-entropy + Dice (section 4)."""
    return soft_cross_entropy(logits, labels, ignore) + dice_loss(logits, labels, ignore)


def loss(model: nn.Module, batch: Sequence[Any]) -> Tensor:
    """`joint_loss` of images (B, 3, H, W), labels (B, H, W) int64 and, if the network reads texts, these or their ids.

    The label after the last class is ignored."""
    images, labels, *texts = batch
    logits = model(images, *texts).float()  # (B, C, H, W)
    return joint_loss(logits, labels, ignore=logits.shape[1])
