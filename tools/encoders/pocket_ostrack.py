"""The toy tracker that replaces OSTrack, trained on clear pairs of crops of one stream. About 5 minutes on one core."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.ops import box_convert

from companion.evaluation.metrics.tracking import iou
from companion.models.bat import OSTrack, losses
from companion.models.bat.crops import MEAN, STD, box_in_crop, crop
from companion.toy import bat as toy
from companion.toy.encoders.tracker import NAME, build
from companion.toy.encoders.training import fit_steps
from companion.toy.scenes import SPLITS
from companion.training.fit import Batch

from . import ship


def pixels(patches: Tensor) -> Tensor:
    """Normalised input of the tracker, from uint8 crops (n, 3, H, W) of one stream."""
    mean, std = (torch.tensor(v, device=patches.device)[:, None, None] for v in (MEAN, STD))
    return (patches.float() / 255 - mean) / std


def pairs(count: int, seed: int, split: str) -> TensorDataset:
    """Training pairs as a dataset: uint8 templates, uint8 searches, boxes x, y, w, h as fractions of the crop."""
    return TensorDataset(*map(torch.from_numpy, foundation_pairs(count, seed, split)))


def foundation_pairs(
    count: int, seed: int, split: str = "train", template: int = 32, search: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Template and search crops from well-lit scenes of a single stream, two thirds visible and one third infrared.

    They train the foundation tracker (which replaces OSTrack). Both crops show the same three objects, which differ in
    appearance and temperature, at independently drawn positions, sizes and background windows. The template is cropped
    around the target's box at factor 2, the search crop at factor 4 around a jittered box: each side times exp(0.25
    N(0, 1)), each coordinate of the centre plus 3 sqrt(wh) (U(0, 1) - 0.5), as BAT's official sampler does.

    Args:
        count: number of pairs, n below.
        seed: the same seed gives the same pairs.
        split: the split whose tiles are used.
        template, search: sides of the crops in pixels.

    Returns:
        Templates (n, 3, template, template) uint8, searches (n, 3, search, search) uint8, and the target's boxes
        (n, 4) float32 as x, y, w, h in units of the search crop (a box may extend beyond the crop).
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), 2))
    places = toy._layouts(rng, 2 * count).reshape(count, 2, 3, 2)
    templates = np.empty((count, 3, template, template), np.uint8)
    searches = np.empty((count, 3, search, search), np.uint8)
    boxes = np.empty((count, 4), np.float32)
    for row, centres in enumerate(places):
        video = still(rng, split, centres)
        stream, draw = ("infrared", toy.draw_infrared) if rng.random() < 1 / 3 else ("visible", toy.draw_visible)
        first, last = video.boxes(stream)
        jittered = last[2:] * np.exp(0.25 * rng.standard_normal(2))
        centre = last[:2] + last[2:] / 2 + 3 * np.sqrt(jittered.prod()) * (rng.random(2) - 0.5)
        around = np.concatenate([centre - jittered / 2, jittered])
        patch, _ = seen(video, 0, rng, draw, first, 2, template)
        templates[row] = patch.transpose(2, 0, 1)
        patch, scale = seen(video, 1, rng, draw, around, 4, search)
        searches[row] = patch.transpose(2, 0, 1)
        boxes[row] = box_in_crop(last, around, scale, search)
    return templates, searches, boxes


def still(rng: np.random.Generator, split: str, centres: np.ndarray) -> toy.Video:
    """A well-lit "video" of two frames with the objects at `centres` (2, 3, 2)."""
    background, warmth, things, target, _ = toy._cast(rng, split, alike=False)
    none = np.zeros(2)
    return toy.Video(
        name="still",
        background=background,
        warmth=warmth,
        drift=rng.uniform(0, toy.PLATE - toy.CANVAS, (2, 2)),
        things=things,
        target=target,
        order=tuple(rng.permutation(3).tolist()),
        centres=centres,
        sizes=toy._sizes(rng, 2),
        heat=np.tile([toy.TEMPERATURES[thing.temperature] for thing in things], (2, 1)),
        shift=none,
        situation=("clear", "clear"),
        dark=none,
        glare=none,
        crossover=none,
    )


def seen(
    video: toy.Video, frame: int, rng: np.random.Generator, draw: Callable, box: np.ndarray, factor: float, size: int
) -> tuple[np.ndarray, float]:
    """`crop` of a frame, drawing only the part inside the crop."""
    middle, reach = box[:2] + box[2:] / 2, np.sqrt(box[2] * box[3]) * factor / 2 + 3
    low = np.clip(np.floor(middle - reach).astype(int), 0, toy.CANVAS)
    high = np.clip(np.ceil(middle + reach).astype(int), 0, toy.CANVAS)
    image = draw(video, frame, rng, (*low.tolist(), *high.tolist()))
    return crop(image, box - [*low, 0, 0], factor, size)


def loss(tracker: OSTrack, batch: Batch) -> dict[str, Tensor]:
    """OSTrack's loss on uint8 templates (B, 3, 32, 32), searches (B, 3, 64, 64) and boxes (B, 4)."""
    template, search, boxes = batch
    return losses(tracker(pixels(template), pixels(search)), boxes)


def train(count: int, epochs: float, batch: int, learning_rate: float, seed: int) -> OSTrack:
    """The tracker, trained from scratch."""
    torch.manual_seed(seed)
    tracker = build("random")
    data = pairs(count, seed, "train")
    fit_steps(tracker, loss, data, epochs * (count // batch), batch, learning_rate, seed, NAME)
    return tracker


@torch.inference_mode()
def measure(tracker: OSTrack) -> dict[str, float]:
    """Mean IoU on 1,000 test pairs of both streams."""
    template, search, truth = pairs(1000, 1, "test").tensors
    parts = zip(template.split(250), search.split(250), strict=True)
    predicted = torch.cat([box_convert(tracker(pixels(z), pixels(x)).box, "cxcywh", "xywh") for z, x in parts])
    return {"IoU": float(iou(64 * predicted.numpy(), 64 * truth.numpy()).mean())}


if __name__ == "__main__":
    recipe = {"count": 16_000, "epochs": 6, "batch": 32, "learning_rate": 2e-3, "seed": 0}
    ship(NAME, train, measure, recipe, tensors=OSTrack.to_official)
