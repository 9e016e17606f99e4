"""The pocket slides: the grade follows from the image, splits share no crop, tiling finds the regions."""

import numpy as np
import pytest

from companion.data import slides as reader
from companion.slides import Slide, tile
from companion.toy.datasets import slides as pocket

SEED = 7


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "COUNTS", {"train": 12, "val": 6, "test": 6})
        yield


@pytest.fixture(scope="module", params=pocket.TASKS)
def written(request, small, tmp_path_factory):
    return pocket.write(tmp_path_factory.mktemp("slides"), request.param, SEED)


@pytest.mark.parametrize("grade", range(pocket.GRADES))
def test_the_place_gives_the_grade_and_the_count_does_not(grade):
    rng = np.random.default_rng(grade)
    counts = set()
    for _ in range(60):
        cells = pocket.arrangement(rng, "place", grade)
        assert sum(map(pocket.is_core, cells)) == grade
        tumour, benign = ((cells == kind).sum(1) for kind in (pocket.TUMOUR, pocket.BENIGN))
        assert set(tumour) <= {0, 4} and set(benign) == {4}
        for region in cells:
            inner = (region.reshape(4, 4)[1:3, 1:3] == pocket.TUMOUR).sum()
            assert inner in ((3,) if pocket.is_core(region) else (0,))
        counts.add(int(tumour.sum()))
    assert len(counts) == pocket.REGIONS - grade + 1, "as many rim regions as there is room for"


@pytest.mark.parametrize("grade", range(pocket.GRADES))
def test_the_count_gives_the_grade_and_the_place_does_not(grade):
    rng = np.random.default_rng(grade)
    drawn = [pocket.arrangement(rng, "count", grade) for _ in range(300)]
    counts = {int((cells == pocket.TUMOUR).sum()) for cells in drawn}
    assert counts == ({4 * grade - 1, 4 * grade, 4 * grade + 1} if grade else {0})
    if grade:
        share = np.mean([cells == pocket.TUMOUR for cells in drawn], (0, 1))
        assert share.std() < 0.2 * share.mean()


def test_a_bag_knows_little_of_the_place():
    """The best prediction from the number of tumour patches alone, compared with the number of core regions."""
    rng = np.random.default_rng(0)
    grades = np.arange(600) % 6
    counts = np.array([(pocket.arrangement(rng, "place", g) == pocket.TUMOUR).sum() for g in grades.tolist()])
    apart = [grades[counts == c].std() for c in np.unique(counts)]
    assert np.corrcoef(grades, counts)[0, 1] ** 2 < 0.5 and max(apart) > 1


@pytest.mark.parametrize("task", pocket.TASKS)
def test_a_slide_is_tissue_between_white_margins(task):
    slide = pocket.draw(np.random.default_rng(3), task, 2, "train")
    assert slide.image.shape[:2] == slide.labels.shape and slide.image.dtype == np.uint8
    glass = slide.labels == 0
    assert (slide.image[glass] == pocket.GLASS).all() and glass[:32].all() and glass[:, -32:].all()
    for (x, y), cells in zip(slide.corners, slide.cells, strict=True):
        for index, kind in enumerate(cells):
            row, column = (32 * i for i in divmod(index, 4))
            said = set(slide.labels[y + row :, x + column :][:32, :32].ravel().tolist())
            assert said <= {0, pocket.STROMA, kind} and kind in said
    # walls of tumour are the darkest thing there is
    light = {kind: slide.image[slide.labels == kind].mean() for kind in (pocket.STROMA, pocket.BENIGN, pocket.TUMOUR)}
    assert light[pocket.TUMOUR] < light[pocket.STROMA]


def test_tiling_by_spacing_finds_the_regions_that_were_drawn(written):
    drawn = pocket.drawn_cells(written)
    assert len(drawn) == 24
    for name, regions in drawn.items():
        with Slide(written / "train_images" / f"{name}.tiff") as slide:
            assert slide.mpp == pytest.approx(pocket.MPP, rel=1e-3) and len(slide.levels) == 2
            found = tile(slide, pocket.TILING)
            assert sorted(map(tuple, found.coords.tolist())) == sorted(regions)
            x, y = found.coords[0]
            pixels = slide.region(x, y, found)
        assert pixels.shape == (128, 128, 3)
        with Slide(written / "train_label_masks" / f"{name}_mask.tiff") as mask:
            labels = mask.read(0, 0, 0, *mask.levels[0])[..., 0] == pocket.TUMOUR
        for (x, y), cells in regions.items():
            there = labels[y : y + 128, x : x + 128].reshape(4, 32, 4, 32).any((1, 3)).ravel()
            assert there.tolist() == [kind == pocket.TUMOUR for kind in cells]


def test_the_reader_of_panda_reads_them(written):
    name, root = f"pocket/{written.name}", written.parent.parent
    assert len(reader.load(name, root)) == 24 and reader.status(reader.find(name), root).state == "present"
    splits = {split: reader.load(name, root, split) for split in reader.SPLITS}
    grades = [sorted(item.grade for item in items) for items in splits.values()]
    assert grades == [sorted([*range(6)] * times) for times in (2, 1, 1)]
    drawn = pocket.drawn_cells(written)
    for item in splits["train"]:
        cells = np.array(list(drawn[item.name].values()))
        cores, tumour = sum(map(pocket.is_core, cells)), int((cells == pocket.TUMOUR).sum())
        assert item.grade == (cores if "place" in name else round(tumour / 4)) and item.mask.is_file()
