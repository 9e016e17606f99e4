"""Downstream tasks of a pre-trained ViT: fine-tuning, a linear probe, Mask R-CNN on a simple pyramid, UPerNet.

    classifier, mixed_loss    mean of the patch tokens -> new norm -> linear, all trained, with layer decay (MAE)
    linear, ridge             frozen features -> linear; by SGD (MAE) or in closed form (pocket)
    detector, Crops           blocks -> pyramid of four scales -> torchvision's Mask R-CNN (ViTDet)
    Segmenter, SceneCrops     blocks 3, 5, 7, 11 -> four scales -> transformers' UPerNet head (MAE, BEiT)

DMT's own recipes were not found: these are those of MAE and G2SD [anc]; each function documents its differences.
Every one takes a `ViT` of any size, copies it, and trains through `fit`.

Shapes: B images of S x S pixels, D the ViT's width, g = S / patch.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.layers import LayerNorm2d
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_convert
from torchvision.transforms import v2

from ...data.images import as_rgb
from ...errors import Count, extra, typed
from ...evaluation.metrics import landcover
from ...io.config import configure
from ...io.progress import progress
from ...training.fit import same_shapes
from ...training.hardware import AUTO, Hardware, evaluating, loader
from ...training.schedules import adamw
from ...training.stored import saved
from ..layers import heads
from ..layers.windows import starts
from .vit import MEAN, NORMALISE, STD, ViT

IGNORED = 255
# of fine-tuning [anc: MAE]
RAND_AUGMENT, ERASING = "rand-m9-mstd0.5-inc1", 0.25
MIXUP, CUTMIX, SMOOTHING = 0.8, 1.0, 0.1


def layer_decayed(
    r: Mapping[str, float], rates: np.ndarray, encoder: str, data: Dataset, hardware: Hardware
) -> dict[str, Any]:
    """The arguments of `fit` for AdamW with learning rates by layer: `layer_decay` a block downwards.

    As in MAE, BEiT and ViTDet: patches, [CLS] token and positions are layer 0, block i is layer i + 1, everything after
    has the full learning rate; [CLS] token, positions, vectors and biases have no weight decay. The last images of a
    pass, too few for a batch, are left out.

    Args:
        r: "batch", "layer_decay" and "weight_decay".
        rates: the full learning rate at each step, (steps,); a dry run has the first ones.
        encoder: where the ViT is in the model, such as "backbone.vit."; "" for the model itself.
    """
    stem, blocks = rf"^{encoder}(?:cls_token|pos_embed|patch_embed)", [(rf"^{encoder}blocks\.(\d+)", None)]
    plain, peak, batch = {f"{encoder}cls_token", f"{encoder}pos_embed"}, max(rates), int(r["batch"])

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        read = SimpleNamespace(  # what timm reads of a model
            named_parameters=model.named_parameters, group_matcher=lambda coarse: {"stem": stem, "blocks": blocks}
        )
        decayed = param_groups_layer_decay(read, r["weight_decay"], plain, layer_decay=r["layer_decay"])
        return [group | {"lr": peak * group["lr_scale"]} for group in decayed]

    return {
        "optimizer": adamw(peak, r["weight_decay"], groups=groups),
        "schedule": lambda base, steps, per_epoch: rates[:steps] * (base / peak),
        "epochs": len(rates) / max(len(data) // batch, 1),
        "batch": batch,
        "hardware": hardware,
    }


# --- classification ---------------------------------------------------------------------------------------------------


def classifier(vit: ViT, classes: int, *, drop_path: float = 0.1) -> ViT:
    """MAE's classifier on a copy of the encoder, (B, 3, S, S) to logits (B, classes); see `heads.classifier`."""
    model = heads.classifier(vit, classes, drop_path=drop_path)
    model.masked_embed = None
    return configure(model, {"vit": vit, "classes": classes, "drop_path": drop_path}, classifier)


@typed
def train_transform(size: Count = 224) -> Callable:
    """MAE's for fine-tuning, by timm: random crop, flip, RandAugment 9, erasing 0.25, ImageNet's mean and std."""
    transform = create_transform(
        size,
        is_training=True,
        color_jitter=None,
        auto_augment=RAND_AUGMENT,
        interpolation="bicubic",
        re_prob=ERASING,
        re_mode="pixel",
        mean=MEAN,
        std=STD,
    )
    transform.transforms.insert(0, as_rgb)
    (drawn,) = (step for step in transform.transforms if isinstance(step, RandAugment))
    for operation in drawn.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """As timm: 0 bits, which RandAugment draws at its largest magnitude, leave black. Pillow 13 refuses them."""
    return posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def mixed_loss(classes: int) -> Callable:
    """For `fit`: cross-entropy of smoothed labels, images mixed in pairs by mixup or cutmix, as MAE's."""
    mixes = [v2.MixUp(alpha=MIXUP, num_classes=classes), v2.CutMix(alpha=CUTMIX, num_classes=classes)]
    mix = v2.RandomChoice(mixes)  # drawn from torch's generator: a resumed run mixes alike

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        images, soft = mix(*batch)  # (B, 3, S, S), (B, C)
        return F.cross_entropy(model(images).float(), soft, label_smoothing=SMOOTHING)

    return loss


class Features(nn.Module):
    """A frozen encoder's features (B, 2 D): [CLS] token and mean patch token, after its norm."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = copy.deepcopy(vit).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.vit.features(images)


def linear(inputs: int, classes: int) -> nn.Sequential:
    """A linear probe, features (n, F) to logits (n, classes): batch norm without affine, then linear (MAE)."""
    model = nn.Sequential(nn.BatchNorm1d(inputs, affine=False, eps=1e-6), nn.Linear(inputs, classes))
    nn.init.trunc_normal_(model[1].weight, std=0.01)
    nn.init.zeros_(model[1].bias)
    return model


def ridge(features: Tensor, labels: Tensor, classes: int, others: Tensor, penalty: float = 30.0) -> Tensor:
    """The outputs (m, classes) of a linear probe in closed form for the features `others` (m, F) [house, section 14.2].

    One-hot labels by ridge regression on features (n, F) that are standardised by their own mean and std.
    """
    mean, std = features.double().mean(0), features.double().std(0, correction=0).clamp_min(1e-6)
    x, y = (features.double() - mean) / std, F.one_hot(labels, classes).double()
    middle = y.mean(0)
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - middle))
    return (((others.double() - mean) / std) @ weights + middle).float()


# --- maps of several scales -------------------------------------------------------------------------------------------


FACTORS = (4, 2, 1, 0.5)  # sides of the maps over that of the grid


class Scales(nn.Module):
    """The patch tokens of four blocks as maps of four scales, the `FACTORS`, without the final norm.

    Args:
        vit: the encoder; copied.
        layers: the blocks.

    Attributes:
        widths: the channels of the maps.
    """

    def __init__(self, vit: ViT, layers: Sequence[int], drop_path: float):
        super().__init__()
        self.vit, self.layers = heads.like(vit, drop_path), layers
        self.vit.masked_embed = None  # in no forward pass here
        self.vit.norm.requires_grad_(False)  # the maps are taken before it
        width, half, quarter = vit.width, vit.width // 2, vit.width // 4
        larger = (nn.ConvTranspose2d(width, half, 2, 2), LayerNorm2d(half), nn.GELU())
        largest = nn.Sequential(*larger, nn.ConvTranspose2d(half, quarter, 2, 2))
        self.scales = nn.ModuleList([largest, nn.ConvTranspose2d(width, half, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.widths = [quarter, half, width, width]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, f g, f g) of images (B, 3, S, S)."""
        rows = images.shape[2] // self.vit.patch_embed.patch_size[0]
        tokens = self.vit.hidden(images, self.layers)  # each (B, 1 + L, D)
        grids = [rearrange(x[:, 1:], "b (h w) d -> b d h w", h=rows) for x in tokens]
        return [scale(x) for scale, x in zip(self.scales, grids, strict=True)]


class SimplePyramid(Scales):
    """ViTDet's: the last block's map at four scales, each separately, and a coarser one by pooling.

    All but four of ViTDet's blocks attend within windows, to save memory; ours attend globally.
    """

    out_channels = 256  # read by torchvision's Mask R-CNN

    def __init__(self, vit: ViT, drop_path: float = 0.0):
        super().__init__(vit, (-1,) * 4, drop_path)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 256, 1, bias=False),
                LayerNorm2d(256),
                nn.Conv2d(256, 256, 3, padding=1, bias=False),
                LayerNorm2d(256),
            )
            for width in self.widths
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps (B, 256, f g, f g) by name: "0", "1", ..., and "pool"."""
        pairs = zip(self.levels, self.maps(images), strict=True)
        maps = OrderedDict((str(i), level(x)) for i, (level, x) in enumerate(pairs))
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)
        return maps


# --- detection --------------------------------------------------------------------------------------------------------


def detector(vit: ViT, classes: int, *, size: int = 1024, drop_path: float = 0.1) -> MaskRCNN:
    """Mask R-CNN of torchvision on a simple pyramid of the encoder.

    torchvision's heads are simpler than ViTDet's (two layers for boxes, no norms), which G2SD has.

    Args:
        classes: without the background.
        size: images are resized to this side, in training and at test.
    """
    patch = vit.patch_embed.patch_size[0]
    strides, names = [patch / factor for factor in (*FACTORS, 0.25)], ["0", "1", "2", "3"]
    return MaskRCNN(
        SimplePyramid(vit, drop_path),
        classes + 1,
        min_size=size,
        max_size=size,
        image_mean=list(MEAN),
        image_std=list(STD),
        size_divisible=2 * patch,
        rpn_anchor_generator=AnchorGenerator(
            tuple((8.0 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
    )


class Crops(Dataset):
    """Instances under large-scale jitter (0.1 to 2, ViTDet's), cropped to size x size, in tensors that stack.

    An item is (image float in [0, 1], boxes (MOST, 4), labels (MOST,), masks packed to bits), rows beyond an image's
    instances with label 0; of more than MOST the smallest are left out.

    Args:
        data: items (uint8 image, target) as `data.pretraining.Instances`.
        size: of the crop.
    """

    MOST = 100

    def __init__(self, data: Dataset, size: int = 1024):
        self.data, self.size = data, size
        self.transform = v2.Compose(
            [
                v2.ScaleJitter((size, size), (0.1, 2.0), antialias=True),
                v2.RandomCrop((size, size), pad_if_needed=True),
                v2.RandomHorizontalFlip(),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, target = self.data[index]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        instances = {"boxes": boxes, "labels": target["labels"], "masks": tv_tensors.Mask(target["masks"])}
        image, kept = self.transform(tv_tensors.Image(image), instances)
        area = kept["masks"].flatten(1).sum(1)
        largest = torch.argsort(area, descending=True)[: self.MOST]
        largest = largest[area[largest] > 0]
        bits = torch.from_numpy(np.packbits(kept["masks"][largest].flatten(1).numpy(), 1))
        absent = self.MOST - len(largest)
        boxes, bits = (F.pad(rows, (0, 0, 0, absent)) for rows in (kept["boxes"][largest].float(), bits))
        return image.as_subclass(Tensor).float() / 255, boxes, F.pad(kept["labels"][largest], (0, absent)), bits


def detection_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """For `fit` on `Crops`: the sum of Mask R-CNN's losses."""
    images, boxes, labels, bits = batch
    size, targets = images.shape[-1], []
    shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    for box, label, mask in zip(boxes, labels, bits, strict=True):
        there = label > 0
        unpacked = (mask[there][..., None] >> shifts) & 1
        unpacked = unpacked.flatten(1)[:, : size * size].view(-1, size, size)  # (n, S, S)
        targets.append({"boxes": box[there], "labels": label[there], "masks": unpacked})
    return sum(model(list(images), targets).values())


def _without_masks(items: list[tuple[Tensor, dict]]) -> list[tuple[Tensor, Any]]:
    return [(image, target["image_id"]) for image, target in items]


def detections(
    model: MaskRCNN,
    data: Dataset,
    categories: Sequence[int],
    *,
    batch: int = 1,
    hardware: Hardware = AUTO,
    folder: Path | None = None,
) -> list[dict]:
    """Rows for `metrics.detection.evaluate`, kinds "bbox" and "segm", of all images of `data.pretraining.Instances`.

    Args:
        categories: category ids in the order of the labels.
        batch: images at once, of one size: the ViT would process padding.
        folder: where the rows are saved as they come, see `stored.saved`; a killed test resumes there.
    """

    @torch.no_grad()
    def found(done: int) -> Iterator[list[dict]]:
        """The rows of each image after the first ones."""
        with evaluating(hardware, model) as device:
            stream = loader(data, 4 * batch, hardware, device, done, _without_masks)
            for items in progress(stream, "detection", -(-len(data) // (4 * batch)), done // (4 * batch)):
                rows: dict[int, list[dict]] = {}
                for some in same_shapes([image for image, _ in items], batch):
                    images = [items[i][0].to(device, non_blocking=True).float() / 255 for i in some]
                    # the masks of one batch are in memory: those of an image of COCO take up to 0.1 GB
                    for i, output in zip(some, model(images), strict=True):
                        rows[i] = _rows(output, items[i][1], categories)
                yield from (rows[i] for i in range(len(items)))

    return [row for rows in saved(folder, len(data), found) for row in rows]


def _rows(output: Mapping[str, Tensor], image_id: Any, categories: Sequence[int]) -> list[dict]:
    """An image's detections in COCO's result format."""
    with extra("detection"):
        from faster_coco_eval.core import mask as rle

    pixels = (output["masks"][:, 0] > 0.5).permute(1, 2, 0).cpu().numpy().astype(np.uint8)  # (H, W, n)
    runs = rle.encode(np.asfortranarray(pixels))
    sides = box_convert(output["boxes"].cpu(), "xyxy", "xywh").tolist()
    rows = []
    for box, label, score, run in zip(sides, output["labels"].tolist(), output["scores"].tolist(), runs, strict=True):
        row = {"image_id": image_id, "category_id": categories[label - 1], "score": score, "bbox": box}
        rows.append(row | {"segmentation": {**run, "counts": run["counts"].decode()}})
    return rows


# --- segmentation -----------------------------------------------------------------------------------------------------


class Segmenter(Scales):
    """UPerNet: four blocks' maps at four scales, pooled and added up, to logits (B, C, H, W).

    Args:
        vit: the encoder; copied.
        classes: C.
        layers: the blocks, counted from 0 (3, 5, 7, 11 of 12).
    """

    def __init__(self, vit: ViT, classes: int, *, layers: Sequence[int] = (3, 5, 7, 11), drop_path: float = 0.1):
        with extra("detection"):
            from transformers import UperNetConfig
            from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        super().__init__(vit, layers, drop_path)
        # as G2SD
        sizes = {"hidden_size": vit.width, "auxiliary_channels": 256, "auxiliary_in_channels": self.widths[2]}
        config = UperNetConfig(pool_scales=[1, 2, 3, 6], num_labels=classes, **sizes)
        self.head, self.auxiliary = UperNetHead(config, self.widths), UperNetFCNHead(config, self.widths)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (B, C, H, W); in training those of the auxiliary head, on the third map, next to them."""
        maps, size = self.maps(images), images.shape[2:]
        heads = [self.head, self.auxiliary] if self.training else [self.head]
        logits = tuple(F.interpolate(head(maps), size, mode="bilinear", align_corners=False) for head in heads)
        return logits if self.training else logits[0]


def segmentation_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """For `fit` on `SceneCrops`: cross-entropy, and 0.4 of the auxiliary head's."""
    images, truth = batch
    main, auxiliary = (F.cross_entropy(x.float(), truth, ignore_index=IGNORED) for x in model(images))
    return main + 0.4 * auxiliary


class SceneCrops(Dataset):
    """Scenes under mmseg's augmentation: the short side to 0.5 to 2 of `size`, a crop of size x size, flips, colours.

    Items are (image, labels), normalised. mmseg also draws another crop where one class fills three quarters of it;
    ours does not.

    Args:
        data: items (uint8 image, labels) as `data.pretraining.Scenes`.
    """

    def __init__(self, data: Dataset, size: int = 512):
        self.data, self.size = data, size
        self.transform = v2.Compose(
            [
                v2.RandomResize(size // 2, 2 * size + 1, antialias=True),
                v2.RandomCrop((size, size), pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}),
                v2.RandomHorizontalFlip(),
                v2.RandomPhotometricDistort(),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.long, "others": None}, scale=True),
                NORMALISE,
                v2.ToPureTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, truth = self.data[index]
        return self.transform(tv_tensors.Image(image), tv_tensors.Mask(truth))


class WholeScenes(Dataset):
    """Scenes as mmseg tests them: items (image, labels), the image normalised, its short side resized to `size`."""

    def __init__(self, data: Dataset, size: int = 512):
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, truth = self.data[index]
        factor = self.size / min(image.shape[1:])
        sides = [max(1, round(n * factor)) for n in image.shape[1:]]
        return NORMALISE(v2.functional.resize(image, sides, antialias=True).float() / 255), truth


@torch.no_grad()
def slide(model: nn.Module, image: Tensor, size: int) -> Tensor:
    """Logits (C, H, W) of one normalised image (3, H, W), sides at least `size`: means over windows that overlap."""
    rows, columns = (starts(n, size, 2 * size // 3) for n in image.shape[1:])
    places = [np.s_[..., y : y + size, x : x + size] for y in rows for x in columns]
    windows = model(torch.stack([image[place] for place in places])).float()  # (n, C, S, S)
    total, count = windows.new_zeros(windows.shape[1], *image.shape[1:]), windows.new_zeros(image.shape[1:])
    for place, logits in zip(places, windows, strict=True):
        total[place] += logits
        count[place] += 1
    return total / count


def confusions(
    model: nn.Module, data: Dataset, classes: int, *, size: int = 512, hardware: Hardware = AUTO, folder: Path | None
) -> Iterator[Tensor]:
    """The confusion matrix (C, C) of each scene, at its original size; see `WholeScenes`, `slide` and `detections`."""
    scenes = WholeScenes(data, size)

    @torch.no_grad()
    def matrices(done: int) -> Iterator[Tensor]:
        with evaluating(hardware, model) as device:
            stream = loader(scenes, None, hardware, device, done)
            for image, truth in progress(stream, "segmentation", len(data), done):
                logits = slide(model, image.to(device), size)[None]
                whole = F.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)
                yield landcover.confusion(truth, whole[0].argmax(0).cpu(), classes).to_sparse()

    return (matrix.to_dense() for matrix in saved(folder, len(data), matrices))
