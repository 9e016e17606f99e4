"""ECAMP: the recipe cases recorded from ToniChopp/ECAMP at d02d16d."""

from __future__ import annotations

import itertools
import re
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
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.data import xrays
from companion.data.xrays_sets import CLASSES, ONE_OF, SIZES
from companion.evaluation import fill
from companion.evaluation.metrics import radiology
from tests.recipes.runner import Case, InOrder, Row, near, same
from companion.evaluation.tables import published_table
from companion.models.ecamp import heads, recipe, text
from companion.models.ecamp import model as ecamp
from companion.models.ecamp.model import ECAMP, Batch, Losses

TASKS = {"fine-tuning": "fine-tune", "linear probe": "linear probe", "segmentation": "segment", "detection": "detect"}
SETS = {"fine-tune": "xrays/chestx-ray14", "segment": "xrays/rsna", "detect": "xrays/rsna"}


def _given(task: str, **changes: Any) -> SimpleNamespace:
    """The parameters of a run on the CPU; as a dry run, whose loaders start no processes and which needs no files."""
    dataset = SETS.get(task, SETS["fine-tune"])
    usual = {"profile": "paper", "task": task, "dataset": dataset, "labels": "100", "encoder": "ECAMP", "seed": 0}
    hardware = {"dry_run": True, "accelerator": "cpu", "devices": 1, "precision": "32-true"}
    return SimpleNamespace(**usual | hardware | changes)


def _dataset(title: str) -> str:
    """Our name of a set by the authors' name of its folder: "ODIR5K", "Aptos"."""
    plain = {name: re.sub(r"\W", "", own).lower() for name, own in recipe.TITLES.items() if name != "xrays/chestmnist"}
    return next(name for name, own in plain.items() if own.startswith(re.sub(r"\W", "", title).lower()))


def _room(case: Case, name: str = "") -> dict[str, Any]:
    """The tolerance of a quantity: {"relative": 1e-3}; without one of its own that of the whole case."""
    given = case.facts["tolerance"]
    if name not in given:
        return {kind: value for kind, value in given.items() if kind in ("relative", "absolute")}
    kind, value = given[name].split()
    return {kind: float(value)}


def _shown(what: str, expected: Any, observed: Any, agrees: bool) -> Row:
    return Row(what, str(expected)[:60], str(observed)[:60], bool(agrees))


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


def _groups_downstream(case: Case) -> list[Row]:
    rows = []
    for title, expected in case.expected.items():
        task, kind = TASKS[title], recipe.KINDS[TASKS[title]]
        with torch.device("meta"):
            model = recipe._head(_given(task), kind)
            levels = {
                n: recipe._head(_given(task, labels=n), kind).pyramid.levels[0] for n in expected.get("expansion", ())
            }
        every = _official(model)
        trained = [name for name, p in every.items() if p.requires_grad]
        optimizer = recipe.downstream_optimizer(task, 1.0)(model)
        group = optimizer.param_groups[0]
        ours = {
            "optimiser": type(optimizer).__name__,
            "groups": len(optimizer.param_groups),
            "trained": len(trained),
            "trained_names": trained,
            "trained_numbers": sum(every[name].numel() for name in trained),
            "names_sha256": _sha(_in_their_order(trained)),
            "frozen": [name for name in every if name not in trained],
            "clip_grad_norm": recipe.CLIP,
            "expected_patience": recipe.patience(_given(task)),
            "expansion": {n: level.bn3.num_features // level.bn1.num_features for n, level in levels.items()},
        } | {key: group[key] for key in ("momentum", "nesterov", "weight_decay", "betas") if key in group}
        for key, value in expected.items():
            what = f"{title} {key}"
            if key == "decays":
                shares = [g["weight_decay"] for g in optimizer.param_groups for _ in g["params"]]
                agrees = shares == [recipe.DECAY] * len(trained)
                rows.append(_shown(what, value, f"{len(shares)} tensors: {set(shares)}", agrees))
            elif key == "frozen" and isinstance(value, str):
                within, but = re.findall(r"(\S+)\*", value)
                found = [name for name in every if name.startswith(within) and not name.startswith(but)]
                rows.append(_shown(what, value, f"{len(ours['frozen'])} tensors", found == ours["frozen"]))
            elif key in ("drop_path_rate", "head_weight", "pos_embed", "mode_of_the_encoder"):
                rows.append(_classifier(what, value, task == "linear probe"))
            else:
                rows.append(same(what, value, ours[key]))
    return rows


def _classifier(what: str, expected: Any, probe: bool) -> Row:
    """How a small classifier starts, and what of it is in training mode."""
    torch.manual_seed(0)
    base = VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=2, num_classes=0, global_pool="")
    model = heads.classifier(base, 40, probe=probe).train()
    last = model.blocks[-1].drop_path1
    spread, start = float(model.head.weight.detach().std()), float(model.head.bias.detach().abs().max())
    if what.endswith("drop_path_rate"):
        return near(what, expected, last.drop_prob, relative=1e-6)
    if what.endswith("head_weight"):
        asked = float(re.findall(r"\de-\d", expected)[0])
        return _shown(what, expected, f"std {spread:.2g}, bias {start:g}", abs(spread / asked - 1) < 0.1 and start == 0)
    if what.endswith("pos_embed"):
        trained = model.pos_embed.requires_grad
        return _shown(what, expected, f"trained: {trained}", trained == (expected == "trained"))
    agrees = last.training and f"drop path {last.drop_prob:g}" in expected
    return _shown(what, expected, f"in training: {last.training}, drop path {last.drop_prob:g}", agrees)


def _groups_pretraining(case: Case) -> list[Row]:
    with torch.device("meta"):
        model = ecamp.build("paper", pooler=True)  # theirs has one, which has no gradient
    published = recipe.recipe()
    optimizer, names = recipe.pretraining_optimizer(published)(model), {id(p): n for n, p in _official(model).items()}
    found = {"frozen": sorted(n for n, p in _official(model).items() if not p.requires_grad)}
    for group in optimizer.param_groups:
        title = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
        found[title] = sorted(names[id(p)] for p in group["params"])
    rows = [
        same(f"no decay {key}", case.settings[key], optimizer.param_groups[0][key]) for key in ("lr", "betas", "eps")
    ]
    for title, expected in case.expected.items():
        ours = {"tensors": len(found[title]), "names_sha256": _sha(found[title])}
        rows += [same(f"{title} {key}", expected[key], value) for key, value in ours.items()]
        listed = expected.get("some", expected.get("names", []))
        rows.append(same(f"{title} names", True, set(listed) <= set(found[title])))
    return rows


# --- labels and texts -------------------------------------------------------------------------------------------------


def _labels_orders(case: Case) -> list[Row]:
    rows = []
    for title, expected in case.expected.items():
        if title == "list_files":
            continue
        name = _dataset(title)
        if isinstance(expected, list):
            rows.append(same(title, expected, CLASSES[name]))
        else:
            by_accuracy = {one for one in ONE_OF if re.search(recipe.TITLES[one].split("-")[0], expected + title, re.I)}
            rows.append(_shown(title, expected, f"accuracy: {ONE_OF}", by_accuracy == set(ONE_OF)))
    counts = published_table("ecamp", "splits-positives").set_index("method")
    for file, facts in case.expected.get("list_files", {}).items():
        title, name = file.split("/")[0], _dataset(file.split("/")[0])
        key = re.sub(r"train_list_?|_list", "", Path(file).stem) or "100"
        rows.append(same(f"list_files {file}", facts["pictures"], SIZES[name, "classification"][key]))
        positives = facts.get("positives_of_each_column", list(facts.get("of_each_value", {}).values()))
        column = {"1": "train_1", "10": "train_10"}.get(key, key)
        listed = counts[[title in method and "segmentation" not in method for method in counts.index]]
        if column in listed and len(listed):
            rows.append(
                same(f"list_files {file} positives", positives[-len(listed) :], listed[column].astype(int).tolist())
            )
    return rows


def _labels_text(case: Case) -> list[Row]:
    rows = [same("entities", case.expected["entities"], text.ENTITIES)] if "entities" in case.expected else []
    sentences = case.expected["sentences"]
    pieces = {piece: i for one in sentences for piece, i in zip(one["tokens"], one["ids"], strict=True)}
    mask, stop = map(int, re.findall(r"is (\d+)", case.settings["tokenizer"]))
    pieces |= {"[PAD]": 0, "[UNK]": 1, "[MASK]": mask, ".": stop}
    # pieces of the added statement alone, whose ids are not recorded
    others = {piece for one in sentences for tokens in one.values() if isinstance(tokens, list) for piece in tokens}
    others = {piece for piece in others if isinstance(piece, str)} - set(pieces)
    words = text.Vocabulary.from_words(pieces | {piece: max(pieces.values()) + 1 + i for i, piece in enumerate(others)})
    length, draws = (
        case.settings["length"],
        {"everything that may be masked": 0.0, "nothing masked": 0.999, "draw of 0.72": 0.72},
    )
    for one in sentences:
        said, count = one["sentence"], len(one["ids"])
        ids = words.encode(said, length)
        weights = text.weights(ids, words)
        rows.append(same(f"sentences ids of {said}", one["ids"], ids[:count]))
        rows.append(same(f"sentences tokens of {said}", one["tokens"], words.words(ids)))
        rows.append(near(f"sentences weights of {said}", one["weights"], weights[:count], relative=1e-5))
        rows.append(near(f"sentences padding of {said}", one["weight_of_padding"], weights[-1], relative=1e-5))
        for kind, number in draws.items():
            hidden = text.mask(ids, words, itertools.repeat(number).__next__)
            key = f"masked positions: {kind}"
            rows.append(same(f"sentences {kind}, of {said}", one[key], np.flatnonzero(hidden == mask)))
        if added := one.get("tokens with the added statement after the first piece"):
            statement = re.findall(r"'(.*)'", case.settings["draws"])[0]
            whole = text.splice(said, statement, iter([0.0, 1.5 / (len(said.split(".")) + 1)]).__next__)
            rows.append(same(f"sentences splice of {said}", added, words.words(words.encode(whole, length))))
    return rows


# --- losses and metrics -----------------------------------------------------------------------------------------------


def _outputs(case: Case) -> list[Tensor]:
    """The recorded heads of a detector, coarse to fine."""
    names = sorted((n for n in case.data if n.startswith("in.head")), key=lambda n: case.data[n].shape[-1])
    return [case.data[name].float() for name in names]


def _size(outputs: list[Tensor]) -> int:
    return 32 * outputs[0].shape[-1]


def _losses(case: Case) -> list[Row]:
    room, data = _room(case), case.data
    logits = data["in.logits"][:, None].requires_grad_()
    mixed = heads.segmentation_loss(logits, data["in.mask"][:, None])
    mixed.backward()
    count, *sides, value = map(float, re.findall(r"-?\d+", case.settings["empty"].replace("two", "2")))
    blank = torch.zeros(int(count), 1, *map(int, sides))
    outputs = [head.requires_grad_() for head in _outputs(case)]
    size = _size(outputs)
    each = [heads.yolo_loss(x, data["in.targets"], a, size) for x, a in zip(outputs, heads.anchors(size), strict=True)]
    total = heads.detection_loss(outputs, data["in.targets"], size)
    total.backward()
    squares = [float((head.grad**2).sum()) for head in outputs]
    wanted = case.expected
    return [
        near("mixed", wanted["mixed"], mixed, **room),
        near(
            "out.gradient",
            data["out.gradient"],
            logits.grad[:, 0],
            absolute=room["relative"] * float(data["out.gradient"].abs().max()),
        ),
        near("mixed_of_empty", wanted["mixed_of_empty"], heads.segmentation_loss(blank + value, blank), **room),
        near(
            "yolo_of_each_head",
            wanted["yolo_of_each_head"],
            [[float(x.detach()) for x in parts] for parts in each],
            **room,
        ),
        near("yolo", wanted["yolo"], total, **room),
        near(
            "yolo_gradient_sum_of_squares_of_each_head",
            wanted["yolo_gradient_sum_of_squares_of_each_head"],
            squares,
            **room,
        ),
    ]


def _metrics(case: Case) -> list[Row]:
    data, wanted, room = case.data, case.expected, _room(case)
    sizes = {
        kind: list(map(int, re.findall(r"\d+", part)))
        for kind, part in (one.split(maxsplit=1) for one in case.settings["batches"].split("; "))
    }

    def mean_of_batches(kind: str, loss: Callable, logits: Tensor, truth: Tensor) -> float:
        parts = zip(logits.split(sizes[kind]), truth.split(sizes[kind]), strict=True)
        return float(np.mean([float(loss(a, b)) for a, b in parts]))

    labels, one_of = data["in.labels"].float(), data["in.labels_one_of"]
    masks, mask_logits = data["in.mask"][:, None], data["in.mask_logits"][:, None]
    outputs, rule = _outputs(case), case.settings["detection"]
    encoder = VisionTransformer(
        img_size=_size(outputs), embed_dim=12, depth=1, num_heads=1, num_classes=0, global_pool=""
    )
    detector = heads.Detector(encoder, channels=(16, 16, 16))
    found = detector.decode(outputs, rule["confidence"], rule["nms"])
    dice = recipe.image_dice(mask_logits, masks)[0]
    loss = heads.classification_loss
    ours = {
        "mean_auroc": recipe.classification_score(data["in.logits"], labels) / 100,
        "mean_loss_of_batches_multilabel": mean_of_batches("classification", loss, data["in.logits"], labels),
        "accuracy": recipe.classification_score(data["in.logits_one_of"], one_of) / 100,
        "mean_loss_of_batches_one_of": mean_of_batches("classification", loss, data["in.logits_one_of"], one_of),
        "dice": dice.mean(),
        "dice_sorted": dice.sort().values,
        "mean_loss_of_batches_segmentation": mean_of_batches(
            "segmentation", heads.segmentation_loss, mask_logits, masks
        ),
        "boxes_kept_of_each_picture": [len(one) for one in found],
    }
    precision = recipe.detection_score(found, data["in.targets"], detector.size) / 100
    low, high = map(float, re.findall(r"0\.\d+", next(name for name in wanted if name.startswith("map"))))
    rows = [near(name, wanted[name], value, **room) for name, value in ours.items()]
    name = next(name for name in wanted if name.startswith("map"))
    return [
        *rows,
        near(name, wanted[name], precision, **_room(case, "map")),
        same(f"{name} thresholds", [low, high], [radiology.IOUS[0], radiology.IOUS[-1]]),
    ]


# --- images -----------------------------------------------------------------------------------------------------------


def _grid(image: Tensor, count: int) -> Tensor:
    at = [round(i * (image.shape[-1] - 1) / (count - 1)) for i in range(count)]
    return image[..., at, :][..., at]


def _image(case: Case, start: str, wanted: Mapping[str, Any], image: Tensor) -> list[Row]:
    """Rows of an image's recorded mean, std and grid of pixels."""
    ours = {"mean": image.mean(), "std": image.std(), "grid": _grid(image, len(wanted["grid"][0]))}
    return [near(f"{start}{name}", value, ours[name], **_room(case)) for name, value in wanted.items()]


def _item(image: np.ndarray, make: Callable, **options: Any) -> tuple[Tensor, Tensor]:
    """Item 0 of a set of one PNG, by our reader."""
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(Path(folder) / "a.png")
        data = make(xrays.own(folder), folder, ["a.png"], **options)
        return data[0]


def _preprocess_classification(case: Case) -> list[Row]:
    transform = xrays.test_transform(case.settings["img_size"])
    labels = torch.zeros(1, 1)
    image, _ = _item(case.data["in.image"].numpy(), xrays.Labelled, labels=labels, transform=transform)
    return _image(case, "", case.expected, image)


def _preprocess_detection(case: Case) -> list[Row]:
    image, wanted = case.data["in.image"].numpy(), case.expected
    transform = xrays.squeeze_transform(case.settings["img_size"])
    height, width = image.shape[:2]
    unit = xrays.BOX_UNIT / np.array([width, height, width, height])  # boxes are given in pixels of a square
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(Path(folder) / "a.png")
        data = xrays.Boxed(xrays.own(folder), folder, ["a.png"], [np.array(case.settings["boxes"]) * unit], transform)
        (grey, boxes), (_, again) = data[0], data[0]
    whole = np.array(case.settings["boxes"])
    odd = np.issubdtype(whole.dtype, np.integer) and ((whole[:, :2] + whole[:, 2:]) % 2).any()
    halved = "centres of whole numbers lose half a pixel there; RSNA's list has decimals" if odd else ""
    # a grey image for each colour, blue first as OpenCV has them
    colours = torch.cat([transform(torch.from_numpy(image[..., c] / 255).float()[None])[:1] for c in (2, 1, 0)])
    room, second = _room(case, "labels"), "labels_when_the_same_item_is_read_a_second_time"
    return [
        *_image(case, "image by channel, ", wanted["image"], colours),
        near(
            "image of the colour image",
            wanted["image"]["grid"],
            _grid(grey, 8),
            **_room(case),
            departs="X-rays are grey, and read as one channel",
        ),
        near("labels size", [row[3:] for row in wanted["labels"]], boxes[:, 3:], **room),
        near("labels", wanted["labels"], boxes, **room, departs=halved),
        near(
            "labels within half a pixel", wanted["labels"], boxes, absolute=0.5 / min(height, width) + room["absolute"]
        ),
        near(second, wanted[second], again, **room, departs="stored boxes are divided in place there: wrong labels"),
    ]


def _preprocess_segmentation(case: Case) -> list[Row]:
    wanted, said, size = case.expected, case.settings, case.settings["img_size"]
    boxes = np.array(said["boxes_rsna"], np.float32)
    runs = np.zeros((xrays.RUN_SIDE, xrays.RUN_SIDE), np.float32)
    for top, bottom, left, right in re.findall(r"rows (\d+)\.\.(\d+) of columns (\d+)\.\.(\d+)", said["mask_siim"]):
        runs[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = 1
    masks = {"xrays/rsna": lambda i: xrays._box_mask([boxes], i), "xrays/siim": lambda i: torch.from_numpy(runs)[None]}
    found = {
        name: _item(
            case.data["in.image"].numpy(), xrays.Masked, mask=mask, transform=recipe.mask_transform(name, False, size)
        )
        for name, mask in masks.items()
    }
    image, rsna, siim = found["xrays/rsna"][0], found["xrays/rsna"][1][0], found["xrays/siim"][1][0]
    soft, room = int(((siim > 0) & (siim < 1)).sum()), _room(case, "mask_siim")["absolute"]
    return [
        same("image size", [3, size, size], image.shape),
        *_image(case, "image ", wanted["image"], image),
        near("mask_rsna sum", wanted["mask_rsna"]["sum"], rsna.sum()),
        same("mask_rsna values", wanted["mask_rsna"]["values"], rsna.unique()),
        same("mask_rsna grid", wanted["mask_rsna"]["grid"], _grid(rsna, len(wanted["mask_rsna"]["grid"]))),
        near("mask_siim sum", wanted["mask_siim"]["sum"], siim.sum(), absolute=room * soft),
        near(
            "mask_siim grid", wanted["mask_siim"]["grid"], _grid(siim, len(wanted["mask_siim"]["grid"])), absolute=room
        ),
        same("mask_siim values_between_0_and_1", wanted["mask_siim"]["values_between_0_and_1"], soft),
        *_warps(case),
    ]


def _warps(case: Case) -> list[Row]:
    """How often training warps, and by how much; on SIIM the mask stays."""
    *recorded, share = map(float, re.findall(r"-?\d+\.?\d*", case.settings["training"][0]))
    bar, rows = torch.zeros(1, 224, 224), []
    bar[:, 104:120, 42:182] = 1
    torch.manual_seed(0)
    for name in ("xrays/rsna", "xrays/siim"):
        transform = recipe.mask_transform(name, True)
        warp: Any = transform.warp.transforms[0]
        moved = any(not torch.equal(transform(bar, bar)[1], bar) for _ in range(20))
        ours = [*warp.scale, *warp.degrees, transform.warp.p, warp.translate, warp.shear, moved]
        rows.append(same(f"image training, {name}", [*recorded, share, None, None, name == "xrays/rsna"], ours))
    return rows


def _preprocess_pretraining(case: Case) -> list[Row]:
    wanted, rows = case.expected, []
    steps: dict[str, Any] = {type(step).__name__: step for step in xrays.pretrain_transform().transforms}
    torch.manual_seed(0)
    shown = xrays.pretrain_transform()(torch.rand(1, 500, 460))
    for name, options in wanted["operations"]:
        step: Any = steps.get(name)
        read: dict[str, Any] = {key: getattr(step, key, None) for key in options}
        if name == "RandomResizedCrop":
            read |= {"size": step.size[0], "interpolation": step.interpolation.value, "ratio": np.round(step.ratio, 6)}
        elif name == "Normalize":
            read = {key: value[0] for key, value in read.items()}
        elif name == "Grayscale":
            read = {"channels": shown.shape[0] if torch.equal(shown[0], shown[2]) else 0}
        elif name == "ToTensor":
            read = {} if shown.dtype == torch.float32 else {"dtype": shown.dtype}
        rows.append(same(f"operations {name}", options, read))
    # the model itself is compared with the authors' in tests/parity: here, which image it is given
    model, trace, ids = ecamp.build("pocket").eval(), {}, torch.ones(1, 20).long()
    pair = Batch(torch.randn(1, 3, 64, 64), ids, ids, ids, ids.float(), torch.rand(1, 64), torch.ones(1, 2).long())
    model(pair, trace)
    small = F.interpolate(pair.images, scale_factor=0.5, mode="bicubic", align_corners=False)
    agrees = torch.allclose(trace["low"], small, atol=1e-5) and trace["super_resolved"].shape == pair.images.shape
    seen = "bicubic to half the side, the target is whole"
    rows.append(_shown("then_in_the_model", wanted["then_in_the_model"], seen, agrees))
    said = wanted["text"]["added_statement"]
    share, draws = float(re.findall(r"probability (0\.\d+)", said)[0]), np.linspace(0, 1, 50, endpoint=False)
    places = {text.splice("a. b. c", " X.", iter([share - 0.01, draw]).__next__).index("X") for draw in draws}
    plain = text.splice("a. b. c", " X.", iter([share]).__next__)
    agrees = len(places) == 4 and plain == "a. b. c"
    rows.append(_shown("text added_statement", said, f"{share}, {len(places)} positions of 3 pieces", agrees))
    pairs = text.Pairs(torch.zeros(1, 3, 8, 8), ["a"], text.Vocabulary.from_words(["a"]))
    return [*rows, same("text length", wanted["text"]["length"], len(pairs[0].ids))]


# --- schedules and selection ------------------------------------------------------------------------------------------


def _schedule_downstream(case: Case) -> list[Row]:
    rows = []
    for title, scripts in case.expected.items():
        for one in scripts:
            task, name = TASKS[title], _dataset(one["task"])
            numbers: dict[str, Any] = recipe.downstream_recipe(task, name, one["share"])
            what = f"{title} {one['task']} {one['share']} %"
            group = recipe.downstream_optimizer(task, numbers["lr"])(nn.Linear(1, 1)).param_groups[0]
            ours = numbers | {"num_steps": numbers["steps"], "train_batch_size": numbers["batch"]}
            ours |= {"weight_decay": group["weight_decay"], "num_classes": str(len(CLASSES[name]))}
            ours |= {"start_eval": str(recipe.FIRST[one["share"]])} if "start_eval" in one else {}
            rows += [same(f"{what} {key}", one[key], value) for key, value in ours.items() if key in one]
            steps = [int(step) for step in one["lr_of_step"]]
            found = recipe.downstream_learning_rates(numbers, max(steps) + 1)[steps]
            rows.append(near(f"{what} lr_of_step", list(one["lr_of_step"].values()), found, **_room(case)))
    return rows


class _Toy(nn.Module):
    """One weight; records how many images each forward pass has, and gives outputs of the right shape."""

    def __init__(self, task: str):
        super().__init__()
        self.weight, self.task = nn.Parameter(torch.ones(())), task
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        self.sizes.append(len(images))
        if self.task == "detect":
            return [self.weight.expand(len(images), 18, side, side) for side in (1, 2, 4)]
        return self.weight.expand(len(images), *((1, 8, 8) if self.task == "segment" else (1,)))


def _toy_data(task: str, count: int) -> TensorDataset:
    truth = {"detect": (1, 5), "segment": (1, 8, 8)}.get(task, (1,))
    return TensorDataset(torch.zeros(count, 1, 1, 32), torch.zeros(count, *truth))


class _Pretrained(nn.Module):
    """A model of pairs that counts them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.sizes: list[int] = []

    def forward(self, batch: Batch) -> Losses:
        self.sizes.append(len(batch.images))
        return Losses(*(self.weight * one for one in (3.0, 1.0, 1.0, 1.0)))


def _schedule_last_batch(case: Case) -> list[Row]:
    rows, tasks = [], {"classification": "fine-tune", "segmentation": "segment", "detection": "detect"}
    for one in case.expected["fine_tuning"]:
        task = tasks[one["task"]]
        p, model = _given(task), _Toy(task)
        # steps of 1: the training ends with its first epoch
        numbers = {"lr": 0.0, "warmup_steps": 0, "steps": 1, "batch": one["batch"]}
        recipe.train(p, model, _toy_data(task, one["pictures"]), recipe.selection(p, lambda _: 1.0), numbers)
        what = f"fine_tuning {one['task']}, {one['pictures']} of {one['batch']}"
        seen = [one["steps_of_an_epoch"], one["pictures_in_the_last_step"]]
        rows.append(same(what, seen, [len(model.sizes), model.sizes[-1]]))
    model, few = _Pretrained(), {"gpus": 1, "batch_per_gpu": 2, "accumulation": 1, "stop_epoch": 1}
    recipe.pretrain(_given("pre-train"), model, TensorDataset(*torch.zeros(7, 7, 1)), settings=few)
    return [
        *rows,
        _shown(
            "pre_training",
            case.expected["pre_training"],
            f"steps of {model.sizes} of 7 pairs",
            model.sizes == [2, 2, 2],
        ),
    ]


def _pretraining_settings(facts: Mapping[str, Any]) -> dict[str, float]:
    names = {"batch_per_gpu": "batch_per_gpu", "gpus": "gpus", "accumulation": "accumulate", "stop_epoch": "epochs"}
    names |= {"lr": "lr", "warmup_epochs": "warmup_epochs", "cosine_end_epoch": "cosine_ends_at_epoch"}
    return {ours: facts[theirs] for ours, theirs in names.items() if theirs in facts}


def _schedule_pretraining(case: Case) -> list[Row]:
    r = recipe.recipe() | _pretraining_settings(case.settings)
    images, wanted = case.settings["pictures"], case.expected
    cut, learning_rates = recipe.pretraining_epoch(images, r), recipe.pretraining_learning_rates(images, r)
    used = int(r["accumulation"]) * cut.steps
    ours = {
        "pictures_per_gpu": -(-images // int(r["gpus"])),
        "iterations_of_each_epoch": cut.iterations,
        "steps_of_each_epoch": cut.steps,
        "iterations_left_over_and_dropped": cut.iterations - used,
        "pictures_of_a_step": cut.batch,
        "last_epoch": len(learning_rates) // cut.steps - 1,
    }
    rates = wanted["rates"]
    found = [learning_rates[one["epoch"] * cut.steps + one["step_in_epoch"]] for one in rates]
    return [
        *(same(name, wanted[name], value) for name, value in ours.items()),
        near("rates", [one["lr"] for one in rates], found, **_room(case)),
    ]


class _RanOut(Exception):
    """A made-up sequence of scores has no further one."""


def _selected(given: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of a made-up sequence of scores, seen in a training of one weight that each step moves."""
    task = {"classification": "fine-tune", "segmentation": "segment", "detection": "detect"}[given["task"]]
    dataset = SETS[task] if given.get("is_multilabel", True) else "xrays/covidx"
    p, model, values = _given(task, dataset=dataset, dry_run=False), _Toy(task), iter(map(float, given["values"]))
    kept: list[float] = []
    looks: list[float] = []

    def score(toy: nn.Module) -> float:
        kept.extend(map(float, best.best.values()))
        looks.append(float(model.weight.detach()))
        for value in values:
            return value
        raise _RanOut

    best = recipe.selection(p, score, given.get("start_eval"))
    numbers, ended = {"lr": 1e-3, "warmup_steps": 0, "steps": given["num_steps"], "batch": 1}, True
    try:
        recipe.train(p, model, _toy_data(task, given["steps_of_an_epoch"]), best, numbers)
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
    for title, given in case.settings["sequences"].items():
        ours = _selected(given)
        rows += [same(f"{title} {key}", value, ours[key]) for key, value in case.expected[title].items()]
    return rows


# --- trajectories -----------------------------------------------------------------------------------------------------


def _filled(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state of `fill` for a model, by the authors' names; BatchNorm's counters are left out."""
    state = model.to_official() if hasattr(model, "to_official") else model.state_dict()
    shapes = {name: list(t.shape) for name, t in state.items() if t.is_floating_point()}
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fill.state_dict(shapes, seed).items()
    }


Run = tuple[list[Any], list[float], dict[str, Tensor]]
"""Losses and learning rate of each step, and the state at the end by the authors' names."""


def _trajectory(case: Case, what: str, losses: list[Any], run: Callable[[int], Run]) -> list[Row]:
    """Rows of a recorded training; `run(n)` trains with images changed by n units in the last place (ULP).

    Where a quantity does not agree within the tolerance of the case, the training is run with images changed by one
    unit up and down: the effect of that rounding is added to the tolerance. (A BatchNorm over one image, and AdamW's
    first steps on gradients that are zero but for rounding, make some sums of weights depend on it.)
    """
    wanted = case.expected["parameters_at_the_end"]

    def quantities(n: int) -> tuple[dict[str, Any], list[float]]:
        found, learning_rates, state = run(n)
        values: dict[str, Any] = {f"{what} {i}": one for i, one in enumerate(found)}
        for name in wanted:
            value = state[name].detach().double()
            values[f"parameters_at_the_end {name} sum"] = float(value.sum())
            values[f"parameters_at_the_end {name} sum_of_squares"] = float((value**2).sum())
        return values, learning_rates

    ours, learning_rates = quantities(0)
    others: list[dict[str, Any]] = []
    theirs = {f"{what} {i}": one for i, one in enumerate(losses)}
    theirs |= {
        f"parameters_at_the_end {name} {key}": value for name, facts in wanted.items() for key, value in facts.items()
    }

    def compare() -> list[Row]:
        rows = []
        for name, value in theirs.items():
            room = {"absolute": 0.0} | _room(case, "loss" if name.startswith(what) else name.split()[-1])
            moved = [float(np.abs(np.subtract(one[name], ours[name])).max()) for one in others]
            room["absolute"] += max(moved, default=0.0)
            rows.append(near(name, value, ours[name], **room))
        return rows

    rows = compare()
    if not all(row.passes for row in rows):
        others = [quantities(n)[0] for n in (1, -1)]
        rows = compare()
    # a learning rate of 0 has no relative difference
    rate = near(
        "lr_of_each_step", case.expected["lr_of_each_step"], learning_rates, **{"absolute": 1e-9} | _room(case, "lr")
    )
    return [rate, same(what, len(losses), sum(name.startswith(what) for name in ours)), *rows]


def _images(name: str, shape: tuple[int, ...], seed: int, n: int) -> Tensor:
    """Values of `fill`, changed by n units in the last place (ULP)."""
    values = fill.values(name, shape, seed)
    return torch.from_numpy(np.nextafter(values, np.float32(n * np.inf)) if n else values)


def _template(facts: Mapping[str, Any]) -> VisionTransformer:
    """An encoder with the sizes of a case, under either spelling of its settings."""
    width = facts.get("hidden_size", facts.get("embed_dim"))
    return VisionTransformer(
        img_size=facts["img_size"],
        patch_size=facts["patch_size"],
        embed_dim=width,
        depth=facts.get("num_hidden_layers", facts.get("depth")),
        num_heads=facts.get("num_attention_heads", facts.get("num_heads")),
        mlp_ratio=facts.get("mlp_ratio", 4),
        num_classes=0,
        global_pool="",
    )


def _downstream(task: str) -> Callable[[Case], list[Row]]:
    """The kind of cases that train a small model of a downstream task."""

    def model_of(facts: Mapping[str, Any], seed: int) -> Any:
        base, attention = _template(facts), facts.get("num_attention_heads", facts.get("num_heads"))
        if task == "fine-tune":
            start = heads.like(base, num_classes=facts["num_classes"], global_pool="avg")
            return heads.classifier_from_official(_filled(start, seed), attention)
        if task == "segment":
            segmenter = heads.Segmenter(base, channels=facts["decode_features"])
            return heads.Segmenter.from_official(_filled(segmenter, seed), attention)
        detector = heads.Detector(base, facts["classes"], facts["expansion"])
        return heads.Detector.from_official(_filled(detector, seed), attention)

    def train(case: Case, n: int) -> Run:
        given = case.settings
        truth = case.data.get("in.labels")
        if truth is None:
            truth = torch.zeros(len(given["boxes"]), 1, given["model"]["img_size"], given["model"]["img_size"])
            for i, (top, left, bottom, right) in enumerate(given["boxes"]):
                truth[i, :, top:bottom, left:right] = 1
        shape = tuple(map(int, re.findall(r"\((\d+(?:, \d+)*)\)", given["images"])[0].split(", ")))
        images, batches = _images("input:images", shape, given["seed"], n), given["batches"]
        epochs = -(-given["num_steps"] // len(batches))
        items = [(images[i], truth[i]) for _ in range(epochs) for batch in batches for i in batch]
        numbers = {"lr": given["optimiser"]["lr"], "warmup_steps": given["warmup_steps"], "steps": given["num_steps"]}
        numbers |= {"batch": len(batches[0])}
        p, rising, model = _given(task), itertools.count(1), model_of(given["model"], given["seed"])
        best = recipe.selection(p, lambda _: float(next(rising)))  # the last weights are the best
        history = recipe.train(p, model, InOrder(items, len(items) // epochs), best, numbers)
        state = model.to_official() if hasattr(model, "to_official") else model.state_dict()
        return [row["loss"] for row in history], [row["lr"] for row in history], state

    def run(case: Case) -> list[Row]:
        what = "loss_of_each_step"
        return _trajectory(case, what, case.expected[what], lambda n: train(case, n))

    return run


def _trajectory_pretraining(case: Case) -> list[Row]:
    given, facts, seed = case.settings, case.settings["model"], case.settings["seed"]
    bert, optimiser, pairs = facts["bert"], case.settings["optimiser"], case.data["in.ids"].shape[1]
    options = {
        "heads": facts["heads"],
        "decoder_heads": facts["decoder_heads"],
        "text_heads": bert["num_attention_heads"],
    }
    start = ECAMP(
        image=facts["img_size"],
        patch=facts["patch"],
        width=facts["embed_dim"],
        depth=facts["depth"],
        decoder_width=facts["decoder_dim"],
        decoder_depth=facts["decoder_depth"],
        words=bert["vocab_size"],
        length=bert["max_position_embeddings"],
        text_width=bert["hidden_size"],
        text_depth=bert["num_hidden_layers"],
        text_hidden=bert["intermediate_size"],
        **options,
    )
    weights = _filled(start, seed) | {n: t for n, t in start.to_official().items() if n.endswith("pos_embed")}
    per_epoch, epochs, accumulate = given["iterations_of_each_epoch"], given["epochs"], given["accumulate"]
    settings = _pretraining_settings(given["schedule"] | given) | {"gpus": 1, "batch_per_gpu": pairs}
    settings |= {"lr": optimiser["lr"], "beta1": optimiser["betas"][0], "beta2": optimiser["betas"][1]}
    settings |= {"weight_decay": float(optimiser["weight_decay"].split(";")[0])}
    cut = recipe.pretraining_epoch(per_epoch * pairs, recipe.recipe() | settings)
    done = [e * per_epoch + (s + 1) * accumulate for e in range(epochs) for s in range(cut.steps)]
    used = [i for end in done for i in range(end - accumulate, end)]
    names = {"masked image": "mim", "super-resolution": "sr", "text": "mlm"}
    stored = {name.removeprefix("in."): value for name, value in case.data.items()}
    corners = torch.stack([stored["column"], stored["row"]], 2).long()

    def items(n: int) -> Iterator[tuple[Tensor, ...]]:
        for i in used:
            images = _images(f"input:image{i}", (pairs, 3, facts["high_res"], facts["high_res"]), seed, n)
            noise = torch.from_numpy(fill.values(f"input:noise{i}", (pairs, start.patches), seed))
            texts = [stored[name][i].long() for name in ("ids", "labels", "attention_mask")]
            yield from zip(images, *texts, stored["weights"][i], noise, corners[i], strict=True)

    def train(n: int) -> Run:
        model, data = (
            ECAMP.from_official(weights, **options, dropout=bert["dropout"]),
            InOrder(items(n), per_epoch * pairs),
        )
        history = recipe.pretrain(_given("pre-train"), model, data, settings=settings, micro_batch=pairs)
        losses = [[row[names[name]] for name in case.expected["losses_are"]] for row in history]
        return losses, [row["lr"] for row in history], model.to_official()

    # of each step the mean over its iterations; those that are left over at the end of an epoch are not computed here
    each = np.array(case.expected["losses_of_each_iteration"])
    wanted = each[used].reshape(-1, accumulate, each.shape[1]).mean(1).tolist()
    return [
        same("losses_are", case.expected["losses_are"], list(names)),
        same("iterations_done_before_each_step", case.expected["iterations_done_before_each_step"], done),
        *_trajectory(case, "losses_of_each_iteration", wanted, train),
    ]


KINDS: dict[str, Callable[[Case], list[Row]]] = {
    "groups_downstream": _groups_downstream,
    "groups_pretraining": _groups_pretraining,
    "labels_orders": _labels_orders,
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
    "trajectory_detection": _downstream("detect"),
    "trajectory_finetune": _downstream("fine-tune"),
    "trajectory_pretraining": _trajectory_pretraining,
    "trajectory_segmentation": _downstream("segment"),
}
