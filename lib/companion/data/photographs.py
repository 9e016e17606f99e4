"""Photographs that ship with scikit-image and scikit-learn, for figures that need real images and no network.

Licences as these libraries state them: astronaut (NASA) and rocket (SpaceX) are in the public domain; cat (S. van der
Walt) and coffee (R. Michetti) CC0; tissue (CMMI) without known restrictions; flower (vultilion) and temple
(danielbuechele) CC BY 2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import v2

from ..errors import check_choice, check_range
from .classification import resize_transform

PHOTOGRAPHS = {
    "astronaut": data.astronaut,
    "cat": data.chelsea,
    "coffee": data.coffee,
    "rocket": data.rocket,
    "temple": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
    "tissue": data.immunohistochemistry,
}


def photographs(input: Any, names: Sequence[str] = tuple(PHOTOGRAPHS)) -> Tensor:
    """The central squares of photographs, (number, 3, size, size) float32, resized and normalised for an encoder.

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.
        names: of `PHOTOGRAPHS`.

    Raises `BadParameter`: an unknown name.
    """
    check_range("names", len(names), 1)
    for name in names:
        check_choice("names", name, PHOTOGRAPHS)
    images = [Image.fromarray(PHOTOGRAPHS[name]()) for name in names]
    resize = resize_transform(input)
    return torch.stack([resize(v2.functional.center_crop(image, [min(image.size)] * 2)) for image in images])
