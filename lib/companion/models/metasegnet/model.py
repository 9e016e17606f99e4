"""MetaSegNet: land-cover segmentation of an image with a text on its climate zone (Wang et al., TGRS 2024).

The appearance of a class depends on the climate. The climate zone follows from an image's coordinates; the image's
features attend to a text that describes the zone, and a decoder predicts the map.

    image (B, 3, H, W) --Swin--> four maps X_k --LayerNorm each--> fusion(X_k, words) --decoder--> logits (B, C, H, W)
    text of the zone   --text encoder--> one state per word ------------^

Neither the paper's text nor its code is available (section 1). So this has two parts:

* read from the first author's image-only code (WangLibo1995/GeoSeg at 9453fe4, GPL-3.0: read and reimplemented, nothing
  copied) and checked against outputs recorded from it: Swin, decoder, losses, optimiser, test-time augmentation. It is
  likely, but not known, that MetaSegNet uses them.
* RECONSTRUCTION, each choice an argument with that word in its help: the text encoders (`text`), the fusion, and which
  parameters are trained.

Shapes: B images, C classes, L words; k = 1 ... 4 the stages, finest first, of width C_k and stride 4, 8, 16, 32.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ... import backbones
from ...errors import BadCheckpoint, BadParameter, check_choice
from ...ops.recorded import recorded
from ..layers.state_dicts import OfficialModel, load_official
from .text import TextEncoder

DECODERS = ("ft_unetformer", "unetformer")
SCALES = (0.75, 1.0, 1.25, 1.5)
AUGMENTATIONS = ("none", "lr", "d4", "d4 loveda")  # 1, 4, 16, 8 views
AUXILIARY = 0.4  # weight of the auxiliary head's loss

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


# --- losses -----------------------------------------------------------------------------------------------------------


def soft_cross_entropy(logits: Tensor, labels: Tensor, ignore: int, smoothing: float = 0.05) -> Tensor:
    """Cross-entropy with label smoothing; ignored pixels count 0, and the mean is over ALL pixels, ignored ones too.

    logits (B, C, H, W), labels (B, H, W) int64."""
    return F.cross_entropy(logits, labels, ignore_index=ignore, label_smoothing=smoothing, reduction="none").mean()


def dice_loss(logits: Tensor, labels: Tensor, ignore: int, smooth: float = 0.05) -> Tensor:
    """1 - Dice of the softmax, of each class over the whole batch, averaged over all classes.

    A class without a true pixel counts 0 in this mean."""
    classes, valid = logits.shape[1], (labels != ignore)[:, None]
    p = logits.softmax(1) * valid
    truth = F.one_hot(labels.where(valid[:, 0], 0), classes).movedim(-1, 1) * valid
    over = (0, 2, 3)
    score = (2 * (p * truth).sum(over) + smooth) / ((p + truth).sum(over) + smooth).clamp_min(1e-7)
    return ((1 - score) * (truth.sum(over) > 0)).mean()


def joint_loss(logits: Tensor, labels: Tensor, ignore: int, auxiliary: Tensor | None = None) -> Tensor:
    """Soft cross-entropy + Dice (section 4) + 0.4 times the soft cross-entropy of an auxiliary head's logits.

    MetaSegNet's own losses are not known; these are those of the author's other networks."""
    loss = soft_cross_entropy(logits, labels, ignore) + dice_loss(logits, labels, ignore)
    return loss if auxiliary is None else loss + AUXILIARY * soft_cross_entropy(auxiliary, labels, ignore)


# --- the decoder ------------------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, kernel: int = 1, *, norm: bool = True, act: bool = False) -> nn.Sequential:
    """Convolution without bias, optionally with BatchNorm and ReLU6."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, bias=False)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outputs)] if norm else []), *([nn.ReLU6()] if act else []))


def _separable(width: int, kernel: int, kind: str) -> nn.Sequential:
    """Depthwise convolution, pointwise convolution, and BatchNorm at the end or, in UNetFormer, between the two."""
    depthwise = nn.Conv2d(width, width, kernel, padding=(kernel - 1) // 2, groups=width, bias=False)
    pointwise, norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
    ft = kind == "ft_unetformer"
    return nn.Sequential(depthwise, *((pointwise, norm) if ft else (norm, pointwise)))


def _resized(x: Tensor, size: Sequence[int], corners: bool = False) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=corners)


def _reflected(x: Tensor, bottom: int, right: int) -> Tensor:
    """`x` with reflection padding below and right, which may exceed the size of `x` (unlike with `F.pad`)."""
    for dim, more in ((-2, bottom), (-1, right)):
        if more:
            n = x.shape[dim]
            position = torch.arange(n + more, device=x.device) % max(2 * n - 2, 1)
            x = x.index_select(dim, torch.minimum(position, (2 * n - 2 - position).abs()))
    return x


class GlobalLocalAttention(nn.Module):
    """Window attention, pooled along rows and along columns, plus a parallel 1x1 and 3x3 convolution.

    Maps (B, D, H, W) of any size are padded to whole windows by reflection (in the released code along rows only).
    """

    def __init__(self, width: int, heads: int, window: int, kind: str):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.local1, self.local3 = _conv(width, width), _conv(width, width, 3)
        self.out = _separable(width, window, kind)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        row, column = (g.flatten() for g in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        dy, dx = (v[:, None] - v[None] + window - 1 for v in (row, column))
        self.register_buffer("index", dy * (2 * window - 1) + dx, persistent=False)
        self.rows = nn.AvgPool2d((window, 1), 1, (window // 2 - 1, 0))
        self.columns = nn.AvgPool2d((1, window), 1, (0, window // 2 - 1))

    def local(self, x: Tensor) -> Tensor:
        return self.local1(x) + self.local3(x)

    def windows(self, x: Tensor) -> Tensor:
        """Attention inside each window, (B, D, H, W)."""
        b, d, height, width = x.shape
        w, heads = self.window, self.heads
        qkv = self.qkv(_reflected(x, -height % w, -width % w))
        down, across = qkv.shape[-2] // w, qkv.shape[-1] // w
        # b (3 heads d) (down w) (across w) -> 3 (b down across) heads (w w) d
        qkv = qkv.view(b, 3, heads, d // heads, down, w, across, w).permute(1, 0, 4, 6, 2, 5, 7, 3)
        q, k, v = qkv.reshape(3, b * down * across, heads, w * w, d // heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table[self.index].permute(2, 0, 1))
        x = x.view(b, down, across, heads, w, w, d // heads).permute(0, 3, 6, 1, 4, 2, 5)
        return x.reshape(b, d, down * w, across * w)[..., :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        inside = self.windows(x)
        spread = self.rows(_reflected(inside, 1, 0)) + self.columns(_reflected(inside, 0, 1))
        return self.out(_reflected(spread + self.local(x), 1, 1))[..., :height, :width]


class Block(nn.Module):
    """x + attention(BN x), then x + MLP(BN x), on maps."""

    def __init__(self, width: int, heads: int, window: int, kind: str):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.attention = GlobalLocalAttention(width, heads, window, kind)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.ReLU6(), nn.Conv2d(4 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WeightedFusion(nn.Module):
    """A weighted sum of a coarse map (B, D, h, w) and an encoder's finer one; the two learned weights sum to 1."""

    def __init__(self, inputs: int, width: int, kind: str):
        super().__init__()
        ft = kind == "ft_unetformer"
        self.lateral = _conv(inputs, width, 3 if ft else 1, norm=ft)
        self.shares = nn.Parameter(torch.ones(2))
        self.after = _conv(width, width, 3, act=True)

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        shares = self.shares.relu()
        shares = shares / (shares.sum() + 1e-8)
        return self.after(shares[0] * self.lateral(finer) + shares[1] * _resized(x, finer.shape[-2:]))


class Refinement(WeightedFusion):
    """Weighted fusion of the finest map, then spatial and channel gates with a convolutional shortcut."""

    def __init__(self, inputs: int, width: int, kind: str):
        super().__init__(inputs, width, kind)
        self.pixels = nn.Conv2d(width, width, 3, padding=1, groups=width)
        small = max(1, width // 16)
        self.channels = nn.Sequential(_conv(width, small, norm=False), nn.ReLU6(), _conv(small, width, norm=False))
        self.shortcut, self.out = _conv(width, width), _separable(width, 3, kind)

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        x = super().forward(x, finer)
        gates = self.pixels(x).sigmoid() + self.channels(x.mean((2, 3), keepdim=True)).sigmoid()
        return F.relu6(self.out(gates * x) + self.shortcut(x))


class Decoder(nn.Module):
    """From four maps, finest first, to logits: the author's FT-UNetFormer or UNetFormer (section 3.3).

    Args:
        channels: widths of the four maps.
        classes: number of classes.
        width, heads, window: of the blocks; the window even.
        kind: one of `DECODERS`; they differ in lateral convolutions, order of norms and dropout.
        auxiliary: add a second head, for training only. None: as released, UNetFormer has one.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        width: int = 256,
        heads: int = 16,
        window: int = 8,
        kind: str = "ft_unetformer",
        auxiliary: bool | None = None,
    ):
        super().__init__()
        check_choice("decoder", kind, DECODERS)
        if len(channels) != 4:
            raise BadParameter("encoder", f"{len(channels)} maps", "one with four maps")
        if width % heads:
            raise BadParameter("heads", heads, f"a divisor of the decoder's width {width}")
        if window < 2 or window % 2:
            raise BadParameter("window", window, "an even number")
        if classes < 2:
            raise BadParameter("classes", classes, "2 or more")
        self.kind, dropout = kind, 0.2 if kind == "ft_unetformer" else 0.1
        self.squeeze = _conv(channels[3], width)
        self.blocks = nn.ModuleList(Block(width, heads, window, kind) for _ in range(3))  # stages 4, 3, 2
        self.fusions = nn.ModuleList(WeightedFusion(channels[i], width, kind) for i in (2, 1))
        self.refine = Refinement(channels[0], width, kind)
        final = [nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1, bias=False)]
        self.head = nn.Sequential(_conv(width, width, 3, act=True), *final)
        self.auxiliary = None
        if kind == "unetformer" if auxiliary is None else auxiliary:
            final = [nn.Dropout(0.1), nn.Conv2d(width, classes, 1, bias=False)]
            self.auxiliary = nn.Sequential(_conv(width, width, 3, act=True), *final)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int], trace: dict | None = None) -> Tensor:
        """Logits (B, C, *size). `trace` receives "b4", "b3", "b2", "p1" and, with an auxiliary head, "auxiliary"."""
        x4 = self.blocks[0](self.squeeze(maps[3]))
        x3 = self.blocks[1](self.fusions[0](x4, maps[2]))
        x2 = self.blocks[2](self.fusions[1](x3, maps[1]))
        x1 = self.refine(x2, maps[0])
        if trace is not None:
            trace |= {"b4": x4, "b3": x3, "b2": x2, "p1": x1}
            if self.auxiliary is not None:
                # as released: aligned corners here, and only here
                x = _resized(x4, x2.shape[-2:], corners=True) + _resized(x3, x2.shape[-2:], corners=True) + x2
                trace["auxiliary"] = _resized(self.auxiliary(x), size)
        return _resized(self.head(x1), size)


# --- image encoder ----------------------------------------------------------------------------------------------------


class _PadFirst(SwinTransformerBlock):
    """timm's block with padding to whole windows BEFORE the shift (timm: after), as in the author's Swin."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(x)[:, :height, :width]


@recorded()
def swin(**sizes: Any) -> SwinTransformer:
    """A timm Swin without classifier, for images of any size, which computes what the author's does (section 3.2).

    Windows are always whole and always shifted, and padding precedes the shift. `sizes` go to timm: `embed_dim`,
    `depths`, `num_heads`, `window_size`, `drop_path_rate`. timm's released weights can be loaded, and give timm's
    outputs if all maps are whole windows.
    """
    model = SwinTransformer(num_classes=0, always_partition=True, strict_img_size=False, **sizes)
    for block in model.modules():
        if isinstance(block, SwinTransformerBlock):
            block.__class__ = _PadFirst  # the stage builds its blocks itself; their class is not an argument
    return model


# --- cross-modal fusion -----------------------------------------------------------------------------------------------


class Fusion(nn.Module):
    """RECONSTRUCTION (section 3.5). Cross-attention: X + g · attention(LN X, T, T), then + g' · MLP(LN X).

    Args:
        channels: width of the image's map.
        text_width: of the states of the words.
        heads: of the attention.
        zero_init: initialise g = g' = 0, so that the network starts as the image-only one; otherwise 1.
    """

    def __init__(self, channels: int, text_width: int, heads: int, *, zero_init: bool = False):
        super().__init__()
        if channels % heads:
            raise BadParameter("fusion_heads", heads, f"a divisor of the stage's width {channels}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.key, self.value = nn.Linear(text_width, channels), nn.Linear(text_width, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.gates = nn.Parameter(torch.full((2,), 0.0 if zero_init else 1.0))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """The map (B, C_k, h, w) after the fusion with words (B, L, D); `mask` (B, L): True at words.

        With `attention` also the attention of each pixel to each word, (B, h, w, L), averaged over the heads."""
        height, width = x.shape[-2:]
        x = x.flatten(2).mT
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.query, self.norm1(x)), (self.key, text), (self.value, text))
        )
        shown = None
        if attention:
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
            shown = scores.mean(1).unflatten(1, (height, width))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.gates[0] * self.out(y.transpose(1, 2).flatten(2))
        x = x + self.gates[1] * self.mlp(self.norm2(x))
        return x.mT.unflatten(-1, (height, width)), shown


# --- the network ------------------------------------------------------------------------------------------------------


class MetaSegNet(OfficialModel):
    """The network; with `text` None the unimodal network, the same encoder and decoder without text and fusion.

    Args:
        encoder: a timm model with four or more maps, which is copied; `swin(**sizes)` for the author's.
        classes: number of classes; this label is ignored, as in the author's code, unless `ignore` is given.
        text: a `TextEncoder`; `text` has three. RECONSTRUCTION.
        norms: a LayerNorm on each map, as in the author's Swin; not in UNetFormer's ResNet.
        width, heads, window, decoder, auxiliary: see `Decoder`.
        fusion_stages: of the stages 1 to 4, those with a fusion. RECONSTRUCTION: all.
        fusion_heads: heads of the fusion; None: C_k / 32. RECONSTRUCTION.
        zero_init: see `Fusion`. RECONSTRUCTION: False, which trains faster.
        ignore: label of pixels without a loss; None: `classes`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        text: TextEncoder | None = None,
        *,
        norms: bool = True,
        width: int = 256,
        heads: int = 16,
        window: int = 8,
        decoder: str = "ft_unetformer",
        auxiliary: bool | None = None,
        fusion_stages: Sequence[int] = (1, 2, 3, 4),
        fusion_heads: int | None = None,
        zero_init: bool = False,
        ignore: int | None = None,
    ):
        super().__init__()
        if not hasattr(encoder, "forward_intermediates") or len(encoder.feature_info) < 4:
            raise BadParameter("encoder", type(encoder).__name__, "a timm model with four or more maps")
        if not set(fusion_stages) <= {1, 2, 3, 4}:
            raise BadParameter("fusion_stages", fusion_stages, (1, 2, 3, 4))
        self.indices = list(range(len(encoder.feature_info)))[-4:]
        info = [encoder.feature_info[i] for i in self.indices]
        channels, self.stride = [i["num_chs"] for i in info], info[0]["reduction"]
        self.encoder = copy.deepcopy(encoder)
        self.encoder.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels) if norms else None
        self.text = text
        self.fusions = nn.ModuleDict(
            {
                str(k): Fusion(c, text.width, fusion_heads or max(1, c // 32), zero_init=zero_init)
                for k, c in enumerate(channels, 1)
                if text is not None and k in fusion_stages
            }
        )
        self.decoder = Decoder(channels, classes, width, heads, window, decoder, auxiliary)
        self.ignore = classes if ignore is None else ignore

    @classmethod
    def build(cls, classes: int, text: TextEncoder | None = None, size: str = "paper", **options) -> MetaSegNet:
        """A network with random weights, of one of `SIZES`; `options` override those of the size."""
        check_choice("size", size, SIZES)
        return cls(swin(**SIZES[size]["swin"]), classes, text, **(SIZES[size]["model"] | options))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the image encoder's activations in the backward pass: less memory, more time."""
        self.encoder.set_grad_checkpointing(enable)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """The ids (n, L) of texts. Raises `BadParameter` for the unimodal network, which has no text."""
        if self.text is None:
            raise BadParameter("texts", texts, "None: the unimodal twin has no text")
        return self.text.ids(texts)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The encoder's four maps (B, C_k, h, w), finest first; images are padded below and right to whole patches."""
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        options = {"indices": self.indices, "intermediates_only": True, "output_fmt": "NCHW"}
        maps = self.encoder.forward_intermediates(x, **options)
        if self.norms is None:
            return maps
        return [norm(m.movedim(1, -1)).movedim(-1, 1) for norm, m in zip(self.norms, maps, strict=True)]

    def forward(self, images: Tensor, texts: Sequence[str] | Tensor | None = None, trace: dict | None = None) -> Tensor:
        """Logits (B, C, H, W) of normalised images (B, 3, H, W) of any size.

        Args:
            texts: one for each image, or one for all: strings, or their ids (B or 1, L) by `self.text.ids`. None for
                the unimodal network only.
            trace: receives the maps before ("maps") and after ("fused") the fusion, the attention of the pixels to the
                words ("attention": stage -> (B, h, w, L)) and the entries of `Decoder`.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise BadParameter(
                "images", (tuple(images.shape), images.dtype), "a batch (B, 3, H, W) of float, normalised"
            )
        maps = self.maps(images)
        if trace is not None:
            trace |= {"maps": list(maps), "attention": {}}
        if (texts is None) != (self.text is None):
            wanted = "None: the unimodal twin has no text" if self.text is None else "a text for each image"
            raise BadParameter("texts", texts, wanted)
        if self.text is not None and texts is not None:
            ids = texts if isinstance(texts, Tensor) else self.text.ids(texts)
            if len(ids) not in (1, len(images)):
                raise BadParameter("texts", f"{len(ids)} of them", f"1, or one for each of {len(images)} images")
            ids = ids.to(images.device).expand(len(images), -1)
            states, mask = self.text(ids), self.text.mask(ids)
            for k, fusion in self.fusions.items():
                maps[int(k) - 1], shown = fusion(maps[int(k) - 1], states, mask, trace is not None)
                if trace is not None:
                    trace["attention"][int(k)] = shown
        if trace is not None:
            trace["fused"] = list(maps)
        return self.decoder(maps, images.shape[-2:], trace)

    def loss(self, images: Tensor, texts: Sequence[str] | Tensor | None, labels: Tensor) -> Tensor:
        """`joint_loss` of a batch, labels (B, H, W) int64; with an auxiliary head only in training."""
        trace: dict | None = {} if self.training and self.decoder.auxiliary is not None else None
        logits = self(images, texts, trace)
        return joint_loss(logits, labels, self.ignore, trace and trace["auxiliary"])

    # --- the author's files

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], text: TextEncoder | None = None, encoder: nn.Module | None = None, **options
    ) -> MetaSegNet:
        """The network of a state dict of GeoSeg's FT-UNetFormer (Swin of any size) or UNetFormer (ResNet-18).

        The names may begin with "net.", as in its Lightning checkpoints.

        With `text` a new fusion is added, see `options`. `encoder`: for a UNetFormer on another timm model.

        Raises `BadCheckpoint`: missing and unknown names and other shapes, all of them listed.
        """
        state, what = official_state(state), "GeoSeg's FT-UNetFormer or UNetFormer"
        sizes = decoder_sizes({n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")})
        if encoder is None:
            if "backbone.conv1.weight" in state:
                encoder = backbones.build("resnet18", "random")
            else:
                encoder = swin(**_swin_sizes(state))
        norms = any(name.startswith("backbone.norm0.") for name in state)
        classes = sizes.pop("classes")
        model = cls(encoder, classes, text, norms=norms, **(sizes | options)).eval()
        load_official(model, state, model.official_names(), what)
        return model

    def official_names(self) -> dict[str, str]:
        """Our name -> GeoSeg's, of the encoder, its norms and the decoder; text encoder and fusion have none."""
        names = {}
        for name in self.state_dict():
            if name.endswith("num_batches_tracked"):
                continue
            if name.startswith("encoder."):
                # patch merging belongs to the following stage in timm, to the preceding one in GeoSeg
                part = re.sub(
                    r"^layers\.(\d)\.downsample",
                    lambda found: f"layers.{int(found[1]) - 1}.downsample",
                    name.removeprefix("encoder."),
                )
                names[name] = f"backbone.{part}"
            elif name.startswith("norms."):
                names[name] = f"backbone.norm{name.removeprefix('norms.')}"
            elif name.startswith("decoder."):
                names[name] = f"decoder.{decoder_name(name.removeprefix('decoder.'))}"
        return names


_RENAMES = (
    (r"^squeeze\.", "pre_conv."),
    (r"^blocks\.(\d)", lambda found: f"b{4 - int(found[1])}"),
    (r"^fusions\.(\d)", lambda found: f"p{3 - int(found[1])}"),
    (r"^refine\.", "p1."),
    (r"^head\.2\.", "segmentation_head.2.0."),
    (r"^head\.", "segmentation_head."),
    (r"^auxiliary\.0\.", "aux_head.conv."),
    (r"^auxiliary\.2\.", "aux_head.conv_out.0."),
    (r"attention\.", "attn."),
    (r"mlp\.0\.", "mlp.fc1."),
    (r"mlp\.2\.", "mlp.fc2."),
    (r"\bqkv\.", "qkv.0."),
    (r"\blocal1\.", "local2."),  # theirs: local1 is the 3x3
    (r"\blocal3\.", "local1."),
    (r"\bout\.", "proj."),
    (r"\btable$", "relative_position_bias_table"),
    (r"\blateral\.", "pre_conv."),
    (r"\bshares$", "weights"),
    (r"\bafter\.", "post_conv."),
    (r"\bpixels\.", "pa.0."),
    (r"\bchannels\.0\.", "ca.1."),
    (r"\bchannels\.2\.", "ca.3."),
)


def decoder_name(name: str) -> str:
    """GeoSeg's name of a tensor of our decoder, or of one of its parts."""
    for pattern, official in _RENAMES:
        name = re.sub(pattern, official, name)
    return name


def load_part(part: nn.Module, state: Mapping[str, Tensor], what: str = "GeoSeg's decoder") -> nn.Module:
    """Load the tensors of GeoSeg's decoder, or of one of its parts, into ours; raises `BadCheckpoint`."""
    names = {name: decoder_name(name) for name in part.state_dict() if not name.endswith("num_batches_tracked")}
    load_official(part, official_state(state), names, what)
    return part.eval()


def decoder_sizes(state: Mapping[str, Tensor]) -> dict:
    """The arguments of `MetaSegNet` that follow from the official tensors of a decoder."""
    need = {"pre_conv.0.weight", "b4.attn.relative_position_bias_table", "segmentation_head.2.0.weight"}
    if missing := need - state.keys():
        raise BadCheckpoint("GeoSeg's FT-UNetFormer or UNetFormer", {f"decoder.{name}" for name in missing})
    table = state["b4.attn.relative_position_bias_table"]
    return {
        "classes": len(state["segmentation_head.2.0.weight"]),
        "width": len(state["pre_conv.0.weight"]),
        "heads": table.shape[1],
        "window": (math.isqrt(len(table)) + 1) // 2,
        "decoder": "ft_unetformer" if "p3.pre_conv.1.weight" in state else "unetformer",
        "auxiliary": "aux_head.conv.0.weight" in state,
    }


def _swin_sizes(state: Mapping[str, Tensor]) -> dict:
    """The sizes of GeoSeg's Swin in a state dict."""
    name = re.compile(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$")
    blocks = [m for m in map(name.match, state) if m]
    if not blocks or "backbone.patch_embed.proj.weight" not in state:
        raise BadCheckpoint("GeoSeg's Swin", {"backbone.patch_embed.proj.weight", "backbone.layers.*"} - state.keys())
    depths: dict[int, int] = {}
    for m in blocks:
        depths[int(m[1])] = max(depths.get(int(m[1]), 0), int(m[2]) + 1)
    tables = [state[f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in sorted(depths)]
    return {
        "embed_dim": len(state["backbone.patch_embed.proj.weight"]),
        "depths": tuple(depths[i] for i in sorted(depths)),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (math.isqrt(len(tables[0])) + 1) // 2,
        "drop_path_rate": 0.3,
    }


def official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without computed buffers, index tables, masks, counters of batches, and without Lightning's "net."."""
    computed = ("relative_position_index", "attn_mask", "num_batches_tracked")
    return {name.removeprefix("net."): t for name, t in state.items() if not name.endswith(computed)}


# --- inference --------------------------------------------------------------------------------------------------------

Predict = Callable[[Tensor], Tensor]


def views(kind: str) -> list[tuple[bool, bool, float]]:
    """The views of a test-time augmentation: (flipped left-right, flipped upside down, scale).

    "lr": both flips; "d4": both flips at four scales (Potsdam); "d4 loveda": left-right flips at four scales. There are
    no rotations, despite the name.
    """
    check_choice("augmentation", kind, AUGMENTATIONS)
    upside_down = (False, True) if kind in ("lr", "d4") else (False,)
    scales = SCALES if kind.startswith("d4") else (1.0,)
    return [(h, v, s) for h in ((False,) if kind == "none" else (False, True)) for v in upside_down for s in scales]


def augmented(predict: Predict, images: Tensor, kind: str = "lr") -> Tensor:
    """The mean of the logits (B, C, H, W) over the `views` of images (B, 3, H, W).

    Images and logits are scaled bicubically."""
    size, total = images.shape[-2:], 0
    found = views(kind)
    for left_right, upside_down, scale in found:
        dims = [d for d, turned in ((-1, left_right), (-2, upside_down)) if turned]
        x = images.flip(dims)
        if scale != 1:
            x = F.interpolate(x, [int(n * scale) for n in size], mode="bicubic", align_corners=False)
        logits = predict(x)
        if scale != 1:
            logits = F.interpolate(logits, tuple(size), mode="bicubic", align_corners=False)
        total = total + logits.flip(dims)
    return total / len(found)


class Band(NamedTuple):
    """Finished rows of a large image."""

    top: int
    logits: Tensor  # (C, rows, W)


def _starts(length: int, tile: int, step: int) -> list[int]:
    """First pixels of the tiles along one axis; the last tile ends with the image."""
    return [*range(0, max(length - tile, 0), step), max(length - tile, 0)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights of a tile along one axis: rising over the overlap, 1 inside, falling again."""
    position = torch.arange(1.0, length + 1)
    return torch.minimum(position, position.flip(0)).div(overlap + 1).clamp_max(1)


@torch.no_grad()
def bands(
    predict: Predict,
    source: Tensor | Callable[[int, int, int, int], Tensor],
    size: tuple[int, int] | None = None,
    *,
    tile: int = 512,
    overlap: int = 128,
    batch: int = 4,
) -> Iterator[Band]:
    """Logits of an image of any size from overlapping, blended tiles, from top to bottom.

    Only the rows that further tiles overlap are in memory: it grows with the image's width, not with its height. The
    logits of an image not larger than a tile are those of `predict`.

    Args:
        predict: images (b, 3, h, w) to logits (b, C, h, w).
        source: an image (3, H, W), or a function (top, left, height, width) -> (3, height, width) that reads a window
            of an image of `size` (H, W).
        tile: side in pixels.
        overlap: pixels that neighbours share, less than a tile; the last tile of a row or column shares more.
        batch: tiles at once.
    """
    if not 0 <= overlap < tile:
        raise BadParameter("overlap", overlap, f"0 to {tile - 1}, less than a tile")
    if batch < 1:
        raise BadParameter("batch", batch, "1 or more")
    if isinstance(source, Tensor):
        image, size = source, source.shape[-2:]

        def source(top: int, left: int, rows: int, columns: int) -> Tensor:
            return image[:, top : top + rows, left : left + columns]

    elif size is None:
        raise BadParameter("size", size, "height and width of the image that `source` reads")
    height, width = size
    rows, columns = min(tile, height), min(tile, width)
    tops, lefts = _starts(height, tile, tile - overlap), _starts(width, tile, tile - overlap)
    weight = _ramp(rows, overlap)[:, None] * _ramp(columns, overlap)
    total, done, base = torch.empty(0), torch.empty(0), 0  # sums of logits and of weights, from row `base` on
    for i, top in enumerate(tops):
        for first in range(0, len(lefts), batch):
            some = lefts[first : first + batch]
            logits = predict(torch.stack([source(top, left, rows, columns) for left in some]))
            if not total.numel():
                total = logits.new_zeros(logits.shape[1], rows, width)
                done, weight = logits.new_zeros(rows, width), weight.to(logits)
            for left, found in zip(some, logits, strict=True):
                total[:, :, left : left + columns] += found * weight
                done[:, left : left + columns] += weight
        finished = (tops[i + 1] if i + 1 < len(tops) else height) - base
        yield Band(base, total[:, :finished] / done[:finished])
        base += finished
        total, done = (F.pad(t[..., finished:, :], (0, 0, 0, finished)) for t in (total, done))


def segment(predict: Predict, source: Tensor | Callable, size: tuple[int, int] | None = None, **options) -> Tensor:
    """The most likely class of each pixel, (H, W) uint8, of an image of any size; arguments as `bands`."""
    found = [band.logits.argmax(0).to(torch.uint8).cpu() for band in bands(predict, source, size, **options)]
    return torch.cat(found)
