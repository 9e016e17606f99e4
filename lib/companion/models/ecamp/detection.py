"""Detector on ECAMP's pre-trained ViT (section 5.4): YOLOv3's heads on a pyramid of three levels, loss and boxes.

The encoder is frozen, and its last norm is left out; see `heads`.

Shapes: B images of S x S pixels, D the ViT's width, g = S / patch, h cells on a side of a level: g / 2, g, 2 g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation, batched_nms, box_convert, box_iou

from ...errors import BadParameter, Count
from ...io.config import configure
from ..layers.heads import vit_sizes
from ..layers.predicting import Images, Names, Transform, batches, grey
from ..layers.state_dicts import OfficialModel, below, check_names
from . import official
from .heads import PatchMap
from .transforms import squeeze_transform

# pixels at 416, three for each level, coarse to fine (YOLOv3's)
ANCHORS = (((116, 90), (156, 198), (373, 326)), ((30, 61), (62, 45), (59, 119)), ((10, 13), (16, 30), (33, 23)))

conv_bn = partial(Conv2dNormActivation, activation_layer=partial(nn.LeakyReLU, negative_slope=0.1))


class Pyramid(nn.Module):
    """A map (B, D, g, g) to three: (B, 2048, g/2, g/2), (B, 1024, g, g), (B, 512, 2g, 2g), coarse to fine.

    Each ends in a residual bottleneck of C / e channels.
    """

    def __init__(self, width: int, e: int, channels: Sequence[int] = (2048, 1024, 512)):
        super().__init__()
        coarse, middle, fine = channels
        self.inputs = nn.ModuleList(
            [nn.Conv2d(width, coarse, 1, stride=2, bias=False), nn.Conv2d(width, middle, 1), nn.Conv2d(width, fine, 1)]
        )
        # torchvision's, whose inner width is a quarter at base_width 64
        self.levels = nn.ModuleList(Bottleneck(c, c // 4, base_width=256 // e) for c in channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        coarse, middle, fine = (conv(x) for conv in self.inputs)
        fine = F.interpolate(fine, scale_factor=2, mode="bilinear", align_corners=True)
        return [level(y) for level, y in zip(self.levels, (coarse, middle, fine), strict=True)]


class Branch(nn.Sequential):
    """YOLOv3's head of one level: six convolutions, then (B, outputs, h, h), and what the next finer level receives."""

    def __init__(self, inputs: int, width: int, outputs: int):
        narrow, wide = width // 4, width // 2
        super().__init__(
            conv_bn(inputs, narrow, 1),
            conv_bn(narrow, wide, 3),
            conv_bn(wide, narrow, 1),
            conv_bn(narrow, wide, 3),
            conv_bn(wide, narrow, 1),
            conv_bn(narrow, wide, 3),
            nn.Conv2d(wide, outputs, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        below = x
        for i, layer in enumerate(self):
            x = layer(x)
            if i == 4:
                below = x  # (B, width / 4, h, h)
        return x, below


class Detector(OfficialModel):
    """Images (B, 3, S, S) to the raw outputs of three heads, coarse to fine, each (B, 3 (5 + classes), h, h).

    Args:
        encoder: `ECAMP.encoder`, or any ViT of timm with as many rows of patches as columns, an even number; it is
            copied.
        classes: of boxes.
        expansion: e of the bottlenecks: 4 with all labels, 8 with 1 or 10 % of them.
        channels: of the three levels; the heads' widths follow.

    Raises `BadParameter`: an encoder of another grid.
    """

    rules = official.NAMES["detector"]

    def __init__(
        self,
        encoder: VisionTransformer,
        classes: Count = 1,
        expansion: Count = 4,
        channels: tuple[Count, Count, Count] = (2048, 1024, 512),
    ):
        configure(self, locals())
        super().__init__()
        self.map = PatchMap(encoder)
        rows, columns = encoder.patch_embed.grid_size
        if rows % 2 or rows != columns:
            raise BadParameter("encoder", f"{rows} x {columns} patches", "an even number of rows, and as many columns")
        self.size = encoder.patch_embed.img_size[0]
        self.pyramid = Pyramid(encoder.embed_dim, expansion, channels)
        below = [0, channels[0] // 8, channels[1] // 8]  # channels from the coarser level
        widths = zip(channels, below, strict=True)
        self.branches = nn.ModuleList(Branch(width + more, width, 3 * (5 + classes)) for width, more in widths)
        self.reductions = nn.ModuleList(conv_bn(2 * more, more, 1) for more in below[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        coarse, middle, fine = self.pyramid(self.map(images))
        first, below = self.branches[0](coarse)
        below = F.interpolate(self.reductions[0](below), scale_factor=2)
        second, below = self.branches[1](torch.cat([below, middle], 1))
        below = F.interpolate(self.reductions[1](below), scale_factor=2)
        third, _ = self.branches[2](torch.cat([below, fine], 1))
        return [first, second, third]

    def predict(self, images: Images, names: Names, transform: Transform = None, **options: Any) -> list[Tensor]:
        """Boxes (n, 7) of each image; options as of `decode`."""
        found = batches(self, images, transform or squeeze_transform(self.size), grey)
        return [boxes.cpu() for heads in found for boxes in decode([x.float() for x in heads], self.size, **options)]

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> Detector:
        """The detector of a state dict of the authors, in eval mode.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        layers, logits = "backbone.layers.", "embedding0.conv_out.weight"
        coarse, reduced, fine = (f"{layers}{name}.weight" for name in ("downsample", "layer1.conv1", "transpose1"))
        check_names(state, {coarse, reduced, fine, logits}, "ECAMP's detector")
        inner, middle = state[reduced].shape[:2]
        channels = (len(state[coarse]), middle, len(state[fine]))
        encoder = VisionTransformer(**vit_sizes(below(state, "backbone.encoder."), heads), num_classes=0)
        model = cls(encoder, len(state[logits]) // 3 - 5, middle // inner, channels)
        return model.loaded(state, "ECAMP's detector")


# --- loss -------------------------------------------------------------------------------------------------------------


def anchors(size: int) -> Tensor:
    """(3 levels, 3, 2) widths and heights in pixels of an image of side `size`."""
    return torch.tensor(ANCHORS, dtype=torch.float32) * size / 416


def detection_loss(outputs: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """The sum over the heads, coarse to fine, of `yolo_loss`; boxes (B, T, 5) as there, for images of side `size`."""
    return torch.stack([yolo_loss(x, boxes, a, size)[0] for x, a in zip(outputs, anchors(size), strict=True)]).sum()


def _cells(head: Tensor, anchors: Tensor, size: int) -> tuple[Tensor, Tensor, float]:
    """A head's output as (B, anchors, h, h, 5 + classes), its anchors in cells, and the side of a cell in pixels."""
    cell = size / head.shape[-1]
    return rearrange(head, "b (a k) y x -> b a y x k", a=len(anchors)), anchors.to(head.device) / cell, cell


def yolo_loss(head: Tensor, boxes: Tensor, anchors: Tensor, size: int) -> tuple[Tensor, ...]:
    """YOLOv3's loss of one head: total, x, y, w, h, confidence, class.

        total = 2.5 (x + y + w + h) + confidence + class        all of them means over ALL cells, empty ones too

    Every box is assigned to the best anchor of every head. Anchors with an IoU above 0.5 with a box have no objectness
    loss. That IoU adds 1 to all extents, in cells, as released.

    Args:
        head: (B, 3 (5 + classes), h, h), raw.
        boxes: (B, T, 5) class, centre and size as fractions of the image; rows of zeros are padding.
        anchors: (3, 2) in pixels.
        size: S.
    """
    p, anchors, _ = _cells(head, anchors, size)
    cells, images = head.shape[-1], torch.arange(len(p), device=p.device)
    target, empty = torch.zeros_like(p), torch.ones_like(p[..., 4])
    for box in boxes.unbind(1):  # in order: of two boxes in one cell the later one counts
        there = box.abs().sum(-1, keepdim=True) > 0  # (B, 1), no mask as index, which would synchronise with a GPU
        centre, extent = cells * box[:, 1:3], cells * box[:, 3:]
        i, j = centre.long().clamp(max=cells - 1).unbind(1)
        iou = box_iou(F.pad(extent + 1, (2, 0)), F.pad(anchors + 1, (2, 0)))  # (B, anchors)
        best = iou.argmax(1)
        offset, scale = centre - torch.stack([i, j], 1), (extent / anchors[best]).log()
        kind = F.one_hot(box[:, 0].long(), p.shape[-1] - 5)
        row = torch.cat([offset, scale, torch.ones_like(offset[:, :1]), kind], 1).to(p.dtype)  # (B, 5 + classes)
        target[images, best, j, i] = torch.where(there, row, target[images, best, j, i])
        empty[images, :, j, i] = torch.where((iou > 0.5) & there, 0, empty[images, :, j, i])

    objects = target[..., 4:5]
    bce = objects * F.binary_cross_entropy_with_logits(p, target, reduction="none")
    squared = (objects * (p - target)).square()
    (x, y), (w, h) = bce[..., :2].mean((0, 1, 2, 3)), squared[..., 2:4].mean((0, 1, 2, 3))
    confidence = bce[..., 4].mean() + 0.5 * (F.softplus(p[..., 4]) * empty).mean()
    kinds = bce[..., 5:].mean()
    return 2.5 * (x + y + w + h) + confidence + kinds, x, y, w, h, confidence, kinds


# --- boxes ------------------------------------------------------------------------------------------------------------


def yolo_decode(head: Tensor, anchors: Tensor, size: int) -> Tensor:
    """Boxes (B, 3 h h, 5 + classes) of one head: centre and size in pixels, objectness, the classes' probabilities."""
    p, anchors, cell = _cells(head, anchors, size)
    position = torch.arange(head.shape[-1], device=head.device)
    grid = torch.stack(torch.meshgrid(position, position, indexing="xy"), -1)  # (h, h, 2): x, y
    centre = (p[..., :2].sigmoid() + grid) * cell
    extent = p[..., 2:4].exp() * anchors[:, None, None] * cell
    return torch.cat([centre, extent, p[..., 4:].sigmoid()], -1).flatten(1, 3)


def suppress(decoded: Tensor, confidence: float = 0.5, overlap: float = 0.5) -> list[Tensor]:
    """Non-maximum suppression, by class, of boxes (B, n, 5 + classes) with an objectness of at least `confidence`.

    Returns:
        For each image (m, 7), best first: x1, y1, x2, y2 in pixels, objectness, the class's probability, the class.
        The IoU takes a box as one pixel wider and higher, as released.
    """
    kept = []
    for boxes in decoded:
        boxes = boxes[boxes[:, 4] >= confidence]
        corners = box_convert(boxes[:, :4], "cxcywh", "xyxy")
        probability, kind = boxes[:, 5:].max(1, keepdim=True)
        keep = batched_nms(corners + corners.new_tensor([0, 0, 1, 1]), boxes[:, 4], kind[:, 0], overlap)
        kept.append(torch.cat([corners, boxes[:, 4:5], probability, kind], 1)[keep])
    return kept


def decode(outputs: Sequence[Tensor], size: int, confidence: float = 0.5, overlap: float = 0.5) -> list[Tensor]:
    """The boxes (n, 7) of each image of side `size` from the outputs of a detector, see `suppress`."""
    levels = [yolo_decode(x, a, size) for x, a in zip(outputs, anchors(size), strict=True)]
    return suppress(torch.cat(levels, 1), confidence, overlap)
