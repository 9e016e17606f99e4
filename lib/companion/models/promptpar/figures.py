"""Figures of PromptPAR: its mask, what its tokens attend to, and what its region tokens recognise."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from ...viz import plots
from ...viz.style import COLOURS, styled
from .model import Maps, PromptPAR

_VISIBLE = ListedColormap(["#e3e3e3", COLOURS[0]])  # not attended to; attended to


@styled
def mask(forbidden: Tensor, groups: int, title: str) -> Figure:
    """The attention mask of a sequence: which token (row) attends to which (column).

    Args:
        forbidden: (L, L) as `model.region_mask` returns it, of groups of equal size.
        groups: tokens of the groups together; the patches follow.
    """
    figure, ax = plt.subplots(figsize=(4.9, 3.7))
    ax.imshow(~forbidden.numpy(), cmap=_VISIBLE, interpolation="nearest")
    size, patches = groups / 5, (groups + len(forbidden)) / 2
    names = ["CLS, P₀", *(f"LC{r}, P{r}" for r in "₁₂₃₄"), "patches"]
    ax.set_yticks([*((r + 0.5) * size - 0.5 for r in range(5)), patches], names)
    ax.set_xticks([groups / 2, patches], ["groups", "patches, row by row"])
    ax.set(xlabel="key", ylabel="query", title=title)
    ax.tick_params(length=0)
    handles = [Rectangle((0, 0), 1, 1, color=_VISIBLE(i)) for i in (1, 0)]
    figure.legend(handles, ["attends", "masked"], loc="outside right center")
    return figure


def short(names: Sequence[str], width: int = 26) -> list[str]:
    """Names of attributes as labels of a figure."""
    return [textwrap.shorten(name.removeprefix("A pedestrian "), width, placeholder=" …") for name in names]


def maps(model: PromptPAR, images: Tensor) -> Maps:
    """`model.maps` of many images, 100 at a time."""
    return Maps(*map(torch.cat, zip(*(model.maps(part) for part in images.split(100)), strict=True)))


def regions(models: Mapping[str, PromptPAR], images: Tensor, label: str) -> Figure:
    """Attention of [CLS] and of each region token, the mean over heads and images, over the mean image.

    Args:
        models: with as many regions each; the attention of a token has the sum 100.
        label: of the colour bar.
    """
    found = {name: maps(model, images).regions.mean(0) for name, model in models.items()}
    shares = {name: 100 * heat / heat.sum((1, 2), keepdim=True) for name, heat in found.items()}
    titles = ["[CLS]", *(f"LC{chr(0x2080 + r)}" for r in range(1, len(next(iter(found.values())))))]
    mean = images.mean(0)
    mean = (mean - mean.min()) / (mean.max() - mean.min())  # with more contrast
    shown = mean.expand(len(titles), -1, -1, -1)
    return plots.attention_grid(shown, shares, titles, mode="nearest", shared=True, label=label)


def attribute(model: PromptPAR, images: Tensor, truth: Tensor, i: int) -> Figure:
    """An image with attribute i and one without, the attention of its token, and the cosine of patches and sentence.

    Args:
        images: (n, 3, H, W) in [-1, 1].
        truth: (n, A) their labels.
    """
    pair = images[[k for y in (1, 0) for k in (truth[:, i] == y).nonzero()[:1, 0].tolist()]]
    found = model.maps(pair)
    with torch.no_grad():
        predicted = model(pair)[:, i].sigmoid()
    titles = [f"{name} {value:.2f}" for name, value in zip(("present", "absent"), predicted, strict=False)]
    heat = {"attention": found.attributes[:, i], "cosine": found.cosines[:, i]}
    options = {"mean": [0.5] * 3, "std": [0.5] * 3, "mode": "nearest"}
    return plots.attention_grid(pair, heat, titles, label="attention or cosine", **options)


def auroc(scores: Tensor, truth: Tensor) -> list[float]:
    """How well the scores of each attribute rank the images with it, `truth`, first: AUROC in percent; both (n, A).

    NaN for an attribute that no image has, or all have.
    """
    pairs = zip(scores.cpu().float().T.numpy(), (truth == 1).T.numpy(), strict=True)
    return [100 * roc_auc_score(y, s) if y.any() and not y.all() else float("nan") for s, y in pairs]


@torch.inference_mode()
def similarity(model: PromptPAR, images: Tensor, truth: Tensor, names: Sequence[str]) -> pd.DataFrame:
    """AUROC of the cosine of a token with each sentence: rows the frozen CLIP's image feature, [CLS], each strip."""
    clip = copy.deepcopy(model.clip).float()
    rows = torch.cat(
        [
            torch.cat([clip.encode_image(part)[:, None], model.forward_features(part)[:, model.class_positions]], 1)
            for part in images.split(100)
        ]
    )
    cosines = F.normalize(rows, dim=-1) @ F.normalize(model.text_features, dim=-1).T  # (n, 2 + R, A)
    index = ["frozen CLIP", "[CLS]", *(f"strip {r}" for r in range(1, cosines.shape[1] - 1))]
    return pd.DataFrame([auroc(own, truth) for own in cosines.unbind(1)], index=index, columns=names)


def attention_by_row(model: PromptPAR, images: Tensor, truth: Tensor, names: Sequence[str]) -> pd.DataFrame:
    """The attention of each attribute's token to each row of patches in the fusion block, in percent: the mean over
    the images with the attribute."""
    heat = maps(model, images).attributes.sum(-1)  # (n, A, rows)
    found = torch.stack([heat[truth[:, i] == 1, i].mean(0) for i in range(truth.shape[1])], 1)
    shares = (100 * found / found.sum(0)).cpu().numpy()
    return pd.DataFrame(shares, index=[f"row {row}" for row in range(1, 1 + len(shares))], columns=names)
