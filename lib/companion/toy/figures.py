"""Figures of the notebook about the synthetic datasets and the small encoders trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..models.hvit import dino
from ..viz.style import COLOURS, styled
from . import bat, dmt, dplq, ecamp, hvit, metasegnet, promptpar, sa2vp, scenes, sic_cads, tip

SPLIT_COLOURS = dict(zip(scenes.SPLITS, (COLOURS[0], COLOURS[1], COLOURS[4]), strict=True))
NOVEL, BASE = COLOURS[3], COLOURS[0]  # boxes of novel and of base classes


def _show(ax: Axes, image: np.ndarray | Tensor, title: str = "") -> None:
    ax.imshow(np.asarray(image), cmap="gray", interpolation="nearest")
    ax.set_title(title, fontsize=8.5)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _frame(ax: Axes, box: Iterable[float], colour: str = "white") -> None:
    """A box x, y, w, h in pixels."""
    x, y, w, h = box
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour, linewidth=1.5))


@styled
def overview(seed: int) -> Figure:
    """One image of each synthetic dataset, with the paper whose notebook uses it; of BAT both streams."""
    frame = bat.Clip(bat.plan("test", 0, seed), np.random.default_rng(seed)).frame(0)
    rng = np.random.default_rng((seed, 6))
    visible, infrared = frame[..., :3], frame[..., 3:]
    land = metasegnet.drawn("Csa", 1, "test", seed)[0][0]
    region = hvit.region(rng, hvit.arrangement(rng, "place", 4)[0], "test")
    people, _ = promptpar.people(6, "test", "street", seed)
    shown = {
        "SA²VP\nlocation, digits, …": next(sa2vp.examples("where", "test", seed))[0],
        "DPLQ\ntwo sensors": dplq.draw(rng, "remote", "test", 3, 1),
        "SIC-CADS\nobjects in context": sic_cads.scene(rng, "test").image,
        "BAT\nvisible stream": visible,
        "BAT\ninfrared stream": infrared,
        "PromptPAR\nattributes": people[-1],
        "TIP\ncaptioned textures": tip.pictures("test", seed)[0].image,
        "DMT\ncollages of factors": dmt.collages(1, "test", seed)[0][0],
        "H-ViT\nregion of a slide": region,
        "MetaSegNet\nland cover": land,
        "ECAMP\nchest and report": ecamp.chests(1, "test", seed)[0].image,
        "encoders\nscenes with captions": scenes.scene(rng, "test").image,
    }
    figure, axes = plt.subplots(2, 6, figsize=(8.6, 4.0))
    for ax, (title, image) in zip(axes.flat, shown.items(), strict=True):
        _show(ax, image, title)
    figure.suptitle("the synthetic datasets, by the notebook that uses them")
    return figure


@styled
def tiles(names: Sequence[str], seed: int, crops: int = 6) -> Figure:
    """Photographs with their tiles coloured by split, and `crops` random crops of each split in white."""
    rng = np.random.default_rng(seed)
    figure, axes = plt.subplots(1, len(names), figsize=(7.6, 2.6))
    for ax, name in zip(axes, names, strict=True):
        _show(ax, scenes.photograph(name), name)
        for split, colour in SPLIT_COLOURS.items():
            for left, top, right, bottom in scenes.tiles(name, split):
                size = right - left, bottom - top
                ax.add_patch(Rectangle((left, top), *size, color=colour, alpha=0.35, linewidth=0))
            for _ in range(crops):
                left, top, right, bottom = scenes.cut(rng, name, split).box
                _frame(ax, (left, top, right - left, bottom - top))
    handles = [Rectangle((0, 0), 1, 1, color=colour, alpha=0.6) for colour in SPLIT_COLOURS.values()]
    figure.legend(handles, SPLIT_COLOURS, loc="outside lower center", ncols=3)
    return figure


def shared_pixels() -> tuple[int, int, int]:
    """Pixels of all photographs; those in the tiles of more than one split; those in no tile."""
    owners = []
    for name in scenes.PHOTOGRAPHS:
        count = np.zeros(scenes.photograph(name).shape[:2], int)
        for split in scenes.SPLITS:
            for left, top, right, bottom in scenes.tiles(name, split):
                count[top:bottom, left:right] += 1
        owners.append(count.ravel())
    every = np.concatenate(owners)
    return every.size, int((every > 1).sum()), int((every == 0).sum())


@styled
def captioned(drawn: Sequence[scenes.Scene]) -> Figure:
    """Scenes below their captions, five a row, with box and outline of the mask."""
    figure, axes = plt.subplots(-(-len(drawn) // 5), 5, figsize=(10, 2.5 * -(-len(drawn) // 5)))
    for ax, scene in zip(axes.flat, drawn, strict=True):
        left, top, right, bottom = scene.box
        _show(ax, scene.image, scene.caption.replace(" at ", "\nat ").replace(" on ", "\non "))
        _frame(ax, (left, top, right - left, bottom - top))
        ax.contour(scene.mask, levels=[0.5], colors="black", linewidths=1)
    return figure


@styled
def tasks(seed: int = 0, columns: int = 6) -> Figure:
    """Test images of the four classification tasks with their labels, a row for each task."""
    figure, axes = plt.subplots(4, columns, figsize=(7.6, 6.4))
    for row, (task, facts) in zip(axes, sa2vp.TASKS.items(), strict=True):
        for ax, (image, label) in zip(row, sa2vp.examples(task, "test", seed), strict=False):
            _show(ax, image, facts.classes[label])
        row[0].set_ylabel(task)
    return figure


@styled
def sensors(seed: int, labels: Sequence[int] = (0, 3, 5, 6)) -> Figure:
    """The same scenes of both domains through the first sensor (above) and the second (below)."""
    figure, axes = plt.subplots(2, 2 * len(labels), figsize=(9.2, 2.7))
    for block, (name, domain) in zip(np.split(axes, 2, 1), dplq.DOMAINS.items(), strict=True):
        for column, label in zip(block.T, labels, strict=True):
            for sensor, ax in enumerate(column):
                same = np.random.default_rng((seed, label))  # the same scene for both sensors
                title = "" if sensor else domain.classes[label].replace(" at the ", "\nat the ")
                _show(ax, dplq.draw(same, name, "train", label, sensor), title)
                if label == labels[0]:
                    ax.set_ylabel(f"{name},\n{('first', 'second')[sensor]} sensor", fontsize=8)
    return figure


@styled
def cameras(seed: int) -> Figure:
    """Pedestrians of both cameras below up to four of their attributes."""
    figure, axes = plt.subplots(2, 8, figsize=(9.2, 4.9))
    for row, camera in zip(axes, promptpar.CAMERAS, strict=True):
        for ax, image, person in zip(row, *promptpar.people(len(row), "test", camera, seed), strict=True):
            there = [name for name, label in zip(promptpar.ATTRIBUTES, person.labels, strict=True) if label]
            _show(ax, image, "\n".join(there[:4]) or "none")
        row[0].set_ylabel(camera)
    return figure


@styled
def crops(seed: int) -> Figure:
    """A region of a synthetic slide with a patch of tumour framed, the patch, and its large and small DINO crops."""
    regions, cells = hvit.unlabelled(6, "train", seed)
    shown = next(i for i, row in enumerate(cells) if (row == hvit.TUMOUR).any())
    y, x = (32 * index for index in divmod(int((cells[shown] == hvit.TUMOUR).nonzero()[0]), 4))
    pixels = regions[shown] * 0.5 + 0.5
    patch = pixels[:, y : y + 32, x : x + 32]
    torch.manual_seed(seed)
    views = dino.ImageViews((28, 12), ((0.5, 1.0), (0.15, 0.5)), 4, 0.5, (0.5,) * 3, (0.5,) * 3)(patch[None])
    images = {"region": [pixels], "patch": [patch]}
    images |= {"large crop": [view[0] * 0.5 + 0.5 for view in views[:2]]}
    images |= {"small crop": [view[0] * 0.5 + 0.5 for view in views[2:]]}
    panels = [(title, image) for title, found in images.items() for image in found]
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 1.6), width_ratios=[1.6, *[1] * (len(panels) - 1)])
    for ax, (title, image) in zip(axes, panels, strict=True):
        _show(ax, image.movedim(0, -1).clamp(0, 1), title)
    _frame(axes[0], (x, y, 32, 32))
    return figure


@styled
def objects(seed: int) -> Figure:
    """Two scenes of each of the detection dataset's contexts; boxes of base classes blue, of novel ones orange."""
    rng = np.random.default_rng((seed, 8))
    contexts = [*sic_cads.PLACES, *sic_cads.PLACES]
    figure, axes = plt.subplots(1, len(contexts), figsize=(9.2, 1.6))
    for ax, context in zip(axes, contexts, strict=True):
        shown = sic_cads.scene(rng, "test", place=context)
        _show(ax, shown.image, context)
        for label, box in zip(shown.labels, shown.boxes, strict=True):
            _frame(ax, box, NOVEL if label in sic_cads.NOVEL else BASE)
    return figure


@styled
def findings(part: ecamp.Part) -> Figure:
    """The first chest with each finding, the lesion framed, below its report."""
    figure, axes = plt.subplots(1, len(ecamp.FINDINGS), figsize=(8.8, 2.8))
    for finding, ax in enumerate(axes):
        i = int(torch.nonzero(part.labels[:, finding])[0])
        left, top, right, bottom = part.boxes[i].tolist()
        report = part.reports[i].replace(" . ", "\n").replace("evidence of ", "evidence of\n").removesuffix(".")
        _show(ax, part.images[i, 0], report)
        _frame(ax, (left, top, right - left, bottom - top), COLOURS[5])
    return figure


@styled
def generated(rows: Mapping[str, Tensor], captions: Sequence[str]) -> Figure:
    """Rows of images (number, 3, H, W) in 0 to 1, with the row's name on the left and the captions above the first."""
    figure, axes = plt.subplots(len(rows), len(captions), figsize=(9.2, 1.45 * len(rows)))
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=True):
            _show(ax, image.movedim(0, -1).clamp(0, 1))
        row[0].set_ylabel(name)
    for ax, caption in zip(axes[0], captions, strict=True):
        ax.set_title(caption.replace(" with ", "\nwith ").replace(" of ", "\nof "), fontsize=8)
    return figure
