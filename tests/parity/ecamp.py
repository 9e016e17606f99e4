"""ECAMP: the one kind of recorded case that is no data, masks and weights of texts with replayed draws."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from companion.models.ecamp import text

from .runner import Case


def texts(case: Case) -> dict[str, Tensor]:
    """Ids, masked ids and weights of the examples, with their recorded draws."""
    settings = case.facts["settings"]
    words = text.Vocabulary.from_words(settings["vocabulary"])
    found: dict[str, list[np.ndarray]] = {"ids": [], "masked_ids": [], "weights": []}
    for example in settings["examples"]:
        ids = words.encode(example["text"].replace(" ##", ""), settings["length"])
        found["ids"].append(ids)
        found["masked_ids"].append(text.mask(ids, words, iter(example["draws_used"]).__next__))
        found["weights"].append(text.weights(ids, words))
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in found.items()}
