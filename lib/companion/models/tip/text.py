"""TIP's texts: CLIP's tokenizer, as in the pipeline figure.

The same frozen text encoder reads both prompts (inferred: the figure draws two boxes named CLIP).
"""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from transformers import CLIPTokenizer

from ...errors import BadParameter

START, END = "<|startoftext|>", "<|endoftext|>"


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
    """Ids (B, M) of texts, by a tokenizer of transformers, or by an object with a method `ids`.

    Raises `BadParameter` for a text that is too long, unless `truncate`: a truncated caption is still a caption, but
    the end of a truncated instruction would be ignored without an error.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise BadParameter("texts", texts, "a list of texts")
    if hasattr(tokenizer, "ids"):
        return tokenizer.ids(texts, truncate)
    length = tokenizer.model_max_length
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        if len(ids) > length and not truncate:
            raise BadParameter("text", text, f"at most {length} tokens, it has {len(ids)}")
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), **options)["input_ids"]
