"""H-ViT: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ...backbones import read_state
from ...data import slides as data
from ...errors import BadParameter, CompanionError, MissingData, MissingWeights
from ...evaluation.tables import upsert_rows
from ...ops.files import atomic
from ...slides import PANDA, Slide, Tiles, extract, fingerprint, tensor
from ...toy.ablations import hvit as study
from ...toy.datasets import slides as pocket
from ...toy.encoders import slide_dino
from ...training.fit import fit
from ...viz import heatmaps
from . import model as hvit

TASK, LIVE = "place", study.MAIN
KINDS = {"Local": "local", "Global": "global", "mean pooling": "mean", "gated attention": "attention"}
WORKERS = min(8, os.cpu_count() or 1)
# the authors' optimiser: Adam with the decay added to the gradient, halved every 20 epochs, 32 slides a step
RATE, DECAY, HALVED, EPOCHS, BATCH = 2e-4, 1e-5, 20, 200, 32
EARLIEST = 50  # epoch before which training is never stopped
DRY_REGIONS = 3  # of each generated slide
OWN = {"folds": 5, "test": 0.2}  # how slides of one's own are parted


@dataclass(frozen=True)
class Setting:
    """What is trained on what, fold by fold, and tested on what.

    Attributes:
        title: of the data.
        folds: of each fold the training data, items (features, ..., grade), and the data it is tuned on, or None.
        test: of all folds.
        methods: what is run.
        rates: their learning rates.
        build: a method's model, before training; the second argument is the fold.
        learn: (model, method, training data, tuning data, arguments of `fit`) to the history, in place.
        grades: (model, method, data) to the predicted grades (n,).
        options: arguments of `learn`.
        kept: folder where a training of hours leaves its weights, to be read when it is asked for again; None where it
            takes seconds.
        facts: what a kept training depends on, besides its slides and the model that it starts from.
    """

    title: str
    folds: list[tuple[Dataset, Dataset | None]]
    test: Dataset
    methods: tuple[str, ...]
    rates: dict[str, float]
    build: Callable[[str, int], nn.Module]
    learn: Callable[..., list[dict]]
    grades: Callable[[nn.Module, str, Dataset], Tensor]
    options: dict = field(default_factory=dict)
    kept: Path | None = None
    facts: dict = field(default_factory=dict)


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket slides are written below it.
        rates: learning rates by (task, method), as the study chose them on tuning slides.

    Raises:
        BadParameter, MissingData: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    if p.position.startswith("2d"):
        raise BadParameter("position", p.position, ["none", "sine", "learned"])
    if p.devices != 1:
        raise BadParameter("devices", p.devices, "1: training on stored features, tuned after each epoch, takes one")
    return _dry(p) if p.dry_run else _paper(p, out)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    root = str(out / "data")
    found = {part: study.embeddings(root, p.seed, TASK, part) for part in ("trainval", "test")}
    chosen = {method: rates[TASK, method] for method in LIVE}

    def learn(model: nn.Module, method: str, train: TensorDataset, tune: None, **options) -> list[dict]:
        return study.train_model(model, method, train, chosen[method], p.seed, **options)

    return Setting(
        title=f"pocket slides, {TASK}",
        folds=[(found["trainval"], None)],
        test=found["test"],
        methods=LIVE,
        rates=chosen,
        build=lambda method, fold: study.build(method, p.seed + 1000 * fold),
        learn=learn,
        grades=lambda model, method, part: study.grades(model, method, part.tensors[0]),
    )


# --- the published recipe ---------------------------------------------------------------------------------------------


def build(p: SimpleNamespace, method: str, fold: int = 0, classes: int = pocket.GRADES) -> nn.Module:
    """A method at full size on stored patch embeddings, of random weights drawn from the seed and the fold.

    The region level is HIPT's where `region_weights` has a file of it.
    """
    torch.manual_seed(p.seed + 1000 * fold)
    if method not in KINDS:
        raise BadParameter("method", method, list(KINDS))
    if method in ("mean pooling", "gated attention"):
        pooling = "mean" if method == "mean pooling" else "attention"
        return hvit.PatchBag(384, classes, p.head, pooling)
    model = hvit.build(
        "paper",
        KINDS[method],
        p.head,
        patches=p.region // 256,
        classes=classes,
        levels=("region", "slide"),
        position=p.position,
    )
    if file := region_weights(p):
        trained = hvit.RegionEncoder.from_official(hvit.read_checkpoint(file))
        state, side = trained.state_dict(), int(p.region // 256 * hvit.LARGEST_CROP)
        state["pos_embed"] = hvit.resize_positions(state["pos_embed"], (side, side))
        model.region.load_state_dict(state)
    return model


def region_weights(p: SimpleNamespace) -> str | Path:
    """The file of the region level: the parameter `weights`, for Global else HIPT's in `<data_root>/weights`.

    Empty for random weights: Local's own default, and Global's only when `weights` is "random".
    """
    if p.weights or p.method != "Global":
        return "" if p.weights == "random" else p.weights
    usual = Path(p.data_root) / "weights" / "vit4k_xs_dino.pth"
    return usual if usual.is_file() else ""


class Drawn(Dataset):
    """As many slides as `data` has, each drawn anew with replacement; every grade is drawn equally often.

    The draw of an item depends on torch's seed, which `fit` sets by seed, epoch and item.
    """

    def __init__(self, data: Dataset):
        grades = grades_of(data)
        self.data, self.weights = data, 1 / torch.bincount(grades).double()[grades]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple:
        return self.data[int(torch.multinomial(self.weights, 1))]


class Noised(Dataset):
    """`data` with `noise` times a standard normal number added to every feature of the regions there are, anew each
    time: the released code's option against features that are learned by heart, off by default."""

    def __init__(self, data: Dataset, noise: float):
        self.data, self.noise = data, noise

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple:
        features, present, grade = self.data[index]
        there = present.view(-1, *(1,) * (features.ndim - 1))
        return features + self.noise * there * torch.randn_like(features), present, grade


class _Enough(Exception):
    """The tuning loss has not fallen for long enough: no error, but how training is ended from inside its loss."""


class Tuned:
    """A loss that looks at the tuning slides after each epoch, and gives the model its best state back at the end.

    The loss adds the decay to the gradient, as Adam's own does and AdamW's does not.

    Args:
        score: from the model to the kappa and the loss of the tuning slides; None where there are none.
        patience: epochs without a lower tuning loss after which it raises `_Enough`, from epoch `EARLIEST` on; 0 for
            never.
    """

    def __init__(
        self,
        head: str,
        classes: int,
        per_epoch: int,
        score: Callable[[nn.Module], tuple[float, float]] | None,
        patience: int = 0,
    ):
        self.head, self.classes, self.per_epoch, self.score, self.patience = head, classes, per_epoch, score, patience
        self.best, self.state, self.scores, self.losses = -np.inf, None, [], []
        self.rows: list[dict] = []

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loss of a batch (features, present, grades)."""
        step = len(self.rows)
        if step and step % self.per_epoch == 0:
            self.look(model)
            epoch = step // self.per_epoch
            waited = epoch - 1 - int(np.argmin(self.losses)) if self.losses else 0
            if self.patience and epoch >= EARLIEST and waited >= self.patience:
                raise _Enough
        features, present, grades = batch
        value = hvit.loss(self.head, model(features, present=present), grades, self.classes)
        squares = sum(t.square().sum() for t in model.parameters() if t.requires_grad)
        value = value + 0.5 * DECAY * squares
        self.rows.append({"step": step, "lr": float(_rates(step, self.per_epoch)), "loss": value.detach()})
        return value

    def look(self, model: nn.Module) -> None:
        """Score the model; keep its trained tensors when it is as good as the best so far, as the authors do."""
        if self.score is None:
            return
        model.eval()
        with torch.no_grad():
            kappa, loss = self.score(model)
        model.train()
        self.scores.append(kappa)
        self.losses.append(loss)
        if kappa >= self.best:
            self.best = kappa
            self.state = {n: t.detach().cpu().clone() for n, t in model.named_parameters() if t.requires_grad}

    def finish(self, model: nn.Module) -> None:
        """Put the best state back."""
        if self.state is not None:
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in self.state.items():
                    own[name.removeprefix("_forward_module.")].copy_(value)
        model.eval()


def _rates(steps: int | np.ndarray, per_epoch: int) -> np.ndarray:
    """The learning rate at steps."""
    return RATE * 0.5 ** (np.asarray(steps) // per_epoch // HALVED)


def learn(
    p: SimpleNamespace,
    model: nn.Module,
    method: str,
    train: Dataset,
    tune: Dataset | None,
    classes: int = pocket.GRADES,
    **changes,
) -> list[dict]:
    """Train by the authors' recipe, in place; `changes` are arguments of `fit`, `epochs` and `batch` among them.

    `p.sampling` "weighted" draws grades equally often, with replacement; `p.noise` is added to the features (see
    `Noised`); `p.patience` ends a training whose tuning loss no longer falls (see `Tuned`).
    """
    settings = {
        "epochs": EPOCHS,
        "batch": min(BATCH, len(train)),
        "seed": p.seed,
        "accelerator": p.accelerator,
        "precision": p.precision,
        "workers": 0,
        "name": method,
        "weight_decay": 0.0,
    } | changes
    per_epoch = len(train) // settings["batch"]
    rates = _rates(np.arange(max(1, round(settings["epochs"] * per_epoch))), per_epoch)
    score = None if tune is None else (lambda one: _tuning(p, one, tune, classes))
    loss = Tuned(p.head, classes, per_epoch, score, p.patience)
    sides = {"all": ([t for t in model.parameters() if t.requires_grad], rates)}
    shown = Drawn(train) if p.sampling == "weighted" else train
    try:
        history = fit(model, loss, Noised(shown, p.noise) if p.noise else shown, sides=sides, **settings)
        loss.look(model)  # at the last epoch
    except _Enough:
        history = [row | {"loss": float(row["loss"])} for row in loss.rows]
        model.to("cpu")
    loss.finish(model)
    return history


@torch.no_grad()
def _outputs(model: nn.Module, part: Dataset) -> tuple[Tensor, Tensor]:
    """True grades (n,) and outputs (n, ...) of slides (features, present, grade)."""
    device = next(model.parameters()).device
    truth, found = [], []
    for features, present, grade in DataLoader(part, 8):
        found.append(model(features.to(device), present=present.to(device)).float().cpu())
        truth.append(torch.as_tensor(grade))
    return torch.cat(truth), torch.cat(found)


def _tuning(p: SimpleNamespace, model: nn.Module, part: Dataset, classes: int) -> tuple[float, float]:
    """Kappa in percent, and the loss."""
    truth, outputs = _outputs(model, part)
    return study.kappa(truth, hvit.predict(p.head, outputs, classes)), float(hvit.loss(p.head, outputs, truth, classes))


def _full_size(
    p: SimpleNamespace, title: str, folds: list, test: Dataset, classes: int = pocket.GRADES, **others
) -> Setting:
    return Setting(
        title=title,
        folds=folds,
        test=test,
        methods=(p.method,),
        rates={p.method: RATE},
        build=functools.partial(build, p, classes=classes),
        learn=functools.partial(learn, p, classes=classes),
        grades=lambda model, method, part: hvit.predict(p.head, _outputs(model.eval(), part)[1], classes),
        **others,
    )


def _dry(p: SimpleNamespace) -> Setting:
    """The full-size model with random weights, two optimiser steps on generated embeddings of the real shape."""
    generator = torch.Generator().manual_seed(p.seed)
    patches = (p.region // 256) ** 2

    def generated(count: int) -> TensorDataset:
        features = torch.randn(count, DRY_REGIONS, patches, 384, generator=generator)
        present = torch.ones(count, DRY_REGIONS, dtype=torch.bool)
        present[::2, -1] = False  # ragged, as real slides are
        return TensorDataset(features, present, torch.arange(count) % pocket.GRADES)

    title = "generated slides (dry run: kappas mean nothing)"
    return _full_size(p, title, [(generated(2 * BATCH), generated(12))], generated(12), options={"epochs": 1})


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published recipe on stored features of real slides; test slides are those of the first fold's list.

    Slides of one's own are parted here: a fifth is tested on, each fold tunes on another fifth of the rest.
    """
    stored = stored_in(p)
    if p.dataset == "folder":
        items = data.folder(p.data_root)
        lists = [[fold[s] for s in data.SPLITS] for fold in data.split_folds(items, **OWN)[: p.folds]]
        classes = max(2, 1 + max(item.grade for item in items))
    else:
        lists = [[data.load(p.dataset, p.data_root, s, fold) for s in data.SPLITS] for fold in range(p.folds)]
        classes = pocket.GRADES
    _check_lists(lists)
    folds, test = [], None
    for fold in lists:
        longest = data.Features([item for part in fold for item in part], stored, drop=True).longest
        parts = [data.Features(items, stored, longest, drop=True) for items in fold]
        for part, split, items in zip(parts, data.SPLITS, fold, strict=True):
            _check_features(p, part, f"none of the {len(items)} slides of the list {split}")
        folds.append((parts[0], parts[1]))
        test = test or parts[2]
    facts = {k: getattr(p, k) for k in ("head", "sampling", "noise", "patience", "seed", "precision")}
    return _full_size(
        p,
        f"{p.dataset}, {p.folds} folds",
        folds,
        test,
        classes,
        kept=out / "trained",
        facts=facts,
        options={"workers": WORKERS},
    )


def _check_lists(lists: list[list[list[data.Item]]]) -> None:
    """Raises `BadParameter` when a fold trains on slides that it tunes on, or that any fold tests on."""
    train, tune, test = ([{item.name for item in fold[k]} for fold in lists] for k in range(3))
    for k in range(len(lists)):
        for seen, held, what in ((train[k], tune[k], "tunes"), (train[k] | tune[k], set().union(*test), "tests")):
            if both := sorted(seen & held):
                said = f"fold {k} trains or tunes on {both[0]} and {len(both) - 1} more"
                raise BadParameter("folds", said, f"lists apart: none of the slides that a fold {what} on")


def _check_features(p: SimpleNamespace, part: data.Features, nobody: str) -> None:
    """Raises `MissingData` when there are none, `BadParameter` when they are of another level or size of region, and
    `MissingWeights` when Global has no region level to read them with."""
    if not len(part):
        store = f"`companion slides {p.dataset} --data-root {p.data_root} --weights FILE` stores them"
        raise MissingData(
            "features of slides",
            part.path,
            "<slide_id>.h5    or <slide_id>.pt",
            store,
            "that of the slides",
            nobody + " has any",
        )
    patches = (p.region // 256) ** 2
    if p.method == "Global" and len(part.shape) == 2 and not (p.weights or region_weights(p)):
        ways = [
            f"put vit4k_xs_dino.pth of github.com/mahmoodlab/HIPT (HIPT_4K/Checkpoints) into {p.data_root}/weights",
            "give the file of a region level of your own as `weights`, such as one that DINO trained",
            'weights = "random" freezes a random one; method = "Local" trains it',
        ]
        raise MissingWeights("H-ViT's region level", f"{p.data_root}/weights", ways)
    if len(part.shape) == 1 and p.method != "Global":
        accepted = f"patch embeddings (M, {patches}, 384): those of whole regions serve Global alone"
        raise BadParameter("features", str(part.path), accepted)
    if len(part.shape) == 2 and part.shape[0] != patches:
        accepted = f"the region that the features in {part.path} are of, which have {part.shape[0]} patches each"
        raise BadParameter("region", p.region, accepted)


# --- features, slide by slide -----------------------------------------------------------------------------------------


def stored_in(p: SimpleNamespace) -> Path:
    """The folder of the stored patch embeddings."""
    return Path(p.features or Path(p.data_root) / "features")


def patch_level(weights: str) -> hvit.PatchEncoder:
    """The frozen patch level: a file of HIPT's or the authors', or "pocket" for the small one that is shipped."""
    if weights == "pocket":
        return slide_dino.build()[0]
    return hvit.PatchEncoder.from_official(hvit.read_checkpoint(weights))


def store(
    p: SimpleNamespace, patch: hvit.PatchEncoder, part: tuple[int, int] = (0, 1), batch: int = 1
) -> Iterator[tuple[str, Path | CompanionError]]:
    """Patch embeddings of the slides of `dataset`, as the paper profile reads them; a killed run goes on.

    Args:
        p: `dataset`, `data_root`, `features`, `region`, `normalise` and `accelerator` of the notebook's parameters.
        patch: see `patch_level`.
        part: (i, n): every n-th slide from the i-th on, so that n jobs do them all.
        batch: regions a step.

    Yields:
        The name of each slide as it is done, and its file, or why there is none: one bad slide among thousands does
        not keep the others back.
    """
    i, n = part
    if not 0 <= i < n:
        raise BadParameter("part", f"{i}/{n}", "i/n, i from 0 to n - 1")
    if p.region % patch.image:
        raise BadParameter("region", p.region, f"a multiple of the {patch.image} pixels of a patch")
    small = p.dataset.startswith("pocket/")  # slides of a few hundred pixels have smaller pieces of tissue
    tiling = replace(pocket.TILING if small else PANDA, region=p.region)
    items = data.folder(p.data_root) if p.dataset == "folder" else data.load(p.dataset, p.data_root)
    # `embed_patches` belongs to the whole model; the levels above are not run
    whole = hvit.HViT(hvit.SlideTransformer(192), hvit.RegionEncoder(p.region // patch.image, patch.dim), patch)
    device = "cuda" if p.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    whole.to(device)
    made_by = fingerprint(patch)
    for item in items[i::n]:
        try:
            yield (
                item.name,
                extract(
                    item.path,
                    whole.embed_patches,
                    stored_in(p) / f"{item.name}.h5",
                    tiling=tiling,
                    encoder=made_by,
                    normalise=p.normalise,
                    batch=batch,
                    device=device,
                ),
            )
        except CompanionError as error:
            yield item.name, error


# --- where it looks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """Ranked attention on a slide of M regions, the mean over heads (see `heatmaps`).

    Attributes:
        patch, region: (M, s, s), s tokens along a region's side.
        slide: (M,).
        alpha: (M,), the pooling weights as they are.
        output: (1, ...), what the model says.
    """

    patch: np.ndarray
    region: np.ndarray
    slide: np.ndarray
    alpha: np.ndarray
    output: Tensor

    def factorised(self, gamma: float, variant: str) -> np.ndarray:
        """All levels in one map (M, s, s)."""
        return heatmaps.factorised(self.patch, self.region, self.slide[:, None, None], gamma, variant)


@torch.inference_mode()
def look(model: hvit.HViT, patch: hvit.PatchEncoder, slide: Slide, tiles: Tiles, normalise: str) -> Look:
    """Where the levels of `model`, and the patch level below it, look on a slide; one region is in memory at a time."""
    # the same modules with the patch level below: nothing is copied, and what is trained stays so
    whole = hvit.HViT(model.slide, model.region, patch, model.variant)
    low, high, embedded = [], [], []
    for x, y in tiles.coords:
        trace: dict[str, Tensor] = {}
        found = whole.embed_patches(tensor(slide.region(x, y, tiles)[None], normalise), trace=trace)
        embedded.append(whole.embed_regions(found, trace=trace))
        low.append(heatmaps.patch_map(trace["patch_attention"][0].numpy()))
        high.append(heatmaps.region_map(trace["region_attention"][0].numpy(), low[-1].shape[-1]).mean(0))
        low[-1] = low[-1].mean(0)
    trace = {}
    output = whole.slide(torch.cat(embedded)[None], trace=trace)
    alpha = trace["pooling"][0].numpy()
    return Look(np.stack(low), np.stack(high), heatmaps.ranks(alpha, axes=1), alpha, output)


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, method: str, **options) -> tuple[list[nn.Module], list[dict]]:
    """Build and train a method on every fold of a setting; the models, and the history of the first.

    Where the setting keeps what it trains, a fold that is done is only read; the file holds the network under the
    authors' names, for `hvit.HViT.from_official` (a bag's under ours).
    """
    models, histories = [], []
    for fold, (part, tune) in enumerate(found.folds):
        model, changes = found.build(method, fold), found.options | options
        file = None if found.kept is None else _kept_in(found, model, method, fold, changes)
        if file is not None and file.is_file():
            histories.append(_read_kept(model, file))
        else:
            histories.append(found.learn(model, method, part, tune, **changes))
            if file is not None:
                with atomic(file) as temporary:
                    state = {name: model.state_dict()[ours].contiguous() for ours, name in _names(model).items()}
                    save_file(state, temporary, {"history": json.dumps(histories[-1])})
        models.append(model)
    return models, histories[0]


def _kept_in(found: Setting, model: nn.Module, method: str, fold: int, changes: Mapping[str, object]) -> Path:
    """The file of a fold's trained weights; its name tells apart all that the training depends on."""
    lists = [[(item.name, item.grade) for item in part.items] for part in found.folds[fold] if part is not None]
    told = [found.facts, {k: v for k, v in changes.items() if k != "workers"}, fingerprint(model), lists]
    digest = hashlib.sha256(json.dumps([*told, found.folds[fold][0].made_by]).encode()).hexdigest()[:8]
    return found.kept / f"{method}, fold {fold}, seed {found.facts['seed']}, {digest}.safetensors"


def _names(model: nn.Module) -> dict[str, str]:
    """Our names of the tensors -> those in a file."""
    return model.official_names() if isinstance(model, hvit.HViT) else {name: name for name in model.state_dict()}


def _read_kept(model: nn.Module, file: Path) -> list[dict]:
    """Put the kept weights into `model`; the history of their training."""
    state = read_state(file)
    hvit.load(model, state, _names(model), "H-ViT")
    model.eval()
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["history"])


def scores(found: Setting, method: str, models: list[nn.Module]) -> dict[str, float]:
    """Quadratic kappa in percent of the vote of all folds, "kappa", and the mean of single ones, "fold"."""
    said = [found.grades(model, method, found.test) for model in models]
    truth = grades_of(found.test)
    voted = torch.tensor([hvit.vote(one, seed=i) for i, one in enumerate(torch.stack(said, 1).tolist())])
    return {"kappa": study.kappa(truth, voted), "fold": float(np.mean([study.kappa(truth, one) for one in said]))}


def grades_of(part: Dataset) -> Tensor:
    """The true grades (n,)."""
    if isinstance(part, TensorDataset):
        return part.tensors[-1]
    return torch.tensor([item.grade for item in part.items])


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (method, dataset, region, head, seed); `new` joins or replaces its row."""
    keys = ["method", "dataset", "region", "head", "seed"]
    return upsert_rows(path, keys, ["kappa", "fold"], [new] if new else ())
