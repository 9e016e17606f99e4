"""The sets of open-vocabulary detection as facts: layouts, splits, licences. `detection` reads them.

* **OV-COCO**: COCO 2017 in the split of OVR-CNN (Zareian et al., CVPR 2021): 48 classes with boxes in training and 17
  novel ones; the other 15 are annotated nowhere. Made here from the public instances files: training keeps the boxes of
  the 48, testing those of the 65, and both only the pictures that still have one. All 80 names stay in the vocabulary.
* **OV-LVIS**: LVIS v1 (Gupta et al., CVPR 2019) on COCO's pictures: 405 frequent, 461 common and 337 rare classes; the
  rare ones are novel. Training keeps all pictures and drops the rare boxes (`*_norare.json`; the tool of that name
  in SIC-CADS' repository keeps the rare ones instead). Testing is the whole of v1 val, federated.
* **Objects365** v2 val (Shao et al., ICCV 2019): 365 classes, only for testing across data sets. Some names are
  misspelt; UniDet's and Detic's `Objects365_names_fix.csv` (lines "id,old,new") is used where it is.
* **OpenImages** Challenge 2019 val (Kuznetsova et al., IJCV 2020): 500 classes, boxes copied to the parent classes by
  UniDet's converter, whose file is read. Only for testing across data sets.
* **pocket**: small scenes made on this machine, in COCO's layout.

Class names are those of the annotation files, underscores and brackets of LVIS included: so the released code embeds
them.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

COCO_BASE = {
    "person": 1, "bicycle": 2, "car": 3, "motorcycle": 4, "train": 7, "truck": 8, "boat": 9, "bench": 15, "bird": 16,
    "horse": 19, "sheep": 20, "bear": 23, "zebra": 24, "giraffe": 25, "backpack": 27, "handbag": 31, "suitcase": 33,
    "frisbee": 34, "skis": 35, "kite": 38, "surfboard": 42, "bottle": 44, "fork": 48, "spoon": 50, "bowl": 51,
    "banana": 52, "apple": 53, "sandwich": 54, "orange": 55, "broccoli": 56, "carrot": 57, "pizza": 59, "donut": 60,
    "chair": 62, "bed": 65, "toilet": 70, "tv": 72, "laptop": 73, "mouse": 74, "remote": 75, "microwave": 78,
    "oven": 79, "toaster": 80, "refrigerator": 82, "book": 84, "clock": 85, "vase": 86, "toothbrush": 90,
}  # fmt: skip
"""The 48 base classes of OV-COCO and COCO's category ids."""

COCO_NOVEL = {
    "airplane": 5, "bus": 6, "cat": 17, "dog": 18, "cow": 21, "elephant": 22, "umbrella": 28, "tie": 32,
    "snowboard": 36, "skateboard": 41, "cup": 47, "knife": 49, "cake": 61, "couch": 63, "keyboard": 76, "sink": 81,
    "scissors": 87,
}  # fmt: skip
"""The 17 novel ones."""

FILES = {
    "detection/ov-coco": {
        "train": ("annotations/instances_train2017.json",),
        "test": ("annotations/instances_val2017.json",),
    },
    "detection/ov-lvis": {
        "train": ("lvis_v1_train.json", "annotations/lvis_v1_train.json"),
        "test": ("lvis_v1_val.json", "annotations/lvis_v1_val.json"),
    },
    "detection/objects365": {
        "test": (
            *("annotations/zhiyuan_objv2_val_fixname.json", "zhiyuan_objv2_val_fixname.json"),
            *("annotations/zhiyuan_objv2_val.json", "zhiyuan_objv2_val.json"),
        )
    },
    "detection/openimages": {"test": ("annotations/oid_challenge_2019_val_expanded.json",)},
    "pocket/detection": {split: (f"annotations/instances_{split}.json",) for split in ("train", "val", "test")},
}
"""The annotation file of each split below the set's folder, the first spelling being the usual one."""

IMAGES = {
    "detection/ov-coco": {"train": ("train2017",), "test": ("val2017",)},
    # the file names hold train2017/ or val2017/, both of which are COCO's
    "detection/ov-lvis": {split: ("../coco", "../COCO", "") for split in ("train", "test")},
    "detection/objects365": {"test": ("val", "images/val", "")},
    "detection/openimages": {"test": ("images", "images/validation", "")},
    "pocket/detection": {split: (split,) for split in ("train", "val", "test")},
}
"""Where the pictures of each split may be."""

NAMES_FIX = ("Objects365_names_fix.csv", "metadata/Objects365_names_fix.csv", "../metadata/Objects365_names_fix.csv")

_COCO_LICENCE = "annotations CC BY 4.0; the pictures are Flickr's, under their own terms"


def sets() -> Iterator[DataSet]:
    """All of them."""
    yield DataSet(
        name="detection/ov-coco",
        title="OV-COCO (48 base, 17 novel classes)",
        group="Open-vocabulary detection",
        task="detection",
        classes=80,
        sizes={"train": 118_287, "test": 5_000},  # pictures of the files, before those without boxes go
        folders=("coco", "COCO"),
        layout="annotations/instances_train2017.json\nannotations/instances_val2017.json\n"
        "annotations/captions_train2017.json    for training on captions\ntrain2017/*.jpg\nval2017/*.jpg",
        source="cocodataset.org (free, 19 GB of pictures)",
        licence=_COCO_LICENCE,
        citation="Lin et al., Microsoft COCO, ECCV 2014; split of Zareian et al., Open-Vocabulary Object Detection "
        "Using Captions, CVPR 2021",
    )
    yield DataSet(
        name="detection/ov-lvis",
        title="OV-LVIS (866 base, 337 novel classes)",
        group="Open-vocabulary detection",
        task="detection",
        classes=1203,
        sizes={"train": 100_170, "test": 19_809},
        folders=("lvis", "LVIS"),
        layout="lvis_v1_train.json\nlvis_v1_val.json\n../coco/train2017/*.jpg\n../coco/val2017/*.jpg",
        source="lvisdataset.org for the annotations, cocodataset.org for the pictures (free)",
        licence="annotations CC BY 4.0; the pictures are COCO's",
        citation="Gupta et al., LVIS: A Dataset for Large Vocabulary Instance Segmentation, CVPR 2019",
    )
    yield DataSet(
        name="detection/objects365",
        title="Objects365 v2, validation",
        group="Open-vocabulary detection",
        task="detection",
        classes=365,
        sizes={"test": 80_000},
        folders=("objects365", "Objects365"),
        layout="annotations/zhiyuan_objv2_val.json    or zhiyuan_objv2_val_fixname.json\n"
        "Objects365_names_fix.csv    optional: corrected names\nval/*.jpg    or val/images/v1/patch0/*.jpg ...",
        source="objects365.org (free with a registration)",
        licence="annotations CC BY 4.0, after registration; the pictures are their owners'",
        citation="Shao et al., Objects365: A Large-Scale, High-Quality Dataset for Object Detection, ICCV 2019",
    )
    yield DataSet(
        name="detection/openimages",
        title="OpenImages Challenge 2019, validation",
        group="Open-vocabulary detection",
        task="detection",
        classes=500,
        sizes={},
        folders=("oid", "openimages"),
        layout="annotations/oid_challenge_2019_val_expanded.json    made by UniDet's converter\nimages/<shard>/*.jpg",
        source="storage.googleapis.com/openimages/web (free); the json by github.com/xingyizhou/UniDet",
        licence="annotations CC BY 4.0, pictures CC BY 2.0",
        citation="Kuznetsova et al., The Open Images Dataset V4, IJCV 2020",
    )
    yield DataSet(
        name="pocket/detection",
        title="pocket scenes with boxes",
        group="pocket",
        task="detection",
        classes=None,
        sizes={},
        folders=("pocket/detection",),
        layout="annotations/instances_{train,val,test}.json\n{train,val,test}/*.png",
        source="made on this machine: `companion.toy.datasets.detection.write(root)`",
        licence="made here, from photographs bundled with scikit-image and scikit-learn",
        citation="this project",
    )
