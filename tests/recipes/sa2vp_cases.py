"""SA²VP: its recipe against cases recorded from tommy-xq/SA2VP at 35674e7."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import DATASETS, classification
from companion.evaluation import fill
from companion.evaluation.recipe_parity import Case, InOrder, Row, lines, near, parameters, same
from companion.models.sa2vp import recipe
from companion.models.sa2vp.model import SA2VP, SA2VPSwin, TwoPathways, two_pathway_loss
from companion.ops.papers import paper
from companion.training.callbacks import Callback
from companion.training.fit import CPU
from companion.training.schedules import Schedule, adamw, schedule
from tests.conftest import parameters as defaults

FGVC = {"cub200": "cub200", "nabirds": "nabirds", "oxford flowers": "flowers102"}
FGVC |= {"stanford dogs": "dogs120", "stanford cars": "cars196"}
CLASSES = {"CUB": "fgvc/cub200", "DOG": "fgvc/dogs120", "FLOWER": "fgvc/flowers102", "CAR": "fgvc/cars196"}
CLASSES |= {"BIRD": "fgvc/nabirds", "CAL101": "vtab/caltech101", "CIFAR": "vtab/cifar100", "DTD": "vtab/dtd"}
CLASSES |= {"FLOWER_S": "vtab/flowers102", "PET": "vtab/pets", "SVHN_S": "vtab/svhn", "SUN": "vtab/sun397"}
CLASSES |= {"DS_LOC": "vtab/dsprites_location", "DS_ORI": "vtab/dsprites_orientation"}
CLASSES |= {"SN_AZI": "vtab/smallnorb_azimuth", "SN_ELE": "vtab/smallnorb_elevation"}
GROUPS = {"vtab natural": ("vtab/cifar100",), "vtab specialized": ("vtab/eurosat",), "hta": ("hta/dtd", "hta/cub200")}
GROUPS |= {"vtab structured": ("vtab/dmlab",), "oxford flowers (FGVC)": ("fgvc/flowers102",)}
EXCEPTIONS = {"svhn": "svhn", "resisc45": "resisc45", "ds/ori (dsprites orientation)": "dsprites_orientation"}
EXCEPTIONS |= {"sn/ele (smallnorb elevation)": "smallnorb_elevation", "pets": "pets", "clevr count": "clevr_count"}
STEM = "vit_base.transformer."


_parameters = functools.partial(defaults, "sa2vp", profile="paper", accelerator="cpu")


# --- parameter groups, and the tensors at the start -------------------------------------------------------------------


def _groups(case: Case) -> list[Row]:
    """The frozen copies that their model holds and ours shares have the status of what they are copies of."""
    settings, expected = case.settings, case.expected
    swin = settings["backbone"].startswith("Swin")
    group, key = re.fullmatch(r"(?:(vtab|hta) )?(.+)", settings["data_set"]).groups()  # type: ignore[union-attr]
    dataset = f"{group or 'fgvc'}/{(EXCEPTIONS if group == 'vtab' else FGVC).get(key, key)}"
    p = _parameters(backbone="swin_b" if swin else "vit_b16", dataset=dataset, width=settings.get("inter_dim", 0))
    model = recipe.build(p, "SA²VP", settings["classes"], "random")
    optimizer = adamw(settings["lr"], settings["weight_decay"])(model)
    of = {id(t): group["weight_decay"] for group in optimizer.param_groups for t in group["params"]}
    official, ours = model.official_names(), dict(model.named_parameters())
    status = {}
    for name, value in ours.items():
        decay = of.get(id(value))
        for theirs in [official[name]] if isinstance(official[name], str) else official[name]:
            status[theirs] = "frozen" if decay is None else f"decay {decay:g} lr_scale 1"
    copied = r"layers\.2\.blocks" if swin else r"encoder\.layer"
    parts = {"attn.qkv": "attn.qkv", "attn.proj": "attn.to_out", "norm1": "attention_norm"}
    parts |= {"attn.query": "attn.to_q", "attn.key": "attn.to_k", "attn.value": "attn.to_v", "attn.out": "attn.to_out"}
    parts |= {"attention_norm": "attention_norm"}
    stem = "vit_base.layers.2." if swin else f"{STEM}encoder."
    for name in list(status):
        found = re.fullmatch(rf".*{copied}\.(\d+)\.(.+)\.(weight|bias)", name)
        if found and found[2] in parts:
            status[f"{stem}cross_attn.{found[1]}.{parts[found[2]]}.{found[3]}"] = status[name]
    starts = {"frozen": "frozen", "no_decay": "decay 0 ", "decay": f"decay {settings['weight_decay']:g} "}
    counts = {kind: sum(one.startswith(start) for one in status.values()) for kind, start in starts.items()}
    numbers = {"with_head": model.count(head=True), "without_head": model.count()}
    numbers["decay"] = sum(value.numel() for value in ours.values() if of.get(id(value)))
    defaults, told = optimizer.defaults, [f"{name}\t{status[name]}" for name in sorted(status)]
    found_optimizer = {"class": type(optimizer).__name__, "betas": defaults["betas"], "eps": defaults["eps"]}
    rows = [
        same("optimizer", expected["optimizer"], found_optimizer | {"groups": len(optimizer.param_groups)}),
        same("tensors", expected["tensors"], {"all": len(status)} | counts),
        same("numbers_trained", expected["numbers_trained"], numbers),
        lines("sorted_lines", expected["sorted_lines"], told),
        same("line_format", expected["sorted_lines"]["first"], told[: len(expected["sorted_lines"]["first"])]),
        same("examples", expected["examples"], {name: status.get(name) for name in expected["examples"]}),
    ]
    state = model.to_official()
    return rows + [
        row for name, facts in expected["initial_values"].items() for row in _initial(name, facts, state[name])
    ]


def _initial(name: str, facts: dict, value: Tensor) -> Iterator[Row]:
    """The distribution that a tensor starts from; of few numbers, its kind and reach."""
    what, count, std = f"initial_values {name}", facts["count"], facts["std"]
    yield same(f"{what} count", count, value.numel())
    spread = 0.1 if count >= 1000 else 0.25 if count >= 40 else 1.0
    yield near(f"{what} std", std, value.std(correction=0), relative=spread, absolute=1e-12)
    yield near(f"{what} mean", facts["mean"], value.mean(), absolute=max(0.1, 4 / count**0.5) * std + 1e-12)
    if std and count >= 40:  # a normal one reaches far, a uniform one 1.7 std
        uniform = facts["max_abs"] < 2 * std
        yield same(f"{what} uniform", uniform, bool(value.abs().max() < 2 * value.std()))


# --- images -----------------------------------------------------------------------------------------------------------


def _seen(backbone: str) -> backbones.Input:
    """What the profile makes of images for a backbone, at its size and normalisation."""
    with torch.device("meta"):
        return recipe.input_of(_parameters(backbone=backbone), backbones.build(backbone, "random"))


def _preprocess(case: Case) -> list[Row]:
    expected, rows = case.expected, []
    dataset = "vtab/dtd" if case.settings["transform"] == "vtab" else "fgvc/cub200"
    for backbone in ("vit_b16", "swin_b"):
        seen = _seen(backbone)
        tensor = recipe.transforms(dataset, seen)[1](Image.fromarray(case.data["in.image"].numpy()))
        grid = tensor[:, expected["rows"]][:, :, expected["columns"]]
        rows += [
            same(f"shape {backbone}", expected["shape"], tensor.shape),
            near(f"rows {backbone}", np.mean(expected["grid"], (0, 2)), grid.mean((0, 2)), absolute=2e-2),
            near(f"columns {backbone}", np.mean(expected["grid"], (0, 1)), grid.mean((0, 1)), absolute=2e-2),
            near(f"grid {backbone}", expected["grid"], grid, absolute=2e-2),
            near(f"mean {backbone}", expected["mean"], tensor.mean((1, 2)), absolute=2e-3),
            near(f"std {backbone}", expected["std"], tensor.std((1, 2)), absolute=2e-3),
        ]
    return rows


def _operations(case: Case) -> list[Row]:
    """What random draws do to an image of noise, in which each crop fits in one position alone."""
    expected, size = case.expected, case.settings["input_size"]
    seen, (height, width) = _seen("swin_b"), (300, 420)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    vtab, plain = recipe.transforms("vtab/dtd", seen)
    torch.manual_seed(0)
    draws = torch.stack([vtab(picture) for _ in range(8)])
    squeezed = picture.resize((size, size), Image.Resampling.BILINEAR)
    whole = _normalised(squeezed, 0.5)
    fixed = bool((draws == draws[0]).all()) and torch.equal(draws[0], plain(picture))
    close = draws[0].shape == whole.shape and float((draws[0] - whole).abs().max()) < 0.02
    told = expected["vtab"] if fixed and close else f"random: {not fixed}, squeezed to {size}: {close}"
    found = [same("vtab", expected["vtab"], told)]

    fgvc, _ = recipe.transforms("fgvc/cub200", seen)
    short = int(re.findall(r"Resize\((\d+)\)", expected["fgvc"][0])[0])
    resized = _normalised(picture.resize((int(short * width / height), short), Image.Resampling.BILINEAR), 0.5)
    corners, flips, other, count = [], 0, 0, 200
    for _ in range(count):
        crop = fgvc(picture)
        upright, flipped = min(((crop, 0), (crop.flip(-1), 1)), key=lambda one: _fit(resized, one[0])[0])
        gap, corner = _fit(resized, upright)
        corners.append(corner)
        flips, other = flips + flipped, other + (gap > 0.02)
    reach = [max(ends) - min(ends) for ends in zip(*corners, strict=True)]
    room = [short - size, resized.shape[2] - size]
    told = f"other than crop and flip: {other}, corners reach {reach} of {room}, flipped {flips / count:.2f}"
    agrees = not other and all(0.9 * b <= a for a, b in zip(reach, room, strict=True)) and 0.4 < flips / count < 0.6
    found.append(Row("fgvc", str(expected["fgvc"]), told, agrees))
    found.append(_unused(expected["not_used"], other == 0 and fixed))
    one_for_all = type(vtab.transforms[1]) is type(fgvc.transforms[1])
    why = "a line of the source that must be edited for each benchmark is no setting"
    found.append(Row("chosen_by", expected["chosen_by"], "the name of the data set", one_for_all, why))
    return found


def _fit(whole: Tensor, crop: Tensor) -> tuple[float, tuple[int, int]]:
    """Where in `whole` a crop fits best by its four corners: the largest difference there, and the top left corner."""
    (height, width), (rows, columns) = (
        crop.shape[1:],
        (a - b + 1 for a, b in zip(whole.shape[1:], crop.shape[1:], strict=True)),
    )
    corners = [(y, x) for y in (0, height - 1) for x in (0, width - 1)]
    gaps = sum((whole[:, y : y + rows, x : x + columns] - crop[:, y, x, None, None]).abs().sum(0) for y, x in corners)
    top, left = divmod(int(gaps.argmin()), columns)
    return float((whole[:, top : top + height, left : left + width] - crop).abs().max()), (top, left)


def _normalised(picture: Image.Image, middle: float) -> Tensor:
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - middle) / middle


def _unused(names: list[str], plain: bool) -> Row:
    """Mixing and smoothing: whether a training changes the images or the labels it is given; `plain`: no augmentation
    but crops and flips was seen."""
    images, labels, seen = torch.eye(6).view(6, 1, 6, 1), torch.arange(6) % 3, []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 6))

        def forward(self, batch: Tensor) -> Tensor:
            seen.extend(batch.flatten(1).tolist())
            return batch.flatten(1) @ self.weight.T

    recipe.train_model(Watching(), TensorDataset(images, labels), 0.0, epochs=2, batch=3, hardware=CPU)
    unmixed = sorted(seen) == sorted(images.flatten(1).tolist() * 2)
    sure = 100 * torch.eye(3)[labels]
    hard = float(two_pathway_loss(sure, sure, labels)) < 1e-6
    used = {"mixup": not unmixed, "cutmix": not unmixed, "label smoothing": not hard}
    return same("not_used", names, [name for name in names if not used.get(name, not plain)])


# --- labels, settings, schedule ---------------------------------------------------------------------------------------


def _lists(root: Path, dataset: str, first: int = 0) -> None:
    """Made-up lists of a data set, as long as its own, with the label `first + i % classes` of image i."""
    facts = DATASETS[dataset]
    folder = root / facts.folders[0]
    parts = [part for part in ("train", "val", "trainval", "test") if not (part == "trainval" and "fgvc" in dataset)]
    for part in parts:
        name = classification._LISTS[part] if "vtab" in dataset else f"{part}.json"
        images = folder / (classification.IMAGES[dataset.partition("/")[2]] if "fgvc" in dataset else "")
        labels = {f"{part}/{i}.jpg": first + i % (facts.classes or 2) for i in range(facts.sizes[part])}
        for path in (next(iter(labels)), list(labels)[-1]):
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            (images / path).touch()
        text = json.dumps(labels) if "fgvc" in dataset else "".join(f"{k} {v}\n" for k, v in labels.items())
        (folder / name).write_text(text)


def _source(images: classification.Images) -> str:
    """The list that the first image of `_lists` is from."""
    part = Path(images.sources[0]).parent.name
    return f"{part}.json" if images.name.startswith("fgvc") else classification._LISTS[part]


def _labels(case: Case) -> list[Row]:
    expected, rows = case.expected, []
    classes = {name: DATASETS[CLASSES.get(name, f"vtab/{name.lower()}")].classes for name in expected["classes"]}
    remapped = "VPT's lists hold ids of 295 to 1010, for which a loss over 555 classes fails"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _lists(root, "vtab/dtd")
        opened = {part: classification.load("vtab/dtd", root, part) for part in classification.SPLITS}
        by_part = {part: _source(images) for part, images in opened.items()}
        modes = {"train_val": ("train", "val"), "trainval_test": ("trainval", "test"), "else": ("trainval", "val")}
        line = expected["vtab"]["line"].replace("<path>", "train/1.jpg").replace("<label>", "1")
        first = (root / DATASETS["vtab/dtd"].folders[0] / by_part["train"]).read_text().splitlines()[1]
        index = all(label == i % (classes["DTD"] or 2) for i, label in enumerate(opened["train"].labels))
        files = {mode: [by_part[part] for part in parts] for mode, parts in modes.items()}
        rows += [
            same("vtab line", line, first),
            same("vtab index", expected["vtab"]["index"], "label" if index else "another number"),
            same("vtab files", expected["vtab"]["files"], files),
        ]
        for theirs, key in FGVC.items():
            start = 295 if key == "nabirds" else 1
            _lists(root, f"fgvc/{key}", start)
            images = classification.load(f"fgvc/{key}", root, "train")
            offsets = {i % (images.classes) + start - label for i, label in enumerate(images.labels)}
            rule = {0: "label", 1: "label - 1"}.get(next(iter(offsets)), "rank of the id") if len(offsets) == 1 else "?"
            why = remapped if key == "nabirds" else ""
            rows.append(same(f"fgvc_index {theirs}", expected["fgvc_index"][theirs], rule, why))
            below = str(images.sources[0]).removeprefix(f"{root / DATASETS[f'fgvc/{key}'].folders[0]}/")
            prefix = below.removesuffix("train/0.jpg")
            rows.append(same(f"fgvc_prefix {theirs}", expected["fgvc_prefix"][theirs], prefix))
    return [*rows, same("classes", expected["classes"], classes)]


def _settings(case: Case) -> list[Row]:
    rows: list[Row] = []
    for name, facts in case.expected["vit_b16"].items():
        if name == "exceptions":
            for key, changes in facts.items():
                rows += _setting(f"vit_b16 {key}", f"vtab/{EXCEPTIONS[key]}", changes)
            continue
        for dataset in GROUPS.get(name, (f"fgvc/{FGVC.get(name, name)}",)):
            rows += _setting(f"vit_b16 {name}, {dataset}", dataset, facts)
    return rows + _scripts(case.expected["scripts"]) + _mode(case.expected)


def _setting(what: str, dataset: str, facts: dict) -> Iterator[Row]:
    """The profile's setting of a data set, by the authors' names of it."""
    found = recipe.published_settings("vit_b16", dataset)
    for theirs, ours in (("inter_dim", "width"), ("inter_weight", "scale"), ("lr", "lr")):
        if theirs in facts:
            yield same(f"{what} {theirs}", facts[theirs], found[ours])
    if "batch" in facts:
        yield Row(
            f"{what} batch", facts["batch"], str(found["batch"]), str(found["batch"]) in facts["batch"].split("/")
        )
    with torch.device("meta"):
        model = recipe.build(_parameters(dataset=dataset), "SA²VP", 2, "random")
    yield same(f"{what} new_prompt_maps", facts.get("new_prompt_maps", 2), len(model.new_prompts))


def _scripts(expected: dict) -> list[Row]:
    batch = {
        part: recipe.published_settings("vit_b16", GROUPS[f"vtab {part}"][0])["batch"] for part in expected["batch"]
    }
    with torch.device("meta"):
        model = recipe.build(_parameters(), "SA²VP", 2, "random")
    loop, rates, groups = _begun(1e-3, 1000, batch["natural"])
    with tempfile.TemporaryDirectory() as name:
        _lists(Path(name), "vtab/dtd")
        parts = recipe.splits("vtab/dtd", name, _seen("vit_b16"))
    tested = ["trainval_test" if _source(parts["test"]) == "test.txt" else "testall", "val" in parts]
    why = "its accuracy is of 200 images that were trained on; the figure reported is that of the test split"
    peak = int(np.argmax(rates)) + 1
    return [
        same("scripts batch", expected["batch"], batch),
        same("scripts epochs", expected["epochs"], loop.steps // loop.per_epoch),
        same("scripts warmup_epochs", expected["warmup_epochs"], peak / loop.per_epoch),
        same("scripts drop_path", expected["drop_path"], max(_drop_paths(model))),
        near("scripts min_lr", expected["min_lr"], rates[-1], relative=2e-2),
        same("scripts weight_decay", expected["weight_decay"], max(groups)),
        same("scripts mode", [expected["mode"], False], tested, why),
    ]


def _mode(whole: dict) -> list[Row]:
    """What a full-size model in training mode does, and what acts on its gradients and weights."""
    expected = whole["train_mode"]
    with torch.device("meta"):
        vit, swin = (
            recipe.build(_parameters(backbone=name), "SA²VP", 2, "random").train() for name in ("vit_b16", "swin_b")
        )
    mlps = [d.p for block in vit.backbone.blocks for d in (block.mlp.drop1, block.mlp.drop2) if d.training]
    attention = [block.attn.attn_drop.p for block in vit.backbone.blocks]
    adapters = [adapter.dropout.p for adapter in vit.adapters]
    drops = {vit.dropout.p, *mlps, *adapters}
    said = float(expected["vit_dropout"].split(",")[0])
    all_drop = drops == {said} and len(mlps) == 2 * len(vit.backbone.blocks) and not any(attention)
    depths, rate = _drop_paths(swin), float(expected["swin_drop_path"].split(",")[0])
    gradient, stepped, kept = _steps()
    seeds = [recipe._options(_parameters(seed=seed), 1, 1)["seed"] for seed in (1, 2)]
    return [
        Row("train_mode vit_dropout", expected["vit_dropout"], f"drops {drops}, attention {max(attention)}", all_drop),
        same("train_mode vit_drop_path", expected["vit_drop_path"], max(_drop_paths(vit))),
        near("train_mode swin_drop_path", np.linspace(0, rate, len(depths)), depths, absolute=1e-6),
        Row(
            "train_mode mixed_precision",
            expected["mixed_precision"],
            (found := paper("sa2vp")["precision"]),
            found == "16-mixed",
        ),
        same("train_mode clip_grad", expected["clip_grad"], None if abs(gradient - 500) < 1 else gradient),
        same("train_mode ema", expected["ema"], None if torch.equal(stepped, kept) else "an average"),
        same("seed", [42, 42], seeds, "an option --seed that is ignored cannot be meant"),
    ]


def _steps() -> tuple[float, Tensor, Tensor]:
    """Two steps with a gradient whose largest entry is 500: that entry at the first step, the weights after the last
    step, and the selected ones."""
    used: list[Tensor] = []

    class Used(Callback):
        def on_step_end(self, loop: Any) -> None:
            (state,) = loop.optimizer.state.values()
            used.extend([state["exp_avg"].abs().max() / 0.1, loop.model.weight.detach().clone()])

    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    data = TensorDataset(torch.full((2, 1), 1000.0), torch.zeros(2, dtype=torch.long))
    options: dict[str, Any] = {"epochs": 2, "batch": 2, "hardware": CPU, "callbacks": [Used()]}
    recipe.train_model(model, data, 0.1, schedule=schedule("constant", 0.0), **options)
    return float(used[0]), used[-1], model.weight.detach()


def _drop_paths(model: TwoPathways) -> list[float]:
    """The stochastic depth of each frozen block."""
    swin = isinstance(model, SA2VPSwin)
    blocks = [b for layer in model.backbone.layers for b in layer.blocks] if swin else model.backbone.blocks
    return [float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0) for block in blocks]


class _Watch(Callback):
    """The learning rates of each step by parameter group; ends the training after `steps`."""

    def __init__(self, steps: int = 10**9):
        self.steps, self.lrs, self.loop = steps, list[list[float]](), None

    loop: Any

    def on_step_end(self, loop: Any) -> None:
        self.loop = loop
        self.lrs.append([group["lr"] for group in loop.optimizer.param_groups])
        loop.stopped = loop.step >= self.steps


def _begun(lr: float, images: int, batch: int, **options: Any) -> tuple[Any, np.ndarray, list[float]]:
    """A training as long as the profile's, ended after a step: its loop, learning rates, and the decay of each group.

    `options` of `train_model` stand for the profile's.
    """
    watch, data = _Watch(1), TensorDataset(torch.zeros(images, 1), torch.zeros(images, dtype=torch.long))
    usual: dict[str, Any] = {"epochs": recipe.EPOCHS, "hardware": CPU, "callbacks": [watch]}
    (row,) = recipe.train_model(nn.Linear(1, 2), data, lr, batch=batch, **usual | options)
    rates = options.get("schedule", recipe.SCHEDULE)(lr, watch.loop.steps, watch.loop.per_epoch)
    if watch.lrs != [[rates[0]] * 2] or row["lr"] != rates[0]:
        rates = np.full_like(rates, np.nan)  # another schedule was run
    return watch.loop, rates, [group["weight_decay"] for group in watch.loop.optimizer.param_groups]


def _plan(facts: dict) -> Schedule:
    return schedule("cosine", facts["warmup_epochs"] / facts["epochs"], facts["min_lr"])


def _schedule(case: Case) -> list[Row]:
    settings, rows = case.settings, []
    options = {"epochs": settings["epochs"], "schedule": _plan(settings)}
    options["last"] = "drop" if settings["drop_last"] else "train"
    for name, facts in settings["sets"].items():
        expected = case.expected[name]
        loop, rates, _ = _begun(facts["lr"], facts["images"], facts["batch"], **options)
        ours = {
            "images": facts["images"],
            "batch": facts["batch"],
            "steps_per_epoch": loop.per_epoch,
            "steps": loop.steps,
        }
        at = [rates[int(step)] if int(step) < len(rates) else np.nan for step in expected["lr_at_step"]]
        rows += [
            same(f"{name} steps", {key: expected[key] for key in ours}, ours),
            near(f"{name} lr", [*expected["lr_at_step"].values()], at, relative=1e-6, absolute=1e-12),
            near(f"{name} sum", expected["sum_of_all_rates"], rates.sum(), relative=1e-6),
        ]
    return rows


# --- loss, metric, selection ------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A model whose images are the numbers of the rows of given logits."""

    def __init__(self, *logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(one[images.flatten().long()] for one in self.logits)


def _loss(case: Case) -> list[Row]:
    logits = [case.data[f"in.logits_{name}"].clone().requires_grad_() for name in ("image", "prompt")]
    labels = case.data["in.labels"]
    value = recipe.loss(_Logits(*logits), (torch.arange(len(labels)), labels))
    value.backward()
    return [
        near("loss", case.expected["loss"], value.detach(), relative=1e-5),
        *(near(f"out.grad_{name}", case.data[f"out.grad_{name}"], one.grad, absolute=1e-5)
          for name, one in zip(("image", "prompt"), logits, strict=True)),
    ]  # fmt: skip


def _metric(case: Case) -> list[Row]:
    """Theirs prints the plain mean of the loss over batches, which is no result of the profile: computed here."""
    labels, sizes = case.data["in.labels"], case.settings["batches"]
    model = _Logits(case.data["in.logits_image"], case.data["in.logits_prompt"])
    data = TensorDataset(torch.arange(len(labels)).view(-1, 1), labels)
    losses = [recipe.loss(model, (x[:, 0], y)) for x, y in zip(*(t.split(sizes) for t in data.tensors), strict=True)]
    return [
        near("acc1", case.expected["acc1"], recipe.accuracy(model, data, CPU, batch=max(sizes)), absolute=1e-4),
        near("loss", case.expected["loss"], torch.stack(losses).mean(), relative=1e-5),
    ]


class _ByEpoch(nn.Module):
    """A classifier whose number of correct images equals its number of trained epochs."""

    def __init__(self, right: list[int]):
        super().__init__()
        self.right = right
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("epochs", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.epochs += 1
        wrong = images.flatten() >= self.right[max(int(self.epochs) - 1, 0)]
        return torch.stack([~wrong, wrong], 1).float() + 0 * self.weight


def _selection(case: Case) -> list[Row]:
    """The epoch whose weights a training of the profile keeps, and the lists that it reads."""
    accuracies, rows = case.settings["validation_accuracy_by_epoch"], []
    count = next(n for n in range(100, 10**6, 100) if all(abs(a * n / 100 % 1) < 1e-9 for a in accuracies))
    val = TensorDataset(torch.arange(count).view(-1, 1).float(), torch.zeros(count, dtype=torch.long))
    data = TensorDataset(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    for benchmark, dataset in (("fgvc", "fgvc/cub200"), ("vtab", "vtab/dtd")):
        expected = case.expected[benchmark]
        with tempfile.TemporaryDirectory() as name:
            _lists(Path(name), dataset, int(benchmark == "fgvc"))
            parts = recipe.splits(dataset, name, _seen("vit_b16"))
        found = recipe.Setting(
            title=dataset,
            train=data,
            test=val,
            classes=("right", "wrong"),
            input=_seen("vit_b16"),
            learning_rates={"toy": 1e-3},
            build=lambda method: _ByEpoch([round(a * count / 100) for a in accuracies]),
            options={"epochs": len(accuracies), "batch": 2, "hardware": CPU},
            val=val if "val" in parts else None,
        )
        model, _ = recipe.train(found, "toy")
        rows.append(same(f"{benchmark} kept_epoch", expected["kept_epoch"], int(model.epochs) - 1))
        if "max_accuracy" in expected:
            rows.append(
                near(
                    f"{benchmark} max_accuracy",
                    expected["max_accuracy"],
                    recipe.accuracy(model, val, CPU),
                    absolute=1e-4,
                )
            )
        rows.append(same(f"{benchmark} trained_on", expected["trained_on"], _source(parts["train"])))
        chosen = _source(parts["val"]) if "val" in parts else "nothing"
        if "chosen_on" in expected:
            rows.append(same(f"{benchmark} chosen_on", expected["chosen_on"].split(" ")[0], chosen))
        kept = "last checkpoint" if chosen == "nothing" else "checkpoint-best"
        told = f"{kept} on {_source(parts['test'])}"
        rows.append(Row(f"{benchmark} reported", expected["reported"], told, told in expected["reported"]))
    first = int(_ByEpoch([0]).epochs)
    return [*rows, same("counting", case.expected["counting"], f"epochs from {first}")]


# --- trajectories -----------------------------------------------------------------------------------------------------


def _drawn(text: str) -> np.ndarray:
    """The array that a call of NumPy's generator, given as text, makes."""
    seed, shape = re.fullmatch(r"numpy\.random\.default_rng\((\d+)\)\.standard_normal\(\(([\d, ]+)\).*", text).groups()  # type: ignore[union-attr]
    return np.random.default_rng(int(seed)).standard_normal([int(n) for n in shape.split(",")], dtype=np.float32)


def _official(facts: dict, seed: int) -> TwoPathways:
    """The small model of a trajectory, its tensors filled under the authors' names, without dropout."""
    options = {"scale": facts["add_scale"], "dropout": 0.0}
    size, classes, width = facts["image"], facts["classes"], facts["inter_dim"]
    model: TwoPathways
    if "window" in facts:
        heads, depths = tuple(facts["heads"]), tuple(facts["depths"])
        backbone = SwinTransformer(
            img_size=size, patch_size=facts["patch"], embed_dim=facts["embed_dim"], depths=depths, num_heads=heads,
            window_size=facts["window"], num_classes=0,
        )  # fmt: skip
        model, more = SA2VPSwin(backbone, classes, width), {"image_size": size, "heads": heads}
    else:
        ratio = facts["mlp_dim"] / facts["dim"]
        plain = VisionTransformer(
            img_size=size, patch_size=facts["patch"], embed_dim=facts["dim"], depth=facts["depth"],
            num_heads=facts["heads"], mlp_ratio=ratio, num_classes=0,
        )  # fmt: skip
        model = SA2VP(plain, classes, width, new_maps=facts["maps"])
        more = {"heads": facts["heads"], "patch": facts["patch"]}
    shapes = {name: list(tensor.shape) for name, tensor in model.to_official().items()}
    state = {name: torch.from_numpy(value) for name, value in fill.state_dict(shapes, seed).items()}
    return type(model).from_official(state, **options, **more)


def _trajectory(case: Case) -> list[Row]:
    settings, expected = case.settings, case.expected
    batch, plan, optimizer = settings["batch"], settings["schedule"], settings["optimizer"]
    seed = re.search(r"seed=(\d+)", settings["weights"])
    model = _official(settings["model"], int(seed[1]) if seed else 0)
    before = {name: value.clone() for name, value in model.to_official().items()}
    images, labels = torch.from_numpy(_drawn(batch["images"])), case.data["in.labels"]
    items = ((images[i], labels[i]) for i in itertools.cycle(range(len(images))))
    watch = _Watch()
    history = recipe.train_model(
        model,
        InOrder(items, batch["size"] * plan["steps_per_epoch"]),
        optimizer["lr"],
        weight_decay=optimizer["weight_decay"],
        epochs=plan["epochs"],
        batch=batch["size"],
        schedule=_plan(plan),
        callbacks=[watch],
        hardware=CPU,
    )
    after = model.to_official()
    lrs = dict(zip(("decay", "no_decay"), np.array(watch.lrs).T, strict=True))
    rows = [
        near("losses", expected["losses"], [row["loss"] for row in history], relative=1e-3),
        *(
            near(f"lr {name}", expected["lr"][name], lrs[name], relative=1e-6, absolute=1e-12)
            for name in expected["lr"]
        ),
        same("trained_tensors", expected["trained_tensors"], len(model.trained())),
        *parameters("parameters_after", expected["parameters_after"], after, 1e-3),
    ]
    for name, facts in expected.get("unchanged", {}).items():
        rows += parameters("unchanged", {name: facts}, after, 1e-5)
        rows.append(same(f"unchanged {name} bits", True, torch.equal(before[name], after[name])))
    return rows


KINDS: dict[str, Callable[[Case], list[Row]]] = {
    "groups_": _groups,
    "labels_": _labels,
    "loss_": _loss,
    "metric_": _metric,
    "preprocess_train": _operations,
    "preprocess_": _preprocess,
    "schedule_": _schedule,
    "selection_": _selection,
    "settings_": _settings,
    "trajectory_": _trajectory,
}
