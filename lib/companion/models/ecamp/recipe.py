"""ECAMP's `paper` profile: pre-training and the downstream tasks by the authors' recipes, and the tables of results.

A training writes its checkpoint below `<out>/checkpoints`, from which it resumes, and its weights to `<out>/trained`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, xrays
from ...data.xrays_sets import CLASSES, ONE_OF, tasks
from ...errors import BadParameter, MissingWeights, check_choice
from ...evaluation.metrics import radiology
from ...evaluation.tables import published_table, upsert_rows, with_measured
from ...ops.files import atomic
from ...ops.papers import paper
from ...training import checkpoints
from ...training.callbacks import ClipNorm, EarlyStop
from ...training.checkpoints import Checkpoint, checkpoint_key
from ...training.fit import Hardware, History, evaluating, fit
from ...training.schedules import MakeOptimizer, adamw, given, sgd
from ..layers.state_dicts import load_official
from . import heads
from . import model as ecamp
from .model import ECAMP, METHODS
from .text import ENTITY, NO_ENTITY, OTHER, SPLICED, Pairs, Vocabulary

WORKERS = min(16, os.cpu_count() or 1)
DRY_BATCH = 2
TEST_BATCH = 64
HELD = 4 * 2**30  # bytes of validation images and labels


@dataclass(frozen=True)
class Setting:
    """A pre-training.

    Attributes:
        title: of the data.
        learning_rates: of each trained method.
        pairs: training data of a method: items are `model.Batch` without the B.
        build: the model of a method, before training.
        learn: trains a model in place: (model, method) to the history, with the losses "mim", "sr" and "mlm".
    """

    title: str
    learning_rates: dict[str, float]
    pairs: Callable[[str], Pairs]
    build: Callable[[str], ECAMP]
    learn: Callable[[ECAMP, str], History]


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The pre-training of the notebook's checked parameters `p`; in a dry run two steps on generated pairs.

    Args:
        out: the run's folder.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    if p.dataset != "folder":
        _check(p.dataset, "pre-training")
    title, words, pairs, facts = _generated_pairs(p) if p.dry_run else _pairs(p, out)

    def build(method: str) -> ECAMP:
        torch.manual_seed(p.seed)
        model = ecamp.build("paper", words=len(words), **METHODS[method][0])
        if not p.dry_run:
            model.load_mae(backbones.read_state(_file(p, "mae")))
        return model

    def learn(model: ECAMP, method: str) -> History:
        data, name = pairs(method), f"{method}, {p.dataset}, seed {p.seed}"
        if p.dry_run:
            learning_rates = np.full(2, recipe()["lr"])
            return pretrain(p, model, data, learning_rates=learning_rates, batch=DRY_BATCH, name=method)
        checkpoint = Checkpoint.of(out / "checkpoints", name, model=model, method=method, **facts)
        history = pretrain(p, model, data, checkpoint=checkpoint, name=method)
        checkpoints.save(out / "trained", name, model.to_official())
        return history

    return Setting(title, {p.method: recipe()["lr"]}, pairs, build, learn)


# --- pre-training -----------------------------------------------------------------------------------------------------


def recipe() -> dict[str, float]:
    """The hyper-parameters of pre-training in the authors' scripts (the paper's YAML)."""
    return published_table("ecamp", "recipe-pretraining").set_index("method")["value"].to_dict()


@dataclass(frozen=True)
class PretrainingEpoch:
    """An epoch of pre-training as in the authors' loader.

    Attributes:
        iterations: full batches of a device; the remainder is dropped.
        steps: of the optimiser; the remaining iterations of an epoch are computed there but have no effect, because
            gradients are cleared when an epoch begins. Here their images are not read.
        batch: pairs per step, over all devices.
    """

    iterations: int
    steps: int
    batch: int


def pretraining_epoch(images: int, r: Mapping[str, float]) -> PretrainingEpoch:
    """The epoch of a set of `images` under the settings `r`; one step with all pairs if there are fewer than a batch.

    Args:
        r: `recipe()`; gpus, batch_per_gpu and accumulation are read.
    """
    gpus, accumulation = int(r["gpus"]), int(r["accumulation"])
    iterations = -(-images // gpus) // int(r["batch_per_gpu"])
    batch = gpus * int(r["batch_per_gpu"]) * accumulation
    steps = min(iterations // accumulation, images // batch)
    return PretrainingEpoch(iterations, steps, batch) if steps else PretrainingEpoch(accumulation, 1, images)


def pretraining_learning_rates(images: int, r: Mapping[str, float] | None = None) -> np.ndarray:
    """The learning rate of each step: linear warm-up, then a cosine to epoch 200 that stops at epoch 120.

    As released, the epoch at step k is counted in the loader's iterations, accumulation * k / iterations: with
    remaining iterations it does not quite reach its end.

    Args:
        images: of the training set.
        r: settings by name; None: the published ones.
    """
    r = recipe() if r is None else r
    cut = pretraining_epoch(images, r)
    within = np.arange(cut.steps) * int(r["accumulation"]) / cut.iterations
    epoch = (np.arange(int(r["stop_epoch"]))[:, None] + within).ravel()
    falling = 0.5 * (1 + np.cos(np.pi * (epoch - r["warmup_epochs"]) / (r["cosine_end_epoch"] - r["warmup_epochs"])))
    return r["lr"] * np.where(epoch < r["warmup_epochs"], epoch / r["warmup_epochs"], falling)


def pretraining_optimizer(r: Mapping[str, float]) -> MakeOptimizer:
    """AdamW; matrices decay ([CLS] token, mask token and word positions among them), vectors and biases do not."""
    return adamw(r["lr"], r["weight_decay"], betas=(r["beta1"], r["beta2"]))


def pretrain(
    p: SimpleNamespace,
    model: ECAMP,
    data: Dataset,
    *,
    settings: Mapping[str, float] = {},
    learning_rates: np.ndarray | None = None,
    batch: int | None = None,
    micro_batch: int = 64,  # their 16,384 positions have 2 GB of logits over 30,000 words, and the same for gradients
    checkpoint: Checkpoint | None = None,
    name: str = "pre-training",
) -> History:
    """Pre-train by the authors' recipe, in place.

    Args:
        settings: those of `recipe()` that differ.
        learning_rates: of each step; None: the published ones.
        batch: pairs per step; None: the published number, or all pairs if there are fewer.
        micro_batch: pairs that a device processes at once; the gradients of a step are accumulated.
    """
    r = recipe() | dict(settings)
    batch = batch or pretraining_epoch(len(data), r).batch
    learning_rates = pretraining_learning_rates(len(data), r) if learning_rates is None else learning_rates
    accumulate = math.ceil(batch / (p.devices * micro_batch))
    return fit(
        model,
        ecamp.pretraining_loss,
        data,
        epochs=len(learning_rates) / (len(data) // batch),
        batch=batch,
        optimizer=pretraining_optimizer(r),
        schedule=given(learning_rates),
        checkpoint=checkpoint,
        seed=p.seed,
        hardware=Hardware.of(p, "ecamp", workers=WORKERS, accumulate=accumulate),
        name=name,
    )


def _pairs(p: SimpleNamespace, out: Path) -> tuple[str, Vocabulary, Callable[[str], Pairs], dict[str, Any]]:
    """Title, vocabulary, pairs by method, and the identity of the data; "folder": `data_root` itself.

    A learned vocabulary is saved in `out`: relearned from the same reports it would have other ids.
    """
    dataset = xrays.own(p.data_root) if p.dataset == "folder" else DATASETS[p.dataset]
    found = xrays.reports(dataset, p.data_root, xrays.pretrain_transform())
    stored = dataset.folder(p.data_root) / "mimic_wordpiece.json"
    if not stored.is_file():
        stored = out / f"vocabulary {checkpoint_key(texts=found.texts)}.json"
    if not stored.is_file():
        with atomic(stored) as temporary:
            Vocabulary.train(found.texts).tokenizer.save(str(temporary))
    words = Vocabulary.read(stored)
    if found.windows is not None and not (found.windows.min() >= 0 and found.windows.max() <= 14 - 12):
        corners = f"corners of {found.windows.min()} to {found.windows.max()}"
        raise BadParameter("windows", corners, "0 to 2: a window has 12 of the 14 patches of a side")

    def pairs(method: str) -> Pairs:
        options = {"statements": found.statements, "windows": found.windows} | METHODS[method][1]
        return Pairs(found.images, found.texts, words, **options)

    facts = {"data_root": Path(p.data_root), "images": found.images.paths, "vocabulary": words.pieces}
    facts |= {"texts": found.texts, "statements": found.statements, "windows": found.windows}
    return f"{p.dataset}, {len(found.texts):,} images", words, pairs, facts


def _generated_pairs(p: SimpleNamespace) -> tuple[str, Vocabulary, Callable[[str], Pairs], dict[str, Any]]:
    """As `_pairs`, of the real shape, with as many words as MIMIC's vocabulary: the model has the published size."""
    generator = torch.Generator().manual_seed(p.seed)
    images = torch.randn(2 * DRY_BATCH, 3, 448, 448, generator=generator)
    reports = ["There is a small right effusion. There is no evidence of pneumothorax."] * len(images)
    words = Vocabulary.train(reports, 200)
    words.pieces += ["[UNK]"] * (30_000 - len(words))

    def pairs(method: str) -> Pairs:
        options = {"statements": ["There is effusion."] * len(images)} | METHODS[method][1]
        return Pairs(images, reports, words, **options)

    return "generated pairs (dry run: the losses mean nothing)", words, pairs, {}


# --- downstream -------------------------------------------------------------------------------------------------------

# names of the sets in the tables
TITLES = {
    "xrays/chestx-ray14": "ChestX-ray14",
    "xrays/chestmnist": "ChestX-ray14",
    "xrays/chexpert": "CheXpert",
    "xrays/rsna": "RSNA",
    "xrays/covidx": "COVIDx",
    "xrays/siim": "SIIM",
    "fundus/odir": "ODIR-5K",
    "fundus/aptos": "APTOS-2019",
    "fundus/mured": "MuReD",
    "fundus/riga": "RIGA",
}
RECIPES = {
    "fine-tune": "recipe-finetune",
    "linear probe": "recipe-linear",
    "segment": "recipe-segmentation",
    "detect": "recipe-detection",
}
KINDS = {
    "fine-tune": "classification",
    "linear probe": "classification",
    "segment": "segmentation",
    "detect": "detection",
}
PATIENCE = {"segment": 40}  # epochs without a new best; 20 for the others, and on RIGA for other encoders than ECAMP's
FIRST = {"1": 60, "10": 100, "100": 50}  # step after which detection is validated
EXPANSION = {"1": 8, "10": 8, "100": 4}  # of the detector's bottlenecks
BOUND = 50  # limit of a downstream training in multiples of the published steps; the authors' code has none
CLIP, MOMENTUM, DECAY = 1.0, 0.9, 0.05  # the norm of a gradient; SGD's; AdamW's weight decay


@dataclass(frozen=True)
class Downstream:
    """A downstream task on a data set.

    Attributes:
        title: task, set and share of labels.
        metric: name of the `score`, which is in percent.
        data: "train", "val" and "test".
        build: the model, before training.
        learn: trains a model in place, returns the history; the model ends with its best weights on "val".
        score: of a model and a split.
        recipe: lr, warmup_steps, steps, batch.
    """

    title: str
    metric: str
    data: dict[str, Dataset]
    build: Callable[[], nn.Module]
    learn: Callable[[nn.Module], History]
    score: Callable[[nn.Module, Dataset], float]
    recipe: dict[str, float]


def downstream_recipe(task: str, dataset: str, labels: str) -> dict[str, float]:
    """lr, warmup_steps, steps and batch in the authors' scripts; of ChestMNIST those of ChestX-ray14.

    Raises `BadParameter`: there is no script for this task, set and share of labels, for instance classification on the
    fundus sets.
    """
    rows = published_table("ecamp", RECIPES[task]).set_index("method").to_dict("index")
    name = f"{TITLES.get(dataset, dataset)}, {labels}%"
    if name not in rows:
        raise BadParameter("dataset", f"{dataset} with {labels} %", f"for {task}: {list(rows)}")
    return rows[name]


def downstream(p: SimpleNamespace, out: Path) -> Downstream:
    """The downstream task of the parameters `task`, `dataset`, `labels`, `encoder`, `weights` and `protocol`.

    Args:
        out: the run's folder.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    check_choice("task", p.task, KINDS)
    if p.devices > 1:
        raise BadParameter(
            "devices", p.devices, "1: only pre-training runs on several; Dice and BatchNorm need the whole batch"
        )
    kind = KINDS[p.task]
    _check(p.dataset, kind)
    numbers = downstream_recipe(p.task, p.dataset, p.labels)
    if p.dry_run:
        data = _generated(p, kind)
        numbers = numbers | {"batch": DRY_BATCH, "steps": 2, "warmup_steps": 0}
        title = f"{p.task}, generated images for {p.dataset} (dry run: the score means nothing)"
    else:
        data = _splits(p, kind)
        title = f"{p.task} on {p.dataset}, {p.labels} % of the labels"
    score, metric = {
        "classification": (functools.partial(_classified, p), "accuracy" if p.dataset in ONE_OF else "AUROC"),
        "segmentation": (functools.partial(_segmented, p), f"Dice ({p.protocol})"),
        "detection": (functools.partial(_detected, p), f"mAP ({p.protocol})"),
    }[kind]
    return Downstream(
        title=title,
        metric=metric,
        data=data,
        build=functools.partial(_head, p, kind),
        learn=functools.partial(_learn, p, out, data=data, score=score, numbers=numbers),
        score=score,
        recipe=numbers,
    )


def encoder(p: SimpleNamespace) -> VisionTransformer:
    """The ViT-B/16 of the parameter `encoder`, with the weights of `weights` or of `<data_root>/weights`, or random."""
    torch.manual_seed(p.seed)
    blank = VisionTransformer(img_size=224, num_classes=0, global_pool="")
    if p.encoder == "random" or p.dry_run:
        return blank
    # decoders in the file are only for pre-training
    state = backbones.read_state(_file(p, p.encoder.lower()))
    own = {n: t for n, t in state.items() if n in blank.state_dict()}
    load_official(blank, own, {n: n for n in blank.state_dict()}, f"{p.encoder}'s ViT-B/16")
    return blank


def _file(p: SimpleNamespace, name: str) -> Path:
    """A file of the paper's weights: the parameter `weights`, or the file's default path."""
    entry = next(w for w in paper("ecamp")["weights"] if w["name"] == name)
    path = Path(p.weights) if p.weights else Path(p.data_root) / "weights" / entry["file"]
    if not path.is_file():
        ways = [f"put {entry['file']} into {Path(p.data_root) / 'weights'}; {entry['source']}", "weights = '<file>'"]
        if name != "mae":
            ways.append("encoder = 'random', for an untrained one")
        raise MissingWeights(entry["what"], path.parent, ways)
    return path


def _check(dataset: str, kind: str) -> None:
    """Raises `BadParameter` for a data set without this kind of task."""
    known = [name for name, d in DATASETS.items() if d.task == "xrays" and d.group != "pocket" and kind in tasks(name)]
    if dataset not in known:
        raise BadParameter("dataset", dataset, [*known, "folder"] if kind == "pre-training" else known)


def mask_transform(dataset: str, train: bool, size: int = 224) -> xrays.MaskTransform:
    """The transform of a set for segmentation, as released: on SIIM the mask is not warped with its image, RSNA's masks
    are resized by nearest neighbour, others by area."""
    reduce = "nearest" if dataset == "xrays/rsna" else "area"
    return xrays.MaskTransform(size, train, warp_mask=dataset != "xrays/siim", mask=reduce)


def _splits(p: SimpleNamespace, kind: str) -> dict[str, Dataset]:
    transforms: dict[str, Callable[[bool], Any]] = {
        "classification": lambda train: xrays.train_transform() if train else xrays.test_transform(),
        "segmentation": functools.partial(mask_transform, p.dataset),
        "detection": lambda train: xrays.squeeze_transform(),
    }
    found = {}
    for split in xrays.SPLITS:
        # for detection the authors test on the validation list
        listed = "val" if (kind, split, p.protocol) == ("detection", "test", "released") else split
        options = {"task": kind, "share": p.labels, "transform": transforms[kind](split == "train"), "seed": p.seed}
        found[split] = xrays.load(p.dataset, p.data_root, listed, **options)
    return found


def _generated(p: SimpleNamespace, kind: str) -> dict[str, Dataset]:
    generator = torch.Generator().manual_seed(p.seed)
    classes = len(CLASSES[p.dataset])

    def part(count: int) -> TensorDataset:
        images = torch.randn(count, 3, 224, 224, generator=generator)
        if kind == "classification":
            # positives and negatives of each class: an area under the curve needs both
            numbers = torch.arange(count)
            one = numbers % classes
            labels = one if p.dataset in ONE_OF else (numbers[:, None] + torch.arange(classes)) % 2
            return TensorDataset(images, labels if p.dataset in ONE_OF else labels.float())
        if kind == "segmentation":
            return TensorDataset(images, (torch.rand(count, classes, 224, 224, generator=generator) > 0.7).float())
        boxes = torch.zeros(count, xrays.BOXES, 5)
        boxes[:, 0] = torch.tensor([0, 0.4, 0.5, 0.3, 0.3])
        return TensorDataset(images, boxes)

    return {"train": part(2 * DRY_BATCH), "val": part(2), "test": part(2)}


def _head(p: SimpleNamespace, kind: str) -> nn.Module:
    """The model of a task on its encoder. The authors freeze it; on RIGA, which they also run from random weights, not
    a random one."""
    base, classes = encoder(p), len(CLASSES[p.dataset])
    if kind == "classification":
        return heads.classifier(base, classes, probe=p.task == "linear probe")
    if kind == "segmentation":
        return heads.Segmenter(base, classes, frozen=(p.dataset, p.encoder) != ("fundus/riga", "random"))
    return heads.Detector(base, expansion=EXPANSION[p.labels])


def downstream_learning_rates(numbers: Mapping[str, float], count: int) -> np.ndarray:
    """The learning rate of each of `count` steps: linear warm-up, then half a cosine, which rises again beyond `steps`.

    The authors call the scheduler before the optimiser, so the first step has 1 / warmup_steps of the peak instead of
    0.

    Args:
        numbers: lr, warmup_steps and steps, as of `downstream_recipe`.
    """
    steps, warm = int(numbers["steps"]), int(numbers["warmup_steps"])
    step = 1 + np.arange(count)
    done = (step - warm) / max(1, steps - warm)
    return numbers["lr"] * np.where(step < warm, step / max(1, warm), 0.5 * (1 + np.cos(np.pi * done)))


def downstream_optimizer(task: str, lr: float) -> MakeOptimizer:
    """SGD without weight decay for classification, else AdamW, which decays every trained tensor."""
    if KINDS[task] == "classification":
        return sgd(lr, momentum=MOMENTUM, decay="all")
    return adamw(lr, DECAY, decay="all")


def patience(p: SimpleNamespace) -> int:
    """Epochs without a new best after which a training ends."""
    return 20 if p.dataset == "fundus/riga" and p.encoder != "ECAMP" else PATIENCE.get(p.task, 20)


def selection(p: SimpleNamespace, score: Callable[[nn.Module], float], after: int | None = None) -> EarlyStop:
    """The choice of the epoch, as released: from 0 on, an AUROC, Dice or mAP as high as the best one is a new best, an
    accuracy is not.

    Args:
        score: of the model on validation.
        after: step after which an epoch must end to be validated; None: `FIRST` for detection, else 0.
    """
    ties = not (KINDS[p.task] == "classification" and p.dataset in ONE_OF)
    if after is None:
        after = FIRST[p.labels] if p.task == "detect" and not p.dry_run else 0
    return EarlyStop(score, patience(p), first_step=after + 1, ties=ties, patient_ties=ties, start=0.0)


def downstream_loss(task: str, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch (images, labels, masks or boxes)."""
    images, truth = batch
    if KINDS[task] == "classification":
        return heads.classification_loss(model(images), truth)
    if KINDS[task] == "segmentation":
        return heads.segmentation_loss(model(images).float(), truth)
    return heads.detection_loss([head.float() for head in model(images)], truth, images.shape[-1])


def train(
    p: SimpleNamespace,
    model: nn.Module,
    data: Dataset,
    best: EarlyStop,
    numbers: Mapping[str, float],
    *,
    workers: int = 0,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train a downstream model by the authors' recipe, in place; it ends with the weights selected by `best`.

    An epoch's last images, too few for a batch, are a separate step. As in the authors' code a training ends when the
    patience is exhausted, or when an epoch ends on a multiple of the published steps; beyond these the cosine rises
    again.

    Args:
        best: `selection`.
        numbers: lr, warmup_steps, steps and batch, as of `downstream_recipe`.
    """
    batch = int(numbers["batch"])
    per_epoch = -(-len(data) // batch)
    # the patience stops a training long before; without a limit the schedule may have 10^8 entries
    longest = min(math.lcm(per_epoch, int(numbers["steps"])), BOUND * int(numbers["steps"]))
    return fit(
        model,
        functools.partial(downstream_loss, p.task),
        data,
        epochs=longest / per_epoch,
        batch=batch,
        optimizer=downstream_optimizer(p.task, numbers["lr"]),
        schedule=given(downstream_learning_rates(numbers, longest)),
        callbacks=[ClipNorm(CLIP), best],
        checkpoint=checkpoint,
        seed=p.seed,
        hardware=Hardware.of(p, "ecamp", workers=workers),
        last="train",
        name=p.task,
    )


def _learn(
    p: SimpleNamespace,
    out: Path,
    model: nn.Module,
    *,
    data: Mapping[str, Dataset],
    score: Callable[[nn.Module, Dataset], float],
    numbers: Mapping[str, float],
) -> History:
    """`train` on the data of a task, with its checkpoint and final weights below `out`."""
    val = functools.cache(lambda: _held(data["val"], 0 if p.dry_run else WORKERS))
    best = selection(p, lambda one: score(one, val()))
    if p.dry_run:
        return train(p, model, data["train"], best, numbers)
    name = f"{p.task}, {p.dataset}, {p.labels} %, {p.encoder}, {p.protocol} protocol, seed {p.seed}"
    facts = {key: getattr(p, key) for key in ("task", "dataset", "labels", "protocol", "encoder")}
    checkpoint = Checkpoint.of(out / "checkpoints", name, model=model, data_root=Path(p.data_root), **facts)
    history = train(p, model, data["train"], best, numbers, workers=WORKERS, checkpoint=checkpoint)
    checkpoints.save(out / "trained", name, getattr(model, "to_official", model.state_dict)())
    return history


def _held(part: Dataset, workers: int) -> Dataset:
    """Validation data in memory; of grey images one of the three equal channels as float32, 0.2 MB: 1.1 GB for RSNA.

    Data larger than `HELD` bytes are returned unchanged and decoded again at each validation.
    """
    image, truth = part[0]
    channels = 3 if getattr(part, "colour", False) else 1
    if isinstance(part, TensorDataset) or len(part) * (image[:channels].nbytes + truth.nbytes) > HELD:
        return part
    images, truths = image.new_empty(len(part), channels, *image.shape[1:]), truth.new_empty(len(part), *truth.shape)
    for i, (some, labels) in enumerate(DataLoader(part, TEST_BATCH, num_workers=workers)):
        images[i * TEST_BATCH :][: len(some)], truths[i * TEST_BATCH :][: len(some)] = some[:, :channels], labels
    return TensorDataset(images, truths)


@torch.no_grad()
def _outputs(p: SimpleNamespace, model: nn.Module, part: Dataset) -> Iterator[tuple[object, Tensor]]:
    """Outputs and labels, batch by batch, on the CPU. Afterwards the model is on its former device."""
    batch, workers = (2, 0) if p.dry_run else (TEST_BATCH, 0 if isinstance(part, TensorDataset) else WORKERS)
    with evaluating(Hardware.of(p, "ecamp"), model) as device:
        for images, truth in DataLoader(part, batch, num_workers=workers, pin_memory=device.type == "cuda"):
            found = model(images.to(device, non_blocking=True).expand(-1, 3, -1, -1).contiguous())
            yield [x.float().cpu() for x in found] if isinstance(found, (list, tuple)) else found.float().cpu(), truth


def _classified(p: SimpleNamespace, model: nn.Module, part: Dataset) -> float:
    logits, truth = (torch.cat(parts) for parts in zip(*_outputs(p, model, part), strict=True))
    return classification_score(logits, truth)


def classification_score(logits: Tensor, truth: Tensor) -> float:
    """In percent: accuracy for class indices (n,), the mean AUROC of the classes for labels (n, classes)."""
    if truth.ndim == 1:
        return 100 * float((logits.argmax(1) == truth).float().mean())
    return radiology.mean_auroc(truth, logits)


def _segmented(p: SimpleNamespace, model: nn.Module, part: Dataset) -> float:
    """Dice in percent, averaged over images, then over the structures to segment."""
    each = [image_dice(logits, truth, p.protocol) for logits, truth in _outputs(p, model, part)]
    return 100 * float(torch.cat(each, 1).nanmean(1).mean())


def image_dice(logits: Tensor, truth: Tensor, protocol: str = "released") -> Tensor:
    """Dice (structures, n) of logits and masks (n, structures, S, S), see `radiology.dice`."""
    pairs = zip(logits.sigmoid().unbind(1), truth.unbind(1), strict=True)
    return torch.stack([radiology.dice(one, mask, protocol) for one, mask in pairs])


def _detected(p: SimpleNamespace, model: heads.Detector, part: Dataset) -> float:
    found, boxes = [], []
    for outputs, truth in _outputs(p, model, part):
        found += model.decode(outputs)
        boxes.append(truth)
    return detection_score(found, torch.cat(boxes), model.size, p.protocol)


def detection_score(found: list[Tensor], truth: Tensor, size: int, protocol: str = "released") -> float:
    """mAP in percent of what `heads.suppress` found; nan if the protocol excludes all images."""
    scored = (truth[..., 3] > 0).any(1)
    if protocol == "released":
        scored &= torch.tensor([len(image) > 0 for image in found])
    return radiology.mean_precision(found, truth, size, protocol) if scored.any() else float("nan")


# --- results ----------------------------------------------------------------------------------------------------------

KEYS = ["task", "dataset", "labels", "encoder", "protocol", "seed"]
_TABLES = {
    "fine-tune": "classification-finetune",
    "linear probe": "classification-linear",
    "segment": "segmentation",
    "detect": "detection",
}


def measured(path: Path, *new: Mapping[str, Any]) -> pd.DataFrame:
    """The scores on real data in the CSV `path`; `new` rows, `KEYS` and "score", are added or replace equal ones."""
    # a CSV reads "10" as a number
    return upsert_rows(path, KEYS, ["score"], [{**row, "labels": int(row["labels"])} for row in new])


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (row, column) of a published table; of the published protocol only."""
    found = {}
    own = {title: name for name, title in TITLES.items() if name != "xrays/chestmnist"}
    rows = rows[rows.protocol == "released"]
    for (task, dataset, labels, start), group in rows.groupby(["task", "dataset", "labels", "encoder"]):
        fundus = dataset.startswith("fundus/")
        if (table == "fundus") != fundus or (not fundus and _TABLES.get(task) != table):
            continue
        title = TITLES.get(dataset, dataset)
        if own.get(title) == dataset:
            name = "random init" if start == "random" else start
            found[name, f"{title} {labels} %"] = float(group.score.mean())
    return found


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The measurements that judge paper results: `cells` of all tables, with the task before the column's name."""
    tasks = {"classification-finetune": "fine-tuned", "classification-linear": "linear probe"}
    return {
        (method, f"{tasks.get(table, table)}, {column}"): value
        for table in _TABLES.values()
        for (method, column), value in cells(rows, table).items()
    }


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    r = recipe()
    crops = [
        "{:.0%} to {:.0%} of the image".format(*transform.transforms[0].scale)
        for transform in (xrays.pretrain_transform(), xrays.train_transform())
    ]
    warp = xrays.MaskTransform(train=True).warp.transforms[0]
    first = ", ".join(f"{step} ({share} %)" for share, step in FIRST.items())
    return {
        "pre-training, optimiser": f"AdamW, betas {r['beta1']:g} and {r['beta2']:g}, learning rate {r['lr']:g}, decay "
        f"{r['weight_decay']:g} on matrices, no clipping",
        "pre-training, schedule": f"warm-up of {r['warmup_epochs']:g} epochs, cosine to epoch "
        f"{r['cosine_end_epoch']:g}, stopped at {r['stop_epoch']:g}",
        "pre-training, batch": f"{r['effective_batch']:,.0f} pairs: {r['gpus']:g} devices x {r['batch_per_gpu']:g} x "
        f"{r['accumulation']:g} iterations; the remainder of an epoch is dropped",
        "pre-training, images": f"{r['high_resolution']:g} pixels (the encoder sees {r['low_resolution']:g}); crop of "
        f"{crops[0]}, flip; mean {xrays.PRETRAIN_MEAN}, std {xrays.PRETRAIN_STD}; the words left and right stay",
        "pre-training, text": f"{r['text_length']:g} tokens; statements inserted with {SPLICED:g}; hidden: entities "
        f"{ENTITY:g}, other words {OTHER:g}, words of a text without entities {NO_ENTITY:g}",
        "precision": f"{paper('ecamp')['precision']} on a GPU",
        "classification": f"SGD, momentum {MOMENTUM:g}, no decay; crop of {crops[1]}, flip; test: short side to 224, "
        f"centre crop; mean {xrays.MEAN}, std {xrays.STD}",
        "segmentation": f"AdamW, decay {DECAY:g} on all tensors; encoder frozen; scale x {warp.scale[0]:g} to "
        f"{warp.scale[1]:g} and rotation up to {warp.degrees[1]:g} degrees, p {xrays.MaskTransform().warp.p:g}",
        "detection": f"AdamW, decay {DECAY:g} on all tensors; encoder frozen; no augmentation; bottlenecks reduced by "
        + ", ".join(f"{e} ({share} %)" for share, e in EXPANSION.items()),
        "resizing downstream": "segmentation and detection without antialiasing; masks of RSNA nearest, others by area",
        "schedule downstream": "linear warm-up, cosine; the first step has 1 / warm-up steps of the peak; "
        "learning rates, steps and batches in the tables above",
        "clipping downstream": f"norm of the gradient {CLIP:g}",
        "last batch downstream": "the last images of an epoch are a smaller batch",
        "selection": "best AUROC, accuracy, Dice or mAP on validation, after each epoch; of equal ones the later, but "
        f"for accuracy; detection from the first epoch that ends after step {first}",
        "stopping": f"{patience(_usual('fine-tune'))} epochs without a new best (segmentation "
        f"{patience(_usual('segment'))}; RIGA {patience(_usual('segment', 'MRM'))} for other encoders), or an epoch "
        "that ends on a multiple of the steps",
        "metrics": f"mean AUROC of the classes; accuracy for {' and '.join(TITLES[name] for name in ONE_OF)}; Dice at "
        f"0.5; mAP at IoU {radiology.IOUS[0]:.2f} to {radiology.IOUS[-1]:.2f}",
        "detection's test split": 'the validation list (protocol = "released")',
        "devices": "pre-training on several, downstream tasks on one",
        "seeds": "the authors: 42, one run; sweep: none found; four A100, about 15 h of pre-training (their issue 6)",
    }


def _usual(task: str, encoder: str = "ECAMP") -> SimpleNamespace:
    return SimpleNamespace(task=task, encoder=encoder, dataset="fundus/riga" if task == "segment" else "xrays/rsna")


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The paper's tables by title, each cell with the published number and, after the slash, our measurement."""
    ids = ("classification-finetune", "classification-linear", "segmentation", "detection", "fundus")
    return with_measured("ecamp", {table: cells(rows, table) for table in ids})
