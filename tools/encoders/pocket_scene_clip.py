"""The CLIP of scenes of SIC-CADS' toy study. About 40 seconds on one core."""

from __future__ import annotations

import torch
from torchmetrics.functional.classification import multilabel_average_precision

from companion.toy.encoders.detector import CLASSES, CLIP, SceneCLIP, texts
from companion.toy.sic_cads import named, own_seed, scenes, stack, train_clip

from . import ship


@torch.inference_mode()
def measure(model: SceneCLIP) -> dict[str, float]:
    """Mean average precision, in percent, of 400 test images ranked by the cosine of image and text of each class."""
    drawn = scenes(400, "test", own_seed(1))
    cosine = torch.cat([model.encode_image(part, normalize=True) for part in stack(drawn).split(100)]) @ texts(model).T
    return {"mAP": 100 * float(multilabel_average_precision(cosine, named(drawn).long(), len(CLASSES)))}


if __name__ == "__main__":
    recipe = {"pictures": 3000, "steps": 480, "batch": 64, "learning_rate": 3e-3, "seed": 0}
    ship(CLIP, train_clip, measure, recipe)
