"""ECAMP's text preprocessing, in the data loader: tokens, splicing, masking, and the weights of words (section 3.8).

    report + statements of an LLM --splice--> text --tokenizer--> labels --mask--> ids,   labels --weights--> weights

An *entity* is a word that names a finding or a location; its *descriptors* are the one or two words before it (side,
size, "no"). Most of a report is boiler-plate ("there is no evidence of ..."): its loss has a weight of 0.05, and the
removed weight is added to the descriptors.

All randomness comes from `draw`, a function without arguments that returns a uniform number: `ReportPairs` draws from
torch's generator, which `fit` seeds by item, and tests replay recorded numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data import Parts
from ...errors import BadParameter, CorruptFile, check_choice, extra
from .model import Batch

with extra("xrays"):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

MASKINGS = ("released", "intended")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[MASK]", "[SEP]")
TEMPLATES = ("there is no evidence of", "there is no")  # the first that matches
BOILERPLATE = 0.05  # weight of a template's words
CACHED = 1 << 10  # texts, 3 kB each; more than synthetic reports have, while real ones hardly recur
SPLICED = 0.8  # fraction of reports with the LLM's statements
# masking probabilities of an entity, another word, a word of a text without entities
ENTITY, OTHER, NO_ENTITY = 0.75, 0.7, 0.75

# The released list. Matching is by whole word piece in lower case, so that plurals, "COPD" and words that the
# vocabulary splits ("aerate", "hyperinflate") never match.
_ENTITIES = """
    abnormality abscess aerate aorta atelectasis bronchiectasis calcification cardiomediastinal cardiomegaly catheter
    chf collapse congestion consolidation contour COPD deformity dilation distention edema effusion embolism emphysema
    engorgement fibrosis fracture granuloma hernia hilar hyperinflate hemidiaphragm infiltrate mass nodule obscure
    opacity perihilar pneumonia pneumothorax sarcoidosis silhouette thickening tuberculosis vasculature
"""
ENTITIES = tuple(_ENTITIES.split())

Draw = Callable[[], float]


class Vocabulary:
    """A tokenizer, with the ids of special tokens, continuation pieces, entities and templates.

    Args:
        tokenizer: WordPiece of the `tokenizers` library: `train`, `read`, or `from_words` make one.

    Attributes:
        entities: id -> word, of the entities that are a piece of the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, ids = tokenizer, tokenizer.get_vocab()
        if missing := [name for name in SPECIAL[:4] if name not in ids]:
            raise BadParameter("tokenizer", missing, "a vocabulary with [PAD], [UNK], [CLS] and [MASK]")
        self.pad, self.mask, self.stop = ids["[PAD]"], ids["[MASK]"], ids.get(".", -1)
        self.pieces = [""] * (max(ids.values()) + 1)
        for piece, i in ids.items():
            self.pieces[i] = piece
        self.continues = frozenset(i for piece, i in ids.items() if piece.startswith("##"))
        self.entities = {ids[word]: word for word in ENTITIES if word in ids}
        templates = [[ids.get(word, -1) for word in template.split()] for template in TEMPLATES]
        self.templates = [template for template in templates if -1 not in template]

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """The vocabulary of a file of the `tokenizers` library, such as MRM's `mimic_wordpiece.json`.

        Raises `CorruptFile`: it is missing, or another kind of file.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise CorruptFile(path, f"not a tokenizer's JSON ({error})") from error
        return cls(tokenizer)

    @classmethod
    def from_words(cls, words: Mapping[str, int] | Iterable[str]) -> Vocabulary:
        """The vocabulary of pieces and their ids; or of words, with the special tokens and "." put in front."""
        if not isinstance(words, Mapping):
            words = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, ".", *words]))}
        tokenizer = _wordpiece(vocab=dict(words))
        tokenizer.add_special_tokens([name for name in SPECIAL if name in words])
        return cls(tokenizer)

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 30000) -> Vocabulary:
        """A vocabulary of at most `size` pieces, learned from reports. One learned on MIMIC must not be shipped."""
        tokenizer = _wordpiece()
        trainer = WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, length: int) -> np.ndarray:
        """Ids (length,) of "[CLS] " + text, truncated or padded; without [SEP]."""
        ids = self.tokenizer.encode("[CLS] " + text).ids[:length]
        return np.array(ids + [self.pad] * (length - len(ids)), dtype=np.int64)

    def words(self, ids: Iterable[int]) -> list[str]:
        """The pieces of ids, without padding."""
        return [self.pieces[int(i)] for i in ids if int(i) != self.pad]


def _wordpiece(**vocabulary: Any) -> Tokenizer:
    """WordPiece as in the released file: lower case, NFKD, no accents; split at spaces, punctuation and digits."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]", **vocabulary))
    steps = [normalizers.Lowercase(), normalizers.NFKD(), normalizers.StripAccents()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    return tokenizer


def splice(report: str, statements: str, draw: Draw, share: float = SPLICED) -> str:
    """The report with the LLM's statements between two of its sentences, with probability `share`; or without them.

    Draws one number, and with an insertion a second one for its position. As released, two full stops become one, also
    those of the report itself.
    """
    if draw() < share:
        pieces = report.split(".")
        position = int(draw() * (len(pieces) + 1))
        before, after = ("".join(piece + "." for piece in part) for part in (pieces[:position], pieces[position:]))
        report = before + statements + after
    return report.replace("..", ".")


def _positions(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> Iterable[int]:
    """Those that may be masked: after [CLS], before the first padding and the last position."""
    return itertools.takewhile(lambda i: ids[i] != vocabulary.pad, range(1, len(ids) - 1))


def descriptors(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> list[int]:
    """Positions of the descriptors, in the order of the entities: the two before each entity, without full stops.

    As released, an entity at the last position or after the first padding is ignored.
    """
    entities = (i for i in _positions(ids, vocabulary) if int(ids[i]) in vocabulary.entities)
    before = (j for i in entities for j in (i - 1, i - 2) if j > 0 and ids[j] != vocabulary.stop)
    return list(dict.fromkeys(before))


def mask(ids: np.ndarray, vocabulary: Vocabulary, draw: Draw, kind: str = "released") -> np.ndarray:
    """The text (L,) with [MASK] for hidden words.

    "released": entities are masked with probability 0.75, all others, descriptors too, with 0.7; in a text without
    entities all with 0.75. The authors' code intends to mask descriptors but never does: it tests the entity, not the
    descriptor. "intended": as "released", and every descriptor, as in their figure.

    Continuation pieces ("##...") are masked with the piece before them. Draws one number for every other word, and then
    one for each entity.

    Raises `BadParameter`: another kind.
    """
    check_choice("masking", kind, MASKINGS)
    hidden, entities = ids.copy(), []
    share = OTHER if any(int(i) in vocabulary.entities for i in ids[1:-1]) else NO_ENTITY
    for i in _positions(ids, vocabulary):
        word = int(ids[i])
        if word in vocabulary.continues:
            if hidden[i - 1] == vocabulary.mask:
                hidden[i] = vocabulary.mask
            continue
        masked = draw() < share
        if word in vocabulary.entities:
            entities.append(i)
        elif masked:
            hidden[i] = vocabulary.mask
    for i in entities:
        if draw() < ENTITY:
            hidden[i] = vocabulary.mask
    if kind == "intended":
        hidden[descriptors(ids, vocabulary)] = vocabulary.mask
    return hidden


def boilerplate(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """(L,) True on the words of templates, found from left to right, longer ones first, without overlap."""
    words, template, i = list(map(int, ids)), np.zeros(len(ids), bool), 0
    while i < len(words) - 4:
        length = next((len(t) for t in vocabulary.templates if words[i : i + len(t)] == t), 0)
        template[i : i + length] = True
        i += length or 1
    return template


def weights(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The weight of each position (L,) of a text in the loss, float32; the weights of any text sum to L.

    Words of templates have 0.05. The removed weight is added to the descriptors, in proportion to their own; in a
    text without descriptors, to all positions.
    """
    length, template, described = len(ids), boilerplate(ids, vocabulary), descriptors(ids, vocabulary)
    w = np.where(template, BOILERPLATE, 1.0)
    d, c, o = int(template.sum()), len(described), int(template[described].sum())
    lost = 1 - BOILERPLATE
    if d and c:
        w[described] *= (lost * (d - o) + c) / (c - lost * o)
    elif d:
        w *= length / (length - lost * d)
    return w.astype(np.float32)


@functools.lru_cache(CACHED)
def _read(text: str, length: int, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights (length,) of a text; cached, because synthetic texts recur."""
    ids = vocabulary.encode(text, length)
    return ids, weights(ids, vocabulary)


class ReportPairs(Parts, Dataset):
    """Image-report pairs for pre-training, with all random numbers: items are `model.Batch` without the B.

    Args:
        images: item i is an image (3, 2 S, 2 S), normalised; alone or first in a tuple.
        reports: a text for each image.
        vocabulary: see `Vocabulary`.
        patches: N of the encoder.
        length: L.
        statements: an LLM's statements on each report (see `distil`); None: no distillation.
        splice_share: probability that they are inserted.
        masking: see `mask`.
        rebalance: False: all words have the same weight.
        window: side of the super-resolution window in patches.
        windows: its corner for each image, (row, column) in patches; None: in the middle. The authors' file of them was
            never released; as released, they refer to the whole image and are not moved with the crop.

    Raises `BadParameter`: other numbers of texts or corners than of images, or a window beyond the image.
    """

    each = ("images", "reports", "statements", "windows")

    def __init__(
        self,
        images: Sequence[Tensor] | Dataset,
        reports: Sequence[str],
        vocabulary: Vocabulary,
        *,
        patches: int = 196,
        length: int = 256,
        statements: Sequence[str] | None = None,
        splice_share: float = SPLICED,
        masking: str = "released",
        rebalance: bool = True,
        window: int = 12,
        windows: Sequence[Sequence[int]] | None = None,
    ):
        for name, values in (("reports", reports), ("statements", statements), ("windows", windows)):
            if values is not None and len(values) != len(images):
                raise BadParameter(name, len(values), f"{len(images)}, one for each image")
        self.images, self.reports, self.statements, self.vocabulary = images, reports, statements, vocabulary
        self.patches, self.length, self.splice_share = patches, length, splice_share
        self.masking, self.rebalance = masking, rebalance
        last = math.isqrt(patches) - window
        self.windows = torch.as_tensor([(last // 2, last // 2)] * len(images) if windows is None else windows)
        if not 0 <= self.windows.min() <= self.windows.max() <= last:
            raise BadParameter("windows", self.windows.max().item(), f"corners of 0 to {last}, in patches")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Batch:
        image = self.images[i]
        draw = iter(torch.rand(2 + 2 * self.length).tolist()).__next__
        if self.statements is not None and self.splice_share:
            text = splice(self.reports[i], self.statements[i], draw, self.splice_share)
        else:
            text = self.reports[i].replace("..", ".")  # as in `splice`
        labels, weight = _read(text, self.length, self.vocabulary)
        return Batch(
            images=image[0] if isinstance(image, (tuple, list)) else image,
            ids=torch.from_numpy(mask(labels, self.vocabulary, draw, self.masking)),
            labels=torch.from_numpy(labels.copy()),
            attention=torch.from_numpy((labels != self.vocabulary.pad).astype(np.int64)),
            weights=torch.from_numpy(weight.copy() if self.rebalance else np.ones_like(weight)),
            noise=torch.rand(self.patches),
            window=self.windows[i],
        )
