"""The small ViT, trained to classify the object of a scene: 16 classes, shape times hue, at any position.

Flipped and shifted images keep their label, so the [CLS] token learns the object's class, hardly its position. About
4 minutes on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.toy import encoders
from companion.toy.encoders.training import fit_steps
from companion.toy.encoders.vit_and_clip import pixels
from companion.toy.scenes import CLASSES, scenes

from . import ship


def augment(images: Tensor, flips: bool) -> Tensor:
    """Shift each image by up to 2 pixels (edges repeated) and, with `flips`, flip it along both axes at random."""
    n = len(images)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    dy, dx = torch.randint(5, (2, n, 1))
    rows, columns = dy + torch.arange(32), dx + torch.arange(32)
    images = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flips:
        for axis in (2, 3):
            images = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(axis), images)
    return images


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(augment(batch[0], flips=True)), batch[1], label_smoothing=0.05)


def train(images: int, steps: int, seed: int) -> nn.Module:
    """The ViT with its 16-way classifier."""
    drawn = scenes(images, "train", seed)
    inputs, labels = pixels([s.image for s in drawn]), torch.tensor([s.label for s in drawn])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = encoders.build("pocket_vit", "random", num_classes=len(CLASSES))
    fit_steps(model, loss, TensorDataset(inputs, labels), steps, 64, 3e-3, seed, "pocket_vit")
    return model


@torch.inference_mode()
def measure(model: nn.Module) -> dict[str, float]:
    """Accuracy on 1,000 scenes from test tiles."""
    drawn = scenes(1000, "test", 1)
    hit = model(pixels([s.image for s in drawn])).argmax(-1) == torch.tensor([s.label for s in drawn])
    return {"accuracy": hit.float().mean().item()}


if __name__ == "__main__":
    recipe = {"images": 8000, "steps": 1600, "seed": 0}
    ship("pocket_vit", train, measure, recipe)
