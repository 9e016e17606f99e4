"""The small ViT and CLIP: their training, and measures of their quality.

    python -m companion.toy.encoders.vit_and_clip pocket_vit      (about 4 minutes on one core)
    python -m companion.toy.encoders.vit_and_clip pocket_clip     (about 6; initialised from the shipped pocket_vit)

Each command trains from scratch on generated scenes, measures the result on scenes from held-out tiles of the
photographs, and writes `<name>.safetensors` with its model card `<name>.md`. `encoders.build` loads them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...errors import check_choice
from .. import encoders
from ..datasets import classification
from ..datasets.scenes import CLASSES, HUES, PHOTOGRAPHS, PLACES, SHAPES, SIZES, Scene, scenes
from ..datasets.tokens import Tokenizer
from . import card
from .training import fit_steps

VIT = {"images": 8000, "steps": 1600}
CLIP = {"images": 12000, "steps": 1000}
BATCH = 64


def pixels(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 images (32, 32, 3) as the (n, 3, 32, 32) float input of the small encoders, in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - 0.5) / 0.5


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


# --- the supervised ViT -----------------------------------------------------------------------------------------------


def train_vit(images: int = VIT["images"], steps: int = VIT["steps"], seed: int = 0) -> nn.Module:
    """Train the ViT to classify the object of a scene: 16 classes, shape times hue, at any position.

    Flipped and shifted images keep their label, so the [CLS] token learns the object's class, hardly its position.
    Only tiles of the "train" split are used.

    Returns:
        The ViT with its 16-way classifier, in eval mode.
    """
    world = scenes(images, "train", seed)
    inputs, labels = pixels([s.image for s in world]), torch.tensor([s.label for s in world])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = encoders.build("pocket_vit", "random", num_classes=len(CLASSES))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(augment(batch[0], flips=True)), batch[1], label_smoothing=0.05)

    fit_steps(model, loss, TensorDataset(inputs, labels), steps, BATCH, 3e-3, seed, "pocket_vit")
    return model


@torch.inference_mode()
def source_accuracy(model: nn.Module, count: int = 1000, seed: int = 1) -> float:
    """Accuracy of a classifier of `train_vit`'s 16 classes on `count` scenes from test tiles."""
    world = scenes(count, "test", seed)
    hit = model(pixels([s.image for s in world])).argmax(-1) == torch.tensor([s.label for s in world])
    return hit.float().mean().item()


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> np.ndarray:
    """Features for a linear probe, (n, width): the [CLS] token before the classifier, or a CLIP's image embedding."""
    encode = (
        model.encode_image
        if hasattr(model, "encode_image")
        else (lambda x: model.forward_head(model.forward_features(x), pre_logits=True))
    )
    return torch.cat([encode(part) for part in images.split(500)]).numpy()


def linear_probe(model: nn.Module, task: str, seed: int = 0) -> float:
    """Test accuracy of a logistic regression on a task, fitted on its 800 and selected (C) on its 200 images."""
    x, y = {}, {}
    for split in ("train", "val", "test"):
        images, labels = zip(*classification.examples(task, split, seed), strict=True)
        x[split], y[split] = features(model, pixels(images)), np.array(labels)
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x["train"], y["train"])
        for c in (0.01, 0.1, 1.0, 10.0)
    ]
    best = max(probes, key=lambda probe: probe.score(x["val"], y["val"]))
    return float(best.score(x["test"], y["test"]))


# --- the CLIP ---------------------------------------------------------------------------------------------------------


def short_caption(scene: Scene, names: Sequence[str]) -> str:
    """A caption with the attributes `names` only: "a red object on grass", or "an object" when it is empty."""
    words = {name: scene.attributes[name] for name in names}
    thing = " ".join([words[name] for name in ("size", "hue") if name in words] + [words.get("shape", "object")])
    where = f" at the {words['place']}" if "place" in words else ""
    ground = f" on {words['background']}" if "background" in words else ""
    return ("an " if thing == "object" else "a ") + thing + where + ground


def image_tower_from(vit: nn.Module) -> dict[str, Tensor]:
    """A small ViT's weights under the names of open_clip's image tower; both then give the same [CLS] token.

    open_clip's patch projection has no bias: the ViT's is added to the patches' position embedding.
    """
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "blocks": "transformer.resblocks"}
    state = vit.state_dict()
    position = state["pos_embed"][0].clone()
    position[1:] += state["patch_embed.proj.bias"]
    out = {
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": position,
        "conv1.weight": state["patch_embed.proj.weight"],
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
    }
    for key, value in state.items():
        if key.startswith("blocks."):
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            out[key] = value
    return out


def contrast(clip: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP's loss of images and their captions (b, k, tokens), mean over the k kinds of captions.

    Equal captions in a batch are all positives. With full captions alone, two or three words would distinguish almost
    any two images, and the others would hardly be learned.
    """
    images, captions = batch
    image, losses = clip.encode_image(images, normalize=True), []
    for column in captions.unbind(1):
        distinct, which = column.unique(dim=0, return_inverse=True)
        text = clip.encode_text(distinct, normalize=True)[which]
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (which[:, None] == which[None]).float()
        target = same / same.sum(-1, keepdim=True)
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


def train_clip(images: int = CLIP["images"], steps: int = CLIP["steps"], seed: int = 0) -> nn.Module:
    """Train the small CLIP (open_clip's classes) on scenes and captions, contrastively.

    The image tower starts from the shipped ViT, which encodes shapes and hues but not positions: a 2D sine-cosine
    embedding is added to the position embedding of its patches; without it, position stays at chance level for long.

    Each image has seven captions: one for each attribute alone, one with all of them, and one with a random subset, the
    same for the whole batch. Images are not flipped: captions contain left and right.

    Returns:
        The CLIP, in eval mode.
    """
    world = scenes(images, "train", seed)
    attributes, tokenizer = list(world[0].attributes), Tokenizer()
    subsets = [list(itertools.compress(attributes, bits)) for bits in itertools.product((0, 1), repeat=len(attributes))]
    always = [i for i, names in enumerate(subsets) if len(names) in (1, len(attributes))]
    captions = torch.stack([tokenizer([short_caption(scene, names) for scene in world]) for names in subsets], 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = encoders.build("pocket_clip", "random")
    start = image_tower_from(encoders.build("pocket_vit"))
    start["positional_embedding"][1:] += build_sincos2d_pos_embed([8, 8], 48, temperature=10.0)
    model.visual.load_state_dict(start | {"proj": model.visual.proj})

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        chosen = [*always, int(torch.randint(len(subsets), ()))]
        return contrast(model, (augment(batch[0], flips=False), batch[1][:, chosen]))

    data = TensorDataset(pixels([s.image for s in world]), captions)
    fit_steps(model, loss, data, steps, BATCH, 2e-3, seed, "pocket_clip")
    return model


# Zero-shot prompts of each attribute: a template and its words. "object" is the pair of hue and shape.
PROMPTS = {
    "shape": ("a {}", SHAPES),
    "hue": ("a {} object", HUES),
    "size": ("a {} object", SIZES),
    "object": ("a {}", CLASSES),
    "place": ("an object at the {}", PLACES),
    "background": ("an object on {}", tuple(PHOTOGRAPHS)),
}


@torch.inference_mode()
def zero_shot(model: nn.Module, count: int = 1000, seed: int = 1) -> dict[str, float]:
    """Zero-shot accuracy of a CLIP on `count` scenes from test tiles, for each entry of `PROMPTS`."""
    world = scenes(count, "test", seed)
    images = model.encode_image(pixels([s.image for s in world]), normalize=True)
    tokenizer, scores = Tokenizer(), {}
    for name, (template, words) in PROMPTS.items():
        texts = model.encode_text(tokenizer([template.format(word) for word in words]), normalize=True)
        if name == "object":
            truth = torch.tensor([s.label for s in world])
        else:
            truth = torch.tensor([words.index(s.attributes[name]) for s in world])
        scores[name] = ((images @ texts.T).argmax(-1) == truth).float().mean().item()
    return scores


# --- shipping ---------------------------------------------------------------------------------------------------------

TRAIN = {"pocket_vit": train_vit, "pocket_clip": train_clip}
RECIPE = {"pocket_vit": VIT, "pocket_clip": CLIP}


def chance() -> dict[str, float]:
    """Chance level of each linear probe and each zero-shot task."""
    tasks = {name: 1 / len(task.classes) for name, task in classification.TASKS.items()}
    return {**tasks, **{name: 1 / len(words) for name, (_, words) in PROMPTS.items()}}


def measure(name: str, model: nn.Module) -> dict[str, dict[str, float]]:
    """The quality of an encoder: held-out accuracy on its own task, and linear probes on the classification tasks."""
    own = {"object": source_accuracy(model)} if name == "pocket_vit" else zero_shot(model)
    probes = {task: linear_probe(model, task) for task in classification.TASKS}
    return {"supervised" if name == "pocket_vit" else "zero_shot": own, "linear_probe": probes}


def quality(name: str, model: nn.Module) -> dict[str, dict[str, dict[str, float]]]:
    """`measure` next to the chance level."""
    guess = chance()
    return {
        kind: {what: {"accuracy": round(value, 3), "chance": round(guess[what], 3)} for what, value in scores.items()}
        for kind, scores in measure(name, model).items()
    }


def ship(name: str, folder: str | Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train an encoder at full length, measure it, and write its weights and model card into `folder`.

    Raises `BadParameter` for another name.
    """
    check_choice("name", name, TRAIN)
    start = time.monotonic()
    model = TRAIN[name](**RECIPE[name], seed=seed)
    seconds, recipe, measured = time.monotonic() - start, {**RECIPE[name], "seed": seed}, quality(name, model)
    return card.save(folder, name, model.state_dict(), measured, recipe, seconds, tasks=classification.VERSION)


def remeasure(name: str) -> Path:
    """Measure the shipped weights again, after a change of the tasks, and update their model card."""
    path = encoders.WEIGHTS / f"{name}.safetensors"
    options: dict[str, Any] = {"num_classes": len(CLASSES)} if name == "pocket_vit" else {}
    model = encoders.build(name, **options)
    card.update(path, name, quality(name, model), tasks=classification.VERSION)
    return path


if __name__ == "__main__":
    card.command(ship, TRAIN, measure=remeasure)
