"""H-ViT: the recipe cases recorded from computationalpathologygroup/hvit at 444bb72 and clemsgrs/hs2p at f51b276."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from companion import slides
from companion.data import slides as data
from companion.evaluation import fill
from tests.recipes.runner import Case, InOrder, Row, near, same
from companion.models.hvit import model as hvit
from companion.models.hvit import recipe
from companion.models.layers.state_dicts import load_official
from companion.training.fit import CPU, History

ENCODINGS = {"ce": "ordinal", "coral": "coral", "corn": "corn"}  # losses of ordinal labels -> our heads


LEVELS = ("patch_level", "region_level")


def _p(head: str, region: int, method: str, weights: str = "") -> SimpleNamespace:
    """The notebook's parameters that `recipe.build` reads."""
    return SimpleNamespace(
        seed=0, head=head, region=region, method=method, weights=weights, position="none", data_root="nowhere"
    )


def _default(parameter: str) -> Any:
    """The default of a parameter of the notebook."""
    notebook = json.loads((Path(__file__).parents[2] / "notebooks" / "hvit.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
    for line in ast.parse("".join(cell["source"])).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == parameter:
            return ast.literal_eval(line.value)
    raise KeyError(parameter)


def _slides(count: int) -> TensorDataset:
    """Slides of one region of one patch, of grade 1."""
    torch.manual_seed(0)
    return TensorDataset(torch.randn(count, 1, 1, 1), torch.ones(count, 1, dtype=torch.bool), torch.ones(count).long())


def _learn(
    part: Dataset, losses: Iterator[float] | None = None, change: Callable[[nn.Module], object] = id, **options: Any
) -> tuple[int, History]:
    """A small bag of patches trained by `recipe.learn`: the selected epoch, and the history."""
    torch.manual_seed(0)
    model, seen = hvit.PatchBag(1, 6, "regression", "mean", dim=2, dropout=0.0), []
    change(model)

    def loss(model: nn.Module) -> float:
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return next(losses)  # type: ignore[arg-type]

    history = recipe.learn(model, "regression", 6, part, None if losses is None else loss, hardware=CPU, **options)
    last = nn.utils.parameters_to_vector(model.parameters())
    return next((i for i, weights in enumerate(seen) if torch.equal(weights, last)), len(seen)), history


def _labels(case: Case) -> list[Row]:
    expected, classes, logits = case.expected, case.settings["num_classes"], case.data["in.logits"]
    vectors = {str(grade): hvit.extended(torch.tensor([grade]), classes)[0] for grade in range(classes)}
    regression = hvit.predict("regression", case.data["in.regression"], classes)
    return [
        same("ordinal_vector_of_grade", expected["ordinal_vector_of_grade"], vectors),
        same("grade_ordinal_or_coral", expected["grade_ordinal_or_coral"], hvit.predict("ordinal", logits, classes)),
        same(
            "grade_ordinal_or_coral CORAL", expected["grade_ordinal_or_coral"], hvit.predict("coral", logits, classes)
        ),
        same("grade_corn", expected["grade_corn"], hvit.predict("corn", logits, classes)),
        same("grade_regression", expected["grade_regression"], regression),
    ]


def _loss(case: Case) -> list[Row]:
    classes, grades, relative = (
        case.settings["num_classes"],
        case.data["in.grades"],
        case.facts["tolerance"]["relative"],
    )

    def batch_loss(head: str, outputs: Tensor) -> Tensor:
        """The loss of the profile, on outputs in place of a model's."""
        return recipe.batch_loss(head, classes, lambda features, present: features, (outputs, None, grades))

    rows = []
    for name, head in ENCODINGS.items():
        logits, start = case.data["in.logits"].clone().requires_grad_(), f"ordinal {name}, "
        value = hvit.loss(head, logits, grades, classes)
        value.backward()
        for key in (key for key in case.expected if key.startswith(start)):
            ours = batch_loss(head, logits) if "batches of one" in key else value
            rows.append(near(key, case.expected[key], ours.detach(), relative=relative))
        gradient = case.data[f"out.gradient.{name}"]
        room = relative * float(gradient.abs().max())
        rows.append(near(f"out.gradient.{name}", gradient, logits.grad, absolute=room))
    for key, head, name in (
        ("classification ce", "classification", "logits6"),
        ("regression", "regression", "regression"),
    ):
        rows.append(near(key, case.expected[key], batch_loss(head, case.data[f"in.{name}"]), relative=relative))
    return rows


def _vote(case: Case) -> list[Row]:
    s, tolerance = case.settings, case.facts["tolerance"]
    names, truth = s["slide_ids"], torch.tensor(s["label"])
    folds = [*torch.tensor(s["predictions_of_five_folds"]).T]
    each = [recipe.quadratic_kappa(truth, fold) for fold in folds]
    rows, order = (
        [near("kappa_of_each_fold", case.expected["kappa_of_each_fold"], each, **tolerance)],
        np.argsort(names),
    )
    for what, isup in (("plain distance", False), ("custom distance", True)):
        vote, expected = recipe.voted(folds, names, isup), case.expected[what]
        rows += [
            same(f"{what} row_order", expected["row_order"], [names[i] for i in order]),
            same(f"{what} vote", expected["vote"], vote[order]),
            near(f"{what} kappa", expected["kappa"], recipe.quadratic_kappa(truth, vote), **tolerance),
        ]
    return rows


def _tiling(case: Case) -> list[Row]:
    s = case.settings
    segmentation, kept = s["segmentation"], s["filter"]
    tiling = slides.Tiling(
        region=s["tile"],
        mpp=s["target_spacing"],
        saturation=segmentation["sthresh"],
        otsu=segmentation["use_otsu"],
        median=segmentation["mthresh"],
        close=segmentation["close"],
        area=kept["a_t"],
        hole_area=kept["a_h"],
        holes=kept["max_n_holes"],
        drop_holes=s["drop_holes"],
        least=s["tissue_thresh"],
        padding=s["use_padding"],
    )
    mask, size = slides.tissue_mask(case.data["in.thumbnail"].numpy(), tiling), tuple(s["level0"])
    ratio = s["target_spacing"] / s["spacing0"]
    step, unit, factors = int(s["tile"] * ratio), kept["ref_patch_size"] * ratio, slides.axis_factors(size, mask)
    coords, shares, contours = slides.find_tiles(mask, factors, size, step, tiling, unit)
    ours = {
        "coordinates_in_the_order_found": coords,
        "contour": contours,
        "tissue_share": shares,
        "coordinates_in_the_order_of_file_names_x_y": coords[slides.file_order(coords)],
        "tissue_pixels_of_the_mask": int((mask > 0).sum()),
    }
    rows = [same(name, case.expected[name], value) for name, value in ours.items()]
    for name, axis in (("out.mask_rows", 1), ("out.mask_columns", 0)):
        rows.append(same(name, case.data[name], (mask > 0).sum(axis)))
    return rows


def _schedule(case: Case) -> list[Row]:
    """Two epochs on as many small slides, of which each has the loss 1, and the learning rates of all epochs."""
    s, expected, sizes = case.settings, case.expected, []
    count, step, optim = s["slides"], s["gradient_accumulation"] * s["batch_size"], s["optim"]

    def change(model: nn.Module) -> None:
        for t in model.parameters():
            nn.init.zeros_(t)
        model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))

    _, history = _learn(_slides(count), change=change, optimizer=recipe.adam(0.0, 0.0), epochs=2, batch=step)
    per_epoch = len(history) // 2
    divided_by = round(sizes[per_epoch] / history[per_epoch]["loss"])
    left = sizes[per_epoch] - sizes[0]
    lrs = recipe.halved(optim["lr"], s["nepochs"] * per_epoch, per_epoch, optim["lr_scheduler"]["step_size"])
    carried = f"the second epoch's first step has {sizes[per_epoch]} slides, divided by {divided_by}"
    agrees = "added to the first step of the next epoch" in expected["left_over_slides"] and divided_by == step
    return [
        near("lr_of_each_epoch", expected["lr_of_each_epoch"], lrs[::per_epoch], **case.facts["tolerance"]),
        same("steps_of_each_epoch", expected["steps_of_each_epoch"], per_epoch),
        same("slides_left_over_in_each_epoch", expected["slides_left_over_in_each_epoch"], left),
        Row("left_over_slides", expected["left_over_slides"], carried, agrees and left == count % step),
        same("steps_in_all", expected["steps_in_all"], len(lrs)),
    ]


def _sampling(case: Case) -> list[Row]:
    expected, labels = case.expected, torch.tensor(case.settings["labels"])
    balanced = recipe.ClassBalanced(TensorDataset(torch.arange(len(labels)), labels))
    torch.manual_seed(case.settings["torch_seed"])
    drawn = balanced.draw(len(balanced))
    weights = near(
        "weight_of_each_slide", expected["weight_of_each_slide"], balanced.weights, **case.facts["tolerance"]
    )
    return [
        weights,
        same("drawn_in_an_epoch", expected["drawn_in_an_epoch"], len(drawn)),
        same("with_replacement", expected["with_replacement"], len(set(drawn.tolist())) < len(drawn)),
        same("drawn_with_the_seed", expected["drawn_with_the_seed"], drawn),
        same("on_by_default", expected["on_by_default"], _default("sampling") == "weighted"),
    ]


def _selection(case: Case) -> list[Row]:
    s, rows = case.settings, []
    for name, given in s["tuning_loss_of_each_epoch"].items():
        losses = [float(value) for value in given]
        patience = s["patience"] if s["enabled"] else 0
        kept, history = _learn(_slides(1), iter(losses), epochs=len(losses), batch=1, patience=patience)
        stopped = len(history) - 1 if len(history) < len(losses) else None
        ours = {"kept_epoch": kept, "stopped_after_epoch": stopped, "epochs_run": len(history)}
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
    for name, expected in case.expected.items():
        variant, task, encoding, loss = name.partition(",")[0].split()
        head = ENCODINGS[loss] if encoding == "ordinal" else task
        levels = ("slide",) if variant == "global" else ("region", "slide")
        with tempfile.TemporaryDirectory() as folder:
            weights, method = "", variant.title()
            if "with weights" in name:  # the authors' Local freezes it then, which is our Global on patch embeddings
                weights, method = f"{folder}/region.pth", "Global"
                torch.save(hvit.RegionEncoder(s["region_size"] // 256).state_dict(), weights)
            p = _p(head, s["region_size"], method, weights)
            model = recipe.build(p, method, classes=s["num_classes"], levels=levels)
        official = model.official_names()
        names = {id(t): official[n] for n, t in model.named_parameters()}
        groups = []
        for group in recipe.adam()(model).param_groups:
            ordered = sorted((names[id(t)] for t in group["params"]), key=_official)
            facts = {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
            digest = hashlib.sha256("\n".join(ordered).encode()).hexdigest()
            groups.append(facts | {"tensors": len(ordered), "names_sha256": digest})
        trained = {names[id(t)]: t.numel() for t in model.parameters() if t.requires_grad}
        frozen = {names[id(t)]: t.numel() for t in model.parameters() if not t.requires_grad}
        ours = {
            "groups": groups,
            "trained_numbers": sum(trained.values()),
            "frozen_numbers": sum(frozen.values()),
            "output_layer": [n for n in sorted(trained, key=_official) if n == "b" or n.startswith("classifier.")],
            "frozen": sorted({n.partition(".")[0] for n in frozen}),
        }
        rows += [same(f"{name} {key}", expected[key], value) for key, value in ours.items()]
    return rows


def _groups_region(case: Case) -> list[Row]:
    """All levels trained from pixels, at pocket size, by `recipe.learn`; its epochs and stopping are `REGIONS`."""
    expected, relative = case.expected, case.facts["tolerance"]["relative"]
    classes = case.settings["num_classes"]
    torch.manual_seed(0)
    model = hvit.build("pocket", "whole", "classification", patches=2, classes=classes)
    start = {name: t.detach().clone() for name, t in model.named_parameters()}
    pixels = TensorDataset(torch.randn(1, 2, 3, 64, 64), torch.ones(1, 2, dtype=torch.bool), torch.tensor([3]))
    recipe.learn(model, "classification", classes, pixels, epochs=1, hardware=CPU)
    unchanged = [name for name, t in model.named_parameters() if torch.equal(t, start[name])]
    (group,), lrs = recipe.adam()(model).param_groups, recipe.halved(recipe.LEARNING_RATE, 60, 1)
    outputs, grades = torch.randn(4, classes), torch.arange(4)

    def loss(head: str, out: Tensor) -> Tensor:
        return recipe.batch_loss(head, classes, lambda features, present: features, (out, None, grades))

    step = int((lrs == lrs[0]).sum())
    # that the lowest loss is kept, and how the patience counts, is compared in the cases of the selection
    stopping = {"enable": True, "tracking": "loss", "min_max": "min", "patience": recipe.REGIONS["patience"]}
    stopping["min_epoch"] = recipe.EARLIEST - 2  # numbers from 0, and it stops after a later one
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.ones(100, 192), f"{folder}/slide.pt")
        longest = data.Features([data.Item("slide", Path("slide.tiff"), 0)], folder, expected["M_max"])
        regions = len(longest[0][0])
    each = [hvit.loss("corn", outputs[i : i + 1, 1:], grades[i : i + 1], classes) for i in range(4)]
    own = torch.isclose(loss("corn", outputs[:, 1:]), torch.stack(each).mean())
    plain = torch.equal(loss("classification", outputs), F.cross_entropy(outputs, grades))
    return [
        same("optimiser", expected["optimiser"], type(recipe.adam()(model)).__name__),
        near("lr", expected["lr"], group["lr"], relative=relative),
        near("weight_decay", expected["weight_decay"], group["weight_decay"], relative=relative),
        same("nepochs", expected["nepochs"], recipe.REGIONS["epochs"]),
        same("scheduler", expected["scheduler"], {"step_size": step, "gamma": float(lrs[step] / lrs[0])}),
        same("frozen", expected["frozen"], unchanged),
        *(Row(level, expected[level], f"variant whole: unchanged {unchanged}", not unchanged) for level in LEVELS),
        Row("loss", expected["loss"], "cross entropy", plain),
        same("early_stopping", expected["early_stopping"], stopping),
        same("M_max", expected["M_max"], regions),
        same("gradient_accumulation", expected["gradient_accumulation"], recipe.BATCH),
        same("batch_size", expected["batch_size"], 1 if own else len(grades)),
        same("weighted_sampling", expected["weighted_sampling"], _default("sampling") == "weighted"),
    ]


def _trajectory(case: Case) -> list[Row]:
    s, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    tolerance = {name: float(tolerance[name].split()[1]) for name in tolerance}  # "relative 1e-3"
    local, step, optim = s["model"].startswith("Local"), s["gradient_accumulation"], s["optimiser"]
    head = ENCODINGS[s["loss"]] if s["label_encoding"] == "ordinal" else s["task"]
    method, levels = ("Local", ("region", "slide")) if local else ("Global", ("slide",))
    p = _p(head, s.get("region_size", 256), method)
    model = recipe.build(p, method, classes=s["num_classes"], levels=levels, dropout=s["dropout"])
    names, state = model.official_names(), model.state_dict()
    filled = fill.state_dict({names[n]: list(t.shape) for n, t in state.items()}, s["seed"])
    load_official(model, {n: torch.as_tensor(a) for n, a in filled.items()}, names, "H-ViT")
    width = ((s["region_size"] // s["patch_size"]) ** 2, 384) if local else (192,)
    longest, items = max(s["regions_of_each_slide"]), []
    for i, (regions, grade) in enumerate(zip(s["regions_of_each_slide"], s["labels"], strict=True)):
        features = torch.zeros(longest, *width)
        features[:regions] = torch.from_numpy(fill.values(f"input:slide{i}", (regions, *width), s["seed"]))
        items.append((features, torch.arange(longest) < regions, torch.tensor(grade)))
    shown: list[Tensor] = []
    sizes: list[int] = []

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        shown.extend(output.detach().split(1))
        sizes.append(len(output))

    handle = model.register_forward_hook(hook)
    history = recipe.learn(
        model,
        head,
        s["num_classes"],
        InOrder((items[i] for i in s["order"]), s["slides"]),
        epochs=s["epochs"],
        batch=step,
        halve_every=s["scheduler"]["step_size"],
        optimizer=recipe.adam(optim["lr"], optim["weight_decay"]),
        hardware=CPU,
    )
    handle.remove()
    with torch.no_grad():  # the last slides, of which no step is made
        for i in s["order"][len(shown) :]:
            shown.append(model(items[i][0][None], present=items[i][1][None]))
    grades = [items[i][2][None] for i in s["order"]]
    each = [float(hvit.loss(head, out, y, s["num_classes"])) for out, y in zip(shown, grades, strict=True)]
    ours = {f"{key}_of_each_step": [row[key] for row in history] for key in ("loss", "lr")}
    ours["loss_of_each_slide_shown"] = each
    rows = [near(key, expected[key], v, relative=tolerance[key.partition("_")[0]]) for key, v in ours.items()]
    steps = [len(history) // s["epochs"]] * s["epochs"]
    rows += [
        same("slides_shown_before_each_step", expected["slides_shown_before_each_step"], np.cumsum(sizes)),
        same("steps_of_each_epoch", expected["steps_of_each_epoch"], steps),
    ]
    values = {names[n]: t.detach().double() for n, t in model.named_parameters()}
    for name, facts in expected["parameters_at_the_end"].items():
        what, value = f"parameters_at_the_end {name}", values[name]
        rows.append(near(f"{what} sum", facts["sum"], value.sum(), absolute=tolerance["sum"]))
        squares = (value**2).sum()
        rows.append(near(f"{what} squares", facts["sum_of_squares"], squares, relative=tolerance["sum_of_squares"]))
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
