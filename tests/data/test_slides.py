"""Slides with grades: PANDA's layout, folds, user folders, stored features, and errors."""

from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from companion import data
from companion.data import slides
from companion.errors import BadParameter, CorruptFile, MissingData
from tests.data.conftest import refused

NAME = "pocket/slides-place"
HEAD = b"image_id,data_provider,isup_grade,gleason_score\n"
SCORES = ["negative", "3+3", "3+4", "4+3", "4+4", "4+5"]


def panda(root: Path, count: int = 30, name: str = NAME) -> Path:
    """A set in PANDA's layout; its pyramids are empty files, which nothing here opens."""
    top = data.find(name).folder(root)
    for folder in ("train_images", "train_label_masks"):
        (top / folder).mkdir(parents=True)
    lines = ["image_id,data_provider,isup_grade,gleason_score"]
    for i in range(count):
        slide, provider = f"{i:04x}ab", ("radboud", "karolinska")[i // 6 % 2]
        (top / "train_images" / f"{slide}.tiff").touch()
        if i % 3:
            (top / "train_label_masks" / f"{slide}_mask.tiff").touch()
        lines.append(f"{slide},{provider},{i % 6},{SCORES[i % 6]}")
    (top / "train.csv").write_text("\n".join(lines) + "\n")
    return top


def test_the_table(tmp_path):
    top = panda(tmp_path)
    items = slides.load(NAME, tmp_path)
    assert len(items) == 30
    files = top / "train_images" / "0007ab.tiff", top / "train_label_masks" / "0007ab_mask.tiff"
    assert items[7] == slides.Item("0007ab", files[0], 1, files[1], "karolinska", "3+3")
    assert items[6].mask is None
    assert len(slides.load(NAME, tmp_path, exclude=["0007ab"])) == 29
    found = data.status(NAME, tmp_path)
    assert (found.state, found.detail) == ("present", "30 slides, 20 with a label mask")
    panda(tmp_path, name="slides/panda")
    refused(MissingData, "30 slides, 10616 are expected", slides.load, "slides/panda", tmp_path)
    assert data.status("slides/panda", tmp_path).state == "incomplete"


def test_isup_of_gleason():
    assert [slides.isup(score) for score in SCORES] == list(range(6))
    assert [slides.isup(s) for s in ("0+0", "3+5", "5+3", "5+4", "5+5")] == [0, 4, 4, 5, 5]
    refused(BadParameter, "4\\+3", slides.isup, "7")


def test_folds(tmp_path):
    top = panda(tmp_path, 120)
    refused(MissingData, "write_folds", slides.load, NAME, tmp_path, "train")
    slides.write_folds(NAME, tmp_path, folds=5, test=0.2, seed=1)
    first = (top / "folds" / "fold-0" / "train.csv").read_text()
    assert first.startswith("slide_id,isup_grade\n")
    tuned = []
    for fold in range(5):
        split = {name: slides.load(NAME, tmp_path, name, fold) for name in slides.SPLITS}
        names = {name: {item.name for item in own} for name, own in split.items()}
        assert len(set.union(*names.values())) == sum(map(len, names.values())) == 120
        for own in split.values():
            assert max(Counter(item.grade for item in own).values()) <= len(own) / 6 * 1.3 + 1
        tuned.append(names["tune"])
        assert {item.name for item in slides.load(NAME, tmp_path, "test", 0)} == names["test"]
    assert len(set.union(*tuned)) == sum(map(len, tuned))  # each slide tunes once
    slides.write_folds(NAME, tmp_path, folds=5, test=0.2, seed=1)
    assert (top / "folds" / "fold-0" / "train.csv").read_text() == first
    slides.write_folds(NAME, tmp_path, folds=5, test=0.2, seed=2)
    assert (top / "folds" / "fold-0" / "train.csv").read_text() != first
    # lists of an earlier parting do not stay next to the new ones: their test slides are trained on now
    slides.write_folds(NAME, tmp_path, folds=3)
    found = {str(f.relative_to(top / "folds")) for f in (top / "folds").rglob("*.csv")}
    assert found == {f"fold-{k}/{split}.csv" for k in range(3) for split in ("train", "tune")}
    refused(MissingData, r"test\.csv.*write_folds\(.*test=0\.2\)", slides.load, NAME, tmp_path, "test")
    items = slides.load(NAME, tmp_path)
    for change in ({"folds": 1}, {"folds": 121}, {"test": 1.0}):
        refused(BadParameter, next(iter(change)), slides.split_folds, items, **change)


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        (b"image_id,isup_grade\na,1\n", CorruptFile, "data_provider"),
        (HEAD + b"0000ab,r,6,3+3\n", CorruptFile, "line 2.*'6'"),
        (HEAD + b"0000ab,r,one,3+3\n", CorruptFile, "'one'"),
        (HEAD + b"0000ab,r,1\n", CorruptFile, "fewer cells"),
        (HEAD + b"0000ab,r,1,3+3\n0000ab,r,1,3+3\n", CorruptFile, "twice"),
        (HEAD + b"../x,r,1,3+3\n", CorruptFile, "not the name"),
        (HEAD + b"ffff,r,1,3+3\n", MissingData, "ffff"),
        (b"\xff\xfe\x00\x01", CorruptFile, "no table"),
    ],
)
def test_bad_tables(tmp_path, text, error, named):
    top = panda(tmp_path)
    (top / "train.csv").write_bytes(text)
    refused(error, named, slides.load, NAME, tmp_path)
    assert data.status(NAME, tmp_path).state == "incomplete"


def test_bad_lists_and_names(tmp_path):
    top = panda(tmp_path)
    slides.write_folds(NAME, tmp_path)
    (top / "folds" / "fold-0" / "tune.csv").write_text("slide_id,isup_grade\nffff,1\n")
    refused(CorruptFile, r"ffff.*train", slides.load, NAME, tmp_path, "tune")
    refused(BadParameter, "tune", slides.load, NAME, tmp_path, "val")


def test_a_folder_of_ones_own(tmp_path):
    for name in ("b/two.svs", "a/one.tiff", "a/three.ndpi", "a/notes.txt", "a/._one.tiff"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / name).touch()
    items = slides.folder(tmp_path / "classes")
    assert [(item.name, item.grade) for item in items] == [("one", 0), ("three", 0), ("two", 1)]

    (tmp_path / "labels.csv").write_text("slide_id,label\ntwo.svs,4\none,0\n")
    items = slides.folder(tmp_path / "classes", tmp_path / "labels.csv")
    assert [(item.name, item.grade) for item in items] == [("one", 0), ("two", 4)]
    (tmp_path / "labels.csv").write_text("slide_id,kind\ntwo,benign\none,tumour\n")
    assert [item.grade for item in slides.folder(tmp_path / "classes", tmp_path / "labels.csv", "kind")] == [1, 0]
    refused(CorruptFile, "label", slides.folder, tmp_path / "classes", tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("slide_id,label\nfour,1\n")
    refused(MissingData, "four", slides.folder, tmp_path / "classes", tmp_path / "labels.csv")
    refused(MissingData, "no such folder", slides.folder, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(MissingData, "no slide", slides.folder, tmp_path / "empty")
    (tmp_path / "classes" / "b" / "one.svs").touch()
    refused(CorruptFile, "twice", slides.folder, tmp_path / "classes")


def stored(path: Path, features: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, np.zeros((len(features), 2), np.int64)
        file["shares"] = np.zeros(len(features))
        file.attrs["settings"] = "{}"


def test_stored_features(tmp_path):
    items = [slides.Item(name, Path(f"{name}.tiff"), grade) for name, grade in (("a", 3), ("b", 0), ("c", 1), ("d", 2))]
    stored(tmp_path / "a.h5", np.ones((2, 4, 3), np.float32))
    torch.save(torch.full((5, 4, 3), 2.0), tmp_path / "b.pt")  # the authors' files
    stored(tmp_path / "c.h5", np.zeros(0, np.float32))
    refused(MissingData, "no region with tissue: c", slides.Features, items, tmp_path)
    refused(MissingData, "no features: d", slides.Features, [items[3]], tmp_path)
    found = slides.Features(items, tmp_path, drop=True)
    assert found.dropped == ["c", "d"] and len(found) == 2
    features, present, grade = found[0]
    assert features.shape == (5, 4, 3) and features[:2].eq(1).all() and not features[2:].any()
    assert present.tolist() == [True, True, False, False, False] and grade == 3
    assert slides.Features(items[:2], tmp_path, longest=3)[1][0].shape == (3, 4, 3)
    authors = slides.Features(items[1:2], tmp_path)  # their files have no settings
    made = authors.made_by
    torch.save(torch.full((5, 4, 3), 2.5), tmp_path / "b.pt")
    assert made.startswith("b.pt") and made != authors.made_by
    stored(tmp_path / "d.h5", np.ones((2, 4, 2), np.float32))
    refused(CorruptFile, r"d\.h5", slides.Features, items, tmp_path, drop=True)
    (tmp_path / "b.pt").write_bytes(b"no")
    refused(CorruptFile, r"b\.pt", slides.Features, items[:2], tmp_path)
