"""Facts of the open-vocabulary detection sets, from detection_sets.yaml: layouts, splits, licences."""

from __future__ import annotations

from . import facts

_FACTS = facts("detection")
COCO_BASE: dict[str, int] = _FACTS["COCO_BASE"]
"""The 48 base classes of OV-COCO and COCO's category ids."""
COCO_NOVEL: dict[str, int] = _FACTS["COCO_NOVEL"]
"""The 17 novel classes of OV-COCO and COCO's category ids."""
COCO_OTHER: dict[str, int] = _FACTS["COCO_OTHER"]
"""The 15 of COCO's 80 classes that are annotated nowhere in OV-COCO, and COCO's category ids."""
FILES: dict[str, dict[str, tuple[str, ...]]] = _FACTS["FILES"]
"""The annotation file of each split below the set's folder, the usual spelling first."""
IMAGES: dict[str, dict[str, tuple[str, ...]]] = _FACTS["IMAGES"]
"""Where the images of each split may be."""
NAMES_FIX: tuple[str, ...] = _FACTS["NAMES_FIX"]
