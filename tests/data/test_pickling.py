"""Datasets and transforms can be pickled, for loaders that spawn processes, as on macOS and in Python 3.14."""

import importlib
import pickle
import pkgutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

import companion
from companion.data import (
    DATASETS,
    attributes,
    classification,
    detection,
    domains,
    fewshot,
    landcover,
    landcover_transforms,
    pretraining,
    restoration,
    slides,
    tracking,
    xrays,
)
from companion.models.dmt import cache, downstream
from companion.models.dmt import recipe as dmt
from companion.models.ecamp.text import Pairs, Vocabulary
from companion.models.hvit import recipe as hvit
from companion.models.metasegnet import recipe as metasegnet
from companion.models.metasegnet.text import Words
from companion.models.sic_cads import recipe as sic_cads
from companion.models.tip import degradations
from companion.models.tip import recipe as tip
from companion.toy.encoders.words import WordText
from companion.training import fit

ROOT, SEEN = Path("data"), SimpleNamespace(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
TRUTH = {
    "images": [{"id": 1, "width": 8, "height": 8, "file_name": "a.jpg"}],
    "categories": [{"id": 3, "name": "a", "frequency": "f"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4]}],
}


def lists(folder: Path) -> list[Dataset]:
    """The lists of masks, boxes and classes of radiographs."""
    turned, riga = xrays.MaskTransform(train=True), DATASETS["fundus/riga"]
    runs = partial(xrays._run_mask, folder, [("a", ["0 5"])])
    masks = (runs, partial(xrays._box_mask, [np.ones((1, 4))]), xrays.Pictures(riga, folder, ["b.png"]).grey)
    found: list[Dataset] = [xrays.Masked(riga, folder, ["a.png"], mask, turned, xrays._disc_and_cup) for mask in masks]
    found.append(xrays.Boxed(riga, folder, ["a.png"], [np.ones((1, 4))], xrays.squeeze_transform()))
    labelled = xrays.Labelled(riga, folder, ["a.png"], torch.zeros(1), xrays.train_transform())
    stacked = xrays._Stacked(riga, folder, np.zeros((1, 8, 8), np.uint8), torch.zeros(1), xrays.test_transform())
    return [*found, labelled, stacked, xrays.Pictures(riga, folder, ["a.png"], xrays.pretrain_transform())]


def datasets(folder: Path) -> list[Dataset]:
    """A dataset of every class, as the recipes make them, with every transform."""
    own, tensors = DATASETS["fgvc/cub200"], TensorDataset(torch.rand(2, 3, 8, 8), torch.arange(2))
    transforms = [classification.resize_transform(SEEN), attributes.square_transform(32, train=True)]
    transforms += [make(SEEN, train=True) for make in (classification.crop_transform, domains.clip_transform)]
    transforms += [downstream.train_transform(32), downstream.test_transform(32)]
    images = [classification.Images(own, ROOT, ["a.jpg"], [0], 1, transform) for transform in transforms]
    boxes = detection.Boxes(own, ROOT, ROOT, TRUTH, [3], [])
    captioned = restoration.Captioned(own, ROOT, ["a.png"], ["a"])
    degraded = degradations.Degraded(captioned, 8, degradations.Recipe())
    picture = landcover.Picture(Path("a.tif"), None, "a")
    land = landcover.LandCover(own, [picture], {"a": (0, 0, 0)}, landcover.earth, transform=metasegnet.test_transform())
    mosaic = landcover_transforms.Mosaic(land, 0.5, ["Cfb"], metasegnet.train_transform(8, 1, brightness=0.25))
    videos = [
        tracking.Sequence("a", (Path("a"),) * 20, (Path("b"),) * 20, np.full((20, 4), 5.0), None, np.zeros(20, bool))
    ]
    item = slides.Item("a", Path("a.tiff"), 0)
    torch.save(torch.zeros(2, 3), folder / "a.pt")
    features = slides.Features([item], folder)
    views = cache.Views(tensors, dmt.augment(8))
    np.save(folder / "0.npy", np.zeros((2, 5, 4), "float16"))
    stored = cache.Cache(views, folder, 1)
    words = Vocabulary.from_words(["a", "b"])
    pairs = Pairs(torch.rand(2, 3, 8, 8), ["a.", "b."], words, patches=196, length=8)
    pairs[0]
    return [
        *images,
        *lists(folder),
        attributes.Pedestrians(own, ROOT, ["a.jpg"], np.zeros((1, 1)), ["a"], ["a"], None),
        classification.InMemory(*tensors.tensors, 2, "a"),
        fewshot.Part(images[0], [0], [0], ["a"]),
        boxes,
        pretraining.Instances(own, ROOT, Path("a.json"), ROOT, TRUTH),
        pretraining.Scenes(own, ROOT, ["a.jpg"], ["a.png"], 2),
        captioned,
        restoration.Pairs(own, ROOT, ["a.png"], ["a"], ["b.png"]),
        degraded,
        tip.Tensors(degraded, SimpleNamespace(tokenizer=None, text_encoder=WordText(["a"]))),
        tip.Generated(1, 8, 0),
        land,
        mosaic,
        metasegnet.Prompted(mosaic, Words.of(["a b"]), ["a b"]),
        tracking.Pairs(videos, 2),
        features,
        hvit.ClassBalanced(features),
        views,
        stored,
        dmt.Augmented(images[0], dmt.augment(8)),
        downstream.Crops(boxes, 8),
        downstream.SceneCrops(tensors, 8),
        pairs,
        sic_cads.Crops(boxes, 8, 0.5),
        sic_cads.Repeated(boxes, np.ones(len(boxes))),
        sic_cads.Turns([boxes], 1),
        fit._Seeded(tensors, 0),
    ]


def classes() -> set[type]:
    """All classes of datasets in the package but the synthetic ones."""
    for module in pkgutil.walk_packages(companion.__path__, "companion."):
        if not module.name.startswith(("companion.toy", "companion.cli")):
            importlib.import_module(module.name)

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    found = {kind for kind in below(Dataset) if kind.__module__.startswith("companion.")}
    return {kind for kind in found if ".toy." not in kind.__module__}


def test_datasets_and_transforms_can_be_sent_to_spawned_processes(tmp_path):
    made = datasets(tmp_path)
    assert {type(one) for one in made} >= classes()
    for one in made:
        sent = pickle.dumps(one)
        assert type(pickle.loads(sent)) is type(one)
        assert len(sent) < 100_000, f"{type(one).__name__}: {len(sent):,} bytes"  # no weights, no caches
