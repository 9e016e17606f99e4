"""MetaSegNet: what the notebook trains live, at pocket scale or on real land cover."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ...climate import Prompts
from ...models.metasegnet import recipe as full
from ...models.metasegnet.model import MetaSegNet
from ...models.metasegnet.recipe import Test
from ..ablations import metasegnet as study
from ..datasets import landcover as pocket

LIVE = ("unimodal", "MetaSegNet")


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and tested on what.

    Attributes:
        methods: what is trained; rates: their learning rates.
        classes, palette: of the network, in the order of its outputs; `ignore`: the label that is not learned.
        left_out: classes that the means of the scores leave out.
        prompts: the texts of the zones.
        build: the network of a method, before training.
        learn: trains one in place: (network, method, arguments of `fit`) to the history; empty where none is trained.
        tests: what is tested on, by name.
        texts: (method, zones, level, texts of one's own) to a text for each zone, see `metasegnet_full.texts`.
        confusion: (network, test, texts) to the confusion matrix (C, C).
    """

    title: str
    methods: tuple[str, ...]
    rates: dict[str, float]
    classes: tuple[str, ...]
    palette: tuple
    ignore: int
    left_out: tuple[int, ...]
    prompts: Prompts
    build: Callable[[str], MetaSegNet]
    learn: Callable[..., list[dict]]
    tests: dict[str, Test]
    texts: Callable[..., list[str] | None]
    confusion: Callable[[MetaSegNet, Test, Sequence[str] | None], Tensor]


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket images are written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights, CorruptFile: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    return Setting(**full.parts(p, out))


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The land of the run's seed, its left-out zone, and the study's trainings."""
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), p.seed)
    train, test = (study.part(root, p.seed, split) for split in ("train", "test"))
    train, chosen = train.of(study.seen(p.seed)), {method: rates["seen", method] for method in LIVE}

    def learn(model: MetaSegNet, method: str, **options) -> list[dict]:
        return study.train_model(method, model, train, chosen[method], p.seed, **options)

    def confusion(model: MetaSegNet, part: Test, given: Sequence[str] | None) -> Tensor:
        images, labels = part.data.tensors
        return full.metrics.confusion(labels, study.predict(model, images, given), len(pocket.CLASSES))

    def texts(method: str, zones: Sequence[str], kind: str = "", own: object = None) -> list[str] | None:
        if full.LEVELS[method] is None:
            return None
        return study.texts(tuple(zones), kind or study.level(method), p.seed)

    zones = {"seen": study.seen(p.seed), "left out": (study.left_out(p.seed),)}
    return Setting(
        title=f"pocket land cover, zone {study.left_out(p.seed)} left out",
        methods=LIVE,
        rates=chosen,
        classes=pocket.CLASSES,
        palette=pocket.PAINT,
        ignore=pocket.IGNORE,
        left_out=(),
        prompts=study.prompts(),
        build=functools.partial(study.build, seed=p.seed),
        learn=learn,
        tests={name: _test(test.of(kept)) for name, kept in zones.items()},
        texts=texts,
        confusion=confusion,
    )


def _test(part: pocket.Part) -> Test:
    return Test(TensorDataset(part.images, part.labels), list(part.zones), list(pocket.CLASSES))


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, method: str, **options) -> tuple[MetaSegNet, list[dict]]:
    """Build the network of a method and train it; the history is empty where nothing is trained."""
    model = found.build(method)
    history = found.learn(model, method, **options)
    return model.eval(), history


def matrix(found: Setting, model: MetaSegNet, method: str, test: str, kind: str = "") -> Tensor:
    """The confusion matrix (C, C) of a network on a test, with the texts of its method or of the level `kind`."""
    part = found.tests[test]
    return found.confusion(model, part, found.texts(method, part.zones, kind, part.texts))


def sample(found: Setting, test: str, items: Sequence[int]) -> tuple[Tensor, Tensor, list[str | None]]:
    """Some images of a test (n, 3, h, w), their labels (n, h, w) and zones, cut to the smallest of them."""
    part = found.tests[test]
    pairs = [part.data[i] for i in items]
    height, width = (min(labels.shape[axis] for _, labels in pairs) for axis in (0, 1))
    images, labels = (torch.stack([pair[k][..., :height, :width] for pair in pairs]) for k in (0, 1))
    return images, labels, [part.zones[i] for i in items]


# --- results that gather ----------------------------------------------------------------------------------------------


def keep(path: Path, p: SimpleNamespace, found: Setting, matrices: Mapping[str, Tensor]) -> None:
    """Let the results of the real data, one confusion matrix for each test, join those in `path`."""
    full.measured(path, *(full.row(p, name, found.tests[name], counts) for name, counts in matrices.items()))


def tables(path: Path) -> dict[str, pd.DataFrame]:
    """What was measured on real data, by title, see `metasegnet_full.tables`."""
    return full.tables(full.measured(path))
