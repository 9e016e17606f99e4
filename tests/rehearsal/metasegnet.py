"""MetaSegNet: OpenEarthMap, all zones or one left out, also tested on LoveDA; LoveDA, Potsdam, a folder."""

from pathlib import Path

import numpy as np
import pytest

from companion.data import DATASETS, landcover
from companion.data.landcover import LOVEDA, OEM, POTSDAM
from tests.data import test_landcover as layouts
from tests.data.test_rasters import noise, written
from tests.rehearsal.common import Fault

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


COPIES = {
    "each archive in a folder of its own": Fault(CITY, moved(LOVEDA, "Train", "Train/Train"), ""),
    "a test set alone": Fault(CITY, moved(LOVEDA, "Train", "elsewhere"), "0 images of 'train', 2 are"),
    "labels for participants": Fault(TILES, participants, ""),
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
