"""Slides with grades: PANDA's layout, folds, user folders, stored features, and errors."""

import dataclasses
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from companion import data
from companion.data import slides
from companion.errors import BadParameter, CorruptFile, MissingData
from tests.data.conftest import expect, refused, unreadable

NAME = "slides/panda"
SCORES = ["negative", "3+3", "3+4", "4+3", "4+4", "4+5"]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    expect(monkeypatch, NAME, sizes={})


def panda(root: Path, count: int = 30) -> Path:
    """A set in PANDA's layout; its pyramids are empty files, which nothing here opens."""
    top = data.find(NAME).folder(root)
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


def test_the_table(tmp_path, monkeypatch):
    top = panda(tmp_path)
    items = slides.load(NAME, tmp_path)
    files = top / "train_images" / "0007ab.tiff", top / "train_label_masks" / "0007ab_mask.tiff"
    assert items[7] == slides.Item("0007ab", files[0], 1, "karolinska")
    assert len(items) == 30
    with monkeypatch.context() as patch:
        expect(patch, NAME, sizes={"train": 10616})
        refused(MissingData, "30 slides .*10,616", slides.load, NAME, tmp_path)
    head = "image_id,data_provider,isup_grade,gleason_score\n"
    bad = {head + "0000ab,r,1,3+3\n" * 2: "line 3", f"{head}../x,r,1,3+3\n": "../x"}
    unreadable(top / "train.csv", lambda: slides.load(NAME, tmp_path), bad)
    (top / "train.csv").write_text(f"{head}ffff,r,1,3+3\n")
    refused(MissingData, "ffff", slides.load, NAME, tmp_path)


def test_folds(tmp_path):
    top = panda(tmp_path, 120)

    def written(**options) -> dict[str, str]:
        slides.write_folds(NAME, tmp_path, **options)
        return {str(f.relative_to(top / "folds")): f.read_text() for f in (top / "folds").rglob("*.csv")}

    first, tuned = written(folds=5, test=0.2, seed=1), []
    for fold in range(5):
        split = {name: slides.load(NAME, tmp_path, name, fold) for name in slides.SPLITS}
        assert len({item.name for own in split.values() for item in own}) == sum(map(len, split.values())) == 120
        for own in split.values():
            assert max(Counter(item.grade for item in own).values()) <= len(own) / 6 * 1.3 + 1
        assert split["test"] == slides.load(NAME, tmp_path, "test", 0) and len(split["test"]) == 24
        tuned += [item.name for item in split["tune"]]
    assert len(set(tuned)) == len(tuned) == 96  # each slide tunes once
    assert written(folds=5, test=0.2, seed=1) == first != written(folds=5, test=0.2, seed=2)
    # lists of an earlier partition do not stay next to the new ones: their test slides are trained on now
    assert set(written(folds=3)) == {f"fold-{k}/{split}.csv" for k in range(3) for split in ("train", "tune")}
    for change in ({"folds": 1}, {"folds": 121}, {"test": 1.0}):
        refused(BadParameter, next(iter(change)), slides.split_folds, slides.load(NAME, tmp_path), **change)


def test_own_folder(tmp_path):
    """Tables of classes: see tests/test_odd_files.py."""
    for name in ("b/two.svs", "a/one.tiff", "a/three.ndpi", "a/notes.txt", "a/._one.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found() -> list[tuple[str, int]]:
        return [(item.name, item.grade) for item in slides.own(tmp_path)["train"]]

    assert found() == [("one", 0), ("three", 0), ("two", 1)]
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label\ntwo.svs,4\none,0\n")
    assert found() == [("one", 0), ("two", 4)]
    labels.write_text("slide_id,label\nfour,1\n")
    refused(MissingData, "four", found)
    (tmp_path / "b" / "one.svs").touch()
    refused(CorruptFile, "one.svs", found)
    refused(MissingData, "nowhere", slides.own, tmp_path / "nowhere")
    refused(CorruptFile, "0001ab_mask.tiff", slides.own, panda(tmp_path / "copy"))  # its masks are no class


def test_all_slides_of_a_patient_are_in_one_part(tmp_path):
    def items(*lines: str) -> list[slides.Item]:
        for line in lines:
            (tmp_path / f"{line.split(',')[0]}.svs").touch()
        (tmp_path / "labels.csv").write_text("\n".join(["slide_id,label,patient", *lines]))
        return slides.own(tmp_path)["train"]

    mine = items(*(f"s{i:02d},{i // 2 % 3},p{i // 3}" for i in range(48)))  # three slides each, of one grade or two
    found, tuned = slides.split_folds(mine, 3, test=0.25, seed=1), []
    for fold in found:
        patients = [{item.patient for item in fold[name]} for name in slides.SPLITS]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 16 and sum(map(len, fold.values())) == 48
        assert Counter(item.grade for item in fold["test"]) == {0: 4, 1: 4, 2: 4}  # a quarter, of every grade
        tuned += fold["tune"]
    assert len(set(tuned)) == len(tuned) == 36
    some = [dataclasses.replace(item, patient=item.patient if i < 9 else "") for i, item in enumerate(mine)]
    sizes = [len(fold["tune"]) for fold in slides.split_folds(some, 4)]
    assert max(sizes) - min(sizes) <= 3  # slides of unknown patients are not those of one patient
    few = items(*(f"s{i:02d},{i % 2},{'ab'[i // 24]}" for i in range(48)))
    refused(BadParameter, "2 patients", slides.split_folds, few, 3)
    refused(CorruptFile, "line 3: the slide 's01' has no patient", items, "s00,1,a", "s01,0, ")


def test_spacings_of_single_slides(tmp_path):
    table = tmp_path / "spacings.csv"
    table.write_text("slide_id,mpp\na.svs,0.25\nb.1,0.5\n")
    assert slides.spacings(table, {"a", "b.1", "c"}) == {"a": 0.25, "b.1": 0.5}
    bad = {"a,x": "'x'", "a,0": "'0'", "a,nan": "'nan'", "d,1": "'d' is none", "a,1\na.svs,1": "twice"}
    bad = {f"slide_id,mpp\n{row}\n": value for row, value in bad.items()}
    unreadable(table, lambda: slides.spacings(table, {"a", "b"}), bad)


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
    for item in items[2:]:
        refused(MissingData, f": {item.name}", slides.Features, [item], tmp_path)
    found = slides.Features(items, tmp_path, drop=True)
    assert found.dropped == ["c", "d"] and len(found) == 2
    features, present, grade = found[0]
    assert features.shape == (5, 4, 3) and features[:2].eq(1).all() and not features[2:].any()
    assert present.tolist() == [True, True, False, False, False] and grade == 3
    assert slides.Features(items[:2], tmp_path, longest=3)[1][0].shape == (3, 4, 3)
    assert found.collate([found[0]])[0].shape == (1, 2, 4, 3)
    part = found.of(items[::-1][1:])
    assert part.items == items[1::-1] and part.dropped == ["c"] and part[1][0].shape[0] == 5 and found.dropped
    torch.save(torch.ones(3, 4, 3), tmp_path / "c.pt", _use_new_zipfile_serialization=False)  # of old PyTorch
    (tmp_path / "c.h5").unlink()
    assert slides.Features(items[1:3], tmp_path)[1][0][:3].eq(1).all()
    stored(tmp_path / "d.h5", np.ones((2, 4, 2), np.float32))
    refused(CorruptFile, r"d\.h5", slides.Features, items, tmp_path, drop=True)
