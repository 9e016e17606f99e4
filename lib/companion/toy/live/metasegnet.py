"""MetaSegNet: what the notebook trains live on the synthetic land cover, its figures, tables of the ablations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ...data import climate
from ...data import landcover as data
from ...evaluation import ablations
from ...evaluation.metrics import landcover as metrics
from ...models.metasegnet import figures, recipe
from ...models.metasegnet.climate import headless
from ...models.metasegnet.model import MetaSegNet
from ...models.metasegnet.recipe import Part, confusion
from ...models.metasegnet.text import split
from ...training.fit import History
from ...viz import plots
from ..ablations import metasegnet as study
from ..ablations import study_root
from ..datasets import landcover

LIVE = ("unimodal", "MetaSegNet")
PRETRAINED = "MiniLM text"
CLASSES = dict(zip(landcover.CLASSES, landcover.PAINT, strict=True))
BY_ZONE = ("bareland", "rangeland", "developed", "agriculture", "building")  # classes whose colour depends on the zone


@dataclass(frozen=True)
class Setting:
    """A training and its tests, at toy scale.

    Attributes:
        title: of the data.
        learning_rates: of each trained method.
        tests: by name.
        texts: (method, zones, kind) to a text for each zone.
        build: the network of a method, before training.
        learn: trains a network in place: (network, method) to the history.
    """

    title: str
    learning_rates: dict[str, float]
    tests: dict[str, Part]
    texts: Callable[..., list[str] | None]
    build: Callable[[str], MetaSegNet]
    learn: Callable[[MetaSegNet, str], History]


def train(setting: Setting, method: str) -> tuple[MetaSegNet, History]:
    """The network of a method, trained, and the history."""
    model = setting.build(method)
    history = setting.learn(model, method)
    return model.eval(), history


def matrix(setting: Setting, model: MetaSegNet, method: str, test: str, kind: str = "") -> Tensor:
    """The confusion matrix (C, C) of a network on a test, with the texts of its method or those of `kind`."""
    part = setting.tests[test]
    return confusion(model, part, setting.texts(method, part.zones, kind), batch=study.TEST_BATCH)


def toy(seed: int, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The toy setting of a seed: the methods `LIVE`, and `PRETRAINED` for those who ask for it."""
    root = str(out / "data")
    landcover.write(study_root(root, seed), seed)
    train, test = (study.part(root, seed, split) for split in ("train", "test"))
    train = train.of(study.seen(seed))
    chosen = {method: learning_rates["seen", method] for method in (*LIVE, PRETRAINED)}

    def learn(model: MetaSegNet, method: str) -> History:
        return study.train_model(method, model, train, chosen[method], seed)

    def texts(method: str, zones: Sequence[str], kind: str = "") -> list[str] | None:
        if method == "unimodal":
            return None
        return study.texts(tuple(zones), kind or study.level(method), seed)

    def tested(zones: Sequence[str]) -> Part:
        part = test.of(zones)
        return Part(TensorDataset(part.images, part.labels), list(part.zones), list(landcover.CLASSES))

    return Setting(
        title=f"toy land cover, zone {study.left_out(seed)} left out",
        learning_rates={method: chosen[method] for method in LIVE},
        tests={"seen": tested(study.seen(seed)), "left out": tested((study.left_out(seed),))},
        texts=texts,
        build=functools.partial(study.build, seed=seed),
        learn=learn,
    )


def full_size(p: SimpleNamespace, out: Path) -> pd.DataFrame:
    """What `recipe.run` returns at the `paper` profile; at the `pocket` profile one row, which states that nothing was
    run."""
    if p.profile == "paper":
        return recipe.run(p, out)
    return pd.DataFrame({"full size": ["not run at the `pocket` profile"]})


# --- predictions of the live networks ---------------------------------------------------------------------------------


def scores(
    found: Setting, models: Mapping[str, MetaSegNet], kinds: Sequence[str] = ("wrong", "empty"), test: str = "seen"
) -> pd.DataFrame:
    """mIoU in the zones seen and in the one left out, and the IoU of each class on one of the two, by network.

    Args:
        kinds: of prompts, for MetaSegNet next to the right ones: "wrong" of a zone that differs in moisture and
            building style, "empty" without a word.
        test: "seen" or "left out", of the IoU of each class.
    """
    asked = {name: (name, "") for name in models}
    asked |= {f"MetaSegNet, {kind} prompt": ("MetaSegNet", kind) for kind in kinds}
    rows = []
    for label, (name, kind) in asked.items():
        each = {t: metrics.scores(matrix(found, models[name], name, t, kind)) for t in found.tests}
        row = {"network": label} | {f"mIoU, {t}": own.miou for t, own in each.items()}
        rows.append(row | dict(zip(landcover.CLASSES, each[test].iou.tolist(), strict=True)))
    return pd.DataFrame(rows)


def shown(test: landcover.Part, left_out: str, seen: Sequence[str] = ("BSh", "Cfb", "Aw", "Am")) -> dict[str, int]:
    """The test images that the figures show: one for each of three zones, last one of the zone left out."""
    zones = [*[zone for zone in seen if zone != left_out][:3], left_out]
    return {zone: test.zones.index(zone) + 2 for zone in zones}


def pixels(image: Tensor) -> Tensor:
    """A network's input (3, H, W) as RGB in 0 to 1."""
    return torch.from_numpy(plots.denormalise(image, landcover.MEAN, landcover.STD)).permute(2, 0, 1)


def predict(model: MetaSegNet, test: landcover.Part, index: int, text: str | None) -> Tensor:
    """The classes (H, W) of one test image with a text."""
    return study.predict(model, test.images[index : index + 1], None if text is None else [text])[0]


def predictions(models: Mapping[str, MetaSegNet], test: landcover.Part, indices: Mapping[str, int]) -> Figure:
    """Image, truth, both networks, and the pixels that one of them alone predicts correctly, a row for each zone."""
    rows = {}
    for zone, i in indices.items():
        own = {name: predict(models[name], test, i, None if name == "unimodal" else text(zone)) for name in LIVE}
        drawn = [pixels(test.images[i]), test.labels[i], *own.values(), figures.differing(test.labels[i], own)]
        rows[zone if zone != [*indices][-1] else f"{zone}, left out"] = drawn
    titles = ("image (synthetic)", "truth", *LIVE, "only one correct")
    legend = CLASSES | {f"{name} alone correct": colour for name, colour in figures.ONLY.items()}
    return figures.land_cover(rows, legend, titles, side=1.45)


def text(zone: str) -> str:
    """The full text of a synthetic zone."""
    return study.prompts().text(zone)


def under_texts(
    model: MetaSegNet, test: landcover.Part, indices: Mapping[str, int], left_out: str, chosen: Sequence[int] = (0, -1)
) -> Figure:
    """The predicted maps of test images, first and last of `indices`, with four prompts each."""
    rows, titles = {}, {}
    for zone, i in [list(indices.items())[k] for k in chosen]:
        wrong = landcover.other_zone(zone, avoid=left_out)
        given = {f"right ({zone})": text(zone), f"wrong ({wrong})": text(wrong)}
        given |= {"description": headless(text(zone)), "empty": ""}
        maps = {name: predict(model, test, i, words) for name, words in given.items()}
        name = zone if zone != left_out else f"{zone}, left out"
        rows[name] = [pixels(test.images[i]), test.labels[i], *maps.values()]
        accuracy = {n: 100 * float((found == test.labels[i]).float().mean()) for n, found in maps.items()}
        titles[name] = ["image (synthetic)", "truth", *(f"{n}: {share:.0f} % correct" for n, share in accuracy.items())]
    return figures.land_cover(rows, CLASSES, titles, side=1.25)


def under(model: MetaSegNet, test: landcover.Part, index: int, zone: str) -> Figure:
    """A test image, its map with the prompt of a zone, and the truth, small, for a widget."""
    found = predict(model, test, index, text(zone))
    share = 100 * float((found == test.labels[index]).float().mean())
    titles = (f"image of {test.zones[index]}", f"prompt of {zone}: {share:.0f} % correct", "truth")
    figure = plots.image_rows(
        {"": [figures.painted(x, CLASSES) for x in (pixels(test.images[index]), found, test.labels[index])]},
        titles,
        side=1.7,
    )
    figure.set_dpi(84)
    return figure


# --- attention of positions to words ----------------------------------------------------------------------------------


def word_maps(model: MetaSegNet, test: landcover.Part, index: int, count: int = 6) -> Figure:
    """The attention of each stage to the words whose maps vary most over an image."""
    words, attention = attended(model, test, [index])
    maps = {f"stage {k}": a[0] for k, a in attention.items()}
    varying = sum(a.flatten(0, 1).std(0) for a in maps.values())
    picked = torch.as_tensor(varying).argsort(descending=True)[:count].sort().values.tolist()
    return figures.word_maps(pixels(test.images[index]), maps, words, picked)


def attended(model: MetaSegNet, test: landcover.Part, indices: Sequence[int]) -> tuple[list[str], dict[int, Tensor]]:
    """The words of a zone's text, and by stage the attention (n, h, w, L) of test images of that zone to them."""
    given = text(test.zones[indices[0]])
    words = model.text.words(given) if model.text is not None else []
    attention = figures.attention(model, test.images[list(indices)], [given])
    return words, {k: a[..., : len(words)] for k, a in attention.items()}


def attention_by_class(
    model: MetaSegNet, test: landcover.Part, zone: str, stage: int = 1
) -> tuple[list[str], np.ndarray]:
    """The words of a zone's text, and the attention (classes, L) in percent of each class's pixels at one stage."""
    own = [i for i, other in enumerate(test.zones) if other == zone]
    words, attention = attended(model, test, own)
    fine = F.interpolate(attention[stage].movedim(-1, 1), (landcover.SIZE,) * 2, mode="nearest").movedim(1, -1)
    labels = test.labels[own]
    return words, np.stack([100 * fine[labels == c].mean(0).numpy() for c in range(len(landcover.CLASSES))])


# --- tables of the ablations ------------------------------------------------------------------------------------------


def study_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method: mIoU on both tasks as mean ± std over seeds, learning rate, trainable parameters."""
    found = ablations.spreads(rows, ["mIoU"])
    wide = found.pivot(index="method", columns="task", values="mIoU").loc[study.METHODS, [*study.TASKS]]
    wide.columns = [f"mIoU, {task}" for task in wide.columns]
    wide["learning rate"] = found.drop_duplicates("method").set_index("method")["learning rate"]
    wide["trainable parameters"] = rows[rows.stage == "test"].groupby("method").trained.first().map("{:,.0f}".format)
    return wide.reset_index()


def class_table(rows: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """IoU of each class as mean ± std over seeds, by task and method."""
    some = rows[rows.method.isin(methods)]
    found = ablations.spreads(some, [f"IoU {name}" for name in landcover.CLASSES]).drop(columns="learning rate")
    found = found.rename(columns=lambda name: name.removeprefix("IoU "))
    order = pd.MultiIndex.from_product([[*study.TASKS], methods], names=["task", "method"])
    return found.set_index(["task", "method"]).loc[order].reset_index()


def left_out_table(rows: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """By seed the zone left out, how many words of its text occur in texts of zones seen, and each method's mIoU."""
    tested = rows[(rows.stage == "test") & (rows.task == "left out")].set_index(["method", "seed"])
    found = []
    for seed in sorted(set(tested.index.get_level_values("seed"))):
        row = {"seed": seed, "zone": study.left_out(seed)}
        parts = [text(zone).partition(".") for zone in (row["zone"], *study.seen(seed))]
        for name, texts in {"code and name": [p[0] for p in parts], "description": [p[2] for p in parts]}.items():
            own, *others = ([w for w in split(words) if w not in ("climate", "zone")] for words in texts)
            known = sum(any(word in other for other in others) for word in own)
            row[f"known words, {name}"] = f"{known} of {len(own)}"
        found.append(row | {method: tested.mIoU[method, seed] for method in methods})
    return pd.DataFrame(found)


def lead(rows: pd.DataFrame, task: str, better: str, worse: str, metric: str = "mIoU") -> str:
    """The lead of a method over another on test data, mean ± std over seeds, in points."""
    tested = rows[(rows.stage == "test") & (rows.task == task)].set_index(["method", "seed"])[metric].sort_index()
    leads = tested[better] - tested[worse]
    return f"{leads.mean():+.1f} ± {leads.std():.1f} points"


def reasons(rows: pd.DataFrame) -> dict[str, str]:
    """Why synthetic results fail, by claim, with what was measured."""
    tested = rows[(rows.stage == "test")].set_index(["task", "method", "seed"]).sort_index()
    header = {m: tested.loc[("left out", m), "IoU building"] for m in ("MetaSegNet", "no header dropout")}
    buildings = ", ".join(
        f"{study.left_out(seed)} {header['MetaSegNet'][seed]:.0f} and {header['no header dropout'][seed]:.0f}"
        for seed in header["MetaSegNet"].index
    )
    loss = {m: tested.loss.loc[("left out", m)].mean() for m in ("MetaSegNet", PRETRAINED)}
    by_class = ", ".join(
        f"{name} {lead(rows, 'left out', PRETRAINED, 'MetaSegNet', f'IoU {name}').removesuffix(' points')}"
        for name in BY_ZONE
    )
    return {
        "early": "what depends on the zone here is the colour of single positions, which the first stage sees: in the "
        f"zones seen its lead over four stages is {lead(rows, 'seen', 'fusion at stage 1', 'MetaSegNet')}",
        "header": f"in the zones seen its lead is {lead(rows, 'seen', 'MetaSegNet', 'no header dropout')}; in a zone "
        f"left out buildings decide, which transfer or do not: IoU with and without it {buildings}",
        "pretrained": "every word of the new description occurs in the texts of the zones seen, so the small encoder "
        f"knows them too; MiniLM's lead by class: {by_class}; in the zones seen "
        f"{lead(rows, 'seen', PRETRAINED, 'MetaSegNet')}, with a training loss of {loss[PRETRAINED]:.2f} against "
        f"{loss['MetaSegNet']:.2f}",
    }


# --- your own data ----------------------------------------------------------------------------------------------------


def own_area(folder: Path, zones: Sequence[str], seed: int, count: int = 4) -> Path:
    """A folder as a user has it: images/*.tif, georeferenced in their zones, labels/*.tif, and an image new.tif."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for zone in zones:
        for i, (image, labels) in enumerate(landcover.pictures(zone, count, "train", 1000 + seed)):
            name = f"{zone.lower()}_{i}.tif"
            landcover.save(folder / "images" / name, image, zone, i)
            landcover.save(folder / "labels" / name, labels, zone, i)
    landcover.save(folder / "new.tif", landcover.pictures(zones[0], 1, "test", 1000 + seed)[0][0], zones[0])
    return folder


def regions_by_zone() -> tuple[pd.DataFrame, list[str]]:
    """OpenEarthMap's regions by climate zone, and the regions without a known location."""
    places = data.read_places()
    zones = {name: climate.zone(at.latitude, at.longitude, reach=data.COAST) for name, at in places.items()}
    counts = pd.Series([zone for zone in zones.values() if zone is not None]).value_counts().sort_index()
    return counts.rename("regions").to_frame().T, sorted(name for name, zone in zones.items() if zone is None)
