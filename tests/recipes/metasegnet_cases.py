"""MetaSegNet's recipe against cases recorded from WangLibo1995/GeoSeg at 9453fe4, its author's image-only code."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import tv_tensors

from companion.data import landcover
from companion.data.landcover import CLASSES, LOVEDA, POTSDAM
from companion.data.rasters import quiet
from companion.errors import CorruptFile
from companion.evaluation.metrics import landcover as metrics
from companion.models.metasegnet import augmentation as transforms
from companion.models.metasegnet import maps, recipe
from companion.models.metasegnet.model import SIZES, MetaSegNet, dice_loss, joint_loss, soft_cross_entropy, swin
from companion.models.metasegnet.model import loss as model_loss
from companion.training.callbacks import Callback
from companion.training.fit import Loop, fit
from companion.training.hardware import CPU
from companion.training.schedules import sgd
from tests.parity import fill
from tests.recipes.runner import Case, InOrder, Row, close, equal, lines, near, same


def groups(case: Case) -> list[Row]:
    """Parameter groups of the full-size twin, which is built on the meta device."""
    rows, e = [], case.expected
    with torch.device("meta"):
        model = MetaSegNet(swin(**SIZES["paper"]["swin"]), case.settings["classes"])
    official = model.official_names()
    names = {id(t): official[name] for name, t in model.trained().items()}
    for dataset, expected in e["groups"].items():
        r = recipe.published(case.settings["datasets"][dataset])
        made = recipe.param_groups(model, r)
        rows.append(same(f"groups {dataset}", len(expected), len(made)))
        for one in expected:
            what = f"groups {dataset} lr {one['lr']} decay {one['weight_decay']}"
            (group,) = (g for g in made if (g["lr"], g["weight_decay"]) == (one["lr"], one["weight_decay"]))
            rows.append(_named(what, one, [names[id(t)] for t in group["params"]]))
            rows.append(same(f"{what} numbers", one["numbers"], sum(t.numel() for t in group["params"])))
            rows.append(near(f"{what} multiplier", one["lr_multiplier"], group["lr"] / r.lr, relative=1e-6))
    vectors = [names[id(t)] for g in made if g["weight_decay"] for t in g["params"] if t.ndim == 1]
    rows.append(_named("vectors_that_decay", e["vectors_that_decay"], vectors))
    encoder = {names[id(t)] for g in made if g["lr"] == r.encoder_lr for t in g["params"]}
    there = all(f"backbone.norm{k}.{kind}" in encoder for k in range(4) for kind in ("weight", "bias"))
    return [
        *rows,
        Row("backbone_norms", e["backbone_norms"], "in the encoder's group" if there else "not there", there),
    ]


def _named(what: str, recorded: Mapping, names: list[str]) -> Row:
    return lines(what, {"count": recorded["tensors"], "sha256_of_lines": recorded["names_sha256"]}, sorted(names))


class _Source:
    """What `colours` and `loveda` read of a label file: the pixels of an array."""

    path = Path("labels")

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def raw(self, bands: tuple[int, ...], top: int = 0, left: int = 0, *_: int) -> np.ndarray:
        return self.pixels[[band - 1 for band in bands]]


def _label(decode: Callable, *values: int) -> int:
    """The label of a pixel with these values in a label file, or -1 where the file is refused."""
    source = _Source(np.array(values, np.uint8)[:, None, None])
    try:
        return int(decode(source)[0, 0])
    except CorruptFile:
        return -1


def labels(case: Case) -> list[Row]:
    """Classes, colours and label maps."""
    rows: list[Row] = []
    colours, names = case.settings["colours"], case.settings["names"]
    for dataset, e in case.expected.items():
        own = CLASSES[case.settings["datasets"][dataset]]
        rows.append(same(f"{dataset} classes", [names[name] for name in e["classes"]], list(own)))
        for kind in ("palette", "colours_written_by_the_test_as_rgb"):
            for name, theirs, ours in zip(own, e[kind], own.values(), strict=True):
                odd = "the set's own colour: GeoSeg's tool reads its own colour of cars as another class"
                rows.append(same(f"{dataset} {kind} {name}", theirs, ours, odd if name == "car" else ""))
        rows.append(same(f"{dataset} ignored", e["ignored"], len(own)))
        for stored, label in e.get("stored_label_to_class", {}).items():
            rows.append(same(f"{dataset} stored {stored}", label, _label(landcover.loveda, int(stored))))
        for colour, label in e.get("label_of_a_colour_in_the_published_masks", {}).items():
            shade = "a shade counts as its colour, not as the first class" if colour == "orange" else ""
            rows.append(same(f"{dataset} {colour}", label, _label(landcover.colours, *colours[colour]), shade))
        if "unknown_colour" in e:
            refused = "a colour that is no class is an error, not the first class"
            found = _label(landcover.colours, *colours["magenta"])
            rows.append(same(f"{dataset} unknown colour", e["unknown_colour"], found, refused))
    return rows


def loss(case: Case) -> list[Row]:
    """The joint loss, its parts and its gradient."""
    ignore, room = case.settings["ignored"], case.facts["tolerance"]
    logits, truth = case.data["in.logits"].clone().requires_grad_(), case.data["in.labels"]
    joint = joint_loss(logits, truth, ignore)
    joint.backward()
    auxiliary = soft_cross_entropy(case.data["in.auxiliary"], truth, ignore)
    found = {
        "cross_entropy": soft_cross_entropy(logits, truth, ignore, case.settings["smooth"]),
        "dice": dice_loss(logits, truth, ignore),
        "joint": joint,
        "with_auxiliary_head": joint + case.settings["auxiliary"] * auxiliary,
        "all_ignored": joint_loss(logits, torch.full_like(truth, ignore), ignore),
    }
    rows = [near(name, case.expected[name], value.detach(), **room) for name, value in found.items()]
    return [*rows, near("out.gradient", case.data["out.gradient"], logits.grad, **room)]


def _undefined(values: list) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def metric(case: Case) -> list[Row]:
    """Scores of a test; means with and without the last class."""
    e, classes, room = case.expected, case.settings["classes"], case.facts["tolerance"]
    truth, predicted = case.data["in.labels"], case.data["in.predictions"]
    whole, part = (recipe.Part([], [], [""] * classes, left) for left in ((), (classes - 1,)))
    matrix = metrics.confusion(truth, predicted, classes)
    every, some = recipe.scores(whole, matrix), recipe.scores(part, matrix)
    means = {"mean_f1_loveda": every.mf1, "mean_iou_loveda": every.miou, "oa": every.oa}
    means |= {"mean_f1_potsdam": some.mf1, "mean_iou_potsdam": some.miou}
    rows = [near(name, e[name], value / 100, **room) for name, value in means.items()]
    rows += [near(name, _undefined(e[name]), getattr(every, name) / 100, **room) for name in ("iou", "f1")]
    rows.append(same("confusion", e["confusion"], matrix))
    for key, absent in case.settings["absent"].items():
        moved = truth.where(truth != absent, absent - 1).long()
        found = recipe.scores(whole, metrics.confusion(moved, predicted, classes))
        for name, value in (("mean_f1", found.mf1), ("mean_iou", found.miou), ("oa", found.oa)):
            rows.append(near(f"{key} {name}", e[key][name], value / 100, **room))
        for name in ("iou", "f1"):
            rows.append(near(f"{key} {name}", _undefined(e[key][name]), getattr(found, name) / 100, **room))
    return rows


def test(case: Case) -> list[Row]:
    """What the network gets of a tested image."""
    e, room = case.expected, case.facts["tolerance"]
    image = case.data["in.image"].permute(2, 0, 1).contiguous()
    truth = torch.arange(image[0].numel()).reshape(image[0].shape) % 7
    found, kept = transforms.test_transform()(tv_tensors.Image(image), tv_tensors.Mask(truth))
    last = len(e["grid"][0]) - 1
    rows, columns = (torch.tensor([round(i * (n - 1) / last) for i in range(last + 1)]) for n in image.shape[1:])
    return [
        *close(
            e, {"mean": found.mean(), "std": found.std(correction=0), "grid": found[:, rows][:, :, columns]}, **room
        ),
        same("labels_unchanged", e["labels_unchanged"], found.shape[1:] == truth.shape and torch.equal(kept, truth)),
    ]


def _write_potsdam(root: Path, mask: np.ndarray) -> None:
    """All tiles of Potsdam with this mask (3, H, W), in its folders."""
    import rasterio  # an extra

    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": mask.shape[1], "width": mask.shape[2]}
    for split, folder, ending in (("train", "", "label"), ("test", "_noBoundary", "label_noBoundary")):
        for tile in landcover.POTSDAM_TILES[split]:
            for name, pixels in (
                (f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif", np.full_like(mask, 200)),
                (f"5_Labels_all{folder}/top_potsdam_{tile}_{ending}.tif", mask),
            ):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                with quiet(), rasterio.open(root / name, "w", **profile) as file:
                    file.write(pixels)


def tiles(case: Case) -> list[Row]:
    """Windows of a tile of Potsdam and their labels: with the author's padding the same, by default it is ignored."""
    s, rows, size = case.settings, [], case.settings["tile"]
    width, height = s["picture_width_height"]
    mask = np.zeros((3, height, width), np.uint8)
    for area in s["mask"]:
        (top, bottom), (left, right) = area["rows"], area["columns"]
        mask[:, top : bottom + 1, left : right + 1] = np.array(area["colour"])[:, None, None]
    with tempfile.TemporaryDirectory() as root:
        _write_potsdam(Path(root) / "potsdam", mask)
        for what, e in case.expected.items():
            split, flip = s["kinds"][what]
            for padding in landcover.PADDINGS:
                options = {"size": size, "stride": s["stride"], "mirrored": split == "train", "padding": padding}
                data = landcover.load(POTSDAM, root, split, **options)
                windows = data.windows or []
                ours = [i for i, window in enumerate(windows) if window[0] == 0 and window[3] == flip]
                corners = np.array([windows[i][1:3] for i in ours])
                corners -= corners.min(0)
                image, truth = (np.zeros(corners.max(0) + size, np.int64) for _ in range(2))
                for i, (top, left) in zip(ours, corners, strict=True):
                    pixels, found = data.pair(i)
                    image[top : top + size, left : left + size] = pixels[0]
                    truth[top : top + size, left : left + size] = found
                departs = "the padding's label is ignored: impervious is wrong" if padding == "ignored" else ""
                around = np.unique(truth[image == 0])
                rows.append(
                    same(f"{what} labels_of_the_padding, {padding}", e["labels_of_the_padding"], around, departs)
                )
                if departs:
                    continue
                inside = [np.flatnonzero(image.any(axis))[[0, -1]] for axis in (1, 0)]
                found = {"padded_height_width": image.shape, "picture_in_rows": inside[0]}
                found |= {"picture_in_columns": inside[1], "tile_corners_row_column": corners}
                found |= {"pixels_of_each_label": _counts(truth)}
                found |= {f"{k}_tile_labels": _counts(data.pair(ours[i])[1]) for k, i in (("first", 0), ("last", -1))}
                rows += equal(e, found, f"{what} ")
    return rows


def _counts(found: Tensor | np.ndarray) -> dict[str, int]:
    values, counts = np.unique(np.asarray(found), return_counts=True)
    return {str(v): int(n) for v, n in zip(values, counts, strict=True)}


class _Numbered:
    """What `Mosaic` reads of a `LandCover`, without files: item i is red i."""

    def __init__(self, side: int, ignore: int = 6, count: int = 9):
        self.side, self.ignore, self.count = side, ignore, count

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.full((3, self.side, self.side), index, dtype=torch.uint8)
        return image, torch.zeros(self.side, self.side, dtype=torch.int64)


def _operations(mosaic: transforms.Mosaic) -> dict[str, Any]:
    """The settings of the random operations of training; of those with probability 0 none."""
    scale, crop, flip, upside_down, *light, _ = mosaic.transform.transforms  # type: ignore[union-attr]
    # where the ignored label counts as a class of a crop, none is ignored
    ignored = crop.ignore if crop.counted == crop.ignore else 255
    found = {
        "mosaic": mosaic.p,
        "scales": list(scale.scales),
        "crop": crop.size,
        "most": transforms.MOST,
        "ignored": ignored,
    }
    found |= {name: one.p for name, one in (("flip", flip), ("upside_down", upside_down)) if one.p}
    for one in light:
        found |= {"brightness": [one.transforms[0].limit] * 2, "light": one.p}
    return found


def training(case: Case) -> list[Row]:
    """The random operations of training: their settings, and what each does to given numbers."""
    e, s, rows = case.expected, case.settings, []
    for key, recorded in s["operations"].items():
        dataset, own = recorded["dataset"], recorded["own"]
        data = _Numbered(10, len(CLASSES[dataset]))
        r = recipe.published(dataset)
        if not own:  # another network's recipe
            off = {name: recorded.get(name, 0.0) for name in ("flip", "upside_down", "brightness")}
            r = replace(r, crop=recorded["crop"], every=recorded["ignored"] != data.ignore, **off)
        found = _operations(recipe.randomised(data, ["Cfa"] * len(data), r))  # type: ignore[arg-type]
        for name in found if own else recorded.keys() - {"dataset", "own"}:
            rows.append(same(f"{key} {name}", recorded.get(name), found.get(name)))
        rows.append(same(f"{key} operations", sorted(recorded.keys() - {"dataset", "own"} - found.keys()), []))
    rows += _mosaic(e["mosaic"])
    for one in e["crops"]:
        rows += _cropped(one)
    for one in e["scales"]:
        width, height = one["picture_width_height"]
        picture = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        size = transforms.Scale().transform(picture, {"scale": one["scale"]}).shape
        swap = "the sides of an image that is not square are not exchanged" if width != height else ""
        what = f"scales {width} x {height} by {one['scale']}"
        rows.append(same(what, one["scaled_width_height"], [size[2], size[1]], swap))
    for one in s["smart_crop"]:
        for ignored, count in one["tried"]:
            what = f"smart_crop {one['name']}, ignored {ignored}"
            rows.append(same(what, count, _tries(one["labels"], one["shares"], ignored not in one["labels"])))
    for key, levels in s["levels"].items():
        image = tv_tensors.Image(torch.tensor(levels, dtype=torch.uint8).expand(3, 1, -1))
        for one in e[key]:
            found = transforms.BrightnessContrast(0.25).transform(image, one)
            rows.append(same(f"{key} {one['alpha']} {one['beta']}", one["out"], found[0, 0]))
    return rows


def _mosaic(e: Mapping) -> list[Row]:
    """The draws of a mosaic of item 4: its seams, three other items, and a crop of each."""
    data, side, draws = _Numbered(10), 10, list[tuple[int, ...]]()
    mosaic = transforms.Mosaic(data, 1.0, ["Cfa"] * len(data))  # type: ignore[arg-type]

    def drawn(*args: Any, draw: Callable = torch.randint, **kwargs: Any) -> Tensor:
        draws.append((0, *args)[-3:-1])  # the first value and the one after the last
        return draw(*args, **kwargs)

    torch.manual_seed(0)
    with mock.patch.object(torch, "randint", drawn):
        red = mosaic[4][0][0]
    ours = {
        "seam": draws[:2] == [(side // 4, side - side // 4 + 1)] * 2,
        "pictures": draws[2:5] == [(0, len(data))] * 3,
        "order": int(red[0, 0]) == 4,
        "each": len(draws) == 5 + 2 * 4,  # row and column of each crop
    }
    return [Row(f"mosaic {name}", e[name], f"draws {draws}", agrees) for name, agrees in ours.items()]


def _cropped(e: Mapping) -> list[Row]:
    """A crop of a white image: its size, what is padding, and from where to where its corner goes."""
    width, height = e["picture_width_height"]
    size, ignore = e["crop"], 6
    crop, padded = transforms.SmartCrop(size, ignore), list[list[int]]()
    crop.crop.register_forward_pre_hook(lambda _, pair: padded.append([*pair[0].shape[:-3:-1]]))
    image = tv_tensors.Image(torch.full((3, height, width), 255, dtype=torch.uint8))
    torch.manual_seed(0)
    with mock.patch.object(transforms, "TRIES", 1):
        found, truth = crop(image, tv_tensors.Mask(torch.zeros(height, width, dtype=torch.int64)))
    what = f"crops {width} x {height}"
    ours = {
        "padded_width_height": padded[0],
        "crop_corner_from_to": {name: [0, total - size] for name, total in zip("xy", padded[0], strict=True)},
        "crop_size": truth.shape,
        "ignored_at_the_edges": int((truth == ignore).sum()),
        "black": int((found[0] == 0).sum()),
    }
    return equal(e, ours, f"{what} ")


def _tries(labels: list[int], shares: list[float], every: bool) -> int:
    """How many crops are drawn of an image whose every crop has these shares of labels; the last is ignored."""
    size, drawn = 100, []
    crop = transforms.SmartCrop(size, labels[-1], every=every)
    crop.crop.register_forward_hook(lambda *_: drawn.append(1))
    counts = torch.tensor([round(size * size * share) for share in shares])
    truth = torch.tensor(labels).repeat_interleave(counts).reshape(size, size)
    crop(tv_tensors.Image(torch.zeros(3, size, size, dtype=torch.uint8)), tv_tensors.Mask(truth))
    return len(drawn)


def views(case: Case) -> list[Row]:
    """Test-time augmentation: the sizes that the network sees, and the merged probabilities."""
    image, room, rows = case.data["in.image"], case.facts["tolerance"], []
    w, p = case.data["in.w"], case.data["in.p"]
    for what, e in case.expected.items():
        sizes: list[list[int]] = []

        def network(x: Tensor, sizes: list = sizes) -> Tensor:
            height, width = x.shape[-2:]
            sizes.append([height, width])
            row, column = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
            places = p[:, 0, None, None] * row + p[:, 1, None, None] * column
            return torch.einsum("cd,bdhw->bchw", w, x) + places

        found = maps.augmented(network, image, case.settings["kinds"][what])
        rows += [
            same(f"{what} views", e["views"], len(sizes)),
            same(f"{what} sizes", sorted(e["sizes_seen_height_width"]), sorted(sizes)),
            *close(e, {"mean": found.mean(), "sum_of_squares": (found.double() ** 2).sum()}, f"{what} ", **room),
            near(f"out.{what}", case.data[f"out.{what}"], found, **room),
        ]
    return rows


def schedule(case: Case) -> list[Row]:
    """The learning rate of each epoch and the steps of an epoch."""
    s, e, room = case.settings, case.expected, case.facts["tolerance"]
    r = replace(recipe.published(s["dataset"]), epochs=s["epochs"])
    steps = {"drop": math.floor, "train": math.ceil}[recipe.LAST]
    own = steps(s["images"] / s["batch"])
    rows = [same("steps_of_each_epoch", e["steps_of_each_epoch"], own)]
    left = s["images"] - own * s["batch"]
    rows.append(same("images_left_out_of_each_epoch", e["images_left_out_of_each_epoch"], left))
    for name, base in (("backbone", r.encoder_lr), ("rest", r.lr)):
        found = recipe.learning_rates(r, base, own).reshape(s["epochs"], own)
        rows.append(near(f"lr_of_each_epoch {name}", e["lr_of_each_epoch"][name], found[:, 0], **room))
        rows.append(same(f"lr_of_each_epoch {name}, constant", True, bool((found == found[:, :1]).all())))
    rows.append(same("steps_in_all", e["steps_in_all"], found.size))
    for name, other in e.get("other_network_of_the_author", {}).items():
        count = steps(s["images"] / other["batch"])
        rows.append(same(f"other_network_of_the_author {name}", other["steps_of_each_epoch"], count))
    return rows


def _selected(values: list, select: str) -> tuple[int, int]:
    """The epoch whose weights a training ends with where the epochs have these scores, and how many ran."""
    given, states = iter(values), list[float]()

    class Watch(Callback):
        def on_epoch_end(self, loop: Loop) -> None:
            states.append(loop.model.weight.item())

    options = recipe.options(recipe.published(LOVEDA), CPU, score=lambda _: float(next(given)))
    model, callbacks = nn.Linear(1, 1), options["callbacks"][: 2 if select == "best" else 1]
    fit(
        model,
        lambda model, batch: (model(batch[0]) - 100).square().mean(),
        TensorDataset(torch.ones(1, 1)),
        epochs=len(values),
        batch=1,
        optimizer=sgd(0.01),
        callbacks=[Watch(), *callbacks],
        hardware=CPU,
    )
    return states.index(model.weight.item()), len(states)


def selection(case: Case) -> list[Row]:
    """The selected epoch: the author's, and ours by default."""
    e, s, rows = case.expected, case.settings, []
    leak = "the author chooses the epoch on the test images; here the last one is tested, select = 'best' is his"
    for name, found in e["sequences"].items():
        (best, ran), (last, _) = (_selected(s["values_of_each_epoch"][name], select) for select in ("best", "last"))
        for title, want in found.items():
            rows.append(same(f"sequences {name}, {title}", [want["best_epoch"], want["epochs_run"]], [best, ran]))
            if want["epoch_of_last.ckpt"] is not None:
                rows.append(same(f"sequences {name}, {title}, last", want["epoch_of_last.ckpt"], last))
    for config, want in s["tested"].items():
        dataset, score = want["dataset"], recipe.SCORES.get(want["dataset"], "miou")
        # UNetFormer has another recipe, that of the last epoch
        asked = "last" if want["network"] == "unetformer" else "recipe"
        for select in (asked, "best") if dataset == POTSDAM else (asked,):
            kind = recipe.chosen(SimpleNamespace(dataset=dataset, select=select))
            ours = [kind, score if kind == "best" else None]
            departs = leak if dataset == POTSDAM and select == "recipe" else ""
            what = f"tested_checkpoint {config}, select = {select}"
            rows.append(same(what, [want["epoch"], want["score"]], ours, departs))
    for name, where in s["validated_on"].items():
        rows.append(same(f"validated_on {name}", where["split"], recipe.TEST_SPLIT[where["dataset"]]))
    falling = [1.0 / (i + 1) for i in range(max(map(len, s["values_of_each_epoch"].values())))]
    rows.append(same("stops_early", e["stops_early"], _selected(falling, "best")[1] < len(falling)))
    return rows


def _items(s: Mapping) -> Iterator[tuple[Tensor, Tensor]]:
    """The recorded items, image by image."""
    labels, times = s["labels"], s["labels"]["repeated"]
    for i in range(s["epochs"] * s["steps_of_each_epoch"]):
        images = torch.from_numpy(fill.values(f"input:image{i}", tuple(s["images"]), s["seed"]))
        truth = np.random.default_rng([s["seed"], i]).integers(0, labels["below"], labels["shape"])
        yield from zip(images, torch.from_numpy(truth.repeat(times, 1).repeat(times, 2)), strict=True)


def trajectory(case: Case) -> list[Row]:
    """A training by the recipe's loss and options, from filled weights, batches in the recorded order."""
    s, e, room = case.settings, case.expected, case.settings["tolerance"]
    m, o, lr = s["model"], s["optimiser"], s["scheduler"]
    sizes = {"embed_dim": m["embed_dim"], "depths": tuple(m["depths"]), "num_heads": tuple(m["num_heads"])}
    encoder = swin(**sizes, window_size=s["windows"]["encoder"])
    decoder = {"width": m["decode_channels"], "heads": s["heads"], "window": s["windows"]["decoder"]}
    blank = MetaSegNet(encoder, m["num_classes"], **decoder)
    names = {name: list(t.shape) for name, t in blank.to_official().items()}
    state = {name: torch.from_numpy(np.array(t)) for name, t in fill.state_dict(names, s["seed"]).items()}
    model = MetaSegNet.from_official(state)
    for part in model.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = m["dropout"]
        if isinstance(part, DropPath):
            part.drop_prob = m["drop_path"]
    settings = {"epochs": s["epochs"], "batch": s["images"][0], "weight_decay": o["weight_decay"]}
    settings |= {"lr": o["lr"], "encoder_lr": o["lr of backbone.*"]}
    settings |= {"restart": lr.get("T_0", 0), "floor": lr.get("eta_min", 0.0)}
    r, steps = replace(recipe.published(LOVEDA), **settings), s["steps_of_each_epoch"]
    history = fit(model, model_loss, InOrder(_items(s), r.batch * steps), **recipe.options(r, CPU))
    rows = [near("loss_of_each_step", e["loss_of_each_step"], [row["loss"] for row in history], **room["loss"])]
    ours = {"backbone": [row["lr"] for row in history], "decoder": recipe.learning_rates(r, r.lr, steps)}
    for name, want in e["lr_of_each_step"].items():
        rows.append(near(f"lr_of_each_step {name}", want, ours[name], **room["lr"]))
    end = model.to_official()
    for name, want in e["parameters_at_the_end"].items():
        value, what = end[name].double(), f"parameters_at_the_end {name}"
        rows.append(near(f"{what} sum", want["sum"], value.sum(), **room["sum"]))
        rows.append(near(f"{what} squares", want["sum_of_squares"], (value**2).sum(), **room["sum_of_squares"]))
    return rows


KINDS = {
    "groups": groups,
    "labels": labels,
    "loss": loss,
    "metric": metric,
    "preprocess_test": test,
    "preprocess_tiles": tiles,
    "preprocess_training": training,
    "preprocess_views": views,
    "schedule": schedule,
    "selection": selection,
    "trajectory": trajectory,
}
