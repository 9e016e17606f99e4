"""MetaSegNet's text encoders: from prompts to one state per word. A RECONSTRUCTION (section 3.4): the paper names none.

`Words` is small and trained with the network. `BertText` is a released encoder of `transformers`, frozen. Both have

    encoder.ids(texts)    (n, L) int64, padded with `encoder.pad`
    encoder.mask(ids)     (n, L) bool, True at words
    encoder(ids)          (n, L, encoder.width), one state per word
    encoder.words(text)   the words as strings, for attention maps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadParameter, Count, Whole, check_parts, typed
from ...io.config import configure
from ..layers.frozen import current, frozen_copy

HEADS = 4  # of a layer of `Words`


class Words(nn.Module):
    """A small encoder of whole words, trained with the network: embedding + position, transformer layers, norm.

    Args:
        vocabulary: the words, lower case, each once; ids 0 and 1 are padding and unknown.
        width: of the states.
        length: the longest text, in words.
        layers: pre-norm transformer layers. With 0 and one word per zone this is a one-hot zone embedding.
    """

    UNKNOWN = "<unknown>"
    pad, unknown = 0, "unknown"  # `unknown`: a word outside the vocabulary

    def __init__(self, vocabulary: Sequence[str], width: Count = 48, length: Count = 48, layers: Whole = 1):
        configure(self, locals())
        super().__init__()
        check_parts("heads", width, HEADS)
        self.width, self.length = width, length
        self.vocabulary = ("<padding>", self.UNKNOWN, *vocabulary)
        self._id = {word: i for i, word in enumerate(self.vocabulary)}
        self.embedding = nn.Embedding(len(self.vocabulary), width, padding_idx=self.pad)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, HEADS, 96, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    @classmethod
    def of(cls, texts: Sequence[str], **options) -> Words:
        """An encoder that knows every word of `texts`."""
        return cls(sorted({word for text in texts for word in split(text)}), **options)

    def words(self, text: str) -> list[str]:
        """The words of a text, the unknown ones replaced; a text without words is one unknown word."""
        return [word if word in self._id else self.UNKNOWN for word in split(text) or [""]]

    @typed
    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (n, length) of texts. Raises `BadParameter` for a text of more than `length` words."""
        ids = torch.full((len(texts), self.length), self.pad)
        for row, text in zip(ids, texts, strict=True):
            words = [self._id[word] for word in self.words(text)]
            if len(words) > self.length:
                raise BadParameter("texts", text, f"texts of at most {self.length} words")
            row[: len(words)] = torch.tensor(words)
        return ids

    def mask(self, ids: Tensor) -> Tensor:
        """True at words, (n, L) bool."""
        return ids != self.pad

    def forward(self, ids: Tensor) -> Tensor:
        """States (n, L, width) of ids (n, L), those of padding too; equal texts are encoded once."""
        unique, back = ids.unique(dim=0, return_inverse=True)
        x = self.embedding(unique) + self.positions[: ids.shape[1]]  # (u, L, width)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~self.mask(unique))
        return self.norm(x)[back]


CACHED = 64  # texts whose states `BertText` keeps, 0.4 MB each of BERT-base


class BertText(nn.Module):
    """The last hidden states of a text encoder of `transformers` (BERT-base: D = 768), frozen.

    The states of the last `CACHED` texts are kept: a data set has at most one text for each of the 30 climate zones,
    unless each image has its own. The tensors are the caller's, whose model keeps its mode and its flags.

    Args:
        model: returns `last_hidden_state` for `input_ids` and `attention_mask`, such as `BertModel`.
        tokenizer: of `transformers`, the model's own.
        length: tokens of the longest text; longer ones are truncated.
    """

    unknown = "[UNK]"

    def __init__(self, model: nn.Module, tokenizer: Any, length: Count = 128):
        configure(self, locals())
        super().__init__()
        self.model, self.tokenizer, self.length = frozen_copy(model), tokenizer, length
        self.width, self.pad = model.config.hidden_size, tokenizer.pad_token_id

    def words(self, text: str) -> list[str]:
        """The tokens of a text, one for each id that is not padding."""
        ids = self.ids([text])
        return self.tokenizer.convert_ids_to_tokens(ids[self.mask(ids)].tolist())

    @typed
    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (n, length) of texts."""
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(texts), **options)["input_ids"]

    def mask(self, ids: Tensor) -> Tensor:
        """True at tokens that are not padding, (n, L) bool."""
        return ids != self.pad

    def forward(self, ids: Tensor) -> Tensor:
        """States (n, L, width) of ids (n, L), those of padding too."""
        device, weights = ids.device.type, next(self.model.parameters()).dtype
        mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights
        rows = [(weights, mixed, *row) for row in ids.tolist()]  # the only synchronisation with a GPU
        # by the type of the computation and the ids of a text
        states = current(self, "_states", self.model.parameters(), dict[tuple, Tensor])
        if len(states.keys() | {*rows}) > CACHED:
            states.clear()
        if new := list({row: i for i, row in enumerate(rows) if row not in states}.values()):
            with torch.no_grad():
                output = self.model(input_ids=ids[new], attention_mask=self.mask(ids[new]).long())
            states |= {rows[i]: state for i, state in zip(new, output.last_hidden_state, strict=True)}
        return torch.stack([states[row].to(ids.device) for row in rows])

    def train(self, mode: bool = True) -> BertText:
        """Always in eval mode."""
        return super().train(False)


TextEncoder = Words | BertText


def split(text: str) -> list[str]:
    """The words of a text in lower case; everything but letters, digits and hyphens separates them."""
    return "".join(c if c.isalnum() or c == "-" else " " for c in text.lower()).split()
