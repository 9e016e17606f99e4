"""The figures of SIC-CADS' notebook: boxes before and after refinement, image-level scores, sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms
from torchvision.utils import draw_bounding_boxes

from ...viz import plots
from .model import windows
from .predictions import BRANCHES, Predictions, Setting, refined

BASE, NOVEL, CORRECT, WRONG = "white", "#D55E00", "#00803c", "#c00000"  # colours of boxes
GAMMA, LAMBDA = "γ (synthetic test images)", "λ (synthetic test images)"


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


def _present(setting: Setting, images: Iterable[int]) -> list[str]:
    """The names of the classes in each image, at most four."""
    return [", ".join(setting.names[i] for i in setting.test.target(index).labels[:4]) for index in images]


def scenes(setting: Setting, count: int = 6) -> Figure:
    """The first test images with their boxes, of base classes in white, of novel classes in orange."""
    drawn, images = [], range(min(count, len(setting.test)))
    for image, target in (setting.test[index] for index in images):
        drawn.append(_boxed(image, target.boxes, [NOVEL if setting.novel[i] else BASE for i in target.labels]))
    title = f"{setting.title}: test images; boxes of base classes white, of novel classes orange"
    return plots.image_rows({"": drawn}, _present(setting, images), side=1.35, title=title)


def image_scores(setting: Setting, outputs: Predictions, index: int, branches: Sequence[str], most: int = 16) -> Figure:
    """The image-level probabilities of one image by branch, the classes in order of the setting's branch."""
    order = outputs.p[setting.branch][index].argsort(descending=True)[:most].tolist()
    present = set(setting.test.target(index).labels.tolist())
    marks = [
        ("• " if i in present else "") + setting.names[i] + (" (novel)" if setting.novel[i] else "") for i in order
    ]
    table = pd.DataFrame([100 * outputs.p[name][index][order].numpy() for name in branches], [*branches], marks)
    return plots.heat_table(table, "image-level probability (%)", (0, 100), title=f"{setting.title}; •: present")


def patch_cosines(setting: Setting, index: int, cosines: Tensor, levels: int = 2) -> Figure:
    """CLIP's crops of an image, and above each its cosines (P, C) with the classes that are present.

    A star marks the largest of a class at level 1.
    """
    image, target = setting.test[index]
    labels = sorted(set(target.labels.tolist()))[:6]
    best, crops, titles = cosines[1:].argmax(0) + 1, [], []
    height, width = image.shape[1:]
    for number, (left, top, right, bottom) in enumerate(windows(height, width, levels)):
        values = (f"{setting.names[i]} {cosines[number, i]:.2f}" + "*" * int(best[i] == number) for i in labels)
        titles.append(("whole image: " if number == 0 else f"crop {number}: ") + ", ".join(values))
        crops.append(image[:, top:bottom, left:right] / 255)
    return plots.image_rows({"": crops}, titles, side=1.5, title=f"{setting.title}; *: largest of the four crops")


def _best_boxes(setting: Setting, outputs: Predictions, index: int, gamma: float) -> Tensor:
    """An image with its best boxes, as many as it has objects; in red, with a cross, those of a wrong class."""
    image, target = setting.test[index]
    scores, labels = refined(setting, outputs, index, gamma=gamma).max(1)
    rows = nms(outputs.boxes[index], scores, 0.3)[: len(target.labels)]
    names, colours = [], []
    for row in rows:
        same = target.boxes[target.labels == labels[row]]
        correct = len(same) > 0 and bool(box_iou(outputs.boxes[index][row, None], same).max() >= 0.5)
        names.append(f"{setting.names[labels[row]]} {scores[row]:.2f}{'' if correct else ' ✗'}")
        colours.append(CORRECT if correct else WRONG)
    return _boxed(image, outputs.boxes[index][rows], colours, names)


def before_after(setting: Setting, outputs: Predictions, images: Sequence[int]) -> Figure:
    """The best boxes of some images, above by the detector alone, below refined."""
    gammas = {"detector alone": 0.0, f"refined, γ = {setting.gamma:g}": setting.gamma}
    rows = {name: [_best_boxes(setting, outputs, i, gamma) for i in images] for name, gamma in gammas.items()}
    title = f"{setting.title}; above each column the classes that are present"
    return plots.image_rows(rows, _present(setting, images), side=2.1, title=title)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _sweep(rows: pd.DataFrame, group: str, name: str) -> pd.DataFrame:
    """AP50 of a group of classes, a row a seed, a column for each value of a swept parameter."""
    swept = rows.filter(like=f"{group}, {name} ")
    return swept.set_axis([float(column.rpartition(" ")[2]) for column in swept], axis=1)


def _curves(histories: Mapping[str, Mapping[str, Any]], x: str, released: Mapping[int, Sequence[float]]) -> Figure:
    """`plots.curves`, with ticks at fractions and dotted lines at the released values of each panel."""
    figure = plots.curves(histories, x)
    for panel, values in released.items():
        figure.axes[panel].xaxis.set_major_locator(MaxNLocator(6))
        for value in values:
            figure.axes[panel].axvline(value, color="grey", linewidth=0.9, linestyle=":")
    return figure


def gamma_curves(rows: pd.DataFrame) -> Figure:
    """AP50 against gamma for each branch, mean and range over the seeds; dotted: the released values.

    Args:
        rows: the test rows of the study, of one task.
    """
    histories = {}
    for method in BRANCHES:
        novel, base = (_sweep(rows[rows.method == method], group, "gamma") for group in ("novel", "base"))
        histories[method] = {GAMMA: novel.columns, "AP50 of novel classes (%)": novel, "AP50 of base classes (%)": base}
    figure = _curves(histories, GAMMA, {0: (0.5, 0.7), 1: (0.5, 0.7)})
    for ax, limits in zip(figure.axes, ((35, 85), (85, 97)), strict=True):
        ax.set_ylim(*limits)
    return figure


def lambda_curves(rows: pd.DataFrame) -> Figure:
    """The gain of AP50 against each lambda, mean and range over the seeds; dotted: the released values.

    Args:
        rows: the test rows of SIC-CADS in the study, of one task.
    """
    histories = {}
    for group in ("novel", "base"):
        base, novel = (
            _sweep(rows, group, name).sub(rows[f"{group}, gamma 0.0"], axis=0)
            for name in ("lambda_base", "lambda_novel")
        )
        histories[f"{group} classes"] = {
            LAMBDA: base.columns,
            r"gain (points) by $\lambda_B$": base,
            r"gain (points) by $\lambda_N$": novel,
        }
    return _curves(histories, LAMBDA, {0: (0.8,), 1: (0.5, 0.8)})
