"""How the pocket tracker was made, the one-stream foundation that stands for OSTrack, and how good it is.

    python -m companion.toy.encoders.tracker      (about 5 minutes on one core)

It is trained on clear pairs of pictures of one stream, two thirds RGB and one third thermal, whose distractors differ
from the target: it learns to match, and nothing of darkness, glare, crossover, or of two streams.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from ...data.tracking import MEAN, STD
from ...evaluation.metrics.tracking import centre_distance, iou
from ...models.bat import model as bat
from ...training.fit import fit
from ..datasets.tracking import foundation_pairs
from . import card

NAME = "pocket_ostrack"
PAIRS, EPOCHS, BATCH, RATE = 16_000, 6, 32, 2e-3
TESTED = 1000  # pairs of tiles that training never saw


def pixels(patches: Tensor) -> Tensor:
    """uint8 patches (n, 3, H, W) of one stream, normalised as the tracker wants them."""
    mean, std = (torch.tensor(v, device=patches.device)[:, None, None] for v in (MEAN, STD))
    return (patches.float() / 255 - mean) / std


def loss(tracker: bat.OSTrack, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """OSTrack's loss on uint8 templates (B, 3, 32, 32), searches (B, 3, 64, 64) and boxes (B, 4)."""
    template, search, boxes = batch
    return bat.losses(tracker(pixels(template), pixels(search)), boxes)["total"]


def pairs(count: int, seed: int, split: str) -> torch.utils.data.TensorDataset:
    """Foundation pairs as a data set: uint8 templates, uint8 searches, boxes x, y, w, h as fractions of the crop."""
    return torch.utils.data.TensorDataset(*map(torch.from_numpy, foundation_pairs(count, seed, split)))


def train(count: int = PAIRS, epochs: float = EPOCHS, seed: int = 0) -> bat.OSTrack:
    """Train the pocket tracker from nothing; returned in eval mode."""
    torch.manual_seed(seed)
    tracker = bat.foundation(NAME, "random")
    fit(
        tracker,
        loss,
        pairs(count, seed, "train"),
        epochs=epochs,
        batch=BATCH,
        lr=RATE,
        weight_decay=0.05,
        clip=1.0,
        warmup=0.1,
        seed=seed,
        accelerator="cpu",
        name=NAME,
    )
    return tracker


@torch.inference_mode()
def measure(tracker: bat.OSTrack, count: int = TESTED, seed: int = 1) -> dict[str, dict[str, float]]:
    """Mean IoU and precision (centre at most 5 of the 64 pixels off) on test pairs, by stream, and of no answer at all.

    "chance" gives every target a box of average size in the middle of the crop.
    """
    template, search, truth = pairs(count, seed, "test").tensors
    parts = zip(template.split(250), search.split(250), strict=True)
    said = torch.cat([box_convert(tracker(pixels(z), pixels(x)).box, "cxcywh", "xywh") for z, x in parts]).numpy()
    truth, everywhere = truth.numpy(), np.ones(count, bool)
    grey = (template.float().amax(1) - template.float().amin(1)).mean((1, 2)).numpy() < 4  # JPEG leaves a little colour
    size = truth[:, 2:].mean(0)
    middle = np.tile(np.concatenate([0.5 - size / 2, size]), (count, 1))
    found = {}
    for what, boxes, rows in (("RGB", said, ~grey), ("thermal", said, grey), ("chance", middle, everywhere)):
        pair = 64 * boxes[rows], 64 * truth[rows]
        near = centre_distance(*pair, inclusive=False) <= 5
        found[what] = {"IoU": round(float(iou(*pair).mean()), 3), "precision": round(float(near.mean()), 3)}
    return found


def ship(folder: Path, seed: int = 0) -> Path:
    """Train, measure, and write the weights and their card."""
    start = time.monotonic()
    tracker = train(seed=seed)
    head = {
        "library_name": "companion",
        "data": "drawn objects with surfaces cut from photographs that ship with scikit-image and scikit-learn, over "
        "such photographs; train tiles only",
        "command": "python -m companion.toy.encoders.tracker",
        "recipe": {"pairs": PAIRS, "epochs": EPOCHS, "batch": BATCH, "rate": RATE, "seed": seed},
        "seconds": round(time.monotonic() - start),
        "parameters": sum(p.numel() for p in tracker.parameters()),
    }
    return card.ship(folder / f"{NAME}.safetensors", tracker.to_official(), head, measure(tracker), _CARD)


_CARD = """
# pocket_ostrack

A one-stream tracker of OSTrack's build at pocket size: 4 blocks of width 64, patches of 8, templates of 32x32 and
searches of 64x64 pixels, a centre head of width 64. It stands in for OSTrack-256, which no program may download.

`companion.models.bat.model.foundation("pocket_ostrack")` loads it; the tensors have OSTrack's names.

**Measured** on pairs cut from tiles of the photographs never seen in training: see `quality` above. `chance` is a box
of average size in the middle of every crop.

**Limits.** It knows clear pictures of this small world, where distractors differ from the target. It has seen no
darkness, no glare, no thermal crossover, and never two streams at once: that is what the adapters are for.
"""


if __name__ == "__main__":
    card.command(ship)
