"""The sets of restoration by text as facts: layouts, splits, licences. `restoration` reads them.

Which pictures and captions the paper trained on is not known; it is said to be an in-house set with machine captions
(from memory, not read). These stand in their place, a choice of ours:

* **COCO 2017 with captions** (Lin et al., ECCV 2014; Chen et al., 2015): about five captions a picture, the first by
  id is taken. The prompts in the paper's comparison figure are of this style.
* **DIV2K** (Agustsson and Timofte, CVPR workshops 2017): 2K pictures without captions, for the blind mode.
* **pocket**: small pictures with captions, in the layout of a folder of one's own.

Degraded pictures are on no disk: they are made from a seed when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

CAPTIONS = {"train": "annotations/captions_train2017.json", "test": "annotations/captions_val2017.json"}
"""COCO's captions of each split; "test" is val2017, which is what is tested on."""

FOLDERS = {
    "restoration/coco": {"train": "train2017", "test": "val2017"},
    "restoration/div2k": {"train": "DIV2K_train_HR", "test": "DIV2K_valid_HR"},
    "pocket/restoration": {split: split for split in ("train", "val", "test")},
}
"""The folder of each split below the set's."""

DIV2K = {
    "train": (range(1, 801), "bdc2d9338d4e574fe81bf7d158758658"),
    "test": (range(801, 901), "9fcdda83005c5e5997799b69f955ff88"),
}
"""Numbers of the pictures, and the MD5 of the archive."""
DIV2K_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"

OWN = 'captions.jsonl             one line a picture: {"file": "1.png", "caption": "a zebra"}\nimages/<file>'


def sets() -> Iterator[DataSet]:
    """All of them."""
    yield DataSet(
        name="restoration/coco",
        title="COCO 2017 with captions",
        group="restoration by text",
        task="restoration",
        classes=None,
        sizes={"train": 118_287, "test": 5_000},
        folders=("coco", "COCO"),
        layout="annotations/captions_train2017.json\nannotations/captions_val2017.json\ntrain2017/*.jpg\nval2017/*.jpg",
        source="cocodataset.org (free, 19 GB of pictures)",
        licence="annotations CC BY 4.0; the pictures are Flickr's, under their own terms",
        citation="Lin et al., Microsoft COCO, ECCV 2014; Chen et al., Microsoft COCO Captions, arXiv 1504.00325",
    )
    yield DataSet(
        name="restoration/div2k",
        title="DIV2K",
        group="restoration by text",
        task="restoration",
        classes=None,
        sizes={split: len(numbers) for split, (numbers, _) in DIV2K.items()},
        folders=("div2k", "DIV2K"),
        layout="DIV2K_train_HR/0001.png ... 0800.png\nDIV2K_valid_HR/0801.png ... 0900.png",
        source="data.vision.ee.ethz.ch/cvl/DIV2K (free, 4 GB)",
        licence="free for academic research; the pictures are their owners'",
        citation="Agustsson and Timofte, NTIRE 2017 Challenge on Single Image Super-Resolution, CVPR workshops 2017",
        fetchable=True,
    )
    yield DataSet(
        name="pocket/restoration",
        title="pocket pictures with captions",
        group="pocket",
        task="restoration",
        classes=None,
        sizes={},
        folders=("pocket/restoration",),
        layout="\n".join(f"{{train,val,test}}/{line}" for line in OWN.splitlines()),
        source="made on this machine: `companion.toy.datasets.restoration.write(root)`",
        licence="made here",
        citation="this project",
    )
