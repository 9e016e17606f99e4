"""DMT (a reconstruction): the `paper` profile, distillation and downstream tasks with the ancestors' settings."""

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
from ...evaluation.tables import published_table, upsert_rows, with_measured
from ...ops.papers import paper
from ...ops.progress import progress
from ...training.checkpoints import Checkpoint, checkpoint_key, save
from ...training.fit import Hardware, History, apart, device, evaluating, fit, predict
from ...training.schedules import adamw, given, learning_rates, schedule
from . import cache as dmt_cache
from . import downstream as down
from . import teachers as dmt_teachers
from . import vit
from .model import DMT, Teachers, loss
from .vit import ViT

WORKERS = min(16, os.cpu_count() or 1)
MICRO_BATCH = 256  # micro-batch of a device; the gradients of a step are accumulated
EVERY = 200  # steps between checkpoints
# weights of token, feature-map and relation loss
LOSSES = {"token and map": (1, 1, 0), "token": (1, 0, 0), "map": (0, 1, 0), "with relations": (1, 1, 1)}
USUAL = {"distil": IMAGENET, "fine-tune": IMAGENET, "linear probe": IMAGENET, "detect": COCO, "segment": ADE20K}
SIZES = {"detect": 1024, "segment": 512}  # sides of training crops, in pixels
CROP = (0.2, 1.0)  # share of an image's area in a crop of distillation
DRY_BATCH = 2
TEST_BATCH = 8  # images per batch of a detector's test
DRY_CLASSES = {"fine-tune": 1000, "linear probe": 10, "detect": 80, "segment": 150}  # ten for twenty images


@dataclass(frozen=True)
class Setting:
    """The models and data of a distillation.

    Attributes:
        title: of the data.
        learning_rates: by method.
        build: the model of a method, before training.
        learn: trains a model in place: (model, method, arguments of `fit`) to the history.
        trained: file of the student after a `paper` training, the parameter `weights`; None if none is written.
    """

    title: str
    learning_rates: dict[str, float]
    build: Callable[[str], DMT]
    learn: Callable[..., History]
    trained: Path | None = None


# --- distillation by the ancestors' settings --------------------------------------------------------------------------


def recipe(task: str) -> dict[str, float]:
    """The settings of a task in the paper's YAML, G2SD's and MAE's."""
    row = published_table("dmt", "recipe").set_index("method").loc[task]
    return {name: float(value) for name, value in row.items() if not np.isnan(value)}


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row. DMT's own were not found: these are its ancestors'."""
    distil, tune, probe, detect, segment = (recipe(task) for task in USUAL)
    mixup, cutmix, smoothing = down.mixed_loss.__defaults__ or ()
    crop = " to ".join(f"{100 * share:.0f}" for share in CROP)

    def adam(r: Mapping[str, float]) -> str:
        decay = f"decay {r['weight_decay']:g}" + (f", layer decay {r['layer_decay']:g}" if "layer_decay" in r else "")
        return f"AdamW, betas 0.9 and {r['beta2']:g}, {r['lr']:g} for batch {r['batch']:g}, {decay}"

    def cosine(r: Mapping[str, float]) -> str:
        return f"{r['warmup_epochs']:g} epochs of warm-up, cosine to {r['final_lr']:g}, {r['epochs']:g} epochs"

    mixed = f"mixup {mixup:g}, cutmix {cutmix:g}, smoothing {smoothing:g}"
    steps = f"{detect['steps']:,.0f} steps, x 0.1 at {' and '.join(f'{step:,}' for step in DROPS)}"
    linear = f"{segment['steps']:,.0f} steps, linear to {segment['final_lr']:g}"
    return {
        "source": "DMT's own settings were not found; distillation and dense tasks as G2SD, fine-tuning as MAE",
        "distillation": f"{adam(distil)}; {cosine(distil)}",
        "distillation, images": f"crop of {crop} % to 224, bicubic, flip; ImageNet's mean and std",
        "distillation, losses": "smooth L1 on tokens and feature maps, targets standardised by channel (ours)",
        "fine-tuning": f"{adam(tune)}; {cosine(tune)}; drop path {tune['drop_path']:g}",
        "fine-tuning, images": f"{down.RAND_AUGMENT}, erasing {down.ERASING:g}, {mixed}",
        "linear probe": f"SGD with momentum, {probe['lr']:g} for batch {probe['batch']:g}; {cosine(probe)} (ours)",
        "detection": f"Mask R-CNN on a simple pyramid, {SIZES['detect']} pixels; {adam(detect)}; {steps}",
        "segmentation": f"UPerNet, {SIZES['segment']} pixels; {adam(segment)}; {linear}",
        "last images of an epoch": "left out, too few for a batch; others in each epoch",
        "precision": f"{paper('dmt')['precision']} on a GPU (ours)",
        "test images": "short side 256, centre crop of 224, bicubic",
        "selection": "the last step, everywhere; MAE's code reports the best epoch on the test set",
        "seeds": "the parameter seed; how many runs the paper averages was not found",
        "sweep": "none found",
        "metric": "top-1; box and mask AP; mIoU",
    }


def named(text: str) -> list[str]:
    """Names of teachers, comma-separated. Raises `BadParameter` for an unknown or duplicate name, or for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or set(names) - set(dmt_teachers.RELEASED):
        raise BadParameter("teachers", text, f"one or more of {list(dmt_teachers.RELEASED)}, each once, between commas")
    return names


def files(text: str) -> dict[str, str]:
    """Files of teachers, "name=file", comma-separated. Raises `BadParameter`."""
    found = {}
    for entry in (entry.strip() for entry in text.split(",") if entry.strip()):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not equals or not path or name not in dmt_teachers.RELEASED:
            raise BadParameter("teacher_files", entry, f"name=file, the name one of {list(dmt_teachers.RELEASED)}")
        found[name] = path
    return found


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


def build(p: SimpleNamespace, found: Teachers) -> DMT:
    """Student, adapters and decoder of random weights, drawn from the seed."""
    torch.manual_seed(p.seed)
    token, mapped, related = LOSSES[p.losses]
    student = vit.build(p.student, last_heads=max(found.heads) if related else None)
    return DMT(
        student,
        found.widths if p.cached else found,
        mask_ratio=p.mask_ratio,
        statistics="running",
        target_norm=p.target_norm,
        fusion=p.fusion,
        token_weight=token,
        map_weight=mapped,
        relation_weight=related,
        decoder=p.student,
    )


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


def distil_batch(p: SimpleNamespace, images: int) -> int:
    """G2SD's batch; for fewer images all of them, rounded down to a multiple of the devices."""
    return min(int(recipe("distil")["batch"]), max(images // p.devices, 1) * p.devices)


def distil_rates(per_epoch: int) -> np.ndarray:
    """The learning rate at each step of G2SD's generic stage."""
    r = recipe("distil")
    steps, warmup = int(r["epochs"]) * per_epoch, int(r["warmup_epochs"]) * per_epoch
    return learning_rates("cosine", r["lr"], steps, warmup, r["final_lr"])


def distil(
    p: SimpleNamespace,
    model: DMT,
    data: Dataset,
    *,
    rates: np.ndarray | None = None,
    micro_batch: int = MICRO_BATCH,
    **changes: Any,
) -> History:
    """Train by G2SD's recipe, in place; return the history.

    Args:
        data: items (image,), or (image, tokens of each teacher) of a cache.
        rates: the learning rate of each step; None: the published ones, scaled with the batch as in G2SD.
        micro_batch: micro-batch of a device. (The running statistics of the targets are updated once for each.)
        changes: arguments of `fit`.
    """
    r = recipe("distil")
    options = {"batch": distil_batch(p, len(data)), "seed": p.seed, "name": "distillation"} | changes
    per_epoch = len(data) // options["batch"]
    rates = distil_rates(per_epoch) * (options["batch"] / r["batch"]) if rates is None else rates
    hardware = _hardware(p, -(-options["batch"] // (p.devices * micro_batch)))
    optimizer = adamw(r["lr"], r["weight_decay"], betas=(0.9, r["beta2"]))
    options = {"epochs": len(rates) / per_epoch, "optimizer": optimizer, "schedule": given(rates)} | options
    return fit(model, loss, data, **{"hardware": hardware} | options)


def _hardware(p: SimpleNamespace, accumulate: int = 1) -> Hardware:
    return Hardware.of(p, "dmt", workers=WORKERS, accumulate=accumulate)


def _facts(p: SimpleNamespace) -> dict[str, Any]:
    """The parameters that determine a training, for its checkpoint's key; files of weights are hashed by their
    tensors."""
    names = ("seed", "dataset", "student", "teachers", "teacher_view", "target_norm", "fusion", "losses", "mask_ratio")
    return {name: getattr(p, name) for name in (*names, "cached")} | {"data_root": Path(p.data_root)}


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The distillation of the notebook's parameters.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder, for a cache, checkpoints and the trained student.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    found, lr = teachers(p), recipe("distil")["lr"]
    options: dict[str, Any] = {}
    if p.cached and p.losses == "with relations":
        raise BadParameter("losses", p.losses, "any other with cached teachers: relations are not stored")
    if p.dry_run:
        generator = torch.Generator().manual_seed(p.seed)
        raw: Dataset = TensorDataset(torch.rand(2 * DRY_BATCH, 3, 224, 224, generator=generator))
        title = "generated images, random teachers without a file (dry run: losses mean nothing)"
        options = {"rates": np.full(2, lr), "batch": DRY_BATCH}
        trained = None
    else:
        raw = _images_to_distil(p)
        title = f"{p.dataset or USUAL['distil']}, {len(raw):,} images"
        lr *= distil_batch(p, len(raw)) / recipe("distil")["batch"]
        facts = _facts(p) | {"models": found}
        if p.dataset == "folder":  # its images may change between runs
            facts["images"] = [os.path.relpath(path, p.data_root) for path in raw.sources]
        name = f"ViT-{p.student}, seed {p.seed}"
        options["checkpoint"] = Checkpoint.of(out / "checkpoints", name, EVERY, **facts)
        trained = out / "trained" / f"{name}, {checkpoint_key(**facts)}.safetensors"

    @functools.cache
    def data() -> Dataset:
        if not p.cached:
            return Augmented(raw, augment())
        views = dmt_cache.Views(raw, augment(), seed=p.seed)
        build = functools.partial(dmt_cache.build, out / "teachers", found, views, hardware=_hardware(p))
        if p.devices > 1:
            apart(build)  # the code below only opens it
        return dmt_cache.Distilled(views, build())

    def learn(model: DMT, method: str, **changes: Any) -> History:
        history = distil(p, model, data(), **options | {"name": method} | changes)
        if trained is not None:
            save_student(model, trained, {name: getattr(p, name) for name in DISTILLED})
        return history

    return Setting(title, {"DMT": lr}, lambda method: build(p, found), learn, trained)


def _images_to_distil(p: SimpleNamespace) -> Images:
    """ImageNet's training images; "folder": all below `data_root`, or below its `train` if it exists, at any depth,
    because no label is needed. In [0, 1], at their original size."""
    dataset = p.dataset or IMAGENET
    if dataset == "folder":
        return pretraining.pictures(p.data_root)
    if dataset != IMAGENET:
        raise BadParameter("dataset", dataset, [IMAGENET, "folder"])
    return pretraining.load(dataset, p.data_root, "train")


def save_student(model: DMT, path: str | Path, choices: Mapping[str, object] | None = None) -> Path:
    """Write the student alone, under the official names of MAE, MoCo v3, iBOT and DINO: the parameter `weights`.

    Heads are not in the tensors but in the file's metadata; after a relation loss the last block has as many as the
    teachers. `choices`: the parameters `DISTILLED`, which go there too, and which `encoder` compares."""
    student, path = model.export(), Path(path)
    metadata = {"heads": str(student.blocks[0].attn.num_heads), "last_heads": str(student.heads)}
    if choices is not None:
        metadata["distilled"] = json.dumps(dict(choices))
    return save(path.parent, path.stem, student.to_official(), metadata)


# --- downstream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Downstream:
    """A task on a dataset.

    Attributes:
        title: of task, dataset and encoder.
        build: the model, before training.
        learn: trains a model in place: (model, arguments of `fit`) to the history.
        score: of a model on the test split: by metric, in percent.
    """

    title: str
    build: Callable[[], nn.Module]
    learn: Callable[..., History]
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


def downstream(p: SimpleNamespace, out: Path | None = None) -> Downstream:
    """The task of the parameters `task`, `dataset`, `encoder`, `student` and `weights`.

    Args:
        out: the run's folder, for checkpoints and trained weights; None: none are written.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    if p.task == "distil" or p.task not in USUAL:
        raise BadParameter("task", p.task, [task for task in USUAL if task != "distil"])
    dataset = p.dataset or USUAL[p.task]
    if dataset != USUAL[p.task]:
        raise BadParameter("dataset", dataset, [USUAL[p.task], "empty"])
    r = recipe(p.task)
    if p.dry_run:
        r |= {"batch": p.devices * (DRY_BATCH // 2 if p.task == "detect" else DRY_BATCH)}
        title = f"{p.task}, generated images in the shape of {dataset} (dry run: scores mean nothing)"
    else:
        title = f"{p.task} on {dataset}, {p.encoder} encoder"
    make = {"fine-tune": _fine_tune, "linear probe": _probe, "detect": _detect, "segment": _segment}[p.task]
    make_model, train, score = make(p, r)

    def build() -> nn.Module:
        start = encoder(p)
        torch.manual_seed(p.seed)
        return make_model(start)

    def learn(model: nn.Module, **changes: Any) -> History:
        torch.manual_seed(p.seed)
        if p.dry_run or out is None:
            return train(model, **changes)
        name, facts = f"{p.task}, seed {p.seed}", _facts(p) | {"task": p.task, "encoder": p.encoder, "model": model}
        path = f"{name}, {checkpoint_key(**facts)}"
        checkpoint = Checkpoint.of(out / "checkpoints", name, EVERY, **facts)
        history = train(model, **{"checkpoint": checkpoint} | changes)
        save(out / "trained", path, model.state_dict())
        return history

    return Downstream(title, build, learn, score)


Task = tuple[Callable[[ViT], nn.Module], Callable[..., History], Callable[[nn.Module], dict[str, float]]]
"""The model of an encoder, its training, and its scores."""


def _train(
    p: SimpleNamespace,
    r: Mapping[str, float],
    model: nn.Module,
    vit: nn.Module,
    loss: Callable,
    data: Dataset,
    rates: Callable[[int], np.ndarray],
    micro_batch: int,
    **changes: Any,
) -> History:
    """Train by AdamW with layer decay. `rates`: the learning rate of each step, from the steps of an epoch.

    A dataset need not be a whole number of batches: `fit` leaves out the last partial batch of each pass.
    """
    batch = min(int(r["batch"]), len(data))
    per_epoch = len(data) // batch
    lrs = rates(per_epoch)
    options = down.layer_decayed(model, vit, lrs, r["layer_decay"], r["weight_decay"])
    options |= {"hardware": _hardware(p, -(-batch // (p.devices * micro_batch))), "seed": p.seed, "name": p.task}
    return fit(model, loss, data, epochs=len(lrs) / per_epoch, batch=batch, **options | changes)


def _images(p: SimpleNamespace, split: str, transform: Callable) -> Dataset:
    if not p.dry_run:
        return pretraining.load(IMAGENET, p.data_root, split, transform)
    count, classes = (20 if p.task == "linear probe" else 2 * DRY_BATCH * p.devices), DRY_CLASSES[p.task]
    generator = torch.Generator().manual_seed(p.seed + (split == "test"))
    images = torch.randn(count, 3, 224, 224, generator=generator)
    return TensorDataset(images, torch.arange(count) % classes)


def _labels(data: Dataset) -> Tensor:
    return data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)


def _predict(p: SimpleNamespace, model: nn.Module, data: Dataset) -> Tensor:
    return predict(model, data, batch=DRY_BATCH if p.dry_run else 256, hardware=_hardware(p))


def _top1(p: SimpleNamespace, model: nn.Module, data: Dataset) -> dict[str, float]:
    right = _predict(p, model, data).argmax(1) == _labels(data)
    return {"top-1": 100 * float(right.float().mean())}


def _fine_tune(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    data, test = _images(p, "train", down.train_transform()), _images(p, "test", down.test_transform())
    classes = DRY_CLASSES["fine-tune"]

    def rates(per_epoch: int) -> np.ndarray:
        steps, warmup = (2, 0) if p.dry_run else (int(r[name]) * per_epoch for name in ("epochs", "warmup_epochs"))
        return learning_rates("cosine", r["lr"], steps, warmup, r["final_lr"])

    def learn(model: nn.Module, **changes: Any) -> History:
        return _train(p, r, model, model, down.mixed_loss(classes), data, rates, MICRO_BATCH, **changes)

    def build(vit: ViT) -> nn.Module:
        return down.classifier(vit, classes, drop_path=r["drop_path"])

    return build, learn, lambda model: _top1(p, model, test)


def _probe(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    """Features are computed once, of whole images without augmentation, and the probe, which `learn` puts after them,
    is trained on one device."""
    data, test = (_images(p, split, down.test_transform()) for split in ("train", "test"))
    classes = DRY_CLASSES["linear probe"] if p.dry_run else 1000

    def learn(model: nn.Sequential, **changes: Any) -> History:
        features, batch = _predict(p, model[0], data), min(int(r["batch"]), len(data))
        options = {
            "batch": batch,
            "seed": p.seed,
            "hardware": replace(_hardware(p), devices=1, workers=0),
            "name": p.task,
        }
        options |= {"epochs": 2 / (len(data) // batch) if p.dry_run else r["epochs"]}
        options |= {"schedule": schedule("cosine", 0 if p.dry_run else r["warmup_epochs"] / r["epochs"], r["final_lr"])}
        model[1], history = down.probe(features, _labels(data), classes, lr=r["lr"], **options | changes)
        return history

    def build(vit: ViT) -> nn.Module:
        return nn.Sequential(down.Features(vit), nn.Identity())

    return build, learn, lambda model: _top1(p, model, test)


class _Generated(Dataset):
    """Images of COCO's or ADE20K's kind: noise, with a box in it, or with two halves."""

    def __init__(self, task: str, count: int, side: int, seed: int):
        self.task, self.count, self.side, self.seed = task, count, side, seed
        self.categories = tuple(range(1, 1 + DRY_CLASSES[task]))
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


def _detect(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    size = SIZES["detect"]
    if p.dry_run:
        data, test = _Generated("detect", 2 * int(r["batch"]), size, p.seed), _Generated("detect", 1, size, p.seed + 9)
    else:
        data, test = (pretraining.load(COCO, p.data_root, split) for split in ("train", "test"))

    def rates(per_epoch: int) -> np.ndarray:
        step = np.arange(2 if p.dry_run else int(r["steps"]))
        # x 0.1 twice, and a linear warm-up, as in the script
        found = r["lr"] * np.where(step < DROPS[0], 1.0, np.where(step < DROPS[1], 0.1, 0.01))
        return found if p.dry_run else found * np.minimum(1, (step + 1) / r["warmup_steps"])

    def learn(model: nn.Module, **changes: Any) -> History:
        crops = down.Crops(data, size)
        return _train(p, r, model, model.backbone.vit, down.detection_loss, crops, rates, 8, **changes)

    def score(model: nn.Module) -> dict[str, float]:
        options = {"batch": TEST_BATCH, "hardware": _hardware(p), "progress": _bar("detection")}
        rows = down.detections(model, test, test.categories, **options)
        found = {kind: detection.evaluate(test.truth, rows, kind=kind).totals for kind in detection.KINDS}
        return {"box AP": found["bbox"]["AP"], "mask AP": found["segm"]["AP"]}

    def build(vit: ViT) -> nn.Module:
        return down.detector(vit, DRY_CLASSES["detect"], size=size, drop_path=r["drop_path"])

    return build, learn, score


DROPS = (163_889, 177_546)  # of 184,375 steps, those at which the learning rate falls to a tenth


def _segment(p: SimpleNamespace, r: Mapping[str, float]) -> Task:
    size, classes = SIZES["segment"], DRY_CLASSES["segment"]
    if p.dry_run:
        data, test = (
            _Generated("segment", 2 * int(r["batch"]), size, p.seed),
            _Generated("segment", 1, size, p.seed + 9),
        )
    else:
        data, test = (pretraining.load(ADE20K, p.data_root, split) for split in ("train", "test"))

    def rates(per_epoch: int) -> np.ndarray:
        steps, warmup = (2, 0) if p.dry_run else (int(r["steps"]), int(r["warmup_steps"]))
        return learning_rates("linear", r["lr"], steps, warmup, r["final_lr"])

    def learn(model: nn.Module, **changes: Any) -> History:
        if p.devices > 1 and device(p.accelerator) == "cuda":  # as mmseg; a CPU has none
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        crops = down.SceneCrops(data, size)
        return _train(p, r, model, model.vit, down.segmentation_loss, crops, rates, 16, **changes)

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

    def build(vit: ViT) -> nn.Module:
        layers = tuple(len(vit.blocks) * i // 12 - 1 for i in (4, 6, 8, 12))
        return down.Segmenter(vit, classes, layers=layers, drop_path=r["drop_path"])

    return build, learn, score


def _bar(name: str) -> Callable:
    return lambda items: progress(items, name, len(items))


# --- results ----------------------------------------------------------------------------------------------------------

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
KEYS = ["task", "student", "encoder", "teachers", *CHOICES, "seed", "metric"]
TABLES = {
    "imagenet": {"top-1": "imagenet_top1"},
    "coco": {"box AP": "box_ap", "mask AP": "mask_ap"},
    "ade20k": {"mIoU": "miou"},
}


def measured(path: Path, *new: Mapping[str, object]) -> pd.DataFrame:
    """The scores on real data in the CSV `path`; `new` rows, `KEYS` and "score", are added or replace equal ones."""
    rows = upsert_rows(path, KEYS, ["score"], new)
    # rows of an earlier version, which had not all choices, have their defaults
    for name, usual in CHOICES.items():
        rows[name] = rows[name].fillna(usual) if name in rows else usual
    return rows.reindex(columns=[*KEYS, "score"]).drop_duplicates(KEYS, keep="last")


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (row, column) of a table. Ours are separate rows: a reconstruction does not reproduce the
    paper."""
    columns = TABLES[table]
    rows = rows[rows.metric.isin(columns) & (rows.task != "linear probe")]
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows.to_dict("records"):
        size = f"ViT-{row['student'][0].upper()}"
        others = [f"{choice} {row[choice]}" for choice, usual in CHOICES.items() if row[choice] != usual]
        name = {
            "distilled": f"reconstruction ({'; '.join([row['teachers'], *others])}), {size}",
            "random": f"from scratch, {size}",
            "teacher": f"{row['teachers'].partition(',')[0]}, ViT-B",
        }[row["encoder"]]
        found.setdefault((name, columns[row["metric"]]), []).append(float(row["score"]))
    return {cell: float(np.mean(scores)) for cell, scores in found.items()}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title, the paper's tables as far as they are known, with our measurements in separate rows."""
    return with_measured("dmt", {table: cells(rows, table) for table in TABLES})
