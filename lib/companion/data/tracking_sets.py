"""Facts of the tracking sets, from tracking_sets.yaml: layouts, attributes, splits, licences."""

from __future__ import annotations

from . import facts

ATTRIBUTES: dict[str, tuple[str, ...]] = facts("tracking")["ATTRIBUTES"]
"""The attribute names of each set, LasHeR's in the order of the flags in its files; none where no file has them."""
