"""MetaSegNet's recipe against cases recorded from WangLibo1995/GeoSeg at 9453fe4, its author's image-only code."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import tv_tensors

from companion.data import landcover
from companion.data import landcover_transforms as transforms
from companion.data.landcover_sets import CLASSES, LOVEDA, POTSDAM
from companion.errors import CorruptFile
from companion.evaluation import fill
from companion.evaluation.metrics import landcover as metrics
from tests.recipes.runner import Case, InOrder, Row, near, same
from companion.geotiff import quiet
from companion.models.metasegnet import model as metasegnet
from companion.models.metasegnet import recipe
from companion.models.metasegnet.model import MetaSegNet, swin
from companion.training.callbacks import Callback
from companion.training.fit import CPU, Loop, fit
from companion.training.schedules import sgd

SETS = {"potsdam": POTSDAM, "loveda": LOVEDA}
COLOURS = {"white": (255, 255, 255), "blue": (0, 0, 255), "cyan": (0, 255, 255), "green": (0, 255, 0)}
COLOURS |= {"yellow": (255, 255, 0), "red": (255, 0, 0), "black": (0, 0, 0), "orange": (255, 165, 0)}
COLOURS |= {"grey": (128, 128, 128), "magenta": (255, 0, 255)}
NAMES = {"ImSurf": "impervious", "LowVeg": "low vegetation", "agricultural": "agriculture"}


def _p(dataset: str, **options: Any) -> SimpleNamespace:
    """The parameters of the `paper` profile that a training reads."""
    given = {"dataset": dataset, "method": "unimodal", "seed": 0, "profile": "paper", "dry_run": True}
    given |= {"accelerator": "cpu", "devices": 1, "precision": "32-true", "select": "recipe", "padding": "ignored"}
    return SimpleNamespace(**given | options)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def groups(case: Case) -> list[Row]:
    """Parameter groups of the full-size twin, which is built on the meta device."""
    rows, e = [], case.expected
    classes = int(re.findall(r"(\d+) classes", case.settings["model"])[0])
    with torch.device("meta"):
        model = MetaSegNet(swin(**metasegnet.SIZES["paper"]["swin"]), classes)
    official = model.official_names()
    names = {id(t): official[name] for name, t in model.trained().items()}
    for dataset, expected in e["groups"].items():
        r = recipe.recipe(SETS[dataset])
        made = recipe.param_groups(model, r)
        rows.append(same(f"groups {dataset}", len(expected), len(made)))
        for one in expected:
            what = f"groups {dataset} lr {one['lr']} decay {one['weight_decay']}"
            (group,) = (g for g in made if (g["lr"], g["weight_decay"]) == (one["lr"], one["weight_decay"]))
            tensors, numbers = sorted(names[id(t)] for t in group["params"]), sum(t.numel() for t in group["params"])
            ours = [len(tensors), numbers, _digest(tensors)]
            rows.append(same(what, [one["tensors"], one["numbers"], one["names_sha256"]], ours))
            rows.append(same(f"{what} some", [], sorted(set(one["some"]) - set(tensors))))
            rows.append(near(f"{what} multiplier", one["lr_multiplier"], group["lr"] / r.lr, relative=1e-6))
    vectors = sorted(names[id(t)] for g in made if g["weight_decay"] for t in g["params"] if t.ndim == 1)
    want = e["vectors_that_decay"]
    rows.append(same("vectors_that_decay", [want["tensors"], want["names_sha256"]], [len(vectors), _digest(vectors)]))
    encoder = {names[id(t)] for g in made if g["lr"] == r.encoder_lr for t in g["params"]}
    there = all(f"backbone.norm{k}.{kind}" in encoder for k in range(4) for kind in ("weight", "bias"))
    rows.append(Row("backbone_norms", e["backbone_norms"], "in the encoder's group" if there else "not there", there))
    return rows


class _Source:
    """What `colours` reads of a label file: the pixels of an array (3, H, W)."""

    path = Path("colours")

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def raw(self, bands: tuple[int, ...], top: int = 0, left: int = 0, *_: int) -> np.ndarray:
        return self.pixels[[band - 1 for band in bands]]


def _label(colour: str) -> int:
    """The label of a colour of Potsdam's masks, or -1 where the file is refused."""
    pixels = np.array(COLOURS[colour], np.uint8)[:, None, None]
    try:
        return int(landcover.colours(_Source(pixels), pixels)[0, 0])  # type: ignore[arg-type]
    except CorruptFile:
        return -1


def labels(case: Case) -> list[Row]:
    """Classes, colours and label maps."""
    rows: list[Row] = []
    for dataset, e in case.expected.items():
        own = CLASSES[SETS[dataset]]
        rows.append(same(f"{dataset} classes", [NAMES.get(n, n.lower()) for n in e["classes"]], list(own)))
        for kind in ("palette", "colours_written_by_the_test_as_rgb"):
            for name, theirs, ours in zip(own, e[kind], own.values(), strict=True):
                odd = "the set's own colour: GeoSeg's tool reads its own colour of cars as another class"
                rows.append(same(f"{dataset} {kind} {name}", theirs, ours, odd if name == "car" else ""))
        rows.append(same(f"{dataset} ignored", e["ignored"], len(own)))
        for stored, label in e.get("stored_label_to_class", {}).items():
            source = _Source(np.full((1, 1, 1), int(stored)))
            found = landcover.loveda(source, source.pixels)  # type: ignore[arg-type]
            rows.append(same(f"{dataset} stored {stored}", label, int(found[0, 0])))
        for colour, label in e.get("label_of_a_colour_in_the_published_masks", {}).items():
            shade = "a shade counts as its colour, not as the first class" if colour == "orange" else ""
            rows.append(same(f"{dataset} {colour}", label, _label(colour), shade))
        if "unknown_colour" in e:
            refused = "a colour that is no class is an error, not the first class"
            rows.append(same(f"{dataset} unknown colour", e["unknown_colour"], _label("magenta"), refused))
    return rows


def loss(case: Case) -> list[Row]:
    """The joint loss, its parts and its gradient."""
    ignore, smooth = case.settings["ignored"], case.settings["smooth"]
    logits, truth = case.data["in.logits"].clone().requires_grad_(), case.data["in.labels"]
    joint = metasegnet.joint_loss(logits, truth, ignore)
    joint.backward()
    found = {
        "cross_entropy": metasegnet.soft_cross_entropy(logits, truth, ignore, smooth),
        "dice": metasegnet.dice_loss(logits, truth, ignore),
        "joint": joint,
        "with_auxiliary_head": metasegnet.joint_loss(logits, truth, ignore, case.data["in.auxiliary"]),
        "all_ignored": metasegnet.joint_loss(logits, torch.full_like(truth, ignore), ignore),
    }
    room = case.facts["tolerance"]
    rows = [near(name, case.expected[name], value.detach(), **room) for name, value in found.items()]
    return [*rows, near("out.gradient", case.data["out.gradient"], logits.grad, **room)]


def _undefined(values: list) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def metric(case: Case) -> list[Row]:
    """Scores of a test; means with and without the last class."""
    e, classes, room = case.expected, case.settings["classes"], case.facts["tolerance"]
    truth, predicted = case.data["in.labels"], case.data["in.predictions"]
    matrix = metrics.confusion(truth, predicted, classes)
    data = TensorDataset(torch.zeros(0))
    whole, part = (recipe.Test(data, [], [""] * classes, left) for left in ((), (classes - 1,)))
    every, some = recipe.scores(whole, matrix), recipe.scores(part, matrix)
    means = {"mean_f1_loveda": every.mf1, "mean_iou_loveda": every.miou, "oa": every.oa}
    means |= {"mean_f1_potsdam": some.mf1, "mean_iou_potsdam": some.miou}
    rows = [near(name, e[name], value / 100, **room) for name, value in means.items()]
    rows += [near(name, _undefined(e[name]), getattr(every, name) / 100, **room) for name in ("iou", "f1")]
    rows.append(same("confusion", e["confusion"], matrix))
    key = next(name for name in e if name.endswith("predicted but never there"))
    absent, want = int(key.split()[1]), e[key]
    moved = recipe.scores(whole, metrics.confusion(truth.where(truth != absent, absent - 1).long(), predicted, classes))
    for name, value in (("mean_f1", moved.mf1), ("mean_iou", moved.miou), ("oa", moved.oa)):
        rows.append(near(f"{key} {name}", want[name], value / 100, **room))
    return rows + [near(f"{key} {n}", _undefined(want[n]), getattr(moved, n) / 100, **room) for n in ("iou", "f1")]


def _pixels(case: Case) -> Tensor:
    """The image (3, H, W) uint8."""
    return case.data["in.image"].permute(2, 0, 1).contiguous()


def test(case: Case) -> list[Row]:
    """What the network gets of a tested image."""
    image, e, room = _pixels(case), case.expected, case.facts["tolerance"]
    truth = torch.arange(image[0].numel()).reshape(image[0].shape) % 7
    found, kept = transforms.test_transform()(tv_tensors.Image(image), tv_tensors.Mask(truth))
    (rows, columns) = (torch.tensor([round(i * (n - 1) / 7) for i in range(8)]) for n in image.shape[1:])
    return [
        near("mean", e["mean"], found.mean(), **room),
        near("std", e["std"], found.std(correction=0), **room),
        near("grid", e["grid"], found[:, rows][:, :, columns], **room),
        same("labels_unchanged", e["labels_unchanged"], found.shape[1:] == truth.shape and torch.equal(kept, truth)),
    ]


def _mask(settings: Mapping) -> np.ndarray:
    """The mask (3, H, W) that the settings describe: a colour, then areas of others."""
    width, height = settings["picture_width_height"]
    first, *areas = settings["mask"].split("; ")
    mask = np.empty((3, height, width), np.uint8)
    mask[:] = np.array(COLOURS[first])[:, None, None]
    for area in areas:
        found = re.fullmatch(r"rows (\d+)\.\.(\d+)(?: of columns (\d+)\.\.(\d+))? (\w+)", area)
        assert found, area
        top, bottom, left, right = (
            int(n) if n else end for n, end in zip(found.groups()[:4], (0, 0, 0, width - 1), strict=True)
        )
        mask[:, top : bottom + 1, left : right + 1] = np.array(COLOURS[found[5]])[:, None, None]
    return mask


def tiles(case: Case) -> list[Row]:
    """Windows of a tile of Potsdam and their labels: with the author's padding the same, by default it is ignored."""
    import rasterio  # an extra

    s, rows = case.settings, []
    mask, size = _mask(s), s["tile"]
    flips = {"as it is": "", "mirrored left-right": "left-right", "mirrored top-down": "upside down"}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "potsdam"
        for split, ending in (("train", "label"), ("test", "label_noBoundary")):
            for tile in landcover.POTSDAM_TILES[split]:
                files = {f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif": np.full_like(mask, 200)}
                files[f"5_Labels_all{'_noBoundary' * (split == 'test')}/top_potsdam_{tile}_{ending}.tif"] = mask
                for name, pixels in files.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    profile = {"count": 3, "dtype": "uint8", "height": mask.shape[1], "width": mask.shape[2]}
                    with quiet(), rasterio.open(folder / name, "w", driver="GTiff", **profile) as file:
                        file.write(pixels)
        for what, e in case.expected.items():
            split, _, kind = what.partition(": ")
            for padding, departs in (
                ("impervious", ""),
                ("ignored", "the padding's label is ignored: impervious is wrong"),
            ):
                own = "train" if split == "train" else "test"
                options = {"size": size, "stride": s["stride"], "mirrored": own == "train", "padding": padding}
                data = landcover.load(POTSDAM, root, own, **options)
                windows = data.windows or []
                chosen = [i for i, window in enumerate(windows) if window[0] == 0 and window[3] == flips[kind]]
                corners = np.array([windows[i][1:3] for i in chosen])
                corners -= corners.min(0)
                height, width = corners.max(0) + size
                image, truth = np.zeros((height, width), np.uint8), np.zeros((height, width), np.int64)
                for i, (top, left) in zip(chosen, corners, strict=True):
                    pixels, found = data.pair(i)
                    image[top : top + size, left : left + size] = pixels[0]
                    truth[top : top + size, left : left + size] = found
                lines = [np.flatnonzero(image.any(axis)) for axis in (1, 0)]
                around = sorted(set(truth[image == 0].tolist()))
                rows.append(
                    same(f"{what} labels_of_the_padding, {padding}", e["labels_of_the_padding"], around, departs)
                )
                if departs:
                    continue
                rows += [
                    same(f"{what} padded_height_width", e["padded_height_width"], [height, width]),
                    same(f"{what} picture_in_rows", e["picture_in_rows"], [lines[0][0], lines[0][-1]]),
                    same(f"{what} picture_in_columns", e["picture_in_columns"], [lines[1][0], lines[1][-1]]),
                    same(f"{what} tile_corners_row_column", e["tile_corners_row_column"], corners),
                    same(f"{what} pixels_of_each_label", e["pixels_of_each_label"], _counts(truth)),
                    same(f"{what} first_tile_labels", e["first_tile_labels"], _counts(data.pair(chosen[0])[1])),
                    same(f"{what} last_tile_labels", e["last_tile_labels"], _counts(data.pair(chosen[-1])[1])),
                ]
    return rows


def _counts(found: Tensor | np.ndarray) -> dict[str, int]:
    values, counts = np.unique(np.asarray(found), return_counts=True)
    return {str(v): int(n) for v, n in zip(values, counts, strict=True)}


class _Numbered:
    """What `Mosaic` reads of a `LandCover`, without files: item i is red i; its columns count up in green."""

    def __init__(self, side: int, count: int = 9):
        self.side, self.ignore, self.count = side, 6, count

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        red, green = torch.full((self.side, self.side), index), torch.arange(self.side).expand(self.side, -1)
        return torch.stack([red, green, green]).to(torch.uint8), torch.zeros(self.side, self.side, dtype=torch.int64)


def _operations(mosaic: transforms.Mosaic) -> list[str]:
    """The random operations of training with their settings, named as recorded."""
    scale, crop, flip, upside_down, *light, normalised = mosaic.transform.transforms  # type: ignore[union-attr]
    ignored = crop.ignore if crop.counted == crop.ignore else 255  # where the ignored label counts as a class
    lines = [f"mosaic with probability {mosaic.p:g}", "RandomScale one of " + ", ".join(f"{x:g}" for x in scale.scales)]
    lines.append(f"SmartCropV1 {crop.size}, max_ratio {crop.most:g}, ignored {ignored}")
    lines += [f"{name} {one.p:g}" for name, one in (("HorizontalFlip", flip), ("VerticalFlip", upside_down)) if one.p]
    for one in light:
        limit = one.transforms[0].limit
        lines.append(f"RandomBrightnessContrast {limit:g}, {limit:g} with probability {one.p:g}")
    return lines + [type(step).__name__ for step in normalised.transforms if hasattr(step, "mean")]


def _operation_rows(key: str, recorded: list[str], mosaic: transforms.Mosaic) -> list[Row]:
    """A row of each recorded operation: all words of the shorter of the two texts are in the longer."""
    texts = [text for text in recorded if not text.startswith("no flip and no colour")]
    ours = _operations(mosaic)
    found = [same(f"{key} operations", len(texts), len(ours))]
    for text, line in zip(texts, ours, strict=False):
        theirs, own = (set(re.findall(r"[\w.]+", one)) for one in (text, line))
        found.append(Row(f"{key} {line}", text, line, theirs <= own or own <= theirs))
    return found


def training(case: Case) -> list[Row]:
    """The random operations of training: their settings, and what each does to given numbers."""
    e, rows, data = case.expected, [], _Numbered(10)
    zones = ["Cfa"] * len(data)
    for key, dataset in (("potsdam", POTSDAM), ("loveda (dcswin: the data set's train_aug)", LOVEDA)):
        data.ignore = len(CLASSES[dataset])
        made = recipe.randomised(data, zones, recipe.recipe(dataset))  # type: ignore[arg-type]
        rows += _operation_rows(key, e[key], made)
    other = "loveda (unetformer: the config's own)"  # another network's recipe, by our functions with its settings
    chain = transforms.train_transform(512, 7, flip=0.5, upside_down=0.0)
    rows += _operation_rows(other, e[other], transforms.Mosaic(data, 0.25, zones, chain))  # type: ignore[arg-type]
    rows += _mosaic(e["mosaic"])
    for one in e["crops"]:
        rows += _cropped(one)
    for one in e["scales"]:
        width, height = one["picture_width_height"]
        picture = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        found = transforms.Scale().transform(picture, {"scale": one["scale"]}).shape
        swap = "the sides of an image that is not square are not exchanged" if width != height else ""
        rows.append(
            same(f"scales {width} x {height} by {one['scale']}", one["scaled_width_height"], [found[2], found[1]], swap)
        )
    for one in e["smart_crop"]:
        for every, key in ((False, "crops_tried_with_ignored_6"), (True, "crops_tried_with_ignored_255")):
            rows.append(
                same(f"smart_crop {one['name']} {key}", one[key], _tries(one["shares_of_label_0_1_6"], 6, every))
            )
    levels = torch.tensor([0, 51, 102, 153, 204, 255], dtype=torch.uint8).expand(3, 1, -1)
    for one in e["brightness_contrast_of_0_51_102_153_204_255"]:
        found = transforms.BrightnessContrast(0.25).transform(tv_tensors.Image(levels), one)
        what = f"brightness_contrast_of_0_51_102_153_204_255 {one['alpha']} {one['beta']}"
        rows.append(same(what, one["out"], found[0, 0]))
    return rows


def _mosaic(e: Mapping) -> list[Row]:
    """Seams, sources and order of many mosaics of item 4."""
    torch.manual_seed(0)
    data = _Numbered(10)
    mosaic = transforms.Mosaic(data, 1.0, ["Cfa"] * len(data))  # type: ignore[arg-type]
    made = torch.stack([mosaic[4][0] for _ in range(300)]).int()
    red, quarters = made[:, 0], made[:, 0, [0, -1, -1], [-1, 0, -1]]
    changes = [*(red[:, 0].diff() != 0).nonzero()[:, 1], *(red[:, :, 0].diff() != 0).nonzero()[:, 1]]
    seams = {int(n) + 1 for n in changes}
    among = len(quarters.unique()) == len(data) and bool((quarters == 4).any())
    return [
        Row("mosaic seam", e["seam"], f"{sorted(seams)} of 10", seams == {*range(10 // 4, 10 - 10 // 4 + 1)}),
        Row("mosaic pictures", e["pictures"], f"{len(quarters.unique())} of {len(data)}", among),
        Row("mosaic order", e["order"], "the item is top left", bool((red[:, 0, 0] == 4).all())),
        Row("mosaic each", e["each"], "several corners of an image", len(made[:, 1, 0, 0].unique()) > 3),
    ]


def _cropped(e: Mapping) -> list[Row]:
    """A crop of a white image: its size, what is padding, and from where to where its corner goes."""
    width, height = e["picture_width_height"]
    size, ignore = e["crop"], 6
    crop = transforms.SmartCrop(size, ignore, tries=1)
    place = torch.arange(height * width).reshape(height, width)
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    padded: list[list[int]] = []
    crop.crop.register_forward_pre_hook(lambda _, pair: padded.append([*pair[0].shape[:-3:-1]]))
    torch.manual_seed(0)
    found, truth = crop(tv_tensors.Image(image), tv_tensors.Mask(torch.zeros_like(place)))
    black = int((found[0] == 0).sum())
    most = {name: total - size for name, total in zip(("x", "y"), padded[0], strict=True)}
    what = f"crops {width} x {height}"
    return [
        same(f"{what} padded_width_height", e["padded_width_height"], padded[0]),
        same(f"{what} crop_corner_from_to", e["crop_corner_from_to"], {name: [0, end] for name, end in most.items()}),
        same(f"{what} crop_size", e["crop_size"], truth.shape),
        same(f"{what} ignored_at_the_edges", e["ignored_at_the_edges"], int((truth == ignore).sum())),
        same(f"{what} black", e["black"], black),
    ]


def _tries(shares: Any, ignore: int, every: bool) -> int:
    """How many crops are drawn of an image whose every crop has these shares of the labels 0, 1 and `ignore`."""
    size = 100
    values = torch.tensor([0, 1, ignore]).repeat_interleave(
        torch.tensor([round(size * size * share) for share in shares])
    )
    crop, drawn = transforms.SmartCrop(size, ignore, every=every), []
    crop.crop.register_forward_hook(lambda *_: drawn.append(1))
    truth = values.reshape(size, size)
    crop(tv_tensors.Image(torch.zeros(3, size, size, dtype=torch.uint8)), tv_tensors.Mask(truth))
    return len(drawn)


def views(case: Case) -> list[Row]:
    """Test-time augmentation: the sizes that the network sees, and the merged probabilities."""
    kinds = {"loveda d4": "d4 loveda", "potsdam d4": "d4", "lr (both)": "lr"}
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

        found = metasegnet.augmented(network, image, kinds[what])
        rows += [
            same(f"{what} views", e["views"], len(sizes)),
            same(f"{what} sizes", sorted(e["sizes_seen_height_width"]), sorted(sizes)),
            near(f"{what} mean", e["mean"], found.mean(), **room),
            near(f"{what} sum_of_squares", e["sum_of_squares"], (found.double() ** 2).sum(), **room),
            near(f"out.{what}", case.data[f"out.{what}"], found, **room),
        ]
    return rows


class _Count(Callback):
    """Counts epochs and their images."""

    def on_epoch_end(self, loop: Loop) -> None:
        loop.stopped = True  # after one


def _steps(images: int, batch: int) -> tuple[int, int]:
    """Optimiser steps of an epoch, and images left out, by `fit` as the recipe calls it."""
    seen: list[int] = []

    def loss(model: nn.Module, items: tuple[Tensor, ...]) -> Tensor:
        seen.append(len(items[0]))
        return model(items[0]).mean()

    options: dict[str, Any] = {"optimizer": sgd(0.0), "callbacks": [_Count()], "last": recipe.LAST, "hardware": CPU}
    fit(nn.Linear(1, 1), loss, TensorDataset(torch.zeros(images, 1)), epochs=2, batch=batch, **options)
    return len(seen), images - sum(seen)


def schedule(case: Case) -> list[Row]:
    """The learning rate of each epoch and the steps of an epoch."""
    s, e = case.settings, case.expected
    r = recipe.recipe(SETS[case.name.split("_")[1]])
    room, epochs = case.facts["tolerance"], s["epochs"]
    steps, left = _steps(s["images"], s["batch"])
    rows = [same("steps_of_each_epoch", e["steps_of_each_epoch"], steps)]
    rows.append(same("images_left_out_of_each_epoch", e["images_left_out_of_each_epoch"], left))
    for name, base in (("backbone", r.encoder_lr), ("rest", r.lr)):
        found = recipe.learning_rates(r, base, steps, epochs).reshape(epochs, steps)
        rows.append(near(f"lr_of_each_epoch {name}", e["lr_of_each_epoch"][name], found[:, 0], **room))
        rows.append(same(f"lr_of_each_epoch {name}, constant", True, bool((found == found[:, :1]).all())))
    rows.append(same("steps_in_all", e["steps_in_all"], found.size))
    for name, other in e.get("other_network_of_the_author", {}).items():
        own, _ = _steps(s["images"], other["batch"])
        rows.append(same(f"other_network_of_the_author {name}", other["steps_of_each_epoch"], own))
    return rows


def _kept(values: list, dataset: str) -> tuple[int, int, int]:
    """The epochs whose weights a training of a small network ends with, the best and the last, and how many ran."""
    r = replace(recipe.recipe(dataset), epochs=len(values), batch=2)
    given, states, kept = iter(values), [], []

    def score(model: nn.Module) -> float:
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        return float(next(given))

    for select in ("best", "last"):
        torch.manual_seed(0)
        encoder = swin(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
        model = MetaSegNet(encoder, 2, width=16, heads=1, window=4)
        data = TensorDataset(torch.randn(2, 3, 32, 32), torch.randint(2, (2, 32, 32)))
        recipe.learn(_p(dataset), data, model, r=r, score=score if select == "best" else None)
        own = model.state_dict()
        kept += [i for i, state in enumerate(states) if all(torch.equal(t, own[name]) for name, t in state.items())]
    best, last = kept
    return best, last, len(states)


def selection(case: Case) -> list[Row]:
    """The selected epoch: the author's, and ours by default."""
    e, values, rows = case.expected, case.settings["values_of_each_epoch"], []
    leak = "the author chooses the epoch on the test images; here the last one is tested, select = 'best' is his"
    epochs = {len(v) for v in values.values()}
    for name, found in e["sequences"].items():
        for title, want in found.items():
            dataset = SETS[title.partition(" ")[0]]
            best, last, ran = _kept(values[name], dataset)
            rows.append(same(f"sequences {name}, {title}", [want["best_epoch"], want["epochs_run"]], [best, ran]))
            if want["epoch_of_last.ckpt"] is not None:
                rows.append(same(f"sequences {name}, {title}, last", want["epoch_of_last.ckpt"], last))
    for config, kind in e["tested_checkpoint"].items():
        dataset, network = (SETS.get(part, part) for part in config.removesuffix(".py").split("/")[1:])
        scored = "val_F1" if recipe.SCORES.get(dataset) == "mf1" else "val_mIoU"
        chosen = recipe.chosen(_p(dataset, select="last" if network == "unetformer" else "recipe"))
        ours = f"best {scored}" if chosen == "best" else "last"
        rows.append(same(f"tested_checkpoint {config}", kind, ours, leak if dataset == POTSDAM else ""))
        if dataset == POTSDAM:
            rows.append(same(f"tested_checkpoint {config}, select = best", kind, f"best {scored}"))
    for dataset, text in e["validated_on"].items():
        split = recipe.TEST_SPLIT[SETS[dataset]]
        rows.append(Row(f"validated_on {dataset}", text, split, split in text.lower()))
    falling = [1.0 / (i + 1) for i in range(max(epochs))]
    rows.append(same("stops_early", e["stops_early"], _kept(falling, LOVEDA)[2] < len(falling)))
    return rows


def _batches(s: Mapping, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The recorded items, image by image: sizes by the sentences of the settings."""
    shape = [int(n) for n in re.findall(r"\(([\d, ]+)\), seed", s["step_i"]["image"])[0].split(",")]
    high, count, rows, columns, times = (
        int(n)
        for n in re.findall(
            r"integers\(0, (\d+), \((\d+), (\d+), (\d+)\)\), each repeated (\d+)", s["step_i"]["labels"]
        )[0]
    )
    for i in range(s["epochs"] * s["steps_of_each_epoch"]):
        images = torch.from_numpy(fill.values(f"input:image{i}", tuple(shape), seed))
        truth = np.random.default_rng([seed, i]).integers(0, high, (count, rows, columns))
        truth = truth.repeat(times, 1).repeat(times, 2)
        yield from zip(images, torch.from_numpy(truth), strict=True)


def trajectory(case: Case) -> list[Row]:
    """A training by the recipe's `learn`, from filled weights, batches in the recorded order."""
    s, e, seed = case.settings, case.expected, case.settings["seed"]
    m, o, lr = s["model"], s["optimiser"], s["scheduler"]
    dataset = SETS[case.name.split("_")[1]]
    window, small = (int(n) for n in re.findall(r"\d+", m["window_size"]))
    sizes = {"embed_dim": m["embed_dim"], "depths": tuple(m["depths"]), "num_heads": tuple(m["num_heads"])}
    heads = metasegnet.SIZES["paper"]["model"].get("heads", 16)
    blank = MetaSegNet(
        swin(**sizes, window_size=window), m["num_classes"], width=m["decode_channels"], heads=heads, window=small
    )
    names = {name: list(t.shape) for name, t in blank.to_official().items()}
    state = {name: torch.from_numpy(np.array(t)) for name, t in fill.state_dict(names, seed).items()}
    model = MetaSegNet.from_official(state)
    for part in model.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = m["dropout"]
        if isinstance(part, DropPath):
            part.drop_prob = m["drop_path"]
    items = list(_batches(s, seed))
    steps = s["steps_of_each_epoch"]
    batch = len(items) // (s["epochs"] * steps)
    r = replace(
        recipe.recipe(dataset),
        epochs=s["epochs"],
        batch=batch,
        lr=o["lr"],
        encoder_lr=o["lr of backbone.*"],
        weight_decay=o["weight_decay"],
        restart=lr.get("T_0", 0),
        floor=lr.get("eta_min", 0.0),
    )
    history = recipe.learn(_p(dataset), InOrder(items, batch * steps), model, r=r)
    relative = {name: float(re.findall(r"[\d.e-]+$", text)[0]) for name, text in case.facts["tolerance"].items()}
    rows = [
        near("loss_of_each_step", e["loss_of_each_step"], [row["loss"] for row in history], relative=relative["loss"])
    ]
    rates = {"backbone": [row["lr"] for row in history]}
    rates["decoder"] = list(recipe.learning_rates(r, r.lr, steps, s["epochs"]))
    for name, want in e["lr_of_each_step"].items():
        rows.append(near(f"lr_of_each_step {name}", want, rates[name], relative=relative["lr"]))
    ours = model.to_official()
    for name, want in e["parameters_at_the_end"].items():
        value = ours[name].double()
        rows += [
            near(f"parameters_at_the_end {name} sum", want["sum"], value.sum(), absolute=relative["sum"]),
            near(
                f"parameters_at_the_end {name} squares",
                want["sum_of_squares"],
                (value**2).sum(),
                relative=relative["sum_of_squares"],
            ),
        ]
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
