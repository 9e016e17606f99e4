"""The toy tracker, a one-stream tracker that replaces OSTrack: its builder, training and measured quality.

    python -m companion.toy.encoders.tracker      (about 5 minutes on one core)

It is trained on clear pairs of crops of one stream, two thirds RGB and one third thermal, whose distractors differ from
the target: it learns to match; its data have no darkness, glare or crossover, and no second stream.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.ops import box_convert

from ...backbones import read_state
from ...data.tracking import MEAN, STD
from ...evaluation.metrics.tracking import centre_distance, iou
from ...models.bat import OSTrack, losses
from ...training.fit import Batch
from ..datasets.tracking import foundation_pairs
from . import card, weights_file
from .training import fit_steps

NAME = "pocket_ostrack"
PAIRS, EPOCHS, BATCH, LEARNING_RATE = 16_000, 6, 32, 2e-3
TESTED = 1000  # pairs from tiles that are not in training


def build(weights: str | Path = "shipped") -> OSTrack:
    """The toy tracker in eval mode: 4 blocks of width 64, crops of 32 and 64 pixels.

    Args:
        weights: "shipped", "random" (torch's current seed), or a file under the names of OSTrack's authors.

    Raises `CorruptFile`, `BadCheckpoint`: a file that cannot be read, or does not match.
    """
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    unused = {"num_classes": 0, "class_token": False, "pos_embed": "none", "global_pool": ""}
    tracker = OSTrack(VisionTransformer(**size, **unused), template=32, search=64, head_channels=64)
    if weights != "random":
        tracker.load_official(read_state(weights_file(NAME) if weights == "shipped" else weights))
    return tracker.eval()


def pixels(patches: Tensor) -> Tensor:
    """Normalised input of the tracker, from uint8 crops (n, 3, H, W) of one stream."""
    mean, std = (torch.tensor(v, device=patches.device)[:, None, None] for v in (MEAN, STD))
    return (patches.float() / 255 - mean) / std


def loss(tracker: OSTrack, batch: Batch) -> dict[str, Tensor]:
    """OSTrack's loss on uint8 templates (B, 3, 32, 32), searches (B, 3, 64, 64) and boxes (B, 4)."""
    template, search, boxes = batch
    return losses(tracker(pixels(template), pixels(search)), boxes)


def pairs(count: int, seed: int, split: str) -> TensorDataset:
    """Training pairs as a dataset: uint8 templates, uint8 searches, boxes x, y, w, h as fractions of the crop."""
    return TensorDataset(*map(torch.from_numpy, foundation_pairs(count, seed, split)))


def train(count: int = PAIRS, epochs: float = EPOCHS, seed: int = 0) -> OSTrack:
    """Train the toy tracker from scratch; returned in eval mode."""
    torch.manual_seed(seed)
    tracker = build("random")
    data = pairs(count, seed, "train")
    fit_steps(tracker, loss, data, epochs * (count // BATCH), BATCH, LEARNING_RATE, seed, NAME)
    return tracker


def thermal(templates: Tensor) -> Tensor:
    """Whether each of uint8 templates (n, 3, h, w) is thermal, which is grey; JPEG leaves a little colour."""
    return (templates.float().amax(1) - templates.float().amin(1)).mean((1, 2)) < 4


@torch.inference_mode()
def measure(tracker: OSTrack, count: int = TESTED, seed: int = 1) -> dict[str, dict[str, float]]:
    """Mean IoU and precision (centre at most 5 of the 64 pixels off) on test pairs, by stream, and at chance level.

    "chance" predicts a box of average size in the middle of every crop.
    """
    template, search, truth = pairs(count, seed, "test").tensors
    parts = zip(template.split(250), search.split(250), strict=True)
    predicted = torch.cat([box_convert(tracker(pixels(z), pixels(x)).box, "cxcywh", "xywh") for z, x in parts]).numpy()
    truth, everywhere = truth.numpy(), np.ones(count, bool)
    grey = thermal(template).numpy()
    size = truth[:, 2:].mean(0)
    middle = np.tile(np.concatenate([0.5 - size / 2, size]), (count, 1))
    found = {}
    for name, boxes, rows in (("RGB", predicted, ~grey), ("thermal", predicted, grey), ("chance", middle, everywhere)):
        pair = 64 * boxes[rows], 64 * truth[rows]
        near = centre_distance(*pair, inclusive=False) <= 5
        found[name] = {"IoU": round(float(iou(*pair).mean()), 3), "precision": round(float(near.mean()), 3)}
    return found


def ship(folder: Path, seed: int = 0) -> Path:
    """Train, measure, and write the weights and their model card."""
    start = time.monotonic()
    tracker = train(seed=seed)
    seconds = time.monotonic() - start
    recipe = {"pairs": PAIRS, "epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE, "seed": seed}
    return card.save(folder, NAME, tracker.to_official(), measure(tracker), recipe, seconds)


if __name__ == "__main__":
    card.command(ship)
