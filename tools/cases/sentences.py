"""What sentences of recorded cases say: numbers, seeds, arrays and transforms."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD


def number(text: str, after: str = "") -> float:
    """The first number of a sentence that is followed by `after`, such as "1e-3 relative"."""
    return float(re.findall(rf"(\d+(?:\.\d+)?(?:e-?\d+)?)\s*{after}", text)[0])


def seed(text: str) -> int:
    """The seed of the filled weights: "fill.parameter(name, shape, seed=0)"."""
    return int(re.findall(r"seed=(\d+)", text)[0])


def drawn(text: str) -> dict[str, Any]:
    """Seed and shape of a normal array that NumPy's generator draws: "default_rng(0).standard_normal((4, 3), ...)"."""
    shape = re.findall(r"standard_normal\(\(([\d, ]+)\)", text)
    found: dict[str, Any] = {"seed": int(n[0])} if (n := re.findall(r"default_rng\((\d+)\)", text)) else {}
    return found | ({"shape": [int(n) for n in shape[0].strip(" ,").split(",")]} if shape else {})


def step(text: str) -> list[Any]:
    """A transform's name, numbers and interpolation: "Resize((224, 224)), bilinear"."""
    name, text = text.partition("(")[0].split()[0], text.replace("black", "0")
    numbers = [float(Fraction(number)) for number in re.findall(r"\d+(?:\.\d+)?(?:/\d+)?", text)]
    if "CLIP's" in text:
        numbers = [*OPENAI_DATASET_MEAN, *OPENAI_DATASET_STD]
    if name == "RandomCrop" and len(numbers) == 1:
        numbers *= 2
    return [name, numbers, next((kind for kind in ("bicubic", "bilinear") if kind in text), "")]
