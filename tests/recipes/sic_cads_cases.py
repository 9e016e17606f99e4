"""SIC-CADS' recipe against mala-lab/SIC-CADS at c9f28e1."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from companion import backbones
from companion.data import DATASETS, detection
from companion.data.coco import read_annotations
from companion.data.detection import COCO_BASE, COCO_NOVEL, COCO_OTHER
from companion.evaluation.metrics.detection import evaluate, recognition_ap
from companion.models.layers.state_dicts import official_state
from companion.models.sic_cads import recipe
from companion.models.sic_cads.model import FLOOR, MLR, rank_loss, windows
from companion.training.callbacks import Callback, Loop
from companion.training.recipe import run
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, close, equal, near, same

COCO = [
    {"id": i, "name": name} for name, i in sorted((COCO_BASE | COCO_NOVEL | COCO_OTHER).items(), key=lambda x: x[1])
]
NOT_BUILT = "the recipe with images of ImageNet-21k is not built"


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _parameters(dataset: str, captions: bool, seed: int = 0) -> SimpleNamespace:
    """Those of the notebook that the recipe reads."""
    hardware = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "profile": "paper", "dry_run": True}
    return SimpleNamespace(
        dataset=dataset, captions=captions, seed=seed, data_root="", weights="", gamma=0.0, **hardware
    )


# --- parameter groups, schedules --------------------------------------------------------------------------------------


def _modules(name: str) -> tuple[int, str]:
    """Where a name stands in the authors' model: the pyramid's levels, its top, the ResNet, the heads."""
    order = ["backbone.fpn_", "backbone.top_block", "backbone.bottom_up", "mlr_lin.", "mlr_lin2.", "image_embedding."]
    place = next(i for i, start in enumerate(order) if name.startswith(start))
    level = name.partition(".")[2].partition(".")[0]  # fpn_lateral3, fpn_output3, fpn_lateral4, ...
    return place, level[-1] + level if place == 0 else ""


def _published(want: Mapping[str, Any]) -> recipe.Recipe:
    """The recipe of a configuration of the authors'."""
    return recipe.published(want["dataset"], want["captions"])


def _groups(case: Case) -> list[Row]:
    rows = []
    for config, expected in case.expected.items():
        r = _published(expected)
        body = backbones.build(recipe.BODY, "random")
        model = recipe.Recogniser(body, torch.randn(5, 512), torch.zeros(5) > 0, r.model).train()
        p = _parameters(expected["dataset"], expected["captions"])
        fit = recipe.training(p, lambda: model, InOrder([], r.batch)).fit  # noqa: B023
        names, optimizer, clips = model.official_names(), fit["optimizer"](model), fit["callbacks"]
        trained = {id(t) for group in optimizer.param_groups for t in group["params"]}
        theirs = sorted((names[n] for n, t in model.named_parameters() if id(t) in trained), key=_modules)
        norms = {f"body.{n}" for n, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
        frozen = [n for n, t in model.named_parameters() if id(t) not in trained and n.rpartition(".")[0] not in norms]
        still = all(not model.get_submodule(n).training for n in norms)
        (group,) = optimizer.param_groups
        ours = {
            "optimiser": type(optimizer).__name__.upper(),
            "class_is_clipped": bool(clips),
            "tensors": len(theirs),
            "lrs": [group["lr"]],
            "weight_decays": [group["weight_decay"]],
            "betas": group["betas"],
            "eps": group["eps"],
            "names_sha256": _digest(theirs),
            "trained_numbers": sum(t.numel() for t in group["params"]),
            "frozen": [names[n] for n in frozen],
            "clip": [vars(clip)["max_value"] for clip in clips],
            "not_in_the_backbone": [n for n in theirs if not n.startswith("backbone.")],
            "backbone_multiplier": group["lr"] / r.lr,
            "freeze_at": 0 if "backbone.bottom_up.base.conv1.weight" in theirs else "the first convolution",
            "norm": "FrozenBN" if still and not any(".bn" in n for n in theirs) else "trained",
        }
        clip = expected["clip"]
        wanted = expected | {"clip": [clip["value"]] * clip["enabled"]}
        rows += [same(f"{config} {key}", wanted[key], ours.get(key)) for key in wanted.keys() - OURS]
    return rows


OURS = {"dataset", "captions", "built"}  # ours, not of the authors' settings


def _schedule(case: Case) -> list[Row]:
    rows = []
    for config, expected in case.expected.items():
        if not expected["built"]:
            rows.append(Row(config, f"{expected['iterations']} iterations", "none", False, NOT_BUILT))
            continue
        r = _published(expected)
        found = recipe.learning_rates(r, expected["iterations"])
        steps = expected["lr_of_step"]
        lrs = [found[int(step)] for step in steps]
        rows.append(near(f"{config} lr_of_step", list(steps.values()), lrs, **case.facts["tolerance"]))
        turns = expected["batch_of_each_data_set_per_gpu"]
        ours = {
            "iterations": r.iterations,
            "warmup": r.warmup,
            "warmup_factor": r.factor,
            "base_lr": r.lr,
            "ims_per_batch": r.batch,
            "repeat_threshold": r.repeat or 0.0,
            "batch_of_each_data_set_per_gpu": [r.group] * 2 if expected["captions"] else None,
        }
        rows += equal(expected, ours, f"{config} ")
        if turns:
            share = _share_of_boxes(r.group)
            ratio = expected["dataset_ratio"][0] / sum(expected["dataset_ratio"])
            rows.append(near(f"{config} dataset_ratio", ratio, share, absolute=0.04))
    return rows


def _share_of_boxes(group: int, draws: int = 4000) -> float:
    """The share of groups that come from the first of two sources, of very different sizes."""
    sources = [[(torch.zeros(1), torch.zeros(1) > 0, kind)] * count for kind, count in ((True, 7), (False, 90))]
    turns = recipe.Turns(sources, group)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a share of random draws: of the same ones in each run
        found = torch.stack([turns[i][2] for i in range(draws)])
    assert (found == found[:, :1]).all()  # a group is of one source
    return float(found[:, 0].double().mean())


def _repeats(case: Case) -> list[Row]:
    s, many = case.settings, case.settings["with_class_0"]
    classes = [*s["first"], *([[0]] * many), *s["last"]]
    start, end = len(s["first"]), len(s["last"])
    boxes = _boxes("detection/ov-lvis", detection.lvis_categories()[: 1 + max(map(max, classes))], classes)
    factors = detection.repeat_factors(boxes, case.settings["threshold"])
    repeated = recipe.Repeated(boxes, factors)
    odds = np.bincount(repeated.items, repeated.odds)  # how often an item is drawn, on average
    expected, options = case.expected, case.facts["tolerance"]
    return [
        *close(
            expected,
            {"factor_of_the_first_five": factors[:start], "factor_of_the_last_three": factors[-end:]},
            **options,
        ),
        near("factor_of_the_others", [expected["factor_of_the_others"]] * many, factors[start:-end], **options),
        near("sum", expected["sum"], factors.sum(), **options),
        Row("rounding", expected["rounding"], "the odds add up to the factors", np.allclose(odds, factors)),
    ]


def _lvis_images(case: Case) -> list[Row]:
    s = case.settings
    categories = [{"id": i, "name": f"{i}", "frequency": often} for i, often in enumerate(s["frequencies"], 1)]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 1, "height": 1} for i in range(1, s["images"] + 1)]
    rows = [
        {"image_id": i, "category_id": c + 1, "bbox": [0, 0, 1, 1], "iscrowd": crowd}
        for i, c, crowd in s["image_class_crowd"]
    ]
    truth = read_annotations({"images": images, "annotations": rows, "categories": categories})
    truth = detection.ov_lvis(truth, "train")
    boxes = detection.Boxes(DATASETS["detection/ov-lvis"], Path(), Path(), truth, [], [])
    factors = detection.repeat_factors(boxes, s["threshold"])
    return [
        same("images", case.expected["images"], boxes.image_ids),
        near("factors", case.expected["factors"], factors, **case.facts["tolerance"]),
    ]


def _boxes(dataset: str, categories: Sequence[Mapping], classes: Sequence[Sequence[int]], split: str = "train"):
    """A split of images that have a box of each of some classes (indices), made as the paper profile makes it."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 1, "height": 1} for i in range(len(classes))]
    rows = [
        {"image_id": i, "category_id": categories[c]["id"], "bbox": [0, 0, 1, 1], "area": 1}
        for i, found in enumerate(classes)
        for c in found
    ]
    truth = read_annotations({"images": images, "annotations": rows, "categories": categories})
    make = detection.ov_coco if dataset.endswith("coco") else detection.ov_lvis
    ids = sorted(category["id"] for category in categories)
    seen, tested = ({ids[i] for i in make(truth, split)["annotations"].labels} for split in ("train", "test"))
    return detection.Boxes(DATASETS[dataset], Path(), Path(), make(truth, split), sorted(seen), sorted(tested - seen))


# --- labels -----------------------------------------------------------------------------------------------------------


def _classes(case: Case) -> list[Row]:
    coco = _boxes("detection/ov-coco", COCO, [[i] for i in range(len(COCO))])
    listed = detection.lvis_categories()
    lvis = _boxes("detection/ov-lvis", listed, [[i] for i in range(len(listed))])
    names = coco.class_names
    scored = coco.mask(coco.base) | coco.mask(coco.novel)
    rare = lvis.unseen.nonzero().flatten().tolist()
    synonyms = {c["name"]: c["synonyms"] for c in detection.with_synonyms(COCO)}
    ours = {
        "coco_base_names": [names[i] for i in coco.mask(coco.base).nonzero().flatten()],
        "coco_novel_names": [names[i] for i in coco.mask(coco.novel).nonzero().flatten()],
        "coco_names_sha256": _digest(names),
        "coco_base_of_the_recogniser": (~coco.unseen).nonzero().flatten(),
        "coco_all_that_are_not_base": coco.unseen.nonzero().flatten(),
        "coco_neither": (~scored).nonzero().flatten(),
        "lvis_names_sha256": _digest(lvis.class_names),
        "lvis_classes": len(lvis.class_names),
        "lvis_rare": len(rare),
        "lvis_rare_sha256": _digest([str(i) for i in rare]),
    }
    for key, shown in case.expected.items():
        if key.startswith("coco_synonyms_of"):
            ours[key] = {name: synonyms[name] for name in shown}
        elif key.endswith("first_names"):
            ours[key] = (coco if key.startswith("coco") else lvis).class_names[: len(shown)]
    return [same(key, value, ours.get(key)) for key, value in case.expected.items()]


def _captions(case: Case) -> list[Row]:
    rows = []
    for what, recorded in case.expected.items():
        categories = detection.lvis_categories() if "lvis" in what else detection.with_synonyms(COCO)
        texts = [entry.get("captions") or [entry["caption"]] for entry in recorded]
        captions = {
            "images": [{"id": i} for i in range(len(texts))],
            "annotations": [{"image_id": i, "caption": text} for i, own in enumerate(texts) for text in own],
        }
        found = detection.caption_labels(captions, categories)
        ids = {image["id"]: image["pos_category_ids"] for image in found["images"]}
        names = {category["id"]: category["name"] for category in categories}
        for i, entry in enumerate(recorded):
            detail = f"{what} {' / '.join(texts[i])[:40]}"
            if "ids" in entry:
                rows.append(same(detail, entry["ids"], sorted(ids.get(i, []))))
            if "categories" in entry:
                rows.append(same(detail, sorted(entry["categories"]), sorted(names[c] for c in ids.get(i, []))))
    return rows


# --- images -----------------------------------------------------------------------------------------------------------


def _views(case: Case) -> list[Row]:
    image = case.data["in.image"].permute(2, 0, 1)[None]
    height, width = image.shape[-2:]
    model = MLR(timm.create_model("resnet10t", num_classes=0), torch.randn(3, 4), torch.zeros(3) > 0)
    expected, options = case.expected, case.facts["tolerance"]
    rows = [same("crops_x1_y1_x2_y2", expected["crops_x1_y1_x2_y2"], windows(height, width, model.settings.levels))]

    def at(x: Tensor, h: int, w: int) -> Tensor:
        ys, xs = ([round(i * (side - 1) / 7) for i in range(8)] for side in (h, w))
        return x[:, ys][:, :, xs]

    for i, (crop, found) in enumerate(zip(model.crops(image)[0], expected["crop"], strict=True)):
        rows.append(
            near(f"crop {i}, mean and std", [found["mean"], found["std"]], [crop.mean(), crop.std()], **options)
        )
        rows.append(near(f"crop {i}, grid", found["grid"], at(crop, *crop.shape[1:]), **options))
    found, (seen,) = expected["recogniser"], model.prepared(image)
    h, w = found["size_height_width"]
    inside = seen[:, :h, :w]
    beyond = not seen[:, h:].any() and not seen[:, :, w:].any() and bool(inside[:, -1].any() and inside[:, :, -1].any())
    rows.append(same("recogniser padded_to", found["padded_to"], seen.shape[1:]))
    rows.append(Row("recogniser size_height_width", f"{h} x {w}", "zeros beyond it alone", beyond))
    rows.append(near("recogniser mean", found["mean"], inside.mean(), **options))
    rows.append(near("recogniser grid", found["grid"], at(inside, h, w), **options))
    return rows


def _sizes(case: Case) -> list[Row]:
    model = MLR(timm.create_model("resnet10t", num_classes=0), torch.randn(3, 4), torch.zeros(3) > 0)
    detector, recogniser = [], []
    for height, width in case.settings["height_width"]:
        detector.append(recipe.detector_size(height, width))
        image = torch.full((1, 3, *detector[-1]), 255, dtype=torch.uint8)
        (seen,) = model.prepared(image)[:, 0] != 0  # zeros are padded
        recogniser.append([int(seen[:, 0].sum()), int(seen[0].sum())])
    return equal(case.expected, {"detector": detector, "recogniser": recogniser})


def _training_images(case: Case) -> list[Row]:
    rows = []
    for name, want in case.expected["s_and_size"].items():
        pair = [want["crop"], want["size"]]
        if want["built"]:
            r = _published(want)
            rows.append(same(f"s_and_size {name}", pair, [r.crop, r.size]))
        else:
            rows.append(Row(f"s_and_size {name}", f"{pair}", "none", False, NOT_BUILT))
    drawn = _crop_resize_flip()
    rows += [
        Row(f"operations {name}", text, drawn[name], bool(drawn[name])) for name, text in case.expected["operations"]
    ]
    rows.append(Row("labels_after_the_crop", case.expected["labels_after_the_crop"], *_labels_of_crops()))
    model, images = _small(recipe.published("detection/ov-lvis")), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    crops = mock.patch.object(model, "crops", side_effect=model.crops)
    with crops as cropped, mock.patch.object(model, "prepared", side_effect=model.prepared) as prepared:
        model.loss(images, torch.zeros(2, 80) > 0)
    both = all(call.call_args.args[0] is images for call in (cropped, prepared))
    rows.append(Row("teacher_sees", case.expected["teacher_sees"], "the tensor that the recogniser gets", both))
    return rows


class _One:
    """One image with boxes of the classes 0, 1, ..., the last one a crowd, as `detection.Boxes`."""

    def __init__(self, image: Tensor, boxes: Sequence[Sequence[float]]):
        labels = torch.arange(len(boxes))
        self.image, self.positives = image, torch.ones(1, len(boxes), dtype=torch.bool)
        self.found = detection.Target(torch.tensor(boxes), labels, labels == len(boxes) - 1, 0)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> tuple[Tensor, detection.Target]:
        return self.image, self.found


def _crop_resize_flip() -> dict[str, str]:
    """By operation, what it does to given random numbers and to an image; empty where that is not as recorded."""
    generator, bounds = torch.Generator().manual_seed(0), []
    last = lambda bound, _: bounds.append(bound) or torch.tensor(bound - 1)  # noqa: E731
    with mock.patch("torch.rand", return_value=torch.tensor([0.0, 0.5])), mock.patch("torch.randint", last):
        cropped = recipe.random_crop(201, 333, 0.7)  # 201 * 0.7 = 140.7, 333 * 0.85 = 283.05
    even = cropped == (50, 60, 283, 141) and bounds == [61, 51]
    image = torch.randint(0, 256, (3, 41, 67), generator=generator, dtype=torch.uint8)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((29, 29), Image.Resampling.BILINEAR)
    found = []
    for flip in (0.0, 1.0):
        with mock.patch.object(recipe, "FLIP", flip):
            found.append(recipe.Crops(_One(image, [[0.0] * 4]), 29, 1.0)[0][0].int())  # type: ignore[arg-type]
    close = (found[0] - torch.from_numpy(np.array(pil)).permute(2, 0, 1).int()).abs().max() <= 1
    return {
        "RandomCrop relative_range s": "a share of each side, rounded; any corner" * even,
        "Resize": "PIL's bilinear within one grey level" * bool(close),
        "RandomFlip": f"left-right, {recipe.FLIP}" * (recipe.FLIP == 0.5 and torch.equal(found[0], found[1].flip(-1))),
    }


def _labels_of_crops() -> tuple[str, bool]:
    """Labels of crops of an image whose boxes are at its left edge, everywhere, and everywhere but a crowd."""
    whole, found = [0.0, 0.0, 64.0, 64.0], []
    data = _One(torch.zeros(3, 64, 64, dtype=torch.uint8), [[0.0, 0.0, 4.0, 64.0], whole, whole])
    for left, boxes in ((3, True), (4, True), (4, False)):
        with mock.patch.object(recipe, "random_crop", return_value=(left, 0, 32, 64)):
            found.append(recipe.Crops(data, 64, 0.5, boxes)[0][1].tolist())  # type: ignore[arg-type]
    wanted = [[True, True, False], [False, True, False], [True, True, True]]
    return "gone with its last pixel, no crowd, captions' stay", found == wanted


# --- losses, metrics, selection ---------------------------------------------------------------------------------------


def _many_hot(labels: Sequence[Sequence[int]], classes: int) -> Tensor:
    found = torch.zeros(len(labels), classes, dtype=torch.bool)
    for row, positives in zip(found, labels, strict=True):
        row[list(positives)] = True
    return found


def _losses(case: Case) -> list[Row]:
    classes, options = case.settings["classes"], case.facts["tolerance"]
    base = ~_boxes("detection/ov-coco", COCO, [[i] for i in range(len(COCO))]).unseen
    rows = []
    for kind, columns in (("boxes", base), ("captions", None)):
        scores = case.data["in.scores"].clone().requires_grad_()
        value = rank_loss(scores, _many_hot(case.settings[f"labels_{kind}"], classes), columns)
        rows.append(near(kind, case.expected[kind], value.detach(), **options))
        if (recorded := case.data.get(f"out.gradient_{kind}")) is not None:
            (gradient,) = torch.autograd.grad(value, scores)
            rows.append(near(f"out.gradient_{kind}", recorded, gradient, absolute=1e-6, **options))
    return rows


def _metric(case: Case) -> list[Row]:
    side, options = case.settings["side"], case.facts["tolerance"]
    truth_rows, found_rows = (case.data[f"in.{name}"].tolist() for name in ("truth", "detections"))
    ids = sorted({int(row[0]) for row in truth_rows + found_rows})
    images = [{"id": i, "width": side, "height": side, "file_name": f"{i}"} for i in ids]
    annotations = [
        {"id": n, "image_id": int(i), "category_id": int(c), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, c, *box) in enumerate(truth_rows, 1)
    ]
    results = [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": score} for i, c, *box, score in found_rows
    ]
    truth = {"images": images, "annotations": annotations, "categories": COCO}
    test = detection.Boxes(
        DATASETS["detection/ov-coco"],
        Path(),
        Path(),
        read_annotations(truth),
        [*COCO_BASE.values()],
        [*COCO_NOVEL.values()],
    )
    found = recipe.benchmark(_parameters("detection/ov-coco", True), test, results)
    totals = evaluate(truth, results).totals
    absent = (
        "a class without a box is left out of its group's mean, in which it would be nan (no such class on real data)"
    )
    rows = [*close(case.expected, {"AP50": totals["AP50"], "AP": totals["AP"]}, **options)]
    for key, group in (("AP50-seen", "base"), ("AP50-unseen", "novel")):
        value = case.expected[key]
        theirs = np.nan if value is None else value
        rows.append(near(key, theirs, found[group], departs=absent if value is None else "", **options))
    ap = recognition_ap(case.data["in.labels"].numpy() > 0, case.data["in.scores"].numpy())
    recorded = np.array(case.expected["recognition_ap_of_each_class"])
    rows.append(near("recognition_ap_of_each_class", np.where(recorded == -100, np.nan, recorded), ap, **options))
    return rows


def _ties(case: Case) -> list[Row]:
    scores, labels = (np.array(case.settings[name]).T for name in ("tenths", "labels"))
    reason = "images of equal score have one precision, that of the last: AP does not depend on the order of the images"
    orders = {"ap": 1, "ap_images_reversed": -1}
    found = {name: recognition_ap(labels[::step].copy(), scores[::step].copy()) for name, step in orders.items()}
    rows = [
        near(name, case.expected[name], ap, departs=reason, **case.facts["tolerance"]) for name, ap in found.items()
    ]
    return [*rows, near("ap in both orders", *found.values(), relative=1e-9)]


class _Watch(Callback):
    """The weights after each step, and the end of a training after some of them."""

    def __init__(self, until: int = 0):
        self.until, self.seen = until, []  # type: tuple[int, list[Tensor]]

    def on_step_end(self, loop: Loop) -> None:
        self.seen.append(loop.model.model.heads.shared.weight.detach().clone())
        loop.stopped = loop.step == self.until


def _history(p: Any, model: nn.Module, data: Any, r: recipe.Recipe, watch: _Watch) -> list[dict[str, Any]]:
    """The history of a training by another recipe."""
    with mock.patch.object(recipe, "published", lambda *_: r):
        training = recipe.training(p, lambda: model, data)
    fit = training.fit | {"callbacks": [*training.fit["callbacks"], watch]}
    return run(dataclasses.replace(training, fit=fit, dry_run=False))[1]


class _Colours(nn.Module):
    """Replaces CLIP's image tower: the mean colour of each crop times a fixed matrix."""

    def __init__(self, width: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.from_numpy(fill.values("input:teacher", (3, width), 0)))

    def forward(self, crops: Tensor) -> Tensor:
        return crops.mean((2, 3)) @ self.matrix


def _small(r: recipe.Recipe) -> recipe.Recogniser:
    """A recogniser of 80 classes on a very small ResNet, in training mode."""
    body = timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0)
    text, novel = torch.randn(80, 8), torch.arange(80) < 9
    return recipe.Recogniser(body, text, novel, r.model, teacher=_Colours(8)).train()


def _selection(case: Case) -> list[Row]:
    steps, generator = 4, torch.Generator().manual_seed(0)
    coco = recipe.published("detection/ov-coco", captions=True)
    model = _small(coco)
    images = torch.randint(0, 256, (steps, 3, 64, 64), generator=generator, dtype=torch.uint8)
    items = [(image, torch.rand(80, generator=generator) < 0.1, True) for image in images]
    modes, watch = [], _Watch()
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    short = dataclasses.replace(coco, iterations=steps, warmup=1, batch=1)
    p, data = _parameters("detection/ov-coco", True), InOrder(items, steps)
    history = _history(p, model, data, short, watch)
    last = torch.equal(model.heads.shared.weight, watch.seen[-1]) and not torch.equal(watch.seen[-1], watch.seen[-2])
    kept = "the weights after the last step, bit by bit"
    expected = case.expected
    never = len(modes) == steps and all(modes)
    reason = "the released thresholds belong to the authors' detectors; those refined here return all their boxes"
    rows = [
        Row("kept", expected["kept"], kept, last),
        Row("evaluated_in_training", expected["evaluated_in_training"], f"{len(modes)} forward passes", never),
        *equal(expected, {"early_stop": len(history) < steps, "moving_average": not last}),
    ]
    for name in ("gamma", "lambda_base_novel", "score_threshold", "detections_per_image"):
        for what, want in expected[name].items():
            r = _published(want)
            ours = {"gamma": r.gamma, "lambda_base_novel": [r.model.lambda_base, r.model.lambda_novel]}
            ours |= {"detections_per_image": r.top, "score_threshold": FLOOR}
            rows.append(same(f"{name} {what}", want["value"], ours[name], reason if name == "score_threshold" else ""))
    return rows


# --- trajectories -----------------------------------------------------------------------------------------------------


def _official_shapes(classes: int, width: int) -> dict[str, Tensor]:
    """The authors' recogniser without teacher, on the meta device."""
    with torch.device("meta"):
        body = timm.create_model("resnet50", num_classes=0)
        model = MLR(body, torch.empty(classes, width), torch.zeros(classes, dtype=torch.bool))
    return official_state(model.state_dict(), model.official_names())


def _trajectory(case: Case) -> list[Row]:
    settings, expected, tolerance = case.settings, case.expected, case.facts["tolerance"]
    classes, seed = settings["classes"], settings["seed"]
    width, size = settings["teacher_width"], settings["images"]
    shapes = {name: tuple(t.shape) for name, t in _official_shapes(classes, width).items()}
    state = {name: torch.from_numpy(fill.parameter(name, shape, seed)) for name, shape in shapes.items()}
    dataset, captions = settings["dataset"], settings["captions"]
    categories = COCO if captions else detection.lvis_categories()
    novel = _boxes(dataset, categories, [[i] for i in range(classes)]).unseen
    released, optimiser, changed = _published(settings), settings["optimiser"], settings["changed"]
    model = recipe.Recogniser.from_official(state, novel, released.model)
    model.teacher = _Colours(width).requires_grad_(False)
    items = []
    for i, (kind, labels) in enumerate(zip(settings["kinds"], settings["labels"], strict=True)):
        images = np.random.default_rng([seed, i]).integers(0, 256, size)
        kinds = torch.full((size[0],), kind == "box")
        items.append((torch.from_numpy(images.astype(np.uint8)), _many_hot(labels, classes), kinds))
    r = dataclasses.replace(
        released,
        iterations=changed["MAX_ITER"],
        warmup=changed["WARMUP_ITERS"],
        batch=1,  # an item is a whole batch
        lr=optimiser["lr"],
        factor=settings["schedule"]["warmup_factor"],
        clip=(optimiser["clip"] or {}).get("value"),
    )
    watch = _Watch(settings["steps_done"])
    p = _parameters(dataset, captions, seed)
    history = _history(p, model, InOrder(items, r.iterations), r, watch)
    losses = [[row[name] for name in ("loss", "rank", "distill")] for row in history]
    rows = [
        near("losses_of_each_step", expected["losses_of_each_step"], losses, relative=tolerance["loss"]),
        Row("losses_are", str(expected["losses_are"]), "loss, rank, distill", _is_sum(losses)),
        near("lr_of_each_step", expected["lr_of_each_step"], [row["lr"] for row in history], relative=tolerance["lr"]),
    ]
    after = official_state(model.state_dict(), model.official_names())
    for name, facts in expected["parameters_at_the_end"].items():
        value = after[name].double()
        what = f"parameters_at_the_end {name}"
        rows.append(near(f"{what}, sum", facts["sum"], value.sum(), absolute=tolerance["sum"]))
        squares = near(
            f"{what}, squares", facts["sum_of_squares"], (value**2).sum(), relative=tolerance["sum_of_squares"]
        )
        rows.append(squares)
    return rows


def _is_sum(losses: Sequence[Sequence[float]]) -> bool:
    """Whether the first term of each step is the sum of the others."""
    return all(abs(total - sum(terms)) < 1e-5 for total, *terms in losses)


KINDS = {
    "groups": _groups,
    "schedule_repeat": _repeats,
    "schedule": _schedule,
    "data": _lvis_images,
    "labels_captions": _captions,
    "labels": _classes,
    "preprocess_training": _training_images,
    "preprocess_sizes": _sizes,
    "preprocess": _views,
    "loss": _losses,
    "metric_recognition": _ties,
    "metric": _metric,
    "selection": _selection,
    "trajectory": _trajectory,
}
