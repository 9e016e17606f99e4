"""SIC-CADS with the published settings: training the recogniser, refining a detector, tables of results.

Of the released recipes two are here, OV-LVIS on base classes and OV-COCO on base classes with captions (or without);
the third adds images of ImageNet-21k and is not built.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from ... import backbones, detectors
from ...data import DATASETS, detection
from ...data.detection_sets import COCO_BASE, COCO_NOVEL, COCO_OTHER
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics.detection import evaluate, recognition_ap
from ...evaluation.tables import published_table, upsert_rows, with_measured
from ...ops.files import read_json
from ...ops.papers import paper
from ...ops.progress import progress
from ...training.callbacks import Callback, ClipValue
from ...training.checkpoints import Checkpoint, save
from ...training.fit import CPU, Hardware, History, device, evaluating, fit
from ...training.schedules import MakeOptimizer, adamw
from ..layers.precision import without_autocast
from ..layers.state_dicts import load_official
from . import model as sic_cads

CLIP, BODY = "ViT-B-32-quickgelu/openai", "resnet50.a1_in1k"
OWLVIT = "google/owlvit-base-patch32"
BRANCHES = ("text", "visual", "visual+", "fused", "SIC-CADS")
"""Image-level scores: the text branch, the student, CLIP's own crops, and the two fusions."""
COLUMNS = {"detection/objects365": "Objects365", "detection/openimages": "OpenImages"}
GPUS = 4  # of the authors' README: each draws the source of its share of a step
FLIP = 0.5  # probability that a training image is flipped
WEIGHT_DECAY = 1e-4  # of every trained tensor
SHORTER, LONGER = 800, 1333  # sides to which the authors' detectors resize images before the recogniser's own resizing
WORKERS = min(8, os.cpu_count() or 1)
KEPT = 2**28  # bytes of probabilities that predictions hold
NAMED = 80  # classes of the dry run whose names go through the text towers; the others get random vectors


@dataclass(frozen=True)
class Recipe:
    """The released settings of a data set, from the paper's YAML.

    Attributes:
        options: of the recogniser: both lambdas, the logit scale, the weight of the distillation.
        iterations, batch, lr, warmup, factor: of the training.
        group: images of a step that come from one source.
        size, crop: side of a training image, and the smallest share of each side that is cropped.
        clip: largest magnitude of an entry of the gradient; None for no clipping.
        repeat: threshold of the repeat-factor sampling; None for none.
        gamma: weight of the image-level scores in the refinement.
        threshold, top: of the detections.
    """

    options: dict[str, Any]
    iterations: int
    batch: int
    group: int
    lr: float
    warmup: int
    factor: float
    size: int
    crop: float
    clip: float | None
    repeat: float | None
    gamma: float
    threshold: float
    top: int


def recipe(dataset: str, captions: bool = False) -> Recipe:
    """The recipe of "detection/ov-coco"; for all others that of OV-LVIS, which is transferred to other vocabularies.

    With `captions`, which OV-COCO alone has, boxes and captions take turns: each of the authors' `GPUS` draws the
    source of its share of a step. The thresholds of the released configurations, 0.15 and 0.2, belong to their
    detectors and are not used here (see `setting`).
    """
    coco = dataset == "detection/ov-coco"
    training = published_table("sic_cads", "training-recipes").set_index("method")
    values = published_table("sic_cads", "code-hyperparameters").set_index("method")
    t = training.loc["COCO-base + captions (4 GPUs)" if coco else "LVIS-base"]
    v = values.loc["Detic on OV-COCO" if coco else "BoxSup on OV-LVIS"]
    foreign = dataset in COLUMNS
    options = {
        "lambda_base": float(v.lambda_base),
        # of a foreign vocabulary every class counts as novel, and the text branch has a constant share
        "lambda_novel": 1 - sic_cads.CROSS_DATASET if foreign else float(v.lambda_novel),
        "tau": float(v.logit_scale),
        "distill": float(v.kd_weight),
        "levels": int(v.levels),
    }
    return Recipe(
        options=options,
        iterations=int(t.iterations),
        batch=int(t.batch_boxes_total),
        group=int(t.batch_boxes_total) // GPUS if coco and captions else 1,
        lr=float(t.lr),
        warmup=int(t.warmup_iters),
        factor=float(t.warmup_factor),
        size=int(t.size_boxes),
        crop=float(t.crop_min_boxes),
        clip=None if coco else 1.0,
        repeat=None if coco else 0.001,
        gamma=float(v.gamma),
        threshold=float(v.score_thresh_test),
        top=int(v.detections),
    )


def learning_rates(r: Recipe, steps: int) -> np.ndarray:
    """The learning rate of each step (steps,): half a cosine to 0 after a straight line to its value there.

    The line begins at `factor` of the base learning rate, and ends where the cosine stands at the end of the warm-up.
    The warm-up is the same fraction of a shorter run.
    """
    done, warm = np.arange(steps) / steps, r.warmup / r.iterations
    cosine, reached = ((1 + np.cos(np.pi * x)) / 2 for x in (done, warm))
    return r.lr * np.where(done < warm, r.factor + (reached - r.factor) * done / warm, cosine)


def gamma(p: SimpleNamespace) -> float:
    """The weight of the image-level scores: the parameter, or where it is 0 the released one of the dataset."""
    return p.gamma or recipe(p.dataset).gamma


# --- training data ----------------------------------------------------------------------------------------------------


def random_crop(height: int, width: int, smallest: float) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop with a share between `smallest` and 1 of each side, anywhere."""
    share = smallest + (1 - smallest) * torch.rand(2)
    h, w = max(1, int(share[0] * height + 0.5)), max(1, int(share[1] * width + 0.5))
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    return left, top, w, h


class Crops(Dataset):
    """Random crops of images with the classes that they show: (uint8 (3, s, s), (C,) bool, boxes or not).

    A crop has a share between `crop` and 1 of each side, is resized to a square and flipped half of the time. With
    boxes a class is a positive when a part of one of its boxes is in the crop; labels without boxes stay.
    """

    def __init__(self, data: detection.Boxes, size: int, crop: float, boxes: bool = True):
        self.data, self.size, self.crop, self.boxes = data, size, crop, boxes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        image, target = self.data[index]
        height, width = image.shape[1:]
        left, top, w, h = random_crop(height, width, self.crop)
        cropped = resize(image[:, top : top + h, left : left + w], [self.size, self.size], antialias=True)
        positives = self.data.positives[index].clone()
        if self.boxes:
            x1, y1, x2, y2 = target.boxes.unbind(-1)
            seen = (x2.clamp(max=left + w) > x1.clamp(min=left)) & (y2.clamp(max=top + h) > y1.clamp(min=top))
            positives[:] = False
            positives[target.labels[seen & ~target.crowd]] = True
        return (cropped.flip(-1) if torch.rand(()) < FLIP else cropped), positives, self.boxes


class Repeated(Dataset):
    """Items as often as their factors (N,) ask for: the whole part, and once more with the fraction's odds.

    Fractions are drawn at each pass. An item that is not drawn is replaced by any item, with odds in proportion to
    the factors: passes are of one length, and the shares of the items are those of the factors.
    """

    def __init__(self, data: Dataset, factors: np.ndarray):
        times = np.ceil(factors).astype(int)
        self.data, self.items = data, np.repeat(np.arange(len(times)), times)
        self.odds = np.ones(len(self.items))
        self.odds[np.cumsum(times) - 1] = factors - times + 1
        self.shares = np.cumsum(factors) / np.sum(factors)

    def __len__(self) -> int:
        return len(self.items)

    def drawn(self, index: int) -> int:
        """The item at a position of this pass."""
        place, other = torch.rand(2, dtype=torch.float64).tolist()
        if place < self.odds[index]:
            return int(self.items[index])
        return min(int(np.searchsorted(self.shares, other, side="right")), len(self.shares) - 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        return self.data[self.drawn(index)]


class Turns(Dataset):
    """Groups of images from one of several sources: (g, 3, s, s), (g, C) and (g,), the source drawn with equal odds.

    Images are drawn with replacement, as in the authors' sampler of several data sets.
    """

    def __init__(self, sources: Sequence[Dataset], group: int):
        self.sources, self.group = sources, group

    def __len__(self) -> int:
        return max(1, sum(map(len, self.sources)) // self.group)

    def __getitem__(self, _: int) -> tuple[Tensor, Tensor, Tensor]:
        source = self.sources[int(torch.randint(len(self.sources), ()))]
        chosen = torch.randint(len(source), (self.group,)).tolist()
        images, positives, boxes = zip(*(source[i] for i in chosen), strict=True)
        return torch.stack(images), torch.stack(positives), torch.tensor(boxes)


def training_data(p: SimpleNamespace, train: detection.Boxes) -> Dataset:
    """Crops of images with boxes, repeated where classes are rare (OV-LVIS), or in turns with captions (OV-COCO)."""
    r = recipe(p.dataset, p.captions)
    found: Dataset = Crops(train, r.size, r.crop)
    if r.repeat is not None:
        return Repeated(found, detection.repeat_factors(train, r.repeat))
    if not p.captions:
        return found
    file = train.dataset.folder(train.root) / "annotations" / "captions_train2017.json"
    if not file.is_file():
        raise train.dataset.missing(train.root, f"{file} is not there (or set captions = False)")
    labels = detection.caption_labels(read_json(file), detection.with_synonyms(train.truth["categories"]))
    captioned = detection.Boxes(
        train.dataset, train.root, Path(train.sources[0]).parent, labels, train.base, train.novel
    )
    return Turns([found, Crops(captioned, r.size, r.crop, boxes=False)], r.group)


def loss(model: sic_cads.MLR, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The loss of a batch and its two terms, "rank" and "distill", as weighted in it.

    Images with boxes rank the base classes, those with labels alone all classes.
    """
    images, positives, boxes = batch
    e_text, e_image = model(images, raw=True)
    scores = model.tau * sic_cads.pool(model.cosines(e_text), model.levels)
    # an image without positives counts with 0
    kinds = ((boxes, model.base), (~boxes, None))
    rank = sum(sic_cads.rank_loss(scores, positives & kind[:, None], columns) for kind, columns in kinds)
    distill = model.distill * sic_cads.distillation_loss(e_image, model.teacher_embeddings(images))
    return {"loss": rank + distill, "rank": rank, "distill": distill}


class BatchLoss(nn.Module):
    """The loss of a batch as one forward pass, which training on several devices requires.

    A batch is of images, as `Crops` gives them, or of groups of images, as `Turns` does.
    """

    def __init__(self, model: sic_cads.MLR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, positives: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        return loss(self.model, (images.flatten(0, -4), positives.flatten(0, -2), boxes.flatten()))


# --- the recogniser ---------------------------------------------------------------------------------------------------


class Recogniser(sic_cads.MLR):
    """The recogniser as part of the authors' detectors: images are resized to the detector's input size first."""

    def forward(self, x: Tensor, raw: bool = False) -> tuple[Tensor, Tensor]:
        """As `MLR.forward`; with `raw`, of augmented training images (B, 3, s, s), uint8."""
        return super().forward(self.prepared(x, resize=False) if raw else x)

    def prepared(self, images: Tensor, resize: bool = True) -> Tensor:
        return super().prepared(self._resized(images), resize)

    def crops(self, images: Tensor) -> Tensor:
        return super().crops(self._resized(images))

    def _resized(self, images: Tensor) -> Tensor:
        return images if self.training else resize(images, [SHORTER], max_size=LONGER, antialias=True)


def weights_file(p: SimpleNamespace, name: str) -> Path:
    """The default path of a file of the paper's weights, below `<data_root>/weights`."""
    entry = next(w for w in paper("sic_cads")["weights"] if w["name"] == name)
    return Path(p.data_root) / "weights" / entry["file"]


def clip_model(p: SimpleNamespace) -> nn.Module:
    """The frozen CLIP, of its file below `data_root` or of the cache."""
    file = weights_file(p, "clip")
    return backbones.build(f"openclip:{p.clip}", file if p.clip == CLIP and file.is_file() else "pretrained")


def build(p: SimpleNamespace, clip: nn.Module, text: Tensor, novel: Tensor, weights: str | Path) -> Recogniser:
    """The recogniser at full size on a ResNet-50, its new layers drawn from the seed; `weights`: of the ResNet."""
    torch.manual_seed(p.seed)
    body = backbones.build(BODY, weights)
    model = Recogniser(
        body, text, novel, teacher=clip.visual, teacher_input=backbones.input_of(clip), **recipe(p.dataset).options
    )
    return model


def load(p: SimpleNamespace, clip: nn.Module, text: Tensor, novel: Tensor) -> Recogniser:
    """The trained recogniser of the file `checkpoint`, ours (`train_model`) or the authors', with this vocabulary.

    Raises:
        MissingWeights: no such file.
        CorruptFile, BadCheckpoint: it cannot be read, or holds another model.
    """
    if not Path(p.checkpoint).is_file():
        ways = [
            "the authors never released theirs; train one (leave `checkpoint` empty): its weights are in `trained`",
            "set branch = 'visual+', which needs no training",
        ]
        raise MissingWeights("SIC-CADS' recogniser", p.checkpoint, ways)
    state = backbones.read_state(p.checkpoint)
    model = build(p, clip, text, novel, "random")
    if rows := [len(t) for name, t in state.items() if name.endswith("text_embedding.weight")]:  # the authors' names
        theirs = sic_cads.MLR.from_official(state, torch.zeros(rows[0], dtype=torch.bool))
        state = trained_weights(theirs)
    load_official(model, state, {name: name for name in trained_weights(model)}, "SIC-CADS' recogniser on a ResNet-50")
    return model.eval()


def trained_weights(model: sic_cads.MLR) -> dict[str, Tensor]:
    """The tensors of a recogniser without vocabulary and teacher: ResNet with its frozen norms, pyramid, heads."""
    return {n: t for n, t in model.state_dict().items() if n != "text" and not n.startswith("teacher.")}


def _trained(dataset: str) -> str:
    """The beginning of the names of the files that a training on a dataset writes."""
    return f"recogniser {dataset.rpartition('/')[2]} "


def optimizer(r: Recipe) -> MakeOptimizer:
    """AdamW of all that is trained, in one parameter group."""
    return adamw(r.lr, WEIGHT_DECAY, decay="all")


def clipping(r: Recipe) -> list[Callback]:
    """The clipping of gradients: each entry by itself on OV-LVIS, none on OV-COCO."""
    return [ClipValue(r.clip)] if r.clip else []


def train_model(
    p: SimpleNamespace,
    data: Dataset,
    out: Path | None,
    model: Recogniser,
    *,
    r: Recipe | None = None,
    epochs: float | None = None,
    batch: int | None = None,
    workers: int = 0,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train by the released recipe `r`, in place; the history, with both terms of the loss.

    With `out` a killed training is resumed, one that is done is only read, and the trained weights are written as
    `out`/trained/*.safetensors, for the parameter `checkpoint`. `batch` is of images; of groups (`Turns`) as many as
    hold them make a step.
    """
    r = r or recipe(p.dataset, p.captions)
    batch = max((batch or r.batch) // getattr(data, "group", 1), 1)
    epochs = epochs or r.iterations / max(len(data) // batch, 1)
    hardware, checkpoint = Hardware.of(p, "sic_cads", workers=workers), None
    if out is not None:
        facts = {k: getattr(p, k) for k in ("dataset", "captions", "seed", "devices")}
        facts["precision"] = hardware.precision
        facts |= {"data_root": Path(p.data_root), "model": model, "epochs": epochs, "batch": batch}
        name = f"{_trained(p.dataset)}seed {p.seed}"
        checkpoint = Checkpoint.of(out / "checkpoints", name, every=1000, **facts)
    history = fit(
        BatchLoss(model),
        lambda module, items: module(*items),
        data,
        epochs=epochs,
        batch=batch,
        optimizer=optimizer(r),
        schedule=lambda lr, steps, per_epoch: learning_rates(r, steps),
        callbacks=[*clipping(r), *callbacks],
        checkpoint=checkpoint,
        seed=p.seed,
        hardware=hardware,
        name="recogniser",
    )
    if out is not None and checkpoint is not None:
        save(out / "trained", checkpoint.path.stem, trained_weights(model))
    return history


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The recogniser of a run, the detector that it refines, and the test images.

    Attributes:
        test: the test images and their boxes.
        build: the recogniser, before training.
        train: (model, arguments of `fit` that differ) to the history, in place; empty where nothing is trained.
        detect: one image (3, H, W), uint8, to all boxes (R, 4), xyxy, and their probabilities (R, C).
        branch, gamma: the image-level scores that refine, and their weight.
        threshold, nms, top: of the detections, after the refinement.
        hardware: of the recogniser at test.
    """

    title: str
    test: detection.Boxes
    build: Callable[[], sic_cads.MLR]
    train: Callable[..., History]
    detect: Callable[[Tensor], tuple[Tensor, Tensor]]
    branch: str
    gamma: float
    threshold: float
    nms: float | None
    top: int
    hardware: Hardware = CPU

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the C classes."""
        return tuple(self.test.class_names)

    @functools.cached_property
    def base(self) -> Tensor:
        """Which classes are base classes (C,) bool; classes that are neither base nor novel are not scored."""
        return self.test.mask(self.test.base)

    @functools.cached_property
    def novel(self) -> Tensor:
        """Which classes are novel (C,) bool."""
        return self.test.mask(self.test.novel)


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the checked parameters of the notebook; checkpoints and trained weights go below `out`.

    The detectors here return all their boxes: the threshold is a lower bound, not the 0.15 or 0.2 that the released
    configurations set for theirs, and set predictors need no suppression.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with what to change or get.
    """
    if p.dry_run and "owl" not in p.detector:
        raise BadParameter("detector", p.detector, [OWLVIT, "or another OWL: a dry run has no file of a tokenizer"])
    if p.dataset in COLUMNS and p.branch != "visual+" and not (p.checkpoint or p.dry_run):
        accepted = "a recogniser trained with dataset = 'detection/ov-lvis', or branch = 'visual+', which needs none"
        raise BadParameter("checkpoint", p.checkpoint, accepted)
    return _dry_run(p) if p.dry_run else _paper(p, out)


def _setting(
    p: SimpleNamespace, title: str, test: detection.Boxes, make: Callable, train: Callable, detector: nn.Module
) -> Setting:
    hardware = Hardware.of(p, "sic_cads")
    where = device(p.accelerator)

    def detect(image: Tensor) -> tuple[Tensor, Tensor]:
        found = detector.to(where)(image)  # moved at the first image, not before processes for training are forked
        return found.boxes.cpu(), found.probabilities.cpu()

    return Setting(
        title=title,
        test=test,
        build=make,
        train=train,
        detect=detect,
        branch=p.branch,
        gamma=gamma(p),
        threshold=detectors.FLOOR,
        nms=None,
        top=recipe(p.dataset).top,
        hardware=hardware,
    )


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    test = detection.load(p.dataset, p.data_root, "test")
    if p.dataset in COLUMNS:  # nothing of a foreign vocabulary was trained on
        test.novel = test.categories
    if p.images:
        test = first(test, p.images)
    folder = weights_file(p, "detector").parent
    weights = folder if p.detector == OWLVIT and folder.is_dir() else "pretrained"
    detector = detectors.build(p.detector, test.class_names, weights)
    clip = clip_model(p)
    text = sic_cads.vocabulary(clip, open_clip.get_tokenizer(p.clip.partition("/")[0]), test.class_names)
    arguments = (p, clip, text, test.unseen)
    if p.checkpoint:
        make, train = functools.partial(load, *arguments), untrained
    elif p.branch == "visual+":  # its ResNet and heads are not used
        make, train = functools.partial(build, *arguments, "random"), untrained
    else:
        data = training_data(p, detection.load(p.dataset, p.data_root, "train"))
        make = functools.partial(build, *arguments, p.weights or "pretrained")
        train = functools.partial(train_model, p, data, out, workers=WORKERS)
    return _setting(p, DATASETS[p.dataset].title, test, make, train, detector)


def untrained(model: sic_cads.MLR, **changes: Any) -> History:
    """No training: an empty history."""
    return []


def first(data: detection.Boxes, count: int) -> detection.Boxes:
    """The first `count` images of a dataset."""
    truth = _truth_of(data, count)
    folder = Path(data.sources[0].removesuffix(truth["images"][0]["file_name"]))
    return detection.Boxes(data.dataset, data.root, folder, truth, data.base, data.novel)


def _truth_of(data: detection.Boxes, count: int) -> dict:
    """The annotations of the first `count` images."""
    images = data.truth["images"][:count]
    ids = {image["id"] for image in images}
    rows = [row for row in data.truth["annotations"] if row["image_id"] in ids]
    return data.truth | {"images": images, "annotations": rows}


# --- the dry run ------------------------------------------------------------------------------------------------------


def generated(p: SimpleNamespace, count: int, height: int = 480, width: int = 640) -> detection.Boxes:
    """Images of noise with random boxes, in the dataset's classes; numbers where only its file has their names."""
    dataset, rng = DATASETS[p.dataset], np.random.default_rng(p.seed)
    categories: list[dict] = [
        {"id": i, "name": f"class {i}", "frequency": "rcff"[i % 4]} for i in range(dataset.classes)
    ]
    if p.dataset == "detection/ov-lvis":
        categories = [*detection.lvis_categories()]
    base, novel = ([c["id"] for c in categories if (c["frequency"] == "r") is rare] for rare in (False, True))
    if p.dataset == "detection/ov-coco":
        categories = [{"id": i, "name": name} for name, i in (COCO_BASE | COCO_NOVEL | COCO_OTHER).items()]
        base, novel = list(COCO_BASE.values()), list(COCO_NOVEL.values())
    shown = [*base[:3], *novel[:2]]
    images = [{"id": i, "width": width, "height": height, "file_name": f"{i}"} for i in range(count)]
    rows = [
        {
            "id": 10 * i + k + 1,
            "image_id": i,
            "category_id": category,
            "iscrowd": 0,
            "area": 80.0 * 60,
            "bbox": [float(rng.uniform(0, width - 80)), float(rng.uniform(0, height - 60)), 80.0, 60.0],
        }
        for i in range(count)
        for k, category in enumerate(shown)
    ]
    truth = {"images": images, "annotations": rows, "categories": categories}
    found = detection.Boxes(dataset, Path(p.data_root), Path(), truth, base, novel)
    found.sources = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return found


def _dry_run(p: SimpleNamespace) -> Setting:
    """Full-size models with random weights, two optimiser steps on generated images of the real shape."""
    torch.manual_seed(p.seed)
    gpu = device(p.accelerator) == "cuda"
    r, test = recipe(p.dataset, p.captions), generated(p, 2)
    batch = r.batch if gpu else 2
    clip = backbones.build(f"openclip:{p.clip}", "random")
    few, more = test.class_names[:NAMED], len(test.class_names) - NAMED
    text = sic_cads.vocabulary(clip, open_clip.get_tokenizer(p.clip.partition("/")[0]), few)
    detector = detectors.build(p.detector, few, "random")
    text, queries = (
        torch.cat([t, F.normalize(torch.randn(max(more, 0), t.shape[1]), dim=-1)]) for t in (text, detector.queries)
    )
    detector.queries = queries
    make = functools.partial(build, p, clip, text, test.unseen, "random")
    data = Crops(generated(p, 2 * batch), r.size, r.crop)
    train = functools.partial(train_model, p, data, None, batch=batch, epochs=1)
    return _setting(p, "generated images (dry run: the scores mean nothing)", test, make, train, detector)


# --- refinement of a setting's detector -------------------------------------------------------------------------------


def train(found: Setting, **changes: Any) -> tuple[sic_cads.MLR, History]:
    """Build the recogniser of a setting and train it; the history is empty where nothing is trained."""
    model = found.build()
    history = found.train(model, **changes)
    return model.eval(), history


@torch.no_grad()
def branch_scores(model: sic_cads.MLR, image: Tensor) -> dict[str, Tensor]:
    """The image-level probabilities (C,) of one image (3, H, W), uint8, by branch; without a teacher only the learned
    branches of `BRANCHES`."""
    e_text, e_image = model(model.prepared(image[None]))
    student = model.recognised(e_text, e_image)
    found = {"text": student.p_text[0], "visual": student.p_image[0], "fused": student.p[0]}
    if model.teacher is not None:
        plus = model.recognised(e_text, model.teacher_embeddings(image[None]))
        found |= {"visual+": plus.p_image[0], "SIC-CADS": plus.p[0]}
    return {name: found[name] for name in BRANCHES if name in found}


@dataclass(frozen=True)
class Predictions:
    """The outputs of detector and recogniser for the first n test images.

    All probabilities of a large test do not fit in memory: LVIS has 20,000 images of 576 boxes and 1,203 classes.

    Attributes:
        boxes: of each image, (R, 4).
        p: by branch, (n, C).
        best: by branch and gamma, the detections of each image after threshold, suppression and top-k: scores (k,),
            classes (k,) and rows (k,) of its boxes. Those of the detector alone are ("", 0.0).
        probabilities: (R, C) of the first images, as many as `KEPT` bytes hold.
        last: (R, C) of the last other image that `refined` was asked for, by index.
    """

    boxes: list[Tensor] = field(default_factory=list)
    p: dict[str, Tensor] = field(default_factory=dict)
    best: dict[tuple[str, float], list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    probabilities: list[Tensor] = field(default_factory=list)
    last: dict[int, Tensor] = field(default_factory=dict)


def predict(found: Setting, model: sic_cads.MLR, count: int = 0) -> Predictions:
    """Run detector and recogniser on the first `count` test images, 0 for all."""
    outputs, kept = Predictions(), 0
    rows = []
    with evaluating(found.hardware, model) as where:
        for index in progress(range(min(count or len(found.test), len(found.test))), "test images"):
            image, _ = found.test[index]
            with without_autocast(where):  # half precision would move boxes by pixels
                boxes, probabilities = found.detect(image)
            scores = {name: p.cpu() for name, p in branch_scores(model, image.to(where)).items()}
            outputs.boxes.append(boxes)
            rows.append(scores)
            for branch, p in {"": None, **scores}.items():
                gamma = found.gamma if branch else 0.0
                matrix = probabilities if p is None else sic_cads.refine(probabilities, p, gamma)
                best = _best(found, index, boxes, matrix)
                reduced = best.scores.clone(), best.classes.int(), best.rows.int()
                outputs.best.setdefault((branch, gamma), []).append(reduced)
            kept += probabilities.nbytes
            if kept <= KEPT:
                outputs.probabilities.append(probabilities)
    outputs.p.update({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return outputs


def _best(found: Setting, index: int, boxes: Tensor, matrix: Tensor) -> sic_cads.Detections:
    """The detections of an image; of LVIS those that count, of classes annotated in it or known to be absent."""
    best = sic_cads.detect(boxes, matrix, found.threshold, found.nms, found.top)
    absent = found.test.truth["images"][index].get("neg_category_ids")
    if absent is None:
        return best
    counted = (found.test.positives[index] | found.test.mask(absent))[best.classes]
    return sic_cads.Detections(*(values[counted] for values in best))


def refined(found: Setting, outputs: Predictions, index: int, branch: str = "", gamma: float | None = None) -> Tensor:
    """One image's probabilities (R, C) after Eq. 7; `branch` and `gamma` are the setting's unless given.

    The detector runs again on an image whose probabilities were not cached.
    """
    gamma = found.gamma if gamma is None else gamma
    held: Mapping[int, Tensor] | list[Tensor] = outputs.last
    if index < len(outputs.probabilities):
        held = outputs.probabilities
    elif index not in outputs.last:
        outputs.last.clear()
        with evaluating(found.hardware) as where, without_autocast(where):  # as in `predict`
            outputs.last[index] = found.detect(found.test[index][0])[1]
    return sic_cads.refine(held[index], outputs.p[branch or found.branch][index], gamma)


def detections(found: Setting, outputs: Predictions, branch: str = "", gamma: float | None = None) -> list[dict]:
    """Detections of all predicted images, rows in COCO's result format."""
    gamma = found.gamma if gamma is None else gamma
    known = outputs.best.get((branch or found.branch if gamma else "", gamma))
    rows = []
    for index, boxes in enumerate(outputs.boxes):
        if known is None:
            best = _best(found, index, boxes, refined(found, outputs, index, branch, gamma))
        else:
            scores, classes, chosen = known[index]
            best = sic_cads.Detections(boxes[chosen], scores, classes, chosen)
        rows += detectors.rows(best, found.test.image_ids[index], found.test.categories)
    return rows


def ap50(found: Setting, outputs: Predictions, branch: str = "", gamma: float | None = None) -> dict[str, float]:
    """AP50 of novel and base classes and of all that are scored, over the predicted images, in percent."""
    style = "lvis" if found.test.name == "detection/ov-lvis" else "coco"
    truth, rows = _truth_of(found.test, len(outputs.boxes)), detections(found, outputs, branch, gamma)
    scored = evaluate(truth, rows, style=style, top=found.top)
    groups = {"novel": found.test.novel, "base": found.test.base, "all": (*found.test.novel, *found.test.base)}
    return {name: scored.mean(group) for name, group in groups.items()}


def recognition(test: detection.Boxes, p: Tensor) -> dict[str, float]:
    """mAP of image-level scores (n, C) of the first n images, over the base and the novel classes, in percent."""
    each = recognition_ap(test.positives[: len(p)].numpy(), p.numpy())
    groups = {"base": test.base, "novel": test.novel}
    return {name: float(np.nanmean(each[test.mask(group).numpy()])) for name, group in groups.items()}


# --- tables of results ------------------------------------------------------------------------------------------------


def benchmark(p: SimpleNamespace, test: detection.Boxes, rows: list[dict]) -> dict[str, float]:
    """The metrics of a dataset's benchmark, in percent, for detections of all images of `test`.

    OV-LVIS: "APr", "APc", "APf", "AP" of boxes, federated. OV-COCO: AP50 "novel", "base", "all", the 65 classes.
    Others: AP50 by the dataset's column; of OpenImages without the hierarchy and the group boxes of the official
    evaluator.
    """
    if p.dataset == "detection/ov-lvis":
        totals = evaluate(test.truth, rows, style="lvis").totals
        return {name: totals[name] for name in ("APr", "APc", "APf", "AP")}
    found = evaluate(test.truth, rows)
    if p.dataset in COLUMNS:
        return {COLUMNS[p.dataset]: found.totals["AP50"]}
    groups = {"novel": test.novel, "base": test.base, "all": (*test.base, *test.novel)}
    return {name: found.mean(group) for name, group in groups.items()}


VALUES = ["novel", "base", "all", "APr", "APc", "APf", "AP", *COLUMNS.values()]
TABLES = {"ov-coco": "detection/ov-coco", "ov-lvis": "detection/ov-lvis"}


def label(p: SimpleNamespace, gamma: float) -> str:
    """The method's name in the tables: the detector, and the scores that refine it by `gamma` (0: none), with their
    differences from the published setting.

    On the sets of `COLUMNS`, where nothing is trained, the published setting is a recogniser trained here on OV-LVIS.
    """
    name = p.detector.rpartition("/")[2]
    if not gamma:
        return name
    changed = [p.clip] if p.clip != CLIP else []
    if p.branch != "visual+":  # which is CLIP alone
        file = Path(p.checkpoint).name
        usual = p.dataset in COLUMNS and file.startswith(_trained("detection/ov-lvis"))
        changed += ["no captions"] if p.dataset == "detection/ov-coco" and not (p.captions or file) else []
        changed += [f"weights of {file}"] if file and not usual else []
    return ", ".join([f"{name} + {p.branch}, gamma {gamma:g}", *changed])


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (method, dataset, images, seed); `new` joins or replaces its row."""
    return upsert_rows(path, ["method", "dataset", "images", "seed"], VALUES, [new] if new else ())


def record(path: Path, p: SimpleNamespace, found: Setting, outputs: Predictions) -> None:
    """Add the results of a run, with and without refinement, to those in `path`."""
    for gamma in (0.0, found.gamma):
        values = benchmark(p, found.test, detections(found, outputs, gamma=gamma))
        row = {"method": label(p, gamma), "dataset": p.dataset, "images": p.images, "seed": p.seed}
        measured(path, row | values)


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column) for a published table, of runs on all test images."""
    datasets = [TABLES[table]] if table in TABLES else list(COLUMNS)
    found = {}
    for (method, _), group in rows[rows.dataset.isin(datasets) & (rows.images == 0)].groupby(["method", "dataset"]):
        for column in VALUES:
            if column in group and group[column].notna().any():
                found[method, column] = float(group[column].mean())
    return found


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """As `cells`, of all tables, by (method, "OV-COCO novel"), (method, "OV-LVIS APr"), (method, "Objects365"), ..."""
    found: dict[tuple[str, str], float] = {}
    for table, before in (("ov-coco", "OV-COCO "), ("ov-lvis", "OV-LVIS "), ("cross-dataset", "")):
        found |= {(method, before + column): value for (method, column), value in cells(rows, table).items()}
    return found


def protocol() -> dict[str, str]:
    """What the `paper` profile runs with, a fact a row, from its constants."""
    coco, lvis = recipe("detection/ov-coco", captions=True), recipe("detection/ov-lvis")
    image, crop, seen = sic_cads.IMAGENET, sic_cads.OPENAI, f"shorter side to {SHORTER}, longer at most {LONGER}"

    def both(value: Callable[[Recipe], object]) -> str:
        return f"{value(coco)} (OV-COCO), {value(lvis)} (OV-LVIS)"

    return {
        "optimiser": f"AdamW, weight decay {WEIGHT_DECAY:g} on all that is trained, the whole ResNet too",
        "learning rate": both(lambda r: f"{r.lr:g}"),
        "schedule": "half a cosine to 0, after a straight line from "
        + both(lambda r: f"{r.factor:g} of it over {r.warmup:,} steps"),
        "steps": both(lambda r: f"{r.iterations:,}"),
        "batch": f"{coco.batch} (OV-COCO: boxes and captions in turns, {coco.group} images of one source each), "
        f"{lvis.batch} (OV-LVIS); no epochs, no partial batches",
        "gradient": f"on OV-LVIS each entry is clipped at {lvis.clip:g}; on OV-COCO not clipped",
        "sampling": f"OV-LVIS: repeat factors, threshold {lvis.repeat:g}, fractions drawn at each pass",
        "loss": "rank loss on cosines times "
        + both(lambda r: f"{r.options['tau']:g}")
        + f", and {coco.options['distill']:g} times the distillation loss",
        "precision": f"{paper('sic_cads')['precision']} on a GPU; heads and cosines in float32",
        "augmentation": "crop of at least "
        + both(lambda r: f"{r.crop:.0%} of each side")
        + f", squeezed to {coco.size} x {coco.size}, flip with probability {FLIP:g}; CLIP gets the same images",
        "test images": f"{seen} (antialiased); recogniser: shorter side to {image.size}, nearest pixel; CLIP: "
        f"{len(sic_cads.patches(coco.options['levels']))} crops of {crop.size} pixels, bilinear without antialiasing",
        "text": f'"{sic_cads.PROMPT}", names as in the annotation file',
        "fusion": "lambda of base and novel classes "
        + both(lambda r: f"{r.options['lambda_base']:g} and {r.options['lambda_novel']:g}")
        + f"; other vocabularies: text {sic_cads.CROSS_DATASET:g}, image {1 - sic_cads.CROSS_DATASET:g}",
        "refinement": "gamma "
        + both(lambda r: f"{r.gamma:g}")
        + ", all classes of all boxes, before top "
        + both(lambda r: r.top)
        + f"; threshold {detectors.FLOOR:g} (released, for their detectors: "
        + both(lambda r: f"{r.threshold:g}")
        + ")",
        "selection": "none; the last step is tested",
        "seeds": "not found; here the parameter `seed`",
        "sweep": "none found; gamma, both lambdas and the thresholds are constants of the configurations",
        "labels from captions": "LVIS' synonyms of each class' synset, between spaces",
        "detectors": "paper: BoxSup, Detic, VLDet, OADP, RKDWTF, CORA (inferred); here OWL-ViT, OWLv2, Grounding DINO, "
        "or result files of any. Those here saw boxes with names of COCO's novel classes: only gains are meaningful",
        "metric": "OV-COCO: AP50 of boxes, 65 classes; OV-LVIS: federated AP of boxes (the paper's tables: probably "
        "masks); Objects365, OpenImages: AP50 of boxes, OpenImages without group boxes and verified labels",
        "not built": "the recipe with ImageNet-21k; OpenImages' official evaluator",
    }


def tables(path: Path) -> dict[str, pd.DataFrame]:
    """The paper's tables of results by title, the published values next to those measured in `path`."""
    rows = measured(path)
    return with_measured("sic_cads", {name: cells(rows, name) for name in (*TABLES, "cross-dataset")})
