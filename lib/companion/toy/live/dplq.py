"""DPLQ: what the notebook trains, measures and shows live at the `pocket` profile; at `paper`, its recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ...data import fewshot
from ...evaluation import ablations
from ...evaluation.claims import check_range
from ...models.dplq import model as dplq
from ...models.dplq import recipe
from ...models.dplq.model import DPLQ, Prompts
from ...models.dplq.recipe import Setting
from ...models.layers.clip_prompting import PromptedCLIP, encode_text, similarity
from ...training.recipe import Training
from ...viz.attention import Recorder
from ...viz.style import COLOURS
from ..ablations import dplq as study
from ..ablations import study_root
from ..datasets import domains as pocket
from ..encoders import domain_mae

TASK, LIVE = "medical", ("zero-shot CLIP", "MaPLe", "DPLQ")
FIRST_TABLE = ("zero-shot CLIP", "CoOp", "CoCoOp", "MaPLe", "DPLQ")
CONTROLS = tuple(m for m in study.METHODS if m.startswith("DPLQ") and "mean 1" not in m)
NOISY = tuple(m for m in study.METHODS if "mean 1" in m)  # ablations on "remote" alone
UNTRAINED_MODEL, OTHER = "DPLQ, untrained domain model", "DPLQ, the other domain's model"
EXPECTED = {"zero-shot CLIP": (40, 60), "MaPLe": (30, 60), "DPLQ": (80, 100)}  # HM in percent, of one seed
SHADES = {"red": ("#8c0000", "#ff8a80"), "cyan": ("#007c8a", "#6fe3ef")}  # of the classes with this colour in the name
SHADES |= {"green": ("#2e9e2e", "#b5e8b5"), "violet": ("#4b2a85", "#c3a6ff")}


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for: at toy scale, or the `paper` profile's."""
    if p.profile == "paper":
        return recipe.setting(p, out)
    root = str(out / "data")
    pocket.write(study_root(root, p.seed), TASK, p.seed)
    classes = {part: study.images(TASK, root, p.seed, part)[2] for part in ("train", "test base", "test novel")}

    def inputs(method: str, part: str) -> TensorDataset:
        return study.inputs(method, TASK, root, p.seed, part if part == "train" else f"test {part}")

    rates = {method: learning_rates[TASK, method] for method in LIVE if method not in study.UNTRAINED}

    def training(method: str) -> Training:
        width = inputs(method, "train").tensors[-1].shape[-1]
        options = study.TRAINING | {"seed": p.seed, "name": method}
        return Training(
            name=method,
            build=lambda: study.build(method, classes["train"], p.seed, width),
            loss=dplq.loss,
            data=(lambda: inputs(method, "train")) if method in rates else None,
            fit=options | ({"optimizer": study.optimizer(rates[method])} if method in rates else {}),
        )

    return Setting(
        title=f"{TASK} (synthetic), base to novel",
        classes=classes["train"],
        test_classes={half: classes[f"test {half}"] for half in ("base", "novel")},
        trainings={method: training(method) for method in LIVE},
        learning_rates=rates,
        inputs=inputs,
        accuracy=functools.partial(study.accuracy, seed=p.seed),
    )


def sensors(p: SimpleNamespace, out: Path, half: str) -> Tensor:
    """The sensor of each test image, 0 or 1; empty at the `paper` profile, where it is not known."""
    if p.profile != "pocket":
        return torch.zeros(0, dtype=torch.long)
    return study.sensors(TASK, str(out / "data"), p.seed, f"test {half}")


def probe(p: SimpleNamespace, out: Path) -> pd.DataFrame:
    """How well each frozen model's feature predicts the sensor, and how large the sensors' difference in it is.

    "read (%)": accuracy of a logistic regression fitted on the training images, on test images. "gap": root mean square
    of the difference between the sensors' mean features.
    """
    root, rows = str(out / "data"), []
    kinds = {"domain": "of this domain", "other": "of the other domain", "untrained": "untrained"}
    for task in study.TASKS:
        pocket.write(study_root(root, p.seed), task, p.seed)
        for what, name in (kinds | {"CLIP, scaled": "CLIP"}).items():
            parts = ("train", "test base", "test novel")
            few, *tested = (study.features(what, task, root, p.seed, part) for part in parts)
            known, *truth = (study.sensors(task, root, p.seed, part) for part in parts)
            features, true = torch.cat(tested), torch.cat(truth)
            gap = (features[true == 1].mean(0) - features[true == 0].mean(0)).square().mean().sqrt().item()
            read = 100 * domain_mae.probe(few, known.numpy(), features, true.numpy())
            rows.append({"domain": task, "model": name, "read (%)": read, "gap": gap})
    frame = pd.DataFrame(rows).set_index(["domain", "model"])
    for task in study.TASKS:
        found = frame.loc[task]
        check_range(f"{task}, sensor read from CLIP (%)", found.loc["CLIP", "read (%)"], 35, 65)
        check_range(f"{task}, read from the model of this domain (%)", found.loc["of this domain", "read (%)"], low=97)
        rest = max(found.loc["of the other domain", "gap"], found.loc["untrained", "gap"])
        check_range(f"{task}, its gap over the larger of the others", found.loc["of this domain", "gap"] / rest, low=2)
    return frame.reset_index()


def results(
    p: SimpleNamespace, out: Path, models: Mapping[str, PromptedCLIP], found: Setting, scored: Mapping[str, dict]
) -> pd.DataFrame:
    """The live run's scores; at the `paper` profile they are added to `measured.csv`."""
    frame = pd.DataFrame([{"method": name} | values for name, values in scored.items()])
    rates = found.learning_rates
    frame["learning rate"] = [f"{rates[name]:g}" if name in rates else "–" for name in frame.method]
    frame["trainable parameters"] = [f"{models[n].count():,}" if n in rates else "0" for n in frame.method]
    if p.profile == "pocket":
        for name, (low, high) in EXPECTED.items():
            check_range(f"{name}, HM (%)", scored[name]["HM"], low, high)
    elif not p.dry_run:
        recipe.RESULTS.measured(out / "measured.csv", *recipe.rows(p, scored[p.method]))
    return frame


def by_sensor(p: SimpleNamespace, out: Path, models: Mapping[str, PromptedCLIP], found: Setting) -> pd.DataFrame:
    """Accuracy of the live models on the images of each sensor, base and novel classes apart, in percent."""
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {"method": name}
        for half, classes in found.test_classes.items():
            known = sensors(p, out, half)
            right = study.hits(model, found.inputs(name, half), classes, p.seed)
            for sensor, label in enumerate(study.SENSORS if len(known) else ()):
                row[f"{half}, {label}"] = 100 * float(right[known == sensor].mean())
        model.set_classes(found.classes)
        rows.append(row)
    return pd.DataFrame(rows)


def _tested(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()


def study_table(rows: pd.DataFrame, methods: Sequence[str], columns: Sequence[str], against: str = "") -> pd.DataFrame:
    """Methods on the domains that they were run on: test scores over seeds, learning rate, trainable parameters.

    Args:
        against: a method, see `ablations.spreads`.
    """
    table = ablations.spreads(rows[rows.method.isin(methods)], columns, against).set_index(["task", "method"])
    parameters = rows[rows.stage == "test"].groupby(["task", "method"]).trained.first()
    table["trainable parameters"] = parameters.map("{:,.0f}".format)
    order = [(task, method) for task in study.TASKS for method in methods if (task, method) in table.index]
    return table.loc[order].rename_axis(["domain", "method"]).reset_index()


def lottery(rows: pd.DataFrame) -> pd.DataFrame:
    """HM and, in brackets, the last training loss of each seed, with an untrained and with the other domain's model."""
    found = _tested(rows).loc[(slice(None), [UNTRAINED_MODEL, OTHER]), :]
    cells = [f"{hm:.1f} ({loss:.2f})" for hm, loss in zip(found.HM, found.loss, strict=True)]
    return pd.Series(cells, found.index).unstack("seed").rename(columns="seed {}".format).reset_index()


def rescaled(out: Path, rows: pd.DataFrame) -> tuple[str, str, int, float, float]:
    """The poorest training of `lottery`, repeated with its domain feature standardised.

    Returns domain, method and seed, HM in the ablations, and HM of this training.
    """
    root = str(out / "data")
    scores = _tested(rows).loc[(slice(None), [UNTRAINED_MODEL, OTHER]), "HM"]
    task, method, seed = scores.idxmin()
    seed = int(seed)
    pocket.write(study_root(root, seed), task, seed)
    given = {part: study.inputs(method, task, root, seed, part) for part in ("train", "test base", "test novel")}
    feature = given["train"].tensors[-1]
    centre, scale = feature.mean(0), feature.std(0)
    standardised = {k: TensorDataset(*d.tensors[:2], (d.tensors[2] - centre) / scale) for k, d in given.items()}
    classes = {part: study.images(task, root, seed, part)[2] for part in given}
    model = study.build(method, classes["train"], seed, feature.shape[1])
    study.train_model(model, standardised["train"], ablations.selected(rows)[task, method], seed=seed, name=method)
    found = [study.accuracy(model, standardised[k], classes[k], seed) for k in ("test base", "test novel")]
    return task, method, seed, float(scores.min()), fewshot.harmonic_mean(*found)


# --- the live DPLQ, taken apart ---------------------------------------------------------------------------------------


@torch.inference_mode()
def judged(
    model: DPLQ,
    found: Setting,
    feature_of: Callable[[str], Tensor],
    change: Callable[[Prompts, Prompts], Prompts] | None = None,
) -> float:
    """HM of a DPLQ without noise in percent, with other features, or other prompts.

    Args:
        feature_of: from a test set's name to the domain features of its images.
        change: from the prompts of these features and those of the mean feature to the prompts used.
    """
    overall = torch.cat([found.inputs("DPLQ", half).tensors[2] for half in found.test_classes]).mean(0)
    accuracies = {}
    for half, classes in found.test_classes.items():
        images, labels, own = found.inputs("DPLQ", half).tensors
        model.set_classes(classes)
        none = torch.zeros(len(images), model.ctx.shape[1])
        prompts = model.prompts(feature_of(half), none)
        if change:
            prompts = change(prompts, model.prompts(overall.expand_as(own), none))
        predicted = similarity(model.clip, *model.encode(images, prompts)).argmax(-1)
        accuracies[half] = 100 * float((predicted == labels).double().mean())
    model.set_classes(found.classes)
    return fewshot.harmonic_mean(accuracies["base"], accuracies["novel"])


def taken_apart(p: SimpleNamespace, out: Path, model: DPLQ, found: Setting) -> tuple[pd.DataFrame, float, float]:
    """HM with each image's own feature, with its sensor's mean, with others, and with one encoder conditioned.

    Also the share (%) of the variance of the bias in its first direction, and the correlation of that direction with
    the sensor.
    """
    own = {half: found.inputs("DPLQ", half).tensors[2] for half in found.test_classes}
    known = {half: sensors(p, out, half) for half in found.test_classes}
    every, side = torch.cat(list(own.values())), torch.cat(list(known.values()))
    overall, mean = every.mean(0), torch.stack([every[side == i].mean(0) for i in (0, 1)])
    with torch.no_grad():
        bias = model.meta_net(every)
    along, strength, _ = torch.linalg.svd(bias - bias.mean(0), full_matrices=False)
    share = 100 * float(strength[0] ** 2 / strength.square().sum())
    correlation = float(abs(np.corrcoef(along[:, 0], side)[0, 1]))
    trials = {
        "its own": judged(model, found, own.__getitem__),
        "the mean of its sensor": judged(model, found, lambda half: mean[known[half]]),
        "the mean of the other sensor": judged(model, found, lambda half: mean[1 - known[half]]),
        "the mean of all images": judged(model, found, lambda half: overall.expand_as(own[half])),
        "its own, text encoder only": judged(
            model, found, own.__getitem__, lambda a, b: a._replace(deep_image=b.deep_image)
        ),
        "its own, image encoder only": judged(
            model, found, own.__getitem__, lambda a, b: a._replace(context=b.context)
        ),
    }
    frame = pd.DataFrame({"domain feature of an image": trials.keys(), "HM (%)": trials.values()})
    return frame, share, correlation


@dataclass(frozen=True)
class Shown:
    """Test images of the figures, and what the model makes of them.

    Attributes:
        images, labels: (n, 3, H, W), (n,).
        sensors: (n,), 0 or 1; zeros where the sensor is not known.
        feature: (n, F), the domain feature.
        prompts: without noise.
        texts: (n, C, E), text features made for each image; unbiased: (C, E), those without the bias.
        classes: C names.
    """

    images: Tensor
    labels: Tensor
    sensors: Tensor
    feature: Tensor
    prompts: Prompts
    texts: Tensor
    unbiased: Tensor
    classes: tuple[str, ...]


def drawn_model(p: SimpleNamespace, models: Mapping[str, PromptedCLIP], found: Setting) -> DPLQ:
    """The trained DPLQ; where a baseline was trained, an untrained DPLQ on its CLIP, and a printed note."""
    model = models.get("DPLQ")
    if isinstance(model, DPLQ):
        return model.eval()
    print("no DPLQ was trained in this run: the figures show untrained prompts")
    other = next(iter(models.values()))
    depth = int(recipe.published_settings(p.protocol)["prompt depth"])
    feature = dplq.domain_model("clip", clip=other.clip)
    return DPLQ(other.clip, found.classes, other.tokenizer, feature, depth=depth).eval()


@torch.inference_mode()
def shown(p: SimpleNamespace, out: Path, model: DPLQ, found: Setting, half: str) -> Shown:
    """Every eighth of the first 320 test images; at the `paper` profile the first six."""
    count, step = (320, 8) if p.profile == "pocket" else (6, 1)
    name = "DPLQ" if "DPLQ" in found.trainings else next(iter(found.trainings))
    images, labels, *feature = (x[::step] for x in found.items(name, half, count))
    model.set_classes(found.test_classes[half])
    known = sensors(p, out, half)
    side = known[:count:step] if len(known) else torch.zeros(len(images), dtype=torch.long)
    domain = feature[0] if feature else model.domain_features(images)
    prompts = model.prompts(domain, torch.zeros(len(images), model.ctx.shape[1]))
    _, texts = model.encode(images, prompts)
    context = model.mixed(model.mix_text, model.ctx, torch.zeros_like(model.ctx))
    unbiased = encode_text(model.clip, model.prompted(context), model.ends, model.deep_text)
    return Shown(images, labels, side, domain, prompts, texts, unbiased, found.test_classes[half])


def class_colours(classes: Sequence[str]) -> Sequence[str]:
    """A shade of the colour that each class name begins with; where one has none left, the colours of the style."""
    left = {colour: iter(shades) for colour, shades in SHADES.items()}
    found = [next(left.get(name.partition(" ")[0], iter(())), "") for name in classes[:8]]
    return found if all(found) else COLOURS


@torch.inference_mode()
def prompt_attention(
    model: DPLQ, shown: Shown, picked: Tensor, partner: Tensor
) -> tuple[dict[str, Tensor], dict[str, list[float]], float]:
    """Attention of the prompt tokens in the last prompted block, and of the [CLS] token to the prompts in each block.

    With the domain feature of the images `picked`, and with that of `partner`.

    Returns maps (n, rows, columns) by prompt and feature, shares by feature, and the share of uniform attention.
    """
    tokens, grid = len(model.ctx), tuple(model.clip.visual.grid_size)
    maps, shares = {}, {}
    for name, which in (("own feature", picked), ("other sensor's", partner)):
        with Recorder(model.clip.visual) as record:
            none = torch.zeros(len(picked), model.ctx.shape[1])
            model.encode(shown.images[picked], model.prompts(shown.feature[which], none))
        for k in range(tokens):
            row = record.maps[len(model.deep_text)].mean(1)[:, -tokens + k, 1:-tokens]
            maps[f"prompt {k + 1}, {name}"] = row.unflatten(-1, grid)
        shares[name] = [float(weights.mean(1)[:, 0, -tokens:].sum(-1).mean()) for weights in record.maps]
    return maps, shares, tokens / (1 + tokens + grid[0] * grid[1])


def pairs(shown: Shown, each: int = 3) -> tuple[Tensor, Tensor]:
    """Indices of up to `each` images of each sensor, and for each an image of the other sensor."""
    taken = [torch.nonzero(shown.sensors == i)[:, 0] for i in (0, 1)]
    picked = torch.cat([x[torch.linspace(0, len(x) - 1, min(each, len(x))).long()] for x in taken if len(x)])
    return picked, picked.flip(0)


def halves(model: DPLQ, shown: Shown) -> pd.DataFrame:
    """Cosine of the two halves of P_l + β in each layer, which the authors' code logs; mean and std over images."""
    total = model.deep_text.detach()[:, None] + shown.prompts.bias[:, None]  # (J - 1, b, n, Wt)
    cosine = F.cosine_similarity(*total.chunk(2, -1), dim=-1).flatten(1)  # of the components j and k
    return pd.DataFrame(
        {
            "layer": range(1, len(cosine) + 1),
            "cosine of the halves": cosine.mean(1).tolist(),
            "std": cosine.std(1).tolist(),
            "std of random directions": (model.deep_text.shape[-1] / 2) ** -0.5,
            "norm of P": model.deep_text.detach().norm(dim=-1).mean(1).tolist(),
            "norm of β": shown.prompts.bias.norm(dim=-1).mean().item(),
        }
    )


def reasons(rows: pd.DataFrame) -> dict[str, str]:
    """Why claims fail, by claim, with counts from the rows of the ablations."""
    tested = _tested(rows).HM

    def ahead(other: str) -> str:
        won = {task: int((tested[task, "DPLQ"] > tested[task, other]).sum()) for task in study.TASKS}
        return "ahead with " + " and ".join(f"{count} seeds on {task}" for task, count in won.items())

    return {
        "over-untrained": "the sensors' lines never move, so the feature of a random network encodes the sensor too, "
        f"at a smaller scale; where training uses it the result is as good (appendix): {ahead(UNTRAINED_MODEL)}",
        "over-other": f"the other domain's model encodes the sensor too, at a smaller scale: {ahead(OTHER)}",
        "quaternions": "one direction of β is enough here, and either kind of layer passes it on: "
        f"{ahead('DPLQ, real layers')}",
    }
