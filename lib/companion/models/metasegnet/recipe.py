"""MetaSegNet's `paper` profile: the author's recipes on real land cover, the tests, the dry run, the tables of results.

The recipes are those of the first author's image-only code (section 5, the paper's YAML); it is likely, but not known,
that the paper trained this way. Text encoder and fusion are a RECONSTRUCTION, and so is the zero-shot test: a climate
zone is left out of training (`held_out`), or the network of one set is tested on another (`test_on`). No result here is
compared with the paper's; the unimodal network, which equals the author's FT-UNetFormer by parity, is compared with his
published results for it.

A training writes its checkpoint below `<out>/checkpoints`, from which it resumes, and its weights to `<out>/trained`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, Parts, few, landcover, present
from ...data.landcover import CLASSES, LEFT_OUT, LOVEDA, OEM, POTSDAM, POTSDAM_FAULTY, POTSDAM_TILES, TO_LOVEDA
from ...errors import BadParameter
from ...evaluation.metrics import landcover as metrics
from ...evaluation.tables import Results, published_table
from ...io import papers
from ...io.files import sha256
from ...training import schedules
from ...training.callbacks import EarlyStop, Lookahead
from ...training.fit import same_shapes
from ...training.hardware import AUTO, WORKERS, Hardware, RunParameters, evaluating, loader
from ...training.recipe import Opened, Training, dry_items, opened, train
from . import official
from .augmentation import Mosaic, test_transform, train_transform
from .maps import SCALES, augmented
from .model import MetaSegNet, loss
from .prompts import LEVELS, PROMPTS, Prompted, Prompts, text_encoder

SELECT = {LOVEDA: "best"}
"""Of each data set the epoch that is tested, where it is not the last: the one of the highest validation mIoU.

On Potsdam the author takes the epoch of the highest F1 on the TEST images; that is `select` = "best"."""
VIEWS = {POTSDAM: "lr", LOVEDA: "d4 loveda"}  # at test, in the only examples of the author's README
SCORES = {POTSDAM: "mf1"}  # metric that selects the best epoch, if not "miou"
LOOKAHEAD: dict[str, Any] = {"k": 5, "alpha": 0.5}
LAST = "drop"  # the last images of an epoch, see `fit`
DROPPED = 0.5  # header dropout of full texts (section 14)
TEST_SPLIT = {OEM: "val", LOVEDA: "val", POTSDAM: "test"}  # other test labels are not public
RESULTS = Results.of("metasegnet")
TEST_BATCH = 4  # images of 1,024 pixels


class Parameters(RunParameters, Protocol):
    """The notebook's parameters that are read here, see paper.yaml."""

    task: str
    dataset: str
    method: str
    prompt: str
    prompts: str
    augmentation: str
    held_out: str
    test_on: str
    select: str
    padding: str
    checkpoint: str
    without_xbd: bool


# --- the author's settings --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The author's settings of a data set.

    Attributes:
        epochs, batch, lr, encoder_lr, weight_decay: of AdamW in Lookahead; the batch is of one GPU; biases do not
            decay, norms do.
        restart: epochs of the first cosine; each next one is twice as long; 0: one cosine over all epochs.
        floor: final learning rate of a cosine.
        crop: side in pixels.
        copies: of an image per epoch: 3 for Potsdam, each tile and its two flips, which the author stores.
        flip, upside_down, brightness, mosaic, every: see `augmentation`; a mosaic is of one climate zone.
    """

    epochs: int
    batch: int
    lr: float
    encoder_lr: float
    weight_decay: float
    restart: int
    floor: float
    crop: int
    copies: int
    flip: float
    upside_down: float
    brightness: float
    mosaic: float
    every: bool = False


def published(dataset: str) -> Recipe:
    """The recipe of a data set. OpenEarthMap's, which was not found, is Potsdam's with smaller crops (RECONSTRUCTION);
    it is also used for your own folder."""
    title = DATASETS[dataset if dataset in (LOVEDA, POTSDAM) else OEM].title
    tables = {table["id"]: table for table in papers.paper("metasegnet")["tables"]}
    values = next(row["values"] for row in tables["recipes"]["rows"] if row["method"] == title)
    return Recipe(**values | {"every": bool(values["every"])})


def learning_rates(r: Recipe, base: float, per_epoch: int) -> np.ndarray:
    """The learning rate of each step, constant within an epoch, (epochs x per_epoch,).

    Without restarts half a cosine from `base` to `floor`; with them half a cosine to 0, then one twice as long, ..."""
    epochs = np.arange(r.epochs)
    if not r.restart:
        rates = r.floor + (base - r.floor) * (1 + np.cos(np.pi * epochs / r.epochs)) / 2
    else:
        cycle = np.log2(epochs / r.restart + 1).astype(int)
        start, length = (2**cycle - 1) * r.restart, 2**cycle * r.restart
        rates = base * (1 + np.cos(np.pi * (epochs - start) / length)) / 2
    return rates.repeat(per_epoch)


def param_groups(model: MetaSegNet, r: Recipe) -> list[dict]:
    """The trainable parameters in four groups: encoder and the rest, each with its biases in a separate group without
    weight decay.

    The four norms on the encoder's maps belong to the encoder, as in the author's Swin."""
    tensors: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, tensor in model.trained().items():
        encoder, bias = name.startswith(("encoder.", "norms.")), name.endswith("bias")
        tensors.setdefault((encoder, bias), []).append(tensor)
    groups = []
    for (encoder, bias), some in tensors.items():
        options = {"lr": r.encoder_lr, "name": "encoder"} if encoder else {"lr": r.lr, "name": "rest"}
        groups += schedules.param_groups(some, 0.0 if bias else r.weight_decay, "all", **options)
    return groups


def options(
    r: Recipe, hardware: Hardware, seed: int = 0, score: Callable[[nn.Module], float] | None = None
) -> dict[str, Any]:
    """The arguments of `fit`: AdamW in Lookahead, two learning rates, no decay of biases.

    Args:
        score: of the model after each epoch; the weights of the best epoch are selected, in ties the first. None: those
            of the last.
    """
    return {
        "optimizer": schedules.adamw(r.lr, groups=functools.partial(param_groups, r=r)),
        "schedule": lambda base, steps, per_epoch: learning_rates(r, base, per_epoch)[:steps],  # all, but in a dry run
        "epochs": r.epochs,
        "batch": r.batch * hardware.devices,
        "last": LAST,
        "callbacks": [Lookahead(**LOOKAHEAD), *([EarlyStop(score)] if score else [])],
        "seed": seed,
        "hardware": hardware,
    }


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Part(Parts):
    """The training items or those of a test.

    Attributes:
        data: items (image normalised (3, h, w), labels (h, w)).
        zones: of each item. texts: the user's own, if any.
        classes: of the labels; `left_out` of them are excluded from the means.
        into: (C,) the label of each of the network's classes; None if they are the same.
    """

    data: Dataset
    zones: Sequence[str | None]
    classes: Sequence[str]
    left_out: tuple[int, ...] = ()
    texts: Sequence[str | None] | None = None
    into: Tensor | None = None
    each = ("data", "zones", "texts")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index]

    @property
    def sources(self) -> list[str]:
        """The image file of each item."""
        return self.data.sources


def randomised(data: landcover.LandCover, zones: Sequence[str | None], r: Recipe) -> Mosaic:
    """Items (image (3, crop, crop) normalised, labels) by the recipe's random operations; mosaics are of one zone."""
    drawn = {name: getattr(r, name) for name in ("flip", "upside_down", "brightness", "every")}
    return Mosaic(data, r.mosaic, zones, train_transform(r.crop, data.ignore, **drawn))


def read(p: Parameters, split: str, dataset: str, **options) -> landcover.LandCover:
    """A split of a data set, or of your own folder."""
    if dataset == "folder":
        found = landcover.own(p.data_root, landcover.read_classes(p.data_root), **({"size": 1024} | options))
        data = found.get(split, found["all"])  # lists are optional; without them all images are in each split
        if not any(picture.label for picture in data.pictures):
            raise data.dataset.missing(p.data_root, f"no image of '{split}' has a label in labels/")
        return data
    if dataset == OEM:
        options["without_xbd"] = p.without_xbd
    if dataset == POTSDAM:
        options |= {"padding": p.padding, "mirrored": split == "train" and published(dataset).copies == 3}
    return landcover.load(dataset, p.data_root, split, **options)


def train_data(p: Parameters) -> landcover.LandCover:
    """The training images, without those of the zone left out and without Potsdam's tile of wrong labels."""
    data = read(p, "train", p.dataset)
    if p.dataset == POTSDAM:
        faulty = f"top_potsdam_{POTSDAM_FAULTY}_"
        data = data.where([not data.picture(i).image.stem.startswith(faulty) for i in range(len(data))])
    return data.where([zone != p.held_out for zone in data.zones()]) if p.held_out else data


def test_parts(p: Parameters) -> dict[str, Part]:
    """The tests by name: all of a set, or the zones seen and the one left out, or another set."""
    name = p.test_on or p.dataset
    data = read(p, TEST_SPLIT.get(name, "val"), name, transform=test_transform())
    # without a text the map of climate zones is not needed
    zones = data.zones() if LEVELS[p.method] or p.held_out else [None] * len(data)
    whole = Part(data, zones, data.classes, data.left_out, data.texts())
    if p.test_on:
        loveda = [list(CLASSES[LOVEDA]).index(TO_LOVEDA[name]) for name in CLASSES[OEM]]
        return {DATASETS[name].title: replace(whole, into=torch.tensor(loveda))}
    if not p.held_out:
        return {"test": whole}
    held = np.array([zone == p.held_out for zone in zones])
    if not held.any():
        raise BadParameter("held_out", p.held_out, sorted({zone for zone in zones if zone}))
    return {"seen": whole.part(np.flatnonzero(~held)), "left out": whole.part(np.flatnonzero(held))}


def generated(p: Parameters, r: Recipe, count: int) -> Part:
    """So many items for a dry run: noise in squares of one class each, of the recipe's crop size, in two alternating
    zones."""
    names, generator = CLASSES.get(p.dataset, CLASSES[OEM]), torch.Generator().manual_seed(p.seed)
    coarse = torch.randint(len(names) + 1, (count, 1, 8, 8), generator=generator)
    labels = coarse.repeat_interleave(r.crop // 8, 2).repeat_interleave(r.crop // 8, 3)[:, 0]  # (count, side, side)
    images = torch.randn(count, 3, r.crop, r.crop, generator=generator) + labels[:, None] / len(names)
    zones = [("Cfa", "Aw")[i % 2] for i in range(count)]
    return Part(TensorDataset(images, labels), zones, list(names), LEFT_OUT.get(p.dataset, ()))


# --- networks ---------------------------------------------------------------------------------------------------------


def network(
    method: str,
    prompts: Prompts,
    classes: int,
    *,
    data_root: str | Path = "data",
    weights: str = "",
    checkpoint: str = "",
    seed: int = 0,
    random: bool = False,
) -> MetaSegNet:
    """The network of a method: on the Swin-B of `weights`, or all of it from `checkpoint`.

    Args:
        weights: empty for timm's released Swin-B from the cache, or a file of it, or the author's `stseg_*.pth`.
        checkpoint: weights that a training saved, or of GeoSeg's FT-UNetFormer for the unimodal network.
        random: weights that are not there are random, for a dry run.

    Raises `MissingWeights`, `CorruptFile`, `BadCheckpoint`: with the change or download needed.
    """
    torch.manual_seed(seed)
    model = MetaSegNet.build(classes, text_encoder(method, prompts, data_root, random=random))
    if checkpoint:
        official.load(model, checkpoint)
    elif weights or not random or backbones.or_random(official.SWIN, "pretrained") == "pretrained":
        official.load_swin(model, weights)
    return model.eval()


# --- test and selection -----------------------------------------------------------------------------------------------


@torch.no_grad()  # not inference mode: a frozen text encoder caches states that are used in later training
def confusion(
    model: MetaSegNet, test: Part, texts: Sequence[str] | None, augmentation: str = "none", hardware: Hardware = AUTO
) -> Tensor:
    """The confusion matrix (C, C) of a network on a test, with a text for each item; a batch has images of one size."""
    total = torch.zeros(len(test.classes), len(test.classes), dtype=torch.int64)
    data = test.data if texts is None or model.text is None else Prompted(test.data, model.text, texts)
    with evaluating(hardware, model) as where:
        for items in loader(data, TEST_BATCH, hardware, where, collate=list):
            for some in same_shapes([image for image, *_ in items], TEST_BATCH):
                images, labels, *ids = (torch.stack(column) for column in zip(*[items[i] for i in some], strict=True))
                predict = functools.partial(model.forward, texts=ids[0].to(where) if ids else None)
                logits = augmented(predict, images.to(where, non_blocking=True), augmentation)  # (b, C, h, w)
                predicted = logits.argmax(1).cpu()
                if test.into is not None:
                    predicted = test.into[predicted]
                total += metrics.confusion(labels, predicted, len(test.classes))
    return total


def scores(test: Part, matrix: Tensor) -> metrics.Scores:
    """The scores of a test by the author's definitions, from its confusion matrix."""
    return metrics.scores(matrix, test.left_out, undefined=True)


def chosen(p: Parameters) -> str:
    """The epoch whose weights are tested, "last" or "best": that of the parameter `select`, or the recipe's."""
    return SELECT.get(p.dataset, "last") if p.select == "recipe" else p.select


def views(p: Parameters) -> str:
    """The test-time augmentation: that of the parameter `augmentation`, or of the recipe."""
    return VIEWS.get(p.test_on or p.dataset, "none") if p.augmentation == "recipe" else p.augmentation


# --- the setting ------------------------------------------------------------------------------------------------------


def texts_of(p: Parameters, part: Part, kind: str = "") -> list[str] | None:
    """A text for each item, those of the method's training or of another `kind`, see `Prompts.of_method`."""
    return Prompts.read(p.prompts or PROMPTS).of_method(p.method, part.zones, kind, part.texts, p.seed)


def setting(p: Parameters) -> tuple[str, Training, dict[str, Part]]:
    """The data's title, the training and the tests by name of the notebook's parameters, which paper.yaml explains; in
    a dry run on a few images, generated ones where the data are not below `data_root`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with the change or download needed.
    """
    check(p)
    prompts, r, learned = Prompts.read(p.prompts or PROMPTS), published(p.dataset), None
    facts: dict[str, Any] = {key: getattr(p, key) for key in ("dataset", "without_xbd", "held_out", "padding")}
    count, title = dry_items(p, r.batch * p.devices), p.dataset
    if p.without_xbd:  # which `present` asks for
        there = DATASETS[OEM].folder(p.data_root).is_dir()
    else:
        there = not p.dry_run or all(present(name, p.data_root) for name in (p.dataset, p.test_on) if name)
    if p.dry_run and not there:
        learned, title = generated(p, r, count), f"generated land in place of {p.dataset}"
        tests = {"test": learned}
    else:
        tests, land = test_parts(p), {"train": train_data(p)} if p.task == "train" else {}
        if p.dry_run:
            # of a folder without lists all images are in both
            apart = p.dataset != "folder" or (Path(p.data_root) / "train.txt").is_file()
            found = few(land | tests, count) if apart else few(land, count) | few(tests, count)
            land, tests = ({name: found[name] for name in each} for each in (land, tests))
        for data in land.values():
            title += f", {len(data):,} images" + (f", zone {p.held_out} left out" if p.held_out else "")
            learned = Part(randomised(data, data.zones(), r), data.zones(), data.classes, texts=data.texts())
            if p.dataset == "folder":
                facts["labels"] = [(one.image.name, one.label and sha256(one.label)) for one in data.pictures]
    hardware, validation = Hardware.of(p, "metasegnet", workers=WORKERS), next(iter(tests.values()))
    texts = texts_of(p, learned) if learned else None

    def items(part: Part) -> Dataset:
        """The training items, with the ids of their texts if the network reads texts."""
        words = text_encoder(p.method, prompts, p.data_root, random=p.dry_run)
        if words is None or texts is None:
            return part.data
        return Prompted(part.data, words, texts, DROPPED if LEVELS[p.method] == "full" else 0.0)

    def validate(model: MetaSegNet) -> float:
        """The score in percent that selects the best epoch, without augmentation."""
        matrix = confusion(model, validation, texts_of(p, validation), hardware=hardware)
        return getattr(scores(validation, matrix), SCORES.get(p.dataset, "miou"))

    def build() -> MetaSegNet:
        files = {"data_root": p.data_root, "weights": p.weights, "checkpoint": p.checkpoint}
        classes = CLASSES[p.dataset] if p.test_on else validation.classes
        return network(p.method, prompts, len(classes), **files, seed=p.seed, random=p.dry_run)

    training = Training(
        name=_name(p),
        build=build,
        loss=loss,
        data=items(learned) if learned else None,
        fit=options(r, hardware, p.seed, validate if chosen(p) == "best" else None),
        facts=facts | {"data_root": Path(p.data_root), "texts": texts, "select": chosen(p)},
        dry_run=p.dry_run,
    )
    return title, training, tests


def _name(p: Parameters) -> str:
    """The name of a training: method, data, differences from the recipe, file of the texts, seed."""
    without = [f"without {p.held_out}"] if p.held_out else []
    text = [Path(p.prompts).stem] if p.prompts and LEVELS[p.method] not in (None, "code") else []
    changed = [f"{chosen(p)} epoch"] if chosen(p) != SELECT.get(p.dataset, "last") else []
    changed += ["without xBD"] if p.without_xbd else []
    changed += ["padding impervious"] if p.padding != "ignored" else []
    return ", ".join([p.method, p.dataset, *without, *text, *changed, f"seed {p.seed}"])


def method_label(p: Parameters) -> str:
    """The method's name in the tables, with the weights that its network started from."""
    changes = {f"weights of {Path(p.checkpoint).name}": p.checkpoint}
    return RESULTS.label(p.method, changes, **({} if p.checkpoint else {"swin": p.weights}))


def check(p: Parameters) -> None:
    """Raises `BadParameter` for conflicting parameters."""
    if p.test_on and (p.dataset, p.test_on) != (OEM, LOVEDA):
        raise BadParameter("test_on", p.test_on, f"'' or, with dataset = {OEM!r}, {LOVEDA!r}")
    if p.test_on and chosen(p) == "best":
        raise BadParameter("select", p.select, "'last' with `test_on`: the best epoch would be chosen on that set")
    if p.padding != "ignored" and p.dataset != POTSDAM:
        raise BadParameter("padding", p.padding, f"'ignored'; 'impervious' with dataset = {POTSDAM!r}")
    if (p.task == "train") == bool(p.checkpoint):
        raise BadParameter("checkpoint", p.checkpoint, "'' to train; task = 'test' with the file of a trained network")


class Tested(NamedTuple):
    """A network of the `paper` profile, its scores, a row for each test, and one test image for figures.

    `image` is (3, h, w), normalised; `text` is its text, None for the unimodal network.
    """

    title: str
    model: MetaSegNet
    scores: pd.DataFrame
    image: Tensor
    text: str | None


def prepare(p: Parameters, out: Path) -> tuple[str, dict[str, Part], Opened]:
    """The data's title, the tests by name, and the training with model and checkpoint: all that a run reads is opened,
    nothing is trained. Raises as `setting`."""
    title, training, tests = setting(p)
    return title, tests, opened(training, out)


def run(p: Parameters, out: Path) -> Tested:
    """Train and test, or test alone, as the parameters ask, below `out`.

    The scores are added to `<out>/measured.csv`."""
    title, tests, ready = prepare(p, out)
    model, history = train(ready)
    facts = {"data": title, "method": p.method, "steps": len(history)}
    facts["trainable parameters"] = f"{sum(t.numel() for t in model.trained().values()):,}"
    kind, hardware, rows = p.prompt if p.method == "MetaSegNet" else "", Hardware.of(p, "metasegnet"), []
    for name, test in tests.items():
        texts = texts_of(p, test, kind)
        measured = row(p, name, test, confusion(model, test, texts, views(p), hardware))
        rows.append(facts | {key: measured[key] for key in ("test", *RESULTS.values)})
        RESULTS.measured(out / "measured.csv", measured, dry_run=p.dry_run)
    return Tested(title, model, pd.DataFrame(rows), test.data[0][0], texts[0] if texts else None)


# --- results ----------------------------------------------------------------------------------------------------------


def row(p: Parameters, name: str, test: Part, matrix: Tensor) -> dict[str, Any]:
    """A row of `Results`: the settings of a test, and the scores in percent."""
    level, s = LEVELS[p.method], scores(test, matrix)
    facts = {
        "method": method_label(p),
        "dataset": p.dataset,
        "test": name,
        "prompt": "none" if level is None else p.prompt if p.method == "MetaSegNet" else level,
        "texts": Path(p.prompts or PROMPTS).name,
        "augmentation": views(p),
        "held_out": p.held_out or "no zone",
        "epoch": chosen(p),
        "padding": p.padding,
        "seed": p.seed,
    }
    by_class = {f"IoU {c}": float(v) for c, v in zip(test.classes, s.iou, strict=True)}
    return facts | {"mIoU": s.miou, "mF1": s.mf1, "OA": s.oa} | by_class


def closest(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the unimodal network on Potsdam with the settings closest to the author's, all of one kind.

    Preferred are the best epoch on the test split over the last one, padding as impervious over ignored, and the
    augmentation "lr", that of the README's only example; which one gave the published numbers is not known."""
    ours = rows[(rows.method == "unimodal") & (rows.dataset == POTSDAM) & (rows.held_out == "no zone")]
    rank = 4 * (ours.epoch == "best") + 2 * (ours.padding == "impervious") + (ours.augmentation == VIEWS[POTSDAM])
    return ours[rank == rank.max()]


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title: the author's image-only results, on Potsdam with ours of the unimodal network, and all our
    measurements.

    Ours are means over seeds, with the settings closest to the author's (see the columns). No table has the paper's own
    numbers, because the network here is a reconstruction. On LoveDA the author's results are on the server's test set,
    ours on the validation images."""
    anchors, ours = published_table("metasegnet", "geoseg_reproduction"), closest(rows)
    anchors.insert(1, "set", anchors.attrs["groups"])
    twin = (anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")
    for kind in ("augmentation", "epoch", "padding"):
        anchors[f"{kind} here"] = np.where(twin, ours[kind].iloc[0] if len(ours) else "–", "–")
    for column, name in (("F1", "mF1"), ("OA", "OA"), ("mIoU", "mIoU")):
        anchors[f"{column} here"] = np.where(twin, ours[name].astype(float).mean(), np.nan)
    return {anchors.attrs["title"]: anchors, "Measured here with the reconstruction": rows}


def protocol() -> dict[str, str]:
    """The settings of the profile, one per row; the paper's own were not found, these are of its author's other
    code."""
    potsdam, loveda, openearthmap = (published(name) for name in (POTSDAM, LOVEDA, OEM))
    tiles = len([tile for tile in POTSDAM_TILES["train"] if tile != POTSDAM_FAULTY])
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    return {
        "source": "the paper's settings were not found; these are of its author's image-only code, OpenEarthMap's ours",
        "optimiser": (
            f"AdamW in Lookahead ({LOOKAHEAD['k']} steps, {LOOKAHEAD['alpha']:g}); biases do not decay, norms do"
        ),
        "learning rate": f"{potsdam.lr:g}, encoder {potsdam.encoder_lr:g}",
        "weight decay": f"Potsdam, OpenEarthMap: {potsdam.weight_decay:g}; LoveDA: {loveda.weight_decay:g}",
        "schedule": (
            f"Potsdam, OpenEarthMap: cosine with restarts after {potsdam.restart}, 45, ... epochs to "
            f"{potsdam.floor:g}; LoveDA: cosine to {loveda.floor:g}; constant within an epoch, no warm-up; no "
            "gradient clipping"
        ),
        "epochs": f"Potsdam, OpenEarthMap: {potsdam.epochs}; LoveDA: {loveda.epochs}",
        "batch": (
            f"Potsdam, OpenEarthMap: {potsdam.batch}; LoveDA: {loveda.batch} a GPU; the last partial batch: {LAST}"
        ),
        "precision": "32-true",
        "data": (
            f"Potsdam: {tiles} tiles without {POTSDAM_FAULTY} in windows of {landcover.TILE}, {potsdam.copies} "
            f"copies (two mirrored), padding {landcover.PADDINGS[0]}; else the sets' lists"
        ),
        "augmentation": (
            f"scales {scales}; mosaics {potsdam.mosaic:g}, within a climate zone; Potsdam: crops of {potsdam.crop}; "
            f"LoveDA: crops of {loveda.crop}, flips {loveda.flip:g}, upside down {loveda.upside_down:g}, brightness "
            f"and contrast {loveda.brightness:g} with probability 0.25; OpenEarthMap: crops of {openearthmap.crop}, "
            f"flips {openearthmap.flip:g}, upside down {openearthmap.upside_down:g}"
        ),
        "text": f"RECONSTRUCTION: a frozen encoder; code and name of the zone hidden with probability {DROPPED:g}",
        "test": (
            "whole windows; the mean of the logits over 4 views on Potsdam, 8 on LoveDA, inferred from the author's "
            "examples, else 1 (augmentation); eroded labels on Potsdam; OpenEarthMap on val, LoveDA on val, ISPRS "
            "Potsdam on test"
        ),
        "selection": "the last epoch; LoveDA: that of the highest validation mIoU, of equal ones the first",
        "metric": "one confusion matrix; means over classes, Potsdam's without clutter; F1 nan without a right pixel",
        "seeds": "the author's code: 42, one run; here the parameter seed",
        "sweep": "none found",
        "hardware": "not found",
    }
