"""SIC-CADS with the published settings: training the recogniser, the detector that it refines, tables of results.

Of the released recipes two are here, OV-LVIS on base classes and OV-COCO on base classes with captions (or without);
the third adds images of ImageNet-21k and is not built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from ... import backbones
from ...data import DATASETS, detection, few, present
from ...data.coco import read_annotations
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics.detection import evaluate
from ...evaluation.tables import Results
from ...io import papers
from ...training import checkpoints
from ...training.callbacks import ClipValue
from ...training.hardware import WORKERS, Hardware, RunParameters, device
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import adamw
from . import detectors, official
from . import model as sic_cads
from .predictions import Predictions, collect

RESULTS = Results.of("sic_cads")
tables = RESULTS.tables  # published and measured, by title
CLIP, BODY = "ViT-B-32-quickgelu/openai", "resnet50.a1_in1k"
OWLVIT = "google/owlvit-base-patch32"
CLIP_FILE = "clip_vit_b32_openai.safetensors"  # in <data_root>/weights, like the folder of OWL-ViT
COLUMNS = {"detection/objects365": "Objects365", "detection/openimages": "OpenImages"}
GPUS = 4  # of the authors' README: each draws the source of its share of a step
FLIP = 0.5  # probability that a training image is flipped
WEIGHT_DECAY = 1e-4  # of every trained tensor
SHORTER, LONGER = 800, 1333  # sides to which the authors' detectors resize images before the recogniser's own resizing


class Parameters(RunParameters, Protocol):
    dataset: str
    branch: str
    gamma: float
    detector: str
    clip: str
    checkpoint: str
    captions: bool
    images: int


class Tested(NamedTuple):
    """A recogniser of the `paper` profile, and the detector's outputs for the test images, refined by it."""

    model: sic_cads.MLR
    outputs: Predictions


def prepare(p: Parameters, out: Path) -> tuple[str, detection.Boxes, nn.Module, Opened]:
    """A title, the test images, the detector, and the training of the recogniser with its model and checkpoint: all
    that a run reads is opened, nothing is trained.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with what to change or get.
    """
    title, images = data(p)
    detector, clip, text = frozen(p, images["test"])
    chosen = training(p, *recogniser(p, clip, text, images["test"].unseen, images))
    return title, images["test"], detector, opened(chosen, out)


def run(p: Parameters, out: Path) -> Tested:
    """Train a recogniser and refine a detector with it on a test set; two rows of `out`/measured.csv hold the scores.

    The detectors here return all their boxes: the threshold is a lower bound, not the 0.15 or 0.2 that the released
    configurations set for theirs, and set predictors need no suppression. A training resumes from its checkpoint in
    `out`/checkpoints, and a test from its outputs in `out`/outputs; the weights are saved in `out`/trained, for the
    parameter `checkpoint`. A dry run takes two steps on a few images of the dataset, or on generated ones where it is
    not below `data_root`. Raises as `prepare`.
    """
    title, test, detector, ready = prepare(p, out)
    r, where = published(p.dataset, p.captions), device(p.accelerator)
    module, _ = train(ready)

    def detect(image: Tensor) -> sic_cads.Output:
        return detector.to(where)(image)  # moved at the first image, not before processes for training are forked

    combined: dict[str, Any] = {"title": title, "branch": p.branch, "gamma": p.gamma or r.gamma, "top": r.top}
    hardware, name = Hardware.of(p, "sic_cads", workers=WORKERS), f"{p.detector.rpartition('/')[2]} {p.branch}"
    facts = {key: getattr(p, key) for key in ("dataset", "clip", "detector")} | combined
    facts |= {"sources": test.sources, "images": test.images, "positives": test.positives, "classes": test.class_names}
    key = checkpoints.checkpoint_key(**facts, precision=hardware.precision, models=nn.ModuleList([module, detector]))
    folder = checkpoints.file(out / "outputs", f"{name}, {key}", "")
    outputs = collect(module.model, detect, test, hardware, branches=[p.branch], folder=folder, **combined)
    record(out / "measured.csv", p, outputs)
    return Tested(module.model, outputs)


@dataclass(frozen=True)
class Recipe:
    """The released settings of a data set, from the paper's YAML.

    Attributes:
        model: of the recogniser: both lambdas, the logit scale, the weight of the distillation.
        iterations, batch, lr, warmup, factor: of the training.
        group: images of a step that come from one source.
        size, crop: side of a training image, and the smallest share of each side that is cropped.
        clip: largest magnitude of an entry of the gradient; None for no clipping.
        repeat: threshold of the repeat-factor sampling; None for none.
        gamma: weight of the image-level scores in the refinement.
        threshold, top: of the detections.
    """

    model: sic_cads.Settings
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


def published(dataset: str, captions: bool = False) -> Recipe:
    """The recipe of "detection/ov-coco"; for all others that of OV-LVIS, which is transferred to other vocabularies.

    With `captions`, which OV-COCO alone has, boxes and captions take turns: each of the authors' `GPUS` draws the
    source of its share of a step. The thresholds of the released configurations, 0.15 and 0.2, belong to their
    detectors and are not used here (see `run`).
    """
    coco, tables = dataset == "detection/ov-coco", {t["id"]: t["rows"] for t in papers.paper("sic_cads")["tables"]}
    training, values = (
        {row["method"]: row["values"] for row in tables[name]} for name in ("training-recipes", "code-hyperparameters")
    )
    t = training["COCO-base + captions (4 GPUs)" if coco else "LVIS-base"]
    v = values["Detic on OV-COCO" if coco else "BoxSup on OV-LVIS"]
    model = sic_cads.Settings(
        lambda_base=v["lambda_base"],
        # of a foreign vocabulary every class counts as novel, and the text branch has a constant share
        lambda_novel=1 - sic_cads.CROSS_DATASET if dataset in COLUMNS else v["lambda_novel"],
        tau=v["logit_scale"],
        distill=v["kd_weight"],
        levels=v["levels"],
    )
    return Recipe(
        model=model,
        iterations=t["iterations"],
        batch=t["batch_boxes_total"],
        group=t["batch_boxes_total"] // GPUS if coco and captions else 1,
        lr=t["lr"],
        warmup=t["warmup_iters"],
        factor=t["warmup_factor"],
        size=t["size_boxes"],
        crop=t["crop_min_boxes"],
        clip=None if coco else 1.0,
        repeat=None if coco else 0.001,
        gamma=v["gamma"],
        threshold=v["score_thresh_test"],
        top=v["detections"],
    )


def learning_rates(r: Recipe, steps: int) -> np.ndarray:
    """The learning rate of each step (steps,): half a cosine to 0 after a straight line to its value there.

    The line begins at `factor` of the base learning rate, and ends where the cosine stands at the end of the warm-up.
    The warm-up is the same fraction of a shorter run.
    """
    done, warm = np.arange(steps) / steps, r.warmup / r.iterations
    cosine, reached = ((1 + np.cos(np.pi * x)) / 2 for x in (done, warm))
    return r.lr * np.where(done < warm, r.factor + (reached - r.factor) * done / warm, cosine)


# --- data and models --------------------------------------------------------------------------------------------------


def data(p: Parameters) -> tuple[str, dict[str, detection.Boxes]]:
    """A title, and the images: "test", and "train" where a recogniser is trained; in a dry run a few of them, or
    generated ones.

    Raises `BadParameter`, `MissingData`, `CorruptFile`: with what to change or get.
    """
    parts, r = ["test"], published(p.dataset, p.captions)
    if p.branch != "visual+" and not p.checkpoint:  # "visual+" does not use the ResNet and the heads
        if p.dataset in COLUMNS:
            accepted = (
                "a recogniser trained with dataset = 'detection/ov-lvis', or branch = 'visual+', which needs none"
            )
            raise BadParameter("checkpoint", p.checkpoint, accepted)
        parts += ["train", "captions"] if p.captions and r.repeat is None else ["train"]
    count = dry_items(p, r.batch)
    if p.dry_run and not present(p.dataset, p.data_root, *parts):
        title = f"generated images in place of {DATASETS[p.dataset].title} (dry run)"
        return title, {part: generated(p, count) for part in parts}
    found = {part: detection.load(p.dataset, p.data_root, part) for part in parts}
    found = few(found, count) if p.dry_run else found
    test = found["test"]
    if p.dataset in COLUMNS:  # nothing of a foreign vocabulary was trained on
        test.novel = test.categories
    if p.images:
        found["test"] = test.part(range(min(p.images, len(test))))
    return DATASETS[p.dataset].title, found


def frozen(p: Parameters, test: detection.Boxes) -> tuple[nn.Module, nn.Module, Tensor]:
    """The detector, the CLIP, and its text embeddings of the classes; in a dry run random ones without the weights."""
    folder, file = Path(p.data_root, "weights", OWLVIT.rpartition("/")[2]), Path(p.data_root, "weights", CLIP_FILE)
    weights: str | Path = folder if p.detector == OWLVIT and folder.is_dir() else "pretrained"
    source: str | Path = file if p.clip == CLIP and file.is_file() else "pretrained"
    names = test.class_names
    if p.dry_run:
        torch.manual_seed(p.seed)
        source = backbones.or_random(f"openclip:{p.clip}", source)
    try:
        detector = detectors.build(p.detector, names, weights)
    except MissingWeights:
        if not p.dry_run or weights != "pretrained" or "owl" not in p.detector:
            raise
        print(f"{p.detector}: its weights are not here; random ones in this dry run")
        detector = detectors.build(p.detector, names[:1], "random")
        # random vectors, here and below: thousands of names take the text towers minutes
        detector.queries = F.normalize(torch.randn(len(names), detector.queries.shape[1]), dim=-1)
    clip = backbones.build(f"openclip:{p.clip}", source)
    if source == "random":
        return detector, clip, F.normalize(torch.randn(len(names), clip.visual.output_dim), dim=-1)
    return detector, clip, sic_cads.vocabulary(clip, open_clip.get_tokenizer(p.clip.partition("/")[0]), names)


def recogniser(
    p: Parameters, clip: nn.Module, text: Tensor, novel: Tensor, images: Mapping[str, detection.Boxes]
) -> tuple[Callable[[], sic_cads.MLR], Dataset | None]:
    """What makes the recogniser of the parameters, and its training data: None where it is not trained."""
    weights: str | Path = "random"
    if "train" in images:
        weights = p.weights or "pretrained"
        weights = backbones.or_random(BODY, weights) if p.dry_run else weights
    made = functools.partial(build, p, clip, text, novel, weights)
    if p.checkpoint:
        return lambda: official.load(made(), p.checkpoint), None
    return made, training_data(p, images) if "train" in images else None


# --- training data ----------------------------------------------------------------------------------------------------


def random_crop(height: int, width: int, smallest: float) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop with a share between `smallest` and 1 of each side, anywhere."""
    share = smallest + (1 - smallest) * torch.rand(2)
    h, w = max(1, int(share[0] * height + 0.5)), max(1, int(share[1] * width + 0.5))
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    return left, top, w, h


@dataclass
class Crops(Dataset):
    """Random crops of images with the classes that they show: (uint8 (3, s, s), (C,) bool, boxes or not).

    A crop has a share between `crop` and 1 of each side, is resized to a square and flipped half of the time. With
    boxes a class is a positive when a part of one of its boxes is in the crop; labels without boxes stay.
    """

    data: detection.Boxes
    size: int
    crop: float
    boxes: bool = True

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


@dataclass
class Turns(Dataset):
    """Groups of images from one of several sources: (g, 3, s, s), (g, C) and (g,), the source drawn with equal odds.

    Images are drawn with replacement, as in the authors' sampler of several data sets.
    """

    sources: Sequence[Dataset]
    group: int

    def __len__(self) -> int:
        return max(1, sum(map(len, self.sources)) // self.group)

    def __getitem__(self, _: int) -> tuple[Tensor, Tensor, Tensor]:
        source = self.sources[int(torch.randint(len(self.sources), ()))]
        chosen = torch.randint(len(source), (self.group,)).tolist()
        images, positives, boxes = zip(*(source[i] for i in chosen), strict=True)
        return torch.stack(images), torch.stack(positives), torch.tensor(boxes)


def training_data(p: Parameters, images: Mapping[str, detection.Boxes]) -> Dataset:
    """Crops of images with boxes, repeated where classes are rare (OV-LVIS), or in turns with captions (OV-COCO)."""
    r = published(p.dataset, p.captions)
    crops = Crops(images["train"], r.size, r.crop)
    if r.repeat is not None:
        return Repeated(crops, detection.repeat_factors(images["train"], r.repeat))
    if not p.captions:
        return crops
    return Turns([crops, Crops(images["captions"], r.size, r.crop, boxes=False)], r.group)


# --- the recogniser ---------------------------------------------------------------------------------------------------


class Recogniser(sic_cads.MLR):
    """The recogniser as part of the authors' detectors: images are resized to the detector's input size first."""

    def prepared(self, images: Tensor, resize: bool = True) -> Tensor:
        """As `MLR.prepared`; training images (`resize` False) have their size."""
        return super().prepared(self._resized(images) if resize else images, resize)

    def crops(self, images: Tensor) -> Tensor:
        """As `MLR.crops`."""
        return super().crops(self._resized(images))

    def _resized(self, images: Tensor) -> Tensor:
        return images if self.training else resize(images, detector_size(*images.shape[-2:]), antialias=True)


def detector_size(height: int, width: int) -> list[int]:
    """Height and width to which the authors' detectors resize a test image, both rounded to the nearest pixel."""
    longer = SHORTER / min(height, width) * max(height, width)
    scale = min(LONGER / longer, 1.0)
    sides = [int(side * scale + 0.5) for side in (SHORTER, longer)]
    return sides if height < width else sides[::-1]


def build(p: Parameters, clip: nn.Module, text: Tensor, novel: Tensor, weights: str | Path) -> Recogniser:
    """The recogniser at full size on a ResNet-50, its new layers drawn from the seed; `weights`: of the ResNet."""
    torch.manual_seed(p.seed)
    settings = replace(published(p.dataset).model, teacher_input=backbones.input_of(clip))
    return Recogniser(backbones.build(BODY, weights), text, novel, settings, teacher=clip.visual)


# --- the training -----------------------------------------------------------------------------------------------------


def training(p: Parameters, build: Callable[[], sic_cads.MLR], data: Dataset | None) -> Training:
    """The training of a recogniser by the released recipe; none without data.

    AdamW of all that is trained, in one parameter group; gradients are clipped entry by entry on OV-LVIS, and not on
    OV-COCO. The last step is tested. Of groups (`Turns`) as many as hold a batch of images make a step.
    """
    r = published(p.dataset, p.captions)
    batch = max(r.batch // getattr(data, "group", 1), 1)
    items, on = 0 if data is None else len(data), Hardware.of(p, "sic_cads", workers=WORKERS)
    epochs = r.iterations / max(items // batch, 1)
    facts = {key: getattr(p, key) for key in ("dataset", "captions", "seed", "devices")}
    facts |= {"precision": on.precision, "data_root": Path(p.data_root), "epochs": epochs, "batch": batch}
    return Training(
        name=RESULTS.label(
            f"recogniser {p.dataset.rpartition('/')[2]} seed {p.seed}",
            {"no captions": "coco" in p.dataset and not p.captions},
            body=p.weights,
        ),
        build=lambda: sic_cads.BatchLoss(build()),
        loss=lambda module, items: module(*items),
        data=data,
        fit={
            "name": "recogniser",
            "epochs": epochs,
            "batch": batch,
            "optimizer": adamw(r.lr, WEIGHT_DECAY, decay="all"),
            "schedule": lambda lr, steps, per_epoch: learning_rates(r, steps),
            "callbacks": [ClipValue(r.clip)] if r.clip else [],
            "seed": p.seed,
            "hardware": on,
        },
        facts=facts,
        weights=lambda module: official.trained_weights(module.model),
        every=1000,
        dry_run=p.dry_run,
    )


def generated(p: Parameters, count: int) -> detection.Boxes:
    """Images of noise with a box of three base and two novel classes, as many classes as the dataset has, by number."""
    dataset, rng, height, width = DATASETS[p.dataset], np.random.default_rng(p.seed), 480, 640
    categories = [{"id": i, "name": f"class {i}", "frequency": "rcff"[i % 4]} for i in range(dataset.classes)]
    groups = [[i for i in range(dataset.classes) if (i % 4 == 0) is rare] for rare in (False, True)]
    images = [{"id": i, "width": width, "height": height, "file_name": f"{i}"} for i in range(count)]
    shown = [{"category_id": c, "bbox": [90.0 * k, 60, 80, 60]} for k, c in enumerate((*groups[0][:3], *groups[1][:2]))]
    rows = [{"image_id": i, "area": 4800, "iscrowd": 0, **box} for i in range(count) for box in shown]
    rows = [{"id": number, **row} for number, row in enumerate(rows, 1)]
    truth = read_annotations({"images": images, "annotations": rows, "categories": categories})
    boxes = detection.Boxes(dataset, Path(p.data_root), Path(), truth, *groups)
    boxes.sources = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return boxes


# --- tables of results ------------------------------------------------------------------------------------------------


def benchmark(p: Parameters, test: detection.Boxes, rows: list[dict]) -> dict[str, float]:
    """The metrics of a dataset's benchmark, in percent, for detections of all images of `test`.

    OV-LVIS: "APr", "APc", "APf", "AP" of boxes, federated. OV-COCO: AP50 "novel", "base", "all", the 65 classes.
    Others: AP50 by the dataset's column; of OpenImages without the hierarchy and the group boxes of the official
    evaluator.
    """
    if p.dataset == "detection/ov-lvis":
        totals = evaluate(test.truth, rows, style="lvis").totals
        return {name: totals[name] for name in ("APr", "APc", "APf", "AP")}
    scored = evaluate(test.truth, rows)
    if p.dataset in COLUMNS:
        return {COLUMNS[p.dataset]: scored.totals["AP50"]}
    groups = {"novel": test.novel, "base": test.base, "all": (*test.base, *test.novel)}
    return {name: scored.mean(group) for name, group in groups.items()}


def label(p: Parameters, gamma: float) -> str:
    """The method's name in the tables: the detector, and the scores that refine it by `gamma` (0: none), with their
    differences from the published setting.

    On the sets of `COLUMNS`, where nothing is trained, the published setting is a recogniser trained here on OV-LVIS.
    """
    name = p.detector.rpartition("/")[2]
    if not gamma:
        return name
    own, file = p.branch != "visual+", Path(p.checkpoint).name  # "visual+" is CLIP alone
    usual = p.dataset in COLUMNS and file.startswith("recogniser ov-lvis ") and ", from " not in file
    changes = {
        p.clip: p.clip != CLIP,
        "no captions": own and p.dataset == "detection/ov-coco" and not (p.captions or file),
        f"weights of {file}": own and file and not usual,
    }
    started = {"body": p.weights} if own and not file else {}
    return RESULTS.label(f"{name} + {p.branch}, gamma {gamma:g}", changes, **started)


def record(path: Path, p: Parameters, outputs: Predictions) -> None:
    """Add the results of a run, with and without refinement, to those in `path`."""
    for branch, weight in (("", 0.0), (outputs.branch, outputs.gamma)):
        values = benchmark(p, outputs.test, outputs.detections(branch))
        row = {"method": label(p, weight), "dataset": p.dataset, "images": p.images, "seed": p.seed}
        RESULTS.measured(path, row | values, dry_run=p.dry_run)


def protocol() -> dict[str, str]:
    """What the `paper` profile runs with, a fact a row, from its constants."""
    coco, lvis = published("detection/ov-coco", captions=True), published("detection/ov-lvis")
    patches = len(sic_cads.windows(224, 224, coco.model.levels))
    precision = papers.paper("sic_cads")["precision"]
    return {
        "first weights": (
            f"MIIL's ResNet-50 of ImageNet-21k where weights is its file, as published; else {BODY} of ImageNet-1k, "
            "which the row then names"
        ),
        "optimiser": f"AdamW, weight decay {WEIGHT_DECAY:g} on all that is trained, the whole ResNet too",
        "learning rate": f"{coco.lr:g} (OV-COCO), {lvis.lr:g} (OV-LVIS)",
        "schedule": (
            f"half a cosine to 0, after a straight line from {coco.factor:g} of it over {coco.warmup:,} steps "
            f"(OV-COCO), {lvis.factor:g} of it over {lvis.warmup:,} steps (OV-LVIS)"
        ),
        "steps": f"{coco.iterations:,} (OV-COCO), {lvis.iterations:,} (OV-LVIS)",
        "batch": (
            f"{coco.batch} (OV-COCO: boxes and captions in turns, {coco.group} images of one source each), "
            f"{lvis.batch} (OV-LVIS); no epochs, no partial batches"
        ),
        "gradient": f"on OV-LVIS each entry is clipped at {lvis.clip:g}; on OV-COCO not clipped",
        "sampling": (
            f"OV-LVIS: images with a box of a base class; repeat factors, threshold {lvis.repeat:g}, fractions drawn "
            "at each pass"
        ),
        "loss": (
            f"rank loss on cosines times {coco.model.tau:g} (OV-COCO), {lvis.model.tau:g} (OV-LVIS), and "
            f"{coco.model.distill:g} times the distillation loss"
        ),
        "precision": f"training: {precision} on a GPU, heads and cosines in float32; tests in float32",
        "augmentation": (
            f"crop of at least {coco.crop:.0%} of each side (OV-COCO), {lvis.crop:.0%} of each side (OV-LVIS), "
            f"squeezed to {coco.size} x {coco.size}, flip with probability {FLIP:g}; CLIP gets the same images"
        ),
        "test images": (
            f"shorter side to {SHORTER}, longer at most {LONGER}, rounded (antialiased); recogniser: shorter side to "
            f"{sic_cads.IMAGENET.size}, rounded down, nearest pixel; CLIP: {patches} crops of {sic_cads.OPENAI.size} "
            "pixels, bilinear without antialiasing"
        ),
        "text": f'"{sic_cads.PROMPT}", names as in the annotation file',
        "fusion": (
            f"lambda of base and novel classes {coco.model.lambda_base:g} and {coco.model.lambda_novel:g} (OV-COCO), "
            f"{lvis.model.lambda_base:g} and {lvis.model.lambda_novel:g} (OV-LVIS); other vocabularies: text "
            f"{sic_cads.CROSS_DATASET:g}, image {1 - sic_cads.CROSS_DATASET:g}"
        ),
        "refinement": (
            f"gamma {coco.gamma:g} (OV-COCO), {lvis.gamma:g} (OV-LVIS), all classes of all boxes, before top "
            f"{coco.top} (OV-COCO), {lvis.top} (OV-LVIS); threshold {sic_cads.FLOOR:g} (released, for their "
            f"detectors: {coco.threshold:g} (OV-COCO), {lvis.threshold:g} (OV-LVIS))"
        ),
        "selection": "none; the last step is tested",
        "seeds": "not found; here the parameter seed",
        "sweep": "none found; gamma, both lambdas and the thresholds are constants of the configurations",
        "labels from captions": "LVIS' synonyms of each class' synset, between spaces",
        "detectors": (
            "paper: BoxSup, Detic, VLDet, OADP, RKDWTF, CORA (inferred); here OWL-ViT, OWLv2, Grounding DINO, or "
            "result files of any. Those here saw boxes with names of COCO's novel classes: only gains are meaningful"
        ),
        "metric": (
            "OV-COCO: AP50 of boxes, 65 classes; OV-LVIS: federated AP of boxes (the paper's tables: probably "
            "masks); Objects365, OpenImages: AP50 of boxes, OpenImages without group boxes and verified labels"
        ),
        "not built": "the recipe with ImageNet-21k; OpenImages' official evaluator",
    }
