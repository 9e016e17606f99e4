"""SIC-CADS: recognisers of OV-COCO and OV-LVIS, a test without training, and one on foreign vocabularies."""

from pathlib import Path

import pytest
import torch

from companion.io.files import read_json, write_json
from companion.models.sic_cads import official, recipe
from companion.training.checkpoints import save
from tests.conftest import parameters
from tests.data import test_detection as layouts
from tests.data.conftest import expect
from tests.rehearsal.common import Fault
from tests.small import small_clip

COCO, LVIS = "detection/ov-coco", "detection/ov-lvis"
PLACES = {  # of a split: the annotations, the folder of the images, and a file name
    COCO: {
        "train": ("coco/annotations/instances_train2017.json", "coco/train2017", "{}.jpg"),
        "test": ("coco/annotations/instances_val2017.json", "coco/val2017", "{}.jpg"),
    },
    LVIS: {
        "train": ("lvis/lvis_v1_train.json", "coco", "train2017/{}.jpg"),
        "test": ("lvis/lvis_v1_val.json", "coco", "val2017/{}.jpg"),
    },
    "detection/objects365": {
        "test": ("objects365/annotations/zhiyuan_objv2_val.json", "objects365/val", "images/v1/patch0/{}.jpg")
    },
    "detection/openimages": {
        "test": ("oid/annotations/oid_challenge_2019_val_expanded.json", "oid/images", "0/{}.jpg")
    },
}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Eight images a split in the layout of the set, each with a box of two classes; a trained recogniser of LVIS."""
    categories = layouts.coco_categories() if name == COCO else layouts.lvis_file()["categories"]
    base, novel = (1, 17) if name == COCO else (1, 2)
    expect(patch, name, classes=len(categories), sizes=dict.fromkeys(PLACES[name], 8))
    for split, (file, folder, spelled) in PLACES[name].items():
        numbers = range(1, 9) if split == "train" else range(101, 109)
        images = [layouts.image(i, file_name=spelled.format(i)) for i in numbers]
        for found in images:
            layouts.picture(root / folder / found["file_name"])
            if name == LVIS:
                found["coco_url"] = f"http://images.cocodataset.org/{found.pop('file_name')}"
        boxes = [layouts.box(2 * i + (c == novel), i, c) for i in numbers for c in (base, novel)]
        write_json(root / file, {"images": images, "annotations": boxes, "categories": categories})
        if name == COCO and split == "train":
            said = [{"image_id": i, "caption": "a man and a dog"} for i in numbers]
            write_json(root / "coco/annotations/captions_train2017.json", {"images": images, "annotations": said})
    if name not in (COCO, LVIS):
        p = parameters("sic_cads", dataset=LVIS)
        model = recipe.build(p, small_clip(), torch.zeros(3, 24), torch.zeros(3) > 0, "random")
        save(root, "recogniser ov-lvis seed 0", official.trained_weights(model))
        patch.chdir(root)


RUNS = [{"dataset": COCO}, {"dataset": COCO, "branch": "visual+"}, {"dataset": LVIS}]
RUNS += [
    {"dataset": name, "checkpoint": "recogniser ov-lvis seed 0.safetensors"}
    for name in ("detection/objects365", "detection/openimages")
]


def missing(root: Path) -> Path:
    (path := root / "coco/annotations/captions_train2017.json").unlink()
    return path


def changed(file: str, part: str, **fields: object):  # type: ignore[no-untyped-def]
    """The last entry of a part of the annotations with other fields."""

    def damage(root: Path) -> Path:
        found = read_json(root / file)
        found[part][-1] |= fields
        write_json(root / file, found)
        return root / file

    return damage


def unreadable(root: Path) -> Path:
    (path := root / "coco/train2017/3.jpg").write_bytes(path.read_bytes()[:300])
    return path


def overlap(root: Path) -> Path:
    changed("lvis/lvis_v1_val.json", "images", coco_url="http://images.cocodataset.org/train2017/4.jpg")(root)
    return Path("train2017/4.jpg")


def another(root: Path) -> Path:
    (path := root / "coco/annotations/instances_val2017.json").unlink()
    found = layouts.lvis_file()
    write_json(path, found | {"images": [found["images"][0] | {"id": i} for i in range(1, 9)]})
    return path


def ids_of_pandas(root: Path) -> Path:
    """Numbers with a point, as pandas writes columns that have a hole."""
    for file in (root / "coco/annotations").glob("instances*"):
        found = read_json(file)
        for row in (*found["images"], *found["annotations"]):
            row |= {name: float(row[name]) for name in ("id", "image_id", "category_id", "width") if name in row}
        write_json(file, found)
    return root


def moved(old: str, new: str):  # type: ignore[no-untyped-def]
    """A folder below the data root under another name."""

    def damage(root: Path) -> Path:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)
        return root / new

    return damage


def linked(root: Path) -> Path:
    """LVIS is a link to another disk, which has no COCO beside it."""
    (path := root / "disk" / "lvis").parent.mkdir()
    (root / "lvis").rename(path)
    (root / "lvis").symlink_to(path, target_is_directory=True)
    return path


def without(*files: str):  # type: ignore[no-untyped-def]
    def damage(root: Path) -> Path:
        for file in files:
            (root / file).unlink()
        return root

    return damage


OBJECTS = {"dataset": "detection/objects365"}
COPIES = {
    "numbers with a point": Fault({"dataset": COCO}, ids_of_pandas, ""),
    "Ultralytics' folders": Fault({"dataset": COCO}, moved("coco/train2017", "coco/images/train2017"), ""),
    "annotations in their archive's folder": Fault(
        {"dataset": COCO}, moved("coco/annotations", "coco/annotations_trainval2017/annotations"), ""
    ),
    "a linked LVIS": Fault({"dataset": LVIS}, linked, ""),
    "LVIS inside COCO": Fault({"dataset": LVIS}, moved("coco", "lvis/coco"), ""),
    "patches without images/v1": Fault(OBJECTS, moved("objects365/val/images/v1/patch0", "objects365/val/patch0"), ""),
    "no captions": Fault({"dataset": COCO}, without("coco/annotations/captions_train2017.json"), "captions = False"),
    "a hole": Fault({"dataset": COCO}, without("coco/val2017/108.jpg"), "108.jpg"),
}
FAULTS = {
    "a missing list": Fault({"dataset": COCO}, missing, "captions = False"),
    "a label out of range": Fault(
        {"dataset": COCO}, changed(PLACES[COCO]["test"][0], "annotations", category_id=12), "'category_id' is 12"
    ),
    "an unreadable image": Fault({"dataset": COCO}, unreadable, "cannot read"),
    "splits that overlap": Fault({"dataset": LVIS}, overlap, "'train' and 'test'"),
    "the file of another set": Fault({"dataset": COCO}, another, "3 categories, 80"),
}
