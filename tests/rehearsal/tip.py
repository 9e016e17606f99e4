"""TIP: COCO with captions, DIV2K, and a folder of one's own."""

import json
from pathlib import Path

import pytest

from companion.data import restoration
from companion.io.files import write_json
from tests.data.conftest import expect
from tests.data.test_restoration import picture
from tests.rehearsal.common import Fault, moved, without


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Images of 40 x 36 pixels."""
    if name == "restoration/coco":
        expect(patch, name, sizes={"train": 6, "test": 3})
        for split, count in (("train", 6), ("val", 3)):
            images = [{"id": i, "file_name": f"{split}{i}.jpg", "height": 36, "width": 40} for i in range(count)]
            captions = [{"id": i, "image_id": i, "caption": f"a zebra, number {i}"} for i in range(count)]
            write_json(
                root / f"coco/annotations/captions_{split}2017.json", {"images": images, "annotations": captions}
            )
            for i in range(count):
                picture(root / f"coco/{split}2017/{split}{i}.jpg", (40, 36), i)
    elif name == "restoration/div2k":
        few = {"train": (range(1, 7), ""), "test": (range(801, 804), "")}
        patch.setattr(restoration, "DIV2K", few)
        for split, (numbers, _) in few.items():
            for i in numbers:
                picture(root / "DIV2K" / restoration.FOLDERS[name][split] / f"{i:04d}.png", (40, 36), i)
    else:
        for i in range(6):
            picture(root / "images" / f"{i}.png", (40, 36), i)
        lines = [json.dumps({"file": f"{i}.png", "caption": f"a zebra, number {i}"}) for i in range(6)]
        (root / "captions.jsonl").write_text("\n".join(lines))


SMALL = {"size": 64}
COCO = {"dataset": "restoration/coco"} | SMALL
RUNS = [
    COCO,
    COCO | {"degradation": "real-esrgan", "method": "plain ControlNet"},
    {"dataset": "restoration/div2k"} | SMALL,
    {"dataset": "folder"} | SMALL,
]


def spoil(name: str, content: str | None):  # type: ignore[no-untyped-def]
    """A file of COCO below the data root with another content, or without it."""

    def damage(root: Path) -> Path:
        path = root / "coco" / name
        path.unlink() if content is None else path.write_text(content)
        return path

    return damage


def overlap(root: Path) -> Path:
    """One image, listed twelve times: every tenth is tested."""
    (root / "captions.jsonl").write_text('{"file": "1.png", "caption": ""}\n' * 12)
    return Path("1.png")


NO_CAPTIONS = '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}'
FAULTS = {
    "missing captions": Fault(COCO, spoil("annotations/captions_val2017.json", None), "captions_val2017"),
    "captions of another set": Fault(COCO, spoil("annotations/captions_train2017.json", NO_CAPTIONS), "1 images .* 6 "),
    "a missing image": Fault(COCO, spoil("train2017/train3.jpg", None), "train3"),
    "an unreadable image": Fault(COCO, spoil("train2017/train0.jpg", "no image"), "train0"),
    "splits that overlap": Fault({"dataset": "folder"} | SMALL, overlap, "twice"),
}


DIV2K = {"dataset": "restoration/div2k"}
HIGH = "DIV2K/DIV2K_train_HR"
ANNOTATED = "coco/annotations/captions_train2017.json"
COPIES = {
    "Kaggle's folder of DIV2K": Fault(DIV2K, moved(HIGH, f"{HIGH}/DIV2K_train_HR"), ""),
    "DIV2K with a hole": Fault(DIV2K, without(f"{HIGH}/0006.png"), "DIV2K_train_HR/0006.png"),
    "images of low quality in place of DIV2K": Fault(
        DIV2K, moved(HIGH, "DIV2K/DIV2K_train_LR"), "(?s)0001.png.*holds DIV2K_train_LR, DIV2K_valid_HR"
    ),
    "images of COCO in images/": Fault(COCO, moved("coco/val2017", "coco/images/val2017"), ""),
    "captions next to the images of COCO": Fault(COCO, moved(ANNOTATED, "coco/captions_train2017.json"), ""),
    "no captions of COCO": Fault(COCO, without(ANNOTATED), "(?s)captions_train2017.json.*annotations_trainval2017.zip"),
    "an image of COCO that is missing": Fault(
        COCO, without("coco/train2017/train0.jpg"), "images of captions_train2017.json .*train0.jpg"
    ),
}
