"""SIC-CADS: what the notebook trains live, at toy scale or with the published settings, and its tables."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from ...evaluation.claims import check_range
from ...evaluation.metrics.detection import evaluate
from ...models.sic_cads import detectors, predictions, recipe
from ...ops.files import write_json
from ...ops.recorded import recorded
from ...training.fit import History
from ..ablations import sic_cads as ablation
from ..ablations import study_root
from ..datasets import detection as synthetic
from ..encoders import detector as encoders

TASK, METHOD = "shipped detector", "SIC-CADS"
GROUPS = {  # of the bar charts: label -> task, metric
    "scores": {
        f"{task}, {group} classes": (task, f"AP50 {group}") for task in ablation.TASKS for group in ("novel", "base")
    },
    "correct": {
        f"{group}, {look}": (TASK, f"right {group} {look}") for group in ("base", "novel") for look in synthetic.LOOKS
    },
}


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> predictions.Setting:
    """The setting of the notebook's parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root, learning_rate = str(out / "data"), learning_rates[TASK, METHOD]
    synthetic.write(study_root(root, p.seed), p.seed)

    def train(**changes: Any) -> tuple[ablation.MLR, History]:
        model = ablation.build(TASK, p.seed)
        data = ablation.training_data(model, *ablation.images_of(root, p.seed, "train"))
        history = ablation.train_model(model, data, learning_rate, p.seed, **changes)
        return model.eval(), history

    return predictions.Setting(
        title="synthetic scenes",
        test=ablation.images_of(root, p.seed, "test")[0],
        build=functools.partial(ablation.build, TASK, p.seed),
        train=train,
        detect=lambda image: detect(image)[:2],
        branch=p.branch,
        gamma=p.gamma or ablation.GAMMA,
        threshold=ablation.THRESHOLD,
        nms=ablation.NMS,
        top=ablation.TOP,
    )


def detect(image: Tensor) -> detectors.Output:
    """All boxes of the shipped detector for an image (3, 64, 64), uint8, with the probabilities of all classes."""
    clip, detector = ablation.foundation(TASK, 0)
    boxes, probabilities = detector(ablation.pixels(image[None]), encoders.texts(clip))
    return detectors.Output(boxes[0], probabilities[0], (image.shape[1], image.shape[2]))


# --- one's own data ---------------------------------------------------------------------------------------------------


def example_folder(folder: Path, count: int = 96) -> Path:
    """`folder` with `count` synthetic images and `annotations.json`, the boxes of base classes in COCO's format."""
    drawn = synthetic.scenes(count, "train", seed=7)
    found = synthetic.annotation_file("train", drawn)
    write_json(folder / "annotations.json", found)
    for entry, scene in zip(found["images"], drawn, strict=True):
        Image.fromarray(scene.image).save(folder / entry["file_name"])
    return folder


@recorded()
def body() -> nn.Module:
    """The recogniser's small CNN with random weights, as a body that `companion.save` can record."""
    return encoders.Stages()


@recorded()
def clip() -> nn.Module:
    """The shipped CLIP of the synthetic scenes, as a teacher that `companion.save` can record."""
    return encoders.clip()


def recogniser(text: Tensor, novel: Tensor, teacher: nn.Module) -> ablation.MLR:
    """The recogniser at toy scale for a vocabulary of one's own, see `MLR`."""
    return ablation.MLR(body(), text, novel, ablation.SETTINGS, teacher=teacher)


# --- the live run -----------------------------------------------------------------------------------------------------


def meaningful(p: SimpleNamespace, history: History, found: predictions.Predictions) -> list[str]:
    """The branches whose scores come from trained weights: without a training CLIP's own alone."""
    return [name for name in found.p if history or p.checkpoint or name == "visual+"]


def scores(setting: predictions.Setting, found: predictions.Predictions, branches: Sequence[str]) -> pd.DataFrame:
    """mAP of the image-level scores alone, and AP50 of the detector refined by them, a row for each branch."""
    rows = []
    for name in ("", *branches):
        boxes = predictions.ap50(setting, found, name)
        row: dict[str, Any] = {"image-level scores": name or "none: the detector alone"}
        if name:
            alone = predictions.recognition(setting.test, found.p[name])
            row |= {f"mAP {group}": alone[group] for group in ("novel", "base")}
        rows.append(row | {f"AP50 {group}": value for group, value in boxes.items()})
    columns = ["image-level scores", "mAP novel", "mAP base", "AP50 novel", "AP50 base", "AP50 all"]
    return pd.DataFrame(rows, columns=columns)


def check(p: SimpleNamespace, out: Path, setting: predictions.Setting, found: predictions.Predictions) -> None:
    """Check that the scores at toy scale are in their expected ranges; add those on real data to `out`/measured.csv."""
    if p.profile == "pocket":
        alone, ours = predictions.ap50(setting, found, ""), predictions.ap50(setting, found, setting.branch)
        check_range("detector alone, AP50 novel (%)", alone["novel"], 35, 75)
        check_range("gain of AP50 novel (points)", ours["novel"] - alone["novel"], 4, 30)
        check_range("gain of AP50 base (points)", ours["base"] - alone["base"], -2, 5)
    elif not p.dry_run:
        recipe.record(out / "measured.csv", p, setting, found)


def most_refined(setting: predictions.Setting, found: predictions.Predictions, count: int) -> list[int]:
    """The images where refinement corrects the class of most novel objects, less the objects that it spoils."""
    gain = []
    for index, boxes in enumerate(found.boxes[: len(found.probabilities)]):
        target = setting.test.target(index)
        best = box_iou(target.boxes, boxes).argmax(1)
        before, after = (
            predictions.refined(setting, found, index, gamma=gamma)[best].argmax(1) == target.labels
            for gamma in (0.0, None)
        )
        gain.append(int((setting.novel[target.labels] & after & ~before).sum()) - int((before & ~after).sum()))
    best_first = np.argsort(-np.array(gain), kind="stable").tolist()
    return (best_first * count)[:count]


def measured(out: Path) -> dict[str, pd.DataFrame]:
    """The paper's tables of results by title, those in which something was measured on real data."""
    tables = recipe.RESULTS.tables(recipe.RESULTS.measured(out / "measured.csv"))
    return {title: frame for title, frame in tables.items() if (frame["measured here"] != "not run").any()}


# --- diagnostics ------------------------------------------------------------------------------------------------------


def lookalikes(setting: predictions.Setting, found: predictions.Predictions) -> pd.DataFrame:
    """How novel objects are mistaken for the base class that they look like, a row for each look.

    The share of objects that the detector alone assigns to their own class and to the look-alike, and medians: how many
    times likelier the detector finds the look-alike, and the image-level scores the object's own class. Without rows on
    data that have no look-alikes.
    """
    columns = ["look", "objects", "own class (%)", "look-alike (%)", "detector: look-alike / own"]
    columns += ["SIC-CADS: own / look-alike", "visual+: own / look-alike"]
    rows = []
    for index, boxes in enumerate(found.boxes if "look" in setting.test.truth["annotations"][0] else ()):
        target = setting.test.target(index)
        best = box_iou(target.boxes, boxes).argmax(1)
        looks = [a["look"] for a in setting.test.truth["annotations"] if a["image_id"] == target.image_id]
        for row, label, look in zip(best.tolist(), target.labels.tolist(), looks, strict=True):
            if like := synthetic.THINGS[label].like:
                other, own = synthetic.CLASSES.index(like), found.probabilities[index][row]
                predicted = 100.0 * (own.argmax() == label).item(), 100.0 * (own.argmax() == other).item()
                ratios = [(p[label] / p[other]).item() for p in (found.p[b][index] for b in (METHOD, "visual+"))]
                rows.append((look, 1, *predicted, (own[other] / own[label]).item(), *ratios))
    kinds = dict(zip(columns[1:], ["sum", "mean", "mean", *["median"] * 3], strict=True))
    groups = pd.DataFrame(rows, columns=columns).groupby("look", sort=False)
    return groups.agg(kinds).reindex([look for look in synthetic.LOOKS if look in groups.groups]).reset_index()


def above_threshold(setting: predictions.Setting, found: predictions.Predictions, most: int = 100) -> pd.DataFrame:
    """The mean number of (box, class) scores of an image above the detectors' own and the released thresholds."""
    thresholds = (0.02, 0.05, 0.15, 0.2)
    table: dict[str, list] = {"threshold": [f"{low:g}" for low in thresholds]}
    for name, gamma in (("detector alone", 0.0), ("refined, gamma 0.5", 0.5)):
        each = [predictions.refined(setting, found, i, gamma=gamma) for i in range(min(most, len(found.probabilities)))]
        table[name] = [float(np.mean([(matrix > low).sum() for matrix in each])) for low in thresholds]
    return pd.DataFrame(table)


def limits(results: Sequence[Mapping]) -> dict[str, float]:
    """What was removed from the results and cannot be recovered by refinement.

    Returns:
        "lowest score": a threshold. "most rows an image": a top-k, when "images with that many" (%) is not small.
        "boxes with one class" (%): at 100 the other classes of each box were dropped, so refinement can lower the score
        of a box but not change its class.
    """
    counts = Counter(row["image_id"] for row in results)
    boxes = Counter((row["image_id"], *map(float, row["bbox"])) for row in results)
    most = max(counts.values())
    return {
        "lowest score": min(row["score"] for row in results),
        "most rows an image": most,
        "images with that many": 100 * float(np.mean([n == most for n in counts.values()])),
        "boxes with one class": 100 * float(np.mean([n == 1 for n in boxes.values()])),
    }


def finished_results(setting: predictions.Setting, found: predictions.Predictions) -> pd.DataFrame:
    """What is missing from the detector's finished results, and AP50 when they are refined, next to the full matrix."""
    finished = predictions.detections(setting, found, "")
    p = dict(zip(setting.test.image_ids, found.p[setting.branch], strict=True))
    rescaled = detectors.refine_results(finished, p, setting.test.categories, gamma=setting.gamma)
    facts: dict[str, float] = {}
    facts |= limits(finished)
    for what, given in (("as they are", finished), ("rescaled", rescaled)):
        facts[f"AP50 novel, {what}"] = evaluate(setting.test.truth, given, top=setting.top).mean(setting.test.novel)
    facts["AP50 novel, full matrix"] = predictions.ap50(setting, found, setting.branch)["novel"]
    return pd.DataFrame(facts.items(), columns=["of the finished results", "value"])


# --- the study --------------------------------------------------------------------------------------------------------


def best_gammas(rows: pd.DataFrame) -> pd.DataFrame:
    """The gammas of SIC-CADS that do best on test images, and the largest at which no seed loses on base classes.

    Args:
        rows: the test rows of SIC-CADS, of one task.
    """
    curves = {g: rows[[f"{g}, gamma {k}" for k in ablation.GAMMAS]].mean().tolist() for g in ("novel", "base")}
    lossless = [k for k in ablation.GAMMAS if (rows[f"base, gamma {k}"] >= rows["base, gamma 0.0"]).all()]
    found = {f"best gamma for {g} classes": ablation.GAMMAS[int(np.argmax(curve))] for g, curve in curves.items()}
    found["largest gamma at which no seed loses AP50 of base classes"] = max(lossless)
    return pd.DataFrame(found.items(), columns=["SIC-CADS, shipped detector", "gamma"])


def reasons(rows: pd.DataFrame) -> dict[str, str]:
    """Why claims fail, as far as the study shows it, by claim."""
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()
    scratch = tested.loc["detector from scratch"]
    ours, alone = scratch.loc[METHOD], scratch.loc["no refinement", "AP50 base"]
    odd = ours["novel gain beyond base gain"].idxmin()
    base = tested.loc[(TASK, METHOD), "base gain"]
    lossless = best_gammas(tested.loc[(TASK, METHOD)]).gamma.iloc[-1]
    chosen = rows[(rows.stage == "select") & (rows.task == TASK)].groupby(["method", "learning_rate"])["mAP base"]
    ahead = chosen.mean()["text"] - chosen.mean()["visual"]
    others = alone.drop(odd)
    return {
        "novel-more": f"with detector and CLIP from scratch, seed {odd} gains {ours['novel gain'][odd]:.1f} points on "
        f"novel and {ours['base gain'][odd]:.1f} on base classes; its detector starts at {alone[odd]:.1f} AP50 on base "
        f"classes, the others at {others.min():.1f} to {others.max():.1f}",
        "base": f"gamma {ablation.GAMMA:g} lowers it with {(base < 0).sum()} of {len(base)} seeds, by up to "
        f"{-base.min():.1f} points; up to gamma {lossless:g} no seed loses",
        "text-base": "each branch is tested at the learning rate that its own refinement selected; at equal "
        f"learning rates, on validation images, the text branch leads at {(ahead > 0).sum()} of {len(ahead)}",
        "whole-matrix": f"these finished results keep every class of a box above {ablation.FINISHED:g}, which loses "
        "little; with one class a box most is lost",
    }
