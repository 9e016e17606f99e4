"""How the pocket CLIP of pedestrians was made, which PromptPAR prompts, and how good it is.

    python -m companion.toy.encoders.pedestrian_clip      (about 5 minutes on one core)

It learns from clear pictures of people and sentences about them; of the street's camera it has seen nothing. First the
image tower learns to tell the parts' words apart as classes, then both towers contrastively: from nothing, the second
step alone leaves hats, hair and bags at chance for thousands of steps. open_clip's own classes, 64x32 pictures in
patches of 8: a grid of 8 rows and 4 columns.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multilabel_auroc

from ...training.fit import fit
from .. import encoders
from ..datasets.pedestrians import ATTRIBUTES, CAMERAS, SENTENCES, people
from ..datasets.tokens import Tokenizer
from . import card
from .vit_and_clip import pixels

NAME = "pocket_pedestrian_clip"
PICTURES, BATCH, RATE = 8000, 64, 1e-3
NAMING, STEPS = 1500, 1000  # of the two steps
TESTED = 1000

# The order is part of the shipped weights: append only.
WORDS = (
    *("a", "pedestrian", "with", "in", "and", "no", "hat", "hair", "long", "short", "red", "blue", "green", "grey"),
    *("striped", "plain", "top", "trousers", "shorts", "shoes", "backpack", "handbag", "bag"),
)


def tokenizer() -> Tokenizer:
    """The words that this CLIP knows."""
    return Tokenizer(WORDS, context_length=24)


class _Naming(nn.Module):
    """The image tower with a linear layer for each part of the person, which are dropped afterwards."""

    def __init__(self, clip: nn.Module, classes: list[int]):
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleList(nn.Linear(clip.visual.output_dim, count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.clip.encode_image(images)
        return [head(features) for head in self.heads]


def _naming_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return sum(F.cross_entropy(said, right) for said, right in zip(model(images), labels.unbind(1), strict=True))


def _contrast(clip: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the sentences of a picture, (b, parts, tokens), of CLIP's loss.

    Equal sentences in a batch are all right answers. Were only full sentences used, two or three words would tell
    almost any two pictures apart, and the others would hardly be learned.
    """
    images, said = batch
    image, losses = clip.encode_image(images, normalize=True), []
    for column in said.unbind(1):
        distinct, which = column.unique(dim=0, return_inverse=True)
        text = clip.encode_text(distinct, normalize=True)[which]
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (which[:, None] == which[None]).float()
        target = same / same.sum(-1, keepdim=True)
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


def train(count: int = PICTURES, naming: int = NAMING, steps: int = STEPS, seed: int = 0) -> nn.Module:
    """Train the CLIP from nothing, `naming` and `steps` steps of the two kinds; returned in eval mode."""
    images, persons = people(count, "train", "clear", seed)
    read, inputs = tokenizer(), pixels(images)
    captions = [person.captions() for person in persons]
    parts = list(captions[0])
    texts = torch.stack([read([caption[part] for caption in captions]) for part in parts], dim=1)
    labels = torch.stack([texts[:, i].unique(dim=0, return_inverse=True)[1] for i in range(len(parts) - 1)], dim=1)
    torch.manual_seed(seed)
    model = encoders.build(NAME, "random")
    settings = dict(batch=BATCH, lr=RATE, weight_decay=0.05, clip=1.0, warmup=0.1, seed=seed, accelerator="cpu")
    names = _Naming(model, [int(column.max()) + 1 for column in labels.unbind(1)])
    fit(names, _naming_loss, TensorDataset(inputs, labels), epochs=naming / (count // BATCH), name="naming", **settings)
    fit(model, _contrast, TensorDataset(inputs, texts), epochs=steps / (count // BATCH), name=NAME, **settings)
    return model.eval()


@torch.inference_mode()
def measure(model: nn.Module, count: int = TESTED, seed: int = 1) -> dict[str, dict[str, float]]:
    """How well the cosine of picture and sentence ranks pictures by each attribute, on test tiles, by camera.

    The area under the ROC curve: 0.5 is chance.
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
    """Train, measure, and write the weights and their card."""
    start = time.monotonic()
    model = train(seed=seed)
    head = {
        "library_name": "open_clip",
        "data": "drawn pedestrians with cloth cut from photographs that ship with scikit-image and scikit-learn, over "
        "such photographs, as the clear camera shows them; train tiles only",
        "command": "python -m companion.toy.encoders.pedestrian_clip",
        "recipe": {"pictures": PICTURES, "naming": NAMING, "steps": STEPS, "batch": BATCH, "rate": RATE, "seed": seed},
        "seconds": round(time.monotonic() - start),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return card.ship(Path(folder) / f"{NAME}.safetensors", model.state_dict(), head, measure(model), _CARD)


_CARD = """
# pocket_pedestrian_clip

A CLIP of open_clip's own classes: an image tower of 4 blocks and width 64 (64x32 pictures, patches of 8) and a text
tower of 2 blocks and width 48, trained on drawn pedestrians and sentences about them: first to name, then
contrastively. It stands in for CLIP ViT-L/14 in PromptPAR where none can be downloaded.

`encoders.build("pocket_pedestrian_clip")` loads it,
`companion.toy.encoders.pedestrian_clip.tokenizer()` reads its words.

**Measured** on pictures cut from tiles of the photographs never seen in training: see `quality` above, the area under
the ROC curve of the cosine between picture and sentence (chance: 0.5). It was trained on the clear camera alone.

**Limits.** It knows 23 words and this small world only.
"""


if __name__ == "__main__":
    card.command(ship)
