"""The tokenizer of the toy CLIPs: one token per word, with the interface of open_clip's tokenizers.

open_clip's own vocabulary has 49,408 entries: at the toy CLIP's width the embedding table alone would be 12 MB.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..io.config import configure

# The order is part of the shipped weights: append only (the text tower has room for 64 ids, `END` is the last one).
WORDS = (
    *("a", "an", "the", "at", "on", "of", "photo", "small", "large", "red", "green", "cyan", "violet"),
    *("disc", "ring", "cross", "bar", "object", "top", "bottom", "left", "right", "centre"),
    *("astronaut", "brick", "cameraman", "cat", "coffee", "coins", "flower", "grass", "gravel", "moon", "motorcycle"),
    *("page", "retina", "rocket", "stars", "temple", "tissue"),
)
PAD, START, UNKNOWN, FIRST, END = 0, 1, 2, 3, 63


class Tokenizer:
    """Texts to ids, with the interface of `open_clip.SimpleTokenizer`.

    `END` is the largest id: open_clip's text tower reads its feature at the position of the largest one.

    Args:
        words: those with an id, 60 at most; the toy CLIP's by default.
        context_length: tokens of a text, including start and end.
    """

    vocab_size = 64

    def __init__(self, words: Sequence[str] = WORDS, context_length: int = 16):
        configure(self, locals())
        self.words, self.context_length = tuple(words), context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids (n, context_length), long: unknown words share one id, long texts are truncated, the end token is always
        present."""
        length = context_length or self.context_length
        ids = torch.full((1 if isinstance(texts, str) else len(texts), length), PAD)
        for row, text in zip(ids, [texts] if isinstance(texts, str) else texts, strict=True):
            words = re.findall(r"[a-z]+", text.lower())[: length - 2]
            known = [FIRST + self.words.index(word) if word in self.words else UNKNOWN for word in words]
            row[: len(known) + 2] = torch.tensor([START, *known, END])
        return ids

    def decode(self, ids: Tensor) -> str:
        """The words of one row of ids, up to the end."""
        words = []
        for token in ids.tolist():
            if token == END:
                break
            if token >= UNKNOWN:
                words.append("?" if token == UNKNOWN else self.words[token - FIRST])
        return " ".join(words)
