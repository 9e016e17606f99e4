"""MetaSegNet's text encoders: from prompts to one state per word. All of it is a RECONSTRUCTION (section 3.4).

The paper names neither its text encoder nor its pooling, so three encoders share one interface:

    encoder.ids(texts)    (n, L) int64, padded with `encoder.pad`
    encoder.mask(ids)     (n, L) bool, True at words
    encoder(ids)          (n, L, encoder.width), one state per word
    encoder.words(text)   the words as strings, for attention maps

`Words` is small and trained with the network. `ClipText` and `BertText` hold a frozen copy of a released encoder; the
states of each text are cached, since a data set has at most one text for each of the 30 climate zones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from ...errors import BadParameter
from ...ops.recorded import Recorded


class TextEncoder(Recorded, nn.Module):
    """The shared interface; equal texts of a batch are encoded once."""

    width: int
    pad = 0
    unknown = "unknown"  # a word outside the vocabulary

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (n, L) of texts."""
        raise NotImplementedError

    def words(self, text: str) -> list[str]:
        """The words of a text as strings, one for each id that is not padding."""
        raise NotImplementedError

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States (n, L, width) of ids (n, L)."""
        raise NotImplementedError

    def mask(self, ids: Tensor) -> Tensor:
        """True at words, (n, L) bool."""
        return ids != self.pad

    def forward(self, ids: Tensor) -> Tensor:
        """States (n, L, width) of ids (n, L); those of padding are to be masked with `mask`."""
        unique, back = ids.unique(dim=0, return_inverse=True)
        return self.states(unique, self.mask(unique))[back]


class FrozenText(TextEncoder):
    """A text encoder that is not trained; the states of each text are computed once."""

    def freeze(self) -> None:
        """At the end of a constructor."""
        self._known: dict[tuple[int, ...], Tensor] = {}
        self.requires_grad_(False).eval()

    def forward(self, ids: Tensor) -> Tensor:
        rows = [tuple(row) for row in ids.tolist()]  # the only synchronisation with a GPU
        if new := list({row: i for i, row in enumerate(rows) if row not in self._known}.values()):
            with torch.no_grad():
                states = self.states(ids[new], self.mask(ids[new]))
            self._known |= {rows[i]: state for i, state in zip(new, states, strict=True)}
        return torch.stack([self._known[row].to(ids.device) for row in rows])

    def train(self, mode: bool = True):
        return super().train(False)

    def _load_from_state_dict(self, *args, **kwargs):
        self._known.clear()  # the cached states are those of the old weights
        super()._load_from_state_dict(*args, **kwargs)


class Words(TextEncoder):
    """A small encoder of whole words, trained with the network: embedding + position, transformer layers, norm.

    Args:
        vocabulary: the words, lower case, each once; ids 0 and 1 are padding and unknown.
        width: of the states.
        length: the longest text, in words.
        layers: pre-norm transformer layers. With 0 and one word per zone this is a one-hot zone embedding.
        heads, hidden: of those layers.
    """

    UNKNOWN = "<unknown>"

    def __init__(
        self,
        vocabulary: Sequence[str],
        width: int = 48,
        length: int = 48,
        layers: int = 1,
        heads: int = 4,
        hidden: int = 96,
    ):
        super().__init__()
        self.width, self.length = width, length
        self.vocabulary = ("<padding>", self.UNKNOWN, *vocabulary)
        self._id = {word: i for i, word in enumerate(self.vocabulary)}
        self.embedding = nn.Embedding(len(self.vocabulary), width, padding_idx=self.pad)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    @classmethod
    def of(cls, texts: Sequence[str], **options) -> Words:
        """An encoder that knows every word of `texts`."""
        return cls(sorted({word for text in texts for word in split(text)}), **options)

    def words(self, text: str) -> list[str]:
        return [word if word in self._id else self.UNKNOWN for word in split(text) or [""]][: self.length]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (n, length); a text without words is one unknown word, since attention needs at least one.

        Raises `BadParameter` for a text of more than `length` words."""
        ids = torch.full((len(texts), self.length), self.pad)
        for row, text in zip(ids, _checked(texts), strict=True):
            if len(split(text)) > self.length:
                raise BadParameter("texts", text, f"texts of at most {self.length} words")
            words = [self._id[word] for word in self.words(text)]
            row[: len(words)] = torch.tensor(words)
        return ids

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]  # (n, L, width)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.norm(x)


class ClipText(FrozenText):
    """A frozen copy of the text tower of an open_clip CLIP: states of all tokens before pooling (ViT-B-16: D = 512).

    Args:
        clip: from `backbones.build("openclip:ViT-B-16/openai")`.
        tokenizer: the CLIP's own; from texts to ids (n, L): the end token has the largest id, zeros follow it.
    """

    def __init__(self, clip: CLIP, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer
        parts = (clip.token_embedding, clip.transformer, clip.ln_final)
        self.embedding, self.transformer, self.norm = (copy.deepcopy(part) for part in parts)
        self.positions = nn.Parameter(clip.positional_embedding.detach().clone())
        self.register_buffer("causal", clip.attn_mask, persistent=False)
        self.width = self.embedding.embedding_dim
        self.freeze()

    def ids(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(_checked(texts)))

    def mask(self, ids: Tensor) -> Tensor:
        """True up to the end token: zeros after it are padding, a zero before it is a word ("!")."""
        return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)

    def words(self, text: str) -> list[str]:
        ids = self.ids([text])
        return [self.tokenizer.decode([i]).strip() for i in ids[self.mask(ids)].tolist()]

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]  # (n, L, width)
        return self.norm(self.transformer(x, attn_mask=self.causal))


class BertText(FrozenText):
    """A frozen copy of a text encoder of `transformers`: its last hidden states (BERT-base: D = 768).

    Args:
        model: returns `last_hidden_state` for `input_ids` and `attention_mask`, such as `BertModel`.
        tokenizer: of `transformers`, the model's own.
        length: tokens of the longest text; longer ones are truncated.
    """

    unknown = "[UNK]"

    def __init__(self, model: nn.Module, tokenizer: Any, length: int = 128):
        super().__init__()
        self.model, self.tokenizer, self.length = copy.deepcopy(model), tokenizer, length
        self.width, self.pad = model.config.hidden_size, tokenizer.pad_token_id
        self.freeze()

    def ids(self, texts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(_checked(texts)), **options)["input_ids"]

    def words(self, text: str) -> list[str]:
        ids = self.ids([text])
        return self.tokenizer.convert_ids_to_tokens(ids[self.mask(ids)].tolist())

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def split(text: str) -> list[str]:
    """The words of a text in lower case; everything but letters, digits and hyphens separates them."""
    return "".join(c if c.isalnum() or c == "-" else " " for c in text.lower()).split()


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):  # each letter would be a text
        raise BadParameter("texts", texts, "a list of texts")
    return texts
