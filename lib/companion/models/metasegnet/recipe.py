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
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ...data import DATASETS, landcover
from ...data.landcover_sets import CLASSES, LOVEDA, OEM, POTSDAM, POTSDAM_FAULTY, POTSDAM_TILES, TO_LOVEDA
from ...data.landcover_transforms import SCALES, Mosaic, test_transform, train_transform
from ...errors import BadParameter
from ...evaluation.metrics import landcover as metrics
from ...evaluation.tables import Results, published_table
from ...ops import papers
from ...ops.files import sha256
from ...training import schedules
from ...training.callbacks import EarlyStop, Lookahead
from ...training.fit import AUTO, Hardware, device, evaluating, same_shapes
from ...training.recipe import Training
from ...training.recipe import run as train
from . import geotiff, networks
from .climate import PROMPTS, Prompts, headless
from .inference import augmented, views
from .losses import joint_loss
from .model import MetaSegNet
from .networks import LEVELS
from .text import TextEncoder

SELECT = {LOVEDA: "best"}
"""Of each data set the epoch that is tested, where it is not the last: the one of the highest validation mIoU.

On Potsdam the author takes the epoch of the highest F1 on the TEST images; that is `select` = "best"."""
SCORES = {POTSDAM: "mf1"}  # metric that selects the best epoch, if not "miou"
LOOKAHEAD: dict[str, Any] = {"k": 5, "alpha": 0.5}
LAST = "drop"  # the last images of an epoch, see `fit`
DROPPED = 0.5  # header dropout of full texts (section 14)
TEST_SPLIT = {OEM: "val", LOVEDA: "val", POTSDAM: "test"}  # other test labels are not public
RESULTS = Results.of("metasegnet")
WORKERS = min(8, os.cpu_count() or 1)
TEST_BATCH = 4  # images of 1,024 pixels
DRY_SIDE, DRY_STEPS = 512, 2


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
        flip, upside_down, brightness, mosaic, every: see `landcover_transforms`; a mosaic is of one climate zone.
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


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The author's loss of images, labels and, if the network reads texts, their ids."""
    images, labels, *ids = batch
    logits = model(images, *ids).float()  # (B, C, H, W)
    return joint_loss(logits, labels, ignore=logits.shape[1])


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
        "schedule": lambda base, steps, per_epoch: learning_rates(r, base, per_epoch),
        "epochs": r.epochs,
        "batch": r.batch * hardware.devices,
        "last": LAST,
        "callbacks": [Lookahead(**LOOKAHEAD), *([EarlyStop(score)] if score else [])],
        "seed": seed,
        "hardware": hardware,
    }


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """A test set.

    Attributes:
        data: items (image normalised (3, h, w), labels (h, w)).
        zones: of each item. texts: the user's own, if any.
        classes: of the labels; `left_out` of them are excluded from the means.
        into: (C,) the label of each of the network's classes; None if they are the same.
        batch: images at once, grouped by size.
    """

    __test__ = False  # not a pytest class

    data: Dataset
    zones: Sequence[str | None]
    classes: list[str]
    left_out: tuple[int, ...] = ()
    texts: Sequence[str | None] | None = None
    into: Tensor | None = None
    batch: int = 1


@dataclass(frozen=True)
class Data:
    """What the parameters name.

    Attributes:
        title: for people.
        classes: how many the network has.
        tests: by name.
        train: items (image, labels); None: nothing is trained.
        zones, texts: of the training items; one's own texts.
        facts: of the files, where they may change between runs.
    """

    title: str
    classes: int
    tests: dict[str, Test]
    train: Dataset | None = None
    zones: Sequence[str | None] = ()
    texts: Sequence[str | None] | None = None
    facts: Sequence[tuple[str, object]] = ()


class Prompted(Dataset):
    """Items of `data`, (image, labels), with the ids (L,) of their text appended.

    With probability `dropped` the text is without its header. Each text is tokenised once.
    """

    def __init__(self, data: Dataset, encoder: TextEncoder, texts: Sequence[str], dropped: float = 0.0):
        if len(texts) != len(data):
            raise BadParameter("texts", f"{len(texts)} of them", f"{len(data)}, one for each item")
        self.data, self.dropped = data, dropped
        known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.rows = [known[text] for text in texts]
        self.ids = encoder.ids(list(known))
        self.hidden = encoder.ids([headless(text, encoder.unknown) for text in known])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.hidden if torch.rand(()) < self.dropped else self.ids
        return *self.data[index], ids[self.rows[index]]


def randomised(data: landcover.LandCover, zones: Sequence[str | None], r: Recipe) -> Mosaic:
    """Items (image (3, crop, crop) normalised, labels) by the recipe's random operations; mosaics are of one zone."""
    flips = {"flip": r.flip, "upside_down": r.upside_down}
    transform = train_transform(r.crop, data.ignore, scales=SCALES, brightness=r.brightness, every=r.every, **flips)
    return Mosaic(data, r.mosaic, zones, transform)


def real(p: SimpleNamespace) -> Data:
    """The data of the parameters.

    Raises `BadParameter`, `MissingData`, `CorruptFile`: with the change or download needed."""
    tests = _tests(p)
    data = _split(p, "train") if p.task == "train" else next(iter(tests.values())).data
    if p.dataset == POTSDAM and p.task == "train":
        stems = [data.picture(i).image.stem for i in range(len(data))]
        data = data.where([not stem.startswith(f"top_potsdam_{POTSDAM_FAULTY}_") for stem in stems])
    title = f"{p.dataset}, {len(data):,} images" + (f", zone {p.held_out} left out" if p.held_out else "")
    if p.task != "train":
        return Data(title, len(data.classes), tests)
    if p.held_out:
        data = data.where([zone != p.held_out for zone in data.zones()])
    own = p.dataset == "folder"
    labels = [(one.image.name, one.label and sha256(one.label)) for one in data.pictures] if own else ()
    zones = data.zones()
    return Data(
        title, len(data.classes), tests, randomised(data, zones, published(p.dataset)), zones, data.texts(), labels
    )


def _split(p: SimpleNamespace, split: str, dataset: str = "", **options) -> landcover.LandCover:
    name = dataset or p.dataset
    if name == "folder":
        # classes.txt: one name per line; lists of train and val are optional; without them all images are in both
        listed = split if (Path(p.data_root) / f"{split}.txt").is_file() else None
        classes = landcover.read_classes(p.data_root)
        data = landcover.own(p.data_root, classes, listed, **({"size": 1024} | options))
        if p.task != "predict" and not any(picture.label for picture in data.pictures):
            raise data.dataset.missing(p.data_root, f"no image of '{split}' has a label in labels/")
        return data
    if name == OEM:
        options["without_xbd"] = p.without_xbd
    if name == POTSDAM:
        options |= {"padding": p.padding, "mirrored": split == "train" and published(name).copies == 3}
    return landcover.load(name, p.data_root, split, **options)


def _tests(p: SimpleNamespace) -> dict[str, Test]:
    """The tests by name: all of a set, or the zones seen and the one left out, or another set."""
    name = p.test_on or p.dataset
    data = _split(p, TEST_SPLIT.get(name, "val"), name, transform=test_transform())
    into = None
    if p.test_on:
        into = torch.tensor([list(CLASSES[LOVEDA]).index(TO_LOVEDA[c]) for c in CLASSES[OEM]])
    # without a text the map of climate zones is not needed
    zones = data.zones() if LEVELS[p.method] or p.held_out else [None] * len(data)

    def of(part: landcover.LandCover, zones: Sequence[str | None]) -> Test:
        return Test(part, zones, part.classes, part.left_out, part.texts(), into, TEST_BATCH)

    if not p.held_out:
        return {DATASETS[name].title if p.test_on else "test": of(data, zones)}
    if p.held_out not in zones:
        raise BadParameter("held_out", p.held_out, sorted({zone for zone in zones if zone}))
    seen, left = (data.where([(zone == p.held_out) == out for zone in zones]) for out in (False, True))
    return {"seen": of(seen, seen.zones()), "left out": of(left, left.zones())}


def generated(p: SimpleNamespace, r: Recipe) -> Data:
    """As `real`, of a dry run: noise in squares of one class each, of the recipe's crop size, in two alternating
    zones."""
    names = CLASSES.get(p.dataset, CLASSES[OEM])
    side = r.crop if device(p.accelerator) == "cuda" else min(r.crop, DRY_SIDE)

    def items(count: int, seed: int) -> tuple[TensorDataset, list[str]]:
        generator = torch.Generator().manual_seed(1000 * p.seed + seed)
        coarse = torch.randint(len(names) + 1, (count, 1, 8, 8), generator=generator)
        labels = coarse.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)[:, 0]  # (count, side, side)
        images = torch.randn(count, 3, side, side, generator=generator) + labels[:, None] / len(names)
        return TensorDataset(images, labels), [("Cfa", "Aw")[i % 2] for i in range(count)]

    test = Test(*items(2, 2), list(names), landcover.LEFT_OUT.get(p.dataset, ()), batch=2)
    title = "generated land (dry run: the scores mean nothing)"
    return Data(title, len(names), {"test": test}, *items(DRY_STEPS * r.batch * p.devices, 1))


# --- test -------------------------------------------------------------------------------------------------------------


@torch.no_grad()  # not inference mode: a frozen text encoder caches states that are used in later training
def confusion(
    model: MetaSegNet, test: Test, texts: Sequence[str] | None, augmentation: str = "none", hardware: Hardware = AUTO
) -> Tensor:
    """The confusion matrix (C, C) of a network on a test, with a text for each item."""
    total, done = 0, 0
    network: Callable[..., Tensor] = model
    ids = None if texts is None else model.ids(texts)
    workers = 0 if isinstance(test.data, TensorDataset) else WORKERS
    with evaluating(hardware, model) as where:
        pin = where.type == "cuda"
        for items in DataLoader(test.data, test.batch, num_workers=workers, pin_memory=pin, collate_fn=list):
            for some in same_shapes([image for image, _ in items], test.batch):
                own = {} if ids is None else {"texts": ids[[done + i for i in some]].to(where)}
                x = torch.stack([items[i][0].to(where, non_blocking=True) for i in some])  # (b, 3, h, w)
                predicted = augmented(functools.partial(network, **own), x, augmentation).argmax(1).cpu()
                predicted = predicted if test.into is None else test.into[predicted]
                labels = torch.stack([items[i][1] for i in some])
                total = total + metrics.confusion(labels, predicted, len(test.classes))
            done += len(items)
    return total


def scores(test: Test, matrix: Tensor) -> metrics.Scores:
    """The scores of a test by the author's definitions, from its confusion matrix."""
    return metrics.scores(matrix, test.left_out, undefined=True)


# --- selection --------------------------------------------------------------------------------------------------------


def chosen(p: SimpleNamespace) -> str:
    """The epoch whose weights are tested, "last" or "best": that of the parameter `select`, or the recipe's."""
    return SELECT.get(p.dataset, "last") if p.select == "recipe" else p.select


def validated(
    model: MetaSegNet, test: Test, texts: Sequence[str] | None, score: str = "miou", hardware: Hardware = AUTO
) -> float:
    """The score in percent that selects the best epoch, without augmentation."""
    return getattr(scores(test, confusion(model, test, texts, hardware=hardware)), score)


# --- the setting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A training and its tests.

    Attributes:
        title: of the data.
        training: of the method; it is run once.
        tests: by name.
        texts: (zones, kind, own texts) to a text for each zone, see `networks.texts`.
    """

    title: str
    training: Training
    tests: dict[str, Test]
    texts: Callable[..., list[str] | None]


def setting(p: SimpleNamespace) -> Setting:
    """The training and the tests of the notebook's checked parameters `p`, which paper.yaml explains.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with the change or download needed.
    """
    check(p)
    prompts, r = Prompts.read(p.prompts or PROMPTS), published(p.dataset)
    if p.dry_run:
        gpu = device(p.accelerator) == "cuda"
        r = replace(r, epochs=1, batch=r.batch if gpu else 1)
    data = generated(p, r) if p.dry_run else real(p)
    ask = functools.partial(networks.texts, prompts, p.method, seed=p.seed)
    texts, hardware = ask(data.zones, own=data.texts), Hardware.of(p, "metasegnet", workers=WORKERS)
    score = None
    if chosen(p) == "best" and not p.dry_run:
        test, metric = next(iter(data.tests.values())), SCORES.get(p.dataset, "miou")
        asked = ask(test.zones, own=test.texts)
        score = functools.partial(validated, test=test, texts=asked, score=metric, hardware=hardware)

    def build() -> MetaSegNet:
        files = {"data_root": p.data_root, "weights": p.weights, "checkpoint": p.checkpoint}
        sizes = {"text": p.text_encoder, "seed": p.seed, "random": p.dry_run}
        return networks.network(p.method, prompts, data.classes, **files, **sizes)

    def items() -> Dataset:
        words = networks.text_encoder(p.method, prompts, p.text_encoder, p.data_root, random=p.dry_run)
        if words is None or texts is None:
            return data.train
        return Prompted(data.train, words, texts, DROPPED if LEVELS[p.method] == "full" else 0.0)

    facts = {key: getattr(p, key) for key in ("dataset", "without_xbd", "held_out", "text_encoder", "padding")}
    facts |= {"data_root": Path(p.data_root), "texts": texts, "select": chosen(p)}
    if data.facts:
        facts["labels"] = list(data.facts)
    training = Training(
        name=_name(p),
        build=build,
        loss=loss,
        data=None if data.train is None else items,
        fit=options(r, hardware, p.seed, score),
        facts=facts,
    )
    return Setting(data.title, training, data.tests, ask)


def _name(p: SimpleNamespace) -> str:
    """The name of a training: method, data, differences from the recipe, encoder and file of the texts, seed."""
    without = [f"without {p.held_out}"] if p.held_out else []
    text = [p.text_encoder] if LEVELS[p.method] not in (None, "code") else []
    text += [Path(p.prompts).stem] if text and p.prompts else []
    changed = [f"{chosen(p)} epoch"] if chosen(p) != SELECT.get(p.dataset, "last") else []
    changed += ["without xBD"] if p.without_xbd else []
    changed += ["padding impervious"] if p.padding != "ignored" else []
    return ", ".join([p.method, p.dataset, *without, *text, *changed, f"seed {p.seed}"])


def check(p: SimpleNamespace) -> None:
    """Raises `BadParameter` for conflicting parameters."""
    if p.test_on and (p.dataset, p.test_on) != (OEM, LOVEDA):
        raise BadParameter("test_on", p.test_on, f"'' or, with dataset = {OEM!r}, {LOVEDA!r}")
    if p.overlap >= p.tile:
        raise BadParameter("overlap", p.overlap, f"less than the tile, {p.tile}")
    if p.held_out and (p.test_on or p.dataset not in (OEM, "folder")):
        raise BadParameter("held_out", p.held_out, "'' where all images are of one zone, or with `test_on`")
    if p.test_on and chosen(p) == "best":
        raise BadParameter("select", p.select, "'last' with `test_on`: the best epoch would be chosen on that set")
    if p.padding != "ignored" and p.dataset != POTSDAM:
        raise BadParameter("padding", p.padding, f"'ignored'; 'impervious' with dataset = {POTSDAM!r}")
    if p.task != "train" and not (p.checkpoint or p.dry_run):
        raise BadParameter("checkpoint", p.checkpoint, f"the file of a trained network, for task = {p.task!r}")
    if p.task == "train" and p.checkpoint:
        raise BadParameter("checkpoint", p.checkpoint, "'' to train; task = 'test' or 'predict' for a trained one")


def run(p: SimpleNamespace, out: Path) -> pd.DataFrame:
    """Train, test or predict as the parameters ask, below `out`; a row for each test.

    The scores are added to `<out>/measured.csv`; a dry run writes nothing."""
    asked = setting(p)
    model, history = train(asked.training, None if p.dry_run else out)
    facts = {"data": asked.title, "method": p.method, "steps": len(history)}
    facts["trainable parameters"] = f"{sum(t.numel() for t in model.trained().values()):,}"
    kind, hardware = p.prompt if p.method == "MetaSegNet" else "", Hardware.of(p, "metasegnet")
    if p.task == "predict" and not p.dry_run:
        whole = landcover.own(p.data_root, landcover.read_classes(p.data_root))
        texts = asked.texts(whole.zones(), kind, whole.texts())
        tiles = {"tile": p.tile, "overlap": p.overlap, "augmentation": p.augmentation}
        written = [*geotiff.predict(model, whole, texts, out / "maps", hardware=hardware, **tiles)]
        return pd.DataFrame([facts | {"maps written": len(written)}])
    matrices = {
        name: confusion(model, test, asked.texts(test.zones, kind, test.texts), p.augmentation, hardware)
        for name, test in asked.tests.items()
    }
    if not p.dry_run:
        rows = [row(p, name, asked.tests[name], matrix) for name, matrix in matrices.items()]
        RESULTS.measured(out / "measured.csv", *rows)
    found = {name: scores(asked.tests[name], matrix) for name, matrix in matrices.items()}
    return pd.DataFrame([facts | {"test": n, "mIoU": s.miou, "mF1": s.mf1, "OA": s.oa} for n, s in found.items()])


# --- results ----------------------------------------------------------------------------------------------------------


def row(p: SimpleNamespace, name: str, test: Test, matrix: Tensor) -> dict[str, Any]:
    """A row of `Results`: the settings of a test, and the scores in percent."""
    level, s = LEVELS[p.method], scores(test, matrix)
    facts = {
        "method": p.method,
        "dataset": p.dataset,
        "test": name,
        "prompt": "none" if level is None else p.prompt if p.method == "MetaSegNet" else level,
        "text_encoder": "none" if level in (None, "code") else p.text_encoder,
        "texts": Path(p.prompts or PROMPTS).name,
        "augmentation": p.augmentation,
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
    augmentation with most views; the author's augmentation is not known."""
    ours = rows[(rows.method == "unimodal") & (rows.dataset == POTSDAM) & (rows.held_out == "no zone")]
    rank = [
        (epoch == "best", padding == "impervious", len(views(augmentation)))
        for epoch, padding, augmentation in zip(ours.epoch, ours.padding, ours.augmentation, strict=True)
    ]
    return ours[np.array([one == max(rank) for one in rank], bool)]


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title: the author's image-only results, on Potsdam with ours of the unimodal network, and all our
    measurements.

    Ours are means over seeds, with the settings closest to the author's (see the columns). No table has the paper's own
    numbers, because the network here is a reconstruction. On LoveDA the author's results are on the server's test set,
    ours on the validation images."""
    anchors, ours = published_table("metasegnet", "geoseg_reproduction"), closest(rows)
    facts = next(t for t in papers.paper("metasegnet")["tables"] if t["id"] == "geoseg_reproduction")
    anchors.insert(1, "set", [r["group"] for r in facts["rows"]])
    twin = (anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")
    for kind in ("augmentation", "epoch", "padding"):
        anchors[f"{kind} here"] = np.where(twin, ours[kind].iloc[0] if len(ours) else "–", "–")
    for column, name in (("F1", "mF1"), ("OA", "OA"), ("mIoU", "mIoU")):
        anchors[f"{column} here"] = np.where(twin, ours[name].astype(float).mean(), np.nan)
    return {facts["title"]: anchors, "Measured here with the reconstruction": rows}


def protocol() -> dict[str, str]:
    """The settings of the profile, one per row; the paper's own were not found, these are of its author's other
    code."""
    sets = {"potsdam": published(POTSDAM), "loveda": published(LOVEDA), "openearthmap": published(OEM)}
    tiles = [tile for tile in POTSDAM_TILES["train"] if tile != POTSDAM_FAULTY]
    facts = {"tiles": len(tiles), "faulty": POTSDAM_FAULTY, "tile": landcover.TILE, "padding": landcover.PADDINGS[0]}
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    return papers.protocol("metasegnet", **sets, **facts, scales=scales, lookahead=LOOKAHEAD, last=LAST, drop=DROPPED)
