"""H-ViT: the folds of PANDA on stored features, Local and Global, and a folder of slides of one's own."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from companion.data import find, slides
from tests.data.conftest import expect
from tests.data.test_slides import panda
from tests.rehearsal.common import Fault


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """48 slides, which are empty files, their grades, and features of one to three regions of 4 x 4 patches."""
    if name == "folder":
        for i in range(48):
            (root / f"s{i}.tiff").touch()
        rows = [f"s{i},{i % 6}" for i in range(48)]
        (root / "labels.csv").write_text("\n".join(["slide_id,label", *rows]) + "\n")
        names = [f"s{i}" for i in range(48)]
    else:
        expect(patch, name, sizes={})
        panda(root, 48)
        slides.write_folds(name, root, 2, test=0.25)
        names = [item.name for item in slides.load(name, root)]
    (root / "features").mkdir()
    for i, slide in enumerate(names):
        with h5py.File(root / "features" / f"{slide}.h5", "w") as file:
            file["features"] = np.random.default_rng(i).normal(size=(1 + i % 3, 16, 384)).astype("float32")
            file["coords"], file["shares"] = np.zeros((1 + i % 3, 2), "int64"), np.ones(1 + i % 3)
            file.attrs["settings"] = "{}"


PANDA = {"dataset": "slides/panda", "method": "Local", "region": 1024, "folds": 2}
RUNS = [PANDA, PANDA | {"method": "Global"}, PANDA | {"dataset": "folder"}]


def spoil(name: str, content: str | None):  # type: ignore[no-untyped-def]
    """A file of PANDA with another content, or without it."""

    def damage(root: Path) -> Path:
        path = find("slides/panda").folder(root) / name
        path.unlink() if content is None else path.write_text(content)
        return path

    return damage


def features(root: Path) -> Path:
    (path := root / "features/0000ab.h5").write_text("no features")
    return path


def overlap(root: Path) -> Path:
    """A slide that fold 0 trains on is in its list of tests too."""
    train, test = (find("slides/panda").folder(root) / f"folds/fold-0/{name}.csv" for name in ("train", "test"))
    row = train.read_text().splitlines()[1]
    test.write_text(test.read_text() + row + "\n")
    return Path(row.split(",")[0])


ROW = "image_id,data_provider,isup_grade,gleason_score\n0000ab,radboud,6,3+3\n"


def hole(root: Path) -> Path:
    (path := find("slides/panda").folder(root) / "train_images/0000ab.tiff").unlink()
    return path


COPIES = {"a hole": Fault(PANDA, hole, "1 of 48 slides of train.csv .*0000ab.tiff")}
FAULTS = {
    "a missing list": Fault(PANDA, spoil("folds/fold-0/test.csv", None), "write_folds"),
    "a grade out of range": Fault(PANDA, spoil("train.csv", ROW), "'6'"),
    "unreadable features": Fault(PANDA, features, "0000ab"),
    "splits that overlap": Fault(PANDA, overlap, "disjoint"),
    "the table of another set": Fault(PANDA, spoil("train.csv", "slide_id,label\n1,2\n"), "image_id"),
}
