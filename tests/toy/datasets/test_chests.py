"""The pocket chests: reports match the images, the box contains the lesion, splits share nothing; reading."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from companion.errors import BadParameter, CorruptFile, MissingData
from companion.toy.datasets import chests
from tests.data.conftest import refused

SEED = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("clinic")
    chests.write(path, SEED)
    return path


@pytest.fixture(scope="module")
def drawn():
    return chests.chests(400, "val", SEED)


def test_a_report_says_what_is_there_and_one_thing_that_is_not(drawn):
    for chest in drawn:
        sentences = {part.strip() for part in chest.report.split(".") if part.strip()}
        negations = {f"there is no {chest.absent}", f"there is no evidence of {chest.absent}"}
        assert len(sentences) == 2 and f"there is a {chest.side} {chest.finding}" in sentences and sentences & negations
        assert chest.finding != chest.absent and chest.labels.index(1) == chests.FINDINGS.index(chest.finding)
        assert chest.distilled == f"there is {chest.finding} ."
        assert len(chest.report.split()) + len(chest.distilled.split()) < 20  # with a [CLS] in front: the text's length
    for words in (("left", "right"), ("no evidence", "no ")):
        assert all(any(word in chest.report for chest in drawn) for word in words)
    first = np.mean(["no" in chest.report.split()[:3] for chest in drawn])
    assert 0.4 < first < 0.6  # the order of the sentences is not informative


def test_the_lesion_lies_on_the_side_that_the_report_names(drawn):
    """The patient's left is the right of the image."""
    columns = {side: [] for side in chests.SIDES}
    for chest in drawn:
        left, top, right, bottom = chest.box
        assert chest.mask[top:bottom, left:right].sum() == chest.mask.sum() > 4
        assert chest.mask[top].any() and chest.mask[:, left].any() and chest.mask[bottom - 1].any()
        columns[chest.side].append((left + right) / 2)
    assert np.mean(np.array(columns["left"]) > 32) > 0.97 and np.mean(np.array(columns["right"]) < 32) > 0.97


@pytest.mark.parametrize(
    ("finding", "rows"), [("nodule", (4, 60)), ("effusion", (22, 64)), ("pneumothorax", (2, 34)), ("opacity", (0, 64))]
)
def test_each_finding_is_drawn_as_it_is(drawn, finding, rows):
    """Brighter (a pneumothorax: darker) than the same position in the other lung's images, and at its height."""
    own = [chest for chest in drawn if chest.finding == finding]
    lead = []
    for chest in own:
        other = [c for c in drawn if c.side != chest.side][:40]
        here = chest.image[chest.mask].mean()
        lead.append(here - np.mean([c.image[chest.mask].mean() for c in other]))
    assert np.mean(np.array(lead) * (-1 if finding == "pneumothorax" else 1) > 0) > 0.8
    heights = np.sum([chest.mask.any(1) for chest in own], axis=0)
    assert heights[slice(*rows)].sum() > 0.99 * heights.sum()


def test_what_is_read_is_what_was_drawn(root):
    parts = {split: chests.read(root, split) for split in chests.COUNTS}
    assert {split: len(part.images) for split, part in parts.items()} == chests.COUNTS
    drawn = chests.chests(chests.COUNTS["test"], "test", SEED)
    part = parts["test"]
    assert part.images.shape == (800, 1, 64, 64) and part.images.dtype == torch.float32
    assert abs(float(part.images.mean())) < 0.05 and abs(float(part.images.std()) - 1) < 0.05
    for i in (0, 17, 799):
        exact = torch.from_numpy((drawn[i].image / 65535 - chests.MEAN) / chests.STD).float()
        assert torch.allclose(part.images[i, 0], exact, atol=1e-5)
        assert np.array_equal(part.masks[i, 0].numpy() > 0, drawn[i].mask)
        assert part.boxes[i].tolist() == list(drawn[i].box) and part.labels[i].tolist() == drawn[i].labels
        assert part.reports[i] == drawn[i].report and part.distilled[i] == drawn[i].distilled


def test_the_vocabulary_is_that_of_the_reports(root):
    tokenizer = Tokenizer.from_file(str(root / "pocket" / "chests" / "wordpiece.json"))
    assert [tokenizer.token_to_id(word) for word in chests.SPECIAL] == [0, 1, 2, 3, 4]
    for split in chests.COUNTS:
        part = chests.read(root, split)
        for text in {*part.reports, *part.distilled}:
            assert tokenizer.encode(f"[CLS] {text}").tokens == ["[CLS]", *text.split()]
    assert tokenizer.encode("there is a fracture").tokens == ["there", "is", "a", "[UNK]"]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(chests, "COUNTS", {"train": 3, "val": 2, "test": 2})
    refused(MissingData, r"chests\.write", chests.read, tmp_path, "train")
    folder = chests.write(tmp_path, SEED)
    refused(BadParameter, "'val'", chests.read, tmp_path, "holdout")
    picture = folder / "images" / "000002.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    refused(CorruptFile, r"000002\.png", chests.read, tmp_path, "train")
    picture.write_bytes(whole)
    (folder / "train_list.txt").write_text("images/000001.png 1 0\n")
    refused(CorruptFile, r"train_list\.txt", chests.read, tmp_path, "train")
