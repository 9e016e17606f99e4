"""PromptPAR's recipe against cases recorded from Event-AHU/OpenPAR at 210ff55, folder PromptPAR."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

from companion.data import attributes
from companion.data.attributes import COLUMNS, SENTENCES
from companion.evaluation.metrics.attributes import evaluate
from companion.models.layers.clip_prompting import Texts
from companion.models.layers.state_dicts import official_state
from companion.models.promptpar import recipe
from companion.models.promptpar.model import Output, PromptPAR, Settings, loss, weighted_loss
from companion.models.promptpar.transforms import square_transform
from companion.training.recipe import run
from tests.conftest import parameters as notebook
from tests.data import test_attributes as files
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, close, equal, lines, near, parameters, same
from tests.recipes.steps import Watched, done, initial

_p = partial(notebook, "promptpar", profile="paper", dry_run=True, accelerator="cpu")


def _official(model: PromptPAR, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model by the authors' names."""
    return official_state(tensors, {name: o for name, o in model.official_names().items() if name in tensors})


def groups(case: Case) -> list[Row]:
    """Trained tensors, their learning rates and decay, and initial values, at full size."""
    s, e = case.settings, case.expected
    clip = open_clip.create_model(s["clip"], pretrained=None)
    torch.manual_seed(0)
    fusion = VisionTransformer(img_size=16, depth=1, num_classes=0)
    p = _p(dataset=s["dataset"], release=s["release"])
    model = recipe.build(p, SENTENCES[s["dataset"]], clip, fusion)
    labels = torch.zeros(16, s["attributes"])
    training = recipe.training(p, lambda: model, Watched(labels), labels[0], epochs=1, batch=16)
    by_name = {group["name"]: group for group in training.fit["optimizer"](model).param_groups}
    names, rows, text, trained = {id(t): n for n, t in model.named_parameters()}, list[Row](), [], dict[str, Tensor]()
    everything = _official(model, dict(model.named_parameters()))
    for part, kind in (("clip_model", "prompts"), ("model", "heads")):
        group = by_name[kind]
        tensors = _official(model, {names[id(t)]: t for t in group["params"]})
        if kind == "prompts":  # the authors' optimiser has the text prompts too, see `recipe.decayed`
            tensors[recipe.TEXT_PROMPTS] = model.text_prompts
        text += [f"{name}\tbase lr {group['lr']:g} decay {group['weight_decay']:g}" for name in tensors]
        ours = {
            "trained_tensors": len(tensors),
            "trained_numbers": sum(t.numel() for t in tensors.values()),
            "all_numbers": sum(t.numel() for name, t in everything.items() if name.startswith(f"{part}.")),
            "momentum": group["momentum"],
            "nesterov": group["nesterov"],
        }
        rows.append(same(part, {name: e[part][name] for name in ours}, ours))
        trained |= tensors
    rows.append(lines("trained_lines", e["trained_lines"], sorted(text)))
    rows.append(same("names", [], [name for name in e["names"] if name not in trained]))
    for name, want in e["initial_values"].items():
        what, value = f"initial_values {name}", trained[name].detach()
        if value.numel() == 1 and "bias" in name:  # one draw of a uniform distribution
            rows.append(Row(what, f"{want['mean']}", f"{float(value)}", abs(float(value)) <= 768**-0.5))
        else:
            rows += initial(what, want, value)
    return [*rows, _training_mode(e["train_mode"], model.train())]


def _training_mode(want: Mapping, model: PromptPAR) -> Row:
    """The probabilities of drop path and dropout in training."""
    paths = {float(getattr(part, "drop_prob", None) or 0) for block in model.blocks for part in block.modules()} - {0.0}
    drops = {float(part.p) for part in model.modules() if isinstance(part, nn.Dropout)} or {0.0}
    within = {float(part.dropout) for part in model.modules() if isinstance(part, nn.MultiheadAttention)}
    names = ("fusion_block_drop_path", "dropout", "clip_dropout_in_attention")
    return same("train_mode", want, dict(zip(names, map(sorted, (paths, drops, within)), strict=True)))


def labels(case: Case) -> list[Row]:
    """The columns of a set's labels and its partition; or what CLIP reads of each set."""
    rows = []
    if "order" in case.expected:
        name, split = case.settings["dataset"], case.expected["split"]
        rows.append(same("order", case.expected["order"], [int(c) for c in COLUMNS[name]]))
        kind = name.rpartition("/")[2]
        with tempfile.TemporaryDirectory() as root:  # of its partitions the first has these training images
            getattr(files, kind)(Path(root))
            chosen = attributes._mat(attributes.find(name, "attributes"), Path(root), name).splits["train"]
        first = split == 0 and list(chosen) == list(files.TRAIN.ravel() - 1)
        return [*rows, Row("split", f"partition {split}", f"images {chosen}", first)]
    for name, want in case.expected.items():
        p = _p(dataset=want["dataset"], texts=want["texts"])
        found = list(recipe.read_by_clip(p, SENTENCES[p.dataset]))
        ours = [max(found, key=len), len(found) - len(set(found)), sum(text != text.strip() for text in found)]
        texts = [want[key] for key in ("longest", "duplicates", "begin_or_end_with_a_space")]
        rows += [lines(name, want, found), same(f"{name} texts", texts, ours)]
    return rows


def losses(case: Case) -> list[Row]:
    """The total loss, its parts and gradients."""
    given = [case.data[f"in.{name}"].clone().requires_grad_() for name in ("logits", "similarity")]
    labels, ratio, room = case.data["in.labels"], case.data["in.ratio"], case.facts["tolerance"]
    total = loss(Output(*given), labels, ratio, recipe.SIMILARITY)
    total.backward()
    rows = [near("total", case.expected["total"], total.detach(), relative=room["losses"])]
    for name, x, of in zip(("heads", "similarity"), given, ("logits", "similarity"), strict=True):
        part = weighted_loss(x, labels, ratio).detach()
        rows.append(near(name, case.expected[name], part, relative=room["losses"]))
        rows.append(near(f"out.grad_{of}", case.data[f"out.grad_{of}"], x.grad, absolute=room["gradients"]))
    return rows


def metric(case: Case) -> list[Row]:
    """Scores of a test."""
    labels, probabilities = case.data["in.labels"].numpy(), case.data["in.probabilities"].numpy()
    found = evaluate(labels, probabilities, case.settings["threshold"])
    totals, f1 = found.totals, found.f1 / 100
    ours = {
        "mA": totals["mA"] / 100,
        "accuracy": totals["Acc"] / 100,
        "precision": totals["Prec"] / 100,
        "recall": totals["Rec"] / 100,
        "F1": totals["F1"] / 100,
        "mA_of_attributes": found.balanced / 100,
        "f1_of_attributes": f1,
        "precision_of_attributes": found.precision / 100,
        "jaccard_of_attributes": f1 / (2 - f1),
    }
    room = case.facts["tolerance"]["values"]
    return close(case.expected, ours, absolute=room)


def picture(case: Case) -> list[Row]:
    """What the network gets of a tested image."""
    s, e, room = case.settings, case.expected, case.facts["tolerance"]
    image = Image.fromarray(case.data["in.image"].numpy())
    pad, *steps = square_transform(s["size"][0], padding=s.get("colour", "black")).transforms
    x = v2.Compose(steps)(image if s["padded"] else pad(image))
    grid = x[:, e["rows"]][:, :, e["columns"]]
    close = float(((grid - torch.tensor(e["grid"])).abs() <= room["grid"]).float().mean())
    rows = [
        same("shape", e["shape"], x.shape),
        Row("grid", f"{s['share']:.0%} within {room['grid']}", f"{close:.1%}", close >= s["share"]),
        same("rows", len(e["rows"]), grid.shape[1]),
        same("columns", len(e["columns"]), grid.shape[2]),
        near("mean", e["mean"], x.mean((1, 2)), absolute=room["mean"]),
        near("std", e["std"], x.flatten(1).std(1, correction=0), absolute=room["std"]),
    ]
    if "padded_size" in e:
        rows.append(same("padded_size", e["padded_size"], pad(image).size[::-1]))
    return rows


def operations(case: Case) -> list[Row]:
    """The operations of training and test, the loader's batches, and the share of each attribute."""
    e, rows = case.expected, list[Row]()
    for split in ("training", "test"):
        _pad, *steps = square_transform(case.settings["height"], train=split == "training").transforms
        rows.append(same(split, e[split], done(v2.Compose(steps))))
    # two epochs of two images more than two batches
    batch = int(recipe.published()["heads"]["batch"])
    count = 2 * batch + 2
    data = Watched(torch.randn(count, 3, 28, 28), torch.eye(2).repeat(count // 2, 1))
    ratio = torch.full((2,), 0.5)
    training = recipe.training(_p(), lambda: _small(2), data, ratio, epochs=2, batch=batch)
    _, history = run(replace(training, dry_run=False))
    orders = data.asked[:count], data.asked[count:]
    whole = all(sorted(order) == list(range(count)) for order in orders)
    labels = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    rapv1 = attributes.find("par/rapv1", "attributes")
    people = attributes.Pedestrians(rapv1, Path(), list("abc"), labels.numpy(), ["x", "y"], ["x", "y"], None)
    seeds = recipe.protocol()["seeds"]
    return [
        *rows,
        same("loader batch", [e["loader"]["batch"], 3 * 2], [batch, len(history)]),
        *equal(e["loader"], {"drop_last": not whole, "shuffle": orders[0] != orders[1]}, "loader "),
        Row("ratio", e["ratio"], str(people.ratio.tolist()), torch.equal(people.ratio, labels.mean(0))),
        Row("seed", str(e["seed"]), seeds, str(e["seed"]) in seeds),
    ]


SMALLEST = {"image": 28, "patch": 7, "vision_width": 8, "vision_layers": 1, "vision_heads": 1, "text_width": 8}
SMALLEST |= {"text_layers": 1, "text_heads": 1, "embed": 64, "context": 4, "vocabulary": 4, "fusion_dim": 64}
SMALLEST |= {"vis_prompt": 5, "vis_depth": 1, "text_prompt": 1, "div_num": 4, "overlap_row": 0, "mm_layers": 1}


def _small(count: int, **sizes: Any) -> PromptPAR:
    """A small model of random weights for so many attributes: of the smallest sizes, or of a case's."""
    s = SMALLEST | sizes
    head = s["vision_width"] // s["vision_heads"]
    vision = CLIPVisionCfg(s["vision_layers"], s["vision_width"], head, patch_size=s["patch"], image_size=s["image"])
    shape = {"width": s["text_width"], "heads": s["text_heads"], "layers": s["text_layers"]}
    clip = CLIP(s["embed"], vision, CLIPTextCfg(s["context"], s["vocabulary"], **shape), quick_gelu=True)
    options = {"depth": s["mm_layers"], "num_heads": s["fusion_dim"] // 64, "num_classes": 0}
    fusion = VisionTransformer(img_size=16, embed_dim=s["fusion_dim"], **options)
    texts = Texts(torch.zeros(count, 2, s["text_width"]), torch.ones(count, dtype=torch.long))
    own = {"prompts": s["vis_prompt"], "depth": s["vis_depth"], "regions": s["div_num"], "overlap": s["overlap_row"]}
    own |= {"text_prompts": s["text_prompt"], "mm_layers": s["mm_layers"], "visual_embed": True}
    return PromptPAR(clip, texts, None, fusion, Settings(**own))


def schedule(case: Case) -> list[Row]:
    """The learning rate of each epoch."""
    rows, relative, per_epoch = list[Row](), case.facts["tolerance"]["lr"], 3
    for name, want in case.expected.items():
        found = recipe.by_epoch(want["warmup_epochs"])(want["base_lr"], want["epochs"] * per_epoch, per_epoch)
        found = found.reshape(want["epochs"], per_epoch)
        for epoch, lr in want["lr_of_epoch"].items():
            rows.append(near(f"{name} epoch {epoch}", [lr] * per_epoch, found[int(epoch) - 1], relative=relative))
        rows.append(near(f"{name} sum", want["sum"], found[:, 0].sum(), relative=relative))
    return rows


def selection(case: Case) -> list[Row]:
    """What is printed of the results of each epoch, and when they are computed."""
    e, names = case.expected, {"ma": "mA", "acc": "Acc", "f1": "F1"}
    queue = [{names[k]: v for k, v in row.items()} | {"Prec": 0.0} for row in case.settings["test_results_by_epoch"]]
    found, model = list[dict[str, float]](), _small(2)
    scored = recipe.Epochs(lambda model: queue[len(found)], found)
    loop = SimpleNamespace(model=model, fabric=SimpleNamespace(global_rank=0, barrier=lambda: None))
    for _ in queue:
        scored.on_epoch_end(loop)
    own = recipe.maxima(found)
    printed = {f"max_{key}": own[name] for key, name in names.items()}
    epochs = {key: [i for i, row in enumerate(found, 1) if row[names[key]] == own[names[key]]] for key in names}
    last = "the last epoch's weights are saved, and those to resume from"
    return [
        *equal(e, {"printed": printed, "epochs_of_the_maxima": epochs}),
        Row("saved", e["saved"], "the last epoch", False, last),
        Row("evaluated_on", e["evaluated_on"], f"{len(found)} times in {len(queue)} epochs", found == queue),
        same("stops", e["stops"], int(recipe.published()["heads"]["epochs"])),
    ]


def test_mode(case: Case) -> list[Row]:
    """What a test after an epoch changes: here nothing, in the authors' code the similarity's batch norm."""
    s, e = case.settings, case.expected
    model = _small(s["attributes"]).train()
    images = torch.randn(s["batches"] * s["images"], 3, 28, 28)
    modes = list[dict[str, bool]]()

    def score(model: PromptPAR) -> dict[str, float]:
        modes.append({"model": model.bn.training, "clip_model": model.agg_bn.training})
        for some in images.split(s["images"]):
            model(some)
        return {}

    fabric = SimpleNamespace(global_rank=0, barrier=lambda: None)
    recipe.Epochs(score, []).on_epoch_end(SimpleNamespace(model=model, fabric=fabric))
    why = "the running statistics see training images alone; no probability depends on them"
    with torch.no_grad():
        differ = [model.eval()(images)]
        model.agg_bn.train()
        differ.append(model(images))
    return [
        same("in_training_mode", e["in_training_mode"], modes[0], why),
        same("agg_bn_batches", e["agg_bn_batches"], int(model.agg_bn.num_batches_tracked) - 1, why),
        same("bn_batches", e["bn_batches"], int(model.bn.num_batches_tracked)),
        same("probabilities_differ", e["probabilities_differ"], float((differ[0] - differ[1]).abs().max())),
    ]


def precision(case: Case) -> list[Row]:
    """Sentences, and cosines of region tokens, with CLIP's weights in float16."""
    e, room, data = case.expected, case.facts["tolerance"], case.data
    model = _filled(case.settings).half_clip()
    text, recorded = model.text_features, data["out.text"].float()
    model.text_features = recorded
    with torch.no_grad():
        cosines, _ = model.similarities(data["in.classes"].float())
    return [
        same("dtype", e["dtype"], str(model.clip.text_projection.dtype).removeprefix("torch.")),
        near("out.text", recorded, text, absolute=room["text"]),
        near("out.cosines", data["out.cosines"], cosines, absolute=room["cosines"]),
        near("float32_and_rounded", e["float32_and_rounded"], (recorded - text).abs().max(), absolute=room["text"] / 4),
    ]


def _filled(settings: Mapping) -> PromptPAR:
    """A case's model of filled weights."""
    m, state = settings["model"], {}
    for name, value in _small(m["attributes"], **m).to_official().items():
        if value.is_floating_point():
            filled = fill.parameter(name, tuple(value.shape), settings["weights"]["seed"])
            state[name] = torch.from_numpy(np.array(filled))
    state["clip_model.logit_scale"] = torch.tensor(np.log(100.0)).float()
    state["clip_model.softmax_model.temperature"] = torch.tensor(1.0)
    heads = (m["vision_heads"], m["text_heads"], m["fusion_dim"] // 64)
    options = {"overlap": m["overlap_row"], "threshold": m["ag_threshold"], "drop_path": 0.0}
    tokenizer = open_clip.get_tokenizer(recipe.CLIP.partition("/")[0])
    return PromptPAR.from_official(state, m["sentences"], tokenizer, heads=heads, **options)


def trajectory(case: Case) -> list[Row]:
    """A training by the recipe from filled weights, batches in the recorded order."""
    s, e, room = case.settings, case.expected, case.facts["tolerance"]
    o, plan, size = s["optimizer"], s["schedule"], s["batch"]["size"]
    model = _filled(s)

    generator = np.random.default_rng(s["batch"]["seed"])
    images = torch.from_numpy(generator.standard_normal(s["batch"]["images"], dtype=np.float32))
    labels, ratio = case.data["in.labels"], case.data["in.ratio"]
    count = plan["epochs"] * plan["steps_per_epoch"] * size
    items = [(images[i % len(images)], labels[i % len(images)]) for i in range(count)]
    table = {"learning rate": o["lr"], "weight decay": o["weight_decay"], "warm-up epochs": plan["warmup_epochs"]}
    table["gradient clipping"] = dict.fromkeys(o["lr"], s["clip_grad_norm"])
    start = {name: value.clone() for name, value in model.to_official().items()}
    outputs = list[Output]()
    model.register_forward_hook(lambda module, given, out: outputs.append(Output(*(x.detach() for x in out))))
    data = InOrder(items, plan["steps_per_epoch"] * size)
    settings = {"epochs": plan["epochs"], "batch": size, "settings": pd.DataFrame(table).T}
    training = recipe.training(_p(), lambda: model, data, ratio, **settings)
    _, history = run(replace(training, dry_run=False))
    after = training.weights(model)

    rows = [near("losses", e["losses"], [row["loss"] for row in history], relative=room["losses"])]
    truth = labels[torch.arange(count).view(-1, size) % len(labels)]
    for i, name in enumerate(("heads_loss", "similarity_loss")):
        parts = [weighted_loss(out[i], y, ratio) for out, y in zip(outputs, truth, strict=True)]
        rows.append(near(name, e[name], torch.stack(parts), relative=room["losses"]))
    for name, want in e["lr"].items():
        rates = training.fit["schedule"][name](o["lr"][name], len(history), plan["steps_per_epoch"])
        rows.append(near(f"lr {name}", want, rates, relative=room["lr"]))
    name = model.param_groups()[0]["name"]
    rows.append(near(f"lr {name}, of the training", e["lr"][name], [row["lr"] for row in history], relative=room["lr"]))
    compare = partial(parameters, ours=after, relative=room["parameters_after"])
    rows += compare("parameters_after", e["parameters_after"])
    rows += compare("decays_only", e["decays_only"])
    changed = sorted(name for name, value in after.items() if not torch.equal(value, start[name]))
    return [*rows, lines("changed_tensors", e["changed_tensors"], changed)]


KINDS = {
    "groups": groups,
    "labels": labels,
    "loss": losses,
    "metric": metric,
    "preprocess_train": operations,
    "preprocess": picture,
    "precision": precision,
    "schedule": schedule,
    "selection": selection,
    "test": test_mode,
    "trajectory": trajectory,
}
