"""DPLQ's recipe against caoql98/DPLQ at 3d78bb5, which builds on the Dassl toolbox."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

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
from companion.data.domains import CLASSES
from companion.models.dplq import recipe
from companion.models.dplq.model import DPLQ, PROMPT, NoFeatures, loss
from companion.models.layers.clip_prompting import Texts, embed_texts, tower_names
from companion.models.layers.state_dicts import official_state
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.recipe import Training, run
from tests.conftest import parameters as defaults
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, close, equal, lines, near, parameters, same
from tests.recipes.steps import Watched, done, initial, normal, picture

LEFT_OUT = "`visual_net`, in no forward pass and hence without gradient and decay, is left out"
NOT_USED = "the tables of results hold the accuracy over all images alone"
given = partial(defaults, "dplq", profile="paper", dry_run=True, accelerator="cpu")


# --- parameter groups, schedule ---------------------------------------------------------------------------------------


def _groups(case: Case) -> list[Row]:
    settings, expected = case.settings, case.expected
    p = given(protocol=settings["protocol"])
    clip = backbones.build(f"openclip:{recipe.CLIP}", "random")
    names = tuple(f"class {i}" for i in range(settings["classes"]))
    model = recipe.build(p, "DPLQ", names, clip, NoFeatures(clip.visual.output_dim))
    optimizer = recipe.fit_options(p)["optimizer"](model)
    (group,) = optimizer.param_groups
    held, official = {id(t) for t in group["params"]}, model.learner_names() | tower_names(model)
    own = {name: model.get_parameter(name) for name in official}
    trained = official_state(own, {n: o for n, o in official.items() if id(own[n]) in held})
    frozen = official_state(own, {n: o for n, o in official.items() if id(own[n]) not in held})
    unused = expected["trained_without_gradient"]
    rows = [f"{name}\ttrained" for name in (*trained, *unused)] + [f"{name}\tfrozen" for name in frozen]
    learned = [name for name in expected["trained_names"] if not name.startswith(DPLQ.unused)]
    every = len(held) == sum(1 for _ in model.parameters())
    departs = "frozen tensors have no gradient: they are not given to it"
    return [
        *equal(
            expected,
            {
                "optimizer": type(optimizer).__name__,
                "groups": len(optimizer.param_groups),
                "weight_decay": group["weight_decay"],
                "momentum": group["momentum"],
            },
        ),
        same("optimizer_holds_all_parameters", expected["optimizer_holds_all_parameters"], every, departs),
        same("trained_tensors", expected["trained_tensors"], len(trained), LEFT_OUT),
        same("trained_numbers", expected["trained_numbers"], sum(t.numel() for t in trained.values()), LEFT_OUT),
        same("trained_without_gradient", len(unused), sum(name.startswith(DPLQ.unused) for name in unused)),
        same("trained_names", expected["trained_names"], sorted(trained), LEFT_OUT),
        same("trained_names but for visual_net", learned, sorted(trained)),
        *_initial(case, trained, clip, model),
        lines("sorted_lines", expected["sorted_lines"], sorted(rows)),
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
        published, options = recipe.published_settings(protocol), recipe.fit_options(given(protocol=protocol))
        optimizer = options["optimizer"](nn.Linear(2, 2))
        (group,) = optimizer.param_groups
        lrs = options["schedule"](group["lr"], options["epochs"] * steps, steps).reshape(-1, steps)
        theirs = np.repeat(np.array(expected["lr_of_epoch"])[:, None], steps, 1)
        rows.append(near(f"{protocol} lr_of_epoch", theirs, lrs, **case.facts["tolerance"]["lr"]))
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
        rows += equal(expected, ours, f"{protocol} ")
    return rows


# --- labels, images ---------------------------------------------------------------------------------------------------


def _labels(case: Case) -> list[Row]:
    name = next(name for name in CLASSES if DATASETS[name].folders[-1] == case.settings["data_set"])
    folders, expected = sorted(CLASSES[name]), case.expected
    names = [CLASSES[name][folder] for folder in folders]
    base, novel = fewshot.halves(names)
    differ = sum(a != b for a, b in zip(folders, names, strict=True))
    return [
        lines("folders", expected["folders"], folders),
        lines("names", expected["names"], names),
        lines("prompts", expected["prompts"], [PROMPT.replace("{}", text.replace("_", " ")) for text in names]),
        *equal(
            expected,
            {
                "base_names": base,
                "new_names": novel,
                "base": len(base),
                "new": len(novel),
                "differ_from_folder": differ,
            },
        ),
    ]


def _test_image(case: Case) -> list[Row]:
    settings, tolerance = case.settings, case.facts["tolerance"]
    seen = backbones.Input(settings["size"][0], tuple(settings["mean"]), tuple(settings["std"]))
    found = domains.clip_transform(seen)(Image.fromarray(case.data["in.image"].numpy()))
    return picture(case.expected, found, **{name: room["absolute"] for name, room in tolerance.items()})


def _training_images(case: Case) -> list[Row]:
    expected, published = case.expected, recipe.published_settings("base to novel")
    clip = backbones.Input(case.settings["size"][0], open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    batch = int(published["train batch"])
    kinds = [recipe.last(count, published) for count in (batch - 1, batch, batch + 1)]
    data, count = Watched(torch.zeros(2 * batch, 1), torch.zeros(2 * batch, dtype=torch.long)), 2 * batch
    fit(nn.Linear(1, 2), loss, data, epochs=2, batch=batch, optimizer=recipe.optimizer(1e-3), hardware=CPU)
    order = "random" if data.asked[:count] != data.asked[count:] else "as listed"
    return [
        *equal(
            expected,
            {
                "training": done(domains.clip_transform(clip, train=True)),
                "loader": {"batch": batch, "sampler": order, "drop_last": kinds},
            },
        )
    ]


# --- metrics, selection -----------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """A model whose inputs are its logits."""

    def reset_classifier(self, classes: object) -> None:
        """Nothing."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def _accuracy(case: Case) -> list[Row]:
    expected, room = case.expected, case.facts["tolerance"]["values"]
    data = TensorDataset(case.data["in.logits"])
    data.labels = case.data["in.labels"].tolist()
    found = recipe.accuracy(_Given(), data, (), 0, CPU)
    ours = {"accuracy": found, "error_rate": 100 - found}
    unused = [Row(key, str(value)[:60], "not computed", False, NOT_USED) for key, value in expected.items()]
    return close(expected, ours, **room) + [row for row in unused if row.what not in ours]


def _harmonic(case: Case) -> list[Row]:
    expected, settings, room = case.expected, case.settings, case.facts["tolerance"]["values"]
    ours = [fewshot.harmonic_mean(base, novel) for base, novel in settings["pairs_base_new_percent"]]
    seeds = settings["accuracies_of_three_seeds"]
    one = {"method": "DPLQ", "protocol": "base to novel", "dataset": "remote/aid"}
    scores = [(part, seed, value) for part, values in seeds.items() for seed, value in enumerate(values)]
    table = pd.DataFrame([one | dict(zip(("test", "seed", "accuracy"), row, strict=True)) for row in scores])
    found = recipe.over_seeds(table).set_index("test")[["mean", "std"]].astype(float)
    rows = [near("harmonic_means", expected["harmonic_means"], ours, **room)]
    for part, recorded in expected["mean_and_std_over_seeds"].items():
        rows.append(near(f"mean_and_std_over_seeds {part}", recorded, found.loc[part].to_numpy(), **room))
    of_means = fewshot.harmonic_mean(*(float(found.loc[part, "mean"]) for part in seeds))
    return [*rows, near("harmonic_mean_of_the_means", expected["harmonic_mean_of_the_means"], of_means, **room)]


def _selection(case: Case) -> list[Row]:
    """The weights that are saved and tested are those after `fit`: no callback selects others, or tests before."""
    expected, options = case.expected, recipe.fit_options(given(seed=7))
    model, items = nn.Linear(3, 4), TensorDataset(torch.randn(12, 3), torch.arange(12) % 4)
    with tempfile.TemporaryDirectory() as folder:
        run(Training("toy", lambda: model, loss, items, options | {"epochs": 3, "hardware": CPU}), folder)
        (file,) = (Path(folder) / "trained").iterdir()
        saved = load_file(file)["weight"]
    sets = {part: _Listed(each) for part, each in (("train", 30), ("val", 9), ("test", 20))}
    few = fewshot.base_to_novel(sets, int(recipe.published_settings("base to novel")["shots"]), seed=1)
    ours = {
        "base_to_novel_tested_epoch": options["epochs"],
        "cross_dataset_tested_epoch": recipe.fit_options(given(protocol="cross-dataset"))["epochs"],
        "validation_chooses": "callbacks" in options,
        "saved_epochs": "last" if torch.equal(saved, model.weight) else "others",
        "test_during_training": "each" if "callbacks" in options else "after",
        "few_shot": {part: len(getattr(few, part)) // 2 for part in ("train", "val")},
        "seeds": "given" if options["seed"] == 7 else "fixed",
        "test_batch": recipe.TEST_BATCH,
        "noise": given().noise,  # what the option does is in tests/models/dplq
    }
    return equal(expected, ours)


class _Listed:
    """A data set of four classes with so many images each."""

    def __init__(self, each: int):
        self.class_names, self.labels = list("abcd"), [i % 4 for i in range(4 * each)]


# --- trajectories -----------------------------------------------------------------------------------------------------


def training(case: Case) -> Training:
    """A recorded training."""
    settings = case.settings
    m, batch, wanted, plan = (settings[name] for name in ("model", "batch", "optimizer", "schedule"))
    head = m["vision_width"] // m["vision_heads"]
    vision = CLIPVisionCfg(m["vision_layers"], m["vision_width"], head, patch_size=m["patch"], image_size=m["image"])
    text = CLIPTextCfg(m["context"], 1, width=m["text_width"], heads=m["text_heads"], layers=m["text_layers"])
    texts = Texts(torch.zeros(len(m["classes"]), m["context"], m["text_width"]), torch.tensor(m["end_of_text"]))
    clip, sizes = CLIP(m["embed"], vision, text, quick_gelu=True), (m["context_tokens"], m["prompt_depth"])
    skeleton = DPLQ(clip, texts, None, m["domain_features"], tokens=sizes[0], depth=sizes[1])
    shapes = {name: list(t.shape) for name, t in skeleton.to_official().items()}
    state = {n: torch.as_tensor(a) for n, a in fill.state_dict(shapes, settings["weights"]).items()}
    state["logit_scale"] = torch.tensor(100.0).log()
    heads = (m["vision_heads"], m["text_heads"])
    model = DPLQ.from_official(state, ends=m["end_of_text"], heads=heads)

    items = list(zip(normal(batch["images"]), case.data["in.labels"], case.data["in.domain"], strict=True))
    size, epochs = batch["size"], plan["epochs"]
    length = size * plan["steps_per_epoch"]
    every = (items * (epochs * length // len(items) + 1))[: epochs * length]
    options = {
        "epochs": epochs,
        "batch": size,
        "optimizer": recipe.optimizer(wanted["lr"], wanted["weight_decay"], wanted["momentum"]),
        "schedule": recipe.learning_rates(epochs, plan["warmup_epochs"], plan["warmup_lr"]),
        "hardware": CPU,
    }
    return Training(case.name, lambda: model, loss, InOrder(every, length), options)


def _trajectory(case: Case) -> list[Row]:
    expected, tolerance = case.expected, case.facts["tolerance"]
    model, history = run(training(case))
    after = model.to_official()
    frozen = {name: facts for name, facts in expected["unchanged"].items() if not name.startswith(DPLQ.unused)}
    left_out = expected["unchanged"].keys() - frozen.keys()
    return [
        near("losses", expected["losses"], [row["loss"] for row in history], **tolerance["losses"]),
        near("lr", expected["lr"], [row["lr"] for row in history], **tolerance["lr"]),
        *parameters("parameters_after", expected["parameters_after"], after, tolerance["parameters_after"]["relative"]),
        *parameters("unchanged", frozen, after, 1e-6),
        *(Row(f"unchanged {name}", "as it was", "not there", False, LEFT_OUT) for name in left_out),
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
