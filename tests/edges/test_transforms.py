"""Images of every kind, and every argument, at the transforms."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from companion.backbones import Input
from companion.data import classification, domains
from companion.data.images import to_tensor
from companion.models.bat import crops
from companion.models.dmt import downstream, vit
from companion.models.dmt.recipe import augment
from companion.models.ecamp import transforms as ecamp
from companion.models.hvit import dino
from companion.models.metasegnet import augmentation as land
from companion.models.promptpar import square_transform
from companion.models.sa2vp.recipe import transforms
from companion.toy import promptpar
from tests.edges.common import Edge, check
from tests.models.common import refuses

INPUT = Input(16, (0.5,) * 3, (0.5,) * 3)
PICTURE = Image.fromarray((np.arange(30 * 40 * 3) % 251).astype(np.uint8).reshape(30, 40, 3))
PIL = {
    "resize": classification.resize_transform(INPUT),
    "crop": classification.crop_transform(INPUT, train=False),
    "crop, train": classification.crop_transform(INPUT, train=True),
    "CLIP": domains.clip_transform(INPUT),
    "CLIP, train": domains.clip_transform(INPUT, train=True),
    "square": square_transform(16),
    "square, train": square_transform(16, train=True),
    "DMT": vit.test_transform(16),
    "DMT, train": downstream.train_transform(16),
    "toy": promptpar.transform(),
    "tensor": to_tensor,
}
GREY = torch.rand(1, 30, 40, generator=torch.Generator().manual_seed(0))
FLOATS = {
    **{"ecamp, pre-training": ecamp.pretrain_transform(16), "ecamp, train": ecamp.train_transform(16)},
    **{"ecamp, test": ecamp.test_transform(16), "ecamp, squeeze": ecamp.squeeze_transform(16), "DMT": augment()},
    "mask": lambda image: ecamp.MaskTransform("fundus/riga", False, 16)(image, torch.ones(1, 30, 40))[0],
}
COLOURS, FRAME = GREY[None].repeat(2, 3, 1, 1), np.full((60, 80, 6), 100, np.uint8)
LAND = (
    tv_tensors.Image(torch.full((3, 30, 40), 99, dtype=torch.uint8)),
    tv_tensors.Mask(torch.arange(1200).view(30, 40) % 4),
)


def drawn(transform: Any, image: Any) -> Tensor:
    """What the transform gives where its random numbers begin anew."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    return transform(image)


@pytest.mark.parametrize("name", PIL)
def test_an_image_of_any_mode_is_that_image_in_rgb(name):
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK"):
        other = PICTURE.convert(mode)
        one, two = (drawn(PIL[name], picture) for picture in (other, other.convert("RGB")))
        assert one.equal(two) and len(one) == 3 and one.isfinite().all(), mode
    refuses((lambda: PIL[name](Image.new("F", (40, 30), 1e6)), "scale"))


@pytest.mark.parametrize("name", FLOATS)
def test_pixels_are_bytes_or_floats_up_to_one(name):
    expected = drawn(FLOATS[name], GREY)
    for same in (GREY.half(), GREY.double(), (GREY * 255).round().byte()):
        found = drawn(FLOATS[name], same)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    for wrong in (GREY * 255, GREY * torch.nan, GREY * torch.inf, GREY - 3, (GREY * 255).long(), GREY > 0):
        refuses((lambda wrong=wrong: FLOATS[name](wrong), "images"))


def test_a_mask_has_values_up_to_one():
    transform = ecamp.MaskTransform("fundus/riga", False, 16)
    for same in (torch.uint8, torch.bool, torch.float16, torch.int64, torch.float64):
        assert transform(GREY, torch.ones(2, 15, 20, dtype=same))[1].equal(torch.ones(2, 16, 16))
    for wrong in (
        torch.full((1, 30, 40), 255),
        torch.full((1, 30, 40), torch.nan),
        torch.ones(30, 40),
        torch.ones(1, 0, 0),
    ):
        refuses((lambda wrong=wrong: transform(GREY, wrong), "mask"))


def test_land_and_its_labels_are_transformed_together_or_refused():
    image, labels = LAND
    assert [tuple(x.shape) for x in land.train_transform(16, 8)(image, labels)] == [(3, 16, 16), (16, 16)]
    plain = image.as_subclass(Tensor), labels.as_subclass(Tensor)
    for pair in (plain, (image, plain[1]), (plain[0], labels), (tv_tensors.Image(image.int()), labels)):
        refuses((lambda pair=pair: land.train_transform(16, 8)(*pair), "image|labels"))


class Land:
    """Four images."""

    ignore = 8

    def __len__(self) -> int:
        return 4

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        return tuple(x.as_subclass(Tensor) for x in LAND)


BOX = [20.0, 20, 10, 10]
EDGES = {
    "brightness": Edge(lambda limit: land.BrightnessContrast(limit)(*LAND)[0], {"limit": 0.25}, {"limit": "0, 1"}),
    "crop of land": Edge(lambda size: land.SmartCrop(size, 8)(*LAND)[0], {"size": 16}, {"size": "1"}),
    "mosaic": Edge(lambda p: land.Mosaic(Land(), p, [*"aaaa"])[0][0], {"p": 0.25}, {"p": "0, 1"}),
    "images": Edge(lambda small: dino.ImageViews((16, 8), small=small)(COLOURS)[0], {"small": 2}, {"small": "0, 1"}),
    "grids": Edge(lambda small: dino.GridViews(8, small)(torch.ones(2, 4, 8, 8))[0], {"small": 2}, {"small": "0, 1"}),
    "kind": Edge(
        lambda kind: torch.tensor([len(transforms("vtab/dtd", INPUT, kind))]),
        {"kind": "recipe"},
        {"kind": "whole, crops"},
        others={"kind": {name: name for name in ("whole", "crops", "x", None)}},
    ),
    "crop of a frame": Edge(
        lambda image: crops.crop(image, BOX, 2, 16)[0],
        {"image": FRAME},
        {"image": "infrared"},
        others={"image": {"infrared": FRAME[:, :, :3], "floats": FRAME / 255, "integers": FRAME.astype(int)}},
    ),
    "normalised crops": Edge(
        crops.normalise,
        {"patches": FRAME},
        {"patches": "a tensor"},
        others={"patches": {"floats": FRAME / 255, "a tensor": torch.ones(6, 2, 2, dtype=torch.uint8)}},
    ),
}
MAKERS = {
    **{f.__name__: f for f in (classification.resize_transform, domains.clip_transform)},
    "crop_transform": lambda input: classification.crop_transform(input, train=True),
}
for name, make in MAKERS.items():
    EDGES[name] = Edge(
        lambda size, mean, std, make=make: drawn(make(SimpleNamespace(size=size, mean=mean, std=std)), PICTURE),
        {"size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"size": "1", "mean": "first 0, first -1, first 2.5", "std": "first 2.5"},
    )
SIZED = {
    **{f"ecamp {f.__name__}": (f, GREY) for f in (ecamp.pretrain_transform, ecamp.train_transform)},
    **{f"ecamp {f.__name__}": (f, GREY) for f in (ecamp.test_transform, ecamp.squeeze_transform)},
    "DMT test": (vit.test_transform, PICTURE),
    "DMT train": (downstream.train_transform, PICTURE),
    "square": (square_transform, PICTURE),
    "mask": (lambda size: lambda image: ecamp.MaskTransform("fundus/riga", False, size)(image, image)[0], GREY),
}
for name, (make, image) in SIZED.items():
    EDGES[name] = Edge(
        lambda size, make=make, image=image: drawn(make(size), image).nan_to_num(), {"size": 16}, {"size": "1"}
    )
for edge in EDGES.values():
    edge.draws = True


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    assert check(EDGES[name], numbers=lambda found: torch.as_tensor(found).double())


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_box_that_is_not_finite_is_refused(number):
    box = [20, 20, number, 10]
    refuses(
        (lambda: crops.crop(FRAME, box, 2, 16), "box"),
        (lambda: crops.box_in_crop(box, BOX, 1.0, 16), "box"),
        (lambda: crops.box_from_crop(box, BOX, 1.0, 16), "box"),
        (lambda: crops.clip_box(box, 60, 80), "box"),
    )
