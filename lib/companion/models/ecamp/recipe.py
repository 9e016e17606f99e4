"""ECAMP's `paper` profile: pre-training and the downstream tasks by the authors' recipes.

A training writes its checkpoint below `<out>/checkpoints`, from which it resumes, and its weights to `<out>/trained`.

`p` are the notebook's checked parameters, explained in paper.yaml. All functions read `dry_run`, `seed`, `data_root`,
`weights` and what `Hardware.of` reads; pre-training `dataset` and `method`; downstream tasks `task`, `dataset`,
`labels`, `encoder`, `protocol` and `devices`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, xrays
from ...data.xrays_sets import CLASSES, ONE_OF, tasks
from ...errors import BadParameter, MissingWeights, check_choice
from ...evaluation.metrics import radiology
from ...evaluation.tables import Results, published_table
from ...ops import papers
from ...ops.files import atomic
from ...training.callbacks import ClipNorm, EarlyStop
from ...training.checkpoints import checkpoint_key
from ...training.fit import Hardware, evaluating
from ...training.recipe import Training
from ...training.schedules import MakeOptimizer, adamw, given, sgd
from . import detection, heads, official, text
from . import model as ecamp
from .model import ECAMP
from .text import Pairs, Vocabulary
from .variants import METHODS

WORKERS = min(16, os.cpu_count() or 1)
DRY_BATCH = 2
TEST_BATCH = 64
HELD = 4 * 2**30  # bytes of validation images and labels

RESULTS = Results.of("ecamp")
TITLES = RESULTS.names["dataset"]  # of the data sets, in the tables


# --- pre-training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A pre-training.

    Attributes:
        title: of the data.
        pairs: training data of a method: items are `model.Batch` without the B.
        training: of a method; its losses are "mim", "sr" and "mlm".
    """

    title: str
    pairs: Callable[[str], Pairs]
    training: Callable[[str], Training]


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The pre-training of a run, which may save a vocabulary in its folder `out`; in a dry run, on generated pairs.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    if p.dataset != "folder":
        _check(p.dataset, "pre-training")
    title, words, pairs, facts = _generated_pairs(p) if p.dry_run else _pairs(p, out)

    def build(method: str) -> ECAMP:
        torch.manual_seed(p.seed)
        kind, options, _ = METHODS[method]
        model = kind.build("paper", words=len(words), **options)
        if not p.dry_run:
            model.load_mae(backbones.read_state(_file(p, "mae")))
        return model

    def training(method: str) -> Training:
        data, r = pairs(method), published()
        options = pretraining_fit(p, len(data), r)
        if p.dry_run:
            options |= {"schedule": given(np.full(2, r["lr"])), "epochs": 2 * DRY_BATCH / len(data), "batch": DRY_BATCH}
            options["hardware"] = Hardware.of(p, "ecamp")
        return Training(
            name=f"{method}, {p.dataset}, seed {p.seed}",
            build=lambda: build(method),
            loss=ecamp.pretraining_loss,
            data=lambda: data,
            fit=options,
            facts={"method": method, **facts},
            weights=methodcaller("to_official"),
        )

    return Setting(title, pairs, training)


def published(**changes: float) -> dict[str, float]:
    """The hyper-parameters of pre-training in the authors' scripts (the paper's YAML), but for `changes`."""
    return published_table("ecamp", "recipe-pretraining").set_index("method")["value"].to_dict() | changes


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
        r: `published()`; gpus, batch_per_gpu and accumulation are read.
    """
    gpus, accumulation = int(r["gpus"]), int(r["accumulation"])
    iterations = -(-images // gpus) // int(r["batch_per_gpu"])
    batch = gpus * int(r["batch_per_gpu"]) * accumulation
    steps = min(iterations // accumulation, images // batch)
    return PretrainingEpoch(iterations, steps, batch) if steps else PretrainingEpoch(accumulation, 1, images)


def pretraining_learning_rates(images: int, r: Mapping[str, float]) -> np.ndarray:
    """The learning rate of each step: linear warm-up, then a cosine to epoch 200 that stops at epoch 120.

    As released, the epoch at step k is counted in the loader's iterations, accumulation * k / iterations: with
    remaining iterations it does not quite reach its end.

    Args:
        images: of the training set.
        r: `published()`.
    """
    cut = pretraining_epoch(images, r)
    within = np.arange(cut.steps) * int(r["accumulation"]) / cut.iterations
    epoch = (np.arange(int(r["stop_epoch"]))[:, None] + within).ravel()
    falling = 0.5 * (1 + np.cos(np.pi * (epoch - r["warmup_epochs"]) / (r["cosine_end_epoch"] - r["warmup_epochs"])))
    return r["lr"] * np.where(epoch < r["warmup_epochs"], epoch / r["warmup_epochs"], falling)


def pretraining_optimizer(r: Mapping[str, float]) -> MakeOptimizer:
    """AdamW; matrices decay ([CLS] token, mask token and word positions among them), vectors and biases do not."""
    return adamw(r["lr"], r["weight_decay"], betas=(r["beta1"], r["beta2"]))


def pretraining_fit(p: SimpleNamespace, pairs: int, r: Mapping[str, float], micro_batch: int = 64) -> dict[str, Any]:
    """The arguments of `fit` for the authors' pre-training on a number of pairs.

    Args:
        r: `published()`.
        micro_batch: pairs that a device processes at once; the gradients of a step are accumulated. The 16,384
            positions of 64 have 2 GB of logits over 30,000 words, and the same for gradients.
    """
    batch, learning_rates = pretraining_epoch(pairs, r).batch, pretraining_learning_rates(pairs, r)
    accumulate = math.ceil(batch / (p.devices * micro_batch))
    return {
        "epochs": len(learning_rates) / (pairs // batch),
        "batch": batch,
        "optimizer": pretraining_optimizer(r),
        "schedule": given(learning_rates),
        "seed": p.seed,
        "hardware": Hardware.of(p, "ecamp", workers=WORKERS, accumulate=accumulate),
    }


def _pairs(p: SimpleNamespace, out: Path) -> tuple[str, Vocabulary, Callable[[str], Pairs], dict[str, Any]]:
    """Title, vocabulary, pairs by method, and the identity of the data; "folder": `data_root` itself.

    A learned vocabulary is saved in `out`: relearned from the same reports it would have other ids.
    """
    dataset = xrays.own(p.data_root) if p.dataset == "folder" else DATASETS[p.dataset]
    reports = xrays.reports(dataset, p.data_root, xrays.pretrain_transform())
    stored = dataset.folder(p.data_root) / "mimic_wordpiece.json"
    if not stored.is_file():
        stored = out / f"vocabulary {checkpoint_key(texts=reports.texts)}.json"
    if not stored.is_file():
        with atomic(stored) as temporary:
            Vocabulary.train(reports.texts).tokenizer.save(str(temporary))
    words, windows = Vocabulary.read(stored), reports.windows
    if windows is not None and not (windows.min() >= 0 and windows.max() <= 14 - 12):
        corners = f"corners of {windows.min()} to {windows.max()}"
        raise BadParameter("windows", corners, "0 to 2: a window has 12 of the 14 patches of a side")

    def pairs(method: str) -> Pairs:
        options: dict[str, Any] = {"statements": reports.statements, "windows": windows} | METHODS[method][2]
        return Pairs(reports.images, reports.texts, words, **options)

    facts = {"data_root": Path(p.data_root), "images": reports.images.paths, "vocabulary": words.pieces}
    facts |= {"texts": reports.texts, "statements": reports.statements, "windows": windows}
    return f"{p.dataset}, {len(reports.texts):,} images", words, pairs, facts


def _generated_pairs(p: SimpleNamespace) -> tuple[str, Vocabulary, Callable[[str], Pairs], dict[str, Any]]:
    """As `_pairs`, of the real shape, with as many words as MIMIC's vocabulary: the model has the published size."""
    generator = torch.Generator().manual_seed(p.seed)
    images = torch.randn(2 * DRY_BATCH, 3, 448, 448, generator=generator)
    reports = ["There is a small right effusion. There is no evidence of pneumothorax."] * len(images)
    words = Vocabulary.train(reports, 200)
    words.pieces += ["[UNK]"] * (30_000 - len(words))

    def pairs(method: str) -> Pairs:
        options: dict[str, Any] = {"statements": ["There is effusion."] * len(images)} | METHODS[method][2]
        return Pairs(images, reports, words, **options)

    return "generated pairs (dry run: the losses mean nothing)", words, pairs, {}


# --- downstream: task, model, data ------------------------------------------------------------------------------------

KINDS = {
    "fine-tune": "classification",
    "linear probe": "classification",
    "segment": "segmentation",
    "detect": "detection",
}
RECIPES = {
    "fine-tune": "recipe-finetune",
    "linear probe": "recipe-linear",
    "segment": "recipe-segmentation",
    "detect": "recipe-detection",
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
        training: ends with the weights that were best on "val".
        score: of a model and a split.
        recipe: lr, warmup_steps, steps, batch.
    """

    title: str
    metric: str
    data: dict[str, Dataset]
    training: Training
    score: Callable[[nn.Module, Dataset], float]
    recipe: dict[str, float]


def downstream(p: SimpleNamespace) -> Downstream:
    """The downstream task of a run; in a dry run two steps on generated images.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    check_choice("task", p.task, KINDS)
    if p.devices > 1:
        accepted = "1: only pre-training runs on several; Dice and BatchNorm need the whole batch"
        raise BadParameter("devices", p.devices, accepted)
    kind = KINDS[p.task]
    _check(p.dataset, kind)
    numbers = downstream_recipe(p.task, p.dataset, p.labels)
    title = f"{p.task} on {p.dataset}, {p.labels} % of the labels"
    if p.dry_run:
        numbers |= {"batch": DRY_BATCH, "steps": 2, "warmup_steps": 0}
        title = f"{p.task}, generated images for {p.dataset} (dry run: the score means nothing)"
    data = _generated(p, kind) if p.dry_run else _splits(p, kind)
    score, metric = {
        "classification": (functools.partial(_classified, p), "accuracy" if p.dataset in ONE_OF else "AUROC"),
        "segmentation": (functools.partial(_segmented, p), f"Dice ({p.protocol})"),
        "detection": (functools.partial(_detected, p), f"mAP ({p.protocol})"),
    }[kind]
    val = functools.cache(lambda: _held(data["val"], 0 if p.dry_run else WORKERS))
    facts = {key: getattr(p, key) for key in ("task", "dataset", "labels", "protocol", "encoder")}
    training = Training(
        name=f"{p.task}, {p.dataset}, {p.labels} %, {p.encoder}, {p.protocol} protocol, seed {p.seed}",
        build=functools.partial(_head, p, kind),
        loss=functools.partial(downstream_loss, p.task),
        data=lambda: data["train"],
        fit=downstream_fit(p, len(data["train"]), selection(p, lambda model: score(model, val())), numbers),
        facts={"data_root": Path(p.data_root), **facts},
        weights=lambda model: getattr(model, "to_official", model.state_dict)(),
    )
    return Downstream(title, metric, data, training, score, numbers)


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


def encoder(p: SimpleNamespace) -> VisionTransformer:
    """The ViT-B/16 of the parameter `encoder`, with the weights of `weights` or of `<data_root>/weights`, or random."""
    torch.manual_seed(p.seed)
    blank = VisionTransformer(img_size=224, num_classes=0, global_pool="")
    if p.encoder == "random" or p.dry_run:
        return blank
    official.load_vit(blank, backbones.read_state(_file(p, p.encoder.lower())), f"{p.encoder}'s ViT-B/16")
    return blank


def _file(p: SimpleNamespace, name: str) -> Path:
    """A file of the paper's weights: the parameter `weights`, or the file's default path."""
    entry = next(w for w in papers.paper("ecamp")["weights"] if w["name"] == name)
    path = Path(p.weights) if p.weights else Path(p.data_root) / "weights" / entry["file"]
    if not path.is_file():
        ways = [f"put {entry['file']} into {Path(p.data_root) / 'weights'}; {entry['source']}", "weights = '<file>'"]
        if name != "mae":
            ways.append("encoder = 'random', for an untrained one")
        raise MissingWeights(entry["what"], path.parent, ways)
    return path


def _head(p: SimpleNamespace, kind: str) -> nn.Module:
    """The model of a task on its encoder. The authors freeze it; on RIGA, which they also run from random weights, not
    a random one."""
    base, classes = encoder(p), len(CLASSES[p.dataset])
    if kind == "classification":
        return heads.classifier(base, classes, probe=p.task == "linear probe")
    if kind == "segmentation":
        return heads.Segmenter(base, classes, frozen=(p.dataset, p.encoder) != ("fundus/riga", "random"))
    return detection.Detector(base, expansion=EXPANSION[p.labels])


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
    data = {}
    for split in xrays.SPLITS:
        # for detection the authors test on the validation list
        listed = "val" if (kind, split, p.protocol) == ("detection", "test", "released") else split
        options = {"task": kind, "share": p.labels, "transform": transforms[kind](split == "train"), "seed": p.seed}
        data[split] = xrays.load(p.dataset, p.data_root, listed, **options)
    return data


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


# --- downstream: loss, optimiser, schedule, selection -----------------------------------------------------------------


def downstream_loss(task: str, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch (images, labels, masks or boxes)."""
    images, truth = batch
    if KINDS[task] == "classification":
        return heads.classification_loss(model(images), truth)
    if KINDS[task] == "segmentation":
        return heads.segmentation_loss(model(images).float(), truth)
    return detection.detection_loss([head.float() for head in model(images)], truth, images.shape[-1])


def downstream_optimizer(task: str, lr: float) -> MakeOptimizer:
    """SGD without weight decay for classification, else AdamW, which decays every trained tensor."""
    if KINDS[task] == "classification":
        return sgd(lr, momentum=MOMENTUM, decay="all")
    return adamw(lr, DECAY, decay="all")


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


def patience(task: str, dataset: str, encoder: str) -> int:
    """Epochs without a new best after which a training ends."""
    return 20 if dataset == "fundus/riga" and encoder != "ECAMP" else PATIENCE.get(task, 20)


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
    epochs = patience(p.task, p.dataset, p.encoder)
    return EarlyStop(score, epochs, first_step=after + 1, ties=ties, patient_ties=ties, start=0.0)


def downstream_fit(p: SimpleNamespace, images: int, best: EarlyStop, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of `fit` for a downstream training on a number of images, which ends with the weights of `best`.

    An epoch's last images, too few for a batch, are a separate step. As in the authors' code a training ends when the
    patience is exhausted, or when an epoch ends on a multiple of the published steps; beyond these the cosine rises
    again.

    Args:
        best: `selection`.
        numbers: lr, warmup_steps, steps and batch, as of `downstream_recipe`.
    """
    batch = int(numbers["batch"])
    per_epoch = -(-images // batch)
    # the patience stops a training long before; without a limit the schedule may have 10^8 entries
    longest = min(math.lcm(per_epoch, int(numbers["steps"])), BOUND * int(numbers["steps"]))
    return {
        "epochs": longest / per_epoch,
        "batch": batch,
        "last": "train",
        "optimizer": downstream_optimizer(p.task, numbers["lr"]),
        "schedule": given(downstream_learning_rates(numbers, longest)),
        "callbacks": [ClipNorm(CLIP), best],
        "seed": p.seed,
        "hardware": Hardware.of(p, "ecamp", workers=WORKERS),
    }


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


# --- downstream: test -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _outputs(p: SimpleNamespace, model: nn.Module, part: Dataset) -> Iterator[tuple[Any, Tensor]]:
    """Outputs and labels, batch by batch, on the CPU. Afterwards the model is on its former device."""
    batch, workers = (2, 0) if p.dry_run else (TEST_BATCH, 0 if isinstance(part, TensorDataset) else WORKERS)
    with evaluating(Hardware.of(p, "ecamp"), model) as device:
        for images, truth in DataLoader(part, batch, num_workers=workers, pin_memory=device.type == "cuda"):
            out = model(images.to(device, non_blocking=True).expand(-1, 3, -1, -1).contiguous())
            yield [x.float().cpu() for x in out] if isinstance(out, (list, tuple)) else out.float().cpu(), truth


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


def _detected(p: SimpleNamespace, model: detection.Detector, part: Dataset) -> float:
    boxes, truths = [], []
    for outputs, truth in _outputs(p, model, part):
        boxes += model.decode(outputs)
        truths.append(truth)
    return detection_score(boxes, torch.cat(truths), model.size, p.protocol)


def detection_score(boxes: list[Tensor], truth: Tensor, size: int, protocol: str = "released") -> float:
    """mAP in percent of what `detection.suppress` returned; nan if the protocol excludes all images."""
    scored = (truth[..., 3] > 0).any(1)
    if protocol == "released":
        scored &= torch.tensor([len(image) > 0 for image in boxes])
    return radiology.mean_precision(boxes, truth, size, protocol) if scored.any() else float("nan")


# --- protocol ---------------------------------------------------------------------------------------------------------


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    warp = xrays.MaskTransform(train=True).warp
    riga = [patience("segment", "fundus/riga", start) for start in ("ECAMP", "MRM")]
    return papers.protocol(
        "ecamp",
        r=published(),
        pretraining_crop=xrays.pretrain_transform().transforms[0].scale,
        crop=xrays.train_transform().transforms[0].scale,
        warp=warp.transforms[0],
        warped=warp.p,
        precision=papers.paper("ecamp")["precision"],
        first=[*FIRST.values()],
        expansion=[*EXPANSION.values()],
        patience=[patience("fine-tune", "xrays/rsna", "ECAMP"), *riga],
        one_of=" and ".join(TITLES[name] for name in ONE_OF),
        ious=(radiology.IOUS[0], radiology.IOUS[-1]),
        clip=CLIP,
        momentum=MOMENTUM,
        decay=DECAY,
        text=text,
        xrays=xrays,
    )
