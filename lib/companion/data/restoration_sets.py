"""Facts of the text-guided restoration sets, from restoration_sets.yaml: layouts, splits, licences."""

from __future__ import annotations

from . import facts

_FACTS = facts("restoration")
CAPTIONS: dict[str, str] = _FACTS["CAPTIONS"]
"""COCO's captions of each split; "test" is val2017."""
FOLDERS: dict[str, dict[str, str]] = _FACTS["FOLDERS"]
"""The folder of each split below the set's."""
DIV2K: dict[str, tuple[range, str]] = {
    split: (range(first, last + 1), md5) for split, ((first, last), md5) in _FACTS["DIV2K"].items()
}
"""Numbers of the images, and the MD5 of the archive."""
DIV2K_URL: str = _FACTS["DIV2K_URL"]
OWN: str = _FACTS["OWN"]
"""The layout of a folder of one's own."""
