"""The sets of whole slides as facts: layouts, folds, licences. `slides` reads them.

**PANDA**: 10,616 prostate biopsies from two centres, Radboud and Karolinska, graded by pathologists.

* Format: TIFF pyramids at downsamples 1, 4 and 16, 0.45 to 0.50 microns per pixel; label masks of the same shape, in
  their red channel; `train.csv` with image_id, data_provider, isup_grade, gleason_score. 347 GB in all.
* Grades: ISUP 0 (no cancer) to 5.
* Splits: the challenge's test slides are hidden. Folds are lists that one makes (`slides.write_folds`); those of
  H-ViT's authors were not released. Part of the labels, mostly Radboud's, is noisy; a widely used list leaves 9,555.
* Citation: Bulten et al., Nature Medicine 28, 2022. Licence: CC BY-NC-SA 4.0, behind the challenge's rules.

**pocket**: small slides made on this machine, in PANDA's layout. Two tasks: in `place` the grade is told by where
tumour lies in a region, in `count` by how much of it there is.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

LAYOUT = """\
train.csv                                 image_id,data_provider,isup_grade,gleason_score
train_images/<image_id>.tiff
train_label_masks/<image_id>_mask.tiff    optional
folds/fold-<k>/{train,tune,test}.csv      slide_id,isup_grade; made by companion.data.slides.write_folds"""


def sets() -> Iterator[DataSet]:
    """All of them."""
    yield DataSet(
        name="slides/panda",
        title="PANDA",
        group="slides",
        task="slides",
        classes=6,
        sizes={"train": 10_616},
        folders=("slides/panda", "PANDA", "prostate-cancer-grade-assessment"),
        layout=LAYOUT,
        source="kaggle.com/competitions/prostate-cancer-grade-assessment (free with an account, 347 GB)",
        licence="CC BY-NC-SA 4.0, after accepting the rules of the competition",
        citation="Bulten et al., Artificial intelligence for diagnosis and Gleason grading of prostate cancer: the "
        "PANDA challenge, Nature Medicine 28, 154-163, 2022",
    )
    for task, what in (("place", "graded by where tumour lies"), ("count", "graded by how much there is")):
        yield DataSet(
            name=f"pocket/slides-{task}",
            title=f"pocket slides, {what}",
            group="pocket",
            task="slides",
            classes=6,
            sizes={},
            folders=(f"pocket/slides-{task}",),
            layout=LAYOUT,
            source=f'made on this machine: `companion.toy.datasets.slides.write(root, "{task}")`',
            licence="made here; the texture of the stroma is cut from a photograph bundled with scikit-image",
            citation="this project",
        )
