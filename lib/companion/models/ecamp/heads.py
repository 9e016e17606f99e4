"""Classifier, segmenter and detector on ECAMP's pre-trained ViT (sections 5.2 to 5.4), and their losses.

    classifier   mean of the patch tokens -> a new LayerNorm -> linear; all trained, or the last layer (linear probe)
    segmenter    patch tokens -> linear -> 14 x 14 map -> four times conv, norm, ReLU, x2 -> logits at 224
    detector     the same map -> three levels, 28, 14 and 7 cells per side -> YOLOv3's heads, three anchors per cell

In segmenter and detector the encoder is frozen, though the authors' README speaks of fine-tuning, and its last norm is
left out. They are the authors' own (after MGCA), not UNETR or ViTDet: there are no skip connections.

Shapes: B images of S x S pixels, D the ViT's width, g = S / patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from ...errors import BadCheckpoint, BadParameter
from ...ops.recorded import recorded
from ..layers.state_dicts import OfficialModel, check_names, depth, load_official, renamed

# pixels at 416, three for each level, coarse to fine (YOLOv3's)
ANCHORS = (((116, 90), (156, 198), (373, 326)), ((30, 61), (62, 45), (59, 119)), ((10, 13), (16, 30), (33, 23)))
COUNTERS = ("num_batches_tracked",)  # of BatchNorm, which some files lack


# --- the encoder ------------------------------------------------------------------------------------------------------


def like(encoder: VisionTransformer, **options: Any) -> VisionTransformer:
    """A ViT with random weights and the sizes of `encoder`; `options` go to timm, for instance `num_classes`."""
    block, embed = encoder.blocks[0], encoder.patch_embed
    return VisionTransformer(
        img_size=embed.img_size,
        patch_size=embed.patch_size,
        embed_dim=encoder.embed_dim,
        depth=len(encoder.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / encoder.embed_dim,
        **options,
    )


def encoder_like(state: Mapping[str, Tensor], heads: int | None = None) -> VisionTransformer:
    """A ViT with random weights and the sizes of the encoder in a state dict; `heads` None: 64 channels per head.

    Raises `BadCheckpoint`: the state dict has no encoder.
    """
    check_names(state, {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"}, "a ViT")
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    return VisionTransformer(
        img_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth(state, "blocks."),
        num_heads=heads or max(1, width // 64),
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        num_classes=0,
    )


@recorded()
def classifier(
    encoder: VisionTransformer, classes: int, *, probe: bool = False, drop_path: float = 0.1
) -> VisionTransformer:
    """The classifier: timm's ViT with mean pooling of the patch tokens, images (B, 3, S, S) to logits (B, classes).

    The encoder's own last norm is dropped; `fc_norm` starts at 1 and 0, the last layer at N(0, 2e-5).

    Args:
        encoder: `ECAMP.encoder`, or any ViT of timm; it is copied.
        probe: train the last layer alone; `fc_norm` then keeps 1 and 0.
        drop_path: stochastic depth, rising linearly to this probability in the last block.
    """
    model = like(encoder, num_classes=classes, global_pool="avg", drop_path_rate=drop_path)
    state = {n: t for n, t in encoder.state_dict().items() if n in model.state_dict() and not n.startswith("head.")}
    model.load_state_dict(state, strict=False)
    nn.init.ones_(model.fc_norm.weight)
    nn.init.zeros_(model.fc_norm.bias)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    model.requires_grad_(not probe)
    model.head.requires_grad_(True)
    return model


@recorded()
def classifier_from_official(state: Mapping[str, Tensor], heads: int | None = None) -> VisionTransformer:
    """The classifier of a state dict of the authors, whose names are timm's; in eval mode.

    Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
    """
    if "head.weight" not in state:
        raise BadCheckpoint("ECAMP's classifier", ["head.weight"])
    model = like(encoder_like(state, heads), num_classes=len(state["head.weight"]), global_pool="avg").eval()
    load_official(model, state, {name: name for name in model.state_dict()}, "ECAMP's classifier")
    return model


class PatchMap(nn.Module):
    """From images (B, 3, S, S) to a map (B, D, g, g): a linear layer on an encoder's tokens before its last norm."""

    def __init__(self, encoder: VisionTransformer, frozen: bool = True):
        super().__init__()
        self.encoder = like(encoder, num_classes=0, global_pool="")
        self.encoder.norm = nn.Identity()
        kept = {n: t for n, t in encoder.state_dict().items() if not n.startswith(("norm.", "head.", "fc_norm."))}
        self.encoder.load_state_dict(kept)
        self.frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.project = nn.Linear(encoder.embed_dim, encoder.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.encoder.forward_features(images)[:, 1:]
        side = math.isqrt(tokens.shape[1])
        return self.project(tokens).transpose(1, 2).unflatten(2, (side, side))


# --- segmentation -----------------------------------------------------------------------------------------------------


class MapDecoder(nn.Module):
    """(B, D, g, g) to logits (B, classes, S, S): for each of `channels` a 3x3 conv, norm, ReLU, x2; then a 3x3 conv."""

    def __init__(self, inputs: int, channels: Sequence[int], classes: int = 1):
        super().__init__()
        widths = [inputs, *channels]
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            )
            for a, b in pairwise(widths)
        )
        self.logits = nn.Conv2d(widths[-1], classes, 3, padding=1)

    def forward(self, x: Tensor, trace: list[Tensor] | None = None) -> Tensor:
        for step in self.steps:
            x = step(x)
            if trace is not None:
                trace.append(x)
        return self.logits(x)


class Segmenter(OfficialModel):
    """Images (B, 3, S, S) to logits (B, outputs x classes, S, S).

    Args:
        encoder: `ECAMP.encoder`, or any ViT of timm; it is copied.
        outputs: decoders, one for each structure to segment: 1, or 2 for RIGA's disc and cup.
        channels: of the decoder's steps, each of which doubles the side. None: of 512, 256, 128, 64 the last ones, as
            many as the patch needs.
        frozen: as released; False is the README's description, and the authors' setting for a random encoder on RIGA.
        classes: logits of a decoder; more than 1 only to load a file that has them.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        outputs: int = 1,
        channels: Sequence[int] | None = None,
        frozen: bool = True,
        classes: int = 1,
    ):
        super().__init__()
        steps = int(math.log2(encoder.patch_embed.patch_size[0]))
        if channels is None:
            channels = (512, 256, 128, 64)[-steps:]
        if len(channels) != steps:
            raise BadParameter("channels", tuple(channels), f"{steps}, which double the side back to the image's")
        self.map = PatchMap(encoder, frozen)
        self.decoders = nn.ModuleList(MapDecoder(encoder.embed_dim, channels, classes) for _ in range(outputs))

    def forward(self, images: Tensor) -> Tensor:
        x = self.map(images)
        return torch.cat([decoder(x) for decoder in self.decoders], 1)

    def official_names(self) -> dict[str, str]:
        """Our names -> the authors'."""
        names = {}
        for name in self.state_dict():
            official = name.replace("map.encoder.", "encoder.").replace("map.project.", "encoder.seg_head.")
            official = re.sub(r"\.steps\.(\d)\.", lambda m: f".decoder_{int(m[1]) + 1}.", official)
            for i in range(len(self.decoders)):
                theirs = "decoder" if len(self.decoders) == 1 else ("decoder_disc", "decoder_cup")[i]
                official = official.replace(f"decoders.{i}.", f"{theirs}.")
            names[name] = official.replace(".logits.", ".final_out.")
        return names

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> Segmenter:
        """The segmenter of a state dict of the authors, in eval mode: with one decoder, or RIGA's two.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        inner = {n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}
        two = any(name.startswith("decoder_cup.") for name in state)
        start = "decoder_disc." if two else "decoder."
        first = [n for n in state if re.fullmatch(rf"{start}decoder_\d\.0\.weight", n)]
        channels = [len(state[name]) for name in sorted(first)]
        encoder = encoder_like(inner, heads)
        if 2 ** len(channels) != encoder.patch_embed.patch_size[0]:
            raise BadCheckpoint("ECAMP's segmenter", [f"{start}decoder_{len(channels) + 1}.0.weight"])
        classes = len(state.get(f"{start}final_out.bias", torch.zeros(1)))
        model = cls(encoder, 2 if two else 1, channels, classes=classes).eval()
        load_official(model, state, model.official_names(), "ECAMP's segmenter", optional=COUNTERS)
        return model


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean of (1 - p_t)^gamma BCE with p_t = sigmoid(x (2 t - 1)); the target may be soft."""
    easy = F.logsigmoid(-logits * (2 * target - 1))
    return ((gamma * easy).exp() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """(2 sum(p t) + 1) / (sum(p) + sum(t) + 1), with sums over the whole batch."""
    p = logits.sigmoid()
    return (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """10 focal - log(soft Dice), the mean over outputs; logits and target (B, outputs, S, S), target in 0 ... 1."""
    each = [
        10 * focal_loss(x, t) - soft_dice(x, t).log() for x, t in zip(logits.unbind(1), target.unbind(1), strict=True)
    ]
    return torch.stack(each).mean()


def classification_loss(logits: Tensor, target: Tensor) -> Tensor:
    """BCE for multi-label targets (B, classes), cross-entropy for class indices (B,)."""
    if target.ndim == 1 and logits.ndim == 2:
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


# --- detection --------------------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, side: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"conv": nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), "bn": nn.BatchNorm2d(outputs)}
    )


def _run(step: nn.ModuleDict, x: Tensor) -> Tensor:
    return F.leaky_relu(step["bn"](step["conv"](x)), 0.1)


class Bottleneck(nn.Module):
    """ReLU(x + conv1x1(conv3x3(conv1x1 to C / e))), a batch norm after each, ReLU between."""

    def __init__(self, width: int, e: int):
        super().__init__()
        inner = width // e
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + x)


class Pyramid(nn.Module):
    """A map (B, D, g, g) to three: (B, 2048, g/2, g/2), (B, 1024, g, g), (B, 512, 2g, 2g), coarse to fine."""

    def __init__(self, width: int, e: int, channels: Sequence[int] = (2048, 1024, 512)):
        super().__init__()
        coarse, middle, fine = channels
        self.inputs = nn.ModuleList(
            [nn.Conv2d(width, coarse, 1, stride=2, bias=False), nn.Conv2d(width, middle, 1), nn.Conv2d(width, fine, 1)]
        )
        self.levels = nn.ModuleList(Bottleneck(c, e) for c in channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        coarse, middle, fine = (conv(x) for conv in self.inputs)
        fine = F.interpolate(fine, scale_factor=2, mode="bilinear", align_corners=True)
        return [level(y) for level, y in zip(self.levels, (coarse, middle, fine), strict=True)]


class Detector(OfficialModel):
    """Images (B, 3, S, S) to the raw outputs of three heads, coarse to fine, each (B, 3 (5 + classes), h, h).

    Args:
        encoder: `ECAMP.encoder`, or any ViT of timm; it is copied.
        classes: of boxes.
        expansion: e of the bottlenecks: 4 with all labels, 8 with 1 or 10 % of them.
        channels: of the three levels; the heads' widths follow.
        frozen: do not train the encoder, as released.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        classes: int = 1,
        expansion: int = 4,
        channels: Sequence[int] = (2048, 1024, 512),
        frozen: bool = True,
    ):
        super().__init__()
        self.classes, self.size = classes, encoder.patch_embed.img_size[0]
        self.map, self.pyramid = PatchMap(encoder, frozen), Pyramid(encoder.embed_dim, expansion, channels)
        self.heads, self.outputs, self.branches = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        below = 0
        for width in channels:
            narrow, wide = width // 4, width // 2
            sizes = [(width + below, narrow, 1), (narrow, wide, 3)] + 2 * [(wide, narrow, 1), (narrow, wide, 3)]
            self.heads.append(nn.ModuleList(_conv(*size) for size in sizes))
            self.outputs.append(nn.Conv2d(wide, 3 * (5 + classes), 1))
            if width != channels[-1]:
                below = narrow // 2
                self.branches.append(_conv(narrow, below, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        found, below = [], None
        for i, x in enumerate(self.pyramid(self.map(images))):
            if below is not None:
                x = torch.cat([F.interpolate(_run(self.branches[i - 1], below), scale_factor=2), x], 1)
            for j, step in enumerate(self.heads[i]):
                x = _run(step, x)
                if j == 4:  # input of the next level
                    below = x
            found.append(self.outputs[i](x))
        return found

    def anchors(self) -> Tensor:
        """See `anchors`."""
        return anchors(self.size)

    def decode(self, heads: Sequence[Tensor], confidence: float = 0.5, overlap: float = 0.5) -> list[Tensor]:
        """The boxes (n, 7) of each image from the outputs of `forward`, see `suppress`."""
        decoded = [yolo_decode(x, a, self.size) for x, a in zip(heads, self.anchors(), strict=True)]
        return suppress(torch.cat(decoded, 1), confidence, overlap)

    def official_names(self) -> dict[str, str]:
        """Our names -> the authors'."""
        renames = (
            (r"^map\.encoder\.", "backbone.encoder."),
            (r"^map\.project\.", "backbone.encoder.det_head."),
            (r"^pyramid\.inputs\.0\.", "backbone.layers.downsample."),
            (r"^pyramid\.inputs\.1\.", "backbone.layers.traspose."),
            (r"^pyramid\.inputs\.2\.", "backbone.layers.transpose1."),
            (r"^pyramid\.levels\.0\.", "backbone.layers.layer3."),
            (r"^pyramid\.levels\.1\.", "backbone.layers.layer1."),
            (r"^pyramid\.levels\.2\.", "backbone.layers.layer2."),
            (r"^heads\.(\d)\.", r"embedding\1."),
            (r"^outputs\.(\d)\.", r"embedding\1.conv_out."),
            (r"^branches\.0\.", "embedding1_cbl."),
            (r"^branches\.1\.", "embedding2_cbl."),
        )
        return renamed(self.state_dict(), renames)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> Detector:
        """The detector of a state dict of the authors, in eval mode.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        start, first = "backbone.encoder.", "backbone.layers.layer1.conv1.weight"
        needed = {
            first,
            "embedding0.conv_out.weight",
            "backbone.layers.downsample.weight",
            "backbone.layers.transpose1.weight",
        }
        check_names(state, needed, "ECAMP's detector")
        inner = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
        narrow, middle = state[first].shape[:2]
        channels = (
            len(state["backbone.layers.downsample.weight"]),
            middle,
            len(state["backbone.layers.transpose1.weight"]),
        )
        classes = len(state["embedding0.conv_out.weight"]) // 3 - 5
        model = cls(encoder_like(inner, heads), classes, middle // narrow, channels).eval()
        load_official(model, state, model.official_names(), "ECAMP's detector", optional=COUNTERS)
        return model


def anchors(size: int) -> Tensor:
    """(3 levels, 3, 2) widths and heights in pixels of an image of side `size`."""
    return torch.tensor(ANCHORS, dtype=torch.float32) * size / 416


def detection_loss(heads: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """The sum over the heads, coarse to fine, of `yolo_loss`; boxes (B, T, 5) as there, for images of side `size`."""
    return torch.stack([yolo_loss(x, boxes, a, size)[0] for x, a in zip(heads, anchors(size), strict=True)]).sum()


def _cells(head: Tensor, anchors: Tensor, size: int) -> tuple[Tensor, Tensor, float]:
    """A head's output as (B, anchors, h, h, 5 + classes), its anchors in cells, and the side of a cell in pixels."""
    cell = size / head.shape[-1]
    return head.unflatten(1, (len(anchors), -1)).permute(0, 1, 3, 4, 2), anchors.to(head.device) / cell, cell


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
    cells = head.shape[-1]
    mask, empty = torch.zeros_like(p[..., 0]), torch.ones_like(p[..., 0])
    target = torch.zeros_like(p)
    b, every = torch.arange(len(p), device=p.device), torch.arange(len(anchors), device=p.device)
    for t in range(boxes.shape[1]):  # in order: of two boxes in one cell the later one counts
        there = boxes[:, t].abs().sum(-1) > 0  # no mask as index, which would synchronise with a GPU
        kind, centre, extent = boxes[:, t, 0].long(), boxes[:, t, 1:3] * cells, boxes[:, t, 3:] * cells
        i, j = centre.long().clamp(max=cells - 1).unbind(1)
        inter = (torch.minimum(extent[:, None], anchors) + 1).prod(-1)
        iou = inter / ((extent[:, None] + 1).prod(-1) + (anchors + 1).prod(-1) - inter)
        around, cell = (b[:, None], every, j[:, None], i[:, None]), (b, iou.argmax(1), j, i)
        empty[around] = torch.where((iou > 0.5) & there[:, None], 0, empty[around])
        mask[cell] = torch.where(there, 1, mask[cell])
        box = target[cell]
        box[:, :2] = (centre - torch.stack([i, j], 1)).to(box.dtype)
        box[:, 2:4] = (extent / anchors[cell[1]]).log().to(box.dtype)
        box[:, 5:] = F.one_hot(kind, p.shape[-1] - 5).to(box.dtype)
        target[cell] = torch.where(there[:, None], box, target[cell])

    def bce(n: slice | int) -> Tensor:
        each = F.binary_cross_entropy_with_logits(p[..., n], target[..., n], reduction="none")
        return (each * (mask if isinstance(n, int) else mask[..., None])).mean()

    x, y = bce(0), bce(1)
    w, h = (((p[..., n] - target[..., n]) * mask).square().mean() for n in (2, 3))
    confidence = (F.softplus(-p[..., 4]) * mask).mean() + 0.5 * (F.softplus(p[..., 4]) * empty).mean()
    kinds = bce(slice(5, None))
    return 2.5 * (x + y + w + h) + confidence + kinds, x, y, w, h, confidence, kinds


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
    found = []
    for boxes in decoded:
        boxes = boxes[boxes[:, 4] >= confidence]
        half = boxes[:, 2:4] / 2
        corners = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1)
        share, kind = boxes[:, 5:].max(1)
        keep = batched_nms(corners + corners.new_tensor([0, 0, 1, 1]), boxes[:, 4], kind, overlap)
        rest = torch.stack([boxes[:, 4], share, kind.to(share.dtype)], 1)
        found.append(torch.cat([corners, rest], 1)[keep])
    return found
