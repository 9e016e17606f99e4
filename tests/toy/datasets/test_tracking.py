"""The pocket RGB-thermal videos: content, no shortcut to the target, and layout on disk."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from companion.data import tracking as reader
from companion.errors import CorruptFile, MissingData
from companion.toy.datasets import scenes, tracking

# replaces a generator: no noise
SILENCE = SimpleNamespace(standard_normal=lambda shape, dtype: np.zeros(shape, dtype))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tracking.write(root)
    return root


@pytest.fixture(scope="module")
def plans():
    """Every video of seed 0, by split."""
    return {split: [tracking.plan(split, index) for index in range(n)] for split, n in tracking.SEQUENCES.items()}


@pytest.mark.parametrize("stream", ["visible", "infrared"])
def test_the_boxes_cover_the_things(plans, stream):
    """What changes in the image when a thing is left out fills its box and does not leave it."""
    draw = {"visible": tracking.draw_visible, "infrared": tracking.draw_infrared}[stream]
    for video in plans["train"][:12]:
        for thing in range(3):
            alone = replace(video, order=(thing,))
            for frame in (0, 2):  # both streams are clear there
                with_it = draw(alone, frame, SILENCE).astype(int)
                changed = abs(with_it - draw(replace(video, order=()), frame, SILENCE)).max(-1)
                x, y, w, h = video.boxes(stream, thing)[frame]
                rows, columns = np.nonzero(changed > 3)
                assert x - 2.5 <= columns.min() and columns.max() + 1 <= x + w + 2.5
                assert y - 2.5 <= rows.min() and rows.max() + 1 <= y + h + 2.5
                # a surface may happen to look like what is behind it, but not all over
                assert columns.max() + 1 - columns.min() > 0.7 * w and rows.max() + 1 - rows.min() > 0.7 * h


def test_the_target_stays_inside_and_within_the_search_window(plans):
    for video in (video for videos in plans.values() for video in videos):
        for stream in ("visible", "infrared"):
            boxes = video.boxes(stream)
            assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= tracking.CANVAS).all()
            side = np.sqrt(boxes[:, 2:].prod(1))
            assert side.min() >= 12 and side.max() <= 22
            centres = boxes[:, :2] + boxes[:, 2:] / 2
            step = abs(np.diff(centres, axis=0))
            assert np.hypot(*step.T).max() <= 6
            # a search window of factor 4 around the box before holds the whole target
            assert (step + boxes[1:, 2:] / 2 <= 2 * side[:-1, None]).all()
        assert abs(video.boxes("visible") - video.boxes("infrared")).max() <= 1
        far = [np.linalg.norm(video.centres[:, a] - video.centres[:, b], axis=1) for a, b in ((0, 1), (1, 2), (0, 2))]
        assert np.min(far) >= tracking.APART
    # in most frames both distractors lie where a tracker looks, in the search window around the target
    shown = []
    for video in plans["train"]:
        reach = 2 * np.sqrt(video.boxes()[:, 2:].prod(1))
        shown.append((abs(video.centres - video.centres[:, [video.target]]).max((1, 2)) < reach).mean())
    assert np.mean(shown) > 0.6


def test_every_video_starts_well_lit_and_situations_are_balanced(plans):
    for videos in plans.values():
        counts = Counter(word for video in videos for word in video.situation[tracking.OPENING :])
        assert counts["conjunction"] == counts["crossover"] == 2 * counts["dark"] == 2 * counts["glare"] > 0
        assert sum(counts.values()) == len(videos) * (tracking.FRAMES - tracking.OPENING)
        for video in videos:
            assert set(video.situation[: tracking.OPENING]) < {"clear", "conjunction"}
            assert video.dark[0] == video.glare[0] == video.crossover[0] == 0
            assert len(set(video.situation[tracking.OPENING :])) == 2  # the stream to trust changes


def test_a_situation_comes_in_within_two_frames(plans):
    for video in plans["test"]:
        for word in ("dark", "glare", "crossover"):
            weight, rules = getattr(video, word), np.array([w == word for w in video.situation])
            assert (np.rint(weight) == rules).all()
            edges = np.flatnonzero(np.diff(rules))  # the last frames before a change
            between = sorted({*edges.tolist(), *(edges + 1).tolist()})
            assert np.flatnonzero((weight > 0) & (weight < 1)).tolist() == between


def test_only_the_right_stream_names_the_target(plans):
    """Of the three things, take the one that looks most like the target of frame 0: in which stream is it the target?

    Given every box, only the mean colour inside decides; what moves where does not.
    """
    hits = {"visible": {}, "infrared": {}, "both": {}}
    for index, video in enumerate(plans["test"]):
        first = None
        for frame, pair in enumerate(tracking.frames("test", index)):
            seen = {}
            for stream, image in zip(("visible", "infrared"), pair, strict=True):
                for thing in range(3):
                    x, y, w, h = video.boxes(stream, thing)[frame]
                    inside = image[int(y + 0.3 * h) : int(y + 0.7 * h), int(x + 0.3 * w) : int(x + 0.7 * w)]
                    seen[stream, thing] = inside.mean((0, 1))
            first = first or {stream: seen[stream, video.target] for stream in ("visible", "infrared")}
            weights = (video.dark[frame], video.glare[frame], video.crossover[frame])
            if frame == 0 or any(0 < weight < 1 for weight in weights):
                continue
            far = {s: np.array([np.linalg.norm(seen[s, t] - first[s]) for t in range(3)]) for s in first}
            far["both"] = np.linalg.norm([far["visible"], far["infrared"]], axis=0)
            for stream, distance in far.items():
                hits[stream].setdefault(video.situation[frame], []).append(distance.argmin() == video.target)
    rates = {stream: {word: np.mean(found) for word, found in by.items()} for stream, by in hits.items()}
    sure = {"visible": ["clear", "crossover"], "infrared": ["clear", "dark", "glare"], "both": ["conjunction"]}
    blind = {"visible": ["conjunction", "dark", "glare"], "infrared": ["conjunction", "crossover"]}
    assert all(rates[stream][word] > 0.9 for stream, words in sure.items() for word in words), rates
    assert all(rates[stream][word] < 0.6 for stream, words in blind.items() for word in words), rates


def test_in_a_conjunction_each_distractor_shares_one_half_with_the_target(plans):
    for video in (video for videos in plans.values() for video in videos):
        target = video.things[video.target]
        others = [thing for number, thing in enumerate(video.things) if number != video.target]
        same_look = [np.array_equal(thing.surface, target.surface) for thing in others]
        same_heat = [thing.temperature == target.temperature for thing in others]
        if "conjunction" in video.situation:
            assert sorted(same_look) == sorted(same_heat) == [False, True] and same_look != same_heat
            assert len({thing.shape for thing in video.things}) == 1
        else:
            assert not any(same_look) and not any(same_heat)
        # where the visible stream is blind, the target's temperature is its own
        for frame in np.flatnonzero((video.dark == 1) | (video.glare == 1)):
            gaps = np.delete(abs(video.heat[frame] - video.heat[frame, video.target]), video.target)
            assert gaps.min() > 0.3


def test_sizes_paths_and_order_do_not_tell_the_target():
    videos = [tracking.plan("train", index, seed=5) for index in range(600)]
    rank = Counter(video.order.index(video.target) for video in videos)
    place = Counter(video.target for video in videos)
    for counts in (rank, place):
        assert all(abs(counts[number] - 200) < 4 * np.sqrt(600 * 2 / 9) for number in range(3)), counts

    def features(video):
        side = np.log(video.sizes).mean((0, 2))
        aspect = np.log(video.sizes[..., 0] / video.sizes[..., 1]).mean(0)
        growth = np.log(video.sizes[-1] / video.sizes[0]).mean(-1)
        speed = np.linalg.norm(np.diff(video.centres, axis=0), axis=-1).mean(0)
        off_middle = np.linalg.norm(video.centres - tracking.CANVAS / 2, axis=-1).mean(0)
        off_group = np.linalg.norm(video.centres - video.centres.mean(1, keepdims=True), axis=-1).mean(0)
        return np.stack([side, aspect, growth, speed, off_middle, off_group])  # (6, 3)

    table = np.stack([features(video) for video in videos])
    target = np.array([video.target for video in videos])
    deviation = table - table.mean(2, keepdims=True)  # from the three things' mean, within a video
    own = np.take_along_axis(deviation, target[:, None, None], 2)[..., 0]
    for difference in (own, own**2 - (deviation**2).mean(2)):  # neither larger or smaller, nor more or less extreme
        error = difference.std(0) / np.sqrt(len(videos))
        assert (abs(difference.mean(0)) < 4 * error).all(), difference.mean(0) / error
    assert np.ptp(table[:, 1].mean(1)) > 0.4  # the law itself is not degenerate: videos differ in aspect


def test_splits_share_no_tile(plans):
    for split, videos in plans.items():
        for video in videos:
            for cut in (video.background, *(thing.cut for thing in video.things)):
                left, top, right, bottom = cut.box
                inside = [
                    tile[0] <= left and tile[1] <= top and right <= tile[2] and bottom <= tile[3]
                    for tile in scenes.tiles(cut.photograph, split)
                ]
                assert sum(inside) == 1 and right > left and bottom > top


@pytest.fixture(scope="module")
def pairs():
    return tracking.foundation_pairs(300, seed=1)


def test_foundation_pairs_show_one_clear_stream(pairs):
    templates, searches, boxes = pairs
    assert templates.shape == (300, 3, 32, 32) and searches.shape == (300, 3, 64, 64) and boxes.shape == (300, 4)
    assert templates.dtype == searches.dtype == np.uint8 and boxes.dtype == np.float32
    grey = [(image == image[:1]).all() for image in templates]
    assert grey == [(image == image[:1]).all() for image in searches]  # both crops are of one stream
    assert abs(np.mean(grey) - 1 / 3) < 4 * np.sqrt(2 / 9 / 300)
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    assert (middle > 0).all() and (middle < 1).all() and np.ptp(middle, axis=0).min() > 0.6
    side = np.sqrt(boxes[:, 2:].prod(1))
    assert side.min() > 0.1 and side.max() < 0.6  # a quarter of the crop but for the jitter
    first, again, other = (tracking.foundation_pairs(4, seed, "val") for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_a_foundation_box_holds_the_target(pairs):
    """What is in the box looks like the middle of the template, and not like the next pair's."""
    templates, searches, boxes = pairs
    inner = templates[:, :, 10:22, 10:22].astype(float)
    own, other = [], []
    for row, box in enumerate(boxes * 64):
        x, y, w, h = box[0] + box[2] / 5, box[1] + box[3] / 5, box[2] * 0.6, box[3] * 0.6
        if min(x, y) < 0 or max(x + w, y + h) > 64:
            continue
        patch = searches[row].transpose(1, 2, 0)[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))]
        patch = cv2.resize(patch, (12, 12), interpolation=cv2.INTER_AREA).transpose(2, 0, 1).mean((1, 2))
        own.append(np.linalg.norm(patch - inner[row].mean((1, 2))))
        other.append(np.linalg.norm(patch - inner[(row + 1) % len(inner)].mean((1, 2))))
    assert len(own) > 200 and np.mean(np.array(own) < other) > 0.9 and np.median(own) < 0.1 * np.median(other)


def test_drawing_only_what_a_crop_shows_changes_nothing():
    for index in range(12):
        video = tracking.plan("train", index)
        for draw, stream in ((tracking.draw_visible, "visible"), (tracking.draw_infrared, "infrared")):
            for factor, size in ((2, 32), (4, 64)):
                box = video.boxes(stream)[9] + [7 * (index % 5 - 2), 5 * (index % 3 - 1), 0, 0]
                part, scale = tracking._seen(video, 9, SILENCE, draw, box, factor, size)
                whole, same = reader.crop(draw(video, 9, SILENCE), box, factor, size)
                assert scale == same and abs(part.astype(int) - whole).max() <= 1  # rounding of the last bit


def test_the_reader_reads_the_videos(written, plans):
    for split, count in {**tracking.SEQUENCES, "trainval": 72}.items():
        videos = reader.load("pocket/rgbt", written, split)
        assert len(videos) == count and all(len(video) == tracking.FRAMES for video in videos)
        assert not any(video.absent.any() for video in videos)
    for video, known in zip(reader.load("pocket/rgbt", written, "test"), plans["test"], strict=True):
        assert video.name == known.name
        assert abs(video.boxes - known.boxes("visible")).max() < 0.006
        assert abs(video.boxes_infrared - known.boxes("infrared")).max() < 0.006
        assert video.attributes == set(known.situation) - {"clear"}
    assert len(reader.load("pocket/rgbt", written, "test", attribute="dark")) == 12
    assert len(reader.load("pocket/rgbt", written, "train", attribute="crossover")) == 30
    found = {split: tracking.situations(written, split) for split in (*plans, "trainval")}
    assert all(found[split] == {v.name: list(v.situation) for v in videos} for split, videos in plans.items())
    assert found["trainval"] == found["train"] | found["val"]


def test_the_files_hold_the_frames(written, plans):
    folder = written / "pocket" / "rgbt"
    names = {split: (folder / f"{split}.txt").read_text().split() for split in tracking.SEQUENCES}
    assert names == {split: [video.name for video in videos] for split, videos in plans.items()}
    assert len({name for part in names.values() for name in part}) == sum(tracking.SEQUENCES.values())
    assert sorted(path.name for path in (folder / "TestingSet").iterdir()) == sorted(names["test"])
    sequence = folder / "TestingSet" / names["test"][0]
    for number, pair in enumerate(tracking.frames("test", 0)):
        for stream, pixels in zip(("visible", "infrared"), pair, strict=True):
            with Image.open(sequence / stream / f"{number:06d}.jpg") as image:
                assert image.size == (128, 128) and image.mode == "RGB"
                assert abs(np.asarray(image).astype(int) - pixels).mean() < 6
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 40e6


def test_situations_that_are_not_there_or_damaged_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SEQUENCES", {"train": 2, "val": 1, "test": 2})
    with pytest.raises(MissingData, match=r"train\.txt"):
        tracking.situations(tmp_path, "train")
    folder = tracking.write(tmp_path)
    path = next(folder.glob("TestingSet/*/situation.txt"))
    path.write_text("clear\nfog\n")
    with pytest.raises(CorruptFile, match="24 words") as caught:
        tracking.situations(tmp_path, "test")
    assert caught.value.path == path
