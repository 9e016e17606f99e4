"""ECAMP's `paper` profile: pre-training and the downstream tasks by the authors' recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from ... import backbones
from ...data import DATASETS, few, present, xrays
from ...data.xrays import CLASSES, ONE_OF
from ...errors import BadParameter, MissingWeights, check_choice
from ...evaluation.tables import Results, published_table
from ...io import papers
from ...io.files import atomic
from ...training.callbacks import ClipNorm, EarlyStop
from ...training.checkpoints import checkpoint_key
from ...training.hardware import Hardware, RunParameters, evaluating, loader
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import adamw
from ..layers.precision import without_autocast
from . import model as ecamp
from . import official, tasks, text, transforms
from .model import ECAMP
from .tasks import EXPANSION, FIRST, SIDE, TASKS
from .text import ReportPairs, Vocabulary
from .variants import METHODS

WORKERS = 16
TEST_BATCH = 64
# pairs that a device processes at once: the 16,384 positions of 64 have 2 GB of logits over 30,000 words
MICRO_BATCH = 64

BOUND = 50  # limit of a downstream training in multiples of the published steps; the authors' code has none
RIGA_PATIENCE = 20  # of RIGA from other encoders than ECAMP's, see `Task.patience`
CLIP = 1.0  # the norm of a gradient

RESULTS = Results.of("ecamp")
tables = RESULTS.tables  # published and measured, by title
TITLES = RESULTS.names["dataset"]  # of the data sets, in the tables


class Parameters(RunParameters, Protocol):
    """The parameters of the notebook that the recipe reads, see paper.yaml."""

    task: str
    dataset: str
    method: str
    labels: str
    encoder: str
    protocol: str


class Result(NamedTuple):
    """What a run of the `paper` profile trained.

    Attributes:
        table: columns task, steps, metric, score; of a pre-training its last loss.
        model: the pre-trained model, in eval mode on the CPU; None without a pre-training.
        batch: two of its pairs.
    """

    table: pd.DataFrame
    model: ECAMP | None = None
    batch: ecamp.Batch | None = None


class Stage(NamedTuple):
    """A task of a run: its parameters, the title of its data, its training, and of a downstream one the test images."""

    p: Parameters
    title: str
    ready: Opened
    test: Dataset | None


def prepare(p: Parameters, out: Path) -> list[Stage]:
    """The tasks of a run, each with its data, model and checkpoint: all that a run reads is opened, nothing is trained.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    stages = []
    real = not p.dry_run or present(p.dataset, p.data_root, *_wanted(p))
    runs = {} if real else {"pre-train": "xrays/mimic-cxr"} | {name: task.dry_set for name, task in TASKS.items()}
    for task, dataset in (runs | {p.task: p.dataset}).items():
        devices = 1 if p.task == "pre-train" != task else p.devices  # only pre-training runs on several
        chosen: Any = SimpleNamespace(**vars(p) | {"task": task, "dataset": dataset, "devices": devices})
        if task == "pre-train":
            training, test, title = pretraining(chosen, out, real), None, f"{p.method} on {dataset}"
        else:
            training, data = downstream(chosen, real)
            test, title = data["test"], f"{task} on {dataset}, {p.labels} % of the labels"
        title += "" if real else ", generated images in its place"
        stages.append(Stage(chosen, title, opened(training, out), test))
    return stages


def run(p: Parameters, out: Path) -> Result:
    """Train `p.task`, and test a downstream one: its score becomes a row of `out`/measured.csv.

    A stopped training resumes from `out`/checkpoints, the final weights are in `out`/trained. A dry run takes two steps
    on a few images of the dataset, or of every task on generated ones where it is not below `data_root`. Raises as
    `prepare`.
    """
    rows, model, batch = [], None, None
    for chosen, title, ready, test in prepare(p, out):
        trained, history = train(ready)
        if test is None:
            pairs: Any = ready.training.data
            model, batch = trained.cpu(), default_collate([pairs[i] for i in range(2)])
            name, score = "last loss", history[-1]["loss"]
        else:
            # the authors validate at the precision of the training, and test in float32
            precision = {"precision": "32-true" if p.precision == "paper" else p.precision}
            score = evaluate(SimpleNamespace(**vars(chosen) | precision), trained, test)
            name = "accuracy" if chosen.dataset in ONE_OF else TASKS[chosen.task].metric.format(p.protocol)
            facts = {key: getattr(chosen, key) for key in RESULTS.keys} | {"labels": int(p.labels), "score": score}
            RESULTS.measured(out / "measured.csv", facts, dry_run=p.dry_run)
        rows.append((title, len(history), name, score))
    return Result(pd.DataFrame(rows, columns=["task", "steps", "metric", "score"]), model, batch)


def _wanted(p: Parameters) -> list[str]:
    """The parts of a set that a run reads, without lists that nobody has; none for pre-training, which reads all."""
    if p.task not in TASKS or p.dataset not in DATASETS:
        return []
    known = xrays.parts(DATASETS[p.dataset])
    lists = TASKS[p.task].lists
    return [part for split in xrays.SPLITS if (part := xrays.part_name(lists, split, p.labels)) in known]


# --- pre-training -----------------------------------------------------------------------------------------------------


def pretraining(p: Parameters, out: Path, real: bool = True) -> Training:
    """The pre-training of a method on reports; in a dry run on a few pairs, generated ones unless `real`.

    Its losses are "mim", "sr" and "mlm". A learned vocabulary is saved in `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    sets = [name for name, d in DATASETS.items() if d.task == "xrays" and "pre-training" in xrays.tasks(name)]
    check_choice("dataset", p.dataset, [*sets, "folder"])
    pairs, facts = _pairs(p, out) if real else _generated_pairs(p)
    options = pretraining_fit(p, len(pairs), published())
    if p.dry_run:  # a step has 8,192 pairs: here each device takes one micro-batch of them
        pairs = few({"train": pairs}, dry_items(p, MICRO_BATCH * p.devices))["train"]

    def build() -> ECAMP:
        torch.manual_seed(p.seed)
        model = METHODS[p.method][0]("paper", words=len(pairs.vocabulary))
        if file := _file(p, "mae"):
            official.load_mae(model, backbones.read_state(file))
        return model

    return Training(
        name=f"{p.method}, {p.dataset}, seed {p.seed}",
        build=build,
        loss=ecamp.pretraining_loss,
        data=pairs,
        fit=options,
        facts={"method": p.method, **facts},
        weights=ECAMP.to_official,
        dry_run=p.dry_run,
    )


def _pairs(p: Parameters, out: Path) -> tuple[ReportPairs, dict[str, Any]]:
    """The training pairs of a method, and their identity; "folder": `data_root` itself.

    A learned vocabulary is saved in `out`: relearned from the same reports it would have other ids.
    """
    transform = transforms.pretrain_transform()
    if p.dataset == "folder":
        reports = xrays.own(p.data_root, transform=transform, task="pre-training")["train"]
    else:
        reports = xrays.reports(p.dataset, p.data_root, transform)
    reports.images.shortest = transforms.SHORTEST
    facts: dict[str, Any] = {"texts": reports.texts, "statements": reports.statements, "windows": reports.windows}
    file = reports.images.folder / "mimic_wordpiece.json"
    if not file.is_file():
        file = out / f"vocabulary {checkpoint_key(texts=reports.texts)}.json"
    if not file.is_file():
        with atomic(file) as temporary:
            Vocabulary.train(reports.texts).tokenizer.save(str(temporary))
    words = Vocabulary.read(file)
    options: dict[str, Any] = {"statements": reports.statements, "windows": reports.windows} | METHODS[p.method][1]
    facts |= {"data_root": Path(p.data_root), "images": reports.images.paths, "vocabulary": words.pieces}
    return ReportPairs(reports.images, reports.texts, words, **options), facts


def _generated_pairs(p: Parameters) -> tuple[ReportPairs, dict[str, Any]]:
    """As `_pairs`, of the real shape, with as many words as MIMIC's vocabulary: the model has the published size."""
    count = dry_items(p, MICRO_BATCH * p.devices)
    images = torch.randn(count, 3, 448, 448, generator=torch.Generator().manual_seed(p.seed))
    reports = ["There is a small right effusion. There is no evidence of pneumothorax."] * count
    words = Vocabulary.train(reports, 200)
    words.pieces += ["[UNK]"] * (30_000 - len(words))
    options: dict[str, Any] = {"statements": ["There is effusion."] * count} | METHODS[p.method][1]
    return ReportPairs(images, reports, words, **options), {}


def published(**changes: float) -> dict[str, float]:
    """The hyper-parameters of pre-training in the authors' scripts (the paper's YAML), but for `changes`."""
    return published_table("ecamp", "recipe-pretraining").set_index("method")["value"].to_dict() | changes


def pretraining_epoch(images: int, r: Mapping[str, float]) -> tuple[int, int, int]:
    """Iterations, steps and pairs per step of an epoch as in the authors' loader, under the settings `r`.

    An iteration is a full batch of a device; the remainder is dropped. Iterations after the last step of the optimiser
    are computed there but have no effect, because gradients are cleared when an epoch begins: here their images are not
    read. With fewer pairs than a step has, all of them are one step.

    Args:
        r: `published()`; gpus, batch_per_gpu and accumulation are read.
    """
    gpus, accumulation = int(r["gpus"]), int(r["accumulation"])
    iterations = -(-images // gpus) // int(r["batch_per_gpu"])
    batch = gpus * int(r["batch_per_gpu"]) * accumulation
    steps = min(iterations // accumulation, images // batch)
    return (iterations, steps, batch) if steps else (accumulation, 1, images)


def pretraining_learning_rates(images: int, r: Mapping[str, float]) -> np.ndarray:
    """The learning rate of each step: linear warm-up, then a cosine to epoch 200 that stops at epoch 120.

    As released, the epoch at step k is counted in the loader's iterations, accumulation * k / iterations: with
    remaining iterations it does not quite reach its end.

    Args:
        images: of the training set.
        r: `published()`.
    """
    iterations, steps, _ = pretraining_epoch(images, r)
    within = np.arange(steps) * int(r["accumulation"]) / iterations
    epoch = (np.arange(int(r["stop_epoch"]))[:, None] + within).ravel()
    falling = 0.5 * (1 + np.cos(np.pi * (epoch - r["warmup_epochs"]) / (r["cosine_end_epoch"] - r["warmup_epochs"])))
    return r["lr"] * np.where(epoch < r["warmup_epochs"], epoch / r["warmup_epochs"], falling)


def pretraining_fit(p: Parameters, pairs: int, r: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of `fit` for the authors' pre-training on a number of pairs.

    Matrices decay, [CLS] token, mask token and word positions among them; vectors and biases do not.

    Args:
        r: `published()`.
    """
    batch, learning_rates = pretraining_epoch(pairs, r)[2], pretraining_learning_rates(pairs, r)
    accumulate = math.ceil(batch / (p.devices * MICRO_BATCH))
    return {
        "epochs": len(learning_rates) / (pairs // batch),
        "batch": batch,
        "optimizer": adamw(r["lr"], r["weight_decay"], betas=(r["beta1"], r["beta2"])),
        "schedule": lambda base, steps, per_epoch: learning_rates[:steps],  # all, but in a dry run
        "seed": p.seed,
        "hardware": Hardware.of(p, "ecamp", workers=WORKERS, accumulate=accumulate),
    }


# --- downstream: training ---------------------------------------------------------------------------------------------


def downstream(p: Parameters, real: bool = True) -> tuple[Training, dict[str, Dataset]]:
    """The training of a downstream task, which ends with the weights that were best on "val", and the data: "train",
    "val" and "test"; in a dry run a few images of each, generated ones unless `real`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    if p.devices > 1:
        accepted = "1: only pre-training runs on several; Dice and BatchNorm need the whole batch"
        raise BadParameter("devices", p.devices, accepted)
    numbers = downstream_recipe(p.task, p.dataset, p.labels)
    count = dry_items(p, int(numbers["batch"]))
    data = splits(p) if real else generated(p, count)
    data = few(data, count) if p.dry_run and real else data
    best = selection(p, lambda model: evaluate(p, model, data["val"]))
    facts = {key: getattr(p, key) for key in ("task", "dataset", "labels", "protocol", "encoder")}
    training = Training(
        name=f"{p.task}, {p.dataset}, {p.labels} %, {p.encoder}, {p.protocol} protocol, seed {p.seed}",
        build=lambda: head(p),
        loss=lambda model, batch: TASKS[p.task].loss(model(batch[0]), batch[1]),
        data=data["train"],
        fit=downstream_fit(p, len(data["train"]), best, numbers),
        facts={"data_root": Path(p.data_root), **facts},
        weights=lambda model: getattr(model, "to_official", model.state_dict)(),
        dry_run=p.dry_run,
    )
    return training, data


def downstream_recipe(task: str, dataset: str, labels: str) -> dict[str, float]:
    """lr, warmup_steps, steps and batch in the authors' scripts; of ChestMNIST those of ChestX-ray14.

    Raises `BadParameter`: there is no script for this task, set and share of labels, for instance classification on the
    fundus sets.
    """
    rows = published_table("ecamp", TASKS[task].numbers).set_index("method").to_dict("index")
    name = f"{TITLES.get(dataset, dataset)}, {labels}%"
    if name not in rows:
        raise BadParameter("dataset", f"{dataset} with {labels} %", f"for {task}: {list(rows)}")
    return rows[name]


def splits(p: Parameters) -> dict[str, Dataset]:
    """The authors' lists of a data set. As released, detection is tested on the validation list."""
    task = TASKS[p.task]
    load = partial(xrays.load, p.dataset, p.data_root, task=task.lists, share=p.labels, seed=p.seed)
    test = task.transform(p.dataset, False)
    return {
        "train": load("train", transform=task.transform(p.dataset, True)),
        "val": load("val", transform=test),
        "test": load(task.released_test if p.protocol == "released" else "test", transform=test),
    }


def generated(p: Parameters, count: int) -> dict[str, Dataset]:
    """So many random images and their truth."""
    generator = torch.Generator().manual_seed(p.seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return dict.fromkeys(xrays.SPLITS, TensorDataset(images, TASKS[p.task].truth(count, p.dataset, generator)))


def encoder(p: Parameters) -> VisionTransformer:
    """The ViT-B/16 of the parameter `encoder`, with the weights of `weights` or of `<data_root>/weights`, or random."""
    torch.manual_seed(p.seed)
    vit = VisionTransformer(img_size=SIDE, num_classes=0, global_pool="")
    nn.init.trunc_normal_(vit.cls_token, std=0.02)  # as the authors' timm; newer ones have 1e-6
    if p.encoder != "random" and (file := _file(p, p.encoder.lower())):
        official.load_vit(vit, backbones.read_state(file), f"{p.encoder}'s ViT-B/16")
    return vit


def _file(p: Parameters, name: str) -> Path | None:
    """A file of the paper's weights: the parameter `weights`, or the default path, where a dry run needs none."""
    entry = next(w for w in papers.paper("ecamp")["weights"] if w["name"] == name)
    folder = Path(p.data_root) / "weights"
    path = Path(p.weights) if p.weights else folder / entry["file"]
    if p.dry_run and not p.weights and not path.is_file():
        print(f"{path} is not here; random weights in this dry run")
        return None
    if not path.is_file():
        ways = [f"put {entry['file']} into {folder}; {entry['source']}", "weights = '<file>'"]
        untrained = ["encoder = 'random', for an untrained one"] if name != "mae" else []
        raise MissingWeights(entry["what"], path.parent, ways + untrained)
    return path


def head(p: Parameters) -> nn.Module:
    """The model of a task on its encoder."""
    return TASKS[p.task].model(encoder(p), len(CLASSES[p.dataset]), p)


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


def selection(p: Parameters, score: Callable[[nn.Module], float]) -> EarlyStop:
    """The choice of the epoch by the score on validation, as released: from 0 on, an AUROC, Dice or mAP as high as the
    best one is a new best, an accuracy is not.
    """
    task, ties = TASKS[p.task], p.dataset not in ONE_OF
    first = 1 + (0 if p.dry_run else task.first.get(p.labels, 0))
    epochs = RIGA_PATIENCE if p.dataset == "fundus/riga" and p.encoder != "ECAMP" else task.patience
    return EarlyStop(score, epochs, first_step=first, ties=ties, patient_ties=ties, start=0.0)


def downstream_fit(p: Parameters, images: int, best: EarlyStop, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of `fit` for a downstream training on a number of images, which ends with the weights of `best`.

    An epoch's last images, too few for a batch, are a separate step. As in the authors' code a training ends when the
    patience is exhausted, or when an epoch ends on a multiple of the published steps; beyond these the cosine rises
    again.

    Args:
        best: `selection`.
        numbers: lr, warmup_steps, steps and batch, as of `downstream_recipe`.
    """
    batch, steps = int(numbers["batch"]), int(numbers["steps"])
    per_epoch = -(-images // batch)
    # the patience stops a training long before; without a limit the schedule may have 10^8 entries
    longest = min(math.lcm(per_epoch, steps), BOUND * steps)
    return {
        "epochs": longest / per_epoch,
        "batch": batch,
        "last": "train",
        "optimizer": TASKS[p.task].optimizer(numbers["lr"]),
        "schedule": lambda base, steps, per_epoch: downstream_learning_rates(numbers, steps),
        "callbacks": [ClipNorm(CLIP), best],
        "seed": p.seed,
        "hardware": Hardware.of(p, "ecamp", workers=WORKERS),
    }


# --- downstream: test -------------------------------------------------------------------------------------------------


def evaluate(p: Parameters, model: nn.Module, part: Dataset) -> float:
    """The score of a model on a split, in percent; nan where the few images of a dry run have none."""
    try:
        return TASKS[p.task].score(outputs(p, model, part), p.protocol)
    except BadParameter:  # a class without positives
        if p.dry_run:
            return math.nan
        raise


@torch.no_grad()
def outputs(p: Parameters, model: nn.Module, part: Dataset) -> Iterator[tuple[Any, Tensor]]:
    """Outputs and labels, batch by batch, on the CPU. Afterwards the model is on its former device."""
    hardware = Hardware.of(p, "ecamp", workers=WORKERS)
    with evaluating(hardware, model) as device:
        for images, truth in loader(part, TEST_BATCH, hardware, device):
            out = model(images.to(device, non_blocking=True))
            with without_autocast(device):  # of what is done with them
                yield [x.float().cpu() for x in out] if isinstance(out, list) else out.float().cpu(), truth


# --- protocol ---------------------------------------------------------------------------------------------------------


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    r, crop = published(), transforms.train_transform().transforms[1].scale
    warp = transforms.MaskTransform("xrays/rsna", True).warp
    first, expansion = [*FIRST.values()], [*EXPANSION.values()]
    one_of = " and ".join(TITLES[name] for name in ONE_OF)
    precision = papers.paper("ecamp")["precision"]
    return {
        "pre-training, optimiser": (
            f"AdamW, betas {r['beta1']:g} and {r['beta2']:g}, learning rate {r['lr']:g}, decay {r['weight_decay']:g} "
            "on matrices, no clipping"
        ),
        "pre-training, schedule": (
            f"warm-up of {r['warmup_epochs']:g} epochs, cosine to epoch {r['cosine_end_epoch']:g}, stopped at "
            f"{r['stop_epoch']:g}"
        ),
        "pre-training, batch": (
            f"{r['effective_batch']:,.0f} pairs: {r['gpus']:g} devices x {r['batch_per_gpu']:g} x "
            f"{r['accumulation']:g} iterations; the remainder of an epoch is dropped"
        ),
        "pre-training, images": (
            f"{r['high_resolution']:g} pixels (the encoder sees {r['low_resolution']:g}); crop of "
            f"{transforms.PRETRAIN_CROP[0]:.0%} to {transforms.PRETRAIN_CROP[1]:.0%} of the image, flip; mean "
            f"{transforms.PRETRAIN_MEAN}, std {transforms.PRETRAIN_STD}; the words left and right stay; a JPEG whose "
            f"sides stay above {transforms.SHORTEST} pixels is decoded at half of its size (ours)"
        ),
        "pre-training, text": (
            f"{r['text_length']:g} tokens; statements inserted with {text.SPLICED:g}; hidden: entities "
            f"{text.ENTITY:g}, other words {text.OTHER:g}, words of a text without entities {text.NO_ENTITY:g}"
        ),
        "precision": f"{precision} on a GPU; downstream tests in float32",
        "classification": (
            f"SGD, momentum {tasks.MOMENTUM:g}, no decay; crop of {crop[0]:.0%} to {crop[1]:.0%} of the image, flip; "
            f"test: short side to 224, centre crop; mean {transforms.MEAN}, std {transforms.STD}"
        ),
        "segmentation": (
            f"AdamW, decay {tasks.DECAY:g} on all tensors; encoder frozen; scale x {warp.transforms[0].scale[0]:g} to "
            f"{warp.transforms[0].scale[1]:g} and rotation up to {warp.transforms[0].degrees[1]:g} degrees, p "
            f"{warp.p:g}"
        ),
        "detection": (
            f"AdamW, decay {tasks.DECAY:g} on all tensors; encoder frozen; no augmentation; bottlenecks reduced by "
            f"{expansion[0]} (1 %), {expansion[1]} (10 %), {expansion[2]} (100 %)"
        ),
        "resizing downstream": "segmentation and detection without antialiasing; masks of RSNA nearest, others by area",
        "schedule downstream": (
            "linear warm-up, cosine; the first step has 1 / warm-up steps of the peak; learning rates, steps and "
            "batches in the tables above"
        ),
        "clipping downstream": f"norm of the gradient {CLIP:g}",
        "last batch downstream": "the last images of an epoch are a smaller batch",
        "selection": (
            "best AUROC, accuracy, Dice or mAP on validation, after each epoch; of equal ones the later, but for "
            f"accuracy; detection from the first epoch that ends after step {first[0]} (1 %), {first[1]} (10 %), "
            f"{first[2]} (100 %)"
        ),
        "stopping": (
            f"{TASKS['fine-tune'].patience} epochs without a new best (segmentation {TASKS['segment'].patience}; "
            f"RIGA {RIGA_PATIENCE} for other encoders), or an epoch that ends on a multiple of the steps"
        ),
        "metrics": (
            f"mean AUROC of the classes; accuracy for {one_of}; Dice at 0.5; mAP at IoU "
            f"{tasks.radiology.IOUS[0]:.2f} to {tasks.radiology.IOUS[7]:.2f}"
        ),
        "detection's test split": 'the validation list (protocol = "released")',
        "devices": "pre-training on several, downstream tasks on one",
        "seeds": (
            "the authors: 42, one run; sweep: none found; four A100, about 15 h of pre-training (ToniChopp/ECAMP#6)"
        ),
    }
