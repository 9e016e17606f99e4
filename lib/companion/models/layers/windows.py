"""Windows that cover an image of any size."""

from __future__ import annotations


def starts(length: int, side: int, step: int) -> list[int]:
    """First pixels along one axis of windows of a `side`, `step` apart; the last one ends with the image."""
    return [*range(0, max(length - side, 0), step), max(length - side, 0)]
