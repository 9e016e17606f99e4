"""The toy CLIP of pedestrians, PromptPAR's backbone. About 5 minutes on one core.

It is trained on clear images of people and sentences about them, without images of the street camera. First the
image tower is trained to classify the attributes of each body part, then both towers contrastively: from scratch, the
second step alone leaves hats, hair and bags at chance level for thousands of steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multilabel_auroc

from companion.toy import encoders
from companion.toy.encoders.pedestrian_clip import tokenizer
from companion.toy.encoders.training import fit_steps
from companion.toy.encoders.vit_and_clip import pixels
from companion.toy.promptpar import ATTRIBUTES, SENTENCES, people
from companion.training.fit import Batch

from . import ship
from .pocket_clip import contrast

NAME = "pocket_pedestrian_clip"


class Classifier(nn.Module):
    """The image tower with a linear head for each part of the person; the heads are discarded afterwards."""

    def __init__(self, clip: nn.Module, classes: list[int]):
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleList(nn.Linear(clip.visual.output_dim, count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.clip.encode_image(images)
        return [head(features) for head in self.heads]


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return sum(F.cross_entropy(logits, label) for logits, label in zip(model(images), labels.unbind(1), strict=True))


def train(images: int, classifying: int, contrastive: int, batch: int, learning_rate: float, seed: int) -> nn.Module:
    """The CLIP, trained by `classifying` and then `contrastive` steps."""
    drawn, persons = people(images, "train", "clear", seed)
    read, inputs = tokenizer(), pixels(drawn)
    captions = [person.captions() for person in persons]
    parts = list(captions[0])
    texts = torch.stack([read([caption[part] for caption in captions]) for part in parts], dim=1)
    labels = torch.stack([texts[:, i].unique(dim=0, return_inverse=True)[1] for i in range(len(parts) - 1)], dim=1)
    torch.manual_seed(seed)
    model = encoders.build(NAME, "random")
    classifier = Classifier(model, [int(c.max()) + 1 for c in labels.unbind(1)])
    settings = (batch, learning_rate, seed, NAME)
    fit_steps(classifier, classification_loss, TensorDataset(inputs, labels), classifying, *settings)
    fit_steps(model, contrast, TensorDataset(inputs, texts), contrastive, *settings)
    return model.eval()


@torch.inference_mode()
def measure(model: nn.Module) -> dict[str, float]:
    """The mean AUROC of the attributes from the cosine of image and sentence, on 1,000 clear images of test tiles."""
    images, persons = people(1000, "test", "clear", 1)
    text = model.encode_text(tokenizer()(list(SENTENCES.values())), normalize=True)
    image = torch.cat([model.encode_image(part, normalize=True) for part in pixels(images).split(250)])
    truth = torch.tensor(np.array([person.labels for person in persons]))
    return {"mean AUROC": float(multilabel_auroc(image @ text.T, truth, num_labels=len(ATTRIBUTES)))}


if __name__ == "__main__":
    recipe = {"images": 8000, "classifying": 1500, "contrastive": 1000, "batch": 64, "learning_rate": 1e-3, "seed": 0}
    ship(NAME, train, measure, recipe)
