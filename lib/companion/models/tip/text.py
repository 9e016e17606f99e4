"""TIP's text encoders: CLIP's, as in the pipeline figure, and a small frozen one for the `pocket` profile.

Both are components of a diffusers pipeline with one interface:

    ids = tokenize(tokenizer, texts)       (B, M) int64
    states = encoder(ids)[0]               (B, M, d), one per token

The same frozen encoder reads both prompts (inferred: the figure draws two boxes named CLIP).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ...errors import BadParameter

START, END = "<|startoftext|>", "<|endoftext|>"
UNKNOWN, EMPTY = "<unknown>", "<empty>"
MARKS = tuple("0123456789.,;:-")


class WordText(ModelMixin, ConfigMixin):
    """Frozen random word embeddings. A choice of ours for the `pocket` profile, not the paper's (section 14).

    Lower-case words, single digits and single marks are tokens, as CLIP tokenizes numbers. The tokens are repeated up
    to `length` instead of padded: a cross-attention without mask would attend to padding.

    Args:
        vocabulary: known words; digits and marks are always known. All other words share one "unknown" embedding.
        width: d of the states.
        length: M, tokens of every text; a list of four instructions has up to 27.
        memory: share of the previous token's state, shifted by one channel, in each state; 0 gives a bag of words, in
            which the numbers of "Deblur with sigma 0.9; Denoise with sigma 0.05" cannot be distinguished.
        seed: of the embeddings.
    """

    @register_to_config
    def __init__(
        self, vocabulary: Sequence[str], width: int = 32, length: int = 32, memory: float = 0.0, seed: int = 0
    ):
        super().__init__()
        if isinstance(vocabulary, str) or len(set(vocabulary)) != len(vocabulary):
            raise BadParameter("vocabulary", vocabulary, "a list of words, each once")
        if bad := [word for word in vocabulary if not re.fullmatch("[a-z]+", word)]:
            raise BadParameter("vocabulary", bad, "words of the letters a to z")
        if not 0 <= memory < 1:
            raise BadParameter("memory", memory, "0 or more, less than 1")
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
        x = self.embedding(ids)
        if not self.config.memory:
            return (x,)
        states = [x[:, 0]]
        for i in range(1, x.shape[1]):
            states.append(x[:, i] + self.config.memory * states[-1].roll(1, -1))
        return (torch.stack(states, 1),)


def split(text: str) -> list[str]:
    """Lower-case words, single digits and single marks of a text; all other characters separate them."""
    return re.findall(r"[^\W\d_]+|[0-9.,;:-]", text.lower())


def clip_tokenizer(pad: str = END, length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer from the merges that ship with open_clip: offline, with the ids of OpenAI's CLIP.

    Args:
        pad: the padding token: the end token (Stable Diffusion 1.5) or "!" (2.1).
        length: tokens of every text, start and end included.
    """
    simple = SimpleTokenizer()
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): i for token, i in simple.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(simple.bpe_ranks),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=pad,
        model_max_length=length,
    )


def tokenize(tokenizer, texts: Sequence[str], truncate: bool = False) -> Tensor:
    """Ids (B, M) of texts, by a `WordText` or a tokenizer of transformers.

    Raises `BadParameter` for a text that is too long, unless `truncate`: a truncated caption is still a caption, but
    the end of a truncated instruction would be ignored without an error.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise BadParameter("texts", texts, "a list of texts")
    if isinstance(tokenizer, WordText):
        return tokenizer.ids(texts, truncate)
    length = tokenizer.model_max_length
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        if len(ids) > length and not truncate:
            raise BadParameter("text", text, f"at most {length} tokens, it has {len(ids)}")
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found["input_ids"]
