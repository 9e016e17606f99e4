"""Facts of the image classification sets, from classification_sets.yaml: sizes, folders, sources, licences."""

from __future__ import annotations

from . import facts

IMAGES: dict[str, str] = facts("classification")["IMAGES"]
"""Where the images of an FGVC set are below its folder."""
