"""ECAMP's text preprocessing: words, splicing, masking, weights, pairs; recorded draws where the authors' code was
run."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from companion.errors import CorruptFile
from companion.evaluation import parity
from companion.models.ecamp import model as ecamp
from companion.models.ecamp import text
from companion.models.ecamp.text import Pairs, Vocabulary
from tests.models.common import refuses

REPORTS = [
    "There is a small right pleural effusion. There is no evidence of pneumothorax.",
    "The lungs are clear. There is no edema. Heart size is normal.",
    "Mild cardiomegaly with moderate edema. No nodule.",
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train(REPORTS * 4, 200)


@pytest.fixture(scope="module")
def case():
    return next(c for c in parity.cases("ecamp") if c.name == "text_masking")


def uniform(seed):
    return np.random.default_rng(seed).random


def test_masking_as_recorded(case):
    """Every draw is asked for, none beyond; descriptors in the order in which they are found."""
    known = Vocabulary.from_words(case.facts["inputs"]["vocabulary"])
    for example in case.facts["examples"]:
        ids, draws = np.array(example["ids"]), iter(example["draws_used"])
        assert text.mask(ids, known, draws.__next__).tolist() == example["masked_ids"]
        assert next(draws, None) is None
        assert text.descriptors(ids, known) == example["descriptor_positions"]
        assert known.words(ids) == example["tokens"]


def test_splicing_as_recorded(case):
    for example in case.facts["insertion_examples"]:
        draws = iter(example["draws"])
        spliced = text.splice(example["report"], example["llm_output"], draws.__next__)
        assert "[CLS] " + spliced == example["sentence_given_to_tokenizer"]
        assert next(draws, None) is None


def test_weights_sum_to_the_length(vocabulary):
    """Claim 1: re-balancing moves weight and creates none, whatever the text."""
    rng = np.random.default_rng(0)
    there = vocabulary.encode("there is no evidence of", 8)[1:6]
    for _ in range(300):
        ids = rng.integers(4, len(vocabulary), 64)
        for at in rng.integers(1, 56, rng.integers(0, 4)):
            ids[at : at + 5] = there
        ids[rng.integers(8, 65) :] = vocabulary.pad
        w = text.weights(ids, vocabulary)
        assert w.sum() == pytest.approx(64, rel=1e-5) and (w > 0).all()


def test_weights_move_from_boilerplate_to_descriptors(vocabulary):
    ids = vocabulary.encode("there is no evidence of mass. there is a small nodule.", 20)
    found, w = text.descriptors(ids, vocabulary), text.weights(ids, vocabulary)
    words = vocabulary.words(ids)
    assert "small" in [words[i] for i in found]
    assert w[words.index("small")] > 1 and w[words.index("there")] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("kind", "entity", "descriptor", "other"),
    [("released", 0.75, 0.70, 0.70), ("intended", 0.75, 1.0, 0.70), ("mrm", 0.5, 0.5, 0.5)],
)
def test_masking_rates(vocabulary, kind, entity, descriptor, other):
    """Claim 5: entity 0.75, descriptor 0.70 as released and always as intended, other words 0.70; half of MRM's."""
    draw, plain, ids = uniform(0), vocabulary.encode("the lungs are clear", 16), vocabulary.encode(REPORTS[0], 32)

    def words(ids):
        return [i for i, w in enumerate(ids) if i and w and int(w) not in vocabulary.continues]

    entities = [i for i, word in enumerate(ids) if int(word) in vocabulary.entities]
    described = [i for i in text.descriptors(ids, vocabulary) if int(ids[i]) not in vocabulary.continues]
    others = [i for i in words(ids) if i < 31 and ids[i] > 3 and i not in entities + described]
    hidden = np.mean([text.mask(ids, vocabulary, draw, kind) == 3 for _ in range(4000)], 0)
    for places, share in ((entities, entity), (described, descriptor), (others, other)):
        assert places and hidden[places] == pytest.approx(share, abs=0.03)
    assert hidden[0] == 0 and not hidden[ids == 0].any()
    hidden = np.mean([text.mask(plain, vocabulary, draw, kind) == 3 for _ in range(4000)], 0)
    assert hidden[words(plain)] == pytest.approx(0.5 if kind == "mrm" else 0.75, abs=0.03)


def test_texts_become_ids_and_pieces_go_with_their_word():
    known = Vocabulary.from_words(["effusion", "3", "cm"])
    assert known.words(known.encode("Éffusion 3cm.", 9)) == ["[CLS]", "effusion", "3", "cm", "."]
    assert known.words(known.encode("effusion " * 20, 5)) == ["[CLS]"] + ["effusion"] * 4
    assert known.words(known.encode("zebra", 5)) == ["[CLS]", "[UNK]"]
    known = Vocabulary.from_words(["cardio", "##graph", "##ic", "film"])
    ids = known.encode("cardiographic film", 8)
    assert known.words(ids) == ["[CLS]", "cardio", "##graph", "##ic", "film"]
    for draws in itertools.product((0.1, 0.9), repeat=2):
        hidden = text.mask(ids, known, iter(draws).__next__) == known.mask
        assert hidden[1:5].tolist() == [draws[0] < 0.75] * 3 + [draws[1] < 0.75]


def test_entities():
    """44 in the list; "COPD" is upper case, and the released vocabulary has no "aerate" and no "hyperinflate"."""
    assert len(text.ENTITIES) == len(set(text.ENTITIES)) == 44
    pieces = {word.lower() for word in text.ENTITIES} - {"aerate", "hyperinflate"}
    assert len(Vocabulary.from_words(pieces).entities) == 41
    known = Vocabulary.from_words(["opacity", "opacities"])
    assert [known.pieces[i] for i in known.entities] == ["opacity"]  # plurals do not match


def test_a_tokenizer_is_learned_stored_and_read(vocabulary, tmp_path):
    vocabulary.tokenizer.save(str(tmp_path / "words.json"))
    again = Vocabulary.read(tmp_path / "words.json")
    for report in REPORTS:
        assert (again.encode(report, 32) == vocabulary.encode(report, 32)).all()
    assert again.entities == vocabulary.entities and again.templates == vocabulary.templates
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "none.json"):
        with pytest.raises(CorruptFile, match=name):
            Vocabulary.read(tmp_path / name)


def pairs(vocabulary, **options):
    images = torch.randn(3, 3, 64, 64)
    return Pairs(images, REPORTS, vocabulary, patches=64, length=32, window=6, **options)


def test_pairs_feed_the_model(vocabulary):
    statements = ["There is effusion.", "There is no edema.", "There is cardiomegaly."]
    data = pairs(vocabulary, statements=statements)
    batch = default_collate([data[i] for i in range(3)])
    assert isinstance(batch, ecamp.Batch)
    assert batch.images.shape == (3, 3, 64, 64) and batch.noise.shape == (3, 64)
    assert batch.window.tolist() == [[1, 1]] * 3
    assert torch.equal(batch.ids[batch.ids != 3], batch.labels[batch.ids != 3])
    torch.testing.assert_close(batch.weights.sum(1), torch.full((3,), 32.0))
    losses = ecamp.build("pocket", words=len(vocabulary), length=32)(batch)
    assert torch.isfinite(losses.total)


def test_pairs_draw_anew_and_from_torch_alone(vocabulary):
    data = pairs(vocabulary)
    torch.manual_seed(1)
    first, second = data[0], data[0]
    torch.manual_seed(1)
    again = data[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.noise, second.noise) and not torch.equal(first.ids, second.ids)
    plain = pairs(vocabulary, rebalance=False, masking="mrm")[0]
    assert torch.equal(plain.weights, torch.ones(32))
    never = pairs(vocabulary, statements=["X."] * 3, splice_share=0)[0]
    assert torch.equal(never.labels, plain.labels)
    assert pairs(vocabulary, windows=[(0, 2), (1, 1), (2, 2)])[0].window.tolist() == [0, 2]


def test_bad_parameters(vocabulary):
    refuses(
        (lambda: pairs(vocabulary, masking="all"), "intended"),
        (lambda: pairs(vocabulary, statements=["X."]), "3, one for each"),
        (lambda: pairs(vocabulary, windows=[(0, 0)]), "3, one for each"),
        (lambda: pairs(vocabulary, splice_share=2), "0 to 1"),
        (lambda: text.mask(vocabulary.encode("x", 4), vocabulary, uniform(0), "half"), "released"),
        (lambda: Vocabulary.from_words({"a": 0, "[UNK]": 1}), r"\[CLS\]"),
    )
