"""MetaSegNet: OpenEarthMap, all zones or one left out, also tested on LoveDA; LoveDA, Potsdam, a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from companion.data import DATASETS, landcover
from companion.data.landcover import LOVEDA, OEM, POTSDAM
from companion.models import metasegnet
from companion.training.recipe import run
from tests.data import test_landcover as layouts
from tests.data.test_rasters import noise, written
from tests.models.common import draw
from tests.papers.common import Fault, Found, Training, picture

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have

REGIONS = ("tokyo", "kyoto", "el_rodeo", "mexico_city")  # of the zones Cfa, Cfa, Aw, Cwb


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """The data set in its layout: small images, of Potsdam all 38 tiles; next to OpenEarthMap LoveDA."""
    if name == "folder":
        for i in range(5):
            written(root / "images" / f"{i}.tif", noise(40, 48, i))
            written(root / "labels" / f"{i}_mask.tif", layouts.labels(1, 40, 48, i))
        (root / "classes.txt").write_text("field 10 200 30\nwood\n")
        for split, images in {"train": "012", "val": "34"}.items():
            (root / f"{split}.txt").write_text("".join(f"{i}.tif\n" for i in images))
    elif name == POTSDAM:
        patch.setattr(landcover, "TILE", 40)
        layouts.potsdam(root, 40)
    else:
        layouts.loveda(root, patch)
        if name == OEM:
            layouts.earth(root, REGIONS)


EARTH, CITY, OWN = {"dataset": OEM}, {"dataset": LOVEDA}, {"dataset": "folder"}
TILES = {"dataset": POTSDAM, "method": "unimodal"}
RUNS = [EARTH | {"held_out": "Aw"}, CITY, CITY | {"method": "unimodal", "augmentation": "d4"}, OWN]
RUNS += [EARTH | {"method": method} for method in ("unimodal", "constant text", "zone names", "one-hot zone")]
RUNS += [EARTH | {"test_on": LOVEDA}, EARTH | {"prompt": "wrong"}]
RUNS += [TILES | {"select": "best", "padding": "impervious"}, TILES | {"method": "MetaSegNet"}]


def earth(name: str, content: str | np.ndarray | None = None, named: str = ""):  # type: ignore[no-untyped-def]
    """A file of OpenEarthMap with another text or image, or without it; the error names it, or the one `named`."""

    def damage(root: Path) -> Path:
        path = DATASETS[OEM].folder(root) / name
        if content is None:
            path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:
            written(path, content, **layouts.NOWHERE)
        return Path(named) if named else path

    return damage


def listed(root: Path) -> Path:
    """The first training image of a folder is one of its validation."""
    (root / "val.txt").write_text("3.tif\n0.tif\n")
    return Path("0.tif")


def colour(root: Path) -> Path:
    """A tile of Potsdam whose labels have the colour of no class."""
    path = DATASETS[POTSDAM].folder(root) / "5_Labels_all/top_potsdam_2_10_label.tif"
    written(path, np.broadcast_to(np.array([255, 0, 255], np.uint8)[:, None, None], (3, 40, 40)))
    return path


def moved(name: str, old: str, new: str):  # type: ignore[no-untyped-def]
    """A file or folder of a set under another name."""

    def damage(root: Path) -> Path:
        folder = DATASETS[name].folder(root)
        (folder / old).rename(aside := root / "aside")
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        aside.rename(folder / new)
        return folder / new

    return damage


def participants(root: Path) -> Path:
    """The labels of the training tiles as first released, and the eroded ones of all tiles."""
    folder = DATASETS[POTSDAM].folder(root)
    for tile in landcover.POTSDAM_TILES["test"]:
        (folder / f"5_Labels_all/top_potsdam_{tile}_label.tif").unlink()
    return moved(POTSDAM, "5_Labels_all", "5_labels_for_participants")(root)


def beside(root: Path) -> Path:
    """The labels of Potsdam next to its folders."""
    for path in [*(DATASETS[POTSDAM].folder(root) / "5_Labels_all").iterdir()]:
        path.rename(path.parent.parent / path.name)
    return path


COPIES = {
    "each archive in a folder of its own": Fault(CITY, moved(LOVEDA, "Train", "Train/Train"), ""),
    "a test set alone": Fault(CITY, moved(LOVEDA, "Train", "elsewhere"), "0 images of 'train', 2 are"),
    "labels for participants": Fault(TILES, participants, ""),
    "labels next to the folders": Fault(TILES, beside, ""),
    "another neighbour's image": Fault(
        CITY, moved(LOVEDA, "Val/Rural/masks_png/0.png", "Val/Rural/masks_png/0_mask.png"), "masks_png/0.png"
    ),
}
LABEL = "tokyo/labels/tokyo_1.tif"
FAULTS = {
    "a missing list": Fault(EARTH, earth("val.txt"), "is not there"),
    "a missing label": Fault(EARTH, earth(LABEL), "1 files of 'train'"),
    "a missing image": Fault(EARTH, earth("kyoto/images/kyoto_2.tif", named="val.txt"), "1 images of val.txt in kyoto"),
    "a label out of range": Fault(EARTH, earth(LABEL, np.full((1, 70, 90), 9, np.uint8)), "code 9; 0 to 8 are known"),
    "labels of another size": Fault(EARTH, earth(LABEL, layouts.labels(8, 60, 60)), "its image"),
    "an unreadable image": Fault(EARTH, earth("mexico_city/images/mexico_city_2.tif", "no image"), "cannot read"),
    "splits that overlap": Fault(EARTH, earth("val.txt", "tokyo_1.tif\n", "tokyo_1.tif"), "'train' and 'test'"),
    "lists that overlap": Fault(OWN, listed, "'train' and 'val'"),
    "the list of another set": Fault(
        EARTH, earth("train.txt", "Train/Rural/images_png/0.png\n"), "expected different names"
    ),
    "a colour of no class": Fault(TILES, colour, "no class of Potsdam"),
}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.models.metasegnet.model import SIZES, swin
    from companion.models.metasegnet.prompts import LEVELS
    from companion.models.metasegnet.text import Words

    text_encoder = recipe.text_encoder

    def words(method, prompts, *args, **kwargs):  # type: ignore[no-untyped-def]
        if LEVELS[method] in (None, "code"):
            return text_encoder(method, prompts)
        return Words.of(prompts.texts(list(prompts.zones)), length=64)

    patch.setitem(SIZES, "paper", SIZES["pocket"])
    published = recipe.published
    patch.setattr(recipe, "published", lambda dataset: dataclasses.replace(published(dataset), crop=64))
    patch.setattr(recipe.backbones, "build", lambda name, weights: swin(**SIZES["pocket"]["swin"]))
    patch.setattr(recipe, "text_encoder", words)


def land() -> metasegnet.MetaSegNet:
    return metasegnet.MetaSegNet.build(3, metasegnet.Words.of(["hot dry sand", "wet forest"], length=4), "pocket")


def land_with_bert() -> metasegnet.MetaSegNet:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hot", "dry", "sand", "##y", "wet", "forest"]
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(names), **sizes), add_pooling_layer=False)
    return metasegnet.MetaSegNet.build(3, metasegnet.BertText(bert, tokenizer, length=8), "pocket")


MODELS: dict[str, Callable[[], nn.Module]] = {"MetaSegNet": land, "MetaSegNet with BERT": land_with_bert}
"""That `companion.save` writes, by name."""


OFFICIAL = ["ft_unetformer_swin_b"]
"""Recorded cases whose state dict is read and given back under the authors' names."""


FULL_SIZE = ["ft_unetformer_swin_b"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    return draw(batch, 3, 64, 64), ["wet forest"]


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    _, training, tests = recipe.setting(p)
    history = run(training)[1]
    test = tests["test"]
    hardware = training.fit["hardware"]
    counts = recipe.confusion(training.build(), test, recipe.texts_of(p, test), hardware=hardware).float()
    return history, counts / counts.sum()


TRAININGS = {"": Training(train, {}, batch=4, runs="openearthmap texts loveda")}


WAITS = {"models/metasegnet/text.py": 1}  # which texts of a batch are equal


# --- the example on own data


def area() -> None:
    pytest.importorskip("rasterio")
    for i, path in enumerate([*(Path(f"area/images/{i}.tif") for i in range(8)), Path("new.tif")]):
        labels = Path("area/labels") / path.name
        for folder in (path.parent, labels.parent):
            folder.mkdir(parents=True, exist_ok=True)
        image = picture(i, (64, 64) if i % 2 else (80, 100))
        image.save(path)
        Image.fromarray(np.array(image)[..., 0] // 86).save(labels)


EXAMPLE = area, r"\[tensor\(\[\["


def small_example(patch: pytest.MonkeyPatch) -> None:
    from companion.models.metasegnet import augmentation, model

    crops_of = augmentation.train_transform
    patch.setattr(augmentation, "train_transform", lambda size, ignore: crops_of(size // 4, ignore=ignore))
    patch.setitem(model.SIZES, "paper", model.SIZES["pocket"])
