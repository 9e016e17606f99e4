"""DMT (a reconstruction): the `paper` profile, distillation and downstream tasks with the ancestors' settings."""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from ...backbones import read_state
from ...data import few, find, present, pretraining
from ...data.coco import read_annotations
from ...data.images import as_float
from ...data.pretraining import COCO, IMAGENET
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics import accuracy, detection, landcover
from ...evaluation.tables import Cells, Results, published_table, with_measured
from ...io import papers
from ...training import checkpoints
from ...training.fit import Loss, outputs_of
from ...training.hardware import Hardware, RunParameters, apart, device
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import adamw, learning_rates, schedule, sgd
from . import cache as dmt_cache
from . import downstream as down
from . import official, vit
from .model import DMT, Teachers, loss
from .vit import NORMALISE, ViT, test_transform

WORKERS = 16
MICRO_BATCH = 256  # micro-batch of a device; the gradients of a step are accumulated
LOSSES = {"token and map": (1, 1), "token": (1, 0), "map": (0, 1)}  # weights of token and feature-map loss
USUAL = papers.paper("dmt")["parameters"]["dataset"]["usual"]  # the data set of each task
SIZES = {"detect": 1024, "segment": 512}  # sides of training crops, in pixels
CLASSES = {"fine-tune": 1000, "linear probe": 1000, "detect": 80, "segment": 150}
CROP = (0.2, 1.0)  # share of an image's area in a crop of distillation
DROPS = (163_889, 177_546)  # of 184,375 steps, those at which a detector's learning rate falls to a tenth
TEST_BATCH = 8  # images per batch of a detector's test
# choices of the reconstruction, with their defaults; cached: one fixed crop of each image in all epochs
CHOICES = {"target_norm": "channel", "losses": "token and map", "mask_ratio": 0.75, "cached": False}
DISTILLED = ("student", "teachers", *CHOICES)  # the parameters that a student's file records
TABLES = {
    "imagenet": {"top-1": "imagenet_top1"},
    "coco": {"box AP": "box_ap", "mask AP": "mask_ap"},
    "ade20k": {"mIoU": "miou"},
}


class Parameters(RunParameters, Protocol):
    """The parameters of the notebook that the recipe reads, see paper.yaml."""

    task: str
    dataset: str
    encoder: str
    student: str
    teachers: str
    teacher_files: str
    target_norm: str
    losses: str
    mask_ratio: float
    cached: bool


class Result(NamedTuple):
    """What a run of the `paper` profile trained.

    Attributes:
        title: of the data, and the file of a distilled student, for the parameter `weights`.
        table: columns task, steps, metric, value; of a distillation its last loss.
        student, teachers: of a distillation, the teachers by name.
    """

    title: str
    table: pd.DataFrame
    student: ViT | None
    teachers: dict[str, ViT]


class Stage(NamedTuple):
    """A task of a run: its parameters, the title of its data, its training, and of a downstream one the scores."""

    p: Parameters
    title: str
    ready: Opened
    score: Score | None


def prepare(p: Parameters, out: Path) -> list[Stage]:
    """The tasks of a run, each with its data, model and checkpoint: what a run reads is opened, nothing is computed.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    stages = []
    splits = ("train",) if p.task == "distil" else ("train", "test")
    real = not p.dry_run or present(p.dataset or USUAL[p.task], p.data_root, *splits)
    for task in [p.task] if real else USUAL:
        chosen: Any = SimpleNamespace(**vars(p) | {"task": task, "dataset": p.dataset if task == p.task else ""})
        title, training, score = distillation(chosen, out, real) if task == "distil" else downstream(chosen, out, real)
        stages.append(Stage(chosen, title, opened(training, out), score))
    return stages


def run(p: Parameters, out: Path) -> Result:
    """Train `p.task`, and test a downstream one: its scores become rows of `out`/measured.csv.

    A stopped training resumes from `out`/checkpoints, the final weights are in `out`/trained. A dry run takes two steps
    on a few images of the dataset, or of every task on generated ones where it is not below `data_root`. Raises as
    `prepare`.
    """
    titles, rows, student, taught_by = [], [], None, {}
    for chosen, title, ready, score in prepare(p, out):
        model, history = train(ready)
        if score is None:
            # a model whose teachers' tokens are cached has none
            student, taught_by = model.export(), dict((model.teachers or teachers(p)).models.items())
            # the parameter `weights` of the downstream tasks
            title += f"; the student is {checkpoints.file(out / 'trained', ready.training.name, '.safetensors')}"
            scores = {"last loss": history[-1]["loss"]}
        else:
            scores = score(model)
            settings = {name: getattr(chosen, name) for name in ("task", "encoder", "seed", *DISTILLED)}
            new = (settings | {"metric": metric, "score": value} for metric, value in scores.items())
            RESULTS.measured(out / "measured.csv", *new, dry_run=p.dry_run)
        titles.append(title)
        rows += [(chosen.task, len(history), metric, value) for metric, value in scores.items()]
    return Result(
        "\n".join(titles), pd.DataFrame(rows, columns=["task", "steps", "metric", "value"]), student, taught_by
    )


# --- settings ---------------------------------------------------------------------------------------------------------


def published(task: str) -> dict[str, float]:
    """The settings of a task in the paper's YAML, G2SD's and MAE's."""
    row = published_table("dmt", "recipe").set_index("method").loc[task]
    return {name: float(value) for name, value in row.items() if not np.isnan(value)}


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row. DMT's own were not found: these are its ancestors'."""
    distil, fine_tune, linear_probe, detect, segment = (published(task) for task in USUAL)
    low, high = (100 * share for share in CROP)
    precision = papers.paper("dmt")["precision"]
    return {
        "source": "DMT's own settings were not found; distillation and dense tasks as G2SD, fine-tuning as MAE",
        "distillation": (
            f"AdamW, betas 0.9 and {distil['beta2']:g}, {distil['lr']:g} for batch {distil['batch']:g}, decay "
            f"{distil['weight_decay']:g}; {distil['warmup_epochs']:g} epochs of warm-up, cosine to "
            f"{distil['final_lr']:g}, {distil['epochs']:g} epochs"
        ),
        "distillation, images": f"crop of {low:.0f} to {high:.0f} % to 224, bicubic, flip; ImageNet's mean and std",
        "distillation, losses": "smooth L1 on tokens and feature maps, targets standardised by channel (ours)",
        "fine-tuning": (
            f"AdamW, betas 0.9 and {fine_tune['beta2']:g}, {fine_tune['lr']:g} for batch {fine_tune['batch']:g}, "
            f"decay {fine_tune['weight_decay']:g}, layer decay {fine_tune['layer_decay']:g}; "
            f"{fine_tune['warmup_epochs']:g} epochs of warm-up, cosine to {fine_tune['final_lr']:g}, "
            f"{fine_tune['epochs']:g} epochs; drop path {fine_tune['drop_path']:g}"
        ),
        "fine-tuning, images": (
            f"{down.RAND_AUGMENT}, erasing {down.ERASING:g}, mixup {down.MIXUP:g}, cutmix {down.CUTMIX:g}, smoothing "
            f"{down.SMOOTHING:g}"
        ),
        "linear probe": (
            f"SGD with momentum, {linear_probe['lr']:g} for batch {linear_probe['batch']:g}; "
            f"{linear_probe['warmup_epochs']:g} epochs of warm-up, cosine to {linear_probe['final_lr']:g}, "
            f"{linear_probe['epochs']:g} epochs (ours)"
        ),
        "detection": (
            f"Mask R-CNN on a simple pyramid, {SIZES['detect']} pixels; AdamW, betas 0.9 and {detect['beta2']:g}, "
            f"{detect['lr']:g} for batch {detect['batch']:g}, decay {detect['weight_decay']:g}, layer decay "
            f"{detect['layer_decay']:g}; {detect['steps']:,.0f} steps, x 0.1 at {DROPS[0]:,} and {DROPS[1]:,}"
        ),
        "segmentation": (
            f"UPerNet, {SIZES['segment']} pixels; AdamW, betas 0.9 and {segment['beta2']:g}, {segment['lr']:g} for "
            f"batch {segment['batch']:g}, decay {segment['weight_decay']:g}, layer decay {segment['layer_decay']:g}; "
            f"{segment['steps']:,.0f} steps, linear to {segment['final_lr']:g}"
        ),
        "last images of an epoch": "left out, too few for a batch; others in each epoch",
        "precision": f"{precision} on a GPU (ours)",
        "test images": "short side 256, centre crop of 224, bicubic",
        "selection": "the last step, everywhere; MAE's code reports the best epoch on the test set",
        "seeds": "the parameter seed; how many runs the paper averages was not found",
        "sweep": "none found",
        "metric": "top-1; box and mask AP; mIoU",
    }


def _hardware(p: Parameters, batch: int = 1, micro_batch: int = MICRO_BATCH) -> Hardware:
    return Hardware.of(p, "dmt", workers=WORKERS, accumulate=-(-batch // (p.devices * micro_batch)))


def _facts(p: Parameters) -> dict[str, Any]:
    """The parameters that determine a training; files of weights are hashed by their tensors."""
    names = ("seed", "dataset", *DISTILLED)
    return {name: getattr(p, name) for name in names} | {"data_root": Path(p.data_root)}


# --- distillation by the ancestors' settings --------------------------------------------------------------------------


def teacher(p: Parameters, name: str) -> ViT:
    """A teacher of the parameters: from its file or the cache, without which a dry run's is random."""
    entries = [entry.partition("=") for entry in p.teacher_files.split(",") if entry.strip()]
    files = {key.strip(): path.strip() for key, _, path in entries}
    if unused := files.keys() - p.teachers.split(", "):
        raise BadParameter("teacher_files", sorted(unused), f"name=file, the name one of {p.teachers} (`teachers`)")
    torch.manual_seed(p.seed + zlib.crc32(name.encode()))  # random teachers differ from each other
    try:
        return official.released(name, files.get(name, "pretrained"))
    except MissingWeights:
        if not p.dry_run:
            raise
        print(f"{name}: its weights are not here; random ones in this dry run")
        return official.released(name, "random")


def teachers(p: Parameters) -> Teachers:
    """The teachers of the parameters `teachers` and `teacher_files`."""
    return Teachers({name: teacher(p, name) for name in p.teachers.split(", ")})


def build(p: Parameters, taught_by: Teachers) -> DMT:
    """Student, adapters and decoder of random weights, drawn from the seed."""
    torch.manual_seed(p.seed)
    token, mapped = LOSSES[p.losses]
    return DMT(
        vit.build(p.student),
        taught_by.widths if p.cached else taught_by,
        mask_ratio=p.mask_ratio,
        statistics="running",
        target_norm=p.target_norm,
        token_weight=token,
        map_weight=mapped,
        decoder=p.student,
    )


def distillation(p: Parameters, out: Path, real: bool = True) -> tuple[str, Training, None]:
    """The data's title, and the training of the notebook's parameters, without a test; cached tokens are below `out`.

    A dry run has a micro-batch for each of its two steps, of generated images unless `real`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    taught_by, facts, dataset = teachers(p), _facts(p), p.dataset or IMAGENET
    if dataset not in (IMAGENET, "folder"):
        raise BadParameter("dataset", dataset, [IMAGENET, "folder"])
    count = dry_items(p, MICRO_BATCH * p.devices)
    if not real:
        images: Any = _generated(p, count, p.seed)
    elif dataset == "folder":  # at any depth, no label is needed; its images may change between runs
        images = pretraining.own(p.data_root)["train"]
        facts["images"] = [os.path.relpath(path, p.data_root) for path in images.sources]
    else:
        images = pretraining.load(dataset, p.data_root, "train")
    title = f"{dataset}, {len(images):,} images" if real else f"generated images in place of {dataset}"
    options = stage(p, len(images))
    if p.dry_run and real:
        images = few({"train": images}, count)["train"]
    facts["models"] = taught_by

    def cached() -> Dataset:
        views = dmt_cache.Views(images, augment(), seed=p.seed)
        make = functools.partial(dmt_cache.fill, out / "teachers", taught_by, views, hardware=_hardware(p))
        if p.devices > 1:
            apart(make)  # the code below only opens it
        return make()

    training = Training(
        name=f"ViT-{p.student}, seed {p.seed}, {checkpoints.checkpoint_key(**facts)}",
        build=lambda: build(p, taught_by),
        loss=loss,
        data=cached if p.cached else Augmented(images, augment()),
        fit=options,
        facts=facts,
        weights=lambda model: model.student.to_official(),
        metadata=lambda model: {"distilled": json.dumps({name: getattr(p, name) for name in DISTILLED})},
        dry_run=p.dry_run,
    )
    return title, training, None


def stage(p: Parameters, images: int) -> dict[str, Any]:
    """The arguments of `fit` for G2SD's generic stage on so many images; the learning rate is scaled with the batch.

    The batch is G2SD's; of fewer images all of them, rounded down to a multiple of the devices. The running statistics
    of the targets are updated once for each micro-batch.
    """
    r = published("distil")
    batch = min(int(r["batch"]), max(images // p.devices, 1) * p.devices)
    scale = batch / r["batch"]
    return {
        "epochs": r["epochs"],
        "batch": batch,
        "optimizer": adamw(r["lr"] * scale, r["weight_decay"], betas=(0.9, r["beta2"])),
        "schedule": schedule("cosine", r["warmup_epochs"] / r["epochs"], r["final_lr"] * scale),
        "seed": p.seed,
        "hardware": _hardware(p, batch),
        "name": "DMT",
    }


def augment() -> v2.Transform:
    """G2SD's, of tensors in [0, 1]: a crop of 20 to 100 %, bicubic, a flip, ImageNet's mean and std."""
    crop = v2.RandomResizedCrop(224, CROP, interpolation=InterpolationMode.BICUBIC, antialias=True)
    # bicubic overshoots a little
    inside = v2.Lambda(functools.partial(torch.clamp, min=0, max=1))
    return v2.Compose([as_float, crop, inside, v2.RandomHorizontalFlip(), NORMALISE])


class Augmented(Dataset):
    """Items (image,) of a dataset whose items begin with one, with a random augmentation each time."""

    def __init__(self, data: Dataset, transform: Callable[[Tensor], Tensor]):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.transform(self.data[index][0]),)


# --- downstream -------------------------------------------------------------------------------------------------------


Score = Callable[[nn.Module], dict[str, float]]
"""From a trained model to its scores on the test split: by metric, in percent."""


def encoder(p: Parameters) -> ViT:
    """The encoder of a task before training: `weights`, the first teacher, or a random ViT of the student's size.

    Raises:
        MissingWeights: no distilled student was released: train one first.
        BadParameter: the student in the file was distilled with other choices, or has another size.
        CorruptFile, BadCheckpoint: the file cannot be read, or is of another model.
    """
    if p.encoder == "teacher":
        return teacher(p, p.teachers.split(", ")[0])
    if p.encoder == "random" or (p.dry_run and not p.weights):
        torch.manual_seed(p.seed)
        return vit.build(p.student)
    if not Path(p.weights).is_file():
        ways = ["task = 'distil' trains one and writes it below `trained`; the parameter `weights` is its file"]
        raise MissingWeights("a distilled student (none was released)", Path(p.weights or "weights"), ways)
    with torch.device("meta"):
        sizes = vit.build(p.student)
    student = ViT.from_official(read_state(p.weights), sizes.blocks[0].attn.num_heads, "a distilled student")
    # results are filed under the parameters: they must be those of the file
    choices = {"student": p.student if student.pos_embed.shape == sizes.pos_embed.shape else "another size"}
    if Path(p.weights).suffix == ".safetensors":
        with safe_open(p.weights, "pt") as file:
            choices |= json.loads((file.metadata() or {}).get("distilled", "{}"))
    for name, value in choices.items():
        if getattr(p, name, value) != value:
            accepted = f"{value!r}, as the student in {p.weights} (width {student.width})"
            raise BadParameter(name, getattr(p, name), accepted)
    return student


def downstream(p: Parameters, out: Path, real: bool = True) -> tuple[str, Training, Score]:
    """The task of the parameters `task`, `dataset`, `encoder`, `student` and `weights`: its title, its training, and
    the scores of the trained model; in a dry run on a few images, generated ones unless `real`.

    What is computed once, or in a test, is saved below `out`/predictions as it comes: a killed run resumes there.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    dataset = USUAL[p.task]
    if p.dataset not in ("", dataset):
        raise BadParameter("dataset", p.dataset, [dataset, "empty"])
    r, title = published(p.task), f"{p.task} on {dataset}, {p.encoder} encoder"
    count = dry_items(p, int(r["batch"]))
    if real:
        test = test_transform() if dataset == IMAGENET else None
        learned = down.train_transform() if p.task == "fine-tune" else test
        data = {"train": pretraining.load(dataset, p.data_root, "train", learned)}
        data["test"] = pretraining.load(dataset, p.data_root, "test", test)
        data = few(data, count) if p.dry_run else data
    else:
        title += ", generated images in its place"
        data = {split: _generated(p, count, p.seed + i) for i, split in enumerate(("train", "test"))}
    return title, *TASKS[p.task](p, out, r, *data.values())


def _fine_tuning(p: Parameters, out: Path, r: Mapping[str, float], data: Any, test: Any) -> tuple[Training, Score]:
    start, per_epoch = encoder(p), max(len(data) // int(r["batch"]), 1)
    steps, warmup = (int(r[name]) * per_epoch for name in ("epochs", "warmup_epochs"))
    rates, classes = learning_rates("cosine", r["lr"], steps, warmup, r["final_lr"]), CLASSES["fine-tune"]
    options = down.layer_decayed(r, rates, "", data, _hardware(p, int(r["batch"])))
    build = functools.partial(down.classifier, start, classes, drop_path=r["drop_path"])
    return _training(p, build, down.mixed_loss(classes), data, options), lambda model: _top1(p, model, test)


def _probing(p: Parameters, out: Path, r: Mapping[str, float], data: Any, test: Any) -> tuple[Training, Score]:
    """Features are computed once, of whole images without augmentation; the probe is trained on one device."""
    features = down.Features(encoder(p))

    build = functools.partial(down.linear, 2 * features.vit.width, CLASSES["linear probe"])

    def cached() -> Dataset:
        folder = _predictions(p, out, features, data)
        found = outputs_of(features, data, batch=MICRO_BATCH, hardware=_hardware(p), folder=folder)
        return TensorDataset(found, _labels(data))

    options = {
        "epochs": r["epochs"],
        "batch": int(r["batch"]),
        "optimizer": sgd(r["lr"]),
        "schedule": schedule("cosine", r["warmup_epochs"] / r["epochs"], r["final_lr"]),
        "hardware": replace(_hardware(p), devices=1, workers=0),
    }
    training = _training(p, build, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), cached, options)
    whole = replace(training, weights=lambda model: nn.Sequential(features, model).state_dict())
    return whole, lambda model: _top1(p, nn.Sequential(features, model), test)


def _detection(p: Parameters, out: Path, r: Mapping[str, float], data: Any, test: Any) -> tuple[Training, Score]:
    size, start = SIZES["detect"], encoder(p)
    step = np.arange(int(r["steps"]))
    # x 0.1 twice, and a linear warm-up, as in the script
    rates = r["lr"] * np.array([1.0, 0.1, 0.01])[np.searchsorted(DROPS, step, "right")]
    rates *= np.minimum(1, (step + 1) / max(r["warmup_steps"], 1))

    build = functools.partial(down.detector, start, CLASSES["detect"], size=size, drop_path=r["drop_path"])

    def score(model: nn.Module) -> dict[str, float]:
        folder = _predictions(p, out, model, test)
        rows = down.detections(model, test, test.categories, batch=TEST_BATCH, hardware=_hardware(p), folder=folder)
        totals = {kind: detection.evaluate(test.truth, rows, kind=kind).totals for kind in detection.KINDS}
        return {"box AP": totals["bbox"]["AP"], "mask AP": totals["segm"]["AP"]}

    options = down.layer_decayed(r, rates, "backbone.vit.", data, _hardware(p, int(r["batch"]), 8))
    return _training(p, build, down.detection_loss, down.Crops(data, size), options), score


def _segmentation(p: Parameters, out: Path, r: Mapping[str, float], data: Any, test: Any) -> tuple[Training, Score]:
    size, classes, start = SIZES["segment"], CLASSES["segment"], encoder(p)
    layers = [len(start.blocks) * i // 12 - 1 for i in (4, 6, 8, 12)]
    rates = learning_rates("linear", r["lr"], int(r["steps"]), int(r["warmup_steps"]), r["final_lr"])

    def model() -> nn.Module:
        segmenter = down.Segmenter(start, classes, layers=layers, drop_path=r["drop_path"])
        if p.devices > 1 and device(p.accelerator) == "cuda":  # as mmseg; a CPU has none
            return nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
        return segmenter

    def score(model: nn.Module) -> dict[str, float]:
        folder = _predictions(p, out, model, test)
        each = down.confusions(model, test, classes, size=size, hardware=_hardware(p), folder=folder)
        return {"mIoU": landcover.scores(sum(each)).miou}

    options = down.layer_decayed(r, rates, "vit.", data, _hardware(p, int(r["batch"]), 16))
    return _training(p, model, down.segmentation_loss, down.SceneCrops(data, size), options), score


TASKS = {"fine-tune": _fine_tuning, "linear probe": _probing, "detect": _detection, "segment": _segmentation}


def _training(
    p: Parameters, model: Callable[[], nn.Module], loss: Loss, data: Callable[[], Dataset], options: dict[str, Any]
) -> Training:
    """The training of a task, named by the parameters; the model is drawn from the seed, all its tensors are saved."""

    def build() -> nn.Module:
        torch.manual_seed(p.seed)
        return model()

    facts = _facts(p) | {"task": p.task, "encoder": p.encoder, "weights": p.weights}
    name = f"{p.task}, seed {p.seed}, {checkpoints.checkpoint_key(**facts)}"
    fit = {"seed": p.seed, "name": p.task, **options}
    return Training(name, build, loss, data, fit, facts, nn.Module.state_dict, dry_run=p.dry_run)


def _predictions(p: Parameters, out: Path, model: nn.Module, data: Any) -> Path:
    """The folder in `out` for a model's outputs of a data set, named by what they depend on: a killed run resumes."""
    images = data.tensors if isinstance(data, TensorDataset) else getattr(data, "sources", [p.seed, len(data)])
    key = checkpoints.checkpoint_key(model=model, images=images, precision=_hardware(p).precision)
    return out / "predictions" / f"{p.task}, {key}"


def _labels(data: Any) -> Tensor:
    return data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)


def _top1(p: Parameters, model: nn.Module, data: Dataset) -> dict[str, float]:
    return {"top-1": accuracy(_labels(data), outputs_of(model, data, batch=MICRO_BATCH, hardware=_hardware(p)))}


def _generated(p: Parameters, count: int, seed: int) -> Any:
    """So many images of noise: classified, with a box in each, read as COCO's, or with two halves, as ADE20K's."""
    if p.task not in SIZES:
        images = torch.rand(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(images, torch.arange(count))
    side = SIZES[p.task]
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    low, half = side // 4, side // 2
    if p.task == "segment":
        labels = torch.zeros(side, side, dtype=torch.long)
        labels[:, half:] = 1
        return [(torch.from_numpy(image).movedim(2, 0), labels) for image in pixels]
    box = {"category_id": 1, "iscrowd": 0, "area": half**2, "bbox": [low, low, half, half]}
    box["segmentation"] = [[low, low, low, low + half, low + half, low + half, low + half, low]]
    truth = {
        "images": [{"id": i, "width": side, "height": side, "file_name": ""} for i in range(count)],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(CLASSES[p.task])],
        "annotations": [{"id": i, "image_id": i, **box} for i in range(count)],
    }
    found = read_annotations(truth, shapes=True)
    instances = pretraining.Instances(find(COCO, "pretraining"), Path(), Path(), Path(), found)
    instances.sources = pixels
    return instances


# --- results ----------------------------------------------------------------------------------------------------------


RESULTS = Results.of("dmt")


def label(row: Mapping[str, Any]) -> str:
    """The name of a measured model in tables, with the choices that are not the defaults. Ours are separate rows: a
    reconstruction does not reproduce the paper."""
    size = f"ViT-{row['student'][0].upper()}"
    others = [f"{choice} {row[choice]}" for choice, usual in CHOICES.items() if row[choice] != usual]
    return {
        "distilled": f"reconstruction ({'; '.join([row['teachers'], *others])}), {size}",
        "random": f"from scratch, {size}",
        "teacher": f"{row['teachers'].partition(',')[0]}, ViT-B",
    }[row["encoder"]]


def cells(rows: pd.DataFrame, table: str) -> Cells:
    """Means over seeds by (row, column) of one of `TABLES`."""
    rows = rows[rows.metric.isin(TABLES[table]) & (rows.task != "linear probe")]
    names = [label(row) for row in rows.to_dict("records")]
    return rows.score.groupby([names, rows.metric.map(TABLES[table])], sort=False).mean().to_dict()


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title, the paper's tables as far as they are known, with our measurements in rows of their own."""
    return with_measured("dmt", {table: cells(rows, table) for table in TABLES})
