"""Crops of BAT, those that the authors' code cuts, and the pairs that it trains on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from companion.data.tracking import Video
from companion.errors import BadParameter, CompanionError
from companion.io.files import read_json
from companion.models.bat import crops
from companion.models.bat.crops import Pairs, crop
from tests.data.conftest import refused
from tests.parity import fill

PARITY = Path(__file__).parents[2] / "parity" / "bat"
BOXES = [[4, 3, 8, 6], [5, 3, 8, 6], [0, 0, 0, 0], [7, 4, 8, 6]]
STREAMS = {"visible": "v{:03d}.png", "infrared": "i{:03d}.png"}
CROPS = read_json(PARITY / "crops" / "case.json")["about"]


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    """The image of the recorded crops, uint8 (180, 240, 6)."""
    coarse = np.clip(fill.values("input:frame0", (15, 20, 6), 0) * 40 + 110, 0, 255)
    return np.floor(coarse.repeat(12, 0).repeat(12, 1)).astype(np.uint8)


@pytest.mark.parametrize("index", range(len(CROPS["crops"])))
def test_crops_are_the_authors(frame, index):
    facts = CROPS["crops"][index]
    recorded = load_file(PARITY / "crops" / "outputs.safetensors")[f"crop{index // 2}_{facts['size']}"]
    patch, scale = crop(frame, facts["box"], facts["factor"], facts["size"])
    assert patch.dtype == np.uint8 and patch.shape == (facts["size"], facts["size"], 6)
    assert np.abs(patch[::8, ::8].astype(int) - recorded).max() <= 1
    assert scale == pytest.approx(facts["resize_factor"], abs=1e-12)
    x, y, w, h = facts["box"]
    inside = crops.box_in_crop(facts["box"], [x + 3, y - 2, w, h], scale, facts["size"])
    np.testing.assert_allclose(inside, facts["box_in_crop_of_box_shifted_by_+3_-2"], atol=1e-6)


@pytest.mark.parametrize("facts", CROPS["clip_box"])
def test_clipping_is_the_authors(facts):
    assert crops.clip_box(facts["box"], facts["H"], facts["W"], facts["margin"]).tolist() == facts["out"]


def test_boxes_of_crops_and_images(frame):
    one = crops.normalise(frame)
    assert torch.equal(crops.normalise(torch.from_numpy(frame).permute(2, 0, 1).expand(3, -1, -1, -1))[1], one)
    assert crops.box_from_crop([0.5, 0.5, 0.25, 0.25], [10, 20, 6, 4], 2, 128).tolist() == [5, 14, 16, 16]
    for box in ([5, 5, 0, 10], [5, 5, 10, -1], [float("nan"), 5, 4, 4], [500, 500, 10, 10]):
        refused(BadParameter, "box", crop, frame, box, 2, 32)


class Painted(Video):
    """A video without files: noise, with a white object in its box."""

    def frame(self, index: int) -> np.ndarray:
        image = np.random.default_rng(index).integers(0, 99, (120, 160, 6), dtype=np.uint8)
        image[40:56, 50:74] = 250
        return image


def test_pairs_depend_on_the_random_state_alone():
    paths, boxes = (Path("x"),) * 25, np.tile([50.0, 40, 24, 16], (25, 1))
    pairs = Pairs([Painted("a", paths, paths, boxes, None, np.zeros(25, bool))], 5, template=(2, 32), search=(4, 64))
    torch.manual_seed(3)
    first = pairs[0]
    torch.manual_seed(3)
    again, other = pairs[4], pairs[0]
    assert [tuple(t.shape) for t in first] == [(6, 32, 32), (6, 64, 64), (4,)] and len(list(pairs)) == 5
    assert all(map(torch.equal, first, again)) and not torch.equal(first[2], other[2])
    drawn = pairs.draw(7, 20).tensors
    assert all(map(torch.equal, pairs.draw(7, 20).tensors, drawn))
    assert drawn[1].dtype == torch.uint8 and (drawn[0][:, :, 16, 16] >= 200).all()
    outside = dataclasses.replace(pairs.sequences[0], boxes=boxes + 400)
    refused(CompanionError, "'a'", Pairs([outside], 1).draw, 0, 1)


def test_a_pair_is_a_shown_frame_and_a_later_one_of_a_video_that_is_long_enough(monkeypatch):
    """Fewer than `max_gap` frames apart; frames without the object, or with a small box, are never read."""
    read: list[tuple[str, int]] = []
    paint = Painted.frame
    monkeypatch.setattr(Painted, "frame", lambda self, i: read.append((self.name, i)) or paint(self, i))

    def video(name, frames, side=24.0, absent=()):
        hidden = np.isin(np.arange(frames), absent)
        return Painted(name, (), (), np.tile([50.0, 40, side, 16], (frames, 1)), None, hidden)

    hidden = range(40, 80)
    videos = [video("long", 120, absent=hidden), video("short", 19), video("rare", 30, absent=range(4, 30))]
    videos += [video("small", 40, 5), video("other", 40, 6)]
    Pairs(videos, 1, template=(2, 32), search=(4, 64), max_gap=30, min_side=5).draw(0, 100)
    pairs = list(zip(read[::2], read[1::2], strict=True))
    assert {name for name, _ in read} == {"long", "other"} and all(a[0] == b[0] for a, b in pairs)
    gaps = np.array([later - earlier for (_, earlier), (_, later) in pairs])
    assert gaps.min() > 0 and 20 < gaps.max() < 30
    assert not {index for name, index in read if name == "long"} & set(hidden)
