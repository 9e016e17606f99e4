"""PromptPAR's recipe against cases recorded from Event-AHU/OpenPAR at 210ff55, folder PromptPAR."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
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
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.data import attributes
from companion.data.attributes_sets import COLUMNS, PHRASES, SENTENCES
from companion.evaluation import fill
from companion.evaluation.metrics.attributes import evaluate
from tests.recipes.runner import Case, InOrder, Row, lines, near, parameters, same
from companion.models.layers.clip_prompting import Texts
from companion.models.layers.state_dicts import official_state
from companion.models.promptpar import recipe
from companion.models.promptpar.model import Output, PromptPAR, loss, weighted_loss
from companion.training.schedules import sgd
from tests.recipes.steps import Watched, done, drawn, initial, number, seed, told

SETS = {name.lower(): key for key, name in recipe.COLUMNS.items()}  # "peta-zs" -> "par-zs/peta"
TEXT_PROMPTS = "clip_model.transformer.prompt_text_deep"


def _p(**options: Any) -> SimpleNamespace:
    """The parameters of the `paper` profile that the recipe reads."""
    given: dict[str, Any] = {
        "profile": "paper",
        "method": "PromptPAR",
        "dataset": "par/peta",
        "texts": "released",
        "select": "last",
    }
    given |= {"seed": 0, "dry_run": True, "accelerator": "cpu", "devices": 1, "precision": "32-true", "quirks": True}
    return SimpleNamespace(**given | {"checkpoint": ""} | options)


def _official(model: PromptPAR, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model by the authors' names."""
    return official_state(tensors, {name: o for name, o in model.official_names().items() if name in tensors})


def _published(settings: Mapping, names: list[str]) -> PromptPAR:
    """The full-size model of a case, with a CLIP and a ViT-B/16 of random weights."""
    clip = open_clip.create_model(f"{settings['clip'].replace('/', '-')}-quickgelu", pretrained=None)
    torch.manual_seed(0)
    fusion = VisionTransformer(img_size=16, depth=1, num_classes=0)
    release = "2025" if any("visual_embed" in name for name in names) else "2023"
    return recipe.build(
        _p(clip=recipe.CLIP, release=release), SENTENCES[SETS[settings["data_set"].lower()]], clip, fusion
    )


def groups(case: Case) -> list[Row]:
    """Trained tensors, their learning rates and decay, and initial values, at full size."""
    e = case.expected
    model, settings = _published(case.settings, [*e["names"], *e["initial_values"]]), recipe.recipe()
    own = {id(t): name for name, t in model.trained().items()}
    found, text = {}, []
    for group in model.param_groups():
        names = {own[id(t)] for t in group["params"]}
        found[group["name"]] = _official(model, {n: t for n, t in model.named_parameters() if n in names})
    # the authors' optimiser has the text prompts too, which only decay: `recipe.decay_only`
    found["prompts"][TEXT_PROMPTS] = model.text_prompts
    for kind, tensors in found.items():
        lr, decay = (settings[kind][name] for name in ("learning rate", "weight decay"))
        text += [f"{name}\tbase lr {lr:g} decay {decay:g}" for name in tensors]
    rows = [lines("trained_lines", e["trained_lines"], sorted(text))]
    form = re.fullmatch(r"(clip_model|model)\.[\w.]+\tbase lr \S+ decay \S+", text[0])
    rows.append(Row("line_format", e["line_format"], text[0], bool(form)))
    everything = {name: t.numel() for name, t in _official(model, dict(model.named_parameters())).items()}
    optimizer = sgd(1.0)(nn.Linear(1, 1)).defaults
    for part, kind in (("clip_model", "prompts"), ("model", "heads")):
        want, tensors = e[part], found[kind]
        ours = [len(tensors), sum(t.numel() for t in tensors.values())]
        ours.append(sum(count for name, count in everything.items() if name.startswith(f"{part}.")))
        rows.append(
            same(f"{part} sizes", [want[f"{n}"] for n in ("trained_tensors", "trained_numbers", "all_numbers")], ours)
        )
        rows.append(
            same(
                f"{part} optimiser",
                [want["momentum"], want["nesterov"]],
                [optimizer[n] for n in ("momentum", "nesterov")],
            )
        )
    trained = found["prompts"] | found["heads"]
    rows.append(same("names", [], [name for name in e["names"] if name not in trained]))
    for name, want in e["initial_values"].items():
        what, value = f"initial_values {name}", trained[name].detach()
        if value.numel() == 1 and "bias" in name:  # one draw of a uniform distribution
            rows.append(Row(what, f"{want['mean']}", f"{float(value)}", abs(float(value)) <= 768**-0.5))
        else:
            rows += initial(what, want, value)
    return [*rows, _training_mode(e["train_mode"], model)]


def _training_mode(want: Mapping, model: PromptPAR) -> Row:
    """The probabilities of drop path and dropout in training."""
    model.train()
    paths = {float(getattr(part, "drop_prob", None) or 0) for block in model.blocks for part in block.modules()} - {0.0}
    drops = {float(part.p) for part in model.modules() if isinstance(part, nn.Dropout)} or {0.0}
    within = {float(part.dropout) for part in model.modules() if isinstance(part, nn.MultiheadAttention)}
    ours = {
        "fusion_block_drop_path": sorted(paths),
        "dropout": sorted(drops),
        "clip_dropout_in_attention": sorted(within),
    }
    return same("train_mode", want, ours)


def order(case: Case) -> list[Row]:
    """Columns of PETA's labels, and the partition that is used: a file of five is read back."""
    from scipy.io import savemat

    rows = [same("order", case.expected["order"], [int(c) for c in COLUMNS["par/peta"]])]
    count = 10
    dataset = attributes.find("par/peta", "attributes")
    raw = np.zeros((count, 109))
    raw[:, 4:] = np.arange(105) % 2
    names = np.array([[np.array([f"raw {i}"])] for i in range(105)], object)
    partitions = np.empty((5, 1), object)
    for k in range(5):
        ids = np.roll(np.arange(1, count + 1), k)
        partitions[k, 0] = np.zeros((1, 1), dtype=[(name, object) for name in ("train", "val", "test")])
        partitions[k, 0][0, 0] = (ids[:6, None], ids[6:8, None], ids[8:, None])
    fields = np.zeros((1, 1), dtype=[(name, object) for name in "abcd"])
    fields[0, 0] = (raw, names, np.zeros(1), partitions)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / dataset.folders[0]
        folder.mkdir(parents=True)
        savemat(folder / attributes.ANNOTATIONS["par/peta"], {"peta": fields})
        listing = attributes._peta(dataset, Path(root))
    found = [int(i) for i in listing.splits["test"]]
    rows.append(Row("split", case.expected["split"], f"test images {found}", found == [8, 9]))
    return rows


def sentences(case: Case) -> list[Row]:
    """What CLIP reads of each set, by default and of the other kind."""
    rows = []
    for name, want in case.expected.items():
        dataset = SETS[name.partition(" ")[0]]
        kind = "sentences" if "template" in name else "released"
        found = list(recipe.read_by_clip(_p(dataset=dataset, texts=kind), SENTENCES[dataset]))
        rows.append(lines(name, want, found))
        ours = [max(found, key=len), len(found) - len(set(found)), sum(text != text.strip() for text in found)]
        rows.append(
            same(f"{name} texts", [want["longest"], want["duplicates"], want["begin_or_end_with_a_space"]], ours)
        )
    assert set(PHRASES) == {SETS["rapv1"]}
    return rows


def losses(case: Case) -> list[Row]:
    """The total loss, its parts and gradients."""
    logits, similarity = (case.data[f"in.{name}"].clone().requires_grad_() for name in ("logits", "similarity"))
    labels, ratio = case.data["in.labels"], case.data["in.ratio"]
    total = loss(Output(logits, similarity), labels, ratio, recipe.SIMILARITY)
    total.backward()
    found = {"total": total, "heads": weighted_loss(logits, labels, ratio)}
    found["similarity"] = weighted_loss(similarity, labels, ratio)
    room = {key: number(text) for key, text in case.facts["tolerance"].items()}
    rows = [near(name, case.expected[name], value.detach(), relative=room["losses"]) for name, value in found.items()]
    for name, value in (("logits", logits.grad), ("similarity", similarity.grad)):
        rows.append(near(f"out.grad_{name}", case.data[f"out.grad_{name}"], value, absolute=room["gradients"]))
    return rows


def metric(case: Case) -> list[Row]:
    """Scores of a test."""
    labels, probabilities = case.data["in.labels"].numpy(), case.data["in.probabilities"].numpy()
    found = evaluate(labels, probabilities, case.settings["threshold"])
    totals = {"mA": "mA", "accuracy": "Acc", "precision": "Prec", "recall": "Rec", "F1": "F1"}
    ours: dict[str, Any] = {name: found.totals[own] / 100 for name, own in totals.items()}
    ours |= {"mA_of_attributes": found.balanced / 100, "f1_of_attributes": found.f1 / 100}
    room = number(case.facts["tolerance"]["values"])
    f1 = found.f1 / 100
    ours |= {"precision_of_attributes": found.precision / 100, "jaccard_of_attributes": f1 / (2 - f1)}
    return [near(name, case.expected[name], value, absolute=room) for name, value in ours.items()]


def picture(case: Case) -> list[Row]:
    """What the network gets of a tested image."""
    e, tolerance = case.expected, {k: number(v) for k, v in case.facts["tolerance"].items()}
    image = Image.fromarray(case.data["in.image"].numpy())
    size = case.settings["size"][0]
    transform = attributes.square_transform(size)
    if case.settings["padding"].startswith("none"):
        transform = v2.Compose(transform.transforms[1:])
    x = transform(image)
    grid = x[:, e["rows"]][:, :, e["columns"]]
    gap = (grid - torch.tensor(e["grid"])).abs()
    share = 1.0 if "padded_size" not in e else 0.9  # the grid's tolerance is that of nine of ten values
    close = float((gap <= tolerance["grid"]).float().mean())
    agrees = f"{close:.1%}, largest difference {gap.max():.3f}", close >= share
    rows = [
        same("shape", e["shape"], x.shape),
        Row("grid", f"{share:.0%} within {tolerance['grid']}", *agrees),
        near("mean", e["mean"], x.mean((1, 2)), absolute=tolerance["mean"]),
        near("std", e["std"], x.flatten(1).std(1, correction=0), absolute=tolerance["std"]),
        *(same(name, len(e[name]), grid.shape[axis]) for name, axis in (("rows", 1), ("columns", 2))),
    ]
    if "padded_size" in e:
        rows.append(same("padded_size", e["padded_size"], list(attributes.PadToSquare(size)(image).size)[::-1]))
    return rows


def operations(case: Case) -> list[Row]:
    """The operations of training and test, the loader's batches, and the share of each attribute."""
    e, size, rows = case.expected, case.settings["height"], list[Row]()
    for split, train in (("training", True), ("test", False)):
        _pad, *steps = attributes.square_transform(size, train=train).transforms
        pairs = zip(e[split], done(v2.Compose(steps)), strict=True)
        rows += [same(f"{split} {text}", told(text), step) for text, step in pairs]
    # an epoch of two images more than two batches
    batch = int(recipe.recipe()["heads"]["batch"])
    data, count = Watched(torch.randn(2 * batch + 2, 3, 28, 28), torch.eye(2).repeat(batch + 1, 1)), 2 * batch + 2
    history = recipe.learn(_p(), _small(attributes_=2), data, torch.full((2,), 0.5), epochs=2, batch=batch)
    orders = data.asked[:count], data.asked[count:]
    whole = all(sorted(order) == list(range(count)) for order in orders)
    labels = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    names = ["x", "y"]
    rapv1 = attributes.find("par/rapv1", "attributes")
    people = attributes.Pedestrians(rapv1, Path(), list("abc"), labels.numpy(), names, names, None)
    seeds = recipe.protocol()["seeds"]
    return [
        *rows,
        same("loader batch", [e["loader"]["batch"], 3 * 2], [batch, len(history)]),
        same("loader drop_last", e["loader"]["drop_last"], not whole),
        same("loader shuffle", e["loader"]["shuffle"], orders[0] != orders[1]),
        Row("ratio", e["ratio"], str(people.ratio.tolist()), torch.equal(people.ratio, labels.mean(0))),
        Row("seed", str(e["seed"]), seeds, str(e["seed"]) in seeds),
    ]


def _small(attributes_: int, *, m: Mapping | None = None, texts: Texts | None = None, **options: Any) -> PromptPAR:
    """A small model of random weights: of the sizes in `m`, or of the smallest."""
    usual = {"image": 28, "patch": 7, "vision_width": 8, "vision_layers": 1, "vision_heads": 1, "text_width": 8}
    usual |= {"text_layers": 1, "text_heads": 1, "embed": 64, "context": 4, "vocabulary": 4, "fusion_dim": 64}
    usual |= {"vis_prompt": 5, "vis_depth": 1, "text_prompt": 1, "div_num": 4, "overlap_row": 0, "mm_layers": 1}
    s = usual | dict(m or {})
    head = s["vision_width"] // s["vision_heads"]
    vision = CLIPVisionCfg(s["vision_layers"], s["vision_width"], head, patch_size=s["patch"], image_size=s["image"])
    shape = {"width": s["text_width"], "heads": s["text_heads"], "layers": s["text_layers"]}
    clip = CLIP(s["embed"], vision, CLIPTextCfg(s["context"], s["vocabulary"], **shape), quick_gelu=True)
    fusion = VisionTransformer(
        img_size=16, embed_dim=s["fusion_dim"], depth=s["mm_layers"], num_heads=s["fusion_dim"] // 64, num_classes=0
    )
    texts = texts or Texts(torch.zeros(attributes_, 2, s["text_width"]), torch.ones(attributes_, dtype=torch.long))
    own = {"prompts": s["vis_prompt"], "depth": s["vis_depth"], "regions": s["div_num"], "overlap": s["overlap_row"]}
    own |= {"text_prompts": s["text_prompt"], "mm_layers": s["mm_layers"]}
    return PromptPAR(clip, texts, None, fusion, **own | {"visual_embed": True} | options)


def schedule(case: Case) -> list[Row]:
    """The learning rate of each epoch."""
    rows, relative = [], number(case.facts["tolerance"]["lr"])
    for name, want in case.expected.items():
        per_epoch = 3
        found = recipe.by_epoch(want["warmup_epochs"])(want["base_lr"], want["epochs"] * per_epoch, per_epoch)
        found = found.reshape(want["epochs"], per_epoch)
        for epoch, lr in want["lr_of_epoch"].items():
            rows.append(near(f"{name} epoch {epoch}", [lr] * per_epoch, found[int(epoch) - 1], relative=relative))
        rows.append(near(f"{name} sum", want["sum"], found[:, 0].sum(), relative=relative))
    return rows


def selection(case: Case) -> list[Row]:
    """What is printed of the results of each epoch, and when they are computed."""
    e, given = case.expected, case.settings["test_results_by_epoch"]
    names = {"ma": "mA", "acc": "Acc", "f1": "F1"}
    queue = [{names[k]: v for k, v in row.items()} | {"Prec": 0.0} for row in given]
    found: list[dict[str, float]] = []
    scored = recipe.Epochs(lambda model: queue[len(found)], found)
    data = TensorDataset(torch.randn(4, 3, 28, 28), torch.tensor([[1.0, 0.0]] * 4))
    model = _small(attributes_=2)
    history = recipe.learn(_p(), model, data, torch.full((2,), 0.5), epochs=len(queue), batch=2, score=scored)
    own = recipe.maxima(found)
    printed = {f"max_{key}": own[name] for key, name in names.items()}
    epochs = {key: [i for i, row in enumerate(found, 1) if row[names[key]] == own[names[key]]] for key in names}
    last = "the last epoch's weights are saved, and those to resume from"
    want_epochs = int(recipe.recipe()["heads"]["epochs"])
    return [
        same("printed", e["printed"], printed),
        same("epochs_of_the_maxima", e["epochs_of_the_maxima"], epochs),
        Row("saved", e["saved"], "the last epoch", False, last),
        Row("evaluated_on", e["evaluated_on"], f"{len(found)} times in {len(queue)} epochs", found == queue),
        Row(
            "stops",
            e["stops"],
            f"{len(history)} steps",
            len(history) == 2 * len(queue) and f", {want_epochs}" in e["stops"],
        ),
    ]


def trajectory(case: Case) -> list[Row]:
    """A training by the recipe's `learn` from filled weights, batches in the recorded order."""
    s, e = case.settings, case.expected
    m, b, o = s["model"], s["batch"], s["optimizer"]
    tokenizer = open_clip.get_tokenizer(recipe.CLIP.partition("/")[0])
    blank = _small(m["attributes"], m=m)
    state = {}
    for name, value in blank.to_official().items():
        if value.is_floating_point():
            state[name] = torch.from_numpy(np.array(fill.parameter(name, tuple(value.shape), seed(s["weights"]))))
    state["clip_model.logit_scale"], state["clip_model.softmax_model.temperature"] = (
        torch.tensor(np.log(100.0)).float(),
        torch.tensor(1.0),
    )
    heads = (m["vision_heads"], m["text_heads"], m["fusion_dim"] // 64)
    options = {"overlap": m["overlap_row"], "threshold": m["ag_threshold"], "drop_path": 0.0}
    sentences_ = m["sentences"]
    assert isinstance(sentences_, list)
    model = PromptPAR.from_official(state, sentences_, tokenizer, heads=heads, **options)
    (images,), size = drawn(b["generator"], b["images"]), b["size"]
    labels, ratio = case.data["in.labels"], case.data["in.ratio"]
    epochs, per_epoch = s["schedule"]["epochs"], s["schedule"]["steps_per_epoch"]
    count = epochs * per_epoch * size
    items = [(images[i % len(images)], labels[i % len(images)]) for i in range(count)]
    clip_norm = float(re.findall(r"\d+", s["clip_grad_norm"])[0])
    table = pd.DataFrame(
        {
            name: {"learning rate": o["lr"][name], "weight decay": o["weight_decay"][name]}
            for name in ("heads", "prompts")
        }
    )
    table.loc["warm-up epochs"] = s["schedule"]["warmup_epochs"]
    table.loc["gradient clipping"] = clip_norm
    start = {name: value.clone() for name, value in model.to_official().items()}
    outputs = list[Output]()
    model.register_forward_hook(lambda module, given, out: outputs.append(Output(*(x.detach() for x in out))))
    data = InOrder(items, per_epoch * size)
    history = recipe.learn(_p(), model, data, ratio, epochs=epochs, batch=size, settings=table)
    after = model.to_official()
    room = {key: number(text.partition("; ")[0]) for key, text in case.facts["tolerance"].items()}
    rows = [near("losses", e["losses"], [row["loss"] for row in history], relative=room["losses"])]
    truth = labels[torch.arange(count).view(-1, size) % len(labels)]
    for i, name in enumerate(("heads_loss", "similarity_loss")):
        parts = [weighted_loss(out[i], y, ratio) for out, y in zip(outputs, truth, strict=True)]
        rows.append(near(name, e[name], torch.stack(parts), relative=room["losses"]))
    for name, want in e["lr"].items():
        rates = recipe.by_epoch(int(table[name]["warm-up epochs"]))(o["lr"][name], epochs * per_epoch, per_epoch)
        rows.append(near(f"lr {name}", want, rates, relative=room["lr"]))
    first = model.param_groups()[0]["name"]
    rows.append(
        near(f"lr {first}, of the training", e["lr"][first], [row["lr"] for row in history], relative=room["lr"])
    )
    compare = partial(parameters, ours=after, relative=1e-3)
    rows += compare("parameters_after", e["parameters_after"])
    rows += compare("decays_only", e["decays_only"])
    changed = sorted(name for name, value in after.items() if not torch.equal(value, start[name]))
    return [*rows, lines("changed_tensors", e["changed_tensors"], changed)]


KINDS = {
    "groups": groups,
    "labels_peta_order": order,
    "labels_sentences": sentences,
    "loss": losses,
    "metric": metric,
    "preprocess_train": operations,
    "preprocess": picture,
    "schedule": schedule,
    "selection": selection,
    "trajectory": trajectory,
}
