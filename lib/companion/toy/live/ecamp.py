"""ECAMP: what the notebook trains, measures and shows live at the `pocket` profile; at `paper`, its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...data import xrays
from ...evaluation import ablations
from ...evaluation.claims import check_range
from ...models.ecamp import model as ecamp
from ...models.ecamp import recipe
from ...models.ecamp import text as report_text
from ...models.ecamp.model import ECAMP, Batch
from ...models.ecamp.text import Pairs, Vocabulary
from ...training.recipe import Training, run
from ..ablations import ecamp as study
from ..ablations import study_root
from ..datasets import chests
from ..encoders import chest_ecamp

TASK, LIVE = "chests", ("MIM only", "ECAMP")
BATCH = study.RECIPE["batch"]
STEPS = 150  # enough to see the losses fall; the ablations take four times as many
MAIN = ("raw pixels", "random init", "MIM only", "MRM-like", "ECAMP")
VARIANTS = tuple(name for name in study.METHODS if name.startswith("ECAMP"))
METRICS = (
    "AUROC 50",
    "AUROC 200",
    "AUROC 1500",
    "AUROC",
    "Dice",
    "side gain",
    "finding gain",
    "attention lead, hidden",
)
LOSSES = ("side, right", "side, other", "finding, right", "finding, other")
SHARES = ("box area", "attention in box, hidden", "attention in box")
EXPECTED = {"MIM only": 70, "ECAMP": 60, chest_ecamp.NAME: 90}  # AUROC with 200 labels in percent, at least
DRY_TASKS = {
    "fine-tune": "xrays/chestx-ray14",
    "linear probe": "xrays/covidx",
    "segment": "xrays/siim",
    "detect": "xrays/rsna",
}
"""The downstream tasks of a dry run, and the sets that their generated images stand for."""


class Chests(NamedTuple):
    """The synthetic chests of a seed: root of the written files, test split, vocabulary."""

    root: str
    test: chests.Part
    words: Vocabulary


def data(p: SimpleNamespace, out: Path) -> Chests:
    """The synthetic chests of the notebook's seed, written below `out`."""
    root = str(out / "data")
    study.prepare(root, p.seed)
    return Chests(root, study.part(root, p.seed, "test"), study.vocabulary(root, p.seed))


def batch(found: Chests, indices: Sequence[int], seed: int) -> Batch:
    """Test images and their reports, masked as in training."""
    part = found.test
    pairs = Pairs(
        study.colours(part.images[list(indices)]),
        [part.reports[i] for i in indices],
        found.words,
        patches=study.PATCHES,
        length=study.LENGTH,
        window=study.WINDOW,
        statements=[part.distilled[i] for i in indices],
    )
    torch.manual_seed(seed)
    return stacked(pairs, range(len(pairs)))


def stacked(pairs: Pairs, indices: Sequence[int]) -> Batch:
    """Items of `pairs` as one batch."""
    return Batch(*(torch.stack(values) for values in zip(*(pairs[i] for i in indices), strict=True)))


def gallery(part: chests.Part, each: int = 2) -> list[int]:
    """Indices of the first `each` chests of every finding, a row of the four findings after the other."""
    first = [torch.nonzero(part.labels[:, k])[:each, 0].tolist() for k in range(len(chests.FINDINGS))]
    return [i for row in zip(*first, strict=True) for i in row]


def caption(report: str) -> str:
    """A report of two sentences as the title of an image."""
    return report.replace(" . ", "\n").removesuffix(" .")


def roles(ids: Sequence[int] | np.ndarray, words: Vocabulary) -> list[str]:
    """The role of each position of a text: entity, descriptor, boiler-plate or other."""
    described, boiler = report_text.descriptors(ids, words), report_text.boilerplate(ids, words)
    found = ["boiler-plate" if plain else "other" for plain in boiler]
    for i in described:
        found[i] = "descriptor"
    return ["entity" if int(word) in words.entities else role for word, role in zip(ids, found, strict=True)]


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Pre-trained models by method, their data, and the losses of each step, the mean over ten steps, by method and
    loss.

    There are none where the `paper` profile runs a downstream task.
    """

    models: dict[str, ECAMP]
    data: dict[str, Any]
    curves: dict[str, dict[str, list[float]]]


def trainings(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> dict[str, Training]:
    """The pre-trainings of the notebook's checked parameters by method."""
    if p.profile != "pocket":
        return {p.method: recipe.pretraining(p, out)} if p.task == "pre-train" else {}
    root = str(out / "data")
    chests.write(study_root(root, p.seed), p.seed)
    words = len(study.vocabulary(root, p.seed))

    def training(method: str) -> Training:
        return Training(
            name=method,
            build=lambda: study.build(method, p.seed, words),
            loss=ecamp.pretraining_loss,
            data=lambda: study.pairs(method, root, p.seed),
            fit=study.fit_options(learning_rates[TASK, method], p.seed, STEPS / (chests.COUNTS["train"] // BATCH)),
        )

    return {method: training(method) for method in LIVE}


def train(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Trained:
    """The pre-training that the parameters ask for."""
    models, data, curves = {}, {}, {}
    for method, training in trainings(p, out, learning_rates).items():
        models[method], rows = run(training, None if p.profile == "pocket" or p.dry_run else out)
        data[method] = training.data
        history = pd.DataFrame(rows).rename(columns={"loss": "total"})
        smooth = history[["total", "mim", "sr", "mlm"]].rolling(10, min_periods=1).mean()
        curves[method] = smooth.loc[:, smooth.abs().sum() > 0].to_dict("list")
    return Trained(models, data, curves)


def downstream(p: SimpleNamespace, out: Path) -> pd.DataFrame:
    """The downstream task of the `paper` profile, whose score is added to `measured.csv`; a dry run does all tasks.

    Columns: task, steps, metric, score. Empty at the `pocket` profile, and for a pre-training.
    """
    tasks = {} if p.task == "pre-train" else {p.task: p.dataset}
    if p.profile == "pocket":
        tasks = {}
    elif p.dry_run:
        tasks = DRY_TASKS | tasks
    rows = []
    for task, dataset in tasks.items():
        own = vars(p) | {"task": task, "dataset": dataset} | ({"devices": 1} if p.task == "pre-train" else {})
        one = SimpleNamespace(**own)  # on one device
        training, data = recipe.downstream(one)
        model, history = run(training, None if p.dry_run else out)
        title = f"{task} on {dataset}, {p.labels} % of the labels"
        title += " (dry run on generated images: the score means nothing)" if p.dry_run else ""
        rows.append((title, len(history), recipe.metric(one), recipe.evaluate(one, model, data["test"])))
        if not p.dry_run:
            facts = {key: getattr(p, key) for key in recipe.RESULTS.keys} | {"labels": int(p.labels)}
            recipe.RESULTS.measured(out / "measured.csv", facts | {"score": rows[-1][-1]})
    return pd.DataFrame(rows, columns=["task", "steps", "metric", "score"])


def probed(p: SimpleNamespace, found: Chests, trained: Trained) -> pd.DataFrame:
    """AUROC in percent of probes on an untrained encoder, the live ones (at `pocket`) and the shipped one."""
    models = {"random init": study.build("random init", p.seed, len(found.words))}
    models |= trained.models if p.profile == "pocket" else {}
    models[chest_ecamp.NAME] = chest_ecamp.build()
    known = study.part(found.root, p.seed, "train")
    rows = [{"encoder": name} | study.probes(name, model, known, found.test) for name, model in models.items()]
    frame = pd.DataFrame(rows).drop(columns="AUROC")
    for name, low in EXPECTED.items():
        if name in models:
            value = frame.set_index("encoder").loc[name, "AUROC 200"]
            check_range(f"{name}, AUROC with 200 labels (%)", value, low)
    for name, losses in trained.curves.items() if p.profile == "pocket" else ():
        check_range(f"{name}, L_mim at the end over L_mim at the start", losses["mim"][-1] / losses["mim"][9], high=0.8)
    return frame.rename(columns=lambda name: name.replace("AUROC ", "labels: "))


@dataclass(frozen=True)
class Example:
    """A model, a batch that it reconstructs, a title for each image, and the mean and std of the images."""

    model: ECAMP
    batch: Batch
    titles: list[str]
    mean: float
    std: float


def example(p: SimpleNamespace, found: Chests, trained: Trained) -> Example:
    """The model that the `paper` profile pre-trained, with two of its pairs; else the shipped one, with four chests."""
    if p.profile != "pocket" and trained.models:
        pairs: Any = trained.data[p.method]()
        model = trained.models[p.method].cpu().eval()
        return Example(model, stacked(pairs, range(2)), ["pair 1", "pair 2"], xrays.PRETRAIN_MEAN, xrays.PRETRAIN_STD)
    drawn = batch(found, gallery(found.test, 1), p.seed)
    return Example(chest_ecamp.build(), drawn, list(chests.FINDINGS), chests.MEAN, chests.STD)


# --- use of the image by the text decoder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One test chest for each finding, and its report.

    Attributes:
        images, boxes: (4, 1, 64, 64), (4, 4).
        titles: the reports.
        ids, hidden: (4, L), the words, and the same with side and finding masked.
        attention: (4, L).
        side, finding, absent: (4,), positions of these words.
    """

    images: Tensor
    boxes: Tensor
    titles: list[str]
    ids: Tensor
    hidden: Tensor
    attention: Tensor
    side: Tensor
    finding: Tensor
    absent: Tensor


def shown(found: Chests, number: int = 3) -> Shown:
    """The chest `number` of each finding, from 0, in the test split."""
    part, words = found.test, found.words
    at = [int(torch.nonzero(part.labels[:, k])[number]) for k in range(len(chests.FINDINGS))]
    read = study.texts(tuple(part.reports[i] for i in at), words)
    entities = torch.isin(read.ids, torch.tensor(list(words.entities)))
    return Shown(
        images=part.images[at],
        boxes=part.boxes[at],
        titles=[caption(part.reports[i]) for i in at],
        ids=read.ids,
        hidden=read.ids.masked_fill(read.side | read.finding, words.mask),
        attention=read.attention,
        side=read.side.int().argmax(1),
        finding=read.finding.int().argmax(1),
        absent=(entities & ~read.finding).int().argmax(1),
    )


CANDIDATES = (*chests.SIDES, *chests.FINDINGS)


@torch.inference_mode()
def probabilities(model: ECAMP, chosen: Shown, words: Vocabulary) -> dict[str, Tensor]:
    """Predicted probabilities (4, 6) of `CANDIDATES`, of the sides at the masked side and of the findings at the masked
    finding, with the report's own image and with that of the next chest."""
    z = model.project(study.tokens(model, chosen.images))
    columns = torch.tensor([words.tokenizer.token_to_id(name) for name in CANDIDATES])
    found, rows = {}, torch.arange(len(z))
    for name, seen in (("own", z), ("another", z.roll(-1, 0))):
        chance = model.text(chosen.hidden, chosen.attention, seen)[0].softmax(-1)[..., columns]
        sides = len(chests.SIDES)
        found[name] = torch.cat([chance[rows, chosen.side, :sides], chance[rows, chosen.finding, sides:]], 1)
    return found


def right_or_wrong(model: ECAMP, found: Chests) -> pd.DataFrame:
    """The mean loss on the masked side and finding of all test reports, with the right image and with another."""
    means = {name: float(losses.mean()) for name, losses in study.word_losses(model, found.test, found.words).items()}
    rows = []
    for word, choices in (("side", chests.SIDES), ("finding", chests.FINDINGS)):
        right, other = means[f"{word}, right"], means[f"{word}, other"]
        check_range(f"{word}, loss with another image less that with the right one (nats)", other - right, 0.2)
        rows.append((word, right, other, float(np.log(len(choices)))))
    return pd.DataFrame(rows, columns=["masked word", "right image", "another image", "chance level"])


@torch.no_grad()
def attention_maps(model: ECAMP, chosen: Shown, seed: int) -> tuple[dict[str, Tensor], float]:
    """Cross-attention (4, 8, 8) from the finding's word to the patches, by row of the figure.

    The word masked and visible, mean over heads; the visible word by the released recipe (`model.heat`), and the same
    with the patches in the order of the masking noise, as released. Also the largest difference between the released
    maps, put in order, and ours.
    """
    low, rows = ecamp.shrink(study.colours(chosen.images)), torch.arange(len(chosen.images))
    masked = chosen.ids.clone()
    masked[rows, chosen.finding] = chosen.hidden[rows, chosen.finding]
    maps = {
        name: model.attention(low, ids, chosen.attention)[rows, :, chosen.finding]
        for name, ids in (("masked", masked), ("visible", chosen.ids))
    }  # (4, heads, 64)
    order = torch.rand(len(low), study.PATCHES, generator=torch.Generator().manual_seed(seed)).argsort(1)
    released = model.attention(low, chosen.ids, chosen.attention, order)[rows, :, chosen.finding]
    back = released.take_along_dim(order.argsort(1)[:, None], 2)
    panels = {name: found.mean(1).unflatten(1, (8, 8)) for name, found in maps.items()}
    panels["visible, released recipe"] = torch.stack([ecamp.heat(own) for own in maps["visible"]])
    panels["the same, patches in released order"] = torch.stack([ecamp.heat(own) for own in released])
    return panels, float((back - maps["visible"]).abs().max())


def attention_shares(model: ECAMP, found: Chests) -> pd.DataFrame:
    """The share of the finding's attention inside the lesion's box, the word masked and visible, and the box's share of
    the image, in percent, by finding."""
    inside = study.cells(found.test.boxes)
    shares = {hide: (study.looks(model, found.test, found.words, hide) * inside).sum(1) for hide in (True, False)}
    columns = ("box's share of the image", "attention inside, word masked", "word visible")
    rows = []
    for k, finding in enumerate(chests.FINDINGS):
        own = found.test.labels[:, k] == 1
        means = [100 * float(x[own].mean()) for x in (inside.mean(1), shares[True], shares[False])]
        rows.append({"finding": finding} | dict(zip(columns, means, strict=True)))
    ratio = shares[True].mean().item() / inside.mean().item()
    check_range("attention of the masked word inside the box over the box's share", ratio, 2)
    return pd.DataFrame(rows)


def word_map(model: ECAMP, chosen: Shown, chest: int, word: str, masked: bool) -> Tensor:
    """Cross-attention (8, 8) of "finding", "side" or "absent" finding of a chest, mean over heads."""
    ids, at = chosen.ids[[chest]].clone(), int(getattr(chosen, word)[chest])
    if masked:
        ids[0, at] = chosen.hidden[chest, chosen.finding[chest]]
    low = ecamp.shrink(study.colours(chosen.images[[chest]]))
    return model.attention(low, ids, chosen.attention[[chest]])[0, :, at].mean(0).unflatten(0, (8, 8))


def loss_by_kind(drawn: Batch, each: Tensor) -> pd.DataFrame:
    """How much of the positions, and of the text loss, are masked words, visible words and padding, in percent.

    Args:
        each: (B, L), the cross-entropies.
    """
    kinds = {
        "masked": drawn.ids != drawn.labels,
        "visible": (drawn.ids == drawn.labels) & (drawn.attention > 0),
        "padding": drawn.attention == 0,
    }
    weighted = drawn.weights * each
    rows = [
        (name, 100 * float(at.float().mean()), float(each[at].mean()), 100 * float(weighted[at].sum() / weighted.sum()))
        for name, at in kinds.items()
    ]
    return pd.DataFrame(rows, columns=["words", "of all positions (%)", "mean cross-entropy", "of the loss (%)"])


# --- tables of the ablations ------------------------------------------------------------------------------------------


def study_table(rows: pd.DataFrame, metrics: Sequence[str] = METRICS, methods: Sequence[str] = ()) -> pd.DataFrame:
    """Test scores over seeds and the learning rate, a row for each method (of `methods`, if given) with any score."""
    table = ablations.spreads(rows, [*metrics]).drop(columns="task").set_index("method")
    measured = (table[[*metrics]] != "–").any(axis=1)
    order = [name for name in methods or study.METHODS if name in table.index and measured[name]]
    return table.loc[order].reset_index()


def leads(rows: pd.DataFrame, claims: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The lead of the better method of each claim, in points of each of its metrics, by test seed."""
    tested = rows[rows.stage == "test"].set_index(["method", "seed"]).sort_index()
    table = []
    for claim in claims:
        for metric in claim.get("metrics", [rows.attrs["metric"]]):
            lead = tested.loc[claim["better"], metric]
            if "worse" in claim:
                lead = lead - tested.loc[claim["worse"], metric]
            row = {"claim": claim["id"], "metric": metric, "better": claim["better"], "worse": claim.get("worse", "0")}
            table.append(row | {f"seed {seed}": value for seed, value in lead.items()})
    return pd.DataFrame(table)


def _won(rows: pd.DataFrame, metric: str, worse: str) -> str:
    """In how many seeds ECAMP has the higher test score: "3 of 5"."""
    tested = rows[rows.stage == "test"].set_index(["method", "seed"])[metric]
    lead = (tested["ECAMP"] - tested[worse]).dropna()
    return f"{int((lead > 0).sum())} of {len(lead)}"


def over_untrained(rows: pd.DataFrame) -> str:
    """In how many seeds ECAMP is better than the baselines without training."""
    probes = ", ".join(
        f"{_won(rows, f'AUROC {labels}', 'raw pixels')} with {labels:,} labels" for labels in study.PROBES
    )
    dice = _won(rows, "Dice", "random init")
    return f"Seeds in which ECAMP beats raw pixels: {probes}; an untrained encoder in segmentation: {dice}"


def reasons(rows: pd.DataFrame, share: float) -> dict[str, str]:
    """Why claims fail, by claim, with counts from the rows of the ablations.

    Args:
        share: the part of the super-resolution loss that cannot be fitted, in percent.
    """
    tested = rows[rows.stage == "test"].set_index(["method", "seed"]).sort_index()

    def reach(method: str) -> str:
        found = tested.loc[method, "side gain"]
        return f"{found.min():.1f} to {found.max():.1f} %"

    metric = rows.attrs["metric"]
    probe, lesions = (_won(rows, score, "ECAMP, no super-resolution") for score in (metric, "Dice"))
    plain = _won(rows, metric, "ECAMP, no distillation")
    return {
        "super-resolution": f"{share:.0f} % of its loss cannot be fitted (last ReLU); with it the probe is better in "
        f"{probe} seeds, and lesions are segmented better in {lesions} seeds",
        "distillation": "the reports of the synthetic chests are as plain as the statements, which name no side; side "
        f"gain over the seeds: {reach('ECAMP')} with, {reach('ECAMP, no distillation')} without; with them the probe "
        f"is better in {plain} seeds",
        "descriptors": f"side gain over the seeds: {reach('ECAMP, descriptors hidden')} when descriptors are always "
        f"masked, {reach('ECAMP')} as released",
    }
