"""Facts of the remote-sensing and medical image sets of domain prompt learning, from domains_sets.yaml."""

from __future__ import annotations

from collections.abc import Mapping

from . import DATASETS, facts

_FACTS = facts("domains")
CLASSES: dict[str, Mapping[str, str]] = _FACTS["CLASSES"]
"""For each set: folder -> name in the prompt, as in the authors' loaders (caoql98/DPLQ, datasets/<set>.py)."""
WHOLE_SET_NAMES: dict[str, dict[str, str]] = _FACTS["WHOLE_SET_NAMES"]
"""Where the loaders of a whole set (datasets/<set>v2.py, used for domain generalisation) name a class otherwise."""
RELEASED_AS: dict[str, dict[str, str]] = _FACTS["RELEASED_AS"]
"""Class folders of the released archives that the authors renamed."""
TORCHGEO: dict[str, str] = _FACTS["TORCHGEO"]
"""The class of torchgeo that downloads a set."""


def split_sizes(count: int) -> dict[str, int]:
    """How the images of one class are split: half for training, a fifth for validation, the rest for testing.

    Halves are rounded to even, as by Python's `round` (and in the authors' code).
    """
    train, val = round(0.5 * count), round(0.2 * count)
    return {"train": train, "val": val, "test": count - train - val}


def split_file(name: str) -> str:
    """The file name of the list of splits of a set: the authors' name for their sets, `split.json` for any other."""
    if name not in CLASSES:
        return "split.json"
    folder = DATASETS[name].folders[-1]
    return f"split_cao_{'NWPU' if folder == 'nwpu' else folder}.json"


def image_folders(name: str) -> tuple[str, ...]:
    """Possible parents of the class folders below a set's folder, the most specific first.

    "" is the folder itself; "a+b" is one set whose classes are in both a and b.
    """
    released = _FACTS["RELEASED_IN"].get(name, ())
    return (*released, DATASETS[name].folders[-1] if name in CLASSES else "images", "")
