"""TIP's text encoder at the `pocket` profile: frozen random word embeddings, with the interface of CLIP's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import BadParameter, extra

with extra("diffusion"):
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

UNKNOWN, EMPTY = "<unknown>", "<empty>"
MARKS = tuple("0123456789.,;:-")


class WordText(ModelMixin, ConfigMixin):
    """Frozen random word embeddings. A choice of ours for the `pocket` profile, not the paper's.

    Lower-case words, single digits and single marks are tokens, as CLIP tokenizes numbers. The tokens are repeated up
    to `length` instead of padded: a cross-attention without mask would attend to padding.

    Args:
        vocabulary: known words; digits and marks are always known. All other words share one "unknown" embedding.
        width: d of the states.
        length: M, tokens of every text; a list of four instructions has up to 27.
        seed: of the embeddings.
    """

    @register_to_config
    def __init__(self, vocabulary: Sequence[str], width: int = 32, length: int = 32, seed: int = 0):
        super().__init__()
        self.tokens = (UNKNOWN, EMPTY, *MARKS, *vocabulary)
        self._id = {token: i for i, token in enumerate(self.tokens)}
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(len(self.tokens), width)
        self.embedding.weight = nn.Parameter(torch.randn(len(self.tokens), width, generator=generator))
        self.requires_grad_(False)

    @classmethod
    def of(cls, texts: Sequence[str], **options) -> WordText:
        """An encoder with every word of `texts` in its vocabulary."""
        return cls(sorted({token for text in texts for token in split(text) if token[0].isalpha()}), **options)

    def words(self, text: str) -> list[str]:
        """The tokens of a text, unknown ones replaced, not repeated."""
        return [token if token in self._id else UNKNOWN for token in split(text)] or [EMPTY]

    def ids(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        """Ids (B, M) of texts. Raises `BadParameter` for a text of more than `length` tokens, unless `truncate`."""
        rows = []
        for text in texts:
            ids = [self._id[word] for word in self.words(text)]
            if len(ids) > self.config.length and not truncate:
                raise BadParameter("text", text, f"at most {self.config.length} words, digits and marks")
            rows.append((ids * self.config.length)[: self.config.length])
        return torch.tensor(rows)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        """States (B, M, width) of ids (B, M), in a tuple as transformers' encoders return them."""
        return (self.embedding(ids),)


def split(text: str) -> list[str]:
    """Lower-case words, single digits and single marks of a text; all other characters separate them."""
    return re.findall(r"[^\W\d_]+|[0-9.,;:-]", text.lower())
