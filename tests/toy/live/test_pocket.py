"""Figures of the notebook about the synthetic datasets: they show the data that the readers and trainings use."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from companion.toy.datasets import chests, classification, detection, domains, pedestrians, scenes
from companion.toy.live import pocket as figures


def shown(figure, title=None):
    """The images of a figure's panels, or of those with a title."""
    return [ax.images[0].get_array() for ax in figure.axes if ax.images and title in (None, ax.get_title())]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_overview_shows_each_papers_dataset():
    figure = figures.overview(0)
    papers = {ax.get_title().split("\n")[0] for ax in figure.axes}
    assert len(figure.axes) == 12 and papers >= {"SA²VP", "DPLQ", "SIC-CADS", "BAT", "PromptPAR", "TIP", "DMT", "H-ViT"}
    assert all(image.std() > 0 for image in shown(figure))
    visible, infrared = shown(figure, "BAT\nvisible stream")[0], shown(figure, "BAT\ninfrared stream")[0]
    assert np.ptp(infrared, axis=-1).max() == 0 < np.ptp(visible, axis=-1).max()  # grey, colour


def test_no_pixel_is_in_two_splits_and_a_fault_is_counted(monkeypatch):
    total, shared, missing = figures.shared_pixels()
    assert total == sum(np.prod(scenes.photograph(name).shape[:2]) for name in scenes.PHOTOGRAPHS)
    assert shared == missing == 0
    tiles = scenes.tiles

    def widened(name, split):
        first, *rest = tiles(name, split)
        return [(first[0], first[1], first[2] + 1, first[3]), *rest] if split == "train" else [first, *rest]

    monkeypatch.setattr(scenes, "tiles", widened)
    assert figures.shared_pixels()[1] > 0


def test_crops_are_framed_inside_tiles_of_their_split():
    figure = figures.tiles(("coffee", "brick"), 0, crops=3)
    for ax, name in zip(figure.axes, ("coffee", "brick"), strict=True):
        frames = [patch for patch in ax.patches if not patch.get_fill()]
        assert len(frames) == 3 * len(scenes.SPLITS)
        for frame, split in zip(frames, np.repeat(scenes.SPLITS, 3), strict=True):
            x, y = frame.get_xy()
            inside = [
                left - 1 <= x and top - 1 <= y and x + frame.get_width() <= right and y + frame.get_height() <= bottom
                for left, top, right, bottom in scenes.tiles(name, split)
            ]
            assert any(inside)


def test_annotations_are_drawn_on_the_images_they_belong_to():
    drawn = scenes.scenes(7, "train", 3)
    with pytest.raises(ValueError):
        figures.captioned(drawn)  # not full rows
    figure = figures.captioned(drawn[:5])
    for ax, scene in zip(figure.axes, drawn[:5], strict=True):
        assert ax.get_title().replace("\n", " ") == scene.caption
        assert ax.patches[0].get_width() == scene.box[2] - scene.box[0]
        np.testing.assert_array_equal(ax.images[0].get_array(), scene.image)
    figure = figures.tasks(0, columns=2)
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == list(classification.TASKS)
    image, label = next(iter(classification.examples("digits", "test", 0)))
    assert figure.axes[4].get_title() == classification.TASKS["digits"].classes[label]
    np.testing.assert_array_equal(figure.axes[4].images[0].get_array(), image)


def test_both_sensors_show_the_same_scene():
    first, second = shown(figures.sensors(1, labels=(3,)))[:2]
    again = domains.picture(np.random.default_rng((1, 3)), next(iter(domains.DOMAINS)), "train", 3, 1)
    assert not np.array_equal(first, second)
    assert any(np.array_equal(image, again) for image in shown(figures.sensors(1, labels=(3,))))


def test_pedestrians_stand_below_their_attributes():
    figure = figures.cameras(2, count=2, named=99)
    _, people = pedestrians.people(2, "test", "street", 2)
    for ax, person in zip(figure.axes[2:], people, strict=True):
        names = [n for n, label in zip(pedestrians.ATTRIBUTES, person.labels, strict=True) if label]
        assert ax.get_title() == ("\n".join(names) or "none")


def test_boxes_of_novel_classes_have_their_colour():
    figure = figures.objects(0)
    rng = np.random.default_rng((0, 8))
    for ax, context in zip(figure.axes, [*detection.PLACES, *detection.PLACES], strict=True):
        scene = detection.scene(rng, "test", place=context)
        novel = [plt.matplotlib.colors.to_hex(patch.get_edgecolor()) == figures.NOVEL.lower() for patch in ax.patches]
        assert novel == [label in detection.NOVEL for label in scene.labels]


def test_pairs_and_crops_have_the_tracker_s_and_dino_s_sizes():
    figure = figures.tracking_pairs(0)
    thermal, search = shown(figure, "template, thermal"), shown(figure, "search crop")[0]
    assert len(shown(figure, "template, RGB")) == 3 and len(thermal) == 2
    assert all(np.ptp(image.astype(int), axis=2).mean() < 4 for image in thermal)
    assert search.shape[0] > thermal[0].shape[0] and all(len(ax.patches) == 1 for ax in figure.axes[5:])
    figure = figures.crops(0)
    assert [image.shape[0] for image in shown(figure)] == [128, 32, 28, 28, 12, 12, 12, 12]
    x, y = figure.axes[0].patches[0].get_xy()
    left, top = round(x + 0.5), round(y + 0.5)
    np.testing.assert_array_equal(
        shown(figure, "region")[0][top : top + 32, left : left + 32], shown(figure, "patch")[0]
    )


def test_findings_are_framed_below_their_report(tmp_path):
    chests.write(tmp_path, 0)
    part = chests.read(tmp_path, "test")
    figure = figures.findings(part)
    for ax, finding in zip(figure.axes, chests.FINDINGS, strict=True):
        assert finding in ax.get_title() and len(ax.patches) == 1


def test_captions_stand_above_the_first_row():
    rows = {"training set": torch.zeros(2, 3, 4, 4), "generated": torch.ones(2, 3, 4, 4) * 2}
    figure = figures.generated(rows, ["stripes of red", "a photograph"])
    assert [ax.get_title() for ax in figure.axes] == ["stripes\nof red", "a photograph", "", ""]
    assert float(shown(figure)[2].max()) == 1  # clamped
