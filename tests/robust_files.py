"""A whole small input of each kind that a reader takes, and what reads it: for test_robustness.py.

Each maker writes into a folder, and gives the file that is then damaged and what reads it, images and all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from companion import backbones, climate, detectors, slides
from companion.data import attributes, classification, detection, domains, landcover, tracking, xrays
from companion.data import slides as slide_lists
from companion.evaluation import ablations
from companion.models.dmt import Teachers
from companion.models.dmt import build as dmt_vit
from companion.models.dmt import cache as dmt_cache
from companion.models.ecamp.text import Vocabulary
from companion.ops import unpickle
from companion.ops.files import read_json, write_json
from companion.toy.datasets import chests
from companion.toy.datasets import classification as pocket_classification
from companion.toy.datasets import detection as pocket_detection
from companion.toy.datasets import domains as pocket_domains
from companion.toy.datasets import landcover as pocket_landcover
from companion.toy.datasets import pedestrians as pocket_pedestrians
from companion.toy.datasets import slides as pocket_slides
from companion.toy.datasets import tracking as pocket_tracking
from companion.training.checkpoints import Checkpoint
from companion.training.fit import CPU, fit
from companion.training.schedules import adamw
from tests.test_slides import SMALL, drawn, mean_colour, written
from tests.training.test_fit import noisy_model, pairs, squared

Read = Callable[[], object]


def first(folder: Path, pattern: str) -> Path:
    return min(folder.rglob(pattern))


def items(dataset: Iterable) -> None:
    for _ in itertools.islice(iter(dataset), 1500):
        pass


def _classified(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        (root,) = pocket_classification.write(folder, ["digits"])
        file = first(root, f"train/{damaged}" if damaged == "*.png" else damaged)

        def read() -> None:
            data = classification.load("pocket/digits", folder, "train")
            data[[Path(source) for source in data.sources].index(file) if file.suffix == ".png" else 0]

        return file, read

    return make


def _domain(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        root = pocket_domains.write(folder, next(iter(pocket_domains.DOMAINS)))
        return first(root, damaged), lambda: items(domains.own_folder(root)["test"])

    return make


def _pedestrian(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        root = pocket_pedestrians.write(folder)
        return first(root, damaged), lambda: items(attributes.load("pocket/pedestrians", folder, "trainval"))

    return make


def _video(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        root = pocket_tracking.write(folder)

        def read() -> None:
            video = min(tracking.load("pocket/rgbt", folder, "test"), key=lambda video: video.name)
            for pair in zip(video.visible, video.infrared, strict=True):
                tracking.read_frame(*pair)

        return (root / damaged if damaged == "test.txt" else first(root / "TestingSet", damaged)), read

    return make


def _detected(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        root = pocket_detection.write(folder)
        return first(root, damaged), lambda: items(detection.load("pocket/detection", folder, "test"))

    return make


def _slide_list(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        pocket_slides.write(folder, "place")
        root = pocket_slides.folder(folder, "place")
        return first(root, damaged), lambda: slide_lists.load("pocket/slides-place", folder, "train")

    return make


def slide(folder: Path) -> tuple[Path, Read]:
    path = written(folder / "slide.tiff", drawn())

    def read() -> None:
        with slides.Slide(path) as opened:
            opened.thumbnail(4)
            opened.read(0, 0, 0, *opened.size)

    return path, read


def features(folder: Path) -> tuple[Path, Read]:
    path = slides.extract(written(folder / "slide.tiff", drawn()), mean_colour, folder / "a.h5", tiling=SMALL)
    return path, lambda: slides.read_features(path)


def _chest(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        root = chests.write(folder)

        def read() -> None:
            chests.read(folder, "test")
            items(xrays.load("pocket/chests", folder, "test"))
            items(xrays.reports("pocket/chests", folder).images)

        return first(root, damaged), read

    return make


def picture(folder: Path) -> tuple[Path, Read]:
    path = folder / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    return path, lambda: xrays.read_image(path)


def vocabulary(folder: Path) -> tuple[Path, Read]:
    path = first(chests.write(folder), "wordpiece.json")
    return path, lambda: Vocabulary.read(path)


def statements(folder: Path) -> tuple[Path, Read]:
    path = folder / "statements.json"
    write_json(path, {str(i): "There is no effusion." for i in range(20)})
    return path, lambda: xrays.read_statements(path)


def boxes(folder: Path) -> tuple[Path, Read]:
    path = folder / "video.txt"
    tracking.write_results(path, np.arange(40.0).reshape(10, 4) + 0.123)
    return path, lambda: tracking.read_results(folder, ["video"])


def detections(folder: Path) -> tuple[Path, Read]:
    row = {"image_id": 1, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    write_json(folder / "results.json", [row] * 5)
    return folder / "results.json", lambda: detectors.read_results(folder / "results.json")


def checkpoint(folder: Path) -> tuple[Path, Read]:
    path = folder / "c.pt"

    def run() -> None:
        settings = dict(epochs=1, batch=8, optimizer=adamw(1e-2), hardware=CPU)
        fit(noisy_model(), squared, pairs(), **settings, checkpoint=Checkpoint(path))

    run()
    return path, run


def weights(folder: Path) -> tuple[Path, Read]:
    path = folder / "w.pt"
    torch.save({"model": noisy_model().state_dict()}, path)
    return path, lambda: backbones.read_state(path)


def safe_weights(folder: Path) -> tuple[Path, Read]:
    path = folder / "w.safetensors"
    save_file(noisy_model().state_dict(), path)
    return path, lambda: backbones.read_state(path)


def pickled(folder: Path) -> tuple[Path, Read]:
    import pickle

    path = folder / "a.pkl"
    path.write_bytes(pickle.dumps({"a": list(range(1000)), "b": "text" * 100}))
    return path, lambda: unpickle.load(path)


def record(folder: Path) -> tuple[Path, Read]:
    path = folder / "run.json"
    write_json(path, {"slug": "sa2vp", "seconds": 12.5, "versions": {"torch": "2"}})
    return path, lambda: read_json(path)


def rows(folder: Path) -> tuple[Path, Read]:
    head = "stage,task,method,learning_rate,seed,accuracy,loss,seconds\n"
    (folder / "study.csv").write_text(head + "".join(f"test,t,a,0.1,{i},5.0,1.0,0.1\n" for i in range(9)))
    return folder / "study.csv", lambda: ablations.read(folder)


def _tile(damaged: str) -> Callable[[Path], tuple[Path, Read]]:
    def make(folder: Path) -> tuple[Path, Read]:
        root = pocket_landcover.write(folder)

        def read() -> None:
            data = landcover.load("pocket/landcover", folder, "test")
            data.zones()
            items(data)

        listed = (root / "test.txt").read_text(encoding="utf-8").split()[0]
        return first(root, damaged.format(listed)), read

    return make


def said(folder: Path) -> tuple[Path, Read]:
    torch.manual_seed(1)
    teachers, folder = Teachers({"MAE": dmt_vit("pocket teacher")}), folder / "tokens"
    dmt_cache.build(folder, teachers, dmt_cache.Views(torch.rand(4, 3, 32, 32)), hardware=CPU)
    return folder / "cache.json", lambda: dmt_cache.load(folder, teachers)


def prompts(folder: Path) -> tuple[Path, Read]:
    path = folder / "prompts.yaml"
    path.write_bytes(climate.PROMPTS.read_bytes())
    return path, lambda: climate.Prompts.read(path)


def coco(folder: Path) -> tuple[Path, Read]:
    path = folder / "instances.json"
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    found = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [box],
        "categories": [{"id": 3, "name": "cat"}],
    }
    path.write_text(json.dumps(found), encoding="utf-8")
    return path, lambda: detection.read_annotations(path)


FILES: dict[str, Callable[[Path], tuple[Path, Read]]] = {
    "classification list": _classified("train800.txt"),
    "classification picture": _classified("*.png"),
    "domain list": _domain("split.json"),
    "domain picture": _domain("test-*.png"),
    "attributes of pedestrians": _pedestrian("annotation.mat"),
    "picture of a pedestrian": _pedestrian("*.png"),
    "list of videos": _video("test.txt"),
    "boxes of a video": _video("visible.txt"),
    "frame of a video": _video("*.jpg"),
    "COCO annotations": coco,
    "annotations of scenes": _detected("instances_test.json"),
    "picture of a scene": _detected("test/*.png"),
    "table of slides": _slide_list("train.csv"),
    "list of land cover": _tile("test.txt"),
    "places of land cover": _tile("places.csv"),
    "picture of land cover": _tile("images/{}"),
    "labels of land cover": _tile("labels/{}"),
    "slide": slide,
    "features of a slide": features,
    "list of chests": _chest("test_list.txt"),
    "boxes of chests": _chest("test_boxes.csv"),
    "masks of chests": _chest("test_masks.csv"),
    "reports of chests": _chest("test_reports.csv"),
    "picture of a chest": _chest("*.png"),
    "X-ray": picture,
    "word pieces": vocabulary,
    "distilled reports": statements,
    "boxes of a tracker": boxes,
    "results of a detector": detections,
    "checkpoint of a training": checkpoint,
    "released weights": weights,
    "safetensors": safe_weights,
    "settings of cached teachers": said,
    "pickle": pickled,
    "run record": record,
    "rows of a study": rows,
    "texts of climate zones": prompts,
}

UNSEEN = {
    **dict.fromkeys(
        [
            "classification picture",
            "domain picture",
            "picture of a pedestrian",
            "frame of a video",
            "picture of a scene",
            "picture of a chest",
            "X-ray",
        ],
        "zeros at the end",  # Pillow decodes zeros as pixels, and checks no sum
    ),
    "safetensors": "zeros at the end",  # the format has no sum either
    "list of videos": "cut off",  # a list that ends early is a list
    "texts of climate zones": "cut off",  # YAML that ends early is YAML
}
"""The damage that cannot be seen."""
