"""ECAMP: the recipe cases recorded from ToniChopp/ECAMP at d02d16d."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.data import own_set, xrays
from companion.data.radiographs import Labelled, Masked
from companion.data.xrays import CLASSES, ONE_OF, SIZES
from companion.evaluation.metrics import radiology
from companion.evaluation.tables import published_table
from companion.models.ecamp import detection, heads, recipe, tasks, text, transforms
from companion.models.ecamp import model as ecamp
from companion.models.ecamp.model import ECAMP, Batch, Bert, Blocks, Losses
from companion.training.fit import fit
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, close, equal, near, same

SETS = {"segment": "xrays/rsna", "detect": "xrays/rsna"}  # a set that has the task; all others: ChestX-ray14


def _given(task: str, **changes: Any) -> SimpleNamespace:
    """The parameters of a run on the CPU; as a dry run, whose loaders start no processes and which needs no files."""
    dataset = SETS.get(task, "xrays/chestx-ray14")
    usual = {"profile": "paper", "task": task, "dataset": dataset, "labels": "100", "encoder": "ECAMP", "seed": 0}
    hardware = {
        "data_root": "nowhere",
        "weights": "",
        "dry_run": True,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
    }
    return SimpleNamespace(**usual | hardware | changes)


def _room(case: Case, name: str = "") -> dict[str, Any]:
    """The tolerance of a quantity: {"relative": 1e-3}; without one of its own that of the whole case."""
    room = case.facts["tolerance"]
    return room.get(name, {kind: value for kind, value in room.items() if not isinstance(value, Mapping)})


# --- parameter groups -------------------------------------------------------------------------------------------------


def _official(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the authors' names, in order; of the bias that has two names there, the first one."""
    names = model.official_names() if hasattr(model, "official_names") else {n: n for n, _ in model.named_parameters()}
    return {names[n].replace("predictions.decoder.bias", "predictions.bias"): p for n, p in model.named_parameters()}


LAYERS = ("traspose", "layer1", "transpose1", "layer2", "downsample", "layer3")
PARTS = ("backbone", "embedding0", "embedding1_cbl", "embedding1", "embedding2_cbl", "embedding2")


def _in_their_order(names: list[str]) -> list[str]:
    """Names of a detector's parameters in the order in which the authors' classes make the modules, others as given."""

    def key(name: str) -> tuple[int, int]:
        part, _, rest = name.partition(".")
        layer = rest.split(".")[1] if rest.startswith("layers.") else ""
        return PARTS.index(part) if part in PARTS else -1, LAYERS.index(layer) if layer in LAYERS else -1

    return sorted(names, key=key)


def _sha(names: list[str]) -> str:
    return sha256("\n".join(names).encode()).hexdigest()


def _optimizer(task: str, model: nn.Module) -> torch.optim.Optimizer:
    numbers = {"lr": 1.0, "warmup_steps": 0, "steps": 1, "batch": 1}
    return recipe.downstream_fit(_given(task), 1, recipe.selection(_given(task), float), numbers)["optimizer"](model)


def _groups_downstream(case: Case) -> list[Row]:
    rows = []
    for title, expected in case.expected.items():
        task = case.settings["tasks"][title]
        with torch.device("meta"):
            model = recipe.head(_given(task))
            levels = {n: recipe.head(_given(task, labels=n)).pyramid.levels[0] for n in expected.get("expansion", ())}
        every = _official(model)
        trained = [name for name, p in every.items() if p.requires_grad]
        optimizer = _optimizer(task, model)
        group, frozen = optimizer.param_groups[0], [name for name in every if name not in trained]
        shares = [g["weight_decay"] for g in optimizer.param_groups for _ in g["params"]]
        ours = {
            "optimiser": type(optimizer).__name__,
            "groups": len(optimizer.param_groups),
            "trained": len(trained),
            "trained_names": trained,
            "trained_numbers": sum(every[name].numel() for name in trained),
            "names_sha256": _sha(_in_their_order(trained)),
            "frozen": frozen,
            "clip_grad_norm": recipe.CLIP,
            "expected_patience": recipe.TASKS[task].patience,
            "expansion": {n: level.bn3.num_features // level.bn1.num_features for n, level in levels.items()},
            "decays": shares == [tasks.DECAY] * len(trained),
        } | {key: group[key] for key in ("momentum", "nesterov", "weight_decay", "betas") if key in group}
        if recipe.TASKS[task].lists == "classification":
            ours |= _classifier(task)
        for key, value in expected.items():
            if key == "frozen" and isinstance(value, Mapping):  # the names within a part, but for one
                within, but = value["within"], value["but"]
                value = [name for name in every if name.startswith(within) and not name.startswith(but)]
            if key == "head_weight":
                rows.append(near(f"{title} {key}", [value, 0], ours[key], relative=0.1))
            else:
                rows.append(same(f"{title} {key}", value, ours[key]))
    return rows


def _classifier(task: str) -> dict[str, Any]:
    """How a small classifier starts, and what of it is in training mode."""
    torch.manual_seed(0)
    base = VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=2, num_classes=0, global_pool="")
    model = heads.classifier(base, 40, probe=task == "linear probe").train()
    last, head = model.blocks[-1].drop_path1, model.head
    return {
        "drop_path_rate": last.drop_prob,
        "head_weight": [float(head.weight.detach().std()), float(head.bias.detach().abs().max())],
        "pos_embed": model.pos_embed.requires_grad,
        "mode_of_the_encoder": last.drop_prob * last.training,
    }


def _groups_pretraining(case: Case) -> list[Row]:
    with torch.device("meta"):
        model = ecamp.build("paper", text=Bert(pooler=True))  # theirs has one, which has no gradient
    every = _official(model)
    options = recipe.pretraining_fit(_given("pre-train"), 8192, recipe.published())
    optimizer, names = options["optimizer"](model), {id(p): n for n, p in every.items()}
    groups = {"frozen": sorted(n for n, p in every.items() if not p.requires_grad)}
    for group in optimizer.param_groups:
        title = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
        groups[title] = sorted(names[id(p)] for p in group["params"])
    rows = [
        same(f"no decay {key}", case.settings[key], optimizer.param_groups[0][key]) for key in ("lr", "betas", "eps")
    ]
    for title, expected in case.expected.items():
        ours = {"tensors": len(groups[title]), "names_sha256": _sha(groups[title])}
        rows += equal(expected, ours, f"{title} ")
        listed = expected.get("some", expected.get("names", []))
        rows.append(same(f"{title} names", True, set(listed) <= set(groups[title])))
    return rows


# --- labels and texts -------------------------------------------------------------------------------------------------


def _labels_orders(case: Case) -> list[Row]:
    said, rows = case.settings, []
    rows += [same(title, case.expected[title], CLASSES[name]) for title, name in said["classes"].items()]
    rows += [same(f"{title} by accuracy", sorted(names), sorted(ONE_OF)) for title, names in said["accuracy"].items()]
    counts = published_table("ecamp", "splits-positives").set_index("method")
    for file, facts in said["files"].items():
        pictures = case.expected["list_files"][file]["pictures"]
        rows.append(same(f"list_files {file}", pictures, SIZES[facts["dataset"], "classification"][facts["key"]]))
        listed = counts[[facts["set"] in method and "segmentation" not in method for method in counts.index]]
        if facts["column"] in listed and len(listed):  # of RSNA the positives alone
            ours = listed[facts["column"]].astype(int).tolist()
            rows.append(same(f"list_files {file} positives", facts["positives"][-len(listed) :], ours))
    return rows


def _labels_text(case: Case) -> list[Row]:
    rows = [same("entities", case.expected["entities"], text.ENTITIES)] if "entities" in case.expected else []
    said, sentences = case.settings, case.expected["sentences"]
    pieces = {piece: i for one in sentences for piece, i in zip(one["tokens"], one["ids"], strict=True)}
    pieces |= {"[PAD]": 0, "[UNK]": 1, "[MASK]": said["mask"], ".": said["stop"]}
    # pieces of the added statement alone, whose ids are not recorded
    others = {piece for one in sentences for tokens in one.values() if isinstance(tokens, list) for piece in tokens}
    others = {piece for piece in others if isinstance(piece, str)} - set(pieces)
    words = text.Vocabulary.from_words(pieces | {piece: max(pieces.values()) + 1 + i for i, piece in enumerate(others)})
    for one in sentences:
        sentence, count = one["sentence"], len(one["ids"])
        ids = words.encode(sentence, said["length"])
        weights = text.weights(ids, words)
        rows.append(same(f"sentences ids of {sentence}", one["ids"], ids[:count]))
        rows.append(same(f"sentences tokens of {sentence}", one["tokens"], words.words(ids)))
        rows.append(near(f"sentences weights of {sentence}", one["weights"], weights[:count], **_room(case, "weights")))
        padding = one["weight_of_padding"]
        rows.append(near(f"sentences padding of {sentence}", padding, weights[-1], **_room(case, "weights")))
        for key, number in said["draws"].items():
            hidden = text.mask(ids, words, itertools.repeat(number).__next__)
            rows.append(same(f"sentences {key}, of {sentence}", one[key], np.flatnonzero(hidden == words.mask)))
        if added := one.get("tokens with the added statement after the first piece"):
            draws = iter([0.0, 1.5 / (len(sentence.split(".")) + 1)])
            whole = text.splice(sentence, said["statement"], draws.__next__)
            read = words.words(words.encode(whole, said["length"]))
            rows.append(same(f"sentences splice of {sentence}", added, read))
    return rows


def _labels_stops(case: Case) -> list[Row]:
    """The words of each report, with the statement after each of its pieces and without."""
    rows, said = [], case.settings
    words = text.Vocabulary.from_words(piece for one in case.expected["texts"] for piece in one["tokens"])
    for one in case.expected["texts"]:
        report, after = one["report"], one["inserted_after"]
        draws = iter([1.0] if after is None else [0.0, (after + 0.5) / (len(report.split(".")) + 1)])
        ids = words.encode(text.splice(report, said["statement"], draws.__next__), said["length"])
        rows.append(same(f"texts {report}, {after}", one["tokens"], words.words(ids)))
        if after is None:  # and where no statements are
            ids = text.ReportPairs(torch.zeros(1, 3, 8, 8), [report], words)[0].labels
            rows.append(same(f"texts {report}, no statements", one["tokens"], words.words(ids)))
    return rows


# --- losses and metrics -----------------------------------------------------------------------------------------------


def _outputs(case: Case) -> list[Tensor]:
    """The recorded heads of a detector, coarse to fine."""
    names = sorted((n for n in case.data if n.startswith("in.head")), key=lambda n: case.data[n].shape[-1])
    return [case.data[name].float() for name in names]


def _losses(case: Case) -> list[Row]:
    room, data, wanted = _room(case), case.data, case.expected
    logits = data["in.logits"][:, None].requires_grad_()
    mixed = heads.segmentation_loss(logits, data["in.mask"][:, None])
    mixed.backward()
    blank = torch.zeros(case.settings["empty"]["shape"])
    outputs, boxes = [head.requires_grad_() for head in _outputs(case)], data["in.targets"]
    size = 32 * outputs[0].shape[-1]
    pairs = zip(outputs, detection.anchors(size), strict=True)
    parts = [[float(x.detach()) for x in detection.yolo_loss(head, boxes, a, size)] for head, a in pairs]
    total = detection.detection_loss(outputs, boxes, size)
    total.backward()
    ours = {
        "mixed": mixed,
        "mixed_of_empty": heads.segmentation_loss(blank + case.settings["empty"]["logit"], blank),
        "yolo_of_each_head": parts,
        "yolo": total,
        "yolo_gradient_sum_of_squares_of_each_head": [float((head.grad**2).sum()) for head in outputs],
    }
    gradient = data["out.gradient"]
    room_of_all = room["relative"] * float(gradient.abs().max())
    return [*close(wanted, ours, **room), near("out.gradient", gradient, logits.grad[:, 0], absolute=room_of_all)]


def _metrics(case: Case) -> list[Row]:
    data, wanted, room, said = case.data, case.expected, _room(case), case.settings

    def mean_of_batches(kind: str, loss: Callable, logits: Tensor, truth: Tensor) -> float:
        sizes = said["batches"][kind]
        return float(
            np.mean([float(loss(*pair)) for pair in zip(logits.split(sizes), truth.split(sizes), strict=True)])
        )

    labels, one_of = data["in.labels"].float(), data["in.labels_one_of"]
    masks, mask_logits = data["in.mask"][:, None], data["in.mask_logits"][:, None]
    outputs, rule, loss = _outputs(case), said["detection"], heads.classification_loss
    size = 32 * outputs[0].shape[-1]
    boxes = detection.decode(outputs, size, rule["confidence"], rule["nms"])
    ours = {
        "mean_auroc": tasks.labels_score([(data["in.logits"], labels)], "released") / 100,
        "mean_loss_of_batches_multilabel": mean_of_batches("classification", loss, data["in.logits"], labels),
        "accuracy": tasks.labels_score([(data["in.logits_one_of"], one_of)], "released") / 100,
        "mean_loss_of_batches_one_of": mean_of_batches("classification", loss, data["in.logits_one_of"], one_of),
        "dice": tasks.masks_score([(mask_logits, masks)], "released") / 100,
        "dice_sorted": radiology.dice(mask_logits.sigmoid(), masks).sort().values,
        "mean_loss_of_batches_segmentation": mean_of_batches(
            "segmentation", heads.segmentation_loss, mask_logits, masks
        ),
        "boxes_kept_of_each_picture": [len(one) for one in boxes],
    }
    name, precision = said["map"], radiology.mean_precision(boxes, data["in.targets"], size) / 100
    return [
        *close(wanted, ours, **room),
        near(name, wanted[name], precision, **_room(case, "map")),
        same(f"{name} thresholds", said["ious"], [radiology.IOUS[0], radiology.IOUS[-1]]),
    ]


# --- images -----------------------------------------------------------------------------------------------------------


def _grid(image: Tensor, count: int) -> Tensor:
    at = [round(i * (image.shape[-1] - 1) / (count - 1)) for i in range(count)]
    return image[..., at, :][..., at]


def _image(case: Case, start: str, wanted: Mapping[str, Any], image: Tensor) -> list[Row]:
    """Rows of an image's recorded mean, std and grid of pixels."""
    ours = {"mean": image.mean(), "std": image.std(), "grid": _grid(image, len(wanted["grid"][0]))}
    return [near(f"{start}{name}", value, ours[name], **_room(case)) for name, value in wanted.items()]


def _items(
    image: np.ndarray, make: Callable, *args: Any, reads: int = 1, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """Item 0 of a set of one PNG, by our reader, read so many times."""
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(Path(folder) / "a.png")
        data = make(own_set(folder, "xrays", ""), folder, ["a.png"], *args, **options)
        return [data[0] for _ in range(reads)]


def _preprocess_classification(case: Case) -> list[Row]:
    transform = transforms.test_transform(case.settings["img_size"])
    options = {"labels": torch.zeros(1, 1), "transform": transform}
    ((image, _),) = _items(case.data["in.image"].numpy(), Labelled, **options)
    return _image(case, "", case.expected, image)


def _preprocess_detection(case: Case) -> list[Row]:
    image, wanted, whole = case.data["in.image"].numpy(), case.expected, np.array(case.settings["boxes"])
    transform = transforms.squeeze_transform(case.settings["img_size"])
    height, width = image.shape[:2]
    unit = xrays.BOX_UNIT / np.array([width, height, width, height])  # boxes are given in pixels of a square
    (grey, boxes), (_, again) = _items(image, Labelled, xrays.box_labels([whole * unit]), transform, reads=2)
    odd = np.issubdtype(whole.dtype, np.integer) and ((whole[:, :2] + whole[:, 2:]) % 2).any()
    halved = "centres of whole numbers lose half a pixel there; RSNA's list has decimals" if odd else ""
    # a grey image for each colour, blue first as OpenCV has them
    colours = torch.cat([transform(torch.from_numpy(image[..., c] / 255).float()[None])[:1] for c in (2, 1, 0)])
    room, second = _room(case, "labels"), "labels_when_the_same_item_is_read_a_second_time"
    grid, grey_only = wanted["image"]["grid"], "X-rays are grey, and read as one channel"
    half = 0.5 / min(height, width) + room["absolute"]
    return [
        *_image(case, "image by channel, ", wanted["image"], colours),
        near("image of the colour image", grid, _grid(grey, len(grid[0])), **_room(case), departs=grey_only),
        near("labels size", [row[3:] for row in wanted["labels"]], boxes[:, 3:], **room),
        near("labels", wanted["labels"], boxes, **room, departs=halved),
        near("labels within half a pixel", wanted["labels"], boxes, absolute=half),
        near(second, wanted[second], again, **room, departs="stored boxes are divided in place there: wrong labels"),
    ]


def _preprocess_segmentation(case: Case) -> list[Row]:
    wanted, said, size = case.expected, case.settings, case.settings["img_size"]
    boxes = np.array(said["boxes_rsna"], np.float32)
    runs = torch.zeros(1, xrays.RUN_SIDE, xrays.RUN_SIDE)
    for top, bottom, left, right in said["boxes_siim"]:
        runs[:, top:bottom, left:right] = 1
    masks = {"xrays/rsna": lambda i: xrays._box_mask([boxes], i), "xrays/siim": lambda i: runs}
    items = []
    for name, mask in masks.items():
        transform = transforms.MaskTransform(name, False, size)
        items += _items(case.data["in.image"].numpy(), Masked, mask=mask, transform=transform)
    (image, (rsna,)), (_, (siim,)) = items
    soft, room = int(((siim > 0) & (siim < 1)).sum()), _room(case, "mask_siim")["absolute"]
    hard, smooth = wanted["mask_rsna"], wanted["mask_siim"]
    return [
        same("image size", [3, size, size], image.shape),
        *_image(case, "image ", wanted["image"], image),
        near("mask_rsna sum", hard["sum"], rsna.sum()),
        *equal(hard, {"values": rsna.unique(), "grid": _grid(rsna, len(hard["grid"]))}, "mask_rsna "),
        near("mask_siim sum", smooth["sum"], siim.sum(), absolute=room * soft),
        near("mask_siim grid", smooth["grid"], _grid(siim, len(smooth["grid"])), absolute=room),
        same("mask_siim values_between_0_and_1", smooth["values_between_0_and_1"], soft),
        *(_warp(said["warp"], name) for name in masks),
    ]


def _warp(recorded: Mapping[str, Any], name: str) -> Row:
    """How often training warps, and by how much; on SIIM the mask stays."""
    transform = transforms.MaskTransform(name, True)
    warp: Any = transform.warp.transforms[0]
    ours = [*warp.scale, *warp.degrees, transform.warp.p, warp.translate, warp.shear, transform.warp_mask]
    stays = [None, None, name == "xrays/rsna"]
    return same(f"image training, {name}", [*recorded["ranges"], recorded["p"], *stays], ours)


def _preprocess_pretraining(case: Case) -> list[Row]:
    wanted, rows = case.expected, []
    steps: dict[str, Any] = {type(step).__name__: step for step in transforms.pretrain_transform().transforms}
    shown = transforms.pretrain_transform()(torch.rand(1, 500, 460))
    for name, options in wanted["operations"]:
        step: Any = steps.get(name)
        read: dict[str, Any] = {key: getattr(step, key, None) for key in options}
        if name == "RandomResizedCrop":
            read |= {"size": step.size[0], "interpolation": step.interpolation.value, "ratio": np.round(step.ratio, 6)}
        elif name == "Normalize":
            read = {key: value[0] for key, value in read.items()}
        elif name == "Grayscale":
            read = {"channels": len(shown)}
        rows.append(same(f"operations {name}", options, read))
    # the model itself is compared with the authors' in tests/parity: here, which image it is given
    ids = torch.ones(1, 20).long()
    pair = Batch(torch.randn(1, 3, 64, 64), ids, ids, ids, ids.float(), torch.rand(1, 64), torch.ones(1, 2).long())
    out = ecamp.build("pocket").eval().forward_intermediates(pair)[1]
    small = v2.functional.resize(pair.images, [32, 32], v2.InterpolationMode.BICUBIC, antialias=False)
    halved = torch.allclose(out["low"], small, atol=1e-5) and out["super_resolved"].shape == pair.images.shape
    pairs = text.ReportPairs(torch.zeros(1, 3, 8, 8), ["a"], text.Vocabulary.from_words(["a"]))
    draws = np.linspace(0, 1, 50, endpoint=False)
    places = {text.splice("a. b. c", " X.", iter([0.0, draw]).__next__).index("X") for draw in draws}
    return [
        *rows,
        same("then_in_the_model", wanted["then_in_the_model"], halved),
        same("text added_statement", wanted["text"]["added_statement"], pairs.splice_share),
        same("text places", 4, len(places)),  # of 3 pieces
        same("text length", wanted["text"]["length"], len(pairs[0].ids)),
    ]


# --- schedules and selection ------------------------------------------------------------------------------------------


def _schedule_downstream(case: Case) -> list[Row]:
    rows = []
    for title, scripts in case.expected.items():
        task = case.settings["tasks"][title]
        for one in scripts:
            name = case.settings["datasets"][one["task"]]
            numbers: dict[str, Any] = recipe.downstream_recipe(task, name, one["share"])
            what = f"{title} {one['task']} {one['share']} %"
            group = _optimizer(task, nn.Linear(1, 1)).param_groups[0]
            ours = numbers | {"num_steps": numbers["steps"], "train_batch_size": numbers["batch"]}
            ours |= {"weight_decay": group["weight_decay"], "num_classes": str(len(CLASSES[name]))}
            ours |= {"start_eval": str(recipe.FIRST[one["share"]])} if "start_eval" in one else {}
            rows += [same(f"{what} {key}", one[key], value) for key, value in ours.items() if key in one]
            steps = [int(step) for step in one["lr_of_step"]]
            rates = recipe.downstream_learning_rates(numbers, max(steps) + 1)[steps]
            rows.append(near(f"{what} lr_of_step", list(one["lr_of_step"].values()), rates, **_room(case)))
    return rows


class _Toy(nn.Module):
    """One weight, which each step moves; records how many images each forward pass has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.sizes = nn.Parameter(torch.ones(())), list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return 1.0 * self.weight

    def trained(self, images: int, options: Mapping[str, Any]) -> list[dict]:
        """The history of a training by the recipe's `options`."""
        return fit(self, lambda model, batch: model(batch[0]), TensorDataset(torch.zeros(images, 1)), **options)


def _schedule_last_batch(case: Case) -> list[Row]:
    rows = []
    for one in case.expected["fine_tuning"]:
        p, model = _given(one["task"]), _Toy()
        # steps of 1: the training ends with its first epoch
        numbers = {"lr": 0.0, "warmup_steps": 0, "steps": 1, "batch": one["batch"]}
        best = recipe.selection(p, lambda _: 1.0)
        model.trained(one["pictures"], recipe.downstream_fit(p, one["pictures"], best, numbers))
        seen = [one["steps_of_an_epoch"], one["pictures_in_the_last_step"]]
        what = f"fine_tuning {one['task']}, {one['pictures']} of {one['batch']}"
        rows.append(same(what, seen, [len(model.sizes), model.sizes[-1]]))
    few, model = recipe.published(gpus=1, batch_per_gpu=2, accumulation=1, stop_epoch=1), _Toy()
    model.trained(7, recipe.pretraining_fit(_given("pre-train"), 7, few))
    return [*rows, same("pre_training", case.expected["pre_training"], model.sizes == [2, 2, 2])]


def _schedule_pretraining(case: Case) -> list[Row]:
    r, images, wanted = recipe.published(**case.settings["published"]), case.settings["pictures"], case.expected
    iterations, steps, batch = recipe.pretraining_epoch(images, r)
    learning_rates = recipe.pretraining_learning_rates(images, r)
    ours = {
        "pictures_per_gpu": -(-images // int(r["gpus"])),
        "iterations_of_each_epoch": iterations,
        "steps_of_each_epoch": steps,
        "iterations_left_over_and_dropped": iterations - int(r["accumulation"]) * steps,
        "pictures_of_a_step": batch,
        "last_epoch": len(learning_rates) // steps - 1,
    }
    rates = [learning_rates[one["epoch"] * steps + one["step_in_epoch"]] for one in wanted["rates"]]
    return [*equal(wanted, ours), near("rates", [one["lr"] for one in wanted["rates"]], rates, **_room(case))]


class _RanOut(Exception):
    """A made-up sequence of scores has no further one."""


def _selected(run: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of a made-up sequence of scores, seen in a training of one weight that each step moves."""
    task = run["task"]
    changes = {} if run.get("is_multilabel", True) else {"dataset": ONE_OF[0]}
    p, model, values = _given(task, dry_run=False, **changes), _Toy(), iter(map(float, run["values"]))
    kept: list[float] = []
    looks: list[float] = []

    def score(toy: nn.Module) -> float:
        kept.extend(map(float, best.best.values()))
        looks.append(float(model.weight.detach()))
        for value in values:
            return value
        raise _RanOut

    best = recipe.selection(p, score)
    best.first_step = 1 + run.get("start_eval", best.first_step - 1)
    numbers, ended = {"lr": 1e-3, "warmup_steps": 0, "steps": run["num_steps"], "batch": 1}, True
    try:
        images = run["steps_of_an_epoch"]
        model.trained(images, recipe.downstream_fit(p, images, best, numbers))
    except _RanOut:
        ended = False
    kept.extend(map(float, best.best.values()))
    saved = [looks.index(weight) for weight in dict.fromkeys(kept)]
    facts = {"epochs_that_were_saved": saved, "epochs_looked_at": len(looks), "steps_done": len(model.sizes)}
    # the selected weights are those of the model at the end
    last = looks.index(float(model.weight.detach())) if ended and saved else saved[-1] if saved else None
    return facts | {"kept_epoch": last, "ended": ended}


def _selection(case: Case) -> list[Row]:
    rows = []
    for title, run in case.settings["sequences"].items():
        ours = _selected(run)
        rows += [same(f"{title} {key}", value, ours[key]) for key, value in case.expected[title].items()]
    return rows


# --- trajectories -----------------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors by the authors' names."""
    return model.to_official() if hasattr(model, "to_official") else model.state_dict()


def _filled(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state of `fill` for a model, by the authors' names; BatchNorm's counters are left out."""
    shapes = {name: list(t.shape) for name, t in _state(model).items() if t.is_floating_point()}
    filled = fill.state_dict(shapes, seed)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in filled.items()}


Run = tuple[list[Any], list[float], dict[str, Tensor]]
"""Losses and learning rate of each step, and the state at the end by the authors' names."""


def _trajectory(case: Case, what: str, losses: list[Any], run: Callable[[int], Run]) -> list[Row]:
    """Rows of a recorded training; `run(n)` trains with images changed by n units in the last place (ULP).

    Where a quantity does not agree within the tolerance of the case, the training is run with images changed by one
    and two units up and down. The recorded number is one more of such draws: twice the range of ours is added to the
    tolerance. (A BatchNorm over one image, and AdamW's first steps on gradients that are zero but for rounding, make
    some sums of weights and the last losses depend on it, and on the number of threads as well.)
    """
    wanted = case.expected["parameters_at_the_end"]
    theirs = {f"{what} {i}": one for i, one in enumerate(losses)}
    theirs |= {f"parameters_at_the_end {name} {key}": v for name, facts in wanted.items() for key, v in facts.items()}

    def quantities(n: int) -> tuple[dict[str, Any], list[float]]:
        values, learning_rates, state = run(n)
        found: dict[str, Any] = {f"{what} {i}": one for i, one in enumerate(values)}
        for name in wanted:
            value = state[name].detach().double()
            found[f"parameters_at_the_end {name} sum"] = float(value.sum())
            found[f"parameters_at_the_end {name} sum_of_squares"] = float((value**2).sum())
        return found, learning_rates

    ours, learning_rates = quantities(0)

    def compare(others: list[dict[str, Any]]) -> list[Row]:
        rows = []
        for name, value in theirs.items():
            room = {"absolute": 0.0} | _room(case, "loss" if name.startswith(what) else name.split()[-1])
            room["absolute"] += 2 * float(np.ptp([ours[name], *(one[name] for one in others)], axis=0).max())
            rows.append(near(name, value, ours[name], **room))
        return rows

    rows = compare([])
    if not all(row.passes for row in rows):
        rows = compare([quantities(n)[0] for n in (1, -1, 2, -2)])
    # a learning rate of 0 has no relative difference
    room, name = {"absolute": 1e-9} | _room(case, "lr"), "lr_of_each_step"
    count = sum(name.startswith(what) for name in ours)
    return [near(name, case.expected[name], learning_rates, **room), same(what, len(losses), count), *rows]


def _images(name: str, shape: tuple[int, ...], seed: int, n: int) -> Tensor:
    """Values of `fill`, changed by n units in the last place (ULP)."""
    values = fill.values(name, shape, seed)
    return torch.from_numpy(values + n * np.spacing(values))


def _model(task: str, said: Mapping[str, Any]) -> Any:
    """A small model of a downstream task with the recorded initial weights."""
    base, facts = VisionTransformer(**said["vit"], num_classes=0, global_pool=""), said["model"]
    attention, seed = said["vit"]["num_heads"], said["seed"]
    if task == "fine-tune":
        return heads.classifier_from_official(_filled(heads.classifier(base, facts["num_classes"]), seed), attention)
    if task == "segment":
        segmenter = heads.Segmenter(base, channels=facts["decode_features"])
        return heads.Segmenter.from_official(_filled(segmenter, seed), attention)
    detector = detection.Detector(base, facts["classes"], facts["expansion"])
    return detection.Detector.from_official(_filled(detector, seed), attention)


def _trajectory_downstream(task: str, case: Case) -> list[Row]:
    said, what, truth = case.settings, "loss_of_each_step", case.data.get("in.labels")
    if truth is None:
        truth = torch.zeros(len(said["boxes"]), 1, *said["shape"][2:])
        for i, (top, left, bottom, right) in enumerate(said["boxes"]):
            truth[i, :, top:bottom, left:right] = 1
    batches, epochs = said["batches"], -(-said["num_steps"] // len(said["batches"]))
    numbers = {"lr": said["optimiser"]["lr"], "warmup_steps": said["warmup_steps"], "steps": said["num_steps"]}

    def train(n: int) -> Run:
        model, p, rising = _model(task, said), _given(task), itertools.count(1)
        images = _images("input:images", tuple(said["shape"]), said["seed"], n)
        items = [(images[i], truth[i]) for _ in range(epochs) for batch in batches for i in batch]
        best = recipe.selection(p, lambda _: float(next(rising)))  # the last weights are the best
        data = InOrder(items, len(items) // epochs)
        options = recipe.downstream_fit(p, len(data), best, numbers | {"batch": len(batches[0])})
        history = fit(model, lambda model, batch: recipe.TASKS[task].loss(model(batch[0]), batch[1]), data, **options)
        return [row["loss"] for row in history], [row["lr"] for row in history], _state(model)

    return _trajectory(case, what, case.expected[what], train)


def _trajectory_pretraining(case: Case) -> list[Row]:
    said, facts, bert = case.settings, case.settings["model"], case.settings["model"]["bert"]
    seed, pairs, accumulate = said["seed"], case.data["in.ids"].shape[1], said["accumulate"]
    start = ECAMP(
        image=facts["img_size"],
        patch=facts["patch"],
        encoder=Blocks(facts["embed_dim"], facts["depth"], facts["heads"]),
        decoder=Blocks(facts["decoder_dim"], facts["decoder_depth"], facts["decoder_heads"]),
        text=Bert(
            words=bert["vocab_size"],
            length=bert["max_position_embeddings"],
            width=bert["hidden_size"],
            depth=bert["num_hidden_layers"],
            hidden=bert["intermediate_size"],
        ),
    )
    weights = _filled(start, seed) | {n: t for n, t in start.to_official().items() if n.endswith("pos_embed")}
    per_epoch, patches = said["iterations_of_each_epoch"], (facts["img_size"] // facts["patch"]) ** 2
    r = recipe.published(**said["published"] | {"gpus": 1, "batch_per_gpu": pairs})
    steps = recipe.pretraining_epoch(per_epoch * pairs, r)[1]
    done = [e * per_epoch + (s + 1) * accumulate for e in range(said["epochs"]) for s in range(steps)]
    used = [i for end in done for i in range(end - accumulate, end)]
    stored = {name.removeprefix("in."): value for name, value in case.data.items()}
    corners = torch.stack([stored["column"], stored["row"]], 2).long()

    def items(n: int) -> Iterator[tuple[Tensor, ...]]:
        for i in used:
            images = _images(f"input:image{i}", (pairs, 3, facts["high_res"], facts["high_res"]), seed, n)
            noise = torch.from_numpy(fill.values(f"input:noise{i}", (pairs, patches), seed))
            texts = [stored[name][i].long() for name in ("ids", "labels", "attention_mask")]
            yield from zip(images, *texts, stored["weights"][i], noise, corners[i], strict=True)

    def train(n: int) -> Run:
        sizes = {"heads": facts["heads"], "decoder_heads": facts["decoder_heads"]}
        sizes |= {"text_heads": bert["num_attention_heads"], "dropout": bert["dropout"]}
        model, data = ECAMP.from_official(weights, **sizes), InOrder(items(n), per_epoch * pairs)
        options = recipe.pretraining_fit(_given("pre-train", accumulate=accumulate), len(data), r)
        history = fit(model, ecamp.pretraining_loss, data, **options)
        losses = [[row[name] for name in said["losses"]] for row in history]
        return losses, [row["lr"] for row in history], model.to_official()

    # of each step the mean over its iterations; those that are left over at the end of an epoch are not computed here
    each = np.array(case.expected["losses_of_each_iteration"])
    wanted = each[used].reshape(-1, accumulate, each.shape[1]).mean(1).tolist()
    return [
        same("losses_are", sorted(said["losses"]), sorted(Losses._fields[1:])),
        same("iterations_done_before_each_step", case.expected["iterations_done_before_each_step"], done),
        *_trajectory(case, "losses_of_each_iteration", wanted, train),
    ]


KINDS: dict[str, Callable[[Case], list[Row]]] = {
    "groups_downstream": _groups_downstream,
    "groups_pretraining": _groups_pretraining,
    "labels_orders": _labels_orders,
    "labels_stops": _labels_stops,
    "labels_text": _labels_text,
    "loss": _losses,
    "metric": _metrics,
    "preprocess_classification": _preprocess_classification,
    "preprocess_detection": _preprocess_detection,
    "preprocess_pretraining": _preprocess_pretraining,
    "preprocess_segmentation": _preprocess_segmentation,
    "schedule_downstream": _schedule_downstream,
    "schedule_last_batch": _schedule_last_batch,
    "schedule_pretraining": _schedule_pretraining,
    "selection": _selection,
    "trajectory_detection": functools.partial(_trajectory_downstream, "detect"),
    "trajectory_finetune": functools.partial(_trajectory_downstream, "fine-tune"),
    "trajectory_pretraining": _trajectory_pretraining,
    "trajectory_segmentation": functools.partial(_trajectory_downstream, "segment"),
}
