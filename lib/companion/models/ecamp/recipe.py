"""ECAMP's `paper` profile: pre-training and the downstream tasks by the authors' recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ... import backbones
from ...data import DATASETS, few, present, xrays
from ...data.xrays import CLASSES, ONE_OF, tasks
from ...errors import BadParameter, MissingWeights, check_choice
from ...evaluation.metrics import accuracy, radiology
from ...evaluation.tables import Results, published_table
from ...io import papers
from ...io.files import atomic
from ...training.callbacks import ClipNorm, EarlyStop
from ...training.checkpoints import checkpoint_key
from ...training.hardware import Hardware, RunParameters, evaluating
from ...training.recipe import Training, dry_items
from ...training.recipe import run as train
from ...training.schedules import adamw, sgd
from ..layers.precision import without_autocast
from . import detection, heads, official, text, transforms
from . import model as ecamp
from .model import ECAMP
from .text import Pairs, Vocabulary
from .variants import METHODS

SIDE = 224  # of an image downstream
WORKERS = 16
TEST_BATCH = 64
# pairs that a device processes at once: the 16,384 positions of 64 have 2 GB of logits over 30,000 words
MICRO_BATCH = 64

KINDS = {
    "fine-tune": "classification",
    "linear probe": "classification",
    "segment": "segmentation",
    "detect": "detection",
}
# the tasks of a dry run without data, and the sets that their generated images stand for
DRY_TASKS = {
    "pre-train": "xrays/mimic-cxr",
    "fine-tune": "xrays/chestx-ray14",
    "linear probe": "xrays/covidx",
    "segment": "xrays/siim",
    "detect": "xrays/rsna",
}
TABLES = {
    "fine-tune": "recipe-finetune",
    "linear probe": "recipe-linear",
    "segment": "recipe-segmentation",
    "detect": "recipe-detection",
}
FIRST = {"1": 60, "10": 100, "100": 50}  # step after which detection is validated, by percent of the labels
EXPANSION = {"1": 8, "10": 8, "100": 4}  # of the detector's bottlenecks
BOUND = 50  # limit of a downstream training in multiples of the published steps; the authors' code has none
CLIP, MOMENTUM, DECAY = 1.0, 0.9, 0.05  # the norm of a gradient; SGD's; AdamW's weight decay

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


def run(p: Parameters, out: Path) -> Result:
    """Train `p.task`, and test a downstream one: its score becomes a row of `out`/measured.csv.

    A stopped training resumes from `out`/checkpoints, the final weights are in `out`/trained. A dry run takes two steps
    on a few images of the dataset, or of every task on generated ones where it is not below `data_root`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `BadCheckpoint`: with the change or download needed.
    """
    rows, model, batch = [], None, None
    real = not p.dry_run or present(p.dataset, p.data_root, *_wanted(p))
    for task, dataset in (({} if real else DRY_TASKS) | {p.task: p.dataset}).items():
        devices = 1 if p.task == "pre-train" != task else p.devices  # only pre-training runs on several
        chosen: Any = SimpleNamespace(**vars(p) | {"task": task, "dataset": dataset, "devices": devices})
        if task == "pre-train":
            training, title = pretraining(chosen, out, real), f"{p.method} on {dataset}"
            trained, history = train(training, out)
            pairs: Any = training.data()  # type: ignore[misc]
            model, batch = trained.cpu(), default_collate([pairs[i] for i in range(2)])
            name, score = "last loss", history[-1]["loss"]
        else:
            (training, data), title = downstream(chosen, real), f"{task} on {dataset}, {p.labels} % of the labels"
            trained, history = train(training, out)
            name, score = metric(chosen), evaluate(in_test(chosen), trained, data["test"])
            facts = {key: getattr(chosen, key) for key in RESULTS.keys} | {"labels": int(p.labels), "score": score}
            RESULTS.measured(out / "measured.csv", facts, dry_run=p.dry_run)
        title += "" if real else ", generated images in its place"
        rows.append((title, len(history), name, score))
    return Result(pd.DataFrame(rows, columns=["task", "steps", "metric", "score"]), model, batch)


def _wanted(p: Parameters) -> list[str]:
    """The parts of a set that a run reads, without lists that nobody has; none for pre-training, which reads all."""
    kind = KINDS.get(p.task, "")
    read = [xrays.part_name(kind, split, p.labels) for split in xrays.SPLITS]
    known = xrays.parts(DATASETS[p.dataset]) if p.dataset in DATASETS else ()
    return [part for part in read if part in known]


# --- pre-training -----------------------------------------------------------------------------------------------------


def pretraining(p: Parameters, out: Path, real: bool = True) -> Training:
    """The pre-training of a method on reports; in a dry run on a few pairs, generated ones unless `real`.

    Its losses are "mim", "sr" and "mlm". A learned vocabulary is saved in `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    sets = [name for name, d in DATASETS.items() if d.task == "xrays" and "pre-training" in tasks(name)]
    check_choice("dataset", p.dataset, [*sets, "folder"])
    pairs, facts = _pairs(p, out) if real else _generated_pairs(p)
    options = pretraining_fit(p, len(pairs), published())
    if p.dry_run:  # a step has 8,192 pairs: here each device takes one micro-batch of them
        pairs = few({"train": pairs}, dry_items(p, MICRO_BATCH * p.devices))["train"]

    def build() -> ECAMP:
        torch.manual_seed(p.seed)
        model = METHODS[p.method][0]("paper", words=len(pairs.vocabulary))
        if file := _file(p, "mae"):
            model.load_mae(backbones.read_state(file))
        return model

    return Training(
        name=f"{p.method}, {p.dataset}, seed {p.seed}",
        build=build,
        loss=ecamp.pretraining_loss,
        data=lambda: pairs,
        fit=options,
        facts={"method": p.method, **facts},
        weights=ECAMP.to_official,
        dry_run=p.dry_run,
    )


def _pairs(p: Parameters, out: Path) -> tuple[Pairs, dict[str, Any]]:
    """The training pairs of a method, and their identity; "folder": `data_root` itself.

    A learned vocabulary is saved in `out`: relearned from the same reports it would have other ids.
    """
    dataset = xrays.own(p.data_root) if p.dataset == "folder" else DATASETS[p.dataset]
    reports = xrays.reports(dataset, p.data_root, transforms.pretrain_transform())
    reports.images.shortest = transforms.SHORTEST
    facts: dict[str, Any] = {"texts": reports.texts, "statements": reports.statements, "windows": reports.windows}
    file = dataset.folder(p.data_root) / "mimic_wordpiece.json"
    if not file.is_file():
        file = out / f"vocabulary {checkpoint_key(texts=reports.texts)}.json"
    if not file.is_file():
        with atomic(file) as temporary:
            Vocabulary.train(reports.texts).tokenizer.save(str(temporary))
    words = Vocabulary.read(file)
    options: dict[str, Any] = {"statements": reports.statements, "windows": reports.windows} | METHODS[p.method][1]
    facts |= {"data_root": Path(p.data_root), "images": reports.images.paths, "vocabulary": words.pieces}
    return Pairs(reports.images, reports.texts, words, **options), facts


def _generated_pairs(p: Parameters) -> tuple[Pairs, dict[str, Any]]:
    """As `_pairs`, of the real shape, with as many words as MIMIC's vocabulary: the model has the published size."""
    count = dry_items(p, MICRO_BATCH * p.devices)
    images = torch.randn(count, 3, 448, 448, generator=torch.Generator().manual_seed(p.seed))
    reports = ["There is a small right effusion. There is no evidence of pneumothorax."] * count
    words = Vocabulary.train(reports, 200)
    words.pieces += ["[UNK]"] * (30_000 - len(words))
    options: dict[str, Any] = {"statements": ["There is effusion."] * count} | METHODS[p.method][1]
    return Pairs(images, reports, words, **options), {}


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
        loss=lambda model, batch: downstream_loss(p.task, model, batch),
        data=lambda: data["train"],
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
    rows = published_table("ecamp", TABLES[task]).set_index("method").to_dict("index")
    name = f"{TITLES.get(dataset, dataset)}, {labels}%"
    if name not in rows:
        raise BadParameter("dataset", f"{dataset} with {labels} %", f"for {task}: {list(rows)}")
    return rows[name]


def splits(p: Parameters) -> dict[str, Dataset]:
    """The authors' lists of a data set. As released, detection is tested on the validation list."""
    kind, train, test = KINDS[p.task], transforms.train_transform(), transforms.test_transform()
    if kind == "segmentation":
        train, test = transforms.mask_transform(p.dataset, True), transforms.mask_transform(p.dataset, False)
    elif kind == "detection":
        train = test = transforms.squeeze_transform()
    load = partial(xrays.load, p.dataset, p.data_root, task=kind, share=p.labels, seed=p.seed)
    tested = "val" if kind == "detection" and p.protocol == "released" else "test"
    return {
        "train": load("train", transform=train),
        "val": load("val", transform=test),
        "test": load(tested, transform=test),
    }


def generated(p: Parameters, count: int) -> dict[str, Dataset]:
    """So many random images; each class has positive and negative labels, as an area under the curve needs."""
    generator, classes = torch.Generator().manual_seed(p.seed), len(CLASSES[p.dataset])
    images, numbers = torch.randn(count, 3, SIDE, SIDE, generator=generator), torch.arange(count)
    if KINDS[p.task] == "segmentation":
        truth = (torch.rand(count, classes, SIDE, SIDE, generator=generator) > 0.7).float()
    elif KINDS[p.task] == "detection":
        truth = torch.zeros(count, xrays.BOXES, 5)
        truth[:, 0] = torch.tensor([0, 0.4, 0.5, 0.3, 0.3])
    elif p.dataset in ONE_OF:
        truth = numbers % classes
    else:
        truth = ((numbers[:, None] + torch.arange(classes)) % 2).float()
    return dict.fromkeys(xrays.SPLITS, TensorDataset(images, truth))


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
    entry, folder = (
        next(w for w in papers.paper("ecamp")["weights"] if w["name"] == name),
        Path(p.data_root) / "weights",
    )
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
    """The model of a task on its encoder. The authors freeze it; on RIGA, which they also run from random weights, not
    a random one."""
    classes = len(CLASSES[p.dataset])
    if KINDS[p.task] == "classification":
        return heads.classifier(encoder(p), classes, probe=p.task == "linear probe")
    if KINDS[p.task] == "segmentation":
        return heads.Segmenter(encoder(p), classes, frozen=(p.dataset, p.encoder) != ("fundus/riga", "random"))
    return detection.Detector(encoder(p), expansion=EXPANSION[p.labels])


def downstream_loss(task: str, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch (images, labels, masks or boxes)."""
    images, truth = batch
    if KINDS[task] == "classification":
        return heads.classification_loss(model(images), truth)
    if KINDS[task] == "segmentation":
        return heads.segmentation_loss(model(images).float(), truth)
    return detection.detection_loss([head.float() for head in model(images)], truth, images.shape[-1])


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
    """Epochs without a new best after which a training ends: more for segmentation, but on RIGA for ECAMP's encoder."""
    return 40 if task == "segment" and (dataset != "fundus/riga" or encoder == "ECAMP") else 20


def selection(p: Parameters, score: Callable[[nn.Module], float]) -> EarlyStop:
    """The choice of the epoch by the score on validation, as released: from 0 on, an AUROC, Dice or mAP as high as the
    best one is a new best, an accuracy is not. Detection is first validated after step `FIRST`.
    """
    ties = not (KINDS[p.task] == "classification" and p.dataset in ONE_OF)
    first = 1 + (FIRST[p.labels] if p.task == "detect" and not p.dry_run else 0)
    epochs = patience(p.task, p.dataset, p.encoder)
    return EarlyStop(score, epochs, first_step=first, ties=ties, patient_ties=ties, start=0.0)


def downstream_fit(p: Parameters, images: int, best: EarlyStop, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of `fit` for a downstream training on a number of images, which ends with the weights of `best`.

    SGD without weight decay for classification, else AdamW, which decays every trained tensor.

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
    optimizer = adamw(numbers["lr"], DECAY, decay="all")
    if KINDS[p.task] == "classification":
        optimizer = sgd(numbers["lr"], momentum=MOMENTUM, decay="all")
    return {
        "epochs": longest / per_epoch,
        "batch": batch,
        "last": "train",
        "optimizer": optimizer,
        "schedule": lambda base, steps, per_epoch: downstream_learning_rates(numbers, steps),
        "callbacks": [ClipNorm(CLIP), best],
        "seed": p.seed,
        "hardware": Hardware.of(p, "ecamp", workers=WORKERS),
    }


# --- downstream: test -------------------------------------------------------------------------------------------------


def in_test(p: Parameters) -> Parameters:
    """`p`, but for the precision "paper": the authors validate at that of the training, and test in float32."""
    return SimpleNamespace(**vars(p) | ({"precision": "32-true"} if p.precision == "paper" else {}))


def metric(p: Parameters) -> str:
    """The name of the score of a task."""
    if KINDS[p.task] == "classification":
        return "accuracy" if p.dataset in ONE_OF else "AUROC"
    return f"{'Dice' if p.task == 'segment' else 'mAP'} ({p.protocol})"


def evaluate(p: Parameters, model: nn.Module, part: Dataset) -> float:
    """The score of a model on a split, in percent; nan where the few images of a dry run have none."""
    try:
        return score(KINDS[p.task], outputs(p, model, part), p.protocol)
    except BadParameter:  # a class without positives
        if p.dry_run:
            return math.nan
        raise


@torch.no_grad()
def outputs(p: Parameters, model: nn.Module, part: Dataset) -> Iterator[tuple[Any, Tensor]]:
    """Outputs and labels, batch by batch, on the CPU. Afterwards the model is on its former device."""
    hardware = Hardware.of(p, "ecamp", workers=WORKERS)
    with evaluating(hardware, model) as device:
        options = {"num_workers": hardware.workers, "pin_memory": device.type == "cuda"}
        for images, truth in DataLoader(part, TEST_BATCH, **options):
            out = model(images.to(device, non_blocking=True))
            with without_autocast(device):  # of what is done with them
                yield [x.float().cpu() for x in out] if isinstance(out, list) else out.float().cpu(), truth


def score(kind: str, batches: Iterable[tuple[Any, Tensor]], protocol: str = "released") -> float:
    """The score in percent of batches of outputs and truth.

    Classification: accuracy for class indices (n,), the mean AUROC of the classes for labels (n, classes).
    Segmentation: Dice averaged over images, then over the structures to segment. Detection, on images of side `SIDE`:
    mAP; nan if the protocol excludes all images.
    """
    if kind == "segmentation":
        dice = []  # (images, structures) of each batch
        for logits, masks in batches:
            each = radiology.dice(logits.sigmoid().flatten(0, 1), masks.flatten(0, 1), protocol)
            dice.append(each.view(masks.shape[:2]))
        return 100 * float(torch.cat(dice).nanmean(0).mean())
    if kind == "detection":
        kept, boxes = [], []
        for levels, truth in batches:
            kept += detection.decode(levels, SIDE)
            boxes += truth
        scored = (truth.any() and (protocol == "plain" or len(k)) for k, truth in zip(kept, boxes, strict=True))
        return radiology.mean_precision(kept, torch.stack(boxes), SIDE, protocol) if any(scored) else math.nan
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if labels.ndim == 1:
        return accuracy(labels, logits)
    return radiology.mean_auroc(labels, logits)


# --- protocol ---------------------------------------------------------------------------------------------------------


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    warp = transforms.MaskTransform(train=True).warp
    riga = [patience("segment", "fundus/riga", start) for start in ("ECAMP", "MRM")]
    return papers.protocol(
        "ecamp",
        r=published(),
        crop=transforms.train_transform().transforms[0].scale,
        warp=warp.transforms[0],
        warped=warp.p,
        first=[*FIRST.values()],
        expansion=[*EXPANSION.values()],
        one_of=" and ".join(TITLES[name] for name in ONE_OF),
        ious=(radiology.IOUS[0], radiology.IOUS[-1]),
        **globals() | {"text": text, "patience": [patience("fine-tune", "xrays/rsna", "ECAMP"), *riga]},
    )
