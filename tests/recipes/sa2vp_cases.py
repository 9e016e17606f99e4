"""SA²VP: its recipe against cases recorded from tommy-xq/SA2VP at 35674e7."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import DATASETS, classification
from companion.io.papers import paper
from companion.models.layers import classifying
from companion.models.sa2vp import SA2VP, SA2VPSwin, recipe
from companion.models.sa2vp.model import TwoPathways, two_pathway_loss
from companion.training.callbacks import Callback
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.recipe import Training
from companion.training.schedules import Schedule, adamw, schedule
from tests.conftest import parameters as defaults
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, equal, lines, near, parameters, same
from tests.recipes.steps import done, initial, normal, picture

USUAL = vars(defaults("sa2vp", profile="paper", accelerator="cpu"))


def _parameters(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**USUAL | changes)


# --- parameter groups, and the tensors at the start -------------------------------------------------------------------


# a block's attention or first norm, of which the authors' interactions hold frozen copies; and the names of the copies
COPIED = r"(.*encoder\.|.*layers\.2\.)(?:layer|blocks)\.(\d+)\.(?:attn\.(\w+)|attention_norm|norm1)\.(weight|bias)"
COPIES = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out", "qkv": "qkv", "proj": "to_out"}


def _groups(case: Case) -> list[Row]:
    """The frozen copies that their model holds and ours shares have the status of what they are copies of."""
    settings, expected = case.settings, case.expected
    backbone, width = "swin_b" if settings["swin"] else "vit_b16", settings.get("inter_dim", 0)
    p = _parameters(backbone=backbone, dataset=settings["data_set"], width=width)
    model = recipe.build(p, "SA²VP", settings["classes"], "random")
    optimizer = adamw(settings["lr"], settings["weight_decay"])(model)
    decays = {id(t): group["weight_decay"] for group in optimizer.param_groups for t in group["params"]}
    official, status = model.official_names(), {}
    for ours, value in model.named_parameters():
        decay = decays.get(id(value))
        for name in np.ravel(official[ours]):
            status[str(name)] = "frozen" if decay is None else f"decay {decay:g} lr_scale 1"
    for name in list(status):
        if match := re.fullmatch(COPIED, name):
            stem, number, part, kind = match.groups()
            copy = f"attn.{COPIES[part]}" if part else "attention_norm"
            status[f"{stem}cross_attn.{number}.{copy}.{kind}"] = status[name]
    starts = {"frozen": "frozen", "no_decay": "decay 0 ", "decay": f"decay {settings['weight_decay']:g} "}
    counts = {kind: sum(one.startswith(start) for one in status.values()) for kind, start in starts.items()}
    decayed = sum(value.numel() for value in model.parameters() if decays.get(id(value)))
    options = {key: optimizer.defaults[key] for key in ("betas", "eps")} | {"groups": len(optimizer.param_groups)}
    found = {
        "optimizer": {"class": type(optimizer).__name__} | options,
        "tensors": {"all": len(status)} | counts,
        "numbers_trained": {"with_head": model.count(head=True), "without_head": model.count(), "decay": decayed},
        "examples": {name: status.get(name) for name in expected["examples"]},
    }
    rows = equal(expected, found)
    text = [f"{name}\t{status[name]}" for name in sorted(status)]
    rows.append(lines("sorted_lines", expected["sorted_lines"], text))
    rows.append(same("line_format", expected["sorted_lines"]["first"], text[: len(expected["sorted_lines"]["first"])]))
    state = model.to_official()
    for name, facts in expected["initial_values"].items():
        rows += initial(f"initial_values {name}", facts, state[name])
    return rows


# --- images -----------------------------------------------------------------------------------------------------------


def _seen(backbone: str) -> backbones.Input:
    """What the profile makes of images for a backbone, at its size and normalisation."""
    return recipe.input_of(backbone)


def _preprocess(case: Case) -> list[Row]:
    dataset, rows = "vtab/dtd" if case.settings["transform"] == "vtab" else "fgvc/cub200", list[Row]()
    for backbone in ("vit_b16", "swin_b"):
        image = recipe.transforms(dataset, _seen(backbone))[1](Image.fromarray(case.data["in.image"].numpy()))
        rows += picture(case.expected, image, f" {backbone}", grid=2e-2, mean=2e-3, std=2e-3)
    return rows


def _operations(case: Case) -> list[Row]:
    expected, seen = case.expected, _seen("swin_b")
    datasets = {"vtab": "vtab/dtd", "fgvc": "fgvc/cub200"}
    steps = {name: done(recipe.transforms(dataset, seen)[0]) for name, dataset in datasets.items()}
    rows = equal(expected, steps)
    used = {name.lower() for found in steps.values() for name, *_ in found}
    sure = torch.tensor([[100.0, 0.0]])
    if two_pathway_loss(sure, sure, torch.tensor([0])) > 1e-6:
        used.add("labelsmoothing")
    unused = [name for name in expected["not_used"] if name.lower().replace(" ", "") not in used]
    why = "a line of the source that must be edited for each benchmark is no setting"
    chosen = Row("chosen_by", expected["chosen_by"], "the name of the data set", steps["vtab"] == steps["fgvc"], why)
    return [*rows, same("not_used", expected["not_used"], unused), chosen]


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


def _file(dataset: str, part: str) -> str:
    """The list of a split."""
    return f"{part}.json" if dataset.startswith("fgvc") else classification._LISTS[part]


def _opened(dataset: str) -> dict[str, str]:
    """The lists that the profile trains on, selects on and tests."""
    with mock.patch.object(classification, "load", lambda name, root, part, transform: _file(name, part)):
        transforms = recipe.transforms(dataset, _seen("vit_b16"))
        return classifying.images(_parameters(dataset=dataset), transforms)  # type: ignore[return-value]


def _labels(case: Case) -> list[Row]:
    expected, rows = case.expected, []
    classes = {name: DATASETS[dataset].classes for name, dataset in case.settings["classes"].items()}
    remapped = "VPT's lists hold ids of 295 to 1010, for which a loss over 555 classes fails"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _lists(root, "vtab/dtd")
        listed = classification.load("vtab/dtd", root, "train")
        modes = {"train_val": ("train", "val"), "trainval_test": ("trainval", "test"), "else": ("trainval", "val")}
        files = {mode: [_file("vtab", part) for part in parts] for mode, parts in modes.items()}
        line = expected["vtab"]["line"].replace("<path>", "train/1.jpg").replace("<label>", "1")
        text = (root / DATASETS["vtab/dtd"].folders[0] / _file("vtab/dtd", "train")).read_text().splitlines()[1]
        index = all(label == i % listed.classes for i, label in enumerate(listed.labels))
        rows += [
            same("vtab line", line, text),
            *equal(expected["vtab"], {"index": "label" if index else "another number", "files": files}, "vtab "),
        ]
        for theirs, dataset in case.settings["fgvc"].items():
            birds = dataset == "fgvc/nabirds"
            start = 295 if birds else 1
            _lists(root, dataset, start)
            images = classification.load(dataset, root, "train")
            offsets = {i % images.classes + start - label for i, label in enumerate(images.labels)}
            rule = {(0,): "label", (1,): "label - 1"}.get(tuple(offsets), "rank of the id")
            why = remapped if birds else ""
            below = str(images.sources[0]).removeprefix(f"{root / DATASETS[dataset].folders[0]}/")
            rows += [
                same(f"fgvc_index {theirs}", expected["fgvc_index"][theirs], rule, why),
                same(f"fgvc_prefix {theirs}", expected["fgvc_prefix"][theirs], below.removesuffix("train/0.jpg")),
            ]
    return [*rows, same("classes", expected["classes"], classes)]


def _settings(case: Case) -> list[Row]:
    rows: list[Row] = []
    for name, facts in case.expected["vit_b16"].items():
        for dataset in case.settings["data_sets"][name]:
            rows += _setting(f"vit_b16 {name}, {dataset}", dataset, facts)
    return rows + _scripts(case) + _mode(case.expected)


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


def _scripts(case: Case) -> list[Row]:
    expected, sets = case.expected["scripts"], case.settings["data_sets"]
    batch = {part: recipe.published_settings("vit_b16", sets[f"vtab {part}"][0])["batch"] for part in expected["batch"]}
    with torch.device("meta"):
        model = recipe.build(_parameters(), "SA²VP", 2, "random")
    loop, rates, groups = _begun(1e-3, 1000, batch["natural"])
    parts = _opened("vtab/dtd")
    tested = ["trainval_test" if parts["test"] == "test.txt" else "testall", "val" in parts]
    why = "its accuracy is of 200 images that were trained on; the figure reported is that of the test split"
    peak = int(np.argmax(rates)) + 1
    return [
        *equal(
            expected,
            {
                "batch": batch,
                "epochs": loop.steps // loop.per_epoch,
                "warmup_epochs": peak / loop.per_epoch,
                "drop_path": max(_drop_paths(model)),
            },
            "scripts ",
        ),
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
    dropout = expected["vit_dropout"]
    all_drop = drops == {dropout} and len(mlps) == 2 * len(vit.backbone.blocks) and not any(attention)
    depths, rate = _drop_paths(swin), expected["swin_drop_path"]
    callbacks = recipe.fit_options(1e-3, CPU)["callbacks"]
    precision = paper("sa2vp")["precision"]
    seeds = [_training(seed=seed).fit["seed"] for seed in (1, 2)]
    return [
        Row("train_mode vit_dropout", str(dropout), f"drops {drops}, attention {max(attention)}", all_drop),
        same("train_mode vit_drop_path", expected["vit_drop_path"], max(_drop_paths(vit))),
        near("train_mode swin_drop_path", np.linspace(0, rate, len(depths)), depths, absolute=1e-6),
        same("train_mode mixed_precision", expected["mixed_precision"], precision),
        # neither `ClipNorm` nor `MovingAverage`
        *(same(f"train_mode {name}", expected[name], next(iter(callbacks), None)) for name in ("clip_grad", "ema")),
        same("seed", [whole["seed"]] * 2, seeds, "an option --seed that is ignored cannot be meant"),
    ]


def _training(**changes: Any) -> Training:
    """The training of a dry run of the profile."""
    p = _parameters(dry_run=True, **changes)
    return recipe.training(p, recipe.data(p))


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

    `options` of `fit` stand for the profile's.
    """
    watch, data = _Watch(1), TensorDataset(torch.zeros(images, 1), torch.zeros(images, dtype=torch.long))
    usual = recipe.fit_options(lr, CPU) | {"epochs": recipe.EPOCHS, "callbacks": [watch]} | options
    (row,) = fit(nn.Linear(1, 2), recipe.loss, data, batch=batch, **usual)
    rates = usual["schedule"](lr, watch.loop.steps, watch.loop.per_epoch)
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
    """A model whose images are the numbers of the rows of given logits; in eval mode of the first ones."""

    def __init__(self, *logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = tuple(one[images.flatten().long()] for one in self.logits)
        return found if self.training else found[0]


def _loss(case: Case) -> list[Row]:
    logits = [case.data[f"in.logits_{name}"].clone().requires_grad_() for name in ("image", "prompt")]
    labels = case.data["in.labels"]
    value = recipe.loss(_Logits(*logits), (torch.arange(len(labels)), labels))
    value.backward()
    rows = [near("loss", case.expected["loss"], value.detach(), relative=1e-5)]
    for name, x in zip(("image", "prompt"), logits, strict=True):
        rows.append(near(f"out.grad_{name}", case.data[f"out.grad_{name}"], x.grad, absolute=1e-5))
    return rows


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
    accuracies, rows = case.settings["validation_accuracy_by_epoch"], list[Row]()
    count = next(n for n in range(100, 10**6, 100) if all(abs(a * n / 100 % 1) < 1e-9 for a in accuracies))
    val = TensorDataset(torch.arange(count).view(-1, 1).float(), torch.zeros(count, dtype=torch.long))
    data = TensorDataset(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    for benchmark, dataset in (("fgvc", "fgvc/cub200"), ("vtab", "vtab/dtd")):
        expected, parts = case.expected[benchmark], _opened(dataset)
        model = _ByEpoch([round(a * count / 100) for a in accuracies])
        options = recipe.fit_options(1e-3, CPU, val if "val" in parts else None)
        fit(model, recipe.loss, data, epochs=len(accuracies), batch=2, **options)
        rows.append(same(f"{benchmark} kept_epoch", expected["kept_epoch"], int(model.epochs) - 1))
        if "max_accuracy" in expected:
            best = recipe.accuracy(model, val, CPU)
            rows.append(near(f"{benchmark} max_accuracy", expected["max_accuracy"], best, absolute=1e-4))
        rows.append(same(f"{benchmark} trained_on", expected["trained_on"], parts["train"]))
        if "chosen_on" in expected:
            rows.append(same(f"{benchmark} chosen_on", expected["chosen_on"], parts.get("val")))
        reported = ["best" if "val" in parts else "last", parts["test"]]
        rows.append(same(f"{benchmark} reported", expected["reported"], reported))
    return [*rows, same("counting", case.expected["counting"], int(_ByEpoch([0]).epochs))]


# --- trajectories -----------------------------------------------------------------------------------------------------


def _official(facts: dict, fills: int) -> TwoPathways:
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
    state = {name: torch.from_numpy(value) for name, value in fill.state_dict(shapes, fills).items()}
    return type(model).from_official(state, **options, **more)


def _trajectory(case: Case) -> list[Row]:
    settings, expected = case.settings, case.expected
    batch, plan, optimizer = settings["batch"], settings["schedule"], settings["optimizer"]
    model = _official(settings["model"], settings["weights"])
    before = {name: value.clone() for name, value in model.to_official().items()}
    images, labels = normal(batch["images"]), case.data["in.labels"]
    items = ((images[i], labels[i]) for i in itertools.cycle(range(len(images))))
    watch = _Watch()
    options = recipe.fit_options(optimizer["lr"], CPU) | {
        "optimizer": adamw(optimizer["lr"], optimizer["weight_decay"]), "schedule": _plan(plan), "callbacks": [watch]
    }  # fmt: skip
    data = InOrder(items, batch["size"] * plan["steps_per_epoch"])
    history = fit(model, recipe.loss, data, epochs=plan["epochs"], batch=batch["size"], **options)
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
