"""What pre-trained ViTs are trained and judged on, as facts: ImageNet-1k, COCO 2017, ADE20K. `pretraining` reads them.

* **ImageNet-1k** (Russakovsky et al., IJCV 2015): photographs of 1000 classes; 1,281,167 for training, 50,000 for
  validation, which the papers test on. Format: one folder a class, named by its WordNet id, as torchvision and timm
  want it. Licence: behind a registration, non-commercial research.
* **COCO 2017** (Lin et al., ECCV 2014): photographs with boxes and masks of 80 classes; 118,287 for training, 5,000 for
  validation. Format: COCO's JSON (box xywh; polygons, or run lengths around crowds). Licence: annotations CC BY 4.0,
  the pictures are Flickr's.
* **ADE20K**, as SceneParse150 (Zhou et al., CVPR 2017): scenes of which each pixel has one of 150 classes; 20,210 for
  training, 2,000 for validation. Format: JPEG, and PNG with labels 1 to 150, 0 for anything else, which is not counted.
  Licence: free for research.

Which sets and splits DMT used is inferred to be these.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

IMAGENET, COCO, ADE20K = (f"pretraining/{name}" for name in ("imagenet-1k", "coco", "ade20k"))


def sets() -> Iterator[DataSet]:
    """All three."""
    group = "Pre-trained encoders"
    yield DataSet(
        name=IMAGENET,
        title="ImageNet-1k",
        group=group,
        task="pretraining",
        classes=1000,
        sizes={"train": 1_281_167, "test": 50_000},
        folders=("imagenet-1k", "imagenet", "ILSVRC2012"),
        layout="train/<wnid>/*.JPEG    1000 folders\nval/<wnid>/*.JPEG      the same 1000",
        source="image-net.org, with a registration (torchvision.datasets.ImageNet sorts its archives into these "
        "folders); or the hub's ILSVRC/imagenet-1k, gated",
        licence="non-commercial research, after registration",
        citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
    )
    yield DataSet(
        name=COCO,
        title="MS-COCO 2017, boxes and masks",
        group=group,
        task="pretraining",
        classes=80,
        sizes={"train": 118_287, "test": 5_000},
        folders=("coco", "COCO"),
        layout="annotations/instances_train2017.json\nannotations/instances_val2017.json\ntrain2017/*.jpg\nval2017/*.jpg",
        source="cocodataset.org (free, 19 GB of pictures)",
        licence="annotations CC BY 4.0; the pictures are Flickr's, under their own terms",
        citation="Lin et al., Microsoft COCO, ECCV 2014",
    )
    yield DataSet(
        name=ADE20K,
        title="ADE20K (SceneParse150)",
        group=group,
        task="pretraining",
        classes=150,
        sizes={"train": 20_210, "test": 2_000},
        folders=("ade/ADEChallengeData2016", "ADEChallengeData2016", "ade20k"),
        layout="images/{training,validation}/*.jpg\nannotations/{training,validation}/*.png    0 is not counted",
        source="data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (free, 0.9 GB)",
        licence="free for non-commercial research",
        citation="Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017",
    )
