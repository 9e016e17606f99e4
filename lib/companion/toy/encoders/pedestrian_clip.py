"""The tokenizer of the toy CLIP of pedestrians, PromptPAR's backbone."""

from __future__ import annotations

from ..tokens import Tokenizer

# The order is part of the shipped weights: append only.
WORDS = (
    *("a", "pedestrian", "with", "in", "and", "no", "hat", "hair", "long", "short", "red", "blue", "green", "grey"),
    *("striped", "plain", "top", "trousers", "shorts", "shoes", "backpack", "handbag", "bag"),
)


def tokenizer() -> Tokenizer:
    """The tokenizer of this CLIP's vocabulary."""
    return Tokenizer(WORDS, context_length=24)
