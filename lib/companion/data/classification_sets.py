"""Facts of the image classification sets, from classification_sets.yaml: sizes, folders, sources, licences."""

from __future__ import annotations

from . import facts

IMAGES: dict[str, str] = facts("classification")["IMAGES"]
"""Where the images of an FGVC set are below its folder."""
OFFICIAL: dict[str, tuple[str, ...]] = {
    "cub200": ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
    "nabirds": ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
    "flowers102": ("imagelabels.mat", "setid.mat"),
    "dogs120": ("train_list.mat", "test_list.mat"),
    "cars196": ("cars_annos.mat",),
}
"""The files of an FGVC set that hold its official split and labels."""
