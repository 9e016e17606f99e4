"""Prompts of SA²VP and VPT for a real ViT-S/14, trained on crops of photographs.

    python -m companion.toy.encoders.photo_prompts      (needs the extra `real`; half an hour on one core)

The task is to name the photograph that a crop comes from, with 12 photographs; training crops come from the left two
thirds of each, test crops from the right third. Five photographs, those that the notebook shows, are held out. The
settings were fixed before the first training, none was selected.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from ... import backbones
from ...models.layers.vpt import VPT
from ...models.sa2vp import SA2VP, recipe
from ...training.checkpoints import trained_state
from ...training.fit import CPU, fit
from .. import encoders
from ..datasets import scenes
from . import card

NAME, ENCODER, SIZE = "photo_prompts", "vit_small_patch14_dinov2", 224
HELD_OUT = ("astronaut", "cat", "coffee", "temple", "flower")
CLASSES = tuple(name for name in scenes.PHOTOGRAPHS if name not in HELD_OUT)
METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "VPT-deep": lambda vit, classes: VPT(vit, classes, tokens=8, deep=True, dropout=0.0),
    "SA²VP": lambda vit, classes: SA2VP(vit, classes, width=8, scale=0.1, dropout=0.0),
}
RECIPE = {"crops": 360, "epochs": 3, "batch": 20, "learning rate": 1e-3}
TESTED = 120  # crops


def build(method: str, vit: VisionTransformer, seed: int = 0) -> nn.Module:
    """A method around a pretrained ViT, before its training, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return METHODS[method](vit, len(CLASSES)).eval()


def load(vit: VisionTransformer) -> dict[str, nn.Module]:
    """The methods with their shipped prompts, in eval mode, around `vit`: the ViT-S/14 of `backbones` at 224 px.

    Raises `MissingWeights`, `CorruptFile`.
    """
    state, found = backbones.read_state(encoders.weights_file(NAME)), {}
    for method in METHODS:
        found[method] = build(method, vit)
        own = {key.removeprefix(f"{method}."): x.float() for key, x in state.items() if key.startswith(f"{method}.")}
        if missing := trained_state(found[method]).keys() ^ own.keys():
            raise RuntimeError(f"{NAME}: {method} has other tensors than its file: {', '.join(sorted(missing))}")
        found[method].load_state_dict(own, strict=False)
    return found


def crops(count: int, split: str, seed: int, seen: backbones.Input) -> TensorDataset:
    """Random crops (count, 3, 224, 224) of the photographs, normalised for an encoder, and which photograph (count,).

    A crop has 20 to 100 % of the area of the left two thirds of a photograph ("train") or of its right third ("test").
    """
    shown = []
    for name in CLASSES:
        pixels = torch.from_numpy(scenes.photograph(name).copy()).permute(2, 0, 1)
        border = 2 * pixels.shape[2] // 3
        shown.append(pixels[..., :border] if split == "train" else pixels[..., border:])
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(seen.mean), list(seen.std)),
        ]
    )
    labels = torch.arange(count) % len(CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.stack([crop(shown[i]) for i in labels.tolist()])
    return TensorDataset(images, labels)


def ship(folder: Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train both methods, measure them, and write their trained tensors and the model card."""
    start, state, quality = time.monotonic(), dict[str, Tensor](), {}
    seen = backbones.input_of(backbones.build(ENCODER, "random", img_size=SIZE))
    data, held_out = crops(int(RECIPE["crops"]), "train", seed, seen), crops(TESTED, "test", seed + 1, seen)
    for method in METHODS:
        model = build(method, backbones.build(ENCODER, img_size=SIZE), seed)
        options = recipe.fit_options(RECIPE["learning rate"], CPU)
        options |= {"epochs": RECIPE["epochs"], "batch": int(RECIPE["batch"]), "seed": seed, "name": method}
        history = fit(model, recipe.loss, data, **options)
        state |= {f"{method}.{name}": x.half() for name, x in trained_state(model).items()}
        accuracy = recipe.accuracy(model, held_out, CPU, batch=int(RECIPE["batch"]))
        losses = {name: round(history[i]["loss"], 3) for name, i in (("first loss", 0), ("last loss", -1))}
        quality[method] = {"accuracy on crops of the right third (%)": round(accuracy, 1)} | losses
    return card.save(folder, NAME, state, quality, RECIPE | {"seed": seed}, time.monotonic() - start)


if __name__ == "__main__":
    card.command(ship)
