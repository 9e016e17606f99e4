"""A small ViT that learned from two real encoders on photographs: DMT's losses, a ViT-S/14 and an EfficientNet-Lite0.

The teachers differ in architecture, width and pre-training; both have 16 x 16 positions, at 224 and at 256 pixels. Four
photographs are held out: neither a crop of them nor a teacher's tokens of them is used in training. The settings were
fixed before the first training, none was selected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ... import backbones
from ...data.photographs import photographs
from ...models.dmt.vit import ViT, build
from .. import encoders

NAME = "photo_student"
TEACHERS = {"ViT-S/14": "vit_small_patch14_dinov2", "EfficientNet-Lite0": "tf_efficientnet_lite0"}
SIDES = {"ViT-S/14": 224, "EfficientNet-Lite0": 256}  # pixels; both give 16 x 16 positions
STRIDE_16 = 3  # the EfficientNet's stage
GRID = (16, 16)
HELD_OUT = ("astronaut", "coffee", "rocket", "flower")
STUDENT = {"image": 224, "patch": 14, "width": 96, "depth": 3, "heads": 3}
SEEN = backbones.Input(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # normalisation of the student's images


def student(seed: int = 0) -> ViT:
    """The student before its training, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("pocket", **STUDENT).eval()


def load() -> ViT:
    """The shipped student, in eval mode. Raises `MissingWeights`, `CorruptFile`."""
    state = backbones.read_state(encoders.weights_file(NAME))
    return ViT.from_official({name: value.float() for name, value in state.items()}, int(STUDENT["heads"]), NAME)


def teachers(side: int = SIDES["ViT-S/14"]) -> dict[str, nn.Module]:
    """The real encoders, the ViT for images of `side` px. Raises `MissingWeights`: neither cached nor installed."""
    vit, convnet = TEACHERS.values()
    return {"ViT-S/14": backbones.build(vit, img_size=side), "EfficientNet-Lite0": backbones.build(convnet)}


@torch.no_grad()
def tokens(name: str, encoder: nn.Module, images: Tensor, side: int = 0) -> Tensor:
    """Tokens (B, 1 + N, D) of images (B, 3, S, S) in 0 to 1: the last block's, before the final norm, or a map of the
    EfficientNet after its mean, which stands in for the [CLS] token. N is 256, or that of images of `side` px."""
    x = seen_by_teacher(name, encoder, images, side)
    if name == "ViT-S/14":
        last = len(encoder.blocks) - 1
        options = {"norm": False, "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
        ((patches, first),) = encoder.forward_intermediates(x, indices=[last], **options)
        return torch.cat([first, patches], 1)
    (found,) = encoder.forward_intermediates(x, indices=[STRIDE_16], intermediates_only=True)
    patches = found.flatten(2).mT
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def seen_by_teacher(name: str, encoder: nn.Module, images: Tensor, side: int = 0) -> Tensor:
    """A teacher's input of images in 0 to 1: resized to its side, or `side`, and normalised."""
    seen = backbones.input_of(encoder)
    return v2.functional.normalize(resized(images, side or SIDES[name]), list(seen.mean), list(seen.std))


def resized(images: Tensor, side: int) -> Tensor:
    """Images at `side` x `side` pixels, in 0 to 1."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def seen_by_student(images: Tensor, side: int = STUDENT["image"]) -> Tensor:
    """The student's input (B, 3, side, side) of images in 0 to 1."""
    return v2.functional.normalize(resized(images, side), list(SEEN.mean), list(SEEN.std))


def held_out() -> Tensor:
    """The held-out photographs (4, 3, 256, 256), in 0 to 1."""
    return photographs(backbones.Input(256, (0.0,) * 3, (1.0,) * 3), HELD_OUT)


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """How similarly two encoders relate the positions of an image: (B, L), 1 if equally, 0 if unrelated.

    Position j has a row of cosines with all positions; the result is the correlation of the two encoders' rows. No
    adapter is trained, and the widths may differ.

    Args:
        a, b: patch tokens (B, L, D) and (B, L, E).
    """

    def rows(tokens: Tensor) -> Tensor:
        unit = F.normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
        cosines = unit @ unit.mT
        return cosines - cosines.mean(-1, keepdim=True)

    return F.cosine_similarity(rows(a), rows(b), dim=-1)
