"""H-ViT: what the notebook trains live and measures on the synthetic slides, and the tables of its ablations."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ... import backbones
from ...data import slides as data
from ...evaluation import ablations
from ...evaluation.claims import within
from ...models.hvit import features, heatmaps, recipe, slides
from ...models.hvit import model as hvit
from ...models.layers import dino
from ...training.fit import History
from ..ablations import hvit as ablation
from ..ablations import study_root
from ..datasets import slides as synthetic
from ..encoders import slide_dino

TASK = "place"
CONTENT = {synthetic.STROMA: "stroma", synthetic.BENIGN: "benign gland", synthetic.TUMOUR: "tumour"}
Cores = dict[tuple[int, int], bool | None]


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    data, test = (ablation.embeddings(root, p.seed, TASK, split) for split in ("trainval", "test"))
    chosen = {method: learning_rates[TASK, method] for method in ablation.MAIN}

    def train(method: str, fold: int, **changes: Any) -> tuple[nn.Module, History]:
        model = ablation.build(method, p.seed)
        return model, ablation.train_model(model, method, data, chosen[method], p.seed, **changes)

    return recipe.Setting(
        title=f"synthetic slides, {TASK}",
        folds=[(data, None)],
        test=test,
        learning_rates=chosen,
        train=train,
        grades=lambda model, method, part: ablation.grades(model, method, part.tensors[0]),
    )


# --- the slide that the figures show ----------------------------------------------------------------------------------


def cores(p: SimpleNamespace, out: Path, item: data.Item) -> Cores:
    """Of each region of a synthetic slide, in file order: whether its tumour lies in the core, None without tumour."""
    drawn = _drawn(synthetic.folder(study_root(out / "data", p.seed), TASK))[item.name]
    found = {}
    for corner in sorted(drawn, key=lambda corner: f"{corner[0]}_{corner[1]}"):
        tumour = drawn[corner].count(synthetic.TUMOUR) >= 3
        found[corner] = synthetic.is_core(drawn[corner]) if tumour else None
    return found


_drawn = functools.lru_cache(maxsize=2)(synthetic.drawn_cells)


def held_out(p: SimpleNamespace, out: Path) -> list[data.Item]:
    """The synthetic test slides of the notebook's seed, which are written where they are not there."""
    root = study_root(out / "data", p.seed)
    synthetic.write(root, TASK, p.seed)
    return data.load(f"pocket/slides-{TASK}", root, "test")


@dataclass(frozen=True)
class Shown:
    """The slide that the figures show.

    Attributes:
        path, tiling: of the slide.
        patch: the patch level.
        normalise: of its pixels.
        title: what the slide is.
        cores: see `cores`; None for a slide that is not synthetic.
    """

    path: Path
    tiling: slides.Tiling
    patch: hvit.PatchEncoder
    normalise: str
    title: str
    cores: Cores | None = None


def shown(p: SimpleNamespace, out: Path, found: recipe.Setting) -> Shown:
    """A synthetic test slide, with regions of every kind if there is one; at the `paper` profile the first test slide.

    Without HIPT's patch level in <data_root>/weights, and in a dry run: a slide of one generated region, and random
    weights.
    """
    if p.profile == "pocket":
        items = held_out(p, out)
        item = next(filter(functools.partial(_shows_every_kind, p, out), items), items[0])
        title = f"synthetic slide, grade {item.grade}"
        patch = ablation.encoders("dino")[0]
        return Shown(item.path, synthetic.TILING, patch, slide_dino.NORMALISE, title, cores(p, out, item))
    tiling = replace(slides.PANDA, region=p.region)
    file = Path(p.data_root) / "weights" / "vit256_small_dino.pth"
    if not p.dry_run and file.is_file() and isinstance(found.test, data.Features):
        item = found.test.items[0]
        return Shown(item.path, tiling, features.patch_encoder(file), p.normalise, item.name)
    side = min(p.region, 2048)  # 4096 px take a CPU minutes
    pixels = np.full((side + 512, side + 512, 3), 255, np.uint8)
    grey = np.random.default_rng(p.seed).integers(90, 200, (side, side, 1), np.uint8)
    pixels[256:-256, 256:-256] = grey // np.array([1, 2, 1], np.uint8)
    path = slides.write_pyramid(out / "generated.tiff", pixels, 0.5)
    torch.manual_seed(p.seed)
    return Shown(
        path, replace(tiling, region=side), hvit.PatchEncoder().eval(), p.normalise, "generated slide, random weights"
    )


def _shows_every_kind(p: SimpleNamespace, out: Path, item: data.Item) -> bool:
    """Whether a slide is wider than high, and has two core and at least two rim regions."""
    kinds = list(cores(p, out, item).values())
    with slides.Slide(item.path) as slide:
        wide = slide.size[0] / slide.size[1]
    return wide > 1.15 and kinds.count(True) == 2 and kinds.count(False) >= 2


def regions_by_kind(seed: int) -> dict[str, np.ndarray]:
    """A synthetic region of each kind, (128, 128, 3) uint8, by its name."""
    found: dict[str, np.ndarray] = {}
    for slide in synthetic.slides(12, TASK, "test", seed):
        for (x, y), cells in zip(slide.corners, slide.cells, strict=True):
            tumour = int((cells == synthetic.TUMOUR).sum()) >= 3
            kind = "no tumour" if not tumour else "core region" if synthetic.is_core(cells) else "rim region"
            found.setdefault(kind, slide.image[y : y + synthetic.REGION, x : x + synthetic.REGION])
    return {kind: found[kind] for kind in ("core region", "rim region", "no tumour")}


def own_slides(folder: Path, seed: int, count: int = 6) -> Path:
    """A folder as a user has it: synthetic slides, labels.csv, and features/ as `companion slides` stores them."""
    shutil.rmtree(folder, ignore_errors=True)
    patch = ablation.encoders("dino")[0]
    whole = hvit.HViT(hvit.SlideTransformer(48), hvit.RegionEncoder(synthetic.SIDE, patch.dim, 48, 1, 3), patch)
    lines = ["slide_id,label"]
    for number, slide in enumerate(synthetic.slides(count, TASK, "train", seed)):
        path = folder / f"slide_{number}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        slides.write_pyramid(path, slide.image, synthetic.MPP, (1, 4))
        stored = folder / "features" / f"{path.stem}.h5"
        options = {"tiling": synthetic.TILING, "encoder": patch, "normalise": slide_dino.NORMALISE}
        features.extract(path, whole.embed_patches, stored, **options)
        lines.append(f"{path.stem},{slide.grade}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def attention(models: Mapping[str, list[nn.Module]], of: Shown) -> dict[str, heatmaps.AttentionMaps]:
    """The attention of the three levels on a slide, by method, of the first fold's models that read `of.patch`."""
    found = {}
    with slides.Slide(of.path) as slide:
        tiles = slides.tile(slide, of.tiling)
        for name, (model, *_) in models.items():
            if isinstance(model, hvit.HViT) and model.region is not None and of.patch.dim == model.region.inputs:
                found[name] = heatmaps.attention_maps(model, of.patch, slide, tiles, of.normalise)
    return found


def on_tissue(p: SimpleNamespace, of: Shown) -> tuple[hvit.PatchEncoder, str]:
    """A patch level for real tissue, and the normalisation of its pixels.

    At the `paper` profile those of the shown slide; else a pretrained ViT-S/14, and a line that states how far the
    tokens are from that ViT's. Raises `MissingWeights`.
    """
    if p.profile == "paper":
        print(f"the patch level of the figures above ({of.title})")
        return of.patch, of.normalise
    vit = backbones.build("vit_small_patch14_dinov2", img_size=224)
    print(vit.pretrained_cfg.get("description", "the released DINOv2"))
    level, x = hvit.PatchEncoder.from_timm(vit), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        apart = (level.forward_intermediates(x)[1]["tokens"] - vit.forward_features(x)).abs().max()
    print("H-ViT's patch level equal to the ViT:", within({"tokens": apart}, 1e-3)[1])
    return level, "imagenet"


# --- tables that are measured live, on the synthetic slides -----------------------------------------------------------


def _synthetic_only(measure: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """A table whose first argument are the parameters: at the `paper` profile one row states that it is left out."""

    @functools.wraps(measure)
    def wrapped(p: SimpleNamespace, *args: Any, **kwargs: Any) -> pd.DataFrame:
        if p.profile != "pocket":
            return pd.DataFrame({"left out": ["measured on the synthetic slides of the `pocket` profile"]})
        return measure(p, *args, **kwargs)

    return wrapped


@_synthetic_only
def attention_by_content(
    p: SimpleNamespace, out: Path, models: Mapping[str, list[nn.Module]], count: int = 20
) -> pd.DataFrame:
    """Mean rank of the patches of `count` test slides at the region and the slide level, by what they show."""
    patch, rows = ablation.encoders("dino")[0], []
    drawn = _drawn(synthetic.folder(study_root(out / "data", p.seed), TASK))
    for item in held_out(p, out)[:count]:
        kinds = cores(p, out, item)
        looks = attention(models, Shown(item.path, synthetic.TILING, patch, slide_dino.NORMALISE, item.name))
        for name, look in looks.items():
            side = look.region.shape[-1] // synthetic.SIDE
            region = look.region[:, ::side, ::side].reshape(len(look.region), -1)
            for m, (corner, core) in enumerate(kinds.items()):
                for k, content in enumerate(drawn[item.name][corner]):
                    what = CONTENT[content]
                    if content == synthetic.TUMOUR:
                        what += ", core region" if core else ", rim region"
                    rows.append((name, what, region[m, k], look.slide[m]))
    frame = pd.DataFrame(rows, columns=["model", "patch shows", "region level", "slide level"])
    return frame.groupby(["model", "patch shows"]).mean().reset_index()


@_synthetic_only
def probes(p: SimpleNamespace, out: Path, found: recipe.Setting, models: Mapping[str, list[nn.Module]]) -> pd.DataFrame:
    """What region embeddings hold of the position of tumour, and how far they move when patches do.

    "core or rim (%)": accuracy on the test slides of a linear probe trained on the training slides' regions with
    tumour. "shuffled": how far an embedding moves when the sixteen patches are shuffled; "cropped": how far apart two
    large crops of a region are; both in units of the distance between two regions. The first row is the chance level.
    """
    items = data.load(f"pocket/slides-{TASK}", study_root(out / "data", p.seed), "train")
    items += data.load(f"pocket/slides-{TASK}", study_root(out / "data", p.seed), "tune")
    kinds = [[k for item in part for k in cores(p, out, item).values()] for part in (items, held_out(p, out))]
    tumour = [torch.tensor([kind is not None for kind in part]) for part in kinds]
    core = [torch.tensor([kind for kind in part if kind is not None]).long() for part in kinds]
    seen, unseen = (part.tensors[0].flatten(0, 1) for part in (found.folds[0][0], found.test))
    generator = torch.Generator().manual_seed(p.seed)
    order = torch.stack([torch.randperm(seen.shape[1], generator=generator) for _ in unseen])
    shuffled = unseen.gather(1, order[..., None].expand_as(unseen))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(p.seed)
        first, second, *_ = dino.GridViews(synthetic.SIDE, small=0)(_grid(unseen))
        random = [ablation.build("Global, random region level", seed).region.eval() for seed in range(5)]

    def accuracy(embed: Callable[[Tensor], Tensor]) -> float:
        with torch.inference_mode():
            train, test = embed(seen)[tumour[0]], embed(unseen)[tumour[1]]
        return 100 * slide_dino.probe(train.clone(), core[0], test.clone(), core[1])

    def moved(x: Tensor, y: Tensor) -> float:
        return float(((x - y).square().sum(1).mean() / (x - y.roll(7, 0)).square().sum(1).mean()).sqrt())

    share = float(core[1].float().mean())
    rows: list[dict[str, Any]] = [
        {"what is read": "nothing (chance level)", "core or rim (%)": 100 * max(share, 1 - share)}
    ]
    rows.append({"what is read": "patches, concatenated", "core or rim (%)": accuracy(lambda x: x.flatten(1))})
    rows.append({"what is read": "patches, their mean", "core or rim (%)": accuracy(lambda x: x.mean(1))})
    encoders = {"DINO, frozen": [ablation.encoders("dino")[1]], "random, frozen (mean of 5)": random}
    for name, levels in (encoders | {"trained by Local": [models["Local"][0].region]}).items():
        each = []
        for level in levels:
            with torch.inference_mode():
                pairs = [(level(_grid(unseen)), level(_grid(shuffled))), (level(first), level(second))]
            embed = functools.partial(lambda level, x: level(_grid(x)), level)
            each.append((accuracy(embed), *(moved(*pair) for pair in pairs)))
        rows.append(
            {"what is read": name}
            | dict(zip(("core or rim (%)", "shuffled", "cropped"), np.mean(each, 0), strict=True))
        )
    return pd.DataFrame(rows)


def _grid(patches: Tensor) -> Tensor:
    """Patch embeddings (B, P, D) as the grid (B, D, n, n) that the region level reads."""
    return patches.mT.unflatten(2, (synthetic.SIDE, synthetic.SIDE))


@_synthetic_only
def coral(p: SimpleNamespace, found: recipe.Setting, learning_rate: float = 2e-3, epochs: int = 20) -> pd.DataFrame:
    """Local with the CORAL loss, its thresholds starting together as released, or apart: where they end, and kappa."""
    rows, name = [], "Local, CORAL"
    for start in ([0.0] * 5, [4.0, 2.0, 0.0, -2.0, -4.0]):
        model = ablation.build(name, p.seed)
        with torch.no_grad():
            model.slide.thresholds.copy_(torch.tensor(start))
        ablation.train_model(model, name, found.folds[0][0], learning_rate, p.seed, epochs=epochs)
        predicted = ablation.grades(model, name, found.test.tensors[0])
        ends = ", ".join(f"{t:.1f}" for t in model.slide.thresholds.tolist())
        kappa = recipe.kappa(recipe.grades_of(found.test), predicted)
        rows.append({"initial thresholds": ", ".join(f"{t:g}" for t in start), "final": ends, "kappa": kappa})
    return pd.DataFrame(rows)


# --- tables of the ablations ------------------------------------------------------------------------------------------


def study_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method on every task: test kappa and accuracy over seeds, last training loss, learning rate, parameters."""
    order = [(task, method) for task, methods in ablation.TASKS.items() for method in methods]
    kappa, accuracy = (
        ablations.summary(rows, metric).set_index(["task", "method"]).loc[order].reset_index()
        for metric in ("kappa", "accuracy")
    )
    tested = rows[rows.stage == "test"].groupby(["task", "method"])
    frame = kappa[["task", "method"]].copy()
    for name, found in (("kappa", kappa), ("accuracy (%)", accuracy)):
        frame[name] = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(found["mean"], found["std"], strict=True)]
    index = pd.MultiIndex.from_frame(frame[["task", "method"]])
    frame["last training loss"] = tested.loss.mean().reindex(index).to_numpy()
    frame["learning rate"] = [f"{rate:g}" for rate in kappa.learning_rate]
    frame["trainable parameters"] = [f"{count:,}" for count in tested.trained.first().reindex(index)]
    return frame


def leads(rows: pd.DataFrame, task: str = TASK) -> pd.DataFrame:
    """By how many points of kappa each variant of Global and Local beats the method that it varies, on test data."""
    tested = rows[(rows.stage == "test") & (rows.task == task)].set_index(["method", "seed"]).kappa.sort_index()
    found = []
    for name in ablation.TASKS[task]:
        whole, _, varied = name.partition(", ")
        if varied:
            lead = tested[name] - tested[whole]
            wins = f"{int((lead > 0).sum())} of {len(lead)}"
            found.append((name, whole, f"{lead.mean():+.1f} ± {lead.std():.1f}", wins))
    return pd.DataFrame(found, columns=["variant", "compared with", "lead", "seeds won"])


def mistakes(rows: pd.DataFrame) -> pd.DataFrame:
    """Kappa, accuracy, and an estimate of the squared error per wrong grade, of two losses; means over seeds.

    The error follows from kappa and accuracy, as grades are equally frequent: chance has a squared error of 35/6.
    """
    tested = rows[rows.stage == "test"].groupby(["task", "method"])[["kappa", "accuracy"]].mean()
    pairs = [(task, name) for task in ablation.TASKS for name in ("Local", "Local, cross-entropy")]
    frame = tested.loc[pairs].reset_index()
    squares = (1 - frame.kappa / 100) * 35 / 6
    frame["squared error per wrong grade"] = squares / (1 - frame.accuracy / 100)
    return frame.rename(columns={"accuracy": "accuracy (%)"})


def selection(rows: pd.DataFrame, task: str = TASK) -> pd.DataFrame:
    """Mean kappa on validation by learning rate, over the selection seeds, of Local with each of the losses."""
    names = ["Local", *(m for m in ablation.METHODS if ablation.head(m) != "regression")]
    found = ablations.means(rows)[task].unstack().loc[names]
    return found.rename(columns=lambda rate: f"{rate:g}").rename_axis("learning rate:", axis=0).reset_index()


def vote(rows: pd.DataFrame) -> tuple[bool, str, list[int], str]:
    """The claim on the vote of five folds against their mean single one, as `Run.claim` takes it."""
    tested = rows[(rows.stage == "test") & (rows.task == TASK)].set_index(["method", "seed"]).sort_index()
    own = tested.loc["Local, vote of five"]
    lead, other = own.kappa - own.fold, own.kappa - tested.loc["Local"].kappa
    holds = bool((lead > 0).all())
    value = f"{TASK} {lead.mean():+.1f} ± {lead.std():.1f} points over the mean single fold; "
    value += f"{other.mean():+.1f} ± {other.std():.1f} over one Local trained on all slides"
    why = f"single folds reach {own.fold.mean():.1f} already; a vote gains nothing where the folds err alike (smallest "
    return holds, value, sorted(map(int, lead.index)), "" if holds else f"{why}lead {lead.min():+.2f})"


def reasons(rows: pd.DataFrame, probes: pd.DataFrame) -> dict[str, str]:
    """Why synthetic results fail, by claim, with what was measured.

    Args:
        rows: of the ablations.
        probes: see `probes`.
    """
    tested = rows[rows.stage == "test"].groupby(["task", "method"])[["kappa", "loss", "trained"]]
    local, bag = tested.mean().loc["count", "Local"], tested.mean().loc["count", "gated attention"]
    errors = ", ".join(f"{value:.2f}" for value in mistakes(rows).iloc[:, -1])
    low, high = tested.min().loc[TASK].kappa, tested.max().loc[TASK].kappa
    spans = [f"{low[name]:.0f} to {high[name]:.0f}" for name in ("Global, random region level", "Global")]
    found = {
        "count": "gated attention over patches suffices for the amount of tumour; Local has "
        f"{local.trained / bag.trained:.0f} times the trainable parameters and fits the training slides more closely "
        f"(loss {local.loss:.2f} against {bag.loss:.2f}), but not the test slides",
        "ordinal": "nearly all wrong grades are off by one with either loss (squared error per wrong grade "
        f"{errors}), so a loss that knows the order of the grades has little to add",
        "dino": f"the draw of the random weights decides: random region levels reach kappas of {spans[0]} by seed, "
        f"DINO's of {spans[1]}",
    }
    if "core or rim (%)" in probes:
        read = probes.set_index("what is read")["core or rim (%)"]
        dino_, random = (f"{read[name]:.0f} %" for name in ("DINO, frozen", "random, frozen (mean of 5)"))
        found["dino"] += f"; a linear probe separates core from rim regions in {dino_} with DINO, {random} with random"
        found["global-attention"] = (
            f"the frozen region level keeps only a part of the position: a linear probe separates core from rim in "
            f"{dino_} of the test regions (chance level {read.iloc[0]:.0f} %), on the concatenated patches in "
            f"{read['patches, concatenated']:.0f} %, on Local's trained level in {read['trained by Local']:.0f} %"
        )
    return found
