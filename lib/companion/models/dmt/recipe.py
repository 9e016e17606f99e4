"""DMT (a reconstruction): the `paper` profile, distillation and downstream tasks with the ancestors' settings.

`p` are the checked parameters of the notebook, dmt.ipynb: `profile`, `dry_run`, `seed`, `task`, `dataset`, `data_root`,
the choices of the method (`DISTILLED`), `teacher_files`, `encoder`, `weights`, and those that `Hardware.of` reads.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from ...data import pretraining
from ...data.classification import Images
from ...data.pretraining_sets import ADE20K, COCO, IMAGENET
from ...errors import BadParameter, CorruptFile, MissingWeights
from ...evaluation.metrics import detection, landcover
from ...evaluation.tables import Results, published_table, with_measured
from ...ops import papers
from ...ops.progress import progress
from ...training import checkpoints
from ...training.fit import Hardware, History, Loss, apart, device, evaluating, predict
from ...training.recipe import Training, run
from ...training.schedules import adamw, learning_rates, schedule, sgd
from . import cache as dmt_cache
from . import downstream as down
from . import teachers as dmt_teachers
from . import vit
from .model import DMT, Teachers, loss
from .vit import ViT

WORKERS = min(16, os.cpu_count() or 1)
MICRO_BATCH = 256  # micro-batch of a device; the gradients of a step are accumulated
# weights of token, feature-map and relation loss
LOSSES = {"token and map": (1, 1, 0), "token": (1, 0, 0), "map": (0, 1, 0), "with relations": (1, 1, 1)}
USUAL = {"distil": IMAGENET, "fine-tune": IMAGENET, "linear probe": IMAGENET, "detect": COCO, "segment": ADE20K}
SIZES = {"detect": 1024, "segment": 512}  # sides of training crops, in pixels
CLASSES = {"fine-tune": 1000, "linear probe": 1000, "detect": 80, "segment": 150}
CROP = (0.2, 1.0)  # share of an image's area in a crop of distillation
DROPS = (163_889, 177_546)  # of 184,375 steps, those at which a detector's learning rate falls to a tenth
TEST_BATCH = 8  # images per batch of a detector's test
DRY_BATCH = 2
CHOICES = {
    "teacher_view": "full",
    "target_norm": "channel",
    "fusion": "separate",
    "losses": "token and map",
    "mask_ratio": 0.75,
    "cached": False,  # one fixed crop of each image in all epochs
}
"""Choices of the reconstruction, with their defaults."""
DISTILLED = ("student", "teachers", *CHOICES)
"""The parameters that a student's file records."""
TABLES = {
    "imagenet": {"top-1": "imagenet_top1"},
    "coco": {"box AP": "box_ap", "mask AP": "mask_ap"},
    "ade20k": {"mIoU": "miou"},
}


# --- settings ---------------------------------------------------------------------------------------------------------


def published(task: str) -> dict[str, float]:
    """The settings of a task in the paper's YAML, G2SD's and MAE's."""
    row = published_table("dmt", "recipe").set_index("method").loc[task]
    return {name: float(value) for name, value in row.items() if not np.isnan(value)}


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row. DMT's own were not found: these are its ancestors'."""
    tasks = {task.replace("-", "_").replace(" ", "_"): published(task) for task in USUAL}
    constants = {"SIZES": SIZES, "DROPS": DROPS, "CROP": [100 * share for share in CROP], "down": down}
    return papers.protocol("dmt", **tasks, **constants, precision=papers.paper("dmt")["precision"])


def _hardware(p: SimpleNamespace, batch: int = 1, micro_batch: int = MICRO_BATCH) -> Hardware:
    return Hardware.of(p, "dmt", workers=WORKERS, accumulate=-(-batch // (p.devices * micro_batch)))


def _facts(p: SimpleNamespace) -> dict[str, Any]:
    """The parameters that determine a training; files of weights are hashed by their tensors."""
    names = ("seed", "dataset", *DISTILLED)
    return {name: getattr(p, name) for name in names} | {"data_root": Path(p.data_root)}


# --- teachers and students --------------------------------------------------------------------------------------------


def named(text: str) -> list[str]:
    """Names of teachers, comma-separated. Raises `BadParameter` for an unknown or duplicate name, or for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or set(names) - set(dmt_teachers.RELEASED):
        raise BadParameter("teachers", text, f"one or more of {list(dmt_teachers.RELEASED)}, each once, between commas")
    return names


def files(text: str) -> dict[str, str]:
    """Files of teachers, "name=file", comma-separated. Raises `BadParameter`."""
    paths = {}
    for entry in (entry.strip() for entry in text.split(",") if entry.strip()):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not equals or not path or name not in dmt_teachers.RELEASED:
            raise BadParameter("teacher_files", entry, f"name=file, the name one of {list(dmt_teachers.RELEASED)}")
        paths[name] = path
    return paths


def released(p: SimpleNamespace, name: str) -> ViT:
    """A teacher of the parameters: from its file, from the cache, or random in a dry run without a file."""
    torch.manual_seed(p.seed + zlib.crc32(name.encode()))  # random teachers differ from each other
    return dmt_teachers.released(name, files(p.teacher_files).get(name, "random" if p.dry_run else "pretrained"))


def teachers(p: SimpleNamespace) -> Teachers:
    """The teachers of the parameters `teachers`, `teacher_files` and `teacher_view`."""
    names = named(p.teachers)
    if spare := set(files(p.teacher_files)) - set(names):
        raise BadParameter("teacher_files", sorted(spare), f"files of {names}, the parameter `teachers`")
    return Teachers({name: released(p, name) for name in names}, view=p.teacher_view)


def build(p: SimpleNamespace, taught_by: Teachers) -> DMT:
    """Student, adapters and decoder of random weights, drawn from the seed."""
    torch.manual_seed(p.seed)
    token, mapped, related = LOSSES[p.losses]
    return DMT(
        vit.build(p.student, last_heads=max(taught_by.heads) if related else None),
        taught_by.widths if p.cached else taught_by,
        mask_ratio=p.mask_ratio,
        statistics="running",
        target_norm=p.target_norm,
        fusion=p.fusion,
        token_weight=token,
        map_weight=mapped,
        relation_weight=related,
        decoder=p.student,
    )


# --- distillation by the ancestors' settings --------------------------------------------------------------------------


def distillation(p: SimpleNamespace, out: Path) -> tuple[str, Training]:
    """The data's title, and the training of the notebook's parameters; cached tokens are below `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    if p.cached and p.losses == "with relations":
        raise BadParameter("losses", p.losses, "any other with cached teachers: relations are not stored")
    taught_by, facts = teachers(p), _facts(p)
    if p.dry_run:
        generator = torch.Generator().manual_seed(p.seed)
        images: Dataset = TensorDataset(torch.rand(2 * DRY_BATCH, 3, 224, 224, generator=generator))
        title = "generated images, random teachers without a file (dry run: losses mean nothing)"
    else:
        images = _images_to_distil(p)
        title = f"{p.dataset or USUAL['distil']}, {len(images):,} images"
        facts["models"] = taught_by
        if p.dataset == "folder":  # its images may change between runs
            facts["images"] = [os.path.relpath(path, p.data_root) for path in images.sources]

    def data() -> Dataset:
        if not p.cached:
            return Augmented(images, augment())
        views = dmt_cache.Views(images, augment(), seed=p.seed)
        make = functools.partial(dmt_cache.build, out / "teachers", taught_by, views, hardware=_hardware(p))
        if p.devices > 1:
            apart(make)  # the code below only opens it
        return dmt_cache.Distilled(views, make())

    return title, Training(
        name=f"ViT-{p.student}, seed {p.seed}, {checkpoints.checkpoint_key(**facts)}",
        build=lambda: build(p, taught_by),
        loss=loss,
        data=data,
        fit=stage(p, len(images)),
        facts=facts,
        weights=lambda model: model.export().to_official(),
        metadata=lambda model: metadata(model.export(), {name: getattr(p, name) for name in DISTILLED}),
    )


def stage(p: SimpleNamespace, images: int) -> dict[str, Any]:
    """The arguments of `fit` for G2SD's generic stage on so many images; the learning rate is scaled with the batch.

    The batch is G2SD's; of fewer images all of them, rounded down to a multiple of the devices. The running statistics
    of the targets are updated once for each micro-batch.
    """
    r = published("distil")
    batch = DRY_BATCH if p.dry_run else min(int(r["batch"]), max(images // p.devices, 1) * p.devices)
    scale = 1.0 if p.dry_run else batch / r["batch"]
    falling = schedule("cosine", r["warmup_epochs"] / r["epochs"], r["final_lr"] * scale)
    return {
        "epochs": 2 / (images // batch) if p.dry_run else r["epochs"],
        "batch": batch,
        "optimizer": adamw(r["lr"] * scale, r["weight_decay"], betas=(0.9, r["beta2"])),
        "schedule": schedule("constant", 0) if p.dry_run else falling,
        "seed": p.seed,
        "hardware": _hardware(p, batch),
        "name": "DMT",
    }


def distil(p: SimpleNamespace, out: Path, **changes: Any) -> tuple[DMT, History]:
    """The trained model and its history; the student is written to `out`/trained, but not by a dry run.

    `changes` are arguments of `fit`.
    """
    _, training = distillation(p, out)
    return run(training, None if p.dry_run else out, **changes)


def student_file(training: Training, out: Path) -> Path:
    """The file of the student of a distillation, the parameter `weights` of the downstream tasks."""
    return checkpoints.file(out / "trained", training.name, ".safetensors")


def metadata(student: ViT, choices: Mapping[str, object] | None = None) -> dict[str, str]:
    """What a student's file says beside its tensors, which have the official names of MAE, MoCo v3, iBOT and DINO.

    Heads are not in the tensors; after a relation loss the last block has as many as the teachers. `choices`: the
    parameters `DISTILLED`, which `encoder` compares.
    """
    facts = {"heads": str(student.blocks[0].attn.num_heads), "last_heads": str(student.heads)}
    return facts | ({} if choices is None else {"distilled": json.dumps(dict(choices))})


def augment(size: int = 224) -> v2.Transform:
    """G2SD's, of tensors in [0, 1]: a crop of 20 to 100 %, bicubic, a flip, ImageNet's mean and std."""
    crop = v2.RandomResizedCrop(size, CROP, interpolation=InterpolationMode.BICUBIC, antialias=True)
    # bicubic overshoots a little
    inside = v2.Lambda(functools.partial(torch.clamp, min=0, max=1))
    return v2.Compose([crop, inside, v2.RandomHorizontalFlip(), v2.Normalize(list(down.MEAN), list(down.STD))])


class Augmented(Dataset):
    """Items (image,) of a dataset whose items begin with one, with a random augmentation each time."""

    def __init__(self, data: Dataset, transform: Callable[[Tensor], Tensor]):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.transform(self.data[index][0]),)


def _images_to_distil(p: SimpleNamespace) -> Images:
    """ImageNet's training images; "folder": all below `data_root`, or below its `train` if it exists, at any depth,
    because no label is needed. In [0, 1], at their original size."""
    dataset = p.dataset or IMAGENET
    if dataset == "folder":
        return pretraining.pictures(p.data_root)
    if dataset != IMAGENET:
        raise BadParameter("dataset", dataset, [IMAGENET, "folder"])
    return pretraining.load(dataset, p.data_root, "train")


# --- downstream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Downstream:
    """A task on a dataset.

    Attributes:
        title: of task, dataset and encoder.
        training: of its model.
        score: of the trained model on the test split: by metric, in percent.
    """

    title: str
    training: Training
    score: Callable[[nn.Module], dict[str, float]]


def encoder(p: SimpleNamespace) -> ViT:
    """The encoder of a task before training: `weights`, the first teacher, or a random ViT of the student's size.

    Raises:
        MissingWeights: no distilled student was released: train one first.
        BadParameter: the student in the file was distilled with other choices, or has another size.
        CorruptFile, BadCheckpoint: the file cannot be read, or is of another model.
    """
    if p.encoder == "teacher":
        return released(p, named(p.teachers)[0])
    if p.encoder == "random" or (p.dry_run and not p.weights):
        torch.manual_seed(p.seed)
        return vit.build(p.student)
    if not Path(p.weights).is_file():
        ways = ["task = 'distil' trains one and writes it below `trained`; the parameter `weights` is its file"]
        raise MissingWeights("a distilled student (none was released)", Path(p.weights or "weights"), ways)
    state = dmt_teachers.read(p.weights)
    metadata: dict[str, str] = {}
    if Path(p.weights).suffix == ".safetensors":
        with safe_open(p.weights, "pt") as file:
            metadata = file.metadata() or {}
    if "distilled" in metadata:  # results are filed under the parameters: they must be those of the file
        _check_choices(p, metadata["distilled"])
    heads = {name: int(metadata[name]) for name in ("heads", "last_heads") if name in metadata}
    student = ViT.from_official(state, what="a distilled student", **heads)
    with torch.device("meta"):
        usual = vit.build(p.student)
    if (student.width, len(student.blocks)) != (usual.width, len(usual.blocks)):
        accepted = f"the size of the student in {p.weights}: width {student.width}, depth {len(student.blocks)} "
        accepted += f"(ViT-{p.student} has {usual.width} and {len(usual.blocks)})"
        raise BadParameter("student", p.student, accepted)
    return student


def _check_choices(p: SimpleNamespace, text: str) -> None:
    """Compare the parameters with those of a student's file. Raises `BadParameter`, `CorruptFile`."""
    try:
        known = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise CorruptFile(p.weights, f"the metadata entry 'distilled' is damaged ({error})") from error
    for name in DISTILLED:
        if name in known and getattr(p, name) != known[name]:
            accepted = f"{known[name]!r}, with which the student in {p.weights} was distilled"
            raise BadParameter(name, getattr(p, name), accepted)


def downstream(p: SimpleNamespace) -> Downstream:
    """The task of the parameters `task`, `dataset`, `encoder`, `student` and `weights`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    if p.task not in TASKS:
        raise BadParameter("task", p.task, list(TASKS))
    dataset = p.dataset or USUAL[p.task]
    if dataset != USUAL[p.task]:
        raise BadParameter("dataset", dataset, [USUAL[p.task], "empty"])
    r, title = published(p.task), f"{p.task} on {dataset}, {p.encoder} encoder"
    if p.dry_run:
        r["batch"] = p.devices * (DRY_BATCH // 2 if p.task == "detect" else DRY_BATCH)
        title = f"{p.task}, generated images in the shape of {dataset} (dry run: scores mean nothing)"
    return Downstream(title, *TASKS[p.task](p, r))


Task = tuple[Training, Callable[[nn.Module], dict[str, float]]]
"""A training, and the scores of its model."""


def _fine_tuning(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    data, test = _images(p, "train", down.train_transform()), _images(p, "test", down.test_transform())
    start, classes, per_epoch = encoder(p), CLASSES["fine-tune"], len(data) // _batch(r, data)
    steps, warmup = (2, 0) if p.dry_run else (int(r[name]) * per_epoch for name in ("epochs", "warmup_epochs"))
    rates = learning_rates("cosine", r["lr"], steps, warmup, r["final_lr"])

    def model() -> nn.Module:
        return down.classifier(start, classes, drop_path=r["drop_path"])

    training = _training(p, r, model, down.mixed_loss(classes), data, rates, "", MICRO_BATCH)
    return training, lambda model: _top1(p, model, test)


def _probing(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    """Features are computed once, of whole images without augmentation; the probe is trained on one device."""
    data, test = (_images(p, split, down.test_transform()) for split in ("train", "test"))
    features, batch = down.Features(encoder(p)), _batch(r, data)

    def model() -> nn.Module:
        return down.linear(2 * features.vit.width, 10 if p.dry_run else CLASSES["linear probe"])

    options = {
        "epochs": 2 / (len(data) // batch) if p.dry_run else r["epochs"],
        "batch": batch,
        "optimizer": sgd(r["lr"]),
        "schedule": schedule("cosine", 0 if p.dry_run else r["warmup_epochs"] / r["epochs"], r["final_lr"]),
        "hardware": replace(_hardware(p), devices=1, workers=0),
    }
    training = _named(
        p,
        model,
        down.classification_loss,
        lambda: TensorDataset(_predict(p, features, data), _labels(data)),
        options,
        lambda model: nn.Sequential(features, model).state_dict(),
    )
    return training, lambda model: _top1(p, nn.Sequential(features, model), test)


def _detection(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    size = SIZES["detect"]
    data, test = _scenes(p, r, COCO)
    start = encoder(p)
    step = np.arange(2 if p.dry_run else int(r["steps"]))
    # x 0.1 twice, and a linear warm-up, as in the script
    rates = r["lr"] * np.where(step < DROPS[0], 1.0, np.where(step < DROPS[1], 0.1, 0.01))
    rates = rates if p.dry_run else rates * np.minimum(1, (step + 1) / r["warmup_steps"])

    def model() -> nn.Module:
        return down.detector(start, CLASSES["detect"], size=size, drop_path=r["drop_path"])

    def score(model: nn.Module) -> dict[str, float]:
        options = {"batch": TEST_BATCH, "hardware": _hardware(p), "progress": _bar("detection")}
        rows = down.detections(model, test, test.categories, **options)
        totals = {kind: detection.evaluate(test.truth, rows, kind=kind).totals for kind in detection.KINDS}
        return {"box AP": totals["bbox"]["AP"], "mask AP": totals["segm"]["AP"]}

    crops = down.Crops(data, size)
    return _training(p, r, model, down.detection_loss, crops, rates, "backbone.vit.", 8), score


def _segmentation(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    size, classes = SIZES["segment"], CLASSES["segment"]
    data, test = _scenes(p, r, ADE20K)
    start = encoder(p)
    layers = tuple(len(start.blocks) * i // 12 - 1 for i in (4, 6, 8, 12))
    steps, warmup = (2, 0) if p.dry_run else (int(r["steps"]), int(r["warmup_steps"]))
    rates = learning_rates("linear", r["lr"], steps, warmup, r["final_lr"])

    def model() -> nn.Module:
        segmenter = down.Segmenter(start, classes, layers=layers, drop_path=r["drop_path"])
        if p.devices > 1 and device(p.accelerator) == "cuda":  # as mmseg; a CPU has none
            return nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
        return segmenter

    def score(model: nn.Module) -> dict[str, float]:
        normalise = v2.Normalize(list(down.MEAN), list(down.STD))
        matrix = torch.zeros(classes, classes, dtype=torch.long)
        with evaluating(_hardware(p), model) as device:
            for i in _bar("segmentation")(range(len(test))):
                image, truth = test[i]
                # the short side to 512, as mmseg tests; the prediction back to the image's original size
                factor = size / min(image.shape[1:])
                side = [max(1, round(n * factor)) for n in image.shape[1:]]
                resized = normalise(v2.functional.resize(image, side, antialias=True).float() / 255)
                logits = down.slide(model, resized.to(device), size)
                whole = nn.functional.interpolate(logits[None], image.shape[1:], mode="bilinear", align_corners=False)
                matrix += landcover.confusion(truth, whole[0].argmax(0).cpu(), classes)
        return {"mIoU": landcover.scores(matrix).miou}

    crops = down.SceneCrops(data, size)
    return _training(p, r, model, down.segmentation_loss, crops, rates, "vit.", 16), score


TASKS = {"fine-tune": _fine_tuning, "linear probe": _probing, "detect": _detection, "segment": _segmentation}


def _batch(r: Mapping[str, float], data: Dataset) -> int:
    return min(int(r["batch"]), len(data))


def _training(
    p: SimpleNamespace,
    r: Mapping[str, float],
    model: Callable[[], nn.Module],
    loss: Loss,
    data: Dataset,
    rates: np.ndarray,
    where: str,
    micro_batch: int,
) -> Training:
    """A training by AdamW with layer decay.

    A dataset need not be a whole number of batches: `fit` leaves out the last partial batch of each pass.

    Args:
        rates: the learning rate of each step.
        where: the encoder is in the model, see `downstream.layer_decayed`.
    """
    batch = _batch(r, data)
    options = down.layer_decayed(rates, where, r["layer_decay"], r["weight_decay"])
    options |= {"epochs": len(rates) / (len(data) // batch), "batch": batch}
    options |= {"hardware": _hardware(p, batch, micro_batch)}
    return _named(p, model, loss, lambda: data, options, lambda model: model.state_dict())


def _named(
    p: SimpleNamespace,
    model: Callable[[], nn.Module],
    loss: Loss,
    data: Callable[[], Dataset],
    options: Mapping[str, Any],
    weights: Callable[[nn.Module], Mapping[str, Tensor]],
) -> Training:
    """The training of a task, its name and facts from the parameters; the model is drawn from the seed."""

    def build() -> nn.Module:
        torch.manual_seed(p.seed)
        return model()

    facts = _facts(p) | {"task": p.task, "encoder": p.encoder, "weights": p.weights}
    name = f"{p.task}, seed {p.seed}, {checkpoints.checkpoint_key(**facts)}"
    return Training(name, build, loss, data, {"seed": p.seed, "name": p.task, **options}, facts, weights)


def _images(p: SimpleNamespace, split: str, transform: Callable) -> Dataset:
    if not p.dry_run:
        return pretraining.load(IMAGENET, p.data_root, split, transform)
    # ten classes for a probe's twenty images
    count, classes = (20, 10) if p.task == "linear probe" else (2 * DRY_BATCH * p.devices, CLASSES[p.task])
    generator = torch.Generator().manual_seed(p.seed + (split == "test"))
    return TensorDataset(torch.randn(count, 3, 224, 224, generator=generator), torch.arange(count) % classes)


def _scenes(p: SimpleNamespace, r: Mapping[str, float], dataset: str) -> list[Any]:
    """The splits "train" and "test" of COCO or ADE20K."""
    if not p.dry_run:
        return [pretraining.load(dataset, p.data_root, split) for split in ("train", "test")]
    counts, size = (2 * int(r["batch"]), 1), SIZES[p.task]
    return [_Generated(p.task, count, size, p.seed + 9 * i) for i, count in enumerate(counts)]


def _labels(data: Dataset) -> Tensor:
    return data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)


def _predict(p: SimpleNamespace, model: nn.Module, data: Dataset) -> Tensor:
    return predict(model, data, batch=DRY_BATCH if p.dry_run else 256, hardware=_hardware(p))


def _top1(p: SimpleNamespace, model: nn.Module, data: Dataset) -> dict[str, float]:
    right = _predict(p, model, data).argmax(1) == _labels(data)
    return {"top-1": 100 * float(right.float().mean())}


def _bar(name: str) -> Callable:
    return lambda items: progress(items, name, len(items))


class _Generated(Dataset):
    """Images of COCO's or ADE20K's kind: noise, with a box in it, or with two halves."""

    def __init__(self, task: str, count: int, side: int, seed: int):
        self.task, self.count, self.side, self.seed = task, count, side, seed
        self.categories = tuple(range(1, 1 + CLASSES[task]))
        corner, half = side // 4, side // 2
        square = [corner, corner, corner, corner + half, corner + half, corner + half, corner + half, corner]
        self.truth = {
            "images": [{"id": i, "width": side, "height": side, "file_name": ""} for i in range(count)],
            "categories": [{"id": c, "name": str(c)} for c in self.categories],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": half**2,
                    "bbox": [corner, corner, half, half],
                    "segmentation": [square],
                }
                for i in range(count)
            ],
        }

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, object]:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randint(256, (3, self.side, self.side), generator=generator, dtype=torch.uint8)
        corner, half = self.side // 4, self.side // 2
        if self.task == "segment":
            labels = torch.zeros(self.side, self.side, dtype=torch.long)
            labels[:, half:] = 1
            return image, labels
        mask = torch.zeros(1, self.side, self.side, dtype=torch.uint8)
        mask[0, corner : corner + half, corner : corner + half] = 1
        box = torch.tensor([[corner, corner, corner + half, corner + half]], dtype=torch.float32)
        return image, {"boxes": box, "labels": torch.tensor([1]), "masks": mask, "image_id": index}


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


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (row, column) of one of `TABLES`."""
    rows = rows[rows.metric.isin(TABLES[table]) & (rows.task != "linear probe")]
    rows = rows.assign(label=[label(row) for row in rows.to_dict("records")], column=rows.metric.map(TABLES[table]))
    means = rows.groupby(["label", "column"], sort=False).score.mean()
    return {(str(name), str(column)): float(mean) for (name, column), mean in means.items()}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title, the paper's tables as far as they are known, with our measurements in rows of their own."""
    return with_measured("dmt", {table: cells(rows, table) for table in TABLES})
