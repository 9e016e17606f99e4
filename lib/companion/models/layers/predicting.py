"""What the methods `predict` of several papers share: images from files, outputs in batches, values by name.

`companion.predict` calls `model.predict(images, names, **options)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ...backbones import input_of
from ...data import classification, decoding
from ...errors import CorruptFile, Count, check_names, typed
from ...io.config import reconfigure
from ...saving import Pretrained

BATCH = 16

Picture = str | Path | Image.Image
Images = Sequence[Picture]
Names = Sequence[str]
Transform = Callable | None


def picture(image: Picture) -> Image.Image:
    """An RGB image, read like those of your own folders."""
    if isinstance(image, Image.Image):
        return decoding.in_memory(image)
    with decoding.opened(_file(image)) as opened:
        return decoding.picture(opened, rotated=True)


def grey(image: Picture) -> Tensor:
    """A grey image (1, H, W) in 0 to 1, read like X-rays."""
    values = decoding.unit_in_memory(image) if isinstance(image, Image.Image) else decoding.unit(_file(image))
    return torch.from_numpy(np.ascontiguousarray(values))[None]


def coloured(image: Picture) -> Tensor:
    """An RGB image (3, H, W) in 0 to 1."""
    return F.to_dtype(F.pil_to_tensor(picture(image)), torch.float32, scale=True)


@typed
def _file(image: str | Path) -> Path:
    if not Path(image).is_file():
        raise CorruptFile(image, "there is no such file")
    return Path(image)


def batches(
    model: nn.Module, images: Images, transform: Callable, read: Callable = picture, run: Any = None
) -> Iterator[Any]:
    """The outputs of a model, or of its method `run`, for batches of images."""
    first = next(model.parameters())
    for start in range(0, len(images), BATCH):
        batch = torch.stack([transform(read(image)) for image in images[start : start + BATCH]])
        dtype = first.dtype if batch.is_floating_point() else batch.dtype
        yield (run or model)(batch.to(first.device, dtype))


def outputs(*args: Any, **options: Any) -> Tensor:
    """Those of `batches` for all images, float32 on the CPU."""
    return torch.cat([x.float().cpu() for x in batches(*args, **options)])


def named(rows: Tensor, names: Names) -> list[dict[str, float]]:
    """Each row of (n, C) as name -> value, the largest first; without names, numbers."""
    check_names(names, rows.shape[1])  # equal ones would be one entry
    names = names or [str(i) for i in range(rows.shape[1])]
    order = rows.argsort(dim=1, descending=True, stable=True).tolist()
    return [{names[i]: row[i] for i in best} for best, row in zip(order, rows.tolist(), strict=True)]


def head(dim: int, classes: int) -> nn.Linear:
    """A linear classifier, initialised as in VPT's code (truncated normal, 0.02)."""
    layer = nn.Linear(dim, classes)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    return layer


class OnBackbone(Pretrained, nn.Module):
    """A classifier on a `backbone` of timm, whose last layer is `head`."""

    backbone: Any
    head: nn.Linear

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def reset_classifier(self, num_classes: Count) -> None:
        """Exchange the last layer for an untrained one of other classes, as timm's models do."""
        self.head = head(self.head.in_features, num_classes).to(self.head.weight)
        reconfigure(self, classes=num_classes)

    def predict(self, images: Images, names: Names, transform: Transform = None) -> list[dict[str, float]]:
        """The probability of each class."""
        transform = transform or classification.resize_transform(input_of(self.backbone))
        return named(outputs(self, images, transform).softmax(1), names)
