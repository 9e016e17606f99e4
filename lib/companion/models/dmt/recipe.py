"""DMT (a reconstruction): what the notebook trains live, at pocket scale or with the ancestors' published settings."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from ...data import pretraining
from ...data.pretraining_sets import ADE20K, COCO, IMAGENET
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics import detection, landcover
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.files import atomic
from ...ops.progress import progress
from ...toy.ablations import dmt as study
from ...toy.datasets import collage
from ...toy.encoders import teachers as taught
from ...training.fit import fit, learning_rates, predict
from . import cache as dmt_cache
from . import downstream as down
from . import model as dmt
from . import teachers as dmt_teachers
from .ancestors import reheaded
from .model import DMT, Teachers, ViT

WORKERS = min(16, os.cpu_count() or 1)
AT_ONCE = 256  # pictures that go through a device together; the gradients of a step's pictures are added up
# a, b, c: token, feature-map and relation loss
LOSSES = {"token and map": (1, 1, 0), "token": (1, 0, 0), "map": (0, 1, 0), "with relations": (1, 1, 1)}
USUAL = {"distil": IMAGENET, "fine-tune": IMAGENET, "linear probe": IMAGENET, "detect": COCO, "segment": ADE20K}
LIVE = ("DMT", "iBOT only")  # of the pocket run: three teachers, and the one whose student does best alone
LIVE_STEPS = 250  # the losses are seen to fall; the study's students take twice as many
DRY_BATCH = 2
DRY_CLASSES = {"fine-tune": 1000, "linear probe": 10, "detect": 80, "segment": 150}  # ten can be probed on twenty


@dataclass(frozen=True)
class Setting:
    """What is distilled into what.

    Attributes:
        title: of the data.
        methods: what is trained.
        rates: their learning rates.
        teachers: by name; asked, or cached before.
        build: the model of a method, before training.
        learn: trains a model in place: (model, method, list that receives the losses of each step, arguments of `fit`)
            to the history. A row of the list: the total, token and map loss of each head, relation of each teacher.
        parts: "train" and "test" of the pocket pictures, to probe and to look at; empty at the paper profile.
        kept: the file that a training of many hours leaves its student in, the parameter `weights`; beside it is the
            checkpoint that it goes on from after a stop. None where nothing is kept.
    """

    title: str
    methods: tuple[str, ...]
    rates: dict[str, float]
    teachers: Teachers
    build: Callable[[str], DMT]
    learn: Callable[..., list[dict]]
    parts: dict = field(default_factory=dict)
    kept: Path | None = None


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; what is generated or cached is written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    return _distil(p, out)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The collages of the run's seed, and the study's trainings of two methods, cut to `LIVE_STEPS`."""
    root = str(out / "data")
    collage.write(study.folder(root, p.seed), p.seed)
    chosen = {method: rates[study.TASK, method] for method in LIVE}

    def learn(model: DMT, method: str, terms: list[list[float]] | None = None, **changes: object) -> list[dict]:
        data = study.assemble(method, p.seed, root)[2]

        def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            found = model(batch[0], batch[1:])
            if terms is not None:
                terms.append(torch.cat([found.total.detach()[None], *(t.detach() for t in found[1:])]).tolist())
            return found.total

        epochs = LIVE_STEPS / (len(data) // study.RECIPE["batch"])
        options = {"epochs": epochs, "lr": chosen[method], "seed": p.seed, "name": method}
        return fit(model, loss, data, **(study.RECIPE | options | changes))

    return Setting(
        title="pocket collages",
        methods=LIVE,
        rates=chosen,
        teachers=Teachers(taught.load()),
        build=lambda method: study.assemble(method, p.seed, root)[0],
        learn=learn,
        parts={split: study.part(root, p.seed, split) for split in ("train", "test")},
    )


# --- distillation by the ancestors' settings --------------------------------------------------------------------------


def recipe(task: str) -> dict[str, float]:
    """The numbers of a task in the paper's YAML, G2SD's and MAE's; those that it has."""
    row = published_table("dmt", "recipe").set_index("method").loc[task]
    return {name: float(value) for name, value in row.items() if not np.isnan(value)}


def named(text: str) -> list[str]:
    """Names of teachers between commas. Raises `BadParameter` for one that is unknown, or twice there, or none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or set(names) - set(dmt_teachers.RELEASED):
        raise BadParameter("teachers", text, f"one or more of {list(dmt_teachers.RELEASED)}, each once, between commas")
    return names


def files(text: str) -> dict[str, str]:
    """Files of teachers, "name=file" between commas. Raises `BadParameter`."""
    found = {}
    for entry in (entry.strip() for entry in text.split(",") if entry.strip()):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not equals or not path or name not in dmt_teachers.RELEASED:
            raise BadParameter("teacher_files", entry, f"name=file, the name one of {list(dmt_teachers.RELEASED)}")
        found[name] = path
    return found


def released(p: SimpleNamespace, name: str) -> ViT:
    """A teacher as the parameters have it: from its file, from the cache, or random in a dry run without a file."""
    given = files(p.teacher_files)
    torch.manual_seed(p.seed + zlib.crc32(name.encode()))  # random ones differ from each other
    return dmt_teachers.released(name, given.get(name, "random" if p.dry_run else "pretrained"))


def teachers(p: SimpleNamespace) -> Teachers:
    """The teachers that `teachers`, `teacher_files` and `teacher_view` ask for."""
    names = named(p.teachers)
    if spare := set(files(p.teacher_files)) - set(names):
        raise BadParameter("teacher_files", sorted(spare), f"files of {names}, which are asked for")
    return Teachers({name: released(p, name) for name in names}, view=p.teacher_view)


def build(p: SimpleNamespace, taught_by: Teachers) -> DMT:
    """Student, adapters and decoder of random weights, drawn from the seed."""
    torch.manual_seed(p.seed)
    token, mapped, related = LOSSES[p.losses]
    heads = set(taught_by.heads)
    student = dmt.build(p.student, last_heads=max(heads) if related else None)
    return DMT(
        student,
        taught_by.widths if p.cached else taught_by,
        mask_ratio=p.mask_ratio,
        statistics="running",
        target_norm=p.target_norm,
        fusion=p.fusion,
        token=token,
        map=mapped,
        relation=related,
        decoder=p.student,
    )


def augment(size: int = 224) -> v2.Transform:
    """G2SD's, of tensors in [0, 1]: a crop of 20 to 100 %, bicubic, a flip, ImageNet's mean and deviation."""
    cut = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    # bicubic overshoots a little
    inside = v2.Lambda(functools.partial(torch.clamp, min=0, max=1))
    return v2.Compose([cut, inside, v2.RandomHorizontalFlip(), v2.Normalize(list(down.MEAN), list(down.STD))])


class Augmented(Dataset):
    """The same pictures, augmented anew each time."""

    def __init__(self, data: Dataset, transform: Callable[[Tensor], Tensor]):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.transform(self.data[index][0]),)


def distil_rates(steps_an_epoch: int) -> np.ndarray:
    """The learning rate at each step of G2SD's generic stage."""
    r = recipe("distil")
    steps, warmup = int(r["epochs"]) * steps_an_epoch, int(r["warmup_epochs"]) * steps_an_epoch
    return learning_rates("cosine", r["lr"], steps, warmup, r["final_lr"])


def distil(
    p: SimpleNamespace,
    model: DMT,
    data: Dataset,
    terms: list[list[float]] | None = None,
    rates: np.ndarray | None = None,
    at_once: int = AT_ONCE,
    **changes: object,
) -> list[dict]:
    """Train by G2SD's recipe, in place; return the history.

    Args:
        data: items (picture,), or (picture, tokens of each teacher) of a cache.
        terms: receives the losses of every step, see `Setting`; on several devices the total alone, and after a stop
            those of the steps since.
        rates: of each step; the published ones without it.
        at_once: pictures that go through a device together. (Targets standardised by the running statistics do not
            depend on it.)
        changes: arguments of `fit`.
    """
    r = recipe("distil")
    options = {
        "batch": min(int(r["batch"]), len(data)),
        "seed": p.seed,
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "workers": WORKERS,
        "name": "distillation",
        "weight_decay": r["weight_decay"],
        "betas": (0.9, r["beta2"]),
    } | changes
    per_epoch = len(data) // options["batch"]
    rates = distil_rates(per_epoch) if rates is None else rates
    seen = []

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        found = model(batch[0], batch[1:] or None)
        if terms is not None:
            seen.append(torch.cat([found.total.detach()[None], *(part.detach() for part in found[1:])]).tolist())
        return found.total

    sides = {"all": ([t for t in model.parameters() if t.requires_grad], rates)}
    parts = -(-options["batch"] // (options["devices"] * at_once))
    history = fit(model, loss, data, epochs=len(rates) / per_epoch, sides=sides, accumulate=parts, **options)
    if seen:
        terms.extend(np.reshape(seen, (-1, parts, len(seen[0]))).mean(1).tolist())
    elif terms is not None:  # seen by other processes, or before a stop
        terms.extend([row["loss"]] for row in history)
    return history


def _distil(p: SimpleNamespace, out: Path) -> Setting:
    taught_by, steps, kept = teachers(p), {}, None
    if p.cached and p.losses == "with relations":
        raise BadParameter("losses", p.losses, "any other with cached teachers: relations are not kept")
    if p.dry_run:
        generator = torch.Generator().manual_seed(p.seed)
        raw: Dataset = TensorDataset(torch.rand(2 * DRY_BATCH, 3, 224, 224, generator=generator))
        title = "generated pictures, random teachers without a file (dry run: losses mean nothing)"
        steps = {"rates": np.full(2, recipe("distil")["lr"]), "batch": DRY_BATCH, "workers": 0}
    else:
        raw, kept = _pictures(p), out / "trained" / f"ViT-{p.student}, seed {p.seed}, {_fingerprint(p)}.safetensors"
        title = f"{p.dataset or USUAL['distil']}, {len(raw):,} pictures"

    @functools.cache
    def data() -> Dataset:
        if not p.cached:
            return Augmented(raw, augment())
        views = dmt_cache.Views(raw, augment(), seed=p.seed)
        cache = dmt_cache.build(
            out / "teachers",
            taught_by,
            views,
            workers=0 if p.dry_run else WORKERS,
            accelerator=p.accelerator,
            precision=p.precision,
        )
        return dmt_cache.Distilled(views, cache)

    def learn(model: DMT, method: str, terms: list[list[float]] | None = None, **changes: object) -> list[dict]:
        going_on = {} if kept is None else {"checkpoint": kept.with_suffix(".pt"), "resume": True}
        history = distil(p, model, data(), terms, **(steps | going_on | {"name": method} | changes))
        if kept is not None:
            save(model, kept)
        return history

    return Setting(
        title=title,
        methods=("DMT",),
        rates={"DMT": recipe("distil")["lr"]},
        teachers=taught_by,
        build=lambda method: build(p, taught_by),
        learn=learn,
        kept=kept,
    )


def _fingerprint(p: SimpleNamespace) -> str:
    """Of what decides a training: another one has another checkpoint. Files of weights count by size and date."""
    asked = (
        "task",
        "dataset",
        "data_root",
        "encoder",
        "student",
        "teachers",
        "teacher_files",
        "teacher_view",
        "target_norm",
        "fusion",
        "losses",
        "mask_ratio",
        "cached",
        "weights",
    )
    found = [(name, getattr(p, name)) for name in asked]
    for path in (p.weights, *files(p.teacher_files).values()):
        if path and Path(path).is_file():
            found.append((Path(path).stat().st_size, Path(path).stat().st_mtime_ns))
    return f"{zlib.crc32(repr(found).encode()):08x}"


def _pictures(p: SimpleNamespace) -> Dataset:
    """ImageNet's training pictures; "folder": all below `data_root`, or below its `train` where it has one, at any
    depth, since no label is asked for. In [0, 1], at their own size."""
    dataset = p.dataset or IMAGENET
    if dataset == "folder":
        return pretraining.pictures(p.data_root)
    if dataset != IMAGENET:
        raise BadParameter("dataset", dataset, [IMAGENET, "folder"])
    return pretraining.load(dataset, p.data_root, "train")


def save(model: DMT, path: Path) -> Path:
    """Write the student alone, under the official names of MAE, MoCo v3, iBOT and DINO: the parameter `weights`.

    Tensors do not say heads; the file's metadata does, in which a student that learned relations has a last block with
    as many as its teachers."""
    student = model.export()
    heads = {"heads": str(student.blocks[0].attn.num_heads), "last_heads": str(student.heads)}
    with atomic(path) as temporary:
        save_file(student.to_official(), temporary, heads)
    return path


# --- downstream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Downstream:
    """A task on a set, what it is trained on and how it is scored.

    Attributes:
        title: of task, set and encoder.
        data: "train" and "test".
        build: the model, before training.
        learn: trains a model in place: (model, arguments of `fit`) to the history.
        score: of a model on "test": by metric, in percent.
        recipe: the numbers of the training.
    """

    title: str
    data: dict[str, Dataset]
    build: Callable[[], nn.Module]
    learn: Callable[..., list[dict]]
    score: Callable[[nn.Module], dict[str, float]]
    recipe: dict[str, float]


def encoder(p: SimpleNamespace) -> ViT:
    """What a task starts from: `weights`, the first teacher, or a random ViT of the student's size.

    Raises:
        MissingWeights: a distilled student was never released: train one first.
        CorruptFile, BadCheckpoint: the file cannot be read, or is of something else.
    """
    if p.encoder == "teacher":
        return released(p, named(p.teachers)[0])
    if p.encoder == "random" or (p.dry_run and not p.weights):
        torch.manual_seed(p.seed)
        return dmt.build(p.student)
    if not Path(p.weights).is_file():
        ways = ["task = 'distil' trains one; its file, written by `runs.dmt.save`, goes into `weights`"]
        raise MissingWeights("a distilled student (none was released)", Path(p.weights or "weights"), ways)
    state, heads = dmt_teachers.read(p.weights), {}
    if Path(p.weights).suffix == ".safetensors":
        with safe_open(p.weights, "pt") as file:
            heads = file.metadata() or {}
    student = ViT.from_official(state, int(heads["heads"]) if "heads" in heads else None, "a distilled student")
    if "last_heads" in heads:
        reheaded(student.blocks[-1].attn, int(heads["last_heads"]))
    return student


def downstream(p: SimpleNamespace, out: Path | None = None) -> Downstream:
    """What the parameters `task`, `dataset`, `encoder`, `student` and `weights` ask for.

    Args:
        out: the run's folder, where a training keeps its checkpoint and goes on after a stop; None: it does not.

    Raises:
        BadParameter, MissingData, MissingWeights, BadCheckpoint: with what to change or get.
    """
    if p.task == "distil" or p.task not in USUAL:
        raise BadParameter("task", p.task, [task for task in USUAL if task != "distil"])
    dataset = p.dataset or USUAL[p.task]
    if dataset != USUAL[p.task]:
        raise BadParameter("dataset", dataset, [USUAL[p.task], "empty"])
    numbers = recipe(p.task)
    if p.dry_run:
        numbers = numbers | {"batch": 1 if p.task == "detect" else DRY_BATCH}
        title = f"{p.task}, generated pictures in the shape of {dataset} (dry run: scores mean nothing)"
    else:
        title = f"{p.task} on {dataset}, {p.encoder} encoder"
    make = {"fine-tune": _fine_tune, "linear probe": _probe, "detect": _detect, "segment": _segment}[p.task]
    found = make(p, title, numbers)
    if p.dry_run or out is None:
        return found
    checkpoint = out / "trained" / f"{p.task}, seed {p.seed}, {_fingerprint(p)}.pt"
    going_on = {"checkpoint": checkpoint, "resume": True}
    return replace(found, learn=lambda model, **changes: found.learn(model, **(going_on | changes)))


def _options(p: SimpleNamespace, numbers: Mapping[str, float], count: int, changes: Mapping) -> dict:
    """Arguments of `fit` that all tasks share."""
    return {
        "batch": min(int(numbers["batch"]), count),
        "seed": p.seed,
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "workers": 0 if p.dry_run else WORKERS,
        "weight_decay": numbers["weight_decay"],
        "name": p.task,
    } | changes


def _epochs(steps: int, train: Dataset, options: Mapping) -> float:
    """Passes that take so many steps: `fit` leaves out the last partial batch of each."""
    return steps / (len(train) // options["batch"])


def _images(p: SimpleNamespace, split: str, transform: Callable) -> Dataset:
    if not p.dry_run:
        return pretraining.load(IMAGENET, p.data_root, split, transform)
    count, classes = (20 if p.task == "linear probe" else 2 * DRY_BATCH), DRY_CLASSES[p.task]
    generator = torch.Generator().manual_seed(p.seed + (split == "test"))
    images = torch.randn(count, 3, 224, 224, generator=generator)
    return TensorDataset(images, torch.arange(count) % classes)


def _top1(p: SimpleNamespace, model: nn.Module, data: Dataset) -> dict[str, float]:
    batch, workers = (DRY_BATCH, 0) if p.dry_run else (256, WORKERS)
    logits = predict(model, data, batch=batch, accelerator=p.accelerator, precision=p.precision, workers=workers)
    labels = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)
    return {"top-1": 100 * float((logits.argmax(1) == labels).float().mean())}


def _fine_tune(p: SimpleNamespace, title: str, numbers: Mapping[str, float]) -> Downstream:
    data = {"train": _images(p, "train", down.train_transform()), "test": _images(p, "test", down.test_transform())}
    classes = DRY_CLASSES["fine-tune"]

    def learn(model: nn.Module, **changes: object) -> list[dict]:
        train, loss = data["train"], down.mixed_loss(classes)
        options = _options(p, numbers, len(train), changes)
        per_epoch = len(train) // options["batch"]
        steps = 2 if p.dry_run else int(numbers["epochs"]) * per_epoch
        warmup = 0 if p.dry_run else int(numbers["warmup_epochs"]) * per_epoch
        rates = learning_rates("cosine", numbers["lr"], steps, warmup, numbers["final_lr"])
        sides = down.layer_rates(model, model, rates, numbers["layer_decay"])
        parts = -(-options["batch"] // (p.devices * AT_ONCE))
        return fit(model, loss, train, epochs=steps / per_epoch, sides=sides, accumulate=parts, **options)

    return Downstream(
        title=title,
        data=data,
        build=lambda: down.classifier(encoder(p), classes, drop_path=numbers["drop_path"]),
        learn=learn,
        score=lambda model: _top1(p, model, data["test"]),
        recipe=dict(numbers),
    )


def _probe(p: SimpleNamespace, title: str, numbers: Mapping[str, float]) -> Downstream:
    """Features are computed once, of whole pictures without augmentation."""
    data = {split: _images(p, split, down.test_transform()) for split in ("train", "test")}
    classes = DRY_CLASSES["linear probe"] if p.dry_run else 1000

    def learn(model: nn.Sequential, **changes: object) -> list[dict]:
        train = data["train"]
        options = _options(p, numbers, len(train), changes)
        features = predict(
            model[0],
            train,
            batch=DRY_BATCH if p.dry_run else 256,
            accelerator=p.accelerator,
            precision=p.precision,
            workers=options["workers"],
        )
        labels = train.tensors[1] if isinstance(train, TensorDataset) else torch.tensor(train.labels)
        per_epoch = len(features) // options["batch"]
        epochs = 2 / per_epoch if p.dry_run else numbers["epochs"]
        warmup = 0.0 if p.dry_run else numbers["warmup_epochs"] / numbers["epochs"]
        del options["weight_decay"]
        model[1], history = down.probe(
            features,
            labels,
            classes,
            epochs=epochs,
            lr=numbers["lr"],
            warmup=warmup,
            final_lr=numbers["final_lr"],
            **options | {"workers": 0},
        )
        return history

    return Downstream(
        title=title,
        data=data,
        build=lambda: nn.Sequential(down.Features(encoder(p)), nn.Identity()),  # `learn` puts the probe there
        learn=learn,
        score=lambda model: _top1(p, model, data["test"]),
        recipe=dict(numbers),
    )


class _Generated(Dataset):
    """Pictures of COCO's or ADE20K's kind: noise, with a box in it, or with two halves."""

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


def _detect(p: SimpleNamespace, title: str, numbers: Mapping[str, float]) -> Downstream:
    size = 1024
    if p.dry_run:
        data: dict = {"train": _Generated("detect", 2, size, p.seed), "test": _Generated("detect", 1, size, p.seed + 9)}
    else:
        data = {split: pretraining.load(COCO, p.data_root, split) for split in ("train", "test")}

    def learn(model: nn.Module, **changes: object) -> list[dict]:
        train = down.Crops(data["train"], size)
        options = _options(p, numbers, len(train), changes)
        steps = 2 if p.dry_run else int(numbers["steps"])
        step = np.arange(steps)
        # x 0.1 twice, and a linear warm-up, as in the script
        rates = numbers["lr"] * np.where(step < DROPS[0], 1.0, np.where(step < DROPS[1], 0.1, 0.01))
        if not p.dry_run:
            rates = rates * np.minimum(1, (step + 1) / numbers["warmup_steps"])
        sides = down.layer_rates(model, model.backbone.vit, rates, numbers["layer_decay"])
        parts = max(1, options["batch"] // (p.devices * 8))
        return fit(
            model,
            down.detection_loss,
            train,
            epochs=_epochs(steps, train, options),
            sides=sides,
            accumulate=parts,
            **options,
        )

    def score(model: nn.Module) -> dict[str, float]:
        test, device = data["test"], _device(p)
        rows = down.detections(model, test, test.categories, device=device, progress=_bar("detection"))
        found = {kind: detection.evaluate(test.truth, rows, kind=kind).totals for kind in detection.KINDS}
        return {"box AP": found["bbox"]["AP"], "mask AP": found["segm"]["AP"]}

    return Downstream(
        title=title,
        data=data,
        build=lambda: down.detector(encoder(p), DRY_CLASSES["detect"], size=size, drop_path=numbers["drop_path"]),
        learn=learn,
        score=score,
        recipe=dict(numbers),
    )


DROPS = (163_889, 177_546)  # steps of 184,375 at which the rate falls to a tenth


def _segment(p: SimpleNamespace, title: str, numbers: Mapping[str, float]) -> Downstream:
    size, classes = 512, DRY_CLASSES["segment"]
    if p.dry_run:
        data: dict = {
            "train": _Generated("segment", 2 * DRY_BATCH, size, p.seed),
            "test": _Generated("segment", 1, size, p.seed + 9),
        }
    else:
        data = {split: pretraining.load(ADE20K, p.data_root, split) for split in ("train", "test")}

    def learn(model: nn.Module, **changes: object) -> list[dict]:
        train = down.SceneCrops(data["train"], size)
        options = _options(p, numbers, len(train), changes)
        steps = 2 if p.dry_run else int(numbers["steps"])
        warmup = 0 if p.dry_run else int(numbers["warmup_steps"])
        rates = learning_rates("linear", numbers["lr"], steps, warmup, numbers["final_lr"])
        sides = down.layer_rates(model, model.vit, rates, numbers["layer_decay"])
        return fit(model, down.segmentation_loss, train, epochs=_epochs(steps, train, options), sides=sides, **options)

    def score(model: nn.Module) -> dict[str, float]:
        test, device = data["test"], _device(p)
        model = model.to(device).eval()
        normalise = v2.Normalize(list(down.MEAN), list(down.STD))
        matrix = torch.zeros(classes, classes, dtype=torch.long)
        for i in _bar("segmentation")(range(len(test))):
            image, truth = test[i]
            # the short side to 512, as mmseg tests; the answer back to the picture's own size
            factor = size / min(image.shape[1:])
            side = [max(1, round(n * factor)) for n in image.shape[1:]]
            resized = normalise(v2.functional.resize(image, side, antialias=True).float() / 255)
            logits = down.slide(model, resized.to(device), size)
            whole = nn.functional.interpolate(logits[None], image.shape[1:], mode="bilinear", align_corners=False)
            matrix += landcover.confusion(truth, whole[0].argmax(0).cpu(), classes)
        return {"mIoU": landcover.scores(matrix).miou}

    def build() -> down.Segmenter:
        vit = encoder(p)
        depth = len(vit.blocks)
        layers = tuple(depth * i // 12 - 1 for i in (4, 6, 8, 12))
        return down.Segmenter(vit, classes, layers=layers, drop_path=numbers["drop_path"])

    return Downstream(title=title, data=data, build=build, learn=learn, score=score, recipe=dict(numbers))


def _device(p: SimpleNamespace) -> str:
    found = p.accelerator
    return ("cuda" if torch.cuda.is_available() else "cpu") if found == "auto" else found


def _bar(name: str) -> Callable:
    return lambda numbers: progress(numbers, name, len(numbers))


# --- results ----------------------------------------------------------------------------------------------------------

CHOICES = {
    "teacher_view": "full",
    "target_norm": "channel",
    "fusion": "separate",
    "losses": "token and map",
    "mask_ratio": 0.75,
}
"""Of the reconstruction, with what is taken unless something else is asked for."""
KEYS = ["task", "student", "encoder", "teachers", *CHOICES, "seed", "metric"]
TABLES = {
    "imagenet": {"top-1": "imagenet_top1"},
    "coco": {"box AP": "box_ap", "mask AP": "mask_ap"},
    "ade20k": {"mIoU": "miou"},
}


def measured(path: Path, *new: Mapping[str, object]) -> pd.DataFrame:
    """The scores on real data in the CSV `path`; `new` rows, `KEYS` and "score", are added, or replace theirs."""
    return upsert_rows(path, KEYS, ["score"], new)


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (row, column) of a table. Ours are rows of their own: a reconstruction reproduces nothing."""
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
    """By title, the paper's tables as far as they are known, with what was measured in rows of its own."""
    found = {}
    for table in TABLES:
        frame = published_table("dmt", table)
        found[frame.attrs["title"]] = compare_published(frame, cells(rows, table))
    return found
