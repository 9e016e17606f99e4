"""PromptPAR: what the notebook trains live and measures on the synthetic pedestrians, and tables of its ablations."""

from __future__ import annotations

import copy
import csv
import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from ...evaluation import ablations
from ...evaluation.claims import check_range
from ...evaluation.metrics.attributes import Scores
from ...models.promptpar import Maps, PromptPAR, recipe
from ...ops.recorded import recorded
from ...training.fit import History
from ..ablations import promptpar as ablation
from ..ablations import study_root
from ..datasets import pedestrians as toy

TASK, METHODS = "street", ("heads only", "PromptPAR, not masked", "PromptPAR")
METRICS = ["mA", "Acc", "Prec", "Rec", "F1", "F1 of means"]
MAIN = ["heads only", "deep prompts", "PromptPAR, not masked", "regions, no similarity loss", "PromptPAR"]
MAIN += ["PromptPAR, linear fusion", "full fine-tuning"]
"""The methods of the figures."""

EXPECTED = {"heads only": (60, 80), "PromptPAR, not masked": (68, 92), "PromptPAR": (68, 92)}  # mA of the live run
CHANCE = 60.0  # a part with a lower mA has, of its two or three attributes, at least one near the chance level of 50
ROWS = {"head": (0, 1), "upper body": (1, 4), "legs": (4, 7), "feet": (6, 7), "bags": (1, 5)}
"""First and last row of patches of each part of the body."""

SHOWN = {"pocket": 600, "paper": 4}  # test images of the maps, by profile


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters; at `pocket` the images are written below `out`."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    toy.write(study_root(root, p.seed), p.seed)
    parts = {name: ablation.images(root, p.seed, split) for name, split in (("train", "trainval"), ("test", "test"))}

    def train(method: str) -> tuple[PromptPAR, History]:
        model = ablation.build(method, p.seed)
        rate = learning_rates[TASK, method]
        return model, ablation.train_model(model, method, parts["train"], rate, p.seed)

    return recipe.Setting(
        title="synthetic pedestrians",
        names=toy.ATTRIBUTES,
        parts=parts,
        methods=METHODS,
        build=functools.partial(ablation.build, seed=p.seed),
        train=train,
        probabilities=lambda model, data: ablation.probabilities(model, data.tensors[0]),
    )


def check(p: SimpleNamespace, out: Path, found: recipe.Setting, scores: Mapping[str, Scores]) -> None:
    """At toy scale print whether each mA is in its expected range; else add the scores to `out`/measured.csv.

    A dry run adds none.
    """
    if p.profile == "pocket":
        for name, (low, high) in EXPECTED.items():
            check_range(f"{name}, mA (%)", scores[name].totals["mA"], low, high)
    elif not p.dry_run:
        recipe.RESULTS.measured(out / "measured.csv", recipe.row(p, scores[p.method], found.epochs))


def short(names: Sequence[str], width: int = 26) -> list[str]:
    """Names of attributes as labels of a figure."""
    return [textwrap.shorten(name.removeprefix("A pedestrian "), width, placeholder=" …") for name in names]


def by_attribute(found: recipe.Setting, scores: Mapping[str, Scores], most: int = 16) -> pd.DataFrame:
    """mA of the attributes (columns) by method, in percent: those with the lowest in the last row."""
    frame = pd.DataFrame([s.balanced for s in scores.values()], index=list(scores), columns=short(found.names))
    chosen = np.sort(np.argsort(frame.iloc[-1].to_numpy(), kind="stable")[:most])
    return frame.iloc[:, chosen]


# --- maps and similarities of a trained model -------------------------------------------------------------------------


def test_images(p: SimpleNamespace, found: recipe.Setting) -> tuple[Tensor, Tensor]:
    """The test images (n, 3, H, W) that the maps are made of, and their labels (n, A)."""
    return found.examples("test", SHOWN[p.profile])


def _parts(images: Tensor) -> Iterator[Tensor]:
    return iter(images.split(100))


def maps(model: PromptPAR, images: Tensor) -> Maps:
    """`model.maps` of many images, computed in parts."""
    return Maps(*(torch.cat(found) for found in zip(*(model.maps(part) for part in _parts(images)), strict=True)))


def regions(model: PromptPAR, images: Tensor) -> Tensor:
    """The mean attention of [CLS] and of each region token to the patches, (1 + R, rows, columns), each of sum 1."""
    found = maps(model, images).regions.mean(0)
    return found / found.sum((1, 2), keepdim=True)


def auroc(scores: Tensor, truth: Tensor) -> list[float]:
    """How well each attribute's scores (n, A) rank the images with it, `truth` (n, A), first: AUROC in percent.

    NaN for an attribute that no image has, or all have.
    """
    pairs = zip(scores.cpu().float().T.numpy(), (truth == 1).T.numpy(), strict=True)
    return [100 * roc_auc_score(y, s) if y.any() and not y.all() else float("nan") for s, y in pairs]


@torch.inference_mode()
def similarity(model: PromptPAR, images: Tensor, truth: Tensor, untrained: PromptPAR | None = None) -> dict[str, list]:
    """AUROC, in percent by attribute, of the cosine of a token with each sentence: a row for each [CLS] token.

    Args:
        untrained: the same model before training: adds the highest AUROC over its regions as a row.
    """

    def of(features: Tensor, own: PromptPAR) -> list[float]:
        return auroc(F.normalize(features, dim=-1) @ F.normalize(own.text_features, dim=-1).T, truth)

    def classes(own: PromptPAR) -> Tensor:
        return torch.cat([own.forward_features(part)[:, own.class_positions] for part in _parts(images)])

    clip = copy.deepcopy(model.clip).float()
    rows = {"frozen CLIP": of(torch.cat([clip.encode_image(part) for part in _parts(images)]), model)}
    named = ["global", *(f"strip {r}" for r in range(1, 1 + len(model.region_tokens)))]
    tokens = classes(model)
    rows |= {name: of(tokens[:, r], model) for r, name in enumerate(named)}
    if untrained is not None and len(named) > 1:
        before = classes(untrained.eval())
        rows["best strip, untrained"] = np.max([of(before[:, r], untrained) for r in range(1, len(named))], 0).tolist()
    return rows


def by_row(model: PromptPAR, images: Tensor, truth: Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables in percent, rows of patches by attribute.

    The attention of the attribute's token in the fusion block, the mean over images with the attribute, each column of
    sum 100; and the AUROC of the mean cosine of the row's patches with the sentence.
    """
    found = maps(model, images)
    count = truth.shape[1]
    attention = torch.stack([found.attributes[truth[:, i] == 1, i].mean(0).sum(1) for i in range(count)], 1)
    cosines = [auroc(found.cosines[:, :, row].mean(-1), truth) for row in range(found.cosines.shape[2])]
    index = [f"row {row}" for row in range(1, 1 + len(attention))]
    shares = pd.DataFrame((100 * attention / attention.sum(0)).cpu().numpy(), index=index)
    return shares, pd.DataFrame(cosines, index=index)


def frames(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """By attribute of the synthetic pedestrians: the rows of patches of its part of the body; empty for other names."""
    part_of = {name: part for part, named in toy.PARTS.items() for name in named}
    return {name: ROWS[part_of[name]] for name in names if name in part_of}


def one_with_and_one_without(truth: Tensor, attribute: int) -> list[int]:
    """The first image with an attribute and the first without, as far as there are any."""
    return [k for y in (1, 0) for k in (truth[:, attribute] == y).nonzero()[:1, 0].tolist()]


# --- the synthetic data -----------------------------------------------------------------------------------------------


def colours(seed: int, count: int = 4000) -> pd.DataFrame:
    """Of `count` persons: how many have a coloured piece, and how often the colour is on another part, in percent."""
    worn = [toy.dressed(np.random.default_rng((seed, i))) for i in range(count)]
    rows = []
    for colour in ("red", "blue"):
        for name, part in (("top", "top"), ("trousers", "lower"), ("shoes", "shoes")):
            has = np.array([q.labels[toy.ATTRIBUTES.index(f"{colour} {name}")] for q in worn]) == 1
            others = {"hat", "top", "lower", "shoes"} - {part}
            elsewhere = np.array([any(getattr(q, other) == colour for other in others) for q in worn])
            means = (has.mean(), elsewhere[~has].mean(), elsewhere[has].mean())
            rows.append((f"{colour} {name}", *(100 * float(mean) for mean in means)))
    columns = ["attribute", "persons with it (%)", "colour elsewhere, persons without (%)", "persons with (%)"]
    return pd.DataFrame(rows, columns=columns)


@recorded()
def transform() -> v2.Transform:
    """From a PIL image to the input (3, 64, 32) of the toy CLIP, in -1 to 1."""
    size = [toy.HEIGHT, toy.WIDTH]
    return v2.Compose(
        [v2.Resize(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    )


def own_folder(folder: Path, seed: int, count: int = 200) -> Path:
    """A folder as a user has it: synthetic images of persons and `labels.csv` with two attributes, one in ten a test
    image."""
    names = ("red top", "blue trousers")
    images, persons = toy.people(count, "train", "street", seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(["image", "split", *(toy.SENTENCES[name] for name in names)])
        for i, (image, person) in enumerate(zip(images, persons, strict=True)):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
            labels = dict(zip(toy.ATTRIBUTES, person.labels, strict=True))
            write([f"{i:03d}.png", "train" if i % 10 else "test", *(labels[name] for name in names)])
    return folder


# --- tables of the ablations ------------------------------------------------------------------------------------------


def study_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method: its scores on test data over the seeds, the selected learning rate, its trainable parameters."""
    frame = ablations.spreads(rows, METRICS).drop(columns="task").set_index("method")
    trained = rows[rows.stage == "test"].groupby("method").trained.first()
    frame["trainable parameters"] = [f"{trained[name]:,}" for name in frame.index]
    return frame.loc[[name for name in ablation.METHODS if name in frame.index]].reset_index()


def leads(rows: pd.DataFrame, claims: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The lead in mA, in points, of the better method of each claim, by test seed."""
    tested = rows[rows.stage == "test"].set_index(["method", "seed"]).mA.sort_index()
    table = []
    for claim in claims:
        lead = tested[claim["better"]] - tested[claim["worse"]]
        row = {"claim": claim["id"], "better": claim["better"], "worse": claim["worse"]}
        table.append(row | {f"seed {seed}": value for seed, value in lead.items()})
    return pd.DataFrame(table)


def _lost(rows: pd.DataFrame, method: str) -> dict[str, list[int]]:
    """The test seeds with which a method's mA of a part of the body is below `CHANCE`, by part."""
    own = rows[(rows.stage == "test") & (rows.method == method)].set_index("seed").sort_index()
    found = {part: [int(seed) for seed in own.index[own[part] < CHANCE]] for part in toy.PARTS}
    return {part: seeds for part, seeds in found.items() if seeds}


def lost(rows: pd.DataFrame) -> pd.DataFrame:
    """Parts of the body that a method did not learn, with the seeds, and its range of mA."""
    tested, table = rows[rows.stage == "test"].groupby("method").mA, []
    for name in (name for name in ablation.METHODS if name in tested.groups):
        found = _lost(rows, name)
        text = "; ".join(f"{part}: {', '.join(map(str, seeds))}" for part, seeds in found.items()) or "–"
        values = tested.get_group(name)
        table.append((name, sum(map(len, found.values())), text, values.min(), values.max()))
    columns = ["method", "parts not learned", "part, and the seeds", "lowest mA", "highest mA"]
    return pd.DataFrame(table, columns=columns)


def reasons(rows: pd.DataFrame, claims: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Why synthetic results fail, by claim: the parts that each method did not learn, and the lead on all others.

    For full fine-tuning also the lead of the linear fusion.
    """
    tested, found = rows[rows.stage == "test"].set_index(["method", "seed"]).sort_index(), {}
    parts = tested[list(toy.PARTS)]

    def missed(method: str) -> str:
        own = _lost(rows, method)
        named = "; ".join(f"{part}: {', '.join(map(str, seeds))}" for part, seeds in own.items())
        return f"{method} {sum(map(len, own.values()))}" + (f" ({named})" if own else "")

    for claim in claims:
        better, worse = parts.loc[claim["better"]], parts.loc[claim["worse"]]
        lead = (better - worse).where((better >= CHANCE) & (worse >= CHANCE)).mean(axis=1)
        text = f"not learned, of {better.size} pairs of part and seed: {missed(claim['better'])}; "
        text += f"{missed(claim['worse'])}; on the parts that both learned the lead is "
        found[claim["id"]] = text + f"{lead.mean():+.1f} ± {lead.std():.1f} (lowest {lead.min():+.1f})"
    linear = tested.mA["PromptPAR, linear fusion"] - tested.mA["full fine-tuning"]
    found["over-full"] += f"; with a linear fusion the lead in mA is {linear.mean():+.1f} ± {linear.std():.1f}"
    return found
