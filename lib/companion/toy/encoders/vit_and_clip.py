"""How the pocket backbones were made, and how good they are.

    python -m companion.toy.encoders.vit_and_clip pocket_vit      (about 4 minutes on one core)
    python -m companion.toy.encoders.vit_and_clip pocket_clip     (about 6; starts from the shipped pocket_vit)

Each command trains from nothing on generated scenes, measures the result on scenes whose photographs' tiles were never
seen, and writes `<name>.safetensors` with its model card `<name>.md`. `backbones.build` loads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from ... import backbones
from ...errors import BadParameter
from ...ops.progress import progress
from .. import encoders
from ..datasets import classification
from ..datasets.scenes import CLASSES, HUES, PHOTOGRAPHS, PLACES, SHAPES, SIZES, Scene, scenes
from ..datasets.tokens import Tokenizer
from . import card

VIT = {"images": 8000, "steps": 1600}
CLIP = {"images": 12000, "steps": 1000}


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (32, 32, 3) as the (n, 3, 32, 32) float input of the pocket backbones, in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - 0.5) / 0.5


def augment(images: Tensor, flips: bool) -> Tensor:
    """Shift each picture by up to 2 pixels (edges repeated) and, with `flips`, mirror it both ways at random."""
    n = len(images)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    dy, dx = torch.randint(5, (2, n, 1))
    rows, columns = dy + torch.arange(32), dx + torch.arange(32)
    images = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flips:
        for axis in (2, 3):
            images = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(axis), images)
    return images


def fit(model: nn.Module, steps: int, count: int, loss_of: Callable[[Tensor], Tensor], batch: int, lr: float) -> None:
    """AdamW with a one-cycle schedule and clipping at 1; `loss_of` gets the indices (batch,) of a step's pictures."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}], lr
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in progress(range(steps), "training"):
        if len(order) < batch:
            order = torch.randperm(count)
        chosen, order = order[:batch], order[batch:]
        loss = loss_of(chosen)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


# --- the supervised ViT -----------------------------------------------------------------------------------------------


def train_vit(images: int = VIT["images"], steps: int = VIT["steps"], seed: int = 0) -> nn.Module:
    """Train the pocket ViT to name the object of a scene: 16 classes, shape times hue, wherever it is.

    Nothing in the task rewards knowing the place, and mirrored and shifted pictures keep their label: the class token
    learns what, hardly where. Only tiles of the "train" split are seen.

    Returns:
        The ViT with its 16-way classifier, in eval mode.
    """
    torch.manual_seed(seed)
    world = scenes(images, "train", seed)
    inputs, labels = pixels([s.image for s in world]), torch.tensor([s.label for s in world])
    model = encoders.build("pocket_vit", "random", num_classes=len(CLASSES))
    fit(
        model,
        steps,
        images,
        lambda chosen: F.cross_entropy(
            model(augment(inputs[chosen], flips=True)), labels[chosen], label_smoothing=0.05
        ),
        batch=64,
        lr=3e-3,
    )
    return model


@torch.inference_mode()
def source_accuracy(model: nn.Module, count: int = 1000, seed: int = 1) -> float:
    """Accuracy of a classifier of `train_vit`'s 16 classes on `count` scenes cut from test tiles."""
    world = scenes(count, "test", seed)
    hit = model(pixels([s.image for s in world])).argmax(-1) == torch.tensor([s.label for s in world])
    return hit.float().mean().item()


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> np.ndarray:
    """What a linear probe sees, (n, width): the class token before the classifier, or a CLIP's image embedding."""
    encode = (
        model.encode_image
        if hasattr(model, "encode_image")
        else (lambda x: model.forward_head(model.forward_features(x), pre_logits=True))
    )
    return torch.cat([encode(part) for part in images.split(500)]).numpy()


def linear_probe(model: nn.Module, task: str, seed: int = 0) -> float:
    """Test accuracy of a logistic regression on a pocket task, fitted on its 800 and chosen (C) on its 200 pictures."""
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


def short_caption(scene: Scene, said: Sequence[str]) -> str:
    """A caption that says the attributes in `said` only: "a red object on grass", or "an object" when it is empty."""
    words = {name: scene.attributes[name] for name in said}
    thing = " ".join([words[name] for name in ("size", "hue") if name in words] + [words.get("shape", "object")])
    where = f" at the {words['place']}" if "place" in words else ""
    ground = f" on {words['background']}" if "background" in words else ""
    return ("an " if thing == "object" else "a ") + thing + where + ground


def image_tower_from(vit: nn.Module) -> dict[str, Tensor]:
    """A pocket ViT's weights under the names of open_clip's image tower; the two then give the same class token.

    open_clip's patch projection has no bias: the ViT's goes into the patches' position embedding.
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


def train_clip(images: int = CLIP["images"], steps: int = CLIP["steps"], seed: int = 0) -> nn.Module:
    """Train the pocket CLIP (open_clip's classes) on scenes and captions, contrastively.

    The image tower starts from the shipped pocket ViT, which knows shapes and hues but not places: to the position
    embedding of its patches a 2D sine-cosine one is added, without which place stays at chance for long.

    Each picture has seven captions: one for each attribute alone, one that says all, and one that says a random half.
    Were only full captions used, hue and background would tell almost any two apart, and the rest would hardly be
    learned. Equal captions in a batch are all right answers. Pictures are not mirrored: captions say left and right.

    Returns:
        The CLIP, in eval mode.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    world = scenes(images, "train", seed)
    attributes = list(world[0].attributes)
    inputs, tokenizer = pixels([s.image for s in world]), Tokenizer()
    model = encoders.build("pocket_clip", "random")
    start = image_tower_from(encoders.build("pocket_vit"))
    start["positional_embedding"][1:] += build_sincos2d_pos_embed([8, 8], 48, temperature=10.0)
    model.visual.load_state_dict(start | {"proj": model.visual.proj})

    def loss_of(chosen: Tensor) -> Tensor:
        image_features = model.encode_image(augment(inputs[chosen], flips=False), normalize=True)
        losses = []
        for said in [*([name] for name in attributes), attributes, [n for n in attributes if rng.random() < 0.5]]:
            captions = tokenizer([short_caption(world[i], said) for i in chosen.tolist()])
            distinct, which = captions.unique(dim=0, return_inverse=True)
            text_features = model.encode_text(distinct, normalize=True)[which]
            logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
            same = (which[:, None] == which[None]).float()
            target = same / same.sum(-1, keepdim=True)
            losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
        return torch.stack(losses).mean()

    fit(model, steps, images, loss_of, batch=64, lr=2e-3)
    return model


# How each attribute is asked for: a template and the words that fill it. "object" is the pair of hue and shape.
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
    """Zero-shot accuracy of a pocket CLIP on `count` scenes cut from test tiles, for each entry of `PROMPTS`."""
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
    """The accuracy of guessing on each pocket task and each zero-shot question."""
    tasks = {name: 1 / len(task.classes) for name, task in classification.TASKS.items()}
    return {**tasks, **{name: 1 / len(words) for name, (_, words) in PROMPTS.items()}}


def measure(name: str, model: nn.Module) -> dict[str, dict[str, float]]:
    """The quality of a pocket backbone: held-out accuracy on its own task, and linear probes on the pocket tasks."""
    own = {"object": source_accuracy(model)} if name == "pocket_vit" else zero_shot(model)
    probes = {task: linear_probe(model, task) for task in classification.TASKS}
    return {"supervised" if name == "pocket_vit" else "zero_shot": own, "linear_probe": probes}


def ship(name: str, folder: str | Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train a pocket backbone at full length, measure it, and write its weights and model card into `folder`.

    Raises `BadParameter` for a name that is not a pocket backbone's.
    """
    if name not in TRAIN:
        raise BadParameter("name", name, list(TRAIN))
    began = time.perf_counter()
    model = TRAIN[name](**RECIPE[name], seed=seed)
    head = {
        "library_name": "timm" if name == "pocket_vit" else "open_clip",
        "data": "generated scenes over photographs that ship with scikit-image and scikit-learn, train tiles only",
        "command": f"python -m companion.toy.encoders.vit_and_clip {name}",
        "recipe": {**RECIPE[name], "seed": seed},
        "seconds": round(time.perf_counter() - began),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tasks": classification.VERSION,  # the pocket tasks that the linear probes were measured on
    }
    path = Path(folder) / f"{name}.safetensors"
    return card.ship(path, model.state_dict(), head, quality(name, model), _CARDS[name])


def remeasure(name: str) -> Path:
    """Measure the shipped weights again, after a change of the tasks, and put the new quality into their card."""
    if name not in TRAIN:
        raise BadParameter("name", name, list(TRAIN))
    kept = {"num_classes": len(CLASSES)} if name == "pocket_vit" else {}
    path = encoders.WEIGHTS / f"{name}.safetensors"
    head = {key: value for key, value in encoders.read_card(name).items() if key != "quality"}
    head["tasks"] = classification.VERSION
    card.write(path, head, quality(name, backbones.build(name, "pocket", **kept)), _CARDS[name])
    return path


def quality(name: str, model: nn.Module) -> dict[str, dict[str, dict[str, float]]]:
    """What `measure` finds, beside chance."""
    guess = chance()
    return {
        kind: {what: {"accuracy": round(value, 3), "chance": round(guess[what], 3)} for what, value in scores.items()}
        for kind, scores in measure(name, model).items()
    }


_CARDS = {
    "pocket_vit": """
# pocket_vit

A ViT of 6 blocks, width 48, patches of 4 on 32x32 pictures, trained to name the drawn object of a scene (4 shapes
times 4 hues) on cuts of real photographs. It stands in for a large supervised backbone where none can be downloaded.

`encoders.build("pocket_vit")` gives the encoder; `num_classes=16` keeps the classifier too.

**Measured** on scenes and tasks cut from tiles of the photographs never seen in training: see `quality` above.
`supervised` is its own task; `linear_probe` is a logistic regression on the class token, chosen on validation.

**Limits.** It knows this small world only. Its class token hardly says where the object is, on purpose: the tasks that
need place are what prompting has to solve. Nothing about it carries over to real ViTs but the shape of the code.
""",
    "pocket_clip": """
# pocket_clip

A CLIP of open_clip's own classes: an image tower of 6 blocks and width 48 (32x32 pictures, patches of 4) that starts
from `pocket_vit`, and a text tower of 2 blocks and width 64, trained contrastively on scenes and their captions. Its
tokenizer, `companion.toy.datasets.tokens.Tokenizer`, has one id a word and is called as open_clip's are, so that a
real CLIP drops in.

`encoders.build("pocket_clip")` loads it.

**Measured** on scenes and tasks cut from tiles of the photographs never seen in training: see `quality` above.
`zero_shot` asks for one attribute at a time; `linear_probe` is a logistic regression on the image embedding, chosen on
validation.

**Limits.** It knows the 40 words of its captions and this small world only.
""",
}


if __name__ == "__main__":
    card.command(ship, TRAIN, measure=remeasure)
