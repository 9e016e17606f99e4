"""BAT: training on LasHeR or VisEvent, tests on them, on RGBT234 and on GTOT."""

from pathlib import Path

import pytest

from companion.data import tracking
from tests.data import test_tracking as layouts
from tests.data.conftest import expect
from tests.rehearsal.common import Fault

BOX = [10, 8, 12, 9]
BOXES = [BOX] * 24
STREAMS = {"visible": "v{:03d}.png", "infrared": "i{:03d}.png"}
FILES = {"visible.txt": BOXES, "infrared.txt": BOXES, "init.txt": BOXES}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Videos of 24 frames: two to train on, where the set has some, and two to test."""
    video = layouts.video
    if name == "rgbt/lasher":
        expect(patch, name, sizes={"train": 1, "val": 1, "trainval": 2, "test": 2})
        patch.setattr(tracking, "_LISTS", lists := root / "lists")
        for split, names in {"train": ["man"], "val": ["car"], "test": ["bike", "head"]}.items():
            layouts.rows(lists / f"lasher_{split}.txt", [[each] for each in names])
            for each in names:
                folder = "TestingSet/testingset" if split == "test" else "TrainingSet/trainingset"
                video(root / "rgbt/LasHeR" / folder / each, STREAMS, FILES, range(24))
                layouts.rows(root / f"rgbt/LasHeR/AttriSeqsTxt/{each}.txt", [[1] + [0] * 18])
    elif name == "rgbe/visevent":
        expect(patch, name, sizes={"train": 2, "test": 2})
        streams = {"vis_imgs": "frame{:04d}.bmp", "event_imgs": "frame{:04d}.bmp"}
        for part in ("train", "test"):
            layouts.rows(root / f"rgbe/VisEvent/{part}/{part}list.txt", [[f"{part}1"], [f"{part}2"]])
            for each in (f"{part}1", f"{part}2"):
                video(folder := root / "rgbe/VisEvent" / part / each, streams, {"groundtruth.txt": BOXES}, range(24))
                layouts.rows(folder / "absent_label.txt", [[1]] * 24)
    else:
        expect(patch, name, sizes={"test": 2})
        corners = [[10, 8, 22, 17]] * 24
        for each in ("car3", "dog1"):
            if name == "rgbt/gtot":
                files = {"groundTruth_v.txt": corners, "groundTruth_i.txt": corners}
                video(root / "rgbt/GTOT" / each, {"v": "{:05d}v.png", "i": "{:05d}i.png"}, files, range(24))
            else:
                video(root / "rgbt/RGBT234" / each, STREAMS, FILES, range(24))


RUNS = [{"dataset": name} for name in ("rgbt/lasher", "rgbt/rgbt234", "rgbt/gtot", "rgbe/visevent")]
RUNS += [{"dataset": "rgbt/lasher", "method": method} for method in ("full fine-tuning", "RGB only")]


def spoil(name: str, content: bytes | None):  # type: ignore[no-untyped-def]
    """A file of LasHeR below the data root with another content, or without it."""

    def damage(root: Path) -> Path:
        path = root / "rgbt/LasHeR" / name
        path.unlink() if content is None else path.write_bytes(content)
        return path

    return damage


def overlap(root: Path) -> Path:
    layouts.rows(root / "rgbe/VisEvent/test/testlist.txt", [["test1"], ["train1"]])
    (root / "rgbe/VisEvent/train/train1").rename(path := root / "rgbe/VisEvent/test/train1")
    (root / "rgbe/VisEvent/train/train1").symlink_to(path)
    return path


LASHER, BIKE = {"dataset": "rgbt/lasher"}, "TestingSet/testingset/bike"
FAULTS = {
    "a missing annotation": Fault(LASHER, spoil("TrainingSet/trainingset/man/init.txt", None), "is not there"),
    "a box of three numbers": Fault(LASHER, spoil(f"{BIKE}/visible.txt", b"1,2,3,4\n1,2,3\n"), "line 2"),
    "an unreadable frame": Fault(LASHER, spoil(f"{BIKE}/infrared/i000.png", b"\x89PNG"), "cannot|not|truncated"),
    "an unreadable frame to train on": Fault(
        LASHER, spoil("TrainingSet/trainingset/man/visible/v000.png", b""), "cannot|not|truncated"
    ),
    "splits that overlap": Fault({"dataset": "rgbe/visevent"}, overlap, "two splits"),
    "another set's frames": Fault(LASHER, spoil(f"{BIKE}/visible.txt", b"1,2,3,4\n"), "visible 24"),
}
