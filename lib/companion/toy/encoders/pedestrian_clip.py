"""The toy CLIP of pedestrians, PromptPAR's backbone: its training and measured quality.

    python -m companion.toy.encoders.pedestrian_clip      (about 5 minutes on one core)

It is trained on clear images of people and sentences about them, without images of the street camera. First the
image tower is trained to classify the attributes of each body part, then both towers contrastively: from scratch, the
second step alone leaves hats, hair and bags at chance level for thousands of steps. open_clip's own classes, images of
64x32 pixels in patches of 8: a grid of 8 rows and 4 columns.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multilabel_auroc

from ...training.fit import Batch
from .. import encoders
from ..datasets.pedestrians import ATTRIBUTES, CAMERAS, SENTENCES, people
from ..datasets.tokens import Tokenizer
from . import card
from .training import fit_steps
from .vit_and_clip import contrast, pixels

NAME = "pocket_pedestrian_clip"
IMAGES, BATCH, LEARNING_RATE = 8000, 64, 1e-3
CLASSIFYING, CONTRASTIVE = 1500, 1000  # optimiser steps
TESTED = 1000

# The order is part of the shipped weights: append only.
WORDS = (
    *("a", "pedestrian", "with", "in", "and", "no", "hat", "hair", "long", "short", "red", "blue", "green", "grey"),
    *("striped", "plain", "top", "trousers", "shorts", "shoes", "backpack", "handbag", "bag"),
)


def tokenizer() -> Tokenizer:
    """The tokenizer of this CLIP's vocabulary."""
    return Tokenizer(WORDS, context_length=24)


class _Classifier(nn.Module):
    """The image tower with a linear head for each part of the person; the heads are discarded afterwards."""

    def __init__(self, clip: nn.Module, classes: list[int]):
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleList(nn.Linear(clip.visual.output_dim, count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.clip.encode_image(images)
        return [head(features) for head in self.heads]


def _classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return sum(F.cross_entropy(logits, label) for logits, label in zip(model(images), labels.unbind(1), strict=True))


def train(
    count: int = IMAGES, classifying: int = CLASSIFYING, contrastive: int = CONTRASTIVE, seed: int = 0
) -> nn.Module:
    """The CLIP, trained from scratch by steps of the two kinds, in eval mode."""
    images, persons = people(count, "train", "clear", seed)
    read, inputs = tokenizer(), pixels(images)
    captions = [person.captions() for person in persons]
    parts = list(captions[0])
    texts = torch.stack([read([caption[part] for caption in captions]) for part in parts], dim=1)
    labels = torch.stack([texts[:, i].unique(dim=0, return_inverse=True)[1] for i in range(len(parts) - 1)], dim=1)
    torch.manual_seed(seed)
    model = encoders.build(NAME, "random")
    classifier = _Classifier(model, [int(c.max()) + 1 for c in labels.unbind(1)])
    settings = (BATCH, LEARNING_RATE, seed, NAME)
    fit_steps(classifier, _classification_loss, TensorDataset(inputs, labels), classifying, *settings)
    fit_steps(model, contrast, TensorDataset(inputs, texts), contrastive, *settings)
    return model.eval()


@torch.inference_mode()
def measure(model: nn.Module, count: int = TESTED, seed: int = 1) -> dict[str, dict[str, float]]:
    """The area under the ROC curve of each attribute by camera, from the cosine of image and sentence, on test tiles.

    0.5 is the chance level.
    """
    text = model.encode_text(tokenizer()(list(SENTENCES.values())), normalize=True)
    found = {}
    for camera in CAMERAS:
        images, persons = people(count, "test", camera, seed)
        image = torch.cat([model.encode_image(part, normalize=True) for part in pixels(images).split(250)])
        truth = torch.tensor(np.array([person.labels for person in persons]))
        areas = multilabel_auroc(image @ text.T, truth, num_labels=len(ATTRIBUTES), average=None)
        found[camera] = {name: round(float(area), 3) for name, area in zip(ATTRIBUTES, areas, strict=True)}
    return found


def ship(folder: Path, seed: int = 0) -> Path:
    """Train, measure, and write the weights and their model card."""
    start = time.monotonic()
    model = train(seed=seed)
    seconds = time.monotonic() - start
    recipe: dict[str, Any] = dict(images=IMAGES, classifying=CLASSIFYING, contrastive=CONTRASTIVE, batch=BATCH)
    recipe |= {"learning_rate": LEARNING_RATE, "seed": seed}
    return card.save(folder, NAME, model.state_dict(), measure(model), recipe, seconds)


if __name__ == "__main__":
    card.command(ship)
