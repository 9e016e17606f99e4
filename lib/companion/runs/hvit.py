"""H-ViT: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .. import report
from ..data import DATASETS
from ..data import slides as data
from ..errors import BadParameter
from ..fit import fit
from ..models import hvit
from ..pocket import slides as pocket
from ..slides import PANDA, extract, fingerprint
from ..studies import hvit as study

TASK, LIVE = "place", study.MAIN
KINDS = {"Local": "local", "Global": "global", "mean pooling": "mean", "gated attention": "attention"}
WORKERS = min(8, os.cpu_count() or 1)
# the authors' optimiser: Adam with the decay added to the gradient, halved every 20 epochs, 32 slides a step
RATE, DECAY, HALVED, EPOCHS, BATCH = 2e-4, 1e-5, 20, 200, 32
DRY_REGIONS = 3  # of each generated slide


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
    check_dataset(p)
    if p.position.startswith("2d"):
        raise BadParameter("position", p.position, ["none", "sine", "learned"])
    return _dry(p) if p.dry_run else _paper(p)


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


def build(p: SimpleNamespace, method: str, fold: int = 0) -> nn.Module:
    """A method at full size on stored patch embeddings, of random weights drawn from the seed and the fold.

    Global's region level is random unless `weights` names a file of HIPT's.
    """
    torch.manual_seed(p.seed + 1000 * fold)
    if method not in KINDS:
        raise BadParameter("method", method, list(KINDS))
    if method in ("mean pooling", "gated attention"):
        pooling = "mean" if method == "mean pooling" else "attention"
        return hvit.PatchBag(384, pocket.GRADES, p.head, pooling)
    model = hvit.build("paper", KINDS[method], p.head, patches=p.region // 256, levels=("region", "slide"),
                       position=p.position)  # fmt: skip
    if p.weights:
        trained = hvit.RegionEncoder.from_official(hvit.read_checkpoint(p.weights))
        state, side = trained.state_dict(), int(p.region // 256 * hvit.LARGEST_CROP)
        state["pos_embed"] = hvit.resize_positions(state["pos_embed"], (side, side))
        model.region.load_state_dict(state)
    return model


class Tuned:
    """A loss that looks at the tuning slides after each epoch, and gives the model its best state back at the end.

    The loss adds the decay to the gradient, as Adam's own does and AdamW's does not.
    """

    def __init__(self, head: str, per_epoch: int, score: Callable[[nn.Module], float] | None):
        self.head, self.per_epoch, self.score = head, per_epoch, score
        self.step, self.best, self.state, self.scores = 0, -np.inf, None, []

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loss of a batch (features, present, grades)."""
        if self.step and self.step % self.per_epoch == 0:
            self.look(model)
        self.step += 1
        features, present, grades = batch
        value = hvit.loss(self.head, model(features, present=present), grades, pocket.GRADES)
        squares = sum(t.square().sum() for t in model.parameters() if t.requires_grad)
        return value + 0.5 * DECAY * squares

    def look(self, model: nn.Module) -> None:
        """Score the model; keep its trained tensors when it is as good as the best so far, as the authors do."""
        if self.score is None:
            return
        model.eval()
        with torch.no_grad():
            self.scores.append(self.score(model))
        model.train()
        if self.scores[-1] >= self.best:
            self.best = self.scores[-1]
            self.state = {n: t.detach().cpu().clone() for n, t in model.named_parameters() if t.requires_grad}

    def finish(self, model: nn.Module) -> None:
        """Look once more, at the last epoch; put the best state back."""
        self.look(model)
        if self.state is not None:
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in self.state.items():
                    own[name.removeprefix("_forward_module.")].copy_(value)
        model.eval()


def learn(
    p: SimpleNamespace, model: nn.Module, method: str, train: Dataset, tune: Dataset | None, **changes
) -> list[dict]:
    """Train by the authors' recipe, in place; `changes` are arguments of `fit`, `epochs` and `batch` among them."""
    settings = {"epochs": EPOCHS, "batch": min(BATCH, len(train)), "seed": p.seed, "accelerator": p.accelerator,
                "precision": p.precision, "workers": 0, "name": method, "weight_decay": 0.0} | changes  # fmt: skip
    per_epoch = len(train) // settings["batch"]
    steps = max(1, round(settings["epochs"] * per_epoch))
    rates = RATE * 0.5 ** (np.arange(steps) // per_epoch // HALVED)
    score = None if tune is None else (lambda one: study.kappa(*_said(p, one, tune)))
    loss = Tuned(p.head, per_epoch, score)
    sides = {"all": ([t for t in model.parameters() if t.requires_grad], rates)}
    history = fit(model, loss, train, sides=sides, **settings)
    loss.finish(model)
    return history


@torch.no_grad()
def _said(p: SimpleNamespace, model: nn.Module, part: Dataset) -> tuple[Tensor, Tensor]:
    """True and predicted grades (n,) of slides (features, present, grade)."""
    device = next(model.parameters()).device
    truth, said = [], []
    for features, present, grade in DataLoader(part, 8):
        outputs = model(features.to(device), present=present.to(device)).float().cpu()
        said.append(hvit.predict(p.head, outputs, pocket.GRADES))
        truth.append(torch.as_tensor(grade))
    return torch.cat(truth), torch.cat(said)


def _full_size(p: SimpleNamespace, title: str, folds: list, test: Dataset, **options) -> Setting:
    return Setting(
        title=title,
        folds=folds,
        test=test,
        methods=(p.method,),
        rates={p.method: RATE},
        build=functools.partial(build, p),
        learn=functools.partial(learn, p),
        grades=lambda model, method, part: _said(p, model.eval(), part)[1],
        options=options,
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
    return _full_size(p, title, [(generated(2 * BATCH), generated(12))], generated(12), epochs=1)


def _paper(p: SimpleNamespace) -> Setting:
    """The published recipe on stored features of real slides; test slides are those of the fold's list."""
    stored = Path(p.features or Path(p.data_root) / "features")
    folds, test = [], None
    for fold in range(p.folds):
        train, tune, held = (data.load(p.dataset, p.data_root, split, fold) for split in data.SPLITS)
        longest = data.Features([*train, *tune, *held], stored, drop=True).longest
        parts = [data.Features(items, stored, longest, drop=True) for items in (train, tune, held)]
        folds.append((parts[0], parts[1]))
        test = test or parts[2]
    return _full_size(p, f"{p.dataset}, {p.folds} folds", folds, test, workers=WORKERS)


def store(p: SimpleNamespace, patch: hvit.PatchEncoder, batch: int = 1) -> list[Path]:
    """Patch embeddings of every slide of `dataset`, as the paper profile reads them; a killed run goes on.

    Weights of `patch` are the caller's: HIPT's, by `hvit.PatchEncoder.from_official`.
    """
    stored, tiling = Path(p.features or Path(p.data_root) / "features"), replace(PANDA, region=p.region)
    top = hvit.HViT(hvit.SlideTransformer(192), hvit.RegionEncoder(p.region // 256), patch)
    device = "cuda" if p.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    top.to(device)
    return [
        extract(item.path, top.embed_patches, stored / f"{item.name}.h5", tiling=tiling, encoder=fingerprint(patch),
                normalise=p.normalise, batch=batch, device=device)
        for item in data.load(p.dataset, p.data_root)
    ]  # fmt: skip


def check_dataset(p: SimpleNamespace) -> None:
    """Raises `BadParameter` when `dataset` is no set of slides that the paper profile trains on."""
    known = [n for n, found in DATASETS.items() if found.task == "slides" and not n.startswith("pocket/")]
    if p.dataset not in known:
        raise BadParameter("dataset", p.dataset, known)


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, method: str, **options) -> tuple[list[nn.Module], list[dict]]:
    """Build and train a method on every fold of a setting; the models, and the history of the first."""
    models, histories = [], []
    for fold, (part, tune) in enumerate(found.folds):
        model = found.build(method, fold)
        histories.append(found.learn(model, method, part, tune, **(found.options | options)))
        models.append(model)
    return models, histories[0]


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
    return report.gather(path, keys, ["kappa", "fold"], [new] if new else ())
