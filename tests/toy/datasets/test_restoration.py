"""TIP's pocket images: from a seed, kind and contrast independent, splits disjoint, information lost by degradation."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from companion.data import restoration as data
from companion.data.degradations import degrade, parse
from companion.errors import CorruptFile, MissingData
from companion.toy.datasets import restoration as pocket
from companion.toy.datasets import scenes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("pocket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "COUNTS", {"train": (40, 8), "val": (12, 4), "test": (24, 6)})
        pocket.write(path, 3)
        yield path


def test_no_layout_and_no_tile_is_in_two_splits():
    own = {split: set(map(repr, pocket.layouts(split))) for split in scenes.SPLITS}
    assert sum(map(len, own.values())) == len(set.union(*own.values())) == len(pocket._ALL)
    assert all(len(layouts) >= len(pocket._ALL) // 6 for layouts in own.values())


def test_kind_and_contrast_are_drawn_apart():
    found = pocket.pictures("train", 0, (2400, 0))
    counts = Counter((p.kind, p.contrast) for p in found)
    table = np.array([[counts[k, c] for c in pocket.CONTRASTS] for k in pocket.KINDS])
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert (abs(table - expected) < 4 * np.sqrt(expected)).all()
    assert all(p.caption == f"a picture with {p.kind}" for p in found)


@pytest.mark.parametrize("kind", pocket.KINDS)
@pytest.mark.parametrize("contrast", pocket.CONTRASTS)
def test_kind_and_contrast_are_read_off_a_clean_scene(kind, contrast):
    images = np.stack([pocket.paint(layout, kind, contrast) for layout in pocket.layouts("test")])
    clean = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    right = sum(seen == kind for seen in pocket.seen_kind(clean)) / len(clean)
    # where the halves meet is a step, which a very faint texture can be taken for
    assert right == 1 or (contrast == 0.15 and right > 0.8)
    assert (pocket.seen_contrast(clean, (kind,) * len(clean)) - contrast * 2 / 3).abs().mean() < 0.02


def test_a_heavy_degradation_takes_the_texture_and_a_mild_one_makes_contrast_ambiguous():
    found = [p for p in pocket.pictures("test", 0, (200, 0)) if p.contrast == 1.0]
    kinds = tuple(p.kind for p in found)
    clean = torch.from_numpy(np.stack([p.image for p in found])).permute(0, 3, 1, 2).float() / 255
    heavy = torch.stack([degrade(x, pocket.HEAVY, i, edge=pocket.EDGE) for i, x in enumerate(clean)])
    assert pocket.seen_contrast(heavy, kinds).abs().mean() < 0.15 < pocket.seen_contrast(clean, kinds).min()
    blurred = torch.stack([degrade(x, pocket.MILD[0][1], i, edge=pocket.EDGE) for i, x in enumerate(clean)])
    looks = pocket.seen_contrast(blurred, kinds).mean() * 1.5
    assert min(pocket.CONTRASTS) < looks < 0.7, "a strong texture, blurred, looks like a fainter one"
    drawn = [pocket.RECIPE.draw(seed) for seed in range(200)]
    assert {len(ops) for ops in drawn} == {0, 1, 2, 3, 4}
    assert all(parse(data.prompt(ops)) == ops for ops in drawn), "every degradation of the recipe has its text"
    assert {op.value for ops in drawn for op in ops if op.kind == "blur"} == {0.6, 0.9, 1.2}


def test_it_is_read_as_any_folder_of_pictures(root):
    part, own = pocket.read(root, "train"), data.own_folder(root / "pocket" / "restoration" / "train")
    assert len(part) == len(own) == 48 and part.captions == own.captions
    assert all(torch.equal(part[i][0], own[i][0]) for i in range(48))
    assert set(part.scenes().kinds) == set(pocket.KINDS) and len(part.scenes()) == 40
    assert set(part.scenes(0.4).contrasts) == {0.4}
    samples = data.Degraded(part, 16, pocket.RECIPE, fresh=False, share_blind=0.0, seed=1, edge=pocket.EDGE)
    assert samples[3].clean.shape == (3, 16, 16)
    assert data.load("pocket/restoration", root, "val").captions == pocket.read(root, "val").captions


def test_what_is_not_there_or_broken_is_said(root, tmp_path):
    with pytest.raises(MissingData, match="pocket images with captions"):
        pocket.read(tmp_path, "train")
    folder = tmp_path / "pocket" / "restoration" / "val"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "0.png").write_bytes((root / "pocket/restoration/val/images/0000.png").read_bytes())
    (folder / "captions.jsonl").write_text(json.dumps({"file": "0.png", "caption": "a picture"}) + "\n")
    with pytest.raises(CorruptFile, match=r"captions\.jsonl.*kind"):
        pocket.read(tmp_path, "val")
