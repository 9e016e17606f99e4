"""Small real data sets, read in place by the studies and figures on real images; nothing of them is copied."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import MissingData
from ..io import record


def root() -> Path:
    """The folder of the sets: the environment variable COMPANION_REAL_DATA, or data/ of the checkout."""
    return Path(os.environ.get("COMPANION_REAL_DATA") or record.root() / "data")


def folder(needed: str, *, title: str, layout: str, source: str, licence: str) -> Path:
    """The folder <root>/<first part of `needed`> of a set.

    Args:
        needed: a file or folder of the set, relative to the root.
        title, layout, source, licence: of the error, as in `MissingData`.

    Raises:
        MissingData: `needed` does not exist.
    """
    found = root() / needed
    if not found.exists():
        detail = f"{found}; the variable COMPANION_REAL_DATA names the folder that holds it"
        raise MissingData(title, root(), layout, source, licence, detail)
    return root() / Path(needed).parts[0]
