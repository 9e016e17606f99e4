"""Downstream tasks of a pre-trained ViT: fine-tuning, a linear probe, Mask R-CNN on a simple pyramid, UPerNet.

    classifier, fine_tune     mean of the patch tokens -> new norm -> linear, all trained, with layer decay (MAE)
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
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from timm.data import Mixup, create_transform
from timm.layers import LayerNorm2d
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import InterpolationMode, v2

from ...errors import BadParameter
from ...ops.recorded import recorded
from ...training.fit import AUTO, Hardware, History, evaluating, fit, same_shapes
from ...training.schedules import adamw, learning_rates
from ..layers import heads
from .vit import ViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of all released teachers
IGNORED = 255
# of fine-tuning [anc: MAE]
RAND_AUGMENT, ERASING = "rand-m9-mstd0.5-inc1", 0.25
MIXUP, CUTMIX, SMOOTHING = 0.8, 1.0, 0.1


def like(vit: ViT, drop_path: float = 0.0) -> ViT:
    """A copy with stochastic depth, all of it trained, the position embedding too; see `heads.like`."""
    model = heads.like(vit, drop_path)
    model.masked_embed = None  # in no forward pass here
    return model


def layer_decayed(
    rates: np.ndarray, encoder: str = "", layer_decay: float = 0.65, weight_decay: float = 0.05
) -> dict[str, Any]:
    """AdamW and learning rates by layer, `optimizer` and `schedule` of `fit`: `layer_decay` a block downwards.

    As in MAE, BEiT and ViTDet: patches, [CLS] token and positions are layer 0, block i is layer i + 1, everything after
    has the full learning rate; [CLS] token, positions, vectors and biases have no weight decay.

    Args:
        rates: the full learning rate at each step, (steps,).
        encoder: where the ViT is in the model, such as "backbone.vit."; "" for the model itself.
    """
    stem, blocks = rf"^{encoder}(?:cls_token|pos_embed|patch_embed)", [(rf"^{encoder}blocks\.(\d+)", None)]
    plain, peak = {f"{encoder}cls_token", f"{encoder}pos_embed"}, max(rates)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        read = SimpleNamespace(  # what timm reads of a model
            named_parameters=model.named_parameters, group_matcher=lambda coarse: {"stem": stem, "blocks": blocks}
        )
        decayed = param_groups_layer_decay(read, weight_decay, plain, layer_decay=layer_decay)
        return [group | {"lr": peak * group["lr_scale"]} for group in decayed]

    return {
        "optimizer": adamw(peak, weight_decay, groups=groups),
        "schedule": lambda base, steps, per_epoch: rates * (base / peak),
    }


# --- classification ---------------------------------------------------------------------------------------------------


@recorded()
def classifier(vit: ViT, classes: int, *, drop_path: float = 0.1) -> ViT:
    """MAE's classifier on a copy of the encoder, (B, 3, S, S) to logits (B, classes); see `heads.classifier`."""
    model = heads.classifier(vit, classes, drop_path=drop_path)
    model.masked_embed = None
    return model


def train_transform(size: int = 224) -> Callable:
    """MAE's for fine-tuning, by timm: random crop, flip, RandAugment 9, erasing 0.25, ImageNet's mean and std."""
    return create_transform(
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


@recorded()
def test_transform(size: int = 224, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> v2.Transform:
    """The centre of an image whose short side is size x 256 / 224, bicubic."""
    cubic = InterpolationMode.BICUBIC
    steps = [v2.Resize(round(size * 256 / 224), cubic, antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def mixed_loss(classes: int) -> Callable:
    """For `fit`: cross-entropy of smoothed labels, images mixed in pairs by timm.

    The mix is drawn for each batch from torch's generator, so that a resumed run mixes alike.
    """
    mix = Mixup(MIXUP, CUTMIX, label_smoothing=SMOOTHING, num_classes=classes)

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        if len(images) % 2:  # pairs need an even number
            return F.cross_entropy(model(images).float(), labels, label_smoothing=SMOOTHING)
        state = np.random.get_state()  # noqa: NPY002 - timm draws from it
        np.random.seed(int(torch.randint(2**31, ())))  # noqa: NPY002
        # timm writes into its input
        images, soft = mix(images.clone(), labels)
        np.random.set_state(state)  # noqa: NPY002
        return -(soft * model(images).float().log_softmax(-1)).sum(-1).mean()

    return loss


def fine_tune(
    vit: ViT,
    classes: int,
    data: Dataset,
    *,
    epochs: float = 100,
    batch: int = 1024,
    lr: float | None = None,
    layer_decay: float = 0.65,
    warmup: float = 0.05,
    drop_path: float = 0.1,
    weight_decay: float = 0.05,
    **options: Any,
) -> tuple[ViT, History]:
    """A trained classifier and its history. Defaults are MAE's for ViT-B.

    Args:
        data: of (image, label).
        lr: by default 5e-4 for each 256 images of a batch.
        warmup: a share of the steps (MAE: 5 of 100 epochs).
        options: of `fit`.
    """
    model = classifier(vit, classes, drop_path=drop_path)
    steps = max(1, round(epochs * (len(data) // batch)))
    rates = learning_rates("cosine", 5e-4 * batch / 256 if lr is None else lr, steps, round(warmup * steps), 1e-6)
    options |= layer_decayed(rates, "", layer_decay, weight_decay)
    return model, fit(model, mixed_loss(classes), data, epochs=epochs, batch=batch, **options)


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


def classification_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """For `fit`: cross-entropy of a batch of inputs and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


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


def _scales(width: int) -> tuple[list[nn.Module], list[int]]:
    """From a map (B, width, g, g) to maps of the `FACTORS`, and the channels of these."""
    half, quarter = width // 2, width // 4
    larger = (nn.ConvTranspose2d(width, half, 2, 2), LayerNorm2d(half), nn.GELU())
    largest = nn.Sequential(*larger, nn.ConvTranspose2d(half, quarter, 2, 2))
    twice, same, smaller = nn.ConvTranspose2d(width, half, 2, 2), nn.Identity(), nn.MaxPool2d(2)
    return [largest, twice, same, smaller], [quarter, half, width, width]


def _maps(vit: ViT, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The patch tokens of some blocks as maps (B, D, h, w), without the final norm."""
    rows = images.shape[2] // vit.patch
    return [rearrange(x[:, 1:], "b (h w) d -> b d h w", h=rows) for x in vit.hidden(images, layers)]


class SimplePyramid(nn.Module):
    """ViTDet's: the last block's map at 4, 2, 1 and 1/2 times its side, each separately, and a coarser one by pooling.

    The encoder is copied. All but four of ViTDet's blocks attend within windows, to save memory; ours attend globally.
    """

    def __init__(self, vit: ViT, channels: int = 256, drop_path: float = 0.0):
        super().__init__()
        self.vit, self.out_channels = like(vit, drop_path), channels
        self.vit.norm.requires_grad_(False)  # the maps are taken before it
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, width in zip(*_scales(vit.width), strict=True)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps (B, channels, f g, f g) by name: "0", "1", ..., and "pool"."""
        x = _maps(self.vit, images, (-1,))[0]
        maps = OrderedDict((str(i), level(x)) for i, level in enumerate(self.levels))
        maps["pool"] = F.max_pool2d(next(reversed(maps.values())), 1, 2)
        return maps


# --- detection --------------------------------------------------------------------------------------------------------


def detector(
    vit: ViT,
    classes: int,
    *,
    size: int = 1024,
    channels: int = 256,
    drop_path: float = 0.1,
    anchor: float = 8.0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    **options: Any,
) -> MaskRCNN:
    """Mask R-CNN of torchvision on a simple pyramid of the encoder.

    torchvision's heads are simpler than ViTDet's (two layers for boxes, no norms), which G2SD has.

    Args:
        classes: without the background.
        size: images are resized to this side, in training and at test.
        anchor: side of a level's anchors over its stride.
        options: of torchvision's `MaskRCNN`.
    """
    strides = [vit.patch / factor for factor in (*FACTORS, FACTORS[-1] / 2)]
    anchors = AnchorGenerator(tuple((anchor * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
    names = [str(i) for i in range(len(FACTORS))]
    return MaskRCNN(
        SimplePyramid(vit, channels, drop_path),
        classes + 1,
        min_size=size,
        max_size=size,
        image_mean=list(mean),
        image_std=list(std),
        size_divisible=2 * vit.patch,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        **options,
    )


class Crops(Dataset):
    """Instances under large-scale jitter (0.1 to 2, ViTDet's), cropped to size x size, in tensors that stack.

    An item is (image float in [0, 1], boxes (most, 4), labels (most,), masks packed to bits), rows beyond an image's
    instances with label 0.

    Args:
        data: items (uint8 image, target) as `data.pretraining.Instances`.
        size: of the crop.
        most: largest number of instances; the smallest are left out.
        jitter: range of the scale; None: images are left unchanged and must be size x size.
    """

    def __init__(
        self, data: Dataset, size: int = 1024, most: int = 100, jitter: tuple[float, float] | None = (0.1, 2.0)
    ):
        self.data, self.size, self.most = data, size, most
        steps = []
        if jitter is not None:
            steps = [
                v2.ScaleJitter((size, size), jitter, antialias=True),
                v2.RandomCrop((size, size), pad_if_needed=True),
                v2.RandomHorizontalFlip(),
            ]
        self.transform = v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, target = self.data[index]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        given = {"boxes": boxes, "labels": target["labels"], "masks": tv_tensors.Mask(target["masks"])}
        image, kept = self.transform(tv_tensors.Image(image), given)
        if image.shape[1:] != (self.size, self.size):
            raise BadParameter("size", self.size, f"{tuple(image.shape[1:])}, as the images; or a jitter")
        area = kept["masks"].flatten(1).sum(1)
        largest = torch.argsort(area, descending=True)[: self.most]
        largest = largest[area[largest] > 0]
        boxes, labels = torch.zeros(self.most, 4), torch.zeros(self.most, dtype=torch.long)
        bits = np.zeros((self.most, -(-(self.size**2) // 8)), np.uint8)
        boxes[: len(largest)], labels[: len(largest)] = kept["boxes"][largest], kept["labels"][largest]
        bits[: len(largest)] = np.packbits(kept["masks"][largest].flatten(1).numpy(), 1)
        return image.as_subclass(Tensor).float() / 255, boxes, labels, torch.from_numpy(bits)


def detection_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """For `fit` on `Crops`: the sum of Mask R-CNN's losses."""
    images, boxes, labels, bits = batch
    size, targets = images.shape[-1], []
    shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    for own, label, mask in zip(boxes, labels, bits, strict=True):
        there = label > 0
        unpacked = (mask[there][..., None] >> shifts) & 1
        unpacked = unpacked.flatten(1)[:, : size * size].view(-1, size, size)
        targets.append({"boxes": own[there], "labels": label[there], "masks": unpacked})
    return sum(model(list(images), targets).values())


def _without_masks(items: list[tuple[Tensor, dict]]) -> list[tuple[Tensor, Any]]:
    return [(image, target["image_id"]) for image, target in items]


@torch.no_grad()
def detections(
    model: MaskRCNN,
    data: Dataset,
    categories: Sequence[int],
    *,
    batch: int = 1,
    hardware: Hardware = AUTO,
    progress: Callable = iter,
) -> list[dict]:
    """Rows for `metrics.detection.evaluate`, kinds "bbox" and "segm", of all images of `data.pretraining.Instances`.

    Args:
        categories: category ids in the order of the labels.
        batch: images at once, of one size: the ViT would process padding.
        progress: wraps the loader, which returns four batches at a time.
    """
    from faster_coco_eval.core import mask as rle  # the extra "detection"

    rows = []
    with evaluating(hardware, model) as device:
        options = {"num_workers": hardware.workers, "pin_memory": device.type == "cuda", "collate_fn": _without_masks}
        for items in progress(DataLoader(data, 4 * batch, **options)):
            outputs: dict[int, dict[str, Tensor]] = {}
            for some in same_shapes([image for image, _ in items], batch):
                images = [items[i][0].to(device, non_blocking=True).float() / 255 for i in some]
                outputs |= zip(some, model(images), strict=True)
            for i, (_, image_id) in enumerate(items):
                boxes, labels, scores = (outputs[i][name].cpu() for name in ("boxes", "labels", "scores"))
                sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
                masks = (outputs[i]["masks"][:, 0] > 0.5).cpu().numpy().astype(np.uint8)
                for box, label, score, mask in zip(sides, labels, scores, masks, strict=True):
                    run = rle.encode(np.asfortranarray(mask))
                    rows.append(
                        {
                            "image_id": image_id,
                            "category_id": categories[int(label) - 1],
                            "score": float(score),
                            "bbox": box.tolist(),
                            "segmentation": {**run, "counts": run["counts"].decode()},
                        }
                    )
    return rows


# --- segmentation -----------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """UPerNet: four blocks' maps at 4, 2, 1 and 1/2 times the grid's side, pooled, added up, to logits (B, C, H, W).

    Args:
        vit: the encoder; copied.
        classes: C.
        layers: the blocks, counted from 0 (3, 5, 7, 11 of 12).
        auxiliary: channels of a second, simpler head on the third map, in training; 0 for none.
    """

    def __init__(
        self,
        vit: ViT,
        classes: int,
        *,
        layers: Sequence[int] = (3, 5, 7, 11),
        auxiliary: int = 256,
        drop_path: float = 0.1,
        pools: Sequence[int] = (1, 2, 3, 6),
    ):
        from transformers import UperNetConfig  # the extra "detection"
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        super().__init__()
        if len(layers) != 4 or any(not -len(vit.blocks) <= i < len(vit.blocks) for i in layers):
            raise BadParameter("layers", tuple(layers), f"four of {len(vit.blocks)} blocks, counted from 0")
        self.vit, self.layers = like(vit, drop_path), tuple(layers)
        self.vit.norm.requires_grad_(False)  # the maps are taken before it
        scales, widths = _scales(vit.width)
        self.scales = nn.ModuleList(scales)
        config = UperNetConfig(
            hidden_size=vit.width,  # as in G2SD
            pool_scales=list(pools),
            num_labels=classes,
            auxiliary_channels=auxiliary or 1,
            auxiliary_in_channels=widths[2],
        )
        self.head = UperNetHead(config, widths)
        self.auxiliary = UperNetFCNHead(config, widths) if auxiliary else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, C, H, W); in training, with an auxiliary head, its logits next to them."""
        maps = _maps(self.vit, images, self.layers)
        levels = [scale(x) for scale, x in zip(self.scales, maps, strict=True)]
        heads = [self.head, self.auxiliary] if self.training and self.auxiliary is not None else [self.head]
        logits = [F.interpolate(head(levels), images.shape[2:], mode="bilinear", align_corners=False) for head in heads]
        return logits[0] if len(logits) == 1 else (logits[0], logits[1])


def segmentation_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """For `fit` on `SceneCrops`: cross-entropy, and 0.4 of the auxiliary head's."""
    images, truth = batch
    logits = model(images)
    parts = logits if isinstance(logits, tuple) else (logits,)
    losses = [F.cross_entropy(part.float(), truth, ignore_index=IGNORED) for part in parts]
    return losses[0] + (0.4 * losses[1] if len(losses) > 1 else 0)


class SceneCrops(Dataset):
    """Scenes under mmseg's augmentation: the short side to 0.5 to 2 of `size`, a crop of size x size, flips, colours.

    Items are (image, labels), normalised. mmseg also draws another crop where one class fills three quarters of it;
    ours does not.

    Args:
        data: items (uint8 image, labels) as `data.pretraining.Scenes`.
    """

    def __init__(self, data: Dataset, size: int = 512):
        self.data, self.size = data, size
        filled = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
        self.transform = v2.Compose(
            [
                v2.RandomCrop((size, size), pad_if_needed=True, fill=filled),
                v2.RandomHorizontalFlip(),
                v2.RandomPhotometricDistort(),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(list(MEAN), list(STD)),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, truth = self.data[index]
        factor = self.size / min(image.shape[1:]) * float(torch.empty(()).uniform_(0.5, 2.0))
        side = [max(1, round(n * factor)) for n in image.shape[1:]]
        image = v2.functional.resize(tv_tensors.Image(image), side, antialias=True)
        image, truth = self.transform(image, v2.functional.resize(tv_tensors.Mask(truth), side))
        return image.as_subclass(Tensor), truth.as_subclass(Tensor).long()


@torch.no_grad()
def slide(model: nn.Module, image: Tensor, size: int = 512, stride: int = 341) -> Tensor:
    """Logits (C, H, W) of one normalised image (3, H, W) of any size, the mean over overlapping windows."""
    height, width = (max(n, size) for n in image.shape[1:])
    padded = F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
    starts = [sorted({min(i, n - size) for i in range(0, n - size + stride, stride)}) for n in (height, width)]
    corners = [(y, x) for y in starts[0] for x in starts[1]]
    windows = model(torch.stack([padded[:, y : y + size, x : x + size] for y, x in corners])).float()
    total, count = windows.new_zeros(windows.shape[1], height, width), windows.new_zeros(height, width)
    for (y, x), logits in zip(corners, windows, strict=True):
        total[:, y : y + size, x : x + size] += logits
        count[y : y + size, x : x + size] += 1
    return (total / count)[:, : image.shape[1], : image.shape[2]]
