"""MetaSegNet's ablations at toy scale: a text of the climate zone compared with no text, and with control texts.

The network is the full one at a small width: Swin, fusion, the author's decoder and losses. All networks are trained on
the same images of eight of nine zones with the same optimiser, number of steps and grid of learning rates; the ninth
zone is left out, another one for each seed. A learning rate is chosen on validation images of the eight zones with
their right texts, for both tasks: nothing is selected on the zone that was left out, or with a wrong text.

Task "seen" scores test images of the eight zones, "left out" those of the ninth. Both tasks and all texts at test use
one trained network, whose confusion matrices are cached.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ... import backbones
from ...evaluation.metrics import landcover as metrics
from ...models.metasegnet.climate import Prompts, headless
from ...models.metasegnet.model import MetaSegNet
from ...models.metasegnet.text import BertText, TextEncoder, Words
from ...training.fit import CPU, History, fit
from ...training.schedules import adamw
from ..datasets import landcover as pocket
from . import last_loss, reader, study_root

LEARNING_RATES = [2e-3, 4e-3, 8e-3, 1.6e-2]
SELECTION_SEEDS = [100, 106, 107]  # not those of the other studies: they leave out zones that no test seed leaves out
METRIC = "mIoU"
STEPS = 300  # after 250 steps at 2e-3 fields are distinguished, buildings not yet
RECIPE = {"batch": 16, "weight_decay": 0.01}
BUDGET = f"{STEPS} steps, batch {RECIPE['batch']}"
TEST_BATCH = 60
DROPPED = 0.5  # header dropout: the fraction of training texts whose code and name are hidden
LENGTH = 48  # words of the longest text
SUBWORDS = 64  # MiniLM's tokens of the longest text, and a few more
# the zones that seeds leave out, by the remainder of seed / 9
ORDER = ("Csa", "Af", "BSk", "Cfb", "Aw", "BWh", "Am", "BSh", "Cfa")

# the trained networks: what differs from MetaSegNet, such as the level of the texts; None: no text
NETWORKS: dict[str, dict | None] = {
    "unimodal": None,
    "MetaSegNet": {},
    "constant text": {"level": "constant"},
    "zone names": {"level": "name"},
    "one-hot zone": {"level": "code", "layers": 0, "length": 1},
    "no header dropout": {"dropped": 0.0},
    "fusion at stage 1": {"stages": (1,)},
    "fusion at stage 4": {"stages": (4,)},
    "fusion at stages 3 and 4": {"stages": (3, 4)},
    "MiniLM text": {"encoder": "all-MiniLM-L6-v2"},
}
# a trained MetaSegNet with other texts at test
MISLED = {"wrong zone's text": "wrong", "shuffled texts": "shuffled", "empty text": "empty"}
METHODS = [*NETWORKS, *MISLED]
TASKS = {"seen": METHODS, "left out": METHODS}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(root: str | Path, seed: int) -> None:
    """Write the images of a seed."""
    pocket.write(study_root(root, seed), seed)


@reader(4)
def part(root: str, seed: int, split: str) -> pocket.Part:
    """A split, all nine zones of it, in memory."""
    return pocket.read(study_root(root, seed), split)


def left_out(seed: int) -> str:
    """The zone that a seed leaves out of training."""
    return ORDER[seed % len(ORDER)]


def seen(seed: int) -> tuple[str, ...]:
    """The zones that a seed trains on."""
    return tuple(zone for zone in pocket.ZONES if zone != left_out(seed))


@functools.cache
def prompts() -> Prompts:
    """The texts of the toy zones."""
    return Prompts.read(pocket.PROMPTS)


def level(network: str) -> str:
    """The level of a network's texts in training, and by default at test."""
    return (NETWORKS[network] or {}).get("level", "full")


def texts(zones: tuple[str, ...], kind: str, seed: int) -> list[str]:
    """A text for each zone: of a level of `Prompts`, or "wrong": of a zone of another moisture and style, which
    is not the one left out (unless the image's own is)."""
    if kind == "wrong":
        return [prompts().text(pocket.other_zone(zone, avoid=left_out(seed))) for zone in zones]
    return prompts().texts(zones, kind, seed)


# --- the networks -----------------------------------------------------------------------------------------------------


@functools.cache
def _pretrained(name: str) -> tuple[nn.Module, Any]:
    return backbones.build_text(name)


def build(network: str, seed: int) -> MetaSegNet:
    """A network before training. All networks of a seed have the same initial encoder, decoder and word embeddings.

    The vocabulary is that of the training texts: words that occur only in the text of the zone left out are unknown.
    MiniLM is pretrained and frozen, and knows them.

    Raises `MissingWeights`: MiniLM is neither cached nor installed (extra `real`).
    """
    torch.manual_seed(seed)
    twin = MetaSegNet.build(len(pocket.CLASSES), size="pocket")
    if (options := NETWORKS[network]) is None:
        return twin
    torch.manual_seed(seed)
    sizes = {"length": LENGTH} | {name: options[name] for name in ("layers", "length") if name in options}
    words: TextEncoder
    if "encoder" in options:
        words = BertText(*_pretrained(options["encoder"]), length=SUBWORDS)
    else:
        words = Words.of(prompts().texts(seen(seed), level(network)), **sizes)
    stages = options.get("stages", (1, 2, 3, 4))
    model = MetaSegNet.build(len(pocket.CLASSES), words, "pocket", fusion_stages=stages)
    model.load_state_dict(twin.state_dict(), strict=False)
    return model


def train_model(
    network: str, model: MetaSegNet, data: pocket.Part, lr: float, seed: int, steps: int | None = None
) -> History:
    """Train a network in place, for `STEPS` unless `steps` are given."""
    tensors = [data.images, data.labels]
    if model.text is not None:
        given = prompts().texts(data.zones, level(network))
        tensors += [model.text.ids(given), model.text.ids([headless(text, model.text.unknown) for text in given])]
    dropped = (NETWORKS[network] or {}).get("dropped", DROPPED if level(network) == "full" else 0.0)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels, *ids = batch
        if not ids:
            return model.loss(images, None, labels)
        hidden = torch.rand(len(images), 1, device=images.device) < dropped
        return model.loss(images, torch.where(hidden, ids[1], ids[0]), labels)

    batch, optimizer = RECIPE["batch"], adamw(lr, RECIPE["weight_decay"])
    epochs = (steps or STEPS) / (len(data) // batch)
    settings: dict[str, Any] = {"epochs": epochs, "batch": batch, "seed": seed, "hardware": CPU, "name": network}
    return fit(model, loss, TensorDataset(*tensors), optimizer=optimizer, **settings)


@torch.inference_mode()
def predict(model: MetaSegNet, images: Tensor, given: list[str] | None = None, batch: int = TEST_BATCH) -> Tensor:
    """The predicted class of each pixel, (n, H, W), of images with one text each (None: the unimodal network)."""
    model.eval()
    ids = [None] * len(images) if given is None else model.ids(given)
    return torch.cat(
        [
            model(images[i : i + batch], None if given is None else ids[i : i + batch]).argmax(1)
            for i in range(0, len(images), batch)
        ]
    )


@functools.cache
def trained(network: str, lr: float, root: str, seed: int, split: str) -> tuple[dict[tuple[str, str], Tensor], dict]:
    """Train a network; return its confusion matrices (8, 8) by text at test and zone, and facts of the training."""
    model = build(network, seed)
    history = train_model(network, model, part(root, seed, "train").of(seen(seed)), lr, seed)
    asked = {"right": level(network)} | (MISLED if network == "MetaSegNet" and split == "test" else {})
    held_out, matrices = part(root, seed, split), {}
    for name, kind in asked.items():
        given = None if model.text is None else texts(held_out.zones, kind, seed)
        predicted = predict(model, held_out.images, given)
        for zone in pocket.ZONES:
            own = torch.tensor([z == zone for z in held_out.zones])
            matrices[name, zone] = metrics.confusion(held_out.labels[own], predicted[own], len(pocket.CLASSES))
    return matrices, {"loss": last_loss(history), "trained": sum(p.numel() for p in model.trained().values())}


def train(method: str, task: str, lr: float, seed: int, root: str, split: str = "test") -> dict:
    """Train the network of a method, unless it is cached, and score it; returns a row.

    `split` "select": on validation images of the zones that were seen, with their right texts, for every task and
    method; "test": on the task's test images. The row has, in percent, mIoU, mean F1, OA, the IoU of each class and,
    for task "seen", the mIoU of each zone, from one confusion matrix each; loss and number of trainable parameters.
    """
    network, asked = ("MetaSegNet", method) if method in MISLED else (method, "right")
    if split == "select":
        matrices, facts = trained(network, lr, str(root), seed, "val")
        zones, asked = seen(seed), "right"
    else:
        matrices, facts = trained(network, lr, str(root), seed, "test")
        zones = seen(seed) if task == "seen" else (left_out(seed),)
    found = metrics.scores(sum(matrices[asked, zone] for zone in zones))
    row = {"mIoU": found.miou, "mF1": found.mf1, "OA": found.oa}
    row |= {f"IoU {name}": float(value) for name, value in zip(pocket.CLASSES, found.iou, strict=True)}
    if split == "test" and task == "seen":
        row |= {f"mIoU {zone}": metrics.scores(matrices[asked, zone]).miou for zone in zones}
    row = {name: round(value, 2) for name, value in row.items()}
    return row | {"zone left out": left_out(seed)} | facts
