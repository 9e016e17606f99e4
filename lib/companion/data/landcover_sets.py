"""Facts of the land-cover sets, from landcover_sets.yaml: classes, codes, layouts, splits, licences."""

from __future__ import annotations

from . import facts

_FACTS = facts("landcover")
OEM, LOVEDA, POTSDAM = "landcover/openearthmap", "landcover/loveda", "landcover/potsdam"
UAVID = "landcover/uavid"

CLASSES: dict[str, dict[str, tuple[int, int, int]]] = _FACTS["CLASSES"]
"""By set, the classes in the order of their training labels, with the colour (red, green, blue) of each.

The label after the last class is ignored in training and scores: unknown, no data, border, padding."""
LEFT_OUT: dict[str, tuple[int, ...]] = _FACTS["LEFT_OUT"]
"""Classes excluded from the means of the scores; their pixels still count for the other classes (section 7)."""
XBD: tuple[str, ...] = _FACTS["XBD"]
"""Regions of OpenEarthMap whose images come from xBD."""
LOVEDA_FILES: dict[str, str] = _FACTS["LOVEDA_FILES"]
"""Zip files of Zenodo record 5706578 and their MD5."""
POTSDAM_TILES: dict[str, tuple[str, ...]] = _FACTS["POTSDAM_TILES"]
POTSDAM_FAULTY: str = _FACTS["POTSDAM_FAULTY"]
"""The tile with wrong labels, not used to train MetaSegNet: its author's papers exclude it."""
TO_LOVEDA: dict[str, str] = _FACTS["TO_LOVEDA"]
"""RECONSTRUCTION (section 7). OpenEarthMap's classes mapped to LoveDA's, for the cross-dataset test."""
