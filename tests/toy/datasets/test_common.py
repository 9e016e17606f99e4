"""All synthetic datasets: written once, completely, from a seed; splits share no image and no tile."""

import re
import shutil

import numpy as np
import pytest

from companion.errors import BadParameter
from companion.toy.datasets import (
    chests,
    classification,
    collage,
    detection,
    domains,
    landcover,
    pedestrians,
    restoration,
    scenes,
    slides,
    tracking,
    write_once,
)

SEED = 7
FEW = {"train": 3, "val": 2, "test": 2}
SMALL_TASK = {(classification.Task, "sizes"): property(lambda task: FEW)}
# how a dataset is written (to its folder), and the constants that make it small
WRITERS = {
    "classification": (lambda root, seed: classification.write(root, "textures", seed)[0], SMALL_TASK),
    "chests": (chests.write, {(chests, "COUNTS"): FEW}),
    "collage": (collage.write, {(collage, "COUNTS"): dict.fromkeys(FEW, 30)}),
    "detection": (detection.write, {(detection, "COUNTS"): FEW}),
    "domains": (lambda root, seed: domains.write(root, "medical", seed), {(domains, "EACH"): dict.fromkeys(FEW, 1)}),
    "landcover": (landcover.write, {(landcover, "COUNTS"): FEW}),
    "pedestrians": (pedestrians.write, {(pedestrians, "COUNTS"): FEW}),
    "restoration": (restoration.write, {(restoration, "COUNTS"): {"train": (6, 4), "val": (4, 2), "test": (4, 2)}}),
    "slides": (lambda root, seed: slides.write(root, "place", seed), {(slides, "COUNTS"): FEW}),
    "tracking": (tracking.write, {(tracking, "SEQUENCES"): {"train": 2, "val": 1, "test": 2}}),
}
IMAGES = (".png", ".jpg", ".tif", ".tiff")


@pytest.fixture(scope="module", params=WRITERS)
def write(request):
    """A writer of a small dataset: (root, seed) to its folder."""
    function, constants = WRITERS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in constants.items():
            patch.setattr(module, name, value)
        yield function


@pytest.fixture(scope="module")
def written(write, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    return root, write(root, SEED)


@pytest.fixture
def copied(written, tmp_path):
    root, folder = written
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / folder.relative_to(root)


def contents(folder):
    """Bytes by relative path; a MATLAB file begins with the time of its making."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: data[116 * (path.suffix == ".mat") :] for path, data in files.items()}


def images(folder):
    """The images, without label masks."""
    found = contents(folder)
    return {p.as_posix(): d for p, d in found.items() if p.suffix in IMAGES and not re.search("mask|label", str(p))}


def test_a_finished_dataset_is_left_alone(write, copied):
    root, folder = copied
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write(root, SEED) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "damage", ["no image", "empty image", "no list", "no record", "broken record", "other version"]
)
def test_a_damaged_dataset_is_written_again(write, copied, damage):
    """The same bytes, from the seed."""
    root, folder = copied
    before = contents(folder)
    files = sorted(before, key=str)
    image = next(folder / path for path in files if path.suffix in IMAGES)
    others = (folder / path for path in files if path.suffix not in IMAGES)
    *lists, record = sorted(others, key=lambda path: b'"seed"' in path.read_bytes())
    if damage == "empty image":
        image.write_bytes(b"")
    elif damage == "broken record":
        record.write_text("{")
    elif damage == "other version":
        record.write_text(record.read_text().replace('"version": ', '"version": 1'))
    else:
        (image if damage == "no image" else record if damage == "no record" else [record, *lists][-1]).unlink()
    write(root, SEED)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder], "nothing temporary is left"


def test_another_seed_makes_other_images(write, copied):
    root, folder = copied
    before = images(folder)
    after = images(write(root, SEED + 1))
    changed = [before.get(path) != data for path, data in after.items()]
    assert len(changed) >= 5 and np.mean(changed) > 0.9


def test_no_image_is_in_two_splits(written):
    seen = {}
    for path, data in images(written[1]).items():
        split = (re.search("train|val|test", path.lower()) or [path])[0]
        assert seen.setdefault(data, split) == split, path


def test_a_stopped_writing_leaves_nothing(tmp_path):
    def stop(new):
        (new / "1.png").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_once(tmp_path / "set", {"seed": 0}, 2, stop)
    assert list(tmp_path.iterdir()) == []


DRAWN = {
    "classification": lambda split: [next(iter(classification.examples(t, split))) for t in classification.TASKS],
    "collage": lambda split: collage.collages(4, split),
    "detection": lambda split: detection.scenes(3, split),
    "domains": lambda split: [domains.unlabelled(name, 6, split) for name in domains.DOMAINS],
    "foundation pairs": lambda split: tracking.foundation_pairs(2, 0, split),
    "landcover": lambda split: landcover.pictures("Am", 2, split),
    "pedestrians": lambda split: pedestrians.people(4, split, "clear"),
    "restoration": lambda split: restoration.pictures(split, 0, (2, 4)),
    "scenes": lambda split: scenes.scenes(4, split),
    "slides": lambda split: slides.slides(2, "place", split),
    "tracking": lambda split: tracking.plan(split, 0),
}


@pytest.mark.parametrize("draw", [draw for name, draw in DRAWN.items() if name not in ("foundation pairs", "tracking")])
def test_photographs_are_cut_from_tiles_of_the_split(draw, monkeypatch):
    asked, tiles = [], scenes.tiles

    def spy(name, split):
        asked.append(split)
        return tiles(name, split)

    for module in (scenes, detection, pedestrians, slides):
        monkeypatch.setattr(module, "tiles", spy)
    for split in scenes.SPLITS:
        asked.clear()
        draw(split)
        assert asked and set(asked) == {split}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_an_unknown_split_is_refused_with_the_known_ones(draw):
    with pytest.raises(BadParameter, match=r"Accepted: .*'train', 'val', 'test'"):
        draw("trainval")


@pytest.mark.parametrize(
    "call",
    [
        lambda rng: classification.examples("colour", "train"),
        lambda rng: classification.write("nowhere", ["where", "colour"]),
        lambda rng: detection.scene(rng, "train", place="sea"),
        lambda rng: detection.coverage("star", (3, 3), 2),
        lambda rng: domains.write("nowhere", "radar"),
        lambda rng: domains.unlabelled("radar", 1),
        lambda rng: domains.pattern("remote", 2),
        lambda rng: landcover.pictures("Dfb", 1, "train"),
        lambda rng: pedestrians.people(1, "train", "night"),
        lambda rng: restoration.photograph(rng, "page", "test", 200),
        lambda rng: scenes.photograph("lenna"),
        lambda rng: scenes.tiles("brick", "dev"),
        lambda rng: scenes.scene(rng, "train", shape="star"),
        lambda rng: scenes.scene(rng, "train", hue="blue"),
        lambda rng: slides.draw(rng, "where", 0, "train"),
        lambda rng: slides.draw(rng, "place", 6, "train"),
        lambda rng: slides.write("nowhere", "where"),
        lambda rng: tracking.situations("data", "dev"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadParameter, match="Accepted"):
        call(np.random.default_rng(0))
    assert list(tmp_path.iterdir()) == []
