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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ... import backbones, geotiff
from ...climate import OCEAN, PROMPTS, Prompts, misplaced
from ...data import DATASETS, landcover
from ...data.landcover_sets import CLASSES, LOVEDA, OEM, POTSDAM, POTSDAM_FAULTY, POTSDAM_TILES, TO_LOVEDA
from ...data.landcover_transforms import SCALES, Mosaic, test_transform, train_transform
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics import landcover as metrics
from ...evaluation.tables import published_table, upsert_rows
from ...ops.files import sha256
from ...ops.papers import paper
from ...training import checkpoints, schedules
from ...training.callbacks import Callback, EarlyStop, Lookahead
from ...training.checkpoints import Checkpoint, trained_state
from ...training.fit import AUTO, Hardware, History, device, evaluating, fit, same_shapes
from ...training.schedules import adamw
from ..layers.state_dicts import load_official
from .model import SIZES, MetaSegNet, augmented, bands, joint_loss, official_state, swin, views
from .text import BertText, ClipText, TextEncoder, Words, headless

SWIN = "swin_base_patch4_window7_224.ms_in22k_ft_in1k"
CLIP = "ViT-B-16/openai"
LEVELS = {
    "MetaSegNet": "full",
    "unimodal": None,
    "constant text": "constant",
    "zone names": "name",
    "one-hot zone": "code",
}
"""Of each method the level of its texts in training; None: no text."""

SELECT = {LOVEDA: "best"}
"""Of each data set the epoch that is tested, where it is not the last: the one of the highest validation mIoU.

On Potsdam the author takes the epoch of the highest F1 on the TEST images; that is `select` = "best"."""
SCORES = {POTSDAM: "mf1"}  # metric that selects the best epoch, if not "miou"
LOOKAHEAD: dict[str, Any] = {"k": 5, "alpha": 0.5}
LAST = "drop"  # the last images of an epoch, see `fit`
DROPPED = 0.5  # header dropout of full texts (section 14)
TEST_SPLIT = {OEM: "val", LOVEDA: "val", POTSDAM: "test"}  # other test labels are not public
WORKERS = min(8, os.cpu_count() or 1)
TEST_BATCH = 4  # images of 1,024 pixels
DRY_SIDE, DRY_STEPS = 512, 2


# --- the recipe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The author's settings of a data set.

    Attributes:
        epochs, batch, lr, encoder_lr, weight_decay: of AdamW in Lookahead; biases do not decay, norms do.
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


def recipe(dataset: str) -> Recipe:
    """The recipe of a data set. OpenEarthMap's, which was not found, is Potsdam's with smaller crops (RECONSTRUCTION);
    it is also used for your own folder."""
    rows = published_table("metasegnet", "recipes").set_index("method")
    row = rows.loc[DATASETS[dataset].title if dataset in (LOVEDA, POTSDAM) else DATASETS[OEM].title].to_dict()
    whole = ("epochs", "batch", "restart", "crop", "copies")
    values: dict[str, Any] = {name: int(value) if name in whole else float(value) for name, value in row.items()}
    return Recipe(**values | {"every": bool(row["every"])})


def learning_rates(r: Recipe, base: float, per_epoch: int, epochs: int) -> np.ndarray:
    """The learning rate of each step, constant within an epoch, (epochs x per_epoch,).

    Without restarts half a cosine from `base` to `floor`; with them half a cosine to 0, then one twice as long, ..."""
    if not r.restart:
        rates = r.floor + (base - r.floor) * (1 + np.cos(np.pi * np.arange(epochs) / epochs)) / 2
        return rates.repeat(per_epoch)
    found: list[float] = []
    length = r.restart
    while len(found) < epochs:
        found += [base * (1 + np.cos(np.pi * i / length)) / 2 for i in range(length)]
        length *= 2
    return np.array(found[:epochs]).repeat(per_epoch)


def param_groups(model: MetaSegNet, r: Recipe) -> list[dict]:
    """The trainable parameters in four groups: encoder and the rest, each with its biases in a separate group without
    weight decay.

    The four norms on the encoder's maps belong to the encoder, as in the author's Swin."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, tensor in model.trained().items():
        encoder, bias = name.startswith(("encoder.", "norms.")), name.endswith("bias")
        groups.setdefault((encoder, bias), []).append(tensor)
    found = []
    for (encoder, bias), tensors in groups.items():
        options = {"lr": r.encoder_lr, "name": "encoder"} if encoder else {"lr": r.lr, "name": "rest"}
        found += schedules.param_groups(tensors, 0.0 if bias else r.weight_decay, "all", **options)
    return found


class Prompted(Dataset):
    """Items of `data`, (image, labels), with the ids (L,) of their text appended.

    With probability `dropped` the text is without its header. Each text is tokenised once.
    """

    def __init__(self, data: Dataset, encoder: TextEncoder, texts: Sequence[str], dropped: float = 0.0):
        if len(texts) != len(data):
            raise BadParameter("texts", f"{len(texts)} of them", f"{len(data)}, one for each item")
        self.data, self.dropped = data, dropped
        unknown = "[UNK]" if isinstance(encoder, BertText) else "unknown"
        known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.rows = [known[text] for text in texts]
        self.ids, self.hidden = encoder.ids(list(known)), encoder.ids([headless(text, unknown) for text in known])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.hidden if torch.rand(()) < self.dropped else self.ids
        return *self.data[index], ids[self.rows[index]]


def learn(
    p: SimpleNamespace,
    data: Dataset,
    model: MetaSegNet,
    *,
    r: Recipe | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    score: Callable[[nn.Module], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train by the author's recipe, in place: AdamW in Lookahead, two learning rates, no decay of biases.

    Args:
        data: items (image, labels), and the ids of a text if the model uses one.
        r: None: the recipe of the data set.
        epochs, batch: None: those of the recipe; its batch is per GPU.
        score: of the model after each epoch; the weights of the best epoch are selected, in ties the first. None: those
            of the last.
    """
    r = r or recipe(p.dataset)
    batch, epochs, ignore = batch or r.batch * p.devices, epochs or r.epochs, model.ignore
    callbacks: list[Callback] = [Lookahead(**LOOKAHEAD)]
    if score is not None:
        callbacks.append(EarlyStop(score))

    def loss(model: nn.Module, items: tuple[Tensor, ...]) -> Tensor:
        images, labels, *ids = items
        return joint_loss(model(images, *ids).float(), labels, ignore)

    history = fit(
        model,
        loss,
        data,
        epochs=epochs,
        batch=batch,
        optimizer=adamw(r.lr, groups=functools.partial(param_groups, r=r)),
        schedule=lambda base, steps, per_epoch: learning_rates(r, base, per_epoch, epochs),
        callbacks=callbacks,
        last=LAST,
        checkpoint=checkpoint,
        seed=p.seed,
        hardware=Hardware.of(p, "metasegnet", workers=WORKERS),
        name=p.method,
    )
    return history


# --- the network ------------------------------------------------------------------------------------------------------


def text_encoder(p: SimpleNamespace, prompts: Prompts) -> TextEncoder | None:
    """The text encoder of a method (RECONSTRUCTION): BERT-base or CLIP's, frozen, with random weights in a dry run; for
    "one-hot zone" a trained vector for each zone; None for the unimodal network.

    Raises `MissingWeights`: BERT's folder is not below `<data_root>/weights`, or CLIP is not cached."""
    level = LEVELS[p.method]
    if level is None:
        return None
    if level == "code":
        return Words.of(list(prompts.zones), layers=0, length=1)
    if p.text_encoder == "clip":
        clip = backbones.build(f"openclip:{CLIP}", "random" if p.dry_run else "pretrained")
        return ClipText(clip, open_clip.get_tokenizer(CLIP.partition("/")[0]))
    import transformers as hf  # imported here because it takes seconds

    if p.dry_run:
        # BERT's vocabulary is a file; here it is that of our texts
        texts = [*prompts.texts([*prompts.zones, None]), prompts.constant]
        words = sorted({word for text in texts for word in hf.BasicTokenizer().tokenize(text)})
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = hf.BertTokenizer(vocab={word: i for i, word in enumerate([*special, *words])})
        return BertText(hf.BertModel(hf.BertConfig()), tokenizer)
    entry = next(w for w in paper("metasegnet")["weights"] if w["name"] == "bert")
    folder = (Path(p.data_root) / "weights" / entry["file"]).parent
    if not folder.joinpath("config.json").is_file():
        ways = [f"put the files of the hub's google-bert/bert-base-uncased into {folder}", "text_encoder = 'clip'"]
        raise MissingWeights(entry["what"], folder, ways)
    return BertText(*backbones.read_bert(folder))


def build(p: SimpleNamespace, prompts: Prompts, classes: int) -> MetaSegNet:
    """The network of the parameters: on the Swin-B of `weights`, or all of it from `checkpoint`.

    `weights`: empty for timm's released Swin-B from the cache, or a file of it, or the author's `stseg_*.pth`.

    Raises `MissingWeights`, `CorruptFile`, `BadCheckpoint`: with the change or download needed.
    """
    torch.manual_seed(p.seed)
    text, encoder = text_encoder(p, prompts), swin(**SIZES["paper"]["swin"])
    official = {}
    if not (p.dry_run or p.checkpoint):
        state = backbones.read_state(p.weights) if p.weights else {}
        official = {f"backbone.{name.removeprefix('backbone.')}": t for name, t in state.items()}
        if not any(name.startswith("backbone.norm0.") for name in official):  # timm's, or Swin's own release
            official = {}
            encoder.load_state_dict(backbones.build(SWIN, p.weights or "pretrained").state_dict())
    model = MetaSegNet(encoder, classes, text, **SIZES["paper"]["model"])
    if official:
        names = {ours: theirs for ours, theirs in model.official_names().items() if theirs.startswith("backbone.")}
        computed = ("relative_position_index", "attn_mask")
        official = {name: t for name, t in official.items() if not name.endswith(computed)}
        load_official(model, official, names, "the author's Swin")
    if p.checkpoint:
        load(model, p.checkpoint)
    return model.eval()


def load(model: MetaSegNet, path: str | Path) -> None:
    """Load the weights that a training saved; a frozen text encoder is not among them.

    The unimodal network also loads checkpoints of GeoSeg's FT-UNetFormer.

    Raises `MissingWeights`, `CorruptFile`, `BadCheckpoint`."""
    if not Path(path).is_file():
        ways = ["train one (task = 'train', no checkpoint); the paper's was never released"]
        raise MissingWeights("a trained MetaSegNet", path, ways)
    state = backbones.read_state(path)
    if model.text is None and any(name.removeprefix("net.").startswith("backbone.") for name in state):
        load_official(model, official_state(state), model.official_names(), "GeoSeg's FT-UNetFormer of these classes")
        return
    names = {name: name for name in trained_state(model)}
    load_official(model, state, names, "a MetaSegNet of these classes and texts")


# --- tests ------------------------------------------------------------------------------------------------------------


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


def texts(
    prompts: Prompts,
    method: str,
    zones: Sequence[str | None],
    kind: str = "",
    own: Sequence[str | None] | None = None,
    seed: int = 0,
) -> list[str] | None:
    """A text for each zone, of the method's training or of another `kind`; None for the unimodal network.

    Args:
        kind: a level of `climate.Prompts`; "wrong" and "shuffled": texts of the method's level from another zone of
            `zones`, or, if there is only one, from all zones with a text.
        own: texts that replace the full text of the right zone.
    """
    level, right = LEVELS[method], kind not in ("wrong", "shuffled")
    if level is None:
        return None
    if kind == "wrong":
        known = {zone for zone in zones if zone is not None}
        if len(known) > 1:
            zones = misplaced(zones, seed)
        else:
            others = sorted(set(prompts.zones) - known - {OCEAN})
            other = others[np.random.default_rng(seed).integers(len(others))]
            zones = [zone and other for zone in zones]
    elif kind == "shuffled":
        zones = [zones[i] for i in np.random.default_rng(seed).permutation(len(zones))]
    elif kind:
        level = kind
    if level == "code":
        return [zone or "unknown" for zone in zones]
    found = prompts.texts(zones, level, seed)
    if own is None or level != "full" or not right:
        return found
    return [mine or text for mine, text in zip(own, found, strict=True)]


@torch.no_grad()  # not inference mode: a frozen text encoder caches states that are used in later training
def confusion(
    model: MetaSegNet, part: Test, given: Sequence[str] | None, augmentation: str = "none", hardware: Hardware = AUTO
) -> Tensor:
    """The confusion matrix (C, C) of a network on a test, with a text for each item."""
    total, done = 0, 0
    ids = None if given is None else model.ids(given)
    network: Callable[..., Tensor] = model
    workers = 0 if isinstance(part.data, TensorDataset) else WORKERS
    with evaluating(hardware, model) as where:
        pin = where.type == "cuda"
        for items in DataLoader(part.data, part.batch, num_workers=workers, pin_memory=pin, collate_fn=list):
            for some in same_shapes([image for image, _ in items], part.batch):
                own = {} if ids is None else {"texts": ids[[done + i for i in some]].to(where)}
                x = torch.stack([items[i][0].to(where, non_blocking=True) for i in some])
                predicted = augmented(functools.partial(network, **own), x, augmentation).argmax(1).cpu()
                predicted = predicted if part.into is None else part.into[predicted]
                labels = torch.stack([items[i][1] for i in some])
                total = total + metrics.confusion(labels, predicted, len(part.classes))
            done += len(items)
    return total


def predict(
    model: MetaSegNet,
    data: landcover.LandCover,
    given: Sequence[str] | None,
    out: str | Path,
    *,
    tile: int = 1024,
    overlap: int = 256,
    augmentation: str = "none",
    batch: int = 1,
    hardware: Hardware = AUTO,
) -> list[Path]:
    """Maps of all images of a set, of any size, as `<out>/<image>.tif` (see `geotiff.label`).

    Args:
        data: whole images, not windows. given: a text for each.
        tile, overlap, batch: see `metasegnet.bands`.

    Raises `BadParameter`: windows, or a map would overwrite an image or its labels.
    """
    if data.windows is not None:
        raise BadParameter("data", f"windows of {data.size} pixels", "whole images (size = None)")
    files, targets = [], _targets(data, out)
    with evaluating(hardware, model) as where:
        for i, (picture, target) in enumerate(zip(data.pictures, targets, strict=True)):
            ids = () if given is None else (model.ids([given[i]]).to(where),)

            def network(x: Tensor, ids=ids) -> Tensor:
                return augmented(lambda y: model(y, *ids), x.to(where), augmentation)

            tiles = functools.partial(bands, network, tile=tile, overlap=overlap, batch=batch)
            files.append(geotiff.label(tiles, picture.image, target, data.palette, data.classes))
    return files


def _targets(data: landcover.LandCover, out: str | Path) -> list[Path]:
    """The file of each image's map."""
    targets = [Path(out) / f"{picture.image.stem}.tif" for picture in data.pictures]
    own = {path.resolve() for picture in data.pictures for path in (picture.image, picture.label) if path}
    if taken := [target for target in targets if target.resolve() in own]:
        raise BadParameter("out", str(out), f"another folder: a map would overwrite {taken[0]}")
    return targets


def maps(folder: str | Path, out: str | Path, p: SimpleNamespace) -> Iterator[tuple[Path, str | None]]:
    """Segment the images of your own folder (see `landcover.own`, with its `classes.txt`), one after the other.

    Args:
        out: folder of the maps; empty: `<folder>/maps`.
        p: the options of `companion landcover`: `checkpoint`, `method`, `tile`, ...

    Yields:
        The path of each map and the climate zone of its text.
    """
    others = {"task": "predict", "dataset": "folder", "weights": "", "held_out": "", "test_on": ""}
    others |= {"select": "last", "padding": "ignored"}
    p = SimpleNamespace(**(vars(p) | others | {"seed": 0, "dry_run": False}))
    check(p)
    data, prompts = landcover.own(folder, landcover.read_classes(folder)), Prompts.read(p.prompts or PROMPTS)
    out = out or Path(folder) / "maps"
    _targets(data, out)  # before the network is built; all images, not one by one
    model, zones = build(p, prompts, len(data.classes)), data.zones()
    given = texts(prompts, p.method, zones, own=data.texts(), seed=p.seed)
    settings = {"tile": p.tile, "overlap": p.overlap, "augmentation": p.augmentation}
    settings["hardware"] = Hardware(p.accelerator)
    for i, picture in enumerate(data.pictures):
        one = data.where([other is picture for other in data.pictures])
        text = None if given is None else given[i : i + 1]
        (path,) = predict(model, one, text, out, **settings)
        yield path, zones[i]


# --- the setting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A training and its tests.

    Attributes:
        title: of the data.
        learning_rates: of each trained method.
        tests: by name.
        texts: (method, zones, kind, own texts) to a text for each zone, see `texts`.
        build: the network of a method, before training.
        learn: trains a network in place: (network, method) to the history; empty if nothing is trained.
        augmentation, hardware: at test.
    """

    title: str
    learning_rates: dict[str, float]
    tests: dict[str, Test]
    texts: Callable[..., list[str] | None]
    build: Callable[[str], MetaSegNet]
    learn: Callable[[MetaSegNet, str], History]
    augmentation: str = "none"
    hardware: Hardware = AUTO


def train(setting: Setting, method: str) -> tuple[MetaSegNet, History]:
    """The network of a method, trained, and the history, which is empty if nothing is trained."""
    model = setting.build(method)
    history = setting.learn(model, method)
    return model.eval(), history


def matrix(setting: Setting, model: MetaSegNet, method: str, test: str, kind: str = "") -> Tensor:
    """The confusion matrix (C, C) of a network on a test, with the texts of its method or those of `kind`."""
    part = setting.tests[test]
    given = setting.texts(method, part.zones, kind, part.texts)
    return confusion(model, part, given, setting.augmentation, setting.hardware)


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The training and the tests of the notebook's checked parameters `p`.

    Args:
        out: the run's folder.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with the change or download needed.
    """
    check(p)
    prompts = Prompts.read(p.prompts or PROMPTS)
    title, classes, tests, training = _generated(p) if p.dry_run else _real(p)

    def learn_method(model: MetaSegNet, method: str) -> History:
        if p.task != "train" and not p.dry_run:
            return []
        items, zones, own = training()
        data, given = items, texts(prompts, method, zones, own=own, seed=p.seed)
        if model.text is not None and given is not None:
            data = Prompted(items, model.text, given, DROPPED if LEVELS[method] == "full" else 0.0)
        if p.dry_run:
            return learn(p, data, model, epochs=1, batch=len(data) // DRY_STEPS)
        without = [f"without {p.held_out}"] if p.held_out else []
        name = ", ".join([method, p.dataset, *without, *_changed(p, method), f"seed {p.seed}"])
        facts = {key: getattr(p, key) for key in ("dataset", "without_xbd", "held_out", "text_encoder", "padding")}
        facts |= {"data_root": Path(p.data_root), "texts": given, "select": chosen(p)}
        if p.dataset == "folder":  # its images and labels may change between runs
            facts["labels"] = [(one.image.name, one.label and sha256(one.label)) for one in items.data.pictures]
        checkpoint = Checkpoint.of(out / "checkpoints", name, model=model, **facts)
        part = next(iter(tests.values()))
        asked = texts(prompts, method, part.zones, own=part.texts, seed=p.seed)
        score = functools.partial(validated, part=part, given=asked, p=p) if chosen(p) == "best" else None
        history = learn(p, data, model, score=score, checkpoint=checkpoint)
        checkpoints.save(out / "trained", name, trained_state(model))
        return history

    return Setting(
        title=title,
        learning_rates={p.method: recipe(p.dataset).lr},
        tests=tests,
        texts=functools.partial(texts, prompts, seed=p.seed),
        build=lambda method: build(SimpleNamespace(**(vars(p) | {"method": method})), prompts, classes),
        learn=learn_method,
        augmentation=p.augmentation,
        hardware=Hardware.of(p, "metasegnet"),
    )


def chosen(p: SimpleNamespace) -> str:
    """The epoch whose weights are tested, "last" or "best": that of the parameter `select`, or the recipe's."""
    return SELECT.get(p.dataset, "last") if p.select == "recipe" else p.select


def validated(model: MetaSegNet, part: Test, given: Sequence[str] | None, p: SimpleNamespace) -> float:
    """The score in percent that selects the best epoch, without augmentation: mIoU, on Potsdam the mean F1."""
    counts = confusion(model, part, given, hardware=Hardware.of(p, "metasegnet"))
    return getattr(scores(part, counts), SCORES.get(p.dataset, "miou"))


def _changed(p: SimpleNamespace, method: str) -> list[str]:
    """The differences from the recipe, and the encoder and the file of the texts, as parts of a name."""
    text = [p.text_encoder] if LEVELS[method] not in (None, "code") else []
    text += [Path(p.prompts).stem] if text and p.prompts else []
    select = [f"{chosen(p)} epoch"] if chosen(p) != SELECT.get(p.dataset, "last") else []
    without = ["without xBD"] if p.without_xbd else []
    return text + select + without + (["padding impervious"] if p.padding != "ignored" else [])


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
        raise BadParameter(
            "checkpoint", p.checkpoint, "'' to train; task = 'test' or 'predict' for one that is trained"
        )


def _split(p: SimpleNamespace, split: str, dataset: str = "", **options) -> landcover.LandCover:
    name = dataset or p.dataset
    if name == "folder":
        # classes.txt: one name per line; lists of train and val are optional; without them all images are in both
        listed = split if (Path(p.data_root) / f"{split}.txt").is_file() else None
        classes = landcover.read_classes(p.data_root)
        found = landcover.own(p.data_root, classes, listed, **({"size": 1024} | options))
        if p.task != "predict" and not any(picture.label for picture in found.pictures):
            raise found.dataset.missing(p.data_root, f"no image of '{split}' has a label in labels/")
        return found
    if name == OEM:
        options["without_xbd"] = p.without_xbd
    if name == POTSDAM:
        options |= {"padding": p.padding, "mirrored": split == "train" and recipe(name).copies == 3}
    return landcover.load(name, p.data_root, split, **options)


Items = tuple[TensorDataset | Mosaic, Sequence[str | None], Sequence[str | None] | None]
"""Training items (image, labels), their zones, and one's own texts."""


def _real(p: SimpleNamespace) -> tuple[str, int, dict[str, Test], Callable[[], Items]]:
    """Title, number of classes, tests and training items of the parameters."""
    tests = _tests(p)
    whole = _split(p, "train") if p.task == "train" else next(iter(tests.values())).data
    if p.dataset == POTSDAM and p.task == "train":
        stems = [whole.picture(i).image.stem for i in range(len(whole))]
        whole = whole.where([not stem.startswith(f"top_potsdam_{POTSDAM_FAULTY}_") for stem in stems])

    def training() -> Items:
        data = whole.where([zone != p.held_out for zone in whole.zones()]) if p.held_out else whole
        zones = data.zones()
        return randomised(data, zones, recipe(p.dataset)), zones, data.texts()

    title = f"{p.dataset}, {len(whole):,} images" + (f", zone {p.held_out} left out" if p.held_out else "")
    return title, len(whole.classes), tests, training


def randomised(data: landcover.LandCover, zones: Sequence[str | None], r: Recipe) -> Mosaic:
    """Items (image (3, crop, crop) normalised, labels) by the recipe's random operations; mosaics are of one zone."""
    options: dict[str, Any] = {"flip": r.flip, "upside_down": r.upside_down, "brightness": r.brightness}
    options["every"] = r.every
    return Mosaic(data, r.mosaic, zones, train_transform(r.crop, data.ignore, scales=SCALES, **options))


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
    kept = {"seen": [zone != p.held_out for zone in zones], "left out": [zone == p.held_out for zone in zones]}
    found = {}
    for title, keep in kept.items():
        part = data.where(keep)
        found[title] = of(part, part.zones())
    return found


def _generated(p: SimpleNamespace) -> tuple[str, int, dict[str, Test], Callable[[], Items]]:
    """As `_real`, of a dry run: noise in squares of one class each, of the recipe's crop size, in two alternating
    zones."""
    names = CLASSES.get(p.dataset, CLASSES[OEM])
    gpu, r = device(p.accelerator) == "cuda", recipe(p.dataset)
    side, batch = (r.crop, r.batch) if gpu else (min(r.crop, DRY_SIDE), 1)

    def generated(count: int, seed: int) -> Items:
        generator = torch.Generator().manual_seed(1000 * p.seed + seed)
        coarse = torch.randint(len(names) + 1, (count, 1, 8, 8), generator=generator)
        labels = coarse.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)[:, 0]
        images = torch.randn(count, 3, side, side, generator=generator) + labels[:, None] / len(names)
        return TensorDataset(images, labels), [("Cfa", "Aw")[i % 2] for i in range(count)], None

    data, zones, _ = generated(2, 2)
    test = Test(data, zones, list(names), landcover.LEFT_OUT.get(p.dataset, ()), batch=2)
    title = "generated land (dry run: the scores mean nothing)"
    return title, len(names), {"test": test}, lambda: generated(DRY_STEPS * batch, 1)


# --- results ----------------------------------------------------------------------------------------------------------

KEYS = ["method", "dataset", "test", "prompt", "text_encoder", "texts", "augmentation", "held_out"]
KEYS += ["epoch", "padding", "seed"]
VALUES = ["mIoU", "mF1", "OA"]


def scores(part: Test, matrix: Tensor) -> metrics.Scores:
    """The scores of a test by the author's definitions, from its confusion matrix."""
    return metrics.scores(matrix, part.left_out, undefined=True)


def row(p: SimpleNamespace, name: str, part: Test, matrix: Tensor) -> dict[str, Any]:
    """A row for `measured`: the settings of a test, and the scores in percent."""
    found = scores(part, matrix)
    own = {"mIoU": found.miou, "mF1": found.mf1, "OA": found.oa}
    own |= {f"IoU {c}": float(v) for c, v in zip(part.classes, found.iou, strict=True)}
    prompt = "none" if LEVELS[p.method] is None else p.prompt if p.method == "MetaSegNet" else LEVELS[p.method]
    encoder = "none" if LEVELS[p.method] in (None, "code") else p.text_encoder
    facts = {
        "method": p.method,
        "dataset": p.dataset,
        "test": name,
        "prompt": prompt,
        "text_encoder": encoder,
        "texts": Path(p.prompts or PROMPTS).name,
        "augmentation": p.augmentation,
        "held_out": p.held_out or "no zone",
        "epoch": chosen(p),
        "padding": p.padding,
        "seed": p.seed,
    }
    return facts | own


def measured(path: str | Path, *new: Mapping[str, object]) -> pd.DataFrame:
    """The scores on real data in the CSV `path`; `new` rows of `row` are added or replace equal ones.

    Rows of older code, without `epoch` and `padding`, are of the last epoch and of ignored padding."""
    rows = upsert_rows(path, KEYS, VALUES, new)
    for name, usual in (("epoch", "last"), ("padding", "ignored")):
        rows[name] = rows[name].fillna(usual) if name in rows else usual
    return rows


def record(path: Path, p: SimpleNamespace, setting: Setting, matrices: Mapping[str, Tensor]) -> None:
    """Add the scores of the tests, from one confusion matrix each, to those in the CSV `path`."""
    measured(path, *(row(p, name, setting.tests[name], counts) for name, counts in matrices.items()))


def _twin(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the unimodal network on Potsdam with the settings closest to the author's, all of one kind.

    Preferred are the best epoch on the test split over the last one, padding as impervious over ignored, and the
    augmentation with most views; the author's augmentation is not known."""
    ours = rows[(rows.method == "unimodal") & (rows.dataset == POTSDAM) & (rows.held_out == "no zone")]
    kinds = ["epoch", "padding", "augmentation"]
    if ours.empty:
        return ours
    first = max(
        ours[kinds].itertuples(index=False, name=None),
        key=lambda kind: (kind[0] == "best", kind[1] == "impervious", len(views(kind[2]))),
    )
    return ours[(ours[kinds] == list(first)).all(axis=1)]


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column) for the claims: "unimodal", "Potsdam mIoU", "Potsdam mF1", "Potsdam OA"."""
    ours = _twin(rows)
    return {("unimodal", f"Potsdam {name}"): float(ours[name].astype(float).mean()) for name in VALUES if len(ours)}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title: the author's image-only results, on Potsdam with ours of the unimodal network, and all our
    measurements.

    Ours are means over seeds, with the settings closest to the author's (see the columns). No table has the paper's own
    numbers, because the network here is a reconstruction. On LoveDA the author's results are on the server's test set,
    ours on the validation images."""
    anchors = published_table("metasegnet", "geoseg_reproduction")
    facts = next(t for t in paper("metasegnet")["tables"] if t["id"] == "geoseg_reproduction")
    anchors.insert(1, "set", [r["group"] for r in facts["rows"]])
    ours = _twin(rows)
    twin = (anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")
    for kind in ("augmentation", "epoch", "padding"):
        anchors[f"{kind} here"] = np.where(twin, ours[kind].iloc[0] if len(ours) else "–", "–")
    for column, name in (("F1", "mF1"), ("OA", "OA"), ("mIoU", "mIoU")):
        anchors[f"{column} here"] = np.where(twin, ours[name].astype(float).mean(), np.nan)
    return {facts["title"]: anchors, "Measured here with the reconstruction": rows}


def protocol() -> dict[str, str]:
    """The settings of the profile, one per row; the paper's own were not found, these are of its author's other
    code."""
    sets = {"Potsdam": recipe(POTSDAM), "LoveDA": recipe(LOVEDA), "OpenEarthMap": recipe(OEM)}

    def each(text: Callable[[Recipe], str]) -> str:
        groups: dict[str, list[str]] = {}
        for name, r in sets.items():
            groups.setdefault(text(r), []).append(name)
        return next(iter(groups)) if len(groups) == 1 else "; ".join(f"{', '.join(n)}: {t}" for t, n in groups.items())

    def schedule(r: Recipe) -> str:
        ends = f"cosine with restarts after {r.restart}, {3 * r.restart}, ... epochs" if r.restart else "cosine"
        return f"{ends} to {r.floor:g}"

    def random(r: Recipe) -> str:
        flips = [f"{name} {p:g}" for name, p in (("flips", r.flip), ("upside down", r.upside_down)) if p]
        light = [f"brightness and contrast {r.brightness:g} with probability 0.25"] * bool(r.brightness)
        return ", ".join([f"crops of {r.crop}", *flips, *light])

    tiles = [tile for tile in POTSDAM_TILES["train"] if tile != POTSDAM_FAULTY]
    best = [DATASETS[name].title for name, kind in SELECT.items() if kind == "best"]
    return {
        "source": "the paper's settings were not found; these are of its author's image-only code, OpenEarthMap's ours",
        "optimiser": "AdamW in Lookahead ({k} steps, {alpha:g}); biases do not decay, norms do".format(**LOOKAHEAD),
        "learning rate": each(lambda r: f"{r.lr:g}, encoder {r.encoder_lr:g}"),
        "weight decay": each(lambda r: f"{r.weight_decay:g}"),
        "schedule": f"{each(schedule)}; constant within an epoch, no warm-up; no gradient clipping",
        "epochs": each(lambda r: f"{r.epochs}"),
        "batch": f"{each(lambda r: str(r.batch))} a GPU; the last partial batch: {LAST}",
        "precision": paper("metasegnet")["precision"],
        "data": f"Potsdam: {len(tiles)} tiles without {POTSDAM_FAULTY} in windows of {landcover.TILE}, "
        f"{sets['Potsdam'].copies} copies (two mirrored), padding {landcover.PADDINGS[0]}; else the sets' lists",
        "augmentation": f"scales {', '.join(f'{s:g}' for s in SCALES)}; "
        f"mosaics {each(lambda r: f'{r.mosaic:g}')}, within a climate zone; {each(random)}",
        "text": f"RECONSTRUCTION: a frozen encoder; code and name of the zone hidden with probability {DROPPED:g}",
        "test": "whole windows; the mean of the logits over 1, 4, 16 or 8 views (`augmentation`); eroded labels on "
        "Potsdam; " + ", ".join(f"{DATASETS[name].title} on {split}" for name, split in TEST_SPLIT.items()),
        "selection": f"the last epoch; {', '.join(best)}: that of the highest validation mIoU, of equal ones the first",
        "metric": "one confusion matrix; means over classes, Potsdam's without clutter; F1 nan without a right pixel",
        "seeds": "the author's code: 42, one run; here the parameter `seed`",
        "sweep": "none found",
        "hardware": "not found",
    }
