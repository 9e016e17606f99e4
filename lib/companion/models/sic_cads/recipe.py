"""SIC-CADS at full size: the published recipe on real pictures, the dry run, and results that gather.

`parts` gives what `runs.sic_cads.Setting` is made of. Of the released recipes two are here, OV-LVIS on base classes and
OV-COCO on base classes with or without captions; the third adds pictures of ImageNet-21k. Two things differ from the
released code and are not of the method: boxes and captions share each batch instead of taking turns, and pictures
that `repeat_factors` shows more than once are drawn once a run, not once an epoch.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.transforms.v2.functional import resize

from ... import backbones, detectors
from ...data import DATASETS, detection
from ...data.detection_sets import COCO_BASE, COCO_NOVEL
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics.detection import evaluate
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.files import atomic, read_json
from ...ops.papers import paper
from ...training.fit import fit
from ..layers.clip_prompting import load_official
from . import model as sic_cads

CLIP, BODY = "ViT-B-32-quickgelu/openai", "resnet50.a1_in1k"
OWLVIT = "google/owlvit-base-patch32"
COLUMNS = {"detection/objects365": "Objects365", "detection/openimages": "OpenImages"}
SHORTER, LONGER = 800, 1333  # sides that the authors' detectors bring pictures to, before the recogniser sees them
WORKERS = min(8, os.cpu_count() or 1)
NAMED = 80  # classes of the dry run whose names go through the text towers; the others get random vectors


@dataclass(frozen=True)
class Recipe:
    """The released settings of a data set, from the paper's YAML.

    Attributes:
        options: of the recogniser: both lambdas, the logit scale, the weight of the distillation.
        iterations, batch, lr, warmup, factor: of the training.
        size, crop: side of a training picture, and the least share of each side that a crop keeps.
        clip: of each entry of the gradient; None for none.
        repeat: threshold of the repeat-factor sampling; None for none.
        threshold, top: of the detections.
    """

    options: dict[str, float]
    iterations: int
    batch: int
    lr: float
    warmup: int
    factor: float
    size: int
    crop: float
    clip: float | None
    repeat: float | None
    threshold: float
    top: int


def recipe(dataset: str, captions: bool = False) -> Recipe:
    """The recipe of "detection/ov-coco"; for all others that of OV-LVIS, which is carried over to other vocabularies.

    With `captions` a batch holds as many pictures with captions as with boxes.

    The thresholds of the released configurations, 0.15 and 0.2, belong to their detectors: they are not those here
    (see `parts`).
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
        batch=int(t.batch_boxes_total) + (int(t.batch_images_total) if captions else 0),
        lr=float(t.lr),
        warmup=int(t.warmup_iters),
        factor=float(t.warmup_factor),
        size=int(t.size_boxes),
        crop=float(t.crop_min_boxes),
        clip=None if coco else 1.0,
        repeat=None if coco else 0.001,
        threshold=float(v.score_thresh_test),
        top=int(v.detections),
    )


def learning_rates(r: Recipe, steps: int) -> np.ndarray:
    """The rate of each step, (steps,): half a cosine to 0, times a line from `factor` to 1 over the warm-up.

    A shorter run keeps the shares: its warm-up is as large a part of it.
    """
    done, warm = np.arange(steps) / steps, r.warmup / r.iterations
    rising = np.minimum(r.factor + (1 - r.factor) * done / warm, 1)
    return r.lr * (1 + np.cos(np.pi * done)) / 2 * rising


# --- pictures to learn from -------------------------------------------------------------------------------------------


class Lessons(Dataset):
    """Random crops of pictures with the classes that are still on them: (uint8 (3, s, s), (C,) bool, boxes or not).

    A crop keeps a share between `crop` and 1 of each side, is squeezed to a square and flipped half of the time. With
    boxes a class stays when a part of one of its boxes does; labels without boxes stay.
    """

    def __init__(self, data: detection.Boxes, size: int, crop: float, boxes: bool = True):
        self.data, self.size, self.crop, self.boxes = data, size, crop, boxes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        image, target = self.data[index]
        height, width = image.shape[1:]
        share = self.crop + (1 - self.crop) * torch.rand(2)
        h, w = max(1, int(share[0] * height)), max(1, int(share[1] * width))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        cut = resize(image[:, top : top + h, left : left + w], [self.size, self.size], antialias=True)
        positives = self.data.positives[index].clone()
        if self.boxes:
            x1, y1, x2, y2 = target.boxes.unbind(-1)
            seen = (x2.clamp(max=left + w) > x1.clamp(min=left)) & (y2.clamp(max=top + h) > y1.clamp(min=top))
            positives[:] = False
            positives[target.labels[seen & ~target.crowd]] = True
        return (cut.flip(-1) if torch.rand(()) < 0.5 else cut), positives, self.boxes


def lessons(p: SimpleNamespace, train: detection.Boxes) -> Dataset:
    """What the paper profile trains on: boxes, repeated where classes are rare (OV-LVIS), and captions if asked."""
    r = recipe(p.dataset)
    found: Dataset = Lessons(train, r.size, r.crop)
    if r.repeat is not None:
        factors = detection.repeat_factors(train, r.repeat)
        rng = np.random.default_rng(p.seed)
        times = np.floor(factors + rng.random(len(factors))).astype(int)
        found = Subset(found, np.repeat(np.arange(len(factors)), times).tolist())
    if not p.captions:
        return found
    file = train.dataset.folder(train.root) / "annotations" / "captions_train2017.json"
    if not file.is_file():
        raise train.dataset.missing(train.root, f"{file} is not there (or set captions = False)")
    labels = detection.caption_labels(read_json(file), train.truth["categories"])
    captioned = detection.Boxes(
        train.dataset, train.root, Path(train.sources[0]).parent, labels, train.base, train.novel
    )
    # as many of the one as of the other
    times = max(1, round(len(captioned) / len(found)))
    return ConcatDataset([*[found] * times, Lessons(captioned, r.size, r.crop, boxes=False)])


def loss(model: sic_cads.MLR, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of a batch; pictures with boxes rank the base classes, those with labels alone all classes."""
    images, positives, boxes = batch
    e_text, e_image = model(images, raw=True)
    scores = model.tau * sic_cads.pool(e_text @ model.text.mT, model.levels)
    value = model.distill * sic_cads.distillation_loss(e_image, model.teach(images))
    for kind, columns in ((boxes, ~model.novel), (~boxes, None)):
        if kind.any():
            value = value + kind.float().mean() * sic_cads.rank_loss(scores[kind], positives[kind], columns)
    return value


class Learner(nn.Module):
    """The loss of a batch of `Lessons` in one pass, which is what training on several devices asks for."""

    def __init__(self, model: sic_cads.MLR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, positives: Tensor, boxes: Tensor) -> Tensor:
        return loss(self.model, (images, positives, boxes))


# --- the recogniser ---------------------------------------------------------------------------------------------------


class Recogniser(sic_cads.MLR):
    """The recogniser where it stands in the authors' detectors: pictures are brought to their size first.

    It takes pictures from any device, and answers on the CPU, where the detections are.
    """

    def forward(self, x: Tensor, raw: bool = False) -> tuple[Tensor, Tensor]:
        """As `MLR.forward`; with `raw`, of augmented training pictures, (B, 3, s, s) uint8."""
        return super().forward(self.prepared(x, resize=False) if raw else x)

    def prepared(self, images: Tensor, resize: bool = True) -> Tensor:
        return super().prepared(self._placed(images), resize)

    def crops(self, images: Tensor) -> Tensor:
        return super().crops(self._placed(images))

    def _placed(self, images: Tensor) -> Tensor:
        images = images.to(self.text.device)
        return images if self.training else resize(images, [SHORTER], max_size=LONGER, antialias=True)

    def recognised(self, *args, **options) -> sic_cads.Recognition:
        return sic_cads.Recognition(*(t.cpu() for t in super().recognised(*args, **options)))


def file_of(p: SimpleNamespace, name: str) -> Path:
    """Where a file of the paper's weights usually is: `<data_root>/weights`."""
    entry = next(w for w in paper("sic_cads")["weights"] if w["name"] == name)
    return Path(p.data_root) / "weights" / entry["file"]


def clip_model(p: SimpleNamespace) -> nn.Module:
    """The frozen CLIP: the usual file, or what the cache has."""
    usual = file_of(p, "clip")
    return backbones.build(f"openclip:{p.clip}", usual if p.clip == CLIP and usual.is_file() else "pretrained")


def build(p: SimpleNamespace, clip: nn.Module, text: Tensor, novel: Tensor, weights: str | Path) -> Recogniser:
    """The recogniser at full size on a ResNet-50, its new layers drawn from the seed; `weights`: of the ResNet."""
    torch.manual_seed(p.seed)
    body = backbones.build(BODY, weights)
    model = Recogniser(
        body, text, novel, teacher=clip.visual, teacher_input=backbones.input_of(clip), **recipe(p.dataset).options
    )
    return model.to(_device(p))


def load(p: SimpleNamespace, clip: nn.Module, text: Tensor, novel: Tensor) -> Recogniser:
    """The trained recogniser of the file `checkpoint`, ours (`save`) or the authors', with this vocabulary.

    Raises:
        MissingWeights: no such file.
        CorruptFile, BadCheckpoint: it cannot be read, or holds another model.
    """
    if not Path(p.checkpoint).is_file():
        ways = [
            "the authors never released theirs; train one (leave `checkpoint` empty) and keep it: runs.save",
            "set branch = 'visual+', which needs no training",
        ]
        raise MissingWeights("SIC-CADS' recogniser", p.checkpoint, ways)
    state = backbones.read_state(p.checkpoint)
    model = build(p, clip, text, novel, "random")
    if rows := [len(t) for name, t in state.items() if name.endswith("text_embedding.weight")]:  # the authors' names
        theirs = sic_cads.MLR.from_official(state, torch.zeros(rows[0], dtype=torch.bool))
        state = kept(theirs)
    load_official(model, state, {name: name for name in kept(model)}, "SIC-CADS' recogniser on a ResNet-50")
    return model.eval()


def kept(model: sic_cads.MLR) -> dict[str, Tensor]:
    """What of a recogniser is neither its vocabulary nor its teacher: ResNet with its frozen norms, pyramid, heads."""
    state = model.state_dict()
    return {n: t.detach().cpu().contiguous() for n, t in state.items() if n != "text" and not n.startswith("teacher.")}


def save(model: sic_cads.MLR, path: str | Path) -> None:
    """Keep a recogniser as safetensors, for the parameter `checkpoint`."""
    with atomic(path) as temporary:
        save_file(kept(model), temporary)


def learn(p: SimpleNamespace, data: Dataset, model: Recogniser, kept: Path | None = None, **changes) -> list[dict]:
    """Train by the released recipe, in place; `changes` are arguments of `fit`, `epochs` and `batch` among them.

    In the folder `kept` a training that was stopped goes on where it was, one that is done is only read, and the
    recogniser is left as "recogniser ....safetensors", for the parameter `checkpoint`.
    """
    r = recipe(p.dataset, p.captions)
    if r.clip and p.precision == "16-mixed":
        raise BadParameter("precision", p.precision, "32-true or bf16-mixed: the gradient is clipped entry by entry")
    batch = changes.pop("batch", r.batch)
    if batch > len(data):
        raise BadParameter("batch", batch, f"1 to {len(data)}, the pictures there are")
    per_epoch = len(data) // batch
    steps = round(changes.pop("epochs", r.iterations / per_epoch) * per_epoch)
    trained = list(model.trained().values())
    hooks = [t.register_hook(lambda g: g.clamp(-r.clip, r.clip)) for t in trained] if r.clip else []
    options = {
        "seed": p.seed,
        "weight_decay": 1e-4,
        "decay": "all",
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "name": "recogniser",
    } | changes
    if kept is not None:
        name = kept / _run_name(p)
        options |= {"checkpoint": name.with_name(f"{name.name}.pt"), "checkpoint_every": 1000, "resume": True}
    try:
        history = fit(
            Learner(model),
            lambda learner, items: learner(*items),
            data,
            epochs=steps / per_epoch,
            batch=batch,
            sides={"all": (trained, learning_rates(r, steps))},
            **options,
        )
    finally:
        for hook in hooks:
            hook.remove()
    model.to(_device(p)).eval()
    if kept is not None:
        save(model, name.with_name(f"{name.name}.safetensors"))
    return history


def _run_name(p: SimpleNamespace) -> str:
    """What is trained, with a number for all that it depends on: another data set or CLIP goes on from no other's."""
    known = (p.dataset, str(Path(p.data_root).resolve()), p.captions, p.clip, p.weights, p.precision, p.devices)
    return f"recogniser {p.dataset.rpartition('/')[2]} seed {p.seed} {zlib.crc32(repr(known).encode()):08x}"


def _device(p: SimpleNamespace) -> str:
    return "cuda" if p.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


# --- what a setting is made of ----------------------------------------------------------------------------------------


def check(p: SimpleNamespace) -> None:
    """Raises `BadParameter` for parameters that do not go together."""
    if p.captions and p.dataset != "detection/ov-coco":
        raise BadParameter("captions", True, "False: captions are known of detection/ov-coco alone")
    if p.dry_run and "owl" not in p.detector:
        raise BadParameter("detector", p.detector, [OWLVIT, "or another OWL: a dry run has no file of a tokenizer"])
    if p.dataset in COLUMNS and p.branch != "visual+" and not (p.checkpoint or p.dry_run):
        accepted = "a recogniser trained with dataset = 'detection/ov-lvis', or branch = 'visual+', which needs none"
        raise BadParameter("checkpoint", p.checkpoint, accepted)


def parts(p: SimpleNamespace, out: Path) -> dict[str, object]:
    """What a setting of the paper profile is made of: the arguments of `runs.sic_cads.Setting`.

    What is trained is kept below the run's folder `out` (see `learn`).

    The detectors here give all their boxes: the threshold is a floor, not the 0.15 or 0.2 that the released
    configurations set for theirs, and set predictors need no suppression.

    Raises:
        BadParameter, MissingData, MissingWeights, CorruptFile: with what to change or get.
    """
    check(p)
    return _dry(p) if p.dry_run else _paper(p, out)


def _made(
    p: SimpleNamespace, title: str, test: detection.Boxes, make: Callable, teach: Callable, detector: nn.Module
) -> dict[str, object]:
    detector = detector.to(_device(p))

    def detect(image: Tensor) -> tuple[Tensor, Tensor]:
        found = detector(image)
        return found.boxes.cpu(), found.probabilities.cpu()

    return {
        "title": title,
        "names": test.class_names,
        "base": test.mask(test.base),
        "novel": test.mask(test.novel),
        "test": test,
        "build": make,
        "learn": teach,
        "detect": detect,
        "branch": p.branch,
        "gamma": p.gamma,
        "threshold": detectors.FLOOR,
        "nms": None,
        "top": recipe(p.dataset).top,
    }


def _paper(p: SimpleNamespace, out: Path) -> dict[str, object]:
    test = detection.load(p.dataset, p.data_root, "test")
    if p.dataset in COLUMNS:  # nothing of a foreign vocabulary was trained on
        test.novel = test.categories
    if p.pictures:
        test = first(test, p.pictures)
    folder = file_of(p, "detector").parent
    weights = folder if p.detector == OWLVIT and folder.is_dir() else "pretrained"
    detector = detectors.build(p.detector, test.class_names, weights)
    clip = clip_model(p)
    text = sic_cads.vocabulary(clip, open_clip.get_tokenizer(p.clip.partition("/")[0]), test.class_names)
    arguments = (p, clip, text, test.unseen)
    if p.checkpoint:
        make, teach = functools.partial(load, *arguments), lambda model, **options: []
    elif p.branch == "visual+":  # its ResNet and heads are asked for nothing
        make, teach = functools.partial(build, *arguments, "random"), lambda model, **options: []
    else:
        train = detection.load(p.dataset, p.data_root, "train")
        make = functools.partial(build, *arguments, p.weights or "pretrained")
        teach = functools.partial(learn, p, lessons(p, train), kept=out / "trained", workers=WORKERS)
    return _made(p, DATASETS[p.dataset].title, test, make, teach, detector)


def first(data: detection.Boxes, count: int) -> detection.Boxes:
    """The first `count` pictures of a set."""
    truth = data.truth
    images = truth["images"][:count]
    kept = {image["id"] for image in images}
    rows = [row for row in truth["annotations"] if row["image_id"] in kept]
    folder = Path(data.sources[0].removesuffix(truth["images"][0]["file_name"]))
    return detection.Boxes(
        data.dataset, data.root, folder, truth | {"images": images, "annotations": rows}, data.base, data.novel
    )


# --- the dry run ------------------------------------------------------------------------------------------------------


def generated(p: SimpleNamespace, count: int, height: int = 480, width: int = 640) -> detection.Boxes:
    """Pictures of noise with boxes at random, in as many classes as the data set has; names not known are numbers."""
    dataset, rng = DATASETS[p.dataset], np.random.default_rng(p.seed)
    names = {i: name for name, i in (COCO_BASE | COCO_NOVEL).items()} if p.dataset == "detection/ov-coco" else {}
    names |= {i: f"class {i}" for i in range(100, 100 + dataset.classes - len(names))}
    novel = COCO_NOVEL.values() if p.dataset == "detection/ov-coco" else [i for i in names if i % 4 == 0]
    base = COCO_BASE.values() if p.dataset == "detection/ov-coco" else [i for i in names if i % 4]
    shown = [*list(base)[:3], *list(novel)[:2]]
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
    letters = {i: "rcf"[i % 3] for i in names}
    categories = [{"id": i, "name": name, "frequency": letters[i]} for i, name in names.items()]
    truth = {"images": images, "annotations": rows, "categories": categories}
    found = detection.Boxes(dataset, Path(p.data_root), Path(), truth, list(base), list(novel))
    found.sources = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return found


def _dry(p: SimpleNamespace) -> dict[str, object]:
    """Full-size models with random weights, two optimiser steps on generated pictures of the real shape."""
    torch.manual_seed(p.seed)
    gpu = _device(p) == "cuda"
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
    teach = functools.partial(learn, p, Lessons(generated(p, 2 * batch), r.size, r.crop), batch=batch, epochs=1)
    return _made(p, "generated pictures (dry run: the scores mean nothing)", test, make, teach, detector)


# --- results that gather ----------------------------------------------------------------------------------------------


def scores(p: SimpleNamespace, test: detection.Boxes, rows: list[dict]) -> dict[str, float]:
    """What the benchmark of a data set reports, in percent, of finished detections of all pictures of `test`.

    OV-LVIS: "APr", "APc", "APf", "AP" of boxes, federated. OV-COCO: AP50 "novel", "base", "all", the 65 classes.
    Others: AP50 by the data set's column; of OpenImages without its hierarchy and its group boxes, which the
    official evaluator knows.
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


def label(p: SimpleNamespace, refined: bool = True) -> str:
    """The method's name in the tables: the detector, and with what it was refined."""
    return p.detector.rpartition("/")[2] + (f" + {p.branch}, gamma {p.gamma:g}" if refined else "")


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (method, dataset, pictures, seed); `new` joins or replaces its row."""
    return upsert_rows(path, ["method", "dataset", "pictures", "seed"], VALUES, [new] if new else ())


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column) for a published table, of runs on all its pictures."""
    wanted = [TABLES[table]] if table in TABLES else list(COLUMNS)
    found = {}
    for (method, _), group in rows[rows.dataset.isin(wanted) & (rows.pictures == 0)].groupby(["method", "dataset"]):
        for column in VALUES:
            if column in group and group[column].notna().any():
                found[method, column] = float(group[column].mean())
    return found


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Published beside measured, by title, in the layout of each table of results."""
    found = {}
    for name in (*TABLES, "cross-dataset"):
        frame = published_table("sic_cads", name)
        found[frame.attrs["title"]] = compare_published(frame, cells(rows, name))
    return found
