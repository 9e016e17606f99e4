"""DPLQ's recipe against caoql98/DPLQ at 3d78bb5, which builds on the Dassl toolbox."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import DATASETS, domains, fewshot
from companion.data.domains_sets import CLASSES
from companion.evaluation import fill
from tests.recipes.runner import Case, InOrder, Row, lines, near, parameters, same
from companion.models.dplq import recipe
from companion.models.dplq.model import DPLQ, PROMPT, NoFeatures, loss
from companion.models.layers.clip_prompting import Texts, _tower_names, embed_texts
from companion.models.layers.state_dicts import official_state
from companion.training.callbacks import Callback
from companion.training.fit import CPU, Loop, fit
from tests.conftest import parameters as defaults
from tests.recipes.steps import Watched, done, drawn, initial, number, seed, told

LEFT_OUT = "`visual_net`, in no forward pass and hence without gradient and decay, is left out"
NOT_USED = "the tables of results hold the accuracy over all images alone"


def _parameters(protocol: str, seed: int = 0) -> SimpleNamespace:
    """Those of the notebook that the recipe reads."""
    hardware = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "profile": "paper", "dry_run": True}
    names = {"protocol": protocol, "seed": seed, "noise": "always", "clip": "ViT-B-16/openai"}
    return SimpleNamespace(method="DPLQ", dataset="remote/aid", **names, **hardware)


# --- parameter groups, schedule ---------------------------------------------------------------------------------------


def _groups(case: Case) -> list[Row]:
    settings, expected = case.settings, case.expected
    p = _parameters(settings["protocol"])
    clip = backbones.build(f"openclip:{p.clip}", "random")
    names = tuple(f"class {i}" for i in range(settings["classes"]))
    model = recipe.build(p, "DPLQ", names, clip, NoFeatures(clip.visual.output_dim))
    assert isinstance(model, DPLQ)
    optimizer = recipe.optimizer(recipe.published_settings(p.protocol)["learning rate"])(model)
    held = {id(t) for group in optimizer.param_groups for t in group["params"]}
    official = model._names() | _tower_names(model)
    own = {name: model.get_parameter(name) for name in official}
    trained = official_state(own, {n: o for n, o in official.items() if id(own[n]) in held})
    frozen = official_state(own, {n: o for n, o in official.items() if id(own[n]) not in held})
    rows = [f"{name}\ttrained" for name in trained] + [f"{name}\tfrozen" for name in frozen]
    unused = [f"{name}\ttrained" for name in expected["trained_without_gradient"]]
    known = sum(name.startswith(DPLQ._unused) for name in expected["trained_without_gradient"])
    (group,) = optimizer.param_groups
    numbers = sum(t.numel() for t in trained.values())
    learned = [name for name in expected["trained_names"] if not name.startswith("visual_net.")]
    return [
        same("optimizer", expected["optimizer"], type(optimizer).__name__),
        same("groups", expected["groups"], len(optimizer.param_groups)),
        same("weight_decay", expected["weight_decay"], group["weight_decay"]),
        same("momentum", expected["momentum"], group["momentum"]),
        same(
            "optimizer_holds_all_parameters",
            expected["optimizer_holds_all_parameters"],
            len(held) == sum(1 for _ in model.parameters()),
            "frozen tensors have no gradient: they are not given to it",
        ),
        same("trained_tensors", expected["trained_tensors"], len(trained), LEFT_OUT),
        same("trained_numbers", expected["trained_numbers"], numbers, LEFT_OUT),
        same("trained_without_gradient", len(unused), known),
        same("trained_names", expected["trained_names"], sorted(trained), LEFT_OUT),
        same("trained_names but for visual_net", learned, sorted(trained)),
        *_initial(case, trained, clip, model),
        lines("sorted_lines", expected["sorted_lines"], sorted(rows + unused)),
        same("line_format", expected["line_format"], "<official name>\\t<trained or frozen>, sorted by name"),
    ]


def _initial(case: Case, trained: dict[str, Tensor], clip: CLIP, model: DPLQ) -> list[Row]:
    values = dict(case.expected["initial_values"])
    (ctx,) = (name for name in values if name.endswith(".ctx"))
    words = embed_texts(model.tokenizer, clip, [PROMPT.partition("{}")[0]])  # type: ignore[arg-type]
    start = torch.equal(words.embedded[0, 1 : 1 + len(model.ctx)], model.ctx)
    rows = [Row(f"initial_values {ctx}", values.pop(ctx), "the same", start)]
    return rows + [row for n, facts in values.items() for row in initial(f"initial_values {n}", facts, trained[n])]


def _schedule(case: Case) -> list[Row]:
    rows, steps = [], 3
    for protocol, expected in case.expected.items():
        published = recipe.published_settings(protocol)
        options = recipe._options(_parameters(protocol))
        optimizer = recipe.optimizer(published["learning rate"])(nn.Linear(2, 2))
        (group,) = optimizer.param_groups
        lrs = options["schedule"](group["lr"], options["epochs"] * steps, steps).reshape(-1, steps)
        relative = number(case.facts["tolerance"]["lr"], "relative")
        theirs = np.repeat(np.array(expected["lr_of_epoch"])[:, None], steps, 1)
        rows.append(near(f"{protocol} lr_of_epoch", theirs, lrs, relative=relative))
        ours = {
            "lr": group["lr"],
            "epochs": options["epochs"],
            "warmup_epochs": published["warm-up epochs"],
            "warmup_lr": published["warm-up learning rate"],
            "optimizer": {"class": type(optimizer).__name__}
            | {name: group[name] for name in ("momentum", "nesterov", "weight_decay", "dampening")},
            "train_batch": options["batch"],
            "test_batch": recipe.TEST_BATCH,
            "prompt_depth": published["prompt depth"],
            "context_tokens": published["context tokens"],
        }
        rows += [same(f"{protocol} {name}", expected[name], value) for name, value in ours.items()]
    return rows


# --- labels, images ---------------------------------------------------------------------------------------------------


def _labels(case: Case) -> list[Row]:
    name = next(name for name in CLASSES if DATASETS[name].folders[-1] == case.settings["data_set"])
    folders = sorted(CLASSES[name])
    names = [CLASSES[name][folder] for folder in folders]
    spaced = [text.replace("_", " ") for text in names]
    base, novel = fewshot.halves(names)
    expected = case.expected
    return [
        lines("folders", expected["folders"], folders),
        lines("names", expected["names"], names),
        lines("prompts", expected["prompts"], [PROMPT.replace("{}", text) for text in spaced]),
        same("base_names", expected["base_names"], base),
        same("new_names", expected["new_names"], novel),
        same("base", expected["base"], len(base)),
        same("new", expected["new"], len(novel)),
        same(
            "differ_from_folder",
            expected["differ_from_folder"],
            sum(a != b for a, b in zip(folders, names, strict=True)),
        ),
    ]


def _input(settings: dict[str, Any]) -> backbones.Input:
    return backbones.Input(settings["size"][0], tuple(settings["mean"]), tuple(settings["std"]))


def _test_image(case: Case) -> list[Row]:
    expected, tolerance = case.expected, case.facts["tolerance"]
    image = Image.fromarray(case.data["in.image"].numpy())
    found = domains.clip_transform(_input(case.settings))(image)
    grid = found[:, expected["rows"]][:, :, expected["columns"]]

    def room(name: str) -> dict[str, Any]:
        return {"absolute": number(tolerance[name], "absolute")}

    return [
        same("shape", expected["shape"], found.shape),
        same("rows", len(expected["rows"]), grid.shape[1]),
        same("columns", len(expected["columns"]), grid.shape[2]),
        near("grid", expected["grid"], grid, **room("grid")),
        near("mean", expected["mean"], found.mean((1, 2)), **room("mean")),
        near("std", expected["std"], found.std((1, 2)), **room("std")),
    ]


def _training_images(case: Case) -> list[Row]:
    expected = case.expected
    clip = backbones.Input(case.settings["size"][0], open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    steps = zip(expected["training"], done(domains.clip_transform(clip, train=True)), strict=True)
    published, loader = recipe.published_settings("base to novel"), expected["loader"]
    batch = int(published["train batch"])
    kinds = [recipe.last(count, published) for count in (batch - 1, batch, batch + 1)]
    data, count = Watched(torch.zeros(2 * batch, 1), torch.zeros(2 * batch, dtype=torch.long)), 2 * batch
    fit(nn.Linear(1, 2), loss, data, epochs=2, batch=batch, optimizer=recipe.optimizer(1e-3), hardware=CPU)
    return [
        *(same(f"training {text}", told(text), step) for text, step in steps),
        same("loader batch", loader["batch"], batch),
        Row("loader sampler", loader["sampler"], f"{data.asked}", data.asked[:count] != data.asked[count:]),
        Row("loader drop_last", loader["drop_last"], ", ".join(kinds), kinds == ["train", "drop", "drop"]),
    ]


# --- metrics, selection -----------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """A model whose inputs are its logits."""

    def set_classes(self, classes: object) -> None:
        """Nothing."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def _accuracy(case: Case) -> list[Row]:
    expected, room = case.expected, number(case.facts["tolerance"]["values"], "absolute")
    data = TensorDataset(case.data["in.logits"], case.data["in.labels"])
    found = recipe.accuracy(_Given(), data, (), 0, CPU)
    unused = [Row(key, str(value)[:60], "not computed", False, NOT_USED) for key, value in expected.items()]
    return [
        near("accuracy", expected["accuracy"], found, absolute=room),
        near("error_rate", expected["error_rate"], 100 - found, absolute=room),
        *(row for row in unused if row.what not in ("accuracy", "error_rate")),
    ]


def _harmonic(case: Case) -> list[Row]:
    expected, settings = case.expected, case.settings
    room = number(case.facts["tolerance"]["values"], "absolute")
    ours = [fewshot.harmonic_mean(base, novel) for base, novel in settings["pairs_base_new_percent"]]
    seeds = settings["accuracies_of_three_seeds"]
    same_run = {"method": "DPLQ", "protocol": "base to novel", "dataset": "remote/aid"}
    table = pd.DataFrame(
        [
            same_run | {"test": part, "seed": seed, "accuracy": value}
            for part, values in seeds.items()
            for seed, value in enumerate(values)
        ]
    )
    found = recipe.over_seeds(table).set_index("test")
    rows = [near("harmonic_means", expected["harmonic_means"], ours, absolute=room)]
    for part, recorded in expected["mean_and_std_over_seeds"].items():
        own = found.loc[part, ["mean", "std"]].astype(float)
        rows.append(near(f"mean_and_std_over_seeds {part}", recorded, own.to_numpy(), absolute=room))
    of_means = fewshot.harmonic_mean(*(float(found.loc[part, "mean"]) for part in seeds))
    rows.append(near("harmonic_mean_of_the_means", expected["harmonic_mean_of_the_means"], of_means, absolute=room))
    return rows


def _selection(case: Case) -> list[Row]:
    expected, epochs, batch = case.expected, 3, 4
    model, images, labels = nn.Linear(3, 4), torch.randn(3 * batch, 3), torch.arange(3 * batch) % 4
    weights, modes = list[Tensor](), list[bool]()
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    class Watch(Callback):
        def on_step_end(self, loop: Loop) -> None:
            weights.append(model.weight.detach().clone())

    options = recipe._options(_parameters("base to novel", seed=7))
    with tempfile.TemporaryDirectory() as folder:
        found = recipe.Setting(
            title="toy",
            classes=(),
            test_classes={},
            methods=("DPLQ",),
            learning_rates={"DPLQ": 0.1},
            build=lambda method: model,
            inputs=lambda method, part: TensorDataset(images, labels),
            optimizer=recipe.optimizer,
            options=options | {"epochs": epochs, "hardware": CPU, "callbacks": [Watch()]},
            accuracy=lambda model, data, classes: 0.0,
            folder=Path(folder),
        )
        recipe.train(found, "DPLQ")
        (file,) = (Path(folder) / "trained").iterdir()
        saved = load_file(file)["weight"]
    steps = len(weights)
    last = torch.equal(model.weight, weights[-1]) and not any(torch.equal(model.weight, w) for w in weights[:-1])
    sets = (_Listed(each) for each in (30, 9, 20))
    few = fewshot.base_to_novel(dict(zip(("train", "val", "test"), sets, strict=True)), _shots(), seed=1)
    draws = {part: len(getattr(few, part)) // 2 for part in ("train", "val")}
    first, tested = next(iter(few.tests.items()))
    during = modes == [True] * steps and tested.class_names == few.train.class_names
    usual = defaults("dplq").noise
    tests = {"base_to_novel": "base to novel", "cross_dataset": "cross-dataset"}
    return [
        *(
            same(f"{name}_tested_epoch", expected[f"{name}_tested_epoch"], recipe._options(_parameters(p))["epochs"])
            for name, p in tests.items()
        ),
        Row("validation_chooses", str(expected["validation_chooses"]), "weights of the last step", last),
        Row("saved_epochs", expected["saved_epochs"], "one file, of the last step", torch.equal(saved, weights[-1])),
        Row("test_during_training", expected["test_during_training"], f"{steps} steps, then '{first}'", during),
        same("few_shot", expected["few_shot"], draws),
        Row("seeds", expected["seeds"], f"the parameter: {options['seed']}", options["seed"] == 7),
        same("test_batch", expected["test_batch"], recipe.TEST_BATCH),
        # what the option does is in tests/models/dplq
        Row("noise", expected["noise"], usual, usual == "always"),
    ]


def _shots() -> int:
    return int(recipe.published_settings("base to novel")["shots"])


class _Listed:
    """A data set of four classes with so many images each."""

    def __init__(self, each: int):
        self.class_names, self.labels = list("abcd"), [i % 4 for i in range(4 * each)]


# --- trajectories -----------------------------------------------------------------------------------------------------


def trained_setting(case: Case) -> recipe.Setting:
    """The model, items and options of a recorded training."""
    settings = case.settings
    m, batch, wanted, plan = (settings[name] for name in ("model", "batch", "optimizer", "schedule"))
    head = m["vision_width"] // m["vision_heads"]
    vision = CLIPVisionCfg(m["vision_layers"], m["vision_width"], head, patch_size=m["patch"], image_size=m["image"])
    text = CLIPTextCfg(m["context"], 1, width=m["text_width"], heads=m["text_heads"], layers=m["text_layers"])
    texts = Texts(torch.zeros(len(m["classes"]), m["context"], m["text_width"]), torch.tensor(m["end_of_text"]))
    skeleton = DPLQ(
        CLIP(m["embed"], vision, text, quick_gelu=True),
        texts,
        None,
        m["domain_features"],
        tokens=m["context_tokens"],
        depth=m["prompt_depth"],
    )
    shapes = {name: list(t.shape) for name, t in skeleton.to_official().items()}
    state = {n: torch.as_tensor(a) for n, a in fill.state_dict(shapes, seed(settings["weights"])).items()}
    state["logit_scale"] = torch.tensor(100.0).log()
    heads = (m["vision_heads"], m["text_heads"])
    model = DPLQ.from_official(state, ends=m["end_of_text"], heads=heads)

    (images,) = drawn(batch["generator"], batch["images"])
    items = list(zip(images, case.data["in.labels"], case.data["in.domain"], strict=True))
    size, epochs = batch["size"], plan["epochs"]
    length = size * plan["steps_per_epoch"]
    every = (items * (epochs * length // len(items) + 1))[: epochs * length]
    return recipe.Setting(
        title=case.name,
        classes=(),
        test_classes={},
        methods=("DPLQ",),
        learning_rates={"DPLQ": wanted["lr"]},
        build=lambda method: model,
        inputs=lambda method, part: InOrder(every, length),
        optimizer=lambda lr: recipe.optimizer(lr, wanted["weight_decay"], wanted["momentum"]),
        options={
            "epochs": epochs,
            "batch": size,
            "schedule": recipe.learning_rates(epochs, plan["warmup_epochs"], plan["warmup_lr"]),
            "hardware": CPU,
        },
        accuracy=lambda model, data, classes: 0.0,
    )


def _trajectory(case: Case) -> list[Row]:
    expected, tolerance = case.expected, case.facts["tolerance"]
    model, history = recipe.train(trained_setting(case), "DPLQ")
    assert isinstance(model, DPLQ)
    after = model.to_official()
    losses: dict[str, Any] = {name: number(tolerance["losses"], name) for name in ("relative", "absolute")}
    frozen = {name: facts for name, facts in expected["unchanged"].items() if not name.startswith(DPLQ._unused)}
    relative = number(tolerance["parameters_after"], "relative")
    return [
        near("losses", expected["losses"], [row["loss"] for row in history], **losses),
        near("lr", expected["lr"], [row["lr"] for row in history], relative=number(tolerance["lr"], "relative")),
        *parameters("parameters_after", expected["parameters_after"], after, relative),
        *parameters("unchanged", frozen, after, 1e-6),
        *(
            Row(f"unchanged {name}", "as it was", "not there", False, LEFT_OUT)
            for name in expected["unchanged"].keys() - frozen.keys()
        ),
    ]


KINDS = {
    "groups": _groups,
    "schedule": _schedule,
    "labels": _labels,
    "preprocess_train": _training_images,
    "preprocess": _test_image,
    "metric_harmonic": _harmonic,
    "metric": _accuracy,
    "selection": _selection,
    "trajectory": _trajectory,
}
