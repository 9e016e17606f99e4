"""CPU cores that keep a GPU busy: training images per second of one core, read and augmented, beside those of an A100.

Files of smooth noise, in sizes that the real sets have, are written to a temporary folder. The images per second of the
GPU are an estimate, from the FLOPs of a step at the share of the peak that `companion doctor` assumes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bench
import h5py
import numpy as np
import readers
import torch
from PIL import Image

from companion.data import attributes, classification, detection, domains, pretraining, slides, xrays
from companion.io import record
from companion.io.files import write_json
from companion.io.papers import paper
from companion.io.provenance import code_hash, sources
from companion.models.dmt import recipe as dmt
from companion.models.ecamp import transforms
from companion.models.metasegnet import recipe as metasegnet
from companion.models.sic_cads import recipe as sic_cads
from companion.models.tip import recipe as tip
from companion.runs import needs

COUNT = readers.COUNT


def chests(root: Path, height: int, width: int, transform: Callable) -> Sequence:
    """Grey JPEGs of radiographs."""
    (folder := root / f"{height} x {width}").mkdir()
    for i in range(COUNT):
        Image.fromarray(readers.noise(i, height, width)).convert("L").save(folder / f"{i}.jpg", quality=90)
    (folder / "train_list.txt").write_text("".join(f"{i}.jpg 1\n" for i in range(COUNT)))
    return xrays.own(folder, ["a"], transform)["train"]


def embedded(root: Path) -> Sequence:
    """Stored patch embeddings of slides of 18 regions."""
    (folder := root / "features").mkdir()
    items = [slides.Item(f"s{i}", root / f"s{i}.tiff", 1) for i in range(COUNT)]
    for item in items:
        with h5py.File(folder / f"{item.name}.h5", "w") as file:
            file["features"] = np.random.default_rng(0).normal(size=(18, 64, 384)).astype("float32")
            file["coords"], file["shares"] = np.zeros((18, 2), "int64"), np.ones(18)
            file.attrs["settings"] = "{}"
    return slides.Features(items, folder)


def reports(root: Path, height: int, width: int) -> Sequence:
    """The same with reports, for ECAMP's pre-training."""
    (folder := root / f"reports {height} x {width}").mkdir()
    for i in range(COUNT):
        Image.fromarray(readers.noise(i, height, width)).convert("L").save(folder / f"{i}.jpg", quality=90)
    xrays.write_reports(folder / "pretrain.csv", [f"{i}.jpg" for i in range(COUNT)], ["a"] * COUNT, ["b"] * COUNT)
    images = xrays.own(folder, transform=transforms.pretrain_transform(), task="pre-training")["train"].images
    images.shortest = transforms.SHORTEST
    return images


class Regions:
    """The two regions of a slide, as the patch level reads them."""

    def __init__(self, root: Path):
        self.root = root

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> np.ndarray:
        return readers.region(self.root, index)


def photographs(root: Path) -> Sequence:
    varied = classification.crop_transform(readers.SEEN, train=True)
    return classification.own(root / "photographs", varied)["trainval"]


def land(root: Path) -> Sequence:
    return metasegnet.randomised(readers.land(root), "a" * COUNT, metasegnet.published("landcover/potsdam"))


class Feed(NamedTuple):
    """The training images of a run of `paper.yaml`, and what they are; `items` of them count as one there."""

    slug: str
    run: str
    what: str
    make: Callable[[Path], Sequence]
    items: int = 1


FEEDS = [
    Feed("sa2vp", "hta", "JPEG 500 x 375", photographs),
    Feed("dplq", "transfer-remote", "JPEG 256 x 256", lambda root: domains.own(
        root / "satellite", transform=domains.clip_transform(readers.SEEN, train=True))["all"]),
    Feed("sic_cads", "ov-lvis", "JPEG 640 x 480", lambda root: sic_cads.Crops(
        detection.own(root / "scenes")["train"],
        *(getattr(sic_cads.published("detection/ov-lvis"), name) for name in ("size", "crop")))),
    Feed("bat", "lasher", "two pairs of JPEG 640 x 480", readers.pairs),
    Feed("promptpar", "pa100k", "PNG 64 x 160", lambda root: attributes.own(
        root / "pedestrians", attributes.square_transform(train=True))["trainval"]),
    Feed("tip", "coco", "JPEG 640 x 480, degraded", lambda root: tip.samples(
        readers.captioned(root), 512, "TIP", 0)),
    Feed("dmt", "distil", "JPEG 500 x 375", lambda root: dmt.Augmented(
        pretraining.own(root / "photographs")["train"], dmt.augment())),
    Feed("hvit", "features", "slides of 18 regions of 2,048 x 2,048", Regions, 18),
    Feed("hvit", "local", "stored features of 18 regions", embedded),
    Feed("metasegnet", "potsdam", "PNG 1,024 x 1,024 and labels", land),
    Feed("ecamp", "chexpert", "JPEG 384 x 320", lambda root: chests(root, 320, 384, transforms.train_transform())),
    Feed("ecamp", "pre-training", "JPEG 2,560 x 3,072 of 1.5 MB", partial(reports, height=3072, width=2560)),
    Feed("ecamp", "pre-training", "copies of 1,216 x 1,472", partial(reports, height=1472, width=1216)),
]  # fmt: skip


def wanted(feed: Feed) -> float:
    """Images of a training step, or of an encoding, per second of an A100."""
    facts = paper(feed.slug)
    run = next(run for run in facts["runs"] if run["id"] == feed.run)
    passes = 3 if run["epochs"] else 1
    return needs.SHARE * needs.peak("A100", facts.get("products", facts["precision"])) * 1e3 / (passes * run["gflop"])


def seconds(data: Sequence) -> float:
    """CPU seconds of reading all items."""
    start = time.process_time()
    for i in range(len(data)):
        data[i]
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        readers.write(root := Path(temporary))
        for feed in FEEDS:
            data, gpu = feed.make(root), wanted(feed)
            core = len(data) / min(seconds(data) for _ in range(6)) / feed.items
            rows.append({"paper": feed.slug, "run": feed.run, "what": feed.what, "core": core, "gpu": gpu})
            rows[-1]["cores"] = gpu / core
            what = f"{core:.3g} images/s a core, {gpu:.3g} on an A100: {gpu / core:.2g} cores"
            print(f"{feed.slug} {feed.run}, {feed.what}: {what}", flush=True)
    code = code_hash(sources(Path(__file__)))
    facts = {"rows": rows, "versions": record.versions(), "device": record.device(), "code": code}
    write_json(bench.RESULTS / "feeding.json", facts)


if __name__ == "__main__":
    main()
