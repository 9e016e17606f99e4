"""Tables and figures of SIC-CADS' notebook: boxes before and after refinement, image-level scores, gamma."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms
from torchvision.utils import draw_bounding_boxes

from ...data.detection import Boxes
from ...viz import plots
from .model import windows
from .predictions import BRANCHES, Predictions, recognition

BASE, NOVEL, CORRECT, WRONG = "white", "#D55E00", "#00803c", "#c00000"  # colours of boxes
GAMMA = "γ (synthetic test images)"


def _boxed(image: Tensor, boxes: Tensor, colours: list[str], labels: list[str] | None = None) -> Tensor:
    """An image (3, H, W), uint8, enlarged, with boxes (n, 4) drawn into its pixels: (3, h, w) in 0 to 1.

    With `labels` a white margin on the right holds what does not fit into the image.
    """
    scale = max(1, 480 // image.shape[-1])
    large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    large = F.pad(large, (0, large.shape[-1] // 5 if labels else 0), value=255)
    text: dict[str, Any] = {
        "font": findfont("DejaVu Sans"),
        "font_size": large.shape[-1] // 20,
        "label_colors": "white",
    }
    text |= {"fill_labels": True, "label_background_colors": colours} if labels else {}
    return draw_bounding_boxes(large, scale * boxes, labels, colours, width=4, **text) / 255


def _present(test: Boxes, images: Iterable[int]) -> list[str]:
    """The names of the classes in each image, at most four."""
    return [", ".join(test.class_names[i] for i in test.target(index).labels[:4]) for index in images]


def scenes(test: Boxes, title: str, count: int = 6) -> Figure:
    """The first test images with their boxes, of base classes in white, of novel classes in orange."""
    drawn, images, novel = [], range(min(count, len(test))), test.mask(test.novel)
    for image, target in (test[index] for index in images):
        drawn.append(_boxed(image, target.boxes, [NOVEL if novel[i] else BASE for i in target.labels]))
    title += ": test images; boxes of base classes white, of novel classes orange"
    return plots.image_rows({"": drawn}, _present(test, images), side=1.35, title=title)


def scores(methods: Mapping[str, tuple[Predictions, str]]) -> pd.DataFrame:
    """mAP of the image-level scores alone and AP50 of the detector refined by them, in percent, a row a method.

    Args:
        methods: name -> predictions and branch, "" for the detector alone.
    """
    rows = []
    for name, (outputs, branch) in methods.items():
        alone = recognition(outputs.test, outputs.scores[branch]) if branch else {}
        row: dict[str, Any] = {"method": name}
        row |= {f"mAP {group}": alone.get(group, float("nan")) for group in ("novel", "base")}
        rows.append(row | {f"AP50 {group}": value for group, value in outputs.ap50(branch).items()})
    return pd.DataFrame(rows)


def most_refined(outputs: Predictions, count: int) -> list[int]:
    """The images where refinement corrects the class of most novel objects, less the objects that it spoils."""
    gain = []
    for index, boxes in enumerate(outputs.boxes[: len(outputs.probabilities)]):
        target = outputs.test.target(index)
        best = box_iou(target.boxes, boxes).argmax(1)
        before, after = (outputs.refined(index, gamma=g)[best].argmax(1) == target.labels for g in (0.0, None))
        gain.append(int((outputs.novel[target.labels] & after & ~before).sum()) - int((before & ~after).sum()))
    best_first = np.argsort(-np.array(gain), kind="stable").tolist()
    return (best_first * count)[:count]


def image_scores(outputs: Predictions, index: int, branches: Sequence[str]) -> Figure:
    """The image-level probabilities of one image by branch, the 16 highest classes by the branch that refines."""
    order = outputs.scores[outputs.branch][index].argsort(descending=True)[:16].tolist()
    present = set(outputs.test.target(index).labels.tolist())
    marks = [
        ("• " if i in present else "") + outputs.names[i] + (" (novel)" if outputs.novel[i] else "") for i in order
    ]
    table = pd.DataFrame([100 * outputs.scores[name][index][order].numpy() for name in branches], [*branches], marks)
    return plots.heat_table(table, "image-level probability (%)", (0, 100), title=f"{outputs.title}; •: present")


def patch_cosines(outputs: Predictions, index: int, cosines: Tensor) -> Figure:
    """CLIP's crops of an image, and above each its cosines (P, C) with the classes that are present.

    A star marks the largest of a class at level 1.
    """
    image, target = outputs.test[index]
    labels = sorted(set(target.labels.tolist()))[:6]
    best, crops, titles = cosines[1:].argmax(0) + 1, [], []
    height, width = image.shape[1:]
    for number, (left, top, right, bottom) in enumerate(windows(height, width)):
        values = (f"{outputs.names[i]} {cosines[number, i]:.2f}" + "*" * int(best[i] == number) for i in labels)
        titles.append(("whole image: " if number == 0 else f"crop {number}: ") + ", ".join(values))
        crops.append(image[:, top:bottom, left:right] / 255)
    return plots.image_rows({"": crops}, titles, side=1.5, title=f"{outputs.title}; *: largest of the four crops")


def best_boxes(outputs: Predictions, index: int, gamma: float) -> Tensor:
    """An image with its best boxes, as many as it has objects; in red, with a cross, those of a wrong class."""
    image, target = outputs.test[index]
    scores, labels = outputs.refined(index, gamma=gamma).max(1)
    rows = nms(outputs.boxes[index], scores, 0.3)[: len(target.labels)]
    names, colours = [], []
    for row in rows:
        same = target.boxes[target.labels == labels[row]]
        correct = len(same) > 0 and bool(box_iou(outputs.boxes[index][row, None], same).max() >= 0.5)
        names.append(f"{outputs.names[labels[row]]} {scores[row]:.2f}{'' if correct else ' ✗'}")
        colours.append(CORRECT if correct else WRONG)
    return _boxed(image, outputs.boxes[index][rows], colours, names)


def frame(outputs: Predictions, index: int, gamma: float) -> Tensor:
    """`best_boxes` as a small image (h, w, 3) in 0 to 1, for a control."""
    drawn = best_boxes(outputs, index, gamma)
    return F.avg_pool2d(drawn, max(1, max(drawn.shape) // 256)).movedim(0, -1)


def before_after(outputs: Predictions, images: Sequence[int]) -> Figure:
    """The best boxes of some images, above by the detector alone, below refined."""
    gammas = {"detector alone": 0.0, f"refined, γ = {outputs.gamma:g}": outputs.gamma}
    rows = {name: [best_boxes(outputs, i, gamma) for i in images] for name, gamma in gammas.items()}
    title = f"{outputs.title}; above each column the classes that are present"
    return plots.image_rows(rows, _present(outputs.test, images), side=2.1, title=title)


# --- the study --------------------------------------------------------------------------------------------------------


def _sweep(rows: pd.DataFrame, group: str) -> pd.DataFrame:
    """AP50 of a group of classes, a row a seed, a column for each gamma."""
    swept = rows.filter(like=f"{group}, gamma ")
    return swept.set_axis([float(column.rpartition(" ")[2]) for column in swept], axis=1)


def gamma_curves(rows: pd.DataFrame) -> Figure:
    """AP50 against gamma for each branch, mean and range over the seeds; dotted: the released values.

    Args:
        rows: of the study.
    """
    tested, histories = rows[(rows.stage == "test") & (rows.task == "shipped detector")], {}
    for method in BRANCHES:
        novel, base = (_sweep(tested[tested.method == method], group) for group in ("novel", "base"))
        histories[method] = {GAMMA: novel.columns, "AP50 of novel classes (%)": novel, "AP50 of base classes (%)": base}
    figure = plots.curves(histories, GAMMA)
    for ax, limits in zip(figure.axes, ((35, 85), (85, 97)), strict=True):
        ax.set_ylim(*limits)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        for value in (0.5, 0.7):
            ax.axvline(value, color="grey", linewidth=0.9, linestyle=":")
    return figure


def largest_lossless(rows: pd.DataFrame) -> float:
    """The largest gamma up to which SIC-CADS lowers AP50 of base classes with no seed of the study."""
    tested = rows[(rows.stage == "test") & (rows.task == "shipped detector") & (rows.method == "SIC-CADS")]
    swept = _sweep(tested, "base")
    lossless = swept.ge(swept[0.0], axis=0).all()
    return float(lossless[lossless.cummin()].index.max())
