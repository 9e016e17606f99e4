"""BAT: training on LasHeR or VisEvent, tests on them, on RGBT234 and on GTOT."""

import shutil
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


def without_training(root: Path) -> Path:
    """LasHeR's test set alone."""
    shutil.rmtree(path := root / "rgbt/LasHeR/TrainingSet")
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
    "no videos to train on": Fault(LASHER, without_training, r"train: there is no folder .*TrainingSet"),
    "another set's frames": Fault(LASHER, spoil(f"{BIKE}/visible.txt", b"1,2,3,4\n"), "visible 24"),
}


def moved(name: str, there: str):  # type: ignore[no-untyped-def]
    """A folder or file below the data root in another place."""

    def damage(root: Path) -> Path:
        shutil.move(root / name, aside := root / "aside")
        (root / there).parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(aside, root / there))

    return damage


def doubled(root: Path) -> Path:
    path = root / "rgbt/LasHeR" / BIKE / "infrared/i003.png"
    return Path(shutil.copy(path, path.with_name("i003 (1).png")))


def gone(name: str):  # type: ignore[no-untyped-def]
    def damage(root: Path) -> Path:
        (root / name).unlink()
        return root / name

    return damage


RGBT234, GTOT, VISEVENT = {"dataset": "rgbt/rgbt234"}, {"dataset": "rgbt/gtot"}, {"dataset": "rgbe/visevent"}
COPIES = {
    "RGBT234 as unpacked": Fault(RGBT234, moved("rgbt/RGBT234", "rgbt/RGBT234/RGB-T234"), ""),
    "GTOT as unpacked": Fault(GTOT, moved("rgbt/GTOT", "GTOT/GTOT"), ""),
    "streams in other letters": Fault(RGBT234, moved("rgbt/RGBT234/car3/visible", "rgbt/RGBT234/car3/Visible"), ""),
    "LasHeR's test set alone": Fault(LASHER, without_training, "there is no folder .*TrainingSet"),
    "a missing frame": Fault(
        LASHER, gone(f"rgbt/LasHeR/{BIKE}/infrared/i005.png"), r"i006\.png: .* a frame is missing"
    ),
    "a frame that is there twice": Fault(LASHER, doubled, r"i003 \(1\)\.png: .* there twice"),
    "RGBT234 without a stream's boxes": Fault(
        RGBT234, gone("rgbt/RGBT234/dog1/infrared.txt"), r"dog1/infrared\.txt is"
    ),
    "GTOT without a stream's boxes": Fault(
        GTOT, gone("rgbt/GTOT/dog1/groundTruth_i.txt"), r"groundTruth_i\.txt is not"
    ),
    "a video fewer": Fault(
        GTOT, lambda root: shutil.rmtree(root / "rgbt/GTOT/dog1"), "1 sequences in .*, 2 are expected"
    ),
    "VisEvent's train in its test": Fault(VISEVENT, overlap, r"train1 is in two splits: .*list\.txt"),
}
