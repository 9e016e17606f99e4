"""Facts of the pedestrian attribute sets, from attributes_sets.yaml: layouts, splits, sentences, licences."""

from __future__ import annotations

from . import facts

_FACTS = facts("attributes")
SENTENCES: dict[str, tuple[str, ...]] = _FACTS["SENTENCES"]
"""The sentence of each attribute, in label order, as the authors' preparation has them, slips included."""
PHRASES: dict[str, tuple[str, ...]] = _FACTS["PHRASES"]
"""For RAPv1 the authors' script passes CLIP these phrases, and stores the sentences too; which of the two the paper
used was not found. `SENTENCES` has the sentences, as for all other sets and as in the abstract."""
COLUMNS: dict[str, tuple[int, ...]] = _FACTS["COLUMNS"]
"""The scored columns of the raw labels, in label order: of PETA after its first four, of RAPv2 among the 54 that its
annotation selects."""
ZERO_SHOT: dict[str, str] = _FACTS["ZERO_SHOT"]
"""The sets that are another set with a new split."""
ZERO_SHOT_FILES: tuple[str, ...] = _FACTS["ZERO_SHOT_FILES"]
"""The files of the new split: Rethinking_of_PAR's, or the one that PromptPAR's script makes of it."""
IMAGES: dict[str, tuple[str, ...]] = _FACTS["IMAGES"]
"""Where the images may be: as released, or padded to squares by the authors of PromptPAR."""
ANNOTATIONS: dict[str, str] = _FACTS["ANNOTATIONS"]
"""The file with labels and splits; WIDER has five text files."""
WIDER_FILES: dict = _FACTS["WIDER_FILES"]
