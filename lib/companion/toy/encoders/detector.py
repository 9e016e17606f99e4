"""The two toy models of open-vocabulary detection: a CLIP of scenes, and a detector whose classes are its text
embeddings. The ablation, `toy.sic_cads`, trains both again for each seed, on the scenes that it draws.

The CLIP learns from images and the names of the objects on them, novel classes among them, as in captions, and from no
boxes. The detector learns from boxes of base classes alone, on images without novel objects (zero-shot splits remove
those images): it proposes boxes for objects of any class, and the class of a box is the one with the nearest text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.ops import box_iou, complete_box_iou_loss, nms, roi_align

from ... import backbones
from ...errors import BadParameter
from ...io.config import configure
from ...models.layers.precision import without_autocast
from ...models.layers.state_dicts import load_official
from ...models.sic_cads.model import PROMPT
from ...training.schedules import schedule
from .. import encoders
from ..tokens import END, UNKNOWN, Tokenizer
from .training import fit_steps

CLIP, DETECTOR = "pocket_scene_clip", "pocket_ov_detector"
WIDTH = 64  # of the space that images, texts and regions share
PROPOSALS = 30  # boxes of an image
SIDE = 64  # of an image, in pixels
CONTEXT = 12  # tokens of a text

# The order is part of the shipped weights: append only.
CLASSES = (
    *("apple", "tent", "daisy", "lamp", "sign", "hook", "pebble", "cone", "crate", "moon", "rocket", "star"),
    *("ball", "tile", "flag", "flare"),
)
"""The names of `toy.sic_cads.THINGS`: 12 base classes, four novel ones."""


def tokenizer() -> Tokenizer:
    """The vocabulary of this CLIP; all other words share one id, which is ignored."""
    return Tokenizer(CLASSES, context_length=CONTEXT)


def _stage(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Stages(nn.Module):
    """Four stages of one convolution each, which halve the image: maps of strides 2, 4, 8 and 16."""

    channels = (24, 48, 72, 96)
    feature_info = tuple({"num_chs": width} for width in channels)  # as timm's

    def __init__(self):
        configure(self, locals())
        super().__init__()
        self.stages = nn.ModuleList(_stage(a, b) for a, b in zip((3, *self.channels), self.channels, strict=False))

    def forward_intermediates(self, images: Tensor, indices: Sequence[int], intermediates_only: bool) -> list[Tensor]:
        """Images (b, 3, H, W) to the maps of some stages, as timm's models."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return [maps[i] for i in indices]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (b, 3, H, W) to the maps of the last three stages, (b, C, H / s, W / s) for s in 4, 8, 16."""
        return self.forward_intermediates(images, (1, 2, 3), True)


class ImageTower(nn.Module):
    """Images (b, 3, 64, 64) in [-1, 1] to (b, WIDTH): the maximum of each map over the image, and one layer."""

    image_size, output_dim = (SIDE, SIDE), WIDTH
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.trunk = Stages()
        self.proj = nn.Linear(sum(Stages.channels[1:]), WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(torch.cat([found.amax((2, 3)) for found in self.trunk(images)], dim=1))


class SceneCLIP(nn.Module):
    """A CLIP with the methods of open_clip's: `encode_image`, `encode_text`, `visual`, `logit_scale`.

    A text embedding is the mean over the known words and one layer: names in any order, with any words between.
    """

    def __init__(self):
        super().__init__()
        self.visual = ImageTower()
        self.token_embedding = nn.Embedding(Tokenizer.vocab_size, WIDTH)
        self.text_projection = nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images (b, 3, 64, 64) in [-1, 1] to (b, WIDTH)."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Ids (n, L) to (n, WIDTH)."""
        known = ((text > UNKNOWN) & (text < END)).float().unsqueeze(-1)
        words = (self.token_embedding(text) * known).sum(1) / known.sum(1).clamp_min(1)
        features = self.text_projection(words)
        return F.normalize(features, dim=-1) if normalize else features


def clip(weights: str | Path = "pocket") -> SceneCLIP:
    """The CLIP of scenes in eval mode: "pocket" the shipped one, "random", or a file.

    Raises `BadParameter`, `MissingWeights`, `CorruptFile`, `BadCheckpoint`: what cannot be loaded.
    """
    return configure(_load(SceneCLIP(), CLIP, weights), {}, clip)


def texts(model: SceneCLIP) -> Tensor:
    """The normalised text embedding of every class, (16, WIDTH), by the prompt of SIC-CADS' code."""
    with torch.no_grad():
        return model.encode_text(tokenizer()([PROMPT.format(name) for name in CLASSES]), normalize=True)


def _load(model: nn.Module, name: str, weights: str | Path) -> nn.Module:
    if weights != "random":
        path = encoders.weights_file(name) if weights == "pocket" else Path(weights)
        if not path.is_file():
            raise BadParameter("weights", str(weights), "'pocket', 'random' or an existing file")
        load_official(model, backbones.read_state(path), None, name)
    return model.eval()


# --- the CLIP's training ----------------------------------------------------------------------------------------------


def contrast(model: SceneCLIP, batch: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP's loss between images and the names of their objects, a fifth of the names left out at random.

    Equal texts in a batch are all positives.
    """
    images, there = batch
    named = there * (torch.rand_like(there) > 0.2)
    # every image has a name
    named = torch.where(named.any(1, keepdim=True), named, there)
    captions = [" ".join(CLASSES[index] for index in row.nonzero()[:, 0].tolist()) for row in named]
    text = model.encode_text(tokenizer()(captions).to(images.device), normalize=True)
    logits = model.logit_scale.exp().clamp(max=100) * model.encode_image(images, normalize=True) @ text.T
    same = (named @ named.T == named.sum(1)) & (named.sum(1)[:, None] == named.sum(1))
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(
    images: Tensor, named: Tensor, steps: int = 480, batch: int = 64, learning_rate: float = 3e-3, seed: int = 0
) -> SceneCLIP:
    """Train the CLIP of scenes from scratch; returned in eval mode.

    Args:
        images: (n, 3, 64, 64) in [-1, 1].
        named: (n, 16) of 0 and 1, the classes on each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SceneCLIP()
    data, warmup = TensorDataset(images, named), schedule("cosine", warmup=0.2)
    fit_steps(model, contrast, data, steps, batch, learning_rate, seed, CLIP, schedule=warmup)
    return model.eval()


# --- the detector -----------------------------------------------------------------------------------------------------


class ZeroShotClassifier(nn.Module):
    """The classifier of open-vocabulary detectors of Detic's family: scale · cos(linear(x), class), background 0.

    Args:
        inputs: width of a box's feature.
        classes: (C, D), any length.
        scale: of the cosines; 50 in Detic.
        bias: initial value of a learned bias on all logits; None for no bias, as released.
    """

    def __init__(self, inputs: int, classes: Tensor, scale: float = 50.0, bias: float | None = None):
        super().__init__()
        self.linear = nn.Linear(inputs, classes.shape[1])
        self.register_buffer("classes", F.normalize(classes.float(), dim=-1))
        self.scale = scale
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits (R, C + 1) of features (R, inputs), the last column the background's; of other `classes` (K, D),
        of any length, (R, K) without one. The cosines are in float32 also under autocast."""
        with without_autocast(x.device):
            x = self.scale * F.normalize(self.linear(x.float()), dim=-1)
            logits = x @ (self.classes if classes is None else F.normalize(classes.float(), dim=-1)).mT
        logits = logits if self.bias is None else logits + self.bias
        return F.pad(logits, (0, 1)) if classes is None else logits


class Detector(nn.Module):
    """An open-vocabulary detector: a dense head proposes boxes, a region head compares each with the classes' texts.

    As in Detic's classifier, the score of a region and a class is the sigmoid of a scaled cosine. Boxes are the
    proposals', the same for all classes.
    """

    stride = 4

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(_stage(3, 32), _stage(32, 48), *(_stage(n, 64, 1) for n in (48, 64, 64)))
        self.dense = nn.Conv2d(64, 5, 1)
        self.region = nn.Sequential(nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(inplace=True))
        self.classifier = ZeroShotClassifier(128, torch.zeros(len(CLASSES), WIDTH), scale=20.0, bias=-5.0)

    def propose(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """From maps (b, 64, h, w): logits (b, h w) of "an object's centre is here", and boxes (b, h w, 4), xyxy."""
        found = self.dense(maps).flatten(2).mT
        rows, columns = torch.meshgrid(*(torch.arange(n, device=maps.device) for n in maps.shape[2:]), indexing="ij")
        centre = (torch.stack([columns, rows], -1).flatten(0, 1) + 0.5) * self.stride
        # distances to the four sides, 8 pixels each where the head's output is 0
        sides = 8 * found[..., 1:].clamp(-4, 2).exp()
        return found[..., 0], torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], dim=-1)

    def classify(self, maps: Tensor, boxes: Sequence[Tensor], text: Tensor) -> Tensor:
        """Logits of the boxes (R, 4) of each map against texts (C, WIDTH), those of all images concatenated."""
        pooled = roi_align(maps, list(boxes), 3, 1 / self.stride, sampling_ratio=2, aligned=True)
        return self.classifier(self.region(pooled), text)

    @torch.inference_mode()
    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """All boxes (b, PROPOSALS, 4) as x1 y1 x2 y2 in pixels, and each one's probability of each class (b, ., C).

        There is no threshold: refinement needs all scores.
        """
        maps = self.trunk(images)
        logits, boxes = self.propose(maps)
        boxes = boxes.clamp(0, images.shape[-1])
        chosen = []
        for score, candidates in zip(logits, boxes, strict=True):
            best = nms(candidates, score, 0.6)[:PROPOSALS]
            # few are left where the head is untrained: the others are the next best
            rest = score.argsort(descending=True)
            rest = rest[~torch.isin(rest, best)][: PROPOSALS - len(best)]
            chosen.append(candidates[torch.cat([best, rest])])
        found = self.classify(maps, chosen, text).sigmoid()
        return torch.stack(chosen), found.unflatten(0, (len(images), -1))


def detector(weights: str | Path = "pocket") -> Detector:
    """The detector in eval mode; arguments and errors as `clip`."""
    return _load(Detector(), DETECTOR, weights)


def _samples(boxes: Tensor, own: Tensor) -> Tensor:
    """Training boxes: the true ones moved and resized slightly, random ones, and the detector's own."""
    copies = boxes.repeat(3, 1)
    size = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)
    jittered = copies + size * (torch.rand_like(copies) - 0.5) * 0.35
    corner, side = torch.rand(10, 2) * (SIDE - 8), torch.rand(10, 2) * 16 + 6
    return torch.cat([jittered, torch.cat([corner, corner + side], 1), own]).clamp(0, SIDE)


def detector_loss(text: Tensor, model: Detector, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The losses of centres, boxes and base classes of a batch, added; `text` (12, WIDTH)."""
    images, boxes, labels = batch
    maps = model.trunk(images)
    logits, proposed = model.propose(maps)
    rows, text = torch.arange(logits.shape[1], device=images.device), text.to(images.device)
    across = images.shape[-1] // model.stride
    centre = torch.stack([rows % across, rows // across], 1) * model.stride + model.stride / 2
    where, sides, regions, answers = [], [], [], []
    for score, candidates, true, label in zip(logits, proposed, boxes, labels, strict=True):
        true, label = true[label >= 0], label[label >= 0]
        middle, half = (true[:, :2] + true[:, 2:]) / 2, (true[:, 2:] - true[:, :2]) / 2
        # a cell is a positive of an object when it lies in the inner half of its box, or within half a cell
        near = (centre[:, None] - middle).abs() <= (half / 2).clamp_min(model.stride / 2)
        inside = near.all(-1)
        where.append(F.binary_cross_entropy_with_logits(score, inside.any(1).float(), reduction="sum") / len(true))
        cell, target = inside.nonzero(as_tuple=True)
        sides.append(complete_box_iou_loss(candidates[cell], true[target], reduction="mean"))
        best = score.detach().topk(8).indices
        taken = _samples(true, candidates[best].detach())
        overlap, owner = box_iou(taken, true).max(1)
        answer = torch.zeros(len(taken), len(text), device=images.device)
        answer[overlap >= 0.5, label[owner[overlap >= 0.5]]] = 1
        regions.append(taken)
        answers.append(answer)
    logits = model.classify(maps, regions, text)
    classes = F.binary_cross_entropy_with_logits(logits, torch.cat(answers), reduction="sum") / len(logits)
    return torch.stack(where).mean() + torch.stack(sides).mean() + 2 * classes


def train_detector(
    images: Tensor,
    boxes: Tensor,
    labels: Tensor,
    text: Tensor,
    steps: int = 600,
    batch: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Detector:
    """Train the detector from scratch, on images with base objects alone; returned in eval mode.

    Args:
        images: (n, 3, 64, 64) in [-1, 1].
        boxes, labels: (n, k, 4) as x1 y1 x2 y2 and (n, k), label -1: none.
        text: (12, WIDTH), the text embeddings of the base classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Detector()
    data, loss = TensorDataset(images, boxes, labels), functools.partial(detector_loss, text)
    fit_steps(model, loss, data, steps, batch, learning_rate, seed, DETECTOR, clip=5.0)
    return model.eval()
