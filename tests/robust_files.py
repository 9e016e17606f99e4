"""A small valid input of each kind, and its reader: for test_robustness.py.

`SINGLE` files are written to a path and read from it, `SETS` to a folder, of which the first file of a name is damaged.
"""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from companion import backbones
from companion.data import DATASETS, attributes, coco, decoding
from companion.data import slides as slide_lists
from companion.data.pyramids import Slide
from companion.evaluation import ablations
from companion.io import unpickle
from companion.io.files import write_json
from companion.models.dmt import Teachers
from companion.models.dmt import build as dmt_vit
from companion.models.dmt import cache as dmt_cache
from companion.models.hvit import features
from companion.training.checkpoints import Checkpoint
from companion.training.hardware import CPU
from tests.data.test_attributes import pa100k
from tests.data.test_pyramids import drawn, written
from tests.models.hvit.test_slides import SMALL, mean_colour
from tests.training.test_fit import noisy_model, run

Do = Callable[[Path], object]


def read_slide(path: Path) -> None:
    with Slide(path) as opened:
        opened.thumbnail(4)
        opened.read(0, 0, 0, *opened.size)


def extract(path: Path) -> None:
    features.extract(written(path.with_name("slide.tiff"), drawn()), mean_colour, path, tiling=SMALL, encoder="mean")


def train(path: Path) -> None:
    run(noisy_model(), epochs=1, checkpoint=Checkpoint(path))


def teachers() -> Teachers:
    torch.manual_seed(1)
    return Teachers({"MAE": dmt_vit("pocket teacher")})


def cache(folder: Path) -> None:
    dmt_cache.fill(folder / "tokens", teachers(), dmt_cache.Views(torch.rand(4, 3, 32, 32)), hardware=CPU)


def write_rows(path: Path) -> None:
    head = "stage,task,method,learning_rate,seed,accuracy,loss,seconds\n"
    path.write_text(head + "".join(f"test,t,a,0.1,{i},5.0,1.0,0.1\n" for i in range(9)))


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}],
    "categories": [{"id": 3, "name": "cat"}],
}
PICKLED = {"a": list(range(1000)), "b": "text" * 100}
SINGLE: dict[str, tuple[str, Do, Do]] = {
    "COCO annotations": ("instances.json", lambda p: write_json(p, COCO), coco.read_annotations),
    "slide": ("slide.tiff", lambda p: written(p, drawn()), read_slide),
    "features of a slide": ("a.h5", extract, slide_lists.read_features),
    "X-ray": ("a.png", lambda p: Image.fromarray(NOISE).save(p), decoding.unit),
    "checkpoint of a training": ("c.pt", train, train),
    "safetensors": ("w.safetensors", lambda p: save_file(noisy_model().state_dict(), p), backbones.read_state),
    "pickle": ("a.pkl", lambda p: p.write_bytes(pickle.dumps(PICKLED)), unpickle.load),
    "rows of a study": ("study.csv", write_rows, lambda p: ablations.read(p.parent)),
}
FEW = dataclasses.replace(DATASETS["par/pa100k"], sizes={})
SETS: dict[str, tuple[str, Do, Do]] = {
    "attributes of pedestrians": ("annotation.mat", pa100k, lambda f: attributes._pedestrians(FEW, f, None)),
    "settings of cached teachers": ("cache.json", cache, cache),
}
FILES = [*SINGLE, *SETS]


def made(name: str, folder: Path) -> tuple[Path, Callable[[], object]]:
    """The file to damage, and what reads it."""
    file, write, read = (SINGLE | SETS)[name]
    where = folder / file if name in SINGLE else folder
    write(where)
    return min(folder.rglob(file)), lambda: read(where)


UNSEEN = dict.fromkeys(["X-ray", "safetensors"], "zeros at the end")
"""The damage that cannot be seen: Pillow decodes zeros as pixels, and checks no sum; nor does safetensors."""
