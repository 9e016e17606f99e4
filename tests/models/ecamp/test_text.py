"""ECAMP's text preprocessing: words, splicing, masking, weights, pairs; recorded draws where the authors' code was
run."""

import pytest
import torch

from companion.errors import CorruptFile
from companion.models.ecamp import text
from companion.models.ecamp.text import ReportPairs, Vocabulary
from tests.models.common import refuses

REPORTS = [
    "There is a small right pleural effusion. There is no evidence of pneumothorax.",
    "The lungs are clear. There is no edema. Heart size is normal.",
    "Mild cardiomegaly with moderate edema. No nodule.",
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train(REPORTS * 4, 200)


@pytest.mark.parametrize(("kind", "draw", "hidden"), [
    ("released", 0.72, ["effusion"]),
    ("released", 0.69, ["there", "is", "small", "effusion"]),
    ("intended", 0.99, ["is", "small"]),
])  # fmt: skip
def test_what_is_masked(kind, draw, hidden):
    """The two words before an entity are its descriptors."""
    known = Vocabulary.from_words(["there", "is", "small", "effusion"])
    ids = known.encode("there is small effusion", 8)
    masked = text.mask(ids, known, lambda: draw, kind) == known.mask
    assert known.words(ids[masked]) == hidden


def test_a_tokenizer_is_learned_stored_and_read(vocabulary, tmp_path):
    vocabulary.tokenizer.save(str(tmp_path / "words.json"))
    again = Vocabulary.read(tmp_path / "words.json")
    assert again.pieces == vocabulary.pieces and again.entities == vocabulary.entities
    assert set(again.entities.values()) == {"effusion", "pneumothorax", "edema", "cardiomegaly", "nodule"}
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "none.json"):
        refuses((lambda name=name: Vocabulary.read(tmp_path / name), name), error=CorruptFile)


def pairs(vocabulary, **options):
    images = torch.randn(3, 3, 64, 64)
    return ReportPairs(images, REPORTS, vocabulary, patches=64, length=32, window=6, **options)


def test_pairs_draw_anew_and_from_torch_alone(vocabulary):
    data, found = pairs(vocabulary), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(data[0])
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0].noise, found[2].noise) and not torch.equal(found[0].ids, found[2].ids)
    plain = pairs(vocabulary, rebalance=False)[0]
    assert torch.equal(plain.weights, torch.ones(32))
    for share, spliced in ((0, False), (1, True)):
        labels = pairs(vocabulary, statements=["There is edema."] * 3, splice_share=share)[0].labels
        assert torch.equal(labels, plain.labels) != spliced
    assert pairs(vocabulary, windows=[(0, 2), (1, 1), (2, 2)])[0].window.tolist() == [0, 2]


def test_a_large_set_of_reports_does_not_fill_the_memory(vocabulary):
    reports = [f"There is edema {i}." for i in range(2000)]
    data = ReportPairs(
        torch.zeros(1, 3, 64, 64).expand(2000, -1, -1, -1), reports, vocabulary, patches=64, length=8, window=6
    )
    for item in data:
        assert len(item.ids) == 8
    assert text._read.cache_info().currsize < 2000


def test_texts_of_other_images_are_refused(vocabulary):
    refuses(
        (lambda: pairs(vocabulary, masking="all")[0], "intended"),
        (lambda: pairs(vocabulary, statements=["X."]), "statements"),
        (lambda: pairs(vocabulary, windows=[(0, 0)]), "windows"),
        (lambda: pairs(vocabulary, windows=[(0, 3)] * 3), "0 to 2"),
        (lambda: Vocabulary.from_words({"a": 0, "[UNK]": 1}), r"\[CLS\]"),
    )


def test_texts_become_ids():
    known = Vocabulary.from_words(["effusion", "3", "cm"])
    assert known.words(known.encode("Éffusion 3cm.", 9)) == ["[CLS]", "effusion", "3", "cm", "."]
    assert known.words(known.encode("effusion " * 20, 5)) == ["[CLS]"] + ["effusion"] * 4
    assert known.words(known.encode("zebra", 5)) == ["[CLS]", "[UNK]"]
