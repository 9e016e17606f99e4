"""H-ViT: the recipe cases recorded from computationalpathologygroup/hvit at 444bb72 and clemsgrs/hs2p at f51b276."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from companion.data import slides as data
from companion.evaluation.metrics import quadratic_kappa
from companion.models.hvit import model as hvit
from companion.models.hvit import recipe, slides
from companion.models.layers.state_dicts import load_official
from companion.training.fit import History
from companion.training.hardware import CPU
from companion.training.recipe import Training, run
from tests.conftest import parameters
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, equal, near, same


def _labels(case: Case) -> list[Row]:
    expected, classes, logits = case.expected, case.settings["num_classes"], case.data["in.logits"]
    vectors = {str(grade): hvit.extended(torch.tensor([grade]), classes)[0] for grade in range(classes)}
    rows = [same("ordinal_vector_of_grade", expected["ordinal_vector_of_grade"], vectors)]
    for name, heads in (("ordinal_or_coral", ("ordinal", "coral")), ("corn", ("corn",))):
        for head in heads:
            rows.append(same(f"grade_{name} {head}", expected[f"grade_{name}"], hvit.graded(head, logits, classes)))
    regression = hvit.graded("regression", case.data["in.regression"], classes)
    return [*rows, same("grade_regression", expected["grade_regression"], regression)]


def _batch_loss(head: str, classes: int, logits: Tensor, grades: Tensor) -> Tensor:
    """The loss of a training, on outputs in place of a model's."""
    return recipe.batch_loss(head, classes, lambda features, present: features, (logits, None, grades))


def _loss(case: Case) -> list[Row]:
    s, grades, relative = case.settings, case.data["in.grades"], case.facts["tolerance"]["relative"]
    classes, rows = s["num_classes"], []
    for name, one in s["losses"].items():
        logits, head = case.data[f"in.{one['logits']}"], one["head"]
        whole = hvit.loss(head, logits, grades, classes)
        value = _batch_loss(head, classes, logits, grades) if one["per_slide"] else whole
        rows.append(near(name, case.expected[name], value, relative=relative))
    for name, head in s["gradients"].items():
        logits, expected = case.data["in.logits"].clone().requires_grad_(), case.data[f"out.gradient.{name}"]
        hvit.loss(head, logits, grades, classes).backward()
        rows.append(
            near(f"out.gradient.{name}", expected, logits.grad, absolute=relative * float(expected.abs().max()))
        )
    return rows


def _vote(case: Case) -> list[Row]:
    s, tolerance = case.settings, case.facts["tolerance"]
    names, truth = s["slide_ids"], torch.tensor(s["label"])
    folds, order = [*torch.tensor(s["predictions_of_five_folds"]).T], np.argsort(s["slide_ids"])
    each = [quadratic_kappa(truth, fold) for fold in folds]
    rows = [near("kappa_of_each_fold", case.expected["kappa_of_each_fold"], each, **tolerance)]
    for what, isup in (("plain distance", False), ("custom distance", True)):
        vote, expected = recipe.voted(folds, names, isup), case.expected[what]
        rows += [
            *equal(expected, {"row_order": [names[i] for i in order], "vote": vote[order]}, f"{what} "),
            near(f"{what} kappa", expected["kappa"], quadratic_kappa(truth, vote), **tolerance),
        ]
    return rows


def _tiling(case: Case) -> list[Row]:
    s, tiling, size = case.settings, slides.Tiling(**case.settings["tiling"]), tuple(case.settings["level0"])
    mask, ratio = slides.tissue_mask(case.data["in.thumbnail"].numpy(), tiling), s["target_spacing"] / s["spacing0"]
    step, unit = int(s["tile"] * ratio), s["filter"]["ref_patch_size"] * ratio
    coords, shares, contours = slides.find_tiles(mask, slides.axis_factors(size, mask), size, step, tiling, unit)
    ours = {
        "coordinates_in_the_order_found": coords,
        "contour": contours,
        "tissue_share": shares,
        "coordinates_in_the_order_of_file_names_x_y": coords[slides.file_order(coords)],
        "tissue_pixels_of_the_mask": int((mask > 0).sum()),
    }
    recorded = case.expected | {name: case.data[name] for name in ("out.mask_rows", "out.mask_columns")}
    ours |= {"out.mask_rows": (mask > 0).sum(1), "out.mask_columns": (mask > 0).sum(0)}
    return equal(recorded, ours)


def _slides(count: int) -> TensorDataset:
    """Slides of one region of one patch, of grade 1."""
    return TensorDataset(torch.ones(count, 1, 1, 1), torch.ones(count, 1, dtype=torch.bool), torch.ones(count).long())


class _Constant(nn.Module):
    """A regression whose output is a weight, at first 0: each slide's loss is 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        return self.weight.expand(len(x), 1)


def _trained(
    model: nn.Module, part: Dataset, *callbacks, head: str = "regression", classes: int = 6, **options
) -> History:
    """The history of the recipe's training of a model, in place."""
    loss, fit = functools.partial(recipe.batch_loss, head, classes), recipe.fit_options(part, *callbacks, **options)
    return run(Training("case", lambda: model, loss, lambda: part, fit), hardware=CPU)[1]


def _schedule(case: Case) -> list[Row]:
    """Two epochs without changes of the weights, and the learning rates of all epochs."""
    s, expected, step = (
        case.settings,
        case.expected,
        case.settings["gradient_accumulation"] * case.settings["batch_size"],
    )
    history = _trained(_Constant(), _slides(s["slides"]), epochs=2, batch=step, optimizer=recipe.adam(0.0, 0.0))
    per_epoch = len(history) // 2
    # the second epoch's first step has the slides left over too, and their losses of 1 are divided by a whole batch
    left = round((history[per_epoch]["loss"] - history[0]["loss"]) * step)
    optim = s["optim"]
    lrs = recipe.halved(optim["lr"], s["nepochs"] * per_epoch, per_epoch, optim["lr_scheduler"]["step_size"])
    return [
        near("lr_of_each_epoch", expected["lr_of_each_epoch"], lrs[::per_epoch], **case.facts["tolerance"]),
        *equal(
            expected,
            {
                "steps_of_each_epoch": per_epoch,
                "slides_left_over_in_each_epoch": left,
                "left_over_slides": recipe.LAST,
                "steps_in_all": len(lrs),
            },
        ),
    ]


def _sampling(case: Case) -> list[Row]:
    expected, labels = case.expected, torch.tensor(case.settings["labels"])
    balanced = recipe.ClassBalanced(TensorDataset(torch.arange(len(labels)), labels))
    torch.manual_seed(case.settings["torch_seed"])
    drawn = balanced.draw(len(balanced))
    ours = {
        "drawn_in_an_epoch": len(drawn),
        "with_replacement": len(set(drawn.tolist())) < len(drawn),
        "drawn_with_the_seed": drawn,
        "on_by_default": parameters("hvit").sampling == "weighted",
    }
    name = "weight_of_each_slide"
    weights = near(name, expected[name], balanced.weights, **case.facts["tolerance"])
    return [weights, *equal(expected, ours)]


def _scripted(losses: Iterator[float], seen: list[Tensor], model: nn.Module) -> float:
    """The next recorded loss; the weights of each epoch are collected."""
    seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return next(losses)


def _selection(case: Case) -> list[Row]:
    s, rows = case.settings, []
    for name, recorded in s["tuning_loss_of_each_epoch"].items():
        losses, seen, model = [float(value) for value in recorded], list[Tensor](), _Constant()
        loss = functools.partial(_scripted, iter(losses), seen)
        selection = recipe.Selection(loss, s["patience"] if s["enabled"] else 0)
        history = _trained(model, _slides(1), selection, epochs=len(losses), batch=1)
        last = nn.utils.parameters_to_vector(model.parameters())
        ours = {
            "kept_epoch": next(i for i, weights in enumerate(seen) if torch.equal(weights, last)),
            "stopped_after_epoch": len(history) - 1 if len(history) < len(losses) else None,
            "epochs_run": len(history),
        }
        for key, value in ours.items():
            never = key == "kept_epoch" and math.isnan(losses[0])
            departs = "theirs keeps an epoch 0 whose loss is nan for ever" if never else ""
            rows.append(same(f"{name} {key}", case.expected[name][key], value, departs))
    return rows


def _official(name: str) -> int:
    """The position of an official tensor in the authors' model: thresholds first, the region level in forward order."""
    places = (r"b$", r"vit_region\.(cls_token|pos_embed)", r"vit_region\.phi", r"vit_region\.blocks", r"vit_region")
    return next((i for i, place in enumerate(places) if re.match(place, name)), len(places))


def _groups_slide(case: Case) -> list[Row]:
    s, rows = case.settings, []
    for name, own in s["models"].items():
        levels = ("slide",) if own["method"] == "Global" else ("region", "slide")
        p = parameters("hvit", method=own["method"], head=own["head"], region=s["region_size"])
        with tempfile.TemporaryDirectory() as folder:
            if own["weights"]:  # the authors' Local freezes the region level then: our Global on patch embeddings
                p.method, p.weights = "Global", f"{folder}/region.pth"
                torch.save(hvit.RegionEncoder(s["region_size"] // 256).state_dict(), p.weights)
            model = recipe.build(p, classes=s["num_classes"], levels=levels)
        official = model.official_names()
        names = {id(t): official[n] for n, t in model.named_parameters()}
        groups = []
        for group in recipe.adam()(model).param_groups:
            ordered = sorted((names[id(t)] for t in group["params"]), key=_official)
            digest = hashlib.sha256("\n".join(ordered).encode()).hexdigest()
            facts = {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
            groups.append(facts | {"tensors": len(ordered), "names_sha256": digest})
        trained, frozen = (
            {names[id(t)]: t.numel() for t in model.parameters() if t.requires_grad == kind} for kind in (True, False)
        )
        ours = {
            "groups": groups,
            "trained_numbers": sum(trained.values()),
            "frozen_numbers": sum(frozen.values()),
            "output_layer": [n for n in sorted(trained, key=_official) if n == "b" or n.startswith("classifier.")],
            "frozen": sorted({n.partition(".")[0] for n in frozen}),
        }
        rows += equal(case.expected[name], ours, f"{name} ")
    return rows


def _groups_region(case: Case) -> list[Row]:
    """All levels trained from pixels: its epochs and stopping are `REGIONS`; how it is built, at pocket size."""
    expected, relative, classes = case.expected, case.facts["tolerance"]["relative"], case.settings["num_classes"]
    model = hvit.build("pocket", "whole", expected["loss"], patches=2, classes=classes)
    optimizer, lrs = recipe.adam()(model), recipe.halved(recipe.LEARNING_RATE, 60, 1)
    step, (group,) = int((lrs == lrs[0]).sum()), optimizer.param_groups
    kinds = {level: "trained" for level in ("patch", "region") if level not in model.frozen}
    # that the lowest loss is kept, and how the patience counts, is compared in the cases of the selection
    stopping = {"enable": True, "tracking": "loss", "min_max": "min", "patience": recipe.REGIONS["patience"]}
    stopping["min_epoch"] = recipe.EARLIEST - 2  # numbers from 0, and it stops after a later one
    logits, grades = torch.randn(4, classes - 1), torch.arange(4)
    one_by_one = torch.stack([hvit.loss("corn", logits[i : i + 1], grades[i : i + 1], classes) for i in range(4)])
    alone = torch.isclose(_batch_loss("corn", classes, logits, grades), one_by_one.mean())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.ones(expected["M_max"] + 9, 192), f"{folder}/slide.pt")
        padded = data.Features([data.Item("slide", Path("slide.tiff"), 0)], folder, expected["M_max"])[0][0]
    ours = {
        "optimiser": type(optimizer).__name__,
        "nepochs": recipe.REGIONS["epochs"],
        "scheduler": {"step_size": step, "gamma": float(lrs[step] / lrs[0])},
        "frozen": [name for name, t in model.named_parameters() if not t.requires_grad],
        **{f"{level}_level": kind for level, kind in kinds.items()},
        "loss": model.slide.head,
        "early_stopping": stopping,
        "M_max": len(padded),
        "gradient_accumulation": recipe.BATCH,
        "batch_size": 1 if alone else len(grades),
        "weighted_sampling": parameters("hvit").sampling == "weighted",
    }
    close = [near(key, expected[key], group[key], relative=relative) for key in ("lr", "weight_decay")]
    return [*close, *equal(expected, ours)]


def _trajectory(case: Case) -> list[Row]:
    s, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    local, optim, rows = s["method"] == "Local", s["optimiser"], []
    levels = ("region", "slide") if local else ("slide",)
    p = parameters("hvit", method=s["method"], head=s["head"], region=s.get("region_size", 256))
    model = recipe.build(p, classes=s["num_classes"], levels=levels, dropout=s["dropout"])
    names, state = model.official_names(), model.state_dict()
    filled = fill.state_dict({names[n]: list(t.shape) for n, t in state.items()}, s["seed"])
    load_official(model, {n: torch.as_tensor(a) for n, a in filled.items()}, names, "H-ViT")

    width = ((s["region_size"] // s["patch_size"]) ** 2, 384) if local else (192,)
    longest, items = max(s["regions_of_each_slide"]), []
    for i, (regions, grade) in enumerate(zip(s["regions_of_each_slide"], s["labels"], strict=True)):
        features = torch.zeros(longest, *width)
        features[:regions] = torch.from_numpy(fill.values(f"input:slide{i}", (regions, *width), s["seed"]))
        items.append((features, torch.arange(longest) < regions, torch.tensor(grade)))
    shown: list[Tensor] = []  # the outputs of each step
    watch = model.register_forward_hook(lambda module, inputs, output: shown.append(output.detach()))
    history = _trained(
        model,
        InOrder((items[i] for i in s["order"]), s["slides"]),
        head=s["head"],
        classes=s["num_classes"],
        epochs=s["epochs"],
        batch=s["gradient_accumulation"],
        schedule=functools.partial(recipe.halved, every=s["scheduler"]["step_size"]),
        optimizer=recipe.adam(optim["lr"], optim["weight_decay"]),
    )
    watch.remove()
    steps = np.cumsum([len(output) for output in shown])
    with torch.no_grad():  # the last slides, of which no step is made
        shown += [model(items[i][0][None], present=items[i][1][None]) for i in s["order"][steps[-1] :]]
    pairs = zip(torch.cat(shown).split(1), (items[i][2][None] for i in s["order"]), strict=True)
    ours = {f"{key}_of_each_step": [row[key] for row in history] for key in ("loss", "lr")}
    ours["loss_of_each_slide_shown"] = [float(hvit.loss(s["head"], *pair, s["num_classes"])) for pair in pairs]
    rows = [near(key, expected[key], value, **tolerance[key.partition("_")[0]]) for key, value in ours.items()]
    rows.append(same("slides_shown_before_each_step", expected["slides_shown_before_each_step"], steps))
    rows.append(
        same("steps_of_each_epoch", expected["steps_of_each_epoch"], [len(history) // s["epochs"]] * s["epochs"])
    )
    values = {names[n]: t.detach().double() for n, t in model.named_parameters()}
    for name, facts in expected["parameters_at_the_end"].items():
        what, sums = f"parameters_at_the_end {name}", {"sum": values[name].sum()}
        sums["sum_of_squares"] = (values[name] ** 2).sum()
        rows += [near(f"{what} {key}", facts[key], value, **tolerance[key]) for key, value in sums.items()]
    return rows


KINDS = {
    "labels": _labels,
    "loss": _loss,
    "metric": _vote,
    "preprocess_tiling": _tiling,
    "schedule_sampling": _sampling,
    "schedule": _schedule,
    "selection": _selection,
    "groups_region": _groups_region,
    "groups_slide": _groups_slide,
    "trajectory": _trajectory,
}
