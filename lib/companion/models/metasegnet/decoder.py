"""The decoder of the author's FT-UNetFormer (section 3.3): from four maps of an encoder to logits, coarse to fine.

Shapes: b images, c channels; the maps have stride 4, 8, 16, 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 1, *, norm: bool = True, act: bool = False) -> nn.Sequential:
    """Convolution without bias, optionally with BatchNorm and ReLU6."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, bias=False)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outputs)] if norm else []), *([nn.ReLU6()] if act else []))


def separable(width: int, kernel: int) -> nn.Sequential:
    """Depthwise convolution, pointwise convolution, BatchNorm."""
    depthwise = nn.Conv2d(width, width, kernel, padding=(kernel - 1) // 2, groups=width, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def reflected(x: Tensor, bottom: int, right: int) -> Tensor:
    """`x` with reflection padding below and right, which may exceed the size of `x` (unlike with `F.pad`)."""
    for dim, more in ((-2, bottom), (-1, right)):
        if more:
            n = x.shape[dim]
            position = torch.arange(n + more, device=x.device) % max(2 * n - 2, 1)
            x = x.index_select(dim, torch.minimum(position, (2 * n - 2 - position).abs()))
    return x


class GlobalLocalAttention(nn.Module):
    """Window attention, pooled along rows and along columns, plus a parallel 1x1 and 3x3 convolution.

    Maps (b, c, h, w) of any size are padded to whole windows by reflection (in the released code along rows only).
    """

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.local1, self.local3 = conv(width, width), conv(width, width, 3)
        self.out = separable(width, window)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", get_relative_position_index(window, window), persistent=False)
        self.rows = nn.AvgPool2d((window, 1), 1, (window // 2 - 1, 0))
        self.columns = nn.AvgPool2d((1, window), 1, (0, window // 2 - 1))

    def local(self, x: Tensor) -> Tensor:
        return self.local1(x) + self.local3(x)

    def windows(self, x: Tensor) -> Tensor:
        """Attention inside each window of w x w positions, (b, c, h, w)."""
        height, width = x.shape[-2:]
        w, heads = self.window, self.heads
        qkv = self.qkv(reflected(x, -height % w, -width % w))  # (b, 3c, H, W), whole windows
        down, across = qkv.shape[-2] // w, qkv.shape[-1] // w
        sizes = {"down": down, "across": across, "heads": heads}
        windows = "b (three heads d) (down y) (across x) -> three (b down across) heads (y x) d"
        q, k, v = rearrange(qkv, windows, three=3, **sizes)  # (b * down * across, heads, w * w, d)
        bias = self.table[self.index].permute(2, 0, 1)  # (heads, w * w, w * w)
        u = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        u = rearrange(u, "(b down across) heads (y x) d -> b (heads d) (down y) (across x)", y=w, x=w, **sizes)
        return u[..., :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        u = self.windows(x)
        strips = self.rows(reflected(u, 1, 0)) + self.columns(reflected(u, 0, 1))  # pools of even size need one more
        return self.out(reflected(strips + self.local(x), 1, 1))[..., :height, :width]


class Block(nn.Module):
    """x + attention(BN x), then x + MLP(BN x), on maps (b, c, h, w)."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.attention = GlobalLocalAttention(width, heads, window)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.ReLU6(), nn.Conv2d(4 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WeightedFusion(nn.Module):
    """A weighted sum of a coarse map (b, c, h, w) and an encoder's finer one; the two learned weights sum to 1."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.lateral = conv(inputs, width, 3)
        self.shares = nn.Parameter(torch.ones(2))
        self.after = conv(width, width, 3, act=True)

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        shares = self.shares.relu()
        shares = shares / (shares.sum() + 1e-8)
        return self.after(shares[0] * self.lateral(finer) + shares[1] * resized(x, finer.shape[-2:]))


class Refinement(WeightedFusion):
    """Weighted fusion of the finest map, then spatial and channel gates with a convolutional shortcut."""

    def __init__(self, inputs: int, width: int):
        super().__init__(inputs, width)
        self.pixels = nn.Conv2d(width, width, 3, padding=1, groups=width)
        small = max(1, width // 16)
        self.channels = nn.Sequential(conv(width, small, norm=False), nn.ReLU6(), conv(small, width, norm=False))
        self.shortcut, self.out = conv(width, width), separable(width, 3)

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        x = super().forward(x, finer)
        gates = self.pixels(x).sigmoid() + self.channels(x.mean((2, 3), keepdim=True)).sigmoid()
        return F.relu6(self.out(gates * x) + self.shortcut(x))


class Decoder(nn.Module):
    """From four maps, finest first, to logits.

    Args:
        channels: widths of the four maps.
        classes: number of classes.
        width, heads, window: of the blocks; the window even.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int = 256, heads: int = 16, window: int = 8):
        super().__init__()
        self.squeeze = conv(channels[3], width)
        self.blocks = nn.ModuleList(Block(width, heads, window) for _ in range(3))  # stages 4, 3, 2
        self.fusions = nn.ModuleList(WeightedFusion(channels[i], width) for i in (2, 1))
        self.refine = Refinement(channels[0], width)
        final = [nn.Dropout2d(0.2), nn.Conv2d(width, classes, 1, bias=False)]
        self.head = nn.Sequential(conv(width, width, 3, act=True), *final)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (b, classes, *size), and the maps of the decoder by name: "x4" (coarsest) to "x1"."""
        x4 = self.blocks[0](self.squeeze(maps[3]))
        x3 = self.blocks[1](self.fusions[0](x4, maps[2]))
        x2 = self.blocks[2](self.fusions[1](x3, maps[1]))
        x1 = self.refine(x2, maps[0])
        return resized(self.head(x1), size), {"x4": x4, "x3": x3, "x2": x2, "x1": x1}
