"""Figures of MetaSegNet alone: maps of land cover, and the attention of positions to words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...data.rasters import MEAN, STD
from ...viz import plots
from ...viz.attention import Recorder
from ...viz.style import HEAT, method_colours, styled
from .model import MetaSegNet

ONLY = method_colours(["MetaSegNet", "unimodal"])
"""Colours of the pixels that one network alone predicts correctly."""


def rgb(image: Tensor) -> Tensor:
    """A network's input (3, H, W) as RGB in 0 to 1."""
    return torch.from_numpy(plots.denormalise(image, MEAN, STD)).permute(2, 0, 1)


def painted(image: np.ndarray | Tensor, classes: Mapping[str, str]) -> Tensor:
    """An RGB image (3, H, W) in 0 to 1: labels (H, W) in the colours of the classes, unlabelled pixels black."""
    image = torch.as_tensor(image)
    if image.ndim == 3:
        return image
    colours = torch.tensor([to_rgb(colour) for colour in (*classes.values(), "black")])
    return colours[image.long().clamp_max(len(classes))].permute(2, 0, 1)


def differing(truth: Tensor, predicted: Mapping[str, Tensor]) -> Tensor:
    """An image (3, H, W): pixels that one network of `ONLY` alone predicts correctly in its colour, others grey."""
    correct = {name: predicted[name] == truth for name in ONLY}
    drawn = torch.full((*truth.shape, 3), 0.93)
    for name, other in itertools.permutations(ONLY):
        drawn[correct[name] & ~correct[other]] = torch.tensor(to_rgb(ONLY[name]))
    return drawn.permute(2, 0, 1)


@styled
def land_cover(
    rows: Mapping[str, Sequence[np.ndarray | Tensor]],
    classes: Mapping[str, str],
    titles: Sequence[str] | Mapping[str, Sequence[str]] = (),
    *,
    side: float = 1.2,
    title: str = "",
) -> Figure:
    """A grid of images (3, H, W) and label maps (H, W), with a legend of the classes; arguments as `image_rows`."""
    coloured = {name: [painted(image, classes) for image in images] for name, images in rows.items()}
    figure = plots.image_rows(coloured, titles, side=side, title=title)
    legend(figure, classes)
    return figure


def predictions(
    rows: Mapping[str, tuple[Tensor, Tensor]],
    predicted: Mapping[str, Sequence[Tensor]],
    classes: Mapping[str, str],
    title: str = "",
) -> Figure:
    """Images, their labels, the maps of both networks, and the pixels that one of them alone predicts correctly.

    Args:
        rows: name -> image (3, H, W), normalised, and labels (H, W).
        predicted: method of `ONLY` -> a map (H, W) for each row.
    """
    drawn = {}
    for i, (name, (image, truth)) in enumerate(rows.items()):
        maps = {method: predicted[method][i] for method in ONLY}
        drawn[name] = [rgb(image), truth, *maps.values(), differing(truth, maps)]
    colours = {**classes, **{f"{name} alone correct": colour for name, colour in ONLY.items()}}
    return land_cover(drawn, colours, ("image", "truth", *ONLY, "only one correct"), side=1.3, title=title)


@torch.no_grad()
def under_texts(
    model: MetaSegNet,
    rows: Mapping[str, tuple[Tensor, Tensor, Mapping[str, str]]],
    classes: Mapping[str, str],
    side: float = 1.25,
    title: str = "",
) -> Figure:
    """Images, their labels, and the maps predicted with several texts, with the share of correct pixels.

    Args:
        rows: name -> image (3, H, W), normalised, labels (H, W), and the texts by their titles.
    """
    drawn, titles = {}, {}
    for name, (image, truth, texts) in rows.items():
        maps = {title: model(image[None], [text]).argmax(1)[0] for title, text in texts.items()}
        shares = {title: 100 * float((found == truth).float().mean()) for title, found in maps.items()}
        drawn[name] = [rgb(image), truth, *maps.values()]
        titles[name] = ["image", "truth", *(f"{title}: {share:.0f} % correct" for title, share in shares.items())]
    return land_cover(drawn, classes, titles, side=side, title=title)


def legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """Squares with names below a figure, in as few rows as its width allows."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="#333333", linewidth=0.5) for c in colours.values()]
    points = sum(5.4 * len(name) + 34 for name in colours)  # letters, square and gap
    columns = math.ceil(len(colours) / math.ceil(points / (72 * figure.get_figwidth())))
    figure.legend(handles, list(colours), loc="outside lower center", ncols=columns, handlelength=1, columnspacing=1)


@torch.no_grad()
def attention(model: MetaSegNet, images: Tensor, texts: Sequence[str] | Tensor) -> dict[int, Tensor]:
    """The attention (B, h, w, L) of each position to each word by stage, mean over heads; texts as in `forward`."""
    with Recorder(model, ["fusions.*"]) as record:
        _, out = model.eval().forward_intermediates(images, texts)
    return {
        int(k): rearrange(each.mean(1), "b (h w) l -> b h w l", h=out["fused"][int(k) - 1].shape[-2])
        for k, each in zip(model.fusions, record.maps, strict=True)
    }


@styled
def word_maps(model: MetaSegNet, image: Tensor, text: str, title: str = "image") -> Figure:
    """Attention of an image's positions to six words of its text, those whose maps vary most over the image.

    A row for each stage, a column for each word, one colour scale.

    Args:
        image: (3, H, W), normalised.
        title: above the image.
    """
    words = model.text.words(text) if model.text is not None else []
    maps = {k: a[0, ..., : len(words)].cpu() for k, a in attention(model, image[None], [text]).items()}
    varying = torch.stack([a.flatten(0, 1).std(0) for a in maps.values()]).sum(0)
    shown = varying.argsort(descending=True)[:6].sort().values.tolist()
    size = (8.4, 1.02 * len(maps) + 0.3)
    figure, axes = plt.subplots(len(maps), 1 + len(shown), figsize=size, squeeze=False, layout="compressed")
    scale = Normalize(0, max(float(a[..., shown].max()) for a in maps.values()))
    for line, (stage, each) in zip(axes, maps.items(), strict=True):
        line[0].imshow(rgb(image).permute(1, 2, 0).numpy())
        line[0].set_ylabel(f"stage {stage}\n{each.shape[0]} × {each.shape[1]}")
        for ax, index in zip(line[1:], shown, strict=True):
            ax.imshow(each[..., index].numpy(), cmap=HEAT, norm=scale)
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    axes[0, 0].set_title(title, fontsize=8.5)
    for ax, index in zip(axes[0, 1:], shown, strict=True):
        ax.set_title(f"“{words[index]}” ({index + 1})", fontsize=8.5)
    bar = figure.colorbar(ScalarMappable(scale, HEAT), ax=axes, shrink=0.7, aspect=25, pad=0.02)
    bar.set_label("attention, mean over heads")
    return figure
